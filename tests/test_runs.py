"""runs.py: what two runs must not share, and what another place does not change."""

import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import evaluate
import models
import teachers
import train
from support import files, keys, runs

ROOT = Path(__file__).resolve().parents[1]
WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361"]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # nothing has to outlast a power cut


def folder(root, classes=WNIDS[:2], first=0, n=8, size=32, test="val"):
    """Class folders of n one-coloured pictures each, whose names are the same whatever they show:
    the colours begin with number `first`."""
    for part in ("train", test):
        for k, name in enumerate(classes):
            place = root / part / name
            place.mkdir(parents=True)
            for i in range(n):
                colour = tuple((67 * (k + first + 1) * (j + 1) + 3 * i) % 256 for j in range(3))
                Image.new("RGB", (size, size), colour).save(place / f"{i}.png")
    return root


def small(place, **changes):
    """A run on class folders: resnet8 teaches resnet8, an epoch of batches of 8."""
    return train.Config(**{"dataset": "imagenet", "data_dir": str(place / "a"), "image_size": 32,
                           "student": "resnet8", "teacher": ("resnet8",), "method": "kd",
                           "epochs": 1, "batch_size": 8, "lr": 0.05, "workers": 0, "device": "cpu",
                           "cache_dir": str(place / "cache"), "out": str(place / "run"), **changes})


@pytest.fixture
def place(tmp_path):
    """a and b: the same names of files and classes, other pictures."""
    folder(tmp_path / "a")
    folder(tmp_path / "b", first=5)
    return tmp_path


def teacher_folders(place):
    return sorted(path.name for path in (place / "cache").glob("teacher-*"))


def student_digest(out):
    weights = files.read_own(Path(out) / "student.pt", "")["model"]
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def refused(config):
    with pytest.raises((ValueError, OSError)) as error:
        train.run(config)
    assert "\n" not in str(error.value).strip()
    return str(error.value)


# ---- Other data


def test_cached_teacher_is_of_the_same_pictures(place):
    """Two folders and one cache: the student of the second is as with a cache of its own."""
    train.run(small(place))
    train.run(small(place, data_dir=str(place / "b"), out=str(place / "shared")))
    assert len(teacher_folders(place)) == 2
    train.run(small(place, data_dir=str(place / "b"), out=str(place / "own"),
                    cache_dir=str(place / "another")))
    assert student_digest(place / "shared") == student_digest(place / "own")
    assert student_digest(place / "shared") != student_digest(place / "run")
    shutil.copytree(place / "a", place / "moved/to/a")
    train.run(small(place, data_dir=str(place / "moved/to/a"), out=str(place / "again")))
    assert len(teacher_folders(place)) == 2
    assert student_digest(place / "again") == student_digest(place / "run")


def test_cached_teacher_of_another_number_of_classes_is_another(place):
    train.run(small(place))
    folder(place / "three", WNIDS[:3])
    summary = train.run(small(place, data_dir=str(place / "three"), out=str(place / "three-run")))
    assert summary["teacher_accuracy"] is not None and len(teacher_folders(place)) == 2


def test_cached_teacher_is_the_same_by_whatever_names(place, clip_file):
    train.run(small(place))
    (place / "names.txt").write_text("tench\ngoldfish\n")
    named = small(place, class_names=str(place / "names.txt"), out=str(place / "named"))
    train.run(named)
    assert len(teacher_folders(place)) == 1
    student = files.read_own(place / "named/student.pt", "")
    assert student["class_names"] == ["tench", "goldfish"] and student["class_ids"] == WNIDS[:2]
    asked = dataclasses.replace(named, method="richkd", clip=clip_file, num_negatives=16,
                                out=str(place / "asked"))
    train.run(asked)
    (place / "names.txt").write_text("tench\nshark\n")
    train.run(named)  # finished: a run without CLIP depends on no names
    assert "other data in its train split: class 1 is 'goldfish' there and 'shark' here" in refused(
        asked)


@pytest.mark.parametrize("part", ["student.pt", "last.pt"])
def test_cached_teacher_that_is_damaged_is_trained_anew(place, part, capsys):
    train.run(small(place))
    teacher, = (place / "cache").glob("teacher-*")
    before = student_digest(teacher)
    if part == "last.pt":  # of a teacher that was interrupted
        (teacher / "summary.json").unlink()
    for size in (1000, 0):
        (teacher / part).write_bytes((teacher / part).read_bytes()[:size])
        capsys.readouterr()
        files.note.said.clear()
        train.run(small(place, out=str(place / f"anew{size}")))
        said = f"{teacher} is damaged: this teacher is trained anew"
        assert capsys.readouterr().err.count(said) == 1
        assert student_digest(teacher) == before
        if part == "last.pt":
            (teacher / "summary.json").unlink()
    assert student_digest(place / "anew0") == student_digest(place / "run")


