"""Train a student: alone, by a baseline of distillation, or by RichKD (arXiv 2511.09286).

    python train.py                    # rendered shapes and a tiny CLIP: a CPU, no download
    python train.py --dataset cifar100 --teacher resnet110 --student resnet20    # as in the paper

What a run needs (the teacher, CLIP's targets) is made first, and cached. The same command goes on
after its last finished epoch, on a CPU to the same bits. Accuracies are top-1 %, the last ones."""

import clip_model
import contextlib
import data
import dataclasses
import difflib
import functools
import hashlib
import metrics
import models
import os
import richkd
import time
import torch
import torch.distributed as dist
import torch.nn.functional as F
from math import inf, isfinite
from pathlib import Path
from support import clip_files, command, files, folders, runs, shapes
from support.command import autocast, flag, rank, rank_zero_first, setting, world
from typing import NamedTuple

PROMPTS = Path(__file__).resolve().parent / "prompts.txt"  # the authors' templates
# What a method fixes. All else is shared, so that methods differ in their loss alone.
METHODS = {
    "kd": {"alpha": 1.0, "feature_weight": 0.0}, "crd": {"lam": 1.0, "logit_weight": 0.0},
    "dkd": {"alpha": 1.0, "feature_weight": 0.0, "logit_loss": "dkd"},
    "mlkd": {"alpha": 1.0, "feature_weight": 0.0, "logit_loss": "mlkd"},
    "kd-ls": {"alpha": 1.0, "feature_weight": 0.0, "standardize": True},
    "richkd-l": {"feature_weight": 0.0}, "richkd-f": {"logit_weight": 0.0}, "richkd": {},
    "scratch": {"logit_weight": 0.0, "feature_weight": 0.0}}
# What depends on the data set. The schedule is that of CRD (Tian 2020), which the paper follows.
CIFAR = dict(teacher=("resnet110",), student="resnet20", clip="ViT-L/14", num_negatives=16384,
             epochs=240, batch_size=64, lr=0.05, weight_decay=5e-4)
RECIPES = {
    # A quarter of its 250 images as negatives (the paper: a third of CIFAR's); CLIP sees 32 x 32.
    "shapes": {**CIFAR, "teacher": ("resnet14",), "student": "resnet8", "clip": "tiny",
               "image_size": 16, "num_negatives": 64, "epochs": 100, "batch_size": 16, "lr": 0.02},
    "cifar10": CIFAR, "cifar100": CIFAR, "tiny-imagenet": CIFAR, "folder": CIFAR,
    "imagenet": {**CIFAR, "teacher": ("resnet34",), "student": "resnet18", "epochs": 100,
                 "batch_size": 256, "lr": 0.1, "weight_decay": 1e-4}}

@dataclasses.dataclass(frozen=True)
class Shared:
    """The settings of train.py and evaluate.py alike: what CLIP is asked, where work is done."""
    class_names: str = setting(None, "a file of the names that CLIP is asked for, one a line")
    clip: str = setting(None, "tiny, a public name such as ViT-L/14, or a checkpoint")
    clip_activation: str = setting(None, "else its file's", choices=tuple(clip_model.ACTIVATIONS))
    bpe: str = setting(None, "CLIP's bpe_simple_vocab_16e6.txt.gz; else downloaded")
    prompts: str = setting(None, "templates, {} for the name; default: the twelve")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")
    workers: int = setting(min(8, data.cores()), "that read image files", within=(0, inf))
    cache_dir: str = setting(None, "for what is made once; else $RICHKD_CACHE, ~/.cache/richkd")

    __post_init__ = command.normalize

