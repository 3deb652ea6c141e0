"""models.py against the public code of the same networks.

`golden_models.json` holds what that code computes; its "source" names repositories, commits and the
torch version. Each network got the weights of `filled` and the images of `batch`; "init" is the sum
of |w| over a new network, seed 0."""

import json
import models
import pytest
import re
import torch
import torchvision
from helpers import equal, refused, seeded
from pathlib import Path
from PIL import Image
from support import files
from torchvision.transforms.functional import pil_to_tensor

GOLDEN = json.loads(Path(__file__).with_name("golden_models.json").read_text())
TORCHVISION = ("resnet18", "resnet34", "resnet50_imagenet", "mobilenet_v2")

def filled(state):
    """Random values by name and shape alone; every BatchNorm far from the identity."""
    generator, values = seeded(1), {}
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
    return torch.randn(2, 3, size, size, generator=seeded(2))

def assert_close(found, expected):
    expected = torch.as_tensor(expected)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()

def meta_model(name, num_classes=100):
    with torch.device("meta"):
        return models.build_model(name, num_classes)

def save_filled(path, name, num_classes=100):
    state = filled(meta_model(name, num_classes).state_dict())
    torch.save(state, path)
    return state

@pytest.mark.parametrize("name", [name for name in models.CIFAR_MODELS if name != "resnet18_cifar"])
def test_build_model_has_the_public_layout(name, shared):
    expected = json.loads((shared / "reference" / "zoo-layout.json").read_text())[name]
    state = meta_model(name).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == expected

@pytest.mark.parametrize("name", GOLDEN["networks"])
def test_build_model_and_freeze_against_the_public_code(name):
    golden = GOLDEN["networks"][name]
    torch.manual_seed(0)
    model = models.build_model(name, 100)
    initial = sum(parameter.detach().abs().double().sum() for parameter in model.parameters())
    assert initial.item() == pytest.approx(golden["init"], rel=1e-5)
    model.load_state_dict(filled(model.state_dict()), strict=True)
    images = batch(golden["size"])
    with torch.no_grad():
        logits, features = model.eval()(images)
        frozen = models.freeze(model)(images)
        if name == "vgg8":  # pools once more
            assert_close(model(batch(64))[0][:, :4], GOLDEN["vgg8_at_64"])
        trained = model.train()(images)
    assert logits.shape == (2, 100) and features.shape == (2, model.num_features)
    assert_close(logits[:, :4], golden["logits"])
    assert_close(features[:, :4], golden["features"])
    assert_close(frozen[0], logits)
    assert_close(frozen[1], features)
    assert_close(trained[0][:, :4], golden["train_logits"])
    buffers = dict(model.named_buffers())
    statistics = sum(buffers[key].double().abs().sum() for key in buffers if "running" in key)
    assert statistics.item() == pytest.approx(golden["statistics"], rel=1e-5)
    assert all(buffers[key] == 8 for key in buffers if key.endswith("num_batches_tracked"))

@pytest.mark.parametrize("name", TORCHVISION)
def test_build_model_and_freeze_against_torchvision(name):
    torch.manual_seed(0)
    model = models.build_model(name, 5).eval()
    torch.manual_seed(0)
    public = torchvision.models.get_model(name.removesuffix("_imagenet"), num_classes=5).eval()
    assert equal(model.state_dict(), public.state_dict())
    *_, last = (module for module in public.modules() if isinstance(module, torch.nn.Linear))
    read = []
    last.register_forward_pre_hook(lambda module, args: read.append(args[0]))
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

@pytest.mark.parametrize("name", [
    "resnet8", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "resnet18_cifar",
    "mobilenet_v1"])
def test_build_model_takes_any_image_size(name):
    """Also where the public pooling of 8x8, or of 4x4, cannot: Tiny-ImageNet's 64x64, 224x224."""
    model = meta_model(name)
    for size in (8, 33, 224):
        logits, features = model(torch.empty(2, 3, size, size, device="meta"))
        assert logits.shape == (2, 100) and features.shape == (2, model.num_features), size

