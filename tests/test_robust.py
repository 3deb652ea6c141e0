"""Nothing is lost and nothing is trusted: killed, interrupted and concurrent runs, full disks, hostile and damaged files."""

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import clip_model  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402

SIZES = {"train": 100, "test": 25, "shift": 25}
FILES = {"config.json", "log.csv", "last.pt", "student.pt", "summary.json"}


def tiny_clip(path):
    torch.manual_seed(0)
    torch.save(clip_model.CLIP(32, 32, 1, 64, 16, 64, 514, 64, 1, 1).state_dict(), path)


def config(folder, **changes):
    """RichKD (L+F) of two epochs of five steps below a folder; its teacher is trained there, too."""
    return train.Config(**{**dict(teacher=("resnet8",), student="resnet8", clip=str(folder.parent / "clip.pt"), epochs=2,
                                  batch_size=20, num_negatives=64, cache_dir=str(folder / "cache"),
                                  out=str(folder / "run"), device="cpu"), **changes})


def result(folder):
    """What a run leaves, but for its times: the files' names, tensors, log and accuracies, the teacher's too."""
    out = [sorted(path.name for path in (folder / "cache").iterdir())]
    for run in (folder / "run", *(folder / "cache").glob("teacher-*")):
        last = torch.load(run / "last.pt", weights_only=True)
        student = torch.load(run / "student.pt", weights_only=True)["model"]
        tensors = {**student, **{f"bank {key}": value for key, value in last["criterion"].items()}}
        log = [{key: row[key] for key in row if "second" not in key} for row in last["log"]]
        lines = (run / "log.csv").read_text().splitlines()
        out += [{path.name for path in run.iterdir()}, log, len(lines), last["part"],
                json.loads((run / "summary.json").read_text())["accuracies"],
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
                train.main(lambda: train.run(config(folder)))
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
    data.SHAPES_SIZES = SIZES
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
                time.sleep(draw.uniform(0, 0.8) * seconds / (1 + number))  # what is left takes less time
                os.kill(pid, signal.SIGKILL)
            return wait(pid)
        return attempt

    def killed_while_writing(number):
        return wait(start(folder / "writes", lambda: at_call(os, "fsync", 1 + number, die_in_the_middle)))

    def interrupted(number):
        """At a step, once at the last one of an epoch; outside of training; in the epoch's test."""
        function = [(train.Step, "forward", 3), (train.Step, "forward", 2), (train, "load_targets", 1),
                    (train, "predict", 1), (train.Step, "forward", 4), (train, "accuracies", 1)]
        where = function[number] if number < len(function) else (train, "summarize", 99)
        caught = signal.SIGTERM if number % 2 else signal.SIGINT
        status = wait(start(folder / "signals", lambda: at_call(*where, send(caught))))
        lines = (folder / "signals/stderr").read_text().splitlines()
        if status:
            assert status == 128 + caught and lines[-1].startswith("interrupted"), lines
            assert "the same command goes on" in lines[-1] and not any("Traceback" in line for line in lines)
            counts.setdefault("said", []).append(lines[-1].removeprefix("interrupted"))
        return status

    counts["times"] = sum((attempts(name, killed_after_a_while(name)) for name in ("times0", "times1", "times2")), [])
    counts["writes"] = attempts("writes", killed_while_writing)
    counts["signals"] = attempts("signals", interrupted)
    print(json.dumps(counts))


def test_killed_and_interrupted_runs_end_in_the_uninterrupted_ones_bits(tmp_path):
    done = subprocess.run([sys.executable, __file__, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    kills = counts["times"] + counts["writes"]
    print(f"{len(kills)} kills, {len(counts['writes'])} of them in the middle of a write, {len(counts['signals'])} "
          f"interruptions; every run was gone on with, and ended bit-identical")
    assert set(kills) == {-signal.SIGKILL} and len(counts["times"]) > 5 and len(counts["writes"]) > 5
    assert set(counts["signals"]) == {130, 143}
    assert any("of 100 images" in line for line in counts["said"])  # one went on in the middle of an epoch


if __name__ == "__main__":
    main(Path(sys.argv[1]))
