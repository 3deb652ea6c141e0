"""Evaluate trained classifiers: accuracy, calibration, shift, corruptions, what fusing did to the teacher; and CLIP.

    python evaluate.py                                       # the newest finished run on its test split
    python evaluate.py --shift --corruptions                 # its shift splits and the 15 common corruptions, too
    python evaluate.py --run runs/A --fused --plot           # teacher, CLIP and both fused; report.png, samples.png;
                                                             # with --corruptions those three under corruptions, too
    python evaluate.py --run runs/A runs/B --corruptions CIFAR-100-C        # several runs; the published files
    python evaluate.py --shift imagenet-a imagenet-r         # folders by WordNet id; also CIFAR-10.1, STL-10, any other
    python evaluate.py --checkpoint FILE --model resnet20 --dataset cifar100
    python evaluate.py --zero-shot --clip ViT-B/32 --dataset cifar100
    python evaluate.py --compare runs/*/report.json          # methods over seeds, as Markdown, from the reports alone

report.json, beside each run, grows set by set: the same command goes on where it was interrupted, and a report of other
weights or settings is begun anew. Four sections, leaves first: metrics (they take logits, never a model), published
files, what fusion does, runs with their report. A function can be copied with the few helpers it names.

References
    Hendrycks and Dietterich 2019, arXiv 1903.12261: mCE and relative mCE
    Guo et al. 2017, arXiv 1706.04599: expected calibration error, temperature scaling
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

import clip_model
import data
import models
import richkd
import train
from corruptions import *  # each corruption, COMMON, EXTRA and corrupt() are names of this module, too
from results import compare, comparison, plot, tables

# Metrics --------------------------------------------------------------------------------------------------------------
# Logits are (N, K) of any float dtype, targets (N,) int64. Everything is computed in float64; shares and errors lie
# between 0 and 1. An image's confidence is its largest probability.


def top_k_accuracy(logits, target, k=1):
    """Share of the rows whose target is among the k largest logits (among all of them if there are fewer)."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices  # (N, k)
    return top.eq(target[:, None]).any(dim=1).double().mean().item()


def nll(logits, target):
    """Mean negative log-likelihood of the targets, in nats."""
    return F.cross_entropy(logits.double(), target).item()


def brier(logits, target):
    """Mean squared distance of the probabilities from the one-hot target, summed over classes: 0 to 2 (Brier 1950)."""
    probabilities = logits.double().softmax(dim=1)
    return (probabilities - F.one_hot(target, logits.shape[1])).square().sum(dim=1).mean().item()


def calibration_bins(logits, target, bins=15, equal_mass=False):
    """The points of a reliability diagram: (confidence, accuracy, count), each (bins,) float64.

    Bins of equal width hold (b / bins, (b + 1) / bins]; bins of equal mass are the sorted confidences in parts whose
    sizes differ by at most one, the larger first. An empty bin has confidence and accuracy 0.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    if equal_mass:
        index = torch.empty_like(predicted)
        for b, part in enumerate(confidence.argsort(stable=True).tensor_split(bins)):
            index[part] = b
    else:
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)
        index = torch.bucketize(confidence, edges[1:-1])
    count = torch.bincount(index, minlength=bins).double()
    confidence, accuracy = (torch.bincount(index, value, minlength=bins) / count.clamp(min=1)
                            for value in (confidence, predicted.eq(target).double()))
    return confidence, accuracy, count


def ece(logits, target, bins=15, equal_mass=False):
    """Expected calibration error: |confidence - accuracy| of the bins, weighted by their counts (Guo 2017, eq. 3)."""
    confidence, accuracy, count = calibration_bins(logits, target, bins, equal_mass)
    return ((confidence - accuracy).abs() * count).sum().item() / len(target)


def fit_temperature(logits, target):
    """The T in 0.001 ... 1000 at which logits / T have the least NLL (Guo 2017, section 4.2); fit it on images that are
    not reported. The NLL is convex in 1 / T: bisecting on the sign of its derivative finds the one minimum."""
    logits = logits.double()
    right = logits.gather(1, target[:, None]).mean()
    low, high = 1e-3, 1e3
    for _ in range(60):
        temperature = math.sqrt(low * high)
        expected = ((logits / temperature).softmax(dim=1) * logits).sum(dim=1).mean()
        low, high = (low, temperature) if expected < right else (temperature, high)
    return temperature


def quadrants(logits, target, threshold):
    """Counts of the images that are confident (confidence >= threshold) or unsure, and right or wrong."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    confident, right = confidence >= threshold, predicted == target
    return {"confident_right": (confident & right).sum().item(), "confident_wrong": (confident & ~right).sum().item(),
            "unsure_right": (~confident & right).sum().item(), "unsure_wrong": (~confident & ~right).sum().item()}


def bootstrap_interval(statistic, samples, generator, resamples=1000, level=0.95):
    """(low, high) of statistic(*samples) over images drawn with replacement: percentiles (Efron 1979).

    samples are tensors (N, ...), resampled together; the statistic is a number or a tensor, low and high are a number
    or lists. For a mean pass torch.mean and [the images' values]; for a paired difference, the differences.
    """
    n, values = len(samples[0]), []
    for _ in range(resamples):
        index = torch.randint(n, (n,), generator=generator, device=generator.device)
        value = statistic(*(sample[index.to(sample.device)] for sample in samples))
        values.append(torch.as_tensor(value, dtype=torch.float64, device="cpu"))
    values = torch.stack(values)
    return values.quantile((1 - level) / 2, dim=0).tolist(), values.quantile((1 + level) / 2, dim=0).tolist()


