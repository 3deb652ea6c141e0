"""files.py: written whole, downloaded and checked, what a run makes is read back; progress."""

import errno
import hashlib
import http.client
import http.server
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from support import files
from support.files import fetch, read_own, write_atomically

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


def test_read_text(tmp_path):
    path = tmp_path / "names.txt"
    for content in ("\ufeff# é\r\nb\rc\n".encode(), "# é\nb\nc\n".encode()):
        path.write_bytes(content)
        assert files.read_text(path) == "# é\nb\nc\n"
    for content in ("é\n".encode("latin1"), "é\n".encode("utf-16"), bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            files.read_text(path)
        assert str(error.value) == f"{path}: expected text in UTF-8; save it as that"


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


BODIES = {**dict.fromkeys(("good", "half", "halves", "ranges", "all", "elsewhere"), CONTENT),
          "page": b"\n<!DOCTYPE html><html>Sign in</html>", "empty": b"", "other": CONTENT[::-1]}
HALF = len(CONTENT) // 2


class Handler(http.server.BaseHTTPRequestHandler):
    """/good, /other (another file), /page, /moved (to /good), /half (the connection ends), /chunked
    (in the middle of a chunk, too), /chunks (of unknown size), /empty, /silent (nothing at all),
    /garbage (no HTTP), /ranges (goes on where it is asked to), /halves (likewise, but ends),
    /elsewhere (sends another part than was asked for), /all (answers 200 to any); else 404."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(self.path + (f" {asked}" if asked else ""))
        name = self.path.split("/")[1]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if name == "garbage":
            self.wfile.write(b"this is no HTTP\r\n\r\n")
        elif name == "silent":
            pass
        elif asked and name in ("ranges", "halves", "elsewhere"):
            self.partial(name, start)
        elif name == "moved":
            self.send_response(302)
            self.send_header("Location", "/good/file")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif name in ("chunked", "chunks"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            whole = CONTENT + b"\r\n0\r\n\r\n"
            self.wfile.write(b"6400\r\n" + (whole if name == "chunks" else CONTENT[:1000]))
        elif name in BODIES:
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODIES[name])))
            self.end_headers()
            cut = name in ("half", "halves")
            self.wfile.write(BODIES[name][: len(CONTENT) // 2] if cut else BODIES[name])
        else:
            self.send_error(404)
        self.close_connection = True

    def partial(self, name, start):
        if start >= len(CONTENT):
            self.send_error(416)
            return
        start = 0 if name == "elsewhere" else start
        body = CONTENT[start:]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if name == "halves" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands; `clock[0] += seconds` moves it."""
    now = [1000.0]
    monkeypatch.setattr(files.time, "time", lambda: now[0])
    return now


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


REASONS = {"missing": "HTTP Error 404: Not Found", "page": "a web page came", "other": "sha256 of ",
           "half": "the connection ended at 12800 of 25600 bytes", "chunked": "IncompleteRead(",
           "empty": "nothing came", "silent": "Remote end closed connection without response",
           "garbage": "this is no HTTP", "port": "<urlopen error [Errno 111]", "scheme": "<urlopen"}


@pytest.mark.filterwarnings("error")  # of files and sockets left open, too
@pytest.mark.parametrize("bad", REASONS)
def test_fetch_goes_on_with_the_next_address(server, bad, tmp_path, capsys):
    first = {"port": "http://127.0.0.1:1/file", "scheme": "nothing://x/file"}
    first = first.get(bad, f"{server.url}/{bad}/file")
    path = fetch([first, f"{server.url}/moved/file"], tmp_path / "file", DIGEST, "-")
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]
    lines = capsys.readouterr().err.splitlines()
    began = bad in ("other", "half")
    assert lines.pop(0) == f"downloading file (0.0 MB) from {first}" if began else True
    said, *lines = [line for line in lines if not line.startswith("file ")]
    assert said.startswith(f"could not download {first} ({REASONS[bad]}")
    assert lines == [f"downloading file (0.0 MB) from {server.url}/moved/file"]


