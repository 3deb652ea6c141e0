"""richkd.py against values by hand, the public implementations' numbers, brute force, gradcheck.

golden_richkd.json: made once in float64 (torch 2.14.1) with the inputs of `wave` below. By public
code: KD and standardisation from sunshangquan/logit-standardization-KD, DKD from
megvii-research/mdistiller, MLKD's `kd_loss + bc_loss + cc_loss` at the five temperatures from
Jin-Ying/Multi-Level-Logit-Distillation, two steps of CRD (`ContrastMemory` and `ContrastLoss`,
N 12, d 4, 6 negatives) from HobbitLong/RepDistiller. By this project's first edition (commit
674ebb2), which had the contrastive loss in another form: "first_edition".
"""

import copy
import inspect
import io
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import richkd
from richkd import ContrastiveMemory, RichKD

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


# ---- the losses

@pytest.mark.parametrize("name, function", [
    ("kd", lambda s: richkd.kd_loss(s, TEACHER, 3.0)),
    ("kd_standardized", lambda s: richkd.kd_loss(richkd.standardize_logits(s),
                                                 richkd.standardize_logits(TEACHER), 2.0)),
    ("dkd", lambda s: richkd.dkd_loss(s, TEACHER, TARGET, 1.0, 8.0, 4.0)),
    ("mlkd", lambda s: richkd.mlkd_loss(s, TEACHER)),
])
def test_losses_and_gradients_equal_the_public_code(name, function):
    student = STUDENT.clone().requires_grad_()
    loss = function(student)
    loss.backward()
    close(loss.detach(), GOLDEN[name]["loss"])
    close(student.grad, GOLDEN[name]["grad"][0])


def test_standardize_logits_equals_the_public_code():
    close(richkd.standardize_logits(TEACHER), GOLDEN["standardize"])


def test_kd_loss_by_hand():
    # teacher (3/4, 1/4), student (1/2, 1/2); and the T^2 on logits that scale with T
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    close(richkd.kd_loss(torch.zeros(1, 2), teacher, 1.0), expected, 1e-6)
    close(richkd.kd_loss(torch.zeros(1, 2), 4 * teacher, 4.0), 16 * expected, 1e-6)


def test_kd_loss_of_a_class_the_teacher_rules_out():
    teacher = torch.tensor([[math.log(3.0), 0.0, -math.inf]])
    expected = 0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25 * 3)
    close(richkd.kd_loss(torch.zeros(1, 3), teacher, 1.0), expected, 1e-6)


def test_dkd_loss_with_both_weights_one_target_split():
    # Zhao et al., equation 6: KD = TCKD + (1 - p_y of the teacher) NCKD, row by row
    for row in range(len(TARGET)):
        s, t, y = STUDENT[row:row + 1], TEACHER[row:row + 1], TARGET[row:row + 1]
        p = (t / 4).softmax(1)[0, y]
        close(richkd.kd_loss(s, t, 4.0), richkd.dkd_loss(s, t, y, 1.0, (1 - p).item(), 4.0))


def test_dkd_loss_stays_finite_where_the_public_logarithm_overflows():
    student = torch.tensor([[600.0, 0.0, -1.0]], requires_grad=True)
    loss = richkd.dkd_loss(student, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0]))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("function", [
    lambda s: richkd.kd_loss(s, TEACHER, 3.0),
    lambda s: richkd.dkd_loss(s, TEACHER, TARGET),
    lambda s: richkd.mlkd_loss(s, TEACHER),
    lambda s: richkd.kd_loss(richkd.standardize_logits(s), TEACHER),
    lambda s: richkd.fuse_features(s, TEACHER, 0.3),
    lambda s: richkd.nce_loss(s, BANK, torch.tensor([1, 0, 3, 3]), torch.arange(7),
                              torch.tensor(7.0).double(), 0.9),
], ids="kd dkd mlkd standardize fuse nce".split())
def test_losses_gradcheck(function):
    assert torch.autograd.gradcheck(function, STUDENT.clone().requires_grad_())


@pytest.mark.parametrize("loss", [richkd.kd_loss, richkd.mlkd_loss,
                                  lambda s, t: richkd.dkd_loss(s, t, TARGET)])