# AlexNet's top-1 errors on ImageNet-C, mean over the five severities (hendrycks/robustness), and on the clean images
# (torchvision's weights, 56.522 % right; the paper says 43.5 % wrong).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500}
ALEXNET_CLEAN_ERROR = 0.43478


def mean_corruption_error(errors, clean_error=None, alexnet=False):
    """mCE: the mean over the fifteen corruptions of the error, itself the mean over severities (paper, section 4).

    errors maps each of the fifteen names to that error; further names are left out. Plain on CIFAR-C; as on ImageNet-C
    with alexnet=True: each error is divided by AlexNet's. With clean_error it is the relative mCE: the clean error is
    first taken off, from AlexNet's too. Raises ValueError on a missing name.
    """
    missing = [name for name in ALEXNET_ERRORS if name not in errors]
    if missing:
        raise ValueError(f"mCE needs all fifteen corruptions; missing are {', '.join(missing)}")
    clean, alexnet_clean = (0, 0) if clean_error is None else (clean_error, ALEXNET_CLEAN_ERROR)
    return sum((errors[name] - clean) / (baseline - alexnet_clean if alexnet else 1)
               for name, baseline in ALEXNET_ERRORS.items()) / len(ALEXNET_ERRORS)


# Published files ------------------------------------------------------------------------------------------------------


def read_array(path, expected):
    """A .npy file, read when it is used. FileNotFoundError naming what was `expected`, ValueError on a damaged file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the unpacked {expected}")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no NumPy array file, or is cut short; unpack it again") from error


def read_cifar_c(directory, name, severity):
    """One severity of CIFAR-10-C or CIFAR-100-C: images uint8 (N, 3, 32, 32), labels int64 (N,).

    The folder holds <name>.npy uint8 (5 N, 32, 32, 3), severity-major, and labels.npy (5 N,); N is 10,000 as published.
    Only the part asked for is read. Raises FileNotFoundError, and ValueError on a file of another shape.
    """
    check_severity(severity)
    images, labels = (read_array(Path(directory) / file, "CIFAR-10-C or CIFAR-100-C")
                      for file in (f"{name}.npy", "labels.npy"))
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) % 5 or not len(images):
        raise ValueError(f"{directory}/{name}.npy is {images.dtype} {images.shape}; expected uint8 (50000, 32, 32, 3)")
    n = len(images) // 5
    if labels.shape != (5 * n,) or (labels.reshape(5, n) != labels[:n]).any():
        raise ValueError(f"{directory}/labels.npy is {labels.shape}; expected {n} labels, five times over")
    part = slice((severity - 1) * n, severity * n)
    return torch.from_numpy(images[part].transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels[part].astype(np.int64))


def imagenet_c_folder(directory, name, severity):
    """The ImageFolder of one corruption of ImageNet-C or Tiny-ImageNet-C: <name>/<severity>, there or in a subfolder
    as the archives unpack (blur/defocus_blur/1). Raises FileNotFoundError."""
    check_severity(severity)
    for path in (Path(directory) / name, *sorted(Path(directory).glob(f"*/{name}"))):
        if (path / str(severity)).is_dir():
            return path / str(severity)
    raise FileNotFoundError(f"{directory} has no {name}/{severity}; expected the unpacked folders of ImageNet-C")


def list_folder(root, class_ids, folder_classes=None):
    """The images of an ImageFolder with some of a classifier's classes: paths, labels int64 (N,), columns int64 (k,).

    class_ids are the classes in the order of the logits, by the names of the folders (ImageNet-V2, -A, -R and -Sketch:
    WordNet ids); folder_classes {folder: class} renames folders. columns are the classes that occur, ascending, and
    the labels count within them: evaluate logits[:, columns] against labels. The mask is thus on the logits, before
    anything is computed from them, and the choice is among the set's own classes (200 for ImageNet-A and -R). Raises
    FileNotFoundError without the folder, ValueError on a folder of no known class and where there are no images.
    """
    root, column = Path(root), {name: k for k, name in enumerate(class_ids)}
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; expected one with a subfolder for each class")
    paths, classes = [], []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        name = (folder_classes or {}).get(folder.name, folder.name)
        if name not in column:
            raise ValueError(f"{folder}: {name!r} is not a class of the model; its classes are like {class_ids[0]!r}")
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
        paths += found
        classes += [column[name]] * len(found)
    if not paths:
        raise ValueError(f"{root} holds no images; expected <class>/<image>.jpeg, .jpg or .png")
    columns, labels = torch.tensor(classes).unique(return_inverse=True)
    return paths, labels, columns


def read_cifar10_1(directory):
    """CIFAR-10.1 (Recht et al. 2018), version 6 where there are several: images uint8 (N, 3, 32, 32), labels int64 (N,)
    of CIFAR-10's classes. Raises FileNotFoundError, and ValueError on a file of another shape."""
    path = max(Path(directory).glob("cifar10.1_v*_data.npy"), default=Path(directory) / "cifar10.1_v6_data.npy")
    images = read_array(path, "CIFAR-10.1")
    labels = read_array(path.with_name(path.name.replace("data", "labels")), "CIFAR-10.1")
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or not len(images):
        raise ValueError(f"{path} is {images.dtype} {images.shape}; expected uint8 (2000, 32, 32, 3)")
    if labels.shape != images.shape[:1] or not 0 <= labels.min() <= labels.max() < 10:
        raise ValueError(f"{directory}: labels are {labels.shape}; expected {len(images)} numbers from 0 to 9")
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels.astype(np.int64))


