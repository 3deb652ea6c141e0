"""Evaluate trained classifiers and what taught them: accuracy, calibration, shift, corruptions.

    python evaluate.py                                    # the newest finished run, its test split
    python evaluate.py --shift --corruptions --fused      # further sets; teacher, CLIP, both fused
    python evaluate.py --run runs/A runs/B --shift imagenet-a --corruptions ImageNet-C
    python evaluate.py --checkpoint FILE --model resnet20 --dataset cifar100
    python evaluate.py --zero-shot --clip ViT-B/32 --dataset cifar100

A subject is a function from images to logits, and every set of images goes once through all of
them. report.json, beside each run, grows set by set: the same command goes on with it.
"""

import contextlib
import dataclasses
import functools
import math
from pathlib import Path
from typing import Iterator, NamedTuple

import torch

import clip_model
import data
import metrics
import models
import richkd
import train
from corruptions import COMMON, corrupt
from support import checkpoints, clip_files, command, files, runs, shifts
from support.command import setting

ANEW = "train.py --overwrite makes the run anew"
CORRUPTED = [f"{name} {severity}" for name in COMMON for severity in range(1, 6)]

@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting with its line of help; the command line is made from it."""
    run: tuple = setting(None, "run folders; without, the newest finished one in runs/", nargs="+")
    checkpoint: str = setting(None, "a bare checkpoint, with --model and --dataset")
    model: str = setting(None, "the checkpoint's architecture")
    image_size: int = setting(None, "side of the checkpoint's images, where it does not say",
                              within=(8, math.inf))
    dataset: str = setting(None, "the data set; without, the run's own",
                           choices=tuple(data.DATASETS))
    data_dir: str = setting(None, "where it lies; without, where the run found it")
    shift: tuple = setting(
        None, "the data set's own shift splits, too, and those in folders: CIFAR-10.1, STL-10, or "
        "a folder a class (classes.json: {folder: class})", nargs="*", metavar="DIR")
    corruptions: str = setting(None, "corrupted test images, too: generated, or DIR's published",
                               nargs="?", const="generated", metavar="DIR")
    corrupted_share: float = setting(1.0, "share of the test images to corrupt, as much of every "
                                     "class", above=0, within=(0, 1))
    fused: bool = setting(False, "beside each student what taught it: teacher, CLIP, both fused")
    zero_shot: bool = setting(False, "only --clip itself on --dataset, by each template and all")
    class_names: str = setting(None, "as in train.py; without, the run's own")
    clip: str = setting("ViT-L/14", "as in train.py")
    clip_activation: str = setting(None, "as in train.py", choices=clip_files.ACTIVATIONS)
    bpe: str = setting(None, "as in train.py")
    prompts: str = setting(None, "as in train.py")
    seed: int = setting(0, "of generated corruptions", within=(0, 2**31))
    amp: bool = setting(False, "bfloat16, for students; what taught them has their runs' own")
    device: str = setting(train.Config.device, "cpu, cuda, cuda:1")
    workers: int = setting(train.Config.workers, "as in train.py", within=(0, math.inf))
    cache_dir: str = setting(None, "as in train.py")

# Measures: logits (N,K), labels int64 (N,) --------------------------------------------------------
def measures(logits, labels):
    """What is told of every subject on every set, all but NLL in percent: top-1, top-5, NLL, ECE,
    and the images of which it is confident (from .5, from .7) and right, or wrong."""
    row = {"images": len(labels), "top1": 100 * metrics.top_k_accuracy(logits, labels),
           "top5": 100 * metrics.top_k_accuracy(logits, labels, 5),
           "nll": metrics.nll(logits, labels), "ece": 100 * metrics.ece(logits, labels)}
    for threshold in (0.5, 0.7):
        masks = metrics.quadrants(logits, labels, threshold)
        for name in ("confident_right", "confident_wrong"):
            row[f"{name} {threshold}"] = 100 * masks[name].double().mean().item()
    return row

def scores(logits, labels, temperature=None):
    """`measures`, Brier score, ECE by bins of equal mass; "calibration": measures and reliability
    diagram before and after a division by the temperature. Without one it is fitted on a random
    half of the images, always the same, and the calibration is that of the other half."""
    row = {**measures(logits, labels), "brier": metrics.brier(logits, labels),
           "ece_equal_mass": 100 * metrics.ece(logits, labels, equal_mass=True)}
    if temperature is None:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        rest, half = order.tensor_split(2)
        temperature = metrics.fit_temperature(logits[half], labels[half])
        logits, labels = logits[rest], labels[rest]
    row["calibration"] = {"temperature": temperature}
    for name, z in (("before", logits), ("after", logits / temperature)):
        bins = zip(("confidence", "accuracy", "count"), metrics.calibration_bins(z, labels))
        row["calibration"][name] = {**measures(z, labels),
                                    "bins": {what: values.tolist() for what, values in bins}}
    return row

def over_corruptions(rows, alexnet):
    """Means over the fifteen corruptions and five severities; "by_severity": {corruption: top-1 at
    each}; in percent the mean error and how much it is above the clean one, with alexnet also
    ImageNet-C's mCE and relative mCE. rows: {"clean", "fog 1" and so on: `measures`}."""
    top1 = {name: [rows[f"{name} {severity}"]["top1"] for severity in range(1, 6)]
            for name in COMMON}
    errors = {name: 1 - sum(row) / 500 for name, row in top1.items()}  # shares, as metrics has them
    clean = 1 - rows["clean"]["top1"] / 100
    shares = {"mean_error": metrics.mean_corruption_error(errors),
              "relative_mean_error": metrics.mean_corruption_error(errors, clean)}
    if alexnet:
        shares["mce"] = metrics.mean_corruption_error(errors, alexnet=True)
        shares["relative_mce"] = metrics.mean_corruption_error(errors, clean, alexnet=True)
    means = {name: sum(rows[each][name] for each in CORRUPTED) / 75 for name in rows["clean"]}
    return {**means, "by_severity": top1, **{name: 100 * x for name, x in shares.items()}}