def test_losses_of_half_precision_and_under_autocast_compute_in_float32(loss):
    student, teacher = STUDENT.bfloat16().requires_grad_(), TEACHER.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    value.backward()
    full = student.detach().float().requires_grad_()
    expected = loss(full, teacher.float())
    expected.backward()
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert torch.equal(student.grad, full.grad.bfloat16())


# ---- fusion

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


def test_fuse_logits_and_fuse_features_by_hand():
    teacher, clip = torch.tensor([[1.0, 2.0]]), torch.tensor([[11.0, -8.0]])
    close(richkd.fuse_logits(teacher, clip, 0.7), [[4.0, -1.0]], 1e-6)
    fused = richkd.fuse_features(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 0.75)
    close(fused, [[3 / math.sqrt(10), 1 / math.sqrt(10)]], 1e-6)


def test_fuse_teachers_and_one_embed_of_their_concatenation():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, -2.0]])
    close(richkd.fuse_teachers([a, b]), [[3.0, 0.0]], 1e-6)
    close(richkd.fuse_teachers([a, b], [3, 1]), [[2.0, 1.0]], 1e-6)
    assert torch.equal(richkd.fuse_teachers([TEACHER]), TEACHER)
    torch.manual_seed(0)
    embed, features = richkd.Embed(5, 4), torch.randn(3, 5)
    left, right = embed.linear.weight[:, :2], embed.linear.weight[:, 2:]
    separate = features[:, :2] @ left.T + features[:, 2:] @ right.T + embed.linear.bias
    torch.testing.assert_close(embed(features), normalize(separate, dim=1))


# ---- the contrastive memory

def small_memory(**settings):
    memory = ContrastiveMemory(12, 4, 6, **settings).double()
    memory.student_bank.copy_(normalize(wave(12, 4, phase=0.5), dim=1))
    memory.fused_bank.copy_(normalize(wave(12, 4, phase=2.5), dim=1))
    return memory


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
        close(memory.student_bank, golden["banks"][0])
        close(memory.fused_bank, golden["banks"][1])


def test_memory_banks_start_in_the_published_range():
    memory = ContrastiveMemory(1000, 48, 4, seed=3)
    for bank in (memory.student_bank, memory.fused_bank):
        assert bank.abs().max() <= 0.25 and bank.abs().max() > 0.2499  # 1 / sqrt(d / 3)
        assert abs(bank.mean()) < 3e-3 and abs(bank.var() - 0.25**2 / 3) < 1e-3
    assert not torch.equal(memory.student_bank, memory.fused_bank)


@pytest.mark.parametrize("name", ["shared", "shared masked", "per-image", "per-image masked"])
def test_nce_loss_equals_the_first_edition(name):
    golden = GOLDEN["first_edition"][name]
    shape = (3, 25) if "per-image" in name else (25,)
    bank, index = normalize(wave(40, 6, phase=0.4), dim=1), torch.tensor([3, 0, 39])
    negatives = (torch.arange(math.prod(shape)) * 7 + 5).reshape(shape) % 40
    same = negatives.expand(3, -1) % 5 == index[:, None] % 5 if "masked" in name else None
    anchor = unit(3, 6, 0.7)
    loss = richkd.nce_loss(anchor, bank, index, negatives, torch.tensor(4e4).double(), 0.3, same)
    loss.backward()
    close(loss.detach(), golden["loss"], 1e-12)
    close(anchor.grad, golden["grad"], 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_nce_loss_equals_the_published_ratios(masked):
    """-log P/(P + c) and -log (J/N)/(P + c), as published, where they do not overflow."""
    bank, index = normalize(wave(50, 6, phase=0.4), dim=1), torch.tensor([3, 0, 49])
    negatives, Z = (torch.arange(300) * 7 + 5) % 50, torch.tensor(4e4).double()
    same = negatives.expand(3, -1) % 5 == index[:, None] % 5
    anchor = unit(3, 6, 0.7)
    loss = richkd.nce_loss(anchor, bank, index, negatives, Z, 0.3, same if masked else None)
    n, c = 300 / 50, 300 / 50 + 1e-7
    P = (anchor @ bank[negatives].T / 0.3).exp() / Z
    positive = ((anchor * bank[index]).sum(1) / 0.3).exp() / Z
    terms = -(n / (P + c)).log()
    if masked:
        terms = terms * ~same * 300 / (~same).sum(1, keepdim=True)
    expected = (terms.sum(1) - (positive / (positive + c)).log()).mean()
    close(loss.detach(), expected.detach())
    close(*torch.autograd.grad(loss, anchor), torch.autograd.grad(expected, anchor)[0])


def test_nce_loss_is_finite_where_the_published_ratios_overflow():
    anchor, bank = torch.tensor([[300.0, 0.0]], requires_grad=True), torch.eye(2)
    loss = richkd.nce_loss(anchor, bank, torch.tensor([1]), torch.tensor([0]), torch.tensor(1.0))
    loss.backward()
    assert loss.isfinite() and anchor.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["shared", "per-image"])
