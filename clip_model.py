"""CLIP written out: both image towers, text tower, public weights, tokenizer, images, prompts.

    clip, tokenizer = load_clip("ViT-L/14"), Tokenizer(load_merges())
    image_features = clip.encode_image(preprocess(images, clip.visual.input_resolution))  # (B, D)
    text_features = class_features(clip, tokenizer, class_names, templates)  # (K, M, D)

Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision (arXiv
2103.00020). Parameter names, initialisation and vocabulary are those of github.com/openai/CLIP.
"""

import gzip
import html
import math
import textwrap
import zlib
from collections import OrderedDict
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn

from support import checkpoints, clip_layout, clip_weights, files


# Transformer: the text tower, and the body of the ViT ---------------------------------------------
def count_heads(width, head_width=64):
    """The heads of a tower, which its tensors do not tell; OpenAI's are all 64 wide. Raises
    ValueError for a width that is no multiple."""
    if width % head_width:
        raise ValueError(f"a width of {width} does not divide into heads of {head_width}; a config "
                         "beside the weights can say how many heads there are")
    return width // head_width


class Attention(nn.Module):
    """Multi-head self-attention with the parameters of nn.MultiheadAttention. Causal: a position
    sees itself and those before it."""

    def __init__(self, width, heads, causal):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads, self.causal = heads, causal
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


ACTIVATIONS = dict(zip(clip_layout.ACTIVATIONS, (QuickGELU, nn.GELU)))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads, causal, activation="quickgelu", hidden=None):
        super().__init__()
        hidden = hidden or 4 * width
        self.attn = Attention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, hidden), gelu=ACTIVATIONS[activation](),
            c_proj=nn.Linear(hidden, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


def transformer(layers, *block):
    """(B, L, width) to the same: blocks, each of these arguments."""
    blocks = [ResidualAttentionBlock(*block) for _ in range(layers)]
    return nn.Sequential(OrderedDict(resblocks=nn.Sequential(*blocks)))


# Image tower: ViT ---------------------------------------------------------------------------------
# open_clip's ViT-H, g and bigG: {width: (that of a head, that of the MLP)}
GIANTS = {1280: (80, 5120), 1408: (88, 6144), 1664: (104, 8192)}


class VisionTransformer(nn.Module):
    def __init__(self, input_resolution, patch_size, width, layers, embed_dim, heads=None,
                 activation="quickgelu"):
        super().__init__()
        head_width, hidden = GIANTS.get(width, (64, 4 * width))
        self.input_resolution = input_resolution
        length = 1 + (input_resolution // patch_size) ** 2  # the class token and the patches
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(length, width))
        self.ln_pre = nn.LayerNorm(width)
        heads = heads or count_heads(width, head_width)
        self.transformer = transformer(layers, width, heads, False, activation, hidden)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)  # (B, 1 + patches, width)
        x = self.transformer(x)
        x = self.ln_post(x[:, 0])  # (B, width), of the class token alone
        return x @ self.proj  # (B, D)


# Image tower: ModifiedResNet ----------------------------------------------------------------------
class Bottleneck(nn.Module):
    """A ResNet's, but an average pooling, not a stride, makes the image smaller."""

    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)  # at first a block is its shortcut
        self.downsample = nn.Identity()
        if channels != 4 * planes:
            conv = nn.Conv2d(channels, 4 * planes, 1, bias=False)
            self.downsample = nn.Sequential(OrderedDict(
                [("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", nn.BatchNorm2d(4 * planes))]))

    def forward(self, x):  # (B, channels, H, W)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))  # (B, 4 planes, H / stride, W / stride)
        return F.relu(out + self.downsample(x))


class AttentionPool(nn.Module):
    """One attention layer whose only query is the mean of the positions."""

    def __init__(self, side, width, embed_dim):
        super().__init__()
        self.heads = count_heads(width)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(side**2 + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, side * side, width)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)  # (B, 1 or L, width)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, width / heads)
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
        self.to(memory_format=torch.channels_last)  # faster convolutions

    def stage(self, channels, planes, depth, stride):
        blocks = [Bottleneck(channels, planes, stride)]
        blocks += [Bottleneck(4 * planes, planes, stride=1) for _ in range(depth - 1)]
        return nn.Sequential(*blocks)

    def forward(self, images):
        x = images.contiguous(memory_format=torch.channels_last)
        x = F.relu(self.bn1(self.conv1(x)))  # (B, width / 2, H / 2, W / 2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))  # (B, width, H / 2, W / 2)
        x = self.layer1(F.avg_pool2d(x, 2))  # (B, 4 width, H / 4, W / 4)
        x = self.layer2(x)  # (B, 8 width, H / 8, W / 8)
        x = self.layer3(x)  # (B, 16 width, H / 16, W / 16)
        x = self.layer4(x)  # (B, 32 width, H / 32, W / 32)
        return self.attnpool(x)  # (B, D)