def read_stl10(directory):
    """STL-10's test images of the nine classes that CIFAR-10 has: images uint8 (N, 3, 96, 96), labels int64 (N,) of
    CIFAR-10's classes (no frog). `directory` has stl10_binary/ in it. Raises ValueError where that is damaged."""
    try:
        stl = torchvision.datasets.STL10(directory, split="test")
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{directory}/stl10_binary is no complete STL-10 ({error}); unpack it again") from None
    # airplane, bird, car, cat, deer, dog, horse, monkey, ship, truck
    labels = torch.tensor([0, 2, 1, 3, 4, 5, 7, -1, 8, 9])[torch.from_numpy(stl.labels.astype(np.int64))]
    return torch.from_numpy(stl.data[labels.numpy() >= 0].copy()), labels[labels >= 0]


# What fusion does -----------------------------------------------------------------------------------------------------
# Probabilities are the softmax of the logits as they are distilled, at temperature 1. Shares are in percent, a number
# with its interval is [value, low, high]: bootstrap over the images, 95 %.

QUADRANTS = ("confident_right", "confident_wrong", "unsure_right", "unsure_wrong")
MEASURES = ("top1", "nll", "ece", *QUADRANTS)

# Five classes a superclass, in the order of the data set's "coarse" labels.
CIFAR100_SUPERCLASSES = """
beaver dolphin otter seal whale, aquarium_fish flatfish ray shark trout, orchid poppy rose sunflower tulip,
bottle bowl can cup plate, apple mushroom orange pear sweet_pepper, clock keyboard lamp telephone television,
bed chair couch table wardrobe, bee beetle butterfly caterpillar cockroach, bear leopard lion tiger wolf,
bridge castle house road skyscraper, cloud forest mountain plain sea, camel cattle chimpanzee elephant kangaroo,
fox porcupine possum raccoon skunk, crab lobster snail spider worm, baby boy girl man woman,
crocodile dinosaur lizard snake turtle, hamster mouse rabbit shrew squirrel,
maple_tree oak_tree palm_tree pine_tree willow_tree, bicycle bus motorcycle pickup_truck train,
lawn_mower rocket streetcar tank tractor"""


def superclasses(dataset, class_names, class_ids=(), is_a="wordnet.is_a.txt"):
    """{what: the group of each class, int64 (K,)}: CIFAR-100's twenty superclasses, the colours and forms of `shapes`,
    the WordNet parents of class_ids by ImageNet's file of lines "parent child"; {} where none are known."""
    keys = {}
    if dataset == "cifar100":
        group = {name: g for g, row in enumerate(CIFAR100_SUPERCLASSES.split(",")) for name in row.split()}
        keys["superclass"] = [group[name] for name in class_names]
    elif dataset == "shapes":
        keys["colour"], keys["form"] = zip(*(name.split() for name in class_names))
    elif class_ids and Path(is_a).is_file():
        parent = {child: above for above, child in map(str.split, Path(is_a).read_text().splitlines())}
        keys["WordNet parent"] = [parent.get(own, own) for own in class_ids]
    return {what: torch.tensor([row.index(key) for key in row]) for what, row in keys.items()}


def estimate(statistic, samples, generator, resamples=1000):
    """Numbers with their bootstrap intervals, S times [value, low, high], of statistic(*samples), a tensor (S,). (The
    interval of an ECE lies rather high: resampling adds noise to every bin.)"""
    return [list(row) for row in zip(statistic(*samples).tolist(),
                                     *bootstrap_interval(statistic, samples, generator, resamples))]


def against(names, statistic, own, other, generator, resamples=1000):
    """{name: {"value", "change"}}, `estimate` of statistic(*own) and of statistic(*own) - statistic(*other): lists of
    tensors (N, ...) about the same images, resampled together. Without another ([]) there is no change."""
    table = {name: {"value": value} for name, value in zip(names, estimate(statistic, own, generator, resamples))}
    if other:
        changes = estimate(lambda *both: statistic(*both[:len(own)]) - statistic(*both[len(own):]), [*own, *other],
                           generator, resamples)
        for name, change in zip(names, changes):
            table[name]["change"] = change
    return table


def contributions(logits, target, threshold, bins=15):
    """What each image adds to the measures, so that they can be resampled without the logits: float64 (N, 6 + bins).
    Right or not, its NLL, its quadrant (four columns), confidence - right in the column of its bin of equal width."""
    logits = logits.double()
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    right, loss = predicted.eq(target), F.cross_entropy(logits, target, reduction="none")
    quadrant = F.one_hot(2 * (confidence < threshold) + ~right, 4)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)
    gap = F.one_hot(torch.bucketize(confidence, edges[1:-1]), bins) * (confidence - right.double())[:, None]
    return torch.cat([right[:, None], loss[:, None], quadrant, gap], dim=1)


def measures(rows):
    """`contributions` of some images -> MEASURES (7,): top-1, ECE and the quadrants in percent, NLL in nats."""
    mean = rows.mean(dim=0)
    return torch.cat([100 * mean[:1], mean[1:2], 100 * mean[6:].abs().sum(dim=0, keepdim=True), 100 * mean[2:6]])


