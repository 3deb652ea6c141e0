"""CLIP written out: both image towers, text tower, weights, tokenizer, images, prompts.

    clip = load_clip("ViT-L/14")
    tokenizer = Tokenizer(load_merges("bpe_simple_vocab_16e6.txt.gz"))
    image_features = clip.encode_image(preprocess(images, clip.visual.input_resolution))  # (B, D)
    text_features = class_features(clip, tokenizer, class_names, templates)  # (K, M, D)

Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision (arXiv
2103.00020). Parameter names, initialisation and vocabulary are those of github.com/openai/CLIP.
Only `load_clip` needs this project's other files; for the rest, this one can be copied alone."""

import ftfy
import gzip
import html
import math
import regex
import torch
import torch.nn.functional as F
import warnings
from collections import Counter, OrderedDict
from pathlib import Path
from torch import nn

class Attention(nn.Module):
    """Multi-head self-attention with the parameters of nn.MultiheadAttention. Causal: a position
    sees itself and those before it. Heads are 64 wide, as OpenAI's, where no number is given."""
    def __init__(self, width, heads, causal):
        super().__init__()
        if width % (heads or 64):
            raise ValueError(f"a width of {width} does not divide by {heads or 64}: see its config")
        self.heads, self.causal = heads or width // 64, causal
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x):
        B, L, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3 width)
        qkv = qkv.view(B, L, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, width / heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, L, width)

class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid_(1.702 * x)  # in place of the product, which nothing else needs

ACTIVATIONS = {"quickgelu": QuickGELU, "gelu": nn.GELU}  # OpenAI's; most of open_clip's own

class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads, causal, activation, hidden):
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, hidden), gelu=ACTIVATIONS[activation](),
            c_proj=nn.Linear(hidden, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

def transformer(layers, *block):
    """(B, L, width) to the same: blocks, each of these arguments."""
    blocks = [ResidualAttentionBlock(*block) for _ in range(layers)]
    return nn.Sequential(OrderedDict(resblocks=nn.Sequential(*blocks)))

# open_clip's ViT-H, g and bigG, whose heads are 80, 88 and 104 wide: {width: (heads, MLP's width)}
GIANTS = {1280: (16, 5120), 1408: (16, 6144), 1664: (16, 8192)}

class VisionTransformer(nn.Module):
    def __init__(self, input_resolution, patch_size, width, layers, embed_dim, heads, activation):
        super().__init__()
        known, hidden = GIANTS.get(width, (None, 4 * width))
        self.input_resolution = input_resolution
        length = 1 + (input_resolution // patch_size) ** 2  # the class token and the patches
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(length, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = transformer(layers, width, heads or known, False, activation, hidden)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)  # (B, 1 + patches, width)
        x = self.transformer(x)
        x = self.ln_post(x[:, 0])  # (B, width), of the class token alone
        return x @ self.proj  # (B, D)

class Bottleneck(nn.Module):
    """A ResNet's, but an average pooling, not a stride, makes the image smaller."""
    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)  # at first a block is its shortcut
        self.downsample = nn.Identity()
        if channels != 4 * planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes))

    def forward(self, x):  # (B, channels, H, W)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))  # (B, 4 planes, H / stride, W / stride)
        return F.relu(out + self.downsample(self.avgpool(x)))

class AttentionPool(nn.Module):
    """One attention layer, of heads 64 wide, whose only query is the mean of the positions."""
    def __init__(self, side, width, embed_dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(side**2 + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, side * side, width)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)  # (B, 1 or L, width)
        q, k, v = (t.unflatten(2, (-1, 64)).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, 64)
        return self.c_proj(x.flatten(1))  # (B, D)

