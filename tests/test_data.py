"""data.py: augmentation and batches against their definitions; data sets as they lie on a disk,
damaged ones among them."""

import data
import itertools
import os
import pickle
import pytest
import tarfile
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from collections import Counter
from helpers import class_pictures, encoded, random_images, refused, seeded, write_files, write_zip
from PIL import Image
from support import files
from torchvision.transforms import v2
from unittest.mock import Mock
from urllib.error import URLError

@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RICHKD_CACHE", str(tmp_path_factory.mktemp("cache")))

def coded_split(n, side=8):
    """Images whose channels say which image (0), row (1) and column (2) a value is from."""
    image = torch.arange(n).view(n, 1, 1).expand(n, side, side)
    row = torch.arange(1, side + 1).view(1, side, 1).expand(n, side, side)
    column = torch.arange(1, side + 1).view(1, 1, side).expand(n, side, side)
    images = torch.stack([image, row, column], 1).to(torch.uint8)
    return data.Split(images, torch.arange(n) % 7, [str(k) for k in range(7)])

def batches(split, batch_size, seed, rank=0, world=1, workers=0, tables=()):
    """All batches of an epoch, looked up."""
    return [data.look_up(split, tables, drawn)
            for drawn in data.epoch(split, tables, batch_size, seed, rank, world, workers)]

@pytest.mark.parametrize("padding", [4, 2])
def test_augment_is_torchvisions_flip_pad_and_crop(padding):
    images = random_images(200, 3, 12, 10)
    before = images.clone()
    _, top, left, flip = data.draw_epoch(200, 0, padding)
    out = data.augment(images, top, left, flip, padding)
    assert out.dtype == torch.uint8 and torch.equal(images, before)
    for i in range(200):
        image = TF.horizontal_flip(images[i]) if flip[i] else images[i]
        image = TF.crop(TF.pad(image, [padding]), int(top[i]), int(left[i]), 12, 10)
        assert torch.equal(out[i], image)

def test_draw_epoch_makes_every_offset_equally_likely():
    N = 16200
    order, *draws = data.draw_epoch(N, 0)
    assert sorted(order.tolist()) == list(range(N)) and order.tolist() != list(range(N))
    assert all(x.dtype == torch.int64 and x.shape == (N,) for x in (order, *draws))
    counts = Counter(zip(*(x.tolist() for x in draws)))
    assert counts.keys() == set(itertools.product(range(9), range(9), range(2)))
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert 105 < chi_square < 230  # 161 degrees of freedom: mean 161, standard deviation 18

def test_draw_epoch_is_a_function_of_its_seed():
    state = torch.get_rng_state()
    one, same, other = (data.draw_epoch(100, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert not any(torch.equal(a, b) for a, b in zip(one, other))
    assert torch.equal(state, torch.get_rng_state())
    assert [x[:5].tolist() for x in one] == [
        [86, 42, 89, 92, 3], [1, 5, 5, 7, 7], [8, 4, 7, 8, 8], [0, 1, 0, 0, 0]]

def test_to_input_is_torchvisions():
    images, numbers = random_images(4, 3, 5, 6), ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    to_float = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*numbers)])
    out = data.to_input(images, *numbers)
    torch.testing.assert_close(out, to_float(images))
    assert out.is_contiguous(memory_format=torch.channels_last)

@pytest.mark.parametrize("images", [
    torch.ones(2, 3, 8, 8), torch.ones(2, 8, 8, 3).byte(), torch.ones(3, 8, 8).byte()])
def test_to_input_and_augment_refuse_what_is_not_uint8_in_channels(images):
    for call, others in ((data.to_input, 2), (data.augment, 3)):
        assert str(tuple(images.shape)) in refused(call, images, *[torch.zeros(2).long()] * others)

def numbered_stream(tmp_path, n, size=40):
    """Image i is of the one grey i; `size` crops take all of it."""
    write_files(tmp_path, {f"{i:02}.png": encoded((i, i, i), (50, 40)) for i in range(n)})
    return data.Stream([str(tmp_path / f"{i:02}.png") for i in range(n)], size, size)

