"""Files: written whole, read without executing anything, downloaded and checked; the progress line.

Needs torch alone. Errors are `ValueError` and `OSError` of one line that names the file."""

import contextlib
import hashlib
import http.client
import io
import json
import math
import mmap
import os
import pickle
import shutil
import struct
import sys
import textwrap
import time
import urllib.request
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import torch

FORMAT = 2  # of every file that this project writes for itself; a file of another one is refused
CHUNK = 2**20  # bytes of a download between two looks at the progress line


def one_line(error):
    """The last line of an error's text (torch and torchvision write several), or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def cache_folder(cache_dir=None):
    """Where downloads and targets are kept: cache_dir, else $RICHKD_CACHE, else ~/.cache/richkd."""
    folder = cache_dir or os.environ.get("RICHKD_CACHE") or "~/.cache/richkd"
    return Path(os.path.expanduser(folder))


# Writing ------------------------------------------------------------------------------------------


def write_atomically(path, data):
    """Write `data`, bytes or an iterator of bytes: whatever happens, kill -9 and a full disk
    included, `path` holds all of it or what it held before. Raises OSError, naming the file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for part in [data] if isinstance(data, (bytes, memoryview)) else data:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # flush the folder, so that the rename outlasts a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        error.filename = error.filename or str(path)  # that of a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed here
        if time.time() - stale.stat().st_mtime > 86400:
            stale.unlink(missing_ok=True)


def save(path, content):
    """A dict as a checkpoint file, atomically. Through memory, because torch reports a full disk as
    a RuntimeError without a reason, Python as an OSError with one."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getbuffer())


def write_json(path, content):
    """A dict of JSON values, atomically, with a digest by which `read_own` notices a change."""
    text = json.dumps({"format": FORMAT, **content, "digest": json_digest(content)}, indent=1)
    write_atomically(path, text.encode())


def json_digest(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# Reading ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def undamaged(path, advice):
    """What reading a file of another shape raises becomes one ValueError that names it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError):
        raise ValueError(f"{path} is damaged; {advice}") from None


def read_own(path, advice):
    """The dict in a file that `save` or (.json) `write_json` wrote. Raises FileNotFoundError, and
    ValueError, ending in `advice`, for damage and for another format."""
    is_json = Path(path).suffix == ".json"
    with undamaged(path, advice):
        content = json.loads(Path(path).read_text("utf-8")) if is_json else read_checkpoint(path)
        found = content.pop("format", 1)
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, this version reads {FORMAT}; {advice}")
    if is_json and content.pop("digest", "") != json_digest(content):
        raise ValueError(f"{path} is damaged; {advice}")
    return content


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


# Downloads ----------------------------------------------------------------------------------------


def file_digest(path, algorithm="sha256"):
    """The hexadecimal digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def fetch(urls, path, digest, advice):
    """The file `path`, downloaded where it is absent from the first of `urls` that has it.

    digest: "md5:" or "sha256:" and hexadecimal digits, the first few suffice; checked each time.
    Raises FileNotFoundError with every address, the place and `advice`; ValueError for a file that
    lies there with another digest.
    """
    path, (algorithm, expected) = Path(path), digest.split(":")
    failures = []
    for url in () if path.is_file() else urls:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                progress = Progress(path.name, int(answer.headers.get("Content-Length") or 0), "B")
                write_atomically(path, checked(answer, algorithm, expected, progress))
            break
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{url} ({one_line(error)})")
            print(f"could not download {failures[-1]}", file=sys.stderr)
    if not path.is_file():
        raise FileNotFoundError(f"could not download {' or '.join(failures)}; put it at {path}, "
                                f"or {advice}")
    found = file_digest(path, algorithm)
    if not found.startswith(expected):
        raise ValueError(f"{path}: {algorithm} is {found}, expected {expected}; move it away, "
                         f"or {advice}")
    return path


def checked(answer, algorithm, expected, progress):
    """The chunks of a download; ValueError, at the end, where their digest is another one."""
    digest = hashlib.new(algorithm)
    while chunk := answer.read(CHUNK):
        digest.update(chunk)
        progress.update(progress.done + len(chunk))
        yield chunk
    if not digest.hexdigest().startswith(expected):
        raise ValueError(f"{algorithm} of what came is {digest.hexdigest()}, expected {expected}")
    progress.update(progress.done, keep=True)


# Progress -----------------------------------------------------------------------------------------


def duration(seconds):
    """"0:07", "1:02:03"."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """One line on stderr: what, how much of it, rate, time left. On a terminal it rewrites itself;
    elsewhere (in a log) the lines to keep are printed. `start` was done before and does not count
    into the rate."""

    def __init__(self, label, total, unit="images", start=0):
        self.label, self.total, self.unit = label, total, unit
        self.start, self.done = start, start
        self.began, self.shown = time.time(), 0.0

    def update(self, done, note="", keep=False):
        """`done` of the total is ready; `note` is shown beside it; `keep`: a line for the log."""
        self.done = done
        terminal, now = sys.stderr.isatty(), time.time()
        if not keep and (not terminal or now - self.shown < 0.2):
            return
        self.shown = now
        rate = (done - self.start) / max(now - self.began, 1e-9)
        left = f"{duration((self.total - done) / max(rate, 1e-9))} left"
        parts = (f"{self.label} {done}/{self.total}", note, f"{rate:.0f} {self.unit}/s",
                 left if done < self.total else duration(now - self.began))
        line = " | ".join(part for part in parts if part)
        if terminal:  # a line that wraps could not be rewritten
            line = "\r\033[K" + line[: shutil.get_terminal_size().columns - 1]
        end = "" if terminal and done < self.total else "\n"
        print(line, end=end, file=sys.stderr, flush=True)
