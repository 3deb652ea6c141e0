"""evaluate.py's metrics, readers and reports against hand-computed values."""

import dataclasses
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
    mean, relative = (report["corruptions"][name] for name in ("mean_error", "relative_mean_error"))
    assert relative == pytest.approx(mean - 100 + report["test"]["top1"])
    assert report["corruptions"]["source"] == "generated" and "mce" not in report["corruptions"]
    assert report["test"]["brier"] == pytest.approx(evaluate.brier(logits, test.labels), rel=1e-5)
    mass = evaluate.ece(logits, test.labels, bins=15, equal_mass=True)
    assert report["test"]["ece_equal_mass"] == pytest.approx(100 * mass, rel=1e-4)
    temperature = report["test"]["calibration"]["temperature"]
    assert report["shift"]["calibration"]["temperature"] == temperature  # the shift split is not fitted on
    assert report["shift"]["calibration"]["before"]["nll"] == report["shift"]["nll"]
    (run / "report.json").unlink()
    again, = evaluate.evaluate(config(run, shift=[], corruptions="generated"))
    assert again == report  # the same noise
    assert "gaussian_noise" in evaluate.tables([report])


def test_calibration_reports_images_that_it_did_not_fit():
    logits, target = 5 * torch.randn(400, 10, generator=seeded(1)), torch.randint(10, (400,), generator=seeded(2))
    target[:200] = logits[:200].argmax(dim=1)
    table = evaluate.calibration(logits, target)
    matches = []  # the reported half is found by its bins, the fitted one must be the rest
    order = torch.randperm(400, generator=seeded(0))
    for reported, fitted in ((order[:200], order[200:]), (order[200:], order[:200])):
        matches.append(evaluate.nll(logits[reported], target[reported]) == pytest.approx(table["before"]["nll"]) and
                       evaluate.fit_temperature(logits[fitted], target[fitted]) == pytest.approx(table["temperature"]))
    assert matches.count(True) == 1
    assert table["after"]["nll"] < table["before"]["nll"] and table["after"]["top1"] == table["before"]["top1"]
    assert sum(table["after"]["bins"]["count"]) == 200 and table == evaluate.calibration(logits, target)
    given = evaluate.calibration(logits, target, temperature=2.0)
    assert given["after"]["images"] == 400
    assert given["after"]["nll"] == pytest.approx(evaluate.nll(logits / 2, target))


def test_corruption_errors():
    table = {name: [100 - 100 * error] * 5 for name, error in evaluate.ALEXNET_ERRORS.items()}
    errors = evaluate.corruption_errors(table, clean=56.522, alexnet=True)
    mean = 100 * sum(evaluate.ALEXNET_ERRORS.values()) / 15
    assert errors == pytest.approx({"mean_error": mean, "relative_mean_error": mean - 43.478, "mce": 100,
                                    "relative_mce": 100})
    assert list(evaluate.corruption_errors(table, 50, alexnet=False)) == ["mean_error", "relative_mean_error"]
    text = evaluate.tables([{"of": {}, "corruptions": {"source": "published", "top1": table, **errors}}])
    assert text.endswith("against AlexNet: mCE 100.0 %, relative mCE 100.0 %")


@pytest.fixture
def counted(monkeypatch):
    """How often a classifier saw a set of images, by the note of its progress."""
    seen, predict = [], evaluate.predict

    def counting(classifiers, blocks, config, progress, note=""):
        seen.extend([note or progress.label] * len(classifiers))
        return predict(classifiers, blocks, config, progress, note)

    monkeypatch.setattr(evaluate, "predict", counting)
    return seen