@pytest.mark.parametrize("kind", ["tensor", "stream"])
def test_take_and_blocks(kind, tmp_path):
    images = numbered_stream(tmp_path, 20)
    if kind == "tensor":
        images = torch.cat(list(data.blocks(images)))
        assert images.shape == (20, 3, 40, 40) and images.dtype == torch.uint8
    assert data.is_in_memory(images) == (kind == "tensor")
    for index in (slice(3, None, 4), slice(5, 9), torch.tensor([7, 2, 2])):
        found = list(data.blocks(data.take(images, index), size=2))
        assert [len(block) for block in found][:-1] == [2] * (len(found) - 1)
        assert torch.equal(torch.cat(found)[:, 0, 0, 0].long(), torch.arange(20)[index])

def test_resize_and_clip_images():
    stream, bicubic = data.Stream(["0", "1", "2"]), v2.InterpolationMode.BICUBIC
    clip = data.clip_images(stream, 24)
    assert clip == data.Stream(stream.paths, 24, 24, bicubic)
    assert data.take(data.resize(clip, 12), slice(2)) == data.Stream(["0", "1"], 12, 12, bicubic)
    assert data.resize(stream, 32).resize_to == 37  # of 256, for 224
    images = random_images(3, 3, 50, 40)
    expected = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32)])(images)
    assert torch.equal(data.resize(images, 32), expected)
    assert data.resize(expected, 32) is expected and data.clip_images(images, 24) is images

@pytest.mark.parametrize("stream", [False, True])
def test_subset_shares_no_image_and_keeps_the_classes_balance(stream):
    labels = torch.tensor([0] * 10 + [1] * 40 + [2] * 20)[torch.randperm(70, generator=seeded(1))]
    images = data.Stream(list(range(70)), 2) if stream else torch.arange(70).view(70, 1, 1, 1)
    split = data.Split(images, labels, ["a", "b", "c"])
    parts = [data.subset(split, *part) for part in ((0, 0.9 * 0.5), (0, 0.9), (0.9, 1))]
    few, kept, held = ([int(i) for i in (part.images.paths if stream else part.images.flatten())]
                       for part in parts)
    assert [part.labels.bincount().tolist() for part in parts[1:]] == [[9, 36, 18], [1, 4, 2]]
    assert sorted(kept + held) == list(range(70)) and set(few) < set(kept)
    assert labels[few].equal(parts[0].labels) and labels[held].equal(parts[2].labels)
    with pytest.raises(ValueError, match="no image"):
        data.subset(split, 0.5, 0.5)

def test_at_size_decodes_once_and_again_for_other_pictures(tmp_path, monkeypatch):
    class_pictures(tmp_path / "train", ["a", "b"])
    split = data.load_dataset("folder", tmp_path, "train")
    expected = torch.cat(list(data.blocks(data.resize(split.images, 6))))
    before = data.at_size(split, 6)
    assert torch.equal(before.images, expected) and before.labels.tolist() == [0, 0, 1, 1]
    with monkeypatch.context() as patch:
        patch.setattr(data, "blocks", None)  # nothing is decoded
        assert torch.equal(data.at_size(split, 6).images, expected)
    Image.new("RGB", (8, 8), (7, 7, 7)).save(tmp_path / "train/b/1.png")
    assert data.at_size(split, 6).images[3].eq(7).all() and torch.equal(before.images, expected)
    assert data.at_size(split, 5).images.shape == (4, 3, 5, 5)

def test_at_size_streams_above_half_of_the_memory_and_imagenet(tmp_path, monkeypatch, capsys):
    class_pictures(tmp_path / "train", ["a", "b"])
    split, imagenet = (data.load_dataset(dataset, tmp_path, "train")
                       for dataset in ("folder", "imagenet"))
    numbers = {"SC_PAGE_SIZE": 8, "SC_PHYS_PAGES": 107}  # two bytes short of twice 4 * 3 * 6 * 6
    monkeypatch.setattr(os, "sysconf", numbers.get)
    assert not data.is_in_memory(data.at_size(split, 6).images)
    assert "4 images of 6 x 6" in capsys.readouterr().err
    numbers["SC_PHYS_PAGES"] = 108
    assert data.is_in_memory(data.at_size(split, 6).images)
    assert data.at_size(imagenet, 32).images == data.Stream(imagenet.images.paths, 32, 37)

