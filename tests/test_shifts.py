"""shifts.py: published test sets and folders of class folders, damaged ones among them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_data import random_images, refused, write_images

import data
from support import folders, shapes, shifts

# Published test sets ------------------------------------------------------------------------------


@pytest.fixture
def cifar_c(tmp_path):
    """Five severities of four images: an image's first value is 10 * severity + its number."""
    images = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = [10 * severity + i for severity in range(1, 6) for i in range(4)]
    images[:, 5, 9, 2] = 99
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.array([3, 1, 4, 1] * 5, dtype=np.uint8))
    return tmp_path


def test_read_cifar_c(cifar_c):
    images, labels = shifts.read_cifar_c(cifar_c, "fog", 4)
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [40, 41, 42, 43] and (images[:, 2, 5, 9] == 99).all()
    assert images.is_contiguous() and labels.tolist() == [3, 1, 4, 1]
    assert labels.dtype == torch.int64


def test_read_cifar_c_refuses(cifar_c):
    for severity in (0, 6):
        message = refused(shifts.read_cifar_c, cifar_c, "fog", severity)
        assert f"severity {severity}" in message
    assert "snow.npy" in refused(shifts.read_cifar_c, cifar_c, "snow", 1)  # missing
    for shape, dtype in (((20, 3, 32, 32), np.uint8), ((21, 32, 32, 3), np.uint8),
                         ((20, 32, 32), np.uint8), ((20, 32, 32, 3), np.float32)):
        np.save(cifar_c / "snow.npy", np.zeros(shape, dtype))
        message = refused(shifts.read_cifar_c, cifar_c, "snow", 1)
        assert "snow.npy is " in message and "expected uint8 [N, 32, 32, 3]" in message
    for content in (b"", b"no array", (cifar_c / "fog.npy").read_bytes()[:5000],
                    pickle.dumps([1, 2])):
        (cifar_c / "snow.npy").write_bytes(content)
        message = refused(shifts.read_cifar_c, cifar_c, "snow", 1)
        assert "snow.npy or labels.npy is damaged" in message
    np.save(cifar_c / "labels.npy", np.arange(20))
    assert "five times over" in refused(shifts.read_cifar_c, cifar_c, "fog", 1)


def test_imagenet_c_folder(tmp_path):
    (tmp_path / "fog/2").mkdir(parents=True)
    (tmp_path / "blur/defocus_blur/1").mkdir(parents=True)
    assert shifts.imagenet_c_folder(tmp_path, "fog", 2) == tmp_path / "fog/2"
    found = shifts.imagenet_c_folder(tmp_path, "defocus_blur", 1)
    assert found == tmp_path / "blur/defocus_blur/1"
    for name, severity in (("fog", 1), ("snow", 2)):
        with pytest.raises(FileNotFoundError, match=f"no {name}/{severity}"):
            shifts.imagenet_c_folder(tmp_path, name, severity)


def test_list_classes_counts_labels_within_the_columns(tmp_path):
    for folder, count in (("n30", 2), ("n10", 1), ("n15", 3)):
        write_images(tmp_path / folder, count)
    (tmp_path / "n10/notes.txt").write_text("no image")
    ids = ["n05", "n15", "n20", "n10", "n30"]
    paths, labels, columns = shifts.list_classes(tmp_path, ids, ids)
    assert [Path(path).parent.name for path in paths] == ["n10"] + ["n15"] * 3 + ["n30"] * 2
    assert columns.tolist() == [1, 3, 4] and labels.tolist() == [1, 0, 0, 0, 2, 2]


def test_list_classes_renames_and_refuses(tmp_path, capsys):
    write_images(tmp_path / "set/1", 1)
    write_images(tmp_path / "set/2", 1)
    known = ["cat", "dog", "bird"]
    renamed = {"1": "bird", "2": "cat", "3": "dog"}
    _, labels, columns = shifts.list_classes(tmp_path / "set", known, known, renamed)
    assert columns.tolist() == [0, 2] and labels.tolist() == [1, 0]
    assert "set has no images in 3, which classes.json names" in capsys.readouterr().err
    _, labels, columns = shifts.list_classes(tmp_path / "set", known, known)
    assert columns.tolist() == [1, 2] and labels.tolist() == [0, 1]  # by number
    message = refused(shifts.list_classes, tmp_path / "set", known[:2], known[:2])
    assert "'1' is no class; the 2 classes are like 'cat'" in message  # 2 is beyond them
    (tmp_path / "empty/cat").mkdir(parents=True)
    for root in ("empty", "absent"):
        message = refused(shifts.list_classes, tmp_path / root, known, known)
        assert f"{root} holds no folders of images" in message


@pytest.mark.parametrize("suffix", folders.SUFFIXES)
def test_list_classes_counts_pictures_of_every_suffix(tmp_path, suffix, capsys):
    write_images(tmp_path / "cat", 3)
    picture = Image.new("RGB", (4, 4), (9, 99, 199))
    picture.save(tmp_path / f"cat/other{suffix.upper()}")
    for name in (".DS_Store", "._0.png", "notes.txt"):
        (tmp_path / "cat" / name).write_bytes(b"no picture")
    (tmp_path / "__MACOSX/cat").mkdir(parents=True)
    paths, _, _ = shifts.list_classes(tmp_path, ["cat"], ["cat"])
    assert len(paths) == 4
    assert ": left out what is no picture of a class: 3 hidden, 1 .txt\n" in capsys.readouterr().err


# Shift sets ---------------------------------------------------------------------------------------

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def in_memory(class_names):
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    return data.Split(images, torch.tensor([0, 1]), class_names)


