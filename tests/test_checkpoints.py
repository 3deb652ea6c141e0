"""checkpoints.py: read without executing anything, or refused in one line that says why."""

import argparse
import collections
import io
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
from checkpoints import read_checkpoint, read_state_dict

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
    assert type(shell) is checkpoints.Shell and vars(shell) == {"b": 1} and shell == {"c": 2}


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