class ModifiedResNet(nn.Module):
    def __init__(self, input_resolution, width, layers, embed_dim):
        super().__init__()
        self.input_resolution = input_resolution
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = self.stage(width, width, layers[0], stride=1)
        self.layer2 = self.stage(4 * width, 2 * width, layers[1], stride=2)
        self.layer3 = self.stage(8 * width, 4 * width, layers[2], stride=2)
        self.layer4 = self.stage(16 * width, 8 * width, layers[3], stride=2)
        self.attnpool = AttentionPool(input_resolution // 32, 32 * width, embed_dim)

    def stage(self, channels, planes, depth, stride):
        return nn.Sequential(Bottleneck(channels, planes, stride),
                             *(Bottleneck(4 * planes, planes, 1) for _ in range(depth - 1)))

    def forward(self, images):
        x = images.contiguous(memory_format=torch.channels_last)  # faster convolutions
        x = F.relu(self.bn1(self.conv1(x)))  # (B, width / 2, H / 2, W / 2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))  # (B, width, H / 2, W / 2)
        x = self.layer1(F.avg_pool2d(x, 2))  # (B, 4 width, H / 4, W / 4)
        x = self.layer4(self.layer3(self.layer2(x)))  # (B, 32 width, H / 32, W / 32)
        return self.attnpool(x)  # (B, D)

class CLIP(nn.Module):
    """Image and text towers, with OpenAI's names and initialisation. vision_layers: a number of
    blocks (ViT), or four (ModifiedResNet, patch size None). Heads are 64 wide where their number is
    None, but see GIANTS. `logit_scale` is the natural logarithm of the factor on the cosines."""
    def __init__(self, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_heads,
                 transformer_layers, vision_heads=None, activation="quickgelu"):
        super().__init__()
        self.embed_dim, self.context_length, self.vocab_size = embed_dim, context_length, vocab_size
        if isinstance(vision_layers, int):
            self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width,
                                            vision_layers, embed_dim, vision_heads, activation)
        else:
            self.visual = ModifiedResNet(image_resolution, vision_width, vision_layers, embed_dim)
        width, layers, heads = transformer_width, transformer_layers, transformer_heads
        self.transformer = transformer(layers, width, heads, True, activation, 4 * width)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)

    def encode_image(self, images):
        """Images of `preprocess`, else ValueError, to features (B, D), not of unit length."""
        side = self.visual.input_resolution
        if images.shape[2:] != (side, side):  # a few pixels more would pass the convolutions
            raise ValueError(f"expected (B, 3, {side}, {side}), found {tuple(images.shape)}")
        return self.visual(images)

    def encode_text(self, tokens):
        """Token ids int64 (B, L) of `Tokenizer` to features (B, D), not of unit length."""
        end = tokens.argmax(dim=1)  # (B,): the end token has the largest id
        L = int(end.max()) + 1  # what stands behind the end has no influence
        x = self.token_embedding(tokens[:, :L]) + self.positional_embedding[:L]  # (B, L, width)
        x = self.transformer(x)[torch.arange(len(x), device=x.device), end]  # (B, width)
        return self.ln_final(x) @ self.text_projection  # (B, D)

def read_sizes(state):
    """The arguments of CLIP that the shapes of its tensors, in OpenAI's layout, tell."""
    def count(prefix):  # of blocks; at least 1, so that load_state_dict names what is missing
        return len({name.removeprefix(prefix).split(".")[0]
                    for name in state if name.startswith(prefix)}) or 1
    if "visual.proj" in state:
        vision_width, _, _, patch = state["visual.conv1.weight"].shape
        vision_layers = count("visual.transformer.resblocks.")
        positions, unit = len(state["visual.positional_embedding"]), patch
    else:  # a ModifiedResNet, which makes images 32 times smaller
        vision_width, patch = len(state["visual.layer1.0.conv1.weight"]), None
        vision_layers = [count(f"visual.layer{number}.") for number in (1, 2, 3, 4)]
        positions, unit = len(state["visual.attnpool.positional_embedding"]), 32
    context_length, width = state["positional_embedding"].shape
    return {"embed_dim": state["text_projection"].size(1), "vision_layers": vision_layers,
            "image_resolution": unit * math.isqrt(positions - 1),  # the first one is no place
            "vision_width": vision_width, "vision_patch_size": patch,
            "context_length": context_length, "vocab_size": len(state["token_embedding.weight"]),
            "transformer_width": width, "transformer_heads": None,
            "transformer_layers": count("transformer.resblocks.")}

def build_clip(state_dict: dict, said: dict | None = None) -> CLIP:
    """CLIP from tensors in OpenAI's layout: float32, eval mode, copies. said: arguments that
    they do not tell, heads and activation above all. ValueError: one is missing or does not fit."""
    integers = ("input_resolution", "context_length", "vocab_size")  # beside OpenAI's weights
    state = {name: tensor.clone() for name, tensor in state_dict.items() if name not in integers}
    try:
        with torch.device("meta"):  # shapes only: the tensors themselves are assigned
            clip = CLIP(**{**read_sizes(state), **(said or {})})
        clip.load_state_dict(state, assign=True)
    except (LookupError, ArithmeticError, TypeError, RuntimeError) as error:  # maybe of many lines
        raise ValueError("expected a CLIP in OpenAI's layout; missing, unknown, or not as the rest "
                         f"and a config have it: {' '.join(str(error).split())[:400]}") from None
    return clip.float().eval()

def load_clip(name_or_path, cache_dir=None, activation=None) -> CLIP:
    """`build_clip` of a public name, a file, what `support.clip_files.find` takes; else OSError or
    ValueError. activation: of ACTIVATIONS; None: the file's own, else QuickGELU, which is said."""
    from support import clip_files
    path, state, said = clip_files.load(name_or_path, cache_dir, activation)
    try:
        return build_clip(state, said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

WORDS = regex.compile(  # a digit stands alone, letters and signs do not mix
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE)
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are their own letter
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]  # their letters: from 256 on
LETTERS = dict(zip(PRINTABLE + OTHERS, map(chr, PRINTABLE + list(range(256, 324)))))  # as in GPT-2