@dataclasses.dataclass(frozen=True)
class Config(Shared):
    """Every setting; the command line is made from it. None: what RECIPES says, or none."""
    dataset: str = setting("shapes", "data set", choices=tuple(data.DATASETS))
    data_dir: str = setting("data", "where it lies or is downloaded to; some as a zip")
    image_size: int = setting(None, "side of images; default: the data set's", within=(8, inf))
    fraction: float = setting(1.0, "share of the training images that is used", within=(1e-9, 1))
    holdout: float = setting(0.0, "share of them that is the test split", within=(0, 0.9))
    method: str = setting("richkd", "what the student learns from", choices=tuple(METHODS))
    teacher: tuple = setting(None, "architecture; several are averaged", nargs="+", metavar="NAME")
    teacher_weights: tuple = setting(None, "or `imagenet`; else trained", nargs="+", metavar="FILE")
    student: str = setting(None, "the student's architecture")
    clip_scale: float = setting(None, "of cosines; default: exp(logit_scale)", within=(1e-9, 1e9))
    alpha: float = setting(0.7, "the teacher's share of the fused logits", within=(0, 1))
    lam: float = setting(0.7, "the teacher's share of the fused features", within=(0, 1))
    temperature: float = setting(3.0, "of the logit loss", within=(1e-9, 1e9))
    ce_weight: float = setting(1.0, "of the cross-entropy; 0: none", within=(0, inf))
    logit_weight: float = setting(3.0, "of the logit loss; 0: none", within=(0, inf))
    feature_weight: float = setting(0.8, "of the feature loss; 0: none", within=(0, inf))
    logit_loss: str = setting("kd", "against the fused logits", choices=("kd", "dkd", "mlkd"))
    standardize: bool = setting(False, "standardise both logits first (Sun 2024)")
    num_negatives: int = setting(None, "of the feature loss", within=(1, inf))
    negatives: str = setting("shared", "one draw a batch, or more", choices=("shared", "per-image"))
    epochs: int = setting(None, "passes over the images, the teacher's too", within=(1, inf))
    batch_size: int = setting(None, "images a step", within=(1, inf))
    lr: float = setting(None, "learning rate at the start", within=(1e-9, 1e9))
    weight_decay: float = setting(None, "of SGD with momentum .9", within=(0, inf))
    seed: int = setting(0, "of all that is drawn (a teacher trained here: 0)", within=(0, 2**31))
    amp: bool = setting(False, "bfloat16, for student and frozen teacher; on a CPU for CLIP, too")
    deterministic: bool = setting(False, "always the same numbers on CUDA, slower; a CPU has them")
    no_graph: bool = setting(False, "on one GPU call each step, instead of replaying a CUDA graph")
    out: str = setting(None, "run folder; default: runs/<data set>-<method>-...")
    overwrite: bool = setting(False, "start anew where the run folder holds a run")

def for_size(name, image_size):
    """`resnet18` and `resnet50` in the zoo: above 64 pixels ImageNet's, else CIFAR papers'."""
    other = {"resnet50": "resnet50_imagenet"} if image_size > 64 else {"resnet18": "resnet18_cifar"}
    if name in other:
        files.note(f"{name} for images of {image_size} x {image_size} is {other[name]} here")
    return other.get(name, name)

def unread(config):
    """The names of the settings that have no effect with the others of a config."""
    fixed = METHODS[config.method]
    overruled = [name for name in fixed if getattr(config, name) != fixed[name]]
    config = dataclasses.replace(config, **fixed)
    logit, feature = config.logit_weight > 0, config.feature_weight > 0
    teacher = logit and config.alpha > 0 or feature and config.lam > 0
    clip = logit and config.alpha < 1 or feature and config.lam < 1
    tiny = (config.clip or RECIPES[config.dataset]["clip"]) == "tiny"
    reads = {
        ("logit_loss", "standardize"): logit, ("lam", "num_negatives", "negatives"): feature,
        ("temperature",): logit and config.logit_loss != "mlkd",
        ("alpha",): logit or teacher and clip, ("teacher", "teacher_weights"): teacher,
        ("clip", "clip_scale", "prompts"): clip, ("clip_activation", "bpe"): clip and not tiny,
        ("data_dir",): config.dataset != "shapes"}
    return overruled + [name for names, read in reads.items() if not read for name in names]

