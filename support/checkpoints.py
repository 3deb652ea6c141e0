"""Checkpoints, of other programs and this one's own: read without executing anything in them, or
refused by a ValueError or OSError of one line that names the file."""

import functools
import json
import pickle
import textwrap
import torch
import zipfile
from collections import OrderedDict
from support import files

class Inert(dict):
    """Whatever a pickle names, but for `KNOWN`: takes arguments and items, and does nothing."""
    __hash__ = object.__hash__  # a path, or a NumPy number, may be a key

    def __init__(self, *arguments, **named):
        super().__init__()

    def __call__(self, *arguments, **named):
        return self

    append = extend = __call__  # items of a list are left out

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})  # a NumPy dtype's is a tuple

def rebuild_tensor(storage, offset, size, stride, *_):
    if torch.Size(size).numel() > len(storage):
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset)

KNOWN = {
    "collections.OrderedDict": OrderedDict, "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.ByteStorage": torch.uint8, "torch.CharStorage": torch.int8,  # stand for their dtype
    **{f"torch.{name}Storage": getattr(torch, name.lower())
       for name in ("Half", "BFloat16", "Float", "Double", "Short", "Int", "Long", "Bool")}}

class Unpickler(pickle.Unpickler):
    """`find_class` is a pickle's only way to anything outside itself; here nothing is imported."""
    def find_class(self, module, name):
        return KNOWN.get(f"{module}.{name}", Inert)

def flatten(module, prefix=""):
    for name, value in module.items():
        nested = isinstance(value, Inert)
        yield from flatten(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)]

def read_zip(file):
    """What `torch.save` (since 1.6) wrote, or {dotted name: attribute} of TorchScript, by CRC."""
    archive = zipfile.ZipFile(file)
    folder = archive.namelist()[0].partition("/")[0]  # all is in one
    byteorder = f"{folder}/byteorder"
    if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
        raise ValueError("its numbers are big-endian")
    @functools.cache  # several tensors may be views of one storage
    def storage(key):
        _, dtype, record, _, count = key  # "storage", dtype, record's name, device, elements
        data = bytearray(archive.read(f"{folder}/data/{record}"))
        empty = torch.empty(0, dtype=dtype)  # of no bytes frombuffer makes none
        return torch.frombuffer(data, dtype=dtype, count=count) if data else empty
    unpickler = Unpickler(archive.open(f"{folder}/data.pkl"))
    unpickler.persistent_load = storage
    content = unpickler.load()
    return dict(flatten(content)) if isinstance(content, Inert) else content

def read_legacy(file):
    """What `torch.save` wrote before 1.6; beside tensors, as RepDistiller does, some settings."""
    shells = ("argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar")
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in shells]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose text says how to execute what is in it
        raise ValueError("it holds more than tensors and numbers: save a state dict") from None

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,  # by safetensors' names
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}

