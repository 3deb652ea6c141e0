"""models.py against the public code of the same networks.

`golden_models.json` holds what that code computes; its "source" names repositories, commits and the torch version. Each
network got the weights of `filled` and the images of `batch`; "init" is the sum of |w| over a new network, seed 0.
"""

import argparse
import json
import os
import re
import shutil
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import models

GOLDEN = json.loads(Path(__file__).with_name("golden_models.json").read_text())
TORCHVISION = {"resnet18": "fc", "resnet34": "fc", "resnet50_imagenet": "fc", "mobilenet_v2": "classifier.1"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def filled(state):
    """Random values by name and shape alone; every BatchNorm far from the identity."""
    generator = torch.Generator().manual_seed(1)
    values = {}
    for name, tensor in sorted(state.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            values[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            values[name] = 0.5 + noise.abs()
        elif tensor.dim() == 1:
            values[name] = 0.3 * noise + (1 if name.endswith("weight") else 0)
        else:
            values[name] = noise * (2 / tensor[0].numel()) ** 0.5
    return values


def batch(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def assert_close(found, expected):
    expected = torch.as_tensor(expected)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def meta_model(name, num_classes=100):
    with torch.device("meta"):
        return models.build_model(name, num_classes)


@torch.no_grad()
def save_filled(path, name, num_classes=100):
    state = filled(meta_model(name, num_classes).state_dict())
    torch.save(state, path)
    return state


# --- the networks


def test_zoo_is_complete_and_documented():
    table = {name: int(count.replace(",", "")) for name, count in
             re.findall(r"(\w+) +(\d+(?:,\d{3})+)", models.__doc__)}
    assert set(models.ZOO) == set(table) == {*GOLDEN["networks"], *TORCHVISION}
    for name, count in table.items():
        network = meta_model(name, 100 if name in models.CIFAR_MODELS else 1000)
        assert sum(parameter.numel() for parameter in network.parameters()) == count, name


@pytest.mark.parametrize("name", list(models.CIFAR_MODELS))
def test_layout(name, shared):
    expected = json.loads((shared / "reference" / "zoo-layout.json").read_text())[name]
    assert {key: list(tensor.shape) for key, tensor in meta_model(name).state_dict().items()} == expected


@pytest.mark.parametrize("name", GOLDEN["networks"])
def test_same_numbers_as_the_public_code(name):
    golden = GOLDEN["networks"][name]
    torch.manual_seed(0)
    model = models.build_model(name, 100)
    initial = sum(parameter.detach().abs().double().sum().item() for parameter in model.parameters())
    assert initial == pytest.approx(golden["init"], rel=1e-5)
    model.load_state_dict(filled(model.state_dict()), strict=True)
    images = batch(golden["size"])
    with torch.no_grad():
        logits, features = model.eval()(images)
        frozen = models.freeze(model)(images)
        trained = model.train()(images)
    assert logits.shape == (2, 100) and features.shape == (2, model.num_features)
    assert_close(logits[:, :4], golden["logits"])
    assert_close(features[:, :4], golden["features"])
    assert_close(frozen[0], logits)
    assert_close(frozen[1], features)
    assert_close(trained[0][:, :4], golden["train_logits"])
    statistics = [b.double().abs().sum().item() for n, b in model.named_buffers() if "running" in n]
    assert sum(statistics) == pytest.approx(golden["statistics"], rel=1e-5)
    assert all(b == 8 for n, b in model.named_buffers() if n.endswith("num_batches_tracked"))


@pytest.mark.parametrize("name", TORCHVISION)
def test_same_numbers_as_torchvision(name):
    torch.manual_seed(0)
    model = models.build_model(name, 5).eval()
    torch.manual_seed(0)
    public = torchvision.models.get_model(name.removesuffix("_imagenet"), num_classes=5).eval()
    assert list(model.state_dict()) == list(public.state_dict())
    last = public.get_submodule(TORCHVISION[name])
    read = []
    last.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in public.state_dict().items())
    public.load_state_dict(filled(public.state_dict()))
    model.load_state_dict(public.state_dict())
    images = batch(64)
    with torch.no_grad():
        expected = public(images)
        for network in (model, models.freeze(model)):
            logits, features = network(images)
            assert_close(logits, expected)
            assert_close(features, read[0])
    assert model.num_features == last.in_features


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "mobilenetv2", "shufflenetv1"])
def test_any_image_size(name):
    """Tiny-ImageNet's 64x64, which the public pooling of 8x8 cannot take."""
    logits, features = meta_model(name)(torch.empty(2, 3, 64, 64, device="meta"))
    assert logits.shape == (2, 100) and features.dim() == 2


def test_vgg_pools_once_more_at_64():
    """The public vgg8 at 64x64 reads block4 from 4x4 maps."""
    golden = GOLDEN["vgg8_at_64"]
    model = models.build_model("vgg8", 100)
    model.load_state_dict(filled(model.state_dict()))
    with torch.no_grad():
        assert_close(model.eval()(batch(64))[0][:, :4], golden)


def test_multiply_adds():
    stem, stage1 = 3 * 16 * 9 * 32 * 32, 2 * 16 * 16 * 9 * 32 * 32
    stage2 = (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32) * 16 * 16
    stage3 = (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64) * 8 * 8
    assert models.multiply_adds("resnet8", 100, 32) == stem + stage1 + stage2 + stage3 + 64 * 100


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(models, "ZOO", {name: models.ZOO[name] for name in ("resnet8", "mobilenet_v1")})
    monkeypatch.setattr(models, "images_per_second", lambda step, batch_size: 1 if step() is None else 12.3)
    models.print_zoo()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert rows[0] == ["resnet8", "32x32", "100", "64", "83,892", "12,507,392", "12", "12", "1"]
    assert rows[1][:5] == ["mobilenet_v1", "224x224", "1000", "1024", "4,231,976"]


@pytest.mark.parametrize("name, near", [("resnet9", "resnet8"), ("ResNet50", "resnet50"), ("VGG13", "vgg13"),
                                        ("wrn-40-2", "wrn_40_2"), ("ShuffleV1", "shufflenetv1"), ("qqq", "vgg13")])
def test_unknown_name(name, near, tmp_path):
    for call in (lambda: models.build_model(name, 10), lambda: models.load_weights(name, tmp_path / "none.pt")):
        with pytest.raises(ValueError) as caught:
            call()
        message = str(caught.value)
        assert name in message and near in message and "\n" not in message
        assert ("did you mean" in message and near in message.split("the zoo has")[0]) or name == "qqq"


@pytest.mark.parametrize("num_classes", [0, -1, 2.5, None])
def test_bad_class_count(num_classes):
    with pytest.raises(ValueError, match="num_classes"):
        models.build_model("resnet8", num_classes)


# --- freezing


@pytest.mark.parametrize("name, left", [("resnet20", 0), ("resnet50", 0), ("vgg8", 0), ("shufflenetv2", 0),
                                        ("mobilenet_v1", 0), ("wrn_16_2", 7)])
def test_freeze_folds_what_it_can(name, left):
    """A WRN's BatchNorm behind an addition or in front of a fork cannot be folded: bn1 of 6 blocks and the last one."""
    model = models.build_model(name, 3).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = models.freeze(model)
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules()) == left
    assert not frozen.training and not any(parameter.requires_grad for parameter in frozen.parameters())
    assert frozen.num_features == model.num_features
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in frozen.parameters())