def test_an_interrupted_evaluation_goes_on(run, tmp_path, monkeypatch, counted):
    folder, everything = shutil.copytree(run, tmp_path / "run"), {"shift": [], "corruptions": "generated"}
    (folder / "report.json").unlink(missing_ok=True)

    def corrupt(images, name, severity, generator):
        return images // severity  # quick

    def until_snow(images, name, severity, generator):
        if name == "snow" and severity == 3:
            raise KeyboardInterrupt
        return corrupt(images, name, severity, generator)

    monkeypatch.setattr(evaluate, "corrupt", until_snow)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(config(folder, **everything))
    assert len(counted) == 2 + 7 * 5 + 3  # the third snow was begun
    partial = json.loads((folder / "report.json").read_text())
    assert len(partial["corruptions"]["top1"]["snow"]) == 2 and "mean_error" not in partial["corruptions"]
    assert "snow" not in evaluate.tables([partial])
    monkeypatch.setattr(evaluate, "corrupt", corrupt)
    counted.clear()
    resumed, = evaluate.evaluate(config(folder, **everything))
    assert counted[0] == "snow 3" and len(counted) == 38
    counted.clear()
    assert evaluate.evaluate(config(folder, **everything)) == [resumed] and not counted
    assert evaluate.evaluate(config(folder)) == [resumed] and not counted
    (folder / "report.json").unlink()
    assert evaluate.evaluate(config(folder, **everything)) == [resumed]


def test_what_changed_is_evaluated_anew(run, tmp_path, counted, cifar_c):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "report.json").unlink(missing_ok=True)
    first, = evaluate.evaluate(config(folder, shift=[]))
    assert counted == ["test", "shift"]
    for changes in ({"seed": 1}, {"amp": True}, {}):
        counted.clear()
        report, = evaluate.evaluate(config(folder, **changes))
        assert counted == ["test"] and "shift" not in report
    report["corruptions"] = {"source": "published", "folder": str(cifar_c), "top1": {"fog": [1, 2, 3]}}
    (folder / "report.json").write_text(json.dumps(report))
    counted.clear()
    evaluate.evaluate(config(folder, corruptions="generated"))
    assert len(counted) == 75  # the other source's are not gone on with; the test split is
    student = torch.load(folder / "student.pt", weights_only=True)
    student["model"]["fc.bias"] += 1
    torch.save(student, folder / "student.pt")
    for text in (None, "{", "[]"):
        if text:
            (folder / "report.json").write_text(text)
        counted.clear()
        evaluate.evaluate(config(folder))
        assert counted == ["test"]


def test_runs_share_what_they_see(run, tmp_path, counted, monkeypatch):
    folders = [shutil.copytree(run, tmp_path / name) for name in "AB"]
    for folder in folders:
        (folder / "report.json").unlink(missing_ok=True)
    evaluate.evaluate(config(folders[0], shift=[]))
    counted.clear()
    made = []
    monkeypatch.setattr(evaluate, "corrupt", lambda images, *which: made.append(which[:2]) or images)
    reports = evaluate.evaluate(config(*folders, shift=[], corruptions="generated"))
    assert counted[:2] == ["test", "shift"] and len(counted) == 2 + 2 * 75  # of B alone; of both
    assert len(made) == 75
    assert reports[0]["corruptions"] == reports[1]["corruptions"]


@pytest.mark.parametrize("file, content, message", (
    ("config.json", "{", "config.json is damaged"), ("config.json", "3", "config.json is damaged"),
    ("config.json", "{}", "config.json is damaged; or of another version"),
    ("summary.json", "", "summary.json is damaged"), ("student.pt", "", "student.pt is missing or damaged"),
    ("summary.json", '{"dataset": "shapes"}', "summary.json is damaged"),
    ("student.pt", "no zip", "student.pt is missing or damaged"), ("student.pt", None, "is not what train.py writes")))
def test_damaged_files_are_named(run, tmp_path, file, content, message):
    folder = shutil.copytree(run, tmp_path / "run")
    if content is None:
        torch.save({"model": {}}, folder / file)
    else:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        evaluate.evaluate(config(folder))
    assert "\n" not in str(error.value)


