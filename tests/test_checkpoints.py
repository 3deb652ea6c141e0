"""checkpoints.py: read without executing anything, or refused in one line that names the file."""

import argparse
import collections
import datetime
import functools
import io
import math
import numpy as np
import os
import pickle
import pytest
import struct
import torch
import zipfile
from helpers import equal, refused, safetensors, write_zip
from pathlib import Path
from support import checkpoints, files
from support.checkpoints import match, read_checkpoint, read_own, read_state_dict
from torch import nn

def same(a, b):
    return equal(a, b) and all(a[name].dtype == b[name].dtype for name in a)

def some_state():
    return {"conv.weight": torch.randn(4, 3, 2, 2), "bn.running_mean": torch.randn(4),
            "bn.num_batches_tracked": torch.tensor(7), "half": torch.randn(5).half()}

class Ordered(collections.OrderedDict):
    """Of a module that a stranger does not have."""

SGD = torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1, 0.9)
WRAPPINGS = {
    "bare": lambda state: state,
    "parameters": lambda state: {
        name: nn.Parameter(t, t.is_floating_point()) for name, t in state.items()},
    "model": lambda state: {"model": state, "epoch": 240, "accuracy": torch.tensor(79.4)},
    "in five": lambda state: {"net": {"model": {"state_dict": {"module": {"student": state}}}}},
    "its settings": lambda state: {"model": {"name": "vgg8", "size": {"depth": 8}}, "net": state},
    "a subclass": lambda state: {"model": Ordered(state), "best": collections.Counter("ab")},
    "arguments": lambda state: {"model": state, "opt": argparse.Namespace(lr=0.1, steps=[1, 2]),
                                "best": np.float64(73.2), "rate": np.float32(1)},
    "an optimiser": lambda state: {"model": state, "optimizer": SGD.state_dict()},
    "containers": lambda state: {
        "model": state, "last": collections.deque([1, 2], 5), "seen": {"a", "b"}, "j": 2j,
        "log": collections.defaultdict(list, a=[1]), "keys": {Path("a"): 1, np.int64(3): 2}},
    "objects": lambda state: {
        "model": state, "torch": torch.__version__, "t": torch.float16, "d": torch.device("cpu"),
        "when": datetime.datetime.now(), "opt": functools.partial(dict, lr=0.1),
        "scheduler": torch.optim.lr_scheduler.StepLR(SGD, 3), "history": np.zeros(3)},
}

def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()

@pytest.mark.parametrize("kind", WRAPPINGS)
def test_read_state_dict_of_every_wrapping(kind, tmp_path, capsys):
    state, path = some_state(), tmp_path / "weights.pt"
    content = WRAPPINGS[kind](state)
    written = [saved(content, pickle_protocol=protocol) for protocol in range(2, 6)]
    if kind in ("bare", "parameters", "model", "in five", "an optimiser", "arguments"):
        old = saved(content, _use_new_zipfile_serialization=False)
        written.append(old.replace(b"numpy._core", b"numpy.core"))  # NumPy's name in those years
    for data in written:
        path.write_bytes(data)
        found = read_state_dict(str(path))
        assert same(found, state)
        assert not any(tensor.requires_grad for tensor in found.values())
    assert not capsys.readouterr().err

@pytest.mark.parametrize("names", [
    ["model.0.weight", "fc.weight"], ["conv1.weight", "module.weight"], ["conv1.weight", "loss"],
    ["student.weight", "student"], [".", "..", "a."], [""]])
def test_read_state_dict_keeps_the_names_of_layers(names, tmp_path):
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "file.pt")
    assert list(read_state_dict(tmp_path / "file.pt")) == names

def below(prefix, *others):
    return lambda state: {"state_dict": {**{name: torch.zeros(3) for name in others},
                                         **{prefix + name: state[name] for name in state}}}

