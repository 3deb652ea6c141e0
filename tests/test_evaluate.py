"""evaluate.py: its numbers against hand-computed ones, and what its reports depend on."""

import clip_model
import corruptions
import data
import dataclasses
import evaluate
import json
import math
import metrics
import models
import numpy as np
import os
import pytest
import shutil
import torch
import torch.nn.functional as F
import train
from helpers import class_pictures, encoded, logits_of, refused, seeded, small, write_files
from PIL import Image
from support import checkpoints, command, files

pytestmark = pytest.mark.filterwarnings(  # corruptions.py compresses to JPEG by it
    "ignore:The image decoding and encoding capabilities:DeprecationWarning")

def test_scores_calibration_is_of_images_that_it_did_not_fit():
    logits = 5 * torch.randn(400, 10, generator=seeded(1))
    target = torch.randint(10, (400,), generator=seeded(2))
    target[:200] = logits[:200].argmax(dim=1)
    table = evaluate.calibrated(logits, target)["calibration"]
    reported, fitted = torch.randperm(400, generator=seeded(0)).chunk(2)
    temperature = metrics.fit_temperature(logits[fitted], target[fitted])
    expected = metrics.nll(logits[reported] / temperature, target[reported])
    assert table["after"]["nll"] == pytest.approx(expected)
    assert table["before"]["nll"] == pytest.approx(metrics.nll(logits[reported], target[reported]))
    assert table["after"]["images"] == sum(table["after"]["bins"][2]) == 200

def test_calibrated_and_aligned_tell_the_worst_classes():
    logits = F.one_hot(torch.tensor([0, 0, 0, 1, 1, 3, 3, 3]), 4).float()
    row = evaluate.calibrated(logits, torch.tensor([0, 0, 0, 0, 1, 1, 3, 3]))
    assert row["by_class"] == [75, 50, None, 100]
    line = evaluate.aligned({"CLIP": row}, ["ant", "bee", "cow", "dog"])[-1]
    assert "75.00 %" in line and line.endswith("bee 50 %, ant 75 %, dog 100 %")

def test_over_corruptions_by_hand():
    sets = {"clean": {"student": {"top1": 56.522, "nll": 0.5}}}
    for name, error in metrics.ALEXNET_ERRORS.items():
        for severity in range(1, 6):  # around the mean of the five
            top1 = 100 - 100 * error + severity - 3
            sets[f"{name} {severity}"] = {"student": {"top1": top1, "nll": severity}}
    found = evaluate.over_corruptions(sets, "student", alexnet=True)
    mean = sum(metrics.ALEXNET_ERRORS.values()) / 15
    assert (found["top1"], found["nll"]) == pytest.approx((100 - 100 * mean, 3))
    assert (found["mce"], found["relative_mce"]) == pytest.approx((100, 100))
    fog = 100 - 100 * metrics.ALEXNET_ERRORS["fog"]
    assert found["by_severity"]["fog"] == pytest.approx([fog + d for d in (-2, -1, 0, 1, 2)])
    assert list(found["by_severity"]) == list(corruptions.COMMON)
    assert "mce" not in evaluate.over_corruptions(sets, "student", alexnet=False)

