"""Pictures in folders and zips: which file is one, how it is opened, which class it is of.

One notion of each, for training images, test images and shift sets alike: what these functions
leave out or guess they say in one line (`files.note`), and what they cannot know they refuse.
"""

import functools
import os
import re
import stat
import unicodedata
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torchvision
from PIL import Image

from support import files

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_ENTRY = 2**25  # bytes of a file in a zip, unpacked; Tiny-ImageNet's words.txt has 2.5 MB

# Files --------------------------------------------------------------------------------------------


def is_data(name):
    """Whether a file's posix name is none that systems add: .DS_Store, ._cat.png, __MACOSX/..."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


@functools.lru_cache(maxsize=2)
def opened_zip(path, changed):
    """The zip at `path`, opened anew where it has `changed`. Raises ValueError for an entry that is
    there to do harm."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is neither a folder nor a whole zip ({error})") from None
    archive.process = os.getpid()
    for entry in archive.infolist():
        entry.filename = entry.filename.replace("\\", "/")  # as some programs for Windows write it
        archive.NameToInfo[entry.filename] = entry
        if ".." in entry.filename.split("/") or entry.filename.startswith("/"):
            raise ValueError(f"{path}: its entry {entry.filename!r} leads out of it")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ValueError(f"{path}: its entry {entry.filename!r} is a link")
        if entry.file_size > MAX_ENTRY:
            raise ValueError(f"{path}: its entry {entry.filename!r} unpacks to {entry.file_size} "
                             "bytes")
    return archive


def open_zip(path):
    archive = opened_zip(str(path), os.stat(path).st_mtime_ns)
    if archive.process != os.getpid():  # forked: the parent's place in the file is not its own
        archive.fp, archive.process = open(path, "rb"), os.getpid()
    return archive


def list_files(root):
    """Yield the posix names, relative to `root`, of all files in a folder, or in a zip. Links are
    followed; of a folder that is no data (`is_data`) its own name stands for all in it."""
    def fail(error):
        raise error

    if not os.path.isdir(root):
        yield from (name for name in open_zip(root).namelist() if not name.endswith("/"))
        return
    for folder, below, here in os.walk(root, onerror=fail, followlinks=True):
        prefix = Path(folder).relative_to(root).as_posix() + "/"
        prefix = "" if prefix == "./" else prefix
        yield from (prefix + name for name in here)
        yield from (prefix + name for name in below if not is_data(name))
        below[:] = [name for name in below
                    if is_data(name) and not leads_back(os.path.join(folder, name))]


def leads_back(path):
    """Whether a folder is a link to one that it lies in."""
    place = Path(path).parent.resolve() if os.path.islink(path) else None
    return place is not None and place.is_relative_to(os.path.realpath(path))


def read_bytes(root, name):
    """The content of one of `list_files`."""
    return (Path(root) / name).read_bytes() if os.path.isdir(root) else open_zip(root).read(name)


def split_words(text):
    """{id: words} of lines `id<tab>words` or `id words`."""
    rows = [re.split("\t" if "\t" in line else " ", line.strip(), maxsplit=1)
            for line in text.splitlines() if line.strip()]
    return {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}


SYNONYMS = {  # of ImageNet's thousand, for those whose names, as listed, are another's too
    "n02012849": ["crane bird"], "n03126707": ["construction crane"],
    "n02113186": ["Cardigan Welsh corgi"]}


def class_words(root, ids):
    """{class id: its words} from words.txt or synset_words.txt (`id<tab>name`) or ILSVRC's
    LOC_synset_mapping.txt, in `root` or up to three folders above, where Kaggle's lies."""
    for folder in (root, *root.resolve().parents[:3]):
        for name in ("words.txt", "LOC_synset_mapping.txt", "synset_words.txt"):
            if (folder / name).is_file():
                words = split_words(files.read_text(folder / name))
                named = {id: words[id] for id in ids if id in words}
                if 0 < len(named) < len(ids) or named and folder != root:
                    files.note(f"{folder / name} names {len(named)} of the {len(ids)} classes")
                if named:
                    return named
    known = {0: "n01440764", 388: "n02510455", 999: "n15075141"}  # of ImageNet's thousand
    if len(ids) == 1000 and all(ids[k] == id for k, id in known.items()):
        weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
        return dict(zip(ids, weights.meta["categories"]))
    return {}


# Pictures -----------------------------------------------------------------------------------------


def open_image(name, file):
    """An image file (its path, or open) -> a PIL image, RGB with 8 bits, as torchvision opens it;
    grey of 16 bits is scaled, where PIL alone would clip it. Raises ValueError with `name` for what
    is no image, damaged, of another depth, or above PIL's MAX_IMAGE_PIXELS, where PIL only warns.
    """
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            warnings.simplefilter("ignore", UserWarning)  # of palettes with transparency
            with Image.open(file) as image:
                if image.mode[0] not in "IF":
                    return image.convert("RGB")
                # PIL's mode I is 16 bits wide in these two formats; elsewhere nobody knows.
                bits = image.tag_v2.get(258, (16,))[0] if image.format == "TIFF" else 16
                if bits != 16 or image.mode == "F" or (
                        image.mode == "I" and image.format not in ("PNG", "PPM")):
                    raise ValueError(f"its pixels are of PIL's mode {image.mode}, whose range is "
                                     "not known: save it with 8 bits")
                grey = np.asarray(image).astype(np.float64) / 257  # 65535 becomes 255
                return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    except Exception as error:  # damaged bytes can raise anything
        reason = re.sub(r" <_io\.BytesIO.*?>", "", files.one_line(error))
        raise ValueError(f"{name} is not a readable image ({reason})") from None


