"""files.py: written whole, read back, downloaded and checked; progress."""

import errno
import hashlib
import json
import os
import pytest
import time
import torch
from helpers import refused, web_server
from pathlib import Path
from support import files
from support.files import fetch, write_atomically

def new(file):
    file.write(b"new")

def fail(*_):
    raise OSError(errno.EIO, "Input/output error")

def half(file):
    file.write(b"half of the new content")
    raise KeyboardInterrupt

@pytest.mark.parametrize("write, function, kind", [
    (fail, None, OSError), (new, "fsync", OSError), (new, "replace", OSError),
    (half, None, KeyboardInterrupt)])
def test_write_atomically_keeps_the_old_content(tmp_path, write, function, kind, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    if function:
        monkeypatch.setattr(os, function, fail)
    with pytest.raises(kind) as error:
        write_atomically(path, write)
    assert kind is KeyboardInterrupt or error.value.filename == str(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]

def test_save_streams(tmp_path, monkeypatch):
    """torch turns the second, a full disk in the middle of a tensor, into a RuntimeError."""
    files.save(tmp_path / "a.pt", {"model": torch.arange(3.0)})
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    before, real = (tmp_path / "a.pt").read_bytes(), open
    monkeypatch.setattr("builtins.open", lambda path, mode: real("/dev/full", "wb"))
    for size in (10, 10**6):
        with pytest.raises(OSError, match="a.pt") as error:
            files.save(tmp_path / "a.pt", {"model": torch.zeros(size)})
        assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert (tmp_path / "a.pt").read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]

def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match="a.json"):
        files.read_json(path, "-")
    files.write_json(path, {"names": ["é"], "mean": [0.5, float("nan"), -float("inf")]})
    json.loads(path.read_text(), parse_constant=pytest.fail)  # as strict readers take it
    assert files.read_json(path, "-") == {"names": ["é"], "mean": [0.5, None, None]}
    whole = path.read_text()
    another_version = json.dumps({**json.loads(whole), "format": files.FORMAT + 1})
    for text in (whole.replace("0.5", "0.6"), another_version, "", "null", "[[1, 2, 3]]", "{}",
                 "[" * 100_000, whole[:20], "\ufeff" + whole):
        path.write_text(text)
        with pytest.raises(files.Damaged, match="a.json .*; train it anew$"):
            files.read_json(path, "train it anew")
    with pytest.raises(KeyboardInterrupt), files.undamaged(path, "-"):
        raise KeyboardInterrupt  # tells nothing of the file

def test_read_text(tmp_path):
    path = tmp_path / "names.txt"
    for content in ("\ufeff# é\r\nb\rc\n".encode(), "# é\nb\nc\n".encode()):
        path.write_bytes(content)
        assert files.read_text(path) == "# é\nb\nc\n"
    for content in ("é\n".encode("latin1"), "é\n".encode("utf-16"), bytes(range(256))):
        path.write_bytes(content)
        assert str(path) in refused(files.read_text, path)

def test_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("RICHKD_CACHE", raising=False)
    assert files.cache_folder() == Path("/home/somebody/.cache/richkd")
    monkeypatch.setenv("RICHKD_CACHE", "~/elsewhere")
    assert files.cache_folder() == Path("/home/somebody/elsewhere")
    assert files.cache_folder("here") == Path("here")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where no home is known
    assert "--cache-dir" in refused(files.cache_folder)

CONTENT = bytes(range(256)) * 100
DIGEST = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
HALF = len(CONTENT) // 2

@pytest.fixture
def server():
    with web_server(CONTENT) as server:
        yield server

def test_fetch_asks_once_or_the_mirror_of_hugging_face(server, tmp_path, monkeypatch):
    path = tmp_path / "deep/file"
    for digest in (DIGEST, DIGEST[:15], "md5:" + hashlib.md5(CONTENT).hexdigest()):
        assert fetch([f"{server.url}/good/file"], str(path), digest, "-") == path
    assert path.read_bytes() == CONTENT
    assert server.asked == ["/good/file"] and os.listdir(path.parent) == ["file"]
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/good/")
    fetch(["https://huggingface.co/a/b"], tmp_path / "file", DIGEST, "-")
    assert server.asked[1:] == ["/good/a/b"]

