"""Train a student: alone, by a baseline of distillation, or by RichKD (arXiv 2511.09286).

    python train.py                                                  # rendered shapes, a tiny CLIP; CPU, no download
    python train.py --method kd                                      # plain distillation from the same teacher
    python train.py --dataset cifar100 --teacher resnet110 --student resnet20          # the paper's setting
    python train.py --dataset cifar100 --teacher resnet32x4 --teacher-weights resnet32x4.pth --student resnet8x4

What a run needs and does not find (the teacher, the tiny CLIP, CLIP's targets) is made first and cached. The run folder
holds config.json, log.csv (a row an epoch), last.pt (to resume from), student.pt (for evaluate.py) and summary.json.
The same command goes on with an unfinished run, whether Ctrl-C, SIGTERM or kill -9 ended it, to the same result.
Accuracies are top-1 in percent; the one reported is the last epoch's.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import clip_model
import data
import models
import richkd

HERE = Path(__file__).resolve().parent
PROMPTS = HERE / "prompts.txt"  # not a default setting: moving the files must not change a run's settings

# What a method fixes. Everything else is shared, so that methods differ in their loss alone.
METHODS = {
    "scratch": {"logit_weight": 0.0, "feature_weight": 0.0},
    "kd": {"alpha": 1.0, "feature_weight": 0.0},
    "dkd": {"alpha": 1.0, "feature_weight": 0.0, "logit_loss": "dkd"},
    "mlkd": {"alpha": 1.0, "feature_weight": 0.0, "logit_loss": "mlkd"},
    "kd-ls": {"alpha": 1.0, "feature_weight": 0.0, "standardize": True},
    "fitnet": {"lam": 1.0, "logit_weight": 0.0, "feature_loss": "mse"},
    "rkd": {"lam": 1.0, "logit_weight": 0.0, "feature_loss": "rkd"},
    "crd": {"lam": 1.0, "logit_weight": 0.0, "feature_loss": "crd"},
    "richkd-l": {"feature_weight": 0.0},
    "richkd-f": {"logit_weight": 0.0},
    "richkd": {},
}

# What depends on the data set.
CIFAR = dict(teacher=("resnet110",), student="resnet20", clip="ViT-L/14", epochs=240, batch_size=64, lr=0.05,
             weight_decay=5e-4)  # the schedule of CRD (Tian 2020), which the paper follows
RECIPES = {
    "shapes": {**CIFAR, "teacher": ("resnet20",), "student": "resnet8", "clip": "tiny", "epochs": 30},
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "tiny-imagenet": CIFAR,
    "imagenet": dict(teacher=("resnet34",), student="resnet18", clip="ViT-L/14", epochs=100, batch_size=256, lr=0.1,
                     weight_decay=1e-4),
}


def setting(default, text, **extra):
    return dataclasses.field(default=default, metadata={"help": text, **extra})


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting with its line of help; the command line is made from it. None: what RECIPES says."""
    dataset: str = setting("shapes", "one of " + ", ".join(data.DATASETS))
    data_dir: str = setting("data", "where the data set lies or is downloaded to (tiny-imagenet: or its zip)")
    image_size: int = setting(None, "side to which the classifiers' images are brought; the data set's own", type=int)
    fraction: float = setting(1.0, "share of the training images to train on, the same ones for every run")
    holdout: float = setting(0.0, "share of the training images that takes the test split's place (to choose settings)")
    method: str = setting("richkd", "one of " + ", ".join(METHODS))
    teacher: tuple = setting(None, "architecture of the conventional teacher; several are fused", nargs="+")
    teacher_weights: tuple = setting(None, "a checkpoint a teacher; without, it is trained first, and kept", nargs="+")
    teacher_shares: tuple = setting(None, "each teacher's share of their mean logits; equal", nargs="+", type=float)
    student: str = setting(None, "the student's architecture", type=str)
    augmix: bool = setting(False, "AugMix of the student's training images, beside crop and flip")
    clip: str = setting(None, "tiny, a public name such as ViT-L/14, or a checkpoint's path", type=str)
    bpe: str = setting(None, "CLIP's BPE merges, bpe_simple_vocab_16e6.txt.gz; without, downloaded", type=str)
    prompts: str = setting(None, "templates, one a line, {} for the class name; the authors' twelve", type=str)
    average: str = setting("embeddings", "what is averaged over the templates: the class embeddings, or the logits")
    clip_scale: float = setting(None, "scale of CLIP's cosines; without, CLIP's own exp(logit_scale)", type=float)
    alpha: float = setting(0.7, "the teacher's share of the fused logits")
    lam: float = setting(0.7, "the teacher's share of the fused features")
    temperature: float = setting(3.0, "of the logit loss")
    logit_weight: float = setting(3.0, "weight of the logit loss; 0: none")
    feature_weight: float = setting(0.8, "weight of the feature loss; 0: none")
    logit_loss: str = setting("kd", "kd, dkd or mlkd, against the fused logits")
    standardize: bool = setting(False, "standardise both logits first (Sun 2024)")
    feature_loss: str = setting("crd", "crd, mse or rkd, against the fused features")
    num_negatives: int = setting(16384, "negatives of crd")
    negatives: str = setting("shared", "one draw of them for the batch, or per-image as published")
    epochs: int = setting(None, "passes over the training images, the teacher's too", type=int)
    batch_size: int = setting(None, "images a step", type=int)
    lr: float = setting(None, "learning rate at the start", type=float)
    weight_decay: float = setting(None, "of SGD with momentum .9", type=float)
    seed: int = setting(0, "of initialisation, order, augmentation and negatives (a teacher trained here: 0)")
    amp: bool = setting(False, "bfloat16 autocast")
    teacher_dtype: str = setting(None, "of the frozen teacher: float32, or bfloat16 where it is fast", type=str)
    compile: bool = setting(False, "torch.compile of student and teacher")
    deterministic: bool = setting(False, "on CUDA the same numbers every time, slower; a CPU gives them anyway")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")
    workers: int = setting(8, "loader processes where images stream (imagenet)")
    cache_dir: str = setting(os.environ.get("RICHKD_CACHE") or str(Path.home() / ".cache/richkd"),
                             "for teachers, CLIP's weights and targets")
    out: str = setting(None, "run folder; without, runs/<dataset>-<method>-<teacher>-<student>-s<seed>", type=str)
    overwrite: bool = setting(False, "start anew where the run folder holds a run")
    tensorboard: bool = setting(False, "log for tensorboard, too, into the run folder")