@pytest.mark.parametrize("finished", [True, False])
def test_check_inputs_refuses_other_data(place, finished):
    config = small(place, method="scratch", epochs=2)
    whole = train.run(config)
    if not finished:
        (place / "run/summary.json").unlink()
    message = refused(dataclasses.replace(config, data_dir=str(place / "b")))
    assert message == (f"{place}/run holds a run with other data in its train split: other images "
                       "or labels; --out names another folder, --overwrite starts anew")
    folder(place / "c", WNIDS[2:])
    message = refused(dataclasses.replace(config, data_dir=str(place / "c")))
    assert "class 0 is 'n01440764' there and 'n01484850' here" in message
    folder(place / "d", n=6)
    message = refused(dataclasses.replace(config, data_dir=str(place / "d")))
    assert "16 images there, 12 here" in message
    # One picture of val/ is another one, of the same name and side.
    shutil.copytree(place / "a", place / "e")
    shutil.copy(place / "b/val" / WNIDS[0] / "0.png", place / "e/val" / WNIDS[0] / "0.png")
    message = refused(dataclasses.replace(config, data_dir=str(place / "e")))
    assert "other data in its test split: other images or labels" in message
    shutil.copytree(place / "a", place / "moved")
    again = train.run(dataclasses.replace(config, data_dir=str(place / "moved")))
    assert again["accuracies"] == whole["accuracies"]
    anew = dataclasses.replace(config, data_dir=str(place / "b"), overwrite=True)
    assert train.run(anew)["epochs"] == 2
    there = files.read_own(place / "run/config.json", "")["inputs"]["data"]["train"]
    assert there == keys.identity(data.load_dataset("imagenet", place / "b", "train"))


def test_run_whose_data_is_gone_is_not_taken_for_the_same(place):
    config = small(place, method="scratch")
    train.run(config)
    shutil.move(place / "a", place / "gone")
    message = refused(config)
    assert message.startswith(f"{place}/run holds a finished run, but what it depends on cannot be "
                              f"compared: {place}/a is no folder")


def test_check_inputs_refuses_a_run_that_noted_none(place):
    config = small(place, method="scratch")
    train.run(config)
    about = files.read_own(place / "run/config.json", "")
    del about["inputs"]
    files.write_json(place / "run/config.json", about)
    assert "holds a run of an earlier version, which did not note its data" in refused(config)


# ---- Other files


@pytest.fixture
def rich(place, clip_file):
    """A finished run that names a teacher's, CLIP's and a prompts file."""
    torch.manual_seed(0)
    torch.save(models.build_model("resnet8", 2).state_dict(), place / "teacher.pt")
    shutil.copy(clip_file, place / "clip.pt")
    (place / "prompts.txt").write_text("a photo of a {}\n{} at sea\n")
    config = small(place, method="richkd", teacher_weights=(str(place / "teacher.pt"),),
                   clip=str(place / "clip.pt"), prompts=str(place / "prompts.txt"),
                   num_negatives=16)
    train.run(config)
    return config


def test_check_inputs_refuses_other_files_of_the_same_name(rich, place):
    for name in ("teacher.pt", "clip.pt", "prompts.txt"):
        (place / "elsewhere").mkdir(exist_ok=True)
        shutil.copy(place / name, place / "elsewhere" / name)
    elsewhere = dataclasses.replace(
        rich, teacher_weights=(str(place / "elsewhere/teacher.pt"),),
        clip=str(place / "elsewhere/clip.pt"), prompts=str(place / "elsewhere/prompts.txt"))
    summary = files.read_own(place / "run/summary.json", "")
    assert train.run(elsewhere) == summary
    with open(place / "prompts.txt", "a") as file:
        file.write("\n# no template\n")
    assert train.run(rich) == summary

    with open(place / "prompts.txt", "a") as file:
        file.write("a sketch of a {}\n")
    assert f"holds a run with other content of --prompts {place}/prompts.txt; --out" in refused(
        rich)
    default = dataclasses.replace(elsewhere, prompts=None)
    assert f"with --prompts {place}/prompts.txt there, None here; --out" in refused(default)
    state = torch.load(place / "teacher.pt", weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, place / "teacher.pt")
    other = dataclasses.replace(elsewhere, teacher_weights=rich.teacher_weights)
    assert f"other content of --teacher-weights ['{place}/teacher.pt']" in refused(other)
    content = files.read_own(place / "clip.pt", "")["model"]
    content["logit_scale"] = content["logit_scale"] + 1
    files.save(place / "clip.pt", {"model": content})
    other = dataclasses.replace(elsewhere, clip=rich.clip)
    assert f"with other content of --clip {place}/clip.pt;" in refused(other)
    (place / "bpe.txt").write_text("a b\n")
    assert "with --bpe None there, " in refused(dataclasses.replace(
        elsewhere, bpe=str(place / "bpe.txt")))