def resolve(config):
    """Fill in what data set and method decide; -> with a torch.device. ValueError: a wrong one."""
    command.check(config)
    fixed, default = METHODS[config.method], Config()
    for name, value in fixed.items():
        given = getattr(config, name)
        if given not in (value, getattr(default, name)):
            raise ValueError(f"{flag(name)} {given} does not go with --method {config.method}")
    recipe = {"image_size": data.DATASETS[config.dataset].image_size, **RECIPES[config.dataset]}
    student = config.student or recipe["student"]
    if student.startswith(("mobilenet", "shufflenet")) and config.dataset != "imagenet":
        recipe["lr"] = 0.01  # as in RepDistiller's train_student.py
    missing = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **missing, **fixed)
    if not (config.logit_weight or config.feature_weight or config.ce_weight):
        raise ValueError("--ce-weight, --logit-weight, --feature-weight: all are 0")
    changes, without = {"student": for_size(student, config.image_size)}, unread(config)
    if "teacher" in without:
        changes |= {"teacher": (), "teacher_weights": None}
    elif not config.teacher_weights:  # else the file has what it has
        changes["teacher"] = tuple(for_size(name, config.image_size) for name in config.teacher)
    if len(config.teacher_weights or {*config.teacher}) != len(config.teacher):
        raise ValueError("--teacher, --teacher-weights: expected a file for each, or no name twice")
    if "clip" in without:
        changes |= dict.fromkeys(("clip", "clip_activation", "bpe", "prompts"))
    device = command.use_device(config.device, config.deterministic)
    config = dataclasses.replace(config, device=device, **changes)
    for name in {config.student, *config.teacher} - models.ZOO.keys():
        near = difflib.get_close_matches(name, models.ZOO, 5, 0)
        raise ValueError(f"--teacher, --student: no {name!r} in models.py; nearest are {near}")
    return config

def load_split(config, name):
    """A split of the config's data set, with --class-names, its images as they come, for CLIP;
    "test" is, with --holdout, a part of the training images, which "train" lacks."""
    kept, test = 1 - config.holdout, name == "test"
    source = "train" if test and config.holdout else name
    split = data.load_dataset(config.dataset, config.data_dir, source, config.cache_dir)
    if config.class_names:
        lines = clip_model.load_lines(config.class_names)
        split = data.rename_classes(split, lines, config.class_names)
    if source == "train":
        return data.subset(split, kept if test else 0, 1 if test else kept * config.fraction)
    return split

def load_splits(config):
    """{"train", "test" and the data set's shifts: Split} of a run."""
    names = ("train", "test", *data.DATASETS[config.dataset].shifts)
    splits = {name: load_split(config, name) for name in names}
    if config.holdout:
        files.note("--holdout: the data set's own test images are not read")
        folders.say_absent(splits["test"].labels.tolist(), splits["train"].ids, "--holdout")
    sizes = {name: len(split.labels) for name, split in splits.items()}
    if min(sizes["train"], config.batch_size) < 2 * world() or sizes["test"] < 2:
        raise ValueError(f"--batch-size {config.batch_size}, {sizes} images: too few for BatchNorm")
    return splits

def about_run(config, splits):
    """What a run depends on, as config.json has it: {"settings", "inputs": {"data": {split:
    `runs.identity`}, "files": {setting: digest of what it names}}}, of what its method reads."""
    named = {}
    if config.teacher_weights:
        named["teacher_weights"] = [
            models.imagenet_file(name)[2] if path == "imagenet" else files.file_digest(path)
            for name, path in zip(config.teacher, config.teacher_weights)]
    if config.clip:
        named["prompts"] = clip_model.load_templates(config.prompts or PROMPTS)
        named["bpe"] = files.file_digest(config.bpe) if config.bpe else "the public one"
        named["clip"] = config.clip
        if config.clip not in ("tiny", *clip_files.PUBLIC_CLIPS):  # of these it says all
            path, said = clip_files.find(config.clip, config.cache_dir)
            named["clip"] = files.json_digest([files.file_digest(path), said])
    identities = {name: runs.identity(split) for name, split in splits.items()}
    return {"settings": runs.settings(config), "inputs": {"data": identities, "files": named}}

