"""Nothing is lost, nothing is trusted: runs that are killed and interrupted, full disks, and files
of every kind with bytes changed. The long ones are slow: python -m pytest -m slow."""

import clip_model
import contextlib
import errno
import json
import models
import os
import pytest
import random
import shutil
import signal
import stat
import sys
import time
import torch
import train
from helpers import BYTES_CLIP, ROOT, python, safetensors
from pathlib import Path
from support import checkpoints, command, files, runs, shapes

SIZES = {"train": 100, "test": 25, "shift": 25}

def config(folder, **changes):
    """RichKD (L+F), two epochs of five steps, below a folder; its teacher is trained there, too."""
    return train.Config(**{**dict(
        teacher=("resnet8",), student="resnet8", clip=str(folder.parent / "clip.pt"), epochs=2,
        batch_size=20, lr=0.05, num_negatives=64, cache_dir=str(folder / "cache"),
        out=str(folder / "run"), device="cpu"), **changes})

def visible(folder):
    """The files in a folder, but for what a process was writing when it was killed."""
    return sorted(name for name in os.listdir(folder) if name[0] != ".")

def result(folder):
    """What a run leaves, but for its times: files, tensors, log, accuracies; the teacher's too."""
    out = [visible(folder / "cache")]
    for run in (folder / "run", *sorted((folder / "cache").glob("teacher-*"))):
        last = checkpoints.read_own(run / "last.pt", "")
        tensors = {**checkpoints.read_own(run / "student.pt", "")["model"], **last["criterion"]}
        log = [{key: row[key] for key in row if "second" not in key} for row in last["log"]]
        lines = (run / "log.csv").read_text().splitlines()
        accuracies = files.read_json(run / "summary.json", "")["accuracies"]
        out += [visible(run), log, len(lines), accuracies,
                {key: value.contiguous().numpy().tobytes() for key, value in tensors.items()}]
    return out

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

def main(folder):
    torch.set_num_threads(1)
    shapes.SIZES = SIZES
    draw, counts = random.Random(0), {}
    torch.manual_seed(0)
    files.save(folder / "clip.pt", {"model": clip_model.CLIP(*BYTES_CLIP).state_dict()})
    for name in ("whole", "times", "writes", "signals"):
        (folder / name).mkdir()
    began = time.time()
    assert wait(start(folder / "whole")) == 0, (folder / "whole/stderr").read_text()
    seconds, whole = time.time() - began, result(folder / "whole")
    def after_a_while(number):
        pid = start(folder / "times")
        if number < 5:  # what is left takes less and less time
            time.sleep(draw.uniform(0, 0.8) * seconds / (1 + number))
            os.kill(pid, signal.SIGKILL)
        return wait(pid)
    def while_writing(number):
        return wait(start(folder / "writes", lambda: at_call(os, "fsync", 1 + number,
                                                             die_in_the_middle)))
    def by_a_signal(number):
        """At a step, at the last one of an epoch; outside of training; in the epoch's test."""
        function = [(train, "train_step", 3), (train, "train_step", 7), (train, "clip_targets", 1),
                    (train, "predict", 1), (train, "train_step", 5), (train, "accuracies", 2)]
        where = function[number] if number < len(function) else (train, "accuracies", 99)
        caught = signal.SIGTERM if number % 2 else signal.SIGINT
        status = wait(start(folder / "signals", lambda: at_call(
            *where, lambda *_: os.kill(os.getpid(), caught))))
        lines = (folder / "signals/stderr").read_text().splitlines()
        if status:
            assert status == 128 + caught and lines[-1].startswith("interrupted"), lines
            assert not any("Traceback" in line for line in lines)
        return status
    for name, attempt in (("times", after_a_while), ("writes", while_writing),
                          ("signals", by_a_signal)):
        counts[name] = []
        while (status := attempt(len(counts[name]))) != 0:
            counts[name].append(status)
            assert len(counts[name]) < 100
        assert result(folder / name) == whole, name
    print(json.dumps(counts))

