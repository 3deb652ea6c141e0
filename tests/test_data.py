"""data.py: augmentation and batches against their definitions; data sets and shift sets as they
lie on a disk, damaged and hostile ones among them."""

import io
import itertools
import os
import pickle
import stat
import struct
import tarfile
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter

import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torchvision.transforms import v2

import clip_model
import data
from support import files, folders


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RICHKD_CACHE", str(tmp_path_factory.mktemp("cache")))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(*size, seed=0):
    return torch.randint(256, size, dtype=torch.uint8, generator=seeded(seed))


def coded_split(n, side=8):
    """Images whose channels say which image (0), row (1) and column (2) a value is from."""
    image = torch.arange(n).view(n, 1, 1).expand(n, side, side)
    row = torch.arange(1, side + 1).view(1, side, 1).expand(n, side, side)
    column = torch.arange(1, side + 1).view(1, 1, side).expand(n, side, side)
    images = torch.stack([image, row, column], 1).to(torch.uint8)
    return data.Split(images, torch.arange(n) % 7, [str(k) for k in range(7)])


def write_images(folder, count, size=(4, 4)):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size).save(folder / f"{i}.png")


def refused(call, *arguments):
    """The one line by which a call refuses what it is given, without a warning."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises((ValueError, OSError)) as error:
            call(*arguments)
    assert not warned and "\n" not in str(error.value)
    return str(error.value)


# Augmentation -------------------------------------------------------------------------------------


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


def test_augment_reads_and_copies_nothing_off_the_device():
    """On the meta device there is nothing to read, and a tensor of another device is an error."""
    draws = (torch.zeros(5, dtype=torch.int64, device="meta") for _ in range(3))
    out = data.augment(torch.empty(5, 3, 8, 8, dtype=torch.uint8, device="meta"), *draws)
    assert out.shape == (5, 3, 8, 8) and out.device.type == "meta"


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


def test_normalize_is_torchvisions():
    images, mean, std = random_images(4, 3, 5, 6), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    to_float = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    out = data.normalize(images, mean, std)
    torch.testing.assert_close(out, to_float(images))
    assert torch.equal(out, data.normalize(images, torch.tensor(mean), torch.tensor(std)))


def test_to_input_resizes_and_normalizes():
    images, mean, std = random_images(4, 3, 50, 40), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    transform = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32),
                            v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    out = data.to_input(images, 32, mean, std)
    torch.testing.assert_close(out, transform(images))
    assert out.is_contiguous(memory_format=torch.channels_last)


# Images of either kind ----------------------------------------------------------------------------


def numbered_stream(tmp_path, n, size=40):
    """Image i is of the one grey i; `size` crops take all of it."""
    for i in range(n):
        Image.new("RGB", (50, 40), (i, i, i)).save(tmp_path / f"{i:02}.png")
    return data.Stream([str(tmp_path / f"{i:02}.png") for i in range(n)], size, size)


@pytest.mark.parametrize("kind", ["tensor", "stream"])
def test_take_and_blocks(kind, tmp_path):
    images = numbered_stream(tmp_path, 20)
    if kind == "tensor":
        images = torch.cat(list(data.blocks(images)))
        assert images.shape == (20, 3, 40, 40) and images.dtype == torch.uint8
    for index in (slice(3, None, 4), slice(5, 9), torch.tensor([7, 2, 2])):
        expected = torch.arange(20)[index].tolist()
        part = data.take(images, index)
        found = list(data.blocks(part, size=2))
        assert [len(block) for block in found][:-1] == [2] * (len(found) - 1)
        assert torch.cat(found)[:, 0, 0, 0].tolist() == expected and len(part) == len(expected)


def test_take_and_resize_keep_a_streams_transform(tmp_path):
    stream = numbered_stream(tmp_path, 3)
    bicubic = v2.InterpolationMode.BICUBIC
    clip = data.clip_images(stream, 24)
    assert clip.geometry == (24, 24, bicubic)
    assert data.take(clip, slice(2)).geometry == clip.geometry
    assert data.resize(clip, 12).geometry == (12, 12, bicubic)
    assert data.resize(data.Stream(stream.paths), 32).geometry[:2] == (32, 37)  # 224 of 256
    images = random_images(2, 3, 9, 9)
    assert data.clip_images(images, 24) is images


def test_resize_is_torchvisions():
    images = random_images(3, 3, 50, 40)
    expected = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32)])(images)
    assert torch.equal(data.resize(images, 32), expected)
    assert data.resize(expected, 32) is expected


@pytest.mark.parametrize("kind", ["tensor", "stream"])
def test_subset_shares_no_image_and_keeps_the_classes_balance(kind):
    labels = torch.tensor([0] * 10 + [1] * 40 + [2] * 20)[torch.randperm(70, generator=seeded(1))]
    images = torch.arange(70, dtype=torch.uint8)[:, None, None, None].expand(70, 3, 2, 2)
    if kind == "stream":
        images = data.Stream([str(i) for i in range(70)], 2)

    def numbers(split):
        named = split.images.paths if kind == "stream" else split.images[:, 0, 0, 0]
        return [int(i) for i in named]

    split = data.Split(images, labels, ["a", "b", "c"])
    few, kept, held = (data.subset(split, *part) for part in ((0, 0.9 * 0.5), (0, 0.9), (0.9, 1)))
    assert held.labels.bincount().tolist() == [1, 4, 2]
    assert kept.labels.bincount().tolist() == [9, 36, 18]
    assert sorted(numbers(kept) + numbers(held)) == list(range(70))
    assert set(numbers(few)) < set(numbers(kept))
    for part in (few, held):
        assert labels[numbers(part)].equal(part.labels)
    with pytest.raises(ValueError, match="no image"):
        data.subset(split, 0.5, 0.5)


# Batches ------------------------------------------------------------------------------------------


def test_batches_keep_image_label_index_and_rows_together():
    split, table = coded_split(50), torch.arange(50.0).view(50, 1)
    seen = []
    for images, labels, index, rows in data.batches(split, 8, seed=3, tables=(table,)):
        assert torch.equal(images[:, 0].flatten(1).amax(1).long(), index)
        assert torch.equal(labels, index % 7) and torch.equal(rows[:, 0], index.float())
        seen += index.tolist()
    assert sorted(seen) == list(range(50)) and seen != list(range(50))


def test_batches_without_a_seed_are_in_order_and_unchanged():
    split = coded_split(50)
    images, labels, index = (torch.cat(column) for column in zip(*data.batches(split, 7)))
    assert torch.equal(images, split.images) and torch.equal(labels, split.labels)
    assert index.tolist() == list(range(50))


def test_batches_are_what_draw_epoch_says():
    split = coded_split(50)
    order, *crops = data.draw_epoch(50, 3)
    expected = data.augment(split.images[order], *crops)
    images, _, index = (torch.cat(column) for column in zip(*data.batches(split, 8, seed=3)))
    assert torch.equal(index, order) and torch.equal(images, expected)


@pytest.mark.parametrize("N", [21, 22, 25])
def test_batches_of_ranks_are_those_of_one_process(N):
    split = coded_split(N)
    whole = list(data.batches(split, 6, seed=5))
    parts = [list(data.batches(split, 6, seed=5, rank=rank, world=2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    for one, two, together in zip(*parts, whole):
        even = len(together[0]) // 2 * 2  # equal shares, of the last batch, too
        for a, b, all_of_it in zip(one, two, together):
            assert torch.equal(a, all_of_it[:even:2]) and torch.equal(b, all_of_it[1:even:2])
    tested = [index.tolist() for rank in range(2)
              for _, _, index in data.batches(split, 6, rank=rank, world=2)]
    assert sorted(sum(tested, [])) == list(range(N))  # in evaluation every image, once


def test_batches_leave_a_last_image_alone_out_in_training():
    for batch_size, left_out in ((8, 1), (7, 0), (1, 0)):
        for seed in (0, None):
            found = data.batches(coded_split(49), batch_size, seed)
            seen = sum(len(index) for _, _, index in found)
            assert seen == 49 - (left_out if seed is not None else 0)


def image_folder(root, splits=("train", "val")):
    """Two classes of three images, 50 x 40 pixels, in each of the splits."""
    for split in splits:
        for k, name in enumerate(("n01", "n02")):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                image = Image.fromarray(random_images(40, 50, 3, seed=9 * k + i).numpy())
                image.save(root / split / name / f"{i}.png")
    (root / "words.txt").write_text("n01\ttench, Tinca\nn02\tgoldfish\n")
    return root


def test_batches_of_a_stream_are_the_same_with_any_number_of_workers(tmp_path):
    split = data.load_dataset("imagenet", image_folder(tmp_path), "train")
    split = split._replace(images=data.resize(split.images, 16))
    table = torch.arange(6.0)
    runs = [list(data.batches(split, 4, seed=1, workers=workers, tables=(table,)))
            for workers in (0, 2)]
    for one, two in zip(*runs):
        assert all(torch.equal(a, b) for a, b in zip(one, two))
    images, labels, index, rows = runs[0][0]
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(labels, split.labels[index]) and torch.equal(rows, index.float())
    order = torch.cat([batch[2] for batch in runs[0]])
    assert torch.equal(order, data.draw_epoch(6, 1)[0])
    other = {int(i): image for images, _, index in data.batches(split, 4, seed=2)
             for i, image in zip(index, images)}
    assert not any(torch.equal(image, other[int(i)]) for i, image in zip(index, images))

    _, share = (list(data.batches(split, 4, seed=1, rank=rank, world=2)) for rank in (0, 1))
    for whole, part in zip(runs[0], share):
        assert all(torch.equal(a[1::2], b) for a, b in zip(whole, part))


def test_batches_of_a_stream_without_a_seed_are_torchvisions_crops(tmp_path):
    split = data.load_dataset("imagenet", image_folder(tmp_path), "test")
    split = split._replace(images=data.resize(split.images, 16))
    images, _, index = (torch.cat(column) for column in zip(*data.batches(split, 4)))
    with Image.open(split.images.paths[4]) as file:
        expected = v2.Compose([v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor()])(file)
    assert torch.equal(images[4], expected) and index.tolist() == list(range(6))


# Data sets ----------------------------------------------------------------------------------------


def test_load_dataset_lists_the_known_names():
    with pytest.raises(ValueError, match="unknown data set 'mnist'; known: shapes, cifar10"):
        data.load_dataset("mnist", ".", "train")
    with pytest.raises(ValueError, match="cifar10 has no split 'shift'; it has: train, test"):
        data.load_dataset("cifar10", ".", "shift")


@pytest.mark.parametrize("name, file, addresses", [
    ("cifar100", "cifar-100-python.tar.gz", ["zenodo.org", "www.cs.toronto.edu"]),
    ("tiny-imagenet", "tiny-imagenet-200.zip", ["cs231n.stanford.edu"])])
def test_load_dataset_without_a_network_names_file_addresses_place_and_flag(
        name, file, addresses, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    message = refused(data.load_dataset, name, tmp_path / "new", "train")
    assert all(part in message for part in (str(tmp_path / "new" / file), "--data-dir", *addresses))
    assert not os.listdir(tmp_path)
    (tmp_path / file).write_bytes(b"half a file")
    message = refused(data.load_dataset, name, tmp_path, "train")
    assert str(tmp_path / file) in message and "md5 is" in message
    assert os.listdir(tmp_path) == [file]


def test_cifar_unpacks_and_reads_an_archive(tmp_path, monkeypatch):
    """An archive in CIFAR-10's layout with two images a file; its sums are put into torchvision."""
    pixels = random_images(12, 3, 32, 32)
    dataset, base = torchvision.datasets.CIFAR10, "cifar-10-batches-py"
    names = [name for name, _ in dataset.train_list + dataset.test_list]
    content = {"batches.meta": {"label_names": ["plane", "car"]}}
    for i, name in enumerate(names):
        content[name] = {"data": pixels[2 * i : 2 * i + 2].flatten(1).numpy(), "labels": [0, 1]}
    with tarfile.open(tmp_path / dataset.filename, "w:gz") as archive:
        for name, value in content.items():
            path = tmp_path / name
            path.write_bytes(pickle.dumps(value))
            archive.add(path, f"{base}/{name}")
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


