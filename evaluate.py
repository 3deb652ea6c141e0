"""Evaluate trained classifiers: accuracy, calibration, shift, corruptions; what fusing does; CLIP.

    python evaluate.py                               # the newest finished run on its test split
    python evaluate.py --shift --corruptions         # its shift splits and 15 corruptions, too
    python evaluate.py --shift imagenet-a --corruptions ImageNet-C   # folders, published files
    python evaluate.py --fused --plot                # teacher, CLIP and both fused; report.png
    python evaluate.py --checkpoint FILE --model resnet20 --dataset cifar100
    python evaluate.py --zero-shot --clip ViT-B/32 --dataset cifar100
    python evaluate.py --compare runs/*/report.json  # methods over seeds, from the reports alone

report.json, beside each run, grows set by set: the same command goes on where it was interrupted,
and a report of other weights, settings or images is begun anew. Runs and what is asked of them come
first, then what is printed; the numbers are those of metrics.py.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import clip_model
import data
import metrics
import models
import richkd
import targets
import train
from corruptions import COMMON, corrupt
from support import checkpoints, clip_layout, command, files, keys, runs, shifts
from support.command import setting

# Runs and reports ---------------------------------------------------------------------------------
# A report: {"of", "settings", "inputs", "teachers", "weights", "how": what it is about; then "test"
# and each shift set: `scores` with "calibration"; "corruptions"; "fused"}. Images are known by
# their content, wherever they lie.


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting with its line of help; the command line is made from it."""
    run: tuple = setting(None, "run folders; without, the newest finished one in runs/", nargs="+")
    checkpoint: str = setting(None, "a bare checkpoint, with --model and --dataset", type=str)
    model: str = setting(None, "the checkpoint's architecture", type=str)
    image_size: int = setting(None, "side of the checkpoint's images, where it does not say",
                              type=int, within=(8, math.inf))
    dataset: str = setting(None, "the data set; without, the run's own", type=str,
                           choices=tuple(data.DATASETS))
    data_dir: str = setting(None, "where it lies; without, where the run found it", type=str)
    shift: tuple = setting(
        None, "the data set's own shift splits, too, and those in folders: CIFAR-10.1, STL-10, or "
        "a folder a class (classes.json: {folder: class})", nargs="*", metavar="DIR")
    corruptions: str = setting(None, "corrupted test images, too: generated, or DIR's published",
                               nargs="?", const="generated", metavar="DIR")
    corrupted_share: float = setting(1.0, "share of the test images to corrupt, as much of every "
                                     "class", above=0, within=(0, 1))
    fused: bool = setting(False, "the run's teacher, CLIP and both fused on the test split, too")
    plot: bool = setting(False, "draw report.png, of corruptions samples.png (needs matplotlib)")
    compare: tuple = setting(None, "only compare the methods of these reports, or lists of them",
                             nargs="+", metavar="FILE")
    zero_shot: bool = setting(False, "only --clip itself on --dataset, by each template and all")
    class_names: str = setting(None, "as in train.py; without, the run's own", type=str)
    clip: str = setting("ViT-L/14", "as in train.py", type=str)
    clip_activation: str = setting(None, "as in train.py", choices=clip_layout.ACTIVATIONS)
    bpe: str = setting(None, "as in train.py", type=str)
    prompts: str = setting(None, "as in train.py", type=str)
    seed: int = setting(0, "of generated corruptions and intervals", within=(0, 2**31))
    amp: bool = setting(False, "bfloat16; CLIP's on a CPU alone, on a GPU it is float16")
    device: str = setting(train.Config.device, "cpu, cuda, cuda:1")
    workers: int = setting(train.Config.workers, "as in train.py", within=(0, math.inf))
    cache_dir: str = setting(None, "as in train.py", type=str)


ANEW = "train.py --overwrite makes the run anew"


class Subject(NamedTuple):
    """What is evaluated: a classifier, its report, and where that lies."""
    classifier: train.Classifier
    path: Path
    report: dict