class Teachers(torch.nn.ModuleList):
    """Frozen conventional teachers as one: mean logits, concatenated features, float32. With amp
    their weights are bfloat16 once and for all: autocast would cast them at every step."""
    def __init__(self, teachers, amp):
        super().__init__(teachers)
        self.dtype = torch.bfloat16 if amp else torch.float32
        self.to(self.dtype).num_features = sum(teacher.num_features for teacher in teachers)

    @torch.no_grad()
    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):
            pairs = [teacher(images.to(self.dtype)) for teacher in self]
        logits, features = zip(*pairs)
        return richkd.fuse_teachers(logits), torch.cat(features, 1).float()        # (B,K), (B,C)

def load_teachers(config, splits):
    """The conventional teachers, frozen, on the device, or None. One without a file is trained
    first. Raises ValueError where a file says that its classes or its images are others."""
    split, teachers, info = splits["train"], [], data.DATASETS[config.dataset]
    for name, given in zip(config.teacher, config.teacher_weights or [None] * len(config.teacher)):
        path = given or trained_teacher(config, name, splits)
        size = None if path == "imagenet" else runs.input_size(path, split, info)
        if size not in (None, config.image_size):
            raise ValueError(f"{path} needs --image-size {size}, here {config.image_size}")
        load = functools.partial(models.load_weights, name, path, len(split.class_names))
        teachers.append(models.freeze(rank_zero_first(load)))  # which may download it
    return Teachers(teachers, config.amp).to(config.device) if teachers else None

def trained_teacher(config, name, splits):
    """The path of a teacher in the cache, trained first where there is none of these settings and
    training images: the same one for every student, method and seed."""
    shared = ("dataset", "data_dir", "image_size", "fraction", "holdout", "epochs", "batch_size",
              "weight_decay", "amp", "deterministic", "no_graph", "device", "workers", "cache_dir")
    own = resolve(Config(method="scratch", student=name,
                         **{field: getattr(config, field) for field in shared}))
    about = about_run(own, {"train": splits["train"]})
    cache, kind = files.cache_folder(config.cache_dir), f"teacher-{config.dataset}-{name}-"
    folder = cache / (kind + files.json_digest(runs.key(about))[:16])
    if not (folder / "summary.json").is_file():
        for path in sorted(cache.glob(f"{kind}*/config.json"), key=os.path.getmtime)[-1:]:
            with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged one tells nothing
                differ = runs.difference(runs.key(files.read_json(path, "")), runs.key(about))
                files.note(f"teacher {name} is trained: {differ or 'the kept one is unfinished'}")
        fit(own, folder, splits, about, f"teacher {name}")
    return folder / "student.pt"

def tiny_clip(config):
    """The tensors of the tiny CLIP that reads `shapes`, trained first where the cache has none."""
    def train():
        with torch.random.fork_rng(devices=[]):  # its weights draw from the global generator
            torch.manual_seed(0)
            clip = clip_model.CLIP(**shapes.TINY_CLIP).to(config.device)
        shapes.train_tiny_clip(
            clip, clip_model.Tokenizer(shapes.MERGES), clip_model.preprocess,
            *shapes.render_captions(12000), shapes.CAPTIONS,
            progress=files.Progress("tiny CLIP", 500, "steps").update)
        return {name: tensor.cpu() for name, tensor in clip.state_dict().items()}
    path = files.cache_folder(config.cache_dir) / "clip-tiny"
    return runs.cached(path, {"version": shapes.VERSION}, train)

def load_clip(config):
    """-> CLIP on the device, its tokenizer, the scale of its logits. Raises as
    `clip_model.load_clip`. The image tower is float32 on a CPU (bfloat16 with --amp) and float16 on
    a GPU, as OpenAI's weights are: cosines change by 1e-4 on average, in bfloat16 by 2e-3."""
    if config.clip == "tiny":
        clip = clip_model.build_clip(tiny_clip(config))
    else:
        clip = clip_model.load_clip(config.clip, config.cache_dir, config.clip_activation)
    tokenizer = clip_model.Tokenizer(shapes.MERGES if config.clip == "tiny" else ())
    if config.bpe or clip.vocab_size != tokenizer.vocab_size:
        merges = clip_model.load_merges(config.bpe or clip_files.fetch_bpe(config.cache_dir))
        tokenizer = clip_model.Tokenizer(merges)
    scale = config.clip_scale or clip.logit_scale.exp().item()
    if config.device.type == "cuda":
        clip.visual.half()
    elif config.amp:
        clip.visual.bfloat16()
    return clip.to(config.device), tokenizer, scale