@pytest.mark.parametrize("content, said", [
    *((below(prefix), None) for prefix in (
        "module.", "_orig_mod.", "student.", "module._orig_mod.", "net.module.",
        "_orig_mod.module.model.", "module.student._orig_mod.", "backbone.", "a.b.c.d.e.f.")),
    (below("module.student.", "module.teacher.conv.weight", "module.conv_reg.weight"),
     "student and teacher, conv_reg; student"),
    (below("student.module.", "teacher.module.conv.weight"), "student and teacher; student"),
    (below("module.", "n_averaged"), "module and n_averaged; module"),
    (below("_orig_mod.backbone.", "loss.centers"), "backbone and loss; backbone"),
    (lambda state: {"model_ema": some_state(), "model": state}, "model and model_ema; model"),
    (lambda state: {"ema": {"module": some_state(), "decay": 0.9}, "net": {"module": state}},
     "net and ema; net"),
    (lambda state: {"best_state_dict": some_state(), "optimizer_state_dict": {"state": {}},
                    "state_dict": state}, "state_dict and best_state_dict; state_dict"),
    (lambda state: {"best_model": state, "acc": torch.tensor(79.4)}, None),
    (lambda state: {"teacher": state, "best": torch.zeros(1)}, None)])
def test_read_state_dict_takes_prefixes_off_and_says_which_of_several(
        content, said, tmp_path, capsys):
    state, path = some_state(), tmp_path / "file.pt"
    torch.save(content(state), path)
    assert same(read_state_dict(path), state)
    assert capsys.readouterr().err == (f"{path} holds {said} is read\n" if said else "")

def test_read_state_dict_refuses_what_has_none(tmp_path):
    path = tmp_path / "file.pt"
    round_about = {key: {} for key in checkpoints.KEYS}
    round_about |= {key: round_about for key in checkpoints.KEYS[:3]}
    contents = [[1], 3, {}, {"model": {}}, {0: torch.zeros(1), "a\n": 1}, nn.Linear(2, 2),
                round_about, {f"layer{i}": {} for i in range(300)}]
    weights = [torch.tensor([math.nan]), torch.tensor(math.inf), torch.ones(2, dtype=torch.int8),
               torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")]
    for content in (*contents, *({"fc.weight": weight} for weight in weights)):
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            message = refused(read_state_dict, path)
            assert str(path) in message and len(message) < 300
    assert "absent.pt" in refused(read_state_dict, tmp_path / "absent.pt")
    assert str(tmp_path) in refused(read_state_dict, tmp_path)  # a folder

def test_read_own_is_the_inverse_of_save(tmp_path):
    path, content = tmp_path / "a.pt", {"a": torch.arange(3), "b": [1, "x", {"c": None}]}
    files.save(path, content)
    found = read_own(path, "delete it")
    assert found["a"].equal(content["a"]) and found["b"] == content["b"] and len(found) == 2
    other = saved({**content, "format": files.FORMAT + 1})
    for damaged in (other, saved([1]), b"", other[:99]):
        path.write_bytes(damaged)
        with pytest.raises(files.Damaged, match="a.pt.*; delete it$"):
            read_own(path, "delete it")
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        read_own(tmp_path / "absent.pt", "")

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_read_state_dict_of_a_torchscript_archive(dtype, tmp_path):
    module = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)), nn.ReLU())
    module.register_buffer("resolution", torch.tensor(64))
    module, expected = module.to(dtype).eval(), module.to(dtype).state_dict()
    for made in (torch.jit.trace(module, torch.zeros(1, 3, 8, 8, dtype=dtype)),
                 torch.jit.script(module)):
        made.save(tmp_path / "module.pt")
        assert same(read_state_dict(tmp_path / "module.pt"), expected)

KINDS = {str(dtype): torch.randn(3, 5).mul(9).to(dtype) for dtype in checkpoints.DTYPES.values()}
KINDS |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "é": torch.arange(3.0)}

