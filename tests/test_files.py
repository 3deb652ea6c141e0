"""files.py: written whole, downloaded and checked, what a run makes is read back; progress."""

import errno
import hashlib
import http.server
import json
import os
import threading
from pathlib import Path

import pytest
import torch

import files
from files import fetch, read_own, write_atomically

# Writing ------------------------------------------------------------------------------------------


def test_write_atomically(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    write_atomically(str(path), iter([b"second", b"", memoryview(b" and third")]))
    assert path.read_bytes() == b"second and third"
    assert os.listdir(path.parent) == ["file"]


def full_disk():
    yield b"half of the new content"
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted():
    yield b"half of the new content"
    raise KeyboardInterrupt


@pytest.mark.parametrize("data, kind", [(full_disk, OSError), (interrupted, KeyboardInterrupt)])
def test_write_atomically_keeps_the_old_content(tmp_path, data, kind):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(kind) as error:
        write_atomically(path, data())
    if kind is OSError:
        assert str(error.value) == f"[Errno 28] No space left on device: '{path}'"
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_write_atomically_when_the_disk_fails_at_the_end(tmp_path, function, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_save_and_write_json_are_read_by_read_own(tmp_path):
    content = {"model": {"weight": torch.arange(3.0)}, "mean": [0.5], "names": ["é"]}
    files.save(tmp_path / "a.pt", content)
    found = read_own(tmp_path / "a.pt", "-")
    assert torch.equal(found["model"].pop("weight"), torch.arange(3.0))
    assert found == {"model": {}, "mean": [0.5], "names": ["é"]}
    files.write_json(tmp_path / "a.json", {"names": ["é"]})
    assert read_own(tmp_path / "a.json", "-") == {"names": ["é"]}
    by_torch = torch.load(tmp_path / "a.pt", weights_only=True)
    assert by_torch["format"] == files.FORMAT and by_torch["mean"] == [0.5]


def test_read_own_names_another_format(tmp_path):
    for number in (1, 3, None, "2"):
        torch.save({"format": number, "a": 1}, tmp_path / "a.pt")
        (tmp_path / "a.json").write_text(json.dumps({"format": number, "a": 1}))
        for name in ("a.pt", "a.json"):
            with pytest.raises(ValueError, match=f"{name} has format {number}, this version reads"
                                                 f" {files.FORMAT}; train it anew"):
                read_own(tmp_path / name, "train it anew")
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="a.json has format 1, "):
        read_own(tmp_path / "a.json", "-")


@pytest.mark.parametrize("content", [
    b"", b"null", b"3", b"[]", b'"text"', b"[[1, 2, 3]]", b"[" * 100_000, b'{"format": 2', b"\xff",
    b"\xef\xbb\xbf{}"])
def test_read_own_names_a_damaged_file(tmp_path, content):
    for name in ("a.json", "a.pt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            read_own(tmp_path / name, "train it anew")
        assert str(error.value) == f"{tmp_path / name} is damaged; train it anew"


def test_read_own_without_a_file(tmp_path):
    for name in ("a.json", "a.pt"):
        with pytest.raises(FileNotFoundError, match=name):
            read_own(tmp_path / name, "-")


def test_undamaged_lets_other_errors_pass():
    for error in (FileNotFoundError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            with files.undamaged("path", "advice"):
                raise error
    for error in (KeyError("x"), IndexError(), ZeroDivisionError(), RecursionError()):
        with pytest.raises(ValueError, match="^path is damaged; advice$"):
            with files.undamaged("path", "advice"):
                raise error


# Downloads ----------------------------------------------------------------------------------------


CONTENT = bytes(range(256)) * 100
DIGEST = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """/good, /page (another file), /moved (to /good), /half (the connection ends), /chunked (in the
    middle of a chunk, too), /garbage (no HTTP); else 404."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        name = self.path.split("/")[1]
        if name == "garbage":
            self.wfile.write(b"this is no HTTP\r\n\r\n")
        elif name == "moved":
            self.send_response(302)
            self.send_header("Location", "/good/file")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name == "chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"6400\r\n" + CONTENT[:1000])
        elif name in ("good", "half", "page"):
            body = CONTENT if name != "page" else b"<html>Sign in</html>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if name == "half" else body)
        else:
            self.send_error(404)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_asks_once(server, tmp_path):
    path = tmp_path / "deep" / "file"
    assert fetch([f"{server.url}/good/file"], str(path), DIGEST, "-") == path
    assert path.read_bytes() == CONTENT
    for digest in (DIGEST, DIGEST[:15], "md5:" + hashlib.md5(CONTENT).hexdigest()):
        fetch([f"{server.url}/good/file"], path, digest, "-")
    assert server.asked == ["/good/file"] and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("bad", ["missing", "page", "half", "chunked", "garbage", "port", "scheme"])
def test_fetch_goes_on_with_the_next_address(server, bad, tmp_path, capsys):
    first = {"port": "http://127.0.0.1:1/file", "scheme": "nothing://x/file"}
    first = first.get(bad, f"{server.url}/{bad}/file")
    path = fetch([first, f"{server.url}/moved/file"], tmp_path / "file", DIGEST, "-")
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"could not download {first} (") and len(lines) == 2
    assert lines[1].startswith("file 25600/25600 | ")


def test_fetch_names_every_address(server, tmp_path):
    urls = [f"{server.url}/{name}/file" for name in ("missing", "half", "chunked", "page")]
    with pytest.raises(FileNotFoundError) as error:
        fetch(urls, tmp_path / "file", DIGEST, "pass --clip PATH")
    message = str(error.value)
    assert all(url in message for url in urls) and "HTTP Error 404" in message
    assert message.endswith(f"put it at {tmp_path / 'file'}, or pass --clip PATH")
    assert "\n" not in message and not os.listdir(tmp_path)


def test_fetch_leaves_a_file_with_another_digest(server, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"the user's own")
    with pytest.raises(ValueError, match=f"file: sha256 is .*, expected {DIGEST[7:]}; move it away,"
                                         " or pass --bpe PATH"):
        fetch([f"{server.url}/good/file"], path, DIGEST, "pass --bpe PATH")
    assert path.read_bytes() == b"the user's own" and not server.asked


def test_fetch_onto_a_full_disk(server, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileNotFoundError, match="No space left on device"):
        fetch([f"{server.url}/good/file"], tmp_path / "file", DIGEST, "-")
    assert not os.listdir(tmp_path)


def test_file_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 100)
    (tmp_path / "file").write_bytes(CONTENT)
    assert files.file_digest(tmp_path / "file") == DIGEST[7:]
    assert files.file_digest(tmp_path / "file", "md5") == hashlib.md5(CONTENT).hexdigest()


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("RICHKD_CACHE", raising=False)
    assert files.cache_folder() == Path("/home/somebody/.cache/richkd")
    monkeypatch.setenv("RICHKD_CACHE", "~/elsewhere")
    assert files.cache_folder() == Path("/home/somebody/elsewhere")
    assert files.cache_folder("here") == Path("here")


# Progress -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (7.4, "0:07"), (59.7, "1:00"), (3599, "59:59"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert files.duration(seconds) == text


def test_one_line():
    assert files.one_line(ValueError("first\nlast\n")) == "last"
    assert files.one_line(ValueError()) == "ValueError"


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands; `clock[0] += seconds` moves it."""
    now = [1000.0]
    monkeypatch.setattr(files.time, "time", lambda: now[0])
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
        "kd resnet8 200/300 | loss 0.5 | 10 images/s | 0:10 left\n"
        "kd resnet8 300/300 | 10 images/s | 0:20\n")


def test_Progress_on_a_terminal(clock, capsys, monkeypatch):
    """The line rewrites itself, at most five times a second, and does not wrap."""
    monkeypatch.setattr(files.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    progress = files.Progress("x", 100, "steps")
    for done in (10, 20, 30):
        clock[0] += 0.15
        progress.update(done, "a note that is far too long for it")
    clock[0] += 1
    progress.update(100, keep=True)
    err = capsys.readouterr().err
    lines = err.split("\r\033[K")[1:]
    assert [line[:7] for line in lines] == ["x 10/10", "x 30/10", "x 100/1"]
    assert [len(line) for line in lines[:2]] == [29, 29]
    assert lines[-1].endswith("\n") and err.count("\n") == 1