def sweep_alpha(teacher_logits, clip_logits, target, generator, threshold=0.7,
                alphas=tuple(tenth / 10 for tenth in range(11))):
    """What the teacher's share alpha does: a list of {"alpha", then MEASURES with their intervals} of the fused logits
    (N, K), from CLIP alone (0) to the teacher alone (1)."""
    rows = []
    for alpha in alphas:
        fused = richkd.fuse_logits(teacher_logits, clip_logits, alpha)
        values = estimate(measures, [contributions(fused, target, threshold)], generator)
        rows.append({"alpha": alpha, **dict(zip(MEASURES, values))})
    return rows


def quadrant_changes(logits, target, generator, thresholds=(0.5, 0.7, 0.9)):
    """Where the images lie for each model: {threshold: {model: {measure: {"value", "count", "change"}}}}.

    logits: {model: (N, K)}, the first of which is the one that changes are taken against, image by image. The measures
    are the quadrants (with a count), and top-1, NLL and ECE, which do not depend on the threshold.
    """
    table = {}
    for threshold in thresholds:
        rows = {model: contributions(z, target, threshold) for model, z in logits.items()}
        first = next(iter(rows.values()))
        for model, own in rows.items():
            entry = against(MEASURES, measures, [own], [first] if own is not first else [], generator)
            for name, count in quadrants(logits[model], target, threshold).items():
                entry[name]["count"] = count
            table.setdefault(str(threshold), {})[model] = entry
    return table


def rank(values):
    """Ranks of (n,) numbers, equal ones sharing their mean rank: float64 (n,)."""
    _, index, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[index]


def non_target(logits, target, similarity, groups):
    """What is said of the classes that an image does not show. Its non-target distribution is the softmax of its logits
    (N, K) without the target's. -> {"rank_correlation", "entropy", "same <what>" for each of the groups}:

    Spearman's correlation, over ordered pairs of different classes, of the mean non-target probabilities (of class b on
    the images of class a) with similarity (K, K), say of the class names for CLIP; the mean entropy in nats; the mean
    mass in percent on the classes of the target's own group, groups being {what: the group of each class (K,)}.
    """
    K = logits.shape[1]
    others = logits.double().scatter(1, target[:, None], -math.inf).softmax(dim=1)  # (N, K)
    count = torch.bincount(target, minlength=K)[:, None]
    mean = torch.zeros(K, K, dtype=torch.float64, device=logits.device).index_add_(0, target, others) / count
    pairs = (count > 0) & ~torch.eye(K, dtype=torch.bool, device=logits.device)
    ranks = torch.stack([rank(mean[pairs]), rank(similarity[pairs])])
    found = {"rank_correlation": ranks.corrcoef()[0, 1].item(),
             "entropy": torch.special.entr(others).sum(dim=1).mean().item()}
    for what, group in groups.items():
        found[f"same {what}"] = 100 * (others * (group == group[target][:, None])).sum(dim=1).mean().item()
    return found


def fusion(teacher_logits, clip_logits, target, alpha, similarity, groups, generator):
    """The whole analysis, {"alpha", "quadrants", "sweep", "non_target"}: see `quadrant_changes`, `sweep_alpha` and
    `non_target`, which has a value and a change against the teacher for each model, too (200 resamples)."""
    logits = {"teacher": teacher_logits, "clip": clip_logits,
              "fused": richkd.fuse_logits(teacher_logits, clip_logits, alpha)}
    names = list(non_target(teacher_logits, target, similarity, groups))

    def numbers(z, y):
        return torch.tensor(list(non_target(z, y, similarity, groups).values()), dtype=torch.float64)

    rest = {model: against(names, numbers, [z, target], [teacher_logits, target] if model != "teacher" else [],
                           generator, resamples=200) for model, z in logits.items()}
    return {"alpha": alpha, "quadrants": quadrant_changes(logits, target, generator),
            "sweep": sweep_alpha(teacher_logits, clip_logits, target, generator), "non_target": rest}


# Runs and reports -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting with its line of help; the command line is made from it."""
    run: tuple = train.setting(None, "run folders; without, the newest finished one below runs/", nargs="+")
    checkpoint: str = train.setting(None, "a bare checkpoint instead, with --model and --dataset", type=str)
    model: str = train.setting(None, "the checkpoint's architecture", type=str)
    dataset: str = train.setting(None, "the data set; without, the run's own", type=str)
    data_dir: str = train.setting(None, "where the data set lies; without, where the run found it", type=str)
    shift: tuple = train.setting(None, "evaluate the data set's own shift splits and those in folders, too: "
                                 "CIFAR-10.1, STL-10, or a folder a class (classes.json: {folder: class})", nargs="*",
                                 metavar="DIR")
    corruptions: str = train.setting(None, "evaluate corrupted test images, too: the published files below DIR, or "
                                     "generated ones", nargs="?", const="generated", metavar="DIR")
    fused: bool = train.setting(False, "analyse the run's teacher, CLIP and both fused on the test split, too")
    plot: bool = train.setting(False, "draw report.png and, of corruptions, samples.png (needs matplotlib)")
    compare: tuple = train.setting(None, "only compare the methods of these reports (or lists of them)", nargs="+",
                                   metavar="FILE")
    zero_shot: bool = train.setting(False, "evaluate --clip itself on --dataset, by one template, each, and all")
    clip: str = train.setting("ViT-L/14", "as in train.py", type=str)
    bpe: str = train.setting(None, "as in train.py", type=str)
    prompts: str = train.setting(None, "as in train.py", type=str)
    seed: int = train.setting(0, "of generated corruptions and bootstrap intervals")
    amp: bool = train.setting(False, "bfloat16 autocast")
    device: str = train.setting(train.Config.device, "cpu, cuda, cuda:1")
    workers: int = train.setting(8, "loader processes where images stream (imagenet)")
    cache_dir: str = train.setting(train.Config.cache_dir, "as in train.py")


