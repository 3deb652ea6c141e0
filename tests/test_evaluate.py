"""evaluate.py's metrics, readers and reports against hand-computed values."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import clip_model
import data
import evaluate
import models
import train

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------- metrics


def probabilities_as_logits(rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_top_k_accuracy():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    target = torch.tensor([0, 2, 0, 1])
    assert [evaluate.top_k_accuracy(logits, target, k) for k in (1, 2, 3, 5)] == [0.25, 0.5, 1.0, 1.0]


def test_nll_and_brier_by_hand():
    logits, target = probabilities_as_logits([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), torch.tensor([2, 1])
    assert evaluate.nll(logits, target) == pytest.approx(-(math.log(0.2) + math.log(0.8)) / 2)
    assert evaluate.brier(logits, target) == pytest.approx(((0.25 + 0.09 + 0.64) + (0.01 + 0.04 + 0.01)) / 2)
    certain = torch.tensor([[0.0, 1e4], [0.0, 1e4]])
    assert evaluate.brier(certain, torch.tensor([1, 0])) == 1.0  # 0 and 2
    assert evaluate.nll(logits.bfloat16(), target) == pytest.approx(evaluate.nll(logits, target), rel=0.02)


def test_ece_by_hand():
    rows = [[0.95, 0.05], [0.92, 0.08], [0.65, 0.35], [0.62, 0.38], [0.45, 0.55]]
    logits, target = probabilities_as_logits(rows), torch.tensor([0, 1, 0, 0, 1])
    # width 0.1: {.95, .92} half right, {.65, .62} all right, {.55} right
    assert evaluate.ece(logits, target, bins=10) == pytest.approx((2 * (0.935 - 0.5) + 2 * (1 - 0.635) + 0.45) / 5)
    # mass 2, 2, 1: {.55, .62} {.65, .92} {.95}
    expected = (2 * (1 - 0.585) + 2 * (0.785 - 0.5) + (1 - 0.95)) / 5
    assert evaluate.ece(logits, target, bins=3, equal_mass=True) == pytest.approx(expected)
    confidence, accuracy, count = evaluate.calibration_bins(logits, target, bins=10)
    assert count.tolist() == [0, 0, 0, 0, 0, 1, 2, 0, 0, 2]
    assert confidence[9].item() == pytest.approx(0.935) and accuracy[9] == 0.5 and confidence[0] == accuracy[0] == 0


def test_ece_puts_an_edge_into_the_lower_bin_and_has_fifteen():
    _, _, count = evaluate.calibration_bins(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), bins=2)
    assert count.tolist() == [3, 0]  # confidence exactly 0.5
    assert len(evaluate.calibration_bins(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))[2]) == 15
    logits, target = torch.randn(100, 5, generator=seeded()), torch.zeros(100, dtype=torch.long)
    _, _, count = evaluate.calibration_bins(logits, target, equal_mass=True)
    assert count.tolist() == [7] * 10 + [6] * 5


@pytest.mark.parametrize("temperature", (0.02, 0.5, 3.0, 40.0))
def test_temperature_recovers_the_one_that_was_applied(temperature):
    # ten equal rows whose targets come in proportion to the probabilities: the best temperature undoes the scaling
    logits = probabilities_as_logits([[0.5, 0.3, 0.2]] * 10) * temperature
    target = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    assert evaluate.fit_temperature(logits, target) == pytest.approx(temperature, rel=1e-6)


def test_temperature_has_the_least_nll():
    logits, target = 4 * torch.randn(500, 10, generator=seeded(1)), torch.randint(10, (500,), generator=seeded(2))
    target[:300] = logits[:300].argmax(dim=1)
    best = evaluate.fit_temperature(logits, target)
    for factor in (0.98, 1.02):
        assert evaluate.nll(logits / best, target) < evaluate.nll(logits / (best * factor), target)


def test_quadrants():
    logits = probabilities_as_logits([[0.95, 0.05], [0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])
    target = torch.tensor([0, 1, 1, 1, 1])
    assert evaluate.quadrants(logits, target, 0.75) == {
        "confident_right": 2, "confident_wrong": 1, "unsure_right": 1, "unsure_wrong": 1}
    assert sum(evaluate.quadrants(logits, target, 0.5).values()) == 5
    assert evaluate.quadrants(torch.zeros(1, 2), torch.tensor([0]), 0.5)["confident_right"] == 1  # the threshold counts


def test_bootstrap_interval():
    values = (torch.arange(400) % 4 == 0).double()  # mean 0.25, standard error sqrt(.25 * .75 / 400) = 0.02165
    low, high = evaluate.bootstrap_interval(torch.mean, [values], seeded(), resamples=2000)
    assert (low, high) == pytest.approx((0.25 - 1.96 * 0.02165, 0.25 + 1.96 * 0.02165), abs=0.004)
    assert evaluate.bootstrap_interval(torch.mean, [values], seeded(), resamples=2000) == (low, high)
    narrow = evaluate.bootstrap_interval(torch.mean, [values], seeded(), resamples=2000, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    together = evaluate.bootstrap_interval(lambda a, b: (a - b).abs().max(), [values, values], seeded(), resamples=20)
    assert together == (0.0, 0.0)


def test_alexnet_errors_belong_to_their_names():
    assert list(evaluate.ALEXNET_ERRORS) == list(evaluate.COMMON)
    assert list(evaluate.ALEXNET_ERRORS.values()) == [
        0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324, 0.564592,
        0.853204, 0.646056, 0.717840, 0.606500]
    assert list(evaluate.COMMON) == [
        "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
        "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"]
    assert list(evaluate.EXTRA) == ["speckle_noise", "gaussian_blur", "spatter", "saturate"]


def test_mean_corruption_error():
    flat = dict.fromkeys(evaluate.COMMON, 0.4)
    assert evaluate.mean_corruption_error(flat) == pytest.approx(0.4)
    assert evaluate.mean_corruption_error({**flat, "fog": 0.7, "spatter": 1.0}) == pytest.approx(0.42)
    assert evaluate.mean_corruption_error(flat, clean_error=0.1) == pytest.approx(0.3)
    assert evaluate.mean_corruption_error(evaluate.ALEXNET_ERRORS, alexnet=True) == pytest.approx(1)
    half = {name: error / 2 for name, error in evaluate.ALEXNET_ERRORS.items()}
    assert evaluate.mean_corruption_error(half, alexnet=True) == pytest.approx(0.5)
    relative = {name: 0.2 + 2 * (error - 0.43478) for name, error in evaluate.ALEXNET_ERRORS.items()}
    assert evaluate.mean_corruption_error(relative, clean_error=0.2, alexnet=True) == pytest.approx(2)
    only_fog = {**dict.fromkeys(evaluate.COMMON, 0.0), "fog": 0.819324}
    assert evaluate.mean_corruption_error(only_fog, alexnet=True) == pytest.approx(1 / 15)
    with pytest.raises(ValueError, match="missing are snow, fog$"):
        evaluate.mean_corruption_error({name: 0.1 for name in evaluate.COMMON if name not in ("snow", "fog")})


# -------------------------------------------------------------------------------------------------- published files


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
    images, labels = evaluate.read_cifar_c(cifar_c, "fog", 4)
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8 and images.is_contiguous()
    assert images[:, 0, 0, 0].tolist() == [40, 41, 42, 43] and (images[:, 2, 5, 9] == 99).all()
    assert labels.tolist() == [3, 1, 4, 1] and labels.dtype == torch.int64


def test_read_cifar_c_refuses(cifar_c):
    with pytest.raises(ValueError, match="severity 0"):
        evaluate.read_cifar_c(cifar_c, "fog", 0)
    with pytest.raises(FileNotFoundError, match="snow.npy is missing"):
        evaluate.read_cifar_c(cifar_c, "snow", 1)
    for shape in ((20, 3, 32, 32), (21, 32, 32, 3), (0, 32, 32, 3), (20, 32, 32)):
        np.save(cifar_c / "snow.npy", np.zeros(shape, dtype=np.uint8))
        with pytest.raises(ValueError, match=r"snow.npy is uint8 .*; expected uint8 \(50000, 32, 32, 3\)"):
            evaluate.read_cifar_c(cifar_c, "snow", 1)
    np.save(cifar_c / "snow.npy", np.zeros((20, 32, 32, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="float32"):
        evaluate.read_cifar_c(cifar_c, "snow", 1)
    (cifar_c / "snow.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="snow.npy is no NumPy array file"):
        evaluate.read_cifar_c(cifar_c, "snow", 1)
    (cifar_c / "snow.npy").write_bytes((cifar_c / "fog.npy").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut short"):
        evaluate.read_cifar_c(cifar_c, "snow", 1)
    for labels in (np.arange(20), np.zeros(19, dtype=np.int64)):  # not five times the same; another number
        np.save(cifar_c / "labels.npy", labels)
        with pytest.raises(ValueError, match="labels.npy"):
            evaluate.read_cifar_c(cifar_c, "fog", 1)


def write_images(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        torchvision.io.write_png(torch.zeros(3, 4, 4, dtype=torch.uint8), str(folder / f"{i}.png"))


def test_imagenet_c_folder(tmp_path):
    write_images(tmp_path / "fog" / "2" / "n01", 1)
    write_images(tmp_path / "blur" / "defocus_blur" / "1" / "n01", 1)
    assert evaluate.imagenet_c_folder(tmp_path, "fog", 2) == tmp_path / "fog" / "2"
    assert evaluate.imagenet_c_folder(tmp_path, "defocus_blur", 1) == tmp_path / "blur" / "defocus_blur" / "1"
    for name, severity in (("fog", 1), ("snow", 2)):
        with pytest.raises(FileNotFoundError, match=f"no {name}/{severity}"):
            evaluate.imagenet_c_folder(tmp_path, name, severity)


def test_list_folder_masks_logits(tmp_path):
    for folder, count in (("n30", 2), ("n10", 1), ("n15", 3)):
        write_images(tmp_path / folder, count)
    (tmp_path / "n10" / "notes.txt").write_text("no image")
    paths, labels, columns = evaluate.list_folder(tmp_path, ["n05", "n15", "n20", "n10", "n30"])
    assert [path.parent.name for path in paths] == ["n10"] + ["n15"] * 3 + ["n30"] * 2
    assert columns.tolist() == [1, 3, 4] and labels.tolist() == [1, 0, 0, 0, 2, 2]
    logits = torch.tensor([[9.0, 1.0, 8.0, 2.0, 0.0]])  # a class outside the set wins without the mask
    assert evaluate.top_k_accuracy(logits[:, columns], labels[:1]) == 1 and logits.argmax() not in columns
    assert evaluate.nll(logits[:, columns], labels[:1]) == pytest.approx(
        math.log(math.exp(1) + math.exp(2) + math.exp(0)) - 2)  # probabilities among the three


def test_list_folder_maps_and_refuses(tmp_path):
    write_images(tmp_path / "set" / "1", 1)
    write_images(tmp_path / "set" / "2", 1)
    _, labels, columns = evaluate.list_folder(tmp_path / "set", ["cat", "dog", "bird"], {"1": "bird", "2": "cat"})
    assert columns.tolist() == [0, 2] and labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="'1' is not a class of the model; its classes are like 'cat'"):
        evaluate.list_folder(tmp_path / "set", ["cat", "dog"])
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no images"):
        evaluate.list_folder(tmp_path / "empty", ["cat"])
    with pytest.raises(FileNotFoundError, match="is no folder"):
        evaluate.list_folder(tmp_path / "absent", ["cat"])


# ---- runs and their reports


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a few rendered images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_SIZES", {"train": 100, "test": 60, "shift": 50})
        folder = tmp_path_factory.mktemp("runs") / "run"
        train.run(train.Config(method="scratch", student="resnet8", epochs=1, out=str(folder), device="cpu"))
        yield folder


def config(*runs, **changes):
    return evaluate.Config(run=tuple(map(str, runs)), device="cpu", **changes)


def test_report_of_a_run_is_that_of_its_weights(run):
    report, = evaluate.evaluate(config(run, shift=[], corruptions="generated"))
    assert report == json.loads((run / "report.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert report["test"]["top1"] == pytest.approx(summary["student_accuracy"])
    assert report["shift"]["top1"] == pytest.approx(summary["shift_accuracy"])
    model = models.load_weights("resnet8", run / "student.pt")
    test, info = data.load_dataset("shapes", "", "test"), data.DATASETS["shapes"]
    with torch.no_grad():
        logits = model(data.normalize(test.images, info.mean, info.std))[0].double()
    log_p = logits.log_softmax(1)[torch.arange(60), test.labels]
    assert report["test"]["nll"] == pytest.approx(-log_p.mean().item(), rel=1e-5)
    rank = (logits > logits[torch.arange(60), test.labels][:, None]).sum(1)
    assert report["test"]["top5"] == pytest.approx(100 * (rank < 5).double().mean().item())

    rows = report["corruptions"]["top1"]
    assert list(rows) == list(evaluate.COMMON) and all(len(row) == 5 for row in rows.values())
    bright = evaluate.corrupt(test.images, "brightness", 4, None)
    with torch.no_grad():
        right = model(data.normalize(bright, info.mean, info.std))[0].argmax(1) == test.labels
    assert rows["brightness"][3] == pytest.approx(100 * right.double().mean().item())
    assert report["corruptions"]["mean_error"] == pytest.approx(100 - sum(map(sum, rows.values())) / 75)
    again, = evaluate.evaluate(config(run, shift=[], corruptions="generated"))
    assert again == report  # the same noise
    assert "gaussian_noise" in evaluate.tables([report])


def test_newest_run_and_none(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished run below runs/: python train.py makes one"):
        evaluate.evaluate(config())
    for i, name in enumerate(("older", "newest")):
        shutil.copytree(run, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "summary.json", (i, i))
    assert evaluate.newest_run() == Path("runs/newest")
    (tmp_path / "runs/newest/summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished run in runs/newest"):
        evaluate.evaluate(config("runs/newest"))


def test_a_bare_checkpoint(run, tmp_path):
    path = tmp_path / "bare.pt"
    torch.save(torch.load(run / "student.pt", weights_only=True)["model"], path)
    report, = evaluate.evaluate(evaluate.Config(checkpoint=str(path), model="resnet8", dataset="shapes", device="cpu"))
    summary = json.loads((run / "summary.json").read_text())
    assert report["test"]["top1"] == pytest.approx(summary["student_accuracy"])
    assert (tmp_path / "bare.report.json").is_file()
    with pytest.raises(ValueError, match="--model NAME and --dataset NAME"):
        evaluate.evaluate(evaluate.Config(checkpoint=str(path)))
    torch.save(models.build_model("resnet8", 7).state_dict(), path)
    with pytest.raises(ValueError, match="7 classes"):
        evaluate.evaluate(evaluate.Config(checkpoint=str(path), model="resnet8", dataset="shapes", device="cpu"))


def test_other_classes_are_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    student = torch.load(run / "student.pt", weights_only=True)
    student["class_names"][3] = "red banana"
    torch.save(student, tmp_path / "run/student.pt")
    with pytest.raises(ValueError, match="class 3 is 'red banana' there and 'red star' here"):
        evaluate.evaluate(config(tmp_path / "run"))


def test_zero_shot_table(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_SIZES", {"train": 100, "test": 60, "shift": 50})
    torch.manual_seed(0)
    clip = clip_model.CLIP(32, 32, 1, 64, 16, 64, 514, 64, 1, 1).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    (tmp_path / "prompts.txt").write_text("a photo of a {}\n{} in the wild\n")
    table = evaluate.zero_shot(evaluate.Config(clip=str(tmp_path / "clip.pt"), prompts=str(tmp_path / "prompts.txt"),
                                               dataset="shapes", cache_dir=str(tmp_path), device="cpu"))
    assert list(table) == ["all 2 templates", "a photo of a {}", "{} in the wild"]
    test = data.load_dataset("shapes", "", "test")
    with torch.no_grad():
        image = F.normalize(clip.encode_image(clip_model.preprocess(test.images, 32)), dim=1)
    for templates, name in ((["a photo of a {}"], "a photo of a {}"),
                            (["a photo of a {}", "{} in the wild"], "all 2 templates")):
        classes = clip_model.class_features(clip, clip_model.Tokenizer(), test.class_names, templates)
        expected = 100 * ((image @ classes.T).argmax(1) == test.labels).double().mean().item()
        assert table[name] == pytest.approx(expected, abs=2)  # features are kept as float16: a tie may fall otherwise
