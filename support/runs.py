"""What a result depends on, what is kept by it, and the folder of a run. The same data and files in
another place are no difference; others in the same place are one."""

import dataclasses
import hashlib
import itertools
import os
import torch
from pathlib import Path
from support import checkpoints, files
from support.command import flag

# What does not change a result; the other fields are a run's settings.
PLACES = ("data_dir", "no_graph", "device", "workers", "cache_dir", "out", "overwrite")
# Settings that name files: what is in these decides, not where they lie. The names of the classes
# are part of the data.
FILES = ("teacher_weights", "clip", "bpe", "prompts", "class_names")
ANEW = "--overwrite, of a cached teacher removing its folder, starts it anew"

def digest_files(paths):
    """SHA-256 of files: of each the last two parts of its name and its size; of a JPEG or PNG the
    last 256 bytes, in which the one ends its pixels and the other has its checksum; of any other
    all of it. 100,000 JPEGs take a second or two."""
    digest = hashlib.sha256()
    for path in map(str, paths):
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 256))
            content = file.read()
        if not path[-5:].lower().endswith((".jpeg", ".jpg", ".png")):
            content = files.file_digest(path).encode()
        name = os.fsencode("/".join(path.replace(os.sep, "/").rsplit("/", 2)[-2:]))
        digest.update(b"%d %d %b %b" % (len(name), size, name, content))
    return digest.hexdigest()

def identity(split):
    """What tells a data.Split from any other, as JSON has it: {"images": N, "class_names",
    "class_ids", "content": SHA-256 of labels and images}. The same data elsewhere has the same."""
    digest = hashlib.sha256(split.labels.contiguous().numpy())
    if hasattr(split.images, "paths"):  # a Stream
        digest.update(digest_files(split.images.paths).encode())
    else:
        digest.update(str(tuple(split.images.shape)).encode())
        for block in split.images.split(1000):
            digest.update(block.cpu().contiguous().numpy())
    return {"images": len(split.labels), "class_names": list(split.class_names),
            "class_ids": list(split.ids), "content": digest.hexdigest()}

def class_difference(there, here):
    """The first class in which two listings, in the labels' order, differ, in words, or None."""
    pairs = enumerate(itertools.zip_longest(there, here))
    return next((f"class {k} is {before!r} there and {now!r} here"
                 for k, (before, now) in pairs if before != now), None)

def difference(there, here, names=True):
    """What two `identity` differ in, in words; None where they are the same. Without `names` these,
    which CLIP alone is asked for, are not compared."""
    for what in ("class_ids", "class_names") if names else ("class_ids",):
        if there[what] != here[what]:
            return class_difference(there[what], here[what])
    if there["images"] != here["images"]:
        return f"{there['images']} images there, {here['images']} here"
    return "other images or labels" if there["content"] != here["content"] else None

def cached(path, key, make):
    """What make() returns, tensors in a tuple or a dict, kept in a file PATH-DIGEST.pt that is
    mapped into memory, so that processes share it; made where there is none, or a damaged one.
    key: a dict of JSON values, all that it depends on."""
    digest = files.json_digest(key)
    path = Path(f"{path}-{digest[:16]}.pt")
    if path.is_file():
        try:
            with files.undamaged(path, "it is made anew"):
                kept = torch.load(path, mmap=True, weights_only=True)
                if (kept["format"], kept["key"]) == (files.FORMAT, digest):
                    return kept["content"]
        except files.Damaged as error:
            files.note(str(error))
    files.save(path, {"key": digest, "content": make()})
    return torch.load(path, mmap=True, weights_only=True)["content"]

def input_size(path, split, info):
    """The side of the images that a checkpoint reads: what it says of itself, else that of `info`,
    a data set's. Raises ValueError where its classes are not the split's, or its images' mean and
    std not info's."""
    about = checkpoints.read_about(path)
    with files.undamaged(path, "expected what train.py leaves"):
        there = list(about.get("class_ids") or about.get("class_names") or split.ids)
        here = list(split.ids if about.get("class_ids") else split.class_names)
        differ = there not in (here, list(split.ids)) and class_difference(there, here)
        size = int(about.get("image_size", info.image_size))
        own = [[float(value) for value in about.get(name, getattr(info, name))]
               for name in ("mean", "std")]
    if differ:
        raise ValueError(f"{path} knows other classes: {differ}")
    if own != [list(info.mean), list(info.std)]:
        raise ValueError(f"{path} reads images of mean and std {own}; expected those of this data "
                         f"set, {info.mean} and {info.std}")
    return size

