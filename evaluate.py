"""Evaluate trained classifiers: accuracy, calibration, shift and corruptions; and CLIP itself.

    python evaluate.py                                       # the newest finished run on its test split
    python evaluate.py --shift --corruptions                 # its shift splits and the 15 common corruptions, too
    python evaluate.py --run runs/A runs/B --corruptions CIFAR-100-C        # several runs; the published files
    python evaluate.py --checkpoint FILE --model resnet20 --dataset cifar100
    python evaluate.py --zero-shot --clip ViT-B/32 --dataset cifar100

Three sections, leaves first: metrics (they take logits, never a model), published files, and runs with their report. A
function can be copied alone, together with the few helpers it names.

References
    Hendrycks and Dietterich 2019, arXiv 1903.12261: mCE and relative mCE
    Guo et al. 2017, arXiv 1706.04599: expected calibration error, temperature scaling
"""

import dataclasses
import itertools
import json
import math
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
import train
from corruptions import *  # each corruption, COMMON, EXTRA and corrupt() are names of this module, too

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
    """(low, high) of statistic(*samples), a number, over images drawn with replacement: percentiles (Efron 1979).

    samples are tensors (N, ...), resampled together. For a mean pass torch.mean and [the images' values]; for a paired
    difference, the differences.
    """
    n, values = len(samples[0]), []
    for _ in range(resamples):
        index = torch.randint(n, (n,), generator=generator, device=generator.device)
        values.append(float(statistic(*(sample[index.to(sample.device)] for sample in samples))))
    values = torch.tensor(values, dtype=torch.float64)
    return values.quantile((1 - level) / 2).item(), values.quantile((1 + level) / 2).item()


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


