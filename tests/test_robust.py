"""Nothing is lost, nothing is trusted: killed, interrupted, concurrent runs, full disks, hostile and damaged files."""

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
import evaluate  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402

SIZES = {"train": 100, "test": 25, "shift": 25}
FILES = {"config.json", "log.csv", "last.pt", "student.pt", "summary.json"}


def tiny_clip(path):
    torch.manual_seed(0)
    torch.save(clip_model.CLIP(32, 32, 1, 64, 16, 64, 514, 64, 1, 1).state_dict(), path)


def config(folder, **changes):
    """RichKD (L+F) of two epochs of five steps below a folder; its teacher is trained there, too."""
    return train.Config(**{**dict(teacher=("resnet8",), student="resnet8", clip=str(folder.parent / "clip.pt"),
                                  epochs=2, batch_size=20, num_negatives=64, cache_dir=str(folder / "cache"),
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


# ---- Two processes at once

HOLD = ("import fcntl, os, sys, time\nfile = open(sys.argv[1], 'a+')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print(os.getpid(), end='', file=file, flush=True)\nprint(flush=True)\ntime.sleep(float(sys.argv[2]))\n")


@contextlib.contextmanager
def holding(path, seconds):
    """Another process that has a lock file for a while."""
    path.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", HOLD, path, str(seconds)], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def scratch(folder, **changes):
    return config(folder, **{**dict(method="scratch", epochs=1), **changes})


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(data, "SHAPES_SIZES", SIZES)


def test_a_second_process_in_a_run_folder_is_refused_and_a_killed_ones_lock_is_not(tmp_path, few_shapes):
    lock = tmp_path / "run/.lock"
    with holding(lock, 100) as process:
        for changes in ({}, {"overwrite": True}):
            with pytest.raises(ValueError, match=f"run is in use by process {process.pid}; wait until that ends"):
                train.run(scratch(tmp_path, **changes))
            assert os.listdir(tmp_path / "run") == [".lock"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        train.run(scratch(tmp_path))
    assert set(os.listdir(tmp_path / "run")) == FILES


def test_a_lock_is_waited_for_where_told_so(tmp_path, capsys):
    path = tmp_path / ".lock"
    with holding(path, 0.5) as process:
        data.lock(path, lambda file: f"process {file.read().decode()} has it").close()
        assert process.wait(1) == 0
    assert capsys.readouterr().err == f"process {process.pid} has it: waiting for it\n"


def slow_rows(start):
    for i in range(start, 6):
        time.sleep(0.05)
        yield torch.full((1, 2), float(i)), torch.full((1, 3), float(os.getpid()) % 1000)


def make_targets(path, queue):
    cosines, features = data.cached_targets(path, {}, (6, 2, 3), slow_rows)
    queue.put((cosines[:, 0].tolist(), features[:, 0].tolist()))


def test_two_processes_make_one_file_of_targets(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=make_targets, args=(tmp_path / "t.bin", queue)) for _ in range(2)]
    for process in processes:
        process.start()
    (cosines, makers), other = queue.get(timeout=20), queue.get(timeout=20)
    for process in processes:
        process.join()
    assert other == (cosines, makers) and cosines == [0, 1, 2, 3, 4, 5] and len(set(makers)) == 1
    assert os.listdir(tmp_path) == ["t.bin"]


# ---- A full disk


def test_a_full_disk_leaves_the_last_good_checkpoint_and_one_line(tmp_path, few_shapes, monkeypatch, capsys):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 6:  # config.json, log.csv and last.pt of the first epoch, each with its folder
            raise OSError(28, "No space left on device")
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", full)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as stop:
        train.main(lambda: train.run(scratch(tmp_path, epochs=2)))
    for number, handler in before.items():
        signal.signal(number, handler)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: [Errno 28] No space left on device: '")
    assert lines[-1].endswith("run/log.csv'") and len(lines) == 2  # the other one is the first epoch's
    assert set(os.listdir(tmp_path / "run")) == {"config.json", "log.csv", "last.pt"}
    monkeypatch.setattr(os, "fsync", fsync)
    train.run(scratch(tmp_path, epochs=2))
    assert set(os.listdir(tmp_path / "run")) == FILES


# ---- Hostile files


class Evil:
    """A pickle that makes a file when it is loaded as pickles are."""
    def __reduce__(self):
        return open, ("executed", "w")


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
            (top + "train/n01/images/a.JPEG", image(form="JPEG")), (top + "train/n02/images/b.JPEG", image()),
            (top + "val/val_annotations.txt", "c.JPEG\tn02\t0\t0\t1\t1\n"), (top + "val/images/c.JPEG", image())]


def refused(call, *arguments, **named):
    """The one line by which a call refuses its file; `executed` must not have come to be."""
    with warnings.catch_warnings(record=True) as warned, pytest.raises((ValueError, OSError)) as error:
        warnings.simplefilter("always")
        call(*arguments, **named)
    assert not warned and "\n" not in str(error.value) and not os.path.exists("executed")
    return str(error.value)


def test_pickles_are_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pt"
    for content in (Evil(), {"model": Evil()}, {"fc.weight": torch.zeros(2, 64), "x": Evil()}):
        for write in (lambda: torch.save(content, path), lambda: path.write_bytes(pickle.dumps(content)),
                      lambda: torch.save(content, path, _use_new_zipfile_serialization=False)):
            write()
            for load in (lambda: models.load_weights("resnet8", path), lambda: clip_model.load_clip(path),
                         lambda: train.read_checkpoint(path), lambda: train.restore(path, {})):
                assert str(path) in refused(load)


@pytest.mark.parametrize("name, content, message", [
    ("../outside.txt", b"x", "'../outside.txt' leads out of it"),
    ("/outside.txt", b"x", "'/outside.txt' leads out of it"),
    ("tiny-imagenet-200/train/n01/images/../../../../x.JPEG", b"x", "leads out of it"),
    ("tiny-imagenet-200/train/n01/images/bomb.JPEG", bytes(data.MAX_ENTRY + 1), "unpacks to 33554433 bytes"),
    ("tiny-imagenet-200/train/n01/images/z.JPEG", b"no image", "z.JPEG is not a readable image"),
    ("tiny-imagenet-200/train/n09/images/z.JPEG", b"no image", "no complete Tiny-ImageNet"),
])
def test_hostile_archives(tmp_path, name, content, message):
    archive(tmp_path / "t.zip", [*tiny_imagenet(), (name, content)])
    assert message in refused(data.load_dataset, "tiny-imagenet", tmp_path / "t.zip", "train")
    assert os.listdir(tmp_path) == ["t.zip"]


def test_an_archive_with_a_link(tmp_path):
    link = zipfile.ZipInfo("tiny-imagenet-200/train/n01/images/z.JPEG")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive(tmp_path / "t.zip", [*tiny_imagenet(), (link, "/etc/passwd")])
    assert "is a link" in refused(data.load_dataset, "tiny-imagenet", tmp_path / "t.zip", "train")


@pytest.mark.parametrize("content", [b"", b"no image", image()[:45], image((11000, 9000)), image((20000, 10000))],
                         ids=["empty", "text", "cut", "huge", "bomb"])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_none_or_huge_are_named_from_the_loaders_workers_too(tmp_path, content, workers):
    for i in range(4):
        path = tmp_path / "train/n01" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image())
    path.write_bytes(content)
    split = data.load_dataset("imagenet", tmp_path, "train")
    message = refused(lambda: list(data.batches(split, 2, seed=0, workers=workers)))
    assert message.startswith(f"{path} is not a readable image (")


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("content", ["", "null", "3", "[]", "{}", '{"settings": 3}', '{"accuracies": []}', DEEP,
                                     '{"accuracies": {"student": 3}}', "\ufeff{}"])
def test_json_of_another_shape(tmp_path, name, content, few_shapes):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"settings": train.settings(train.resolve(scratch(tmp_path)))}))
    (run / "summary.json").write_text('{"accuracies": {}}')
    (run / name).write_text(content)
    assert f"{name} is damaged; --overwrite" in refused(train.run, scratch(tmp_path))


