"""Nothing is lost, nothing is trusted: runs that are killed and interrupted, full disks, and files
of every kind with bytes changed. The long ones are slow: python -m pytest -m slow."""

import contextlib
import gzip
import io
import json
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import clip_model  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
import targets  # noqa: E402
import train  # noqa: E402
from study import compare  # noqa: E402
from support import (
    checkpoints,  # noqa: E402
    command,  # noqa: E402
    files,  # noqa: E402
    runs,  # noqa: E402
    shapes,  # noqa: E402
)

SIZES = {"train": 100, "test": 25, "shift": 25}
FILES = {"config.json", "log.csv", "last.pt", "student.pt", "summary.json"}


def tiny_clip(path):
    torch.manual_seed(0)
    clip = clip_model.CLIP(32, 32, 1, 64, 16, 64, 514, 64, 1, 1)
    files.save(path, {"model": clip.state_dict()})


def config(folder, **changes):
    """RichKD (L+F), two epochs of five steps, below a folder; its teacher is trained there, too."""
    return train.Config(**{**dict(
        teacher=("resnet8",), student="resnet8", clip=str(folder.parent / "clip.pt"), epochs=2,
        batch_size=20, lr=0.05, num_negatives=64, cache_dir=str(folder / "cache"),
        out=str(folder / "run"), device="cpu"), **changes})


def scratch(folder, **changes):
    return config(folder, **{**dict(method="scratch", epochs=1), **changes})


def visible(folder):
    """The files in a folder, but for what a process was writing when it was killed."""
    return sorted(name for name in os.listdir(folder) if name[0] != ".")


def result(folder):
    """What a run leaves, but for its times: files, tensors, log, accuracies; the teacher's too."""
    out = [visible(folder / "cache")]
    for run in (folder / "run", *sorted((folder / "cache").glob("teacher-*"))):
        last = files.read_own(run / "last.pt", "")
        tensors = {**files.read_own(run / "student.pt", "")["model"], **last["criterion"]}
        log = [{key: row[key] for key in row if "second" not in key} for row in last["log"]]
        lines = (run / "log.csv").read_text().splitlines()
        accuracies = files.read_own(run / "summary.json", "")["accuracies"]
        out += [visible(run), log, len(lines), accuracies,
                {key: value.contiguous().numpy().tobytes() for key, value in tensors.items()}]
    return out


# ---- Processes. This file run as a script forks each one, so that torch is imported once.


def start(folder, sabotage=lambda: None):
    """A process that trains in `folder`, its stderr in the file `stderr` there; -> its id."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(folder / "stderr", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
        sabotage()
        with contextlib.suppress(SystemExit):
            try:
                command.main(lambda: train.run(config(folder)))
                os._exit(0)
            except SystemExit as error:
                os._exit(error.code)
        os._exit(99)
    return pid


def wait(pid):
    """-> the exit status of a process, less than 0 for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_call(module, name, number, action):
    """`action(*arguments)` before the call of that number of a function."""
    original, calls = getattr(module, name), []

    def wrapper(*arguments, **named):
        calls.append(1)
        if len(calls) == number:
            action(*arguments)
        return original(*arguments, **named)
    setattr(module, name, wrapper)


def die_in_the_middle(descriptor):
    if stat.S_ISREG(os.fstat(descriptor).st_mode):  # half of the file is written
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def send(number):
    return lambda *_: os.kill(os.getpid(), number)


def main(folder):
    torch.set_num_threads(1)
    shapes.SIZES = SIZES
    draw, counts = random.Random(0), {}
    tiny_clip(folder / "clip.pt")
    for name in ("whole", "times0", "times1", "times2", "writes", "signals"):
        (folder / name).mkdir()
    began = time.time()
    assert wait(start(folder / "whole")) == 0, (folder / "whole/stderr").read_text()
    seconds, whole = time.time() - began, result(folder / "whole")

    def attempts(name, attempt):
        """Runs that `attempt(number)` ends, until one finishes; -> the statuses of the others."""
        statuses = []
        while (status := attempt(len(statuses))) != 0:
            statuses.append(status)
            assert len(statuses) < 100
        assert result(folder / name) == whole, name
        return statuses

    def killed_after_a_while(name):
        def attempt(number):
            pid = start(folder / name)
            if number < 5:
                # what is left takes less and less time
                time.sleep(draw.uniform(0, 0.8) * seconds / (1 + number))
                os.kill(pid, signal.SIGKILL)
            return wait(pid)
        return attempt

    def killed_while_writing(number):
        def die():
            at_call(os, "fsync", 1 + number, die_in_the_middle)
        return wait(start(folder / "writes", die))

    def interrupted(number):
        """At a step, once at the last one of an epoch; outside of training; in the epoch's test."""
        function = [(train.StudentAndLoss, "forward", 3), (train.StudentAndLoss, "forward", 2),
                    (targets, "load_targets", 1), (train, "predict_split", 1),
                    (train.StudentAndLoss, "forward", 5), (train, "accuracies", 1)]
        where = function[number] if number < len(function) else (runs, "summarize", 99)
        caught = signal.SIGTERM if number % 2 else signal.SIGINT
        status = wait(start(folder / "signals", lambda: at_call(*where, send(caught))))
        lines = (folder / "signals/stderr").read_text().splitlines()
        if status:
            assert status == 128 + caught and lines[-1].startswith("interrupted"), lines
            assert "the same command goes on" in lines[-1]
            assert not any("Traceback" in line for line in lines)
            counts.setdefault("said", []).append(lines[-1].removeprefix("interrupted"))
        return status

    counts["times"] = []
    for name in ("times0", "times1", "times2"):
        counts["times"] += attempts(name, killed_after_a_while(name))
    counts["writes"] = attempts("writes", killed_while_writing)
    counts["signals"] = attempts("signals", interrupted)
    print(json.dumps(counts))