def test_memory_equals_the_first_edition_over_three_steps(mode):
    golden = GOLDEN["first_edition"]["memory " + mode]
    labels = torch.arange(40) % 5
    memory = ContrastiveMemory(40, 6, 25, labels=labels, negatives=mode, seed=3).double()
    shape = (25,) if mode == "shared" else (3, 25)
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
    close(memory.student_bank.sum(1), golden["banks"][0], 1e-12)
    close(memory.fused_bank.sum(1), golden["banks"][1], 1e-12)


def test_memory_shared_negatives_equal_the_same_ones_given_per_image():
    negatives, index = torch.tensor([0, 3, 3, 8, 9, 11]), torch.tensor([1, 4, 7])
    results = []
    for given in (negatives, negatives.expand(3, -1)):
        memory = small_memory(labels=torch.arange(12) % 4)
        student, fused = unit(3, 4, 0.7), unit(3, 4, 1.9)
        loss = memory(student, fused, index, given)
        loss.backward()
        results.append((loss.detach(), student.grad, fused.grad, memory.Z))
    for shared, per_image in zip(*results):
        close(shared, per_image, 1e-12)


def brute_force(memory, student, fused, index, negatives, labels):
    """Equation (6) by loops, in the published form of two probabilities; negatives (B, J), those of
    the own class left out."""
    N, J = len(memory.student_bank), negatives.shape[1]
    total = 0.0
    for anchor, bank, Z in ((student, memory.fused_bank, memory.Z[0]),
                            (fused, memory.student_bank, memory.Z[1])):
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


def test_memory_shared_and_per_image_negatives_estimate_one_expectation():
    """Both means over many draws lie within 4 standard errors of the exact one: J times the mean
    over the other classes."""
    N, J, index = 40, 16, torch.tensor([0, 7, 22])
    labels = torch.arange(N) % 4
    means = {}
    for mode in ("shared", "per-image"):
        memory = ContrastiveMemory(N, 4, J, labels=labels, negatives=mode, seed=1).double()
        memory.student_bank.copy_(normalize(wave(N, 4, phase=0.5), dim=1))
        memory.fused_bank.copy_(normalize(wave(N, 4, phase=2.5), dim=1))
        memory.Z.copy_(torch.tensor([3e5, 5e5]))
        memory.momentum = 1.0  # the banks stay as they are
        student, fused = unit(3, 4, 0.7).detach(), unit(3, 4, 1.9).detach()
        losses = torch.stack([memory(student, fused, index) for _ in range(1500)])
        # (3, 30), each equally likely
        others = torch.stack([(labels != labels[i]).nonzero()[:, 0] for i in index])
        exact = 0.0
        for anchor, bank, Z in ((student, memory.fused_bank, memory.Z[0]),
                                (fused, memory.student_bank, memory.Z[1])):
            for i, positive in enumerate(index):
                P = torch.exp(bank @ anchor[i] / 0.07) / Z
                noise = J / N
                exact -= torch.log(P[positive] / (P[positive] + noise + 1e-7))
                exact -= J * torch.log(noise / (P[others[i]] + noise + 1e-7)).mean()
        exact = exact / 3
        error = losses.std() / len(losses)**0.5
        assert abs(losses.mean() - exact) < 4 * error, mode
        assert error < 0.01 * exact
        means[mode] = losses.mean()
    assert means["shared"] != means["per-image"]


