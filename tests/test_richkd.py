"""richkd.py against values by hand, the public implementations' numbers, brute force, gradcheck.

golden_richkd.json: made once in float64 (torch 2.14.1) with the inputs of `wave` below. By public
code: KD and standardisation from sunshangquan/logit-standardization-KD, DKD from
megvii-research/mdistiller, MLKD's `kd_loss + bc_loss + cc_loss` at the five temperatures from
Jin-Ying/Multi-Level-Logit-Distillation, two steps of CRD (`ContrastMemory` and `ContrastLoss`,
N 12, d 4, 6 negatives) from HobbitLong/RepDistiller. By this project's first edition (commit
674ebb2), which had the contrastive loss in another form: "first_edition".
"""

import ast
import copy
import doctest
import inspect
import json
import math
import pytest
import richkd
import torch
from helpers import refused
from pathlib import Path
from richkd import ContrastiveMemory, RichKD, nce_loss, scores
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

GOLDEN = json.loads((Path(__file__).parent / "golden_richkd.json").read_text())

def wave(*shape, scale=1.0, phase=0.0):
    """Deterministic float64 numbers that need no random generator."""
    numbers = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(numbers * 1.7 + phase)).reshape(shape)

STUDENT, TEACHER = wave(4, 6, scale=4, phase=0.3), wave(4, 6, scale=5, phase=1.1)
TARGET = torch.tensor([2, 0, 5, 3])
BANK = wave(9, 6, phase=2.3)

def close(actual, expected, tolerance=1e-9):
    expected = torch.as_tensor(expected, dtype=actual.dtype).reshape(actual.shape)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

@pytest.mark.parametrize("name, function", [
    ("kd", lambda s, t: richkd.kd_loss(s, t, 3.0)),
    ("kd_standardized", lambda s, t: richkd.kd_loss(richkd.standardize_logits(s),
                                                    richkd.standardize_logits(t), 2.0)),
    ("dkd", lambda s, t: richkd.dkd_loss(s, t, TARGET, 1.0, 8.0, 4.0)),
    ("mlkd", richkd.mlkd_loss)])
def test_losses_and_gradients_equal_the_public_code(name, function):
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    loss = function(student, teacher)
    loss.backward()
    close(loss.detach(), GOLDEN[name]["loss"])
    close(student.grad, GOLDEN[name]["grad"][0])
    assert teacher.grad is None
    close(richkd.standardize_logits(TEACHER), GOLDEN["standardize"])

def test_kd_loss_by_hand():
    # teacher (3/4, 1/4), student (1/2, 1/2); the T^2 on logits that scale with T; a class ruled out
    # by the teacher, by both
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    close(richkd.kd_loss(torch.zeros(1, 2), teacher, 1.0), expected, 1e-6)
    close(richkd.kd_loss(torch.zeros(1, 2), 4 * teacher, 4.0), 16 * expected, 1e-6)
    teacher = torch.tensor([[math.log(3.0), 0.0, -math.inf]])
    expected = 0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25 * 3)
    close(richkd.kd_loss(torch.zeros(1, 3), teacher, 1.0), expected, 1e-6)
    out = torch.full((4, 1), -math.inf, dtype=torch.float64)
    for loss in (richkd.kd_loss, lambda s, t: richkd.dkd_loss(s, t, TARGET)):
        student = torch.cat([STUDENT, out], 1).requires_grad_()
        value = loss(student, torch.cat([TEACHER, out], 1))
        value.backward()
        close(value.detach(), loss(STUDENT, TEACHER))
        assert student.grad.isfinite().all()

def test_dkd_loss_with_both_weights_one_target_split():
    # Zhao et al., equation 6: KD = TCKD + (1 - p_y of the teacher) NCKD, row by row
    for row in range(len(TARGET)):
        s, t, y = STUDENT[row:row + 1], TEACHER[row:row + 1], TARGET[row:row + 1]
        p = (t / 4).softmax(1)[0, y]
        close(richkd.kd_loss(s, t, 4.0), richkd.dkd_loss(s, t, y, 1.0, (1 - p).item(), 4.0))