def test_build_model_refuses_names_and_class_counts():
    assert set(models.ZOO) == {*GOLDEN["networks"], *TORCHVISION}
    message = refused(models.build_model, "resnet9", 10)
    assert "resnet9" in message and all(name in message for name in models.ZOO)
    for count in (0, -1, 2.5, None):
        assert "num_classes" in refused(models.build_model, "resnet8", count)

@pytest.mark.parametrize("name, left", [
    ("resnet20", 0), ("resnet50", 0), ("vgg8", 0), ("shufflenetv2", 0), ("mobilenet_v1", 0),
    ("wrn_16_2", 7)])
def test_freeze_folds_what_it_can(name, left):
    """A WRN's BatchNorm behind an addition or in front of a fork cannot be folded: bn1 of six
    blocks and the last one."""
    model = models.build_model(name, 3).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = models.freeze(model)
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules()) == left
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert frozen.num_features == model.num_features
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert equal(model.state_dict(), before)

def test_freeze_leaves_other_networks_layers_alone():
    """Registered in another order than called; a layer twice; no statistics; parametrised."""
    class Other(models.BasicBlock):
        def forward(self, x):
            return self.conv1(self.bn1(x))
    conv, bn, relu = torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
    bare = torch.nn.BatchNorm2d(4, track_running_stats=False)
    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(4, 4, 1))
    for model, left in ((Other(4, 4, 1), 2), ((relu, conv, relu, bn), 1), ((normed, bn), 1),
                        ((conv, bare), 1), ((conv, bn), 0)):
        model = torch.nn.Sequential(*model) if isinstance(model, tuple) else model
        model.load_state_dict(filled(model.state_dict()))
        frozen, images = models.freeze(model), torch.randn(2, 4, 3, 3)
        assert_close(frozen(images), model.eval()(images))
        assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in frozen.modules()) == left

def test_load_weights_of_half_precision_reads_the_classes_and_draws_nothing(tmp_path):
    state, path = save_filled(tmp_path / "weights.pt", "wrn_16_1", 7), tmp_path / "weights.pt"
    torch.save({"model": {key: value.half() for key, value in state.items()}}, path)
    random_state = torch.get_rng_state()
    for num_classes in (None, 7):
        model = models.load_weights("wrn_16_1", path, num_classes)
        assert not model.training and model.num_features == 64
        for key, value in model.state_dict().items():
            assert value.dtype == (torch.int64 if key.endswith("tracked") else torch.float32)
            assert torch.equal(value, state[key].half().float())
    assert torch.equal(torch.get_rng_state(), random_state)
    message = refused(models.load_weights, "wrn_16_1", path, 10)
    assert "weights.pt" in message and "[10, 64], found [7, 64]" in message

@pytest.mark.parametrize("depth", GOLDEN["option_a"])
def test_load_weights_option_a_under_akamasters_names(depth, tmp_path):
    golden = GOLDEN["option_a"][depth]
    ours = meta_model(f"resnet{depth}", 10).state_dict()
    theirs = {key.replace("fc.", "linear."): ours[key] for key in ours if "downsample" not in key}
    state = {f"module.{key}": value for key, value in filled(theirs).items()
             if not key.endswith("num_batches_tracked")}
    torch.save({"state_dict": state, "best_prec1": 92.6}, tmp_path / "weights.th")
    model = models.load_weights(f"resnet{depth}", tmp_path / "weights.th")
    with torch.no_grad():
        logits, features = models.freeze(model)(batch(32))
    assert_close(logits[:, :4], golden["logits"])
    assert_close(features[:, :4], golden["features"])

@pytest.mark.parametrize("asked, cifar, imagenet", [
    ("resnet18", "resnet18_cifar", "resnet18"), ("resnet50", "resnet50", "resnet50_imagenet")])
