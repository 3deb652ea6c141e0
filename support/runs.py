"""What a result depends on, what is kept by it, and the folder of a run. The same data and files in
another place are no difference; others in the same place are one."""

import contextlib
import dataclasses
import hashlib
import os
import torch
from pathlib import Path
from support import checkpoints, files
from support.command import flag, rank

# What does not change a result; the other fields are a run's settings.
PLACES = ("data_dir", "no_graph", "device", "workers", "cache_dir", "out", "overwrite")
# Settings that name files, whose content decides; the classes' names are part of the data.
FILES = ("teacher_weights", "clip", "bpe", "prompts", "class_names")
ANEW = "--overwrite, of a cached teacher removing its folder, starts it anew"

def digest_files(paths):
    """SHA-256 of the last two parts of each file's name, its size and content: all or, of JPEG and
    PNG, the last 256 bytes, the pixels' end or checksum, so that 100,000 take a second or two."""
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
    """What tells a data.Split from any other, as JSON has it: {"class_ids", "class_names",
    "images": N, "content": SHA-256 of labels and images}. The same data elsewhere has the same."""
    digest = hashlib.sha256(split.labels.contiguous().numpy())
    if hasattr(split.images, "paths"):  # a Stream
        digest.update(digest_files(split.images.paths).encode())
    else:
        digest.update(str(tuple(split.images.shape)).encode())
        for block in split.images.split(1000):
            digest.update(block.cpu().contiguous().numpy())
    return {"class_ids": list(split.ids), "class_names": list(split.class_names),
            "images": len(split.labels), "content": digest.hexdigest()}

def difference(there, here, name=""):
    """The first place where two JSON values differ, in words, or None; name: what they are."""
    if type(there) is type(here) is list:
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if type(there) is type(here) is dict:
        parts = (difference(there.get(key), here.get(key), f"{name} {key}")
                 for key in {**there, **here})
        return next(filter(None, parts), None)
    return None if there == here else f"{name.strip()} is {there!r} there and {here!r} here"

def cached(path, key, make):
    """What make() returns, tensors in a tuple or dict, kept in PATH-DIGEST.pt, which is mapped into
    memory and so shared. key: a dict of JSON values, all that it depends on."""
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
    content = make()
    try:
        files.save(path, {"key": digest, "content": content})
    except OSError as error:
        files.note(f"{path} cannot be kept ({error.strerror}): it is made anew each time")
        return content
    return torch.load(path, mmap=True, weights_only=True)["content"]

def input_size(path, split, info, run=None):
    """The side of the images that a checkpoint says it reads, or None. ValueError: it says other
    classes than the split's, other mean and std than those of a data set's `info`, another run."""
    about = checkpoints.read_checkpoint(path)
    about = about if {"model_name", "format"} <= about.keys() else {}  # another program's
    with files.undamaged(path, "expected what train.py leaves"):
        known = list(about.get("class_ids") or about.get("class_names") or split.ids)
        named = not about.get("class_ids") and known != split.ids
        here = {"class": split.class_names if named else split.ids, "mean": list(info.mean),
                "std": list(info.std), "run": run and about.get("run")}
        there = {"class": known, "mean": list(map(float, about.get("mean", info.mean))),
                 "std": list(map(float, about.get("std", info.std))), "run": run}
        size = about.get("image_size") and int(about["image_size"])
    differ = difference(there, here)
    if differ:
        raise ValueError(f"{path} is not of this data set, or run: its {differ}")
    return size

def settings(config):
    """The settings that decide the result, as JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(config).items() if name not in PLACES}

def key(about):
    """All in config.json, `about`, that decides a run's result: each flag's value or its file's
    content, each split's `identity`; class names only with CLIP, which alone is asked for them."""
    flags = {**about["settings"], **dict.fromkeys(FILES), **about["inputs"]["files"]}
    unread = () if about["settings"]["clip"] else ("class_names",)
    splits = {f"{name} split": {part: split[part] for part in split if part not in unread}
              for name, split in about["inputs"]["data"].items()}
    return {**{flag(name): value for name, value in flags.items()}, **splits}

def run_folder(config, about):
    """Where a run lies: --out, or a folder whose name changes with all that decides its result."""
    name = (config.dataset, config.method, "+".join(config.teacher) or "none", config.student,
            f"s{config.seed}", files.json_digest(key(about))[:8])
    return Path(config.out or f"runs/{'-'.join(name)}")