# --- weights


WRAPPERS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 240, "accuracy": torch.tensor(79.4)},
    "state_dict": lambda state: {"state_dict": state, "best_prec1": 91.78},
    "net": lambda state: {"net": state, "acc": 95.1, "epoch": 3},
    "module.": lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "student.pt": lambda state: {"model_name": "vgg8", "model": state, "class_names": list("abcdefg"), "mean": [.5] * 3,
                                 "std": [.2] * 3, "image_size": 32, "dataset": "shapes"},
    "NumPy numbers": lambda state: {"model": state, "best": np.float64(73.2), "top5": np.float32(90), "n": np.int64(3)},
    "half": lambda state: {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("zipped", [True, False])
def test_ways_to_write_a_checkpoint(kind, zipped, tmp_path):
    state = save_filled(tmp_path / "plain.pt", "wrn_16_1", 7)
    path = tmp_path / "weights.pt"
    torch.save(WRAPPERS[kind](state), path, _use_new_zipfile_serialization=zipped)
    random_state = torch.get_rng_state()
    for num_classes in (None, 7):
        model = models.load_weights("wrn_16_1", path, num_classes)
        assert not model.training and model.num_features == 64
        for key, value in model.state_dict().items():
            assert value.dtype == (torch.int64 if key.endswith("tracked") else torch.float32)
            torch.testing.assert_close(value, state[key], atol=2e-3 if kind == "half" else 0, rtol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(ValueError, match="has 7 classes, expected 10"):
        models.load_weights("wrn_16_1", path, 10)


def test_numbers_that_numpy_1_wrote(tmp_path):
    state = save_filled(tmp_path / "weights.pt", "resnet8", 7)
    torch.save({"model": state, "best": np.float64(70)}, tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "weights.pt").read_bytes()
    (tmp_path / "weights.pt").write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert b"cnumpy.core.multiarray\nscalar" in (tmp_path / "weights.pt").read_bytes()
    models.load_weights("resnet8", tmp_path / "weights.pt", 7)


@pytest.mark.parametrize("depth", GOLDEN["option_a"])
def test_option_a_under_akamasters_names(depth, tmp_path):
    golden = GOLDEN["option_a"][depth]
    ours = meta_model(f"resnet{depth}", 10).state_dict()
    state = filled({key.replace("fc.", "linear."): ours[key] for key in ours if "downsample" not in key})
    state = {f"module.{key}": value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save({"state_dict": state, "best_prec1": 92.6}, tmp_path / "weights.th")
    model = models.load_weights(f"resnet{depth}", tmp_path / "weights.th")
    with torch.no_grad():
        logits, features = model(batch(32))
        frozen = models.freeze(model)(batch(32))
    assert_close(logits[:, :4], golden["logits"])
    assert_close(features[:, :4], golden["features"])
    assert_close(frozen[0], logits)


def test_option_b_under_akamasters_names(tmp_path):
    state = save_filled(tmp_path / "ours.pt", "resnet20", 10)
    torch.save({key.replace("fc.", "linear.").replace("downsample", "shortcut"): value for key, value in state.items()},
               tmp_path / "theirs.pt")
    model = models.load_weights("resnet20", tmp_path / "theirs.pt")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_public_resnet20_on_cifar10(shared):
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    files = sorted((shared / "data" / "cifar10-test-100").glob("*.png"))
    labels = torch.tensor([names.index(re.match("[a-z]+", file.name)[0]) for file in files])
    images = torch.stack([pil_to_tensor(Image.open(file)) for file in files]).float() / 255
    mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]]).view(2, 3, 1, 1)
    model = models.freeze(models.load_weights("resnet20", shared / "weights" / "cifar10-resnet20-12fca82f.th", 10))
    with torch.no_grad():
        predicted = model((images - mean) / std)[0].argmax(1)
    assert len(files) == 100 and (predicted == labels).sum() >= 95


