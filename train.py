"""Train a student: alone, by a baseline of distillation, or by RichKD (arXiv 2511.09286).

    python train.py                    # rendered shapes and a tiny CLIP: a CPU, no download
    python train.py --method kd        # plain distillation from the same teacher
    python train.py --dataset cifar100 --teacher resnet110 --student resnet20    # as in the paper

What a run needs and does not find (the teacher, the tiny CLIP, CLIP's targets) is made first, and
cached. The run folder holds config.json, log.csv (a row an epoch), last.pt (to resume from),
student.pt (for evaluate.py) and summary.json. The same command goes on with an unfinished run from
its last finished epoch, however it ended, on a CPU to the same bits. Accuracies are top-1 in
percent; the one reported is the last epoch's.
"""

import dataclasses
import functools
import importlib.util
import math
import sys
import time
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist

import data
import models
import richkd
import targets
from support import clip_layout, command, files, runs
from support.command import autocast, flag, rank, rank_zero_first, setting, world
from teachers import Teachers, given_teacher

# What a method fixes. All else is shared, so that methods differ in their loss alone.
METHODS = {
    "scratch": {"logit_weight": 0.0, "feature_weight": 0.0},
    "kd": {"alpha": 1.0, "feature_weight": 0.0},
    "dkd": {"alpha": 1.0, "feature_weight": 0.0, "logit_loss": "dkd"},
    "mlkd": {"alpha": 1.0, "feature_weight": 0.0, "logit_loss": "mlkd"},
    "kd-ls": {"alpha": 1.0, "feature_weight": 0.0, "standardize": True},
    "crd": {"lam": 1.0, "logit_weight": 0.0},
    "richkd-l": {"feature_weight": 0.0},
    "richkd-f": {"logit_weight": 0.0},
    "richkd": {},
}

# What depends on the data set. The schedule is that of CRD (Tian 2020), which the paper follows.
CIFAR = dict(teacher=("resnet110",), student="resnet20", clip="ViT-L/14", num_negatives=16384,
             epochs=240, batch_size=64, lr=0.05, weight_decay=5e-4)
IMAGENET = dict(teacher=("resnet34",), student="resnet18", clip="ViT-L/14", num_negatives=16384,
                epochs=100, batch_size=256, lr=0.1, weight_decay=1e-4)
RECIPES = {
    # A quarter of its 1,000 images as negatives, where the paper's 16384 are a third of CIFAR's.
    "shapes": {**CIFAR, "teacher": ("resnet20",), "student": "resnet8", "clip": "tiny",
               "num_negatives": 256, "epochs": 30},
    "cifar10": CIFAR, "cifar100": CIFAR, "tiny-imagenet": CIFAR, "folder": CIFAR,
    "imagenet": IMAGENET,
}