def test_published_files_of_another_data_set(cifar_c, tmp_path):
    """CIFAR-C's labels are the test split's; ImageNet-C's folders are its classes."""
    test = data.Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([3, 1, 4, 1]), list("abcdefghij"))
    known = evaluate.Config(dataset="cifar10", corruptions=str(cifar_c), device="cpu", workers=0)
    images, labels = evaluate.corrupted(test, "fog", 2, known)
    assert torch.cat(list(images))[:, 0, 0, 0].tolist() == [20, 21, 22, 23] and labels.tolist() == [3, 1, 4, 1]
    with pytest.raises(ValueError, match="labels.npy does not have the labels of cifar10's test split"):
        evaluate.corrupted(test._replace(labels=torch.tensor([3, 1, 4, 2])), "fog", 2, known)
    for folder in ("val/n01", "val/n02", "C/fog/1/n01", "C/fog/1/n03", "C/fog/2/n01", "C/fog/2/n02"):
        write_images(tmp_path / folder, 1)
    paths = sorted(str(path) for path in (tmp_path / "val").glob("*/*"))
    test = data.Split(data.Stream(paths), torch.tensor([0, 1]), ["cat", "dog"])
    known = dataclasses.replace(known, dataset="imagenet", corruptions=str(tmp_path / "C"))
    assert torch.cat(list(evaluate.corrupted(test, "fog", 2, known)[0])).shape == (2, 3, 224, 224)
    with pytest.raises(ValueError, match="other classes than imagenet: class 1 is 'n03' there and 'n02' here"):
        evaluate.corrupted(test, "fog", 1, known)


# ---- shift sets


def test_cifar10_1(tmp_path):
    test = data.Split(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), list("abcdefghij"))
    images = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    images[:, 1, 2, 0] = range(20)
    np.save(tmp_path / "cifar10.1_v6_data.npy", images)
    with pytest.raises(FileNotFoundError, match="cifar10.1_v6_labels.npy is missing"):
        evaluate.read_cifar10_1(tmp_path)
    np.save(tmp_path / "cifar10.1_v6_labels.npy", np.arange(20) % 10)
    split, columns = evaluate.load_shift(tmp_path, evaluate.Config(dataset="cifar10"), test)
    assert split.images[:, 0, 1, 2].tolist() == list(range(20)) and columns.tolist() == list(range(10))
    assert split.labels.tolist() == list(range(10)) * 2
    with pytest.raises(ValueError, match="holds a shift set of cifar10, but these runs are on cifar100"):
        evaluate.load_shift(tmp_path, evaluate.Config(dataset="cifar100"), test)
    for wrong in (np.arange(19), np.full(20, 10), np.full(20, -1)):
        np.save(tmp_path / "cifar10.1_v6_labels.npy", wrong)
        with pytest.raises(ValueError, match="expected 20 numbers from 0 to 9"):
            evaluate.read_cifar10_1(tmp_path)
    np.save(tmp_path / "cifar10.1_v6_data.npy", images[..., 0])
    with pytest.raises(ValueError, match=r"v6_data.npy is uint8 \(20, 32, 32\); expected uint8 \(2000, 32, 32, 3\)"):
        evaluate.read_cifar10_1(tmp_path)


def test_stl10_has_nine_classes_of_cifar10(tmp_path, monkeypatch):
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    own = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (tmp_path / "stl10_binary").mkdir()
    with pytest.raises(ValueError, match="stl10_binary is no complete STL-10"):
        evaluate.read_stl10(tmp_path)
    pixels = np.zeros((10, 3, 96, 96), dtype=np.uint8)
    pixels[:, 1, 7, 5] = range(10)  # their files are column-major
    pixels.tofile(tmp_path / "stl10_binary/test_X.bin")
    np.arange(1, 11, dtype=np.uint8).tofile(tmp_path / "stl10_binary/test_y.bin")
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    test = data.Split(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1]), names)
    split, columns = evaluate.load_shift(tmp_path, evaluate.Config(dataset="cifar10"), test)
    assert split.images.shape == (9, 3, 96, 96)
    assert [names[k] for k in columns] == [name for name in names if name != "frog"]
    shown = [own[value] for value in split.images[:, 1, 5, 7]]
    assert [names[columns[label]] for label in split.labels] == [{"car": "automobile"}.get(n, n) for n in shown]
    assert "monkey" not in shown


