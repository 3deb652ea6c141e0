"""Checkpoints, of other programs and this one's own, read without executing anything in them.

Errors are `ValueError` and `OSError` of one line that names the file."""

import functools
import json
import math
import os
import pickle
import textwrap
import zipfile
from collections import OrderedDict

import torch

from support import files

class Inert(dict):
    """Stands for every class and function that a pickle names, but those in `KNOWN`: it takes
    arguments, items and attributes (as items), and does nothing."""
    __hash__ = object.__hash__  # a path, or a NumPy number, may be a key

    def __init__(self, *arguments, **named):
        super().__init__()

    def __call__(self, *arguments, **named):
        return self

    append = extend = __call__  # items of a list are left out

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})  # a NumPy dtype's is a tuple

def rebuild_tensor(storage, offset, size, stride, *_):
    if math.prod(size) > len(storage):
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset)

KNOWN = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch.ByteStorage": torch.uint8, "torch.CharStorage": torch.int8,  # stand for their dtype
    **{f"torch.{name}Storage": getattr(torch, name.lower())
       for name in ("Half", "BFloat16", "Float", "Double", "Short", "Int", "Long", "Bool")},
}

class Unpickler(pickle.Unpickler):
    """`find_class` is the only way in which a pickle comes to anything outside itself; here nothing
    is imported. persistent_load: function of a storage's key, which returns it as a tensor (n,)."""

    def __init__(self, file, persistent_load):
        super().__init__(file, encoding="latin1")  # of Python 2's strings
        self.persistent_load = persistent_load

    def find_class(self, module, name):
        return KNOWN.get(f"{module}.{name}", Inert)

def flatten(module, prefix=""):
    for name, value in module.items():
        nested = isinstance(value, Inert)
        yield from flatten(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)]