def settings(config):
    """The settings that decide the result, as JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(config).items() if name not in PLACES}

def open_run(config, inputs):
    """-> the run's folder, nothing changed in it, and its summary if it is finished, else None.
    Raises ValueError where it holds something else than a run of these settings, data and files,
    which --overwrite starts anew. inputs: as train.py's `inputs` has them."""
    teacher = "+".join(config.teacher) or "none"
    name = f"{config.dataset}-{config.method}-{teacher}-{config.student}-s{config.seed}"
    folder = Path(config.out or Path("runs") / name)
    if any(part.is_file() for part in (folder, *folder.parents)):
        raise NotADirectoryError(f"{folder} is no folder; --out names one")
    names = os.listdir(folder) if folder.is_dir() else []
    if "config.json" not in names and any(name[0] != "." for name in names):
        raise ValueError(f"{folder} is not empty and holds no run (no config.json); --out names "
                         "another folder")
    if config.overwrite or not {"last.pt", "summary.json"} & {*names}:
        return folder, None
    about = files.read_json(folder / "config.json", ANEW)
    with files.undamaged(folder / "config.json", ANEW):
        differ = run_difference(about, config, inputs)
    if differ:
        raise ValueError(f"{folder} holds a run with {differ}; --out names another folder, "
                         "--overwrite starts anew")
    finished = "summary.json" in names
    summary = files.read_json(folder / "summary.json", ANEW) if finished else None
    return folder, summary

def run_difference(about, config, inputs):
    """What a run's config.json, `about`, and a config with its inputs differ in, in words; None
    where in nothing. A split that only one of them has is not compared."""
    there, here = about["settings"], settings(config)
    differ = [f"{flag(name)} {there.get(name)} there, {here.get(name)} here"
              for name in {**there, **here}
              if name not in FILES and there.get(name) != here.get(name)]
    if differ:
        return f"other settings: {'; '.join(differ)}"
    there, here = about["inputs"], inputs
    for name, own in here["data"].items():
        differ = difference(there["data"].get(name, own), own, config.clip is not None)
        if differ:
            return f"other data in its {name} split: {differ}"
    for name in FILES:
        if there["files"].get(name) != here["files"].get(name):
            return f"other content of {flag(name)} {getattr(config, name)}"
    return None

def begin_run(config, folder, inputs):
    """Empty the folder of its run, if it holds one, and write config.json."""
    for name in ("summary.json", "last.pt", "student.pt", "log.csv", "report.json", "report.png",
                 "samples.png", "fusion.json"):
        (folder / name).unlink(missing_ok=True)
    places = {name: getattr(config, name) for name in PLACES}
    files.write_json(folder / "config.json", {
        "settings": settings(config), "inputs": inputs, "torch": torch.__version__,
        "places": {**places, "device": str(config.device)}})

def restore(path, stateful):
    """Read last.pt into modules and optimiser, `stateful`; -> its log, [] where there is no file.
    Raises files.Damaged where it is damaged."""
    if not path.is_file():
        return []
    with files.undamaged(path, ANEW):
        last = checkpoints.read_own(path, ANEW)
        for name, part in stateful.items():
            part.load_state_dict(last[name])
        return list(last["log"])

def keep_epoch(folder, log, stateful):
    """log.csv and last.pt as they stand after an epoch, each row of `log` a dict."""
    lines = [",".join(map(str, row)) + "\n" for row in (log[0], *map(dict.values, log))]
    files.write_atomically(folder / "log.csv", lambda file: file.write("".join(lines).encode()))
    files.save(folder / "last.pt", {"log": log, **{
        name: part.state_dict() for name, part in stateful.items()}})

def summary_table(summary):
    """The summary's accuracies as text: a row a model, a column a split."""
    names = {"clip": f"CLIP zero-shot ({summary['clip']})",
             "teacher": f"teacher {summary['teacher']}", "fused": "fused teacher",
             "student": f"student {summary['student']} ({summary['method']})"}
    rows = {who: row for who, row in summary["accuracies"].items() if row}
    width = max(len(names[who]) for who in rows)
    lines = [" " * width + "".join(f"{split:>10}" for split in rows["student"])]
    for who, row in rows.items():
        cells = "".join(f"{value:10.1f}" for value in row.values())
        lines.append(f"{names[who]:{width}}{cells}")
    return "\n".join(lines)