# What is evaluated --------------------------------------------------------------------------------
class Student:
    """A classifier, with --fused what taught it, and the report of them, a JSON file: {"about":
    whose numbers these are, "sets": {name: {"key": which images they are of, subject: numbers}}}.
    A report about something else is begun anew, and so is a set with another key."""

    def __init__(self, config, test, path, name, report, **about):
        """The checkpoint `path` of the architecture `name`; about: what the report is about beside
        weights and images. Raises ValueError where its classes or images are others."""
        info = data.DATASETS[config.dataset]
        size = runs.input_size(path, checkpoints.read_about(path), test, info._replace(
            image_size=config.image_size or info.image_size))
        if config.image_size not in (None, size):
            raise ValueError(f"{path} reads images of {size} x {size}, here they are of "
                             f"{config.image_size}: evaluate those of one size at a time")
        model = models.freeze(models.load_weights(name, path, len(test.class_names)))
        self.subjects = {"student": at_own_size(model.to(config.device), config, size)}
        self.clip_targets = self.classes = self.clip_scale = self.alpha = None
        self.path, self.image_size, self.sets = Path(report), size, {}
        self.about = {**about, "weights": files.file_digest(path), "image_size": size,
                      "amp": config.amp, "test": runs.identity(test)["content"]}
        with contextlib.suppress(OSError, ValueError):
            before = files.read_json(self.path, "it is begun anew")
            if before.get("about") == self.about:
                self.sets = before["sets"]

    def done(self, name, key):
        """{subject: numbers} of those that were measured on a set."""
        rows = self.sets.get(name, {"key": None})
        return {who: row for who, row in rows.items() if who != "key"} if rows["key"] == key else {}

    def add(self, name, key, rows):
        self.sets[name] = {"key": key, **self.done(name, key), **rows}
        files.write_json(self.path, {"about": self.about, "sets": self.sets})

