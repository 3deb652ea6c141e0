"""train.py's step as a GPU needs it: no reading, no copying, all that an epoch draws from its seed;
without a GPU on tensors that only say that they are on one. And command.CudaGraph's order."""

import contextlib
import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import command
import data
import models
import train
from teachers import Teachers

ROOT = Path(__file__).resolve().parents[1]
METHODS = {**{method: {} for method in train.METHODS}, "per-image": {"negatives": "per-image"},
           "standardize": {"standardize": True}, "amp": {"amp": True},
           "two teachers": {"teacher": ("resnet8", "wrn_16_1")}}


class FromTheHost(TorchDispatchMode):
    """Notes every tensor that is copied from the CPU to another device, as `.to` and `copy_` do."""

    def __init__(self):
        super().__init__()
        self.copied = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[0] if function.overloadpacket is torch.ops.aten._to_copy else args[1]
            if source.device.type == "cpu" != result.device.type:
                self.copied.append(tuple(source.shape))
        return result


def prepare(method, device):
    """A `Training` of 40 random images on the device, as after its first step."""
    name = method if method in train.METHODS else "richkd"
    config = train.Config(method=name, teacher=("resnet8",), student="resnet8", num_negatives=16,
                          batch_size=8, device="cpu")
    config = train.resolve(dataclasses.replace(config, **METHODS[method]))
    config = dataclasses.replace(config, device=device)
    split = data.Split(torch.empty(40, 3, 32, 32, dtype=torch.uint8, device=device),
                       torch.zeros(40, dtype=torch.int64), ["a", "b", "c"])
    tables = (torch.zeros(40, 3).half(), torch.zeros(40, 5).half()) if config.clip else ()
    teachers = None
    if config.teacher:
        teachers = [models.freeze(models.build_model(name, 3)) for name in config.teacher]
        teachers = Teachers(teachers, config).to(device)
    training = train.begin(config, split, teachers, tables, 100.0)
    if hasattr(training.model.criterion, "memory"):
        training.model.criterion.memory.has_Z = True  # the first step is no graph's
    for group in training.optimizer.param_groups:
        group["lr"] = training.rate
    return training


def on_fake_gpu(training):
    """The same within a FakeTensorMode, of tensors that say they are on a GPU."""
    def fake(value):
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")
    for module in (training.model, training.teachers):
        for part in module.modules() if module else ():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = torch.nn.Parameter(fake(parameter),
                                                                parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = fake(buffer)
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1, momentum=0.9,
                                weight_decay=1e-4, fused=True)
    rate = optimizer.param_groups[0]["lr"] = fake(training.rate)
    split = training.split._replace(images=fake(training.split.images),
                                    labels=fake(training.split.labels))
    return training._replace(
        config=dataclasses.replace(training.config, device="cuda"), split=split,
        optimizer=optimizer, tables=tuple(map(fake, training.tables)), rate=rate,
        **{name: fake(getattr(training, name)) for name in ("mean", "std", "sums")})


def no_backward(loss):
    """In the place of autograd, whose engine asks for the driver of a GPU."""
    assert loss.shape == () and loss.requires_grad


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("method", METHODS)
def test_train_step_reads_nothing_from_a_gpu_and_copies_nothing_to_it(method, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", no_backward)
    training = prepare(method, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), FromTheHost() as host:
        training = on_fake_gpu(training)
        places = torch.zeros(4, 8, dtype=torch.int64, device="cuda")
        means = train.train_step(training, places)
    assert not host.copied
    assert means.device.type == "cuda" and means.shape == training.sums.shape


@pytest.mark.parametrize("method", METHODS)
def test_train_step_and_its_backward_pass_on_meta_tensors(method, monkeypatch):
    """As above with autograd, on a device that has no numbers to read at all (and no fused SGD)."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: contextlib.nullcontext())
    training = prepare(method, "meta")
    monkeypatch.setattr(training.optimizer, "step", lambda: None)
    places = torch.zeros(4, 8, dtype=torch.int64, device="meta")
    with FromTheHost() as host:
        means = train.train_step(training, places)
    assert not host.copied
    assert means.device.type == "meta" and means.shape == training.sums.shape
    assert all(parameter.grad is not None for parameter in training.model.parameters())


def test_what_the_tests_above_look_for_is_found():
    with FakeTensorMode(allow_non_fake_inputs=True), FromTheHost() as host:
        there = torch.zeros(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            there.sum().item()
        there + torch.ones(3).to("cuda")
        there.copy_(torch.ones(3))
        assert host.copied == [(3,), (3,)]


class Recorded:
    """torch.cuda as far as `CudaGraph` uses it: a replay calls what was captured."""

    class CUDAGraph:
        def replay(self):
            Recorded.current.calls.append("replay")
            Recorded.current.captured()

    def __init__(self, function):
        self.calls, self.captured, Recorded.current = [], lambda: function(self.argument), self

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        self.calls.append("plain")
        return contextlib.nullcontext()

    def graph(self, graph):
        self.calls.append("capture")
        return contextlib.nullcontext()


def test_cuda_graph_calls_thrice_captures_and_replays(monkeypatch):
    """Every call sees its own argument; one of another shape is called as it is, at any time."""
    seen = []
    recorded = Recorded(lambda argument: seen.append(argument.tolist()))
    monkeypatch.setattr(torch, "cuda", recorded)

    def function(argument):
        recorded.argument = argument
        if recorded.calls[-1:] != ["capture"]:  # which runs nothing
            seen.append(argument.tolist())
        return len(seen)

    graph, arguments = command.CudaGraph(function), [[i, i + 1] for i in range(6)]
    arguments.insert(2, [7])
    for argument in arguments:
        graph(torch.tensor(argument))
    assert seen == arguments
    assert recorded.calls == ["plain"] * 3 + ["capture"] + ["replay"] * 3
    graph(torch.tensor([8]))
    assert seen[-1] == [8] and len(recorded.calls) == 7


@pytest.mark.slow
def test_bench_gpu_runs_in_miniature():
    done = subprocess.run(
        [sys.executable, "bench/bench_gpu.py", "--device", "cpu", "--small", "--steps", "2",
         "--images", "64"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {tuple(line.split()[:4]) for line in done.stdout.splitlines()}
    for method in ("scratch", "kd", "richkd-l", "richkd"):
        assert ("resnet8,", "resnet8,", method, "amp") in rows
    for said in ("CPU, torch", "CLIP (tiny)", "changes a cosine", "jpeg_compression", "fifteen"):
        assert said in done.stdout