# CLIP ---------------------------------------------------------------------------------------------
class CLIP(nn.Module):
    """Image and text towers with OpenAI's parameter names and initialisation.

    `vision_layers` is a number of blocks (ViT) or four of them (ModifiedResNet, with patch size
    None). Heads are 64 wide where their number is None, but see GIANTS. `activation`: one of
    ACTIVATIONS. `logit_scale` is the natural logarithm of the factor on the cosines.
    """

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
        width, layers = transformer_width, transformer_layers
        heads = transformer_heads or count_heads(width)
        self.transformer = transformer(layers, width, heads, True, activation)
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
        """Float images (B, 3, H, W), as `preprocess` makes them, to features (B, D), not of unit
        length. Raises ValueError unless H and W are `visual.input_resolution`."""
        side = self.visual.input_resolution
        if images.shape[1:] != (3, side, side) or not images.is_floating_point():
            raise ValueError(f"encode_image takes float (B, 3, {side}, {side}) from preprocess, "
                             f"found {images.dtype} {tuple(images.shape)}")
        return self.visual(images)

    def encode_text(self, tokens):
        """Token ids (B, L), int64, as `Tokenizer` makes them, to features (B, D), not of unit
        length. Raises ValueError where L is more than `context_length`."""
        if tokens.ndim != 2 or tokens.shape[1] > self.context_length:
            raise ValueError(f"encode_text takes ids (B, up to {self.context_length}), found "
                             f"{tuple(tokens.shape)}")
        end = tokens.argmax(dim=1)  # (B,): the end token has the largest id
        L = int(end.max()) + 1  # what stands behind the end has no influence
        x = self.token_embedding(tokens[:, :L]) + self.positional_embedding[:L]  # (B, L, width)
        x = self.transformer(x)
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end])  # (B, width)
        return x @ self.text_projection  # (B, D)


# Weights ------------------------------------------------------------------------------------------
def build_clip(state_dict, said=None):
    """CLIP from tensors in OpenAI's layout, all sizes read from their shapes: float32, eval mode,
    copies throughout. said: arguments of CLIP by name, of which heads and activation, which shapes
    do not tell, are taken, and the others must agree. Raises ValueError where they do not, for an
    image tower of unknown kind, and for a tensor that is missing, unknown or of a wrong shape."""
    state, said = {}, said or {}
    for name, tensor in state_dict.items():
        if name not in clip_layout.ARCHIVE:
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            state[name] = tensor.to(dtype, copy=True)
    with torch.device("meta"):  # shapes only: the tensors themselves are assigned
        clip = CLIP(**{"transformer_heads": None, **said, **clip_layout.read_sizes(state, said)})
    try:
        clip.load_state_dict(state, assign=True)
    except RuntimeError as error:  # names all that does not fit, on many lines
        raise ValueError(textwrap.shorten(f"no CLIP in OpenAI's layout: {error}", 400)) from None
    if isinstance(clip.visual, ModifiedResNet):
        clip.visual.to(memory_format=torch.channels_last)
    return clip.eval()


def load_clip(name_or_path, cache_dir=None, activation=None):
    """CLIP by what `clip_weights.find` takes, such as a public name or a file: float32, eval mode,
    on the CPU. activation: one of ACTIVATIONS; None: see `clip_layout.find_activation`. Raises
    FileNotFoundError for a missing file, or one that cannot be downloaded; ValueError for an
    unknown name, and a file not wholly a CLIP."""
    path, said = clip_weights.find(str(name_or_path), cache_dir)
    tensors = checkpoints.read_state_dict(path)
    try:
        state = clip_layout.to_openai_layout(tensors)
        activation = clip_layout.find_activation(path, state, said, activation)
        return build_clip(state, {**said, "activation": activation})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# Tokenizer ----------------------------------------------------------------------------------------
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = regex.compile(  # a digit stands alone, letters and signs do not mix
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE)
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are their own letter
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]  # their letters: from 256 on
LETTERS = dict(zip(PRINTABLE + OTHERS, map(chr, PRINTABLE + list(range(256, 324)))))  # as in GPT-2


