"""data.py: augmentation and batches against their definitions, reading Tiny-ImageNet's layout, the cache of targets."""

import io
import json
import urllib.error
import zipfile

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

import data


def coded_images(n, side=8):
    """Images that say which image and which pixel each value is from: channel 0 the image, 1 the row, 2 the column."""
    rows = torch.arange(1, side + 1).view(1, side, 1).expand(n, side, side)
    columns = torch.arange(1, side + 1).view(1, 1, side).expand(n, side, side)
    return torch.stack([torch.arange(n).view(n, 1, 1).expand(n, side, side), rows, columns], 1).to(torch.uint8)


def coded_split(n):
    return data.Split(coded_images(n), torch.arange(n) % 7, [str(k) for k in range(7)])


# ---- augmentation and batches


def test_augment_is_padded_crop_and_flip_with_every_offset_equally_likely():
    n, side, padding = 16200, 8, 4
    images = coded_images(1, side).expand(n, -1, -1, -1)
    before = images.clone()
    out = data.augment(images, torch.Generator().manual_seed(0), padding)
    assert out.shape == images.shape and out.dtype == torch.uint8 and torch.equal(images, before)
    counts = {}
    padded = torch.nn.functional.pad(images[0], [padding] * 4)
    expected = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top:top + side, left:left + side]
            for flip, view in ((False, crop), (True, crop.flip(2))):
                expected[view.contiguous().numpy().tobytes()] = (top, left, flip)
    for image in out.contiguous():
        key = expected[image.numpy().tobytes()]  # KeyError: not a crop of this image
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 162
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert 105 < chi_square < 230  # 161 degrees of freedom: mean 161, standard deviation 18


