"""Checkpoints as other programs write them, read without executing anything in them.

Imports torch alone. Errors are `ValueError` and `OSError` of one line that names the file."""

import json
import math
import mmap
import os
import pickle
import struct
import sys
import textwrap
import zipfile
import zlib
from collections import OrderedDict

import torch


def note(text):
    """Say a fall-back, a guess, what is left out: one line on stderr, once a process for each text
    (`note.said` has them, which tests clear), and by rank 0 alone."""
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    told = os.environ.get("RANK", "") if "LOCAL_RANK" in os.environ else ""  # by torchrun
    rank = torch.distributed.get_rank() if ranks else told if told.isdecimal() else 0
    if int(rank) == 0 and text not in note.said:
        clear = "\r\033[K" if sys.stderr.isatty() else ""  # what is left of a progress line
        print(clear + " ".join(text.splitlines()), file=sys.stderr)
    note.said.add(text)


note.said = set()


class Shell(dict):
    """Stands for an object of a class that is not imported: attributes and items, no action."""
    __hash__ = object.__hash__  # a path, or a NumPy number, may be a key

    def __init__(self, *arguments, **named):
        super().__init__()

    def __setstate__(self, state):
        vars(self).update(state if isinstance(state, dict) else {})  # a NumPy dtype's is a tuple

    append = extend = lambda self, item: None  # items of a list are left out


def rebuild_tensor(data, offset, size, stride, *_):
    if math.prod(size) > data.numel():
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return data.as_strided(size, stride, offset)


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,  # by safetensors' names
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


class TensorUnpickler(pickle.Unpickler):
    """Admits tensors and plain values, turns known bystanders of theirs (command-line arguments,
    paths, NumPy numbers, TorchScript modules) into shells, refuses all else by its name."""
    KNOWN = {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor": rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch.jit._pickle.build_intlist": list,
        "torch.Size": tuple,
        **{f"builtins.{kind.__name__}": Shell for kind in (
            object, list, tuple, dict, set, frozenset, int, float, complex, bool, str, bytes)},
        "torch.ByteStorage": torch.uint8, "torch.CharStorage": torch.int8,  # named by dtype
        **{f"torch.{name}Storage": getattr(torch, name.lower())
           for name in ("Half", "BFloat16", "Float", "Double", "Short", "Int", "Long", "Bool")},
        **{str(dtype): dtype for dtype in DTYPES.values()},
    }
    SHELLS = ("__torch__.", "argparse.", "collections.", "copyreg._reconstructor", "datetime.",
              "easydict.", "functools.partial", "lightning.", "lightning_fabric.", "numpy.",
              "omegaconf.", "pathlib.", "pytorch_lightning.", "torch.device", "torch.optim.",
              "torch.torch_version.", "types.SimpleNamespace", "typing.", "yacs.", "_codecs.encode")

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("__builtin__", "builtins").replace("copy_reg", "copyreg")
        if name in self.KNOWN:
            return self.KNOWN[name]
        if name.startswith(self.SHELLS):
            return Shell
        raise pickle.UnpicklingError(f"it asks for {name}, which is refused; save a state dict")