def test_losses_stay_finite_where_the_public_code_overflows():
    student = torch.tensor([[600.0, 0.0, -1.0]], requires_grad=True)
    own, drawn = scores(student, torch.eye(3), torch.tensor([1]), torch.tensor([0]))
    for loss in (richkd.dkd_loss(student, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0])),
                 nce_loss(own, drawn, torch.tensor(1.0), 3)):
        gradient, = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all()

@pytest.mark.parametrize("function", [
    lambda s: richkd.kd_loss(s, TEACHER, 3.0),
    lambda s: richkd.dkd_loss(s, TEACHER, TARGET),
    lambda s: richkd.mlkd_loss(s, TEACHER),
    lambda s: richkd.kd_loss(richkd.standardize_logits(s), TEACHER),
    lambda s: richkd.fuse_features(s, TEACHER, 0.3),
    lambda s: nce_loss(*scores(s, BANK, torch.tensor([1, 0, 3, 3]), torch.arange(7), 0.9),
                       torch.tensor(7.0).double(), 9, torch.arange(28).view(4, 7) % 3 == 0),
], ids="kd dkd mlkd standardize fuse nce".split())
def test_losses_gradcheck(function):
    assert torch.autograd.gradcheck(function, STUDENT.clone().requires_grad_())

def test_ensemble_text_features_and_zero_shot_logits_by_hand():
    # The lengths must not matter.
    text = torch.tensor([[[3.0, 0.0], [0.0, 0.5]], [[0.0, -2.0], [0.0, -7.0]]])
    images = torch.tensor([[0.0, 9.0], [2.0, 0.0]])
    features = richkd.ensemble_text_features(text)
    half = math.sqrt(0.5)
    close(features, [[half, half], [0.0, -1.0]], 1e-6)
    logits = richkd.zero_shot_logits(images, 5 * features, 100.0)
    close(logits, [[100 * half, -100.0], [100 * half, 0.0]], 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits, richkd.zero_shot_logits(images, 5 * features, 100.0))

def test_fusion_by_hand():
    teacher, clip = torch.tensor([[1.0, 2.0]]), torch.tensor([[11.0, -8.0]])
    close(richkd.fuse_logits(teacher, clip, 0.7), [[4.0, -1.0]], 1e-6)
    fused = richkd.fuse_features(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.75)
    close(fused, [[3 / math.sqrt(10), 1 / math.sqrt(10)]], 1e-6)
    assert richkd.fuse_logits(teacher, None, 1) is teacher
    assert richkd.fuse_logits(None, clip, 0) is clip
    close(richkd.fuse_teachers([teacher, clip]), [[6.0, -3.0]], 1e-6)
    close(richkd.fuse_teachers([teacher, clip], [3, 1]), [[3.5, -0.5]], 1e-6)
    assert torch.equal(richkd.fuse_teachers([TEACHER]), TEACHER)

def seeded(function, seed=0):
    """The function, with the negatives that a seed draws."""
    torch.manual_seed(seed)
    return function

def small_memory(**settings):
    memory = ContrastiveMemory(12, 4, 6, **settings).double()
    memory.bank.copy_(banks(12))
    return memory

def banks(N):
    """(2, N, 4): the fused one, the student's."""
    return torch.stack([normalize(wave(N, 4, phase=phase), dim=1) for phase in (2.5, 0.5)])

def unit(B, d, phase):
    return normalize(wave(B, d, phase=phase), dim=1).requires_grad_()

def test_memory_equals_the_public_code_over_two_steps():
    memory = small_memory()
    negatives = ((torch.arange(36) * 5 + 3) % 12).view(2, 3, 6)
    index = torch.tensor([[1, 4, 7], [4, 0, 11]])
    for k, golden in enumerate(GOLDEN["crd"]):
        student, fused = unit(3, 4, 0.7 + k), unit(3, 4, 1.9 + k)
        loss = memory(student, fused, index[k], negatives[k])
        loss.backward()
        close(loss.detach(), golden["loss"], 1e-8)
        close(student.grad, golden["grad"][0], 1e-8)
        close(fused.grad, golden["grad"][1], 1e-8)
        close(memory.Z, golden["Z"])
        close(memory.bank, golden["banks"][::-1])