# What does not change a result.
PLACES = ("data_dir", "device", "workers", "cache_dir", "out", "overwrite", "tensorboard")

# Settings -------------------------------------------------------------------------------------------------------------


def flag(name):
    return "--" + name.replace("_", "-")


def needs_teacher(config):
    return config.logit_weight > 0 and config.alpha > 0 or config.feature_weight > 0 and config.lam > 0


def needs_clip(config):
    return config.logit_weight > 0 and config.alpha < 1 or config.feature_weight > 0 and config.lam < 1


def resolve(config):
    """Fill in what depends on the data set and the method. Raises ValueError, naming the valid values."""
    if config.dataset not in data.DATASETS:
        raise ValueError(f"unknown data set {config.dataset!r}; known: {', '.join(data.DATASETS)}")
    if config.method not in METHODS:
        raise ValueError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    default = Config()
    for name, value in METHODS[config.method].items():
        if getattr(config, name) not in (value, getattr(default, name)):
            raise ValueError(f"{flag(name)} {getattr(config, name)} does not go with --method {config.method}, which "
                             f"fixes it at {value}")
    recipe = {**RECIPES[config.dataset], "image_size": data.DATASETS[config.dataset].image_size}
    if (config.student or recipe["student"]).startswith(("mobilenet", "shufflenet")) and config.dataset != "imagenet":
        recipe["lr"] = 0.01  # Tian 2020: they diverge at .05
    recipe = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **recipe, **METHODS[config.method])
    if config.dataset == "imagenet":  # the zoo's resnet50 is the one for 32x32 images
        names = {"resnet50": "resnet50_imagenet"}
        config = dataclasses.replace(config, student=names.get(config.student, config.student),
                                     teacher=tuple(names.get(name, name) for name in config.teacher))
    for name, low, high in (("alpha", 0, 1), ("lam", 0, 1), ("logit_weight", 0, math.inf), ("workers", 0, math.inf),
                            ("feature_weight", 0, math.inf), ("num_negatives", 1, math.inf), ("epochs", 1, math.inf),
                            ("batch_size", 1, math.inf), ("image_size", 8, math.inf), ("seed", 0, 2**31),
                            ("fraction", 0, 1), ("holdout", 0, 0.9)):
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"{flag(name)} {getattr(config, name)}: expected {low} to {high}")
    for name in ("temperature", "lr", "clip_scale"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise ValueError(f"{flag(name)} {getattr(config, name)}: expected more than 0")
    for name, known in (("logit_loss", ("kd", "dkd", "mlkd")), ("feature_loss", ("crd", "mse", "rkd")),
                        ("negatives", ("shared", "per-image")), ("average", ("embeddings", "logits"))):
        if getattr(config, name) not in known:
            raise ValueError(f"{flag(name)} {getattr(config, name)!r}: expected one of {', '.join(known)}")
    teacher = config.teacher if needs_teacher(config) else ()
    weights, shares = config.teacher_weights if teacher else None, config.teacher_shares if teacher else None
    for name, values in (("teacher_weights", weights), ("teacher_shares", shares)):
        if values and len(values) != len(teacher):
            raise ValueError(f"{len(teacher)} --teacher, but {len(values)} {flag(name)}: expected one a teacher")
    with torch.device("meta"):  # an unknown name raises; no weights are made for that
        for name in (config.student, *teacher):
            models.build_model(name, 2)
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device} cannot be used here: {str(error).splitlines()[0]}") from None
    if config.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard needs the package of that name: pip install tensorboard")
    dtype = (config.teacher_dtype or fast_dtype(config.device)) if teacher else None
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--teacher-dtype {dtype!r}: expected one of float32, bfloat16")
    return dataclasses.replace(config, teacher=tuple(teacher), teacher_weights=weights, teacher_shares=shares,
                               teacher_dtype=dtype, clip=config.clip if needs_clip(config) else None)


