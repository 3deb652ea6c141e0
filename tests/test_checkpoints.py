"""checkpoints.py: read without executing anything, or refused in one line that says why."""

import argparse
import bz2
import collections
import datetime
import functools
import gzip
import io
import json
import lzma
import math
import os
import pickle
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from support import checkpoints
from support.checkpoints import note, read_about, read_checkpoint, read_state_dict


def test_note_is_said_once_and_by_rank_0(monkeypatch, capsys):
    for text in ("a is guessed", "b is\nleft out", "a is guessed"):
        note(text)
    assert capsys.readouterr().err == "a is guessed\nb is left out\n"
    note.said.clear()
    monkeypatch.setenv("RANK", "1")  # left over: torchrun sets more than that
    note("c is guessed")
    assert capsys.readouterr().err == "c is guessed\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    note("a is guessed")
    monkeypatch.setenv("RANK", "0")
    note("b is left out")
    assert capsys.readouterr().err == "b is left out\n"


# Pickled by torch.save ----------------------------------------------------------------------------

# Checkpoints --------------------------------------------------------------------------------------


def some_state():
    return {"conv.weight": torch.randn(4, 3, 2, 2), "bn.running_mean": torch.randn(4),
            "bn.num_batches_tracked": torch.tensor(7), "half": torch.randn(5).half()}


class Ordered(collections.OrderedDict):
    """Of a module that a stranger does not have; `readable` names it as if it were a library's."""


@pytest.fixture
def readable(monkeypatch):
    monkeypatch.setattr(checkpoints.TensorUnpickler, "SHELLS",
                        (*checkpoints.TensorUnpickler.SHELLS, f"{__name__}.Ordered"))


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
    "in five": lambda state: {"net": {"model": {"state_dict": {"module": {"student": state}}}}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": torch.zeros(2)},
    "its settings": lambda state: {"model": {"name": "vgg8", "size": {"depth": 8}}, "net": state},
    "a subclass": lambda state: {"model": Ordered(state), "best": collections.Counter("ab")},
    "student.pt": lambda state: {"model_name": "vgg8", "model": state, "class_names": ["a", "b"],
                                 "mean": [0.5] * 3, "image_size": 32, "dataset": None},
    "NumPy numbers": lambda state: {"model": state, "best": np.float64(73.2), "n": np.int64(3)},
    "an array": lambda state: {"model": state, "history": np.zeros(3)},
    "arguments": lambda state: {"model": state, "opt": argparse.Namespace(lr=0.1, path=Path("a"))},
    "an optimiser": lambda state: {
        "model": state, "optimizer": torch.optim.SGD(parameters(state).values(), 0.1).state_dict()},
    "a default dict": lambda state: {"model": state, "log": collections.defaultdict(list, a=[1])},
    "of numbers": lambda state: {"model": state, "log": collections.defaultdict(float, a=1.5)},
    "a path as key": lambda state: {"model": state, "seen": {Path("a"): 1, np.int64(3): 2}},
    "a queue": lambda state: {"model": state, "last": collections.deque([1, 2], 5)},
    "sets": lambda state: {"model": state, "seen": {"a", "b"}, "frozen": frozenset([1]), "j": 2j},
    "versions": lambda state: {"model": state, "torch": torch.__version__, "t": torch.float16,
                               "device": torch.device("cpu"), "when": datetime.datetime.now()},
    "a schedule": lambda state: {"model": state, "scheduler": torch.optim.lr_scheduler.StepLR(
        torch.optim.SGD(parameters(state).values(), 0.1), 3)},
    "a partial": lambda state: {"model": state, "opt": functools.partial(dict, lr=0.1)},
}


@pytest.mark.parametrize("kind", WRAPPINGS)
@pytest.mark.parametrize("zipped", [True, False])
def test_read_state_dict_of_every_wrapping(kind, zipped, tmp_path, readable, capsys):
    state = some_state()
    path = tmp_path / "weights.pt"
    torch.save(WRAPPINGS[kind](state), path, _use_new_zipfile_serialization=zipped)
    found = read_state_dict(str(path))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) and found[k].dtype == state[k].dtype for k in state)
    assert not capsys.readouterr().err