def test_both_resnet50(tmp_path):
    """A file tells which of the two is meant; `resnet50_imagenet` cannot mean the other one."""
    torchvision_file, cifar_file = tmp_path / "tv.pt", tmp_path / "cifar.pt"
    save_filled(torchvision_file, "resnet50_imagenet", 3)
    save_filled(cifar_file, "resnet50", 3)
    assert models.load_weights("resnet50", torchvision_file).conv1.kernel_size == (7, 7)
    assert models.load_weights("resnet50_imagenet", torchvision_file).conv1.kernel_size == (7, 7)
    assert models.load_weights("resnet50", cifar_file).conv1.kernel_size == (3, 3)
    with pytest.raises(ValueError, match=r"conv1.weight.*\[64, 3, 7, 7\].*\[64, 3, 3, 3\].*fits resnet50$"):
        models.load_weights("resnet50_imagenet", cifar_file)


def broken(state, change):
    state = dict(state)
    change(state)
    return state


@pytest.mark.parametrize("change, message", [
    (lambda s: s.update({"layer1.0.conv1.weight": torch.zeros(16, 16, 5, 5)}),
     r"resnet8: tensor 'layer1.0.conv1.weight': expected \[16, 16, 3, 3\], found \[16, 16, 5, 5\]$"),
    (lambda s: s.pop("layer2.0.bn1.weight"), r"'layer2.0.bn1.weight': expected \[32\], found none$"),
    (lambda s: s.update({"extra": torch.zeros(3)}), r"'extra': expected none, found \[3\]$"),
    (lambda s: s.update({"fc.bias": torch.zeros(8)}), r"'fc.bias': expected \[7\], found \[8\]$"),
    (lambda s: s.pop("layer3.0.downsample.0.weight"), r"'layer3.0.downsample.0.weight': expected"),
    (lambda s: s.pop("fc.weight"), "last linear layer"),
])
def test_a_tensor_that_does_not_fit(change, message, tmp_path):
    state = save_filled(tmp_path / "good.pt", "resnet8", 7)
    torch.save(broken(state, change), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=message) as caught:
        models.load_weights("resnet8", tmp_path / "bad.pt")
    assert "bad.pt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("saved, asked", [("resnet8", "resnet20"), ("wrn_16_2", "resnet32x4"), ("vgg8", "vgg13"),
                                          ("mobilenetv2", "mobilenet_v2"), ("resnet110", "resnet56")])
