"""CLIP as the second teacher: what it says of every plain image, computed once and kept.

    clip, tokenizer, scale = load_clip_teacher(config)
    targets = load_targets(config, clip, tokenizer, splits, identities)  # {split: (cosines, ...)}
    clip_logits = scale * cosines[index].float()                # z_C of equation (2) in richkd.py

`config` is train.py's: CLIP's own flags, dataset, amp, device, workers and cache_dir are read.
"""

import functools
import hashlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import clip_model
import data
import richkd
from support import checkpoints, command, files, keys, shapes
from support.command import rank, world

PROMPTS = Path(__file__).resolve().parent / "prompts.txt"  # the authors' templates
PART = 10_000       # images whose targets are kept together: what an interruption can cost a rank


def load_clip_teacher(config):
    """-> CLIP on the device, its tokenizer, the scale of its logits. The tiny one is trained first,
    in the cache. The image tower is float32 on a CPU (bfloat16 with --amp) and float16 on a GPU, as
    OpenAI's weights are and what is kept of it: on average cosines change by 1e-4, in bfloat16 by
    2e-3. Raises as `clip_model.load_clip`."""
    path = config.clip
    if path == "tiny":
        folder = files.cache_folder(config.cache_dir)
        path = shapes.tiny_clip(folder, config.device)
        try:
            checkpoints.read_state_dict(path)
        except ValueError:
            files.note(f"{path} is damaged: the tiny CLIP is trained anew")
            path.unlink()
            path = shapes.tiny_clip(folder, config.device)
    clip = clip_model.load_clip(path, config.cache_dir, config.clip_activation)
    tokenizer = clip_model.Tokenizer()  # bytes alone, as the tiny one has it
    if clip.vocab_size != tokenizer.vocab_size:
        tokenizer = clip_model.Tokenizer(clip_model.load_merges(config.bpe, config.cache_dir))
    scale = config.clip_scale or clip.logit_scale.exp().item()
    clip = clip.to(config.device)
    if torch.device(config.device).type == "cuda":
        halve(clip.visual)
    elif config.amp:
        clip.visual.bfloat16()
    return clip, tokenizer, scale


def halve(visual):
    """An image tower, changed to compute in float16. QuickGELU, x sigmoid(1.702 x), is a SiLU where
    the layers around it bring the factor: one pass over what is the largest there, not three."""
    for block in visual.modules():
        is_block = isinstance(block, clip_model.ResidualAttentionBlock)
        if is_block and isinstance(block.mlp.gelu, clip_model.QuickGELU):
            block.mlp.c_fc.weight.data *= 1.702
            block.mlp.c_fc.bias.data *= 1.702
            block.mlp.c_proj.weight.data /= 1.702
            block.mlp.gelu = torch.nn.SiLU()
    return visual.half()


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
    with torch.inference_mode():
        images = clip_model.preprocess(images.to(config.device), clip.visual.input_resolution)
        dtype = next(clip.visual.parameters()).dtype
        features = clip.encode_image(images.to(dtype)).float()
        if dtype == torch.float16 and not features.isfinite().all():
            files.note("this CLIP exceeds float16: it goes on in float32")
            features = clip.visual.float()(images)
        features = F.normalize(features, dim=1)
    cosines = [richkd.zero_shot_logits(features, each, 1.0) for each in classes]
    return sum(cosines) / len(classes), features


