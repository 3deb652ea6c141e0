"""files.py: written whole, read without executing anything, downloaded and checked."""

import argparse
import collections
import errno
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import struct
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import files
from files import fetch, read_checkpoint, read_own, read_state_dict, write_atomically

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


# Checkpoints --------------------------------------------------------------------------------------


def some_state():
    return {"conv.weight": torch.randn(4, 3, 2, 2), "bn.running_mean": torch.randn(4),
            "bn.num_batches_tracked": torch.tensor(7), "half": torch.randn(5).half()}


def parameters(state):
    return {name: nn.Parameter(t, t.is_floating_point()) for name, t in state.items()}


WRAPPINGS = {
    "bare": lambda state: state,
    "ordered": collections.OrderedDict,
    "parameters": parameters,
    "model": lambda state: {"model": state, "epoch": 240, "accuracy": torch.tensor(79.4)},
    "state_dict": lambda state: {"state_dict": state, "best_prec1": 91.78},
    "net": lambda state: {"net": state, "acc": 95.1, "epoch": 3},
    "model in state_dict": lambda state: {"state_dict": {"model": state}},
    "module.": lambda state: {"state_dict": {f"module.{key}": state[key] for key in state}},
    "student.pt": lambda state: {"model_name": "vgg8", "model": state, "class_names": ["a", "b"],
                                 "mean": [0.5] * 3, "image_size": 32, "dataset": None},
    "NumPy numbers": lambda state: {"model": state, "best": np.float64(73.2), "n": np.int64(3)},
    "an array": lambda state: {"model": state, "history": np.zeros(3)},
    "arguments": lambda state: {"model": state, "opt": argparse.Namespace(lr=0.1, path=Path("a"))},
    "an optimiser": lambda state: {
        "model": state, "optimizer": torch.optim.SGD(parameters(state).values(), 0.1).state_dict()},
    "a default dict": lambda state: {"model": state, "log": collections.defaultdict(list, a=[1])},
}


@pytest.mark.parametrize("kind", WRAPPINGS)
@pytest.mark.parametrize("zipped", [True, False])
def test_read_state_dict_of_every_wrapping(kind, zipped, tmp_path):
    state = some_state()
    path = tmp_path / "weights.pt"
    torch.save(WRAPPINGS[kind](state), path, _use_new_zipfile_serialization=zipped)
    found = read_state_dict(str(path))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) and found[k].dtype == state[k].dtype for k in state)


def test_read_state_dict_beside_numbers_of_numpy_1(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"model": some_state(), "best": np.float64(70)}, path,
               _use_new_zipfile_serialization=False)
    old = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"cnumpy.core.multiarray\nscalar" in old
    path.write_bytes(old)
    assert read_state_dict(path).keys() == some_state().keys()