def encoded(colour=(9, 99, 199), size=(8, 8), form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()


def tiny_imagenet_files(size=(8, 8)):
    """Two classes, three training and two validation images in Tiny-ImageNet's layout, each of one
    grey; the first image has another size if that is asked for."""
    images = {"train/n01/images/n01_0.JPEG": 10, "train/n02/images/n02_0.JPEG": 20,
              "train/n02/images/n02_1.JPEG": 30, "val/images/val_0.JPEG": 40,
              "val/images/val_1.JPEG": 50}
    content = {name: encoded((grey,) * 3, form="JPEG") for name, grey in images.items()}
    content["train/n01/images/n01_0.JPEG"] = encoded((10,) * 3, size, "JPEG")
    content["wnids.txt"] = b"n02\nn01\n"
    content["words.txt"] = b"n01\tgoldfish, Carassius\nn02\tlion\nn03\tunused\n"
    content["val/val_annotations.txt"] = (b"val_0.JPEG\tn02\t0\t0\t1\t1\n"
                                          b"val_1.JPEG\tn01\t0\t0\t1\t1\n")
    return {f"tiny-imagenet-200/{name}": value for name, value in content.items()}


def write_zip(path, entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def test_tiny_imagenet_reads_the_same_from_zip_folder_and_its_parent(tmp_path):
    archive = write_zip(tmp_path / "tiny.zip", tiny_imagenet_files().items())
    for name, content in tiny_imagenet_files().items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for root in (archive, tmp_path / "data", tmp_path / "data/tiny-imagenet-200"):
        train = data.load_dataset("tiny-imagenet", root, "train")
        test = data.load_dataset("tiny-imagenet", root, "test")
        assert train.class_names == ["goldfish, Carassius", "lion"]  # sorted, unlike in wnids.txt
        assert train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [1, 0]
        assert train.images[:, 0, 0, 0].tolist() == [10, 20, 30]
        assert test.images[:, 0, 0, 0].tolist() == [40, 50]


def test_tiny_imagenet_damaged_or_of_mixed_sizes_is_refused(tmp_path):
    archive = write_zip(tmp_path / "t.zip", tiny_imagenet_files(size=(12, 9)).items())
    message = refused(data.load_dataset, "tiny-imagenet", archive, "train")
    assert "n01_0.JPEG has 12 x 9 pixels; expected 12 x 12" in message
    archive.write_bytes(archive.read_bytes()[:2000])
    message = refused(data.load_dataset, "tiny-imagenet", archive, "test")
    assert "no complete Tiny-ImageNet" in message
    write_zip(archive, [("else.txt", b"")])
    message = refused(data.load_dataset, "tiny-imagenet", archive, "test")
    assert "holds no wnids.txt" in message


@pytest.mark.parametrize("name, content, message", [
    ("../outside.txt", b"x", "'../outside.txt' leads out of it"),
    ("/outside.txt", b"x", "'/outside.txt' leads out of it"),
    ("tiny-imagenet-200/train/n01/images/../../../../x.JPEG", b"x", "leads out of it"),
    ("train/n01/images/bomb.JPEG", bytes(folders.MAX_ENTRY + 1), "unpacks to 33554433 bytes"),
    ("tiny-imagenet-200/train/n01/images/z.JPEG", b"no image", "z.JPEG is not a readable image"),
    ("tiny-imagenet-200/train/n09/images/z.JPEG", encoded(), "no complete Tiny-ImageNet"),
])
def test_open_archive_refuses_hostile_entries(tmp_path, name, content, message):
    write_zip(tmp_path / "t.zip", [*tiny_imagenet_files().items(), (name, content)])
    assert message in refused(data.load_dataset, "tiny-imagenet", tmp_path / "t.zip", "train")
    assert os.listdir(tmp_path) == ["t.zip"]


def test_open_archive_refuses_a_link(tmp_path):
    link = zipfile.ZipInfo("tiny-imagenet-200/train/n01/images/z.JPEG")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    write_zip(tmp_path / "t.zip", [*tiny_imagenet_files().items(), (link, "/etc/passwd")])
    message = refused(data.load_dataset, "tiny-imagenet", tmp_path / "t.zip", "train")
    assert "is a link" in message


def claiming(width, height):
    """A PNG of 8 x 8 pixels whose header says that it has width x height."""
    png = encoded()
    header = png[12:16] + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.mark.parametrize("content", [b"", b"no image", encoded()[:45], claiming(11000, 9000),
                                     claiming(20000, 10000)],
                         ids=["empty", "text", "cut", "huge", "bomb"])
@pytest.mark.parametrize("workers", [0, 2])
def test_open_image_names_what_is_none_or_huge_from_the_loaders_workers_too(
        tmp_path, content, workers):
    write_images(tmp_path / "train/n01", 4)
    path = tmp_path / "train/n01/3.png"
    path.write_bytes(content)
    split = data.load_dataset("imagenet", tmp_path, "train")
    message = refused(lambda: list(data.batches(split, 2, seed=0, workers=workers)))
    assert message.startswith(f"{path} is not a readable image (")


def test_imagenet_class_names(tmp_path):
    image_folder(tmp_path)
    split = data.load_dataset("imagenet", tmp_path, "train")
    assert split.class_names == ["tench, Tinca", "goldfish"]
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "words.txt").rename(tmp_path / "LOC_synset_mapping.txt")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca\n")
    split = data.load_dataset("imagenet", tmp_path, "test")
    assert split.class_names == ["tench, Tinca", "n02"]


def test_imagenet_folder_missing(tmp_path):
    message = refused(data.load_dataset, "imagenet", tmp_path, "train")
    assert "--data-dir" in message and str(tmp_path / "train") in message


# Listings of classes ------------------------------------------------------------------------------


def class_pictures(root, classes, n=2):
    """n pictures a class, the colour of which tells the class's first letter and the picture."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (8, 8), (ord(name[0]), i, 0)).save(root / name / f"{i}.png")


def shown(split):
    """What a split's pictures show: the first letters of its labels' classes, if all is right."""
    images = split.images
    if isinstance(images, data.Stream):
        images = data.in_memory(images, 8)
    return [(chr(value), data.ids_of(split)[label][0])
            for value, label in zip(images[:, 0, 0, 0].tolist(), split.labels.tolist())]


@pytest.mark.parametrize("dataset", ["imagenet", "folder"])
@pytest.mark.parametrize("test, line", [
    (["b", "c"], "val has no image of 1 of the 3 classes of train/: a"),
    (["B", "c_"], "val: 2 classes are spelled otherwise: B for b"),
    (["a", "b", "c"], ""),
])
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


@pytest.mark.parametrize("test, message", [
    (["a", "d"], "val: 'd' is no class; the 3 classes are like 'a'"),
    (["1", "2", "3"], "val: '1' is no class"),
    (["a", "A"], "val: two folders are of class 'a'"),
])
def test_image_folders_refuses_what_has_no_certain_class(test, message, tmp_path):
    class_pictures(tmp_path / "train", ["a", "b", "c"])
    class_pictures(tmp_path / "val", test)
    assert message in refused(data.load_dataset, "folder", tmp_path, "test")


def test_image_folders_of_numbers_are_places_among_the_sorted_ids(tmp_path, capsys):
    class_pictures(tmp_path / "train", ["n03", "n01", "n02"])
    class_pictures(tmp_path / "test", ["0", "1", "2"])
    split = data.load_dataset("folder", tmp_path, "test")
    assert split.labels.tolist() == [0, 0, 1, 1, 2, 2] and split.class_ids == ["n01", "n02", "n03"]
    assert "3 classes are numbers, taken for places in the sorted list: 0 for n01" in (
        capsys.readouterr().err)


def test_image_folders_says_which_of_val_and_test_it_takes(tmp_path, capsys):
    class_pictures(tmp_path / "train", ["a"])
    class_pictures(tmp_path / "test", ["a"], n=3)
    assert len(data.load_dataset("folder", tmp_path, "test").labels) == 3
    class_pictures(tmp_path / "val", ["a"])
    assert len(data.load_dataset("folder", tmp_path, "test").labels) == 2
    assert "val/ is the test split" in capsys.readouterr().err


def test_image_folders_without_train_has_vals_classes_and_says_so(tmp_path, capsys):
    class_pictures(tmp_path / "val", ["b", "a"])
    assert data.load_dataset("imagenet", tmp_path, "test").class_names == ["a", "b"]
    assert "has no train/: the classes are those of val/" in capsys.readouterr().err
    for root in (tmp_path / "absent", tmp_path / "val/a/0.png"):
        assert "is no folder; --data-dir" in refused(data.load_dataset, "folder", root, "train")


def test_image_folders_counts_what_it_leaves_out(tmp_path, capsys):
    class_pictures(tmp_path / "train", ["a", "b"])
    for name in ("a/._0.png", "b/note.txt", "loose.png", "__MACOSX/a/0.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"")
    (tmp_path / "train/c").mkdir()
    split = data.load_dataset("folder", tmp_path, "train")
    assert split.class_names == ["a", "b"] and len(split.labels) == 4
    assert "2 hidden, 1 in no class's folder, 1 .txt" in capsys.readouterr().err


@pytest.mark.parametrize("above", ["", "..", "../../.."])
@pytest.mark.parametrize("name", ["LOC_synset_mapping.txt", "words.txt"])
def test_class_words_are_found_where_kaggle_lays_them(above, name, tmp_path, capsys):
    root = tmp_path / "imagenet/ILSVRC/Data/CLS-LOC"
    class_pictures(root / "train", ["n01", "n02"])
    (root / above / name).write_bytes(b"\xef\xbb\xbfn01 tench, Tinca\nn02 goldfish\n")
    split = data.load_dataset("imagenet", root, "train")
    assert split.class_names == ["tench, Tinca", "goldfish"] and split.class_ids == ["n01", "n02"]
    assert ("names 2 of the 2 classes" in capsys.readouterr().err) == bool(above)


def test_class_words_says_where_they_are_few(tmp_path, capsys):
    class_pictures(tmp_path / "train", ["n01", "n02"])
    (tmp_path / "words.txt").write_text("n01\ttench\n")
    assert data.load_dataset("imagenet", tmp_path, "train").class_names == ["tench", "n02"]
    assert "words.txt names 1 of the 2 classes" in capsys.readouterr().err


def test_image_folders_of_imagenet_have_names_that_prompts_tell_apart(tmp_path, capsys):
    """torchvision's names, of which two are the same, with the byte tokenizer."""
    meta = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    ids = ["n01440764", *(f"n9{k:07d}" for k in range(1, 1000))]
    for k, id in ((134, "n02012849"), (517, "n03126707"), (264, "n02113186")):
        ids[k] = id  # their places among the thousand
    words = dict(zip(ids, meta))
    class_pictures(tmp_path / "train", ["n02012849", "n03126707", "n02113186", ids[474]])
    (tmp_path / "words.txt").write_text("".join(f"{id}\t{name}\n" for id, name in words.items()))
    split = data.load_dataset("imagenet", tmp_path, "train")
    names = clip_model.prompt_names(split.class_names, clip_model.Tokenizer())
    assert len({name.lower() for name in names}) == 4 and "cannot be told" not in (
        capsys.readouterr().err)


def test_rename_classes(tmp_path):
    split, path = coded_split(7), tmp_path / "names.txt"
    names = [f"name {k}" for k in range(7)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*names, "", ""]).encode())
    found = data.rename_classes(split, path)
    assert found.class_names == names and found.class_ids == list("0123456")
    path.write_text("".join(f"{k}\tname of {k}\n" for k in (6, 2, 4, 0, 1, 3, 5)))
    assert data.rename_classes(split, path).class_names == [f"name of {k}" for k in range(7)]
    path.write_text("\n".join("1023456"))
    assert refused(data.rename_classes, split, path) == (
        f"{path} has the classes' own names in another order; expected '0' first and '6' last")
    path.write_text("one\ntwo\n")
    assert refused(data.rename_classes, split, path) == (
        f"{path} has 2 names, one a line; expected one for each of the 7 classes, from '0' to '6'")