def test_memory_gradcheck():
    memory, index = small_memory(labels=torch.arange(12) % 3), torch.tensor([1, 4, 7])

    def loss(student, fused):
        return copy.deepcopy(memory)(student, fused, index)
    memory.Z.fill_(1e5)
    assert torch.autograd.gradcheck(loss, (unit(3, 4, 0.7), unit(3, 4, 1.9)), atol=1e-4)


def test_memory_of_an_image_twice_in_a_batch_leaves_its_last_row():
    memory, student, fused = small_memory(momentum=0.75), unit(3, 4, 0.7), unit(3, 4, 1.9)
    old = memory.student_bank[5].clone()
    memory(student, fused, torch.tensor([5, 2, 5]))
    close(memory.student_bank[5], normalize(0.75 * old + 0.25 * student[2].detach(), dim=0))


def test_memory_of_which_only_the_banks_grow_with_the_data_set():
    def numbers(N):
        memory = ContrastiveMemory(N, 8, 4, labels=torch.arange(N) % 3)
        return {name: tensor.nbytes for name, tensor in memory.state_dict().items()}
    small, large = numbers(10), numbers(1000)
    assert {name for name in small if small[name] != large[name]} == {"student_bank", "fused_bank"}
    assert large["student_bank"] == 1000 * 8 * 4


# ---- the method

B, K, N = 6, 5, 30


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
    method = make(ce_weight=0.5)
    z_s, f_s, z_t, f_t, z_c, f_c, target, index = batch()
    memory = copy.deepcopy(method.memory)
    loss, parts = method(z_s, f_s, z_t, f_t, z_c, f_c, target, index)
    fused = normalize(0.7 * method.teacher_embed(f_t) + 0.3 * method.clip_embed(f_c), dim=1)
    close(parts["ce"], 0.5 * torch.nn.functional.cross_entropy(z_s, target).detach(), 1e-6)
    close(parts["logit"], 3 * richkd.kd_loss(z_s, 0.7 * z_t + 0.3 * z_c, 3.0).detach(), 1e-6)
    close(parts["feature"], 0.8 * memory(method.student_embed(f_s), fused, index).detach(), 1e-5)
    close(loss.detach(), sum(parts.values()), 1e-6)
    assert not any(part.requires_grad for part in parts.values())
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.parameters())
    assert z_s.grad.abs().sum() > 0 and f_s.grad.abs().sum() > 0


def test_richkd_with_alpha_and_lam_of_one_are_kd_and_crd_to_the_bit():
    method = make(alpha=1, lam=1)
    z_s, f_s, z_t, f_t, _, _, target, index = batch()
    student = z_s.detach().clone().requires_grad_()
    memory = copy.deepcopy(method.memory)
    loss, parts = method(z_s, f_s, z_t, f_t, None, None, target, index)
    kd = 3.0 * richkd.kd_loss(student, z_t, 3.0)
    crd = 0.8 * memory(method.student_embed(f_s), method.teacher_embed(f_t), index)
    expected = torch.nn.functional.cross_entropy(student, target) + kd + crd
    assert torch.equal(parts["logit"], kd) and torch.equal(parts["feature"], crd)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.equal(z_s.grad, student.grad)
    assert method.clip_embed is None


def test_richkd_from_clip_alone():
    method = make(alpha=0, lam=0, ce_weight=0)
    z_s, f_s, _, _, z_c, f_c, target, index = batch()
    memory = copy.deepcopy(method.memory)
    _, parts = method(z_s, f_s, None, None, z_c, f_c, target, index)
    assert torch.equal(parts["logit"], 3.0 * richkd.kd_loss(z_s, z_c, 3.0))
    crd = memory(method.student_embed(f_s), method.clip_embed(f_c), index)
    assert torch.equal(parts["feature"], 0.8 * crd)
    assert set(parts) == {"logit", "feature"} and method.teacher_embed is None


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
                                    richkd.standardize_logits(t), 2.0)),
])
def test_richkd_other_logit_losses_take_the_fused_logits(settings, expected):
    z_s, f_s, z_t, f_t, z_c, f_c, target, index = batch()
    method = make(feature_weight=0, logit_weight=1, **settings)
    _, parts = method(z_s, f_s, z_t, f_t, z_c, f_c, target, index)
    close(parts["logit"], expected(z_s, 0.7 * z_t + 0.3 * z_c, target).detach(), 1e-5)


