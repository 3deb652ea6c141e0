"""Files: written whole, read without executing anything, downloaded and checked; the progress line.

Needs torch alone. Errors are `ValueError` and `OSError` of one line that names the file."""

import contextlib
import hashlib
import http.client
import io
import json
import os
import shutil
import sys
import time
import urllib.request
from pathlib import Path

import torch

from checkpoints import note, read_checkpoint

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
            note(f"could not download {failures[-1]}")
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