def newest_run(fused, root="runs"):
    """The folder below `root` whose run finished last, with `fused` of those with a teacher and
    CLIP. Raises FileNotFoundError."""
    finished = Path(root).glob("*/summary.json")
    for path in sorted(finished, key=lambda path: path.stat().st_mtime, reverse=True):
        summary = files.read_json(path, ANEW)
        if not fused or summary["teacher"] and summary["clip"]:
            files.note(f"evaluating {path.parent}")
            return path.parent
    kind = "run with a teacher and CLIP, as --fused needs," if fused else "run"
    raise FileNotFoundError(f"no finished {kind} below {root}/: python train.py makes one; --run "
                            "names one elsewhere, --checkpoint a bare checkpoint")

def read_run(folder, config):
    """-> a finished run's `train.Config`, in the places of this evaluation, and its config.json."""
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(f"no finished run in {folder}: python train.py makes one, and "
                                "finishes one that it began")
    about = files.read_json(folder / "config.json", ANEW)
    with files.undamaged(folder / "config.json", ANEW):
        own = train.Config(
            **about["settings"], data_dir=config.data_dir or about["places"]["data_dir"],
            device=config.device, workers=config.workers, cache_dir=config.cache_dir)
    return own, about

def at_own_size(network, config, size):
    """A network as a function of uint8 images of any size to logits."""
    info = data.DATASETS[config.dataset]
    logits = train.classifier(network, info.mean, info.std, config)
    return lambda images: logits(data.resize(images, size))

def add_teaching(student, own, about):
    """Add what taught a run's student, as train.py makes it again from its cache; own, about: as
    `read_run` has them. Raises ValueError where data or files are others now."""
    splits = train.load_splits(own)
    differ = runs.run_difference(about, own, train.inputs(own, splits))
    if differ:
        raise ValueError(f"--fused: what taught this run is not here: it has {differ}")
    if own.teacher:
        teachers = train.load_teachers(own, splits)
        student.subjects["teacher"] = at_own_size(teachers, own, own.image_size)
    if own.clip:
        (clip, tokenizer, scale), names = train.load_clip(own), splits["test"].class_names
        classes = functools.cache(lambda: train.class_embeddings(own, clip, tokenizer, names))

        def clip_targets(name, split):  # of plain images, which train.py may have cached
            named = {"test": splits["test"], name: split._replace(class_names=names)}
            return scale * train.clip_targets(own, clip, tokenizer, named)[name][0].float()

        student.subjects["CLIP"] = lambda images: (
            scale * train.clip_view(clip, classes(), images)[0])
        student.clip_targets, student.classes = clip_targets, classes
        student.clip_scale, student.alpha = scale, own.alpha

def prepare(config):
    """-> (config with data set, place and size filled in, the test split, [Student]). What can be
    wrong with a command is said here, before anything takes long."""
    config = dataclasses.replace(config, device=command.use_device(config.device))
    if config.checkpoint and not (config.model and config.dataset):
        raise ValueError("--checkpoint takes --model NAME and --dataset NAME with it")
    if len({Path(folder).name for folder in config.shift or ()}) < len(config.shift or ()):
        raise ValueError("--shift: two folders have one name; evaluate one after another")
    folders = [] if config.checkpoint else config.run or [newest_run(config.fused)]
    read = {Path(folder): read_run(Path(folder), config) for folder in folders}
    first, _ = next(iter(read.values()), (train.Config(), None))
    config = dataclasses.replace(
        config, dataset=config.dataset or first.dataset, data_dir=config.data_dir or first.data_dir,
        image_size=config.image_size or first.image_size,
        class_names=config.class_names or first.class_names)
    if config.shift == [] and not data.DATASETS[config.dataset].shifts:
        raise ValueError(f"{config.dataset} has no shift split of its own: --shift DIR names one")
    test, students = train.load_split(config, "test"), []
    for folder, (own, about) in read.items():
        with files.undamaged(folder / "config.json", ANEW):
            split, named = about["inputs"]["data"]["train"], about["inputs"]["files"]
            names = files.json_digest(split["class_names"])  # which CLIP is asked for
            inputs = {"train": split["content"], "files": {**named, "class_names": names}}
        students.append(Student(config, test, folder / "student.pt", own.student,
                                folder / "report.json", settings=about["settings"], inputs=inputs))
        if config.fused:
            add_teaching(students[-1], own, about)
    if config.checkpoint:
        of = {"checkpoint": config.checkpoint, "dataset": config.dataset, "student": config.model}
        students.append(Student(config, test, config.checkpoint, config.model,
                                f"{config.checkpoint}.report.json", settings=of))
    if config.fused and all(len(student.subjects) == 1 for student in students):
        raise ValueError("--fused: no run here has a teacher or CLIP")
    return dataclasses.replace(config, image_size=students[0].image_size), test, students

