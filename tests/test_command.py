"""command.py: the Python it needs, and whom it joins. Its settings, errors and signals are tested
with the scripts that use them."""

import ast
import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support import command

ROOT = Path(__file__).resolve().parents[1]
OURS = sorted(path.stem for path in ROOT.glob("*.py"))
TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500"}


def python(script, *arguments):
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True,
                          text=True, cwd=ROOT)


# Other Pythons and systems ------------------------------------------------------------------------

OLDER = """
import runpy, sys, torch, torchvision
sys.version_info = (3, 10, 13, "final", 0)
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
finally:
    print(*sys.modules)
"""


@pytest.mark.parametrize("name", ["train.py", "evaluate.py"])
def test_command_refuses_an_older_python_before_anything_that_it_cannot_read(name):
    done = python(OLDER, name)
    assert (done.returncode, done.stderr) == (
        2, "error: this is Python 3.10, expected 3.11 or newer: install requirements.txt for a "
           "newer one and start it with that\n")
    met = {*done.stdout.split()} & {*OURS}
    assert "richkd" not in met  # its annotations need 3.10
    for path in (name, "command.py", *(f"{module}.py" for module in met)):
        ast.parse((ROOT / path).read_text("utf-8"), feature_version=(3, 8))


ELSEWHERE = """
import os, signal, sys, torch, torchvision, torch.utils.data
for name in ("fcntl", "resource", "termios", "pwd", "grp", "readline", "syslog"):
    sys.modules[name] = None
for name in ("fork", "sched_getaffinity", "sysconf", "uname", "getuid", "statvfs", "killpg",
             "register_at_fork", "O_DIRECTORY", "posix_fallocate"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGCHLD", "SIGUSR1", "SIGPIPE", "pthread_sigmask"):
    delattr(signal, name)
import """ + ", ".join(OURS) + """
shapes.SIZES = {"train": 40, "test": 20, "shift": 20}
folder = sys.argv[1]
command.main(lambda: train.run(train.Config(
    method="kd", teacher=("resnet8",), student="resnet8", epochs=1, batch_size=20, device="cpu",
    cache_dir=folder + "/cache", out=folder + "/run")))
"""


def test_main_of_a_system_without_what_posix_alone_has(tmp_path):
    """As on Windows: every module is imported, and a run from the shapes to its summary made."""
    done = python(ELSEWHERE, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()


# Processes ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    device: str = "cpu"


@pytest.fixture
def environment(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(*pair) for pair in values.items()]


@pytest.mark.parametrize("left, said", [
    ("WORLD_SIZE", "WORLD_SIZE set without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: "),
    ("RANK WORLD_SIZE", "RANK, WORLD_SIZE set without LOCAL_RANK, MASTER_ADDR, MASTER_PORT: "),
    ("LOCAL_RANK", "LOCAL_RANK set without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: "),
    ("WORLD_SIZE MASTER_ADDR MASTER_PORT", "WORLD_SIZE set without RANK, LOCAL_RANK: "),
    ("RANK LOCAL_RANK WORLD_SIZE MASTER_PORT",
     "RANK, LOCAL_RANK, WORLD_SIZE set without MASTER_ADDR: "),
    ("MASTER_ADDR MASTER_PORT", None), ("SLURM_PROCID SLURM_NTASKS SLURM_LOCALID", None),
])
def test_join_ranks_without_torchrun(left, said, environment, capsys):
    """What is left over is said once, by any rank that it names, and then there is none."""
    environment(**{name: "3" for name in left.split()})
    for _ in range(2):
        assert command.join_ranks(Config()) == Config()
    rest = "ignored, this is one process; torchrun starts several\n"
    assert capsys.readouterr().err == (said + rest if said else "")
    assert not command.dist.is_initialized()
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & {*os.environ}


def test_join_ranks_as_torchrun_starts_one(environment, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment(**{**TORCHRUN, "MASTER_PORT": str(port)})
    try:
        assert command.join_ranks(Config()) == Config()
        assert command.dist.is_initialized()
        assert (command.rank(), command.world()) == (0, 1)
    finally:
        command.leave_ranks()
    assert capsys.readouterr().err == ""


def test_join_ranks_of_more_processes_than_gpus(environment):
    environment(**{**TORCHRUN, "LOCAL_RANK": "99"})
    with pytest.raises(ValueError, match="^--device cuda:99 cannot be used here: .*"):
        command.join_ranks(Config("cuda"))
