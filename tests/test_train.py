"""train.py: complete runs, resuming, what methods share, and what every wrong input says."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import clip_model
import data
import models
import train

ROOT = Path(__file__).resolve().parents[1]
FILES = {"config.json", "log.csv", "last.pt", "student.pt", "summary.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module", autouse=True)
def small_shapes():
    """The embedded data set with few images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_SIZES", {"train": 150, "test": 50, "shift": 50})
        yield


@pytest.fixture(scope="module")
def clip_file(folder):
    """A byte-level CLIP of random weights."""
    torch.manual_seed(0)
    clip = clip_model.CLIP(32, 32, 1, 64, 16, 64, 514, 64, 1, 1)
    path = folder / "clip.pt"
    torch.save(clip.state_dict(), path)
    return str(path)


@pytest.fixture
def config(folder, clip_file, tmp_path):
    """RichKD (L+F), two epochs; teacher and targets are cached for the whole module."""
    return train.Config(teacher=("resnet14",), student="resnet8", clip=clip_file, epochs=2, num_negatives=64,
                        cache_dir=str(folder / "cache"), out=str(tmp_path / "run"), device="cpu")


def with_(config, **changes):
    return train.dataclasses.replace(config, **changes)


def weights(run):
    return torch.load(Path(run) / "student.pt", weights_only=True)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- a run


def test_a_run_leaves_its_folder_complete(config, capsys):
    summary = train.run(config)
    out = Path(config.out)
    assert {path.name for path in out.iterdir()} == FILES
    assert summary == json.loads((out / "summary.json").read_text())
    for key in ("dataset method teacher student seed epochs student_accuracy teacher_accuracy clip_accuracy fused_accuracy "
                "shift_accuracy images_per_second seconds").split():
        assert summary[key] is not None, key
    with open(out / "log.csv") as file:
        log = list(csv.DictReader(file))
    assert [row["epoch"] for row in log] == ["1", "2"]
    assert float(log[-1]["test_accuracy"]) == summary["student_accuracy"]  # the last epoch's, not the best
    parts = [float(log[0][part]) for part in ("ce", "logit", "feature")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(float(log[0]["loss"]), rel=1e-5)
    about = json.loads((out / "config.json").read_text())
    assert about["settings"]["alpha"] == 0.7 and about["torch"] == torch.__version__ and len(about["source"]) == 64
    student = torch.load(out / "student.pt", weights_only=True)
    assert student["model_name"] == "resnet8" and len(student["class_names"]) == len(student["model"]["fc.bias"])

    # its accuracies are those of the weights it leaves
    test = data.load_dataset("shapes", "", "test")
    model = models.load_weights("resnet8", out / "student.pt").eval()
    info = data.DATASETS["shapes"]
    logits = model(data.normalize(test.images, info.mean, info.std))[0]
    assert 100 * (logits.argmax(1) == test.labels).double().mean().item() == summary["student_accuracy"]

    # the same command on a finished run says so and computes nothing
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert train.run(config) == summary and "finished" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    text = train.table(summary)
    assert "CLIP zero-shot" in text and "fused teacher" in text and text.count("\n") == 4


def test_other_settings_in_the_folder_are_refused_by_name(config):
    train.run(with_(config, method="scratch", epochs=1))
    with pytest.raises(ValueError, match="other settings: --lr 0.05 there, 0.1 here; --out names"):
        train.run(with_(config, method="scratch", epochs=1, lr=0.1))
    summary = train.run(with_(config, method="scratch", epochs=1, lr=0.1, overwrite=True))
    assert summary["student_accuracy"] is not None and summary["teacher"] is None
    stranger = Path(config.out).parent / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds no run"):
        train.run(with_(config, out=str(stranger), overwrite=True))
    assert (stranger / "thesis.tex").exists()


def test_default_folder_name(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = train.run_folder(train.resolve(with_(config, out=None, seed=3, teacher=("resnet14", "resnet8"))))
    assert folder == Path("runs/shapes-richkd-resnet14+resnet8-resnet8-s3")


def test_resuming_gives_the_uninterrupted_student_to_the_bit(config, monkeypatch):
    whole = train.run(config)
    cut = with_(config, out=config.out + "-cut")
    save = data.save

    def save_then_stop(path, obj):
        save(path, obj)
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train.run(cut)
    monkeypatch.setattr(data, "save", save)
    assert not (Path(cut.out) / "summary.json").exists()
    resumed = train.run(cut)
    assert equal(weights(config.out), weights(cut.out))
    assert resumed["accuracies"] == whole["accuracies"]
    one, two = (torch.load(Path(run) / "last.pt", weights_only=True) for run in (config.out, cut.out))
    assert equal({k: v for k, v in one["criterion"].items() if isinstance(v, torch.Tensor)},
                 {k: v for k, v in two["criterion"].items() if isinstance(v, torch.Tensor)})


def test_alpha_one_is_plain_distillation_to_the_bit(config):
    train.run(with_(config, method="kd"))
    train.run(with_(config, method="richkd-l", alpha=1.0, out=config.out + "-l"))
    assert equal(weights(config.out), weights(config.out + "-l"))


def test_the_frozen_teacher_is_the_teacher_in_either_dtype(config):
    """Folded BatchNorm and channels_last to rounding; bfloat16 to what its 8 bits allow; outputs a graph may hold."""
    resolved = train.resolve(config)
    teachers = train.load_teachers(resolved, train.load_splits(resolved))
    path = next(Path(config.cache_dir).glob("teacher-shapes-resnet14-*/student.pt"))
    plain = models.load_weights("resnet14", path).eval()
    inputs = train.to_input(data.load_dataset("shapes", "", "test").images, (0.5,) * 3, (0.25,) * 3)
    with torch.no_grad():
        expected = plain(inputs)
    assert train.resolve(config).teacher_dtype == train.fast_dtype("cpu")
    assert train.resolve(with_(config, method="scratch")).teacher_dtype is None
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 0.05)):
        teachers.dtype = dtype
        for got, want in zip(teachers(inputs), expected):
            assert got.dtype == torch.float32 and not got.is_inference()
            assert 0 < (got - want).abs().max() <= bound * want.abs().max()
    with pytest.raises(ValueError, match="--teacher-dtype 'float16': expected one of float32, bfloat16"):
        train.resolve(with_(config, teacher_dtype="float16"))


