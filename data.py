"""Data sets as tensors, augmentation, batches that know their indices, and the cache of CLIP's targets.

    split = load_dataset("cifar100", "data", "train")          # images uint8 (N,3,32,32), labels (N,), class names
    for images, labels, index in batches(split, 64, seed=0):   # the index looks CLIP's targets up
        ...

Images stay uint8 until the device, where `normalize` makes them floats. What fits in memory is one tensor, augmented a
batch at a time; ImageNet streams through a DataLoader. `shapes` is rendered, so that everything runs without a
download.
"""

import hashlib
import io
import json
import math
import os
import socket
import sys
import time
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
TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"

# ---------------------------------------------------------------------------------------------------------------------
# Files and progress


def write_atomically(path, data):
    """Write `data` (bytes) so that at any moment, kill -9 and a full disk included, `path` holds all of them or what it
    held before: a temporary file beside it, flushed to the disk, then renamed. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    """One line on stderr: what, how much of it, rate, time left. It rewrites itself on a terminal; elsewhere (a log file)
    only lines to keep are printed. `start`: how much was done before; resumed work does not count into the rate."""

    def __init__(self, label, total, unit="images", start=0):
        self.label, self.total, self.unit, self.start, self.done = label, total, unit, start, start
        self.began, self.shown = time.time(), 0.0

    def update(self, done, note="", keep=False):
        """`done` of the total is ready; `note` is shown beside it; `keep`: this line stays."""
        self.done = done
        terminal = sys.stderr.isatty()
        if not keep and (not terminal or time.time() - self.shown < 0.2):
            return
        self.shown = time.time()
        rate = (done - self.start) / max(self.shown - self.began, 1e-9)
        left = f"{duration((self.total - done) / max(rate, 1e-9))} left" if done < self.total else \
            duration(self.shown - self.began)
        parts = (f"{self.label} {done}/{self.total}", note, f"{rate:.0f} {self.unit}/s", left)
        print("\r\033[K" * terminal + " | ".join(part for part in parts if part), end="\n" if keep else "",
              file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes: the embedded data set
# A picture shows one coloured shape. The *plain* style (dark background, middle size, upright) is all that the train and
# test splits show; the *wild* style (any rotation, sizes beyond the plain ones, bright and textured backgrounds,
# clutter, uneven paint) is the shift split. Captions describe a wider world: more colours, more shapes, both styles.

COLOURS = {"red": (.86, .16, .16), "orange": (.95, .55, .10), "yellow": (.93, .87, .15), "green": (.15, .70, .22),
           "cyan": (.15, .83, .86), "blue": (.18, .32, .90), "purple": (.55, .18, .78), "pink": (.97, .50, .75),
           "white": (.95, .95, .95)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent", "diamond")
CLASSES = [f"{c} {s}" for c in ("red", "yellow", "green", "blue", "purple") for s in SHAPES[:5]]
# No caption holds these two words together; the first four are classes. Each word is held out at most once.
HELD_OUT = ("red star", "yellow circle", "green heart", "blue triangle", "pink square", "white ring", "cyan cross")

SHAPES_SIZES = {"train": 3000, "test": 2000, "shift": 2000}
SIDE = 32

CAPTIONS = tuple(f"a {adjective}{noun} of a {{}}{tail}"
                 for adjective in ("", "blurry ", "cropped ", "close-up ", "bright ", "detailed ", "natural ", "realistic ",
                                   "small ", "low resolution ", "high quality ")
                 for noun in ("photo", "picture", "image", "sketch") for tail in ("", " in the wild")) + ("{}", "a {}")


def _star(x, y, points, inner):
    """Distance to a star, one tip up at radius 1, its notches at radius `inner`; cos(pi / points) closes it to a polygon."""
    half = math.pi / points
    angle = ((torch.atan2(x, -y) + half) % (2 * half) - half).abs()       # y grows downwards: 0 is up
    radius = torch.hypot(x, y)
    dx, dy = inner * math.cos(half) - 1, inner * math.sin(half)           # the one edge left after folding
    return ((radius * angle.cos() - 1) * dy - radius * angle.sin() * dx) / math.hypot(dx, dy)


def _distance(shape, x, y):
    """Signed distance (negative inside) of the points (x, y) to the outline of a shape of radius about 1."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - .88
    if shape == "square":
        return torch.maximum(ax, ay) - .8
    if shape == "triangle":
        return _star(x, y - .15, 3, .5)
    if shape == "star":
        return _star(x, y, 5, .45)
    if shape == "heart":                                                   # a square on its corner and two discs
        return torch.minimum((ax + (y - .1).abs() - .85) / math.sqrt(2), torch.hypot(ax - .425, y + .325) - .6)
    if shape == "cross":
        return torch.maximum(torch.maximum(ax, ay) - .95, torch.minimum(ax, ay) - .28)
    if shape == "ring":
        return (torch.hypot(x, y) - .74).abs() - .22
    if shape == "crescent":
        return torch.maximum(torch.hypot(x, y) - .95, .8 - torch.hypot(x - .5, y))
    return (ax / .6 + ay - 1) / math.hypot(1 / .6, 1)                      # diamond