def fast_dtype(device):
    """The dtype in which a frozen network runs fastest there: bfloat16 where the hardware multiplies it."""
    if torch.device(device).type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def settings(config):
    """The settings that decide the result, as JSON has them."""
    return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(config).items() if k not in PLACES}))


def run_folder(config):
    teacher = "+".join(config.teacher) or "none"
    name = f"{config.dataset}-{config.method}-{teacher}-{config.student}-s{config.seed}"
    return Path(config.out or Path("runs") / name)


@contextlib.contextmanager
def held(config, wait=False):
    """The run's folder, with its config.json, for this process (of several, rank 0) alone. Raises ValueError where it
    holds something else than this run, and where another process has it, unless told to wait."""
    folder = run_folder(config)
    with contextlib.ExitStack() as stack:
        first(lambda: rank() or claim(config, folder, stack, wait))
        yield folder


def claim(config, folder, stack, wait):
    """Lock the folder until `stack` is left, and write config.json or see that the one there has the same settings."""
    known = folder / "config.json"
    if folder.exists() and not known.is_file() and any(name[0] != "." for name in os.listdir(folder)):
        raise ValueError(f"{folder} is not empty and holds no run (no config.json); --out names another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = data.lock(folder / ".lock", lambda file: f"{folder} is in use by process {file.read().decode()}", wait)
    stack.enter_context(lock)
    stack.callback((folder / ".lock").unlink)
    lock.truncate(0)
    lock.write(str(os.getpid()).encode())
    lock.flush()
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink()
    begun = any((folder / file).is_file() for file in ("last.pt", "summary.json"))
    if begun and config.overwrite:
        for file in ("summary.json", "last.pt", "student.pt", "log.csv", "report.json"):  # nothing that is not a run's
            (folder / file).unlink(missing_ok=True)
    elif begun:
        with data.undamaged(known, "--overwrite starts the run anew"):
            old, new = json.loads(known.read_text())["settings"], settings(config)
            differ = [f"{flag(k)} {old.get(k)} there, {new.get(k)} here" for k in {**old, **new}
                      if old.get(k) != new.get(k)]
        if differ:
            raise ValueError(f"{folder} holds a run with other settings: {'; '.join(differ)}; --out names another "
                             "folder, --overwrite starts anew")
        return
    source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(HERE.glob("*.py")))).hexdigest()
    about = {"settings": settings(config), "places": {name: getattr(config, name) for name in PLACES},
             "torch": torch.__version__, "source": source}
    data.write_atomically(known, json.dumps(about, indent=2).encode())


# Several processes, one a GPU, as torchrun starts them ----------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def join(config):
    """Where torchrun started this process, join the others; -> the config with this process's own device."""
    if "WORLD_SIZE" not in os.environ:
        return config
    if config.device.startswith("cuda"):
        config = dataclasses.replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(config.device)
    if not dist.is_initialized():  # ranks wait for each other while one of them makes CLIP's targets: for hours
        dist.init_process_group("nccl" if config.device.startswith("cuda") else "gloo", timeout=timedelta(days=2))
    return config