def test_memory_banks_start_in_the_published_range_by_the_seed():
    memory, generator = ContrastiveMemory(1000, 48, 4, seed=3), torch.Generator().manual_seed(3)
    for bank in (memory.bank[1], memory.bank[0]):
        expected = torch.empty(1000, 48).uniform_(-0.25, 0.25, generator=generator)  # sqrt(3 / d)
        assert torch.equal(bank, expected)

@pytest.mark.parametrize("mode, shape", [("shared", (25,)), ("per-image", (3, 25))])
def test_memory_equals_the_first_edition_over_three_steps(mode, shape):
    golden = GOLDEN["first_edition"]["memory " + mode]
    labels = torch.arange(40) % 5
    memory = ContrastiveMemory(40, 6, 25, labels=labels, negatives=mode, seed=3).double()
    for k, step in enumerate(golden["steps"]):
        student, fused = unit(3, 6, 0.7 + k), unit(3, 6, 1.9 + k)
        drawn = torch.Generator().manual_seed(3 * 1_000_003 + k + 1)  # as the first edition drew
        negatives = torch.randint(40, shape, generator=drawn)
        loss = memory(student, fused, torch.tensor([3 + k, 0, 39 - k]), negatives)
        loss.backward()
        close(loss.detach(), step["loss"], 1e-12)
        close(student.grad, step["grad"][0], 1e-12)
        close(fused.grad, step["grad"][1], 1e-12)
    close(memory.Z, golden["Z"], 1e-12)
    close(memory.bank.sum(2), golden["banks"][::-1], 1e-12)

def brute_force(memory, student, fused, index, negatives, labels):
    """Equation (6) by loops, in the published form of two probabilities; negatives (B, J), those of
    the own class left out."""
    N, J = memory.bank.shape[1], negatives.shape[1]
    total = 0.0
    for anchor, bank, Z in zip((student, fused), memory.bank, memory.Z):
        for i, positive in enumerate(index):
            P = torch.exp(anchor[i] @ bank[positive] / 0.07) / Z
            total -= torch.log(P / (P + J / N + 1e-7))
            kept = [j for j in negatives[i] if labels[j] != labels[positive]]
            for j in kept:
                P = torch.exp(anchor[i] @ bank[j] / 0.07) / Z
                total -= torch.log(J / N / (P + J / N + 1e-7)) * J / len(kept)
    return total / len(index)

@pytest.mark.parametrize("per_image", [False, True])
def test_memory_same_class_negatives_are_masked(per_image):
    labels, index = torch.arange(12) % 3, torch.tensor([1, 4, 8])
    negatives = torch.tensor([[0, 1, 2, 3, 4, 8], [5, 7, 9, 10, 1, 3], [2, 0, 5, 4, 4, 6]])
    if not per_image:
        negatives = negatives[:1].expand(3, 6)
    memory = small_memory(labels=labels)
    memory.Z.copy_(torch.tensor([3e5, 5e5]))
    student, fused = unit(3, 4, 0.7), unit(3, 4, 1.9)
    expected = brute_force(memory, student, fused, index, negatives, labels)
    gradient = torch.autograd.grad(expected, (student, fused))
    loss = memory(student, fused, index, negatives if per_image else negatives[0])
    loss.backward()
    close(loss.detach(), expected.detach())
    close(student.grad, gradient[0])
    close(fused.grad, gradient[1])

def test_memory_of_an_image_twice_in_a_batch_leaves_its_last_row():
    memory, student, fused = small_memory(momentum=0.75), unit(3, 4, 0.7), unit(3, 4, 1.9)
    old = memory.bank[1, 5].clone()
    memory(student, fused, torch.tensor([5, 2, 5]))
    close(memory.bank[1, 5], normalize(0.75 * old + 0.25 * student[2].detach(), dim=0))