def test_inputs_are_those_that_a_method_reads(rich, place):
    def names(**changes):
        config = train.resolve(dataclasses.replace(rich, **changes))
        return runs.inputs(config, {})["files"].keys()

    assert names() == {"teacher_weights", "clip", "prompts", "bpe"}
    assert names(method="kd") == {"teacher_weights"} and names(method="scratch") == set()
    assert names(alpha=0.0, lam=0.0) == {"clip", "prompts", "bpe"}
    assert names(teacher_weights=None) == {"clip", "prompts", "bpe"}
    for changes in ({"method": "kd", "prompts": "missing"}, {"method": "kd", "bpe": "missing"},
                    {"method": "scratch", "teacher_weights": ("missing",)}):
        assert runs.settings(train.resolve(dataclasses.replace(rich, **changes)))
        assert names(**changes) is not None
    tiny = train.resolve(dataclasses.replace(rich, clip="tiny"))
    assert runs.inputs(tiny, {})["files"]["clip"] == "tiny"


# ---- What a checkpoint says of itself


@pytest.fixture
def student(place):
    """The student.pt of a run on a."""
    train.run(small(place, method="scratch", out=str(place / "teacher")))
    return place / "teacher/student.pt"


def test_given_teacher_of_other_classes_is_refused(student, place):
    config = small(place, teacher_weights=(str(student),))
    train.run(config)
    folder(place / "c", WNIDS[2:])
    other = dataclasses.replace(config, data_dir=str(place / "c"), out=str(place / "c-run"))
    assert refused(other) == (f"{student} knows other classes: class 0 is 'n01440764' there and "
                              "'n01484850' here")
    # In another order, too; and where an older file has the names alone.
    about = files.read_own(student, "")
    files.save(student, {**about, "class_ids": about["class_ids"][::-1]})
    swapped = dataclasses.replace(config, out=str(place / "swapped"))
    assert "class 0 is 'n01443537' there and 'n01440764' here" in refused(swapped)
    del about["class_ids"]
    files.save(student, {**about, "class_names": ["tench", "shark"]})
    (place / "a/words.txt").write_text("n01440764\ttench\nn01443537\tgoldfish\n")
    assert "class 1 is 'shark' there and 'goldfish' here" in refused(swapped)
    for names in (["tench", "goldfish"], WNIDS[:2]):  # both are what the data set calls them
        files.save(student, {**about, "class_names": names})
        train.run(dataclasses.replace(swapped, overwrite=True))
    files.save(student, {**about, "class_ids": 3})
    message = refused(dataclasses.replace(swapped, overwrite=True))
    assert message == f"{student} is damaged; expected what train.py leaves"
    assert not Path(place / "c-run").exists()


def test_given_teacher_reads_images_as_it_was_trained(student, place):
    """By its own mean and std, whatever those of the data set here are."""
    config = train.resolve(small(place, teacher_weights=(str(student),)))
    split = runs.load_split(config, "test")
    images = torch.stack([train.resized(split, 32, config).images[i, None][0] for i in (0, 9)])
    about, info = files.read_own(student, ""), data.DATASETS["imagenet"]
    inputs = data.to_input(images, 32, info.mean, info.std)
    plain = models.load_weights("resnet8", student)
    for mean, std in ((info.mean, info.std), ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))):
        files.save(student, {**about, "mean": list(mean), "std": list(std)})
        teacher = teachers.given_teacher(config, "resnet8", str(student), split)
        assert isinstance(teacher, teachers.OwnInput) == (mean != info.mean)
        with torch.no_grad():
            expected = plain(data.normalize(images, mean, std))
            torch.testing.assert_close(teacher(inputs), expected, rtol=1e-4, atol=1e-4)
        assert teacher.num_features == 64
    files.save(student, {**about, "image_size": 64})
    with pytest.raises(ValueError, match="reads images of 64 x 64, here they are of 32: --image-s"):
        teachers.given_teacher(config, "resnet8", str(student), split)
    torch.save(about["model"], student)  # a file that says nothing: the data set's mean and std
    assert not isinstance(teachers.given_teacher(config, "resnet8", str(student), split),
                          teachers.OwnInput)


def test_load_splits_of_a_holdout_needs_no_test_images_and_says_what_it_lacks(tmp_path, capsys):
    folder(tmp_path / "few", n=10)
    shutil.rmtree(tmp_path / "few/val")
    for i in range(2, 10):
        (tmp_path / f"few/train/{WNIDS[1]}/{i}.png").unlink()
    splits = runs.load_splits(small(tmp_path, data_dir=str(tmp_path / "few"), holdout=0.2))
    assert splits["test"].labels.tolist() == [0, 0] and len(splits["train"].labels) == 10
    assert (f"--holdout has no image of 1 of the 2 classes of the training images: {WNIDS[1]}"
            in capsys.readouterr().err)