# Pictures in memory -------------------------------------------------------------------------------


def test_in_memory_decodes_once_and_again_for_other_pictures(tmp_path, monkeypatch, capsys):
    class_pictures(tmp_path / "train", ["a", "b"])
    images = data.load_dataset("folder", tmp_path, "train").images
    expected = torch.cat(list(data.blocks(data.resize(images, 6))))
    found = data.in_memory(images, 6)
    assert torch.equal(found, expected)
    assert "4 images of 6 x 6: 0.000432 MB in memory, kept in " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(data, "blocks", None)  # nothing is decoded
        assert torch.equal(data.in_memory(images, 6), expected)
    Image.new("RGB", (8, 8), (7, 7, 7)).save(tmp_path / "train/b/1.png")
    assert data.in_memory(images, 6)[3].eq(7).all() and torch.equal(found, expected)


def test_in_memory_streams_above_half_of_the_memory(tmp_path, monkeypatch, capsys):
    class_pictures(tmp_path / "train", ["a", "b"])
    images = data.load_dataset("folder", tmp_path, "train").images
    numbers = {"SC_PAGE_SIZE": 8, "SC_PHYS_PAGES": 107}  # two bytes short of twice 4 * 3 * 6 * 6
    monkeypatch.setattr(os, "sysconf", numbers.get)
    assert isinstance(data.in_memory(images, 6), data.Stream)
    assert "more than half of the memory: they stream" in capsys.readouterr().err
    numbers["SC_PHYS_PAGES"] = 108
    assert isinstance(data.in_memory(images, 6), torch.Tensor)


