"""train.py: complete runs, resuming, the methods, CLIP's targets, and what wrong input says."""

import clip_model
import csv
import data
import dataclasses
import evaluate
import json
import metrics
import models
import os
import pytest
import re
import richkd
import socket
import subprocess
import sys
import time
import torch
import train
from dataclasses import replace as with_
from helpers import equal, logits_of, python, script, weights
from pathlib import Path
from support import checkpoints, command, files, runs, shapes
from torch.nn.functional import normalize
from unittest.mock import Mock

FILES = {"config.json", "log.csv", "last.pt", "student.pt", "summary.json"}
pytestmark = pytest.mark.usefixtures("few_shapes")

@pytest.fixture
def config(clip_file, teacher_file, tmp_path):
    """RichKD (L+F), two epochs; CLIP's targets are cached for the whole module."""
    return train.Config(teacher=("resnet8",), teacher_weights=(teacher_file,), student="resnet8",
                        clip=clip_file, epochs=2, num_negatives=64, out=str(tmp_path / "run"),
                        cache_dir=str(Path(teacher_file).with_name("cache")), device="cpu")

# A run --------------------------------------------------------------------------------------------
def test_run_leaves_its_folder_complete(config, capsys):
    summary = train.run(config)
    out = Path(config.out)
    assert {path.name for path in out.iterdir()} == FILES
    assert summary == files.read_json(out / "summary.json", "")
    for key in ("dataset", "method", "teacher", "student", "seed", "epochs", "student_accuracy",
                "teacher_accuracy", "clip_accuracy", "fused_accuracy", "shift_accuracy",
                "images_per_second", "seconds"):
        assert summary[key] is not None, key
    with open(out / "log.csv") as file:
        log = list(csv.DictReader(file))
    assert [row["epoch"] for row in log] == ["1", "2"]
    assert float(log[-1]["test_accuracy"]) == summary["student_accuracy"]  # the last, not the best
    parts = [float(log[0][part]) for part in ("ce", "logit", "feature")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(float(log[0]["loss"]), rel=1e-5)
    about = files.read_json(out / "config.json", "")
    assert about["settings"]["alpha"] == 0.7 and about["torch"] == torch.__version__
    student = checkpoints.read_own(out / "student.pt", "")
    assert student["model_name"] == "resnet8"
    assert len(student["class_names"]) == len(student["model"]["fc.bias"])

    # its accuracies are those of the weights it leaves
    test = data.load_dataset("shapes", "", "test")
    top1 = metrics.top_k_accuracy(logits_of(out, test.images), test.labels)
    assert 100 * top1 == summary["student_accuracy"]

    # the same command on a finished run computes nothing
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert train.run(config) == summary and config.out in capsys.readouterr().err
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    table = runs.summary_table(out, summary).splitlines()
    assert len(table) == 6 and table[1].startswith("CLIP zero-shot (clip.pt) ")
    assert str(out) in table[-1]

def test_run_with_alpha_one_is_plain_distillation_to_the_bit(config):
    train.run(with_(config, method="kd"))
    train.run(with_(config, method="richkd-l", alpha=1.0, out=config.out + "-l"))
    assert equal(weights(config.out), weights(config.out + "-l"))

# Each numbered equation of richkd.py, and a method whose run uses its function.
EQUATIONS = {1: ("ensemble_text_features", {}), 2: ("zero_shot_logits", {}),
             3: ("fuse_logits", {"method": "richkd-l"}), 4: ("fuse_features", {}),
             5: ("kd_loss", {"method": "kd"}), 6: ("nce_loss", {"method": "crd"}),
             7: ("RichKD", {"method": "scratch"}), 8: ("standardize_logits", {"method": "kd-ls"}),
             9: ("dkd_loss", {"method": "dkd"}), 10: ("mlkd_loss", {"method": "mlkd"})}

class Called(Exception):
    """Where a function is replaced by one that raises it."""

@pytest.mark.parametrize("number", EQUATIONS)
def test_run_uses_the_function_that_bears_an_equations_number(config, number, monkeypatch):
    name, changes = EQUATIONS[number]
    assert f"quation ({number})" in getattr(richkd, name).__doc__
    monkeypatch.setattr(richkd, name, Mock(side_effect=Called))
    if number < 3:  # CLIP's targets are not in the cache, so that they are computed
        config = with_(config, cache_dir=config.out + "-cache")
        with pytest.raises(Called):
            evaluate.zero_shot(evaluate.Config(clip=config.clip, cache_dir=config.cache_dir,
                                               device="cpu", zero_shot=True))
    with pytest.raises(Called):
        train.run(with_(config, epochs=1, **changes))

def test_equations_are_all_tested():
    assert {*map(int, re.findall(r"\((\d\d?)\)", richkd.__doc__))} == set(EQUATIONS)

# Settings -----------------------------------------------------------------------------------------
def test_resolve_lets_methods_differ_in_their_loss_alone(config):
    scratch = runs.settings(train.resolve(with_(config, method="scratch")))
    for method, fixed in train.METHODS.items():
        own = runs.settings(train.resolve(with_(config, method=method)))
        differ = {name for name in own if own[name] != scratch[name]}
        teachers = {"teacher", "teacher_weights", "clip"}
        assert differ <= {*fixed, *train.METHODS["scratch"], "method", *teachers}, method

def test_resolve_reads_resnet18_and_resnet50_by_the_images_side(config, capsys):
    def names(size, **changes):
        own = train.resolve(with_(config, dataset="imagenet", image_size=size, **changes))
        return own.student, *own.teacher

    free = {"teacher": ("resnet50", "resnet18"), "teacher_weights": None, "student": "resnet18"}
    assert names(64, **free) == ("resnet18_cifar", "resnet50", "resnet18_cifar")
    assert "resnet18_cifar" in capsys.readouterr().err
    assert names(65, **free) == names(224, **free) == ("resnet18", "resnet50_imagenet", "resnet18")
    given = {**free, "teacher_weights": ("a.pth", "b.pth")}  # of which the files decide
    assert names(64, **given) == ("resnet18_cifar", "resnet50", "resnet18")

def test_learning_rate_is_the_papers_schedule():
    cifar, imagenet = (train.resolve(train.Config(dataset=name, method="scratch", device="cpu"))
                       for name in ("cifar100", "imagenet"))
    rates = [round(train.learning_rate(cifar, epoch), 9) for epoch in range(240)]
    assert rates == [0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30
    rates = [round(train.learning_rate(imagenet, epoch), 9) for epoch in range(100)]
    assert rates == [0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10
    assert train.resolve(with_(cifar, student="shufflenetv1", lr=None)).lr == 0.01
    assert cifar.num_negatives == 16384

# Another value of every flag that may change a result; OTHER: a file that the test writes.
OTHERS = {
    "image_size": "24", "fraction": "0.5", "holdout": "0.3", "student": "resnet14", "lr": "0.01",
    "epochs": "2", "batch_size": "32", "weight_decay": "0.1", "seed": "1", "amp": None,
    "ce_weight": "0.5", "logit_weight": "2", "feature_weight": "2", "temperature": "2",
    "alpha": "0.4", "lam": "0.4", "logit_loss": "mlkd", "standardize": None, "clip_scale": "3",
    "num_negatives": "32", "negatives": "per-image", "teacher": "resnet14", "clip": "OTHER",
    "teacher_weights": "OTHER", "clip_activation": "gelu", "prompts": "OTHER", "bpe": "OTHER",
    "class_names": "OTHER"}

def parsed(method, **flags):
    parts = [[command.flag(name), *([value] if value else [])] for name, value in flags.items()]
    return command.parse(train.Config, "", ["--method", method, *sum(parts, [])], train.unread)

@pytest.mark.slow
@pytest.mark.parametrize("method", ["scratch", "mlkd", "crd", "richkd"])
def test_unread_is_every_flag_that_changes_nothing(method, teacher_file, clip_file, tmp_path,
                                                   monkeypatch):
    """A flag changes the student or what is kept of it, or it is refused by name."""
    monkeypatch.setattr(shapes, "SIZES", {"train": 100, "test": 25, "shift": 25})
    assert {field.name for field in dataclasses.fields(train.Config)} == {
        *OTHERS, *runs.PLACES, "dataset", "method", "deterministic"}  # which a CPU always is
    (tmp_path / "prompts").write_text("{} at sea")
    (tmp_path / "bpe").write_text("a b\n")
    (tmp_path / "class_names").write_text("\n".join(f"thing of {chr(97 + i)}" for i in range(25)))
    torch.manual_seed(7)
    torch.save(models.build_model("resnet8", 25).state_dict(), tmp_path / "teacher_weights")
    state = checkpoints.read_state_dict(clip_file)
    torch.save({name: x.flip(0) if "proj" in name else x for name, x in state.items()},
               tmp_path / "clip")

    def left(**flags):
        train.run(with_(parsed(method, **flags), student=flags.get("student", "resnet8"), workers=0,
                        epochs=int(flags.get("epochs", 1)), out=str(tmp_path / "run"), device="cpu",
                        overwrite=True, cache_dir=str(Path(teacher_file).with_name("cache"))))
        kept = checkpoints.read_own(tmp_path / "run/student.pt", "")
        return kept["class_names"], {name: x.tolist() for name, x in kept["model"].items()}

    base = {name: value for name, value in (
        ("teacher_weights", teacher_file), ("teacher", "resnet8"), ("clip", clip_file),
        ("num_negatives", "64")) if name not in train.unread(train.Config(method=method))}
    whole = left(**base)
    for name, value in OTHERS.items():
        changed = {**base, name: str(tmp_path / name) if value == "OTHER" else value}
        if name == "teacher":
            changed.pop("teacher_weights", None)
        if name in train.METHODS[method] and changed[name] in (None, train.METHODS[method][name]):
            continue  # as the method fixes it
        try:
            assert left(**changed) != whole, name
        except ValueError as error:
            assert command.flag(name) in str(error) or name == "bpe" and "BPE" in str(error), name

@pytest.mark.parametrize("flags", [
    {"bpe": "x"}, {"clip_activation": "gelu"}, {"data_dir": "x"}, {"alpha": "0", "teacher": "x"}])
def test_parse_refuses_what_shapes_and_the_tiny_clip_do_not_read(flags):
    with pytest.raises(ValueError, match=command.flag([*flags][-1])):
        parsed("richkd-l", **flags)

# Teachers, methods --------------------------------------------------------------------------------
@pytest.mark.parametrize("amp, bound", [(False, 1e-5), (True, 0.05)])
@torch.no_grad()
def test_teachers_say_what_the_teacher_says(config, teacher_file, amp, bound):
    """Folded BatchNorm and channels_last to rounding; bfloat16 to what its 8 bits allow; outputs
    that a graph may hold."""
    resolved = train.resolve(with_(config, amp=amp))
    teachers = train.load_teachers(resolved, train.load_splits(resolved))
    test = data.load_dataset("shapes", "", "test")
    inputs = data.to_input(test.images, (0.5,) * 3, (0.25,) * 3)
    expected = models.load_weights("resnet8", teacher_file).eval()(inputs)
    for got, want in zip(teachers(inputs), expected):
        assert got.dtype == torch.float32 and not got.is_inference() and not got.requires_grad
        assert 0 < (got - want).abs().max() <= bound * want.abs().max()

def test_train_epoch_leaves_the_teachers_as_they_were(config):
    resolved = train.resolve(with_(config, feature_weight=0.0))
    splits = train.load_splits(resolved)
    split = data.at_size(splits["train"], 32)
    tables = torch.rand(len(split.labels), 25).half(), torch.rand(len(split.labels), 32).half()
    run = train.begin(resolved, split, train.load_teachers(resolved, splits), tables, 100.0)
    before, after = ({key: value.clone() for key, value in module.state_dict().items()}
                     for module in (run.teachers, run.student))
    means = train.train_epoch(run, train.step_of(run), 0, files.Progress("", 150))
    assert set(means) == {"loss", "ce", "logit", "train_accuracy"}
    assert equal(before, run.teachers.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in run.teachers.parameters())
    assert not any(torch.equal(x, after[key]) for key, x in run.student.state_dict().items())

@pytest.mark.parametrize("method", train.METHODS)
def test_run_of_every_method(config, method):
    assert train.run(with_(config, method=method, epochs=1))["student_accuracy"] is not None

def test_run_trains_and_fuses_two_teachers(config):
    two = with_(config, teacher=("resnet14", "resnet8"), teacher_weights=None, epochs=1)
    summary = train.run(two)
    assert summary["teacher"] == "resnet14+resnet8" and summary["teacher_accuracy"] is not None
    teachers = sorted(Path(config.cache_dir).glob("teacher-shapes-*/student.pt"))
    before = [path.stat().st_mtime_ns for path in teachers]
    resolved = train.resolve(with_(two, seed=1))
    train.load_teachers(resolved, train.load_splits(resolved))  # the same ones, from the cache
    assert len(teachers) == 2 and [path.stat().st_mtime_ns for path in teachers] == before

def test_run_whose_loss_is_no_longer_finite_keeps_the_last_epoch(config, monkeypatch):
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate",
                        lambda config, epoch: 1e30 if epoch else rate(config, epoch))
    with pytest.raises(FloatingPointError, match=r"epoch 2, step \d"):
        train.run(with_(config, method="scratch"))
    last = checkpoints.read_own(Path(config.out) / "last.pt", "")
    assert len(last["log"]) == 1
    assert all(value.isfinite().all() for value in last["student"].values())

def test_load_splits_of_a_holdout_has_its_own_test_images(config):
    split = train.load_splits(with_(train.resolve(config), holdout=0.2, fraction=0.5))
    whole = train.load_splits(train.resolve(config))["train"]
    rows, one, two = ({tuple(image.flatten().tolist()) for image in part.images}
                      for part in (whole, split["train"], split["test"]))
    assert (len(split["train"].labels), len(split["test"].labels)) == (75, 25)
    assert one < rows and two < rows and not one & two

# CLIP's targets -----------------------------------------------------------------------------------
@pytest.fixture
def asked(clip_file, tmp_path):
    return train.resolve(train.Config(clip=clip_file, cache_dir=str(tmp_path), device="cpu"))

def test_clip_targets_are_the_scores_of_each_image(asked):
    clip, tokenizer, scale = train.load_clip(asked)
    assert scale == clip.logit_scale.exp().item()
    splits = {name: data.load_dataset("shapes", "", name) for name in ("train", "test")}
    found = train.clip_targets(asked, clip, tokenizer, splits)
    templates = clip_model.load_templates(train.PROMPTS)
    text = clip_model.class_features(clip, tokenizer, splits["train"].class_names, templates)
    classes = normalize(text.mean(1), dim=1)                                    # (K,M,D) -> (K,D)
    for name, few in (("train", [7, 149]), ("test", [0, 49])):
        cosines, features = found[name]
        assert cosines.dtype == features.dtype == torch.float16
        with torch.no_grad():
            image = clip.encode_image(clip_model.preprocess(splits[name].images[few], 32))
        image = normalize(image, dim=1)
        torch.testing.assert_close(features[few].float(), image, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(cosines[few].float(), image @ classes.T, atol=1e-3, rtol=1e-3)

def test_load_clip_trains_the_tiny_one_once_from_a_seed_of_its_own(asked, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(shapes, "train_tiny_clip", lambda clip, *_, **__: calls.append(1) or clip)
    monkeypatch.setattr(shapes, "render_captions", lambda n: ([], []))
    states = []
    for place in ("one", "one", "other"):
        torch.rand(1)
        before = torch.get_rng_state()
        tiny = with_(asked, clip="tiny", cache_dir=str(tmp_path / place))
        states.append(train.load_clip(tiny)[0].state_dict())
        assert torch.equal(torch.get_rng_state(), before)
    assert len(calls) == 2 and equal(states[0], states[2])

def test_clip_targets_are_made_anew_where_they_depend_on_it(asked, tmp_path, monkeypatch):
    clip, tokenizer, _ = train.load_clip(asked)
    test, calls, view = data.load_dataset("shapes", "", "test"), [], train.clip_view
    monkeypatch.setattr(train, "clip_view", lambda *args: calls.append(1) or view(*args))
    (tmp_path / "one.txt").write_text("a {}\n")
    clips = [clip_model.load_clip(asked.clip), clip_model.load_clip(asked.clip, None, "gelu"),
             train.load_clip(with_(asked, amp=True))[0]]
    clips[0].visual.proj.data[0, 0] += 1
    images, merges = test.images.clone(), clip_model.Tokenizer()
    images[3, 0, 5, 5] ^= 1
    merges.priority = {("~", "~"): 0}
    for number, arguments in enumerate((
            *((asked, other, tokenizer, test) for other in (clip, *clips)),
            (with_(asked, prompts=str(tmp_path / "one.txt")), clip, tokenizer, test),
            (asked, clip, merges, test),
            (asked, clip, tokenizer, test._replace(images=images))), 1):
        for _ in range(2):
            train.clip_targets(*arguments[:3], {"test": arguments[3]})
        assert len(calls) == number

def test_clip_targets_that_are_not_finite_are_not_kept(asked, tmp_path):
    clip, tokenizer, _ = train.load_clip(asked)
    clip.visual.proj.data[:] = torch.nan
    test = data.load_dataset("shapes", "", "test")
    with pytest.raises(FloatingPointError):
        train.clip_targets(asked, clip, tokenizer, {"test": test})
    assert not [*tmp_path.glob("targets-*")]

def test_clip_view_that_exceeds_float16_goes_on_in_float32(asked, capsys):
    clip, tokenizer, _ = train.load_clip(asked)
    images = data.load_dataset("shapes", "", "test").images[:5]
    classes = torch.randn(25, clip.embed_dim)
    exact, _ = train.clip_view(clip, classes, images)
    clip.visual.proj.data *= 2**16
    clip.visual.half()
    for _ in range(2):
        cosines, features = train.clip_view(clip, classes, images)
        assert features.isfinite().all()
        torch.testing.assert_close(cosines, exact, rtol=0, atol=5e-3)
    assert capsys.readouterr().err.count("float16") == 1

@pytest.mark.parametrize("name", ["clip-cifar", "clip-mini"])
def test_clip_view_in_float16_as_on_a_gpu_has_the_cosines_of_float32(shared, name):
    """Of real CLIPs on real images, to 2e-3 but for one in a hundred."""
    config = train.Config(clip=str(shared / f"clip/{name}.pt"), device=torch.device("cpu"),
                          bpe=str(shared / "clip/bpe_simple_vocab_16e6.txt.gz"))
    clip, tokenizer, _ = train.load_clip(config)
    root = shared / "data/cifar10-test-100"
    [images] = data.blocks(data.Stream(sorted(map(str, root.rglob("*.png"))), 32, 32))
    classes = train.class_embeddings(config, clip, tokenizer, data.CIFAR_CLASSES["cifar10"])
    exact, _ = train.clip_view(clip, classes, images)
    clip.visual.half()
    change = (train.clip_view(clip, classes, images)[0] - exact).abs()              # (100,10)
    assert (change.amax(1) < 2e-3).sum() >= 99 and change.mean() < 2e-4

# Several processes --------------------------------------------------------------------------------
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LOSSES = """
import json, os, torch, data, train
from pathlib import Path
from support import shapes
shapes.SIZES = {"train": 250, "test": 50, "shift": 50}
torch.set_num_threads(1)
losses, path = [], Path(f"{sys.argv[4]}-{os.environ.get('RANK', 0)}.json")
to_input, begin, step = data.to_input, train.begin, train.train_step

def begin_in_float64(*arguments):
    run = begin(*arguments)
    for part in (run.student.eval(), run.criterion, run.teachers):
        part.double()
    run.student.train, run.teachers.dtype = lambda mode=True: run.student, torch.float64
    return run

def noted(run, drawn):
    means = step(run, drawn)
    losses.append(means[:-1].tolist())
    return means

train.begin, train.train_step = begin_in_float64, noted
data.to_input = lambda *arguments: to_input(*arguments).double()
train.run(train.Config(teacher=("resnet8",), teacher_weights=(sys.argv[1],), student="resnet8",
                       clip=sys.argv[2], epochs=4, batch_size=50, num_negatives=64,
                       cache_dir=sys.argv[3], out=sys.argv[4], device="cpu"))
path.write_text(json.dumps(losses))
"""

@pytest.mark.slow
def test_run_of_two_processes_has_the_losses_of_one(teacher_file, clip_file, tmp_path):
    """RichKD (L+F) for 20 steps, but for BatchNorm, which stays as it is: it normalises by each
    process's own half of the batch. In float64, since rounding grows from step to step."""
    path = script(tmp_path / "script.py", LOSSES)
    for world in ("2", "1"):
        done = python(*(TORCHRUN if world == "2" else ()), path, teacher_file, clip_file,
                      tmp_path / "cache", tmp_path / world)
        assert done.returncode == 0, done.stderr
    one, left, right = (torch.tensor(json.loads((tmp_path / name).read_text()), dtype=torch.float64)
                        for name in ("1-0.json", "2-0.json", "2-1.json"))
    difference = (one - (left + right) / 2).abs() / one.abs()
    assert len(one) == 20 and difference[:5].max() < 1e-12 and difference.max() < 1e-9

AGENT = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
         "--rdzv-backend=c10d", "--rdzv-id=test", "--rdzv-endpoint"]
DIES = """
import os, time, torch, train
from support import command, shapes
shapes.SIZES = {"train": 150, "test": 51, "shift": 50}
torch.set_num_threads(1)
step = train.train_step
def train_step(run, drawn):
    if command.rank() == 1 and os.environ.get("DIES") and run.config.method == "richkd":
        with open(os.environ["DIES"], "w") as file:
            file.write(str(time.time()))
        os._exit(9)
    return step(run, drawn)
train.train_step = train_step
config = train.Config(teacher=("resnet14",), student="resnet8", clip=sys.argv[1], epochs=2,
                      batch_size=50, num_negatives=64, cache_dir=sys.argv[2], out=sys.argv[3],
                      device="cpu")
command.main(lambda: train.run(config))
"""

def two_machines(arguments, port, seconds, **environment):
    """Two of torchrun's agents on this machine, which find each other as two machines do."""
    agents = [subprocess.Popen([sys.executable, *AGENT, f"127.0.0.1:{port}", *arguments],
                               stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
              for _ in range(2)]
    said = [agent.communicate(timeout=seconds)[1] for agent in agents]
    return [agent.returncode for agent in agents], said

@pytest.mark.slow
def test_run_of_two_machines_where_one_dies_ends_and_goes_on(clip_file, tmp_path, monkeypatch):
    """A rank that dies ends the others within a minute; the same command goes on, with what was
    made before, and leaves what one process leaves: the student of rank 0, which tested it."""
    out, path = tmp_path / "run", script(tmp_path / "script.py", DIES)
    arguments = [str(path), clip_file, str(tmp_path / "cache"), str(out)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    codes, said = two_machines(arguments, port, 150, DIES=str(tmp_path / "died"))
    assert all(codes), said
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    assert not (out / "summary.json").exists() and (out / "config.json").exists()
    codes, said = two_machines(arguments, port, 150)
    assert codes == [0, 0], said
    assert {path.name for path in out.iterdir()} == FILES
    assert sum(text.count("epoch 2/2") for text in said) == 1  # the student's; there is a teacher
    monkeypatch.setattr(shapes, "SIZES", {"train": 150, "test": 51, "shift": 50})
    test = data.load_dataset("shapes", "", "test")
    top1 = metrics.top_k_accuracy(logits_of(out, test.images), test.labels)
    assert 100 * top1 == json.loads((out / "summary.json").read_text())["student_accuracy"]