# Sets of images -----------------------------------------------------------------------------------
class Images(NamedTuple):
    """A set of images, and what tells it from others."""
    name: str
    key: dict
    labels: torch.Tensor           # int64 (N,)
    blocks: Iterator               # of what networks see, uint8 (b,3,H,W) on the device
    split: data.Split = None       # of plain images, of which CLIP sees its own crop
    columns: object = slice(None)  # of the logits, to choose among

def blocks(images, config):
    return data.blocks(images, None, config.workers, config.device)

def at_size(split, config):
    return data.at_size(split, config.image_size, config.cache_dir, config.workers, config.device)

def plain_sets(config, test):
    """Yield the test split and, with --shift, the data set's own shift splits and the folders."""
    def seen(split):
        yield from blocks(at_size(split, config).images, config)

    def plain(name, split, columns=slice(None), key=None):
        key = {**(key or {}), "content": runs.identity(split)["content"]}
        return Images(name, key, split.labels, seen(split), split, columns)

    yield plain("test", test)
    for name in data.DATASETS[config.dataset].shifts if config.shift is not None else ():
        yield plain(name, train.load_split(config, name))
    for folder in config.shift or ():
        images, labels, columns = shifts.load_shift(folder, config.dataset, test.ids,
                                                    test.class_names)
        if isinstance(images, list):  # paths
            size = data.DATASETS[config.dataset].image_size
            images = data.Stream(images, size, 256 if config.dataset == "imagenet" else size)
        yield plain(f"shift {Path(folder).name}", test._replace(images=images, labels=labels),
                    columns, {"columns": columns.tolist()})

def published(config, test, name, severity):
    """The published images of a corruption, of either kind, and their labels."""
    K = len(test.class_names)
    if config.dataset.startswith("cifar"):
        where = Path(config.corruptions, "labels.npy")
        images, labels = shifts.read_cifar_c(config.corruptions, name, severity)
    else:
        where = shifts.imagenet_c_folder(config.corruptions, name, severity)
        paths, labels, columns = shifts.list_classes(where, test.ids, test.class_names)
        labels, size = columns[labels], data.size_of(test.images)
        images = data.Stream(paths, size, size)  # which they have already
    counts = labels.bincount(minlength=K)
    if len(counts) > K:
        raise ValueError(f"{where} has the label {len(counts) - 1}; {config.dataset} has {K} "
                         "classes")
    if not counts.equal(test.labels.bincount(minlength=K)):
        files.note(f"{where} has {len(labels)} images, of some classes more or fewer than the "
                   f"test split's {len(test.labels)}")
    return images, labels

