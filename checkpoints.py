"""Checkpoints as other programs write them: read without executing anything in them.

Imports torch and the standard library alone. Errors are `ValueError` of one line that names the
file, and `OSError`."""

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
    (`note.said`, which tests clear), and by rank 0 alone."""
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if ranks else int(os.environ.get("RANK") or 0)
    if rank == 0 and text not in note.said:
        print(text, file=sys.stderr)
    note.said.add(text)


note.said = set()


class Shell(dict):
    """Stands for an object of a class that is not imported: attributes and items, no action."""

    def __init__(self, *arguments, **named):
        super().__init__()

    def __setstate__(self, state):
        vars(self).update(state if isinstance(state, dict) else {})  # a NumPy dtype's is a tuple


def rebuild_tensor(data, offset, size, stride, *_):
    if math.prod(size) > data.numel():
        raise pickle.UnpicklingError("a tensor is larger than its storage")
    return data.as_strided(size, stride, offset)


class TensorUnpickler(pickle.Unpickler):
    """Admits tensors and plain values, turns known bystanders of theirs (command-line arguments,
    paths, NumPy numbers, TorchScript modules) into shells, refuses all else by its name."""
    KNOWN = {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor": rebuild_tensor,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch.jit._pickle.build_intlist": list,
        "torch.Size": tuple,
        "torch.ByteStorage": torch.uint8, "torch.CharStorage": torch.int8,  # named by dtype
        **{f"torch.{name}Storage": getattr(torch, name.lower())
           for name in ("Half", "BFloat16", "Float", "Double", "Short", "Int", "Long", "Bool")},
        **{str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16,
                                           torch.float64, torch.int64, torch.uint8)},
    }
    SHELLS = ("__torch__.", "argparse.Namespace", "collections.", "copyreg._reconstructor",
              "datetime.", "numpy.", "pathlib.", "types.SimpleNamespace", "_codecs.encode",
              "builtins.object", "builtins.list", "builtins.dict", "builtins.int", "builtins.set")

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("__builtin__", "builtins").replace("copy_reg", "copyreg")
        if name in self.KNOWN:
            return self.KNOWN[name]
        if name.startswith(self.SHELLS):
            return Shell
        raise pickle.UnpicklingError(f"it asks for {name}, which is refused")


def read_zip(file):
    """What `torch.save` (since 1.6) or TorchScript wrote; the tensors are views of the mapped file,
    each checked against its CRC."""
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
    pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    folder = pickled.removesuffix("data.pkl")
    unpickler = TensorUnpickler(archive.open(pickled))
    unpickler.persistent_load = storage
    return unpickler.load()


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
        unpickler = TensorUnpickler(file)
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


def read_checkpoint(path):
    """What a file by torch.save, of any version, or a TorchScript archive holds: tensors (on the
    CPU) and plain values in dicts and lists, a TorchScript module as a `Shell`.

    Nothing in the file is executed. Raises ValueError, naming what it asks for where refused.
    """
    with open(path, "rb") as file:
        try:
            return read_zip(file) if file.peek(2)[:2] == b"PK" else read_legacy(file)
        except Exception as error:  # damaged bytes can raise anything
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            raise ValueError(f"{path}: not a checkpoint of tensors and plain values, or damaged "
                             f"({reason}); nothing in it was executed") from None


def read_state_dict(path):
    """{name: tensor} of a checkpoint: bare, or under "state_dict", "model" or "net", without the
    `module.` of DataParallel. Raises as `read_checkpoint`, and ValueError where there is none."""
    def flatten(shell, prefix):
        for name, value in vars(shell).items():
            nested = isinstance(value, Shell)
            yield from flatten(value, f"{prefix}{name}.") if nested else [(prefix + name, value)]

    content = read_checkpoint(path)
    if isinstance(content, Shell) and not content:
        content = dict(flatten(content, ""))  # a TorchScript module's attributes are the state
    for key in ("state_dict", "model", "net"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    items = content.items() if isinstance(content, dict) else ()
    state = {str(name).removeprefix("module."): value for name, value in items
             if isinstance(value, torch.Tensor)}
    if not state:
        raise ValueError(f"{path}: no tensors in it: expected a state dict, bare or under "
                         "'state_dict', 'model' or 'net'")
    return state


ABOUT = ("model_name", "dataset", "class_names", "class_ids", "mean", "std", "image_size")


def read_about(path):
    """What this project's own student.pt says of itself beside its tensors, those of `ABOUT` that
    it has; {} for a file that says none of it. Raises as `read_checkpoint`."""
    content = read_checkpoint(path)
    known = isinstance(content, dict) and "model_name" in content
    return {key: content[key] for key in ABOUT if known and key in content}
