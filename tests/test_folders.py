"""folders.py: what is a picture, of which class, and what is said of the rest."""

import numpy as np
import os
import pytest
import struct
import zipfile
import zlib
from helpers import WNIDS, encoded, refused, write_files, write_zip
from PIL import Image
from support import files, folders

def test_list_files_lists_what_is_data_once_whatever_links_lead_to_it(tmp_path, capsys):
    root, systems = tmp_path / "root", (
        "__MACOSX", "a/@eaDir/c.png", "$Recycle.Bin", "lost+found", "a/.git", "#recycle", ".snap",
        "System Volume Information", "~snapshot", "@SynoEAStream", "__pycache__", "found.001")
    names = ["a/b/c.png", "a-b/d.png", "e.txt", *(f"{name}/x.png" for name in systems)]
    write_files(root, dict.fromkeys(names, b""))
    assert list(folders.list_files(root)) == ["a/b/c.png", "a-b/d.png", "e.txt"]
    write_files(tmp_path, {"store/1.png": b""})
    for name, target in {"link": "a/b", "a/up": "..", "a/b/f.png": "c.png", "c/1.png":
                         "../../store/1.png", "d": "../store", "a/b/loop": "loop2"}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(target)
    os.link(root / "a-b/d.png", root / "a-b/hard.png")
    with pytest.raises(OSError, match="loop"):
        list(folders.list_files(root))
    (root / "a/b/loop").unlink()
    os.mkfifo(root / "a/pipe.png")
    assert list(folders.list_files(root)) == ["a/b/c.png", "a-b/d.png", "c/1.png", "e.txt"]
    assert f"{root}: left out {5 + 10 + 1}" in capsys.readouterr().err

def test_unpack_once_by_content(tmp_path, monkeypatch):
    content = {"top\\a\\0.png": b"1", "top/b/": b"", "__MACOSX/x.png": b"", "top/@eaDir/x.png": b"",
               "../../out.txt": b"", "/absolute.txt": b"2"}
    archive = write_zip(tmp_path / "x.zip", content)
    folder = folders.unpack(archive, tmp_path / "cache")
    assert sorted(folders.list_files(folder)) == ["absolute.txt", "top/a/0.png"]
    assert folders.holder(folder, "a") == folder / "top" and not folders.holder(folder, "c")
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZipFile", None)
        assert folders.unpack(archive, tmp_path / "cache") == folder
    write_zip(archive, {"other.png": b""})
    assert folders.unpack(archive, tmp_path / "cache") != folder
    assert sorted(os.listdir(tmp_path)) == ["cache", "x.zip"]
    assert len(os.listdir(tmp_path / "cache")) == 2

def test_unpack_refuses(tmp_path):
    archive, cache = tmp_path / "x.zip", tmp_path / "cache"
    whole = write_zip(archive, {"a/0.png": encoded(size=(64, 64))}).read_bytes()
    changed = whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]
    for content in (b"", b"no zip", whole[:-30], changed):
        archive.write_bytes(content)
        with pytest.raises(files.Damaged, match="x.zip"):
            folders.unpack(archive, cache)
    assert not os.listdir(cache)

@pytest.mark.parametrize("above", ["", "..", "../../.."])
@pytest.mark.parametrize("name", ["LOC_synset_mapping.txt", "words.txt", "synset_words.txt"])
def test_class_words_are_found_where_kaggle_lays_them(above, name, tmp_path, capsys):
    root = tmp_path / "imagenet/ILSVRC/Data/CLS-LOC"
    one, two, three, word = *WNIDS[:3], "goldfish"
    text = f"\ufeff{one} tench, Tinca\n{two},{word}\n{word}\tfish\nn1\tgold, {word}\n"
    write_files(root / above, {name: text.encode()})
    root.mkdir(parents=True, exist_ok=True)
    assert folders.class_words(root, [one, two]) == {one: "tench, Tinca", two: word}
    assert not capsys.readouterr().err
    assert folders.class_words(root, [two, three]) == {two: word}
    assert name in capsys.readouterr().err  # it names one of two
    assert folders.class_words(root, [three]) == {}
    assert folders.class_words(root, [word]) == ({} if above else {word: "fish"})

def test_class_words_of_imagenet_without_a_list(tmp_path):
    ids = [f"n9{k:07d}" for k in range(1000)]
    for k, id in ((0, "n01440764"), (388, "n02510455"), (999, "n15075141")):
        ids[k] = id
    words = folders.class_words(tmp_path, ids)
    assert [words[ids[k]] for k in (0, 388, 999)] == ["tench", "giant panda", "toilet tissue"]