def class_embeddings(config, clip, tokenizer, class_names):
    """What CLIP's cosines are taken with: (K,D), the mean over the templates, equation (1)."""
    templates = clip_model.load_templates(config.prompts or PROMPTS)
    line = files.Progress("prompts", len(class_names) * len(templates), "prompts")
    text = clip_model.class_features(clip, tokenizer, class_names, templates, progress=line.update)
    return richkd.ensemble_text_features(text)                                      # (K,M,D)

@torch.inference_mode()
def clip_view(clip, classes, images):
    """uint8 images (B,3,H,W) -> CLIP's cosines (B,K) with `class_embeddings`, features (B,D)."""
    images = clip_model.preprocess(images, clip.visual.input_resolution).to(classes.device)
    dtype = next(clip.visual.parameters()).dtype
    features = clip.encode_image(images.to(dtype)).float()
    if dtype == torch.float16 and not features.isfinite().all():
        files.note("this CLIP exceeds float16: it goes on in float32")
        features = clip.visual.float()(images)
    features = F.normalize(features, dim=1)
    return richkd.zero_shot_logits(features, classes, 1.0), features

def clip_targets(config, clip, tokenizer, splits):
    """CLIP's view of every plain image of each split, from the cache or computed now: {split name:
    (cosines (N,K), unit-length features (N,D))}, float16 on the CPU."""
    class_names = next(iter(splits.values())).class_names
    # What the tensors do not tell: QuickGELU or GELU, and into how many heads a width is split.
    kinds = [[type(module).__name__, getattr(module, "heads", 0)] for module in clip.modules()]
    key = {"kinds": kinds, "clip": hashlib.sha256(), "merges": [*tokenizer.priority],
           "names": clip_model.prompt_names(class_names, tokenizer),
           "templates": clip_model.load_templates(config.prompts or PROMPTS)}
    for name, tensor in sorted(clip.state_dict().items()):
        values = tensor.cpu().contiguous().flatten().view(torch.uint8)  # NumPy has no bfloat16
        key["clip"].update(name.encode() + values.numpy().tobytes())
    key["clip"] = key["clip"].hexdigest()
    # The prompts are encoded once for all splits, and only where one is not in the cache.
    classes = functools.cache(lambda: class_embeddings(config, clip, tokenizer, class_names))
    def look(name):
        images = data.clip_images(splits[name].images, clip.visual.input_resolution)
        rows, line = [], files.Progress(f"CLIP's targets ({name})", len(images))
        for block in data.blocks(images, 250, config.workers):  # the CPU brings them to size
            view = clip_view(clip, classes(), block)
            if not torch.cat(view, 1).isfinite().all():
                raise FloatingPointError("CLIP's features are not finite numbers")
            rows.append([part.to("cpu", torch.float16) for part in view])           # (b,K), (b,D)
            line.update(line.done + len(block))
        return tuple(torch.cat(part) for part in zip(*rows))
    def kept(name):
        path = files.cache_folder(config.cache_dir) / f"targets-{config.dataset}-{name}"
        own = {**key, "images": runs.identity(splits[name])["content"]}
        return runs.cached(path, own, lambda: look(name))
    return {name: rank_zero_first(functools.partial(kept, name)) for name in splits}