@pytest.mark.slow
def test_run_killed_and_interrupted_ends_in_the_uninterrupted_ones_bits(tmp_path):
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    kills = counts["times"] + counts["writes"]
    print(f"{len(kills)} kills, {len(counts['writes'])} of them in the middle of a write, "
          f"{len(counts['signals'])} interruptions; every run was gone on with, and ended "
          "bit-identical")
    assert set(kills) == {-signal.SIGKILL}
    assert len(counts["times"]) > 5 and len(counts["writes"]) > 5
    assert set(counts["signals"]) == {130, 143}
    assert any("keeps epoch 1 of 2" in line for line in counts["said"])


# ---- A full disk


def test_write_atomically_on_a_full_disk_leaves_the_last_epoch_and_one_line(tmp_path, monkeypatch,
                                                                            capsys):
    monkeypatch.setattr(shapes, "SIZES", SIZES)
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 6:  # config.json, log.csv and last.pt of one epoch, each with its folder
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as stop:
        command.main(lambda: train.run(scratch(tmp_path, epochs=2)))
    for number, handler in before.items():
        signal.signal(number, handler)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert lines[-1] == f"error: {tmp_path}/run/log.csv: No space left on device"
    assert lines[-2].startswith("scratch resnet8 100/200 |")
    assert set(os.listdir(tmp_path / "run")) == {"config.json", "log.csv", "last.pt"}
    monkeypatch.setattr(os, "fsync", fsync)
    train.run(scratch(tmp_path, epochs=2))
    assert set(os.listdir(tmp_path / "run")) == FILES


# ---- Fuzz: every outcome is success or one line


def archive(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)