@pytest.fixture(scope="module")
def run(tmp_path_factory, few_shapes):
    """A finished run on a few rendered images."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.run(train.Config(method="scratch", student="resnet8", epochs=1, out=str(folder),
                           device="cpu"))
    return folder

@pytest.fixture(scope="module")
def rich(tmp_path_factory, few_shapes, clip_file, teacher_file):
    """The places of a run of RichKD with a teacher and a CLIP of random weights."""
    folder = tmp_path_factory.mktemp("rich")
    train.run(train.Config(teacher=("resnet8",), teacher_weights=(teacher_file,), student="resnet8",
                           clip=clip_file, epochs=1, alpha=0.4, cache_dir=str(folder / "cache"),
                           out=str(folder / "run"), device="cpu"))
    return folder

@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")

@pytest.fixture
def quick(monkeypatch):
    """Instead of networks: the first pixels of an image are its logits."""
    def predict(subjects, blocks, progress=None, note=""):
        logits = torch.cat([images.flatten(1)[:, :25].float() for images in blocks])
        return dict.fromkeys(subjects, logits)
    monkeypatch.setattr(train, "predict", predict)
    monkeypatch.setattr(evaluate, "corrupt",
                        lambda images, name, severity, generator: images // severity)

@pytest.fixture
def counted(monkeypatch):
    """Which set a subject saw, each time."""
    seen, predict = [], train.predict
    def counting(subjects, blocks, progress=None, note=""):
        if isinstance(next(iter(subjects)), tuple):  # else it is train.py that asks
            seen.extend([note] * len(subjects))
        return predict(subjects, blocks, progress, note)
    monkeypatch.setattr(train, "predict", counting)
    return seen

def config(*runs, **changes):
    return evaluate.Config(**{"run": tuple(map(str, runs)), "device": "cpu", "workers": 0,
                              **changes})

def evaluated(run, **changes):
    """The sets of the report of a run."""
    [student] = evaluate.evaluate(config(run, **changes))
    return student.sets

def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())

def test_evaluate_reports_what_the_weights_say(copy):
    sets = evaluated(copy, shift=[], corruptions="generated", corrupted_share=0.4)
    assert sets == files.read_json(copy / "report.json", "")["sets"]
    row, summary = sets["test"]["student"], summary_of(copy)
    assert row["top1"] == pytest.approx(summary["student_accuracy"])
    assert sets["shift"]["student"]["top1"] == pytest.approx(summary["shift_accuracy"])
    test = data.load_dataset("shapes", "", "test")
    logits, N = logits_of(copy, test.images), len(test.labels)
    assert row["nll"] == pytest.approx(metrics.nll(logits, test.labels), rel=1e-5)
    place = (logits > logits[torch.arange(N), test.labels][:, None]).sum(1)
    assert row["top5"] == pytest.approx(100 * (place < 5).double().mean().item())
    sure = logits.softmax(1).amax(1) >= 0.5
    assert row["confident_wrong 0.5"] == pytest.approx(100 * (sure & (place > 0)).sum().item() / N)
    found, part = sets["corruptions"]["student"], data.subset(test, 0, 0.4)
    for name, severity in (("brightness", 4), ("gaussian_noise", 2)):
        number = list(corruptions.COMMON).index(name)  # each has its own seed
        images = corruptions.corrupt(part.images, name, severity, seeded(10 * number + severity))
        top1 = 100 * metrics.top_k_accuracy(logits_of(copy, images), part.labels)
        assert found["by_severity"][name][severity - 1] == pytest.approx(top1)
    assert found["images"] == len(part.labels) < N and "mce" not in found
    assert found["top1"] == pytest.approx(sum(map(sum, found["by_severity"].values())) / 75)
    assert sets["corruptions"]["key"] == {"source": "generated", "share": 0.4,
                                          "content": "seed 0 on cpu"}

def test_evaluate_goes_on_where_it_was_interrupted(copy, monkeypatch, quick, counted):
    everything, add = {"shift": [], "corruptions": "generated"}, evaluate.Student.add
    def until_snow(student, name, *rows):
        if name == "snow 3":
            raise KeyboardInterrupt
        add(student, name, *rows)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate.Student, "add", until_snow)
        evaluated(copy, **everything)
    assert len(counted) == 3 + 7 * 5 + 3  # test, shift, clean; the third snow was begun
    assert "corruptions" not in files.read_json(copy / "report.json", "")["sets"]
    counted.clear()
    resumed = evaluated(copy, **everything)
    assert counted[0] == "snow 3" and len(counted) == 38
    counted.clear()
    assert evaluated(copy, **everything) == evaluated(copy) == resumed and not counted
    (copy / "report.json").unlink()
    assert evaluated(copy, **everything) == resumed

def test_evaluate_begins_anew_what_changed(copy, quick, counted):
    evaluated(copy, corruptions="generated")
    counted.clear()
    evaluated(copy, seed=1, corruptions="generated")
    assert len(counted) == 76  # the seed is that of the corruptions alone
    for changes in ({"amp": True}, {}):
        counted.clear()
        assert evaluated(copy, **changes).keys() == {"test"} and counted == ["test"]
    student = checkpoints.read_own(copy / "student.pt", "")
    student["model"]["fc.bias"] += 1
    files.save(copy / "student.pt", student)
    whole = (copy / "report.json").read_text()
    for text in (whole, "{", "[]", '{"about": {}}', whole.replace('"top1": ', '"top1": 1')):
        (copy / "report.json").write_text(text)
        counted.clear()
        evaluated(copy)
        assert counted == ["test"]

def test_evaluate_shows_several_runs_the_same_blocks(copy, tmp_path, quick, counted, monkeypatch):
    folders, made = [copy, shutil.copytree(copy, tmp_path / "B")], []
    evaluated(copy)
    monkeypatch.setattr(evaluate, "corrupt", lambda images, **which: made.append(which) or images)
    first, second = evaluate.evaluate(config(*folders, corruptions="generated"))
    assert counted[:2] == ["test"] * 2  # once each
    assert len(counted) == 2 + 2 * 76 and len(made) == 75
    assert first.sets == second.sets

@pytest.mark.parametrize("file", ("config.json", "student.pt"))
def test_evaluate_names_a_damaged_file(copy, file):
    for content in (b"{", b"{}", b'{"format": 3}'):
        (copy / file).write_bytes(content)
        assert str(copy / file) in refused(evaluate.evaluate, config(copy))
    os.remove(copy / file)
    assert file in refused(evaluate.evaluate, config(copy))

def test_newest_run_has_what_is_asked_for(run, rich, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "runs/" in refused(evaluate.evaluate, config())
    for i, (source, name) in enumerate(((run, "older"), (rich / "run", "rich"), (run, "newest"))):
        shutil.copytree(source, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "summary.json", (i, i))
    assert str(evaluate.newest_run(fused=False)) == "runs/newest"
    assert str(evaluate.newest_run(fused=True)) == "runs/rich"
    shutil.rmtree("runs/rich")
    assert "--fused" in refused(evaluate.evaluate, config(fused=True))

def test_evaluate_takes_a_bare_checkpoint(run, tmp_path):
    path, test = tmp_path / "student.pt", data.load_dataset("shapes", "", "test")
    about = checkpoints.read_own(run / "student.pt", "")
    torch.save(about["model"], path)
    own = config(run=None, checkpoint=str(path), model="resnet8", dataset="shapes")
    [student] = evaluate.evaluate(dataclasses.replace(own, image_size=about["image_size"]))
    accuracy = summary_of(run)["student_accuracy"]
    assert student.sets["test"]["student"]["top1"] == pytest.approx(accuracy)
    assert (tmp_path / "student.pt.report.json").is_file()
    # What the file says of itself: the side of its images is used, the rest must be the same.
    files.save(path, {**about, "image_size": 40})
    [student] = evaluate.evaluate(own)
    expected = metrics.nll(logits_of(tmp_path, test.images), test.labels)
    assert student.sets["test"]["student"]["nll"] == pytest.approx(expected, rel=1e-4)
    assert "40" in refused(evaluate.evaluate, dataclasses.replace(own, image_size=32))
    names = ["red banana", *about["class_names"][1:]]
    for change in ({"class_names": names, "class_ids": names},
                   {"model": models.build_model("resnet8", 7).state_dict()}):
        files.save(path, {**about, **change})
        assert str(path) in refused(evaluate.evaluate, own)

@pytest.mark.parametrize("dataset, size", [("folder", 48), ("imagenet", 48), ("shapes", 24)])
def test_evaluate_has_train_pys_accuracy_at_any_image_size(dataset, size, tmp_path, few_shapes):
    for part, sides in (("train", (40, 44)), ("val", (50, 60))):
        class_pictures(tmp_path / "a" / part, ("ant", "bee"), 20, sides)
    train.run(small(tmp_path, dataset=dataset, image_size=size, method="scratch"))
    row = evaluated(tmp_path / "run", cache_dir=str(tmp_path / "cache"))["test"]["student"]
    assert row["top1"] == pytest.approx(summary_of(tmp_path / "run")["student_accuracy"])

def test_evaluate_knows_the_test_split_by_its_images(tmp_path):
    for part in ("a/train", "a/val", "moved/val"):
        class_pictures(tmp_path / part, ("ant", "bee"), 8)
    class_pictures(tmp_path / "b/val", ("ant", "bee"), 8, size=(9, 9))
    class_pictures(tmp_path / "c/val", ("ant", "cow"), 8)
    train.run(small(tmp_path, method="scratch"))
    first = evaluated(tmp_path / "run")
    assert evaluated(tmp_path / "run", data_dir=str(tmp_path / "moved")) == first
    second = evaluated(tmp_path / "run", data_dir=str(tmp_path / "b"))
    assert first["test"]["key"] != second["test"]["key"]
    said = refused(evaluate.evaluate, config(tmp_path / "run", data_dir=str(tmp_path / "c")))
    assert "student.pt" in said and "bee" in said and "cow" in said
    shutil.rmtree(tmp_path / "a/val")  # without --data-dir no others are taken for the run's own
    shutil.copytree(tmp_path / "b/val", tmp_path / "a/val")
    assert "--data-dir" in refused(evaluate.evaluate, config(tmp_path / "run"))

def cifar_c(folder, labels=(3, 1, 4, 1)):
    """CIFAR-10-C of four images: a pixel tells the corruption, one the severity and the image."""
    folder.mkdir()
    images = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = [10 * severity + i for severity in range(1, 6) for i in range(4)]
    for number, name in enumerate(corruptions.COMMON):
        images[:, 0, 1, 0] = number
        np.save(folder / f"{name}.npy", images)
    np.save(folder / "labels.npy", np.array(list(labels) * 5, dtype=np.uint8))
    return folder

def corrupted_sets(folder, test, dataset="cifar10", **changes):
    own = config(dataset=dataset, corruptions=str(folder), image_size=32, **changes)
    own = dataclasses.replace(own, device=torch.device("cpu"))
    return {images.name: images for images in evaluate.corrupted_sets(own, test)}

def test_corrupted_sets_reads_cifar_c(tmp_path):
    labels = torch.tensor([3, 1, 4, 1])
    test = data.Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), labels, list("abcdefghij"))
    sets = corrupted_sets(cifar_c(tmp_path / "C"), test)
    assert len(sets) == 76
    pixels = torch.cat(list(sets["fog 2"].blocks))[:, 0, 0]
    assert pixels[:, 0].tolist() == [20, 21, 22, 23]
    assert set(pixels[:, 1].tolist()) == {9}  # fog
    assert not torch.cat(list(sets["clean"].blocks)).any()
    key = sets["clean"].key
    sets = corrupted_sets(cifar_c(tmp_path / "D", (1, 1, 3, 4)), test)  # in another order
    assert sets["fog 2"].labels.tolist() == [1, 1, 3, 4]
    for labels in ((1, 1, 3, 3), (3, 1, 4, 10)):  # other classes
        folder = cifar_c(tmp_path / str(labels), labels)
        assert str(folder) in refused(corrupted_sets, folder, test)
    shutil.copytree(tmp_path / "C", tmp_path / "moved/C")
    assert corrupted_sets(tmp_path / "moved/C", test)["clean"].key == key
    np.save(tmp_path / "C/fog.npy", np.full((20, 32, 32, 3), 99, dtype=np.uint8))
    assert corrupted_sets(tmp_path / "C", test)["clean"].key != key
    os.remove(tmp_path / "C/snow.npy")
    assert "snow.npy" in refused(corrupted_sets, tmp_path / "C", test)

@pytest.mark.parametrize("dataset", ("imagenet", "tiny-imagenet"))
def test_corrupted_sets_reads_imagenet_c_neither_resized_nor_cropped(dataset, tmp_path):
    for name in corruptions.COMMON:
        for severity in range(1, 6):
            class_pictures(tmp_path / "C" / name / str(severity), ("n01", "n02"), 1, (48, 48))
    stream = data.Stream([tmp_path / "C/fog/2/n01/0.png"] * 2, 48, 55)
    images = stream if dataset == "imagenet" else torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    test = data.Split(images, torch.tensor([0, 1]), ["cat", "dog"], ["n01", "n02"])
    sets = corrupted_sets(tmp_path / "C", test, dataset)
    plain = torch.from_numpy(np.array(Image.open(tmp_path / "C/fog/2/n01/0.png")))
    assert next(iter(sets["fog 2"].blocks))[0].equal(plain.permute(2, 0, 1))
    assert sets["fog 2"].labels.tolist() == [0, 1]
    shutil.rmtree(tmp_path / "C/fog/2/n01")  # as where unpacking ended
    assert "fog 2" in refused(corrupted_sets, tmp_path / "C", test, dataset)
    class_pictures(tmp_path / "C/fog/2", ("n03",), 1, (48, 48))
    assert "n03" in refused(corrupted_sets, tmp_path / "C", test, dataset)

def test_evaluate_chooses_among_a_shift_folders_classes_where_images_stream(tmp_path):
    class_pictures(tmp_path / "data/val", ("n01", "n02", "n03"), 2, (40, 40))
    write_files(tmp_path / "data", {"words.txt": b"n01\tcat\nn02\tdog\nn03\tbird\n"})
    class_pictures(tmp_path / "set", ("n02", "n03"), 2, (40, 40))
    torch.manual_seed(0)
    state = models.build_model("resnet8", 3).state_dict()
    torch.save({"model": state, "image_size": 32}, tmp_path / "student.pt")
    own = config(run=None, checkpoint=str(tmp_path / "student.pt"), model="resnet8", image_size=32,
                 dataset="imagenet", data_dir=str(tmp_path / "data"), shift=[str(tmp_path / "set")])
    row = evaluate.evaluate(own)[0].sets["shift set"]
    paths = [tmp_path / "set" / wnid / f"{i}.png" for wnid in ("n02", "n03") for i in (0, 1)]
    images = torch.stack([data.Stream(paths, 32, 37)[i, None][0] for i in range(4)])
    logits = logits_of(tmp_path, images, "imagenet")[:, 1:]  # n02 and n03 alone
    assert row["student"]["images"] == 4 and row["key"]["columns"] == [1, 2]
    expected = metrics.nll(logits, torch.tensor([0, 0, 1, 1]))
    assert row["student"]["nll"] == pytest.approx(expected, rel=1e-4)
    assert "--shift" in refused(evaluate.evaluate, dataclasses.replace(own, shift=[]))

def test_evaluate_knows_a_shift_folder_by_its_images(copy, tmp_path, counted):
    place = tmp_path / "wild"
    class_pictures(place, ("3", "12"), 2, (32, 32))  # by number
    own = {"shift": [str(place)], "cache_dir": str(tmp_path / "cache")}
    [student] = evaluate.evaluate(config(copy, **own))
    found, text = student.sets["shift wild"], evaluate.table(student)
    assert "shift wild (2 classes), student" in text and "test, student" in text
    paths = [place / name for name in ("12/0.png", "12/1.png", "3/0.png", "3/1.png")]
    images = torch.stack([data.Stream(paths, 32, 32)[i, None][0] for i in range(4)])
    expected = metrics.nll(logits_of(copy, images)[:, [3, 12]], torch.tensor([1, 1, 0, 0]))
    assert found["student"]["nll"] == pytest.approx(expected, rel=1e-5)
    counted.clear()
    shutil.copytree(place, tmp_path / "moved/wild")
    evaluated(copy, **{**own, "shift": [str(tmp_path / "moved/wild")]})
    assert not counted  # the same pictures in another place
    (place / "12").rename(place / "11")
    assert evaluated(copy, **own)["shift wild"]["key"] != found["key"]  # called otherwise
    (place / "3/1.png").write_bytes(encoded())
    evaluated(copy, **own)
    assert counted == ["shift wild"] * 2
    own["shift"].append(str(tmp_path / "moved/wild"))
    assert "--shift" in refused(evaluate.evaluate, config(copy, **own))

def test_evaluate_fused_agrees_with_the_run(rich, tmp_path, counted):
    folder = shutil.copytree(rich / "run", tmp_path / "run")
    own = {"cache_dir": str(rich / "cache"), "shift": []}
    evaluated(folder, **own)
    counted.clear()
    sets, summary = evaluated(folder, fused=True, **own), summary_of(folder)
    assert counted == ["test"] * 2 + ["shift"] * 2  # student, teacher; CLIP's view is cached
    for who in ("student", "teacher", "CLIP", "fused"):
        for split, accuracy in summary["accuracies"][who.lower()].items():
            assert sets[split][who]["top1"] == pytest.approx(accuracy)
    counted.clear()
    assert evaluated(folder, fused=True, **own) == sets and not counted

def test_evaluate_fused_under_corruptions(rich, clip_file, teacher_file, tmp_path, monkeypatch):
    folder = shutil.copytree(rich / "run", tmp_path / "run")
    monkeypatch.setattr(evaluate, "corrupt",
                        lambda images, name, severity, generator: images // severity)
    [student] = evaluate.evaluate(config(folder, cache_dir=str(rich / "cache"), fused=True,
                                         corruptions="generated", corrupted_share=0.4))
    test = data.subset(data.load_dataset("shapes", "", "test"), 0, 0.4)
    info, clip = data.DATASETS["shapes"], clip_model.load_clip(clip_file)
    teacher = models.load_weights("resnet8", teacher_file).eval()
    text = clip_model.class_features(clip, clip_model.Tokenizer(), test.class_names,
                                     clip_model.load_templates(train.PROMPTS))
    with torch.no_grad():
        seen = data.resize(test.images // 2, train.RECIPES["shapes"]["image_size"])
        z_t = teacher(data.to_input(seen, info.mean, info.std))[0]
        x = F.normalize(clip.encode_image(clip_model.preprocess(test.images // 2, 32)), dim=1)
    z_c = clip.logit_scale.exp().item() * x @ F.normalize(text.mean(dim=1), dim=1).T
    for who, z in (("teacher", z_t), ("CLIP", z_c), ("fused", 0.4 * z_t + 0.6 * z_c)):
        expected = metrics.nll(z, test.labels)
        assert student.sets["fog 2"][who]["nll"] == pytest.approx(expected, rel=1e-5)
        top1 = [student.sets[f"fog {severity}"][who]["top1"] for severity in range(1, 6)]
        assert student.sets["corruptions"][who]["top1"] == pytest.approx(sum(top1) / 5)
    lines = evaluate.table(student).splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100  # a screen

def test_evaluate_fused_refuses_what_did_not_teach_it(run, rich, teacher_file, tmp_path, counted):
    assert "--fused" in refused(evaluate.evaluate, config(run, fused=True))
    folder = shutil.copytree(rich / "run", tmp_path / "run")
    about = files.read_json(folder / "config.json", "")
    about["settings"]["teacher_weights"] = [str(tmp_path / "teacher.pt")]  # in another place
    files.write_json(folder / "config.json", about)
    shutil.copy(teacher_file, tmp_path / "teacher.pt")
    own = config(folder, cache_dir=str(rich / "cache"), fused=True)
    evaluate.evaluate(own)
    counted.clear()
    torch.save(models.build_model("resnet8", 25).state_dict(), tmp_path / "teacher.pt")
    assert "--teacher-weights" in refused(evaluate.evaluate, own) and not counted

def test_evaluate_takes_the_held_out_images_of_a_run(tmp_path, counted):
    """Of a folder without val/, too; of several runs only those of one share."""
    class_pictures(tmp_path / "a/train", ("ant", "bee"), 10)
    shares = [small(tmp_path, method="scratch", holdout=share, out=str(tmp_path / str(share)))
              for share in (0.2, 0.4)]
    summaries = [train.run(own) for own in shares]
    sets = evaluated(tmp_path / "0.2", cache_dir=str(tmp_path / "cache"))
    assert sets["test"]["student"]["images"] == 4
    assert sets["test"]["student"]["top1"] == summaries[0]["student_accuracy"]
    both = config(tmp_path / "0.2", tmp_path / "0.4", cache_dir=str(tmp_path / "cache"))
    assert "--holdout" in refused(evaluate.evaluate, both)
    class_pictures(tmp_path / "a/train", ("bee",), 15)  # trained images would be among the test's
    assert "--data-dir" in refused(evaluate.evaluate, config(tmp_path / "0.2"))

def test_evaluate_prints_what_it_cannot_keep(copy, monkeypatch, capsys):
    def full(path, content):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr(files, "write_json", full)
    text = evaluate.job(config(copy, shift=[]))
    assert "test, student" in text and "shift, student" in text
    assert not (copy / "report.json").exists() and "report.json" in capsys.readouterr().err
    monkeypatch.undo()
    assert str(copy / "report.json") in evaluate.job(config(copy)).splitlines()[-1]

MODES = {  # what each reads, beside data set, class names, precision and places
    "--run R": "run shift corruptions fused image_size",
    "--run R --corruptions": "run shift corruptions fused image_size corrupted_share seed",
    "--run R --corruptions C": "run shift corruptions fused image_size",
    "--checkpoint F --model resnet8": "checkpoint model shift corruptions image_size",
    "--zero-shot --clip F --dataset cifar10": "clip clip_activation bpe prompts zero_shot",
    "--zero-shot": "clip prompts zero_shot"}

@pytest.mark.parametrize("mode", MODES)
def test_unread_is_what_a_mode_does_not_read(mode):
    flags = {"run": "R", "checkpoint": "F", "model": "resnet8", "image_size": "32", "shift": "D",
             "corruptions": "C", "corrupted_share": "0.5", "fused": "", "clip": "tiny", "seed": "1",
             "clip_activation": "gelu", "bpe": "B", "prompts": "P"}
    others = {"dataset", "data_dir", "class_names", "amp", "device", "workers", "cache_dir"}
    assert {*flags, *others, "zero_shot"} == {x.name for x in dataclasses.fields(evaluate.Config)}
    for name, value in flags.items():
        line = [*mode.split(), *f"{command.flag(name)} {value}".split()]
        if name in MODES[mode].split() or command.flag(name) in mode.split():
            command.parse(evaluate.Config, "", line, evaluate.unread)
        else:
            with pytest.raises(ValueError, match=f"--run|{command.flag(name)}"):
                command.parse(evaluate.Config, "", line, evaluate.unread)

def test_zero_shot_is_by_each_template_and_all(tmp_path, few_shapes, clip_file, capsys):
    templates = ["a photo of a {}", "{} in the wild"]
    (tmp_path / "prompts.txt").write_text("\n".join(templates))
    own = config(clip=clip_file, prompts=str(tmp_path / "prompts.txt"), dataset="shapes",
                 cache_dir=str(tmp_path))
    table, names = evaluate.zero_shot(own)
    said = capsys.readouterr().err
    assert list(table) == ["all 2 templates", *templates] and names[0] in said and "4 %" in said
    test, clip = data.load_dataset("shapes", "", "test"), clip_model.load_clip(clip_file)
    with torch.no_grad():
        image = F.normalize(clip.encode_image(clip_model.preprocess(test.images, 32)), dim=1)
    text = clip_model.class_features(clip, clip_model.Tokenizer(), test.class_names, templates)
    for name, classes in zip(table, (F.normalize(text.mean(dim=1), dim=1), *text.unbind(1))):
        expected = 100 * metrics.top_k_accuracy(image @ classes.T, test.labels)
        assert table[name]["top1"] == pytest.approx(expected, abs=2)  # float16: ties fall otherwise

@pytest.mark.parametrize("number", [1e300, 12345678.9, math.nan, math.inf, 0.0, 43.21])
def test_aligned_never_lets_columns_run_together(number):
    row = {**dict.fromkeys(evaluate.COLUMNS, number), "images": 50000}
    header, *lines = evaluate.aligned({"x" * 30: row, "y": {**row, "images": 99}}, [])
    assert len(header) == len(lines[0]) == len(lines[1]) and "-" in lines[1].split()
    cells = [float(cell) for cell in lines[0].split()[1:]]
    assert cells == pytest.approx([50000, *[number] * 5], rel=0.05, nan_ok=True)

@pytest.mark.parametrize("flags, named", (
    ("--device nonsense", "--device"), ("--dataset cifar", "'cifar'"), ("--run nowhere", "nowhere"),
    ("--checkpoint x.pt", "--model")))
def test_job_refuses_a_wrong_command(flags, named):
    assert named in refused(lambda: evaluate.job(command.parse(evaluate.Config, "", flags.split())))