@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_open_image_of_8_bits_is_pils(mode, tmp_path):
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "x.tiff")
    opened = folders.open_image(tmp_path / "x.tiff")
    assert opened.mode == "RGB" and (np.asarray(opened) == np.asarray(image.convert("RGB"))).all()

def claiming(width, height):
    """A PNG of 8 x 8 pixels whose header says that it has width x height."""
    png = encoded()
    header = png[12:16] + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]

@pytest.mark.parametrize("content", [
    b"", b"no image", encoded()[:45], claiming(11000, 9000), claiming(20000, 10000),
    np.uint16, np.int32, np.float32], ids="empty text cut huge bomb 16 32 float".split())
def test_open_image_names_what_is_none_or_huge_or_of_more_than_8_bits(tmp_path, content):
    path = tmp_path / "x.tiff"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.fromarray(np.full((4, 4), 1000, content)).save(path)
    assert str(path) in refused(folders.open_image, path)

def test_by_class_sorts_by_part_and_counts_the_rest(tmp_path, capsys):
    names = ["b/2.PNG", "b/10.jpg", "a-b/1.png", "a/1.webp", "a/x/0.tif", "b/.DS_Store", "loose",
             "loose.png", "__MACOSX/b/2.png", "b/clip.gif", "b/x.txt", "b/y/3.bmp"]
    write_files(tmp_path, dict.fromkeys(names, b""))
    assert folders.by_class(tmp_path) == {
        "a": [f"{tmp_path}/a/1.webp", f"{tmp_path}/a/x/0.tif"], "a-b": [f"{tmp_path}/a-b/1.png"],
        "b": [f"{tmp_path}/b/10.jpg", f"{tmp_path}/b/2.PNG", f"{tmp_path}/b/y/3.bmp"]}
    said = capsys.readouterr().err
    assert f"{tmp_path}: left out 3 files" in said and "below: ['x', 'y']" in said
    assert list(folders.by_class(tmp_path, part=-2)) == ["a", "a-b", "b", "x", "y"]
    for root in (tmp_path / "a", tmp_path / "absent"):
        (tmp_path / "a/x/0.tif").unlink(missing_ok=True)
        assert str(root) in refused(folders.by_class, root)

IDS, NAMES = ["n01", "n02", "n03"], ["tench, Tinca", "sea horse", "crane"]

@pytest.mark.parametrize("listing, expected, line", [
    (["n02", "n01"], {"n02": 1, "n01": 0}, ""),
    (["sea horse"], {"sea horse": 1}, ""),
    (["Sea_Horse", "TENCH"], {"Sea_Horse": 1, "TENCH": 0}, "2 classes spelled otherwise"),
    (["0", "1", "2"], {"0": 0, "1": 1, "2": 2}, "3 numbers"),
    (["002", "000", "001"], {"002": 2, "000": 0, "001": 1}, "3 numbers"),
])
def test_match_classes(listing, expected, line, capsys):
    assert folders.match_classes(listing, IDS, NAMES, "val") == expected
    assert line in capsys.readouterr().err

@pytest.mark.parametrize("listing, names", [
    (["n04"], NAMES),                       # unknown
    (["1", "2", "3"], NAMES),               # from 1 on?
    (["1", "2"], NAMES),                    # is 0 absent, or are they from 1 on?
    (["0", "1", "n03"], NAMES),             # two ways at once
    (["Crane"], ["crane", "dog", "crane"]),  # of which?
    (["n01", "tench"], NAMES), (["n01", "N01"], NAMES),  # twice the same class
])
def test_match_classes_refuses_what_is_not_certain(listing, names):
    message = refused(folders.match_classes, listing, IDS, names, "val")
    assert message.startswith("val: ") and repr(listing[0]) in message

@pytest.mark.parametrize("first", [0, 1])
def test_match_classes_by_number_where_classes_are_numbers_themselves(first):
    ids = sorted(map(str, range(first, 12)))  # 0 1 10 11 2 ...
    for digits in (1, 3):
        listing = [f"{k:0{digits}d}" for k in range(first, 12)]
        expected = {name: ids.index(str(int(name))) for name in listing}
        assert folders.match_classes(listing, ids, ids, "val") == expected
        part = {name: expected[name] for name in listing[:3]}
        assert folders.match_classes(listing[:3], ids, ids, "set", partial=True) == part

def test_match_classes_of_a_part_and_in_two_forms_of_unicode():
    assert folders.match_classes(["1"], IDS, NAMES, "set", partial=True) == {"1": 1}
    assert "'3'" in refused(folders.match_classes, ["3"], IDS, NAMES, "set", True)
    ids = ["cafe\u0301", "tea"]  # as macOS decomposes it
    assert folders.match_classes(["caf\xe9", "tea"], ids, ids, "val") == {"caf\xe9": 0, "tea": 1}