# CIFAR as pictures --------------------------------------------------------------------------------

CIFAR10 = data.CIFAR_CLASSES["cifar10"]


def cifar_files(above=""):
    """Two pictures a class, the colour of which tells the class."""
    return {f"cifar10/{split}/{above}{name}/{i}.png": encoded((20 * k, i, 9), (32, 32))
            for split in ("train", "test") for k, name in enumerate(CIFAR10) for i in (1, 0)}


def unpack(root, content):
    for name, value in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(value)


@pytest.mark.parametrize("layout", ["zip", "in a folder", "unpacked", "its parent", "superclass",
                                    "mac", "backslashes", "spaces"])
def test_cifar_pictures_of_every_layout(layout, tmp_path, capsys):
    content, root = cifar_files("super/" if layout == "superclass" else ""), tmp_path
    if layout == "mac":
        content |= {f"__MACOSX/{name}": b"" for name in content} | {"cifar10/train/.DS_Store": b""}
    if layout == "backslashes":
        content = {name.replace("/", "\\"): value for name, value in content.items()}
    if layout == "spaces":
        content = {name.replace("truck", "Truck"): value for name, value in content.items()}
    if layout in ("zip", "mac", "backslashes"):
        root = write_zip(tmp_path / "pictures.zip", content.items())
    elif layout == "in a folder":
        write_zip(tmp_path / "CIFAR-10.zip", content.items())
    else:
        unpack(tmp_path, content)
        root = tmp_path / "cifar10" if layout == "unpacked" else tmp_path
    for name in ("train", "test"):
        split = data.load_dataset("cifar10", root, name)
        assert split.images.shape == (20, 3, 32, 32) and split.class_names == CIFAR10
        assert torch.equal(split.images[:, 0, 5, 5] // 20, split.labels.to(torch.uint8))
        assert split.images[:, 1, 5, 5].tolist() == [0, 1] * 10  # sorted by name
    said = capsys.readouterr().err
    assert "(train) holds 20 images; cifar10 has 50000" in said
    assert ("1 hidden" in said) == (layout == "mac")


def test_cifar_pictures_with_a_class_that_is_called_train(tmp_path):
    known = data.CIFAR_CLASSES["cifar100"]
    for split in ("train", "test"):
        class_pictures(tmp_path / split, known, n=0)
        for k, name in enumerate(known):
            path = tmp_path / split / name / "x.png"
            Image.new("RGB", (32, 32), (k, split == "test", 0)).save(path)
    for split in ("train", "test"):
        found = data.load_dataset("cifar100", tmp_path, split)
        assert found.images[:, 0, 0, 0].tolist() == found.labels.tolist() == list(range(100))
        assert found.images[:, 1].eq(split == "test").all()


@pytest.mark.parametrize("change, message", [
    (lambda content: {n: v for n, v in content.items() if "/frog/" not in n},
     "(train) holds 9 of cifar10's 10 classes, no 'frog'"),
    (lambda content: content | {"cifar10/train/whale/0.png": encoded(size=(32, 32))},
     "(train): 'whale' is no class; the 10 classes are like 'airplane'"),
    (lambda content: content | {"cifar10/train/frog/9.png": encoded(size=(33, 32))},
     "frog/9.png has 33 x 32 pixels; expected 32 x 32"),
    (lambda content: content | {"cifar10/train/frog/9.png": b"no image"},
     "frog/9.png is not a readable image"),
    (lambda content: {"cifar10/x.txt": b""}, "(train) holds no pictures"),
    (lambda content: content | {"../x.png": b""}, "leads out of it"),
])
def test_cifar_pictures_refuses(change, message, tmp_path):
    archive = write_zip(tmp_path / "x.zip", change(cifar_files()).items())
    assert message in refused(data.load_dataset, "cifar10", archive, "train")


def test_load_dataset_never_makes_a_folder_of_a_path_that_is_not_there(tmp_path):
    for name in ("tiny-imagenet", "cifar100", "imagenet", "folder"):
        message = refused(data.load_dataset, name, tmp_path / "absent.zip", "train")
        assert f"{tmp_path}/absent.zip does not exist" in message
    assert not os.listdir(tmp_path)


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


# Tiny-ImageNet as people have it ------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["by class", "by class, without annotations", "in images/",
                                    "from a Mac"])
