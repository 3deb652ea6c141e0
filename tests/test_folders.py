"""folders.py: what is a picture, of which class, and what is said of the rest."""

import io
import os
import struct

import numpy as np
import pytest
from PIL import Image

from support import files, folders


def said(capsys):
    return capsys.readouterr().err


# Files --------------------------------------------------------------------------------------------


def test_list_files_follows_links_and_stops_at_what_is_no_data(tmp_path):
    for name in ("a/b/c.png", "a/.git/x.png", "__MACOSX/a/._c.png", "e.txt"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(b"")
    (tmp_path / "root/link").symlink_to(tmp_path / "root/a/b")
    (tmp_path / "root/a/up").symlink_to("..")
    assert sorted(folders.list_files(tmp_path / "root")) == [
        "__MACOSX", "a/.git", "a/b/c.png", "e.txt", "link/c.png"]
    assert folders.class_folders(tmp_path / "root") == ["a", "link"]
    (tmp_path / "root/a/b/c.png").unlink()  # what is left lies in .git
    assert folders.class_folders(tmp_path / "root") == []


def test_list_files_names_a_folder_that_it_may_not_read(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("train"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="train"):
        list(folders.list_files(tmp_path))


def test_split_words_of_every_separator_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(b"\xef\xbb\xbfn01\ttench, Tinca\r\n\r\nn02 gold fish\nsea horse\thippo\n")
    assert folders.split_words(files.read_text(path)) == {"n01": "tench, Tinca", "n02": "gold fish",
                                                           "sea horse": "hippo"}


# Pictures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_open_image_scales_grey_of_16_bits(form, tmp_path):
    """A ramp of all levels: PIL's own conversion to RGB makes all above 255 white."""
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = tmp_path / "ramp"
    if form == "PPM":
        path.write_bytes(b"P5 256 256 65535\n" + ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(path, form)
    found = np.asarray(folders.open_image(path, path))
    expected = np.round(ramp / 257.0).astype(np.uint8)
    assert found.shape == (256, 256, 3) and (found == expected[:, :, None]).all()


def test_open_image_of_12_bits_is_refused(tmp_path):
    """PIL reads a TIFF's 12 bits as 16: white would be nearly black."""
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(tmp_path / "x.tiff")
    content = (tmp_path / "x.tiff").read_bytes()
    tag = struct.pack("<HHI", 258, 3, 1)  # BitsPerSample, a short, one of them
    content = content.replace(tag + struct.pack("<H", 16), tag + struct.pack("<H", 12))
    (tmp_path / "x.tiff").write_bytes(content)
    with pytest.raises(ValueError, match="x.tiff is not a readable image"):
        folders.open_image(tmp_path / "x.tiff", tmp_path / "x.tiff")


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_open_image_refuses_depths_whose_range_it_cannot_know(kind, tmp_path):
    Image.fromarray(np.full((4, 4), 1000, kind)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="x.tiff is not a readable image .*save it with 8 bits"):
        folders.open_image(tmp_path / "x.tiff", tmp_path / "x.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_open_image_of_8_bits_is_pils(mode, tmp_path):
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    image = Image.fromarray(pixels).convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF")
    assert (np.asarray(folders.open_image("x", file)) == np.asarray(image.convert("RGB"))).all()


def test_pictures_are_sorted_by_part_and_the_rest_is_counted(capsys):
    names = ["b/2.PNG", "b/10.jpg", "a-b/1.png", "a/1.webp", "a/x/0.tif", "b/.DS_Store", "loose",
             "loose.png", "__MACOSX/b/._2.png", "b/clip.gif", "b/x.txt", "a/y.txt"]
    assert folders.pictures(names, "somewhere") == [
        "a/1.webp", "a/x/0.tif", "a-b/1.png", "b/10.jpg", "b/2.PNG"]
    assert said(capsys) == ("somewhere: left out what is no picture of a class: 2 hidden, 2 .txt, "
                            "1 without a suffix, 1 in no class's folder, 1 .gif\n")
    assert folders.pictures(["a/1.png"], "elsewhere") == ["a/1.png"] and not said(capsys)


# Two listings of the classes ----------------------------------------------------------------------

IDS, NAMES = ["n01", "n02", "n03"], ["tench, Tinca", "sea horse", "crane"]


@pytest.mark.parametrize("found, expected, line", [
    (["n02", "n01"], {"n02": 1, "n01": 0}, ""),
    (["sea horse"], {"sea horse": 1}, ""),
    (["Sea_Horse", "TENCH"], {"Sea_Horse": 1, "TENCH": 0}, "2 classes are spelled otherwise"),
    (["0", "1", "2"], {"0": 0, "1": 1, "2": 2}, "3 classes are numbers"),
    (["002", "000", "001"], {"002": 2, "000": 0, "001": 1}, "3 classes are numbers"),
])
def test_match_classes(found, expected, line, capsys):
    assert folders.match_classes(found, IDS, NAMES, "val") == expected
    assert line in said(capsys)


@pytest.mark.parametrize("found, names", [
    (["n04"], NAMES),                       # unknown
    (["1", "2", "3"], NAMES),               # from 1 on?
    (["1", "2"], NAMES),                    # is 0 absent, or are they from 1 on?
    (["0", "1", "n03"], NAMES),             # two ways at once
    (["Crane"], ["crane", "dog", "crane"]),  # of which?
    (["n01", "tench"], NAMES),              # twice the same class
])
def test_match_classes_refuses_what_is_not_certain(found, names):
    with pytest.raises(ValueError, match="is no class; the 3 classes are like|two folders are of"):
        folders.match_classes(found, IDS, names, "val")


@pytest.mark.parametrize("first", [0, 1])
def test_match_classes_by_number_where_classes_are_numbers_themselves(first):
    ids = sorted(map(str, range(first, 12)))  # 0 1 10 11 2 ...
    for digits in (1, 3):
        found = [f"{k:0{digits}d}" for k in range(first, 12)]
        expected = {name: ids.index(str(int(name))) for name in found}
        assert folders.match_classes(found, ids, ids, "val") == expected
        assert folders.match_classes(found[:3], ids, ids, "set", None, True) == {
            name: expected[name] for name in found[:3]}


def test_match_classes_of_names_in_two_forms_of_unicode():
    ids = ["cafe\u0301", "tea"]  # as macOS decomposes it
    assert folders.match_classes(["caf\xe9", "tea"], ids, ids, "val") == {"caf\xe9": 0, "tea": 1}


def test_match_classes_of_a_part_and_renamed():
    assert folders.match_classes(["1"], IDS, NAMES, "set", partial=True) == {"1": 1}
    renamed = {"1": "crane", "hound": "n01", "dog": "n01"}
    found = folders.match_classes(["1", "hound", "dog"], IDS, NAMES, "set", renamed, True)
    assert found == {"1": 2, "hound": 0, "dog": 0}
    with pytest.raises(ValueError, match="'whale' is no class"):
        folders.match_classes(["1"], IDS, NAMES, "set", {"1": "whale"}, True)


def test_say_absent(capsys):
    folders.say_absent({"n01": 0, "n02": 1, "n03": 2}, IDS, "val", "train/")
    assert not said(capsys)
    folders.say_absent({"n02": 1}, IDS, "val", "train/")
    assert said(capsys) == "val has no image of 2 of the 3 classes of train/: n01, n03\n"