@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_run_killed_and_interrupted_ends_in_the_uninterrupted_ones_bits(tmp_path):
    done = python(__file__, tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert {*counts["times"], *counts["writes"]} == {-signal.SIGKILL}
    assert len(counts["times"]) > 3 and len(counts["writes"]) > 5
    assert {*counts["signals"]} == {130, 143}

def test_write_atomically_on_a_full_disk_leaves_the_last_epoch(clip_file, tmp_path, monkeypatch):
    """From which the same command goes on, to the bits of the uninterrupted run."""
    monkeypatch.setattr(shapes, "SIZES", SIZES)
    asked, calls = config(tmp_path, clip=clip_file), []
    train.run(asked)
    whole = result(tmp_path)
    shutil.rmtree(tmp_path / "run")
    def full(descriptor):
        calls.append(1)
        if len(calls) > 3:  # config.json, log.csv and last.pt of one epoch
            raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(os, "fsync", full)
        train.run(asked)
    assert error.value.filename == f"{tmp_path}/run/log.csv"
    assert {*os.listdir(tmp_path / "run")} == {"config.json", "log.csv", "last.pt"}
    begun = os.stat(tmp_path / "run/config.json").st_mtime_ns
    train.run(asked)
    assert result(tmp_path) == whole
    assert os.stat(tmp_path / "run/config.json").st_mtime_ns == begun

def mutated(content, draw):
    """Bytes with some of them changed, cut, removed, repeated or put elsewhere."""
    content, way = bytearray(content), draw.randrange(6)
    i, j = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    if way == 0:
        del content[i:]
    elif way == 1:
        del content[i : min(j, i + 64)]
    elif way < 4:
        content[i:i] = content[i:j][:4096] if way == 2 else draw.randbytes(draw.randrange(1, 64))
    else:
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            content[draw.randrange(len(content))] = draw.choice((0, 10, 255, draw.randrange(256)))
    return bytes(content)

@pytest.mark.slow
def test_readers_of_mutated_files_read_or_refuse_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "SIZES", SIZES)
    torch.set_num_threads(1)
    draw = random.Random(0)
    files.save("clip.pt", {"model": clip_model.CLIP(*BYTES_CLIP).state_dict()})
    scratch = config(tmp_path, method="scratch", epochs=1, out="run")
    train.run(scratch)
    student = models.build_model("resnet8", 25)
    parts = {"student": student, "optimizer": torch.optim.SGD(student.parameters(), 0.1, 0.9),
             "criterion": train.richkd.RichKD(64, 0, 0, 100, logit_weight=0, feature_weight=0)}
    torch.save(checkpoints.read_own("run/student.pt", "")["model"], "legacy.pt",
               _use_new_zipfile_serialization=False)
    own = checkpoints.read_own("run/last.pt", "")["run"]
    tensors = {"a.weight": torch.zeros(2, 3), "a.n": torch.tensor(0)}
    Path("a.safetensors").write_bytes(safetensors(tensors))
    Path("prompts.txt").write_text("# no\na photo of a {}\nä sketch of a {}\n", encoding="utf-8")
    Path("bpe.txt").write_text("#version: 0.2\na b\nc d</w>\né f\n", encoding="utf-8")
    runs.cached("cached", {"a": 1}, lambda: torch.rand(40, 5))
    [cached] = Path().glob("cached-*")
    cases = [  # file, how it is read, how often
        ("run/student.pt", lambda path: models.load_weights("resnet8", path, 25), 200),
        ("legacy.pt", lambda path: models.load_weights("resnet8", path), 200),
        ("a.safetensors", checkpoints.read_state_dict, 1000),
        ("run/last.pt", lambda path: runs.restore(Path(path), parts, own), 200),
        ("clip.pt", clip_model.load_clip, 100),
        (cached, lambda path: runs.cached("cached", {"a": 1}, lambda: torch.rand(40, 5)), 200),
        ("prompts.txt", clip_model.load_templates, 100),
        ("bpe.txt", lambda path: clip_model.Tokenizer(clip_model.load_merges(path)), 100),
        ("run/config.json", lambda _: train.run(scratch), 50),
        ("run/summary.json", lambda _: train.run(scratch), 50)]
    for path, read, times in cases:
        path = Path(path)
        whole = path.read_bytes()
        for number in range(times):
            path.write_bytes(mutated(whole, draw))
            try:
                read(str(path))
            except (ValueError, OSError) as error:  # which command.main says in one line
                assert str(error) and "\n" not in str(error).strip(), (path, number, str(error))
        path.write_bytes(whole)

if __name__ == "__main__":
    main(Path(sys.argv[1]))