WNIDS = ["n01440764", "n01443537"]

@pytest.mark.parametrize("ids, lines, expected", [
    ("ab", ["pepper, bell", "7 up"], ["pepper  bell", "7 up"]),
    ("ab", ["b\tpepper, bell", "a\tapple"], ["apple", "pepper  bell"]),  # by id
    ("ab", ["1 pepper", "2 apple"], ["1 pepper", "2 apple"]),
    *(("ab", [f"big {by}b", f"a{by}small"], ["small", "big"]) for by in (" | ", ",", ": ", "=")),
    (["cat", "sea dog"], ["sea dog", "tabby cat"], ["tabby cat", "sea dog"]),
    (["class_2", "class_10"], ["x class_10", "class_2: y"], ["y", "x"]),
    (WNIDS, [f"{k},{id},of {k}" for k, id in enumerate(WNIDS[::-1])], ["1, of 1", "0, of 0"]),
    (WNIDS, [f"{id} of {id}, x" for id in WNIDS[::-1]], [f"of {id}, x" for id in WNIDS]),
    (WNIDS, [f"{id},of {id}" for id in WNIDS[::-1]], [f"of {id}" for id in WNIDS]),
    *(("ab", lines, None) for lines in (
        [], ["b", "a"], ["A", "B", "C"], ["2 x", "1 y"], ["x,1", "y,0"], ["a\tx", "c\ty"],
        ["x|1", "y|0"], ["c: x", "d: y"], [f"{id} x" for id in WNIDS])),
    *((ids, ["x", "y"], None) for ids in (["10", "2"], ["class_10", "class_2"]))])
def test_rename_classes_in_order_or_by_id_or_refuses(ids, lines, expected):
    split = coded_split(7)._replace(class_names=list(ids))
    if expected is None:
        assert "names.txt" in refused(data.rename_classes, split, lines, "names.txt")
    else:
        renamed = data.rename_classes(split, lines, "names.txt")
        assert renamed.class_names == expected and renamed.ids == list(ids)

def test_epoch_is_what_draw_epoch_says_with_its_labels_and_rows():
    split, table = coded_split(50, side=32), torch.arange(50.0).view(50, 1)
    order, *crops = data.draw_epoch(50, 3)
    found = zip(*batches(split, 8, seed=3, tables=(table,)))
    images, labels, index, rows = (torch.cat(column) for column in found)
    assert torch.equal(index, order)
    assert torch.equal(images, data.augment(split.images[order], *crops))
    assert torch.equal(images[:, 0].flatten(1).amax(1).long(), index)
    assert torch.equal(labels, index % 7) and torch.equal(rows[:, 0], index.float())
    assert next(iter(data.epoch(split, (), 8, seed=3))).shape == (4, 8)

@pytest.mark.parametrize("N, batch_size, sizes", [
    (22, 6, [3, 3, 3, 2]), (21, 6, [3, 3, 3]), (25, 6, [3] * 4), (30, 7, [3] * 4), (9, 3, [])])
def test_epoch_of_ranks_is_that_of_one_process_without_batches_of_one(N, batch_size, sizes):
    split = coded_split(N)
    whole = batches(split, batch_size, seed=5)
    parts = [batches(split, batch_size, seed=5, rank=rank, world=2) for rank in range(2)]
    assert sum(len(labels) for _, labels, _ in whole) == N - (N == 25)  # no last image alone
    assert [[len(labels) for _, labels, _ in part] for part in parts] == [sizes] * 2
    for one, two, together in zip(*parts, whole):
        even = len(together[0]) // 2 * 2  # equal shares, of the last batch, too
        for a, b, all_of_it in zip(one, two, together):
            assert torch.equal(a, all_of_it[:even:2]) and torch.equal(b, all_of_it[1:even:2])

