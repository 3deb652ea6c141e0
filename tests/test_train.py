"""train.py: complete runs, resuming, what methods share, and what every wrong input says."""

import csv
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import models
import richkd
import train
from support import checkpoints, command, files, keys, runs, shapes

ROOT = Path(__file__).resolve().parents[1]
FILES = {"config.json", "log.csv", "last.pt", "student.pt", "summary.json"}
pytestmark = pytest.mark.usefixtures("few_shapes")


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "resnet8.pt"
    torch.save(models.build_model("resnet8", 25).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(cache, clip_file, teacher_file, tmp_path):
    """RichKD (L+F), two epochs; CLIP's targets are cached for the whole module."""
    return train.Config(teacher=("resnet8",), teacher_weights=(teacher_file,), student="resnet8",
                        clip=clip_file, epochs=2, num_negatives=64, cache_dir=str(cache),
                        out=str(tmp_path / "run"), device="cpu")


def with_(config, **changes):
    return dataclasses.replace(config, **changes)


def weights(folder):
    return checkpoints.read_state_dict(Path(folder) / "student.pt")


def loaded(config):
    """What a resolved config trains on: its splits, and its `runs.inputs`."""
    splits = runs.load_splits(config)
    return splits, runs.inputs(config, splits)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- a run


def test_run_leaves_its_folder_complete(config, capsys):
    summary = train.run(config)
    out = Path(config.out)
    assert {path.name for path in out.iterdir()} == FILES
    assert summary == files.read_own(out / "summary.json", "")
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
    about = files.read_own(out / "config.json", "")
    assert about["settings"]["alpha"] == 0.7 and about["torch"] == torch.__version__
    assert len(about["source"]) == 64
    student = files.read_own(out / "student.pt", "")
    assert student["model_name"] == "resnet8"
    assert len(student["class_names"]) == len(student["model"]["fc.bias"])

    # its accuracies are those of the weights it leaves
    test, info = data.load_dataset("shapes", "", "test"), data.DATASETS["shapes"]
    model = models.load_weights("resnet8", out / "student.pt").eval()
    right = model(data.normalize(test.images, info.mean, info.std))[0].argmax(1) == test.labels
    assert 100 * right.double().mean().item() == summary["student_accuracy"]

    # the same command on a finished run says so and computes nothing
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert train.run(config) == summary and "finished" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    text = runs.summary_table(summary)
    assert "CLIP zero-shot" in text and "fused teacher" in text and text.count("\n") == 4


def test_run_resumed_has_the_uninterrupted_students_bits(config, monkeypatch):
    whole = train.run(config)
    cut, save = with_(config, out=config.out + "-cut"), files.save

    def save_then_stop(path, content):
        save(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train.run(cut)
    monkeypatch.setattr(files, "save", save)
    assert not (Path(cut.out) / "summary.json").exists()
    begun = (Path(cut.out) / "config.json").read_bytes()
    monkeypatch.setattr(torch, "__version__", "another")  # config.json says how a run was begun
    resumed = train.run(cut)
    assert (Path(cut.out) / "config.json").read_bytes() == begun
    assert equal(weights(config.out), weights(cut.out))
    assert resumed["accuracies"] == whole["accuracies"]
    one, two = (files.read_own(Path(out) / "last.pt", "") for out in (config.out, cut.out))
    assert equal(one["criterion"], two["criterion"])


def test_run_with_alpha_one_is_plain_distillation_to_the_bit(config):
    train.run(with_(config, method="kd"))
    train.run(with_(config, method="richkd-l", alpha=1.0, out=config.out + "-l"))
    assert equal(weights(config.out), weights(config.out + "-l"))


def test_run_deterministic_changes_nothing_on_a_cpu(config):
    config = with_(config, method="scratch", epochs=1)
    train.run(config)
    train.run(with_(config, deterministic=True, out=config.out + "-d"))
    assert equal(weights(config.out), weights(config.out + "-d"))
    assert not torch.are_deterministic_algorithms_enabled()


# Each numbered equation of richkd.py, and a method whose run uses its function.
EQUATIONS = {1: ("ensemble_text_features", {}), 2: ("zero_shot_logits", {}),
             3: ("fuse_logits", {"method": "richkd-l"}), 4: ("fuse_features", {}),
             5: ("kd_loss", {"method": "kd"}), 6: ("nce_loss", {"method": "crd"}),
             7: ("RichKD", {"method": "scratch"}), 8: ("standardize_logits", {"method": "kd-ls"}),
             9: ("dkd_loss", {"method": "dkd"}), 10: ("mlkd_loss", {"method": "mlkd"})}


class Called(Exception):
    pass


def stop(*arguments, **named):
    raise Called


@pytest.mark.parametrize("number", EQUATIONS)
def test_run_uses_the_function_that_bears_an_equations_number(config, number, monkeypatch):
    name, changes = EQUATIONS[number]
    changed = with_(config, epochs=1, average="logits" if number < 3 else "embeddings", **changes)
    if number < 3:  # CLIP's targets are not in the cache, so that they are computed
        identity = keys.identity
        monkeypatch.setattr(keys, "identity", lambda split: {**identity(split), "content": "other"})
    monkeypatch.setattr(richkd, name, stop)
    with pytest.raises(Called):
        train.run(changed)


def test_equations_are_all_tested():
    numbers = {int(number) for number in re.findall(r"\((\d\d?)\)", richkd.__doc__)}
    assert numbers == set(EQUATIONS)
    for number, (name, _) in EQUATIONS.items():
        assert f"quation ({number})" in getattr(richkd, name).__doc__, name


@pytest.mark.parametrize("name", ["ensemble_text_features", "zero_shot_logits"])
def test_evaluate_zero_shot_uses_the_equations_functions(name, config, monkeypatch):
    monkeypatch.setattr(richkd, name, stop)
    with pytest.raises(Called):
        evaluate.zero_shot(evaluate.Config(clip=config.clip, device="cpu", zero_shot=True,
                                           cache_dir=config.out + "-cache"))


# ---- settings


def test_open_run_refuses_other_settings_by_name(config):
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


def test_open_run_names_the_folder(config):
    config = with_(config, out=None, seed=3, teacher=("resnet14", "resnet8"), teacher_weights=None)
    folder = runs.open_run(train.resolve(config))
    assert folder == Path("runs/shapes-richkd-resnet14+resnet8-resnet8-s3") and not folder.exists()


def test_resolve_lets_methods_differ_in_their_loss_alone(config):
    scratch = runs.settings(train.resolve(with_(config, method="scratch")))
    for method, fixed in train.METHODS.items():
        own = runs.settings(train.resolve(with_(config, method=method)))
        differ = {name for name in own if own[name] != scratch[name]}
        teachers = {"teacher", "teacher_weights", "clip"}
        assert differ <= {*fixed, *train.METHODS["scratch"], "method", *teachers}, method
    assert train.resolve(with_(config, method="scratch")).teacher == ()
    assert train.resolve(with_(config, method="kd")).clip is None
    assert train.resolve(with_(config, alpha=0.0, lam=0.0)).teacher == ()  # CLIP is the only one


def test_resolve_fits_the_negatives_of_shapes():
    resolved = train.resolve(train.Config(device="cpu"))
    assert resolved.num_negatives < len(shapes.render_shapes("train")[1]) * 2
    cifar = train.resolve(train.Config(dataset="cifar100", device="cpu"))
    assert cifar.num_negatives == 16384


def test_run_says_that_the_rate_is_of_another_batch_size(config, capsys, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *arguments: {})
    for _ in range(2):
        train.run(with_(config, batch_size=32))
    said = "--batch-size 32: the learning rate was tuned for 64; --lr sets another"
    assert capsys.readouterr().err.splitlines() == [said]
    files.note.said.clear()
    train.run(with_(config, batch_size=32, lr=0.025))
    train.run(with_(config, batch_size=64))
    assert capsys.readouterr().err == ""


def test_resolve_reads_resnet18_and_resnet50_by_the_images_side(config, capsys):
    def names(size, **changes):
        own = train.resolve(with_(config, dataset="imagenet", image_size=size, **changes))
        return own.student, *own.teacher

    free = {"teacher": ("resnet50", "resnet18"), "teacher_weights": None, "student": "resnet18"}
    assert names(64, **free) == ("resnet18_cifar", "resnet50", "resnet18_cifar")
    assert capsys.readouterr().err == "resnet18 for images of 64 x 64 is resnet18_cifar here\n"
    assert names(65, **free) == names(224, **free) == ("resnet18", "resnet50_imagenet", "resnet18")
    assert "resnet50 for images of 224 x 224 is resnet50_imagenet here" in capsys.readouterr().err
    given = {**free, "teacher_weights": ("a.pth", "b.pth")}  # of which the files decide
    assert names(64, **given) == ("resnet18_cifar", "resnet50", "resnet18")
    shapes_own = train.resolve(with_(config, student="resnet18"))
    assert shapes_own.student == "resnet18_cifar"


def test_config_has_a_worker_for_each_core():
    assert train.Config().workers == min(8, data.cores()) == evaluate.Config().workers
    assert train.Config().cache_dir is None and evaluate.Config().cache_dir is None


def test_learning_rate_is_the_papers_schedule():
    cifar = train.resolve(train.Config(dataset="cifar100", method="scratch"))
    rates = [round(train.learning_rate(cifar, epoch), 9) for epoch in range(240)]
    assert rates == [0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30
    imagenet = train.resolve(train.Config(dataset="imagenet", method="scratch"))
    rates = [round(train.learning_rate(imagenet, epoch), 9) for epoch in range(100)]
    assert rates == [0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10
    shuffle = train.Config(dataset="cifar100", method="scratch", student="shufflenetv1")
    assert train.resolve(shuffle).lr == 0.01


# ---- teachers, methods


@pytest.mark.parametrize("amp, bound", [(False, 1e-5), (True, 0.05)])
def test_teachers_say_what_the_teacher_says(config, teacher_file, amp, bound):
    """Folded BatchNorm and channels_last to rounding; bfloat16 to what its 8 bits allow; outputs
    that a graph may hold."""
    resolved = train.resolve(config)
    teachers = train.load_teachers(resolved, *loaded(resolved))
    plain = models.load_weights("resnet8", teacher_file).eval()
    test = data.load_dataset("shapes", "", "test")
    inputs = data.to_input(test.images, 32, (0.5,) * 3, (0.25,) * 3)
    with torch.no_grad():
        expected = plain(inputs)
    if amp:
        teachers = train.Teachers([*teachers.teachers], with_(resolved, amp=True))
    for got, want in zip(teachers(inputs), expected):
        assert got.dtype == torch.float32 and not got.is_inference() and not got.requires_grad
        assert 0 < (got - want).abs().max() <= bound * want.abs().max()


def test_train_epoch_leaves_the_teachers_as_they_were(config):
    resolved = train.resolve(config)
    training, _ = train.prepare(resolved, *loaded(resolved))
    student = training.model.student
    before, after = ({key: value.clone() for key, value in module.state_dict().items()}
                     for module in (training.teachers, student))
    step = train.step_of(training)
    means = train.train_epoch(training, step, 0, files.Progress("", 150), [])
    assert set(means) == {"loss", "ce", "logit", "feature", "train_accuracy"}
    assert equal(before, training.teachers.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in training.teachers.parameters())
    assert not any(torch.equal(value, after[key]) for key, value in student.state_dict().items())


def test_train_epoch_ends_after_the_step_of_a_signal(config):
    resolved = train.resolve(with_(config, method="scratch"))
    training, _ = train.prepare(resolved, *loaded(resolved))
    step = train.step_of(training)
    assert train.train_epoch(training, step, 0, files.Progress("", 150), [15]) is None


@pytest.mark.parametrize("method", train.METHODS)
def test_run_of_every_method(config, method):
    summary = train.run(with_(config, method=method, epochs=1))
    assert summary["method"] == method and summary["student_accuracy"] is not None


def test_run_trains_and_fuses_two_teachers(config):
    two = with_(config, teacher=("resnet14", "resnet8"), teacher_weights=None, epochs=1)
    summary = train.run(two)
    assert summary["teacher"] == "resnet14+resnet8" and summary["teacher_accuracy"] is not None
    teachers = sorted(Path(config.cache_dir).glob("teacher-shapes-*"))
    assert len(teachers) == 2 and all((folder / "student.pt").is_file() for folder in teachers)
    before = [(folder / "student.pt").stat().st_mtime_ns for folder in teachers]
    train.run(with_(two, seed=1, out=config.out + "-1"))  # the same teachers, from the cache
    assert [(folder / "student.pt").stat().st_mtime_ns for folder in teachers] == before


def test_run_asks_for_tensorboard_before_any_work(config, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard needs the package.*pip install"):
        train.run(with_(config, tensorboard=True))
    assert not Path(config.out).exists()
    assert runs.settings(config) == runs.settings(with_(config, tensorboard=True))


def test_keep_epoch_gives_tensorboard_every_column_of_the_log(config, monkeypatch):
    scalars = []

    class Writer:
        def __init__(self, folder):
            pass

        def __enter__(self):
            return SimpleNamespace(add_scalar=lambda *values: scalars.append(values))

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=Writer))
    train.run(with_(config, method="scratch", tensorboard=True))
    with open(Path(config.out) / "log.csv") as file:
        rows = list(csv.DictReader(file))
    expected = [(name, float(value), epoch) for epoch, row in enumerate(rows, 1)
                for name, value in row.items()]
    assert scalars == expected and len(rows) == 2


# ---- two processes


def script(path, text):
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + text)
    return path


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
RANKS = """
import torch, command, shapes, train
shapes.SIZES = {"train": 150, "test": 51, "shift": 50}
torch.set_num_threads(1)
config = train.Config(teacher=("resnet14",), student="resnet8", clip=sys.argv[1], epochs=2,
                      batch_size=50, num_negatives=64, cache_dir=sys.argv[2], out=sys.argv[3],
                      device="cpu")
command.main(lambda: train.run(config))
"""


@pytest.mark.slow
def test_run_of_two_processes_makes_the_same_files(clip_file, tmp_path, monkeypatch):
    path, out = script(tmp_path / "script.py", RANKS), tmp_path / "run"
    done = subprocess.run([sys.executable, *TORCHRUN, path, clip_file, tmp_path / "cache", out],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == FILES
    summary = json.loads((out / "summary.json").read_text())
    monkeypatch.setattr(shapes, "SIZES", {"train": 150, "test": 51, "shift": 50})
    test, info = data.load_dataset("shapes", "", "test"), data.DATASETS["shapes"]
    model = models.load_weights("resnet8", out / "student.pt").eval()  # rank 0's, which both tested
    logits = model(data.normalize(test.images, info.mean, info.std))[0]
    assert train.top1(logits, test.labels) == summary["student_accuracy"]
    assert done.stderr.count("epoch 2/2") == 2  # the teacher's and the student's line, each once


LOSSES = """
import json, os, signal, torch, command, data, shapes, train
from pathlib import Path
shapes.SIZES = {"train": 250, "test": 50, "shift": 50}
torch.set_num_threads(1)
ranks, path = int(sys.argv[5]), Path(f"{sys.argv[4]}-{os.environ.get('RANK', 0)}.json")
losses = json.loads(path.read_text()) if path.exists() else []

def forward(model, inputs, teachers, *supervision):
    if ranks == 1:  # what each rank would see through the student by itself, then interleaved again
        shares = [model.student(inputs[rank::2]) for rank in range(2)]
        logits, features = (torch.stack(pair, 1).flatten(0, 1) for pair in zip(*shares))
    else:
        logits, features = model.student(inputs)
    loss, parts = model.criterion(logits, features, *teachers(inputs), *supervision)
    losses.append([loss.item(), *(part.item() for part in parts.values())])
    first = ranks == 2 and not path.exists()
    if first and len(losses) == 8 and command.rank() == 1:  # one is told to stop; both do
        os.kill(os.getpid(), signal.SIGTERM)
    return loss, parts, logits

train.StudentAndLoss.forward = forward
Model = train.StudentAndLoss
load, to_input, init = train.load_teachers, data.to_input, Model.__init__

def load_teachers(*arguments):
    teachers = load(*arguments).double()
    teachers.dtype = torch.float64
    return teachers

train.load_teachers = load_teachers
data.to_input = lambda *arguments: to_input(*arguments).double()
Model.__init__ = lambda model, *arguments: init(model, *arguments) or model.double() and None
try:
    train.run(train.Config(teacher=("resnet8",), teacher_weights=(sys.argv[1],), student="resnet8",
                           clip=sys.argv[2], epochs=4, batch_size=50, num_negatives=64,
                           cache_dir=sys.argv[3], out=sys.argv[4], device="cpu"))
except KeyboardInterrupt as stop:
    assert stop.args[0] == signal.SIGTERM and "keeps epoch 1 of 4" in stop.args[1], stop.args
    del losses[5:]  # the second epoch is gone through again
command.leave_ranks()
path.write_text(json.dumps(losses))
"""


@pytest.mark.slow
def test_run_of_two_processes_has_the_losses_of_one(clip_file, tmp_path):
    """RichKD (L+F) for 20 steps. BatchNorm normalises by each process's own half of the batch, so
    the one process sends the two halves through the student one after the other; all else is as it
    is. In float64: float32's rounding grows tenfold every few steps at this learning rate, whatever
    makes it. A signal stops the two in the second epoch, and the same command goes on."""
    path, teacher = script(tmp_path / "script.py", LOSSES), tmp_path / "teacher.pt"
    torch.manual_seed(1)
    torch.save(models.build_model("resnet8", 25).state_dict(), teacher)
    for world in ("2", "2", "1"):
        done = subprocess.run([sys.executable, *(TORCHRUN if world == "2" else ()), path, teacher,
                               clip_file, tmp_path / "cache", tmp_path / world, world],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, left, right = (torch.tensor(json.loads((tmp_path / name).read_text()), dtype=torch.float64)
                        for name in ("1-0.json", "2-0.json", "2-1.json"))
    difference = (one - (left + right) / 2).abs() / one.abs()
    print(f"largest relative difference of loss, ce, logit, feature over 20 steps: "
          f"{difference.amax(0).tolist()}")
    assert len(one) == 20 and difference.max() < 1e-9


AGENT = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
         "--rdzv-backend=c10d", "--rdzv-id=test", "--rdzv-endpoint"]
DIES = """
import os, time
step = train.train_step
def train_step(training, batch):
    if command.rank() == 1 and os.environ.get("DIES") and training.config.method == "richkd":
        with open(os.environ["DIES"], "w") as file:
            file.write(str(time.time()))
        os._exit(9)
    return step(training, batch)
train.train_step = train_step
"""


def two_machines(arguments, port, seconds, **environment):
    """Two of torchrun's agents on this machine, which find each other as two machines do."""
    agents = [subprocess.Popen([sys.executable, *AGENT, f"127.0.0.1:{port}", *arguments],
                               stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
              for _ in range(2)]
    said = [agent.communicate(timeout=seconds)[1] for agent in agents]
    return [agent.returncode for agent in agents], said


@pytest.mark.slow
def test_run_of_two_machines_where_one_dies_ends_and_goes_on(clip_file, tmp_path):
    """A rank that dies ends the others within a minute; the same command goes on, with what was
    made before, the targets by both ranks, and the teacher."""
    head, tail = RANKS.rsplit("command.main", 1)
    out, text = tmp_path / "run", head + DIES + "command.main" + tail
    path = script(tmp_path / "script.py", text)
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
    assert "Warning" not in "".join(said)


# ---- wrong input: one line that names it


@pytest.mark.parametrize("changes, message", [
    ({"dataset": "mnist"}, "--dataset 'mnist': expected one of shapes, cifar10, cifar100, "),
    ({"method": "magic"}, "--method 'magic': expected one of scratch, kd, "),
    ({"student": "resnet21"}, "unknown model 'resnet21'"),
    ({"teacher": ("resnet9",), "teacher_weights": None}, "unknown model 'resnet9'"),
    ({"clip": "ViT-B/64"}, "ViT-B/32, ViT-B/16, ViT-L/14"),
    ({"clip": "missing.pt"}, "missing.pt"),
    ({"alpha": 1.5}, "--alpha 1.5: expected 0 to 1"),
    ({"lam": -0.1}, "--lam -0.1: expected 0 to 1"),
    ({"temperature": 0.0}, "--temperature 0.0: expected more than 0"),
    ({"epochs": 0}, "--epochs 0: expected 1 to inf"),
    ({"method": "kd", "alpha": 0.5}, "--alpha 0.5 does not go with --method kd"),
    ({"teacher_weights": ("a", "b")}, "1 --teacher, but 2 --teacher-weights: expected one a"),
    ({"teacher_weights": ("missing.pth",)}, "missing.pth"),
    ({"prompts": "missing.txt"}, "missing.txt"),
    ({"device": "gpu"}, "--device gpu cannot be used here"),
    ({"logit_loss": "mse"}, "--logit-loss 'mse': expected one of kd, dkd, mlkd"),
])
def test_run_with_wrong_settings(config, changes, message):
    with pytest.raises((ValueError, OSError)) as error:
        train.run(with_(config, **changes))
    assert message in str(error.value)
    assert not Path(config.out).exists()


def test_run_with_wrong_prompts(config, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# only\n\n# comments\n")
    with pytest.raises(ValueError, match="prompts.txt:1: "):
        train.run(with_(config, prompts=str(prompts)))
    prompts.write_text("a photo of a {}\na photo of nothing\n")
    with pytest.raises(ValueError, match="prompts.txt:2: "):
        train.run(with_(config, prompts=str(prompts)))


def test_load_teachers_of_another_architecture_or_class_count(config, tmp_path):
    path = tmp_path / "teacher.pt"
    torch.save(models.build_model("resnet20", 25).state_dict(), path)
    with pytest.raises(ValueError, match=r"layer\d.*resnet20"):
        train.run(with_(config, teacher_weights=(str(path),)))
    torch.save(models.build_model("resnet8", 10).state_dict(), path)
    with pytest.raises(ValueError, match="10 classes"):
        train.run(with_(config, teacher_weights=(str(path),)))


def test_run_whose_loss_is_no_longer_finite_keeps_the_last_epoch(config, monkeypatch):
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate",
                        lambda config, epoch: 1e30 if epoch else rate(config, epoch))
    with pytest.raises(FloatingPointError, match=r"epoch 2, step \d: .*keeps epoch 1") as error:
        train.run(with_(config, method="scratch"))
    assert "\n" not in str(error.value)
    last = files.read_own(Path(config.out) / "last.pt", "")
    assert len(last["log"]) == 1
    assert all(value.isfinite().all() for value in last["student"].values())


def test_run_with_a_damaged_checkpoint_or_config(config):
    scratch = with_(config, method="scratch", epochs=1)
    train.run(scratch)
    out = Path(config.out)
    (out / "summary.json").unlink()
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="last.pt is damaged; --overwrite"):
        train.run(scratch)
    (out / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged; --overwrite"):
        train.run(scratch)


@pytest.mark.parametrize("arguments, message", [
    (["--dataset", "mnist"], "error: argument --dataset: invalid choice: 'mnist' (choose from "),
    (["--alpha", "1.5"], "error: --alpha 1.5: expected 0 to 1"),
    (["--epochs", "many"], "error: argument --epochs: invalid int value: 'many'; --help lists"),
])
def test_main_says_it_in_one_line_and_exits_with_2(arguments, message, tmp_path, monkeypatch,
                                                   capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(lambda: train.run(command.parse(train.Config, "", arguments)))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert err.startswith(message) and err.count("\n") == 1


def test_train_py_is_a_command_that_leaves_nothing_behind_when_refused(tmp_path):
    arguments = ["--dataset", "imagenet", "--data-dir", "nowhere"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *arguments], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: nowhere is no folder; --data-dir names one")
    assert not list(tmp_path.iterdir())


def test_parse_lists_choices_and_defaults(capsys):
    with pytest.raises(SystemExit):
        command.parse(train.Config, "", ["--help"])
    text = capsys.readouterr().out
    assert "{kd,dkd,mlkd}" in text and "{shared,per-image}" in text and "(0.7)" in text
    assert all(command.flag(field.name) in text for field in dataclasses.fields(train.Config))