def test_tiny_imagenet_with_its_validation_images_laid_otherwise(layout, tmp_path, capsys):
    content, top = tiny_imagenet_files(), "tiny-imagenet-200/"
    wnids = {"val_0.JPEG": "n02", "val_1.JPEG": "n01"}
    if "class" in layout:
        for file, wnid in wnids.items():
            content[f"{top}val/{wnid}/{file}"] = content.pop(f"{top}val/images/{file}")
    elif layout == "in images/":
        for file, wnid in wnids.items():
            content[f"{top}val/{wnid}/images/{file}"] = content.pop(f"{top}val/images/{file}")
    if "without" in layout:
        del content[f"{top}val/val_annotations.txt"]
    if layout == "from a Mac":
        content |= {f"__MACOSX/{name}": b"" for name in content} | {f"{top}val/.DS_Store": b""}
        for name in ("wnids.txt", "words.txt", "val/val_annotations.txt"):
            lines = content[top + name].replace(b"\n", b"\r\n")
            content[top + name] = b"\xef\xbb\xbf" + lines + b"\r\n\r\n"
    content[f"{top}train/n01/n01_boxes.txt"] = b"n01_0.JPEG\t0\t0\t1\t1\n"
    archive = write_zip(tmp_path / "t.zip", content.items())
    test, train = (data.load_dataset("tiny-imagenet", archive, name) for name in ("test", "train"))
    assert train.images[:, 0, 0, 0].tolist() == [10, 20, 30]
    by_label = dict(zip(test.labels.tolist(), test.images[:, 0, 0, 0].tolist()))
    assert by_label == {1: 40, 0: 50} and test.class_ids == ["n01", "n02"]
    assert test.class_names == ["goldfish, Carassius", "lion"]
    assert ("left out" in capsys.readouterr().err) == (layout == "from a Mac")