@pytest.mark.parametrize("mode, shape", [("shared", (6,)), ("per-image", (3, 6))])
def test_memory_draws_with_torchs_own_generator(mode, shape):
    student, fused, index = unit(3, 4, 0.7), unit(3, 4, 1.9), torch.tensor([1, 4, 7])
    first, second, other = (seeded(small_memory(negatives=mode), seed)(student, fused, index)
                            for seed in (5, 5, 6))
    negatives = seeded(torch.randint, 5)(12, shape)
    assert first == second == small_memory()(student, fused, index, negatives) != other

def test_memory_Z_is_the_first_batchs_or_the_loaded_one():
    student, fused, index = unit(3, 4, 0.7), unit(3, 4, 1.9), torch.tensor([1, 4, 7])
    memory = small_memory()
    fresh = copy.deepcopy(memory.state_dict())
    first = memory(student, fused, index, torch.arange(6))
    own, drawn = scores(torch.stack([student, fused]), fresh["bank"], index, torch.arange(6))
    together = torch.cat([own[..., None], drawn], dim=2).detach()
    close(memory.Z, 12 * together.exp().mean((1, 2)), 1e-12)
    Z = memory.Z.clone()
    memory(fused, student, index)
    assert torch.equal(memory.Z, Z)
    memory.load_state_dict(fresh)  # of a criterion that has not run, into one that has
    assert torch.equal(memory(student, fused, index, torch.arange(6)), first)
    memory.load_state_dict({**fresh, "Z": 2 * Z})
    memory(student, fused, index)
    assert torch.equal(memory.Z, 2 * Z)

def test_memory_changes_in_training_mode_only():
    student, fused, index = unit(3, 4, 0.7), unit(3, 4, 1.9), torch.tensor([1, 4, 7])
    memory, trained = small_memory().eval(), small_memory()
    for _ in range(2):  # first without Z: that of the batch serves, and is not kept
        before = copy.deepcopy(trained.state_dict())
        memory.load_state_dict(before)
        again, loss, other = (each(student, fused, index, torch.arange(6))
                              for each in (memory, memory, trained))
        assert again == loss == other
        assert all(torch.equal(x, before[name]) for name, x in memory.state_dict().items())

@pytest.mark.parametrize("bad, images", [(math.nan, 1), (math.inf, 3)])
def test_memory_is_updated_by_finite_rows_alone(bad, images):
    memory, index = small_memory(), torch.tensor([1, 4, 7])
    before, student = memory.bank.clone(), unit(3, 4, 0.7).detach()
    student[:images] = bad
    assert memory(student, unit(3, 4, 1.9), index).isnan()  # the first batch, so no Z
    kept = [(new == old).all(1)[index].tolist() for new, old in zip(memory.bank, before)]
    assert kept == [[False] * 3, [image < images for image in range(3)]]
    assert memory(unit(3, 4, 0.7), unit(3, 4, 1.9), index).isfinite()
    assert memory.state_dict()["Z"].isfinite().all() and memory.bank.isfinite().all()

B, K, N = 6, 5, 21  # N < 4 B: inductor would rather keep the bank for backward than rows of it

def batch(step=0):
    """The eight arguments of RichKD.forward in float32, student widths 7, teacher 9, CLIP 11."""
    tensors = [wave(B, width, scale=3, phase=step + 0.1 * width).float()
               for width in (K, 7, K, 9, K, 11)]
    tensors[2] = tensors[2].flip(1)
    for i in (0, 1):
        tensors[i].requires_grad_()
    return [*tensors, torch.arange(B) % K, (torch.arange(B) * 4 + step) % N]

def make(**settings):
    torch.manual_seed(0)
    return RichKD(7, 9, 11, N, **{"d": 8, "num_negatives": 12, **settings})

