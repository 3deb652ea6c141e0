"""Evaluate trained classifiers and what taught them: accuracy, calibration, shift, corruptions.

    python evaluate.py                                    # the newest finished run, its test split
    python evaluate.py --shift --corruptions --fused      # further sets; teacher, CLIP, both fused
    python evaluate.py --run runs/A runs/B --shift imagenet-a --corruptions ImageNet-C
    python evaluate.py --checkpoint FILE --model resnet20 --dataset cifar100
    python evaluate.py --zero-shot --clip ViT-B/32 --dataset cifar100

A subject is a function from images to logits, and every set of images goes once through all of
them. report.json, beside each run, grows set by set: the same command goes on with it."""

import clip_model
import contextlib
import data
import dataclasses
import functools
import metrics
import models
import richkd
import torch
import train
from corruptions import COMMON, corrupt
from math import inf
from pathlib import Path
from support import command, files, runs, shifts
from support.command import setting
from typing import Iterator, NamedTuple

ANEW = "train.py --overwrite makes the run anew"
CORRUPTED = {f"{name} {severity}": (name, severity) for name in COMMON for severity in range(1, 6)}

@dataclasses.dataclass(frozen=True)
class Config(train.Shared):
    """Every setting; the command line is made from it. Without --clip: the data set's own."""
    run: tuple = setting(None, "run folders; without, the newest finished one in runs/", nargs="+")
    checkpoint: str = setting(None, "a bare checkpoint, with --model and --dataset")
    model: str = setting(None, "the checkpoint's architecture")
    image_size: int = setting(None, "its images' side, where it does not say", within=(8, inf))
    dataset: str = setting(None, "without, the run's own", choices=tuple(data.DATASETS))
    data_dir: str = setting(None, "where it lies; without, where the run found it")
    shift: tuple = setting(None, "its own shift sets, too, and DIR's", nargs="*", metavar="DIR")
    corruptions: str = setting(None, "corrupted test images, too: generated, or DIR's published",
                               nargs="?", const="generated", metavar="DIR")
    corrupted_share: float = setting(1.0, "of every class's images", within=(1e-9, 1))
    fused: bool = setting(False, "beside each student what taught it: teacher, CLIP, both fused")
    zero_shot: bool = setting(False, "only --clip itself on --dataset, by each template and all")
    seed: int = setting(0, "of generated corruptions", within=(0, 2**31))
    amp: bool = setting(False, "bfloat16, for students; what taught them has their runs' own")

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

def calibrated(logits, labels):
    """`measures`, Brier score, "by_class": each one's top-1 in percent, or None; "calibration": a
    temperature fitted on a fixed random half, `measures` and bins of the rest before and after."""
    row = {**measures(logits, labels), "brier": metrics.brier(logits, labels)}
    right, N = labels.bincount((logits.argmax(1) == labels).double()), labels.bincount()
    row["by_class"] = [100 * x / n if n else None for x, n in zip(right.tolist(), N.tolist())]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rest, half = order.tensor_split(2)
    temperature = metrics.fit_temperature(logits[half], labels[half])
    row["calibration"] = {"temperature": temperature}
    for name, z in (("before", logits[rest]), ("after", logits[rest] / temperature)):
        bins = [points.tolist() for points in metrics.calibration_bins(z, labels[rest])]
        row["calibration"][name] = {**measures(z, labels[rest]), "bins": bins}
    return row

def over_corruptions(sets, who, alexnet):
    """A subject's means over the fifteen corruptions and five severities; "by_severity": {name:
    top-1 at each}; with alexnet ImageNet-C's "mce" and "relative_mce" in percent."""
    clean = sets["clean"][who]
    row = {name: sum(sets[x][who][name] for x in CORRUPTED) / len(CORRUPTED) for name in clean}
    row["by_severity"] = {name: [sets[f"{name} {severity}"][who]["top1"]
                                 for severity in range(1, 6)] for name in COMMON}
    if alexnet:  # metrics has errors as shares
        errors = {name: 1 - sum(top1) / 500 for name, top1 in row["by_severity"].items()}
        for name, error in (("mce", None), ("relative_mce", 1 - clean["top1"] / 100)):
            row[name] = 100 * metrics.mean_corruption_error(errors, error, alexnet=True)
    return row