class Tokenizer:
    """CLIP's lower-case byte-pair encoding; the ids are those of OpenAI's tokenizer.

    The vocabulary is 256 bytes, the same 256 at the end of a word, the merges, (left, right) in
    order of priority, then start and end: without merges a byte-level tokenizer of 514 ids.
    """

    def __init__(self, merges=()):
        letters, merges = list(LETTERS.values()), [tuple(pair) for pair in merges]
        tokens = letters + [letter + "</w>" for letter in letters] + ["".join(p) for p in merges]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.tokens = [*tokens, START, END]
        self.priority = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end, self.vocab_size = len(tokens), len(tokens) + 1, len(tokens) + 2
        self.cache = {START: [self.start], END: [self.end]}  # word: ids

    def encode_word(self, word):
        """Ids of one word: the two neighbours that come first among the merges become one part,
        again and again, until no two neighbours are a merge."""
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

    def decode(self, ids):
        """Ids to text, as OpenAI's: a space ends each word, some around punctuation are new."""
        byte_of = {letter: byte for byte, letter in LETTERS.items()}
        text = "".join(self.tokens[int(i)] for i in ids).replace("</w>", " ")
        data = b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in text)
        return data.decode("utf-8", errors="replace").strip()

    def __call__(self, texts, context_length, truncate=False):
        """One text or B of them to (B, context_length) int64: start, ids, end, zeros. A text that
        is too long raises ValueError or, with `truncate`, is cut as OpenAI's cuts it."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > context_length and not truncate:
                raise ValueError(f"{len(ids)} tokens, over the context length {context_length}: "
                                 f"{text[:80]!r}")
            ids = ids[: context_length - 1] + ids[-1:] if len(ids) > context_length else ids
            row[: len(ids)] = torch.tensor(ids)
        return tokens


NUM_MERGES = 49152 - 256 - 2  # CLIP uses the first 48,894 of the 262,144 in the file


def load_merges(path=None, cache_dir=None):
    """The merges of a BPE file, plain or .gz, as (left, right) symbols; without a path the public
    one's, downloaded once to `files.cache_folder(cache_dir)`. Raises ValueError for another kind of
    file, FileNotFoundError where there is none."""
    path = clip_weights.fetch_bpe(cache_dir) if path is None else path
    data = Path(path).read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        lines = data.decode("utf-8").split("\n")
        lines = lines[1:] if "#version" in lines[0] else lines
        pairs = [line.split() for line in lines[:NUM_MERGES] if line.strip()]
        return [(left, right) for left, right in pairs]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: no BPE file, two symbols a line, or .gz: {error}") from None


# Images -------------------------------------------------------------------------------------------
def resize_axis(x, axis, size, kept):
    """The middle `kept` of the `size` lines to which Pillow's antialiased bicubic resizes an axis
    of uint8 (B, 3, H, W). Its weights are integers in units of 2**-22, and it rounds half up, once
    an axis; float64 holds the sums exactly."""
    length, start = x.shape[axis], round((size - kept) / 2)
    if size == length:
        return x.narrow(axis, start, kept)
    scale = length / size
    stretch = max(scale, 1.0)  # antialiasing: the kernel widens where the image shrinks
    line = torch.arange(start, start + kept, dtype=torch.float64)[:, None]
    pixel = torch.arange(length)
    centre = (line + 0.5) * scale  # (kept, 1)
    first, last = ((centre + side * stretch + 0.5).long() for side in (-2, 2))
    t = ((pixel - centre + 0.5) / stretch).abs()  # (kept, length)
    cubic = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2)
    weights = cubic * ((t < 2) & (pixel >= first) & (pixel < last))
    weights = weights / weights.sum(dim=1, keepdim=True) * 2**22
    weights = (weights + 0.5 * weights.sign()).trunc().to(x.device) / 2**22
    x = x.double() @ weights.T if axis == 3 else weights @ x.double()
    return x.add_(0.5).clamp_(0, 255).to(torch.uint8)


def preprocess(images, resolution):
    """CLIP's image transform: RGB uint8 (B, 3, H, W) to normalised float32 (B, 3, resolution,
    resolution), on the images' device: the shorter side is resized, with Pillow's grey levels, and
    the centre cropped. Raises ValueError for other images."""
    x = images
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape[2:]:
        raise ValueError(f"preprocess takes uint8 (B, 3, H, W), found {x.dtype} {tuple(x.shape)}")
    H, W = x.shape[2:]
    height, width = (int(resolution * side / min(H, W)) for side in (H, W))
    axes = [(3, width), (2, height)]
    if H - height > max(0, 2 * (W - width)):  # then Pillow, from version 13 on, turns the order
        axes.reverse()
    for axis, size in axes:
        x = resize_axis(x, axis, size, resolution)
    mean, std = (255 * torch.tensor(value, device=x.device)[:, None, None]
                 for value in (clip_layout.MEAN, clip_layout.STD))
    return (x.float() - mean) / std


# Prompts ------------------------------------------------------------------------------------------
def load_templates(path):
    """The prompt templates of a file: one a line, `{}` for the class name; empty lines and `#`
    comments are skipped, a second copy is said. Raises ValueError for a line without `{}`, and for
    a file without any."""
    lines = [line.strip() for line in files.read_text(path).splitlines()]
    templates = {n: line for n, line in enumerate(lines, 1) if line and not line.startswith("#")}
    for number, template in (templates or {1: ""}).items():
        if "{}" not in template:
            raise ValueError(f"{path}:{number}: expected a template with {{}} for the class name, "
                             f"found {template[:80]!r}")
        if lines.index(template) < number - 1:
            files.note(f"{path}:{number}: {template[:80]!r} is there again, and counts twice")
    return list(templates.values())


def prompt_names(class_names, tokenizer):
    """K class names as prompts have them: spaces for underscores, of a comma list the first; but
    classes that have its token ids in common take their next name that no other has. Classes that
    even so cannot be told apart, and names that are no words, are said."""
    names = [[" ".join(part.split()) for part in name.replace("_", " ").split(",") if part.strip()]
             or [""] for name in class_names]
    ids = [[tuple(tokenizer.encode(part)) for part in parts] for parts in names]
    place, before = [0] * len(ids), None  # which of its names a class has
    while place != before:
        before, classes = list(place), {}  # classes: {token ids: who has them}
        for k, each in enumerate(ids):
            classes.setdefault(each[place[k]], []).append(k)
        shared = [same for same in classes.values() if len(same) > 1]
        for same in shared:
            for k in same:
                taken = {each[i] for each, i in zip(ids, place)}
                taken = taken.union(*(ids[j] for j in same if j != k))
                free = (i for i in range(place[k], len(ids[k])) if ids[k][i] not in taken)
                place[k] = next(free, place[k])
    found = [parts[i] for parts, i in zip(names, place)]
    advice = "name the classes, one a line, by --class-names FILE"
    if shared:
        pairs = "; ".join(f"{class_names[i]!r} and {class_names[j]!r}" for i, j, *_ in shared[:3])
        files.note("CLIP cannot tell classes apart that have the same prompt, "
                   f"{len(shared)} times: {pairs}; {advice}")
    codes = [name for name in found if regex.fullmatch(r"n\d{8}|\d+", name)]
    if codes:
        files.note(f"{len(codes)} of {len(found)} class names are no words: CLIP is asked for 'a "
                   f"photo of a {codes[0]}'; put words.txt (id<tab>name) or LOC_synset_mapping.txt "
                   f"beside train/, or {advice}")
    return found


@torch.no_grad()
def class_features(clip, tokenizer, class_names, templates, batch_size=256, progress=None):
    """Text features (K, M, D), float32, each of unit length, of K class names in M templates.

    `progress(done, total)` follows each batch of prompts. Raises ValueError for a prompt that is
    too long and for another CLIP's tokenizer.
    """
    if tokenizer.vocab_size != clip.vocab_size:
        raise ValueError(f"{tokenizer.vocab_size} token ids, this CLIP has {clip.vocab_size}: "
                         "another BPE file")
    prompts = [template.replace("{}", name)
               for name in prompt_names(class_names, tokenizer) for template in templates]
    tokens = tokenizer(prompts, clip.context_length).to(clip.logit_scale.device)  # (K M, L)
    features = []
    for batch in tokens.split(batch_size):
        features.append(F.normalize(clip.encode_text(batch).float(), dim=1))
        if progress:
            progress(sum(map(len, features)), len(tokens))
    return torch.cat(features).view(len(class_names), len(templates), -1)
