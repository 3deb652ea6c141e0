"""Files: written whole, downloaded and checked; what is said of them, the progress line.

Needs torch alone. Errors are `ValueError` and `OSError` of one line that names the file."""

import contextlib
import glob
import hashlib
import http.client
import io
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch

from support.checkpoints import is_web_page, note, read_checkpoint

FORMAT = 2  # of every file that this project writes for itself; a file of another one is refused
CHUNK = 2**16  # bytes of a download between two looks at the progress line


def one_line(error):
    """The last line of an error's text (torch and torchvision write several), or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def cache_folder(cache_dir=None):
    """Where downloads and targets are kept: cache_dir, else $RICHKD_CACHE, else ~/.cache/richkd.
    Raises ValueError where the folder is in a home that is not known, as for a container's user."""
    folder = os.path.expanduser(cache_dir or os.environ.get("RICHKD_CACHE") or "~/.cache/richkd")
    if folder.startswith("~"):
        raise ValueError(f"{folder}: no home folder is known; set RICHKD_CACHE to a folder, or "
                         "pass --cache-dir")
    return Path(folder)


def check_folder(path):
    """Raises NotADirectoryError where `path` is no folder and could not be made one, which is not
    made yet."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is no folder; expected one, or a name for a new one")


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
        take_place(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # that of a full disk names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # of a killed process
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed its own
            if time.time() - stale.stat().st_mtime > 86400:
                stale.unlink()


def take_place(temporary, path):
    """A file, written and flushed, becomes `path`, also after a power cut."""
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


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


def read_text(path):
    """The text of a file that a person may have written: UTF-8, with or without the mark that
    Windows puts first. Raises ValueError where it is not."""
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected text in UTF-8; save it as that") from None


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


# Downloads ----------------------------------------------------------------------------------------


def file_digest(path, algorithm="sha256"):
    """The hexadecimal digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def fetch(urls, path, digest, advice):
    """The file `path`; where it is absent, downloaded from the first of `urls` that has it. What
    came before a connection ended is kept beside it as NAME.*.part, and gone on with.

    digest: "md5:" or "sha256:" and hexadecimal digits, the first few suffice; checked each time.
    Raises FileNotFoundError with every address, the place and `advice`; ValueError for a file that
    lies there with another digest.
    """
    path, (algorithm, expected) = Path(path), digest.split(":")
    if path.is_file():
        found = file_digest(path, algorithm)
        if not found.startswith(expected):
            raise ValueError(f"{path}: {algorithm} is {found}, expected {expected}; move it away, "
                             f"or {advice}")
        return path
    failures = []
    with partial_file(path, expected) as part:
        for url in map(at_endpoint, urls):
            try:
                download(url, part, algorithm, expected)
                take_place(part, path)
                return path
            except (OSError, ValueError, http.client.HTTPException) as error:
                failures.append(f"{url} ({one_line(error)})")
                note(f"could not download {failures[-1]}")
    raise FileNotFoundError(f"could not download {' or '.join(failures)}; put it at {path}, "
                            f"or {advice}")


def at_endpoint(url):
    """An address on huggingface.co at $HF_ENDPOINT, where that is set, as Hugging Face has it."""
    origin, endpoint = "https://huggingface.co/", os.environ.get("HF_ENDPOINT")
    if endpoint and url.startswith(origin):
        return f"{endpoint.rstrip('/')}/{url.removeprefix(origin)}"
    return url


@contextlib.contextmanager
def partial_file(path, expected):
    """The name of this process's own partial file of `path`: a new one, or the largest of those
    that another process left. A download writes at least every ten seconds, or ends; what ended by
    an exception is made old, so that the next one need not wait."""
    check_folder(path.parent)
    part = path.with_name(f"{path.name}.{expected[:8]}.{os.getpid()}.part")
    left = path.parent.glob(f"{glob.escape(path.name)}.{expected[:8]}.*.part")
    with contextlib.suppress(FileNotFoundError):  # yet another process was faster
        for other in sorted(left, key=lambda file: file.stat().st_size):
            if time.time() - other.stat().st_mtime > 60:
                os.replace(other, part)
    try:
        yield part
    finally:
        if part.exists():
            os.utime(part, (0, 0))


def download(url, part, algorithm, expected):
    """What is at an address, into `part`, which may hold its beginning. Raises OSError,
    HTTPException, and ValueError where another file came, of which nothing stays."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    anew = not done
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            anew = anew or answer.status != 206
            if anew or answer.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                receive(answer, url, part, 0 if anew else done)
    except urllib.error.HTTPError as error:
        error.close()
        if anew or error.code != 416:  # nothing follows what is here
            raise
    found = file_digest(part, algorithm)
    if not found.startswith(expected):
        part.unlink()
        if anew:
            raise ValueError(f"{algorithm} of what came is {found}, expected {expected}")
        note(f"{part} was the beginning of another file; from the start")
        download(url, part, algorithm, expected)


def receive(answer, url, part, done):
    """Append an answer to the first `done` bytes of `part`, with a progress line, which goes to a
    log every minute. Raises ValueError for a web page, OSError where the connection ends early."""
    length = answer.headers.get("Content-Length")
    total = done + int(length or 0)
    chunk = answer.read(CHUNK)
    if not chunk:
        raise OSError("nothing came")
    if not done and is_web_page(chunk):
        raise ValueError("a web page came")
    name, size = part.name.rsplit(".", 3)[0], f" ({total / 1e6:.1f} MB)" if length else ""
    note(f"downloading {name}{size} from {url}" + (f" behind {done / 1e6:.1f} MB" if done else ""))
    progress, said = Progress(name, total / 1e6, "MB", done / 1e6), time.time()
    part.parent.mkdir(parents=True, exist_ok=True)  # not before there is something to keep
    with open(part, "ab" if done else "wb") as file:
        while chunk:
            file.write(chunk)
            done += len(chunk)
            late = time.time() - said > 60
            said = time.time() if late else said
            if done < total:
                progress.update(done / 1e6, keep=late)
            chunk = answer.read(CHUNK)
        file.flush()
        os.fsync(file.fileno())
    if done < total:
        raise OSError(f"the connection ended at {done} of {total} bytes")
    progress.total = done / 1e6
    progress.update(progress.total, keep=True)


# Progress -----------------------------------------------------------------------------------------


def duration(seconds):
    """"0:07", "1:02:03"."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """One line on stderr: what, how much of it, rate, time left. On a terminal it rewrites itself;
    elsewhere (in a log) the lines to keep are printed. `start` was done before and does not count
    into the rate. MB have a digit behind the point."""

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
        digits = 1 if self.unit == "MB" else 0
        parts = (f"{self.label} {done:.{digits}f}/{self.total:.{digits}f}", note,
                 f"{rate:.{digits}f} {self.unit}/s",
                 left if done < self.total else duration(now - self.began))
        line = " | ".join(part for part in parts if part)
        if terminal:  # a line that wraps could not be rewritten
            line = "\r\033[K" + line[: shutil.get_terminal_size().columns - 1]
        end = "" if terminal and done < self.total else "\n"
        print(line, end=end, file=sys.stderr, flush=True)