class Run(NamedTuple):
    """What every step works with, on the device."""
    config: Config
    split: data.Split
    tables: tuple         # CLIP's cosines (N,K) and features (N,D), float16, or nothing
    scale: float          # of the cosines, or None
    teachers: Teachers    # or None
    student: torch.nn.Module
    criterion: richkd.RichKD
    optimizer: torch.optim.Optimizer
    mean: torch.Tensor    # (3,), of the images
    std: torch.Tensor     # (3,)
    rate: torch.Tensor    # (), the learning rate: within a CUDA graph a number would stand still
    sums: torch.Tensor    # (M,) float64, of the means that `train_step` returns

def average_gradients(run):
    """Under torchrun: every gradient becomes its mean over the ranks, in one message."""
    if world() == 1:
        return
    parameters = (*run.student.parameters(), *run.criterion.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient) / world())

def train_step(run, drawn):
    """One step, from the batch to the optimiser. It reads nothing from the device and copies
    nothing to it, so that a CUDA graph can replay it. -> (M,) float64: the loss, its parts and the
    accuracy, means over the batch, also added to run.sums. drawn: one item of `data.epoch`."""
    z_t, f_t, z_c, f_c = None, None, None, None
    images, y, index, *clip = data.look_up(run.split, run.tables, drawn)
    x = data.to_input(images, run.mean, run.std)     # (B,3,H,W): one crop for both networks
    if clip:  # of the plain image, computed beforehand
        cosines, features = clip
        z_c, f_c = run.scale * cosines.float(), features.float()                    # (B,K), (B,D)
    with autocast(run.config):
        if run.teachers:
            z_t, f_t = run.teachers(x)                                              # (B,K), (B,C)
        z_s, f_s = run.student(x)                                                   # (B,K), (B,C)
        loss, parts = run.criterion(z_s, f_s, z_t, f_t, z_c, f_c, y, index)
    run.optimizer.zero_grad()
    loss.backward()
    average_gradients(run)
    run.optimizer.step()
    accuracy = 100 * (z_s.detach().argmax(1) == y).float().mean()
    means = torch.stack([loss.detach(), *parts.values(), accuracy]).double()
    run.sums.add_(means)
    return means

def step_of(run):
    """`train_step` of this run as a function of what is drawn alone: on one GPU that holds the
    images a CUDA graph of it, elsewhere (torchrun's ranks talk, streams wait for files) a call."""
    step, alone = functools.partial(train_step, run), not dist.is_initialized()
    whole = run.config.device.type == "cuda" and data.is_in_memory(run.split.images)
    return command.CudaGraph(step) if alone and whole and not run.config.no_graph else step

def learning_rate(config, epoch):
    """The rate of an epoch, counted from 0: a tenth after epochs 150, 180, 210 of 240 (Tian 2020),
    on ImageNet after 30, 60, 90 of 100, and after the same shares of other numbers of epochs."""
    decays = (30, 60, 90) if config.dataset == "imagenet" else (62.5, 75, 87.5)
    return config.lr * 0.1 ** sum(100 * epoch >= percent * config.epochs for percent in decays)

def loss_parts(config):
    return [name for name in ("ce", "logit", "feature") if getattr(config, f"{name}_weight")]

def told(config, means):
    return " + ".join(f"{name} {means[name]:.2f}" for name in loss_parts(config))

def train_epoch(run, step, epoch, progress):
    """One pass over the training images. step: `step_of(run)`, the same in every epoch. -> {"loss",
    its parts, "train_accuracy"}, means over the steps. FloatingPointError: a loss not finite."""
    config, N = run.config, len(run.split.labels)
    names = ["loss", *loss_parts(config), "train_accuracy"]
    # All that an epoch draws is a function of seed and epoch: it can be repeated to the bit.
    seed = config.seed * 100_003 + epoch
    torch.manual_seed(seed)  # of negatives and dropout
    run.rate.fill_(learning_rate(config, epoch))
    for group in run.optimizer.param_groups:
        group["lr"] = run.rate  # also after a checkpoint, which brings its own
    run.student.train()
    run.sums.zero_()
    # Reading a number stalls a GPU, so the sums for the log stay there and are looked at rarely.
    every = 1 if config.device.type == "cpu" else 50
    batches = data.epoch(run.split, run.tables, config.batch_size, seed, rank(), world(),
                         config.workers, config.device)
    for steps, drawn in enumerate(batches, 1):
        means = step(drawn)
        if steps % every == 0:
            now = dict(zip(names, means.tolist(), strict=True))
            if not isfinite(now["loss"]):
                break
            done = min(N - 1, steps * config.batch_size)  # the last line is `fit`'s
            progress.update(epoch * N + done, told(config, now))
    if not isfinite(run.sums[0]):
        raise FloatingPointError(f"epoch {epoch + 1}, step {steps}: loss not finite; see --lr")
    if world() > 1:
        dist.all_reduce(run.sums)
    return dict(zip(names, (run.sums / world() / steps).tolist(), strict=True))