def load_targets(config, clip, tokenizer, splits, identities):
    """CLIP's view of every plain image of each split, from the cache or computed now: {split name:
    (cosines (N,K), unit-length features (N,D))}, float16 on the CPU. identities: {split name:
    `keys.identity`}."""
    # What the tensors do not tell: QuickGELU or GELU, and into how many heads a width is split.
    kinds = [[type(module).__name__, getattr(module, "heads", 0)] for module in clip.modules()]
    weights = hashlib.sha256(files.json_digest(kinds).encode())
    for name, tensor in sorted(clip.state_dict().items()):
        values = tensor.cpu().contiguous().flatten().view(torch.uint8)  # NumPy has no bfloat16
        weights.update(name.encode() + values.numpy().tobytes())
    class_names = next(iter(splits.values())).class_names
    asked = {"names": clip_model.prompt_names(class_names, tokenizer),
             "templates": clip_model.load_templates(config.prompts or PROMPTS),
             "merges": files.json_digest([*tokenizer.priority]), "average": config.average}
    # The prompts are encoded once for all splits, and only where one is not in the cache.
    classes = functools.cache(lambda: class_embeddings(config, clip, tokenizer, class_names))

    targets = {}
    for name, split in splits.items():
        images = data.clip_images(split.images, clip.visual.input_resolution)

        def views(start, stop, images=images):
            part = data.take(images, slice(start, stop))
            for block in data.blocks(part, 250, config.workers, config.device):
                yield clip_view(config, clip, classes(), block)

        on_cpu = torch.device(config.device).type == "cpu"  # a GPU's are float16, --amp or not
        key = {"clip": weights.hexdigest(), **asked, "amp": config.amp and on_cpu, "split": name,
               "images": identities[name]["content"]}
        file = f"targets-{config.dataset}-{name}-{files.json_digest(key)[:16]}.bin"
        shape = (len(split.labels), len(class_names), clip.embed_dim)
        targets[name] = cached_targets(files.cache_folder(config.cache_dir) / file, key, shape,
                                       views)
    return targets


def cached_targets(path, key, shape, views):
    """(cosines (N,K), features (N,D)) float16, memory-mapped from the file `path`, as
    `keys.mapped`: made first where there is none, by all ranks, and anew where it is damaged.

    key: a dict of JSON values, all that the targets depend on. shape: (N, K, D). views: (start,
    stop) -> iterator of (cosines (b,K), features (b,D)). An interruption costs a rank at most PART
    images; ranks take whole parts each.
    """
    path, (N, K, D), label = Path(path), shape, key.get("split", "")

    def table():
        rows = functools.partial(target_rows, path, N, views, label)
        try:
            return keys.mapped(path, key, [N, K + D], torch.float16, rows)
        except FileNotFoundError:  # another process has joined the parts, and removed them
            return keys.mapped(path, key, [N, K + D], torch.float16, rows)

    if world() > 1:
        absent = 0 if path.is_file() else 1
        if command.any_rank([absent], "cuda" if dist.get_backend() == "nccl" else "cpu"):
            make_parts(path, N, views, label, rank(), world())
            dist.barrier()
    numbers = command.rank_zero_first(table)
    for part in path.parent.glob(f"{path.name}.*"):
        part.unlink(missing_ok=True)
    return numbers.split([K, D], 1)


def part_files(path, N):
    """The files beside `path` that the targets lie in while they are made: {file: first image}."""
    return {path.with_name(f"{path.name}.{start}"): start for start in range(0, N, PART)}


def make_parts(path, N, views, label, rank=0, world=1):
    """Make those of the `part_files` that are not there; each rank makes every world-th."""
    parts = [*part_files(path, N).items()][rank::world]
    progress = files.Progress(f"CLIP's targets ({label})", sum(min(PART, N - i) for _, i in parts))

    def rows(start):
        for cosines, features in views(start, min(N, start + PART)):
            both = torch.cat([cosines, features], 1).to("cpu", torch.float16)       # (b,K+D)
            if not both.isfinite().all():
                raise FloatingPointError("CLIP's features are not finite numbers")
            if rank == 0:  # whose share stands for all
                progress.update(progress.done + len(both),
                                keep=progress.done + len(both) == progress.total)
            yield both.contiguous().numpy().tobytes()

    for part, start in parts:
        if part.is_file():
            progress.start = progress.done = progress.done + min(PART, N - start)
        else:
            files.write_atomically(part, rows(start))


def target_rows(path, N, views, label):
    """Yield the bytes of N rows, part by part, after all parts were made, from which another
    process, or the next run, goes on."""
    make_parts(path, N, views, label)
    for part in part_files(path, N):
        yield part.read_bytes()