class Classifier(NamedTuple):
    """A trained network, what reading its answers takes, and its report."""
    model: torch.nn.Module
    mean: list
    std: list
    image_size: int
    path: Path  # of the report
    report: dict  # its first entries


def newest_run(root="runs"):
    """The folder below `root` whose run finished last. FileNotFoundError, saying how to make one, if there is none."""
    finished = sorted(Path(root).glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise FileNotFoundError(f"no finished run below {root}/: python train.py makes one; --run names one elsewhere, "
                                "--checkpoint a bare checkpoint")
    print(f"evaluating {finished[-1].parent}", file=sys.stderr)
    return finished[-1].parent


def read_config(folder, config):
    """A run's settings, a `train.Config`, in the places of this evaluation. Raises ValueError for a damaged file."""
    path = folder / "config.json"
    with data.undamaged(path, "or of another version; train.py --overwrite makes the run anew"):
        about = json.loads(path.read_text())
        places = {name: getattr(config, name) for name in ("device", "workers", "cache_dir")}
        places["data_dir"] = os.fspath(config.data_dir or about["places"]["data_dir"])
        return train.resolve(train.Config(**about["settings"], **places))


def read_reports(path):
    """The reports in a file: a report.json, or a list of them as tests/study.sh gathers. ValueError for another one."""
    with data.undamaged(path, "expected a report.json, or a list of such reports"):
        content = json.loads(Path(path).read_text())
        first, *rest = content if isinstance(content, list) else [content]
        for report in (first, *rest):
            comparison(compare([report]))  # raises now, not later
        return [first, *rest]


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_classes(what, there, here):
    """Raises ValueError, `what` and the first class that differs, unless both lists of classes are equal."""
    for k, (own, other) in enumerate(itertools.zip_longest(there, here)):
        if own != other:
            raise ValueError(f"{what}: class {k} is {own!r} there and {other!r} here")


def load_run(folder, own, dataset, class_names):
    """-> Classifier of a finished run, `own` its settings. Raises ValueError for a damaged one, and where its classes
    are others."""
    path = folder / "summary.json"
    with data.undamaged(path, "train.py --overwrite makes the run anew"):
        summary = json.loads(path.read_text())
        train.table(summary)  # raises now, not later
        report = {"of": {key: summary[key] for key in ("dataset", "method", "teacher", "student", "seed", "epochs")},
                  "settings": train.settings(own),
                  "teachers": {who: row for who, row in summary["accuracies"].items() if row and who != "student"}}
    path, known = folder / "student.pt", ("model_name", "class_names", "mean", "std", "image_size")
    try:
        student = train.read_checkpoint(path)
    except (OSError, ValueError):
        raise ValueError(f"{path} is missing or damaged; train.py --overwrite makes the run anew") from None
    with data.undamaged(path, f"it is not what train.py writes: expected {', '.join(known)} in it"):
        name, own_names, mean, std, size = (student[key] for key in known)
        data.normalize(data.resize(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), size), mean, std)  # raises now
        model, own_names = models.load_weights(name, path), list(own_names)
    check_classes(f"{folder} was trained on other classes than {dataset} has", own_names, class_names)
    return Classifier(model, mean, std, size, folder / "report.json", {**report, "weights": digest(path)})


def go_on(classifier, **how):
    """The report that lies there, to be completed, if it is of the same weights and settings; else a new one."""
    new = json.loads(json.dumps({**classifier.report, "how": how}))
    with contextlib.suppress(FileNotFoundError, ValueError), data.undamaged(classifier.path, ""):
        old = json.loads(classifier.path.read_text())
        tables([old]), comparison(compare([old]))  # what this run will do with it, raises now
        [row["brier"] for name, row in old.items() if name not in (*new, "corruptions", "fused")]
        numbers = [len(row) <= 5 and sum(row) for row in old.get("corruptions", {"top1": {}})["top1"].values()]
        if {key: old.get(key) for key in new} == new and False not in numbers:
            return old
    return new


def scores(logits, labels):
    """The metrics of a test set: top-1, top-5 and both ECEs (15 bins) in percent, NLL in nats, Brier score."""
    return {"images": len(labels), "top1": 100 * top_k_accuracy(logits, labels),
            "top5": 100 * top_k_accuracy(logits, labels, 5), "nll": nll(logits, labels), "brier": brier(logits, labels),
            "ece": 100 * ece(logits, labels), "ece_equal_mass": 100 * ece(logits, labels, equal_mass=True)}


def calibration(logits, labels, temperature=None):
    """`scores` before and after a division by the temperature, with the reliability diagram's points. Without one, it
    is fitted on a random half of the images (always the same), and the scores are those of the other half."""
    if temperature is None:
        rest, half = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tensor_split(2)
        temperature = fit_temperature(logits[half], labels[half])
        logits, labels = logits[rest], labels[rest]
    table = {"temperature": temperature}
    for name, z in (("before", logits), ("after", logits / temperature)):
        points = zip(("confidence", "accuracy", "count"), calibration_bins(z, labels))
        table[name] = {**scores(z, labels), "bins": {what: row.tolist() for what, row in points}}
    return table