def test_a_shift_folder_for_images_that_stream(tmp_path):
    """Columns by WordNet id, by number and through classes.json; scores of the masked logits."""
    for k, (wnid, count) in enumerate((("n01", 2), ("n02", 2), ("n03", 2))):
        write_images(tmp_path / "data/val" / wnid, count)
        torchvision.io.write_png(torch.full((3, 40, 30), 80 * k, dtype=torch.uint8),
                                 str(tmp_path / "data/val" / wnid / "0.png"))
    (tmp_path / "data/words.txt").write_text("n01\tcat\nn02\tdog\nn03\tbird\n")
    for folders in (("n02", "n03"), ("1", "2"), ("hounds", "fowl")):
        for folder, source in zip(folders, ("n02", "n03")):
            shutil.copytree(tmp_path / "data/val" / source, tmp_path / folders[0] / "set" / folder)
    torch.manual_seed(0)
    torch.save(models.build_model("resnet18", 3).state_dict(), tmp_path / "net.pt")
    known = {"checkpoint": str(tmp_path / "net.pt"), "model": "resnet18", "dataset": "imagenet", "workers": 0,
             "data_dir": str(tmp_path / "data"), "device": "cpu"}
    with pytest.raises(ValueError, match="'fowl' is not a class of the model"):
        evaluate.evaluate(evaluate.Config(**known, shift=[str(tmp_path / "hounds/set")]))
    (tmp_path / "hounds/set/classes.json").write_text('{"hounds": "dog", "fowl": "n03"}')
    rows = []
    for folder in ("n02", "1", "hounds"):
        report, = evaluate.evaluate(evaluate.Config(**known, shift=[str(tmp_path / folder / "set")]))
        rows.append(report["shift set"])
        assert rows[-1].pop("folder") == str(tmp_path / folder / "set")
    assert [row["nll"] for row in rows] == pytest.approx([rows[0]["nll"]] * 3) and rows[0]["images"] == 4
    files = [tmp_path / "n02/set" / wnid / f"{i}.png" for wnid in ("n02", "n03") for i in (0, 1)]
    info, model = data.DATASETS["imagenet"], models.load_weights("resnet18", tmp_path / "net.pt")
    images = torch.stack([data.Stream([str(file)])[0, None][0] for file in files])
    with torch.no_grad():
        logits = model(data.normalize(images, info.mean, info.std))[0][:, 1:]  # n02 and n03 alone
    assert rows[0]["nll"] == pytest.approx(evaluate.nll(logits, torch.tensor([0, 0, 1, 1])), rel=1e-4)
    (tmp_path / "n02/set/classes.json").write_text("{")
    with pytest.raises(ValueError, match="classes.json is damaged"):  # "shift set" is now another folder's
        evaluate.evaluate(evaluate.Config(**known, shift=[str(tmp_path / "n02/set")]))
    with pytest.raises(ValueError, match="imagenet has no shift split of its own: --shift DIR"):
        evaluate.evaluate(evaluate.Config(**known, shift=[]))


def test_a_shift_folder_for_images_in_memory(run, tmp_path):
    test = data.render_shapes("shift")
    for k in (3, 12):
        folder = tmp_path / "wild" / test[2][k].replace(" ", "_")
        folder.mkdir(parents=True)
        for i in (test[1] == k).nonzero()[:, 0].tolist()[:5]:
            torchvision.io.write_png(test[0][i], str(folder / f"{i}.png"))
    names = {test[2][k].replace(" ", "_"): test[2][k] for k in (3, 12)}
    (tmp_path / "wild/classes.json").write_text(json.dumps(names))
    split, columns = evaluate.load_shift(tmp_path / "wild", evaluate.Config(dataset="shapes"), data.Split(*test))
    assert columns.tolist() == [3, 12]
    assert split.images[0, None][0].equal(test[0][int(Path(split.images.paths[0]).stem)])  # as it is, not cropped
    report, = evaluate.evaluate(config(run, shift=[str(tmp_path / "wild")], workers=0))
    assert {"test", "shift", "shift wild"} <= report.keys() and report["shift wild"]["top1"] >= 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        evaluate.evaluate(config(run, shift=[str(tmp_path / "empty")]))


# ---- what fusion does