@contextlib.contextmanager
def alone(folder):
    """A run's folder, made and tried before anything takes long, for one process at a time.
    ValueError: another one trains in it; OSError: it cannot be written, nor is it finished."""
    readable, lock = (folder / "summary.json").is_file(), folder / ".lock"
    if rank() > 0 or readable and not os.access(folder, os.W_OK):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(lock, "ab") as file:
        try:
            import fcntl  # Windows has none
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with its process
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another process trains there; see --out") from None
        except (ImportError, OSError) as error:
            files.note(f"{folder} cannot be locked ({error}): start no second run in it")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a folder stays unless it is empty
                lock.unlink()
                folder.rmdir()

def open_run(folder, about, overwrite):
    """-> the summary of a folder's run, None if unfinished. ValueError: the folder is another's."""
    names = [name for name in os.listdir(folder) if name[0] != "."]
    if names and "config.json" not in names:
        raise ValueError(f"{folder} is not empty and holds no run (no config.json); see --out")
    contents = [split["content"] for split in about["inputs"]["data"].values()]
    if len({*contents}) < len(contents):
        files.note("the test split is a copy of the training images: it tests nothing")
    if overwrite or not {"last.pt", "summary.json"} & {*names}:
        return None
    with files.undamaged(folder / "config.json", ANEW):
        differ = difference(key(files.read_json(folder / "config.json", ANEW)), key(about))
    if differ:
        raise ValueError(f"{folder} holds another run: {differ}; see --out, --overwrite")
    return files.read_json(folder / "summary.json", ANEW) if "summary.json" in names else None

def begin_run(config, folder, about):
    """Write config.json, in a folder that --overwrite has emptied of its run."""
    for name in ("summary.json", "last.pt", "student.pt", "log.csv", "report.json", "report.png",
                 "samples.png", "fusion.json") if config.overwrite else ():
        (folder / name).unlink(missing_ok=True)
    places = {name: getattr(config, name) for name in PLACES}
    places |= {"device": str(config.device), "data_dir": str(Path(config.data_dir).absolute())}
    files.write_json(folder / "config.json", {
        **about, "torch": torch.__version__, "places": places})

def restore(path, stateful, run):
    """Read last.pt into `stateful` -> its log, or []. files.Damaged, as for another run's file."""
    if not path.is_file():
        return []
    with files.undamaged(path, ANEW):
        last = checkpoints.read_own(path, ANEW)
        if last["run"] != run:
            raise ValueError
        for name, part in stateful.items():
            part.load_state_dict(last[name])
        return list(last["log"])

def keep_epoch(folder, log, stateful, run):
    """log.csv and last.pt of a run as they stand after an epoch, each row of `log` a dict."""
    lines = [",".join(map(str, row)) + "\n" for row in (log[0], *map(dict.values, log))]
    files.write_atomically(folder / "log.csv", lambda file: file.write("".join(lines).encode()))
    files.save(folder / "last.pt", {"run": run, "log": log, **{
        name: part.state_dict() for name, part in stateful.items()}})

def summary_table(folder, summary):
    """A run as text: accuracies, a row a model; whether fusion does harm; where the student is."""
    table, clip = summary["accuracies"], Path(summary["clip"] or "")
    names = {"clip": f"CLIP zero-shot ({clip.name if clip.exists() else clip})",
             "teacher": f"teacher {summary['teacher']}", "fused": "fused teacher",
             "student": f"student {summary['student']} ({summary['method']})"}
    lines = [" " * 28 + "".join(f"{split:>10}" for split in table["student"])]
    lines += [f"{names[who]:28}" + "".join(f"{value:10.1f}" for value in row.values())
              for who, row in table.items() if row]
    of = {who: summary[f"{who}_accuracy"] for who in ("clip", "teacher")}
    if summary["fused_accuracy"] is not None and summary["fused_accuracy"] < max(of.values()):
        lines += [f"The fused teacher is below {names[max(of, key=of.get)]}; for other alphas:",
                  f"python study/fusion.py {folder}"]
    return "\n".join([*lines, f"{folder}/ has student.pt, log.csv"])