def test_read_cifar10_1(tmp_path):
    images = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    images[:, 1, 2, 0] = range(20)
    assert "cifar10.1_v6_data.npy" in refused(shifts.read_cifar10_1, tmp_path)
    np.save(tmp_path / "cifar10.1_v4_data.npy", images[:5])
    np.save(tmp_path / "cifar10.1_v6_data.npy", images)
    assert "cifar10.1_v6_labels.npy" in refused(shifts.read_cifar10_1, tmp_path)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.arange(20) % 10)
    split, columns = shifts.load_shift(tmp_path, "cifar10", in_memory(CIFAR10))
    assert split.images[:, 0, 1, 2].tolist() == list(range(20))
    assert columns.tolist() == list(range(10)) and split.labels.tolist() == list(range(10)) * 2
    message = refused(shifts.load_shift, tmp_path, "cifar100", in_memory(CIFAR10))
    assert "holds a shift set of cifar10, not of cifar100" in message
    for wrong in (np.full(20, 10), np.full(20, -1)):
        np.save(tmp_path / "cifar10.1_v6_labels.npy", wrong)
        assert "not all from 0 to 9" in refused(shifts.read_cifar10_1, tmp_path)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.arange(19))
    message = refused(shifts.read_cifar10_1, tmp_path)
    assert "is torch.uint8 [20, 32, 32, 3], its labels [19]" in message


def test_read_stl10_has_nine_classes_of_cifar10(tmp_path):
    own = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    assert "test_X.bin" in refused(shifts.read_stl10, tmp_path)
    pixels = np.zeros((10, 3, 96, 96), dtype=np.uint8)
    pixels[:, 1, 7, 5] = range(10)  # their files are column-major
    pixels.tofile(folder / "test_X.bin")
    np.arange(1, 11, dtype=np.uint8).tofile(folder / "test_y.bin")
    split, columns = shifts.load_shift(tmp_path, "cifar10", in_memory(CIFAR10))
    assert split.images.shape == (9, 3, 96, 96)
    assert [CIFAR10[k] for k in columns] == [name for name in CIFAR10 if name != "frog"]
    shown = [own[value].replace("car", "automobile") for value in split.images[:, 1, 5, 7]]
    assert [CIFAR10[columns[label]] for label in split.labels] == shown
    for name, content in (("test_X.bin", b"short"), ("test_y.bin", bytes([99] * 10))):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert "stl10_binary is damaged" in refused(shifts.read_stl10, tmp_path)
        (folder / name).write_bytes(whole)


def test_read_stl10_agrees_with_torchvision(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "test_X.bin").write_bytes(random_images(10 * 3 * 96 * 96).numpy().tobytes())
    (folder / "test_y.bin").write_bytes(bytes([1, 3, 8, 2, 10, 9, 4, 5, 6, 7]))
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    (folder / "class_names.txt").write_text("")
    expected = torchvision.datasets.STL10(tmp_path, split="test")
    images, _ = shifts.read_stl10(tmp_path)
    kept = torch.tensor(expected.labels) != 7  # the monkey
    assert torch.equal(images, torch.from_numpy(expected.data)[kept])


def test_load_shift_by_wordnet_id_number_and_classes_json(tmp_path):
    for k, wnid in enumerate(("n01", "n02", "n03")):
        (tmp_path / "val" / wnid).mkdir(parents=True)
        for i in (0, 1):
            Image.new("RGB", (40, 30), (80 * k + i,) * 3).save(tmp_path / "val" / wnid / f"{i}.png")
    (tmp_path / "words.txt").write_text("n01\tcat\nn02\tdog\nn03\tbird\n")
    test = data.load_dataset("imagenet", tmp_path, "test")
    for names in (("n02", "n03"), ("1", "2"), ("hounds", "fowl")):
        for folder, source in zip(names, ("n02", "n03")):
            (tmp_path / names[0]).mkdir(exist_ok=True)
            (tmp_path / names[0] / folder).symlink_to(tmp_path / "val" / source)
    message = refused(shifts.load_shift, tmp_path / "hounds", "imagenet", test)
    assert "'fowl' is no class; the 3 classes are like 'n01'" in message
    (tmp_path / "hounds/classes.json").write_text('{"hounds": "dog", "fowl": "n03"}')
    for folder in ("n02", "1", "hounds"):
        split, columns = shifts.load_shift(tmp_path / folder, "imagenet", test)
        assert columns.tolist() == [1, 2] and sorted(split.labels.tolist()) == [0, 0, 1, 1]
        images = torch.cat(list(data.blocks(split.images)))
        assert images.shape == (4, 3, 224, 224)  # as the test split's
        assert torch.equal(images[:, 0, 0, 0] // 80, columns[split.labels])
    (tmp_path / "hounds/classes.json").write_text("{")
    message = refused(shifts.load_shift, tmp_path / "hounds", "imagenet", test)
    assert "classes.json is damaged; expected {folder: class}" in message


def test_load_shift_leaves_small_images_whole(tmp_path):
    images, labels, names = shapes.render_shapes("shift")
    chosen = (3, 12)
    for k in chosen:
        folder = tmp_path / names[k].replace(" ", "_")
        folder.mkdir()
        for i in (labels == k).nonzero()[:3, 0].tolist():
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    renamed = {names[k].replace(" ", "_"): names[k] for k in chosen}
    (tmp_path / "classes.json").write_text(json.dumps(renamed))
    split, columns = shifts.load_shift(tmp_path, "shapes", data.Split(images, labels, names))
    assert columns.tolist() == list(chosen)
    numbers = [int(Path(path).stem) for path in split.images.paths]
    assert torch.equal(torch.cat(list(data.blocks(split.images))), images[numbers])