def test_superclasses(tmp_path):
    members = [row.split() for row in evaluate.CIFAR100_SUPERCLASSES.split(",")]
    names = sorted(name for row in members for name in row)
    assert [len(row) for row in members] == [5] * 20 and len(set(names)) == 100
    group = evaluate.superclasses("cifar100", names)["superclass"]
    assert len(group) == 100 and len(group.unique()) == 20
    def together(a, b):
        return group[names.index(a)] == group[names.index(b)]
    assert together("maple_tree", "willow_tree") and together("streetcar", "lawn_mower") and together("man", "woman")
    assert not together("man", "maple_tree") and not together("bus", "streetcar") and not together("seal", "shark")
    groups = evaluate.superclasses("shapes", ["red star", "blue star", "red heart"])
    assert groups["colour"].tolist() == [0, 1, 0] and groups["form"].tolist() == [0, 0, 2]
    (tmp_path / "is_a").write_text("n9 n1\nn8 n2\nn9 n3\nn7 n9\n")
    groups = evaluate.superclasses("imagenet", list("abcd"), ["n1", "n2", "n3", "n4"], tmp_path / "is_a")
    assert groups["WordNet parent"].tolist() == [0, 1, 0, 3]
    assert evaluate.superclasses("imagenet", ["a"], ["n1"], tmp_path / "none") == {}
    assert evaluate.superclasses("tiny-imagenet", ["cat"]) == {}


def test_measures_are_the_metrics():
    logits, target = 3 * torch.randn(300, 7, generator=seeded(1)), torch.randint(7, (300,), generator=seeded(2))
    found = dict(zip(evaluate.MEASURES, evaluate.measures(evaluate.contributions(logits, target, 0.7)).tolist()))
    expected = {"top1": 100 * evaluate.top_k_accuracy(logits, target), "nll": evaluate.nll(logits, target),
                "ece": 100 * evaluate.ece(logits, target),
                **{name: count / 3 for name, count in evaluate.quadrants(logits, target, 0.7).items()}}
    assert found == pytest.approx(expected)


def test_rank_shares_ties():
    assert evaluate.rank(torch.tensor([3.0, 1.0, 3.0, 7.0, 3.0])).tolist() == [3, 1, 3, 5, 3]


