"""command.py: the Python it needs, what it refuses, whom it joins, what it makes of a signal."""

import ast
import dataclasses
import evaluate
import io
import json
import numpy as np
import os
import pytest
import signal
import socket
import sys
import threading
import torch
import train
from helpers import ROOT, class_folders, python, script, small
from pathlib import Path
from support import command, files
from unittest.mock import Mock

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500"}

OLDER = """
import runpy, sys, torch, torchvision
sys.version_info = (3, 10, 13, "final", 0)
runpy.run_path("train.py", run_name="__main__")
"""

@pytest.mark.slow
def test_command_refuses_an_older_python_before_anything_that_it_cannot_read():
    done = python("-c", OLDER, cwd=ROOT)
    assert done.returncode == 2 and "3.11" in done.stderr and done.stderr.count("\n") == 1
    ast.parse((ROOT / "support/command.py").read_text("utf-8"), feature_version=(3, 8))

ELSEWHERE = """
import os, signal, sys, torch, torchvision, torch.utils.data
for name in ("fcntl", "resource", "termios", "pwd", "grp", "readline", "syslog"):
    sys.modules[name] = None
for name in ("fork", "sched_getaffinity", "sysconf", "uname", "getuid", "statvfs", "killpg",
             "register_at_fork", "O_DIRECTORY", "posix_fallocate"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGUSR1", "SIGPIPE", "pthread_sigmask"):
    delattr(signal, name)
import evaluate, train
from support import command, shapes
shapes.SIZES = {"train": 40, "test": 20, "shift": 20}
folder = sys.argv[1]
command.main(lambda: train.run(train.Config(
    method="kd", teacher=("resnet8",), student="resnet8", epochs=1, batch_size=20, device="cpu",
    cache_dir=folder + "/cache", out=folder + "/run")))
"""

@pytest.mark.slow
def test_main_of_a_system_without_what_posix_alone_has(tmp_path):
    """As on Windows: every module is imported, and a run from the shapes to its summary made."""
    done = python("-c", ELSEWHERE, tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()

@pytest.mark.slow
def test_parse_gives_help_without_a_home():
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("HOME", "RICHKD_CACHE")}
    code = ("import os.path\nos.path.expanduser = lambda path: path\nimport evaluate, train\n"
            "from support import command\ncommand.parse(train.Config, '', ['--help'])\n")
    done = python("-c", code, env=environment, cwd=ROOT)
    assert done.returncode == 0 and "--cache-dir" in done.stdout, done.stderr

@pytest.mark.parametrize("config", [train.Config, evaluate.Config])
def test_parse_lists_every_flag_with_choices_and_defaults(config, capsys):
    with pytest.raises(SystemExit):
        command.parse(config, "", ["--help"])
    text = capsys.readouterr().out
    assert all(command.flag(field.name) in text for field in dataclasses.fields(config))
    assert "{shapes,cifar10," in text

@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

NO_MEMORY = [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"),
    RuntimeError("unable to write to file </torch_7>: No space left on device (28)")]

@pytest.mark.parametrize("job, status, named", [
    *((lambda flags=flags: train.run(command.parse(train.Config, "", flags.split())), 2, flags[:7])
      for flags in ("--dataset mnist", "--alpha 1.5", "--epochs many", "--epoch 3")),
    *((lambda number=number: os.kill(os.getpid(), number), 128 + number, "")
      for number in (signal.SIGINT, signal.SIGTERM)),
    *((Mock(side_effect=error), 1, "--batch-size, fewer --workers") for error in NO_MEMORY)])
def test_main_says_it_in_one_line_and_exits(job, status, named, tmp_path, monkeypatch, capsys,
                                            handlers):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(job)
    out, err = capsys.readouterr()
    assert stopped.value.code == status and out == "" and named in err and err.count("\n") == 1
    assert err.startswith("interrupted" if status > 2 else "error: ")

def test_main_in_a_thread_prints_to_any_stream(monkeypatch, handlers):
    """Where no signals can be handled. A stream that lacks a character, none, another program's; at
    last, in the main thread, one that nobody reads any longer."""
    monkeypatch.setattr(sys, "stderr", None)
    for out in (io.TextIOWrapper(io.BytesIO(), encoding="cp1252"), None, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", out)
        job = (lambda: files.say("said") or "höhe ≤ 3",)
        thread = threading.Thread(target=command.main, args=job)
        thread.start()
        thread.join()
        if hasattr(out, "buffer"):
            assert out.buffer.getvalue().decode("cp1252").split() == ["höhe", "\\u2264", "3"]
    assert out.getvalue() == "höhe ≤ 3\n"
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    with pytest.raises(SystemExit) as stopped:
        command.main(lambda: "done")
    assert stopped.value.code == 141

LOSES_A_WORKER = """
import multiprocessing, os, sys, time, train
from support import command
step, arguments = train.train_step, {arguments}
def killing(run, drawn):
    os.kill(multiprocessing.active_children()[0].pid, 9)
    time.sleep(1)
    return step(run, drawn)
train.train_step = killing
command.main(lambda: train.run(train.Config(**arguments)))
"""

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers that are forked")
def test_main_ends_where_a_worker_was_killed(tmp_path):
    class_folders(tmp_path / "a", n=20)
    arguments = vars(small(tmp_path, method="scratch", workers=2))
    code = script(tmp_path / "kill.py", LOSES_A_WORKER.format(arguments=arguments))
    done = python(code, timeout=60)
    assert done.returncode == 1 and "--workers" in done.stderr.splitlines()[-1], done.stderr

@dataclasses.dataclass(frozen=True)
class Config:
    device: torch.device = torch.device("cpu")
    deterministic: bool = False

@pytest.fixture
def environment(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(*pair) for pair in values.items()]

@pytest.mark.parametrize("left", [
    "WORLD_SIZE", "RANK LOCAL_RANK WORLD_SIZE MASTER_PORT", "SLURM_PROCID SLURM_LOCALID"])
def test_join_ranks_without_torchrun(left, environment):
    """What is left over in a shell starts nothing."""
    environment(**{name: "3" for name in left.split()})
    assert command.join_ranks(Config()) == Config() and not command.dist.is_initialized()

def test_normalize_takes_what_python_users_write(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = train.Config(data_dir=Path("~/data"), teacher="resnet8", teacher_weights=["~/t.pt"],
                          epochs=np.int64(3), alpha=1, lr=np.float64(0.1), out="~/x")
    assert (config.data_dir, config.out) == ("/home/me/data", "/home/me/x")
    assert (config.teacher, config.teacher_weights) == (("resnet8",), ("/home/me/t.pt",))
    assert json.dumps([config.epochs, config.alpha, config.lr]) == "[3, 1.0, 0.1]"
    for name, value in (("epochs", "3"), ("epochs", 2.5), ("lr", float("nan")), ("amp", "no")):
        with pytest.raises(ValueError, match=command.flag(name)):
            command.check(train.Config(**{name: value}))

def test_join_ranks_as_torchrun_starts_one(environment, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment(**{**TORCHRUN, "MASTER_PORT": str(port)})
    try:
        assert command.join_ranks(Config()) == Config()
        assert (command.rank(), command.world()) == (0, 1)
    finally:
        command.dist.destroy_process_group()
    assert capsys.readouterr().err == ""

def test_join_ranks_of_more_processes_than_gpus(environment):
    environment(**{**TORCHRUN, "LOCAL_RANK": "99"})
    with pytest.raises(ValueError, match="--device cuda:99"):
        command.join_ranks(Config(torch.device("cuda")))