def test_fetch_of_an_unknown_size(server, tmp_path, capsys):
    fetch([f"{server.url}/chunks/file"], tmp_path / "file", DIGEST, "-")
    assert (tmp_path / "file").read_bytes() == CONTENT
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"downloading file from {server.url}/chunks/file"
    assert lines[1].startswith("file 0.0/0.0 | ") and len(lines) == 2


def test_fetch_names_every_address(server, tmp_path):
    urls = [f"{server.url}/{name}/file" for name in ("missing", "empty", "page", "other")]
    with pytest.raises(FileNotFoundError) as error:
        fetch(urls, tmp_path / "file", DIGEST, "pass --clip PATH")
    message = str(error.value)
    assert all(url in message for url in urls) and "HTTP Error 404" in message
    assert message.endswith(f"put it at {tmp_path / 'file'}, or pass --clip PATH")
    assert "\n" not in message and not os.listdir(tmp_path)


def parts(folder):
    return [path for path in folder.iterdir() if path.name.endswith(".part")]


def failed(url, path):
    """What is left of a download that fails: the partial file, and no other."""
    with pytest.raises(FileNotFoundError):
        fetch([url], path, DIGEST, "-")
    assert parts(path.parent) == list(path.parent.iterdir())
    return parts(path.parent)


def test_fetch_goes_on_where_the_connection_ended(server, tmp_path, capsys):
    path = tmp_path / "a [1].bin"
    for size in (HALF, HALF + HALF // 2):
        (part,) = failed(f"{server.url}/halves/file", path)
        assert part.read_bytes() == CONTENT[:size] and part.name.startswith("a [1].bin.")
    fetch([f"{server.url}/ranges/file"], path, DIGEST, "-")
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]
    assert server.asked == ["/halves/file", "/halves/file bytes=12800-",
                            "/ranges/file bytes=19200-"]
    lines = capsys.readouterr().err.splitlines()
    assert f"downloading a [1].bin (0.0 MB) from {server.url}/ranges/file behind 0.0 MB" in lines


@pytest.mark.parametrize("name, asked", [
    ("all", ["all bytes=12800-"]), ("elsewhere", ["elsewhere bytes=12800-", "elsewhere"]),
    ("moved", ["moved bytes=12800-", "good bytes=12800-"])])
def test_fetch_starts_anew_where_the_server_does_not_go_on(server, name, asked, tmp_path):
    failed(f"{server.url}/half/file", tmp_path / "file")
    server.asked.clear()
    fetch([f"{server.url}/{name}/file"], tmp_path / "file", DIGEST, "-")
    assert (tmp_path / "file").read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]
    assert [line.replace("/file", "").strip("/") for line in server.asked] == asked


@pytest.mark.parametrize("left, asked", [
    (b"x" * HALF, ["/ranges/file bytes=12800-", "/ranges/file"]),  # of another file
    (b"x" * 30000, ["/ranges/file bytes=30000-", "/ranges/file"]),  # longer than it
    (CONTENT, ["/ranges/file bytes=25600-"]),  # whole, and was not renamed
    (b"", ["/ranges/file"])])
def test_fetch_and_what_was_left(server, left, asked, tmp_path):
    part = tmp_path / f"file.{DIGEST[7:15]}.1.part"
    part.write_bytes(left)
    os.utime(part, (0, 0))
    fetch([f"{server.url}/ranges/file"], tmp_path / "file", DIGEST, "-")
    assert (tmp_path / "file").read_bytes() == CONTENT and os.listdir(tmp_path) == ["file"]
    assert server.asked == asked


def test_fetch_keeps_its_part_from_a_web_page(server, tmp_path):
    for name in ("half", "page", "missing", "silent", "empty"):
        (part,) = failed(f"{server.url}/{name}/file", tmp_path / "file")
        assert part.read_bytes() == CONTENT[:HALF], name