def test_richkd_is_its_weighted_parts():
    method, arguments = make(ce_weight=0.5), batch()
    z_s, f_s, z_t, f_t, z_c, f_c, target, index = arguments
    before, memory = [x.detach().clone() for x in arguments], copy.deepcopy(method.memory)
    loss, parts = seeded(method)(*arguments)
    fused = normalize(0.7 * method.teacher_embed(f_t) + 0.3 * method.clip_embed(f_c), dim=1)
    close(parts["ce"], 0.5 * torch.nn.functional.cross_entropy(z_s, target).detach(), 1e-6)
    close(parts["logit"], 3 * richkd.kd_loss(z_s, 0.7 * z_t + 0.3 * z_c, 3.0).detach(), 1e-6)
    feature = seeded(memory)(method.student_embed(f_s), fused, index)
    close(parts["feature"], 0.8 * feature.detach(), 1e-5)
    close(loss.detach(), sum(parts.values()), 1e-6)
    assert not any(part.requires_grad for part in parts.values())
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.parameters())
    assert z_s.grad.abs().sum() > 0 and f_s.grad.abs().sum() > 0
    assert all(torch.equal(x, y) for x, y in zip(arguments, before))

@pytest.mark.parametrize("weight", [1, 0])
def test_richkd_of_one_teacher_alone_is_kd_and_crd_to_the_bit(weight):
    method = make(alpha=weight, lam=weight)
    z_s, f_s, z_t, f_t, z_c, f_c, target, index = batch()
    given = (z_t, f_t, None, None) if weight else (None, None, z_c, f_c)
    student = z_s.detach().clone().requires_grad_()
    memory = copy.deepcopy(method.memory)
    loss, parts = seeded(method)(z_s, f_s, *given, target, index)
    logits, features = (z_t, method.teacher_embed(f_t)) if weight else (z_c, method.clip_embed(f_c))
    kd = 3.0 * richkd.kd_loss(student, logits, 3.0)
    crd = 0.8 * seeded(memory)(method.student_embed(f_s), features, index)
    expected = torch.nn.functional.cross_entropy(student, target) + kd + crd
    assert torch.equal(parts["logit"], kd) and torch.equal(parts["feature"], crd)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(z_s.grad, student.grad)
    assert (method.clip_embed if weight else method.teacher_embed) is None

def test_richkd_part_of_weight_zero_is_neither_computed_nor_allocated():
    logits_only = make(feature_weight=0)
    z_s, f_s, z_t, f_t, z_c, f_c, target, index = batch()
    _, parts = logits_only(z_s, None, z_t, None, z_c, None, target, None)
    assert set(parts) == {"ce", "logit"} and not logits_only.state_dict()
    _, parts = make(logit_weight=0)(z_s, f_s, None, f_t, None, f_c, target, index)
    assert set(parts) == {"ce", "feature"}
    assert set(make(logit_weight=0, feature_weight=0)(z_s, *[None] * 5, target, None)[1]) == {"ce"}

@pytest.mark.parametrize("settings, expected", [
    ({"logit_loss": "dkd"}, lambda s, t, y: richkd.dkd_loss(s, t, y, 1.0, 8.0, 3.0)),
    ({"logit_loss": "mlkd"}, lambda s, t, y: richkd.mlkd_loss(s, t)),
    ({"standardize": True, "temperature": 2.0},
     lambda s, t, y: richkd.kd_loss(richkd.standardize_logits(s),
                                    richkd.standardize_logits(t), 2.0))])
def test_richkd_other_logit_losses_take_the_fused_logits(settings, expected):
    z_s, f_s, z_t, f_t, z_c, f_c, target, index = batch()
    method = make(feature_weight=0, logit_weight=1, **settings)
    _, parts = method(z_s, f_s, z_t, f_t, z_c, f_c, target, index)
    close(parts["logit"], expected(z_s, 0.7 * z_t + 0.3 * z_c, target).detach(), 1e-5)