@pytest.mark.filterwarnings("error")  # of files and sockets left open, too
@pytest.mark.parametrize("kinds, left, asked", [
    *((f"{bad} good", b"", "/good/file") for bad in ("nowhere", "missing", "page", "other")),
    ("half good", b"", f"/good/file bytes={HALF}-"),
    ("all", CONTENT[:HALF], f"/all/file bytes={HALF}-"),  # a server that does not know Range
    ("good good", b"x" * HALF, "/good/file"),             # the beginning of another file
    ("good good", b"x" * 30_000, "/good/file")])          # which is longer
def test_fetch_goes_on_with_the_next_address(kinds, left, asked, server, tmp_path):
    if left:
        (tmp_path / "file.part").write_bytes(left)
    urls = [f"{server.url}/{kind}/file".replace(f"{server.url}/nowhere", "http://127.0.0.1:1")
            for kind in kinds.split()]
    fetch(urls, tmp_path / "file", DIGEST, "-")
    assert (tmp_path / "file").read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]
    assert server.asked[-1] == asked and len(server.asked) == len(urls) - ("nowhere" in kinds)

def test_fetch_goes_on_where_the_connection_ended(server, tmp_path):
    path = tmp_path / "a [1].bin"
    for size in (HALF, HALF + HALF // 2):
        refused(fetch, [f"{server.url}/half/file"], path, DIGEST, "-")
        assert (tmp_path / "a [1].bin.part").read_bytes() == CONTENT[:size]
    refused(fetch, [f"{server.url}/missing/file"], path, DIGEST, "-")  # keeps what came
    fetch([f"{server.url}/good/file"], path, DIGEST, "-")
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert server.asked[1] == f"/half/file bytes={HALF}-"
    assert server.asked[-1] == f"/good/file bytes={HALF + HALF // 2}-"

def test_fetch_beside_another_process(server, tmp_path, monkeypatch):
    """The other one, which began later, has renamed the partial file when this one ends."""
    receive = files.receive
    def late(*arguments):
        receive(*arguments)
        os.replace(tmp_path / "file.part", tmp_path / "file")
    monkeypatch.setattr(files, "receive", late)
    assert fetch([f"{server.url}/good/file"] * 2, tmp_path / "file", DIGEST, "-").is_file()
    assert len(server.asked) == 1

def test_note_once_and_by_rank_0(capsys, monkeypatch):
    for _ in range(2):
        files.note("two\nlines")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "1")
    files.note("another")
    files.Progress("x", 1).update(1, keep=True)
    assert capsys.readouterr().err == "two lines\n"

@pytest.fixture
def clock(monkeypatch):
    """A clock that stands; `clock[0] += seconds` moves it."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now

def test_Progress_in_a_log(clock, capsys):
    """Only the lines to keep; what was done before the start does not count into the rate."""
    progress = files.Progress("kd resnet8", 300, start=100)
    clock[0] += 10
    progress.update(150)
    progress.update(200, "loss 0.5", keep=True)
    clock[0] += 10
    progress.update(300, keep=True)
    assert capsys.readouterr().err == (
        "kd resnet8 200/300 | loss 0.5 | 10 images/s | 0:00:10 left\n"
        "kd resnet8 300/300 | 10 images/s | 0:00:20\n")

def test_Progress_on_a_terminal(clock, capsys, monkeypatch):
    """The line rewrites itself, at most five times a second."""
    monkeypatch.setattr(files.sys.stderr, "isatty", lambda: True, raising=False)
    progress = files.Progress("x", 100, "steps")
    for done in (10, 20, 30):
        clock[0] += 0.15
        progress.update(done, "a note")
    clock[0] += 1
    progress.update(100, keep=True)
    err = capsys.readouterr().err
    lines = err.split("\r\033[K")[1:]
    assert [line[:7] for line in lines] == ["x 10/10", "x 30/10", "x 100/1"]
    assert lines[-1].endswith("\n") and err.count("\n") == 1
    for columns, kept in (("70", "train 55 %"), ("50", "train 55 %"), ("36", "")):
        monkeypatch.setenv("COLUMNS", columns)
        files.Progress("kd resnet8", 300).update(0, "epoch 1/3 | loss 0.5 | train 55 %", keep=True)
        line = capsys.readouterr().err
        assert "kd resnet8 0/300 |" in line and kept in line and line.endswith(" | 0:00:00")
