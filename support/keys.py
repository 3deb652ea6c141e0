"""What a result depends on: what tells one data set from another, and files that are kept by it.

    before = identity(split)                   # JSON values: classes, number and content of images
    difference(before, identity(other))        # None, or what differs, in words

Whatever is kept (teachers, targets, runs, reports) has these in its key, never a path alone.
"""

import hashlib
import itertools
import json
import math
import os
from pathlib import Path

import torch

from support import files, folders


def digest_files(paths):
    """SHA-256 of files, given as a Stream has them: of each the last two parts of its name and its
    size; of a JPEG or PNG the last 256 bytes, in which the one ends its pixels and the other has
    its checksum; in a zip its checksum; of any other file all of it. 100,000 JPEGs take a second.
    """
    digest = hashlib.sha256()
    for path in paths:
        name = path[1] if isinstance(path, tuple) else str(path)
        if isinstance(path, tuple) and not os.path.isdir(path[0]):
            entry = folders.open_zip(path[0]).getinfo(path[1])
            size, content = entry.file_size, b"%d" % entry.CRC
        else:
            path = os.path.join(*path) if isinstance(path, tuple) else path
            size, content = size_and_content(path)
        name = os.fsencode("/".join(name.replace(os.sep, "/").rsplit("/", 2)[-2:]))
        digest.update(b"%d %d %b %b" % (len(name), size, name, content))
    return digest.hexdigest()


def size_and_content(path):
    """A file's size, and bytes that change with its content; see `digest_files`."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # faster than a file object
    try:
        size = os.lseek(file, 0, os.SEEK_END)
        if not str(path)[-5:].lower().endswith((".jpeg", ".jpg", ".png")):
            return size, files.file_digest(path).encode()
        if hasattr(os, "pread"):
            return size, os.pread(file, 256, max(0, size - 256))
        os.lseek(file, max(0, size - 256), os.SEEK_SET)
        return size, os.read(file, 256)
    finally:
        os.close(file)


def identity(split):
    """What tells a split from any other, as JSON has it: {"images": N, "class_names", "class_ids",
    "content": SHA-256 of labels and images}. The same data in another place has the same."""
    digest = hashlib.sha256(split.labels.contiguous().numpy())
    if isinstance(split.images, torch.Tensor):
        digest.update(str(tuple(split.images.shape)).encode())
        for block in split.images.split(1000):
            digest.update(block.cpu().contiguous().numpy())
    else:  # a Stream
        digest.update(digest_files(split.images.paths).encode())
    return {"images": len(split.labels), "class_names": list(split.class_names),
            "class_ids": list(split.class_ids or split.class_names),
            "content": digest.hexdigest()}


def class_difference(there, here):
    """The first class in which two listings, in the labels' order, differ, in words, or None."""
    for k, (before, now) in enumerate(itertools.zip_longest(there, here)):
        if before != now:
            return f"class {k} is {before!r} there and {now!r} here"
    return None


def difference(there, here, names=True):
    """What two `identity` differ in, in words; None where they are the same. Without `names` these,
    which CLIP alone is asked for, are not compared."""
    for what in ("class_ids", "class_names") if names else ("class_ids",):
        differ = class_difference(there[what], here[what])
        if differ:
            return differ
    if there["images"] != here["images"]:
        return f"{there['images']} images there, {here['images']} here"
    return "other images or labels" if there["content"] != here["content"] else None


def mapped(path, key, shape, dtype, rows):
    """A tensor of `shape`, memory-mapped from the file `path`, so that processes share it and
    memory does not grow with it; made first, from the bytes that rows() yields, where there is
    none, or one that was made with another key (a dict of JSON values) or is damaged.

    The file: one line of JSON, padded by spaces to a multiple of 4096 bytes, then the numbers."""
    path = Path(path)
    header = json.dumps({"format": files.FORMAT, "key": key, "shape": shape}, sort_keys=True)
    header = header.encode().ljust(math.ceil((len(header) + 1) / 4096) * 4096 - 1) + b"\n"
    size = len(header) + math.prod(shape) * dtype.itemsize

    def whole():
        with open(path, "rb") as file:
            return file.readline(len(header)) == header and path.stat().st_size == size

    if path.is_file() and not whole():
        files.note(f"{path} is damaged, and made anew")
        path.unlink()
    if not path.is_file():
        files.write_atomically(path, itertools.chain([header], rows()))
    numbers = torch.from_file(str(path), size=size // dtype.itemsize, dtype=dtype)
    return numbers[len(header) // dtype.itemsize :].view(shape)