class Traced(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))
        self.last = nn.Linear(4, 2)
        self.register_buffer("resolution", torch.tensor(64))

    def forward(self, x):
        return self.last(self.first(x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("make", ["trace", "script"])
def test_read_state_dict_of_a_torchscript_archive(make, dtype, tmp_path):
    module, x = Traced().to(dtype).eval(), torch.zeros(1, 3, 8, 8, dtype=dtype)
    made = torch.jit.trace(module, x) if make == "trace" else torch.jit.script(module)
    made.save(tmp_path / "module.pt")
    found, expected = read_state_dict(tmp_path / "module.pt"), module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert all(found[k].dtype == expected[k].dtype for k in expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_read_checkpoint_of_every_kind_of_tensor(zipped, tmp_path):
    whole = torch.randn(6, 5)
    content = {dtype: torch.randn(3, 2).mul(9).to(dtype) for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8,
        torch.int16, torch.int32, torch.int64, torch.bool)}
    content = {str(dtype): tensor for dtype, tensor in content.items()}
    content |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "turned": whole.T,
                "part": whole[2:4, 1:], "same": whole, "size": torch.Size([2, 3]), "text": "é",
                "list": [1, 2.5, None, True, (3, [4])]}
    path = tmp_path / "file.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert found.keys() == content.keys()
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
            assert found[name].stride() == value.stride(), name
        else:
            assert found[name] == value
    before = path.read_bytes()
    found["same"].zero_()  # a view of the mapped file, which stays as it is
    assert path.read_bytes() == before and not found["part"].any()


class Call:
    """A pickle that calls a function when it is loaded as pickles are."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def forms(path, content):
    """The content as each kind of file that read_checkpoint reads."""
    torch.save(content, path)
    yield "zip"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    yield "legacy"
    path.write_bytes(pickle.dumps(content))
    yield "pickle"
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            replaced = name.endswith("/data.pkl")
            new.writestr(name, pickle.dumps(content, 2) if replaced else old.read(name))
    yield "TorchScript"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call, culprit", [
    (Call(os.system, "touch executed"), rf"{os.name}\.system"),
    (Call(os.mkdir, "executed"), rf"{os.name}\.mkdir"),
    (Call(open, "executed", "w"), r"_?io\.open"),
    (Call(eval, "open('executed', 'w')"), r"builtins\.eval"),
    (Call(getattr, "text", "upper"), r"builtins\.getattr"),
    (Call(torch.load, "other.pt"), r"torch\.serialization\.load"),
    (Call(torch.hub.load, "owner/repository"), r"torch\.hub\.load"),
    (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
])
def test_read_checkpoint_refuses_by_name(call, culprit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pt"
    for content in (call, {"model": {"weight": torch.zeros(2), "x": call}}):
        for form in forms(path, content):
            if form in ("pickle", "TorchScript") and content is not call:
                continue  # tensors are written by torch.save alone
            for read in (read_checkpoint, read_state_dict):
                with pytest.raises(ValueError) as error:
                    read(path)
                message = str(error.value)
                assert message.startswith(f"{path}: ") and "\n" not in message, form
                assert "nothing in it was executed" in message, form
                assert re.search(culprit + ", which is refused", message), (form, message)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("module, name", [
    ("collections", "defaultdict"), ("numpy", "load"), ("numpy.lib.npyio", "load"),
    ("pathlib", "PosixPath"), ("datetime", "datetime"), ("builtins", "set"),
    ("__torch__.evil", "Module"), ("copyreg", "_reconstructor"), ("types", "SimpleNamespace")])
def test_read_checkpoint_makes_shells_that_do_nothing(module, name, tmp_path):
    """Called with arguments, given attributes and items: a shell takes it all."""
    pickled = (
        b"\x80\x02}X\x01\x00\x00\x00a"  # {"a": module.name("executed")
        + f"c{module}\n{name}\n".encode() + b"X\x08\x00\x00\x00executed\x85R"
        + b"}X\x01\x00\x00\x00bK\x01sb"  # with .b = 1,
        + b"X\x01\x00\x00\x00cK\x02s"  # and ["c"] = 2
        + b"s.")  # }
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("file/data.pkl", pickled)
    shell = read_checkpoint(tmp_path / "file.pt")["a"]
    assert type(shell) is files.Shell and vars(shell) == {"b": 1} and shell == {"c": 2}


def repacked(content, change):
    """The bytes of an archive whose entries `change(name, data)` changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def damaged_files():
    """name -> bytes of a file that is no whole checkpoint."""
    state = {"weight": torch.arange(4000.0)}
    good, legacy = saved(state), saved(state, _use_new_zipfile_serialization=False)
    small = saved({"weight": torch.arange(4.0)})
    others = io.BytesIO()
    with zipfile.ZipFile(others, "w") as archive:
        archive.writestr("other", b"")
    deflated = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old:
        with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    return {
        "empty": b"", "text": b"hello world\n", "noise": bytes(range(256)) * 20,
        "a web page": b"<!DOCTYPE html><html><body>404</body></html>\n",
        "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "zip, cut": good[: len(good) // 2], "zip, a bit": flipped(good, len(good) // 2),
        "zip, short record": repacked(
            good, lambda name, data: data[:-4] if "/data/" in name else data),
        "zip, no record": repacked(good, lambda name, data: data).replace(b"data/0", b"data/9"),
        "zip, packed": deflated.getvalue(), "zip, of other files": others.getvalue(),
        "zip, larger tensor": repacked(  # of 5 elements in a storage of 4
            small, lambda name, data: data.replace(b"K\x04\x85", b"K\x05\x85")),
        "zip, vast tensor": saved({"weight": torch.zeros(1).expand(10**12)}),
        "legacy, cut": legacy[: len(legacy) // 2], "legacy, its head": legacy[:100],
        "legacy, another length": legacy.replace(struct.pack("<q", 4000), struct.pack("<q", 3999)),
        "legacy, no storage": legacy[: legacy.rindex(struct.pack("<q", 4000))],
        "legacy, huge storage": legacy.replace(struct.pack("<H", 4000), struct.pack("<H", 65000)),
        "pickle of a number": pickle.dumps(3),
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_read_checkpoint_of_a_damaged_file(kind, tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(damaged_files()[kind])
    with pytest.raises(ValueError, match="not a checkpoint of tensors .*, or damaged") as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", [[1], 3, {}, {"model": {}}, {"epoch": 3}, {"a": {"b": 1}}])
def test_read_state_dict_without_tensors(content, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="file.pt: no tensors in it: expected a state dict"):
        read_state_dict(tmp_path / "file.pt")
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        read_state_dict(tmp_path / "absent.pt")


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
