"""Pictures in class folders: which file is one, how it is opened, which class it is of. What is
left out or guessed is said in one line (`files.note`), what cannot be known is refused."""

import os
import re
import stat
import tempfile
import torchvision
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path
from PIL import Image
from support import files

SUFFIXES = tuple(".bmp .jfif .jpe .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
WORDNET = re.compile(r"n\d{8}")  # an id
# What macOS, Windows, Linux, Python, Synology and QNAP lay among people's files.
SYSTEMS = re.compile(r"(?i)[.~@#$]|__|(found\.\d+|lost\+found|recycler|system volume information|"
                     r"thumbs\.db|thumbnails|desktop\.ini|network trash folder|temporary items)$")

def is_data(name):
    """Whether a posix name is none that systems add: .DS_Store, ._cat.png, a/@eaDir/cat.png."""
    return not any(map(SYSTEMS.match, name.split("/")))

def unpack(archive, cache_dir=None):
    """The folder in the cache, named by its content, that a zip's data are unpacked into, once."""
    folder = files.cache_folder(cache_dir) / f"{archive.stem}-{files.file_digest(archive)[:16]}"
    if folder.is_dir():
        return folder
    files.note(f"unpacking {archive} into {folder}, once")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as temporary:
        whole = Path(temporary, "whole")
        try:
            with zipfile.ZipFile(archive) as opened:
                for entry in opened.infolist():
                    entry.filename = entry.filename.replace("\\", "/")  # as Windows writes it
                    if is_data(entry.filename):
                        opened.extract(entry, whole)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise files.Damaged(f"{archive} is no whole zip ({error})") from None
        if not folder.is_dir():  # no other process was faster
            os.replace(whole, folder)
    return folder

def holder(root, name, cache_dir=None):
    """`root`, which may be a zip, or a folder in it, that holds `name`; None: there is none."""
    root = unpack(root, cache_dir) if root.is_file() else root
    found = (path.parent for path in (*root.glob(name), *root.glob(f"*/{name}")))
    return next((path for path in found if path == root or is_data(path.name)), None)

def list_files(root):
    """Yield the posix names, relative to `root`, of the data files below it, links followed, sorted
    by their parts. Left out, which is said: what links lead to again, or back to, what is no file,
    systems' own but for names with a dot. OSError: a broken link, a folder that cannot be read."""
    waiting, left = [f"{root}"] if os.path.isdir(root) else [], []
    met = {(above.st_dev, above.st_ino) for above in map(os.stat, Path(root).resolve().parents)}
    while waiting:
        path = waiting.pop()
        found = os.stat(path)
        kind = stat.S_IFMT(found.st_mode)
        if (found.st_dev, found.st_ino) in met or kind not in (stat.S_IFDIR, stat.S_IFREG):
            left.append(path)  # a pipe, too, which never ends
        elif kind == stat.S_IFDIR:
            names = sorted(os.listdir(path), reverse=True)
            waiting += [f"{path}/{name}" for name in names if is_data(name)]
            left += [f"{path}/{name}" for name in names if name[0] != "." and not is_data(name)]
        else:
            yield path.removeprefix(f"{root}/")
        met.add((found.st_dev, found.st_ino))
    if left:
        files.note(f"{root}: left out {len(left)}, systems' own or there already: {left[:3]}")

def words_by_id(lines, ids, behind=True):
    """[(id, words)] of the lines that hold just one of the ids as a word; behind=False: that begin
    with it. Words are the line without the id where a tab or one of `,:;|=` parts them, or where it
    is a code, like 12 and n01443537, or all ids differ in digits alone; else the whole line."""
    rows, known, codes = [], {*ids}, len({re.sub(r"\d+", "", id) for id in ids}) == 1
    for line in map(str.strip, lines):
        fields = re.split(r"\s*[\t,:;|=]\s*", line)
        held = known & {*fields, *line.split(), *re.findall(r"\w+", line)}
        if len(held) == 1:
            [id] = held
            left, right = re.split(rf"(?<!\w){re.escape(id)}(?!\w)", line, maxsplit=1)
            if codes or re.fullmatch(r"[a-z]?\d+", id) or id in (fields[0], fields[-1]):
                left, right = left.rstrip("\t ,:;|=._-("), right.lstrip("\t ,:;|=._-)")
                line = ", ".join(filter(None, (left, right))) or id
            if behind or not left:
                rows.append((id, line))
    return rows

def class_words(root, ids):
    """{class id: its words} by a list in `root` or, of WordNet's ids, to three folders above."""
    names = ("words.txt", "LOC_synset_mapping.txt", "synset_words.txt")
    above = root.resolve().parents[:3] if any(map(WORDNET.fullmatch, ids)) else ()
    for path in filter(Path.is_file, [where / name for where in (root, *above) for name in names]):
        words = dict(words_by_id(files.read_text(path).splitlines(), ids, behind=False))
        if len(words) < len(ids):
            files.note(f"{path} names {len(words)} of the {len(ids)} classes")
        if words:
            return words
    if len(ids) == 1000 and (ids[0], ids[-1]) == ("n01440764", "n15075141"):  # ImageNet's
        return dict(zip(ids, torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]))
    return {}