# Settings -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting; the command line is made from it. None: what RECIPES says, or none."""
    dataset: str = setting("shapes", "data set", choices=tuple(data.DATASETS))
    data_dir: str = setting("data", "where it lies or is downloaded to; some as a zip")
    image_size: int = setting(None, "side of the classifiers' images; default: the data set's",
                              type=int, within=(8, math.inf))
    fraction: float = setting(1.0, "share of the training images, the same ones in every run",
                              within=(0, 1))
    holdout: float = setting(0.0, "share of the training images in the place of the test split, to "
                             "choose settings", within=(0, 0.9))
    method: str = setting("richkd", "what the student learns from", choices=tuple(METHODS))
    teacher: tuple = setting(None, "conventional teacher's architecture; several are averaged",
                             nargs="+", metavar="NAME")
    teacher_weights: tuple = setting(None, "a checkpoint a teacher, or `imagenet`; without, it is "
                                     "trained first, and kept", nargs="+", metavar="FILE")
    teacher_shares: tuple = setting(None, "each teacher's share of the mean logits; default: equal",
                                    nargs="+", type=float, metavar="SHARE")
    student: str = setting(None, "the student's architecture", type=str)
    class_names: str = setting(None, "a file of the names that CLIP is asked for, one a line in "
                               "the order of the classes; default: the data set's", type=str)
    clip: str = setting(None, "tiny, a public name such as ViT-L/14, or a checkpoint", type=str)
    clip_activation: str = setting(None, "CLIP's, where its file does not tell; default: OpenAI's "
                                   "quickgelu", choices=clip_layout.ACTIVATIONS)
    bpe: str = setting(None, "CLIP's bpe_simple_vocab_16e6.txt.gz; else downloaded", type=str)
    prompts: str = setting(None, "templates, {} for the name; default: the twelve", type=str)
    average: str = setting("embeddings", "what is averaged over the templates",
                           choices=("embeddings", "logits"))
    clip_scale: float = setting(None, "scale of CLIP's cosines; default: exp(logit_scale)",
                                type=float, above=0)
    alpha: float = setting(0.7, "the teacher's share of the fused logits", within=(0, 1))
    lam: float = setting(0.7, "the teacher's share of the fused features", within=(0, 1))
    temperature: float = setting(3.0, "of the logit loss", above=0)
    ce_weight: float = setting(1.0, "of the cross-entropy; 0: none", within=(0, math.inf))
    logit_weight: float = setting(3.0, "of the logit loss; 0: none", within=(0, math.inf))
    feature_weight: float = setting(0.8, "of the feature loss; 0: none", within=(0, math.inf))
    logit_loss: str = setting("kd", "against the fused logits", choices=("kd", "dkd", "mlkd"))
    standardize: bool = setting(False, "standardise both logits first (Sun 2024)")
    num_negatives: int = setting(None, "of the feature loss", type=int, within=(1, math.inf))
    negatives: str = setting("shared", "one draw of them for a batch, or one an image",
                             choices=("shared", "per-image"))
    epochs: int = setting(None, "passes over the training images, the teacher's too", type=int,
                          within=(1, math.inf))
    batch_size: int = setting(None, "images a step", type=int, within=(1, math.inf))
    lr: float = setting(None, "learning rate at the start", type=float, above=0)
    weight_decay: float = setting(None, "of SGD with momentum .9", type=float, within=(0, math.inf))
    seed: int = setting(0, "of weights, order, crops and negatives (a teacher trained here: 0)",
                        within=(0, 2**31))
    amp: bool = setting(False, "bfloat16, for student and frozen teacher; on a CPU for CLIP, too")
    deterministic: bool = setting(False, "always the same numbers on CUDA, slower; a CPU has them")
    no_graph: bool = setting(False, "on one GPU call each step, instead of replaying a CUDA graph")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1")
    workers: int = setting(min(8, data.cores()), "loader processes where images stream",
                           within=(0, math.inf))
    cache_dir: str = setting(None, "for teachers, CLIP's weights and targets; default: "
                             "$RICHKD_CACHE, or ~/.cache/richkd", type=str)
    out: str = setting(None, "run folder; default: runs/<data set>-<method>-...", type=str)
    overwrite: bool = setting(False, "start anew where the run folder holds a run")
    tensorboard: bool = setting(False, "log for tensorboard, too, into the run folder")


def for_size(name, image_size):
    """`resnet18` and `resnet50` as the zoo calls them: at more than 64 pixels ImageNet's networks,
    else those that papers on CIFAR call so."""
    small, large = {"resnet18": "resnet18_cifar"}, {"resnet50": "resnet50_imagenet"}
    found = (small if image_size <= 64 else large).get(name, name)
    if found != name:
        files.note(f"{name} for images of {image_size} x {image_size} is {found} here")
    return found


