"""CLIP written out: tokenizer, both image towers, text tower, public weights, preprocessing, class embeddings.

References:
  Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021 (arXiv 2103.00020)
  github.com/openai/CLIP: parameter names, initialisation, byte-pair vocabulary and the nine public checkpoints
"""

import gzip
import hashlib
import html
import math
import mmap
import os
import pickle
import struct
import textwrap
import urllib.request
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn

PUBLIC_URL = "https://openaipublic.azureedge.net/clip/models"  # followed by SHA-256 and file (clip/clip.py)
PUBLIC_CLIPS = {  # name: bytes, SHA-256
    "RN50": (255827503, "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": (291791292, "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": (421854225, "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": (661125706, "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": (1353500174, "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": (353976522, "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": (350837078, "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": (932768134, "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": (934088680, "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}
PUBLIC_BPE = ("https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz", 1356917,
              "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")


def fetch(url, size, sha256, cache_dir, flag):
    """Path of a public file in the cache folder, downloaded where it is absent. Its SHA-256 is checked each time."""
    folder = Path(cache_dir or os.environ.get("RICHKD_CACHE") or "~/.cache/richkd").expanduser()
    path = folder / url.split("/")[-1]
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            urllib.request.urlopen(url, timeout=10).close()  # the next line alone would wait long for a dead network
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)  # appears whole and checked, or not
        except (OSError, RuntimeError) as error:
            what = f"could not download {url} ({size:,} bytes)"
            raise FileNotFoundError(f"{what}: {error}; put it at {path}, or pass {flag} PATH") from None
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: SHA-256 is {found}, expected {sha256}; move it away, or use it by {flag} {path}")
    return path


# Tokenizer ------------------------------------------------------------------------------------------------------------
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = regex.compile(  # CLIP's split into words: a digit stands alone, letters and signs do not mix
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
NUM_MERGES = 49152 - 256 - 2  # CLIP uses the first 48,894 of the 262,144 merges in the public file


def load_merges(path=None, cache_dir=None):
    """The byte-pair merges of a BPE file, plain or .gz: a list of (left, right) symbols, at most CLIP's 48,894.

    Without a path the public file, kept in `cache_dir`, $RICHKD_CACHE or ~/.cache/richkd. Raises ValueError for
    another kind of file, FileNotFoundError where it is missing or cannot be downloaded.
    """
    data = Path(path or fetch(*PUBLIC_BPE, cache_dir, "--bpe")).read_bytes()
    try:
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no BPE file, plain or .gz: {error}") from None
    header = int("#version" in lines[0])
    pairs = [tuple(line.split()) for line in lines[header : header + NUM_MERGES] if line.strip()]
    symbols = set(Tokenizer().symbols.values())
    if any(len(pair) != 2 or not symbols.issuperset("".join(pair)) for pair in pairs):
        raise ValueError(f"{path}: no BPE file: expected two symbols a line, in GPT-2's letters for bytes")
    return pairs


class Tokenizer:
    """CLIP's lower-case byte-pair encoding; the ids are those of OpenAI's tokenizer.

    `merges` are (left, right) pairs of symbols in order of priority. The vocabulary is 256 bytes, the same 256 at the
    end of a word, the merges, then the start and the end token: without merges a byte-level tokenizer of 514 ids.
    """

    def __init__(self, merges=()):
        merges = [tuple(pair) for pair in merges]
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's order: these bytes first,
        moved = [byte for byte in range(256) if byte not in printable]  # the others written as characters from 256 on
        self.symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(moved)}
        byte_of = {symbol: byte for byte, symbol in self.symbols.items()}
        tokens = [*byte_of, *(symbol + "</w>" for symbol in byte_of), *(left + right for left, right in merges)]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start, self.end = len(tokens), len(tokens) + 1
        self.vocab_size = len(tokens) + 2
        self.cache = {START: [self.start], END: [self.end]}  # word: ids; written out, the two specials are special
        self.bytes = [bytes(byte_of[symbol] for symbol in token.removesuffix("</w>")) + b" " * token.endswith("</w>")
                      for token in tokens] + [START.encode(), END.encode()]

    def encode_word(self, word):
        """Ids of one word: the neighbours of lowest rank are merged wherever they meet, until none has a rank."""
        parts = [self.symbols[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                step = 2 if (parts[i], *parts[i + 1 : i + 2]) == best else 1
                merged.append("".join(parts[i : i + step]))
                i += step
            parts = merged
        return [self.ids[part] for part in parts]

    def encode(self, text):
        """Text to a list of ids without start and end: mojibake repaired, HTML unescaped twice, lower case."""
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip().lower()
        ids = []
        for word in WORDS.findall(text):
            if word not in self.cache:
                self.cache[word] = self.encode_word(word)
            ids += self.cache[word]
        return ids

    def decode(self, ids):
        """Ids to text; a space ends each word, so that those around punctuation may be new."""
        return b"".join(self.bytes[int(i)] for i in ids).decode("utf-8", errors="replace").strip()

    def __call__(self, texts, context_length, truncate=False):
        """One text or a list of B to (B, context_length) int64: start, ids, end, zeros. A longer text raises ValueError
        or, with `truncate`, is cut, the end token last."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > context_length and not truncate:
                raise ValueError(f"{len(ids)} tokens, over the context length {context_length}: {text[:80]!r}")
            if len(ids) > context_length:
                ids[context_length - 1 :] = [self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


# Transformer: the text tower and the ViT image tower ------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention with the parameters of nn.MultiheadAttention."""

    def __init__(self, width, heads):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads; CLIP's heads are 64 wide")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, causal, keep):
        B, L, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, L, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, width / heads)
        x = F.scaled_dot_product_attention(q[:, :, :keep], k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, causal, keep):
        x = x[:, :keep] + self.attn(self.ln_1(x), causal, keep)
        c_fc, c_proj = self.mlp["c_fc"], self.mlp["c_proj"]
        # QuickGELU, y * sigmoid(1.702 y), is silu(1.702 y) / 1.702: both factors ride on the matrix products and the
        # activation works in place, which on a CPU saves as much time as the products take in bfloat16
        hidden = torch.addmm(c_fc.bias, self.ln_2(x).flatten(0, 1), c_fc.weight.T, alpha=1.702, beta=1.702)
        out = torch.addmm(c_proj.bias, F.silu(hidden, inplace=True), c_proj.weight.T, alpha=1 / 1.702)
        return x + out.view_as(x)


class Transformer(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, causal=False, keep=None):
        """(B, L, width) to the same, or to its first `keep` positions: the last block computes no others."""
        for block in self.resblocks[:-1]:
            x = block(x, causal, None)
        return self.resblocks[-1](x, causal, keep)


class VisionTransformer(nn.Module):
    def __init__(self, input_resolution, patch_size, width, layers, embed_dim):
        super().__init__()
        self.input_resolution, length = input_resolution, (input_resolution // patch_size) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(length, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, width // 64)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding), keep=1)
        return self.ln_post(x[:, 0]) @ self.proj


# ModifiedResNet: three stem convolutions, average pooling instead of strides, attention pooling at the end ------------
class Bottleneck(nn.Module):
    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(width) for width in (planes, planes, 4 * planes))
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Identity()
        if stride > 1 or channels != 4 * planes:
            conv, bn = nn.Conv2d(channels, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
            self.downsample = nn.Sequential(OrderedDict([("-1", nn.AvgPool2d(stride)), ("0", conv), ("1", bn)]))
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + self.downsample(x), inplace=True)


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
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, L, width / heads)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))  # one query: (B, width) to (B, D)


class ModifiedResNet(nn.Module):
    def __init__(self, input_resolution, width, layers, embed_dim):
        super().__init__()
        self.input_resolution = input_resolution
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(planes) for planes in (width // 2, width // 2, width))
        channels = width
        for stage, blocks in enumerate(layers):
            planes = width * 2**stage
            first = Bottleneck(channels, planes, stride=2 if stage else 1)
            channels = 4 * planes
            rest = [Bottleneck(channels, planes, stride=1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.attnpool = AttentionPool(input_resolution // 32, channels, embed_dim)
        self.to(memory_format=torch.channels_last)  # faster convolutions, on CPU as on GPU

    def forward(self, images):
        x = images.contiguous(memory_format=torch.channels_last)
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)), inplace=True)
        x = F.avg_pool2d(x, 2)
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


# CLIP -----------------------------------------------------------------------------------------------------------------
class CLIP(nn.Module):
    """Image and text towers with OpenAI's parameter names and initialisation.

    `vision_layers` is a number of blocks (ViT, with `vision_patch_size`) or four of them (ModifiedResNet, with None);
    the image tower's heads are 64 wide. `logit_scale` is the natural logarithm of the factor on the cosines.
    """

    def __init__(self, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_heads, transformer_layers):
        super().__init__()
        self.embed_dim, self.context_length, self.vocab_size = embed_dim, context_length, vocab_size
        if isinstance(vision_layers, int):
            self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width, vision_layers, embed_dim)
        else:
            self.visual = ModifiedResNet(image_resolution, vision_width, vision_layers, embed_dim)
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(transformer_width**-0.5 * torch.randn(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=transformer_width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * transformer_layers * transformer_width) ** -0.5)
            nn.init.normal_(block.mlp["c_fc"].weight, std=(2 * transformer_width) ** -0.5)
            nn.init.normal_(block.mlp["c_proj"].weight, std=(2 * transformer_layers * transformer_width) ** -0.5)

    def encode_image(self, images):
        """Images (B, 3, H, W), float as `preprocess` makes them, to features (B, D), not of unit length."""
        side = self.visual.input_resolution
        if images.shape[1:] != (3, side, side) or not images.is_floating_point():
            found = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"encode_image takes float (B, 3, {side}, {side}) from preprocess, found {found}")
        return self.visual(images)

    def encode_text(self, tokens):
        """Token ids (B, L), int64, L up to `context_length`, to features (B, D), not of unit length: those of the end
        token, the largest id of a row, which sees nothing behind it."""
        if tokens.ndim != 2 or tokens.shape[1] > self.context_length:
            raise ValueError(f"encode_text takes ids (B, at most {self.context_length}), found {tuple(tokens.shape)}")
        end = tokens.argmax(dim=1)
        length = int(end.max()) + 1  # the columns behind have no influence
        x = self.token_embedding(tokens[:, :length]) + self.positional_embedding[:length]
        x = self.transformer(x, causal=True)[torch.arange(len(x), device=x.device), end]  # (B, width)
        return self.ln_final(x) @ self.text_projection


def build_clip(state_dict):
    """CLIP from tensors in OpenAI's layout, all sizes read from their shapes: float32, eval mode, copies throughout.

    Raises ValueError for an image tower of unknown kind and for a tensor missing, unknown or of a wrong shape.
    """
    integers = ("input_resolution", "context_length", "vocab_size")  # beside the weights in OpenAI's archives
    state = {key: tensor for key, tensor in state_dict.items() if key not in integers}

    def shape(key, dims):
        if getattr(state.get(key), "ndim", None) != dims:
            raise ValueError(f"no CLIP in OpenAI's layout: tensor {key!r} is missing or has not {dims} dimensions")
        return state[key].shape

    def count(prefix):
        return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}) or 1

    if "visual.proj" in state:
        vision_width, _, _, patch = shape("visual.conv1.weight", 4)
        vision_layers = count("visual.transformer.resblocks.")
        resolution = patch * math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
    elif "visual.layer1.0.conv1.weight" in state:
        vision_width, patch = shape("visual.layer1.0.conv1.weight", 4)[0], None
        vision_layers = tuple(count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
        resolution = 32 * math.isqrt(shape("visual.attnpool.positional_embedding", 2)[0] - 1)
    else:
        raise ValueError("a vision tower of unknown kind: neither OpenAI's ViT ('visual.proj') nor its ModifiedResNet")
    context_length, width = shape("positional_embedding", 2)
    with torch.device("meta"):  # shapes only: the tensors themselves are assigned
        clip = CLIP(shape("text_projection", 2)[1], resolution, vision_layers, vision_width, patch, context_length,
                    shape("token_embedding.weight", 2)[0], width, width // 64, count("transformer.resblocks."))
    for key, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            state[key] = tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
    try:
        clip.load_state_dict(state, assign=True)
    except RuntimeError as error:  # names all that is missing, unknown or of a wrong shape, on many lines
        raise ValueError(f"no CLIP in OpenAI's layout: {textwrap.shorten(str(error), 400)}") from None
    return clip.to(memory_format=torch.channels_last).eval()


# Checkpoint files, read without executing anything they hold ----------------------------------------------------------
class TensorUnpickler(pickle.Unpickler):
    """Admits tensors, dictionaries and module shells, and refuses everything else by its name."""
    NAMES = {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": lambda data, offset, size, stride, *_: data.as_strided(size, stride, offset),
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch.jit._pickle.build_intlist": list,
        **{f"torch.{name}Storage": getattr(torch, name.lower())  # a storage is named by its dtype
           for name in ("Half", "BFloat16", "Float", "Double", "Int", "Long", "Bool")},
    }

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__":  # a TorchScript module: only its attributes are of interest
            return SimpleNamespace
        if f"{module}.{name}" not in self.NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return self.NAMES[f"{module}.{name}"]


def read_tensors(path):
    """{name: tensor} of a TorchScript archive or a file by torch.save, plain or under "state_dict" or "model".

    Nothing in the file is executed; the tensors are views of the mapped file. Raises ValueError for other files.
    """
    def storage(key):
        _, dtype, record, _, elements = key  # "storage", dtype, name of the record, device, number of elements
        info = archive.getinfo(f"{folder}data/{record}")
        start = info.header_offset + 30 + sum(struct.unpack_from("<HH", mapped, info.header_offset + 26))
        data = memoryview(mapped)[start : start + info.file_size]
        if zlib.crc32(data) != info.CRC or len(data) != elements * dtype.itemsize:
            raise zipfile.BadZipFile(f"record {info.filename} is damaged")
        return torch.frombuffer(data, dtype=dtype) if elements else torch.empty(0, dtype=dtype)

    def flatten(shell, prefix=""):
        for name, value in vars(shell).items():
            nested = isinstance(value, SimpleNamespace)
            yield from flatten(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]

    with open(path, "rb") as file:
        try:
            if file.peek(2)[:2] == b"PK":
                archive, mapped = zipfile.ZipFile(file), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                folder = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
                unpickler = TensorUnpickler(archive.open(f"{folder}data.pkl"))
                unpickler.persistent_load = storage
            else:  # no tensors then, but whatever it asks for is named
                unpickler = TensorUnpickler(file)
            state = unpickler.load()
        except Exception as error:  # damaged bytes can raise anything
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            raise ValueError(f"{path}: not a TorchScript archive or state dict, or damaged: {reason}") from None
    if isinstance(state, SimpleNamespace):
        state = {name: value for name, value in flatten(state) if isinstance(value, torch.Tensor)}
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected a state dict (torch.save since 1.6)")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def load_clip(name_or_path, cache_dir=None):
    """CLIP from a public name (downloaded once to `cache_dir`, $RICHKD_CACHE or ~/.cache/richkd) or from a file.

    Float32, eval mode, on the CPU. Raises ValueError for an unknown name and a file that is not wholly a CLIP in
    OpenAI's layout, FileNotFoundError for a missing file and for a public one that cannot be downloaded.
    """
    path = Path(name_or_path)
    if str(name_or_path) in PUBLIC_CLIPS:
        size, sha256 = PUBLIC_CLIPS[str(name_or_path)]
        file = str(name_or_path).replace("/", "-").replace("@", "-") + ".pt"
        path = fetch(f"{PUBLIC_URL}/{sha256}/{file}", size, sha256, cache_dir, "--clip")
    elif not path.exists():
        kind = FileNotFoundError if path.suffix else ValueError
        raise kind(f"{str(path)!r} is neither a file nor a public CLIP; these are {', '.join(PUBLIC_CLIPS)}")
    tensors = read_tensors(path)
    try:
        return build_clip(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# Images ---------------------------------------------------------------------------------------------------------------
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def resize_axis(x, axis, size, start, stop):
    """Lines `start` to `stop` of uint8 (B, 3, H, W), its `axis` resized to `size` by Pillow's antialiased bicubic.

    Pillow's weights are integers in units of 2**-22, a line is rounded once, half up; float64 holds the sums exactly.
    In blocks, as 16 neighbouring lines depend on few others.
    """
    scale = x.shape[axis] / size
    stretch = max(scale, 1.0)  # antialiasing: the kernel widens where the image shrinks
    lines = []
    for block in torch.arange(start, stop, dtype=torch.float64).split(16):
        centre = (block[:, None] + 0.5) * scale
        first = (centre - 2 * stretch + 0.5).long().clamp(min=0)
        last = (centre + 2 * stretch + 0.5).long().clamp(max=x.shape[axis])
        pixel = torch.arange(first[0].item(), last[-1].item())
        t = ((pixel - centre + 0.5) / stretch).abs()  # (lines, pixels)
        cubic = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2)  # a = -1/2
        weights = cubic * ((t < 2) & (pixel >= first) & (pixel < last))
        weights = weights / weights.sum(dim=1, keepdim=True) * 2**22
        weights = ((weights + 0.5 * weights.sign()).trunc() / 2**22).to(x.device)
        used = x.narrow(axis, pixel[0].item(), len(pixel)).double()
        line = used @ weights.T if axis == 3 else (weights.expand(len(x), 3, -1, -1) @ used)
        lines.append(line.add_(0.5).clamp_(0, 255).to(torch.uint8))
    return torch.cat(lines, dim=axis)


def preprocess(images, resolution):
    """CLIP's image transform: RGB uint8 (B, 3, H, W) to normalised float32 (B, 3, resolution, resolution).

    The shorter side is resized, the centre cropped, on the images' device, with Pillow's grey levels.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"preprocess takes uint8 (B, 3, H, W), found {images.dtype} {tuple(images.shape)}")
    x, sides = images, images.shape[2:]
    H, W = (int(resolution * side / min(sides)) for side in sides)
    # Pillow takes the width first, from version 13 on the height where that shrinks by over twice as many lines
    height_first = sides[0] - H > max(0, 2 * (sides[1] - W))
    for axis, size in ((2, H), (3, W)) if height_first else ((3, W), (2, H)):
        start = round((size - resolution) / 2)
        whole = size == x.shape[axis]
        x = x.narrow(axis, start, resolution) if whole else resize_axis(x, axis, size, start, start + resolution)
    mean, std = (255 * torch.tensor(value, device=x.device).view(3, 1, 1) for value in (MEAN, STD))
    return x.float().sub_(mean).div_(std)


# Prompts --------------------------------------------------------------------------------------------------------------
def load_templates(path):
    """The prompt templates of a file: one a line, `{}` for the class name; empty lines and `#` comments are skipped.

    Raises ValueError with file and line for a line without `{}`, and for a file without templates.
    """
    try:
        lines = enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text in UTF-8: {error}") from None
    templates = {number: line.strip() for number, line in lines if line.strip() and line.strip()[0] != "#"}
    wrong = [number for number, template in templates.items() if "{}" not in template]
    if wrong or not templates:
        raise ValueError(f"{path}:{(wrong or [1])[0]}: expected a template with {{}} for the class name")
    return list(templates.values())


def clean_class_name(name):
    """A data set's class name as words: the first of a comma list, spaces for underscores."""
    return " ".join(name.split(",")[0].replace("_", " ").split())


@torch.no_grad()
def class_features(clip, tokenizer, class_names, templates, batch_size=256, progress=None):
    """Class embeddings (K, D): K names in M templates, each prompt at unit length, their mean at unit length.

    `progress(done, total)` follows each batch of prompts. Raises ValueError for a prompt too long or another tokenizer.
    """
    if tokenizer.vocab_size != clip.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, this CLIP {clip.vocab_size}: another BPE file")
    prompts = [template.replace("{}", clean_class_name(name)) for name in class_names for template in templates]
    tokens = tokenizer(prompts, clip.context_length).to(clip.logit_scale.device)
    features = []
    for batch in tokens.split(batch_size):
        features.append(F.normalize(clip.encode_text(batch).float(), dim=1))
        if progress:
            progress(sum(map(len, features)), len(tokens))
    features = torch.cat(features).view(len(class_names), len(templates), -1)  # (K, M, D)
    return F.normalize(features.mean(dim=1), dim=1)


# The tiny CLIP of the embedded data set -------------------------------------------------------------------------------


def train_tiny_clip(images, phrases, templates, seed=0, device="cpu", steps=1000, batch_size=128, progress=None):
    """A small byte-level CLIP, trained on pictures uint8 (N, 3, 32, 32) and as many phrases of two words, "red star",
    that templates make captions of.

    Contrastive both ways (Radford 2021, section 2.3), but for two things. The captions of one step share their template
    and repeat, so every distinct one is encoded once and stands for all its images: no caption is its own negative.
    And two captions that say the same in other words are positives too; without that the text tower, whose captions
    all look alike at first, does not tell second words apart within so few steps. Every second step's captions have
    that word alone. Returns a CLIP in eval mode, float32, on `device`; `progress(done, total)` after every step.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer, context_length = Tokenizer(), 56
    captions = []  # for phrases and for words: which text an image has (N,), the texts' tokens (templates, texts, L)
    for names in (phrases, [phrase.split()[1] for phrase in phrases]):
        texts = sorted(set(names))
        tokens = [tokenizer([template.format(text) for text in texts], context_length) for template in templates]
        captions.append((torch.tensor([texts.index(name) for name in names]), torch.stack(tokens)))

    with torch.random.fork_rng(devices=[]):  # initialisation draws from the global generator
        torch.manual_seed(seed)
        clip = CLIP(embed_dim=64, image_resolution=32, vision_layers=(1, 1, 1, 1), vision_width=16,
                    vision_patch_size=None, context_length=context_length, vocab_size=tokenizer.vocab_size,
                    transformer_width=64, transformer_heads=1, transformer_layers=2).to(device)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2.5e-3, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.5e-3, steps, pct_start=0.15, cycle_momentum=False)
    for step in range(steps):
        shown = torch.randint(len(images), (batch_size,), generator=generator)
        text_of, tokens = captions[step % 2]
        present, column = text_of[shown].unique(return_inverse=True)  # the step's T distinct texts; which is an image's
        two = torch.randint(len(tokens), (2,), generator=generator)  # templates
        image = F.normalize(clip.encode_image(preprocess(images[shown].to(device), 32)), dim=1)  # (B, D)
        text = clip.encode_text(tokens[two][:, present].flatten(0, 1).to(device))
        text, reworded = F.normalize(text, dim=1).chunk(2)  # (T, D) each
        scale, column = clip.logit_scale.exp(), column.to(device)
        logits = scale * image @ text.T  # (B, T)
        share = F.one_hot(column, len(text)).float()
        share = share / share.sum(dim=0)  # a text's images, equally
        loss = (F.cross_entropy(logits, column) + F.cross_entropy(logits.T, share.T)) / 2
        loss = loss + F.cross_entropy(scale * text @ reworded.T, torch.arange(len(text), device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        if progress:
            progress(step + 1, steps)
    return clip.eval()