def test_the_model_that_fits_is_named(saved, asked, tmp_path):
    save_filled(tmp_path / "weights.pt", saved, 4)
    with pytest.raises(ValueError, match=f"does not fit {asked}: tensor .*; the file fits {saved}$"):
        models.load_weights(asked, tmp_path / "weights.pt")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def not_checkpoints(folder):
    state = meta_model("resnet8", 2).to_empty(device="cpu").state_dict()
    half = folder / "whole.pt"
    torch.save(state, half)
    yield "command", {"model": state, "x": Touch(folder / "executed")}, "carries (posix|nt).mkdir"
    yield "namespace", {"model": state, "opt": argparse.Namespace(lr=.1)}, "carries argparse.Namespace"
    yield "network", models.build_model("resnet8", 2), "carries torch.nn"
    yield "array", {"model": state, "a": np.zeros(3)}, "carries numpy"
    yield "list", [1, 2], "no classifier"
    yield "number", 3, "no classifier"
    yield "empty", {}, "no classifier"
    yield "nothing", b"", "cannot be read"
    yield "text", b"hello world\n", "cannot be read"
    yield "noise", bytes(range(256)) * 20, "cannot be read"
    yield "half", half.read_bytes()[:20000], "cannot be read"


def test_refused_without_executing(tmp_path):
    for name, content, message in not_checkpoints(tmp_path):
        for zipped in (True, False):
            path = tmp_path / f"{name}.pt"
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                torch.save(content, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match=message) as caught:
                models.load_weights("resnet8", path)
            assert f"{name}.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        models.load_weights("resnet8", tmp_path / "none.pt")


# --- ImageNet weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_imagenet_without_a_network(hub, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    for name, file in (("resnet34", "resnet34-b627a593.pth"), ("resnet50", "resnet50-0676ba61.pth")):
        with pytest.raises(FileNotFoundError) as caught:
            models.load_weights(name, "imagenet")
        message = str(caught.value)
        assert f"https://download.pytorch.org/models/{file}" in message and str(hub / file) in message
        assert "--teacher-weights PATH" in message and "\n" not in message
    for name in ("mobilenet_v1", "resnet20"):
        with pytest.raises(ValueError, match=f"no public ImageNet weights for {name}"):
            models.load_weights(name, "imagenet")


def test_imagenet_download(hub, monkeypatch, tmp_path):
    """The file is asked for once, with the digest of its name, and read from the folder from then on."""
    state = save_filled(tmp_path / "served.pt", "resnet18", 1000)
    asked = []

    def download(url, path, hash_prefix, progress):
        asked.append((url, hash_prefix))
        shutil.copy(tmp_path / "served.pt", path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        model = models.load_weights("resnet18", "imagenet", 1000)
        assert torch.equal(model.fc.bias, state["fc.bias"])
    assert asked == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd")]
    with pytest.raises(ValueError, match="has 1000 classes, expected 100"):
        models.load_weights("resnet18", "imagenet", 100)