def classifier(model, config, size):
    """A network as a function: uint8 images (B,3,H,W), brought to `size` -> logits (B,K)."""
    info = data.DATASETS[config.dataset]
    def logits(images):
        with autocast(config):
            return model(data.to_input(data.resize(images, size), info.mean, info.std))[0]
    return logits

@torch.inference_mode()
def predict(subjects, blocks, progress=None, note=""):
    """Blocks of uint8 images through {name: function to logits (b,K)} -> {name: logits (N,K)}."""
    rows = {name: [] for name in subjects}
    for images in blocks:
        for name, subject in subjects.items():
            rows[name].append(subject(images).float())
        if progress:
            progress.update(progress.done + len(images), note)
    return {name: torch.cat(blocks).cpu() for name, blocks in rows.items()}

def accuracies(run, splits, targets):
    """{"clip", "teacher", "fused", "student": {split: top-1 in percent}} on splits at the
    classifiers' size; without a teacher, or without CLIP's targets, what needs it is empty."""
    config, table = run.config, {"clip": {}, "teacher": {}, "fused": {}, "student": {}}
    networks = ("teacher", run.teachers), ("student", run.student.eval())
    subjects = {who: classifier(net, config, config.image_size) for who, net in networks if net}
    for name, split in splits.items():
        logits = predict(subjects, data.blocks(split.images, None, config.workers, config.device))
        if name in targets:
            logits["clip"] = run.scale * targets[name][0].float()
        if {"clip", "teacher"} <= logits.keys():
            logits["fused"] = richkd.fuse_logits(logits["teacher"], logits["clip"], config.alpha)
        for who, z in logits.items():
            table[who][name] = 100 * metrics.top_k_accuracy(z, split.labels)
    return table

def begin(config, split, teachers, tables, scale):
    """The `Run` of a new student. tables, scale: CLIP's targets of the split, or () and None."""
    info, device = data.DATASETS[config.dataset], config.device
    if data.is_in_memory(split.images):  # the images are on the device, so can these be
        tables = tuple(table.to(device) for table in tables)
        split = split._replace(labels=split.labels.to(device))
    torch.manual_seed(config.seed)
    student = models.build_model(config.student, len(split.class_names))
    own = ("alpha", "lam", "temperature", "ce_weight", "logit_weight", "feature_weight",
           "logit_loss", "standardize", "num_negatives", "negatives", "seed")
    criterion = richkd.RichKD(
        student.num_features, teachers.num_features if teachers else 0,
        tables[1].shape[1] if tables else 0, len(split.labels), labels=split.labels,
        **{name: getattr(config, name) for name in own}).to(device)
    student.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD([*student.parameters(), *criterion.parameters()], lr=config.lr,
                                momentum=0.9, weight_decay=config.weight_decay, fused=True)
    mean, std, rate = (torch.tensor(x, device=device) for x in (info.mean, info.std, config.lr))
    sums = torch.zeros(2 + len(loss_parts(config)), dtype=torch.float64, device=device)
    return Run(config, split, tables, scale, teachers, student, criterion, optimizer, mean, std,
               rate, sums)