def resolve(config):
    """Fill in what depends on the data set and the method. Raises ValueError, naming the valid
    values, for a wrong one."""
    command.check(config)
    fixed, default, imagenet = METHODS[config.method], Config(), config.dataset == "imagenet"
    for name, value in fixed.items():
        if getattr(config, name) not in (value, getattr(default, name)):
            raise ValueError(f"{flag(name)} {getattr(config, name)} does not go with --method "
                             f"{config.method}, which fixes it at {value}")
    recipe = {"image_size": data.DATASETS[config.dataset].image_size, **RECIPES[config.dataset]}
    student = config.student or recipe["student"]
    if student.startswith(("mobilenet", "shufflenet")) and not imagenet:
        recipe["lr"] = 0.01  # as in RepDistiller's train_student.py
    missing = {name: value for name, value in recipe.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **missing, **fixed)

    logit, feature = config.logit_weight > 0, config.feature_weight > 0
    needs_teacher = logit and config.alpha > 0 or feature and config.lam > 0
    needs_clip = logit and config.alpha < 1 or feature and config.lam < 1
    unused = () if needs_teacher else ("teacher_weights", "teacher_shares")
    unused += () if needs_clip else ("clip", "clip_activation", "bpe", "prompts")
    if not (logit or feature or config.ce_weight):
        raise ValueError("--ce-weight, --logit-weight, --feature-weight: all are 0")
    teacher = config.teacher if needs_teacher else ()
    if not config.teacher_weights:  # else the file has what it has
        teacher = tuple(for_size(name, config.image_size) for name in teacher)
    config = dataclasses.replace(config, student=for_size(student, config.image_size),
                                 teacher=teacher, **dict.fromkeys(unused))
    shares = config.teacher_shares
    if shares and not min(shares) >= 0 < max(shares):
        raise ValueError(f"--teacher-shares {shares}: expected none below 0 and one above")
    for name in ("teacher_weights", "teacher_shares"):
        values = getattr(config, name)
        if values and len(values) != len(teacher):
            raise ValueError(f"{len(teacher)} --teacher, but {len(values)} {flag(name)}: "
                             "expected one a teacher")
    with torch.device("meta"):  # an unknown name raises; no weights are made for that
        for name in (config.student, *config.teacher):
            models.build_model(name, 2)
    command.check_device(config.device)
    if config.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard needs the package of that name: pip install tensorboard")
    return config


# Data and teachers --------------------------------------------------------------------------------


def resized(split, image_size, config):
    """A split as the classifiers see it, in training and in evaluation alike: at image_size, on the
    device where it fits in memory. config: train.py's or evaluate.py's."""
    if config.dataset == "folder":
        images = data.in_memory(split.images, image_size, config.cache_dir, config.workers)
    else:
        images = data.resize(split.images, image_size)
    if isinstance(images, torch.Tensor):
        images = images.to(config.device)
    return split._replace(images=images)


def load_teachers(config, splits, inputs):
    """The conventional teachers, frozen, on the device; None if there are none. One without a
    checkpoint is trained first, in the cache, the same for every student, method and seed. inputs:
    `runs.inputs` of the splits."""
    given = config.teacher_weights or [None] * len(config.teacher)
    teachers = [given_teacher(config, name, path, splits["train"]) if path else
                models.freeze(cached_teacher(config, name, splits, inputs))
                for name, path in zip(config.teacher, given)]
    return Teachers(teachers, config).to(config.device) if teachers else None