def read_cifar_c(directory, name, severity):
    """One severity of CIFAR-10-C or CIFAR-100-C: images uint8 (N, 3, 32, 32), labels int64 (N,).

    The folder holds <name>.npy uint8 (5 N, 32, 32, 3), severity-major, and labels.npy (5 N,); N is 10,000 as published.
    Only the part asked for is read. Raises FileNotFoundError, and ValueError on a file of another shape.
    """
    check_severity(severity)
    arrays = []
    for path in (Path(directory) / f"{name}.npy", Path(directory) / "labels.npy"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; expected the unpacked CIFAR-10-C or CIFAR-100-C")
        try:
            arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no NumPy array file, or is cut short; unpack it again") from error
    images, labels = arrays
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


# Runs and reports -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting with its line of help; the command line is made from it."""
    run: tuple = train.setting(None, "run folders; without, the newest finished one below runs/", nargs="+")
    checkpoint: str = train.setting(None, "a bare checkpoint instead, with --model and --dataset", type=str)
    model: str = train.setting(None, "the checkpoint's architecture", type=str)
    dataset: str = train.setting(None, "the data set; without, the run's own", type=str)
    data_dir: str = train.setting(None, "where the data set lies; without, where the run found it", type=str)
    shift: bool = train.setting(False, "evaluate the data set's shift splits, too")
    corruptions: str = train.setting(None, "evaluate corrupted test images, too: the published files below DIR, or "
                                     "generated ones", nargs="?", const="generated", metavar="DIR")
    zero_shot: bool = train.setting(False, "evaluate --clip itself on --dataset, by one template, each, and all")
    clip: str = train.setting("ViT-L/14", "as in train.py", type=str)
    bpe: str = train.setting(None, "as in train.py", type=str)
    prompts: str = train.setting(None, "as in train.py", type=str)
    seed: int = train.setting(0, "of generated corruptions")
    amp: bool = train.setting(False, "bfloat16 autocast")
    device: str = train.setting(train.Config.device, "cpu, cuda, cuda:1")
    workers: int = train.setting(8, "loader processes where images stream (imagenet)")
    cache_dir: str = train.setting(train.Config.cache_dir, "as in train.py")


class Classifier(NamedTuple):
    """A trained network and what reading its answers takes."""
    model: torch.nn.Module
    mean: list
    std: list
    image_size: int
    about: dict  # what the report says of it
    report: Path


def newest_run(root="runs"):
    """The folder below `root` whose run finished last. FileNotFoundError, saying how to make one, if there is none."""
    finished = sorted(Path(root).glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise FileNotFoundError(f"no finished run below {root}/: python train.py makes one; --run names one elsewhere, "
                                "--checkpoint a bare checkpoint")
    print(f"evaluating {finished[-1].parent}", file=sys.stderr)
    return finished[-1].parent


def load_run(folder, dataset, class_names):
    """-> Classifier of a finished run. Raises ValueError for a damaged one, and for one of other classes than the data
    set's, naming the first that differs."""
    student, summary = train.read_checkpoint(folder / "student.pt"), json.loads((folder / "summary.json").read_text())
    for k, (own, other) in enumerate(itertools.zip_longest(student["class_names"], class_names)):
        if own != other:
            raise ValueError(f"{folder} was trained on other classes than {dataset} has: class {k} is {own!r} there "
                             f"and {other!r} here")
    model = models.load_weights(student["model_name"], folder / "student.pt")
    about = {key: summary[key] for key in ("dataset", "method", "teacher", "student", "seed", "epochs")}
    return Classifier(model, student["mean"], student["std"], student["image_size"], about, folder / "report.json")


def scores(logits, labels):
    """The metrics of one test set: top-1, top-5 and ECE in percent, NLL in nats."""
    return {"top1": 100 * top_k_accuracy(logits, labels), "top5": 100 * top_k_accuracy(logits, labels, 5),
            "nll": nll(logits, labels), "ece": 100 * ece(logits, labels)}


@torch.inference_mode()
def predict(classifiers, blocks, config):
    """Blocks of uint8 images (b,3,H,W) -> a list of logits (N,K), one a classifier, each seeing the images at its own
    size; a block is made once for all of them."""
    logits = [[] for _ in classifiers]
    for images in blocks:
        for classifier, rows in zip(classifiers, logits):
            inputs = train.to_input(data.resize(images, classifier.image_size), classifier.mean, classifier.std)
            with train.autocast(config):
                rows.append(classifier.model(inputs)[0].float().cpu())
    return [torch.cat(rows) for rows in logits]


def load_test(name, config):
    """A test split, its images at their own size; where they stream or differ, as the data set's customary crop."""
    split = data.load_dataset(config.dataset, config.data_dir, name)
    if isinstance(split.images, torch.Tensor):
        return split
    return split._replace(images=data.resize(split.images, data.DATASETS[config.dataset].image_size))


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
    else:
        folder = torchvision.datasets.ImageFolder(imagenet_c_folder(config.corruptions, name, severity))
        size = data.DATASETS[config.dataset].image_size  # the published images have it already
        images = data.Stream([path for path, _ in folder.samples], size, size)
        split = data.Split(images, torch.tensor(folder.targets), test.class_names)
        if len(folder.classes) != len(test.class_names):
            raise ValueError(f"{folder.root} has {len(folder.classes)} classes, {config.dataset} "
                             f"{len(test.class_names)}: expected a folder for each")
    return blocks(split, config), split.labels


def evaluate(config):
    """What the command does with classifiers: -> their reports, dicts that also lie in report.json beside each run."""
    folders = []
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
        known = [json.loads((folder / "config.json").read_text()) for folder in folders]
        datasets = {run["settings"]["dataset"] for run in known}
        if not config.dataset and len(datasets) > 1:
            raise ValueError(f"these runs are on different data sets, {', '.join(sorted(datasets))}: evaluate them one "
                             "data set at a time")
        config = dataclasses.replace(config, dataset=config.dataset or datasets.pop(),
                                     data_dir=config.data_dir or known[0]["places"]["data_dir"])
    test = load_test("test", config)
    classifiers = [load_run(folder, config.dataset, test.class_names) for folder in folders]
    if config.checkpoint:
        info, path = data.DATASETS[config.dataset], Path(config.checkpoint)
        model = models.load_weights(config.model, path, len(test.class_names))
        about = {"checkpoint": str(path), "dataset": config.dataset, "student": config.model}
        classifiers = [Classifier(model, info.mean, info.std, info.image_size, about, path.with_suffix(".report.json"))]
    for classifier in classifiers:
        classifier.model.eval().to(config.device, memory_format=torch.channels_last)

    reports = [{"of": classifier.about} for classifier in classifiers]
    for name in ("test", *(data.DATASETS[config.dataset].shifts if config.shift else ())):
        split = test if name == "test" else load_test(name, config)
        for report, logits in zip(reports, predict(classifiers, blocks(split, config), config)):
            report[name] = scores(logits, split.labels)
    if config.corruptions:
        source = "generated" if config.corruptions == "generated" else "published"
        for report in reports:
            report["corruptions"] = {"source": source, "top1": {}}
        tasks = [(name, severity) for name in COMMON for severity in range(1, 6)]
        progress = data.Progress(f"corruptions ({source})", len(tasks), "sets")
        for done, (name, severity) in enumerate(tasks, 1):
            images, labels = corrupted(test, name, severity, config)
            for report, logits in zip(reports, predict(classifiers, images, config)):
                report["corruptions"]["top1"].setdefault(name, []).append(100 * top_k_accuracy(logits, labels))
            progress.update(done, f"{name} {severity}", keep=done == len(tasks))
        for report in reports:
            errors = {name: 1 - sum(row) / 500 for name, row in report["corruptions"]["top1"].items()}
            report["corruptions"]["mean_error"] = 100 * mean_corruption_error(errors)
    for classifier, report in zip(classifiers, reports):
        data.write_atomically(classifier.report, json.dumps(report, indent=2).encode())
    return reports


def zero_shot(config):
    """CLIP itself on a data set's test split: {"all N templates": top-1 in percent, then an entry a template}."""
    config = dataclasses.replace(config, dataset=config.dataset or "shapes", data_dir=config.data_dir or "data")
    test = data.load_dataset(config.dataset, config.data_dir, "test")
    templates = clip_model.load_templates(config.prompts or train.PROMPTS)
    clip, tokenizer = train.load_clip(config)
    _, features = train.load_targets(config, clip, tokenizer, {"test": test})["test"]  # (N,D), unit length
    each = [clip_model.class_features(clip, tokenizer, test.class_names, [t]).cpu() for t in templates]  # M times (K,D)
    classes = {f"all {len(each)} templates": F.normalize(sum(each), dim=1), **dict(zip(templates, each))}
    return {name: 100 * top_k_accuracy(features.float() @ rows.T, test.labels) for name, rows in classes.items()}


def tables(reports):
    """The reports as text: a table of test sets each, and one of corruptions by severity."""
    lines = []
    for report in reports:
        lines.append(" ".join(f"{key} {value}" for key, value in report["of"].items() if value is not None))
        lines.append(f"{'':20}{'top-1 %':>10}{'top-5 %':>10}{'NLL':>10}{'ECE %':>10}")
        for name, row in report.items():
            if isinstance(row, dict) and "ece" in row:
                lines.append(f"{name:20}{row['top1']:10.2f}{row['top5']:10.2f}{row['nll']:10.3f}{row['ece']:10.2f}")
        if "corruptions" in report:
            lines.append(f"{'top-1 %, severity':20}{1:>10}{2:>10}{3:>10}{4:>10}{5:>10}{'mean':>10}")
            for name, row in report["corruptions"]["top1"].items():
                lines.append(f"{name:20}" + "".join(f"{value:10.2f}" for value in [*row, sum(row) / 5]))
            lines.append(f"mean error over the fifteen ({report['corruptions']['source']}): "
                         f"{report['corruptions']['mean_error']:.2f} %")
    return "\n".join(lines)


def job(config):
    if config.zero_shot:
        for template, top1 in zero_shot(config).items():
            print(f"{top1:6.2f} %  {template}")
    else:
        print(tables(evaluate(config)))


if __name__ == "__main__":
    train.main(lambda: job(train.parse(Config, __doc__)))
