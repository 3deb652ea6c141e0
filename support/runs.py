"""A run's folder, and what a run depends on: its settings, its data and the files that it names.

    splits = load_splits(config)         # the data, as --fraction, --holdout and names have it
    found = inputs(config, splits)       # digests of data and files, wherever these lie
    folder = open_run(config)            # ValueError where it holds a run of other settings,
    check_inputs(folder, config, found)  # of other data or files
    begin_run(config, folder, found)     # config.json: all of it
    log = restore(folder / "last.pt", stateful)    # of the epochs before; [] at the beginning
    keep_epoch(config, folder, log, stateful, progress)  # log.csv, last.pt
    summarize(config, log, table)        # what summary.json holds

The same data and files in another place are no difference; others in the same place are one.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import torch

import clip_model
import data
import models
import targets
from support import clip_weights, files, folders, keys
from support.command import flag, world

# What does not change a result; the other fields are a run's settings.
PLACES = ("data_dir", "no_graph", "device", "workers", "cache_dir", "out", "overwrite",
          "tensorboard")
# Settings that name files: what is in these decides, not where they lie. The names of the classes
# are part of the data.
FILES = ("teacher_weights", "clip", "bpe", "prompts", "class_names")
ANEW = "--overwrite starts the run anew"
OTHERWISE = "--out names another folder, --overwrite starts anew"


def settings(config):
    """The settings that decide the result, as JSON has them."""
    everything = dataclasses.asdict(config)
    return json.loads(json.dumps({k: v for k, v in everything.items() if k not in PLACES}))


def load_split(config, name):
    """A split of the config's data set, with --class-names; train.py's config or evaluate.py's."""
    split = data.load_dataset(config.dataset, config.data_dir, name, config.cache_dir)
    return data.rename_classes(split, config.class_names) if config.class_names else split


def load_splits(config):
    """{"train", "test" and the data set's shifts: Split}, the images as they come, for CLIP."""
    names = ("train", "test", *data.DATASETS[config.dataset].shifts)
    splits = {name: load_split(config, name) for name in names
              if name != "test" or not config.holdout}
    kept = 1 - config.holdout
    if config.holdout:
        test = data.subset(splits["train"], kept, 1)
        splits = {"train": splits["train"], "test": test, **splits}
        held = {k: k for k in test.labels.tolist()}
        folders.say_absent(held, data.ids_of(test), "--holdout", "the training images")
    if kept * config.fraction < 1:
        splits["train"] = data.subset(splits["train"], 0, kept * config.fraction)
    N, least = len(splits["train"].labels), max(2, world())
    if N < least:  # BatchNorm needs two, each rank one
        raise ValueError(f"{config.data_dir}: {N} training images; expected at least {least}")
    return splits


def inputs(config, splits):
    """What a run depends on beside its settings, as config.json has it: {"data": {split:
    `keys.identity`}, "files": {setting: digest of what it names}}, of a method without a teacher or
    without CLIP nothing that only these read. config: a resolved train.Config. Raises OSError and
    ValueError for files that cannot be read."""
    found = {}
    if config.teacher_weights:
        paths = [models.imagenet_file(name) if path == "imagenet" else path
                 for name, path in zip(config.teacher, config.teacher_weights)]
        found["teacher_weights"] = [files.file_digest(path) for path in paths]
    if config.clip:
        templates = clip_model.load_templates(config.prompts or targets.PROMPTS)
        found["clip"] = config.clip
        if config.clip not in ("tiny", *clip_weights.PUBLIC_CLIPS):  # of these it says all
            path, listing = clip_weights.find(config.clip, config.cache_dir)
            found["clip"] = files.json_digest([files.file_digest(path), listing])
        found["prompts"] = files.json_digest(templates)
        found["bpe"] = (files.file_digest(config.bpe) if config.bpe
                        else clip_weights.BPE_DIGEST.removeprefix("sha256:"))
    return {"data": {name: keys.identity(split) for name, split in splits.items()},
            "files": found}


def difference(about, config, here):
    """What a run's config.json, `about`, and a config with its `inputs`, `here`, differ in besides
    settings, in words; None where in nothing. A split that only one of them has is not compared."""
    there, before = about["inputs"], about["settings"]
    for name in here["data"]:
        differ = name in there["data"] and keys.difference(
            there["data"][name], here["data"][name], names=config.clip is not None)
        if differ:
            return f"other data in its {name} split: {differ}"
    for name in FILES:
        if there["files"].get(name) != here["files"].get(name):
            was, now = before.get(name), settings(config)[name]
            return (f"other content of {flag(name)} {now}" if was == now
                    else f"{flag(name)} {was} there, {now} here")
    return None


def holds_run(folder):
    """Whether there is a run to go on with, or a finished one."""
    return any((folder / name).is_file() for name in ("last.pt", "summary.json"))