def cached_teacher(config, name, splits, inputs):
    """The network of a teacher in the cache, trained first where there is none of these settings
    and training images, or a damaged one."""
    shared = ("dataset", "data_dir", "image_size", "fraction", "holdout", "epochs", "batch_size",
              "weight_decay", "amp", "no_graph", "device", "workers", "cache_dir")
    own = resolve(Config(method="scratch", student=name,
                         **{field: getattr(config, field) for field in shared}))
    # The names of the classes are CLIP's: whatever they are, the teacher is the same.
    images = {key: value for key, value in inputs["data"]["train"].items() if key != "class_names"}
    digest = files.json_digest({"settings": runs.settings(own), "train": images})[:16]
    folder = files.cache_folder(config.cache_dir) / f"teacher-{config.dataset}-{name}-{digest}"
    for anew in (False, True):
        try:
            if anew or not (folder / "summary.json").is_file():
                own = dataclasses.replace(own, overwrite=anew)
                fit(own, folder, splits, {"data": inputs["data"], "files": {}})
            return models.load_weights(name, folder / "student.pt",
                                       len(splits["train"].class_names))
        except (ValueError, FileNotFoundError) as error:
            if anew or str(folder) not in str(error):
                raise
            files.note(f"{folder} is damaged: this teacher is trained anew")


# Training -----------------------------------------------------------------------------------------


class Classifier(NamedTuple):
    """A network and how it reads images: side in pixels, mean and std of images in 0..1."""
    model: torch.nn.Module
    mean: tuple
    std: tuple
    image_size: int


@torch.inference_mode()
def predict(classifiers, blocks, config, progress=None, note=""):
    """Blocks of uint8 images (b,3,H,W) -> a list of logits (N,K), float32 on the CPU, one a
    classifier; a block is made once for all of them."""
    logits = [[] for _ in classifiers]
    for classifier in classifiers:
        classifier.model.eval()
    for images in blocks:
        for (model, mean, std, image_size), rows in zip(classifiers, logits):
            with autocast(config):
                rows.append(model(data.to_input(images, image_size, mean, std))[0].float())
        if progress:
            done = progress.done + len(images)
            progress.update(done, note, keep=done >= progress.total)
    return [torch.cat(rows).cpu() for rows in logits]


def predict_split(model, images, config):
    """-> logits (N,K), float32 on the CPU; each rank sees its share of the images."""
    info, share = data.DATASETS[config.dataset], slice(rank(), None, world())
    classifier = Classifier(model, info.mean, info.std, config.image_size)
    blocks = data.blocks(data.take(images, share), None, config.workers, config.device)
    [mine] = predict([classifier], blocks, config)
    if world() == 1:
        return mine
    logits = torch.zeros(len(images), mine.shape[1], device=config.device)
    logits[share] = mine.to(config.device)
    dist.all_reduce(logits)
    return logits.cpu()


def top1(logits, labels):
    """Accuracy in percent."""
    return 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def learning_rate(config, epoch):
    """The rate of an epoch, counted from 0: a tenth after epochs 150, 180, 210 of 240 (Tian 2020),
    on ImageNet after 30, 60, 90 of 100, and after the same shares of other numbers of epochs."""
    decays = (30, 60, 90) if config.dataset == "imagenet" else (62.5, 75, 87.5)
    return config.lr * 0.1 ** sum(100 * epoch >= percent * config.epochs for percent in decays)


class StudentAndLoss(torch.nn.Module):
    """Student and criterion as one module, whose gradients DistributedDataParallel averages."""

    def __init__(self, student, criterion):
        super().__init__()
        self.student, self.criterion = student, criterion

    def forward(self, inputs, teachers, *supervision):
        teacher_logits, teacher_features = None, None
        if teachers:
            with command.beside(inputs.device):  # neither network alone fills a GPU
                teacher_logits, teacher_features = teachers(inputs)                 # (B,K), (B,C)
        logits, features = self.student(inputs)                                     # (B,K), (B,C)
        if teachers:
            command.join(inputs.device)
        loss, parts = self.criterion(logits, features, teacher_logits, teacher_features,
                                     *supervision)
        return loss, parts, logits


def loss_parts(config):
    return [name for name in ("ce", "logit", "feature") if getattr(config, f"{name}_weight")]