def test_load_weights_tells_cifars_network_by_its_stem(asked, cifar, imagenet, tmp_path, capsys):
    """The field calls both by one name, and CIFAR's tensors by several; the other two names are
    plain. What no tensor tells is said."""
    save_filled(tmp_path / "7x7.pt", imagenet, 3)
    state = save_filled(tmp_path / "ours.pt", cifar, 3)
    torch.save({"net": {f"module.{key.replace('downsample', 'shortcut')}": state[key]
                        for key in state}}, tmp_path / "kuangliu.pth")
    torch.save({key.replace("linear", "fc").replace("shortcut", "downsample"): state[key]
                for key in state}, tmp_path / "torchvision.pt")
    assert models.load_weights(asked, tmp_path / "7x7.pt").conv1.kernel_size == (7, 7)
    other, file = (cifar, "7x7.pt") if asked == "resnet18" else (imagenet, "ours.pt")
    message = refused(models.load_weights, other, tmp_path / file)
    assert file in message and "conv1.weight" in message
    for file in ("ours.pt", "kuangliu.pth", "torchvision.pt"):
        assert capsys.readouterr().err == ""
        assert equal(models.load_weights(asked, tmp_path / file, 3).state_dict(), state)
    said = capsys.readouterr().err
    assert "torchvision.pt" in said and "max-pooling" in said

def test_load_weights_of_a_public_resnet20(shared):
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    paths = sorted((shared / "data" / "cifar10-test-100").glob("*.png"))
    labels = torch.tensor([names.index(re.match("[a-z]+", path.name)[0]) for path in paths])
    images = torch.stack([pil_to_tensor(Image.open(path)) for path in paths]).float() / 255
    mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]]).view(2, 3, 1, 1)
    weights = shared / "weights" / "cifar10-resnet20-12fca82f.th"
    model = models.freeze(models.load_weights("resnet20", weights, 10))
    with torch.no_grad():
        predicted = model((images - mean) / std)[0].argmax(1)
    assert len(paths) == 100 and (predicted == labels).sum() == 97

@pytest.mark.parametrize("change, tensor", [
    (lambda state: state.update({"layer1.0.conv1.weight": torch.zeros(16, 16, 5, 5)}), "layer1.0."),
    (lambda state: state.pop("layer3.0.downsample.0.weight"), "layer3.0.downsample.0.weight"),
    (lambda state: state.update(extra=torch.zeros(3)), "extra"),
    (lambda state: state.update(stem=state.pop("conv1.weight")), "conv1.weight")])
def test_load_weights_names_file_and_tensor_that_do_not_fit(change, tensor, tmp_path):
    state = save_filled(tmp_path / "weights.pt", "resnet8", 7)
    change(state)
    torch.save(state, tmp_path / "weights.pt")
    message = refused(models.load_weights, "resnet8", tmp_path / "weights.pt")
    assert "weights.pt" in message and f"'{tensor}" in message

def test_imagenet_file_is_downloaded_by_the_digest_in_its_name(tmp_path, monkeypatch):
    assert "none.pt" in refused(models.load_weights, "resnet8", tmp_path / "none.pt")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    asked = (f"https://download.pytorch.org/models/{path.name}", path, "sha256:f37072fd")
    assert models.imagenet_file("resnet18") == asked
    assert models.imagenet_file("resnet50_imagenet")[2] == "sha256:0676ba61"
    for name in ("mobilenet_v1", "resnet20"):
        assert name in refused(models.imagenet_file, name)
    path.parent.mkdir()
    state, fetched = save_filled(path, "resnet18", 1000), []
    monkeypatch.setattr(files, "fetch", lambda urls, *how: fetched.append((*urls, *how)))
    assert torch.equal(models.load_weights("resnet18", "imagenet").fc.bias, state["fc.bias"])
    assert fetched == [(*asked, fetched[0][3])] and "--teacher-weights PATH" in fetched[0][3]