def test_tiny_imagenet_compares_folders_and_annotations(tmp_path, capsys):
    content, top = tiny_imagenet_files(), "tiny-imagenet-200/val/"
    for file, wnid in {"val_0.JPEG": "n01", "val_1.JPEG": "n01"}.items():
        content[f"{top}{wnid}/{file}"] = content.pop(f"{top}images/{file}")
    archive = write_zip(tmp_path / "t.zip", content.items())
    message = refused(data.load_dataset, "tiny-imagenet", archive, "test")
    assert "val/n01/val_0.JPEG is of class n02 in val_annotations.txt" in message
    content[f"{top}val_annotations.txt"] += b"val_0.JPEG\tn01\t0\t0\t1\t1\n\nno tab\n"
    archive = write_zip(tmp_path / "twice.zip", content.items())
    message = refused(data.load_dataset, "tiny-imagenet", archive, "test")
    assert "val_annotations.txt has two classes for one image" in message
    content[f"{top}val_annotations.txt"] = b"val_0.JPEG\tn01\t0\t0\t1\t1\n"
    archive = write_zip(tmp_path / "one.zip", content.items())
    assert data.load_dataset("tiny-imagenet", archive, "test").labels.tolist() == [0]
    assert "1 images in tiny-imagenet-200/val/ are not in" in capsys.readouterr().err
    del content[f"{top}n01/val_0.JPEG"]
    archive = write_zip(tmp_path / "u.zip", content.items())
    message = refused(data.load_dataset, "tiny-imagenet", archive, "test")
    assert "it holds no tiny-imagenet-200/val/images/val_0.JPEG" in message