class Tokenizer:
    """CLIP's lower-case byte-pair encoding. Ids are OpenAI's: 256 bytes, these at a word's end, the
    merges (left, right) in order of priority, start and end: without merges, 514.
    >>> Tokenizer()(["ab", "a b"], 5)
    tensor([[512,  64, 321, 513,   0],
            [512, 320, 321, 513,   0]])"""
    def __init__(self, merges=()):
        letters, merges = list(LETTERS.values()), list(merges)
        tokens = letters + [letter + "</w>" for letter in letters] + list(map("".join, merges))
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.priority = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end, self.vocab_size = len(tokens), len(tokens) + 1, len(tokens) + 2
        self.cache = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}  # word: ids

    def encode_word(self, word):
        """Ids of one word: again and again the two neighbours first among the merges are joined."""
        parts = [LETTERS[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            order = [self.priority.get(pair, math.inf) for pair in zip(parts, parts[1:])]
            if min(order) == math.inf:
                break
            i = order.index(min(order))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]

    def encode(self, text):
        """Ids of a text, without start and end: mojibake is repaired, HTML unescaped twice."""
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip().lower()
        ids = []
        for word in WORDS.findall(text):
            if word not in self.cache:
                self.cache[word] = self.encode_word(word)
            ids += self.cache[word]
        return ids

    def __call__(self, texts: str | list[str], context_length: int) -> torch.Tensor:
        """One text or B to (B, context_length) int64: start, ids, end, zeros; else ValueError."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > context_length:
                raise ValueError(f"{len(ids)} tokens, more than {context_length}: {text[:60]!r}")
            row[: len(ids)] = torch.tensor(ids)
        return tokens

def load_merges(path) -> list[tuple[str, str]]:
    """The merges (left, right), by priority, of a BPE file, plain or .gz; else ValueError."""
    data = Path(path).read_bytes()
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        lines = [line for line in text.split("\n") if line.strip() and "#version" not in line]
        # Of the file's 262,144, CLIP uses so many: its 49,408 ids without 512 bytes, start and end.
        return [(left, right) for left, right in map(str.split, lines[:48894])]
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{path}: no BPE file, two symbols a line, or .gz: {error}") from None

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's

def preprocess(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """RGB uint8 (B, 3, H, W), else ValueError, to normalised float32 (B, 3, resolution, resolution)
    on the same device, as CLIP does: the shorter side is resized, the centre cropped.
    >>> preprocess(torch.zeros(2, 3, 32, 48, dtype=torch.uint8), 224).shape
    torch.Size([2, 3, 224, 224])"""
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or images.ndim != 4 or shape[1] != 3 or 0 in shape[2:]:
        raise ValueError(f"preprocess takes uint8 (B, 3, H, W), found {images.dtype} {shape}")
    height, width = (int(resolution * side / min(shape[2:])) for side in shape[2:])
    # Pillow's bicubic, but for one level here and there. It rounds and clips between its two
    # passes; torch does so for uint8 on a CPU, not for floats nor on a GPU.
    x = F.interpolate(images.cpu(), (height, width), mode="bicubic", antialias=True)
    top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    x = x[:, :, top : top + resolution, left : left + resolution].to(images.device)
    mean, std = (255 * torch.tensor(value, device=x.device)[:, None, None] for value in (MEAN, STD))
    return x.float().sub_(mean).div_(std)

# A line of a program or a list: a quote, bullet or index first, brackets, a comma or index last.
NO_NAME = regex.compile(r"^['\"`\u2018\u201c\u2022|*]|^-\s|^\d+\s*[.:)]\s|['\"]\s*[,:)]|[][{}<>]"
                        r"|\s#\s|[,;:=(]$|:\s+\d+$")

def load_lines(path, holding="") -> list[str]:
    """The names or, holding "{}" once, templates of a file, one a line, but for empty ones and `#`
    comments. ValueError: no UTF-8, no line, one without `holding`, a program, a numbered list."""
    try:
        text = Path(path).read_text("utf-8-sig")  # with or without the mark that Windows writes
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected text in UTF-8; save it as that") from None
    lines = [line for line in map(str.strip, text.splitlines()) if line and line[0] != "#"]
    for line in lines or [""]:
        numbered = holding and regex.search(r"^\d+\s*[,;|=\t]|[,;|=\t]\s*\d+$", line)
        if numbered or line.count("{}") != bool(holding) or NO_NAME.search(line.replace("{}", "")):
            raise ValueError(f"{path}: expected one name or template a line, with {{}} in templates"
                             f", without a program's quotes and indices; found {line[:80]!r}")
    return lines

def load_templates(path) -> list[str]:
    """The templates of a file, `{}` for the class name, by `load_lines`; a second copy is said."""
    templates = load_lines(path, "{}")
    twice = [template for template, copies in Counter(templates).items() if copies > 1]
    if twice:
        warnings.warn(f"{path}: {twice[0]!r} is there again, and counts again", stacklevel=2)
    return templates

# Names are parted where goldFish, gold-fish, gold.fish are; iPhone, T-shirt and A340-600 are not.
JOINT = r"(?<=\p{L}\p{Ll})(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll}{2})|(?<=\p{L}{2})[-.~=]+(?=\p{L})"
CODE = r"(?:[a-z]|(?i:class)\W?)?\d+"  # a number, or an id such as WordNet's n01443537

def in_words(class_names: list[str]) -> list[str]:
    """K class names of folders as words: `_`, `+` and %20 are spaces; where all K stay different,
    codes before or behind all come off, and all are parted at JOINT if none has a space then."""
    plain = [" ".join(name.replace("_", " ").split()) for name in class_names]
    names = [regex.sub(r"%20|(?<=\w)\+(?=\w)", " ", name) for name in plain]
    places = "|".join(map(str, range(len(names) + 1)))  # not the number of a Boeing 747
    before = rf"^\W*({CODE}\W+)+(?=\p{{L}})"
    behind = rf"(?<=\p{{L}}\W*)(\W+(n\d{{8}}|0*({places})))+\W*$"
    for every, pattern, by in ((before, before, ""), (behind, behind, ""), (r"^\S+$", JOINT, " ")):
        if all(regex.search(every, name) for name in names):
            new = [regex.sub(pattern, by, name) for name in names]
            if 1 < len({*map(str.lower, new)}) == len({*map(str.lower, names)}):
                names = new
    changed = [k for k, name in enumerate(names) if name != plain[k]]
    if changed:
        warnings.warn(f"{len(changed)} of {len(names)} class names are put in words for CLIP: "
                      f"{names[changed[0]]!r} for {class_names[changed[0]]!r}", stacklevel=3)
    return names

def prompt_names(class_names: list[str], tokenizer: Tokenizer) -> list[str]:
    """K class names as prompts have them: `in_words`, of a comma list the first one; where to CLIP
    another class's first one is the same, the first that no other class has at all. Names whose
    prompts are equal even so, and names that are no words, are said."""
    lists = [[part.strip() for part in words.split(",") if part.strip()] or [name]
             for name, words in zip(class_names, in_words(class_names))]
    ids = {name: tuple(tokenizer.encode(name)) for names in lists for name in names}
    first = Counter(ids[names[0]] for names in lists)
    anywhere = Counter(each for names in lists for each in {ids[name] for name in names})
    found = [next((name for name in names if anywhere[ids[name]] == 1), names[0])
             if first[ids[names[0]]] > 1 else names[0] for names in lists]
    uses = Counter(ids[name] for name in found)
    unclear = [name for name in found if uses[ids[name]] > 1 or regex.fullmatch(CODE, name)]
    if unclear:
        warnings.warn(f"{len(unclear)} of {len(found)} class names, equal or codes, tell CLIP "
                      f"nothing: {', '.join(unclear[:5])}; see --class-names", stacklevel=2)
    return found

@torch.no_grad()
def class_features(clip, tokenizer, class_names, templates, batch_size=256,
                   progress=lambda done: None):
    """Text features (K, M, D), float32, each of unit length, of K class names in M templates.
    progress(prompts done) follows each batch of them. Raises ValueError for a prompt that is too
    long, a template without {}, a string for a list, and another CLIP's tokenizer."""
    bare = [template for template in templates or [""] if "{}" not in template]
    if isinstance(class_names, str) or not len(class_names) or bare:
        raise ValueError("expected a list of names and a list of templates with {}, found "
                         f"{str(class_names)[:40]!r} and {str(templates)[:40]!r}")
    if tokenizer.vocab_size != clip.vocab_size:
        raise ValueError(f"{tokenizer.vocab_size} token ids, CLIP has {clip.vocab_size}: other BPE")
    prompts = [template.replace("{}", name)
               for name in prompt_names(class_names, tokenizer) for template in templates]
    tokens = tokenizer(prompts, clip.context_length).to(clip.logit_scale.device)  # (K M, L)
    features = []
    for batch in tokens.split(batch_size):
        features.append(F.normalize(clip.encode_text(batch).float(), dim=1))
        progress(sum(map(len, features)))
    return torch.cat(features).view(len(class_names), len(templates), -1)