@pytest.mark.parametrize("loss", ["kd", "dkd", "mlkd"])
@pytest.mark.parametrize("enabled", [True, False])
def test_richkd_half_precision_arguments_give_the_float32_loss(loss, enabled):
    arguments = [x.detach().bfloat16() if x.is_floating_point() else x for x in batch()]
    full = [x.float() if x.is_floating_point() else x for x in arguments]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        value, parts = make(logit_loss=loss)(*arguments)
    expected, exact = make(logit_loss=loss)(*full)
    assert value.dtype == torch.float32 and torch.equal(parts["logit"], exact["logit"])
    close(value, expected, 1e-6)

def test_richkd_takes_what_inference_mode_made():
    arguments, method = batch(), make()
    with torch.inference_mode():
        arguments[2:6] = [x.clone() for x in arguments[2:6]]
    loss, _ = seeded(method)(*arguments)
    loss.backward()
    assert torch.equal(loss, seeded(make())(*batch())[0])
    assert all(x.grad.abs().sum() > 0 for x in method.parameters())

@pytest.mark.parametrize("mode", ["shared", "per-image"])
def test_richkd_survives_a_checkpoint(mode):
    method, resumed = (make(negatives=mode, labels=torch.arange(N) % K, seed=seed)
                       for seed in (4, 5))
    for step in range(4):
        if step == 2:
            resumed.load_state_dict(copy.deepcopy(method.state_dict()))
        losses = [seeded(each, step)(*batch(step))[0] for each in (method, resumed)]
    assert torch.equal(*losses)
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name

@pytest.mark.slow
@pytest.mark.parametrize("backend, loss, mode, masked, capture", [  # inductor takes long
    ("inductor", "kd", "shared", True, True), ("aot_eager", "kd", "per-image", False, False),
    ("aot_eager", "dkd", "shared", False, True), ("aot_eager", "dkd", "per-image", True, True),
    ("aot_eager", "mlkd", "shared", True, False), ("aot_eager", "ls", "shared", False, False)])
def test_richkd_compiled_equals_called(backend, loss, mode, masked, capture):
    """With capture_scalar_outputs, which torch's own warning suggests, and without."""
    from torch._dynamo import config, reset
    from torch._inductor import config as inductor
    settings = {"standardize": True} if loss == "ls" else {"logit_loss": loss}
    labels = torch.arange(N) % K if masked else None
    called, other = (make(negatives=mode, labels=labels, **settings) for _ in range(2))
    reset()
    compiled = torch.compile(other, backend=backend)
    for step in range(2):
        results = []
        for method, function in ((called, called), (other, compiled)):
            arguments = batch(step)
            with config.patch(capture_scalar_outputs=capture), inductor.patch(fallback_random=True):
                value, parts = seeded(function, step)(*arguments)
                (value + function(*arguments)[0]).backward()  # two forward, then backward
            results.append([value.detach(), *parts.values(), arguments[0].grad, arguments[1].grad,
                            *(x.grad for x in method.parameters()), *method.buffers()])
        for expected, actual in zip(*results):
            close(actual.double(), expected.double(), 1e-5)