class Training(NamedTuple):
    """What every step works with, on the device."""
    config: Config
    split: data.Split
    model: torch.nn.Module  # a StudentAndLoss
    optimizer: torch.optim.Optimizer
    teachers: Teachers | None
    tables: tuple         # CLIP's cosines (N,K) and features (N,D), float16, or nothing
    clip_scale: float
    mean: torch.Tensor    # (3,), of the images
    std: torch.Tensor     # (3,)
    rate: torch.Tensor    # (), the learning rate: within a CUDA graph a number would stand still
    sums: torch.Tensor    # (M,) float64, of the means that `train_step` returns


def train_step(training, batch):
    """One step, from the batch to the optimiser. It reads nothing from the device and copies
    nothing to it, so that a CUDA graph can replay it. -> (M,) float64: the loss, its parts and the
    accuracy, means over the batch, also added to training.sums.

    batch: (4,B) int64, where to find it (`data.epoch_places`); of a stream, what its loader gave.
    """
    config, split, model, optimizer, teachers, tables, clip_scale = training[:7]
    if isinstance(batch, torch.Tensor):
        batch = data.look_up(split, tables, batch)
    # Teacher and student see the same crop (B,3,H,W); CLIP saw the plain image, beforehand.
    pixels, labels, index, *clip = batch
    inputs = data.to_input(pixels, config.image_size, training.mean, training.std)
    clip_logits, clip_features = None, None
    if clip:
        clip_logits, clip_features = clip_scale * clip[0].float(), clip[1].float()  # (B,K), (B,D)

    # The student, then equation (7): its logits against labels and fused logits, its features
    # against the memory's fused ones; `index` tells the memory which images these are.
    with autocast(config):
        loss, parts, logits = model(inputs, teachers, clip_logits, clip_features, labels, index)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

    accuracy = 100 * (logits.detach().argmax(1) == labels).float().mean()
    means = torch.stack([loss.detach(), *parts.values(), accuracy]).double()
    training.sums.add_(means)
    return means


def step_of(training):
    """`train_step` of this training as a function of the batch alone: on one GPU that holds the
    images a CUDA graph of it, elsewhere (torchrun's ranks talk, streams wait for files) a call."""
    config, step = training.config, functools.partial(train_step, training)
    in_memory = isinstance(training.split.images, torch.Tensor)
    alone = in_memory and not dist.is_initialized()
    if config.device.startswith("cuda") and alone and not config.no_graph:
        return command.CudaGraph(step)
    return step


def train_epoch(training, step, epoch, progress, caught):
    """One pass over the training images. step: `step_of(training)`, the same in every epoch.
    -> {"loss", its parts, "train_accuracy"}, their means over the steps; None where a signal in
    `caught` ended it. FloatingPointError: a loss not finite."""
    config, N = training.config, len(training.split.labels)

    # All that an epoch draws is a function of seed and epoch: it can be repeated to the bit.
    seed = config.seed * 100_003 + epoch
    torch.manual_seed(seed)  # dropout's
    training.rate.fill_(learning_rate(config, epoch))
    for group in training.optimizer.param_groups:
        group["lr"] = training.rate  # also after a checkpoint, which brings its own
    training.model.train()
    training.sums.zero_()
    share = (config.batch_size, seed, rank(), world())
    if isinstance(training.split.images, torch.Tensor):
        batches = data.epoch_places(N, *share, config.device)
    else:
        batches = data.batches(training.split, *share, config.workers, config.device,
                               training.tables)

    # Reading a number stalls a GPU, so the sums for the log stay there and are looked at rarely.
    steps, every = 0, 1 if torch.device(config.device).type == "cpu" else 50
    for batch in batches:
        means = step(batch)
        steps += 1
        if steps % every == 0 or N - steps * config.batch_size < 2:  # last: of 1 image is no batch
            loss, accuracy = means[[0, -1]].tolist()
            if not math.isfinite(loss) or not math.isfinite(training.sums[0]):
                raise FloatingPointError(
                    f"epoch {epoch + 1}, step {steps}: the loss is not finite; the run folder "
                    f"keeps epoch {epoch}; a smaller --lr may help")
            if rank() == 0:
                progress.update(epoch * N + min(N, steps * config.batch_size),
                                f"epoch {epoch + 1}/{config.epochs} | loss {loss:.3f} | "
                                f"accuracy {accuracy:.1f} %")
            if command.any_rank(caught, config.device):
                return None
    if world() > 1:
        dist.all_reduce(training.sums)
    means = (training.sums / world() / steps).tolist()
    return dict(zip(["loss", *loss_parts(config), "train_accuracy"], means, strict=True))