def first(work):
    """work() on every rank, on rank 0 before the others, which find what it downloaded or cached."""
    if rank() > 0:
        dist.barrier()
    result = work()
    if rank() == 0 and world() > 1:
        dist.barrier()
    return result


# Data and teachers ----------------------------------------------------------------------------------------------------


def load_splits(config):
    """{"train", "test" and the data set's shifts: Split}, images as they come (CLIP sees those)."""
    names = ("train", "test", *data.DATASETS[config.dataset].shifts)
    splits = {name: data.load_dataset(config.dataset, config.data_dir, name) for name in names}
    if config.fraction < 1 or config.holdout > 0:
        kept = 1 - config.holdout
        if config.holdout:
            splits["test"] = data.subset(splits["train"], kept, 1)
        splits["train"] = data.subset(splits["train"], 0, kept * config.fraction)
    return splits


def resized(split, config):
    """A split as the classifiers see it: at --image-size, on the device."""
    images = data.resize(split.images, config.image_size)
    return split._replace(images=images.to(config.device) if isinstance(images, torch.Tensor) else images)


class Teachers(torch.nn.Module):
    """Frozen conventional teachers as one: mean logits, concatenated features (see `richkd.fuse_teachers`), both
    float32, computed in `dtype`, "float32" or "bfloat16"."""

    def __init__(self, teachers, shares, dtype):
        super().__init__()
        self.teachers, self.shares, self.dtype = torch.nn.ModuleList(teachers), shares, dtype
        self.num_features = sum(teacher.num_features for teacher in teachers)

    def forward(self, images):
        bfloat16 = torch.autocast(images.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")
        with torch.inference_mode(), bfloat16:
            logits, features = zip(*(teacher(images) for teacher in self.teachers))
        # Made outside of inference mode, so that the student's graph may hold them.
        return richkd.fuse_teachers(logits, self.shares), torch.cat(features, 1).float()  # (B,K), (B,C)


def load_teachers(config, splits):
    """The conventional teachers, frozen, on the device. One without a checkpoint is trained first by this script's own
    `fit`, in the cache; it is the same for every student, method and seed."""
    teachers = []
    for name, weights in zip(config.teacher, config.teacher_weights or [None] * len(config.teacher)):
        if weights is None:
            own = resolve(Config(dataset=config.dataset, image_size=config.image_size, method="scratch", student=name,
                                 fraction=config.fraction, holdout=config.holdout, epochs=config.epochs,
                                 batch_size=config.batch_size, weight_decay=config.weight_decay, amp=config.amp,
                                 device=config.device, workers=config.workers))
            digest = hashlib.sha256(json.dumps(settings(own), sort_keys=True).encode()).hexdigest()[:8]
            folder = Path(config.cache_dir) / f"teacher-{config.dataset}-{name}-{digest}"
            with held(dataclasses.replace(own, out=str(folder)), wait=True):
                if not (folder / "summary.json").is_file():
                    fit(own, folder, splits)
            weights = folder / "student.pt"
        model = models.load_weights(name, weights, len(splits["train"].class_names))
        teachers.append(models.freeze(model))
    return Teachers(teachers, config.teacher_shares, config.teacher_dtype).to(config.device) if teachers else None


def load_clip(config):
    """-> (CLIP on the device, its tokenizer). The tiny one is trained first, in the cache."""
    path = config.clip
    if config.clip == "tiny":
        made_of = inspect.getsource(clip_model.train_tiny_clip) + "".join(data.CAPTIONS)
        digest = hashlib.sha256(made_of.encode() + data.render_captions(64)[0].numpy().tobytes()).hexdigest()
        path = Path(config.cache_dir) / f"clip-tiny-{digest[:8]}.pt"
        if not path.is_file():
            progress = data.Progress("tiny CLIP", 1000, "steps")
            clip = clip_model.train_tiny_clip(
                *data.render_captions(24000), data.CAPTIONS, device=config.device,
                progress=lambda done, total: progress.update(done, keep=done == total))
            data.save(path, clip.state_dict())
    clip = clip_model.load_clip(path, config.cache_dir)
    tokenizer = clip_model.Tokenizer()  # bytes alone
    if clip.vocab_size != tokenizer.vocab_size:
        tokenizer = clip_model.Tokenizer(clip_model.load_merges(config.bpe, config.cache_dir))
    return clip.to(config.device), tokenizer


def class_embeddings(config, clip, tokenizer, class_names):
    """What CLIP's cosines are taken with, a list of (K,D): one, the mean over the templates, or with --average logits
    one for each template, whose logits are averaged."""
    templates = clip_model.load_templates(config.prompts or PROMPTS)
    sets = [[template] for template in templates] if config.average == "logits" else [templates]
    progress = data.Progress("prompts", len(class_names) * len(templates), "prompts")
    return [clip_model.class_features(clip, tokenizer, class_names, some, progress=lambda done, total: progress.update(
        i * total + done, keep=i * total + done == progress.total)) for i, some in enumerate(sets)]


def clip_view(config, clip, classes, images):
    """What CLIP says of uint8 images (B,3,H,W): cosines (B,K) with `class_embeddings`, unit-length features (B,D)."""
    with torch.inference_mode(), autocast(config):
        images = clip_model.preprocess(images.to(config.device), clip.visual.input_resolution)
        features = F.normalize(clip.encode_image(images).float(), dim=1)
    return sum(richkd.zero_shot_logits(features, w, 1.0) for w in classes) / len(classes), features


def load_targets(config, clip, tokenizer, splits):
    """CLIP's view of every image of each split, unaugmented, computed once and kept in the cache:
    {split name: (cosines (N,K), unit-length features (N,D)), both float16}."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    class_names = next(iter(splits.values())).class_names
    # Once for all splits, and only where one is not in the cache.
    classes = functools.cache(lambda: class_embeddings(config, clip, tokenizer, class_names))

    def blocks(split, start):
        for images in data.blocks(split.images, clip.visual.input_resolution, start, config.workers):
            yield clip_view(config, clip, classes(), images)

    targets = {}
    for name, split in splits.items():
        key = {"checkpoint": digest.hexdigest(), "templates": clip_model.load_templates(config.prompts or PROMPTS),
               "class_names": split.class_names, "dataset": config.dataset, "split": name,
               "images": data.fingerprint(split.images), "amp": config.amp,
               **({"average": config.average} if config.average != "embeddings" else {})}
        short = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
        path = Path(config.cache_dir) / f"targets-{config.dataset}-{name}-{short}.bin"
        shape = (len(split.labels), len(split.class_names), clip.embed_dim)
        targets[name] = data.cached_targets(path, key, shape, lambda start: blocks(split, start))
    return targets


# Training -------------------------------------------------------------------------------------------------------------


def autocast(config):
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.amp)


def to_input(images, mean, std):
    """uint8 (B,3,H,W) -> what the classifiers read: float32, normalised, channels_last."""
    return data.normalize(images, mean, std).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(model, split, config):
    """-> logits (N,K), float32, on the CPU: what `model` in eval mode says of every image of a split."""
    info = data.DATASETS[config.dataset]
    model.eval()
    logits = torch.zeros(len(split.labels), len(split.class_names), device=config.device)
    for images, _, index in data.batches(split, 500 * world(), rank=rank(), world=world(), workers=config.workers,
                                         device=config.device):
        with autocast(config):
            logits[index] = model(to_input(images, info.mean, info.std))[0].float()
    if world() > 1:  # each row was filled by one rank
        dist.all_reduce(logits)
    return logits.cpu()


def accuracy(logits, labels):
    """Top-1 in percent."""
    return 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def learning_rate(config, epoch):
    """The rate of an epoch, counted from 0: divided by 10 after epochs 150, 180 and 210 of 240 (Tian 2020), on ImageNet
    after 30, 60 and 90 of 100, or after the same fractions of another number of epochs."""
    decays = (30, 60, 90) if config.dataset == "imagenet" else (62.5, 75, 87.5)
    return config.lr * 0.1 ** sum(100 * epoch >= percent * config.epochs for percent in decays)


class Step(torch.nn.Module):
    """Student and criterion as one module, whose gradients DistributedDataParallel averages."""

    def __init__(self, student, criterion):
        super().__init__()
        self.student, self.criterion = student, criterion

    def forward(self, inputs, *supervision):
        logits, features = self.student(inputs)
        return *self.criterion(logits, features, *supervision), logits


@contextlib.contextmanager
def signals():
    """-> a list that SIGINT and SIGTERM add themselves to, instead of ending the process at once."""
    caught = []
    before = {number: signal.signal(number, lambda number, frame: caught.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agreed(caught, config):
    """The signal that any of the ranks caught, 0 for none: all ranks stop at the same step."""
    number = max(caught, default=0)
    if world() > 1:
        number = torch.tensor(number, device=config.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def train_epoch(config, epoch, train, step, optimizer, teachers, targets, scale, progress, part=None, caught=()):
    """One pass over the training split, or what is missing of one after `part`, up to a caught signal: -> {"images",
    "steps", "seconds", "sums"} of the pass, with the sums over steps of "loss", "ce", "logit", "feature",
    "train_accuracy". Raises FloatingPointError where the loss is no longer finite."""
    # Everything random is a function of seed, epoch and step, so that a resumed run repeats it exactly.
    seed, info, N = config.seed * 100_003 + epoch, data.DATASETS[config.dataset], len(train.labels)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, epoch)
    step.train()
    every = 1 if torch.device(config.device).type == "cpu" else 50  # reading a loss stalls a GPU
    images, steps, seconds, sums = (part or {"images": 0, "steps": 0, "seconds": 0, "sums": {}}).values()
    began, finite = time.time() - seconds, math.nan
    total = torch.tensor(list(sums.values()) or 0, dtype=torch.float64, device=config.device)
    for pixels, labels, index, *clip in data.batches(train, config.batch_size, seed, images, rank(), world(),
                                                     config.workers, config.device, targets or (), config.augmix):
        torch.manual_seed((seed * 2**32 + steps) % 2**63)  # dropout
        inputs, steps, images = to_input(pixels, info.mean, info.std), steps + 1, min(images + config.batch_size, N)
        teacher_outputs = teachers(inputs) if teachers else (None, None)
        clip_outputs = (scale * clip[0].float(), clip[1].float()) if clip else (None, None)
        stop = steps % every == 0 or images == N
        try:
            with autocast(config):
                loss, parts, logits = step(inputs, *teacher_outputs, *clip_outputs, labels, index)
            right = 100 * (logits.detach().argmax(1) == labels).float().mean()
            sums = {"loss": loss.detach(), **parts, "train_accuracy": right}
            total = total + torch.stack(list(sums.values())).double()
            if stop:
                if not total[0].isfinite():
                    raise ValueError("the loss is not finite")
                finite = loss.item()
                if rank() == 0:
                    progress.update(epoch * N + images, f"epoch {epoch + 1}/{config.epochs} | loss {finite:.3f} | "
                                    f"accuracy {right.item():.1f} %")
        except ValueError as error:
            raise FloatingPointError(f"epoch {epoch + 1}, step {steps}: {error}; last finite loss {finite:.4g}; the "
                                     f"run folder keeps epoch {epoch}; a smaller --lr may help") from None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if stop and agreed(caught, config):
            break
    else:
        images = N
    if world() > 1:
        dist.all_reduce(total)
    return {"images": images, "steps": steps, "seconds": time.time() - began,
            "sums": dict(zip(sums, (total / world()).tolist()))}


def fit(config, folder, splits):
    """Train config.student on splits["train"], going on from folder/last.pt where there is one; write student.pt and
    summary.json. Returns the summary. SIGINT and SIGTERM finish the step, save and raise KeyboardInterrupt."""
    # What can be missing is asked for before anything that takes long: given teachers, CLIP, then teachers to train.
    teachers = load_teachers(config, splits) if config.teacher_weights else None
    clip_targets, scale = {}, None
    if config.clip:
        clip, tokenizer = first(lambda: load_clip(config))
        clip_targets = first(lambda: load_targets(config, clip, tokenizer, splits))
        scale = config.clip_scale or clip.logit_scale.exp().item()
        del clip
    teachers = teachers or load_teachers(config, splits)
    splits = {name: resized(split, config) for name, split in splits.items()}
    train, N = splits["train"], len(splits["train"].labels)
    targets = clip_targets.get("train")
    if targets and isinstance(train.images, torch.Tensor):  # the images live on the device, so can the targets
        targets = [table.to(config.device) for table in targets]

    torch.manual_seed(config.seed)
    student = models.build_model(config.student, len(train.class_names))
    criterion = richkd.RichKD(
        student.num_features, teachers.num_features if teachers else 0, targets[1].shape[1] if targets else 0, N,
        alpha=config.alpha, lam=config.lam, temperature=config.temperature, logit_weight=config.logit_weight,
        feature_weight=config.feature_weight, logit_loss=config.logit_loss, standardize=config.standardize,
        feature_loss=config.feature_loss, num_negatives=config.num_negatives, negatives=config.negatives,
        labels=train.labels, bank_dtype=torch.float32 if isinstance(train.images, torch.Tensor) else torch.float16,
        seed=config.seed)
    step = Step(student, criterion).to(config.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(step.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay,
                                fused=True)
    parts, log, part = {"student": student, "criterion": criterion, "optimizer": optimizer}, [], None
    if (folder / "last.pt").is_file():
        log, part = restore(folder / "last.pt", parts)
        if rank() == 0:
            print(f"{folder}: going on after {place(config, log, part, N)}", file=sys.stderr)
    if config.compile:
        for module in (student, *(teachers.teachers if teachers else ())):
            module.compile()
    if world() > 1:  # BatchNorm statistics and banks are each rank's own (the banks are kept equal by RichKD)
        step = torch.nn.parallel.DistributedDataParallel(step, broadcast_buffers=False)
    if config.tensorboard and rank() == 0:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder)

    start = len(log) * N + (part["images"] if part else 0)
    progress = data.Progress(f"{config.method} {config.student}", config.epochs * N, start=start)
    with signals() as caught:
        for epoch in range(len(log), config.epochs):
            part = train_epoch(config, epoch, train, step, optimizer, teachers, targets, scale, progress, part, caught)
            for buffer in student.buffers() if world() > 1 else ():  # BatchNorm statistics: rank 0's are saved, tested
                dist.broadcast(buffer, 0)
            if part["images"] == N:
                means = {name: value / part["steps"] for name, value in part["sums"].items()}
                test_accuracy = accuracy(predict(student, splits["test"], config), splits["test"].labels)
                log.append({"epoch": epoch + 1, "lr": learning_rate(config, epoch), **means,
                            "test_accuracy": test_accuracy, "images_per_second": N / part["seconds"],
                            "seconds": part["seconds"]})
                part = None
            if rank() == 0:
                rows = [log[0], *(row.values() for row in log)] if log else []
                text = "".join(",".join(map(str, row)) + "\n" for row in rows)
                data.write_atomically(folder / "log.csv", text.encode())
                state = {name: module.state_dict() for name, module in parts.items()}
                data.save(folder / "last.pt", {**state, "log": log, "part": part})
            if number := agreed(caught, config):
                raise KeyboardInterrupt(number, f"; {folder} keeps {place(config, log, part, N)}")
            if rank() == 0:
                progress.update((epoch + 1) * N, "epoch {epoch}/{epochs} | loss {loss:.3f} | accuracy "
                                "{train_accuracy:.1f} % | test {test_accuracy:.1f} %".format(
                                    epochs=config.epochs, **log[-1]), keep=True)
                if config.tensorboard:
                    for name, value in log[-1].items():
                        writer.add_scalar(name, value, epoch + 1)
                    writer.flush()

    info, weights = data.DATASETS[config.dataset], {name: value.cpu() for name, value in student.state_dict().items()}
    summary = summarize(config, log, accuracies(config, student, teachers, clip_targets, scale, splits))
    if rank() == 0:
        data.save(folder / "student.pt", {
            "model_name": config.student, "model": weights, "class_names": train.class_names, "mean": list(info.mean),
            "std": list(info.std), "image_size": config.image_size, "dataset": config.dataset})
        data.write_atomically(folder / "summary.json", json.dumps(summary, indent=2).encode())
    if world() > 1:
        dist.barrier()  # the files are there
    return summary


def accuracies(config, student, teachers, clip_targets, scale, splits):
    """{"clip", "teacher", "fused", "student": {split: top-1 in percent}} on the splits not trained on; without a
    teacher or without CLIP, what needs it is empty."""
    table = {"clip": {}, "teacher": {}, "fused": {}, "student": {}}
    for name, split in splits.items():
        if name == "train":
            continue
        logits = {"student": predict(student, split, config)}
        if teachers:
            logits["teacher"] = predict(teachers, split, config)
        if clip_targets:
            logits["clip"] = scale * clip_targets[name][0].float()
        if teachers and clip_targets:
            logits["fused"] = richkd.fuse_logits(logits["teacher"], logits["clip"], config.alpha)
        for who, z in logits.items():
            table[who][name] = accuracy(z, split.labels)
    return table


def summarize(config, log, table):
    """What summary.json holds. The accuracies are the last epoch's; the best one is chosen on the test split itself, so
    it stands beside them for information only. Seconds are those of training the student, without teacher and CLIP."""
    best = max(log, key=lambda row: row["test_accuracy"])
    return {
        "dataset": config.dataset, "method": config.method, "teacher": "+".join(config.teacher) or None,
        "student": config.student, "seed": config.seed, "epochs": config.epochs, "clip": config.clip,
        **{f"{who}_accuracy": table[who].get("test") for who in ("student", "teacher", "clip", "fused")},
        "shift_accuracy": table["student"].get("shift"), "accuracies": table,
        "best_test_accuracy": best["test_accuracy"], "best_test_epoch": best["epoch"],
        "images_per_second": sum(row["images_per_second"] for row in log) / len(log),
        "seconds": sum(row["seconds"] for row in log), "device": config.device, "torch": torch.__version__}


def read_checkpoint(path):
    """last.pt or student.pt. Raises ValueError where it is damaged, which torch, checking no sums, does not notice."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:
                return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # damaged bytes can raise anything
        pass
    raise ValueError(f"{path} is damaged; --overwrite starts the run anew")


def restore(path, parts):
    """Read last.pt into the modules and the optimiser `parts`; -> its log and what it holds of an unfinished epoch.
    Raises ValueError where it is damaged."""
    last = read_checkpoint(path)
    try:
        for name, module in parts.items():
            module.load_state_dict(last[name])
        log, part = last["log"], last["part"]
        [row["test_accuracy"] + row["images_per_second"] + row["seconds"] for row in log]  # raises now, not later
        part and sum((part["images"], part["steps"], part["seconds"], *part["sums"].values()))
        return log, part
    except Exception:  # a file that something else wrote can raise anything, too
        raise ValueError(f"{path} is damaged; --overwrite starts the run anew") from None


def place(config, log, part, N):
    """Where a run stands, for people."""
    return f"epoch {len(log) + bool(part)} of {config.epochs}" + (f", {part['images']} of {N} images" if part else "")


def run(config):
    """What the command does: train, unless the run folder holds the finished run. Returns the summary, a dict."""
    config = join(resolve(config))
    if config.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = not config.deterministic
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)  # what has no such algorithm is named
    with held(config) as folder:
        if not (folder / "summary.json").is_file():
            return fit(config, folder, first(lambda: load_splits(config)))
        with data.undamaged(folder / "summary.json", "--overwrite trains anew"):
            summary = json.loads((folder / "summary.json").read_text())
            table(summary)
        show(f"{folder} holds this run, finished; --overwrite trains anew")
        return summary