def corrupted_sets(config, test):
    """Yield the test images at the data set's own size, clean ones and the fifteen corruptions at
    five severities, generated or published. Raises as reading them where one of these is missing.
    """
    device = config.device if config.device.type == "cuda" else torch.device("cpu")
    tasks = [(name, severity) for name in COMMON for severity in range(1, 6)]
    key = {"share": config.corrupted_share, "source": "generated",  # differing with the device
           "content": f"seed {config.seed} on {device.type}"}
    if config.corruptions != "generated":
        paths = [Path(config.corruptions, f"{name}.npy") for name in (*COMMON, "labels")]
        if not config.dataset.startswith("cifar"):
            paths = [path for task in tasks for path in published(config, test, *task)[0].paths]
        key |= {"source": "published", "content": runs.digest_files(paths)}
    if config.dataset == "folder":  # which has no size of its own
        test = at_size(test, config)
    if config.corrupted_share < 1:
        test = data.subset(test, 0, config.corrupted_share)
    yield Images("clean", key, test.labels, blocks(test.images, config))
    for name, severity in tasks:
        if key["source"] == "published":
            images, labels = published(config, test, name, severity)
            seen = blocks(images, config)
        else:  # each has its own generator, so that it can be repeated alone
            seed = 1000 * config.seed + 10 * list(COMMON).index(name) + severity
            draw = functools.partial(corrupt, name=name, severity=severity,
                                     generator=torch.Generator(device).manual_seed(seed))
            labels, seen = test.labels, map(draw, blocks(test.images, config))
        yield Images(f"{name} {severity}", key, labels, seen)

def evaluate_set(students, images, progress):
    """Add to the reports what is missing there of a set, which goes once through all subjects."""
    subjects = {(student, who): subject for student in students
                for who, subject in student.subjects.items()
                if who not in student.done(images.name, images.key)}
    if not subjects:
        progress.start = progress.done = progress.done + len(images.labels)
        return
    asked = {which for which in subjects if which[1] == "CLIP" and images.split}
    networks = {which: subject for which, subject in subjects.items() if which not in asked}
    note = "" if images.split else images.name
    logits = train.predict(networks, images.blocks, progress, note) if networks else {}
    for student, who in asked:
        logits[student, who] = student.clip_targets(images.name, images.split)
    for student in dict.fromkeys(student for student, _ in subjects):
        own = {who: logits[student, who] for who in student.subjects if (student, who) in logits}
        if {"teacher", "CLIP"} <= own.keys():
            own["fused"] = richkd.fuse_logits(own["teacher"], own["CLIP"], student.alpha)
        own = {who: z[:, images.columns] for who, z in own.items()}
        rows = {}
        for who, z in own.items():
            fitted = student.sets.get("test", {}).get(who)  # its temperature serves all sets
            rows[who] = measures(z, images.labels) if not images.split else scores(
                z, images.labels, fitted and fitted["calibration"]["temperature"])
        student.add(images.name, images.key, rows)

def evaluate(config):
    """What the command does with classifiers: -> [Student], the report of each also beside its
    checkpoint. What is in one already is not done again."""
    if config.corrupted_share < 1 and config.corruptions != "generated":
        raise ValueError("--corrupted-share is for generated --corruptions: published are whole")
    config, test, students = prepare(config)
    for images in plain_sets(config, test):
        evaluate_set(students, images, files.Progress(images.name, len(images.labels)))
    if not config.corruptions:
        return students
    progress = None
    for images in corrupted_sets(config, test):
        progress = progress or files.Progress("corruptions", len(images.labels) * 76)
        evaluate_set(students, images, progress)
    alexnet = config.dataset == "imagenet" and len(test.class_names) == 1000
    for student in students:
        rows = {name: student.done(name, images.key) for name in ("clean", *CORRUPTED)}
        student.add("corruptions", images.key, {
            who: over_corruptions({name: row[who] for name, row in rows.items()}, alexnet)
            for who in rows["clean"]})
    return students