PREFIXES = ["module.", "_orig_mod.", "model.", "student.", "module._orig_mod.", "net.module.",
            "_orig_mod.module.model.", "module.student._orig_mod.", "backbone.", "a.b.c.d.e.f."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_read_state_dict_takes_prefixes_off(prefix, tmp_path, capsys):
    state = some_state()
    torch.save({"model": {prefix + name: state[name] for name in state}}, tmp_path / "file.pt")
    found = read_state_dict(tmp_path / "file.pt")
    assert list(found) == list(state) and not capsys.readouterr().err
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("prefix, others, said", [
    ("module.student.", ["module.teacher.conv.weight", "module.conv_reg.weight"],
     "student and conv_reg, teacher; student"),
    ("student.module.", ["teacher.module.conv.weight"], "student and teacher; student"),
    ("student.", ["teacher._orig_mod.conv.weight", "scale"],
     "student and scale, teacher; student"),
    ("module.", ["n_averaged"], "module and n_averaged; module"),
    ("model.", ["teacher.conv.weight", "criterion.weight"], "model and criterion, teacher; model"),
    ("_orig_mod.backbone.", ["loss.centers"], "backbone and loss; backbone"),
])
def test_read_state_dict_says_what_it_leaves_out(prefix, others, said, tmp_path, capsys):
    state = some_state()
    torch.save({"state_dict": {**{name: torch.zeros(3) for name in others},
                               **{prefix + name: state[name] for name in state}}},
               tmp_path / "file.pt")
    found = read_state_dict(tmp_path / "file.pt")
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert found.keys() == state.keys()
    assert capsys.readouterr().err == f"{tmp_path / 'file.pt'} holds {said} is read\n"


@pytest.mark.parametrize("names", [
    ["model.0.weight", "fc.weight"], ["conv1.weight", "module.weight"], ["weight"],
    ["conv1.weight"], ["fc.weight", "fc.bias"], ["conv1.weight", "loss"],
    ["student.weight", "student"], [".", "..", "a."], [""]])
def test_read_state_dict_keeps_the_names_of_layers(names, tmp_path):
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "file.pt")
    found = read_state_dict(tmp_path / "file.pt")
    assert list(found) == names


@pytest.mark.parametrize("content, said", [
    (lambda right, wrong: {"model_ema": wrong, "model": right}, "model and model_ema; model"),
    (lambda right, wrong: {"state_dict_ema": wrong, "state_dict": right},
     "state_dict and state_dict_ema; state_dict"),
    (lambda right, wrong: {"teacher": wrong, "student": right}, "student and teacher; student"),
    (lambda right, wrong: {"ema": {"module": wrong, "decay": 0.9}, "net": {"module": right}},
     "net.module and ema.module; net.module"),
    (lambda right, wrong: {"model_ema": right}, None), (lambda right, wrong: {"ema": right}, None),
    (lambda right, wrong: {"teacher": right, "best": torch.zeros(1)}, None),
])
def test_read_state_dict_says_which_of_several_it_takes(content, said, tmp_path, capsys):
    right, wrong = some_state(), some_state()
    torch.save(content(right, wrong), tmp_path / "file.pt")
    found = read_state_dict(tmp_path / "file.pt")
    assert torch.equal(found["conv.weight"], right["conv.weight"])
    expected = f"{tmp_path / 'file.pt'} holds {said} is read\n" if said else ""
    assert capsys.readouterr().err == expected


def test_read_state_dict_of_a_dict_that_holds_itself(tmp_path):
    content = {key: {} for key in checkpoints.KEYS}
    content |= {key: content for key in checkpoints.KEYS[:3]}
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="no tensors in it"):
        read_state_dict(tmp_path / "file.pt")


def test_read_state_dict_refuses_what_is_not_finite(tmp_path):
    for value in (math.nan, math.inf):
        torch.save({"fc.weight": torch.tensor([[1.0, value]])}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="fc.weight has values that are not finite"):
            read_state_dict(tmp_path / "x.pt")


def test_read_about_of_a_student_and_of_others(tmp_path):
    said = {"model_name": "vgg8", "dataset": "shapes", "class_names": ["a", "b"], "mean": [0.5] * 3,
            "std": [0.2] * 3, "image_size": 32}
    more = {**said, "class_ids": ["n1", "n2"]}
    for content, expected in [
            ({**said, "model": some_state(), "format": 2}, said), ({**more, "format": 2}, more),
            ({**said, "model": some_state()}, {}),  # of another program, which says other things
            ({"model": some_state(), "mean": 3}, {}), (some_state(), {}), ([1], {})]:
        torch.save(content, tmp_path / "file.pt")
        assert read_about(tmp_path / "file.pt") == expected