def open_run(config):
    """The run's folder, nothing changed in it. Raises ValueError where it holds something else than
    a run of these settings, which --overwrite starts anew."""
    teacher = "+".join(config.teacher) or "none"
    name = f"{config.dataset}-{config.method}-{teacher}-{config.student}-s{config.seed}"
    folder = Path(config.out or Path("runs") / name)
    files.check_folder(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    if "config.json" not in names and any(name[0] != "." for name in names):
        raise ValueError(f"{folder} is not empty and holds no run (no config.json); --out names "
                         "another folder")
    if config.overwrite or not holds_run(folder):
        return folder
    with files.undamaged(folder / "config.json", ANEW):
        there = files.read_own(folder / "config.json", ANEW)["settings"]
        here = settings(config)
        differ = [f"{flag(name)} {there.get(name)} there, {here.get(name)} here"
                  for name in {**there, **here}
                  if name not in FILES and there.get(name) != here.get(name)]
    if differ:
        raise ValueError(f"{folder} holds a run with other settings: {'; '.join(differ)}; "
                         f"{OTHERWISE}")
    return folder


def check_inputs(folder, config, here):
    """Raises ValueError, naming what differs, where the folder holds a run of other data or files
    than `here`, the config's `inputs`."""
    if config.overwrite or not holds_run(folder):
        return
    path = folder / "config.json"
    about = files.read_own(path, ANEW)
    if "inputs" not in about:
        raise ValueError(f"{folder} holds a run of an earlier version, which did not note its data "
                         f"and files; {OTHERWISE}")
    with files.undamaged(path, ANEW):
        differ = difference(about, config, here)
    if differ:
        raise ValueError(f"{folder} holds a run with {differ}; {OTHERWISE}")


def begin_run(config, folder, found):
    """Empty the folder of its run, if it holds one, and write config.json. found: `inputs`."""
    left = ("summary.json", "last.pt", "student.pt", "log.csv", "report.json", "report.png",
            "samples.png")
    for path in (*(folder / name for name in left), *folder.glob("events.out.tfevents.*")):
        path.unlink(missing_ok=True)
    here = Path(__file__).resolve().parent
    source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py"))))
    files.write_json(folder / "config.json", {
        "settings": settings(config), "inputs": found,
        "places": {name: getattr(config, name) for name in PLACES},
        "torch": torch.__version__, "source": source.hexdigest()})


def restore(path, stateful):
    """Read last.pt into modules and optimiser, `stateful`; -> its log, [] where there is no file.
    Raises ValueError where it is damaged."""
    if not path.is_file():
        return []
    last = files.read_own(path, ANEW)
    with files.undamaged(path, ANEW):
        earlier = "memory._extra_state" in last["criterion"]
    if earlier:
        raise ValueError(f"{path} is of an earlier version, which drew other negatives; {ANEW}")
    with files.undamaged(path, ANEW):
        for name, part in stateful.items():
            part.load_state_dict(last[name])
        return list(last["log"])


def keep_epoch(config, folder, log, stateful, progress):
    """log.csv and last.pt as they stand after an epoch; its line for people, and for tensorboard
    where that is asked for."""
    lines = [",".join(log[0])] + [",".join(map(str, row.values())) for row in log]
    files.write_atomically(folder / "log.csv", "".join(line + "\n" for line in lines).encode())
    state = {name: part.state_dict() for name, part in stateful.items()}
    files.save(folder / "last.pt", {**state, "log": log})
    row = log[-1]
    note = (f"epoch {row['epoch']}/{config.epochs} | loss {row['loss']:.3f} | accuracy "
            f"{row['train_accuracy']:.1f} % | test {row['test_accuracy']:.1f} %")
    progress.update(row["epoch"] * progress.total // config.epochs, note, keep=True)
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        with SummaryWriter(folder) as writer:
            for name, value in row.items():
                writer.add_scalar(name, value, row["epoch"])


def summarize(config, log, table):
    """What summary.json holds. The accuracies are the last epoch's; the best one is chosen on the
    test split itself and stands there for information only. Seconds are those of the student."""
    best = max(log, key=lambda row: row["test_accuracy"])
    return {
        "dataset": config.dataset, "method": config.method,
        "teacher": "+".join(config.teacher) or None, "student": config.student,
        "seed": config.seed, "epochs": config.epochs, "clip": config.clip,
        **{f"{who}_accuracy": row.get("test") for who, row in table.items()},
        "shift_accuracy": table["student"].get("shift"), "accuracies": table,
        "best_test_accuracy": best["test_accuracy"], "best_test_epoch": best["epoch"],
        "images_per_second": sum(row["images_per_second"] for row in log) / len(log),
        "seconds": sum(row["seconds"] for row in log), "device": config.device,
        "torch": torch.__version__}


def summary_table(summary):
    """The summary's accuracies as text: a row a model, a column a split."""
    names = {"clip": f"CLIP zero-shot ({summary['clip']})", "teacher": f"teacher "
             f"{summary['teacher']}", "fused": "fused teacher",
             "student": f"student {summary['student']} ({summary['method']})"}
    rows = {who: row for who, row in summary["accuracies"].items() if row}
    width = max(len(names[who]) for who in rows)
    lines = [" " * width + "".join(f"{split:>10}" for split in rows["student"])]
    for who, row in rows.items():
        cells = "".join(f"{value:10.1f}" for value in row.values())
        lines.append(f"{names[who]:{width}}{cells}")
    return "\n".join(lines)


def input_of(about, info):
    """mean, std and side of the images that a checkpoint reads: what it says of itself
    (`checkpoints.read_about`), or else `info`, a data set's. Raises for values of another kind."""
    found = {**info._asdict(), **about}
    mean, std = (tuple(torch.tensor(found[name], dtype=torch.float64).view(3).tolist())
                 for name in ("mean", "std"))
    return mean, std, int(found["image_size"])


def class_difference(about, split):
    """What the classes of a checkpoint, by `checkpoints.read_about`, and of a split differ in, in
    words; None where in nothing, or where the file does not say."""
    ids, names = data.ids_of(split), list(split.class_names)
    there = list(about.get("class_ids") or about.get("class_names") or ids)
    if there in (ids, names):
        return None
    return keys.class_difference(there, ids if about.get("class_ids") else names)