def read_zip(file):
    """What `torch.save` (since 1.6) wrote, or {dotted name: attribute} of a TorchScript module.
    zipfile compares what it reads with its CRC."""
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    pickled = next((name for name in names if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise ValueError(f"it is an archive of other files ({', '.join(names[:3])}): unpack it")
    folder = pickled.removesuffix("data.pkl")
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")

    @functools.cache  # several tensors may be views of one storage
    def storage(key):
        _, dtype, record, _, count = key  # "storage", dtype, record's name, device, elements
        data = bytearray(archive.read(f"{folder}data/{record}"))
        if len(data) != count * dtype.itemsize:
            raise ValueError("a storage has another length than its tensors")
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    content = Unpickler(archive.open(pickled), storage).load()
    return dict(flatten(content)) if isinstance(content, Inert) else content

def read_legacy(file):
    """What `torch.save` wrote before 1.6, a pickle each: a magic number, version, machine, content,
    names of storages; then each storage's length and bytes."""
    storages = {}

    def storage(key):
        if key[0] != "storage" or key[-1] is not None:
            raise ValueError("it holds whole modules, or parts of storages; save a state dict")
        _, dtype, name, _, count, _ = key
        return storages.setdefault(name, torch.empty(count, dtype=dtype))

    magic, _, _, content, names = (Unpickler(file, storage).load() for _ in range(5))
    if magic != 0x1950A86A20F9469CFC6C:
        raise ValueError("it is no file by torch.save")
    for name in names:
        data = storages[name].view(torch.uint8).numpy()
        count = int.from_bytes(file.read(8), "little")
        if count != len(storages[name]) or file.readinto(data) != len(data):
            raise ValueError("a storage has another length than its tensors")
    return content

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,  # by safetensors' names
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}

def read_safetensors(file):
    """{name: tensor} of a .safetensors file (github.com/huggingface/safetensors, Format): the
    header's length, the header in JSON, the tensors without a gap. The format has no checksums: a
    changed bit in a tensor goes unnoticed."""
    length = int.from_bytes(file.read(8), "little")
    size = os.fstat(file.fileno()).st_size - 8 - length  # of all tensors together
    if length > 10**8 or size < 0:
        raise ValueError("its header is larger than the file, or than 100 MB")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    end, tensors = 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        start, stop = entry["data_offsets"]
        if start != end or stop > size or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is not where, or as large as, its shape asks for")
        tensors[name], end = torch.empty(shape, dtype=dtype), stop
        file.readinto(tensors[name].flatten().view(torch.uint8).numpy())
    if end != size:
        raise ValueError("it does not end where its tensors do")
    return tensors

def read_file(file):
    """The content of an open file, whose first bytes tell its kind. Damaged ones raise anything."""
    head = file.read(262)
    file.seek(0)
    packed = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")
    if head[8:9] == b"{":  # behind a length, which may be any bytes, those of a zip, too
        return read_safetensors(file)
    if head.startswith(b"PK"):
        return read_zip(file)
    if not head:
        raise ValueError("it is empty: get it again")
    if files.is_web_page(head):
        raise ValueError("it is a web page: get the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("it is a pointer of git-lfs: run `git lfs pull` where it is from")
    if head.startswith(packed) or head[257:262] == b"ustar":
        raise ValueError("it is an archive: unpack it")
    return read_legacy(file)

def read_checkpoint(path):
    """What a file by torch.save, of any version, a TorchScript archive or a .safetensors file has:
    tensors (on the CPU) and plain values in dicts and lists, whatever its name. Nothing in it is
    executed. Raises OSError; ValueError, which tells what a file is that is no checkpoint."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, expected a checkpoint: name a file in it")
    with open(path, "rb") as file:
        try:
            return read_file(file)
        except Exception as error:
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            raise ValueError(f"{path} is no checkpoint of tensors, or damaged ({reason})") from None

def read_own(path, advice):
    """The dict in a file that `files.save` wrote. Raises FileNotFoundError; `files.Damaged`, which
    ends in `advice`, for another file or version."""
    with files.undamaged(path, advice):
        content = read_checkpoint(path)
        if content.pop("format") != files.FORMAT:
            raise ValueError
    return content

# The network in it --------------------------------------------------------------------------------
# Under which names programs keep a network, in the order in which one of several is taken: what was
# trained before its running average and its teacher.
KEYS = ("state_dict", "model", "model_state_dict", "net", "network", "module", "student", "weights",
        "params", "state_dict_ema", "model_ema", "ema", "teacher")
BESIDE = ("teacher", "criterion", "loss", "ema", "model_ema", "n_averaged")  # are no layers

def say_taken(path, taken, others):
    if others:
        files.note(f"{path} holds {taken} and {', '.join(others)}; {taken} is read")

def states(content, keys=()):
    """Each dict of tensors in dicts under `KEYS`, inner ones first: (its keys, {name: tensor})."""
    for key in KEYS if len(keys) < 5 else ():  # a pickle may hold itself
        if isinstance(content.get(key), dict):
            yield from states(content[key], (*keys, key))
    state = {name: value for name, value in content.items()
             if isinstance(name, str) and torch.is_tensor(value)}
    if state:
        yield keys, state

def unwrapped(state, path):
    """{name: tensor} without what wraps the network, in any order and depth: `_orig_mod.` of
    torch.compile anywhere, `student.` beside any names, and what all names begin with but those
    of no layers: `module.` of DataParallel, `model.`, `backbone.`, ..."""
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while True:
        heads = sorted({name.partition(".")[0] for name in state})
        modules = any(name.count(".") > 1 for name in state)  # else one head is that of a layer
        taken = next((head for head in heads if head == "student" or (
            {head, *BESIDE}.issuperset(heads) and (head in KEYS or modules))), None)
        if taken is None or taken in state:  # the latter is a tensor's whole name
            return state
        say_taken(path, taken, [head for head in heads if head != taken])
        state = {name.removeprefix(f"{taken}."): tensor for name, tensor in state.items()
                 if name.startswith(f"{taken}.")}

def read_state_dict(path):
    """{name: tensor} of a checkpoint: bare or, at any depth, under one of `KEYS`, without the
    prefixes of what wrapped the network; one of several networks is taken in the order of `KEYS`,
    and `note` says which. Raises as `read_checkpoint`, and ValueError where there is none."""
    content = read_checkpoint(path)
    networks = list(states(content)) if isinstance(content, dict) else []
    if not networks:
        there = textwrap.shorten(str(list(content)), 80) if isinstance(content, dict) else "none"
        raise ValueError(f"{path}: no state dict, neither bare nor under 'state_dict', 'model' or "
                         f"'net'; the keys in it are {there}")
    keys, state = networks[0]
    others = [".".join(other) for other, _ in networks if other != keys[: len(other)]]
    say_taken(path, ".".join(keys), others)
    state = unwrapped(state, path)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite: its training failed")
    return state

def read_about(path):
    """What this project's own student.pt says of itself beside its tensors; {} for a file that says
    none of it. Raises as `read_checkpoint`."""
    about = ("model_name", "dataset", "class_names", "class_ids", "mean", "std", "image_size")
    content = read_checkpoint(path)
    ours = isinstance(content, dict) and {"model_name", "format"} <= content.keys()
    return {key: content[key] for key in about if ours and key in content}

def match(wanted, state):
    """The tensors `state` of a file under the names of a model, which wants {name: shape}, and what
    does not fit, in words, or None."""
    matched = {}
    for key, tensor in state.items():
        plain = key.replace("compressible_", "")  # akamaster/pytorch_resnet_cifar10
        names = (key, plain, plain.replace("linear", "fc").replace("shortcut", "downsample"),
                 plain.replace("fc", "linear").replace("downsample", "shortcut"))
        ours = (name for name in names if name in wanted and (name == key or name not in state))
        matched[next(ours, key)] = tensor
    for key in wanted:
        if key.endswith("num_batches_tracked"):  # files older than PyTorch 0.4.1 have no counters
            matched.setdefault(key, torch.tensor(0))
    for key in (*wanted, *matched):
        expected = list(wanted[key]) if key in wanted else "none"
        there = list(matched[key].shape) if key in matched else "none"
        if expected != there:
            others = [name for name in matched if name not in wanted] or list(state)
            return matched, (f"tensor '{key}': expected {expected}, found {there}; in the file are "
                             f"{', '.join(others[:3])}, ... ({len(state)} tensors)")
    return matched, None