def begin(config, split, teachers, tables, clip_scale):
    """The `Training` of a new student. split: the training images, `resized`; teachers: as
    `load_teachers` returns them; tables: CLIP's targets of the split, or ()."""
    info, device = data.DATASETS[config.dataset], config.device
    if isinstance(split.images, torch.Tensor):  # the images are on the device, so can these be
        tables = tuple(table.to(device) for table in tables)
        split = split._replace(labels=split.labels.to(device))
    torch.manual_seed(config.seed)
    student = models.build_model(config.student, len(split.class_names))
    criterion = richkd.RichKD(
        student.num_features, teachers.num_features if teachers else 0,
        tables[1].shape[1] if tables else 0, len(split.labels), alpha=config.alpha, lam=config.lam,
        temperature=config.temperature, ce_weight=config.ce_weight,
        logit_weight=config.logit_weight, feature_weight=config.feature_weight,
        logit_loss=config.logit_loss, standardize=config.standardize,
        num_negatives=config.num_negatives, labels=split.labels, negatives=config.negatives,
        seed=config.seed)
    model = StudentAndLoss(student, criterion).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9,
                                weight_decay=config.weight_decay, fused=True)
    mean, std, rate = (torch.tensor(x, device=device) for x in (info.mean, info.std, config.lr))
    sums = torch.zeros(2 + len(loss_parts(config)), dtype=torch.float64, device=device)
    return Training(config, split, model, optimizer, teachers, tables, clip_scale, mean, std, rate,
                    sums)


def prepare(config, splits, inputs):
    """-> the `Training` of a new student, and CLIP's targets of every split."""
    # What can be missing comes before what takes long: given teachers, CLIP, teachers to train.
    teachers = load_teachers(config, splits, inputs) if config.teacher_weights else None
    clip_targets, clip_scale = {}, None
    if config.clip:
        clip, tokenizer, clip_scale = rank_zero_first(lambda: targets.load_clip_teacher(config))
        clip_targets = targets.load_targets(config, clip, tokenizer, splits, inputs["data"])
    teachers = teachers or load_teachers(config, splits, inputs)
    train = resized(splits["train"], config.image_size, config)
    return begin(config, train, teachers, clip_targets.get("train", ()), clip_scale), clip_targets