@pytest.mark.parametrize("zipped", [True, False])
def test_read_checkpoint_of_every_kind_of_tensor(zipped, tmp_path):
    whole, path = torch.randn(6, 5), tmp_path / "file.pt"
    content = {**KINDS, "turned": whole.T, "part": whole[2:4, 1:], "same": whole}
    plain = ["é", 2.5, None, True, (3, [4])]
    torch.save({**content, "": plain}, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert found.pop("") == plain and same(found, content)
    assert all(found[name].stride() == content[name].stride() for name in content)
    before = path.read_bytes()
    found["same"].zero_()  # a storage of two tensors, and none of the file
    assert path.read_bytes() == before and not found["part"].any()

def test_read_safetensors_of_every_kind_of_tensor(tmp_path):
    path = tmp_path / "any name"
    plain = struct.unpack_from("<Q", safetensors(KINDS))[0]
    for spaces in (*range(8), 0x4B50 - plain, 0x8B1F - plain):  # at any byte; as a zip, as gzip
        path.write_bytes(safetensors(KINDS, spaces=spaces))
        found = read_checkpoint(path)
        assert list(found) == list(KINDS) and same(found, KINDS)

class Call(tuple):
    """(function, its arguments), called when it is loaded as pickles are."""
    def __reduce__(self):
        return tuple(self)

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", [
    Call((os.mkdir, ("executed",))), Call((eval, ("open('executed', 'w')",))),
    Call((setattr, (argparse.Namespace(), "a", 1))), nn.Linear(2, 2)])
def test_read_checkpoint_calls_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"model": {"weight": torch.ones(2), "x": call}, "x": [call]}
    torch.save(content, "old.pt", _use_new_zipfile_serialization=False)
    torch.save(content, "file.pt")
    assert same(read_state_dict("file.pt"), {"weight": torch.ones(2)})
    assert type(read_checkpoint("file.pt")["x"][0]) is checkpoints.Inert
    write_zip("module.pt", {"module/data.pkl": pickle.dumps(call, 2)})
    Path("plain.pt").write_bytes(pickle.dumps(call))
    for name in ("module.pt", "plain.pt", "old.pt"):
        assert name in refused(read_state_dict, name)
    assert not Path("executed").exists()

NAMED = b"cos\nmkdir\n"  # find_class("os", "mkdir")
ARGUMENT = b"X\x08\x00\x00\x00executed"