def table(summary):
    """The summary's accuracies as text: a row a model, a column a split."""
    names = {"clip": f"CLIP zero-shot ({summary['clip']})", "teacher": f"teacher {summary['teacher']}",
             "fused": "fused teacher", "student": f"student {summary['student']} ({summary['method']})"}
    rows = {who: row for who, row in summary["accuracies"].items() if row}
    width = max(len(names[who]) for who in rows)
    lines = [" " * width + "".join(f"{split:>10}" for split in rows["student"])]
    for who, row in rows.items():
        lines.append(f"{names[who]:{width}}" + "".join(f"{value:10.1f}" for value in row.values()))
    return "\n".join(lines)


def parse(config_class, text, arguments=None):
    """Command line -> a config: a flag a field of the dataclass. A wrong command line is one line and exit 2."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: sys.exit(print(f"error: {message}; --help lists the flags", file=sys.stderr) or 2)
    for field in dataclasses.fields(config_class):
        extra = dict(field.metadata)
        if field.default is False:
            extra["action"] = "store_true"
        elif "nargs" not in extra:
            extra.setdefault("type", type(field.default))
        default = "" if field.default in (None, False) else f" ({field.default})"
        extra["help"] = extra["help"].replace("%", "%%") + default
        parser.add_argument(flag(field.name), default=field.default, **extra)
    return config_class(**vars(parser.parse_args(arguments)))


def show(text):
    if rank() == 0:
        print(text)


def main(job):
    """Run a script's job; what the user can mend is one line on stderr and exit status 2."""
    def interrupt(number, frame):
        raise KeyboardInterrupt(number, "")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    clear = "\r\033[K" if sys.stderr.isatty() else ""  # what is left of a progress line
    try:
        job()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{clear}error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        number, state = error.args or (signal.SIGINT, "")
        if rank() == 0:
            print(f"{clear}interrupted{state}; the same command goes on", file=sys.stderr)
        sys.exit(128 + number)


if __name__ == "__main__":
    main(lambda: show(table(run(parse(Config, __doc__)))))