def read_safetensors(file):
    """{name: tensor} of a .safetensors file (github.com/huggingface/safetensors, Format): the
    header's length, the header in JSON, the tensors without a gap, and no checksums."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    end, tensors = 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        tensors[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        data = tensors[name].flatten().view(torch.uint8).numpy()
        start, end = end, end + len(data)
        if entry["data_offsets"] != [start, end] or file.readinto(data) < len(data):
            raise ValueError(f"{name} is not where, or as large as, its shape asks for")
    if file.read(1):
        raise ValueError("it does not end where its tensors do")
    return tensors

def read_checkpoint(path):
    """The dict in a file by torch.save, of any version, a TorchScript archive or a .safetensors
    file, whatever its name: tensors, on the CPU, and plain values in dicts and lists."""
    with open(path, "rb") as file:
        head = file.peek()
        try:
            if head[8:9] == b"{":  # behind a length, which may be any bytes, those of a zip, too
                content = read_safetensors(file)
            elif head.startswith(b"PK"):
                content = read_zip(file)
            elif head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):  # a magic number
                content = read_legacy(file)
            else:
                raise ValueError(f"it begins with {head[:23]!r}: unpack it? a web page, git-lfs?")
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, no dict")
        except Exception as error:  # a damaged file may raise anything
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
            raise ValueError(f"{path} is no checkpoint of tensors, or damaged ({reason})") from None
    return content

def read_own(path, advice):
    """What `files.save` wrote; else FileNotFoundError, `files.Damaged`, which ends in `advice`."""
    with files.undamaged(path, advice):
        content = read_checkpoint(path)
        if content.pop("format") != files.FORMAT:
            raise ValueError
    return content

# Where programs keep networks, in order of choice: what was trained, its average, its teacher.
KEYS = ("state_dict", "model", "model_state_dict", "net", "network", "module", "student", "weights",
        "params", "state_dict_ema", "model_ema", "ema", "teacher")
BESIDE = ("teacher", "criterion", "loss", "ema", "model_ema", "n_averaged")  # are no layers

def tensors(content, place="", depth=5):
    """(name, tensor) of each in a dict or, behind key and "\\0", in one there named by `KEYS`."""
    for name, value in content.items():
        if isinstance(name, str) and torch.is_tensor(value):
            yield place + name, value.detach()
        elif depth and isinstance(value, dict) and any(key in str(name) for key in KEYS):
            yield from tensors(value, f"{place}{name}\0", depth - 1)  # a pickle may hold itself

def unwrapped(state, path):
    """{name: tensor} of `tensors` without what wraps the network, at any depth: dicts, `_orig_mod.`
    of torch.compile, `student.` beside any, what all names but those of no layers begin with
    (`module.`, `model.`, `backbone.`). Of several networks the first in `KEYS` is read, as said."""
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while True:
        nested = {name: tensor for name, tensor in state.items() if "\0" in name}
        state, mark = nested or state, "\0" if nested else "."
        heads = sorted({name.partition(mark)[0] for name in state},
                       key=lambda head: ([*KEYS, head].index(head), head))
        modules = any(name.count(".") > 1 for name in state)  # else one head is that of a layer
        taken = next((head for head in heads if nested or head == "student" or (
            {head, *BESIDE}.issuperset(heads) and (head in KEYS or modules))), None)
        if taken is None or taken in state:  # the latter is a tensor's whole name
            return state
        if len(heads) > 1:
            others = ", ".join(head for head in heads if head != taken)
            files.note(f"{path} holds {taken} and {others}; {taken} is read")
        state = {name.removeprefix(taken + mark): tensor for name, tensor in state.items()
                 if name.startswith(taken + mark)}

def read_state_dict(path):
    """{name: tensor} of a checkpoint, `unwrapped`. ValueError: none, or not of finite numbers."""
    content = read_checkpoint(path)
    state = unwrapped(dict(tensors(content)), path)
    if not state:
        raise ValueError(f"{path}: expected a state dict, found only {str([*content])[:80]}")
    for name, tensor in state.items():
        plain = tensor.dtype in DTYPES.values() and not (tensor.is_sparse or tensor.is_meta)
        whole = name.endswith("weight") and not tensor.is_floating_point()
        if not plain or whole or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name!r} holds other than plain, finite numbers")
    return state

def match(wanted, state, problem):
    """The tensors `state` of a file under the names of a model's state dict, `wanted`. Raises
    ValueError, beginning with `problem`, where names or shapes differ."""
    # files older than PyTorch 0.4.1 have no counters
    matched = {key: torch.tensor(0) for key in wanted if key.endswith("num_batches_tracked")}
    for key, tensor in state.items():
        plain = key.replace("compressible_", "")  # akamaster/pytorch_resnet_cifar10
        names = (key, plain, plain.replace("linear", "fc").replace("shortcut", "downsample"),
                 plain.replace("fc", "linear").replace("downsample", "shortcut"))
        ours = (name for name in names if name in wanted and (name == key or name not in state))
        matched[next(ours, key)] = tensor
    for key in (*wanted, *matched):
        expected, found = [[*one[key].shape] if key in one else None for one in (wanted, matched)]
        if expected != found:
            given = f"{found}, with {[*state][:3]}"
            raise ValueError(f"{problem}: tensor {key!r}: expected {expected}, found {given}")
    return matched
