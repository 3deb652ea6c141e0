"""Files: written whole, read with their damage named, downloaded and checked; notes, progress.
Errors are `ValueError` and `OSError` of one line that names the file."""

import contextlib
import functools
import hashlib
import http.client
import json
import os
import shutil
import sys
import time
import torch
import urllib.request
from datetime import timedelta
from pathlib import Path

FORMAT = 3  # of every file that this project writes for itself; a file of another one is refused

class Damaged(ValueError):
    """A file of this project's own, or an archive, that is not as it was written."""

def say(text, end="\n", every_rank=False):
    """One line on stderr, by torchrun's rank 0 alone; on a terminal it replaces a progress line."""
    if every_rank or "MASTER_ADDR" not in os.environ or os.environ.get("RANK", "0") == "0":
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        print(clear + " ".join(text.splitlines()), end=end, file=sys.stderr, flush=True)

note = functools.cache(say)  # a fall-back, a guess, what is left out: each text once

def cache_folder(cache_dir=None):
    """Where downloads and targets are kept. Raises ValueError where no home folder is known."""
    folder = os.path.expanduser(cache_dir or os.environ.get("RICHKD_CACHE") or "~/.cache/richkd")
    if folder.startswith("~"):
        raise ValueError(f"{folder}: no home folder is known; set RICHKD_CACHE or --cache-dir")
    return Path(folder)

def write_atomically(path, write):
    """A file by write(open file). Whatever happens, path holds all of it or what it held before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # of a full disk torch makes a RuntimeError
        reason = error if isinstance(error, OSError) else error.__context__ or error
        reason.filename = str(path)
        raise reason from None
    finally:
        temporary.unlink(missing_ok=True)

def save(path, content):
    """A dict as a checkpoint file, by torch.save, atomically; `checkpoints.read_own` reads it."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))

def write_json(path, content):
    """A dict of JSON values (NaN, which JSON lacks, is null), atomically, and their digest."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    text = json.dumps({"format": FORMAT, **content, "digest": json_digest(content)}, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))

def read_json(path, advice):
    """The dict that `write_json` wrote. Raises FileNotFoundError; `Damaged`, ending in `advice`."""
    with undamaged(path, advice):
        content = json.loads(Path(path).read_text("utf-8"))
        kind, digest = content.pop("format"), content.pop("digest")
        if kind != FORMAT or digest != json_digest(content):
            raise ValueError
    return content

@contextlib.contextmanager
def undamaged(path, advice):
    """What reading a file of another shape raises becomes one `Damaged` that names it."""
    try:
        yield
    except OSError:
        raise
    except Exception:  # damaged bytes can raise anything
        raise Damaged(f"{path} is damaged, or of another version; {advice}") from None

def read_text(path):
    """The text of a person's file: UTF-8, also with Windows' mark first; else raises `Damaged`."""
    with undamaged(path, "expected text in UTF-8"):
        return Path(path).read_text("utf-8-sig")

def json_digest(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

def file_digest(path, algorithm="sha256"):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()

def fetch(urls, path, digest, advice):
    """The file `path`; where it is absent, from the first of `urls` that has it. What came before a
    connection ended is kept as NAME.part, and gone on with. digest: "md5:" or "sha256:" and its
    first digits. Raises FileNotFoundError with every address; `Damaged` for another digest."""
    path, part, failures = Path(path), Path(f"{path}.part"), []
    for url in urls:
        if path.is_file():  # it was there, or another process was faster
            break
        try:
            receive(url, part)
            verify(part, digest, "left out")
            os.replace(part, path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            if isinstance(error, Damaged) or getattr(error, "code", 0) == 416:
                part.unlink(missing_ok=True)  # no beginning of that file
            reason = str(error)
            failures.append(f"{url} ({reason})")
    if not path.is_file():
        raise FileNotFoundError(f"could not download {' or '.join(failures)}; put it at {path}, "
                                f"or {advice}") from OSError(reason)
    return verify(path, digest, f"move it away, or {advice}")

def receive(url, part):
    """What is at an address, into `part`; what this holds is taken for the beginning, unless the
    server ignores `Range`. Raises OSError, also where the connection ends early; HTTPException."""
    if os.environ.get("HF_ENDPOINT"):  # Hugging Face's own variable, for mirrors
        url = url.replace("https://huggingface.co", os.environ["HF_ENDPOINT"].rstrip("/"))
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        done = done if answer.status == 206 else 0
        total = done + int(answer.headers.get("Content-Length", 0))
        note(f"downloading {part.stem} ({total / 1e6:.1f} MB) from {url}")
        part.parent.mkdir(parents=True, exist_ok=True)  # not before there is something to keep
        progress = Progress(part.stem, total / 1e3, "kB", done / 1e3)
        with open(part, "r+b" if done else "wb") as file:
            file.seek(done)  # not appended: another process may be writing the same
            for chunk in iter(lambda: answer.read(2**16), b""):
                done += file.write(chunk)
                progress.update(done / 1e3)
    if done < total:
        raise OSError(f"the connection ended at {done} of {total} bytes")

def verify(path, digest, advice):
    """The path, if its file's digest begins as expected; else raises `Damaged`."""
    algorithm, expected = digest.split(":")
    if not file_digest(path, algorithm).startswith(expected):
        raise Damaged(f"{path}: its {algorithm} does not begin with {expected}; {advice}")
    return path

class Progress:
    """One line on stderr: what, how much, a note, rate, time left. A terminal's is rewritten; in a
    log the last one stands, and those to keep. `start`, done before, is no part of the rate. Where
    a terminal is narrow, the rate goes, then the first parts of the note, parted by " | "."""
    def __init__(self, label, total, unit="images", start=0):
        self.label, self.total, self.unit, self.start, self.done = label, total, unit, start, start
        self.began, self.shown = time.time(), 0.0

    def update(self, done, note="", keep=False):
        self.done, now, terminal = done, time.time(), sys.stderr.isatty()
        if not (keep or done >= self.total or terminal and now - self.shown > 0.2):
            return
        self.shown, spent = now, now - self.began
        rate = (done - self.start) / max(spent, 1e-9)
        known = done < self.total and rate > 0 and spent > 2  # the first steps tell little
        time_left = timedelta(0, round((self.total - done) / rate if known else spent))
        parts = [f"{self.label} {done:.0f}/{self.total:.0f}", *filter(None, note.split(" | ")),
                 f"{rate:.0f} {self.unit}/s", f"{time_left}{' left' * known}"]
        width = shutil.get_terminal_size().columns - 1 if terminal else 10**6
        while len(" | ".join(parts)) > width and len(parts) > 2:
            del parts[-2 if parts[-2].endswith("/s") else 1]
        say(" | ".join(parts)[:width], end="" if terminal and done < self.total else "\n")
