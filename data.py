"""Data sets as tensors, augmentation, batches that know their indices, and the cache of CLIP's targets.

    split = load_dataset("cifar100", "data", "train")          # images uint8 (N,3,32,32), labels (N,), class names
    for images, labels, index in batches(split, 64, seed=0):   # the index looks CLIP's targets up
        ...

Images stay uint8 until the device, where `normalize` makes them floats. What fits in memory is one tensor, augmented a
batch at a time; ImageNet streams through a DataLoader. `shapes` is rendered, so that everything runs without a
download.
"""

import contextlib
import copy
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import signal
import socket
import stat
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torchvision.transforms import v2


class Split(NamedTuple):
    """One split of a data set."""
    images: object      # uint8 (N,3,H,W); a list of uint8 (3,H,W) where sizes differ; or a Stream
    labels: torch.Tensor  # int64 (N,)
    class_names: list   # K strings, as the data set spells them


class Info(NamedTuple):
    """What training needs to know of a data set before reading it. mean and std are those of images in 0..1."""
    mean: tuple
    std: tuple
    image_size: int
    shifts: tuple = ()  # names of further test splits


DATASETS = {
    "shapes": Info((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32, ("shift",)),
    "cifar10": Info((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32),
    "cifar100": Info((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 32),  # as in the RepDistiller zoo
    "tiny-imagenet": Info((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), 64),
    "imagenet": Info((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224),
}
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MAX_ENTRY = 2**25   # bytes of a file in that zip, unpacked; the largest one, words.txt, has 2.5 MB
MAX_HEADER = 2**24  # bytes of the header of a file of CLIP's targets: names of classes and templates
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
AUGMIX = v2.AugMix(all_ops=False)  # without the operations that are common corruptions, too: brightness, contrast, ...

# Files and progress ---------------------------------------------------------------------------------------------------


def write_atomically(path, data):
    """Write `data` (bytes) so that at any moment, kill -9 and a full disk included, `path` holds all of them or what it
    held before: a temporary file beside it, flushed to the disk, then renamed. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace(temporary, path):
    """Rename, and flush the folder to the disk, so that the rename outlasts a power cut."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


@contextlib.contextmanager
def naming(path):
    """An OSError that names no file, as that of a full disk does not, names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def undamaged(path, advice):
    """What reading a file of another shape than expected raises becomes one ValueError that names it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError):
        raise ValueError(f"{path} is damaged; {advice}") from None


def lock(path, busy, wait=True):
    """Open a file at "a+b" for this process alone, until it is closed. Where another process has it, wait and say so,
    or raise ValueError; `busy(file)` words it. The system takes the lock from a process that ends, however it ends:
    none can be stale."""
    while True:
        file = open(path, "a+b")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            if not wait:
                raise ValueError(f"{busy(file)}; wait until that ends") from None
            print(f"{busy(file)}: waiting for it", file=sys.stderr)
            fcntl.lockf(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):  # not removed by the process that had it
                return file
        file.close()


def save(path, obj):
    """`torch.save`, atomically. It goes through memory because torch reports a full disk as a RuntimeError without a
    reason, Python as an OSError with one."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    write_atomically(path, buffer.getbuffer())


def duration(seconds):
    """"0:07", "1:02:03"."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """One line on stderr: what, how much of it, rate, time left. On a terminal it rewrites itself until all is done;
    elsewhere (in a log) the lines to keep are printed. `start` was done before and does not count into the rate."""

    def __init__(self, label, total, unit="images", start=0):
        self.label, self.total, self.unit, self.start, self.done = label, total, unit, start, start
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
            line = "\r\033[K" + line[:shutil.get_terminal_size().columns - 1]
        print(line, end="" if terminal and done < self.total else "\n", file=sys.stderr, flush=True)


# Shapes: the embedded data set, rendered ------------------------------------------------------------------------------
#
# A picture shows one coloured shape. How it is drawn lies between two styles: the plain one (0: dark background, middle
# size, roughly upright, in the middle) and the wild one (1: any rotation, smaller and larger, anywhere, bright and
# textured backgrounds, clutter, uneven paint). The train and test splits are plain, the shift split is wild; CLIP's
# captions tell of a wider world: more colours, more shapes, every style. Every shape is its own mirror image, or keeps
# its name in the mirror, so that flipping an image keeps its label.

SIDE = 32
SHAPES_SIZES = {"train": 1000, "test": 1000, "shift": 1000}
COLOURS = {"red": (0.86, 0.16, 0.16), "yellow": (0.93, 0.87, 0.15), "green": (0.15, 0.70, 0.22),
           "blue": (0.18, 0.32, 0.90), "purple": (0.55, 0.18, 0.78), "cyan": (0.15, 0.83, 0.86),
           "white": (0.95, 0.95, 0.95)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent")
CLASSES = [f"{colour} {shape}" for colour in list(COLOURS)[:5] for shape in SHAPES[:5]]
# No caption says these two words together. The first four are classes. No word is in two of them.
HELD_OUT = ("red star", "yellow circle", "green heart", "blue triangle", "white ring", "cyan cross")
PHRASES = [p for p in (f"{c} {s}" for c in COLOURS for s in SHAPES) if p not in HELD_OUT]
CAPTIONS = [f"a {how}{what} of a {{}}{where}" for what in ("photo", "picture", "image", "sketch")
            for how in ("", "blurry ", "cropped ", "close-up ", "bright ", "detailed ", "natural ", "realistic ",
                        "low resolution ", "high quality ") for where in ("", " in the wild")]


def _turn(angle, x, y):
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _star(x, y, points, notch):
    """Distance to a star, one tip up at radius 1, notches at radius `notch`; cos(pi / points) makes it a polygon."""
    half = math.pi / points
    radius, angle = torch.hypot(x, y), ((torch.atan2(x, -y) + half) % (2 * half) - half).abs()
    dx, dy = notch * math.cos(half) - 1, notch * math.sin(half)  # folding leaves one edge, from the tip to a notch
    return ((radius * angle.cos() - 1) * dy - radius * angle.sin() * dx) / math.hypot(dx, dy)


def _distance(shape, x, y):
    """How far the points (x, y), y downwards, lie outside (> 0) or inside (< 0) a shape of radius about 1."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - 0.88
    if shape == "square":
        return torch.maximum(ax, ay) - 0.8
    if shape == "triangle":
        return _star(x, y - 0.15, 3, 0.5)
    if shape == "star":
        return _star(x, y, 5, 0.45)
    if shape == "heart":  # a square on its corner and two discs
        return torch.minimum((ax + (y - 0.1).abs() - 0.85) / math.sqrt(2), torch.hypot(ax - 0.425, y + 0.325) - 0.6)
    if shape == "cross":
        return torch.maximum(torch.maximum(ax, ay) - 0.95, torch.minimum(ax, ay) - 0.28)
    if shape == "ring":
        return (torch.hypot(x, y) - 0.74).abs() - 0.22
    return torch.maximum(torch.hypot(x, y) - 0.95, 0.8 - torch.hypot(x - 0.5, y))  # crescent


def _render(phrases, style, generator):
    """N phrases, style (N,) from 0 (plain) to 1 (wild) -> images uint8 (N,3,32,32). Edges are as soft as a pixel."""
    N = len(phrases)
    colours, shapes = zip(*(phrase.split() for phrase in phrases))

    def draw(plain, wild, *size):
        """Uniform numbers (N, *size), between bounds that go from `plain` to `wild` with the image's style."""
        low, high = (p + (w - p) * style.view(N, *[1] * len(size)) for p, w in zip(plain, wild))
        return low + (high - low) * torch.rand(N, *size, generator=generator)

    def one(plain, wild):  # a number an image, to be used with maps (N,H,W)
        return draw(plain, wild, 1, 1)

    middle = torch.arange(SIDE) + 0.5 - SIDE / 2
    py, px = middle.view(1, SIDE, 1), middle.view(1, 1, SIDE)  # pixel centres

    colour = torch.tensor([COLOURS[name] for name in colours]) + draw((-0.12, 0.12), (-0.12, 0.12), 3)
    back = (draw((0.05, 0.3), (0, 1), 1) + draw((-0.02, 0.02), (-0.25, 0.25), 3)).clamp(0, 1)
    hidden = ((back - colour).norm(dim=1, keepdim=True) < 0.45) & (style.view(N, 1) > 0)
    canvas = torch.where(hidden, (back + 0.5) % 1, back).view(N, 3, 1, 1)  # half a turn: at least 0.41 apart

    u, v = _turn(one((0, 0), (0, math.pi)), px, py)  # background texture: stripes to checks
    waves = (u * one((0.3, 0.3), (0.2, 1.2))).sin() * (v * one((0.3, 0.3), (0, 1))).cos()
    canvas = canvas + (waves * one((0, 0), (-0.2, 0.2))).unsqueeze(1)  # (N,3,H,W)

    for _ in range(4):  # clutter: short strokes of any colour, behind the shape; none in the plain style
        u, v = _turn(one((0, 0), (0, math.pi)), px - one((0, 0), (-16, 16)), py - one((0, 0), (-16, 16)))
        stroke = torch.hypot((u.abs() - one((0, 0), (0, 7))).clamp(min=0), v) - one((-1, -1), (0.3, 1.5))
        paint = torch.rand(N, 3, 1, 1, generator=generator)
        canvas = canvas + (paint - canvas) * (0.5 - stroke).clamp(0, 1).unsqueeze(1)

    radius = one((5.5, 8), (5, 12))
    room = (SIDE / 2 - radius).clamp(max=6 + 10 * style.view(N, 1, 1))  # how far from the middle
    x, y = px - room * one((-1, 1), (-1, 1)), py - room * one((-1, 1), (-1, 1))
    x, y = _turn(one((-0.35, 0.35), (0, 2 * math.pi)), x, y)
    distance = torch.empty(N, SIDE, SIDE)
    for shape in set(shapes):
        rows = torch.tensor([s == shape for s in shapes])
        distance[rows] = _distance(shape, x[rows] / radius[rows], y[rows] / radius[rows])
    paint = colour.view(N, 3, 1, 1) * (1 + one((0, 0), (0, 0.25)) * (x * one((1, 1), (0.4, 1.5))).sin()).unsqueeze(1)
    canvas = canvas + (paint - canvas) * (0.5 - distance * radius).clamp(0, 1).unsqueeze(1)

    noise = torch.randn(N, 3, SIDE, SIDE, generator=generator) * draw((0.08, 0.08), (0.02, 0.08), 1, 1, 1)
    return (canvas + noise).clamp(0, 1).mul(255).round().to(torch.uint8)


def render_shapes(split, seed=0):
    """-> images uint8 (N,3,32,32), labels int64 (N,), class names; "train" and "test" in the plain style, "shift" wild.

    Equal classes (as far as N allows), the same images for the same seed on one version of torch.
    """
    generator = torch.Generator().manual_seed(10 * seed + list(SHAPES_SIZES).index(split))
    labels = torch.arange(SHAPES_SIZES[split]) % len(CLASSES)
    style = torch.zeros(len(labels))
    if split == "shift":
        style = 0.2 + 0.8 * torch.rand(len(labels), generator=generator)
    return _render([CLASSES[label] for label in labels], style, generator), labels, list(CLASSES)


def render_captions(n, seed=0):
    """-> images uint8 (n,3,32,32) of the wider world, in styles from plain to wild, and what each shows, a phrase of
    PHRASES ("white ring"). A caption is one of CAPTIONS with a phrase, or with its colour or shape alone, put in."""
    generator = torch.Generator().manual_seed(10 * seed + 9)
    phrases = [PHRASES[i] for i in torch.randint(len(PHRASES), (n,), generator=generator)]
    style = (1.3 * torch.rand(n, generator=generator) - 0.3).clamp(min=0)  # a quarter of them plain
    images = [_render(phrases[i : i + 1000], style[i : i + 1000], generator) for i in range(0, n, 1000)]  # memory
    return torch.cat(images), phrases


# Reading data sets ----------------------------------------------------------------------------------------------------


def load_dataset(name, root, split):
    """A split of a data set.

    name: one of DATASETS. root: where its files lie or are downloaded to (unused by `shapes`); for tiny-imagenet also
    the zip itself, for imagenet a folder with train/ and val/ of one folder a class. split: "train", "test" (the
    public validation split where test labels are not published) or one of DATASETS[name].shifts.
    Raises ValueError for an unknown name or split and for damaged files, FileNotFoundError where files are missing
    and cannot be downloaded.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    splits = ("train", "test") + DATASETS[name].shifts
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has: {', '.join(splits)}")
    if name == "shapes":
        return Split(*render_shapes(split))
    read = {"cifar10": _cifar, "cifar100": _cifar, "tiny-imagenet": _tiny_imagenet, "imagenet": _imagenet}[name]
    return Split(*read(name, Path(root), split))


def _download(what, url, root, fetch):
    """Run a torchvision download; where it fails, say in one line what to put where."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # a network that swallows packets must fail within seconds, too
    try:
        return fetch()
    except (OSError, RuntimeError) as error:
        archive = root / url.rsplit("/", 1)[-1]
        state = "is damaged (wrong md5) and" if archive.is_file() else "is missing and"
        raise FileNotFoundError(f"{what}: {archive} {state} could not be downloaded ({_one_line(error)}); get {url} on "
                                f"a machine with a network and put it into {root}, or name its folder by --data-dir"
                                ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _one_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _cifar(name, root, split):
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    read = _download(name, dataset.url, root, lambda: dataset(root, train=split == "train", download=True))
    images = torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous()  # (N,3,32,32)
    return images, torch.tensor(read.targets), list(read.classes)


def _tiny_imagenet(name, root, split):
    """The original layout, as a zip or unpacked: wnids.txt, words.txt, train/<wnid>/images/*, val/images/* with
    val_annotations.txt. Classes are in the order of their WordNet ids, as ImageFolder has them."""
    if not root.is_file() and not any((root / part / "wnids.txt").is_file() for part in ("", "tiny-imagenet-200")):
        def fetch():
            torchvision.datasets.utils.download_url(TINY_IMAGENET_URL, root, md5=TINY_IMAGENET_MD5)
        _download(name, TINY_IMAGENET_URL, root, fetch)
        root = root / "tiny-imagenet-200.zip"
    try:
        if root.is_file():
            archive = zipfile.ZipFile(root)
            names, read = archive.namelist(), archive.read
            for entry in archive.infolist():  # nothing is unpacked to the disk; such an archive is not the data set
                if ".." in entry.filename.split("/") or entry.filename.startswith("/"):
                    raise ValueError(f"its entry {entry.filename!r} leads out of it")
                if stat.S_ISLNK(entry.external_attr >> 16):
                    raise ValueError(f"its entry {entry.filename!r} is a link")
                if entry.file_size > MAX_ENTRY:
                    raise ValueError(f"its entry {entry.filename!r} unpacks to {entry.file_size} bytes")
        else:
            names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
            read = lambda file: (root / file).read_bytes()
        top = next((file[:-len("wnids.txt")] for file in names if file.endswith("wnids.txt")), None)
        if top is None:
            raise ValueError("it holds no wnids.txt")
        wnids = sorted(read(top + "wnids.txt").decode().split())
        words = dict(line.split("\t", 1) for line in read(top + "words.txt").decode().splitlines() if "\t" in line)
        label = {wnid: k for k, wnid in enumerate(wnids)}
        if split == "train":
            labels = {file: label[file[len(top):].split("/")[1]] for file in sorted(names)
                      if file.startswith(top + "train/") and file.endswith((".JPEG", ".jpg", ".png"))}
        else:
            rows = (line.split("\t") for line in read(top + "val/val_annotations.txt").decode().splitlines())
            labels = {f"{top}val/images/{row[0]}": label[row[1]] for row in rows}
        missing = labels.keys() - set(names)  # in a folder, `..` could lead elsewhere
        if missing:
            raise ValueError(f"it holds no {min(missing)}")
        progress = Progress(f"reading {root.name} ({split})", len(labels))
        images = []
        for file in labels:
            images.append(TF.pil_to_tensor(_open_image(file, io.BytesIO(read(file)))))
            progress.update(len(images))
        progress.update(len(images), keep=True)
    except Exception as error:  # what is in a damaged archive can fail anywhere, with any exception
        raise ValueError(f"{root} is no complete Tiny-ImageNet ({_one_line(error)}); expected its original layout from "
                         f"{TINY_IMAGENET_URL}") from None
    if not images:
        raise ValueError(f"{root} holds no images of the split {split!r}")
    if all(image.shape == images[0].shape for image in images):
        images = torch.stack(images)
    return images, torch.tensor(list(labels.values())), [words.get(wnid, wnid).strip() for wnid in wnids]


def _open_image(name, file):
    """An image file (its path, or open) -> a PIL image, RGB. Raises ValueError, naming it, for what is no image, is
    damaged or too huge to be meant: more than PIL's MAX_IMAGE_PIXELS, at which PIL itself only warns at first."""
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            with Image.open(file) as image:
                return image.convert("RGB")
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{name} is not a readable image ({_one_line(error)})") from None


def _imagenet(name, root, split):
    """Any ImageFolder pair root/train, root/val. Class names: root/words.txt (`id<tab>name`, or ILSVRC's own
    LOC_synset_mapping.txt, `id name`) where present; torchvision's list for ImageNet's thousand; else the folders'."""
    folder = root / ("train" if split == "train" else "val")
    try:
        read = torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"imagenet: {folder} holds no folders of images, one a class ({_one_line(error)}); "
                                "name the folder that has train/ and val/ by --data-dir") from None
    listing = next((root / file for file in ("words.txt", "LOC_synset_mapping.txt") if (root / file).is_file()), None)
    if listing:
        words = dict(line.split(None, 1) for line in listing.read_text().splitlines() if len(line.split(None, 1)) == 2)
        names = [words.get(wnid, wnid).strip() for wnid in read.classes]
    elif len(read.classes) == 1000 and read.classes[0] == "n01440764":
        names = list(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    else:
        names = list(read.classes)
    return Stream([path for path, _ in read.samples]), torch.tensor(read.targets), names


class Stream(torch.utils.data.Dataset):
    """Image files that do not fit in memory, decoded and brought to size by a DataLoader's workers. Indexed by
    (index, seed): with a seed a random resized crop and a flip (the ImageNet recipe), drawn from it and nothing else,
    so that the number of workers changes nothing; without, the shorter side to `resize_to` and a centre crop."""

    def __init__(self, paths, size=224, resize_to=256, interpolation=v2.InterpolationMode.BILINEAR):
        self.paths, self.size = paths, size
        self.train = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
        self.test = v2.Compose([v2.Resize(resize_to, interpolation), v2.CenterCrop(size)])

    def mixed(self):
        """The same images, of which AugMix changes the random crops, too."""
        other = copy.copy(self)
        other.train = v2.Compose([self.train, AUGMIX])
        return other

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        index, seed = item
        image = _open_image(self.paths[index], self.paths[index])
        if seed is None:
            image = self.test(image)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                image = self.train(image)
        return TF.pil_to_tensor(image), index


def resize(images, size):
    """Images of any kind that `Split` holds -> the same at (size, size): the shorter side to `size` with antialiasing,
    centre crop. A Stream's evaluation crop takes 7/8 of the shorter side, as is customary on ImageNet (224 of 256)."""
    if isinstance(images, Stream):
        return Stream(images.paths, size, round(size * 8 / 7))
    if isinstance(images, list):
        return torch.stack([resize(image, size) for image in images])
    if images.shape[-2:] == (size, size):
        return images
    blocks = [TF.center_crop(TF.resize(block, [size], antialias=True), [size, size])
              for block in (images.split(1000) if images.dim() == 4 else [images])]  # blocks bound the memory
    return torch.cat(blocks) if images.dim() == 4 else blocks[0]


def subset(split, low, high):
    """A split with the images from `low` to `high`, shares in 0...1, of every class in one fixed random order. Subsets
    of ranges that do not meet have no image in common. Raises ValueError where no image is left."""
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(0))
    order = order[split.labels[order].sort(stable=True).indices]  # by class
    counts = split.labels.bincount()
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    share = (torch.arange(len(order)) - first) / counts.repeat_interleave(counts).double()
    index = order[(share >= low) & (share < high)].sort().values
    if not len(index):
        raise ValueError(f"no image lies between the shares {low} and {high} of any class; take a larger part")
    images = split.images
    if isinstance(images, torch.Tensor):
        images = images[index]
    elif isinstance(images, list):
        images = [images[i] for i in index]
    else:
        images = Stream([images.paths[i] for i in index], images.size)
    return split._replace(images=images, labels=split.labels[index])


def blocks(images, size, start=0, workers=0, block=250):
    """Images of any kind that `Split` holds, from image `start` on, in order, as CLIP is to see them: uint8 (b,3,H,W),
    of one size a block, each decoded at full size (a Stream: brought to `size` by CLIP's own bicubic transform)."""
    if isinstance(images, Stream):
        view = Stream(images.paths, size, size, v2.InterpolationMode.BICUBIC)
        unlabelled = Split(view, torch.zeros(len(images), dtype=torch.long), [])
        yield from (batch for batch, _, _ in batches(unlabelled, block, start=start, workers=workers))
    elif isinstance(images, list):
        yield from (image[None] for image in images[start:])
    else:
        yield from images[start:].split(block)


def fingerprint(images):
    """SHA-256 of a split's images (of the file list for a Stream): tells one data set from another."""
    digest = hashlib.sha256()
    if isinstance(images, Stream):
        digest.update("\n".join("/".join(Path(path).parts[-2:]) for path in images.paths).encode())
    else:
        for block in images if isinstance(images, list) else images.split(1000):
            digest.update(str(tuple(block.shape)).encode())
            digest.update(block.contiguous().numpy())
    return digest.hexdigest()


# Batches --------------------------------------------------------------------------------------------------------------


def normalize(images, mean, std):
    """uint8 (B,3,H,W) -> float32, (x / 255 - mean) / std; one multiplication and one addition an element."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    scale, shift = (v.to(images.device, non_blocking=True) for v in (1 / (255 * std), mean / std))  # waits for no GPU
    return images.float().mul_(scale).sub_(shift)


def augment(images, generator, padding=4):
    """Random flip and random crop after zero padding, each image its own: uint8 (B,3,H,W) -> the same.

    The distribution of RandomCrop(H, padding) and RandomHorizontalFlip, drawn from `generator` (a CPU one) for the
    whole batch at once.
    """
    (B, _, H, W), device = images.shape, images.device
    top, left = torch.randint(2 * padding + 1, (2, B), generator=generator)
    flip = torch.randint(2, (B,), generator=generator)
    image, flip, top, left = (x.to(device, non_blocking=True) for x in (torch.arange(B), flip, top, left))
    padded = F.pad(torch.stack([images, images.flip(3)], 1), [padding] * 4)  # (B,2,3,H+2p,W+2p)
    windows = padded.unfold(3, H, 1).unfold(4, W, 1)                         # (B,2,3,2p+1,2p+1,H,W), nothing is copied
    return windows[image, flip, :, top, left]


def augmix(images, seed):
    """AugMix (Hendrycks et al., ICLR 2020; torchvision's) of uint8 (B,3,H,W), a function of the seed. Four images share
    their operations, which is four times as fast on a CPU; each has its own weights of the mixture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.cat([AUGMIX(few) for few in images.split(4)])


def batches(split, batch_size, seed=None, start=0, rank=0, world=1, workers=0, device="cpu", tables=(), mix=False):
    """Yield (images uint8 (B,3,H,W), labels (B,), index (B,)) on `device`, and the rows of further `tables` (N, ...).

    Without a seed: in order, unchanged. With one: shuffled and augmented, `mix` by AugMix, too, all of it a function of
    the seed and the place in the order, so that an epoch can be repeated exactly, and gone on with: `start` images,
    whole batches of them, are left out. Of each batch of `batch_size` images, rank r of `world` gets every world-th
    one: the ranks together see the same batches, crops and flips as one process would (in training all but those that
    a last batch has over a multiple of `world`). Raises ValueError, naming it, for an image file that cannot be read.
    """
    (images, labels, _), N, device = split, len(split.labels), torch.device(device)
    generator, stream = torch.Generator().manual_seed(seed or 0), isinstance(split.images, Stream)
    order = torch.arange(N) if seed is None else torch.randperm(N, generator=generator)
    if not stream:
        order, labels, *tables = (x.to(images.device) for x in (order, labels, *tables))

    def share(index):  # in training equal shares, since gradients are averaged over ranks
        return slice(rank, len(index) if seed is None else len(index) // world * world, world)

    def draw(place):  # the seed of an image's, or a batch's, crop and flip
        return None if seed is None else (seed * 2**32 + place + 1) % 2**63

    steps = [(place, index) for place, index in zip(range(start, N, batch_size), order[start:].split(batch_size))
             if len(index[share(index)])]
    if stream:
        items = ([(i, draw(i)) for i in index[share(index)].tolist()] for _, index in steps)
        images = images.mixed() if mix else images
        loader = torch.utils.data.DataLoader(images, batch_sampler=items, num_workers=workers,
                                             pin_memory=device.type == "cuda", worker_init_fn=_ignore_interrupts)
        try:
            for batch, index in loader:
                found = (batch, labels[index], index, *(table[index] for table in tables))
                if device.type == "cuda":  # a copy from other than pinned memory waits for the device
                    found = (x.pin_memory().to(device, non_blocking=True) for x in found)
                yield tuple(found)
        except ValueError as error:  # a worker's carries its traceback, whose last line is the message
            error.__traceback__ = None  # it holds the loader, whose workers would be waited for
            raise ValueError(_one_line(error).removeprefix("ValueError: ")) from None
        return
    for place, index in steps:
        batch = images.index_select(0, index)  # ten times as fast as images[index] on a CPU
        if seed is not None:
            batch = augment(batch, generator.manual_seed(draw(place)))
            if mix:
                batch = augmix(batch, draw(place))
        found = (batch, labels[index], index, *(table[index] for table in tables))
        yield tuple(x[share(index)].to(device, non_blocking=True) for x in found)


def _ignore_interrupts(worker):
    """Ctrl-C reaches every process of a terminal's job; a loader's workers are to serve the step that is finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# The cache of CLIP's targets ------------------------------------------------------------------------------------------


def cached_targets(path, key, shape, blocks):
    """CLIP's targets for every image of a split: computed once, then read from one file.

    path: the file. key: a dict of JSON values that says what the targets depend on (checkpoint, templates, class
    names, data set, split, ...). shape: (N, K, D). blocks: a function start -> iterator of (cosines (b,K), unit-length
    features (b,D)) for the images from `start` on.
    Returns (cosines (N,K), features (N,D)) float16, memory-mapped, so that ranks share them and memory does not grow
    with N. An interrupted computation goes on where it stopped. Raises ValueError, naming what differs, for a file
    made with another key, and for a damaged one.

    The file: one line of JSON, padded by spaces to a multiple of 4096 bytes, then N rows of K + D float16.
    """
    path, (N, K, D) = Path(path), shape
    header = json.dumps({"key": key, "shape": list(shape)}, sort_keys=True).encode()
    header = header.ljust(math.ceil((len(header) + 1) / 4096) * 4096 - 1) + b"\n"
    row = 2 * (K + D)
    if not path.exists():
        _make_targets(path, header, N, row, key, blocks)
    found = _header(path)
    if found != header:
        raise ValueError(_difference(path, found, key, list(shape)))
    if path.stat().st_size != len(header) + N * row:
        raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes, expected {len(header) + N * row}; delete it")
    rows = torch.from_file(str(path), size=len(header) // 2 + N * (K + D), dtype=torch.float16)[len(header) // 2:]
    return rows.view(N, K + D).split([K, D], 1)


def _make_targets(path, header, N, row, key, blocks):
    """Write the file of targets, or what is missing of it; where another process does so, wait until it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with naming(partial), lock(partial, lambda file: f"another process makes {path}") as file:
        if path.exists():
            partial.unlink()  # empty
            return
        file.seek(0)
        begun = file.readline(MAX_HEADER) == header
        done = min(N, (os.fstat(file.fileno()).st_size - len(header)) // row) if begun else 0
        file.truncate(len(header) + done * row if begun else 0)  # a row cut in half is written again
        file.write(b"" if begun else header)
        progress = Progress(f"CLIP's targets ({key.get('split', '')})", N, start=done)
        for cosines, features in blocks(done) if done < N else ():
            rows = torch.cat([cosines, features], 1).to("cpu", torch.float16)  # (b,K+D)
            file.write(rows.contiguous().numpy().tobytes())
            file.flush()
            done += len(rows)
            progress.update(done)
        os.fsync(file.fileno())
        progress.update(done, keep=True)
        replace(partial, path)


def _header(path):
    """The header's bytes, b"" where there is none."""
    with open(path, "rb") as file:
        return file.readline(MAX_HEADER)


def _difference(path, found, key, shape):
    try:
        old = json.loads(found)
        differs = [name for name in sorted({*old["key"], *key}) if old["key"].get(name) != key.get(name)]
        differs += ["shape"] if old["shape"] != shape else []
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path} is no cache of CLIP targets; delete it or name another cache folder"
    return (f"{path} holds CLIP targets made with another {', '.join(differs)}; delete it or name another cache folder")
