"""runs.py: what two runs must not share, and what another place does not change."""

import data
import evaluate
import models
import os
import pytest
import shutil
import signal
import subprocess
import sys
import time
import torch
import train
from dataclasses import replace as with_
from helpers import ROOT, WNIDS, class_folders, equal, refused, script, small, weights, write_files
from pathlib import Path
from PIL import Image
from support import checkpoints, files, folders, runs

def some_split(**change):
    images = torch.arange(4 * 3 * 6 * 8).view(4, 3, 6, 8).to(torch.uint8)
    return data.Split(images, torch.tensor([0, 1, 1, 0]), ["cat", "dog"])._replace(**change)

def test_identity_of_tensors_tells_them_apart():
    images = some_split().images
    changed = images.clone()
    changed[3, 2, 5, 7] += 1
    splits = [some_split(), some_split(images=changed), some_split(images=images.view(4, 3, 8, 6)),
              some_split(images=images.flip(0)), some_split(labels=torch.tensor([1, 0, 0, 1])),
              some_split(class_names=["cat", "fox"]), some_split(class_ids=["n1", "n2"]),
              some_split(images=images[:3], labels=torch.tensor([0, 1, 1]))]
    found = [runs.identity(split) for split in splits]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert runs.difference(one, other) and one != other
    same = some_split(images=images.clone(memory_format=torch.channels_last))
    assert runs.identity(same) == found[0] and runs.difference(found[0], found[0]) is None

def test_identity_of_a_stream_is_its_pictures(tmp_path):
    """Pictures of one size in bytes, too, as plain PNGs have; but not where they lie."""
    def identity():
        return runs.identity(some_split(labels=torch.arange(6) % 2, images=data.Stream(paths)))
    class_folders(tmp_path / "here", n=3, parts=["train"])
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    paths = sorted(map(str, tmp_path.glob("there/**/*.png")))
    found = [identity()]
    paths = [path.replace("there", "here") for path in paths]
    assert identity() == found[0]
    first, second = map(Path, paths[:2])
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    found.append(identity())
    image = Image.open(first)
    image.putpixel((16, 16), (255, 0, 0))  # one in the middle
    image.save(first)
    found.append(identity())
    paths[0] = str(first.rename(first.with_name("other.png")))
    found.append(identity())
    Image.new("RGB", (32, 32), (1, 2, 3)).save(paths[0])
    found.append(identity())
    assert len({one["content"] for one in found}) == 5

@pytest.mark.parametrize("suffix", folders.SUFFIXES)
def test_digest_files_notices_a_pixel_in_a_picture_of_every_format(suffix, tmp_path):
    """Of one size in bytes, with the change far from the end, as uncompressed formats allow."""
    path, digests = tmp_path / f"x{suffix}", []
    for colour in (0, 255):
        image = Image.new("RGB", (64, 64))
        image.putpixel((30, 60 if suffix == ".bmp" else 3), (colour, colour, colour))
        image.convert("L" if suffix == ".pgm" else "RGB").save(path)
        digests.append(runs.digest_files([path]))
    assert len({*digests}) == 2