def image_folder(root):
    """Two classes of three noisy images, 50 x 40 pixels, in train/ and val/."""
    for part in ("train", "val"):
        class_pictures(root / part, ["n01", "n02"], n=3)
    for seed, path in enumerate(sorted(root.rglob("*.png"))):
        Image.fromarray(random_images(40, 50, 3, seed=seed).numpy()).save(path)
    return write_files(root, {"words.txt": b"n01\ttench, Tinca\nn02\tgoldfish\n"})

def test_epoch_of_a_stream_is_the_same_with_any_number_of_workers(tmp_path):
    split = data.load_dataset("imagenet", image_folder(tmp_path), "train")
    split = split._replace(images=data.resize(split.images, 16))
    table = torch.arange(6.0)
    one, two = (batches(split, 4, seed=1, workers=workers, tables=(table,)) for workers in (0, 2))
    assert all(torch.equal(a, b) for parts in zip(one, two) for a, b in zip(*parts))
    for whole, part in zip(one, batches(split, 4, seed=1, rank=1, world=2)):
        assert all(torch.equal(a[1::2], b) for a, b in zip(whole, part))
    images, labels, index, rows = (torch.cat(column) for column in zip(*one))
    assert images.shape == (6, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(labels, split.labels[index]) and torch.equal(rows, index.float())
    assert torch.equal(index, data.draw_epoch(6, 1)[0])
    other = {int(i): image for images, _, index in batches(split, 4, seed=2)
             for i, image in zip(index, images)}
    assert not any(torch.equal(image, other[int(i)]) for i, image in zip(index, images))
    torch.manual_seed((1 * 1_000_003 + int(index[0])) % 2**32)  # the ImageNet recipe
    with Image.open(split.images.paths[index[0]]) as file:
        recipe = v2.Compose([v2.RandomResizedCrop(16), v2.RandomHorizontalFlip(), v2.PILToTensor()])
        assert torch.equal(images[0], recipe(file))

def test_blocks_of_a_stream_are_torchvisions_crops(tmp_path):
    images = data.load_dataset("imagenet", image_folder(tmp_path), "test").images
    pixels = torch.cat(list(data.blocks(data.resize(images, 16), size=4)))
    with Image.open(images.paths[4]) as file:
        expected = v2.Compose([v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor()])(file)
    assert torch.equal(pixels[4], expected) and len(pixels) == 6

@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_names_a_file_that_cannot_be_read_from_the_workers_too(tmp_path, workers):
    class_pictures(tmp_path / "train", ["n01", "n02"])
    (tmp_path / "train/n01/1.png").write_bytes(b"no image")
    split = data.load_dataset("imagenet", tmp_path, "train")
    message = refused(lambda: batches(split, 2, seed=0, workers=workers))
    assert message.startswith(f"{tmp_path}/train/n01/1.png is not a readable image (")

def test_load_dataset_refuses_other_names_and_makes_no_folder_of_a_path_that_is_not_there(tmp_path):
    assert "tiny-imagenet" in refused(data.load_dataset, "mnist", ".", "train")
    assert "train, test" in refused(data.load_dataset, "cifar10", ".", "shift")
    for name in ("tiny-imagenet", "cifar100", "imagenet", "folder"):
        message = refused(data.load_dataset, name, tmp_path / "absent.zip", "train")
        assert f"{tmp_path}/absent.zip" in message
    assert not os.listdir(tmp_path)

@pytest.mark.parametrize("name, file, address", [
    ("cifar100", "cifar-100-python.tar.gz", "zenodo.org cs.toronto.edu"),
    ("tiny-imagenet", "tiny-imagenet-200.zip", "cs231n.stanford.edu")])
def test_load_dataset_without_a_network_names_file_addresses_place_and_flag(
        name, file, address, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=URLError("no network")))
    message = refused(data.load_dataset, name, tmp_path / "new", "train")
    for part in (str(tmp_path / "new" / file), "--data-dir", *address.split()):
        assert part in message and not (tmp_path / "new").exists()
    (tmp_path / file).write_bytes(b"half a file")
    assert str(tmp_path / file) in refused(data.load_dataset, name, tmp_path, "train")
    assert os.listdir(tmp_path) == [file]