def open_image(path):
    """An image file -> a PIL image, RGB with 8 bits, as torchvision opens it. ValueError: it is no
    image, damaged, of more bits, which PIL would clip, or above PIL's MAX_IMAGE_PIXELS."""
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            warnings.simplefilter("ignore", UserWarning)  # of palettes with transparency
            with Image.open(path) as image:
                if image.mode[0] in "IF":
                    raise ValueError(f"PIL's mode {image.mode}; expected 8 bits")
                return image.convert("RGB")
    except Exception as error:  # damaged bytes can raise anything
        raise ValueError(f"{path} is not a readable image ({error})") from None

def by_class(root, part=0):
    """{class: paths} in ImageFolder's order; what is left out is said. A picture's class is the
    first part of its name in `root`; -2: the folder it lies in. FileNotFoundError: no picture."""
    listing, rest, below = {}, [], set()
    for name in list_files(root):
        parts = name.split("/")
        if len(parts) > 1 and name.lower().endswith(SUFFIXES):
            listing.setdefault(parts[part], []).append(f"{root}/{name}")
            below |= {*parts[1:-1]}
        elif not name.endswith(".txt"):
            rest.append(name)
    if rest:
        files.note(f"{root}: left out {len(rest)} files, no pictures in class folders: {rest[:3]}")
    if part == 0 and below - {"images"}:
        files.note(f"{root}: its folders are the classes, not those below: {sorted(below)[:5]}")
    if not listing:
        above = Path(root).parent
        beside = sorted(os.listdir(above))[:9] if above.is_dir() else "no folder; unpack it"
        raise FileNotFoundError(f"{root} holds no <class>/<image>; {above} is {beside}")
    return dict(sorted(listing.items()))

def class_folders(root):
    """The names of the folders in `root` that are data, sorted, if any."""
    return sorted(path.name for path in root.glob("*") if path.is_dir() and is_data(path.name))

def alike(name):
    """A class's name without what people write in different ways; of synonyms the first."""
    name = unicodedata.normalize("NFC", name.split(", ")[0])
    name = " ".join(name.replace("_", " ").replace("-", " ").split()).lower()
    return str(int(name)) if name.isdecimal() else name  # 002 is 2

def match_classes(listing, class_ids, class_names, where, partial=False):
    """{name: its class's number} of the names that a second listing, `where`, has for the classes.
    A name is a class's id or name, or `alike` to just one's, or, where all others are numbers, a
    place in class_ids: all, unless `partial`. What is guessed or lacks is said. ValueError: no
    certain class, or two names of one."""
    K, known, spelled = len(class_ids), {id: k for k, id in enumerate(class_ids)}, {}
    for k, name in [*enumerate(class_ids), *enumerate(class_names)]:
        spelled[alike(name)] = k if spelled.get(alike(name), k) == k else None
    rest = [name for name in listing if name not in known]
    numbers = {int(name) for name in rest if name.isdecimal()}
    by_place = (len(numbers) == len(rest) and numbers <= set(range(K))
                and (partial or len(numbers) == K) and not any(id.isdecimal() for id in class_ids))
    known |= {name: int(name) if by_place else spelled.get(alike(name)) for name in rest}
    numbers = [known[name] for name in listing]
    wrong = [name for name in listing if known[name] is None or numbers.count(known[name]) > 1]
    if wrong:
        raise ValueError(f"{where}: {wrong[:5]}: of none of the {K} classes, or several of one; "
                         f"they are like {class_ids[0]!r}, or all the numbers from 0 to {K - 1}")
    if rest:
        kind = "numbers, places in the sorted list" if by_place else "classes spelled otherwise"
        files.note(f"{where}: {len(rest)} {kind}: {rest[0]} for {class_ids[known[rest[0]]]}")
    if not partial:
        say_absent(numbers, class_ids, where)
    return dict(zip(listing, numbers))

def labelled(listing, class_ids, class_names, where, partial=False):
    """The paths of `by_class` one after another, and each one's number by `match_classes`."""
    matched = match_classes(listing, class_ids, class_names, where, partial)
    return ([path for paths in listing.values() for path in paths],
            [matched[name] for name, paths in listing.items() for _ in paths])

def say_absent(present, class_ids, where):
    """One line about the classes that `where` has no image of; present: the others' numbers."""
    absent = [class_ids[k] for k in sorted({*range(len(class_ids))} - {*present})]
    if absent:
        files.note(f"{where} has no image of {len(absent)} classes: {absent[:5]}")