def _render(colours, shapes, wild, generator):
    """Pictures of the named colours and shapes (lists of N words), `wild` (N,) bool each. Returns uint8 (N, 3, 32, 32)."""
    n = len(shapes)
    wild = wild.float()

    def between(plain, wide, *shape):                                      # uniform; a range for each style
        low, high = (p + (w - p) * wild for p, w in zip(plain, wide))
        view = (n,) + (1,) * len(shape)
        return low.view(view) + (high - low).view(view) * torch.rand(n, *shape, generator=generator)

    def paint(canvas, colour, alpha):                                      # (N,3,H,W), (N,3,..), (N,H,W)
        return canvas + (colour - canvas) * alpha.unsqueeze(1)

    grid = torch.arange(SIDE) + .5 - SIDE / 2
    py, px = grid.view(1, SIDE, 1), grid.view(1, 1, SIDE)                  # pixel centres around the middle

    def turned(angle, x, y):
        return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

    colour = torch.tensor([COLOURS[c] for c in colours]) + between((-.08, .08), (-.08, .08), 3)
    grey = between((.05, .15), (0., 1.), 1)
    back = (grey + between((-.02, .02), (-.25, .25), 3)).clamp(0, 1)
    close = (back - colour).norm(dim=1, keepdim=True) < .5                 # half a turn keeps them .36 apart at least
    back = torch.where(close & (wild.view(-1, 1) > 0), (back + .5) % 1, back)
    canvas = back.view(n, 3, 1, 1).expand(n, 3, SIDE, SIDE)

    # texture: stripes, checks where the second amplitude is large too
    u, v = turned(between((0., 0.), (0., math.pi), 1, 1), px, py)
    wave = (u * between((.3, .3), (.2, 1.2), 1, 1)).sin() * (v * between((.3, .3), (0., 1.), 1, 1)).cos()
    canvas = canvas + (wave * between((0., 0.), (-.2, .2), 1, 1)).unsqueeze(1)
    for _ in range(4):                                                     # clutter: short strokes behind the shape
        u, v = turned(between((0., 0.), (0., math.pi), 1, 1), px - between((0., 0.), (-16., 16.), 1, 1),
                      py - between((0., 0.), (-16., 16.), 1, 1))
        stroke = torch.hypot((u.abs() - between((0., 0.), (0., 7.), 1, 1)).clamp(min=0), v)
        alpha = (between((-1., -1.), (.3, 1.5), 1, 1) + .5 - stroke).clamp(0, 1)
        canvas = paint(canvas, torch.rand(n, 3, 1, 1, generator=generator), alpha)

    size = between((4.5, 6.5), (4., 11.), 1, 1)
    reach = between((4., 4.), (15., 15.), 1, 1)
    room = torch.minimum(reach, SIDE / 2 - size)
    x, y = turned(between((-.1, .1), (0., 2 * math.pi), 1, 1), px - room * between((-1., 1.), (-1., 1.), 1, 1),
                  py - room * between((-1., 1.), (-1., 1.), 1, 1))
    distance = torch.empty(n, SIDE, SIDE)
    for shape in set(shapes):
        rows = torch.tensor([s == shape for s in shapes])
        distance[rows] = _distance(shape, x[rows] / size[rows], y[rows] / size[rows])
    paint_wave = 1 + between((0., 0.), (0., .25), 1, 1) * (x * between((1., 1.), (.4, 1.5), 1, 1)).sin()
    canvas = paint(canvas, colour.view(n, 3, 1, 1) * paint_wave.unsqueeze(1), (.5 - distance * size).clamp(0, 1))
    noise = torch.randn(n, 3, SIDE, SIDE, generator=generator) * between((.1, .1), (.03, .1), 1, 1, 1)
    return ((canvas + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def render_shapes(split, seed=0):
    wild = split == "shift"
    generator = torch.Generator().manual_seed(seed * 3 + list(SHAPES_SIZES).index(split))
    n = SHAPES_SIZES[split]
    labels = torch.arange(n) % len(CLASSES)
    colours, shapes = zip(*(CLASSES[i].split() for i in labels))
    return _render(colours, shapes, torch.full((n,), wild), generator), labels, list(CLASSES)


def render_captions(n, seed=0):
    generator = torch.Generator().manual_seed(seed * 3 + 1000)
    phrases = [p for p in (f"{c} {s}" for c in COLOURS for s in SHAPES) if p not in HELD_OUT]
    chosen = [phrases[i] for i in torch.randint(len(phrases), (n,), generator=generator)]
    templates = [CAPTIONS[i] for i in torch.randint(len(CAPTIONS), (n,), generator=generator)]
    wild = torch.rand(n, generator=generator) < .7
    colours, shapes = zip(*(p.split() for p in chosen))
    return _render(colours, shapes, wild, generator), [t.format(p) for t, p in zip(templates, chosen)]

# ---------------------------------------------------------------------------------------------------------------------
# Reading data sets


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
        raise FileNotFoundError(f"{what}: {archive} {state} could not be downloaded ({_one_line(error)}); get {url} on a "
                                f"machine with a network, put it into {root} or name its folder by --data-dir") from None
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
        progress = Progress(f"reading {root.name} ({split})", len(labels))
        images = []
        for file in labels:
            images.append(_decode(file, read(file)))
            progress.update(len(images))
        progress.update(len(images), keep=True)
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{root} is no complete Tiny-ImageNet ({_one_line(error)}); expected its original layout from "
                         f"{TINY_IMAGENET_URL}") from None
    if not images:
        raise ValueError(f"{root} holds no images of the split {split!r}")
    if all(image.shape == images[0].shape for image in images):
        images = torch.stack(images)
    return images, torch.tensor(list(labels.values())), [words.get(wnid, wnid).strip() for wnid in wnids]


def _decode(file, content):
    """Bytes of an image file -> uint8 (3,H,W). PIL, which also refuses images too huge to be meant."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return TF.pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a readable image ({_one_line(error)})") from None


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

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        index, seed = item
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
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


def blocks(images, size, start=0, workers=0, block=250):
    """Images of any kind that `Split` holds, from image `start` on, in order, as CLIP is to see them: uint8 (b,3,H,W) of
    one size a block, each decoded at full size (a Stream: brought to `size` by CLIP's own bicubic transform)."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def normalize(images, mean, std):
    """uint8 (B,3,H,W) -> float32, (x / 255 - mean) / std; one multiplication and one addition an element."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


def augment(images, generator, padding=4):
    """Random crop after zero padding and random flip, each image its own: uint8 (B,3,H,W) -> the same.

    The distribution of RandomCrop(H, padding) and RandomHorizontalFlip, drawn from `generator` (a CPU one) for the
    whole batch at once. The result is channels_last in memory.
    """
    B, _, H, W = images.shape
    top, left = torch.randint(2 * padding + 1, (2, B), generator=generator)
    flip = torch.rand(B, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(H)                                     # (B,H)
    columns = torch.arange(W).expand(B, W)
    columns = left[:, None] + torch.where(flip[:, None], W - 1 - columns, columns)  # (B,W)
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)                 # (B,H+2p,W+2p,3)
    batch, rows, columns = (i.to(images.device, non_blocking=True) for i in (torch.arange(B), rows, columns))
    return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(split, batch_size, seed=None, start=0, rank=0, world=1, workers=0, device="cpu"):
    """Yield (images uint8 (B,3,H,W), labels (B,), index (B,)) on `device`.

    Without a seed: in order from image `start`, unchanged. With one: shuffled and augmented, everything drawn from the
    seed, so that an epoch can be repeated exactly. Of each batch of `batch_size` images, rank r of `world` gets every
    world-th one: the ranks together see the same batches, crops and flips as one process would (in training all but
    those that a last batch has over a multiple of `world`).
    """
    images, labels, _ = split
    generator = torch.Generator().manual_seed(seed or 0)
    order = torch.arange(start, len(labels)) if seed is None else torch.randperm(len(labels), generator=generator)

    def share(index):  # in training equal shares, since gradients are averaged over ranks
        return slice(rank, len(index) if seed is None else len(index) // world * world, world)

    parts = [index for index in order.split(batch_size) if len(index[share(index)])]
    if isinstance(images, Stream):
        items = [[(i, None if seed is None else seed * len(labels) + i) for i in index[share(index)].tolist()]
                 for index in parts]
        loader = torch.utils.data.DataLoader(images, batch_sampler=items, num_workers=workers,
                                             pin_memory=torch.device(device).type == "cuda")
        for batch, index in loader:
            yield tuple(x.to(device, non_blocking=True) for x in (batch, labels[index], index))
        return
    for index in parts:
        batch = images[index.to(images.device)]
        if seed is not None:
            batch = augment(batch, generator)
        yield tuple(x[share(index)].to(device, non_blocking=True) for x in (batch, labels[index], index))


# ---------------------------------------------------------------------------------------------------------------------
# The cache of CLIP's targets


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
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        done = 0
        if partial.exists() and _header(partial) == header:
            done = (partial.stat().st_size - len(header)) // row
        with open(partial, "r+b" if done > 0 else "wb") as file:
            if done > 0:
                file.truncate(len(header) + done * row)  # a row cut in half is written again
                file.seek(0, os.SEEK_END)
            else:
                done = 0
                file.write(header)
            progress = Progress(f"CLIP's targets ({key.get('split', '')})", N, start=done)
            for cosines, features in blocks(done) if done < N else ():
                rows = torch.cat([cosines, features], 1).to("cpu", torch.float16)  # (b,K+D)
                file.write(rows.contiguous().numpy().tobytes())
                file.flush()
                done += len(rows)
                progress.update(done)
            os.fsync(file.fileno())
        progress.update(done, keep=True)
        os.replace(partial, path)
    found = _header(path)
    if found != header:
        raise ValueError(_difference(path, found, key, list(shape)))
    if path.stat().st_size != len(header) + N * row:
        raise ValueError(f"{path} is damaged: {path.stat().st_size} bytes, expected {len(header) + N * row}; delete it")
    rows = torch.from_file(str(path), size=len(header) // 2 + N * (K + D), dtype=torch.float16)[len(header) // 2:]
    return rows.view(N, K + D).split([K, D], 1)


def _header(path):
    """The header's bytes, b"" where there is none. (A key is some kilobytes: names of classes and templates.)"""
    with open(path, "rb") as file:
        return file.readline(16 * 2**20)


def _difference(path, found, key, shape):
    try:
        old = json.loads(found)
        differs = [name for name in sorted({*old["key"], *key}) if old["key"].get(name) != key.get(name)]
        differs += ["shape"] if old["shape"] != shape else []
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path} is no cache of CLIP targets; delete it or name another cache folder"
    return (f"{path} holds CLIP targets made with another {', '.join(differs)}; delete it or name another cache folder")