@torch.inference_mode()
def predict(classifiers, blocks, config, progress, note=""):
    """Blocks of uint8 images (b,3,H,W) -> a list of logits (N,K), one a classifier, each seeing the images at its own
    size; a block is made once for all of them."""
    logits = [[] for _ in classifiers]
    for images in blocks:
        for classifier, rows in zip(classifiers, logits):
            inputs = train.to_input(data.resize(images, classifier.image_size), classifier.mean, classifier.std)
            with train.autocast(config):
                rows.append(classifier.model(inputs)[0].float().cpu())
        done = progress.done + len(images)
        progress.update(done, note, keep=done >= progress.total)
    return [torch.cat(rows) for rows in logits]


def load_test(name, config):
    """A test split, its images at their own size; where they stream or differ, as the data set's customary crop."""
    split = data.load_dataset(config.dataset, config.data_dir, name)
    if isinstance(split.images, torch.Tensor):
        return split
    return split._replace(images=data.resize(split.images, data.DATASETS[config.dataset].image_size))


def folder_names(split):
    """The classes' folders, in the order of the labels, where images stream: WordNet ids for ImageNet. Else []."""
    paths = split.images.paths if isinstance(split.images, data.Stream) else []
    return sorted({Path(path).parent.name for path in paths})


def load_shift(directory, config, test):
    """-> (a Split whose labels count within the columns, columns of the logits to choose among): a shift set's folder.

    CIFAR-10.1's or STL-10's files, or a folder of images a class. Folders are named by class (where the images stream
    by the folders of the data set, that is by WordNet id) or by its number (ImageNet-V2), or in classes.json.
    """
    root, info, names = Path(directory), data.DATASETS[config.dataset], list(test.class_names)
    for files, read in (("cifar10.1_*.npy", read_cifar10_1), ("stl10_binary", read_stl10)):
        if any(root.glob(files)):
            if config.dataset != "cifar10":
                raise ValueError(f"{root} holds a shift set of cifar10, but these runs are on {config.dataset}")
            images, labels = read(root)
            columns, labels = labels.unique(return_inverse=True)
            return data.Split(images, labels, names), columns
    ids = folder_names(test) or names
    folder_classes = {str(k): name for k, name in enumerate(ids) if str(k) not in ids}
    if (root / "classes.json").is_file():
        with data.undamaged(root / "classes.json", "expected {folder: class}"):
            given = json.loads((root / "classes.json").read_text())
            folder_classes |= {folder: ids[names.index(name)] if name in names else "" + name
                               for folder, name in given.items()}
    paths, labels, columns = list_folder(root, ids, folder_classes)
    resize_to = info.image_size if ids is names else round(info.image_size * 8 / 7)  # as `data.resize` does
    return data.Split(data.Stream(paths, info.image_size, resize_to), labels, names), columns


def blocks(split, config):
    """A split's images, uint8 (b,3,H,W) a block, on the device."""
    for images, _, _ in data.batches(split, 250, workers=config.workers, device=config.device):
        yield images


def corrupted(test, name, severity, config):
    """-> (blocks of corrupted test images, their labels): generated, or read from the published files. Each generated
    corruption and severity has its own generator, so that it can be repeated alone."""
    if config.corruptions == "generated":
        seed = 1000 * config.seed + 10 * list(COMMON).index(name) + severity
        generator = torch.Generator().manual_seed(seed)
        return (corrupt(images, name, severity, generator) for images in blocks(test, config)), test.labels
    if config.dataset.startswith("cifar"):
        split = data.Split(*read_cifar_c(config.corruptions, name, severity), test.class_names)
        if len(split.labels) == len(test.labels) and not split.labels.equal(test.labels):
            raise ValueError(f"{config.corruptions}/labels.npy does not have the labels of {config.dataset}'s test "
                             "split; expected the files made from it")
    else:
        folder = torchvision.datasets.ImageFolder(imagenet_c_folder(config.corruptions, name, severity))
        size = data.DATASETS[config.dataset].image_size  # the published images have it already
        images = data.Stream([path for path, _ in folder.samples], size, size)
        split = data.Split(images, torch.tensor(folder.targets), test.class_names)
        if folder_names(test):
            check_classes(f"{folder.root} has other classes than {config.dataset}", folder.classes, folder_names(test))
        if len(folder.classes) != len(test.class_names):
            raise ValueError(f"{folder.root} has {len(folder.classes)} classes, {config.dataset} "
                             f"{len(test.class_names)}: expected a folder for each")
    return blocks(split, config), split.labels


def corruption_errors(table, clean, alexnet):
    """The means over {corruption: top-1 a severity}, in percent: the error, the same less the clean one (`clean` is the
    clean top-1); with alexnet the mCE and relative mCE of ImageNet-C, see `mean_corruption_error`."""
    errors, clean = {name: 1 - sum(row) / 500 for name, row in table.items()}, 1 - clean / 100
    means = {"mean_error": mean_corruption_error(errors), "relative_mean_error": mean_corruption_error(errors, clean)}
    if alexnet:
        means |= {"mce": mean_corruption_error(errors, alexnet=True),
                  "relative_mce": mean_corruption_error(errors, clean, alexnet=True)}
    return {name: 100 * value for name, value in means.items()}


def load_teaching(folder, config):
    """What taught a run's student, made again as train.py made it (its cache has all of it): -> (the run's
    `train.Config`, splits, teachers, CLIP, its tokenizer, its scale)."""
    own = read_config(folder, config)
    splits = train.load_splits(own)
    teachers = train.load_teachers(own, splits)
    clip, tokenizer = train.load_clip(own)
    return own, splits, teachers, clip, tokenizer, own.clip_scale or clip.logit_scale.exp().item()