def fit(config, folder, splits, about, label):
    """Train config.student, from folder/last.pt on where there is one; write student.pt and
    summary.json. -> the summary. about: `about_run`'s, for config.json; label: of progress."""
    # What can be missing comes before what takes long: given teachers, CLIP, teachers to train.
    teachers = load_teachers(config, splits) if config.teacher_weights else None
    targets, scale = {}, None
    if config.clip:
        clip, tokenizer, scale = rank_zero_first(lambda: load_clip(config))
        targets = clip_targets(config, clip, tokenizer, splits)
    teachers = teachers or load_teachers(config, splits)
    how = (config.image_size, config.cache_dir, config.workers, config.device)
    splits = rank_zero_first(lambda: {name: data.at_size(split, *how)
                                      for name, split in splits.items()})
    run = begin(config, splits.pop("train"), teachers, targets.get("train", ()), scale)
    stateful = {"student": run.student, "criterion": run.criterion, "optimizer": run.optimizer}
    own = files.json_digest(runs.key(about))
    log = [] if config.overwrite else runs.restore(folder / "last.pt", stateful, own)
    if log:
        files.note(f"{folder}: going on after epoch {len(log)}")
    elif rank() == 0:
        runs.begin_run(config, folder, about)
    step, N = step_of(run), len(run.split.labels)
    progress = files.Progress(label, config.epochs * N, start=len(log) * N)
    for epoch in range(len(log), config.epochs):
        began = time.time()
        means = train_epoch(run, step, epoch, progress)
        seconds = time.time() - began
        if rank() == 0:  # whose BatchNorm statistics are the run's
            alone = accuracies(run._replace(teachers=None), {"test": splits["test"]}, {})
            log.append({"epoch": epoch + 1, "lr": learning_rate(config, epoch), **means,
                        "test_accuracy": alone["student"]["test"],
                        "images_per_second": N / seconds, "seconds": seconds})
            runs.keep_epoch(folder, log, stateful, own)
            text = f"{told(config, means)} | epoch {epoch + 1}/{config.epochs} | train "
            text += f"{means['train_accuracy']:.1f} % | test {log[-1]['test_accuracy']:.1f} %"
            progress.update((epoch + 1) * N, text, keep=True)
    if rank() == 0:
        info, state = data.DATASETS[config.dataset], run.student.state_dict()
        files.save(folder / "student.pt", {
            "model_name": config.student, "model": {name: x.cpu() for name, x in state.items()},
            "dataset": config.dataset, "class_names": list(run.split.class_names),
            "class_ids": list(run.split.ids), "mean": list(info.mean), "std": list(info.std),
            "image_size": config.image_size, "run": own})
        table = accuracies(run, splits, targets)
        files.write_json(folder / "summary.json", {
            "dataset": config.dataset, "method": config.method, "student": config.student,
            "teacher": "+".join(config.teacher) or None, "clip": config.clip, "seed": config.seed,
            "epochs": config.epochs, "accuracies": table,
            **{f"{who}_accuracy": row.get("test") for who, row in table.items()},
            "shift_accuracy": table["student"].get("shift"),
            "images_per_second": sum(row["images_per_second"] for row in log) / len(log),
            "seconds": sum(row["seconds"] for row in log), "device": str(config.device),
            "torch": torch.__version__})
    if world() > 1:
        dist.barrier()  # the files are there
    return files.read_json(folder / "summary.json", runs.ANEW)

def finished(config):
    """Train, unless the run folder holds the finished run. -> the folder, the summary, a dict."""
    config = command.join_ranks(resolve(config))
    about = rank_zero_first(lambda: about_run(config, {}))  # of a missing file before images
    splits = rank_zero_first(lambda: load_splits(config))
    about["inputs"]["data"] = {name: runs.identity(split) for name, split in splits.items()}
    folder = runs.run_folder(config, about)
    with runs.alone(folder):
        summary = rank_zero_first(lambda: runs.open_run(folder, about, config.overwrite))
        if summary:
            files.note(f"{folder} holds this run, finished; --overwrite trains anew")
        label = f"student {config.student} ({config.method})"
        return folder, summary or fit(config, folder, splits, about, label)

def run(config):
    return finished(config)[1]

if __name__ == "__main__":
    command.main(lambda: runs.summary_table(
        *finished(command.parse(Config, __doc__, unread=unread))))
