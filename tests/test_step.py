"""train.py's step as a GPU needs it: no reading, no copying, all that an epoch draws from its seed;
without a GPU on tensors that only say that they are on one. And command.CudaGraph's order."""

import contextlib
import data
import dataclasses
import models
import pytest
import torch
import train
from helpers import ROOT, python
from support import command
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from unittest.mock import Mock

METHODS = {**{method: {} for method in train.METHODS}, "per-image": {"negatives": "per-image"},
           "standardize": {"standardize": True}, "amp": {"amp": True},
           "two teachers": {"teacher": ("resnet8", "wrn_16_1")}}

class Crossings(TorchDispatchMode):
    """Notes every operation between the CPU and another device: copies either way, and a tensor of
    the CPU among arguments on the other one, such as an index (one number is no copy)."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        copies = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        kinds = {x.device.type for x in tensors if x.dim() or copies}
        if "cpu" in kinds and len(kinds) > 1:
            self.noted.append(str(function))
        return result

def prepare(method, device):
    """A `train.Run` of 40 random images on the device, as after its first step."""
    name = method if method in train.METHODS else "richkd"
    config = train.Config(method=name, teacher=("resnet8",), student="resnet8", num_negatives=16,
                          batch_size=8, device="cpu")
    config = train.resolve(dataclasses.replace(config, **METHODS[method]))
    config = dataclasses.replace(config, device=torch.device(device))
    split = data.Split(torch.empty(40, 3, 32, 32, dtype=torch.uint8, device=device),
                       torch.zeros(40, dtype=torch.int64), ["a", "b", "c"])
    tables = (torch.zeros(40, 3).half(), torch.zeros(40, 5).half()) if config.clip else ()
    teachers = None
    if config.teacher:
        teachers = [models.freeze(models.build_model(name, 3)) for name in config.teacher]
        teachers = train.Teachers(teachers, config.amp).to(device)
    run = train.begin(config, split, teachers, tables, 100.0)
    if hasattr(run.criterion, "memory"):
        run.criterion.memory.has_Z = True  # the first step is no graph's
    for group in run.optimizer.param_groups:
        group["lr"] = run.rate
    return run

def on_fake_gpu(run):
    """The same within a FakeTensorMode, of tensors that say they are on a GPU."""
    def fake(value):
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")
    for module in filter(None, (run.student, run.criterion, run.teachers)):
        module._apply(fake)
    parameters = [*run.student.parameters(), *run.criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    rate = optimizer.param_groups[0]["lr"] = fake(run.rate)
    split = run.split._replace(images=fake(run.split.images), labels=fake(run.split.labels))
    config = dataclasses.replace(run.config, device=torch.device("cuda"))
    return run._replace(config=config, split=split, optimizer=optimizer, rate=rate,
                        tables=tuple(map(fake, run.tables)),
                        **{name: fake(getattr(run, name)) for name in ("mean", "std", "sums")})

def no_backward(loss):
    """In the place of autograd, whose engine asks for the driver of a GPU."""
    assert loss.shape == () and loss.requires_grad

@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("method", METHODS)
def test_train_step_reads_nothing_from_a_gpu_and_copies_nothing_to_it(method, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", no_backward)
    run = prepare(method, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), Crossings() as crossings:
        run = on_fake_gpu(run)
        drawn = torch.zeros(4, 8, dtype=torch.int64, device="cuda")
        means = train.train_step(run, drawn)
    assert not crossings.noted
    assert means.device.type == "cuda" and means.shape == run.sums.shape

@pytest.mark.parametrize("method", METHODS)
def test_train_step_and_its_backward_pass_on_meta_tensors(method, monkeypatch):
    """As above with autograd, on a device that has no numbers to read at all (and no fused SGD)."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: contextlib.nullcontext())
    run = prepare(method, "meta")
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    drawn = torch.zeros(4, 8, dtype=torch.int64, device="meta")
    with Crossings() as crossings:
        means = train.train_step(run, drawn)
    assert not crossings.noted
    assert means.device.type == "meta" and means.shape == run.sums.shape
    parameters = [*run.student.parameters(), *run.criterion.parameters()]
    assert all(parameter.grad is not None for parameter in parameters)

def test_what_the_tests_above_look_for_is_found():
    with FakeTensorMode(allow_non_fake_inputs=True), Crossings() as crossings:
        there, here = torch.zeros(3, device="cuda"), torch.ones(3)
        with pytest.raises(DataDependentOutputException):
            there.sum().item()
        for count, cross in enumerate((
                lambda: here.to("cuda"), lambda: there.copy_(here), lambda: there.cpu(),
                lambda: there[torch.tensor([0, 2])], lambda: here.copy_(there)), 1):
            cross()
            assert len(crossings.noted) == count, crossings.noted
        there * 2 + there.mean()
        assert len(crossings.noted) == 5

class Recorded:
    """torch.cuda as far as command.CudaGraph uses it: a replay calls what was captured."""

    class CUDAGraph:
        def replay(self):
            Recorded.current.calls.append("replay")
            Recorded.current.captured()

    def __init__(self, function):
        self.calls, self.captured, Recorded.current = [], lambda: function(self.argument), self

    Stream = current_stream = Mock()

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
    graph, arguments = command.CudaGraph(function), [[i, i + 1] for i in range(6)]
    arguments.insert(2, [7])
    for argument in arguments:
        graph(torch.tensor(argument))
    assert seen == arguments
    assert recorded.calls == ["plain"] * 3 + ["capture"] + ["replay"] * 3

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["scratch", "richkd", "mlkd"])
def test_graph_has_the_losses_of_called_steps(method, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    losses = []
    for no_graph in (True, False):
        run = prepare(method, "cuda")
        run.split.images.random_(generator=torch.Generator("cuda").manual_seed(0))
        if hasattr(run.criterion, "memory"):
            run.criterion.memory.has_Z = False
        run = run._replace(config=dataclasses.replace(run.config, no_graph=no_graph))
        step, means = train.step_of(run), []
        for seed in range(3):
            torch.manual_seed(seed)
            means += [step(drawn).clone() for drawn in data.epoch(
                run.split, run.tables, 8, seed, device="cuda")]
        losses.append(torch.stack(means).cpu())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)

@pytest.mark.slow
def test_bench_gpu_runs_in_miniature():
    done = python("bench/bench_gpu.py", "--device", "cpu", "--small", "--steps", 2, "--images", 64,
                  cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = {tuple(line.split()[:4]) for line in done.stdout.splitlines()}
    for method in ("scratch", "kd", "richkd-l", "richkd"):
        assert ("resnet8,", "resnet8,", method, "amp") in rows