@pytest.mark.parametrize("protocol", range(2, 6))
def test_read_checkpoint_of_every_protocol(protocol, tmp_path, readable):
    state = some_state()
    for kind in WRAPPINGS:
        torch.save(WRAPPINGS[kind](state), tmp_path / "file.pt", pickle_protocol=protocol)
        found = read_state_dict(tmp_path / "file.pt")
        assert found.keys() == state.keys(), kind


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
    (Call(setattr, argparse.Namespace(), "a", 1), r"builtins\.setattr"),
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
        "text": b"hello world\n", "noise": bytes(range(256)) * 20, "JSON": b'{"a": [1, 2, 3]}\n',
        "zip, cut": good[: len(good) // 2], "zip, a bit": flipped(good, len(good) // 2),
        "zip, short record": repacked(
            good, lambda name, data: data[:-4] if "/data/" in name else data),
        "zip, no record": repacked(good, lambda name, data: data).replace(b"data/0", b"data/9"),
        "zip, of another machine": repacked(
            good, lambda name, data: b"big" if name.endswith("/byteorder") else data),
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


def packed(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("content, told", [
    (b"", "it is empty"),
    (b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>Sign in</body></html>\n", "it is a web page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "it is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    (gzip.compress(b"x"), "an archive: unpack it"), (bz2.compress(b"x"), "an archive: unpack it"),
    (lzma.compress(b"x"), "an archive: unpack it"), (packed("a", b"x"), "an archive: unpack it"),
    (damaged_files()["zip, of other files"], r"an archive of other files \(other\): unpack it"),
])
@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_read_checkpoint_tells_what_is_no_checkpoint(content, told, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not a checkpoint of tensors.*{told}") as error:
        read_state_dict(tmp_path / name)
    assert "\n" not in str(error.value)


def test_read_checkpoint_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="is a folder, expected a checkpoint: name a file in it"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content, there", [
    ([1], "[]"), (3, "[]"), ({}, "[]"), ({"model": {}}, "['model']"), ({"a": {"b": 1}}, "['a']"),
    ({0: torch.zeros(1), "a\n": torch.zeros(1).numpy()}, r"['a\n']"),
    ({f"layer{i}": {} for i in range(30)}, "['layer0', 'layer1', 'layer2', 'layer3', 'layer4', "
                                           "'layer5', 'layer6', [...]")])
def test_read_state_dict_without_tensors(content, there, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="file.pt: no tensors in it: expected a state") as error:
        read_state_dict(tmp_path / "file.pt")
    assert str(error.value).endswith(f", found {there}")
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        read_state_dict(tmp_path / "absent.pt")


# safetensors --------------------------------------------------------------------------------------

NAMES = {dtype: name for name, dtype in checkpoints.DTYPES.items()}


def safetensors(tensors, change=lambda header: None, spaces=0, end=b""):
    """The bytes of a file of these tensors; `change` changes the header before it is written."""
    header, blobs = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        blob = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(blobs), len(blobs) + len(blob)]}
        blobs += blob
    text = change(header) or json.dumps(header)
    text = text.encode() + b" " * spaces
    return struct.pack("<Q", len(text)) + text + blobs + end


@pytest.mark.parametrize("spaces", range(8))  # so that tensors lie on no multiple of their size
def test_read_safetensors_of_every_kind_of_tensor(spaces, tmp_path):
    content = {str(dtype): torch.randn(3, 5).mul(9).to(dtype) for dtype in NAMES}
    content |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "é": torch.arange(3.0)}
    path = tmp_path / "any name"
    path.write_bytes(safetensors(content, spaces=spaces))
    found = read_checkpoint(path)
    assert list(found) == list(content)
    for name, tensor in content.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name] + found[name], tensor + tensor), name
    found["scalar"].zero_()  # a view of the mapped file, which stays as it is
    assert read_checkpoint(path)["scalar"] == 3.5