# ---- Fuzz: every outcome is success or one line


def mutated(content, draw):
    """Bytes with some of them changed, cut, removed, repeated or put elsewhere."""
    content, way = bytearray(content), draw.randrange(6)
    i, j = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    if way == 0:
        del content[i:]
    elif way == 1:
        del content[i:min(j, i + 64)]
    elif way == 2:
        content[i:i] = content[i:j][:4096]
    elif way == 3:
        content[i:i] = draw.randbytes(draw.randrange(1, 64))
    else:
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            content[draw.randrange(len(content))] = draw.choice((0, 10, 255, draw.randrange(256)))
    return bytes(content)


def odd(draw):
    """A value that is not expected anywhere."""
    return draw.choice((None, True, -1, 2**70, 1e400, float("nan"), "", "x" * 1000, [], {}, [1], {"a": {}}, "é\0"))


def reshaped(value, draw):
    """A tree of dicts and lists with one branch replaced, removed or renamed."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.2:
        return odd(draw)
    value = dict(value) if isinstance(value, dict) else list(value)
    key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
    way = draw.random()
    if way < 0.2:
        del value[key]
    elif way < 0.3 and isinstance(value, dict):
        value["renamed"] = value.pop(key)
    elif isinstance(value[key], torch.Tensor):
        tensor = value[key]
        value[key] = draw.choice((odd(draw), tensor.flatten(), tensor[None], tensor.bool(), tensor.to(torch.complex64),
                                  tensor.double() * float("nan"), torch.empty(0), tensor.to_sparse(),
                                  torch.empty(3, device="meta")))
    else:
        value[key] = reshaped(value[key], draw)
    return value


def test_fuzz(tmp_path, few_shapes, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    monkeypatch.setattr(models, "ZOO", {name: models.ZOO[name] for name in ("resnet8", "resnet14", "vgg8")})
    draw = random.Random(0)
    tiny_clip(tmp_path / "clip.pt")
    train.run(scratch(tmp_path, out="run"))
    capsys.readouterr()
    student = models.build_model("resnet8", 25)
    parts = {"student": student, "criterion": train.richkd.RichKD(64, 0, 0, 100, logit_weight=0, feature_weight=0),
             "optimizer": torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)}
    archive("t.zip", tiny_imagenet())
    Path("prompts.txt").write_text("# comment\na photo of a {}\nä sketch of a {}\n", encoding="utf-8")
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a in "abcdeé" for b in ("f", "g</w>", "Ġ"))
    Path("bpe.txt").write_text(merges, encoding="utf-8")
    Path("bpe.gz").write_bytes(gzip.compress(merges.encode()))
    key, rows = {"split": "train", "classes": ["a", "b"]}, torch.rand(40, 5)

    def targets(path):
        return data.cached_targets(Path(path), key, (40, 2, 3), lambda start: [rows[start:].split([2, 3], 1)])

    targets("targets.bin")
    part = Path("targets.bin").read_bytes()[:4096 + 10 * 17]
    Path("targets.part").write_bytes(part)
    weights = torch.load("run/student.pt", weights_only=True)
    torch.save(weights["model"], "legacy.pt", _use_new_zipfile_serialization=False)
    config_ = train.resolve(scratch(tmp_path, out="run"))

    def fit_clip(path):
        clip = clip_model.load_clip(path)
        clip_model.class_features(clip, clip_model.Tokenizer(), ["a"], ["{}"])

    def continue_targets(path):
        Path("other.bin").unlink(missing_ok=True)
        os.rename(path, "other.bin.part")
        cosines, _ = targets("other.bin")

    def templates(path):
        clip_model.Tokenizer()([t.replace("{}", "cat") for t in clip_model.load_templates(path)], 10_000)

    def tokenize(path):
        tokenizer = clip_model.Tokenizer(clip_model.load_merges(path))
        tokenizer.decode(tokenizer.encode("abcdef decafé"))

    def evaluate_run(_):
        evaluate.evaluate(evaluate.Config(run=("run",), shift=("shift",), device="cpu", workers=0,
                                          cache_dir=config_.cache_dir))

    def compare_reports(path):
        reports = evaluate.read_reports(path)
        evaluate.comparison(evaluate.compare(reports))

    folders = ["red circle", "blue star", "white ring"]
    for folder in folders:
        Path("shift", folder).mkdir(parents=True)
        Path("shift", folder, "a.png").write_bytes(image((32, 32)))
    Path("shift/classes.json").write_text(json.dumps({folder: "green heart" for folder in folders}))
    evaluate_run(None)
    report = json.loads(Path("run/report.json").read_text())
    report["corruptions"] = {"source": "generated", "folder": None, "top1": {"fog": [9.0, 8.0], "snow": [5.0] * 5}}
    Path("run/report.json").write_text(json.dumps(report))
    Path("reports.json").write_text(json.dumps([report, {**report, "of": {**report["of"], "seed": 1}}]))

    cases = {  # file: how it is read, how often
        "run/student.pt": (lambda path: models.load_weights("resnet8", path, 25), 500),
        "legacy.pt": (lambda path: models.load_weights("resnet8", path), 300),
        "run/last.pt": (lambda path: train.restore(path, parts), 500), "clip.pt": (fit_clip, 200),
        "targets.bin": (targets, 400), "targets.part": (continue_targets, 200),
        "t.zip": (lambda path: [data.load_dataset("tiny-imagenet", path, split) for split in ("train", "test")], 500),
        "prompts.txt": (templates, 200), "bpe.txt": (tokenize, 200), "bpe.gz": (tokenize, 200),
        "run/config.json": (lambda _: train.run(config_), 150), "run/summary.json": (lambda _: train.run(config_), 150),
        "run/report.json": (evaluate_run, 150), "reports.json": (compare_reports, 300),
        "shift/classes.json": (evaluate_run, 60)}
    cases |= {f"{path} ": (evaluate_run, 60) for path in ("run/config.json", "run/summary.json", "run/student.pt")}
    counts = {"read": 0, "refused": 0}
    for path, (read, times) in cases.items():
        path, in_place = path.strip(), path.endswith(" ") or path.endswith("json")
        whole = Path(path).read_bytes()
        tree = json.loads(whole) if path.endswith("json") else None
        tree = torch.load(path, weights_only=True) if path.endswith(".pt") else tree
        target = path if in_place else "mutated"
        for number in range(times):
            if tree is None or number % 3:
                Path(target).write_bytes(mutated(whole, draw))
            elif path.endswith("json"):
                Path(target).write_text(json.dumps(reshaped(tree, draw)))
            else:
                torch.save(reshaped(tree, draw), target)
            try:  # as train.main does, which lets others through
                read(target)
                counts["read"] += 1
            except (ValueError, OSError) as error:
                counts["refused"] += 1
                assert str(error) and "\n" not in str(error).strip(), (path, number, str(error))
            except Exception as error:
                raise AssertionError(f"{path}, mutation {number}: {type(error).__name__}") from error
        Path(path).write_bytes(whole)
    print(f"{sum(counts.values())} mutated files: {counts}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