def pictures(names, where):
    """Of files' posix names, as `list_files` has them, those of pictures in a folder, sorted part
    by part. What is left out is counted in one line about `where`."""
    found, left_out = [], Counter()
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        if not is_data(name):
            left_out["hidden"] += 1
        elif suffix not in SUFFIXES:
            left_out[suffix or "without a suffix"] += 1
        elif "/" not in name:
            left_out["in no class's folder"] += 1
        else:
            found.append(name)
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(5))
        files.note(f"{where}: left out what is no picture of a class: {kinds}")
    return sorted(found, key=lambda name: name.split("/"))


def by_class(root):
    """{class: paths} of a folder of class folders, both sorted as torchvision's ImageFolder has
    them. Raises FileNotFoundError where there are none."""
    names = []
    if os.path.isdir(root):
        names = pictures(list_files(root), root)
    found = {}
    for name in names:
        found.setdefault(name.split("/")[0], []).append(f"{root}/{name}")
    if not found:
        raise FileNotFoundError(f"{root} holds no folders of images; expected <class>/<image>, of "
                                f"{', '.join(SUFFIXES)}")
    return found


def class_folders(root):
    """The sorted names of the class folders in `root` that hold a picture, if any."""
    def has_picture(folder):
        return any(is_data(name) and name.lower().endswith(SUFFIXES) for name in list_files(folder))

    return sorted(folder.name for folder in Path(root).glob("*")
                  if is_data(folder.name) and folder.is_dir() and has_picture(folder))


# Two listings of the classes ----------------------------------------------------------------------


def alike(name):
    name = unicodedata.normalize("NFC", name.split(",")[0])
    name = re.sub(r"[\s_-]+", " ", name).strip().lower()
    return str(int(name)) if name.isdecimal() else name  # 002 is 2


def match_classes(found, class_ids, class_names, where, renamed=None, partial=False):
    """{name: its class's number} of names that a second listing, `where`, has for known classes.

    A name is the class's id or name, or `renamed` to one ({name: id or name}); or one that differs
    from just one of them in case, spaces, `_` and `-`; or, where no name is left but numbers, a
    place in class_ids: all places from 0 on unless `partial`. The last two are said in a line.
    Raises ValueError for a name of no certain class, and for two names of one class.
    """
    renamed, K = renamed or {}, len(class_ids)
    count, spelled = Counter(class_names), {}
    exact = {name: k for k, name in enumerate(class_names) if count[name] == 1}
    exact |= {name: k for k, name in enumerate(class_ids)}  # which are unique, and win
    for k, pair in enumerate(zip(class_ids, class_names)):
        for name in pair:
            spelled.setdefault(alike(name), set()).add(k)

    matched = {}
    rest = [name for name in found if renamed.get(name, name) not in exact]
    numbers = [name for name in rest if name.isdecimal() and name not in renamed]
    places = {int(name) for name in numbers}
    by_place = (len(places) == len(rest) > 0 and max(places) < K
                and not any(id.isdecimal() for id in class_ids)
                and (partial or places == set(range(K))))
    for name in found:
        if renamed.get(name, name) in exact:
            matched[name] = exact[renamed.get(name, name)]
        elif by_place:
            matched[name] = int(name)
        elif len(spelled.get(alike(name), ())) == 1 and name not in renamed:
            [matched[name]] = spelled[alike(name)]
        else:
            raise ValueError(
                f"{where}: {renamed.get(name, name)!r} is no class; the {K} classes are like "
                f"{class_ids[0]!r}, or numbers from 0 to {K - 1}, each of them")
    if rest:
        kind = "numbers, taken for places in the sorted list" if by_place else "spelled otherwise"
        files.note(f"{where}: {len(rest)} classes are {kind}: {rest[0]} for "
                   f"{class_ids[matched[rest[0]]]}")
    plain = Counter(k for name, k in matched.items() if name not in renamed)
    for name, k in matched.items():
        if plain[k] > 1 and name not in renamed:
            raise ValueError(f"{where}: two folders are of class {class_ids[k]!r}, one of them "
                             f"{name!r}")
    return matched


def labelled(found, matched):
    """The paths of `by_class` one after another, and the number of each one's class."""
    return ([path for paths in found.values() for path in paths],
            [matched[name] for name, paths in found.items() for _ in paths])


def say_absent(matched, class_ids, where, other):
    """One line about the classes of `other` that the listing `where` lacks, if it lacks any."""
    absent = sorted(set(range(len(class_ids))) - set(matched.values()))
    if absent:
        some = ", ".join(str(class_ids[k]) for k in absent[:5]) + ", ..." * (len(absent) > 5)
        files.note(f"{where} has no image of {len(absent)} of the {len(class_ids)} classes of "
                   f"{other}: {some}")