def newest_run(root="runs"):
    """The folder below `root` whose run finished last. Raises FileNotFoundError."""
    finished = Path(root).glob("*/summary.json")
    newest = max(finished, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise FileNotFoundError(f"no finished run below {root}/: python train.py makes one; --run "
                                "names one elsewhere, --checkpoint a bare checkpoint")
    print(f"evaluating {newest.parent}", file=sys.stderr)
    return newest.parent


def read_run(folder, config):
    """-> a finished run's `train.Config`, in the places of this evaluation, and its config.json."""
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(f"no finished run in {folder}: python train.py makes one, and "
                                "finishes one that it began")
    about = files.read_own(folder / "config.json", ANEW)
    with files.undamaged(folder / "config.json", ANEW):
        own = train.Config(
            **about["settings"], data_dir=config.data_dir or about["places"]["data_dir"],
            device=config.device, workers=config.workers, cache_dir=config.cache_dir)
    return own, about


def load_run(folder, own, about, test, identity):
    """The Subject of a finished run, own and about as `read_run` has them. Raises ValueError for a
    damaged one, and where its classes are others; says where it was tested on other images."""
    summary = files.read_own(folder / "summary.json", ANEW)
    of = ("dataset", "method", "teacher", "student", "seed", "epochs")
    report = {"of": {name: summary[name] for name in of}, "settings": runs.settings(own),
              "teachers": {who: row for who, row in summary["accuracies"].items()
                           if row and who != "student"}}
    path = folder / "student.pt"
    student = files.read_own(path, ANEW)
    with files.undamaged(path, ANEW):
        model = models.load_weights(student["model_name"], path)
        classifier = train.Classifier(model, *runs.input_of(student, data.DATASETS[own.dataset]))
        differ = runs.class_difference(student, test)
    if differ:
        raise ValueError(f"{folder}: {differ}")
    if "inputs" in about:  # else it is of an earlier version
        with files.undamaged(folder / "config.json", ANEW):
            found = about["inputs"]
            report["inputs"] = {"train": found["data"]["train"]["content"],
                                "files": dict(found["files"])}
            if own.clip:  # which is asked for them
                names = files.json_digest(found["data"]["train"]["class_names"])
                report["inputs"]["files"]["class_names"] = names
            other = keys.difference(found["data"]["test"], identity, names=False)
        if other:
            files.note(f"{folder} was tested on another test split while training: {other}")
            report["teachers"] = {who: {} for who in report["teachers"]}  # of other images
    report["weights"] = files.file_digest(path)
    return Subject(classifier, folder / "report.json", report)


def load_bare(config, test):
    """The Subject of a bare checkpoint, by what it says of itself (`checkpoints.read_about`) or by
    --image-size and what is known of the data set. Raises ValueError where its classes are others.
    """
    path, info = Path(config.checkpoint), data.DATASETS[config.dataset]
    info = info._replace(image_size=config.image_size or info.image_size)
    model = models.load_weights(config.model, path, len(test.class_names))
    about = checkpoints.read_about(path)
    with files.undamaged(path, "expected what train.py leaves"):
        classifier = train.Classifier(model, *runs.input_of(about, info))
        differ = runs.class_difference(about, test)
    if differ:
        raise ValueError(f"{path}: {differ}")
    if config.image_size not in (None, classifier.image_size):
        raise ValueError(f"--image-size {config.image_size}: {path} says that its images have "
                         f"{classifier.image_size}")
    of = {"checkpoint": str(path), "dataset": config.dataset, "student": config.model}
    report = {"of": of, "image_size": classifier.image_size, "weights": files.file_digest(path)}
    return Subject(classifier, path.with_name(f"{path.name}.report.json"), report)


def is_taught(subject):
    return {"teacher", "clip"} <= subject.report.get("teachers", {}).keys()


def prepare(config):
    """-> (config with data set and place filled in, the test split, [Subject]). What can be wrong
    with a command is said here, before anything takes long."""
    if config.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if config.checkpoint and not (config.model and config.dataset):
        raise ValueError("--checkpoint takes --model NAME and --dataset NAME with it")
    owns = {}
    if not config.checkpoint:
        folders = [Path(folder) for folder in config.run or [newest_run()]]
        owns = {folder: read_run(folder, config) for folder in folders}
    datasets = sorted({own.dataset for own, _ in owns.values()})
    if not config.dataset and len(datasets) > 1:
        raise ValueError(f"these runs are on {', '.join(datasets)}: evaluate one after another")
    first, _ = next(iter(owns.values()), (train.Config(), {}))
    config = dataclasses.replace(config, dataset=config.dataset or first.dataset,
                                 data_dir=config.data_dir or first.data_dir,
                                 class_names=config.class_names or first.class_names)
    if config.shift == [] and not data.DATASETS[config.dataset].shifts:
        raise ValueError(f"{config.dataset} has no shift split of its own: --shift DIR names one")
    test = runs.load_split(config, "test")
    identity = keys.identity(test)
    found = [load_run(folder, *own, test, identity) for folder, own in owns.items()]
    if config.checkpoint:
        found = [load_bare(config, test)]
    if config.dataset == "folder":  # no size of its own: corruptions are made at the classifiers'
        sizes = sorted({classifier.image_size for classifier, _, _ in found})
        if len(sizes) > 1:
            raise ValueError(f"these runs have images of {', '.join(map(str, sizes))} pixels: "
                             "evaluate one after another")
        test = train.resized(test, sizes[0], config)
    del identity["class_names"]  # of no influence here
    how = {"seed": config.seed, "amp": config.amp, "test": identity}
    subjects = []
    for classifier, path, report in found:
        model = models.freeze(classifier.model).to(config.device)
        report = go_on(path, {**report, "how": how})
        subjects.append(Subject(classifier._replace(model=model), path, report))
    if config.fused and not any(map(is_taught, subjects)):
        raise ValueError("--fused: no run here has a teacher and CLIP, as those of richkd have")
    return config, test, subjects


def go_on(path, start):
    """The report at `path`, to be completed, where there is a whole one with the entries of
    `start`; else a new one that begins with these."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        report = files.read_own(path, "it is begun anew")
        if start.items() <= report.items():
            return report
    return start


def save_reports(subjects):
    for subject in subjects:
        files.write_json(subject.path, subject.report)


def scores(logits, labels):
    """The metrics of a test set: top-1, top-5 and both ECEs (15 bins) in percent, NLL, Brier."""
    return {"images": len(labels), "top1": 100 * metrics.top_k_accuracy(logits, labels),
            "top5": 100 * metrics.top_k_accuracy(logits, labels, 5),
            "nll": metrics.nll(logits, labels), "brier": metrics.brier(logits, labels),
            "ece": 100 * metrics.ece(logits, labels),
            "ece_equal_mass": 100 * metrics.ece(logits, labels, equal_mass=True)}


def calibration(logits, labels, temperature=None):
    """`scores` and the reliability diagram before and after a division by the temperature. Without
    one it is fitted on a random half of the images, always the same; reported is the other."""
    if temperature is None:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        rest, half = order.tensor_split(2)
        temperature = metrics.fit_temperature(logits[half], labels[half])
        logits, labels = logits[rest], labels[rest]
    table = {"temperature": temperature}
    for name, z in (("before", logits), ("after", logits / temperature)):
        points = zip(("confidence", "accuracy", "count"), metrics.calibration_bins(z, labels))
        table[name] = {**scores(z, labels), "bins": {what: row.tolist() for what, row in points}}
    return table


def device_blocks(images, config):
    return data.blocks(images, None, config.workers, config.device)


def evaluate_sets(config, test, subjects):
    """Add to the reports the test split and, with --shift, shift splits and folders."""
    folders = {f"shift {Path(folder).name}": folder for folder in config.shift or ()}
    if len(folders) < len(config.shift or ()):
        raise ValueError("--shift: two folders have one name; evaluate one after another")
    own = data.DATASETS[config.dataset].shifts if config.shift is not None else ()
    for name in ("test", *own, *folders):
        split, columns, key = test, slice(None), {}  # the whole report is of one test split
        if name in folders:
            split, columns = shifts.load_shift(folders[name], config.dataset, test)
            key["columns"] = columns.tolist()
        elif name != "test":
            split = runs.load_split(config, name)
        if name != "test":
            key["content"] = keys.identity(split)["content"]
        todo = [subject for subject in subjects if name not in subject.report
                or not key.items() <= subject.report[name].items()]
        sizes = sorted({subject.classifier.image_size for subject in todo})
        progress = files.Progress(name, len(split.labels) * len(sizes))
        for size in sizes:
            same = [subject for subject in todo if subject.classifier.image_size == size]
            images = train.resized(split, size, config).images
            found = train.predict([subject.classifier for subject in same],
                                  device_blocks(images, config), config, progress)
            for (_, _, report), logits in zip(same, found):
                logits = logits[:, columns]
                fitted = None if name == "test" else report["test"]["calibration"]["temperature"]
                report[name] = {**scores(logits, split.labels), **key,
                                "calibration": calibration(logits, split.labels, fitted)}
        save_reports(todo)


def published(test, name, severity, config):
    """The published images of one corruption and severity, of either kind, and their labels."""
    if config.dataset.startswith("cifar"):
        images, labels = shifts.read_cifar_c(config.corruptions, name, severity)
        if len(labels) == len(test.labels) and not labels.equal(test.labels):
            raise ValueError(f"{config.corruptions}/labels.npy has other labels than the test "
                             f"split of {config.dataset}")
        if int(labels.max()) >= len(test.class_names):
            raise ValueError(f"{config.corruptions}/labels.npy has the label {int(labels.max())}; "
                             f"{config.dataset} has {len(test.class_names)} classes")
        say_other_count(config.corruptions, labels, test)
        return images, labels
    root = shifts.imagenet_c_folder(config.corruptions, name, severity)
    paths, labels, columns = shifts.list_classes(root, data.ids_of(test), test.class_names)
    if len(columns) != len(test.class_names):
        raise ValueError(f"{root} has {len(columns)} classes, {config.dataset} "
                         f"{len(test.class_names)}: expected a folder for each")
    say_other_count(root, labels, test)
    images = test.images  # whose size the published images have already
    size = images.geometry[0] if isinstance(images, data.Stream) else images.shape[-1]
    return data.Stream(paths, size, size), labels


def say_other_count(where, labels, test):
    if len(labels) != len(test.labels):
        files.note(f"{where} has {len(labels)} images a severity, the test split "
                   f"{len(test.labels)}")


def drawing_device(config):
    """Where generated corruptions are drawn: where the images are, if that is a GPU of CUDA's."""
    return config.device if torch.device(config.device).type == "cuda" else "cpu"


def corruption_source(config, test):
    """What tells one set of corrupted test images from another: {"source", "content", "share"}, of
    generated ones the kind of device, too, whose generators differ. Raises as reading them where
    one of the published is missing."""
    if config.corruptions == "generated":
        return {"source": "generated", "content": None, "share": config.corrupted_share,
                "drawn_on": torch.device(drawing_device(config)).type}
    if config.corrupted_share < 1:
        raise ValueError("--corrupted-share is for generated corruptions: published ones are whole")
    if config.dataset.startswith("cifar"):
        paths = [Path(config.corruptions) / f"{name}.npy" for name in (*COMMON, "labels")]
    else:
        streams = (published(test, name, severity, config)[0]
                   for name, severity in itertools.product(COMMON, range(1, 6)))
        paths = itertools.chain.from_iterable(stream.paths for stream in streams)
    return {"source": "published", "content": keys.digest_files(paths), "share": 1.0}


def is_from(source, found):
    """Whether what a report has of corruptions is of this source; earlier ones drew on the CPU."""
    return source.items() <= {"drawn_on": "cpu", **found}.items()


def corrupted(test, name, severity, config):
    """-> (blocks of corrupted test images at the data set's own size, their labels): generated, or
    the published files. Each generated corruption and severity has its own generator, so that it
    can be repeated alone."""
    if config.corruptions == "generated":
        seed = 1000 * config.seed + 10 * list(COMMON).index(name) + severity
        generator = torch.Generator(drawing_device(config)).manual_seed(seed)
        clean = device_blocks(test.images, config)
        return (corrupt(images, name, severity, generator) for images in clean), test.labels
    images, labels = published(test, name, severity, config)
    return device_blocks(images, config), labels


def corruption_errors(table, clean, alexnet):
    """In percent, of {corruption: top-1 a severity}: the mean error, and the same less the clean
    one (`clean` is the clean top-1); with alexnet ImageNet-C's mCE and relative mCE, too."""
    errors = {name: 1 - sum(row) / 500 for name, row in table.items()}  # 5 x percent
    means = {"mean_error": metrics.mean_corruption_error(errors),
             "relative_mean_error": metrics.mean_corruption_error(errors, 1 - clean / 100)}
    if alexnet:
        means["mce"] = metrics.mean_corruption_error(errors, alexnet=True)
        means["relative_mce"] = metrics.mean_corruption_error(errors, 1 - clean / 100, alexnet=True)
    return {name: 100 * value for name, value in means.items()}


def evaluate_corruptions(config, test, subjects, source):
    """Add to the reports top-1 under fifteen corruptions at five severities, and their means."""
    for _, _, report in subjects:
        if not is_from(source, report.get("corruptions", {})):
            report["corruptions"] = {**source, "top1": {}}
    tasks = []
    for name, severity in itertools.product(COMMON, range(1, 6)):
        todo = [subject for subject in subjects
                if len(subject.report["corruptions"]["top1"].get(name, ())) < severity]
        if todo:
            tasks.append((name, severity, todo))
    progress = files.Progress(f"corruptions ({source['source']})", len(tasks) * len(test.labels))
    for name, severity, todo in tasks:
        images, labels = corrupted(test, name, severity, config)
        found = train.predict([subject.classifier for subject in todo], images, config, progress,
                              f"{name} {severity}")
        for (_, _, report), logits in zip(todo, found):
            top1 = report["corruptions"]["top1"].setdefault(name, [])
            top1.append(100 * metrics.top_k_accuracy(logits, labels))
        save_reports(todo)
    alexnet = config.dataset == "imagenet" and len(test.class_names) == 1000
    for classifier, _, report in subjects:
        found, clean = report["corruptions"], report["test"]["top1"]
        if source["share"] < 1:  # of the same images
            if "clean" not in found:
                blocks = device_blocks(data.resize(test.images, classifier.image_size), config)
                [logits] = train.predict([classifier], blocks, config)
                found["clean"] = 100 * metrics.top_k_accuracy(logits, test.labels)
            clean = found["clean"]
        found |= corruption_errors(found["top1"], clean, alexnet)
    save_reports(subjects)


def evaluate(config):
    """What the command does with classifiers: -> their reports, dicts that also lie in report.json
    beside each run. What is in a report already is not done again."""
    config, test, subjects = prepare(config)
    evaluate_sets(config, test, subjects)
    source, part = {}, test  # of the corrupted images
    if config.corruptions:
        source = corruption_source(config, test)
        if config.corrupted_share < 1:
            part = data.subset(test, 0, config.corrupted_share)
        evaluate_corruptions(config, part, subjects, source)
    for subject in subjects:
        if config.fused and is_taught(subject):
            from study import fusion
            fusion.evaluate_fused(config, part, subject, source)
        if config.plot:
            from study import plot
            plot.draw(config, test, subject)
    return [subject.report for subject in subjects]


def zero_shot(config):
    """CLIP itself on a test split: {"all M templates": top-1 in percent, then one a template}."""
    places = ("class_names", "clip", "clip_activation", "bpe", "prompts", "amp", "device",
              "workers", "cache_dir")
    own = train.Config(dataset=config.dataset or "shapes", data_dir=config.data_dir or "data",
                       **{name: getattr(config, name) for name in places})
    test = runs.load_split(own, "test")
    templates = clip_model.load_templates(own.prompts or targets.PROMPTS)
    clip, tokenizer, scale = targets.load_clip_teacher(own)
    _, features = targets.load_targets(own, clip, tokenizer, {"test": test},  # (N,D)
                                       {"test": keys.identity(test)})["test"]
    text = clip_model.class_features(clip, tokenizer, test.class_names, templates).cpu()  # (K,M,D)
    classes = {f"all {len(templates)} templates": richkd.ensemble_text_features(text)}
    classes |= {template: text[:, m] for m, template in enumerate(templates)}  # (K,D) each
    logits = {name: richkd.zero_shot_logits(features.float(), rows, scale)
              for name, rows in classes.items()}
    return {name: 100 * metrics.top_k_accuracy(z, test.labels) for name, z in logits.items()}


# Printed ------------------------------------------------------------------------------------------


def describe(report):
    return ", ".join(f"{key} {value}" for key, value in report["of"].items() if value is not None)


def table(corner, columns, rows):
    """Lines of at most 100 columns where labels have up to 28; a row is (label, numbers), a number
    a column, at most seven."""
    width = max([28, *(len(label) for label, _ in rows)])
    lines = [f"{corner:{width}}" + "".join(f" {name:>9}" for name in columns)]
    for label, numbers in rows:
        line = f"{label:{width}}"
        for column, number in zip(columns, numbers):
            digits = 3 if column in ("NLL", "Brier") else 2
            cell = f"{number:10.{digits}f}"
            line += cell if cell[0] == " " else f" {number:9.2e}"
        lines.append(line)
    return lines


def temperature_text(temperature):
    """ "T = 1.23"; "T >= 1e+03" where `fit_temperature` met its bound: the best is beyond it."""
    beyond = {temperature < 1.001 * metrics.LEAST_TEMPERATURE: "<=",
              temperature > 0.999 * metrics.MOST_TEMPERATURE: ">="}
    return f"T {beyond.get(True, '=')} {temperature:.3g}"


def sets_table(report):
    rows = []
    for name, row in report.items():
        if isinstance(row, dict) and "brier" in row:
            before, after = row["calibration"]["before"], row["calibration"]["after"]
            half = "half of it, " if before["images"] < row["images"] else ""
            rows.append((name, row))
            if half:
                rows.append((f"  {half}T = 1", before))
            fitted = temperature_text(row["calibration"]["temperature"])
            rows.append((f"  {half}{fitted}", after))
    names = ("top1", "top5", "nll", "brier", "ece", "ece_equal_mass")
    return table("", ("top-1 %", "top-5 %", "NLL", "Brier", "ECE %", "mass-ECE"),
                 [(label, [row[name] for name in names]) for label, row in rows])


def tables(reports):
    """The reports as text: test sets, corruptions by severity and what fusing does."""
    lines = []
    for report in reports:
        lines += [describe(report), *sets_table(report)]
        found = report.get("corruptions", {})
        if "mean_error" in found:
            rows = [(name, [*row, sum(row) / 5]) for name, row in found["top1"].items()]
            lines += table("top-1 %, severity", (1, 2, 3, 4, 5, "mean"), rows)
            share = found.get("share", 1)
            share = f", {100 * share:.3g} % of the images" if share < 1 else ""
            lines.append(f"over the fifteen ({found['source']}{share}): mean error "
                         f"{found['mean_error']:.2f} %, less the clean error "
                         f"{found['relative_mean_error']:.2f} %")
        if "mce" in found:
            lines.append(f"against AlexNet: mCE {found['mce']:.1f} %, relative mCE "
                         f"{found['relative_mce']:.1f} %")
        if "fused" in report:
            from study import fusion
            lines += fusion.tables(report["fused"])
    return "\n".join(lines)


def job(config):
    from study import compare
    command.check(config)
    command.check_device(config.device)
    command.set_up_gpu(config.device)
    if config.zero_shot:
        for template, top1 in zero_shot(config).items():
            print(f"{top1:6.2f} %  {template}")
    elif config.compare:
        runs = [run for path in config.compare for run in compare.read_reports(path)]
        print(compare.as_markdown(compare.groups(runs)))
    else:
        reports = evaluate(config)
        print(tables(reports))
        if len(reports) > 1:
            runs = [compare.run_of(report) for report in reports]
            print("\n" + compare.as_markdown(compare.groups(runs)))


if __name__ == "__main__":
    import evaluate as module  # as study/fusion.py imports it
    command.main(lambda: module.job(command.parse(module.Config, __doc__)))