class Student:
    """A classifier, with --fused what taught it, and their report, JSON: {"about": whose numbers,
    "sets": {name: {"key": of which images, subject: numbers}}}; begun anew where these differ."""
    def __init__(self, config, test, own, run, weights, report, about):
        """`own` and on: as `read_run`. Raises ValueError for weights of other classes or images."""
        info = data.DATASETS[config.dataset]
        size = runs.input_size(weights, test, info, run and files.json_digest(runs.key(run)))
        size = size or config.image_size or info.image_size
        model = models.freeze(models.load_weights(own.student, weights, len(test.class_names)))
        self.subjects = {"student": train.classifier(model.to(config.device), config, size)}
        self.path, self.names, self.alpha, self.sets = Path(report), test.class_names, own.alpha, {}
        self.about = {**about, "weights": files.file_digest(weights), "image_size": size,
                      "amp": config.amp, "test": runs.identity(test)["content"]}
        with contextlib.suppress(OSError, ValueError):
            before = files.read_json(self.path, "it is begun anew")
            self.sets = before["sets"] if before["about"] == self.about else {}
        if config.fused and run:
            self.add_teaching(own, run)

    def add_teaching(self, own, run):
        """What taught it, as train.py makes it again. Raises ValueError where that is not here."""
        splits = train.load_splits(own)
        differ = runs.difference(runs.key(run), runs.key(train.about_run(own, splits)))
        if differ:
            raise ValueError(f"--fused: what taught this run is not here: {differ}")
        if own.teacher:
            teachers = train.load_teachers(own, splits)
            self.subjects["teacher"] = train.classifier(teachers, own, own.image_size)
        if own.clip:
            (clip, tokenizer, scale), names = train.load_clip(own), splits["test"].class_names
            classes = functools.cache(lambda: train.class_embeddings(own, clip, tokenizer, names))
            def clip_logits(name, split):  # of plain images, which train.py may have cached
                asked = {name: split._replace(class_names=names)}
                return scale * train.clip_targets(own, clip, tokenizer, asked)[name][0].float()
            self.subjects["CLIP"] = lambda batch: scale * train.clip_view(clip, classes(), batch)[0]
            self.clip_logits, self.classes, self.clip_scale = clip_logits, classes, scale

    def done(self, name, key):
        """{subject: numbers} of those that were measured on a set."""
        rows = dict(self.sets.get(name, {}))
        return rows if rows.pop("key", None) == key else {}

    def add(self, name, key, rows):
        self.sets[name] = {"key": key, **rows}
        try:
            files.write_json(self.path, {"about": self.about, "sets": self.sets})
        except OSError as error:
            files.note(f"{self.path} cannot be kept ({error.strerror}): printed alone")

def newest_run(fused, root="runs"):
    """The folder below `root` whose run finished last, with `fused` one with teacher and CLIP."""
    for path in sorted(Path(root).glob("*/summary.json"), key=lambda p: -p.stat().st_mtime):
        summary = files.read_json(path, ANEW)
        if not fused or summary["teacher"] and summary["clip"]:
            files.note(f"evaluating {path.parent}")
            return path.parent
    raise FileNotFoundError(f"no finished run{' for --fused' * fused} in {root}/: see --run")

def read_run(folder, config):
    """What a `Student` is made of: the `train.Config` of a finished run, in the places of this
    evaluation, its config.json, its weights, its report, what that is about beside images."""
    run = files.read_json(folder / "config.json", ANEW)
    with files.undamaged(folder / "config.json", ANEW):
        own = train.Config(
            **run["settings"], data_dir=config.data_dir or run["places"]["data_dir"],
            device=config.device, workers=config.workers, cache_dir=config.cache_dir)
        split = run["inputs"]["data"]["train"]
        named = {**run["inputs"]["files"], "class_names": files.json_digest(split["class_names"])}
        about = {"settings": run["settings"], "inputs": {"train": split["content"], "files": named}}
    return own, run, folder / "student.pt", folder / "report.json", about