def test_deterministic_changes_nothing_on_a_cpu(config):
    config = with_(config, method="scratch", epochs=1)
    train.run(config)
    train.run(with_(config, deterministic=True, out=config.out + "-d"))
    assert equal(weights(config.out), weights(config.out + "-d")) and not torch.are_deterministic_algorithms_enabled()


def test_compiled_is_the_same_to_rounding(config, monkeypatch):
    """--compile with the graphs captured and not made into machine code, which takes minutes."""
    compiled, compile_ = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module) or compile_(
        module, backend="aot_eager"))
    config = with_(config, method="kd", epochs=1)
    one, two = train.run(config), train.run(with_(config, compile=True, out=config.out + "-compiled"))
    assert len(compiled) == 2  # student and teacher
    assert two["accuracies"]["teacher"] == one["accuracies"]["teacher"]
    assert weights(config.out).keys() == weights(config.out + "-compiled").keys()
    losses = [float((Path(out) / "log.csv").read_text().splitlines()[1].split(",")[2])
              for out in (config.out, config.out + "-compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_tensorboard_is_asked_for_before_any_work(config, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard needs the package of that name: pip install tensorboard"):
        train.run(with_(config, tensorboard=True))
    assert not Path(config.out).exists()
    assert train.settings(config) == train.settings(with_(config, tensorboard=True))


def test_tensorboard_gets_every_column_of_the_log(config, monkeypatch):
    scalars = []
    writer = SimpleNamespace(add_scalar=lambda *values: scalars.append(values), flush=lambda: None)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder: writer))
    train.run(with_(config, method="scratch", tensorboard=True))
    with open(Path(config.out) / "log.csv") as file:
        for epoch, row in enumerate(csv.DictReader(file), 1):
            for name, value in row.items():
                assert (name, float(value), epoch) in scalars
    assert epoch == 2


def test_methods_differ_in_their_loss_alone(config):
    runs = {}
    for method in train.METHODS:
        resolved = train.resolve(with_(config, method=method))
        shared = {k: v for k, v in train.settings(resolved).items()
                  if k not in (*train.METHODS[method], "method", "teacher", "teacher_dtype", "clip")}
        runs[method] = shared
        assert all(shared[key] == runs["scratch"].get(key, shared[key]) for key in shared)
    assert train.resolve(with_(config, method="scratch")).teacher == ()
    assert train.resolve(with_(config, method="kd")).clip is None
    assert train.resolve(with_(config, method="richkd", alpha=0.0, lam=0.0)).teacher == ()  # CLIP is the only teacher