def analyse(teaching, config):
    """`fusion` for a run's own teacher, CLIP and alpha on its test split, from `load_teaching`; and CLIP's scale."""
    own, splits, teachers, clip, tokenizer, scale = teaching
    cosines, _ = train.load_targets(own, clip, tokenizer, {"test": splits["test"]})["test"]
    names, templates = splits["test"].class_names, clip_model.load_templates(own.prompts or train.PROMPTS)
    with torch.inference_mode():
        classes = clip_model.class_features(clip, tokenizer, names, templates).to(config.device)
    test = train.resized(splits["test"], own)
    teacher, clip_logits = (z.to(config.device) for z in (train.predict(teachers, test, own), scale * cosines.float()))
    groups = superclasses(own.dataset, names, folder_names(splits["test"]), Path(own.data_dir) / "wordnet.is_a.txt")
    groups = {what: group.to(config.device) for what, group in groups.items()}
    print("what fusion does, with bootstrap intervals", file=sys.stderr)  # a minute for CIFAR-100 on a CPU
    return {"clip_scale": scale, **fusion(teacher, clip_logits, test.labels.to(config.device), own.alpha,
                                          classes @ classes.T, groups, torch.Generator().manual_seed(config.seed))}


def analyse_corrupted(teaching, test, config):
    """{"teacher", "clip", "fused"}: top-1 in percent on the corrupted test images that the student is evaluated on, the
    mean over the fifteen corruptions and their severities. CLIP sees them at the data set's own size."""
    own, _, teachers, clip, tokenizer, scale = teaching
    classes, info = train.class_embeddings(own, clip, tokenizer, test.class_names), data.DATASETS[own.dataset]
    found, tasks = {"teacher": 0.0, "clip": 0.0, "fused": 0.0}, list(itertools.product(COMMON, range(1, 6)))
    progress = data.Progress("teacher, CLIP and fused under corruptions", len(tasks) * len(test.labels))
    for name, severity in tasks:
        images, labels = corrupted(test, name, severity, config)
        logits = {who: [] for who in found}
        for block in images:
            inputs = train.to_input(data.resize(block, own.image_size), info.mean, info.std)
            logits["teacher"].append(teachers(inputs)[0])
            logits["clip"].append(scale * train.clip_view(own, clip, classes, block)[0])
            logits["fused"].append(richkd.fuse_logits(logits["teacher"][-1], logits["clip"][-1], own.alpha))
            progress.update(progress.done + len(block), f"{name} {severity}")
        for who, z in logits.items():
            found[who] += 100 * top_k_accuracy(torch.cat(z).cpu(), labels) / len(tasks)
    progress.update(progress.total, keep=True)
    return found


def prepare(config):
    """-> (config with data set and place filled in, the test split, [(Classifier, its report so far)])."""
    if config.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot draws with matplotlib, which is not installed: pip install matplotlib")
    folders = known = []
    if config.checkpoint:
        if not (config.model and config.dataset):
            raise ValueError("--checkpoint takes --model NAME and --dataset NAME with it")
        config = dataclasses.replace(config, data_dir=config.data_dir or "data")
    else:
        folders = [Path(folder) for folder in config.run or [newest_run()]]
        unfinished = [str(folder) for folder in folders if not (folder / "summary.json").is_file()]
        if unfinished:
            raise FileNotFoundError(f"no finished run in {', '.join(unfinished)} (no summary.json); python train.py "
                                    "makes one, and finishes one that it began")
        known = [read_config(folder, config) for folder in folders]
        datasets = {own.dataset for own in known}
        if not config.dataset and len(datasets) > 1:
            raise ValueError(f"these runs are on different data sets, {', '.join(sorted(datasets))}: evaluate them one "
                             "data set at a time")
        config = dataclasses.replace(config, dataset=config.dataset or datasets.pop(),
                                     data_dir=config.data_dir or known[0].data_dir)
    test = load_test("test", config)
    if config.shift == [] and not data.DATASETS[config.dataset].shifts:
        raise ValueError(f"{config.dataset} has no shift split of its own: --shift DIR names the folder of one")
    classifiers = [load_run(folder, own, config.dataset, test.class_names) for folder, own in zip(folders, known)]
    if config.checkpoint:
        info, path = data.DATASETS[config.dataset], Path(config.checkpoint)
        model = models.load_weights(config.model, path, len(test.class_names))
        report = {"of": {"checkpoint": str(path), "dataset": config.dataset, "student": config.model},
                  "weights": digest(path)}
        path = path.with_suffix(".report.json")
        classifiers = [Classifier(model, info.mean, info.std, info.image_size, path, report)]
    classifiers = [own._replace(model=models.freeze(own.model).to(config.device)) for own in classifiers]
    images = data.fingerprint(test.images)
    return config, test, [(own, go_on(own, seed=config.seed, amp=config.amp, images=images)) for own in classifiers]


def save(pairs):
    for classifier, report in pairs:
        data.write_atomically(classifier.path, json.dumps(report, indent=1).encode())


