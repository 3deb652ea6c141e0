"""keys.py: what is another data set has another identity, what is the same one has the same."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data import numbered_stream, random_images

import data
from support import folders, keys


def some_split(**change):
    split = data.Split(random_images(4, 3, 6, 8), torch.tensor([0, 1, 1, 0]), ["cat", "dog"])
    return split._replace(**change)


def test_identity_of_tensors_tells_them_apart():
    images = some_split().images
    changed = images.clone()
    changed[3, 2, 5, 7] += 1
    splits = [some_split(), some_split(images=changed), some_split(images=images.view(4, 3, 8, 6)),
              some_split(images=images.flip(0)), some_split(labels=torch.tensor([1, 0, 0, 1])),
              some_split(class_names=["cat", "fox"]), some_split(class_ids=["n1", "n2"]),
              some_split(images=images[:3], labels=torch.tensor([0, 1, 1]))]
    found = [keys.identity(split) for split in splits]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert keys.difference(one, other) and one != other
    same = some_split(images=images.clone(memory_format=torch.channels_last))
    assert keys.identity(same) == found[0] and keys.difference(found[0], found[0]) is None


def stream_split(folder, n=6):
    return data.Split(numbered_stream(folder, n), torch.arange(n) % 2, ["cat", "dog"])


def test_identity_of_a_stream_is_the_same_in_another_place(tmp_path):
    (tmp_path / "here/train").mkdir(parents=True)
    split = stream_split(tmp_path / "here/train")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    paths = [str(path).replace("here", "there") for path in split.images.paths]
    assert keys.identity(split._replace(images=data.Stream(paths))) == keys.identity(split)


@pytest.mark.parametrize("change", ["swapped", "replaced", "renamed", "edited"])
def test_identity_of_a_stream_notices_pictures_that_are(change, tmp_path):
    """Pictures of one size in bytes, too, as plain PNGs have."""
    split = stream_split(tmp_path)
    first, second = (Path(split.images.paths[i]) for i in (0, 1))
    before = keys.identity(split)
    if change == "swapped":
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    elif change == "replaced":
        Image.new("RGB", (40, 40), (1, 2, 3)).save(first)
    elif change == "renamed":
        split.images.paths[0] = first.rename(first.with_name("other.png"))
    else:  # one pixel in the middle
        image = Image.open(first)
        image.putpixel((20, 20), (255, 0, 0))
        image.save(first)
    assert keys.difference(before, keys.identity(split)) == "other images or labels"


@pytest.mark.parametrize("suffix", folders.SUFFIXES)
def test_digest_files_notices_a_pixel_in_a_picture_of_every_format(suffix, tmp_path):
    """Of one size in bytes, with the change far from the end, as uncompressed formats allow."""
    path, digests = tmp_path / f"x{suffix}", []
    for colour in (0, 255):
        image = Image.new("RGB", (64, 64))
        image.putpixel((30, 60 if suffix == ".bmp" else 3), (colour, colour, colour))
        image.convert("L" if suffix == ".pgm" else "RGB").save(path)
        digests.append(keys.digest_files([path]))
    assert len({*digests}) == 2


def test_digest_files_of_names_that_are_no_utf8(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    try:
        Image.new("RGB", (4, 4)).save(os.fsdecode(path), "PNG")
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    assert len(keys.digest_files([os.fsdecode(path)])) == 64


def test_difference_says_what_differs():
    before = keys.identity(some_split(class_ids=["n1", "n2"]))
    for change, words in (
            ({"class_ids": ["n1", "n3"]}, "class 1 is 'n2' there and 'n3' here"),
            ({"class_ids": ["n1", "n2", "n3"]}, "class 2 is None there and 'n3' here"),
            ({"class_names": ["cat", "fox"]}, "class 1 is 'dog' there and 'fox' here"),
            ({"images": 5}, "4 images there, 5 here"),
            ({"content": "0"}, "other images or labels")):
        assert keys.difference(before, {**before, **change}) == words
    other = {**before, "class_names": ["cat", "fox"]}
    assert keys.difference(before, other, names=False) is None


def test_mapped_is_made_once_and_anew_for_another_key_or_damage(tmp_path, capsys):
    path, made = tmp_path / "numbers.bin", []

    def rows():
        made.append(1)
        for row in range(3):
            yield torch.full((2,), row, dtype=torch.float16).numpy().tobytes()

    def read(key):
        found = keys.mapped(path, key, (3, 2), torch.float16, rows)
        assert found.tolist() == [[0, 0], [1, 1], [2, 2]]
        return len(made)

    assert [read({"a": 1}), read({"a": 1})] == [1, 1] and not capsys.readouterr().err
    assert read({"a": 2}) == 2
    assert f"{path} is damaged, and made anew" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-1])
    assert read({"a": 2}) == 3