def test_fetch_leaves_the_part_of_a_process_at_work(server, tmp_path):
    part = tmp_path / f"file.{DIGEST[7:15]}.1.part"
    part.write_bytes(CONTENT[:HALF])
    fetch([f"{server.url}/ranges/file"], tmp_path / "file", DIGEST, "-")
    assert server.asked == ["/ranges/file"] and part.read_bytes() == CONTENT[:HALF]
    other = tmp_path / "other"  # of another digest
    os.utime(part, (0, 0))
    os.rename(part, tmp_path / "other.12345678.1.part")
    fetch([f"{server.url}/ranges/file"], other, DIGEST, "-")
    assert other.read_bytes() == CONTENT and len(parts(tmp_path)) == 1


def test_fetch_keeps_what_came_before_an_interruption(server, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "CHUNK", 1000)
    monkeypatch.setattr(files.Progress, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch([f"{server.url}/ranges/file"], tmp_path / "file", DIGEST, "-")
    monkeypatch.undo()
    assert [part.read_bytes() for part in parts(tmp_path)] == [CONTENT[:1000]]
    fetch([f"{server.url}/ranges/file"], tmp_path / "file", DIGEST, "-")
    assert server.asked == ["/ranges/file", "/ranges/file bytes=1000-"]


def test_fetch_in_a_log_shows_a_line_a_minute(server, tmp_path, clock, capsys, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 6400)
    monkeypatch.setattr(files, "file_digest", lambda *_: DIGEST[7:])
    read = http.client.HTTPResponse.read

    def slow(self, *size):
        clock[0] += 31
        return read(self, *size)

    monkeypatch.setattr(http.client.HTTPResponse, "read", slow)
    fetch([f"{server.url}/good/file"], tmp_path / "file", DIGEST, "-")
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["file 0.0/0.0 | 0.0 MB/s | 0:21 left", "file 0.0/0.0 | 0.0 MB/s | 2:04"]


@pytest.mark.parametrize("endpoint, url, expected", [
    ("https://mirror.example/hub/", "https://huggingface.co/a/b", "https://mirror.example/hub/a/b"),
    ("https://mirror.example", "https://zenodo.org/a", "https://zenodo.org/a"),
    ("", "https://huggingface.co/a/b", "https://huggingface.co/a/b")])
def test_at_endpoint(endpoint, url, expected, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert files.at_endpoint(url) == expected


def test_fetch_asks_the_mirror_of_hugging_face(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/good")
    fetch(["https://huggingface.co/a/b"], tmp_path / "file", DIGEST, "-")
    assert server.asked == ["/good/a/b"]


def test_fetch_into_a_folder_that_cannot_be(server, tmp_path):
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(OSError, match="cache"):
        fetch([f"{server.url}/good/file"], tmp_path / "cache" / "file", DIGEST, "-")
    assert not server.asked


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
    assert [part.read_bytes() for part in parts(tmp_path)] == [CONTENT]
    monkeypatch.undo()
    fetch([f"{server.url}/ranges/file"], tmp_path / "file", DIGEST, "-")
    assert server.asked[1:] == ["/ranges/file bytes=25600-"] and not parts(tmp_path)


def test_file_digest(tmp_path):
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


def test_cache_folder_without_a_home(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where no home is known
    monkeypatch.delenv("RICHKD_CACHE", raising=False)
    with pytest.raises(ValueError, match="^~/.cache/richkd: no home folder is known; set "
                                         "RICHKD_CACHE to a folder, or pass --cache-dir$"):
        files.cache_folder()
    assert files.cache_folder("/somewhere") == Path("/somewhere")


# Progress -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (7.4, "0:07"), (59.7, "1:00"), (3599, "59:59"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert files.duration(seconds) == text


def test_one_line():
    assert files.one_line(ValueError("first\nlast\n")) == "last"
    assert files.one_line(ValueError()) == "ValueError"


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


def test_Progress_of_a_download(clock, capsys):
    """In MB, with one digit; what lay there before does not count into the rate."""
    progress = files.Progress("ViT-L-14.pt", 890.25, "MB", start=90.25)
    clock[0] += 100
    progress.update(490.25, keep=True)
    assert capsys.readouterr().err == "ViT-L-14.pt 490.2/890.2 | 4.0 MB/s | 1:40 left\n"


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
