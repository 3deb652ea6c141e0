"""evaluate.py's metrics and reports against hand-computed values."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip_model
import corruptions
import data
import evaluate
import metrics
import models
import targets
import train
from study import fusion
from support import command, files, shapes

pytestmark = pytest.mark.filterwarnings(  # corruptions.py compresses to JPEG by it
    "ignore:The image decoding and encoding capabilities:DeprecationWarning")


@pytest.fixture(autouse=True)
def unflushed(monkeypatch):
    """A report is written a hundred times here; none has to outlast a power cut."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Metrics ------------------------------------------------------------------------------------------


def probabilities_as_logits(rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_top_k_accuracy_by_hand():
    logits = torch.tensor([[3.0, 2, 1], [1, 3, 2], [1, 2, 3], [3, 1, 2]])
    target = torch.tensor([0, 2, 0, 1])
    found = [metrics.top_k_accuracy(logits, target, k) for k in (1, 2, 3, 5)]
    assert found == [0.25, 0.5, 1.0, 1.0]


def test_nll_and_brier_by_hand():
    logits = probabilities_as_logits([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    target = torch.tensor([2, 1])
    assert metrics.nll(logits, target) == pytest.approx(-(math.log(0.2) + math.log(0.8)) / 2)
    squares = (0.25 + 0.09 + 0.64) + (0.01 + 0.04 + 0.01)
    assert metrics.brier(logits, target) == pytest.approx(squares / 2)
    certain = torch.tensor([[0.0, 1e4], [0.0, 1e4]])
    assert metrics.brier(certain, torch.tensor([1, 0])) == 1.0  # 0 and 2
    assert metrics.nll(logits.bfloat16(), target) == pytest.approx(
        metrics.nll(logits, target), rel=0.02)


def test_ece_by_hand():
    rows = [[0.95, 0.05], [0.92, 0.08], [0.65, 0.35], [0.62, 0.38], [0.45, 0.55]]
    logits, target = probabilities_as_logits(rows), torch.tensor([0, 1, 0, 0, 1])
    # Width 0.1: {.95, .92} half right, {.65, .62} all right, {.55} right.
    expected = (2 * (0.935 - 0.5) + 2 * (1 - 0.635) + 0.45) / 5
    assert metrics.ece(logits, target, bins=10) == pytest.approx(expected)
    # Mass 2, 2, 1: {.55, .62} {.65, .92} {.95}.
    expected = (2 * (1 - 0.585) + 2 * (0.785 - 0.5) + (1 - 0.95)) / 5
    assert metrics.ece(logits, target, bins=3, equal_mass=True) == pytest.approx(expected)
    confidence, accuracy, count = metrics.calibration_bins(logits, target, bins=10)
    assert count.tolist() == [0, 0, 0, 0, 0, 1, 2, 0, 0, 2]
    assert confidence[9].item() == pytest.approx(0.935) and accuracy[9] == 0.5
    assert confidence[0] == accuracy[0] == 0


def test_calibration_bins_has_fifteen_and_an_edge_in_the_lower_one():
    target = torch.zeros(3, dtype=torch.int64)
    _, _, count = metrics.calibration_bins(torch.zeros(3, 2), target, bins=2)
    assert count.tolist() == [3, 0]  # confidence exactly 0.5
    assert len(metrics.calibration_bins(torch.zeros(3, 2), target)[2]) == 15
    logits, target = torch.randn(100, 5, generator=seeded()), torch.zeros(100, dtype=torch.int64)
    _, _, count = metrics.calibration_bins(logits, target, equal_mass=True)
    assert count.tolist() == [7] * 10 + [6] * 5


@pytest.mark.parametrize("temperature", (0.02, 0.5, 3.0, 40.0))
def test_fit_temperature_recovers_the_one_that_was_applied(temperature):
    # Ten equal rows whose targets come in proportion to the probabilities: the best temperature
    # undoes the scaling.
    logits = probabilities_as_logits([[0.5, 0.3, 0.2]] * 10) * temperature
    target = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    assert metrics.fit_temperature(logits, target) == pytest.approx(temperature, rel=1e-6)


def test_fit_temperature_has_the_least_nll():
    logits = 4 * torch.randn(500, 10, generator=seeded(1))
    target = torch.randint(10, (500,), generator=seeded(2))
    target[:300] = logits[:300].argmax(dim=1)
    best = metrics.fit_temperature(logits, target)
    for factor in (0.98, 1.02):
        worse = metrics.nll(logits / (best * factor), target)
        assert metrics.nll(logits / best, target) < worse


def test_quadrants_by_hand():
    logits = probabilities_as_logits([[0.95, 0.05], [0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])
    target = torch.tensor([0, 1, 1, 1, 1])
    found = metrics.quadrants(logits, target, 0.75)
    assert {name: mask.nonzero().flatten().tolist() for name, mask in found.items()} == {
        "confident_right": [0, 4], "confident_wrong": [1], "unsure_right": [2], "unsure_wrong": [3]}
    at_the_threshold = metrics.quadrants(torch.zeros(1, 2), torch.tensor([0]), 0.5)
    assert at_the_threshold["confident_right"].item()


def test_bootstrap_interval_is_that_of_a_mean():
    values = (torch.arange(400) % 4 == 0).double()  # mean .25, its error sqrt(.25 * .75 / 400)
    error = 0.02165
    low, high = metrics.bootstrap_interval(values, seeded(), resamples=2000)
    assert (low, high) == pytest.approx((0.25 - 1.96 * error, 0.25 + 1.96 * error), abs=0.004)
    assert metrics.bootstrap_interval(values, seeded(), resamples=2000) == (low, high)
    narrow = metrics.bootstrap_interval(values, seeded(), resamples=2000, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_mean_corruption_error_has_alexnets_errors_under_their_names():
    assert list(metrics.ALEXNET_ERRORS) == list(corruptions.COMMON)
    assert list(metrics.ALEXNET_ERRORS.values()) == [
        0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572,
        0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500]


def test_mean_corruption_error_by_hand():
    flat = dict.fromkeys(corruptions.COMMON, 0.4)
    alexnet = metrics.ALEXNET_ERRORS
    assert metrics.mean_corruption_error(flat) == pytest.approx(0.4)
    found = metrics.mean_corruption_error({**flat, "fog": 0.7, "spatter": 1.0})
    assert found == pytest.approx(0.42)
    assert metrics.mean_corruption_error(flat, clean_error=0.1) == pytest.approx(0.3)
    assert metrics.mean_corruption_error(alexnet, alexnet=True) == pytest.approx(1)
    half = {name: error / 2 for name, error in alexnet.items()}
    assert metrics.mean_corruption_error(half, alexnet=True) == pytest.approx(0.5)
    relative = {name: 0.2 + 2 * (error - 0.43478) for name, error in alexnet.items()}
    found = metrics.mean_corruption_error(relative, clean_error=0.2, alexnet=True)
    assert found == pytest.approx(2)
    only_fog = {**dict.fromkeys(corruptions.COMMON, 0.0), "fog": 0.819324}
    assert metrics.mean_corruption_error(only_fog, alexnet=True) == pytest.approx(1 / 15)
    few = {name: 0.1 for name in corruptions.COMMON if name not in ("snow", "fog")}
    with pytest.raises(ValueError, match="missing are snow, fog$"):
        metrics.mean_corruption_error(few)


def test_corruption_errors_are_in_percent():
    table = {name: [100 - 100 * error] * 5 for name, error in metrics.ALEXNET_ERRORS.items()}
    errors = evaluate.corruption_errors(table, clean=56.522, alexnet=True)
    mean = 100 * sum(metrics.ALEXNET_ERRORS.values()) / 15
    assert errors == pytest.approx({"mean_error": mean, "relative_mean_error": mean - 43.478,
                                    "mce": 100, "relative_mce": 100})
    plain = evaluate.corruption_errors(table, 50, alexnet=False)
    assert list(plain) == ["mean_error", "relative_mean_error"]
    report = {"of": {}, "corruptions": {"source": "published", "top1": table, **errors}}
    text = evaluate.tables([report])
    assert text.endswith("against AlexNet: mCE 100.0 %, relative mCE 100.0 %")


def test_calibration_reports_images_that_it_did_not_fit():
    logits = 5 * torch.randn(400, 10, generator=seeded(1))
    target = torch.randint(10, (400,), generator=seeded(2))
    target[:200] = logits[:200].argmax(dim=1)
    table = evaluate.calibration(logits, target)
    order, matches = torch.randperm(400, generator=seeded(0)), []
    for reported, fitted in ((order[:200], order[200:]), (order[200:], order[:200])):
        before = metrics.nll(logits[reported], target[reported])
        temperature = metrics.fit_temperature(logits[fitted], target[fitted])
        matches.append(before == pytest.approx(table["before"]["nll"])
                       and temperature == pytest.approx(table["temperature"]))
    assert matches.count(True) == 1  # one half was fitted, the other reported
    assert table["after"]["nll"] < table["before"]["nll"]
    assert table["after"]["top1"] == table["before"]["top1"]
    assert sum(table["after"]["bins"]["count"]) == 200
    assert table == evaluate.calibration(logits, target)
    given = evaluate.calibration(logits, target, temperature=2.0)
    assert given["after"]["images"] == 400
    assert given["after"]["nll"] == pytest.approx(metrics.nll(logits / 2, target))


# Runs and their reports ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_shapes):
    """A finished run on a few rendered images."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.run(train.Config(method="scratch", student="resnet8", epochs=1, out=str(folder),
                           device="cpu"))
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A copy of that run, without a report."""
    return shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report.json"))


def config(*runs, **changes):
    return evaluate.Config(run=tuple(map(str, runs)), device="cpu", **changes)


def read_report(folder):
    return files.read_own(folder / "report.json", "")


def logits_of(folder, images):
    info = data.DATASETS["shapes"]
    model = models.load_weights("resnet8", folder / "student.pt")
    with torch.no_grad():
        return model(data.normalize(images, info.mean, info.std))[0]


def test_evaluate_reports_what_the_weights_say(copy):
    report, = evaluate.evaluate(config(copy, shift=[], corruptions="generated"))
    assert report == read_report(copy)
    summary = json.loads((copy / "summary.json").read_text())
    assert report["test"]["top1"] == pytest.approx(summary["student_accuracy"])
    assert report["shift"]["top1"] == pytest.approx(summary["shift_accuracy"])
    test = data.load_dataset("shapes", "", "test")
    logits, N = logits_of(copy, test.images).double(), len(test.labels)
    right = logits[torch.arange(N), test.labels]
    log_p = right - logits.logsumexp(1)
    assert report["test"]["nll"] == pytest.approx(-log_p.mean().item(), rel=1e-5)
    place = (logits > right[:, None]).sum(1)
    assert report["test"]["top5"] == pytest.approx(100 * (place < 5).double().mean().item())
    assert report["test"]["brier"] == pytest.approx(metrics.brier(logits, test.labels), rel=1e-5)
    mass = metrics.ece(logits, test.labels, bins=15, equal_mass=True)
    assert report["test"]["ece_equal_mass"] == pytest.approx(100 * mass, rel=1e-4)
    temperature = report["test"]["calibration"]["temperature"]
    assert report["shift"]["calibration"]["temperature"] == temperature  # it is not fitted on
    assert report["shift"]["calibration"]["before"]["nll"] == report["shift"]["nll"]

    found = report["corruptions"]
    assert list(found["top1"]) == list(corruptions.COMMON)
    assert all(len(row) == 5 for row in found["top1"].values())
    bright = logits_of(copy, corruptions.corrupt(test.images, "brightness", 4, None))
    top1 = 100 * (bright.argmax(1) == test.labels).double().mean().item()
    assert found["top1"]["brightness"][3] == pytest.approx(top1)
    mean = 100 - sum(map(sum, found["top1"].values())) / 75
    assert found["mean_error"] == pytest.approx(mean)
    assert found["relative_mean_error"] == pytest.approx(mean - 100 + report["test"]["top1"])
    assert found["source"] == "generated" and "mce" not in found

    own = config(copy, dataset="shapes", corruptions="generated")
    for _ in range(2):  # the same noise each time, of each corruption alone
        blocks, _ = evaluate.corrupted(test, "gaussian_noise", 4, own)
        noisy = logits_of(copy, torch.cat(list(blocks)))
        top1 = 100 * (noisy.argmax(1) == test.labels).double().mean().item()
        assert found["top1"]["gaussian_noise"][3] == pytest.approx(top1)
    lines = evaluate.tables([report]).splitlines()
    assert max(map(len, lines)) <= 100 and any("gaussian_noise" in line for line in lines)


def test_corrupt_is_evaluates_too():
    assert evaluate.corrupt is corruptions.corrupt


def write_image(path, seed, size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (*size, 3), generator=seeded(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def test_evaluate_has_train_pys_transform_where_images_stream(tmp_path):
    """--image-size 32 for files of 40 to 60 pixels: decoded at 32, as while training."""
    for k, name in enumerate(("ant", "bee", "cow")):
        for part, count in (("train", 8), ("val", 20)):
            for i in range(count):
                path = tmp_path / "data" / part / name / f"{i}.png"
                write_image(path, 100 * k + i, size=(40 + i, 60 - i))
    train.run(train.Config(dataset="imagenet", data_dir=str(tmp_path / "data"), image_size=32,
                           method="scratch", student="resnet8", epochs=1, batch_size=8, workers=0,
                           out=str(tmp_path / "run"), device="cpu"))
    report, = evaluate.evaluate(config(tmp_path / "run", workers=0))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert report["test"]["top1"] == pytest.approx(summary["student_accuracy"])
    paths = sorted((tmp_path / "data/val").glob("*/*.png"))
    images = torch.stack([data.Stream(paths, 32, 37)[i, None][0] for i in range(60)])
    info = data.DATASETS["imagenet"]
    model = models.load_weights("resnet8", tmp_path / "run/student.pt")
    with torch.no_grad():
        logits = model(data.normalize(images, info.mean, info.std))[0]
    labels = torch.arange(3).repeat_interleave(20)
    assert report["test"]["nll"] == pytest.approx(metrics.nll(logits, labels), rel=1e-4)


@pytest.fixture
def quick(monkeypatch):
    """Instead of networks: the first pixels of an image are its logits."""
    def predict(classifiers, blocks, config, progress=None, note=""):
        logits = torch.cat([images.flatten(1)[:, :25].float() for images in blocks])
        return [logits] * len(classifiers)

    monkeypatch.setattr(train, "predict", predict)


@pytest.fixture
def counted(monkeypatch):
    """How often a classifier saw a set of images, by the note of its progress."""
    seen, predict = [], train.predict

    def counting(classifiers, blocks, config, progress=None, note=""):
        if progress:  # of what is evaluated; what taught it has none
            seen.extend([note or progress.label] * len(classifiers))
        return predict(classifiers, blocks, config, progress, note)

    monkeypatch.setattr(train, "predict", counting)
    return seen


def test_evaluate_goes_on_where_it_was_interrupted(copy, monkeypatch, quick, counted):
    everything = {"shift": [], "corruptions": "generated"}

    def corrupt(images, name, severity, generator):
        return images // severity  # quick

    def until_snow(images, name, severity, generator):
        if name == "snow" and severity == 3:
            raise KeyboardInterrupt
        return corrupt(images, name, severity, generator)

    monkeypatch.setattr(evaluate, "corrupt", until_snow)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(config(copy, **everything))
    assert len(counted) == 2 + 7 * 5 + 3  # the third snow was begun
    partial = read_report(copy)
    assert len(partial["corruptions"]["top1"]["snow"]) == 2
    assert "mean_error" not in partial["corruptions"] and "snow" not in evaluate.tables([partial])
    monkeypatch.setattr(evaluate, "corrupt", corrupt)
    counted.clear()
    resumed, = evaluate.evaluate(config(copy, **everything))
    assert counted[0] == "snow 3" and len(counted) == 38
    counted.clear()
    assert evaluate.evaluate(config(copy, **everything)) == [resumed] and not counted
    assert evaluate.evaluate(config(copy)) == [resumed] and not counted
    (copy / "report.json").unlink()
    assert evaluate.evaluate(config(copy, **everything)) == [resumed]


def test_go_on_begins_anew_what_changed(copy, quick, counted):
    evaluate.evaluate(config(copy, shift=[]))
    assert counted == ["test", "shift"]
    for changes in ({"seed": 1}, {"amp": True}, {}):
        counted.clear()
        report, = evaluate.evaluate(config(copy, **changes))
        assert counted == ["test"] and "shift" not in report
    published = {"source": "published", "folder": "elsewhere", "top1": {"fog": [1, 2, 3]}}
    evaluate.save_reports([evaluate.Subject(None, copy / "report.json",
                                    {**report, "corruptions": published})])
    counted.clear()
    evaluate.evaluate(config(copy, corruptions="generated"))
    assert len(counted) == 75  # the other source's are not gone on with; the test split is
    student = files.read_own(copy / "student.pt", "")
    student["model"]["fc.bias"] += 1
    files.save(copy / "student.pt", student)
    whole = None
    for text in (None, "{", "[]", '{"of": {}}', "an edited one"):  # the third: the first edition's
        if text == "an edited one":
            text = whole.replace('"top1": ', '"top1": 1')
        if text:
            (copy / "report.json").write_text(text)
        counted.clear()
        evaluate.evaluate(config(copy))
        assert counted == ["test"]
        whole = (copy / "report.json").read_text()


def test_evaluate_shows_several_runs_the_same_blocks(copy, tmp_path, quick, counted, monkeypatch):
    folders = [copy, shutil.copytree(copy, tmp_path / "B")]
    evaluate.evaluate(config(folders[0], shift=[]))
    counted.clear()
    made = []
    monkeypatch.setattr(evaluate, "corrupt", lambda images, *which: made.append(which) or images)
    reports = evaluate.evaluate(config(*folders, shift=[], corruptions="generated"))
    assert counted[:2] == ["test", "shift"] and len(counted) == 2 + 2 * 75  # of B alone; of both
    assert len(made) == 75
    assert reports[0]["corruptions"] == reports[1]["corruptions"]


@pytest.mark.parametrize("file, content, message", (
    ("config.json", "{", "config.json is damaged"), ("config.json", "3", "config.json is damaged"),
    ("config.json", '{"format": 2}', "config.json is damaged"),
    ("config.json", "{}", "config.json has format 1, this version reads 2"),
    ("summary.json", "", "summary.json is damaged"),
    ("summary.json", '{"format": 2, "dataset": "shapes"}', "summary.json is damaged"),
    ("student.pt", "no zip", "student.pt is damaged"),
    ("student.pt", {"model": {}}, "student.pt is damaged")))
def test_evaluate_names_a_damaged_file(copy, file, content, message):
    if isinstance(content, dict):
        files.save(copy / file, content)
    else:
        (copy / file).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        evaluate.evaluate(config(copy))
    assert "\n" not in str(error.value) and "--overwrite" in str(error.value)


def test_evaluate_names_other_classes(copy):
    student = files.read_own(copy / "student.pt", "")
    student["class_names"][3] = "red banana"
    files.save(copy / "student.pt", student)
    with pytest.raises(ValueError, match="class 3 is 'red banana' there and 'red star' here"):
        evaluate.evaluate(config(copy))


def test_newest_run_and_none(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished run below runs/: python train.py"):
        evaluate.evaluate(config())
    for i, name in enumerate(("older", "newest")):
        shutil.copytree(run, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "summary.json", (i, i))
    assert evaluate.newest_run() == Path("runs/newest")
    (tmp_path / "runs/newest/summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished run in runs/newest"):
        evaluate.evaluate(config("runs/newest"))


def test_evaluate_takes_a_bare_checkpoint(run, tmp_path):
    path = tmp_path / "bare.pt"
    torch.save(files.read_own(run / "student.pt", "")["model"], path)
    own = evaluate.Config(checkpoint=str(path), model="resnet8", dataset="shapes", device="cpu")
    report, = evaluate.evaluate(own)
    summary = json.loads((run / "summary.json").read_text())
    assert report["test"]["top1"] == pytest.approx(summary["student_accuracy"])
    assert (tmp_path / "bare.pt.report.json").is_file()
    with pytest.raises(ValueError, match="--model NAME and --dataset NAME"):
        evaluate.evaluate(evaluate.Config(checkpoint=str(path)))
    torch.save(models.build_model("resnet8", 7).state_dict(), path)
    with pytest.raises(ValueError, match="7 classes"):
        evaluate.evaluate(own)


def test_evaluate_corruptions_of_a_share_compares_with_the_same_clean_images():
    """Images of which the first fifth of each class is right, the others wrong."""
    class Bright(torch.nn.Module):  # class 1 where an image is bright
        def forward(self, images):
            bright = images.mean((1, 2, 3)) > 0
            return torch.stack([~bright, bright], 1).float(), images

    labels = torch.tensor([0, 1] * 10)
    test = data.Split(torch.zeros(20, 3, 8, 8, dtype=torch.uint8), labels, ["dark", "bright"])
    part = data.subset(test._replace(images=torch.arange(20)), 0, 0.2).images
    shown = 1 - labels
    shown[part] = labels[part]
    images = (255 * shown).to(torch.uint8)[:, None, None, None].expand(20, 3, 8, 8).contiguous()
    test = data.subset(test._replace(images=images), 0, 0.2)
    own = evaluate.Config(dataset="shapes", corruptions="generated", corrupted_share=0.2,
                          device="cpu", workers=0)
    classifier = train.Classifier(Bright(), (0.5,) * 3, (0.5,) * 3, 8)
    report = {"test": {"top1": 20.0}}
    evaluate.save_reports, saved = lambda subjects: None, evaluate.save_reports
    try:
        source = evaluate.corruption_source(own, test)
        evaluate.evaluate_corruptions(own, test, [evaluate.Subject(classifier, None, report)],
                                      source)
    finally:
        evaluate.save_reports = saved
    found = report["corruptions"]
    assert found["share"] == 0.2
    assert found["relative_mean_error"] == pytest.approx(found["mean_error"])  # clean: all right


# Corrupted and shifted images ---------------------------------------------------------------------


def test_corrupted_reads_cifar_c_with_the_test_splits_labels(tmp_path, capsys):
    images = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = [10 * severity + i for severity in range(1, 6) for i in range(4)]
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.array([3, 1, 4, 1] * 5, dtype=np.uint8))
    test = data.Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([3, 1, 4, 1]),
                      list("abcdefghij"))
    own = evaluate.Config(dataset="cifar10", corruptions=str(tmp_path), device="cpu", workers=0)
    blocks, labels = evaluate.corrupted(test, "fog", 2, own)
    assert torch.cat(list(blocks))[:, 0, 0, 0].tolist() == [20, 21, 22, 23]
    assert labels.tolist() == [3, 1, 4, 1]
    other = test._replace(labels=torch.tensor([3, 1, 4, 2]))
    with pytest.raises(ValueError, match="other labels than the test split of cifar10"):
        evaluate.corrupted(other, "fog", 2, own)
    few = test._replace(images=test.images[:3], labels=test.labels[:3])
    evaluate.corrupted(few, "fog", 2, own)
    assert "has 4 images a severity, the test split 3" in capsys.readouterr().err
    np.save(tmp_path / "labels.npy", np.array([3, 1, 4, 10] * 5, dtype=np.uint8))
    with pytest.raises(ValueError, match="labels.npy has the label 10; cifar10 has 10 classes"):
        evaluate.corrupted(few, "fog", 2, own)


def test_corrupted_reads_imagenet_c_with_the_data_sets_classes(tmp_path):
    for folder in ("val/n01", "val/n02", "C/fog/1/n01", "C/fog/1/n03", "C/fog/2/n01", "C/fog/2/n02",
                   "C/fog/3/n02"):
        write_image(tmp_path / folder / "0.png", 0, size=(224, 224))
    paths = sorted(str(path) for path in (tmp_path / "val").glob("*/*"))
    test = data.Split(data.Stream(paths), torch.tensor([0, 1]), ["cat", "dog"],
                      ["n01", "n02"])
    own = evaluate.Config(dataset="imagenet", corruptions=str(tmp_path / "C"), device="cpu",
                          workers=0)
    blocks, labels = evaluate.corrupted(test, "fog", 2, own)
    images = torch.cat(list(blocks))
    assert images.shape == (2, 3, 224, 224) and labels.tolist() == [0, 1]
    plain = torch.from_numpy(np.array(Image.open(paths[0]))).permute(2, 0, 1)
    assert images[0].equal(plain)  # published images are neither resized nor cropped
    with pytest.raises(ValueError, match="'n03' is no class"):
        evaluate.corrupted(test, "fog", 1, own)
    with pytest.raises(ValueError, match="3 has 1 classes, imagenet 2: expected a folder for each"):
        evaluate.corrupted(test, "fog", 3, own)
    for name in ("tiny-imagenet", "folder"):  # at the test split's own size
        in_memory = test._replace(images=torch.zeros(2, 3, 48, 48, dtype=torch.uint8))
        blocks, labels = evaluate.corrupted(in_memory, "fog", 2,
                                            dataclasses.replace(own, dataset=name))
        assert next(blocks).shape == (2, 3, 48, 48) and labels.tolist() == [0, 1]


def test_evaluate_sets_masks_the_logits_of_a_shift_folder(tmp_path):
    """Where images stream: the scores are those of the set's own classes alone."""
    for k, wnid in enumerate(("n01", "n02", "n03")):
        for i in range(2):
            write_image(tmp_path / "data/val" / wnid / f"{i}.png", 10 * k + i)
    (tmp_path / "data/words.txt").write_text("n01\tcat\nn02\tdog\nn03\tbird\n")
    for wnid in ("n02", "n03"):
        shutil.copytree(tmp_path / "data/val" / wnid, tmp_path / "set" / wnid)
    torch.manual_seed(0)
    torch.save(models.build_model("resnet18", 3).state_dict(), tmp_path / "net.pt")
    own = evaluate.Config(checkpoint=str(tmp_path / "net.pt"), model="resnet18", workers=0,
                          dataset="imagenet", data_dir=str(tmp_path / "data"), device="cpu",
                          shift=[str(tmp_path / "set")])
    report, = evaluate.evaluate(own)
    paths = [tmp_path / "set" / wnid / f"{i}.png" for wnid in ("n02", "n03") for i in (0, 1)]
    info, model = data.DATASETS["imagenet"], models.load_weights("resnet18", tmp_path / "net.pt")
    images = torch.stack([data.Stream(paths)[i, None][0] for i in range(4)])
    with torch.no_grad():
        logits = model(data.normalize(images, info.mean, info.std))[0][:, 1:]  # n02 and n03 alone
    row = report["shift set"]
    assert row["images"] == 4 and row["columns"] == [1, 2]
    expected = metrics.nll(logits, torch.tensor([0, 0, 1, 1]))
    assert row["nll"] == pytest.approx(expected, rel=1e-4)
    shutil.copytree(tmp_path / "set", tmp_path / "other/set")
    shutil.rmtree(tmp_path / "other/set/n03")
    again, = evaluate.evaluate(dataclasses.replace(own, shift=[str(tmp_path / "other/set")]))
    assert again["shift set"]["images"] == 2  # the name is now another folder's
    with pytest.raises(ValueError, match="imagenet has no shift split of its own: --shift DIR"):
        evaluate.evaluate(dataclasses.replace(own, shift=[]))


def test_evaluate_sets_takes_a_folder_for_images_in_memory(copy, tmp_path):
    images, labels, names, _ = data.load_dataset("shapes", "", "shift")
    for k in (3, 12):
        folder = tmp_path / "wild" / names[k].replace(" ", "_")
        folder.mkdir(parents=True)
        for i in (labels == k).nonzero().flatten().tolist():
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    classes = {names[k].replace(" ", "_"): names[k] for k in (3, 12)}
    (tmp_path / "wild/classes.json").write_text(json.dumps(classes))
    report, = evaluate.evaluate(config(copy, shift=[str(tmp_path / "wild")], workers=0))
    assert {"test", "shift", "shift wild"} <= report.keys()
    own = [i for k in (3, 12) for i in (labels == k).nonzero().flatten().tolist()]
    logits = logits_of(copy, images[own])[:, [3, 12]]
    expected = metrics.nll(logits, (labels[own] == 12).long())
    assert report["shift wild"]["nll"] == pytest.approx(expected, rel=1e-5)


# What fusing does, and CLIP itself ----------------------------------------------------------------


@pytest.fixture(scope="module")
def rich(tmp_path_factory, few_shapes, clip_file):
    """The places of a run of RichKD with a teacher and a CLIP of random weights."""
    folder = tmp_path_factory.mktemp("rich")
    torch.manual_seed(0)
    torch.save(models.build_model("resnet8", 25).state_dict(), folder / "teacher.pt")
    train.run(train.Config(
        teacher=("resnet8",), teacher_weights=(str(folder / "teacher.pt"),), student="resnet8",
        clip=clip_file, epochs=1, alpha=0.4, cache_dir=str(folder / "cache"),
        out=str(folder / "run"), device="cpu"))
    return folder


def test_evaluate_fused_agrees_with_the_run(rich, counted):
    own = config(rich / "run", cache_dir=str(rich / "cache"), fused=True)
    report, = evaluate.evaluate(own)
    summary = json.loads((rich / "run/summary.json").read_text())
    fused = report["fused"]
    assert fused["alpha"] == 0.4 and fused["clip_scale"] == pytest.approx(1 / 0.07, rel=1e-4)
    for model in ("teacher", "clip", "fused"):
        top1 = summary[f"{model}_accuracy"]
        for rows in fused["quadrants"].values():
            assert rows[model]["top1"] == pytest.approx(top1)
    assert fused["sweep"][4]["top1"] == pytest.approx(summary["fused_accuracy"])
    names = ["rank_correlation", "entropy", "same colour", "same form"]
    assert list(fused["non_target"]["fused"]) == names
    assert report == read_report(rich / "run")
    lines = evaluate.tables([report]).splitlines()
    assert max(map(len, lines)) <= 100 and lines[-1].startswith("alpha 1.0")
    counted.clear()
    assert evaluate.evaluate(own) == [report] and not counted


def test_evaluate_fused_under_corruptions(rich, clip_file, monkeypatch):
    monkeypatch.setattr(evaluate, "COMMON", dict.fromkeys(("contrast", "pixelate")))
    own = config(rich / "run", dataset="shapes", corruptions="generated",
                 cache_dir=str(rich / "cache"))
    test, info = data.load_dataset("shapes", "", "test"), data.DATASETS["shapes"]
    teacher = models.load_weights("resnet8", rich / "teacher.pt").eval()
    clip = clip_model.load_clip(clip_file)
    text = clip_model.class_features(clip, clip_model.Tokenizer(), test.class_names,
                                     clip_model.load_templates(targets.PROMPTS))
    classes = F.normalize(text.mean(dim=1), dim=1)
    right = {"teacher": 0, "clip": 0, "fused": 0}
    for name in evaluate.COMMON:
        for severity in range(1, 6):
            images = corruptions.corrupt(test.images, name, severity, seeded())  # draws nothing
            with torch.no_grad():
                z_t = teacher(data.normalize(images, info.mean, info.std))[0]
                x = F.normalize(clip.encode_image(clip_model.preprocess(images, 32)), dim=1)
            z_c = clip.logit_scale.exp().item() * x @ classes.T
            for who, z in (("teacher", z_t), ("clip", z_c), ("fused", 0.4 * z_t + 0.6 * z_c)):
                right[who] += z.argmax(1).eq(test.labels).sum().item()
    teaching = fusion.RunTeachers(*evaluate.read_run(rich / "run", own))
    found = teaching.analyse_corrupted(test, own)
    total = 10 * len(test.labels)
    assert found == pytest.approx({who: 100 * n / total for who, n in right.items()})


def test_evaluate_fused_needs_teacher_and_clip(run, counted):
    with pytest.raises(ValueError, match="no run here has a teacher and CLIP"):
        evaluate.evaluate(config(run, fused=True))
    assert not counted


def test_zero_shot_is_by_each_template_and_all(tmp_path, few_shapes, clip_file):
    (tmp_path / "prompts.txt").write_text("a photo of a {}\n{} in the wild\n")
    own = evaluate.Config(clip=clip_file, prompts=str(tmp_path / "prompts.txt"), dataset="shapes",
                          cache_dir=str(tmp_path), device="cpu")
    table = evaluate.zero_shot(own)
    assert list(table) == ["all 2 templates", "a photo of a {}", "{} in the wild"]
    test, clip = data.load_dataset("shapes", "", "test"), clip_model.load_clip(clip_file)
    with torch.no_grad():
        image = F.normalize(clip.encode_image(clip_model.preprocess(test.images, 32)), dim=1)
    text = clip_model.class_features(clip, clip_model.Tokenizer(), test.class_names,
                                     ["a photo of a {}", "{} in the wild"])
    for name, classes in (("all 2 templates", F.normalize(text.mean(dim=1), dim=1)),
                          ("a photo of a {}", text[:, 0]), ("{} in the wild", text[:, 1])):
        right = (image @ classes.T).argmax(1) == test.labels
        expected = 100 * right.double().mean().item()
        assert table[name] == pytest.approx(expected, abs=2)  # float16: a tie may fall otherwise


# What two reports must not share ------------------------------------------------------------------


def coloured(root, names=("ant", "bee"), first=0, n=8, size=40):
    for part in ("train", "val"):
        for k, name in enumerate(names):
            for i in range(n):
                write_image(root / part / name / f"{i}.png", 1000 * first + 100 * k + i,
                            size=(size + i, size + 8 - i))
    return root


def of_folders(place, **changes):
    return train.Config(**{"dataset": "imagenet", "data_dir": str(place / "a"), "image_size": 32,
                           "method": "scratch", "student": "resnet8", "epochs": 1, "lr": 0.05,
                           "batch_size": 8, "workers": 0, "out": str(place / "run"),
                           "cache_dir": str(place / "cache"), "device": "cpu", **changes})


@pytest.mark.parametrize("dataset, size", [("folder", 48), ("folder", 32), ("imagenet", 48)])
def test_evaluate_has_train_pys_accuracy_at_any_image_size(dataset, size, tmp_path):
    coloured(tmp_path / "a", n=20)
    train.run(of_folders(tmp_path, dataset=dataset, image_size=size))
    report, = evaluate.evaluate(config(tmp_path / "run", workers=0, cache_dir=tmp_path / "cache"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert report["test"]["top1"] == pytest.approx(summary["student_accuracy"])
    bare = evaluate.Config(checkpoint=str(tmp_path / "run/student.pt"), model="resnet8", workers=0,
                           dataset=dataset, data_dir=str(tmp_path / "a"), device="cpu",
                           cache_dir=str(tmp_path / "cache"))
    assert evaluate.evaluate(bare)[0]["test"] == report["test"]


def test_evaluate_has_train_pys_accuracy_of_tensors_at_another_size(tmp_path, few_shapes):
    train.run(train.Config(method="scratch", student="resnet8", epochs=1, image_size=24,
                           out=str(tmp_path / "run"), device="cpu"))
    report, = evaluate.evaluate(config(tmp_path / "run", shift=[]))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert report["test"]["top1"] == pytest.approx(summary["student_accuracy"])
    assert report["shift"]["top1"] == pytest.approx(summary["shift_accuracy"])
    images = data.resize(data.load_dataset("shapes", "", "test").images, 24)
    logits = logits_of(tmp_path / "run", images)
    labels = data.load_dataset("shapes", "", "test").labels
    assert report["test"]["nll"] == pytest.approx(metrics.nll(logits, labels), rel=1e-5)


def test_evaluate_bare_checkpoint_is_what_it_says(copy, tmp_path):
    """Mean, std and side are its own; classes are compared."""
    about = files.read_own(copy / "student.pt", "")
    own = evaluate.Config(checkpoint=str(tmp_path / "net.pt"), model="resnet8", dataset="shapes",
                          device="cpu")
    mean, std, size = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4], 40
    files.save(tmp_path / "net.pt", {**about, "mean": mean, "std": std, "image_size": size})
    report, = evaluate.evaluate(own)
    test = data.load_dataset("shapes", "", "test")
    model = models.load_weights("resnet8", copy / "student.pt")
    with torch.no_grad():
        logits = model(data.normalize(data.resize(test.images, size), mean, std))[0]
    assert report["test"]["nll"] == pytest.approx(metrics.nll(logits, test.labels), rel=1e-4)
    names = ["red banana", *about["class_names"][1:]]
    files.save(tmp_path / "net.pt", {**about, "class_names": names})
    with pytest.raises(ValueError, match="net.pt: class 0 is 'red banana' there and 'red circle'"):
        evaluate.evaluate(own)
    files.save(tmp_path / "net.pt", {**about, "image_size": "large"})
    with pytest.raises(ValueError, match="net.pt is damaged") as error:
        evaluate.evaluate(own)
    assert "\n" not in str(error.value)


def test_evaluate_says_that_a_run_was_tested_on_other_images(tmp_path, capsys):
    coloured(tmp_path / "a")
    train.run(of_folders(tmp_path))
    own = config(tmp_path / "run", workers=0)
    first, = evaluate.evaluate(own)
    assert "tested on another" not in capsys.readouterr().err
    coloured(tmp_path / "b", first=7)
    second, = evaluate.evaluate(dataclasses.replace(own, data_dir=str(tmp_path / "b")))
    said = f"{tmp_path}/run was tested on another test split while training: other images or labels"
    assert said in capsys.readouterr().err
    assert first["how"]["test"] != second["how"]["test"] and first["test"] != second["test"]
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert evaluate.evaluate(dataclasses.replace(own, data_dir=str(tmp_path / "moved"))) == [first]
    coloured(tmp_path / "c", names=("ant", "cow"))
    with pytest.raises(ValueError, match="run: class 1 is 'bee' there and 'cow' here"):
        evaluate.evaluate(dataclasses.replace(own, data_dir=str(tmp_path / "c")))


def test_evaluate_sets_knows_a_shift_folder_by_its_images(tmp_path, quick, counted):
    coloured(tmp_path / "a")
    train.run(of_folders(tmp_path))
    shutil.copytree(tmp_path / "a/val", tmp_path / "set")
    own = config(tmp_path / "run", workers=0, shift=[str(tmp_path / "set")])
    evaluate.evaluate(own)
    counted.clear()
    shutil.copytree(tmp_path / "set", tmp_path / "moved/set")
    evaluate.evaluate(dataclasses.replace(own, shift=[str(tmp_path / "moved/set")]))
    assert not counted  # the same pictures in another place
    write_image(tmp_path / "set/ant/0.png", 99)
    evaluate.evaluate(own)
    assert counted == ["shift set"]
    counted.clear()
    (tmp_path / "set/classes.json").write_text('{"ant": "bee", "bee": "ant"}')
    evaluate.evaluate(own)
    assert counted == ["shift set"]  # the same pictures are called otherwise
    shutil.rmtree(tmp_path / "set/ant")
    first = evaluate.evaluate(own)[0]["shift set"]
    (tmp_path / "set/classes.json").write_text('{"bee": "bee"}')
    assert evaluate.evaluate(own)[0]["shift set"]["columns"] != first["columns"]
    with pytest.raises(ValueError, match="--shift: two folders have one name"):
        evaluate.evaluate(dataclasses.replace(
            own, shift=[str(tmp_path / "set"), str(tmp_path / "moved/set")]))


def test_corruption_source_knows_published_files_by_their_content(tmp_path):
    labels = np.array([3, 1, 4, 1] * 5, dtype=np.uint8)
    for number, name in enumerate(corruptions.COMMON):
        np.save(tmp_path / f"{name}.npy", np.full((20, 32, 32, 3), number, dtype=np.uint8))
    np.save(tmp_path / "labels.npy", labels)
    own = evaluate.Config(dataset="cifar10", corruptions=str(tmp_path), device="cpu", workers=0)
    before = evaluate.corruption_source(own, None)
    shutil.copytree(tmp_path, tmp_path.with_name("moved") / tmp_path.name)
    moved = dataclasses.replace(own, corruptions=str(tmp_path.with_name("moved") / tmp_path.name))
    assert evaluate.corruption_source(moved, None) == before
    np.save(tmp_path / "fog.npy", np.full((20, 32, 32, 3), 99, dtype=np.uint8))
    assert evaluate.corruption_source(own, None) != before
    (tmp_path / "snow.npy").unlink()
    with pytest.raises(FileNotFoundError, match="snow.npy"):
        evaluate.corruption_source(own, None)


def test_evaluate_fused_refuses_what_did_not_teach_the_run(rich, tmp_path, counted):
    folder = tmp_path / "run"
    shutil.copytree(rich / "run", folder, ignore=shutil.ignore_patterns("report.json"))
    shutil.copy(rich / "teacher.pt", tmp_path / "teacher.pt")
    about = files.read_own(folder / "config.json", "")
    about["settings"]["teacher_weights"] = [str(tmp_path / "teacher.pt")]  # in another place
    files.write_json(folder / "config.json", about)
    own = config(folder, cache_dir=str(rich / "cache"), fused=True)
    report, = evaluate.evaluate(own)
    torch.save(models.build_model("resnet8", 25).state_dict(), tmp_path / "teacher.pt")
    assert evaluate.evaluate(own) == [report]  # nothing is made again
    (folder / "report.json").unlink()
    with pytest.raises(ValueError, match="--fused: what taught this run is not here: it has other "
                                         "content of --teacher-weights"):
        evaluate.evaluate(own)


def test_temperature_text_marks_a_bound():
    target = torch.zeros(4, dtype=torch.int64)
    right = torch.tensor([[9.0, 0.0]] * 4)
    wrong = metrics.fit_temperature(-right, target)
    assert evaluate.temperature_text(wrong) == "T >= 1e+03"
    assert evaluate.temperature_text(metrics.fit_temperature(right, target)) == "T <= 0.001"
    assert evaluate.temperature_text(1.5) == "T = 1.5"


@pytest.mark.parametrize("number", [1e300, -1e300, 12345678.9, -1234567.0, math.nan, math.inf, 0.0])
def test_table_never_lets_columns_run_together(number):
    lines = evaluate.table("", ("top-1 %", "NLL"), [("shift " + "x" * 40, [number, number]),
                                                   ("test", [1, number])])
    for line in lines[1:]:
        cells = line.split()[-2:]
        assert [float(cell) for cell in cells] == pytest.approx(
            [1.0 if line.startswith("test") else number, number], rel=0.01, nan_ok=True)


# The command --------------------------------------------------------------------------------------


def test_prepare_without_matplotlib_begins_nothing(run, monkeypatch, counted):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        evaluate.evaluate(config(run, plot=True, seed=3))
    assert not counted


def test_evaluate_draws_pictures(rich, tmp_path, monkeypatch, quick):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(evaluate, "corrupt", lambda images, *which: images // which[1])
    folder = shutil.copytree(rich / "run", tmp_path / "run")
    own = config(folder, cache_dir=str(rich / "cache"), plot=True)
    evaluate.evaluate(own)
    assert (folder / "report.png").is_file() and not (folder / "samples.png").exists()
    evaluate.evaluate(dataclasses.replace(own, corruptions="generated"))
    samples = np.asarray(Image.open(folder / "samples.png"))
    image = shapes.render_shapes("test")[0][1].permute(1, 2, 0).numpy() // 4
    y, x = 8 * 98 + 2, 10 * 98 + 2  # the second image, severity 4; the eleventh corruption
    assert (samples[y:y + 96:3, x:x + 96:3] == image).all()


@pytest.mark.parametrize("flags, message", (
    (["--device", "nonsense"], "--device nonsense cannot be used here"),
    (["--dataset", "cifar"], "invalid choice: 'cifar'"),
    (["--run", "nowhere"], "no finished run in nowhere"),
    (["--compare", "nowhere.json"], "nowhere.json"),
    (["--checkpoint", "x.pt", "--dataset", "shapes"], "--checkpoint takes --model")))
def test_job_answers_a_wrong_command_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(lambda: evaluate.job(command.parse(evaluate.Config, "", flags)))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_config_has_flags_with_and_without_folders():
    plain = command.parse(evaluate.Config, "", [])
    assert plain.shift is None and plain.corruptions is None
    own = command.parse(evaluate.Config, "", ["--shift", "--corruptions"])
    assert own.shift == [] and own.corruptions == "generated"
    given = command.parse(evaluate.Config, "", ["--shift", "A", "B", "--corruptions", "C"])
    assert given.shift == ["A", "B"] and given.corruptions == "C"


def test_table_keeps_to_its_columns():
    lines = evaluate.table("", ("top-1 %", "NLL"), [("a", [12.345, 1.23456]), ("b", [100, 4.3e7])])
    assert lines == ["" + f"{'':28}   top-1 %       NLL", f"{'a':28}     12.35     1.235",
                     f"{'b':28}    100.00  4.30e+07"]


@pytest.mark.slow
def test_job_compares_from_the_command_line():
    """As a script, where study/ imports evaluate.py."""
    root = Path(__file__).resolve().parents[1]
    path = root / "study/results/shapes-negatives.json"
    done = subprocess.run([sys.executable, root / "evaluate.py", "--compare", path], text=True,
                          capture_output=True, cwd=root / "tests", check=True)
    assert done.stdout.strip() in (root / "study/README.md").read_text()