def test_richkd_step_is_of_few_operations_and_reads_nothing_from_the_device(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU: see test_step
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            if not function.is_view:
                names.append(function.name())
            return function(*arguments, **named or {})
    counts = []
    for weight in (0.0, 0.8):
        method, names = make(feature_weight=weight, labels=torch.arange(N) % K), []
        method(*batch())  # sets Z
        with Operations():
            method(*batch(1))[0].backward()
        counts.append(len(names))
        assert not {"aten::_local_scalar_dense", "aten::nonzero"} & set(names)
    assert counts[1] - counts[0] <= 140

def two_steps(rank, world, folder):
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank,
                                             world_size=world)
    torch.set_num_threads(1)
    method = make(seed=5, labels=torch.arange(N) % K)
    losses = []
    torch.manual_seed(5)  # the ranks' negatives, too
    for step in range(2):
        rows = slice(rank * B // world, (rank + 1) * B // world)
        losses.append(method(*(x[rows] for x in batch(step)))[0].detach())
    torch.save({"losses": torch.stack(losses), "state": method.state_dict()},
               f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()

@pytest.mark.slow
def test_memory_two_processes_keep_the_banks_of_one(tmp_path):
    torch.multiprocessing.spawn(two_steps, (2, str(tmp_path)), nprocs=2)
    two_steps(0, 1, str(tmp_path))
    first, second, alone = (torch.load(tmp_path / name, weights_only=True)
                            for name in ("2-0.pt", "2-1.pt", "1-0.pt"))
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
        close(tensor.double(), alone["state"][name], 1e-6)
    close((first["losses"] + second["losses"]) / 2, alone["losses"], 1e-5)
    assert (first["losses"] != second["losses"]).all()

NAMES = {name for name, value in vars(richkd).items() if inspect.getmodule(value) is richkd}

def alone(name):
    """A function or class from its source and, of richkd.py, the imports and the names in it."""
    namespace, wanted = {"torch": torch, "F": torch.nn.functional, "math": math}, [name]
    for each in wanted:  # which grows
        source = inspect.getsource(getattr(richkd, each))
        names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        wanted += names & NAMES - set(wanted)
        exec(source, namespace)
    return namespace[name]

def test_every_functions_example_works_from_its_source_and_the_names_in_it():
    for name in sorted(NAMES):
        example = doctest.DocTestParser().get_doctest(
            inspect.getdoc(getattr(richkd, name)) or "", vars(richkd), name, None, None)
        if example.examples:
            example.globs = alone(name).__globals__
            assert doctest.DocTestRunner().run(example).failed == 0, name
    method = alone("RichKD")(7, 9, 11, N, d=8, num_negatives=12)
    method.load_state_dict(make().state_dict())
    assert torch.equal(seeded(method)(*batch())[0], seeded(make())(*batch())[0])

S, T, Y, ROWS, J = STUDENT, TEACHER, TARGET, torch.arange(4), torch.arange(7)
OWN, DRAWN = scores(S, BANK, ROWS, J)
ONE, WHOLE = torch.ones, torch.arange  # ONE(4, 1) and so on

@pytest.mark.parametrize("place, named, wrong", [
    (0, "(B, K)", [None, ONE(B), ONE(B, 1)]), (2, "(B, K)", [None, ONE(B, K + 1), ONE(B, 1)]),
    (4, "(B, K)", [None, ONE(B + 1, K), ONE(1, K)]),
    (1, "student_features", [None, ONE(B, 8), ONE(7)]),
    (3, "teacher_features", [None, ONE(B, 1), ONE(B, 9, 9)]),
    (5, "clip_features", [None, ONE(B, 11, 1), ONE(11, B)]),
    (6, "target", [None, ONE(B, 1), WHOLE(4), ONE(B, K), WHOLE(B), WHOLE(B) - 100]),
    (7, "index", [None, ONE(B), WHOLE(1), WHOLE(B)[:, None]]),
    (7, "num_images", [WHOLE(B) + N - 1, WHOLE(B) - 1])])
def test_richkd_names_what_is_wrong_and_leaves_the_memory_alone(place, named, wrong):
    method = make(labels=WHOLE(N) % K)
    method(*batch())
    before = copy.deepcopy(method.state_dict())
    for x in wrong:
        assert named in refused(method, *(x if i == place else y for i, y in enumerate(batch())))
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())

@pytest.mark.parametrize("named, call, wrong", [
    ("(B, K)", richkd.standardize_logits, [wave(2, 3, 4), wave(4, 1), wave(4)]),
    ("target", lambda x: richkd.dkd_loss(S, T, x),
     [None, Y[:, None], Y[:3], Y.double(), torch.eye(6)[Y], Y + 1, Y - 1, Y > 0]),
    ("v:", lambda x: scores(x, BANK, ROWS, J), [wave(4, 1), wave(4, 5), wave(2, 4, 6)]),
    ("v:", lambda x: scores(S, x, ROWS, J), [BANK.expand(2, 9, 6), BANK[:, :1]]),
    ("index", lambda x: scores(S, BANK, x, J), [Y[0], ROWS[:1], ROWS.double(), ROWS + 6]),
    ("negatives", lambda x: scores(S, BANK, ROWS, x), [J + 3, J - 1, J.double(), J[None]]),
    ("tau", lambda x: scores(S, BANK, ROWS, J, x), [0, -0.07, math.nan, ONE(4, 1)]),
    ("own", lambda x: nce_loss(x, DRAWN, ONE(()), 9), [OWN[:, None], OWN[:1]]),
    ("Z", lambda x: nce_loss(OWN, DRAWN, x, 9), [ONE(1), ONE(4)]),
    ("same", lambda x: richkd.sum_kept(DRAWN.clone(), x),
     [ONE(4, 7), ONE(7) > 0, ONE(1, 7) > 0, ONE(4, 1) > 0]),
    ("(K, M, D)", richkd.ensemble_text_features, [wave(12, 6), wave(6), wave(2, 3, 4, 5)]),
    ("class_features", lambda x: richkd.zero_shot_logits(S, x, 1.0), [S[0], BANK.mT, S[None]]),
    ("features", richkd.Embed(6, 3), [wave(4, 5), wave(6), wave(4, 3, 6)]),
    ("weights", lambda x: richkd.fuse_teachers([S, T], x),
     [[], [0, 0], [1, -1], [2, -1], [math.nan, 1], [math.inf, 1]]),
    ("weights", lambda x: richkd.fuse_logits(S, T, x), [-0.1, 1.5, math.nan]),
    ("argument", lambda x: richkd.fuse_teachers([S, T], x), [[1.0], [1.0, 1.0, 1.0]]),
    ("", richkd.fuse_teachers, [[], [None]]),
    ("alpha, lam", lambda x: make(**x), [{"alpha": -0.1}, {"lam": 2}, {"momentum": math.nan}]),
    ("weights", lambda x: make(**x), [{"ce_weight": -1}, {"feature_weight": math.nan}]),
    ("num_negatives", lambda x: make(**x), [{"num_negatives": 0}, {"num_negatives": 1.5}]),
    ("float32", lambda x: make().to(x)(*batch()), [torch.half, torch.bfloat16]),
    ("temperature", lambda x: make(temperature=x)(*batch()), [0, -1, math.nan]),
    ("labels", lambda x: make(labels=x), [J, WHOLE(N)[:, None], ONE(N), [0] * N, WHOLE(N) - 1]),
    ("kd, dkd, mlkd", lambda x: make(logit_loss=x), ["kl"]),
    ("shared, per-image", lambda x: make(negatives=x), ["all"])])
def test_every_function_refuses_what_it_would_compute_wrongly(named, call, wrong):
    for x in wrong:
        assert named in refused(call, x), x

def test_losses_and_fusion_refuse_logits_of_two_shapes_and_no_temperature():
    for pair in ((S, T[:, :1]), (S, T[:1]), (S, T.mT), (S[0], T[0]), (S[None], T[None]), (S, None),
                 (S[:, :1], T[:, :1]), (S[:0], T[:0])):
        for function in (richkd.kd_loss, richkd.mlkd_loss, richkd.fuse_logits, richkd.fuse_features,
                         lambda s, t: richkd.dkd_loss(s, t, Y),
                         lambda s, t: richkd.fuse_teachers([s, t])):
            assert "(B, K)" in refused(function, *pair)
    for bad in (0, -1.0, math.nan, math.inf, None, ONE(4, 1), ONE(1), -ONE(())):
        for function in (richkd.kd_loss, lambda s, t, T: richkd.mlkd_loss(s, t, (2.0, T)),
                         lambda s, t, T: richkd.dkd_loss(s, t, Y, temperature=T)):
            assert "temperature" in refused(function, S, T, bad)
    assert "temperature" in refused(richkd.mlkd_loss, S, T, ())
    learned = torch.tensor(3.0, requires_grad=True)
    close(richkd.kd_loss(S, T, learned).detach(), richkd.kd_loss(S, T))