def image(size=(8, 8), form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(buffer, form)
    return buffer.getvalue()


def tiny_imagenet():
    top = "tiny-imagenet-200/"
    return [(top + "wnids.txt", "n02\nn01\n"), (top + "words.txt", "n01\tfish\nn02\tlion\n"),
            (top + "train/n01/images/a.JPEG", image(form="JPEG")),
            (top + "train/n02/images/b.JPEG", image()),
            (top + "val/val_annotations.txt", "c.JPEG\tn02\t0\t0\t1\t1\n"),
            (top + "val/images/c.JPEG", image())]


def mutated(content, draw):
    """Bytes with some of them changed, cut, removed, repeated or put elsewhere."""
    content, way = bytearray(content), draw.randrange(6)
    i, j = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    if way == 0:
        del content[i:]
    elif way == 1:
        del content[i : min(j, i + 64)]
    elif way == 2:
        content[i:i] = content[i:j][:4096]
    elif way == 3:
        content[i:i] = draw.randbytes(draw.randrange(1, 64))
    else:
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            place = draw.randrange(len(content))
            content[place] = draw.choice((0, 10, 255, draw.randrange(256)))
    return bytes(content)


def odd(draw):
    """A value that is not expected anywhere."""
    return draw.choice((None, True, -1, 2**70, 1e400, float("nan"), "", "x" * 1000, [], {}, [1],
                        {"a": {}}, "é\0"))


def reshaped(tree, draw):
    """A dict of tensors with one of its entries replaced, removed or renamed."""
    tree = dict(tree)
    name = draw.choice(list(tree))
    value, way = tree.pop(name), draw.randrange(3)
    if way == 0:
        tree["renamed"] = value
    elif way == 1:
        others = [odd(draw)]
        if isinstance(value, torch.Tensor):
            others += [value.flatten(), value[None], value.bool(), value.to(torch.complex64),
                       value.double() * float("nan"), torch.empty(0), value.to_sparse(),
                       torch.empty(3, device="meta")]
        elif isinstance(value, dict) and value:
            others.append(reshaped(value, draw))
        tree[name] = draw.choice(others)
    return tree


@pytest.mark.slow
def test_readers_of_mutated_files_read_or_refuse_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "SIZES", SIZES)
    monkeypatch.setattr(models, "ZOO", {name: models.ZOO[name] for name in ("resnet8", "vgg8")})
    torch.set_num_threads(1)
    draw = random.Random(0)
    tiny_clip(tmp_path / "clip.pt")
    train.run(scratch(tmp_path, out="run"))
    evaluate.evaluate(evaluate.Config(run=("run",), device="cpu", workers=0))
    config_ = train.resolve(scratch(tmp_path, out="run"))
    student = models.build_model("resnet8", 25)
    parts = {"student": student, "optimizer": torch.optim.SGD(student.parameters(), 0.1, 0.9),
             "criterion": train.richkd.RichKD(64, 0, 0, 100, logit_weight=0, feature_weight=0)}
    torch.save(files.read_own("run/student.pt", "")["model"], "legacy.pt",
               _use_new_zipfile_serialization=False)
    header = json.dumps({"__metadata__": {"format": "pt"},
                         "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                         "a.n": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]}}).encode()
    Path("a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    archive("t.zip", tiny_imagenet())
    Path("prompts.txt").write_text("# no\na photo of a {}\nä sketch of a {}\n", encoding="utf-8")
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a in "abcdeé" for b in ("f", "g</w>"))
    Path("bpe.txt").write_text(merges, encoding="utf-8")
    Path("bpe.gz").write_bytes(gzip.compress(merges.encode()))
    key, table = {"split": "train", "classes": ["a", "b"]}, torch.rand(40, 5)

    def cached(path):
        return targets.cached_targets(Path(path), key, (40, 2, 3), lambda start, stop: [
            table[start:stop].split([2, 3], 1)])

    cached("targets-a-b-c.bin")

    def fit_clip(path):
        clip = clip_model.load_clip(path)
        clip_model.class_features(clip, clip_model.Tokenizer(), ["a"], ["{}"])

    def templates(path):
        prompts = [text.replace("{}", "cat") for text in clip_model.load_templates(path)]
        clip_model.Tokenizer()(prompts, 10_000)

    def tokenize(path):
        tokenizer = clip_model.Tokenizer(clip_model.load_merges(path))
        tokenizer.decode(tokenizer.encode("abcdef decafé"))

    def tiny(path):
        return [data.load_dataset("tiny-imagenet", path, split) for split in ("train", "test")]

    def evaluate_run(_):
        evaluate.evaluate(evaluate.Config(run=("run",), device="cpu", workers=0))

    cases = [  # file, how it is read, how often
        ("run/student.pt", lambda path: models.load_weights("resnet8", path, 25), 300),
        ("run/student.pt", evaluate_run, 40),
        ("legacy.pt", lambda path: models.load_weights("resnet8", path), 300),
        ("a.safetensors", checkpoints.read_state_dict, 3000),
        ("run/last.pt", lambda path: runs.restore(Path(path), parts), 300),
        ("clip.pt", fit_clip, 150), ("targets-a-b-c.bin", cached, 300), ("t.zip", tiny, 300),
        ("prompts.txt", templates, 150), ("bpe.txt", tokenize, 150), ("bpe.gz", tokenize, 150),
        ("run/config.json", evaluate_run, 60), ("run/report.json", evaluate_run, 100),
        ("run/config.json", lambda _: train.run(config_), 100),
        ("run/summary.json", lambda _: train.run(config_), 100),
        ("run/report.json", compare.read_reports, 100),
    ]
    counts = {"read": 0, "refused": 0}
    for path, read, times in cases:
        path = Path(path)
        whole = path.read_bytes()
        tree = None
        if path.suffix == ".pt" and read is not evaluate_run:  # as other programs could write it
            tree = torch.load(path, weights_only=True)
        for number in range(times):
            if tree and number % 3 == 0:
                torch.save(reshaped(tree, draw), path)
            else:
                path.write_bytes(mutated(whole, draw))
            try:  # as command.main does, which lets others through
                read(str(path))
                counts["read"] += 1
            except (ValueError, OSError) as error:
                counts["refused"] += 1
                assert str(error) and "\n" not in str(error).strip(), (path, number, str(error))
            except Exception as error:
                raise AssertionError(f"{path}, mutation {number}: {error!r}") from error
        path.write_bytes(whole)
    print(f"{sum(counts.values())} mutated files: {counts}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