def fit(config, folder, splits, inputs):
    """Train config.student, from folder/last.pt on where there is one; write student.pt and
    summary.json. -> the summary. A signal raises KeyboardInterrupt within a step, on a GPU 50."""
    training, clip_targets = prepare(config, splits, inputs)
    splits = {name: resized(split, config.image_size, config)
              for name, split in splits.items() if name != "train"}
    model, N = training.model, len(training.split.labels)
    stateful = {"student": model.student, "criterion": model.criterion,
                "optimizer": training.optimizer}
    log = [] if config.overwrite else runs.restore(folder / "last.pt", stateful)
    if world() > 1:  # BatchNorm statistics are each rank's own; the memory keeps itself equal
        with warnings.catch_warnings():  # torch 2.14 has another word for it, older ones do not
            warnings.simplefilter("ignore", FutureWarning)
            ddp = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        training = training._replace(model=ddp)
    step = step_of(training)
    if rank() == 0 and not log:
        runs.begin_run(config, folder, inputs)
    if rank() == 0 and log:
        print(f"{folder}: going on after epoch {len(log)}", file=sys.stderr)
    progress = files.Progress(f"{config.method} {config.student}", config.epochs * N,
                              start=len(log) * N)
    with command.signals() as caught:
        for epoch in range(len(log), config.epochs):
            began = time.time()
            means = train_epoch(training, step, epoch, progress, caught)
            seconds = time.time() - began
            if means:
                if world() > 1:  # BatchNorm's statistics: those of rank 0 are tested and saved
                    for buffer in model.student.buffers():
                        dist.broadcast(buffer, 0)
                logits = predict_split(model.student, splits["test"].images, config)
                log.append({"epoch": epoch + 1, "lr": learning_rate(config, epoch), **means,
                            "test_accuracy": top1(logits, splits["test"].labels),
                            "images_per_second": N / seconds, "seconds": seconds})
                if rank() == 0:
                    runs.keep_epoch(config, folder, log, stateful, progress)
            number = command.any_rank(caught, config.device)
            if number:
                kept = f"; {folder} keeps epoch {len(log)} of {config.epochs}"
                raise KeyboardInterrupt(number, kept)
    table = accuracies(training, model.student, clip_targets, splits)
    summary = runs.summarize(config, log, table)
    if rank() == 0:
        info = data.DATASETS[config.dataset]
        weights = {name: tensor.cpu() for name, tensor in model.student.state_dict().items()}
        files.save(folder / "student.pt", {
            "model_name": config.student, "model": weights, "dataset": config.dataset,
            "class_names": list(training.split.class_names),
            "class_ids": list(training.split.class_ids), "mean": list(info.mean),
            "std": list(info.std), "image_size": config.image_size})
        files.write_json(folder / "summary.json", summary)
    if world() > 1:
        dist.barrier()  # the files are there
    return summary


def accuracies(training, student, clip_targets, splits):
    """{"clip", "teacher", "fused", "student": {split: top-1 in percent}} on the splits that nothing
    was trained on; without a teacher or without CLIP, what needs it is empty."""
    config, table = training.config, {"clip": {}, "teacher": {}, "fused": {}, "student": {}}
    for name, split in splits.items():
        logits = {"student": predict_split(student, split.images, config)}
        if training.teachers:
            logits["teacher"] = predict_split(training.teachers, split.images, config)
        if clip_targets:
            logits["clip"] = training.clip_scale * clip_targets[name][0].float()
        if training.teachers and clip_targets:
            logits["fused"] = richkd.fuse_logits(logits["teacher"], logits["clip"], config.alpha)
        for who, z in logits.items():
            table[who][name] = top1(z, split.labels)
    return table


def run(config):
    """Train, unless the run folder holds the finished run. -> the summary, a dict."""
    given, config = config, command.join_ranks(resolve(config))
    command.set_up_gpu(config.device, config.deterministic)
    folder = runs.open_run(config)
    finished = (folder / "summary.json").is_file() and not config.overwrite
    try:
        splits = rank_zero_first(lambda: runs.load_splits(config))
        inputs = rank_zero_first(lambda: runs.inputs(config, splits))
    except (OSError, ValueError) as error:
        if finished:
            raise ValueError(f"{folder} holds a finished run, but what it depends on cannot be "
                             f"compared: {files.one_line(error)}") from None
        raise
    runs.check_inputs(folder, config, inputs)
    if not finished:
        usual = RECIPES[config.dataset]["batch_size"]
        if given.lr is None and config.batch_size != usual:
            files.note(f"--batch-size {config.batch_size}: the learning rate was tuned for "
                       f"{usual}; --lr sets another")
        return fit(config, folder, splits, inputs)
    summary = files.read_own(folder / "summary.json", "--overwrite trains anew")
    command.show(f"{folder} holds this run, finished; --overwrite trains anew")
    return summary


if __name__ == "__main__":
    command.main(lambda: command.show(runs.summary_table(run(command.parse(Config, __doc__)))))
