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

import checkpoints
import checkpoints
import files


# Transformer: the text tower, and the body of the ViT ---------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention with the parameters of nn.MultiheadAttention."""

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


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads, causal):
        super().__init__()
        self.attn = Attention(width, heads, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


def transformer(width, layers, heads, causal):
    """(B, L, width) to the same. Causal: a position sees itself and those before it."""
    blocks = [ResidualAttentionBlock(width, heads, causal) for _ in range(layers)]
    return nn.Sequential(OrderedDict(resblocks=nn.Sequential(*blocks)))


# Image tower: ViT ---------------------------------------------------------------------------------
class VisionTransformer(nn.Module):
    def __init__(self, input_resolution, patch_size, width, layers, embed_dim):
        super().__init__()
        self.input_resolution = input_resolution
        length = 1 + (input_resolution // patch_size) ** 2  # the class token and the patches
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(length, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = transformer(width, layers, heads=width // 64, causal=False)
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
        self.heads = width // 64
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
    None). `logit_scale` is the natural logarithm of the factor on the cosines.
    """

    def __init__(self, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_heads,
                 transformer_layers):
        super().__init__()
        self.embed_dim, self.context_length, self.vocab_size = embed_dim, context_length, vocab_size
        if isinstance(vision_layers, int):
            self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width,
                                            vision_layers, embed_dim)
        else:
            self.visual = ModifiedResNet(image_resolution, vision_width, vision_layers, embed_dim)
        width, layers = transformer_width, transformer_layers
        self.transformer = transformer(width, layers, transformer_heads, causal=True)
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
def build_clip(state_dict):
    """CLIP from tensors in OpenAI's layout, all sizes read from their shapes: float32, eval mode,
    copies throughout. Raises ValueError for an image tower of unknown kind and for a tensor that is
    missing, unknown or of a wrong shape."""
    state = {}
    for name, tensor in state_dict.items():
        if name not in ("input_resolution", "context_length", "vocab_size"):  # in OpenAI's archives
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            state[name] = tensor.to(dtype, copy=True)

    def shape(name, dims):
        if name not in state or state[name].ndim != dims or 0 in state[name].shape:
            raise ValueError(f"no CLIP in OpenAI's layout: no {dims}-dimensional tensor {name!r}")
        return state[name].shape

    def count(prefix):  # of blocks; at least 1, so that load_state_dict names what is missing
        names = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
        return max(1, len({name.split(".")[0] for name in names}))

    if "visual.proj" in state:
        vision_width, _, _, patch = shape("visual.conv1.weight", 4)
        vision_layers = count("visual.transformer.resblocks.")
        resolution = patch * math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
    elif "visual.layer1.0.conv1.weight" in state:
        vision_width, patch = shape("visual.layer1.0.conv1.weight", 4)[0], None
        vision_layers = [count(f"visual.layer{number}.") for number in (1, 2, 3, 4)]
        resolution = 32 * math.isqrt(shape("visual.attnpool.positional_embedding", 2)[0] - 1)
    else:
        raise ValueError("a vision tower of unknown kind: neither OpenAI's ViT ('visual.proj') nor "
                         "its ModifiedResNet")
    context_length, width = shape("positional_embedding", 2)
    vocab_size, embed_dim = shape("token_embedding.weight", 2)[0], shape("text_projection", 2)[1]
    with torch.device("meta"):  # shapes only: the tensors themselves are assigned
        clip = CLIP(embed_dim, resolution, vision_layers, vision_width, patch, context_length,
                    vocab_size, width, width // 64, count("transformer.resblocks."))
    try:
        clip.load_state_dict(state, assign=True)
    except RuntimeError as error:  # names all that does not fit, on many lines
        raise ValueError(textwrap.shorten(f"no CLIP in OpenAI's layout: {error}", 400)) from None
    if isinstance(clip.visual, ModifiedResNet):
        clip.visual.to(memory_format=torch.channels_last)
    return clip.eval()


# OpenAI's storage, and what stands before it: the address in its own code, which often fails.
HOSTS = ("https://openaipublic.blob.core.windows.net/clip",
         "https://openaipublic.azureedge.net/clip")
PUBLIC_CLIPS = {  # name: SHA-256 (openai/CLIP, clip/clip.py)
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def load_clip(name_or_path, cache_dir=None):
    """CLIP from a public name, downloaded once to `files.cache_folder(cache_dir)`, or from a file:
    float32, eval mode, on the CPU. Raises FileNotFoundError for a missing file, or one that cannot
    be downloaded; ValueError for an unknown name, and a file not wholly CLIP in OpenAI's layout."""
    name, path = str(name_or_path), Path(name_or_path)
    if name in PUBLIC_CLIPS:
        digest, file = PUBLIC_CLIPS[name], name.replace("/", "-").replace("@", "-") + ".pt"
        urls = [f"{host}/models/{digest}/{file}" for host in HOSTS]
        path = files.cache_folder(cache_dir) / file
        files.fetch(urls, path, f"sha256:{digest}", "pass --clip PATH")
    elif not path.exists():
        kind = FileNotFoundError if path.suffix else ValueError
        raise kind(f"{name!r} is neither a file nor a public CLIP; these are "
                   f"{', '.join(PUBLIC_CLIPS)}")
    tensors = checkpoints.read_state_dict(path)
    try:
        return build_clip(tensors)
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


BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BPE_DIGEST = "sha256:924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
BPE_URLS = (f"https://raw.githubusercontent.com/openai/CLIP/main/clip/{BPE_FILE}",
            f"{HOSTS[0]}/{BPE_FILE}")
NUM_MERGES = 49152 - 256 - 2  # CLIP uses the first 48,894 of the 262,144 in the file


def load_merges(path=None, cache_dir=None):
    """The merges of a BPE file, plain or .gz, as (left, right) symbols; without a path the public
    one's, downloaded once to `files.cache_folder(cache_dir)`. Raises ValueError for another kind of
    file, FileNotFoundError where there is none."""
    if path is None:
        path = files.cache_folder(cache_dir) / BPE_FILE
        files.fetch(BPE_URLS, path, BPE_DIGEST, "pass --bpe PATH")
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
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


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
    mean, std = (255 * torch.tensor(value, device=x.device)[:, None, None] for value in (MEAN, STD))
    return (x.float() - mean) / std


# Prompts ------------------------------------------------------------------------------------------
def load_templates(path):
    """The prompt templates of a file: one a line, `{}` for the class name; empty lines and `#`
    comments are skipped. Raises ValueError for a line without `{}`, and for a file without any."""
    with files.undamaged(path, "expected text in UTF-8"):
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    templates = {n: line for n, line in enumerate(lines, 1) if line and not line.startswith("#")}
    for number, template in (templates or {1: ""}).items():
        if "{}" not in template:
            raise ValueError(f"{path}:{number}: expected a template with {{}} for the class name, "
                             f"found {template[:80]!r}")
    return list(templates.values())


def clean_class_name(name):
    """A data set's class name as words: the first of a comma list, spaces for underscores."""
    return " ".join(name.split(",")[0].replace("_", " ").split())


@torch.no_grad()
def class_features(clip, tokenizer, class_names, templates, batch_size=256, progress=None):
    """Text features (K, M, D), float32, each of unit length, of K class names in M templates.

    `progress(done, total)` follows each batch of prompts. Raises ValueError for a prompt that is
    too long and for another CLIP's tokenizer.
    """
    if tokenizer.vocab_size != clip.vocab_size:
        raise ValueError(f"{tokenizer.vocab_size} token ids, this CLIP has {clip.vocab_size}: "
                         "another BPE file")
    prompts = [template.replace("{}", clean_class_name(name))
               for name in class_names for template in templates]
    tokens = tokenizer(prompts, clip.context_length).to(clip.logit_scale.device)  # (K M, L)
    features = []
    for batch in tokens.split(batch_size):
        features.append(F.normalize(clip.encode_text(batch).float(), dim=1))
        if progress:
            progress(sum(map(len, features)), len(tokens))
    return torch.cat(features).view(len(class_names), len(templates), -1)
