"""shifts.py: published test sets and folders of class folders, damaged ones among them."""

import numpy as np
import pickle
import pytest
import torch
from helpers import class_pictures, refused
from pathlib import Path
from support import shifts

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

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
        assert f"severity {severity}" in refused(shifts.read_cifar_c, cifar_c, "fog", severity)
    assert "snow.npy" in refused(shifts.read_cifar_c, cifar_c, "snow", 1)  # missing
    for shape, dtype in (((20, 3, 32, 32), np.uint8), ((21, 32, 32, 3), np.uint8),
                         ((20, 32, 32), np.uint8), ((20, 32, 32, 3), np.float32)):
        np.save(cifar_c / "snow.npy", np.zeros(shape, dtype))
        assert "snow.npy" in refused(shifts.read_cifar_c, cifar_c, "snow", 1)
    for content in (b"", b"no array", (cifar_c / "fog.npy").read_bytes()[:5000],
                    pickle.dumps([1, 2])):
        (cifar_c / "snow.npy").write_bytes(content)
        assert "snow.npy or labels.npy" in refused(shifts.read_cifar_c, cifar_c, "snow", 1)
    for labels in (np.arange(20), np.ones((20, 1), int), np.ones(20)):  # in no order, two, floats
        np.save(cifar_c / "labels.npy", labels)
        assert "labels" in refused(shifts.read_cifar_c, cifar_c, "fog", 1)

def test_imagenet_c_folder(tmp_path):
    (tmp_path / "fog/2").mkdir(parents=True)
    (tmp_path / "blur/defocus_blur/1").mkdir(parents=True)
    assert shifts.imagenet_c_folder(tmp_path, "fog", 2) == tmp_path / "fog/2"
    found = shifts.imagenet_c_folder(tmp_path, "defocus_blur", 1)
    assert found == tmp_path / "blur/defocus_blur/1"
    for name, severity in (("fog", 1), ("snow", 2)):
        assert f"{name}/{severity}" in refused(shifts.imagenet_c_folder, tmp_path, name, severity)

def test_load_shift_of_cifar10_1(tmp_path):
    images = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    images[:, 1, 2, 0] = range(20)
    assert "cifar10.1_v6_data.npy" in refused(shifts.read_cifar10_1, tmp_path)
    np.save(tmp_path / "cifar10.1_v4_data.npy", images[:5])
    np.save(tmp_path / "cifar10.1_v6_data.npy", images)
    assert "cifar10.1_v6_labels.npy" in refused(shifts.read_cifar10_1, tmp_path)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.arange(20) % 10)
    pixels, labels, columns = shifts.load_shift(tmp_path, "cifar10", CIFAR10, CIFAR10)
    assert pixels[:, 0, 1, 2].tolist() == list(range(20)) and pixels.shape == (20, 3, 32, 32)
    assert columns.tolist() == list(range(10)) and labels.tolist() == list(range(10)) * 2
    message = refused(shifts.load_shift, tmp_path, "cifar100", CIFAR10, CIFAR10)
    assert "cifar100" in message and str(tmp_path) in message
    for wrong in (np.full(20, 10), np.full(20, -1), np.arange(19)):
        np.save(tmp_path / "cifar10.1_v6_labels.npy", wrong)
        assert "cifar10.1_v6" in refused(shifts.read_cifar10_1, tmp_path)

def test_load_shift_of_stl10_has_nine_classes_of_cifar10(tmp_path):
    own = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    assert "test_X.bin" in refused(shifts.read_stl10, tmp_path)
    pixels = np.zeros((10, 3, 96, 96), dtype=np.uint8)
    pixels[:, 1, 7, 5] = range(10)  # their files are column-major
    pixels.tofile(folder / "test_X.bin")
    np.arange(1, 11, dtype=np.uint8).tofile(folder / "test_y.bin")
    images, labels, columns = shifts.load_shift(tmp_path, "cifar10", CIFAR10, CIFAR10)
    assert images.shape == (9, 3, 96, 96)
    assert [CIFAR10[k] for k in columns] == [name for name in CIFAR10 if name != "frog"]
    shown = [own[value].replace("car", "automobile") for value in images[:, 1, 5, 7]]
    assert [CIFAR10[columns[label]] for label in labels] == shown
    for name, content in (("test_X.bin", b"short"), ("test_y.bin", bytes([99] * 10))):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert "stl10_binary" in refused(shifts.read_stl10, tmp_path)
        (folder / name).write_bytes(whole)

def test_list_classes_counts_labels_within_the_columns(tmp_path):
    for folder, count in (("n30", 2), ("n10", 1), ("n15", 3)):
        class_pictures(tmp_path, [folder], count)
    ids = ["n05", "n15", "n20", "n10", "n30"]
    paths, labels, columns = shifts.list_classes(tmp_path, ids, ids)
    assert [Path(path).parent.name for path in paths] == ["n10"] + ["n15"] * 3 + ["n30"] * 2
    assert columns.tolist() == [1, 3, 4] and labels.tolist() == [1, 0, 0, 0, 2, 2]

@pytest.mark.parametrize("names", [["n02", "n03"], ["dog", "Bird"], ["1", "2"]])
def test_load_shift_by_wordnet_id_name_and_number(names, tmp_path):
    tmp_path = tmp_path / "val"
    class_pictures(tmp_path, names)
    ids, class_names = ["n01", "n02", "n03"], ["cat", "dog", "bird"]
    paths, labels, columns = shifts.load_shift(tmp_path, "imagenet", ids, class_names)
    assert columns.tolist() == [1, 2] and len(paths) == 4
    for path, label in zip(paths, labels.tolist()):
        assert Path(path).parent.name == names[label]
    message = refused(shifts.load_shift, tmp_path / "..", "imagenet", ids, class_names)
    assert f"{tmp_path}/../val" in message