@pytest.mark.parametrize("opcodes", [
    NAMED + ARGUMENT + b"\x85R",  # REDUCE
    b"\x8c\x02os\x8c\x05mkdir\x93" + ARGUMENT + b"\x85R",  # STACK_GLOBAL
    b"(" + ARGUMENT + b"ios\nmkdir\n",  # INST
    b"(" + NAMED + ARGUMENT + b"o",  # OBJ
    NAMED + ARGUMENT + b"\x85\x81",  # NEWOBJ
    NAMED + ARGUMENT + b"\x85}\x92",  # NEWOBJ_EX
    NAMED + b")R" + ARGUMENT + b"\x85R",  # what a call returned is called
    NAMED + b")R}X\x01\x00\x00\x00aK\x01sb",  # BUILD
    NAMED + b")R(K\x01K\x02e",  # APPENDS
])
def test_unpickler_makes_inert_objects_by_every_opcode(opcodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_zip("file.pt", {"file/data.pkl": b"\x80\x04}K\x00" + opcodes + b"s."})
    (thing,) = read_checkpoint("file.pt").values()
    assert type(thing) is checkpoints.Inert and not Path("executed").exists()

def test_unpickler_leaves_what_it_knows_as_it_is(tmp_path):
    before, path = dict(vars(checkpoints.Inert)), tmp_path / "file.pt"
    build = b"N}X\x05\x00\x00\x00itemsK\x01s\x86b."  # of a class: it would change its attribute
    for name in (NAMED, b"ccollections\nOrderedDict\n"):
        write_zip(path, {"a/data.pkl": b"\x80\x04" + name + build})
        assert str(path) in refused(read_checkpoint, path)
    assert dict(vars(checkpoints.Inert)) == before

def repacked(content, change):
    """The bytes of an archive whose entries `change(name, data)` changed."""
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        entries = {name: change(name, old.read(name)) for name in old.namelist()}
    return write_zip(io.BytesIO(), entries).getvalue()

def damaged_safetensors():
    good, two = safetensors({"a": torch.ones(9)}), {"a": torch.ones(2), "b": torch.ones(2)}
    yield from {"cut": good[:-1], "cut in the header": good[:40], "longer": good + b"x",
                "a long header": struct.pack("<Q", 2**63) + b'{"a": 1}',
                "deep": struct.pack("<Q", 500_005) + b'{"a":' + b"[" * 500_000}.items()
    for key, value in (
            ("data_offsets", [4, 12]), ("data_offsets", [0, 8]), ("data_offsets", [12, 20]),
            ("data_offsets", [-4, 4]), ("data_offsets", [8, 8000]), ("shape", [3]), ("shape", "2"),
            ("shape", [2**62, 2**62]), ("shape", [-1, -2]), ("dtype", "F64"), ("dtype", "F8_E4M3")):
        yield f"{key} {value}", safetensors(two, lambda header, of={key: value}: (
            header["b"].update(of)))

def other_files():
    """name -> (bytes of a file that is no whole checkpoint, a word of what is said of it)."""
    good, legacy = (saved({"weight": torch.arange(4000.0)}, _use_new_zipfile_serialization=zipped)
                    for zipped in (True, False))
    small, count = saved({"weight": torch.arange(4.0)}), struct.pack("<q", 4000)
    middle = len(good) // 2
    return {
        "a list": (saved([1]), "list"), "zip, cut": (good[:middle], ""),
        "zip, a bit": (good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], "CRC"),
        "zip, short record": (repacked(
            good, lambda name, data: data[:-4] if "/data/" in name else data), "length"),
        "zip, of another machine": (repacked(
            good, lambda name, data: b"big" if name.endswith("/byteorder") else data), "big"),
        "zip, larger tensor": (repacked(  # of 5 elements in a storage of 4
            small, lambda name, data: data.replace(b"K\x04\x85", b"K\x05\x85")), "larger"),
        "zip, vast tensor": (saved({"weight": torch.zeros(1).expand(10**12)}), "larger"),
        "legacy, cut": (legacy[: len(legacy) // 2], "EOF"),
        "legacy, another length": (legacy.replace(count, struct.pack("<q", 3999)), "size"),
        "nothing": (b"", "b''"), "gzip": (b"\x1f\x8b..", "unpack"),
        "a page": (b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>Sign in</body>\n", "web page"),
        "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid 0\n", "git-lfs"),
        **{f"safetensors, {kind}": (content, "") for kind, content in damaged_safetensors()}}

@pytest.mark.parametrize("kind", other_files())
def test_read_checkpoint_of_what_is_none(kind, tmp_path):
    content, word = other_files()[kind]
    (tmp_path / "file.pth").write_bytes(content)
    message = refused(read_checkpoint, tmp_path / "file.pth")
    assert "file.pth" in message and word in message and len(message) < 400

def test_match_by_name_and_shape():
    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    wanted = {"fc.weight": one, "a.downsample.0": two, "a.num_batches_tracked": torch.tensor(1)}
    found = match(wanted, {"linear.weight": one, "compressible_a.shortcut.0": two}, "")
    assert found["fc.weight"] is one and found["a.downsample.0"] is two
    assert found["a.num_batches_tracked"] == 0
    assert match({"linear.weight": one}, {"fc.weight": one}, "")["linear.weight"] is one
    # `linear` may stand for `fc`, but not where the file has an `fc` of its own
    for name in ("linear.weight", "stem"):
        problem = refused(match, {"fc.weight": one}, {"fc.weight": one, name: three}, "a.pt")
        assert problem.startswith("a.pt: ") and f"'{name}'" in problem