def test_logits_or_embeddings_are_averaged_over_the_templates(config, tmp_path):
    prompts = tmp_path / "two.txt"
    prompts.write_text("a photo of a {}\na {} far away\n")
    cosines = {}
    for average in ("embeddings", "logits"):
        resolved = train.resolve(with_(config, average=average, prompts=str(prompts)))
        splits = train.load_splits(resolved)
        clip, tokenizer = train.load_clip(resolved)
        cosines[average], features = train.load_targets(resolved, clip, tokenizer, splits)["test"]
    names, each = splits["test"].class_names, ["a photo of a {}", "a {} far away"]
    each = torch.stack([clip_model.class_features(clip, tokenizer, names, [template]) for template in each])
    for average, rows in (("logits", each.mean(0)), ("embeddings", torch.nn.functional.normalize(each.mean(0), dim=1))):
        torch.testing.assert_close(cosines[average].float(), features.float() @ rows.T, rtol=0, atol=1e-3)
    assert (cosines["embeddings"] - cosines["logits"]).abs().max() > 2e-3


def test_teachers_are_left_as_they_were(config):
    resolved = train.resolve(config)
    splits = train.load_splits(resolved)
    teachers = train.load_teachers(resolved, splits)
    before = {key: value.clone() for key, value in teachers.state_dict().items()}
    clip, _ = train.load_clip(resolved)
    clip_before = {key: value.clone() for key, value in clip.state_dict().items()}
    targets = train.load_targets(resolved, clip, clip_model.Tokenizer(), splits)["train"]
    student = models.build_model("resnet8", 25)
    criterion = train.richkd.RichKD(student.num_features, teachers.num_features, 32, 150, num_negatives=8)
    step = train.Step(student, criterion)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.1)
    student_before = {key: value.clone() for key, value in student.state_dict().items()}
    train.train_epoch(resolved, 0, splits["train"], step, optimizer, teachers, targets, 100.0, data.Progress("", 150))
    assert equal(before, teachers.state_dict()) and equal(clip_before, clip.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in teachers.parameters())
    assert not any(torch.equal(value, student_before[key]) for key, value in student.state_dict().items())