def evaluate(config):
    """What the command does with classifiers: -> their reports, dicts that also lie in report.json beside each run.
    What is in a report already is not done again."""
    config, test, pairs = prepare(config)
    taught = [pair for pair in pairs if {"teacher", "clip"} <= pair[1].get("teachers", {}).keys()]
    if config.fused and not taught:
        raise ValueError("--fused: no run here has a teacher and CLIP, as those of richkd, richkd-l and richkd-f have")

    sets = [("test", None)]
    if config.shift is not None:
        sets += [(name, None) for name in data.DATASETS[config.dataset].shifts]
        sets += [(f"shift {path.name}", str(path)) for path in (Path(folder).resolve() for folder in config.shift)]
    for name, folder in sets:
        todo = [pair for pair in pairs if name not in pair[1] or pair[1][name].get("folder") != folder]
        if todo:
            split, columns = load_shift(folder, config, test) if folder else (
                test if name == "test" else load_test(name, config), slice(None))
            progress = data.Progress(name, len(split.labels))
            for (_, report), logits in zip(todo, predict([own for own, _ in todo], blocks(split, config), config,
                                                         progress)):
                logits = logits[:, columns]
                temperature = None if name == "test" else report["test"]["calibration"]["temperature"]
                report[name] = {**scores(logits, split.labels), **({"folder": folder} if folder else {}),
                                "calibration": calibration(logits, split.labels, temperature)}
            save(todo)

    if config.corruptions:
        folder = None if config.corruptions == "generated" else str(Path(config.corruptions).resolve())
        start = {"source": "published" if folder else "generated", "folder": folder}
        for _, report in pairs:
            if {key: report.get("corruptions", {}).get(key) for key in start} != start:
                report["corruptions"] = {**start, "top1": {}}
        tasks = [(name, severity, todo) for name in COMMON for severity in range(1, 6)
                 if (todo := [p for p in pairs if len(p[1]["corruptions"]["top1"].get(name, ())) < severity])]
        progress = data.Progress(f"corruptions ({start['source']})", len(tasks) * len(test.labels))
        for name, severity, todo in tasks:
            images, labels = corrupted(test, name, severity, config)
            logits = predict([own for own, _ in todo], images, config, progress, f"{name} {severity}")
            for (_, report), z in zip(todo, logits):
                report["corruptions"]["top1"].setdefault(name, []).append(100 * top_k_accuracy(z, labels))
            save(todo)
        alexnet = config.dataset == "imagenet" and len(test.class_names) == 1000
        for _, report in pairs:
            report["corruptions"] |= corruption_errors(report["corruptions"]["top1"], report["test"]["top1"], alexnet)
        save(pairs)

    for classifier, report in taught if config.fused else ():
        teaching = functools.cache(functools.partial(load_teaching, classifier.path.parent, config))  # if at all, once
        if "fused" not in report:
            report["fused"] = analyse(teaching(), config)
            save([(classifier, report)])
        if config.corruptions and {key: report["fused"].get("corruptions", {}).get(key) for key in start} != start:
            report["fused"]["corruptions"] = {**start, **analyse_corrupted(teaching(), test, config)}
            save([(classifier, report)])
    for classifier, report in pairs if config.plot else ():
        data.write_atomically(classifier.path.with_suffix(".png"), plot(report))
        if config.corruptions:
            draw_samples(test, config, classifier.path.with_name("samples.png"))
    return [report for _, report in pairs]


def draw_samples(test, config, path, n=2):
    """The first n test images under the fifteen corruptions (columns, in their order) by severity (rows)."""
    images = next(blocks(test, config))[:n].cpu()
    few = data.Split(images, test.labels[:n], test.class_names)
    cells = [next(iter(corrupted(few, name, severity, config)[0]))[:n].cpu() for severity in range(1, 6)
             for name in COMMON]
    cells = torch.stack(cells, dim=1).flatten(0, 1)  # (n * 5 * 15, 3, H, W)
    times = max(1, 96 // cells.shape[-1])
    grid = torchvision.utils.make_grid(cells.repeat_interleave(times, 2).repeat_interleave(times, 3), nrow=15,
                                       pad_value=255)
    data.write_atomically(path, torchvision.io.encode_png(grid).numpy().tobytes())


def zero_shot(config):
    """CLIP itself on a data set's test split: {"all N templates": top-1 in percent, then an entry a template}."""
    config = train.Config(dataset=config.dataset or "shapes", data_dir=config.data_dir or "data", **{
        name: getattr(config, name) for name in ("clip", "bpe", "prompts", "amp", "device", "workers", "cache_dir")})
    test = data.load_dataset(config.dataset, config.data_dir, "test")
    templates = clip_model.load_templates(config.prompts or train.PROMPTS)
    clip, tokenizer = train.load_clip(config)
    _, features = train.load_targets(config, clip, tokenizer, {"test": test})["test"]  # (N,D), unit length
    each = [clip_model.class_features(clip, tokenizer, test.class_names, [t]).cpu() for t in templates]  # M times (K,D)
    classes = {f"all {len(each)} templates": F.normalize(sum(each), dim=1), **dict(zip(templates, each))}
    return {name: 100 * top_k_accuracy(features.float() @ rows.T, test.labels) for name, rows in classes.items()}


def job(config):
    train.resolve(train.Config(dataset=config.dataset or "shapes", device=config.device))  # raises where one is wrong
    if config.compare:
        print(comparison(compare([report for path in config.compare for report in read_reports(path)])))
    elif config.zero_shot:
        for template, top1 in zero_shot(config).items():
            print(f"{top1:6.2f} %  {template}")
    else:
        reports = evaluate(config)
        print(tables(reports))
        if len(reports) > 1:
            print("\n" + comparison(compare(reports)))


if __name__ == "__main__":
    train.main(lambda: job(train.parse(Config, __doc__)))