def prepare(config):
    """-> (config with data set and size filled in, {"test", with --shift its own: Split},
    [Student]). What can be wrong with a command is said here, before anything takes long."""
    config = dataclasses.replace(config, device=command.use_device(config.device))
    if len({Path(folder).name for folder in config.shift or ()}) < len(config.shift or ()):
        raise ValueError("--shift: two folders have one name; evaluate one after another")
    if not config.checkpoint:
        sources = [read_run(Path(run), config) for run in config.run or [newest_run(config.fused)]]
    elif config.model and config.dataset:
        path, own = config.checkpoint, {"dataset": config.dataset, "student": config.model}
        about = {"settings": {"checkpoint": path, **own}}
        sources = [(train.Config(**own, cache_dir=config.cache_dir), None, path,
                    f"{path}.report.json", about)]
    else:
        raise ValueError("--checkpoint takes --model NAME and --dataset NAME with it")
    asked = {name: getattr(config, name) for name in ("dataset", "data_dir", "class_names")}
    own = dataclasses.replace(sources[0][0], **{name: x for name, x in asked.items() if x})
    if config.data_dir and own.dataset == "shapes":
        raise ValueError("--data-dir: shapes are rendered")
    names = () if config.shift is None else data.DATASETS[own.dataset].shifts
    if config.shift == () and not names:
        raise ValueError(f"{own.dataset} has no shift split of its own: --shift DIR names one")
    splits = {name: train.load_split(own, name) for name in ("test", *names)}
    config = dataclasses.replace(config, dataset=own.dataset, data_dir=own.data_dir)
    students = [Student(config, splits["test"], *source) for source in sources]
    if config.fused and all(len(student.subjects) == 1 for student in students):
        raise ValueError("--fused: no run here has a teacher or CLIP")
    size = config.image_size or students[0].about["image_size"]
    for student, (source, run, *_) in zip(students, sources):
        kind = student.about["image_size"], source.holdout
        if kind != (size, own.holdout):
            raise ValueError(f"{student.path}: --image-size, --holdout {kind}: evaluate it alone")
        if run and source.dataset == own.dataset != "shapes" and not asked["data_dir"]:
            if run["inputs"]["data"]["test"]["content"] != student.about["test"]:
                raise ValueError(f"{source.data_dir}: not this run's test images; see --data-dir")
    return dataclasses.replace(config, image_size=size), splits, students

class Images(NamedTuple):
    """A set of images, and what tells it from others."""
    name: str
    key: dict
    labels: torch.Tensor           # int64 (N,)
    blocks: Iterator               # of what networks see, uint8 (b,3,H,W) on the device
    split: data.Split = None       # of plain images, of which CLIP sees its own crop
    columns: object = slice(None)  # of the logits, to choose among

def at_size(split, config):
    return data.at_size(split, config.image_size, config.cache_dir, config.workers, config.device)

def plain_sets(config, splits):
    """Yield the splits and, with --shift, the folders."""
    def plain(name, split, chosen=slice(None), **key):
        key["content"] = runs.identity(split)["content"]
        seen = data.blocks(at_size(split, config).images, None, config.workers, config.device)
        return Images(name, key, split.labels, seen, split, chosen)
    yield from (plain(name, split) for name, split in splits.items())
    test, size = splits["test"], data.DATASETS[config.dataset].image_size
    for root in config.shift or ():
        images, labels, chosen = shifts.load_shift(root, config.dataset, test.ids, test.class_names)
        if isinstance(images, list):  # paths
            images = data.Stream(images, size, 256 if config.dataset == "imagenet" else size)
        key = {"columns": chosen.tolist()} if len(chosen) < len(test.class_names) else {}
        split = test._replace(images=images, labels=labels)
        yield plain(f"shift {Path(root).name}", split, chosen, **key)

def published(config, test, name, severity):
    """The published images of a corruption, of either kind, and their labels."""
    if config.dataset.startswith("cifar"):
        images, labels = shifts.read_cifar_c(config.corruptions, name, severity)
    else:
        folder = shifts.imagenet_c_folder(config.corruptions, name, severity)
        paths, labels, columns = shifts.list_classes(folder, test.ids, test.class_names)
        labels, seen = columns[labels], test.images
        size = seen.shape[-1] if data.is_in_memory(seen) else seen.size
        images = data.Stream(paths, size, size)  # which they have already
    if sorted(labels.tolist()) != sorted(test.labels.tolist()):  # their order may differ
        raise ValueError(f"{config.corruptions}, {name} {severity}: other classes than the test's")
    return images, labels