def test_clip_targets_are_the_scores_of_each_image(config):
    resolved = train.resolve(config)
    splits = {"train": data.load_dataset("shapes", "", "train")}
    clip, tokenizer = train.load_clip(resolved)
    cosines, features = train.load_targets(resolved, clip, tokenizer, splits)["train"]
    with torch.no_grad():
        image = clip.encode_image(clip_model.preprocess(splits["train"].images[[7, 149]], 32))
    classes = clip_model.class_features(clip, tokenizer, splits["train"].class_names,
                                        clip_model.load_templates(ROOT / "prompts.txt"))
    image = image / image.norm(dim=1, keepdim=True)
    torch.testing.assert_close(features[[7, 149]].float(), image, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(cosines[[7, 149]].float(), image @ classes.T, atol=1e-3, rtol=1e-3)


def test_learning_rate_is_the_papers_schedule():
    cifar = train.resolve(train.Config(dataset="cifar100", method="scratch"))
    rates = [round(train.learning_rate(cifar, epoch), 9) for epoch in range(240)]
    assert rates == [0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30
    imagenet = train.resolve(train.Config(dataset="imagenet", method="scratch"))
    rates = [round(train.learning_rate(imagenet, epoch), 9) for epoch in range(100)]
    assert rates == [0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10
    assert train.resolve(train.Config(dataset="cifar100", method="scratch", student="shufflenetv1")).lr == 0.01


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_runs(config, method):
    summary = train.run(with_(config, method=method, epochs=1))
    assert summary["method"] == method and summary["student_accuracy"] is not None


def test_two_teachers_are_fused(config):
    summary = train.run(with_(config, teacher=("resnet14", "resnet8"), epochs=1))
    assert summary["teacher"] == "resnet14+resnet8" and summary["teacher_accuracy"] is not None


RANKS = """
import sys, torch, data, train
data.SHAPES_SIZES = {"train": 150, "test": 51, "shift": 50}
torch.set_num_threads(1)
summary = train.run(train.Config(teacher=("resnet14",), student="resnet8", clip=sys.argv[1], epochs=2, batch_size=50,
                                 num_negatives=64, cache_dir=sys.argv[2], out=sys.argv[3], device="cpu"))
"""


def test_two_processes_make_the_same_files(clip_file, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + RANKS)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script,
                           clip_file, tmp_path / "cache", tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    model = models.load_weights("resnet8", tmp_path / "run/student.pt").eval()  # rank 0's; both ranks tested it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_SIZES", {"train": 150, "test": 51, "shift": 50})
        test = data.load_dataset("shapes", "", "test")
    logits = model(data.normalize(test.images, data.DATASETS["shapes"].mean, data.DATASETS["shapes"].std))[0]
    assert 100 * (logits.argmax(1) == test.labels).sum().item() / 51 == summary["student_accuracy"]
    assert done.stderr.count("epoch 2/2") == 2  # the teacher's and the student's line, each once


LOSSES = """
import json, os, signal, torch, data, train
data.SHAPES_SIZES = {"train": 250, "test": 50, "shift": 50}
torch.set_num_threads(1)
ranks, path = int(sys.argv[5]), Path(f"{sys.argv[4]}-{os.environ.get('RANK', 0)}.json")
losses = json.loads(path.read_text()) if path.exists() else []

def forward(step, inputs, *supervision):
    if ranks == 1:  # what each rank would see through the student by itself, then interleaved again
        shares = [step.student(inputs[rank::2]) for rank in range(2)]
        logits, features = (torch.stack(pair, 1).flatten(0, 1) for pair in zip(*shares))
    else:
        logits, features = step.student(inputs)
    loss, parts = step.criterion(logits, features, *supervision)
    losses.append([loss.item(), *(part.item() for part in parts.values())])
    if ranks == 2 and len(losses) == 8 and train.rank() == 1:  # one rank is told to stop; both do, and go on later
        os.kill(os.getpid(), signal.SIGTERM)
    return loss, parts, logits

train.Step.forward = forward
load, to_input, init = train.load_teachers, train.to_input, train.Step.__init__
train.load_teachers = lambda *arguments: load(*arguments).double()
train.to_input = lambda *arguments: to_input(*arguments).double()
train.Step.__init__ = lambda step, *arguments: init(step, *arguments) or step.double() and None
try:
    train.run(train.Config(teacher=("resnet8",), teacher_weights=(sys.argv[1],), teacher_dtype="float32",
                           student="resnet8", clip=sys.argv[2], epochs=4, batch_size=50, num_negatives=64,
                           cache_dir=sys.argv[3], out=sys.argv[4], device="cpu"))
except KeyboardInterrupt as stop:
    assert stop.args[0] == signal.SIGTERM and "epoch 2 of 4, 150 of 250 images" in stop.args[1], stop.args
path.write_text(json.dumps(losses))
"""


def test_two_processes_have_the_losses_of_one(clip_file, tmp_path):
    """RichKD (L+F) for 20 steps. BatchNorm normalises by each process's own half of the batch, so the one process sends
    the two halves through the student one after the other; all else is as it is. In float64: float32's rounding grows
    tenfold every few steps at this learning rate, whatever makes it. A signal stops the two after 8 steps."""
    script, teacher = tmp_path / "script.py", tmp_path / "teacher.pt"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n" + LOSSES)
    torch.manual_seed(1)
    torch.save(models.build_model("resnet8", 25).state_dict(), teacher)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for world in ("2", "2", "1"):
        done = subprocess.run([sys.executable, *(torchrun if world == "2" else ()), script, teacher, clip_file,
                               tmp_path / "cache", tmp_path / world, world], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, left, right = (torch.tensor(json.loads((tmp_path / name).read_text()), dtype=torch.float64)
                        for name in ("1-0.json", "2-0.json", "2-1.json"))
    difference = (one - (left + right) / 2).abs() / one.abs()
    print(f"largest relative difference of loss, ce, logit, feature over 20 steps: {difference.amax(0).tolist()}")
    assert len(one) == 20 and difference.max() < 1e-9
    logs = [(tmp_path / world / "log.csv").read_text().splitlines() for world in "12"]
    for one, two in zip(*([line.split(",")[2:6] for line in log[1:]] for log in logs)):  # lr, loss, ce, logit, feature
        assert [float(x) for x in one] == pytest.approx([float(x) for x in two], rel=1e-5)


# ---- wrong input: one line that names it


@pytest.mark.parametrize("changes, message", [
    ({"dataset": "mnist"}, "unknown data set 'mnist'; known: shapes, cifar10, cifar100, tiny-imagenet, imagenet"),
    ({"method": "magic"}, "unknown method 'magic'; known: scratch, kd, "),
    ({"student": "resnet21"}, "unknown model 'resnet21'"),
    ({"teacher": ("resnet9",)}, "unknown model 'resnet9'"),
    ({"clip": "ViT-B/64"}, "ViT-B/32, ViT-B/16, ViT-L/14"),
    ({"clip": "missing.pt"}, "missing.pt"),
    ({"alpha": 1.5}, "--alpha 1.5: expected 0 to 1"),
    ({"lam": -0.1}, "--lam -0.1: expected 0 to 1"),
    ({"temperature": 0.0}, "--temperature 0.0: expected more than 0"),
    ({"epochs": 0}, "--epochs 0: expected 1 to inf"),
    ({"method": "kd", "alpha": 0.5}, "--alpha 0.5 does not go with --method kd, which fixes it at 1.0"),
    ({"teacher_weights": ("a", "b")}, "1 --teacher, but 2 --teacher-weights: expected one a teacher"),
    ({"teacher_weights": ("missing.pth",)}, "missing.pth"),
    ({"prompts": "missing.txt"}, "missing.txt"),
    ({"device": "gpu"}, "--device gpu cannot be used here"),
    ({"logit_loss": "mse"}, "--logit-loss 'mse': expected one of kd, dkd, mlkd"),
])
def test_wrong_settings(config, changes, message):
    with pytest.raises((ValueError, OSError)) as error:
        train.run(with_(config, **changes))
    assert message in str(error.value)
    assert not list(Path(config.out).glob("*.pt"))


def test_wrong_prompts(config, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# only\n\n# comments\n")
    with pytest.raises(ValueError, match="prompts.txt:1: expected a template"):
        train.run(with_(config, prompts=str(prompts)))
    prompts.write_text("a photo of a {}\na photo of nothing\n")
    with pytest.raises(ValueError, match="prompts.txt:2: "):
        train.run(with_(config, prompts=str(prompts)))


def test_teacher_file_of_another_architecture_or_class_count(config, tmp_path):
    path = tmp_path / "teacher.pt"
    torch.save(models.build_model("resnet20", 25).state_dict(), path)
    with pytest.raises(ValueError, match=r"layer\d.*resnet20"):
        train.run(with_(config, teacher_weights=(str(path),)))
    torch.save(models.build_model("resnet14", 10).state_dict(), path)
    with pytest.raises(ValueError, match="10 classes"):
        train.run(with_(config, teacher_weights=(str(path),)))


def test_a_loss_that_is_no_longer_finite_keeps_the_last_good_checkpoint(config, monkeypatch):
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda config, epoch: 1e30 if epoch else rate(config, epoch))
    with pytest.raises(FloatingPointError, match=r"epoch 2, step \d: .*last finite loss \d.*keeps epoch 1") as error:
        train.run(with_(config, method="scratch"))
    assert "\n" not in str(error.value)
    last = torch.load(Path(config.out) / "last.pt", weights_only=True)
    assert len(last["log"]) == 1 and all(value.isfinite().all() for value in last["student"].values())


def test_damaged_checkpoint_and_config(config):
    train.run(with_(config, method="scratch", epochs=1))
    out = Path(config.out)
    (out / "summary.json").unlink()
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="last.pt is damaged; --overwrite"):
        train.run(with_(config, method="scratch", epochs=1))
    (out / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged; --overwrite"):
        train.run(with_(config, method="scratch", epochs=1))


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "mnist"], "error: unknown data set 'mnist'; known: "),
    (["--alpha", "1.5"], "error: --alpha 1.5: expected 0 to 1"),
    (["--epochs", "many"], "error: argument --epochs: invalid int value: 'many'; --help lists the flags"),
    (["--dataset", "imagenet", "--data-dir", "nowhere"], "error: imagenet: nowhere/train holds no folders of images"),
])
def test_the_command_line_says_it_in_one_line_and_exits_with_2(arguments, message, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