def test_augmix_is_torchvisions_on_four_images_and_a_function_of_the_seed():
    images = torch.randint(256, (10, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, state = images.clone(), torch.get_rng_state()
    out = data.augmix(images, 5)
    assert out.shape == images.shape and out.dtype == torch.uint8 and torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    transform = v2.AugMix(all_ops=False)
    assert torch.equal(out, torch.cat([transform(images[:4]), transform(images[4:8]), transform(images[8:])]))
    assert not torch.equal(out, data.augmix(images, 6)) and not torch.equal(out, images)


def test_batches_are_mixed_alike_for_every_rank_and_when_gone_on_with():
    split = data.Split(torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8), torch.arange(24), [])
    plain, mixed = (list(data.batches(split, 8, seed=3, mix=mix)) for mix in (False, True))
    for (images, _, index), (changed, _, other) in zip(plain, mixed):
        assert torch.equal(index, other) and not torch.equal(images, changed)
    for rank in range(2):
        share = list(data.batches(split, 8, seed=3, start=8, rank=rank, world=2, mix=True))
        for (images, *_), (part, *_) in zip(mixed[1:], share):
            assert torch.equal(images[rank::2], part)
    for (images, *_), (same, *_) in zip(data.batches(split, 8), data.batches(split, 8, mix=True)):
        assert torch.equal(images, same)  # without a seed nothing is changed


def test_batches_keep_image_label_and_index_together():
    split = coded_split(50)
    seen = []
    for images, labels, index in data.batches(split, 8, seed=3):
        assert torch.equal(images[:, 0].flatten(1).amax(1).long(), index) and torch.equal(labels, index % 7)
        seen += index.tolist()
    assert sorted(seen) == list(range(50)) and seen != list(range(50))
    again = [index for _, _, index in data.batches(split, 8, seed=3)]
    other = [index for _, _, index in data.batches(split, 8, seed=4)]
    assert torch.cat(again).tolist() == seen and torch.cat(other).tolist() != seen
    plain = list(data.batches(split, 8, start=13))
    assert torch.equal(torch.cat([images for images, _, _ in plain]), split.images[13:])
    assert torch.equal(torch.cat([index for _, _, index in plain]), torch.arange(13, 50))


def test_an_epoch_is_gone_on_with_at_any_step():
    split = coded_split(50)
    table = torch.arange(50.0).view(50, 1)
    whole = list(data.batches(split, 8, seed=3, tables=(table,)))
    for step in (0, 1, 5, 6):
        rest = list(data.batches(split, 8, seed=3, start=8 * step, tables=(table,)))
        assert len(rest) == 7 - step
        for mine, all_of_it in zip(rest, whole[step:]):
            assert all(torch.equal(a, b) for a, b in zip(mine, all_of_it))
            assert torch.equal(mine[3][:, 0], mine[2].float())  # the table's rows are the images'
    assert list(data.batches(split, 8, seed=3, start=50)) == []
    crops = [images[:, 1, :, 0].flatten().tolist() for images, *_ in whole[:2]]
    assert crops[0] != crops[1]  # the draws are a step's own


def test_ranks_share_the_batches_of_one_process():
    split = coded_split(21)
    whole = list(data.batches(split, 6, seed=5))
    parts = [list(data.batches(split, 6, seed=5, rank=rank, world=2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        for mine, all_of_it in zip(zip(*(part[step] for part in parts)), batch):
            all_of_it = all_of_it[:len(all_of_it) // 2 * 2]  # equal shares, also of the last batch of 3
            assert torch.equal(mine[0], all_of_it[0::2]) and torch.equal(mine[1], all_of_it[1::2])
    tested = [torch.cat([index for _, _, index in data.batches(split, 6, rank=rank, world=2)]) for rank in range(2)]
    assert sorted(torch.cat(tested).tolist()) == list(range(21))  # in evaluation every image, once


def test_normalize_is_torchvisions():
    images = torch.randint(256, (4, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(images)
    torch.testing.assert_close(data.normalize(images, mean, std), expected)


def test_resize_brings_every_kind_of_image_to_size():
    generator = torch.Generator().manual_seed(0)
    tall = torch.randint(256, (3, 50, 40), dtype=torch.uint8, generator=generator)
    square = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=generator)
    out = data.resize([tall, square], 32)
    reference = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32)])
    for got, image in zip(out, (tall, square)):
        assert torch.equal(got, reference(image))
    assert data.resize(out, 32) is out


# ---- data sets


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown data set 'mnist'; known: shapes, cifar10"):
        data.load_dataset("mnist", ".", "train")
    with pytest.raises(ValueError, match="cifar10 has no split 'shift'; it has: train, test"):
        data.load_dataset("cifar10", ".", "shift")


@pytest.mark.parametrize("name, file", [("cifar100", "cifar-100-python.tar.gz"), ("tiny-imagenet", "tiny-imagenet-200.zip")])
def test_without_a_network_one_line_names_file_address_place_and_flag(name, file, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset(name, tmp_path, "train")
    message = str(error.value)
    assert "\n" not in message and "missing" in message
    assert all(part in message for part in (file, "http", str(tmp_path), "--data-dir"))
    (tmp_path / file).write_bytes(b"half a file")
    with pytest.raises(FileNotFoundError, match="damaged"):
        data.load_dataset(name, tmp_path, "train")


def tiny_imagenet(root, sizes=((8, 8),)):
    """Two classes, three training and two validation images in Tiny-ImageNet's layout, each of one colour."""
    files = {"wnids.txt": b"n02\nn01\n", "words.txt": b"n01\tgoldfish, Carassius\nn02\tlion\nn03\tunused\n",
             "val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t1\t1\nval_1.JPEG\tn01\t0\t0\t1\t1\n"}
    images = {"train/n01/images/n01_0.JPEG": 10, "train/n02/images/n02_0.JPEG": 20, "train/n02/images/n02_1.JPEG": 30,
              "val/images/val_0.JPEG": 40, "val/images/val_1.JPEG": 50}
    for i, (name, grey) in enumerate(images.items()):
        buffer = io.BytesIO()
        Image.new("RGB", sizes[i % len(sizes)], (grey,) * 3).save(buffer, "JPEG")
        files[name] = buffer.getvalue()
    for name, content in files.items():
        path = root / "tiny-imagenet-200" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    archive = root / "tiny.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(f"tiny-imagenet-200/{name}", content)
    return archive


def test_tiny_imagenet_reads_the_same_from_zip_folder_and_its_parent(tmp_path):
    archive = tiny_imagenet(tmp_path)
    for root in (archive, tmp_path, tmp_path / "tiny-imagenet-200"):
        train, test = (data.load_dataset("tiny-imagenet", root, split) for split in ("train", "test"))
        assert train.class_names == ["goldfish, Carassius", "lion"]  # by WordNet id, not as wnids.txt lists them
        assert train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [1, 0]
        assert train.images[:, 0, 0, 0].tolist() == [10, 20, 30] and test.images[:, 0, 0, 0].tolist() == [40, 50]


def test_tiny_imagenet_of_mixed_sizes(tmp_path):
    split = data.load_dataset("tiny-imagenet", tiny_imagenet(tmp_path, ((8, 8), (12, 9))), "train")
    assert [tuple(image.shape) for image in split.images] == [(3, 8, 8), (3, 9, 12), (3, 8, 8)]
    assert data.resize(split.images, 8)[:, 0, 4, 4].tolist() == [10, 20, 30]
    assert [tuple(block.shape) for block in data.blocks(split.images, 8, start=1)] == [(1, 3, 9, 12), (1, 3, 8, 8)]


def test_damaged_tiny_imagenet_is_one_line(tmp_path):
    archive = tiny_imagenet(tmp_path)
    whole = archive.read_bytes()
    archive.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="is no complete Tiny-ImageNet"):
        data.load_dataset("tiny-imagenet", archive, "train")
    (tmp_path / "tiny-imagenet-200/train/n01/images/n01_0.JPEG").write_bytes(b"no image")
    with pytest.raises(ValueError, match="n01_0.JPEG is not a readable image"):
        data.load_dataset("tiny-imagenet", tmp_path, "train")


def image_folder(root):
    for split in ("train", "val"):
        for k, name in enumerate(("n01", "n02")):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                image = torch.randint(256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(9 * k + i))
                Image.fromarray(image.numpy()).save(root / split / name / f"{i}.png")
    (root / "words.txt").write_text("n01\ttench, Tinca\nn02\tgoldfish\n")
    return root


def test_imagenet_streams_the_same_with_any_number_of_workers(tmp_path):
    split = data.load_dataset("imagenet", image_folder(tmp_path), "train")
    assert split.class_names == ["tench, Tinca", "goldfish"] and split.labels.tolist() == [0, 0, 0, 1, 1, 1]
    split = split._replace(images=data.resize(split.images, 16))
    runs = [list(data.batches(split, 4, seed=1, workers=workers)) for workers in (0, 2)]
    for one, two in zip(*runs):
        assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert runs[0][0][0].shape == (4, 3, 16, 16) and runs[0][0][0].dtype == torch.uint8
    other = next(iter(data.batches(split, 4, seed=2)))
    assert not torch.equal(other[0], runs[0][0][0])
    mixed = [list(data.batches(split, 4, seed=1, workers=workers, mix=True)) for workers in (0, 2)]
    assert all(torch.equal(one[0], two[0]) for one, two in zip(*mixed))
    assert mixed[0][0][0].shape == (4, 3, 16, 16) and not torch.equal(mixed[0][0][0], runs[0][0][0])
    rest = list(data.batches(split, 4, seed=1, start=4, workers=2))
    assert len(rest) == 1 and all(torch.equal(a, b) for a, b in zip(rest[0], runs[0][1]))
    plain = torch.cat([images for images, _, _ in data.batches(split, 4)])
    with Image.open(split.images.paths[4]) as file:
        expected = v2.Compose([v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor()])(file)
    assert torch.equal(plain[4], expected)


def test_imagenet_folder_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        data.load_dataset("imagenet", tmp_path, "train")


# ---- files


def test_write_atomically_keeps_the_old_content_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "file"
    data.write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        data.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_progress_counts_only_what_is_done_now(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(data.time, "time", lambda: now[0])
    progress = data.Progress("work", 1000, start=500)
    now[0] += 10
    progress.update(600)  # not a terminal, nothing to keep: silent
    assert capsys.readouterr().err == ""
    progress.update(600, "loss 1", keep=True)
    assert capsys.readouterr().err == "work 600/1000 | loss 1 | 10 images/s | 0:40 left\n"
    now[0] += 3690
    progress.update(1000, keep=True)
    assert capsys.readouterr().err == "work 1000/1000 | 0 images/s | 1:01:40\n"


# ---- the cache of CLIP's targets

KEY = {"checkpoint": "abc", "templates": ["a {}"], "class_names": ["ä", "b"], "split": "train"}


def rows(start, N=10, K=2, D=3, stop_after=None, asked=None):
    """Blocks of two images whose values tell the image; `asked` collects where reading began."""
    if asked is not None:
        asked.append(start)
    for first in range(start, N, 2):
        if stop_after is not None and first >= stop_after:
            raise KeyboardInterrupt
        n = torch.arange(first, min(first + 2, N)).float()
        yield n[:, None] + torch.tensor([0.0, 0.25]), -n[:, None] + torch.tensor([0.0, 0.25, 0.5])


def test_targets_are_computed_once_and_read_back(tmp_path):
    asked = []
    for _ in range(2):
        cosines, features = data.cached_targets(tmp_path / "t.bin", KEY, (10, 2, 3), lambda start: rows(start, asked=asked))
        assert cosines.dtype == features.dtype == torch.float16
        assert torch.equal(cosines[:, 1].float(), torch.arange(10) + 0.25)
        assert torch.equal(features[:, 2].float(), 0.5 - torch.arange(10))
    assert asked == [0] and [p.name for p in tmp_path.iterdir()] == ["t.bin"]


@pytest.mark.parametrize("cut", [0, 3])
def test_interrupted_targets_go_on_where_they_stopped(tmp_path, cut):
    path, asked = tmp_path / "t.bin", []
    with pytest.raises(KeyboardInterrupt):
        data.cached_targets(path, KEY, (10, 2, 3), lambda start: rows(start, stop_after=6))
    assert not path.exists()
    partial = tmp_path / "t.bin.part"
    partial.write_bytes(partial.read_bytes()[:len(partial.read_bytes()) - cut])  # a row cut in half is made again
    cosines, _ = data.cached_targets(path, KEY, (10, 2, 3), lambda start: rows(start, asked=asked))
    assert asked == [6 if cut == 0 else 5] and torch.equal(cosines[:, 0].float(), torch.arange(10.0))


def test_targets_of_another_key_or_damaged_are_refused(tmp_path):
    path = tmp_path / "t.bin"
    data.cached_targets(path, KEY, (10, 2, 3), rows)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="made with another class_names, templates;"):
        data.cached_targets(path, {**KEY, "templates": ["b {}"], "class_names": ["c"]}, (10, 2, 3), rows)
    with pytest.raises(ValueError, match="made with another shape;"):
        data.cached_targets(path, KEY, (12, 2, 3), rows)
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="is damaged"):
        data.cached_targets(path, KEY, (10, 2, 3), rows)
    for nonsense in (b"", b"garbage\n", b"[]\n", json.dumps({"key": 3, "shape": 4}).encode() + b"\n"):
        path.write_bytes(nonsense)
        with pytest.raises(ValueError, match="is no cache of CLIP targets"):
            data.cached_targets(path, KEY, (10, 2, 3), rows)


@pytest.mark.parametrize("kind", ["tensor", "list", "stream"])
def test_subsets_share_no_image_and_keep_the_classes_balance(kind):
    labels = torch.tensor([0] * 10 + [1] * 40 + [2] * 20)[torch.randperm(70, generator=torch.Generator().manual_seed(1))]
    images = torch.arange(70, dtype=torch.uint8)[:, None, None, None].expand(70, 3, 2, 2)
    if kind == "list":
        images = list(images)
    elif kind == "stream":
        images = data.Stream([str(i) for i in range(70)], 2)

    def numbers(split):
        each = split.images.paths if kind == "stream" else [image[0, 0, 0] for image in split.images]
        return [int(i) for i in each]
    split = data.Split(images, labels, ["a", "b", "c"])
    few, kept, held = (data.subset(split, *part) for part in ((0, 0.9 * 0.5), (0, 0.9), (0.9, 1)))
    assert held.labels.bincount().tolist() == [1, 4, 2] and kept.labels.bincount().tolist() == [9, 36, 18]
    assert sorted(numbers(kept) + numbers(held)) == list(range(70)) and set(numbers(few)) < set(numbers(kept))
    assert all(labels[i] == label for part in (few, held) for i, label in zip(numbers(part), part.labels))
    with pytest.raises(ValueError, match="no image"):
        data.subset(split, 0.5, 0.5)