def read_zip(file):
    """What `torch.save` (since 1.6) wrote, or {dotted name: attribute} of a TorchScript module; the
    tensors are views of the mapped file, each checked against its CRC."""
    def flatten(shell, prefix):
        for name, value in vars(shell).items():
            nested = isinstance(value, Shell)
            yield from flatten(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]

    def storage(key):
        _, dtype, record, _, elements = key  # "storage", dtype, record's name, device, elements
        info = archive.getinfo(f"{folder}data/{record}")
        lengths = struct.unpack_from("<HH", mapped, info.header_offset + 26)  # of name and extra
        start = info.header_offset + 30 + sum(lengths)
        data = memoryview(mapped)[start : start + info.file_size]
        if zlib.crc32(data) != info.CRC or len(data) != elements * dtype.itemsize:
            raise zipfile.BadZipFile(f"record {info.filename} is damaged")
        return torch.frombuffer(data, dtype=dtype) if elements else torch.empty(0, dtype=dtype)

    archive = zipfile.ZipFile(file)
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    names = archive.namelist()
    pickled = next((name for name in names if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise ValueError(f"it is an archive of other files ({', '.join(names[:3])}): unpack it")
    folder = pickled.removesuffix("data.pkl")
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
    unpickler = TensorUnpickler(archive.open(pickled), encoding="latin1")  # of Python 2's strings
    unpickler.persistent_load = storage
    content = unpickler.load()
    return dict(flatten(content, "")) if isinstance(content, Shell) and not content else content


def read_legacy(file):
    """What `torch.save` wrote before 1.6: a magic number, version, machine, the object, the names
    of its storages; then each storage's length and bytes."""
    storages, size = {}, os.fstat(file.fileno()).st_size

    def storage(key):
        _, dtype, name, _, elements, view = key
        if view is not None or elements * dtype.itemsize > size:
            raise pickle.UnpicklingError("a storage is a view, or larger than the file")
        return storages.setdefault(name, torch.empty(elements, dtype=dtype))

    content = None
    for part in range(5):
        unpickler = TensorUnpickler(file, encoding="latin1")
        unpickler.persistent_load = storage
        found = unpickler.load()
        if part == 0 and found != 0x1950A86A20F9469CFC6C:
            raise pickle.UnpicklingError("it is no file by torch.save")
        content = found if part == 3 else content
    for name in found:
        data = storages[name]
        if struct.unpack("<q", file.read(8)) != (len(data),):
            raise pickle.UnpicklingError("a storage has another length than its tensors")
        if len(data):
            data.copy_(torch.frombuffer(bytearray(file.read(data.nbytes)), dtype=data.dtype))
    return content


def read_safetensors(file):
    """{name: tensor} of a .safetensors file (github.com/huggingface/safetensors, Format): the
    header's length, the header in JSON, the tensors without a gap, here views of the mapped file.
    The format has no checksums: a changed bit in a tensor goes unnoticed."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    (length,) = struct.unpack_from("<Q", mapped)
    if length > min(10**8, len(mapped) - 8):
        raise ValueError("its header is larger than the file, or than 100 MB")
    header = json.loads(mapped[8 : 8 + length].decode("utf-8"), object_pairs_hook=unique)
    header.pop("__metadata__", None)
    data, end, tensors = memoryview(mapped)[8 + length :], 0, {}
    for (start, stop), name in sorted((header[name]["data_offsets"], name) for name in header):
        dtype, shape = DTYPES[header[name]["dtype"]], header[name]["shape"]
        if any(type(n) is not int or n < 0 for n in [*shape, start, stop]):
            raise ValueError(f"{name} has a size that is no number")
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} is not where, or as large as, its shape asks for")
        flat = data[start:stop]
        flat = torch.frombuffer(flat, dtype=dtype) if flat else torch.empty(0, dtype=dtype)
        tensors[name], end = flat.view(shape), stop
    if end != len(data):
        raise ValueError("it does not end where its tensors do")
    return tensors


def is_web_page(head):
    """Whether what begins with these bytes is HTML, or XML, in which some servers refuse."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:9].lower()
    return text.startswith((b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<error"))


def no_checkpoint(head):
    """What a file that begins with these bytes (262, or all) is and what to do, or None."""
    packed = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd")
    if not head:
        return "it is empty: get it again"
    if is_web_page(head):
        return "it is a web page: get the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs: run `git lfs pull` where it is from"
    if head.startswith(packed) or head[257:262] == b"ustar":
        return "it is an archive: unpack it"
    return None


def read_checkpoint(path):
    """What a file by torch.save, of any version, a TorchScript archive or a .safetensors file has:
    tensors (on the CPU) and plain values in dicts and lists. The bytes tell the kind, not the name.
    Nothing in it is executed. Raises ValueError, naming what is refused, and telling what a file is
    that is no checkpoint."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, expected a checkpoint: name a file in it")
    with open(path, "rb") as file:
        head = file.read(262)
        file.seek(0)
        try:
            if head[8:9] == b"{":  # behind a length, which may be any bytes, those of a zip, too
                return read_safetensors(file)
            told = no_checkpoint(head)
            if told:
                raise ValueError(told)
            return read_zip(file) if head.startswith(b"PK") else read_legacy(file)
        except Exception as error:  # damaged bytes can raise anything
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            raise ValueError(f"{path}: not a checkpoint of tensors and plain values, or damaged "
                             f"({reason}); nothing in it was executed") from None


# The network in it --------------------------------------------------------------------------------

# Under which names programs keep a network, in the order in which one of several is taken: what was
# trained before its running average and its teacher.
KEYS = ("state_dict", "model", "model_state_dict", "net", "network", "module", "student", "weights",
        "params", "state_dict_ema", "model_ema", "ema", "teacher")
BESIDE = ("teacher", "criterion", "loss", "ema", "model_ema", "n_averaged")  # are no layers


def say_taken(path, taken, others):
    if others:
        note(f"{path} holds {taken} and {', '.join(others)}; {taken} is read")


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
    content = content if isinstance(content, dict) else {}
    found = list(states(content))
    if not found:
        there = textwrap.shorten(str([key for key in content if isinstance(key, str)]), 80)
        raise ValueError(f"{path}: no tensors in it: expected a state dict, bare or under "
                         f"'state_dict', 'model' or 'net', found {there}")
    keys, state = found[0]
    others = [".".join(other) for other, _ in found if other != keys[: len(other)]]
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