CIFAR10 = data.CIFAR_CLASSES["cifar10"]

def test_cifar_unpacks_and_reads_an_archive(tmp_path, monkeypatch):
    """An archive in CIFAR-10's layout with two images a file; its sums are put into torchvision."""
    pixels = random_images(12, 3, 32, 32)
    dataset, base = torchvision.datasets.CIFAR10, "cifar-10-batches-py"
    names = [name for name, _ in dataset.train_list + dataset.test_list]
    content = {name: {"data": part.flatten(1).numpy(), "labels": [0, 1]}
               for name, part in zip(names, pixels.split(2))}
    content["batches.meta"] = {"label_names": ["plane", "car"]}
    write_files(tmp_path, {name: pickle.dumps(value) for name, value in content.items()})
    with tarfile.open(tmp_path / dataset.filename, "w:gz") as archive:
        for name in content:
            archive.add(tmp_path / name, f"{base}/{name}")
    sums = {name: files.file_digest(tmp_path / name, "md5") for name in content}
    monkeypatch.setattr(dataset, "train_list", [[name, sums[name]] for name in names[:-1]])
    monkeypatch.setattr(dataset, "test_list", [[names[-1], sums[names[-1]]]])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(dataset, "tgz_md5", files.file_digest(tmp_path / dataset.filename, "md5"))
    train, test = (data.load_dataset("cifar10", tmp_path, split) for split in ("train", "test"))
    assert torch.equal(train.images, pixels[:10]) and torch.equal(test.images, pixels[10:])
    assert train.labels.tolist() == [0, 1] * 5 and train.class_names == ["plane", "car"]
    (tmp_path / dataset.filename).unlink()
    assert torch.equal(data.load_dataset("cifar10", tmp_path, "test").images, test.images)

def cifar_files(above=""):
    """Two pictures a class, of which one is spelled with a capital; the colour tells the class."""
    classes = [name.replace("truck", "Truck") for name in CIFAR10]
    return {f"cifar10/{split}/{above}{name}/{i}.png": encoded((20 * k, i, 9), (32, 32))
            for split in ("train", "test") for k, name in enumerate(classes) for i in (1, 0)}