def test_read_state_dict_of_safetensors(tmp_path):
    state = some_state()
    wrapped = {f"module.student.{name}": tensor for name, tensor in state.items()}
    (tmp_path / "a.safetensors").write_bytes(safetensors(wrapped))
    found = read_state_dict(tmp_path / "a.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    (tmp_path / "a.safetensors").write_bytes(safetensors({}))
    with pytest.raises(ValueError, match="a.safetensors: no tensors in it"):
        read_state_dict(tmp_path / "a.safetensors")


def changed(name, key, value):
    """A change of the header: an entry's key has another value."""
    return lambda header: header[name].update({key: value})


def test_read_safetensors_whose_length_looks_like_another_kind(tmp_path):
    for length, kind in ((0x4B50, b"PK"), (0x8B1F, b"\x1f\x8b"), (0x685A42, b"BZh")):
        plain = safetensors({"a": torch.ones(2)})
        spaces = length - struct.unpack_from("<Q", plain)[0]
        path = tmp_path / "a.safetensors"
        path.write_bytes(safetensors({"a": torch.ones(2)}, spaces=spaces))
        assert path.read_bytes().startswith(kind)
        assert torch.equal(read_checkpoint(path)["a"], torch.ones(2))


DAMAGED = {
    "cut": safetensors({"a": torch.ones(9)})[:-1],
    "cut in the header": safetensors({"a": torch.ones(9)})[:40],
    "longer": safetensors({"a": torch.ones(9)}, end=b"x"),
    "a long header": struct.pack("<Q", 2**63) + b'{"a": 1}',
    "a header of 100 MB": struct.pack("<Q", 10**8 + 1) + b"{",
    "no JSON": struct.pack("<Q", 8) + b"{'a': 1}",
    "a list": struct.pack("<Q", 9) + b"{}, [1] ]",
    "no UTF-8": struct.pack("<Q", 9) + b'{"\xff": 1}',
    "deep": struct.pack("<Q", 500_005) + b'{"a":' + b"[" * 500_000,
    "twice": safetensors({"a": torch.ones(1)}, lambda header: '{"a": 1, "a": %s}' % json.dumps(
        header["a"])),
    "twice, inside": safetensors({"a": torch.ones(1)}, lambda header: (
        '{"a": {"dtype": "F32", "shape": [9], "shape": [1], "data_offsets": [0, 4]}}')),
    "overlapping": safetensors({"a": torch.ones(2), "b": torch.ones(2)},
                               changed("b", "data_offsets", [4, 12])),
    "the same": safetensors({"a": torch.ones(2), "b": torch.ones(2)},
                            changed("b", "data_offsets", [0, 8])),
    "a gap": safetensors({"a": torch.ones(2), "b": torch.ones(2)},
                         lambda header: header.pop("a") and None),
    "before": safetensors({"a": torch.ones(2)}, changed("a", "data_offsets", [-4, 4])),
    "beyond": safetensors({"a": torch.ones(2)}, changed("a", "data_offsets", [0, 8000])),
    "backwards": safetensors({"a": torch.ones(2)}, changed("a", "data_offsets", [8, 0])),
    "three offsets": safetensors({"a": torch.ones(2)}, changed("a", "data_offsets", [0, 8, 8])),
    "a true": safetensors({"a": torch.ones(1)}, changed("a", "shape", [True])),
    "a fraction": safetensors({"a": torch.ones(1)}, changed("a", "shape", [1.0])),
    "no number": safetensors({"a": torch.ones(1)}, changed("a", "shape", [float("nan")])),
    "a text": safetensors({"a": torch.ones(1)}, changed("a", "shape", "1")),
    "a size below 0": safetensors({"a": torch.ones(2)}, changed("a", "shape", [-1, -2])),
    "another shape": safetensors({"a": torch.ones(2)}, changed("a", "shape", [3])),
    "vast": safetensors({"a": torch.ones(2)}, changed("a", "shape", [2**62, 2**62])),
    "another dtype": safetensors({"a": torch.ones(2)}, changed("a", "dtype", "F64")),
    "an unknown dtype": safetensors({"a": torch.ones(2)}, changed("a", "dtype", "F8_E4M3")),
    "no dtype": safetensors({"a": torch.ones(2)}, lambda header: header["a"].pop("dtype") and None),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_read_safetensors_of_a_damaged_file(kind, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(DAMAGED[kind])
    with pytest.raises(ValueError, match="not a checkpoint of tensors .*, or damaged") as error:
        read_checkpoint(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