def test_digest_files_of_names_that_are_no_utf8(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    Image.new("RGB", (4, 4)).save(os.fsdecode(path), "PNG")
    assert len(runs.digest_files([os.fsdecode(path)])) == 64

def test_cached_is_made_once_and_anew_for_another_key_or_damage(tmp_path, capsys):
    made = []
    def read(key):
        numbers, ones = runs.cached(tmp_path / "deep/numbers", key, lambda: made.append(1) or (
            torch.arange(6).view(3, 2).half(), torch.ones(3)))
        assert numbers.tolist() == [[0, 1], [2, 3], [4, 5]] and ones.tolist() == [1, 1, 1]
        return len(made)
    assert [read({"a": 1}), read({"a": 1}), read({"a": 2}), read({"a": 1})] == [1, 1, 2, 2]
    assert not capsys.readouterr().err
    one, two = sorted((tmp_path / "deep").iterdir())
    whole = one.read_bytes()
    for number, damaged in enumerate((two.read_bytes(), whole[:-1000], whole[:100], b""), 3):
        one.write_bytes(damaged)
        assert max(read({"a": 1}), read({"a": 2})) == number
        assert one.name in capsys.readouterr().err or number == 3
        files.note.cache_clear()

@pytest.fixture
def place(tmp_path):
    """a and b: the same names of files and classes, other pictures."""
    class_folders(tmp_path / "a")
    class_folders(tmp_path / "b", first=5)
    return tmp_path

def test_trained_teacher_is_of_the_same_pictures(place):
    """Two folders and one cache: the student of the second is as with a cache of its own."""
    train.run(small(place))
    train.run(small(place, data_dir=str(place / "b"), out=str(place / "shared")))
    assert len([*place.glob("cache/teacher-*")]) == 2
    train.run(small(place, data_dir=str(place / "b"), out=str(place / "own"),
                    cache_dir=str(place / "another")))
    assert equal(weights(place / "shared"), weights(place / "own"))
    assert not equal(weights(place / "shared"), weights(place / "run"))
    shutil.copytree(place / "a", place / "moved/to/a")
    train.run(small(place, data_dir=str(place / "moved/to/a"), out=str(place / "again")))
    assert len([*place.glob("cache/teacher-*")]) == 2
    assert equal(weights(place / "again"), weights(place / "run"))

def test_trained_teacher_is_the_same_by_whatever_names(place, clip_file):
    train.run(small(place))
    (place / "names.txt").write_text("tench\ngoldfish\n")
    named = small(place, class_names=str(place / "names.txt"), out=str(place / "named"))
    train.run(named)
    assert len([*place.glob("cache/teacher-*")]) == 1
    student = checkpoints.read_own(place / "named/student.pt", "")
    assert student["class_names"] == ["tench", "goldfish"] and student["class_ids"] == WNIDS[:2]
    asked = with_(named, method="richkd", clip=clip_file, num_negatives=9, out=str(place / "asked"))
    train.run(asked)
    (place / "names.txt").write_text("tench\nshark\n")
    train.run(named)  # finished: a run without CLIP depends on no names
    assert "'goldfish'" in refused(train.run, asked)

@pytest.mark.parametrize("finished", [True, False])
def test_open_run_refuses_other_data_and_settings(place, finished):
    config = small(place, method="scratch", epochs=2)
    whole = train.run(config)
    if not finished:
        (place / "run/summary.json").unlink()
    assert f"{place}/run" in refused(train.run, with_(config, data_dir=str(place / "b")))
    assert "--lr is 0.05 there and 0.1 here" in refused(train.run, with_(config, lr=0.1))
    class_folders(place / "c", WNIDS[2:])
    assert "n01484850" in refused(train.run, with_(config, data_dir=str(place / "c")))
    # One picture of val/ is another one, of the same name and side.
    shutil.copytree(place / "a", place / "e")
    shutil.copy(place / "b/val" / WNIDS[0] / "0.png", place / "e/val" / WNIDS[0] / "0.png")
    assert "test split" in refused(train.run, with_(config, data_dir=str(place / "e")))
    shutil.copytree(place / "a", place / "moved")
    again = train.run(with_(config, data_dir=str(place / "moved")))
    assert again["accuracies"] == whole["accuracies"]
    anew = with_(config, data_dir=str(place / "b"), overwrite=True)
    assert train.run(anew)["epochs"] == 2
    there = files.read_json(place / "run/config.json", "")["inputs"]["data"]["train"]
    assert there == runs.identity(data.load_dataset("imagenet", place / "b", "train"))
    shutil.move(place / "b", place / "gone")
    assert f"{place}/b" in refused(train.run, with_(anew, overwrite=False))

@pytest.fixture
def rich(place, clip_file):
    """A finished run that names a teacher's, CLIP's and a prompts file."""
    given = write_files(place / "given", {
        "prompts.txt": b"a photo of a {}\n{} at sea\n", "clip.pt": Path(clip_file).read_bytes()})
    torch.save(models.build_model("resnet8", 2).state_dict(), given / "teacher.pt")
    config = small(place, method="richkd", teacher_weights=(str(given / "teacher.pt"),),
                   clip=str(given / "clip.pt"), prompts=str(given / "prompts.txt"),
                   num_negatives=16)
    train.run(config)
    return config

def test_open_run_refuses_other_files_of_the_same_name(rich, place):
    shutil.copytree(place / "given", place / "elsewhere")
    away = str(place / "elsewhere")
    elsewhere = with_(rich, teacher_weights=(f"{away}/teacher.pt",), clip=f"{away}/clip.pt",
                      prompts=f"{away}/prompts.txt")
    summary = files.read_json(place / "run/summary.json", "")
    assert train.run(elsewhere) == summary
    with open(place / "given/prompts.txt", "a") as file:
        file.write("\n# no template\n")
    assert train.run(rich) == summary
    with open(place / "given/prompts.txt", "a") as file:
        file.write("a sketch of a {}\n")
    assert "--prompts" in refused(train.run, rich)
    assert "--prompts" in refused(train.run, with_(elsewhere, prompts=None))
    state = torch.load(place / "given/teacher.pt", weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, place / "given/teacher.pt")
    other = with_(elsewhere, teacher_weights=rich.teacher_weights)
    assert "--teacher-weights" in refused(train.run, other)
    content = checkpoints.read_own(place / "given/clip.pt", "")["model"]
    content["logit_scale"] = content["logit_scale"] + 1
    files.save(place / "given/clip.pt", {"model": content})
    assert "--clip" in refused(train.run, with_(elsewhere, clip=rich.clip))
    (place / "bpe.txt").write_text("a b\n")
    assert "--bpe" in refused(train.run, with_(elsewhere, bpe=str(place / "bpe.txt")))

def test_inputs_are_those_that_a_method_reads(rich):
    def names(**changes):
        config = train.resolve(with_(rich, **changes))
        return train.about_run(config, {})["inputs"]["files"].keys()
    assert names() == {"teacher_weights", "clip", "prompts", "bpe"}
    assert names(alpha=0.0, lam=0.0) == {"clip", "prompts", "bpe"}
    assert names(teacher_weights=None) == {"clip", "prompts", "bpe"}
    assert names(method="kd", prompts="missing", bpe="missing") == {"teacher_weights"}
    assert names(method="scratch", teacher_weights=("missing",)) == set()
    tiny = train.resolve(with_(rich, clip="tiny"))
    assert train.about_run(tiny, {})["inputs"]["files"]["clip"] == "tiny"

def test_load_teachers_compares_what_a_checkpoint_says_of_itself(place):
    student = place / "teacher/student.pt"
    train.run(small(place, method="scratch", out=str(place / "teacher")))
    config = small(place, teacher_weights=(str(student),))
    train.run(config)
    class_folders(place / "c", WNIDS[2:])
    other = with_(config, data_dir=str(place / "c"), out=str(place / "c-run"))
    assert str(student) in refused(train.run, other) and not (place / "c-run").exists()
    # In another order, too; and where a file has the names alone.
    about = checkpoints.read_own(student, "")
    again = with_(config, overwrite=True)
    files.save(student, {**about, "class_ids": about["class_ids"][::-1]})
    assert "'n01443537' there" in refused(train.run, again)
    del about["class_ids"]
    files.save(student, {**about, "class_names": ["tench", "shark"]})
    (place / "a/words.txt").write_text("n01440764\ttench\nn01443537\tgoldfish\n")
    assert "'shark' there" in refused(train.run, again)
    for names in (["tench", "goldfish"], WNIDS[:2]):  # both are what the data set calls them
        files.save(student, {**about, "class_names": names})
        train.run(again)
    for change in ({"class_ids": 3}, {"mean": [0.5, 0.4, 0.3]}, {"std": [0.2, 0.25, 0.3]},
                   {"image_size": 64}):
        files.save(student, {**about, "class_names": WNIDS[:2], **change})
        assert str(student) in refused(train.run, again)
    torch.save(about["model"], student)  # a file that says nothing: the data set's mean and std
    train.run(again)

@pytest.mark.parametrize("changes, named", [
    ({"dataset": "mnist"}, "--dataset 'mnist'"), ({"method": "magic"}, "--method 'magic'"),
    ({"student": "resnet9"}, "resnet9"), ({"teacher": ("resnet9",)}, "resnet9"),
    ({"alpha": 1.5}, "--alpha 1.5"), ({"lam": -0.1}, "--lam -0.1"),
    ({"temperature": 0.0}, "--temperature 0.0"), ({"epochs": 0}, "--epochs 0"),
    ({"method": "kd", "alpha": 0.5}, "--alpha 0.5 does not go with --method kd"),
    ({"ce_weight": 0.0, "logit_weight": 0.0, "feature_weight": 0.0}, "--feature-weight"),
    ({"logit_loss": "mse"}, "--logit-loss 'mse'"), ({"device": "gpu"}, "--device gpu"),
    ({"data_dir": "nowhere"}, "nowhere"), ({"data_dir": "one"}, "one"),
    ({"holdout": 0.01}, "0.99"), ({"teacher_weights": ("a", "b")}, "--teacher-weights"),
    *(({"teacher_weights": (x,)}, x) for x in ("missing.pth", "resnet14.pt", "seven.pt")),
    *(({"clip": name}, name) for name in ("ViT-B/64", "missing.pt", "resnet14.pt")),
    *(({name: file}, file) for name in ("prompts", "class_names") for file in (
        "missing.txt", "empty.txt")),
    ({"bpe": "missing.gz"}, "missing.gz"), ({"out": "empty.txt/run"}, "empty.txt"),
    ({"out": "a"}, "a is not empty"), ({"teacher": ("resnet14",) * 2}, "--teacher")])
def test_begin_run_is_after_all_that_can_be_refused(place, clip_file, monkeypatch, changes, named):
    """No run folder, and with --overwrite nothing of the run that is there is lost."""
    monkeypatch.chdir(place)
    for path, name, classes in (("resnet14.pt", "resnet14", 2), ("seven.pt", "resnet8", 7)):
        torch.save(models.build_model(name, classes).state_dict(), path)
    Path("empty.txt").write_text("")
    class_folders(place / "one", WNIDS[:1], n=1)
    wrong = small(place, **{"method": "richkd", "clip": clip_file, "num_negatives": 16, **changes})
    before = {*place.rglob("*")}
    assert named in refused(train.run, wrong)
    assert {*place.rglob("*")} - before <= {place / "cache"}  # refused before a teacher is trained
    Path("run").mkdir()
    for name in ("config.json", "last.pt", "student.pt", "summary.json", "log.csv"):
        Path("run", name).write_text("precious")
    assert named in refused(train.run, with_(wrong, overwrite=True))
    assert {path.read_text() for path in Path("run").iterdir()} == {"precious"}
    assert {*place.rglob("*")} >= before

def test_run_folder_is_another_one_for_whatever_changes_the_result(place, monkeypatch, capsys):
    """And the same one for what does not; each then finds its own run."""
    monkeypatch.chdir(place)
    base = small(place, method="scratch", out=None)
    class_folders(place / "c", WNIDS[2:])
    changes = [{}, {"lr": 0.01}, {"epochs": 2}, {"fraction": 0.5}, {"ce_weight": 2.0}, {"seed": 1},
               {"data_dir": "b"}, {"data_dir": str(place / "c")}, {"holdout": 0.25}]
    for change in changes:
        train.run(with_(base, **change))
    folders_ = sorted(Path("runs").iterdir())
    assert len(folders_) == len(changes) and "test split" in capsys.readouterr().err  # a copy
    assert {files.read_json(folder / "config.json", "")["places"]["data_dir"]
            for folder in folders_} == {str(place / name) for name in "abc"}
    shutil.copytree(place / "a", place / "moved")
    for change in ({"data_dir": str(place / "moved")}, {"workers": 1}, {"no_graph": True}):
        train.run(with_(base, **change))
    assert sorted(Path("runs").iterdir()) == folders_

def test_restore_names_a_checkpoint_or_config_that_is_damaged_or_another_runs(place):
    one, two = (small(place, method="scratch", lr=lr, out=str(place / str(lr))) for lr in (.1, .2))
    train.run(one)
    train.run(two)
    (place / "0.2/summary.json").unlink()
    other = (place / "0.1/last.pt").read_bytes()
    for name, content in (("config.json", b"{"), ("last.pt", b"PK"), ("last.pt", other)):
        whole = (place / "0.2" / name).read_bytes()
        (place / "0.2" / name).write_bytes(content)
        assert f"0.2/{name}" in refused(train.run, two)
        (place / "0.2" / name).write_bytes(whole)
    shutil.copy(place / "0.1/student.pt", place / "0.2/student.pt")
    own = evaluate.Config(run=str(place / "0.2"), workers=0, device="cpu")
    assert "0.2/student.pt" in refused(evaluate.evaluate, own)

@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="signals of POSIX")
def test_alone_refuses_a_folder_in_which_another_process_trains(place, monkeypatch):
    """Of any settings, wherever that process has been stopped; afterwards the folder is free."""
    config = small(place, method="scratch")
    script(place / "stopped.py", f"""
import os, signal, torch, train
torch.set_num_threads({torch.get_num_threads()})
def stop(*_):
    os.kill(os.getpid(), signal.SIGSTOP)
    replace(*_)
replace, os.replace = os.replace, stop
train.run(train.Config(**{vars(config)!r}))
""")
    process = subprocess.Popen([sys.executable, place / "stopped.py"], stderr=subprocess.DEVNULL)
    for _ in range(5):  # config.json, log.csv, last.pt, student.pt, summary.json
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        for other in (config, with_(config, lr=0.2), with_(config, overwrite=True)):
            assert f"{place}/run" in refused(train.run, other)
        os.kill(process.pid, signal.SIGCONT)
    assert process.wait(60) == 0
    whole = weights(place / "run")
    train.run(with_(config, out=str(place / "own")))
    assert equal(weights(place / "own"), whole)
    assert {path.name for path in (place / "run").iterdir()} == {
        "config.json", "last.pt", "student.pt", "summary.json", "log.csv"}

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
    class_folders(tmp_path / "a", n=20)
    out = tmp_path / "group"
    process = subprocess.Popen(stream_command(tmp_path, out), start_new_session=True, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said  # a worker that has just been forked may say more
    assert len(checkpoints.read_own(out / "last.pt", "")["log"]) < 6
    assert "\ninterrupted" in said
    for name in ("group", "whole"):
        subprocess.run(stream_command(tmp_path, tmp_path / name), capture_output=True, check=True)
    assert equal(weights(out), weights(tmp_path / "whole"))

def test_summary_table_says_where_fusing_does_harm():
    top1 = {"clip": 80.0, "teacher": 40.0, "fused": 70.0, "student": 50.0}
    summary = {"clip": "ViT-L/14", "teacher": "resnet8", "student": "resnet8", "method": "richkd",
               "accuracies": {who: {"test": x} for who, x in top1.items()},
               **{f"{who}_accuracy": x for who, x in top1.items()}}
    *_, harm, command, where = runs.summary_table("here", summary).splitlines()
    assert "ViT-L/14" in harm and command == "python study/fusion.py here" and "here/" in where
    summary["fused_accuracy"] = 81.0
    assert "fusion.py" not in runs.summary_table("here", summary)