@pytest.mark.parametrize("layout", ["zip", "unpacked", "superclass"])
def test_cifar_pictures_of_every_layout(layout, tmp_path):
    content = cifar_files("super/" if layout == "superclass" else "")
    if layout == "zip":
        root = write_zip(tmp_path / "pictures.zip", content)
    else:
        root = write_files(tmp_path, content) / "cifar10"
    for name in ("train", "test"):
        split = data.load_dataset("cifar10", root, name)
        assert split.images.shape == (20, 3, 32, 32) and split.class_names == CIFAR10
        assert torch.equal(split.images[:, 0, 5, 5] // 20, split.labels.to(torch.uint8))
        assert split.images[:, 1, 5, 5].tolist() == [0, 1] * 10  # sorted by name

@pytest.mark.parametrize("change, named", [
    (lambda content: content | {"cifar10/train/whale/0.png": b""}, "'whale'"),
    (lambda content: content | {"cifar10/train/frog/9.png": encoded(size=(33, 32))}, "frog/9.png"),
    (lambda content: {"cifar10/x.txt": b""}, "train")])
def test_cifar_pictures_refuses(change, named, tmp_path):
    archive = write_zip(tmp_path / "x.zip", change(cifar_files()))
    assert named in refused(data.load_dataset, "cifar10", archive, "train")
    assert os.listdir(tmp_path) == ["x.zip"]

@pytest.mark.slow
def test_cifar_of_the_shared_zip_is_the_published_one(shared):
    if not (shared / "data/cifar100.zip").is_file():
        pytest.skip("no cifar100.zip in ../shared")
    train = data.load_dataset("cifar100", shared / "data/cifar100.zip", "train")
    assert train.labels.bincount().tolist() == [500] * 100
    pixels = train.images.double().div(255).transpose(0, 1).flatten(1)
    std, mean = torch.std_mean(pixels, dim=1)
    assert mean.tolist() == pytest.approx([0.50707516, 0.48654887, 0.44091784], abs=1e-7)
    assert std.tolist() == pytest.approx([0.26733429, 0.25643846, 0.27615047], abs=1e-7)

TOP = "tiny-imagenet-200/"

def tiny_imagenet_files():
    """Two classes, three training and two validation images in Tiny-ImageNet's layout, each of one
    grey."""
    images = {"train/n01/images/n01_0.JPEG": 10, "train/n02/images/n02_0.JPEG": 20,
              "train/n02/images/n02_1.JPEG": 30, "val/images/val_0.JPEG": 40,
              "val/images/val_1.JPEG": 50}
    content = {name: encoded((grey,) * 3, form="JPEG") for name, grey in images.items()}
    content |= {"train/n01/n01_boxes.txt": b"n01_0.JPEG\t0\t0\t1\t1\n", "wnids.txt": b"n02\nn01\n",
                "words.txt": b"n01\tgoldfish, Carassius\nn02\tlion\nn03\tunused\n",
                "val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t1\t1\n"
                                           b"val_1.JPEG\tn01\t0\t0\t1\t1\n"}
    return {TOP + name: value for name, value in content.items()}

@pytest.mark.parametrize("layout", ["zip", "folder", "its parent", "val/<wnid>",
                                    "val/<wnid> alone", "val/<wnid>/images", "Windows"])
def test_tiny_imagenet_of_every_layout(layout, tmp_path, capsys):
    content = tiny_imagenet_files()
    for file, wnid in {"val_0.JPEG": "n02", "val_1.JPEG": "n01"}.items():
        if "<wnid>" in layout:
            place = f"{wnid}/images" if "images" in layout else wnid
            content[f"{TOP}val/{place}/{file}"] = content.pop(f"{TOP}val/images/{file}")
    if "alone" in layout:
        del content[f"{TOP}val/val_annotations.txt"]
    if layout == "Windows":
        content |= {name: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n") + b"\r\n\r\n"
                    for name, text in content.items() if name.endswith(".txt")}
    root = write_zip(tmp_path / "t.zip", content)
    if layout in ("folder", "its parent"):
        root = write_files(tmp_path, content) / (TOP if layout == "folder" else "")
    test, train = (data.load_dataset("tiny-imagenet", root, name) for name in ("test", "train"))
    assert train.class_names == ["goldfish, Carassius", "lion"]  # sorted, unlike in wnids.txt
    assert train.images[:, 0, 0, 0].tolist() == [10, 20, 30] and train.labels.tolist() == [0, 1, 1]
    by_label = dict(zip(test.labels.tolist(), test.images[:, 0, 0, 0].tolist()))
    assert by_label == {1: 40, 0: 50} and test.ids == ["n01", "n02"]
    assert "alone" in layout or test.labels.tolist() == [1, 0]  # in the order of the list
    assert "left out" not in capsys.readouterr().err

VAL, LISTING = f"{TOP}val/", "val_annotations.txt"

@pytest.mark.parametrize("change, split, named", [
    ({f"{TOP}train/n01/images/n01_0.JPEG": encoded(size=(12, 9))}, "train", "n01_0.JPEG"),
    ({f"{TOP}train/n09/images/z.JPEG": encoded()}, "train", "'n09'"),
    ({f"{TOP}wnids.txt": None}, "train", "wnids.txt"),
    ({f"{VAL}images/val_0.JPEG": None, f"{VAL}n01/val_0.JPEG": encoded()}, "test", LISTING),
    ({f"{VAL}images/val_0.JPEG": None}, "test", LISTING),
    ({f"{VAL}{LISTING}": b"val_0.JPEG\tn02\t0\t0\t1\t1\n"}, "test", LISTING),
    ({f"{VAL}{LISTING}": b"no columns\nhere\n"}, "test", LISTING)])
def test_tiny_imagenet_refuses(change, split, named, tmp_path):
    content = {**tiny_imagenet_files(), **change}
    archive = write_zip(tmp_path / "t.zip", {k: v for k, v in content.items() if v is not None})
    assert named in refused(data.load_dataset, "tiny-imagenet", archive, split)
    archive.write_bytes(archive.read_bytes()[:-20])
    assert str(archive) in refused(data.load_dataset, "tiny-imagenet", archive, split)
    assert os.listdir(tmp_path) == ["t.zip"]

def shown(split):
    """What a split's pictures show: the first letters of its labels' classes, if all is right."""
    images = data.at_size(split._replace(images=data.clip_images(split.images, 8)), 8).images
    return [(chr(value), split.ids[label][0])
            for value, label in zip(images[:, 0, 0, 0].tolist(), split.labels.tolist())]

@pytest.mark.parametrize("dataset", ["imagenet", "folder"])
@pytest.mark.parametrize("test, line", [
    (["b", "c"], "val has no image of 1 classes"), (["B", "c_"], "val: 2 classes spelled"),
    (["a", "b", "c"], "")])
def test_image_folders_gives_test_images_trains_labels(dataset, test, line, tmp_path, capsys):
    class_pictures(tmp_path / "train", ["c", "a", "b"])
    class_pictures(tmp_path / "val", test)
    assert set(shown(data.load_dataset(dataset, tmp_path, "train"))) == {(k, k) for k in "abc"}
    split = data.load_dataset(dataset, tmp_path, "test")
    pairs = shown(split)
    assert len(pairs) == 2 * len(test) and split.class_names == ["a", "b", "c"]
    assert all(letter.lower() == label for letter, label in pairs)
    said = capsys.readouterr().err
    assert f"{tmp_path}/{line}" in said if line else "val" not in said

@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("names, named", [
    (["train/a/0.png", "train/b/0.png", "train/yak/x.gif", "val/a/0.png"], "['yak']"),
    (["train/images/a/0.png", "train/images/b/0.png", "val/images/b/0.png"], "'b']"),
    (["Train/a/0.png", "valid/b/0.png"], "'Train', 'valid'"),
    (["test/a/0.png", "test/b/.keep"], "test")])
def test_load_dataset_refuses_empty_and_single_classes(names, named, split, tmp_path):
    write_files(tmp_path, dict.fromkeys(names, encoded()))
    message = refused(data.load_dataset, "folder", tmp_path, split)
    assert str(tmp_path) in message and named in message

@pytest.mark.parametrize("link, to, split", [
    ("train/c", "b", "train"), ("train/c", "..", "train"), ("val", "train", "test"),
    ("val/b/0.png", "gone", "test"), ("val/b/0.png", "../../train/b/0.png", "test")])
def test_load_dataset_refuses_links_to_what_is_elsewhere(link, to, split, tmp_path):
    """A class of links alone, training images as a test, a broken link, a single test image."""
    class_pictures(tmp_path / "train", ["a", "b"])
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(to)
    assert str(tmp_path) in refused(data.load_dataset, "folder", tmp_path, split)

def test_image_folders_says_which_split_it_takes_for_which(tmp_path, capsys):
    class_pictures(tmp_path / "test", ["b", "a"], n=3)
    split = data.load_dataset("folder", tmp_path, "test")
    assert len(split.labels) == 6 and split.class_names == ["a", "b"]
    assert "has no train/" in capsys.readouterr().err
    class_pictures(tmp_path / "val", ["b", "a"])
    assert len(data.load_dataset("folder", tmp_path, "test").labels) == 4
    assert "val/ is the test split" in capsys.readouterr().err
    assert str(tmp_path / "train") in refused(data.load_dataset, "imagenet", tmp_path, "train")
    for root in (tmp_path / "absent", tmp_path / "val/a/0.png"):
        assert str(root) in refused(data.load_dataset, "folder", root, "train")

def test_image_folders_names_classes_by_words(tmp_path):
    words = {"n02012849": "crane", "n02963159": "cardigan, x"}
    class_pictures(tmp_path / "train", [*words, "n1"])
    (tmp_path / "words.txt").write_text("".join(f"{id}\t{words[id]}\n" for id in words))
    split = data.load_dataset("imagenet", tmp_path, "train")
    assert split.ids == [*words, "n1"] and split.class_names == [*words.values(), "n1"]
    assert split.labels.tolist() == [0, 0, 1, 1, 2, 2]