def test_load_run_has_no_accuracies_of_other_images_than_it_is_evaluated_on(place, capsys):
    config = small(place, holdout=0.3)
    train.run(config)
    report, = evaluate.evaluate(evaluate.Config(run=(config.out,), device="cpu", workers=0,
                                                cache_dir=config.cache_dir))
    assert report["teachers"] == {"teacher": {}}
    assert "was tested on another test split while training" in capsys.readouterr().err


# ---- What is refused leaves nothing behind


@pytest.mark.parametrize("changes, message", [
    ({"data_dir": "nowhere"}, "nowhere is no folder"),
    ({"teacher_weights": ("missing.pth",)}, "missing.pth"),
    ({"teacher_weights": ("resnet14.pt",)}, "does not fit resnet8"),
    ({"prompts": "missing.txt"}, "missing.txt"),
    ({"prompts": "empty.txt"}, "empty.txt:1: expected a template"),
    ({"bpe": "missing.gz"}, "missing.gz"),
    ({"clip": "missing.pt"}, "missing.pt"),
    ({"clip": "resnet14.pt"}, "resnet14.pt"),
    ({"class_names": "missing.txt"}, "missing.txt"),
    ({"class_names": "empty.txt"}, "empty.txt has 0 names"),
    ({"student": "resnet9"}, "unknown model"),
    ({"holdout": 0.01}, "no image lies between the shares 0.99 and 1 of any class"),
    ({"ce_weight": 0.0, "logit_weight": 0.0, "feature_weight": 0.0}, "--feature-weight: all are 0"),
    ({"teacher_shares": (0.0,)}, "--teacher-shares (0.0,): expected none below 0 and one above"),
    ({"out": "empty.txt/run"}, "empty.txt is no folder; expected one, or a name for a new one"),
    ({"data_dir": "one"}, "one: 1 training images; expected at least 2"),
    ({"device": "gpu"}, "--device gpu"),
])
def test_begin_run_is_after_all_that_can_be_refused(place, clip_file, monkeypatch, changes,
                                                    message):
    """No run folder, and with --overwrite nothing of the run that is there is lost."""
    monkeypatch.chdir(place)
    torch.save(models.build_model("resnet14", 2).state_dict(), "resnet14.pt")
    Path("empty.txt").write_text("")
    folder(place / "one", WNIDS[:1], n=1)
    config = small(place, method="richkd", clip=clip_file, num_negatives=16)
    wrong = dataclasses.replace(config, **changes)
    before = {path.name for path in place.iterdir()} | {"cache"}
    assert message in refused(wrong)
    assert {path.name for path in place.iterdir()} <= before
    assert not teacher_folders(place)  # refused before a teacher is trained
    Path("run").mkdir()
    for name in ("config.json", "last.pt", "student.pt", "summary.json", "log.csv"):
        Path("run", name).write_text("precious")
    assert message in refused(dataclasses.replace(wrong, overwrite=True))
    assert {path.read_text() for path in Path("run").iterdir()} == {"precious"}


# ---- Signals


def stream_command(place, out):
    config = small(place, method="scratch", epochs=6, workers=2, out=str(out))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(config).items()
             if value != getattr(train.Config(), name) and not isinstance(value, tuple)]
    return [sys.executable, str(ROOT / "train.py"), *flags]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_run_whose_whole_process_group_is_told_to_stop(tmp_path):
    """As `timeout`, docker and clusters do while images stream: the loader's workers get SIGTERM,
    too. The epoch is kept, and the same command goes on from it to the same bits."""
    folder(tmp_path / "a", n=20)
    out = tmp_path / "group"
    process = subprocess.Popen(stream_command(tmp_path, out), start_new_session=True, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in said, said
    kept = len(files.read_own(out / "last.pt", "")["log"])
    assert said.splitlines()[-1] == (f"interrupted; {out} keeps epoch {kept} of 6; the same "
                                     "command goes on")
    for name in ("group", "whole"):
        subprocess.run(stream_command(tmp_path, tmp_path / name), capture_output=True, check=True)
    assert student_digest(out) == student_digest(tmp_path / "whole")


def test_help_is_there_without_a_home():
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("HOME", "RICHKD_CACHE")}
    code = ("import pathlib, os.path, sys\n"
            "def none(*_): raise RuntimeError('no home')\n"
            "pathlib.Path.home = none\n"
            "os.path.expanduser = lambda path: path\n"
            "import train, evaluate; from support import command\n"
            "command.parse(train.Config, '', ['--help'])\n")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True, cwd=ROOT)
    assert done.returncode == 0 and "--cache-dir" in done.stdout, done.stderr