@pytest.mark.parametrize("enabled", [True, False])
def test_richkd_half_precision_arguments_give_the_float32_loss(enabled):
    arguments = [x.detach().bfloat16() if x.is_floating_point() else x for x in batch()]
    full = [x.float() if x.is_floating_point() else x for x in arguments]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        loss, _ = make()(*arguments)
    assert loss.dtype == torch.float32
    close(loss, make()(*full)[0], 1e-6)


def test_richkd_forward_modifies_none_of_its_arguments():
    arguments = batch()
    before = [x.detach().clone() for x in arguments]
    make(labels=torch.arange(N) % K)(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before))


@pytest.mark.parametrize("mode", ["shared", "per-image"])
def test_richkd_survives_a_checkpoint(mode):
    settings = dict(negatives=mode, labels=torch.arange(N) % K, seed=4)
    method = make(**settings)
    for step in range(2):
        method(*batch(step))
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    resumed = RichKD(7, 9, 11, N, d=8, num_negatives=12, **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(2, 4):
        assert torch.equal(method(*batch(step))[0], resumed(*batch(step))[0])
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def splitmix64(state):
    """The generator as published, in Python's whole numbers: the state's output."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> shift)) * factor % 2**64
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed, step", [(0, 0), (3, 0), (0, 9), (2**31, 2**31)])
def test_memory_draw_is_splitmix64_of_seed_and_step(seed, step):
    memory, per_image = (ContrastiveMemory(997, 4, J, seed=seed, negatives=mode)
                         for J, mode in ((6, "shared"), (2, "per-image")))
    for each in (memory, per_image):
        each.step.fill_(step)
    assert memory.start != ContrastiveMemory(997, 4, 6, seed=seed + 1).start
    counters = [(memory.start + step * 2**32 + i) * 0x9E3779B97F4A7C15 % 2**64 for i in range(6)]
    expected = [splitmix64(counter) % 2**63 % 997 for counter in counters]
    assert memory.draw(3).tolist() == expected
    per_image.start = memory.start
    assert per_image.draw(3).tolist() == [expected[:2], expected[2:4], expected[4:]]


def test_memory_draw_is_uniform():
    memory = ContrastiveMemory(100, 4, 16384)
    counts = torch.zeros(100)
    for step in range(60):
        memory.step.fill_(step)
        counts += memory.draw(64).bincount(minlength=100)
    expected = counts.sum() / 100
    chi_squared = ((counts - expected)**2 / expected).sum()  # of 99 degrees of freedom
    assert 99 - 4 * 198**0.5 < chi_squared < 99 + 4 * 198**0.5


def test_richkd_draws_at_every_step_anew_and_seeds_differ():
    loss = [make(seed=seed, momentum=1.0)(*batch())[1]["feature"] for seed in (0, 0, 1)]
    assert loss[0] == loss[1] != loss[2]
    method = make(momentum=1.0)
    assert len({method(*batch())[1]["feature"].item() for _ in range(3)}) == 3


# ---- two processes

def two_steps(rank, world, folder):
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank,
                                             world_size=world)
    torch.set_num_threads(1)
    method = make(seed=5, labels=torch.arange(N) % K)
    losses = []
    for step in range(2):
        rows = slice(rank * B // world, (rank + 1) * B // world)
        losses.append(method(*(x[rows] for x in batch(step)))[0].detach())
    torch.save({"losses": torch.stack(losses), "state": method.state_dict()},
               f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


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


# ---- each function alone, and bad input

CALLS = {
    "kd_loss": (STUDENT, TEACHER, 3.0), "standardize_logits": (STUDENT,),
    "dkd_loss": (STUDENT, TEACHER, TARGET),
    "mlkd_loss": (STUDENT, TEACHER),
    "nce_loss": (STUDENT, BANK, torch.tensor([1, 0, 3, 3]), torch.arange(7), torch.tensor(9.0)),
    "ensemble_text_features": (wave(2, 3, 4),),
    "zero_shot_logits": (STUDENT, TEACHER, 100.0), "fuse_teachers": ([STUDENT, TEACHER], [1, 2]),
    "fuse_logits": (STUDENT, TEACHER, 0.7), "fuse_features": (STUDENT, TEACHER, 0.7),
    "gather": (STUDENT,),
}


def test_every_function_is_called_alone():
    assert set(CALLS) == {name for name, _ in inspect.getmembers(richkd, inspect.isfunction)}


@pytest.mark.parametrize("name", CALLS)
def test_every_function_works_from_its_source_and_torch_alone(name):
    namespace = {"torch": torch}
    exec(inspect.getsource(getattr(richkd, name)), namespace)
    assert torch.equal(namespace[name](*CALLS[name]), getattr(richkd, name)(*CALLS[name]))


def test_every_class_works_from_its_source_and_the_names_it_uses():
    def alone(name, *needed):
        namespace = {"torch": torch}
        for part in (*needed, name):
            exec(inspect.getsource(getattr(richkd, part)), namespace)
        return namespace[name]
    assert alone("Embed")(7, 4)(torch.randn(2, 7)).shape == (2, 4)
    memory = alone("ContrastiveMemory", "nce_loss", "gather")(12, 4, 6)
    memory(unit(3, 4, 0.7).float(), unit(3, 4, 1.9).float(), torch.tensor([1, 4, 7]))
    build = alone("RichKD", *CALLS, "Embed", "ContrastiveMemory")
    build(7, 9, 11, N, d=8, num_negatives=12)(*batch())


def bad(position, value, method=None):
    arguments = batch()
    arguments[position] = value
    return lambda: (method or make())(*arguments)


@pytest.mark.parametrize("call, message", [
    (lambda: richkd.kd_loss(STUDENT, TEACHER[:, :5]), r"\(4, 6\).*\(4, 5\)"),
    (lambda: richkd.dkd_loss(STUDENT, TEACHER[:3], TARGET), r"\(4, 6\).*\(3, 6\)"),
    (lambda: richkd.dkd_loss(STUDENT, TEACHER, TARGET[:2]), r"\(4, 6\).*\(2,\)"),
    (lambda: richkd.mlkd_loss(STUDENT, TEACHER[:, :5]), r"\(4, 6\).*\(4, 5\)"),
    (lambda: richkd.fuse_logits(STUDENT, TEACHER[:, :5], 0.5), r"\(4, 6\).*\(4, 5\)"),
    (lambda: richkd.fuse_features(STUDENT, TEACHER[:, :5], 0.5), r"\(4, 6\).*\(4, 5\)"),
    (lambda: richkd.fuse_teachers([STUDENT, TEACHER[:, :5]]), r"\(4, 6\).*\(4, 5\)"),
    (lambda: richkd.fuse_teachers([STUDENT, TEACHER], [1.0]), "a weight each"),
    (lambda: richkd.fuse_teachers([STUDENT, TEACHER], [1.0, -1.0]), "-1.0.*>= 0"),
    (lambda: richkd.fuse_teachers([STUDENT, TEACHER], [0.0, 0.0]), "not all 0"),
    (lambda: make(alpha=-0.1), "alpha -0.1"),
    (lambda: make(lam=2), "lam 2"),
    (lambda: make(temperature=0), "temperatures 0, "),
    (lambda: make(nce_temperature=-1), "temperatures 3.0, -1"),
    (lambda: make(logit_loss="kl"), "kd, dkd, mlkd"),
    (lambda: make(negatives="all"), "shared, per-image"),
    (bad(4, torch.zeros(B, 4)), r"\(6, 5\).*\(6, 4\)"),
    (bad(7, torch.arange(5)), r"\(5,\)"),
])
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4, N], [0, 1, 2, 3, 4, -1]])
def test_memory_is_left_alone_by_an_index_outside_of_it(index):
    method = make(labels=torch.arange(N) % K)
    method(*batch())
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(IndexError):
        bad(7, torch.tensor(index), method)()
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())


def test_richkd_shows_nan_in_the_loss():
    arguments = batch()
    arguments[2] = torch.full((B, K), math.nan)
    assert make()(*arguments)[0].isnan()