def zero_shot(config):
    """CLIP itself on a test split: {"all M templates": top-1 in percent, then one a template}."""
    shared = {field.name for field in dataclasses.fields(train.Config)} & vars(config).keys()
    own = train.Config(**{name: getattr(config, name) for name in shared
                          if getattr(config, name) is not None})
    own = dataclasses.replace(own, device=command.use_device(config.device))
    test = train.load_split(own, "test")
    templates = clip_model.load_templates(own.prompts or train.PROMPTS)
    clip, tokenizer, scale = train.load_clip(own)
    _, features = train.clip_targets(own, clip, tokenizer, {"test": test})["test"]          # (N,D)
    text = clip_model.class_features(clip, tokenizer, test.class_names, templates).cpu()  # (K,M,D)
    classes = {f"all {len(templates)} templates": richkd.ensemble_text_features(text)}
    classes |= {template: text[:, m] for m, template in enumerate(templates)}               # (K,D)
    logits = {name: richkd.zero_shot_logits(features.float(), rows, scale)
              for name, rows in classes.items()}
    return {name: 100 * metrics.top_k_accuracy(z, test.labels) for name, z in logits.items()}

# Printed ------------------------------------------------------------------------------------------

COLUMNS = {"top1": "top-1 %", "top5": "top-5 %", "nll": "NLL", "ece": "ECE %",
           "confident_right 0.5": "right .5", "confident_wrong 0.5": "wrong .5",
           "confident_right 0.7": "right .7", "confident_wrong 0.7": "wrong .7"}

def table(corner, rows):
    """Lines of at most 100 columns where labels have up to 28; rows: {label: `measures`}."""
    width = max([28, *map(len, (corner, *rows))])
    lines = [f"{corner:{width}}" + "".join(f" {title:>8}" for title in COLUMNS.values())]
    for label, row in rows.items():
        lines.append(f"{label:{width}}")
        for name in COLUMNS:
            form = "8.1e" if abs(row[name]) >= 1e4 else "8.3f" if name == "nll" else "8.2f"
            lines[-1] += f" {row[name]:{form}}"
    return lines

def tables(students):
    """The reports as text: a row a set, student and subject; of one student alone also what a
    temperature changes, and the corruptions one by one."""
    rows, several, sets = {}, len(students) > 1, students[0].sets
    names = dict.fromkeys(name for student in students for name in student.sets)
    for name in (name for name in names if name not in ("clean", *CORRUPTED)):
        for student in students:
            run = f", {student.path.parent.name}" if several else ""
            for who, row in student.sets.get(name, {}).items():
                if who != "key":
                    rows[f"{name}{run}, {who}"] = row
        if not several and "calibration" in sets[name]["student"]:
            calibration = sets[name]["student"]["calibration"]
            T, after = calibration["temperature"], calibration["after"]
            bound = {T < 1.001 * metrics.LEAST_TEMPERATURE: "<=",  # the best one is beyond it
                     T > 0.999 * metrics.MOST_TEMPERATURE: ">="}
            rows[f"{name}, student, T {bound.get(True, '=')} {T:.3g}"] = after
    lines = [*table("" if several else students[0].path.parent.name, rows),
             "right .5: % right with a confidence from .5; T: fitted on half of test, for the rest"]
    if several:
        paths = " ".join(str(student.path) for student in students)
        lines.append(f"python study/compare.py {paths}  # methods over seeds")
    if not several and "corruptions" in sets:
        row, key = sets["corruptions"]["student"], sets["corruptions"]["key"]
        errors = {"mean_error": "mean error", "relative_mean_error": "above the clean one",
                  "mce": "mCE against AlexNet", "relative_mce": "relative mCE"}
        errors = [f"{text} {row[name]:.2f}" for name, text in errors.items() if name in row]
        lines.append(f"{key['source']}, of {100 * key['share']:.3g} % of the images; the student's "
                     f"{', '.join(errors)}; top-1:")
        cells = [f"{name:18}{sum(top1) / 5:7.2f}" for name, top1 in row["by_severity"].items()]
        lines += ["     ".join(cells[i : i + 3]) for i in range(0, 15, 3)]
    return "\n".join(lines)

def job(config):
    command.check(config)
    if config.zero_shot:
        for template, top1 in zero_shot(config).items():
            print(f"{top1:6.2f} %  {template}")
    else:
        print(tables(evaluate(config)))

if __name__ == "__main__":
    command.main(lambda: job(command.parse(Config, __doc__)))