def corrupted_sets(config, test):
    """Yield the test images at the data set's own size: clean, and under the fifteen corruptions at
    five severities, generated or published; of these a missing one raises OSError at once."""
    key = {"share": config.corrupted_share, "source": "generated",  # differing with the device
           "content": f"seed {config.seed} on {config.device.type}"}
    if config.corruptions != "generated":
        paths = [Path(config.corruptions, f"{name}.npy") for name in (*COMMON, "labels")]
        if not config.dataset.startswith("cifar"):
            paths = [path for which in CORRUPTED.values()
                     for path in published(config, test, *which)[0].paths]
        key |= {"source": "published", "content": runs.digest_files(paths)}
    if config.dataset == "folder":  # which has no size of its own
        test = at_size(test, config)
    test = data.subset(test, 0, config.corrupted_share)
    blocks = functools.partial(data.blocks, workers=config.workers, device=config.device)
    yield Images("clean", key, test.labels, blocks(test.images))
    for i, (label, (name, severity)) in enumerate(CORRUPTED.items()):
        images, labels, draw = test.images, test.labels, lambda images: images
        if key["source"] == "published":
            images, labels = published(config, test, name, severity)
        else:  # each has its own generator, so that it can be repeated alone
            seed = 1000 * config.seed + 10 * (i // 5) + severity
            generator = torch.Generator(config.device).manual_seed(seed)
            draw = functools.partial(corrupt, name=name, severity=severity, generator=generator)
        yield Images(label, key, labels, map(draw, blocks(images)))

def evaluate_set(students, images, progress):
    """Add to the reports what is missing there of a set, which goes once through all subjects."""
    students = [student for student in students
                if student.subjects.keys() - student.done(images.name, images.key)]
    if not students:
        progress.start = progress.done = progress.done + len(images.labels)
        return
    networks = {(student, who): subject for student in students
                for who, subject in student.subjects.items() if who != "CLIP" or not images.split}
    logits = train.predict(networks, images.blocks, progress, images.name)
    tell = calibrated if images.name == "test" else measures
    for student in students:
        own = {who: z for (of, who), z in logits.items() if of is student}
        if images.split and "CLIP" in student.subjects:
            own["CLIP"] = student.clip_logits(images.name, images.split)
        if {"teacher", "CLIP"} <= own.keys():
            own["fused"] = richkd.fuse_logits(own["teacher"], own["CLIP"], student.alpha)
        student.add(images.name, images.key, {
            who: tell(z[:, images.columns], images.labels) for who, z in own.items()})

def evaluate(config):
    """-> [Student]; their reports also lie beside their weights: what is there is not done anew."""
    config, splits, students = prepare(config)
    for images in plain_sets(config, splits):
        evaluate_set(students, images, files.Progress("plain images", len(images.labels)))
    progress = files.Progress("corruptions", 0)
    for images in corrupted_sets(config, splits["test"]) if config.corruptions else ():
        progress.total = (1 + len(CORRUPTED)) * len(images.labels)
        evaluate_set(students, images, progress)
    alexnet = config.dataset == "imagenet" and len(splits["test"].class_names) == 1000
    for student in students if config.corruptions else ():
        student.add("corruptions", images.key, {
            who: over_corruptions(student.sets, who, alexnet)
            for who in student.done(images.name, images.key)})  # the last one's: all have them
    return students

def training(config):
    """The `train.Config` that has this evaluation's settings of data set and CLIP."""
    return train.Config(**{name: value for name, value in vars(config).items()
                           if value is not None and hasattr(train.Config, name)})

def zero_shot(config):
    """CLIP on a test split -> {"all M templates": `calibrated`, one: `measures`}, names asked."""
    own = train.resolve(training(config))
    test = train.load_split(own, "test")
    templates = clip_model.load_templates(own.prompts or train.PROMPTS)
    clip, tokenizer, scale = train.load_clip(own)
    names = clip_model.prompt_names(test.class_names, tokenizer)
    changed, K = sum(map(str.__ne__, names, test.ids)), len(names)
    asked = f"{', '.join(names[:5])}{', ...' * (K > 5)}; {changed} of {K} not as in the data set"
    files.note(f"{len(test.labels)} images, chance {100 / K:.3g} %; CLIP is asked for {asked}")
    _, features = train.clip_targets(own, clip, tokenizer, {"test": test})["test"]          # (N,D)
    text = clip_model.class_features(clip, tokenizer, test.class_names, templates).cpu()  # (K,M,D)
    def row(tell, classes):                                                                 # (K,D)
        return tell(richkd.zero_shot_logits(features.float(), classes, scale), test.labels)
    together = row(calibrated, richkd.ensemble_text_features(text))
    alone = {template: row(measures, text[:, m]) for m, template in enumerate(templates)}
    return {f"all {len(templates)} templates": together, **alone}, names

COLUMNS = {"top1": "  top-1 %", "nll": "      NLL", "ece": "    ECE %",
           "confident_right 0.7": "  sure, right", "confident_wrong 0.7": "  sure, wrong"}

def aligned(rows, names):
    """{label: `measures`} as lines; mean and worst of the first row's classes; no ECE of few."""
    width = max(map(len, rows))
    lines = [" " * width + "  images" + "".join(COLUMNS.values())]
    for label, row in rows.items():
        lines.append(f"{label:{width}}{row['images']:8.0f}")
        for name, title in COLUMNS.items():
            x = None if name == "ece" and row["images"] < 100 else row[name]
            cell = "-" if x is None else f"{x:.2f}" if abs(x) < 1e5 else f"{x:.1e}"
            lines[-1] += f"{cell:>{len(title)}}"
    lines.append("ECE: how far confidence is from accuracy; sure: a confidence of 70 % or more")
    label, row = next(iter(rows.items()))
    top1 = sorted((x, name) for x, name in zip(row.get("by_class", ()), names) if x is not None)
    if top1:  # which older reports have not
        worst = ", ".join(f"{name[:16]} {x:.0f} %" for x, name in top1[:3])
        mean = sum(x for x, _ in top1) / len(top1)
        lines.append(f"{label}: mean of classes {mean:.2f} %, worst {worst}")
    return lines

def table(student):
    """A report as text: a row a set and subject, the student by corruption, where the file lies."""
    rows = {}
    for name, of in student.sets.items():
        if name not in CORRUPTED:
            columns = of["key"].get("columns")
            among = f" ({len(columns)} classes)" if columns else ""
            rows |= {f"{name}{among}, {who}": row for who, row in of.items() if who != "key"}
    lines = [student.path.parent.name, *aligned(rows, student.names)]
    if "corruptions" in student.sets:
        source, row = student.sets["corruptions"]["key"]["source"], rows["corruptions, student"]
        lines.append(f"Student's top-1 %, mean of five severities, {source} (clean: without any):")
        cells = [f"{name:18}{sum(top1) / 5:6.2f}" for name, top1 in row["by_severity"].items()]
        cells += [f"{x:18}{row[x]:6.2f}" for x in ("mce", "relative_mce") if x in row]
        lines += [" ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    if student.path.is_file():
        lines.append(f"{student.path} has all of it")
    return "\n".join(lines)

def unread(config):
    """The names of the settings that have no effect with the others of a config."""
    zero_shot, generated = config.zero_shot, config.corruptions == "generated"
    reads = {
        ("clip", "clip_activation", "bpe", "prompts"): zero_shot,
        ("checkpoint", "image_size", "shift", "corruptions"): not zero_shot,
        ("run", "fused"): not (zero_shot or config.checkpoint), ("model",): config.checkpoint,
        ("corrupted_share", "seed"): generated and not zero_shot}
    names = [name for names, read in reads.items() if not read for name in names]
    return names + train.unread(training(config)) if zero_shot else names

def job(config):
    command.check(config)
    if config.zero_shot:
        return "\n".join(aligned(*zero_shot(config)))
    return "\n\n".join(map(table, evaluate(config)))

if __name__ == "__main__":
    command.main(lambda: job(command.parse(Config, __doc__, unread=unread)))