def test_non_target_by_hand():
    logits = probabilities_as_logits([[0.5, 0.3, 0.2], [0.9, 0.01, 0.09], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]])
    target = torch.tensor([0, 0, 1, 2])
    similarity = torch.tensor([[1, 0.3, 0.5], [0.3, 1, 0.1], [0.5, 0.1, 1]])
    found = evaluate.non_target(logits, target, similarity, {"kind": torch.tensor([0, 0, 1])})
    rows = [(0.6, 0.4), (0.1, 0.9), (0.5, 0.5), (0.25, 0.75)]  # the other two classes, in order
    assert found["entropy"] == pytest.approx(-sum(p * math.log(p) for row in rows for p in row) / 4)
    assert found["same kind"] == pytest.approx(100 * (0.6 + 0.1 + 0.5 + 0) / 4)
    # means of (0,1) (0,2) (1,0) (1,2) (2,0) (2,1): .35 .65 .5 .5 .25 .75, similarities .3 .5 .3 .1 .5 .1
    a, b = np.array([2, 5, 3.5, 3.5, 1, 6]), np.array([3.5, 5.5, 3.5, 1.5, 5.5, 1.5])
    assert found["rank_correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    certain = evaluate.non_target(torch.tensor([[500.0, 1.0, 0.0]]), target[:1], similarity, {})  # no underflow
    assert certain["entropy"] == pytest.approx(-sum(p * math.log(p) for p in (0.7310586, 0.2689414)))


def test_sweep_and_quadrants():
    target = torch.randint(5, (200,), generator=seeded(0))
    teacher, clip = (3 * torch.randn(200, 5, generator=seeded(k)) + 2 * F.one_hot(target, 5) for k in (1, 2))
    sweep = evaluate.sweep_alpha(teacher, clip, target, seeded())
    assert [row["alpha"] for row in sweep] == [k / 10 for k in range(11)]
    for row, logits in ((sweep[0], clip), (sweep[10], teacher), (sweep[3], 0.3 * teacher + 0.7 * clip)):
        assert row["nll"][0] == pytest.approx(evaluate.nll(logits, target))
        assert row["unsure_wrong"][0] == pytest.approx(evaluate.quadrants(logits, target, 0.7)["unsure_wrong"] / 2)
        assert row["top1"][1] < row["top1"][0] < row["top1"][2]
    table = evaluate.quadrant_changes({"teacher": teacher, "clip": clip, "same": teacher}, target, seeded())
    assert list(table) == ["0.5", "0.7", "0.9"] and "change" not in table["0.5"]["teacher"]["top1"]
    for threshold, rows in table.items():
        counts = [rows[model]["confident_wrong"]["count"] for model in ("teacher", "clip")]
        assert counts == [evaluate.quadrants(z, target, float(threshold))["confident_wrong"] for z in (teacher, clip)]
        value, low, high = rows["clip"]["confident_wrong"]["change"]
        assert value == pytest.approx((counts[1] - counts[0]) / 2) and low < value < high
        assert all(entry["change"] == [0, 0, 0] for entry in rows["same"].values())  # paired: the same images


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """A run of RichKD with a teacher and a CLIP of random weights, and the places where it was made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_SIZES", {"train": 100, "test": 60, "shift": 50})
        folder = tmp_path_factory.mktemp("rich")
        torch.manual_seed(0)
        torch.save(clip_model.CLIP(32, 32, 1, 64, 16, 64, 514, 64, 1, 1).state_dict(), folder / "clip.pt")
        torch.save(models.build_model("resnet8", 25).state_dict(), folder / "teacher.pt")
        train.run(train.Config(teacher=("resnet8",), teacher_weights=(str(folder / "teacher.pt"),), student="resnet8",
                               clip=str(folder / "clip.pt"), epochs=1, alpha=0.4, cache_dir=str(folder / "cache"),
                               out=str(folder / "run"), device="cpu"))
        yield folder


def test_fused_agrees_with_the_run(rich, counted):
    places = {"cache_dir": str(rich / "cache"), "fused": True}
    report, = evaluate.evaluate(config(rich / "run", **places))
    summary, fused = json.loads((rich / "run/summary.json").read_text()), report["fused"]
    assert fused["alpha"] == 0.4 and fused["clip_scale"] == pytest.approx(1 / 0.07, rel=1e-4)
    for model in ("teacher", "clip", "fused"):
        for rows in fused["quadrants"].values():
            assert rows[model]["top1"]["value"][0] == pytest.approx(summary[f"{model}_accuracy"])
    assert fused["sweep"][4]["top1"][0] == pytest.approx(summary["fused_accuracy"])
    assert list(fused["non_target"]["fused"]) == ["rank_correlation", "entropy", "same colour", "same form"]
    assert report == json.loads((rich / "run/report.json").read_text())
    lines = evaluate.tables([report]).splitlines()
    assert sum(line.startswith("confident, right at") for line in lines) == 3
    assert [line.split()[0] for line in lines[-11:]] == [str(k / 10) for k in range(11)]
    counted.clear()
    assert evaluate.evaluate(config(rich / "run", **places)) == [report] and not counted


def test_fused_under_corruptions(rich, monkeypatch):
    monkeypatch.setattr(evaluate, "COMMON", dict.fromkeys(("contrast", "pixelate")))
    own = evaluate.dataclasses.replace(config(rich / "run", corruptions="generated", cache_dir=str(rich / "cache")),
                                       dataset="shapes")
    test, info = data.load_dataset("shapes", "", "test"), data.DATASETS["shapes"]
    teacher = models.load_weights("resnet8", rich / "teacher.pt").eval()
    clip, tokenizer = train.load_clip(train.Config(clip=str(rich / "clip.pt"), device="cpu"))
    classes = clip_model.class_features(clip, tokenizer, test.class_names, clip_model.load_templates(train.PROMPTS))
    right = {"teacher": 0, "clip": 0, "fused": 0}
    for name in evaluate.COMMON:
        for severity in range(1, 6):
            images = evaluate.corrupt(test.images, name, severity, seeded())  # these two draw nothing
            with torch.no_grad():
                z_t = teacher(data.normalize(images, info.mean, info.std))[0]
                x = F.normalize(clip.encode_image(clip_model.preprocess(images, 32)), dim=1)
            z_c = clip.logit_scale.exp().item() * x @ classes.T
            for who, z in (("teacher", z_t), ("clip", z_c), ("fused", 0.4 * z_t + 0.6 * z_c)):
                right[who] += z.argmax(1).eq(test.labels).sum().item()
    found = evaluate.analyse_corrupted(evaluate.load_teaching(rich / "run", own), test, own)
    assert found == pytest.approx({who: 100 * n / (10 * 60) for who, n in right.items()})


def test_fused_needs_teacher_and_clip(run):
    with pytest.raises(ValueError, match="no run here has a teacher and CLIP"):
        evaluate.evaluate(config(run, fused=True))


# ---- pictures


def test_without_matplotlib_nothing_is_begun(run, monkeypatch, counted):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        evaluate.evaluate(config(run, plot=True, seed=3))
    assert not counted


def test_pictures(rich, tmp_path):
    pytest.importorskip("matplotlib")
    folder, places = shutil.copytree(rich / "run", tmp_path / "run"), {"cache_dir": str(rich / "cache"), "plot": True}
    (folder / "report.json").unlink(missing_ok=True)
    evaluate.evaluate(config(folder, **places))
    small = torchvision.io.read_image(str(folder / "report.png"))
    assert not (folder / "samples.png").exists()
    evaluate.evaluate(config(folder, **places, corruptions="generated", fused=True))
    large = torchvision.io.read_image(str(folder / "report.png"))
    assert [large.shape[k] / small.shape[k] for k in (1, 2)] == [2, 2]  # four panels, not one
    samples = torchvision.io.read_image(str(folder / "samples.png"))
    assert samples.shape == (3, 10 * 98 + 2, 15 * 98 + 2)
    test = data.load_dataset("shapes", "", "test")
    bright = evaluate.corrupt(test.images[1:2], "brightness", 4, None).repeat_interleave(3, 2).repeat_interleave(3, 3)
    y, x = 8 * 98 + 2, 10 * 98 + 2  # the second image, severity 4; the eleventh corruption
    assert samples[:, y:y + 96, x:x + 96].equal(bright[0])


@pytest.mark.parametrize("flags, message", (
    (["--device", "nonsense"], "--device nonsense cannot be used here"), (["--dataset", "cifar"], "unknown data set"),
    (["--run", "nowhere"], "no finished run in nowhere"), (["--compare", "nowhere.json"], "nowhere.json"),
    (["--checkpoint", "x.pt", "--dataset", "shapes"], "--checkpoint takes --model")))
def test_a_wrong_command_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(lambda: evaluate.job(train.parse(evaluate.Config, "", flags)))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_flags_with_and_without_folders():
    plain = train.parse(evaluate.Config, "", [])
    assert plain.shift is None and plain.corruptions is None
    own = train.parse(evaluate.Config, "", ["--shift", "--corruptions"])
    assert own.shift == [] and own.corruptions == "generated"
    given = train.parse(evaluate.Config, "", ["--shift", "A", "B", "--corruptions", "C"])
    assert given.shift == ["A", "B"] and given.corruptions == "C"


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


def test_reports_are_read_alone_or_as_a_list(tmp_path):
    path = tmp_path / "reports.json"
    one = {"of": {"dataset": "shapes", "method": "kd", "student": "resnet8", "epochs": 1}, "test": {"nll": 1., "ece": 2.}}
    for content, expected in ((one, [one]), ([one, one], [one, one])):
        path.write_text(json.dumps(content))
        assert evaluate.read_reports(path) == expected
    for content in ("{", "[]", "3", '[{"of": 1}]', '{"of": {}, "test": {}}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="reports.json is damaged"):
            evaluate.read_reports(path)
