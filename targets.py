"""CLIP as the second teacher: what it says of every plain image, computed once and kept.

    clip, tokenizer, scale = load_clip_teacher(config)
    targets = load_targets(config, clip, tokenizer, splits)     # {split: (cosines, features)}
    clip_logits = scale * cosines[index].float()                # z_C of equation (2) in richkd.py

`config` is train.py's: CLIP's own flags, dataset, amp, device, workers and cache_dir are read.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import clip_model
import command
import data
import files
import richkd
import shapes

PROMPTS = Path(__file__).resolve().parent / "prompts.txt"  # the authors' templates
PART = 10_000       # images whose targets are kept together: what an interruption can cost
MAX_HEADER = 2**24  # bytes of a target file's first line: the names of classes and templates


def load_clip_teacher(config):
    """-> CLIP on the device, its tokenizer, the scale of its logits. The tiny one is trained first,
    in the cache. Raises as `clip_model.load_clip`."""
    path = config.clip
    if path == "tiny":
        path = shapes.tiny_clip(config.cache_dir, config.device)
    clip = clip_model.load_clip(path, config.cache_dir)
    tokenizer = clip_model.Tokenizer()  # bytes alone, as the tiny one has it
    if clip.vocab_size != tokenizer.vocab_size:
        tokenizer = clip_model.Tokenizer(clip_model.load_merges(config.bpe, config.cache_dir))
    scale = config.clip_scale or clip.logit_scale.exp().item()
    return clip.to(config.device), tokenizer, scale


def class_embeddings(config, clip, tokenizer, class_names):
    """What CLIP's cosines are taken with, a list of (K,D): one, the mean over the templates; with
    --average logits one for each template, whose logits are averaged."""
    templates = clip_model.load_templates(config.prompts or PROMPTS)
    progress = files.Progress("prompts", len(class_names) * len(templates), "prompts")
    text = clip_model.class_features(                                               # (K,M,D)
        clip, tokenizer, class_names, templates,
        progress=lambda done, total: progress.update(done, keep=done == total))
    if config.average == "logits":
        return [richkd.ensemble_text_features(one) for one in text.split(1, dim=1)]
    return [richkd.ensemble_text_features(text)]


def clip_view(config, clip, classes, images):
    """What CLIP says of uint8 images (B,3,H,W): cosines (B,K) with `class_embeddings`, unit-length
    features (B,D)."""
    with torch.inference_mode(), command.autocast(config):
        images = clip_model.preprocess(images.to(config.device), clip.visual.input_resolution)
        features = F.normalize(clip.encode_image(images).float(), dim=1)
    cosines = [richkd.zero_shot_logits(features, each, 1.0) for each in classes]
    return sum(cosines) / len(classes), features


def load_targets(config, clip, tokenizer, splits):
    """CLIP's view of every plain image of each split, from the cache or computed now: {split name:
    (cosines (N,K), unit-length features (N,D))}, float16 on the CPU."""
    weights = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        weights.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    class_names = next(iter(splits.values())).class_names
    # The prompts are encoded once for all splits, and only where one is not in the cache.
    classes = functools.cache(lambda: class_embeddings(config, clip, tokenizer, class_names))

    targets = {}
    for name, split in splits.items():
        images = data.clip_images(split.images, clip.visual.input_resolution)

        def views(start, stop, images=images):
            part = data.take(images, slice(start, stop))
            for block in data.blocks(part, workers=config.workers, device=config.device):
                yield clip_view(config, clip, classes(), block)

        key = {"checkpoint": weights.hexdigest(), "class_names": split.class_names,
               "templates": clip_model.load_templates(config.prompts or PROMPTS),
               "average": config.average, "amp": config.amp, "dataset": config.dataset,
               "split": name, "images": data.fingerprint(split.images)}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = Path(config.cache_dir) / f"targets-{config.dataset}-{name}-{digest[:8]}.bin"
        shape = (len(split.labels), len(split.class_names), clip.embed_dim)
        targets[name] = cached_targets(path, key, shape, views)
    return targets


def cached_targets(path, key, shape, views):
    """(cosines (N,K), features (N,D)) float16, memory-mapped from the file `path`, so that ranks
    share them and memory does not grow with N; made first where there is no file.

    key: a dict of JSON values, all that the targets depend on. shape: (N, K, D). views: (start,
    stop) -> iterator of (cosines (b,K), features (b,D)). An interruption costs at most PART images.
    Raises ValueError for a damaged file, and for one made with another key.

    The file: one line of JSON, padded by spaces to a multiple of 4096 bytes, then N rows of K + D.
    """
    path, (N, K, D) = Path(path), shape
    header = json.dumps({"format": files.FORMAT, "key": key, "shape": [N, K, D]}, sort_keys=True)
    header = header.encode().ljust(math.ceil((len(header) + 1) / 4096) * 4096 - 1) + b"\n"
    if not path.is_file():
        make_targets(path, header, N, views, key.get("split", ""))
    for part in path.parent.glob(f"{path.name}.*"):  # joined by now
        part.unlink(missing_ok=True)
    with open(path, "rb") as file:
        found = file.readline(MAX_HEADER)
    if found != header or path.stat().st_size != len(header) + N * 2 * (K + D):
        raise ValueError(f"{path} holds other targets than its name says, or is damaged; delete it")
    numbers = torch.from_file(str(path), size=len(header) // 2 + N * (K + D), dtype=torch.float16)
    return numbers[len(header) // 2 :].view(N, K + D).split([K, D], 1)


def make_targets(path, header, N, views, label):
    """Write the file of `cached_targets`: part by part, then joined. Two processes may do so."""
    starts = range(0, N, PART)
    parts = [path.with_name(f"{path.name}.{start}") for start in starts]
    progress = files.Progress(f"CLIP's targets ({label})", N)

    def rows(start):
        for cosines, features in views(start, min(N, start + PART)):
            both = torch.cat([cosines, features], 1).to("cpu", torch.float16)       # (b,K+D)
            progress.update(progress.done + len(both), keep=progress.done + len(both) == N)
            yield both.contiguous().numpy().tobytes()

    for start, part in zip(starts, parts):
        if part.is_file():
            progress.start = progress.done = min(N, start + PART)
        else:
            files.write_atomically(part, rows(start))
    with contextlib.suppress(FileNotFoundError):  # the other process has joined and removed them
        files.write_atomically(path, itertools.chain([header], (p.read_bytes() for p in parts)))
