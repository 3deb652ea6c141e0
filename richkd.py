"""RichKD: knowledge distillation from a conventional teacher fused with CLIP, in plain PyTorch.

Mansourian, Babaei, Kasaei, "Enriching Knowledge Distillation with Cross-Modal Teacher Fusion", arXiv 2511.09286.
Leaf functions first, the method `RichKD` last. A function needs nothing but torch: copy it alone. NaN and indices are
checked on the CPU only: reading a GPU's numbers at every step would stall it, a training loop looks now and then.

The method (equation numbers are this file's; the docstrings refer to them)

  ensemble     (1)  w_k   = unit( mean_m unit(t_km) )                        t_km: text feature of class k, template m
  zero shot    (2)  z_C   = s * unit(x) . w_k                                x: CLIP's image feature
  fusion       (3)  z_F   = a z_T + (1 - a) z_C                              logits
               (4)  f_F   = unit( l g_T(f_T) + (1 - l) g_C(f_C) )            features;  g(f) = unit(W f + b)
  logit loss   (5)  L_log = T^2 KL( softmax(z_F / T) || softmax(z_S / T) )   or (9) DKD, (10) MLKD; (8) standardises
  feature loss (6)  P(v, r) = exp(v . r / tau) / Z                           v: an embedding, r: a row of a memory bank
                    L_fea = - log P+ / (P+ + c)  -  sum_j log (J/N) / (P-_j + c),   c = J/N + 1e-7
                    once with v = g_S(f_S) against the bank of f_F, once with v = f_F against the bank of g_S(f_S);
                    then r_i <- unit( mu r_i + (1 - mu) v_i ) in both banks  or (11) MSE, (12) RKD
  total        (7)  L     = w_ce CE(z_S, y) + w_log L_log + w_fea L_fea

  symbol   argument           paper     |  symbol    argument             paper
  a        alpha              0.7       |  J         num_negatives        16384
  l        lam                0.7       |  tau       nce_temperature      0.07
  T        temperature        3         |  mu        momentum             0.5
  s        scale              exp(logit_scale) of CLIP, about 100; 1 in the authors' script (raw cosines)
  w_ce, w_log, w_fea          ce_weight, logit_weight, feature_weight: 1, 3, 0.8
  B batch, K classes, M templates, D CLIP's width, C a classifier's feature width, d (128) the shared width, N images
"""

import torch


def kd_loss(student_logits, teacher_logits, temperature=3.0):
    """Knowledge distillation, T^2 KL(teacher || student), mean over the batch: equation (5).

    Both logits (B, K), temperature > 0 -> (), float32 at least. Hinton et al., arXiv 1503.02531, section 2; its T^2
    keeps the gradient's scale; mdistiller `KD.py`. ValueError: shapes that differ, temperature <= 0, NaN.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"shapes differ: student {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)  # half precision loses the small probabilities
    student = (student_logits.to(dtype) / temperature).log_softmax(1)
    teacher = (teacher_logits.to(dtype) / temperature).softmax(1)
    loss = torch.nn.functional.kl_div(student, teacher, reduction="batchmean") * temperature**2
    if loss.is_cpu and loss.isnan():
        raise ValueError("the KD loss is NaN: student or teacher logits hold NaN or infinity")
    return loss


def standardize_logits(logits):
    """Z-score of every row, (z - mean) / (1e-7 + unbiased std): equation (8). (B, K) -> (B, K), float32 at least.

    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024: student and teacher, before the softmax.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits - logits.mean(-1, keepdim=True)) / (1e-7 + logits.std(-1, keepdim=True))


def dkd_loss(student_logits, teacher_logits, target, alpha=1.0, beta=8.0, temperature=4.0):
    """Decoupled KD, T^2 (alpha KL(b_T || b_S) + beta KL(q_T || q_S)), mean over the batch: equation (9).

    b = (p_y, 1 - p_y) is the target class against the rest, q the softmax over the other K - 1 classes.
    Logits (B, K), target (B,) int64 -> (), float32 at least. Zhao et al., CVPR 2022, equation 7; defaults of
    mdistiller's `DKD.py`, whose first 20 epochs ramp the weight up. ValueError: shapes, temperature <= 0, NaN.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"shapes differ: student {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}")
    if target.shape != student_logits.shape[:1]:
        raise ValueError(f"target is {tuple(target.shape)}, expected (B,) for logits {tuple(student_logits.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected > 0")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    # 1000 less on the target's logit: its probability is exactly 0, its logarithm finite.
    hide = torch.zeros_like(student_logits, dtype=dtype).scatter_(1, target[:, None], 1000.0)  # (B, K)
    binary, others = [], []
    for logits in (student_logits, teacher_logits):
        logits = (logits.to(dtype) / temperature).log_softmax(1)
        rest = (logits - hide).logsumexp(1, keepdim=True)  # (B, 1), log(1 - p_y) without cancellation
        binary.append(torch.cat([logits.gather(1, target[:, None]), rest], dim=1))  # (B, 2)
        others.append((logits - hide).log_softmax(1))
    tckd, nckd = (torch.nn.functional.kl_div(student, teacher.exp(), reduction="batchmean")
                  for student, teacher in (binary, others))
    loss = temperature**2 * (alpha * tckd + beta * nckd)
    if loss.is_cpu and loss.isnan():
        raise ValueError("the DKD loss is NaN: student or teacher logits hold NaN or infinity")
    return loss


def mlkd_loss(student_logits, teacher_logits, temperatures=(2.0, 3.0, 4.0, 5.0, 6.0)):
    """Multi-level logit distillation: equation (10), with p the (B, K) softmax at temperature T,

    sum_T  T^2 KL(p_T || p_S)  +  |p_T p_T' - p_S p_S'|^2 / B  +  |p_T' p_T - p_S' p_S|^2 / K
           instance level         batch level, (B, B)             class level, (K, K)

    Logits (B, K) -> (), float32 at least. Jin et al., "Multi-Level Logit Distillation", CVPR 2023; temperatures and
    norms of the public `KD_ours.py`, for one view and without its confidence masks. ValueError: shapes, T <= 0, NaN.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"shapes differ: student {tuple(student_logits.shape)}, teacher {tuple(teacher_logits.shape)}")
    if not all(temperature > 0 for temperature in temperatures):
        raise ValueError(f"temperatures are {temperatures}, expected > 0")
    B, K = student_logits.shape
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.to(dtype)
    loss = 0.0
    with torch.autocast(student_logits.device.type, enabled=False):  # the products below stay in float32
        for T in temperatures:
            log_student = (student_logits / T).log_softmax(1)
            student, teacher = log_student.exp(), (teacher_logits / T).softmax(1)
            loss = loss + T**2 * torch.nn.functional.kl_div(log_student, teacher, reduction="batchmean")
            loss = loss + (teacher @ teacher.T - student @ student.T).square().sum() / B
            loss = loss + (teacher.T @ teacher - student.T @ student).square().sum() / K
    if loss.is_cpu and loss.isnan():
        raise ValueError("the MLKD loss is NaN: student or teacher logits hold NaN or infinity")
    return loss


def mse_loss(student, fused):
    """Mean squared error of two embeddings (B, d) -> (): equation (11). FitNets, Romero et al., ICLR 2015, equation 3.

    The public FitNet's weight is 100; the mean over d makes unit vectors at most 4 / d apart. ValueError: shapes.
    """
    if student.shape != fused.shape:
        raise ValueError(f"shapes differ: student {tuple(student.shape)}, fused {tuple(fused.shape)}")
    dtype = torch.promote_types(student.dtype, torch.float32)
    return torch.nn.functional.mse_loss(student.to(dtype), fused.to(dtype))


def rkd_loss(student, teacher, distance_weight=25.0, angle_weight=50.0):
    """Relational KD: equation (12), smooth L1 between student and teacher, over the batch, of

    distances  |f_i - f_j| over their mean (i != j)   and   angles  unit(f_i - f_j) . unit(f_k - f_j).

    Features (B, C) and (B, d), the widths free, B >= 2 -> (). Only the student gets a gradient. Park et al., CVPR
    2019, equations 3-8; weights and the 1e-12 of RepDistiller's `RKD.py`. ValueError: different B, or B < 2.
    """
    if student.shape[0] != teacher.shape[0] or len(student) < 2:
        raise ValueError(f"features {tuple(student.shape)}, {tuple(teacher.shape)}: expected one batch of B >= 2")
    B = len(student)
    dtype = torch.promote_types(student.dtype, torch.float32)
    distances, angles = [], []
    with torch.autocast(student.device.type, enabled=False):
        for features in (student.to(dtype), teacher.to(dtype).detach()):
            square = features.square().sum(1)
            distance = (square[:, None] + square - 2 * features @ features.T).clamp(min=1e-12).sqrt()  # (B, B)
            distance = distance * (1 - torch.eye(B, dtype=dtype, device=features.device))
            distances.append(distance / (distance.sum() / (B * (B - 1))))
            direction = torch.nn.functional.normalize(features - features[:, None], dim=2)  # (B, B, C)
            angles.append(direction @ direction.transpose(1, 2))  # (B, B, B)
    smooth_l1 = torch.nn.functional.smooth_l1_loss
    return distance_weight * smooth_l1(*distances) + angle_weight * smooth_l1(*angles)


def nce_loss(anchor, bank, index, negatives, Z, temperature=0.07, same=None, times=None):
    """Noise-contrastive estimation of CRD against one bank: equation (6), mean over the batch.

    anchor (B, d) against the rows index (B,) and negatives, (J,) for the whole batch or (B, J), of bank (N, d);
    Z () the normaliser; same (B, J) bool masks negatives, and the rest of a row stands for all J. Or negatives is None
    and times (N,) says how often each row of the bank was drawn, J times in all; then same is (B, N). -> ()
    D = P / (P + c) says "the pair is real". With h = v . r / tau - log(Z c), - log D is softplus(-h) and - log(1 - D)
    softplus(h): nothing overflows. The negatives' gradient, the sum of sigmoid(h) r, is added up as they pass by, so
    that no (B, J) or (B, J, d) block is kept; the loss can be differentiated once, by the anchor.
    Tian et al., "Contrastive Representation Distillation", ICLR 2020, equation 18; RepDistiller `crd/criterion.py`.
    """
    J = negatives.shape[-1] if times is None else times.sum(dtype=torch.float64)
    (B, d), N, c = anchor.shape, len(bank), J / len(bank) + 1e-7
    anchor, offset = anchor / temperature, (Z * c).log().to(anchor.dtype)
    positive = torch.nn.functional.softplus(offset - (anchor * bank[index].to(anchor.dtype)).sum(1))  # (B,)
    # One product of (B, d) for shared negatives, B products of (1, d) for each image's own.
    shape, block = ((B, 1), 256) if times is None and negatives.ndim == 2 else ((1, B), 2048)
    with torch.no_grad():
        v, same = anchor.view(*shape, d), None if same is None else same.view(*shape, -1)
        negative, gradient = torch.zeros_like(v[..., 0]), torch.zeros_like(v)
        for start in range(0, N if times is not None else J, block):
            part = slice(start, start + block)
            rows = bank[part] if times is not None else torch.nn.functional.embedding(negatives[..., part], bank)
            rows = rows.to(anchor.dtype).view(shape[0], -1, d)
            h = torch.baddbmm(-offset, v, rows.mT)  # (1, B, j) or (B, 1, j)
            if same is not None:
                h.masked_fill_(same[..., part], -torch.inf)
            loss, slope = torch.nn.functional.softplus(h), h.sigmoid_()
            if times is not None:
                loss, slope = loss.mul_(times[part]), slope.mul_(times[part])
            negative += loss.sum(2)
            gradient.baddbmm_(slope, rows)
        weight = 1.0
        if same is not None:
            masked = same.sum(2) if times is None else same.to(times.dtype) @ times
            weight = (J / (J - masked).clamp(min=1)).to(anchor.dtype).view(B)
    negative, gradient = negative.view(B), gradient.view(B, d)
    negative = weight * (negative + (gradient * (anchor - anchor.detach())).sum(1))  # the value, and its gradient
    constant = J * torch.as_tensor(c * N / J, dtype=torch.float64).log()  # the numerator is J/N, not c
    return (positive + negative).mean() + constant.to(anchor.dtype)


def ensemble_text_features(text_features):
    """A class's feature from M templates: equation (1), Radford et al. (CLIP), section 3.1.4. (K, M, D) -> (K, D)."""
    normalize = torch.nn.functional.normalize
    text_features = text_features.to(torch.promote_types(text_features.dtype, torch.float32))
    return normalize(normalize(text_features, dim=2).mean(1), dim=1)


def zero_shot_logits(image_features, class_features, scale):
    """CLIP's logits, scale * cosine: equation (2). (B, D), (K, D) -> (B, K), float32 at least.

    `scale` is CLIP's learned exp(logit_scale), about 100. The authors' script keeps raw cosines, scale 1; at T = 3 they
    move a fused logit by at most 0.1. ValueError: widths that differ.
    """
    if image_features.shape[1:] != class_features.shape[1:]:
        raise ValueError(f"widths differ: images {tuple(image_features.shape)}, classes {tuple(class_features.shape)}")
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    normalize = torch.nn.functional.normalize
    with torch.autocast(image_features.device.type, enabled=False):
        return scale * normalize(image_features.to(dtype), dim=1) @ normalize(class_features.to(dtype), dim=1).T


def fuse_teachers(logits, weights=None):
    """Weighted mean of several conventional teachers' logits, a list of n times (B, K) -> (B, K).

    weights: n numbers >= 0, divided here by their sum; None is equal weights. Features need no such function: one
    `Embed` of their concatenation (B, C_1 + ... + C_n) is the sum of one linear map each. ValueError: shapes, weights.
    """
    weights = [1.0] * len(logits) if weights is None else list(weights)
    if len({z.shape for z in logits}) != 1:
        raise ValueError(f"teacher logits of the shapes {[tuple(z.shape) for z in logits]}, expected equal ones (B, K)")
    if len(weights) != len(logits) or not all(w >= 0 for w in weights) or not sum(weights) > 0:
        raise ValueError(f"teacher weights {weights}, expected {len(logits)} numbers >= 0, not all 0")
    return sum(w / sum(weights) * z.to(torch.promote_types(z.dtype, torch.float32)) for w, z in zip(weights, logits))


def fuse_logits(teacher_logits, clip_logits, alpha=0.7):
    """alpha * teacher + (1 - alpha) * CLIP, alpha in [0, 1]: equation (3). (B, K), (B, K) -> (B, K)."""
    if teacher_logits.shape != clip_logits.shape:
        raise ValueError(f"shapes differ: teacher {tuple(teacher_logits.shape)}, CLIP {tuple(clip_logits.shape)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected a number in [0, 1]")
    dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
    return alpha * teacher_logits.to(dtype) + (1 - alpha) * clip_logits.to(dtype)


def fuse_features(teacher, clip, lam=0.7):
    """lam * teacher + (1 - lam) * CLIP, then unit length: equation (4). Embeddings (B, d), (B, d) -> (B, d)."""
    if teacher.shape != clip.shape:
        raise ValueError(f"shapes differ: teacher {tuple(teacher.shape)}, CLIP {tuple(clip.shape)}")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam is {lam}, expected a number in [0, 1]")
    return torch.nn.functional.normalize(lam * teacher + (1 - lam) * clip, dim=1)


class Embed(torch.nn.Module):
    """The map g of equation (4): linear, then unit length. (B, in_features) -> (B, d). ValueError: another width."""

    def __init__(self, in_features, d=128):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, d)

    def forward(self, features):
        if features.ndim != 2 or features.shape[1] != self.linear.in_features:
            raise ValueError(f"features are {tuple(features.shape)}, expected (B, {self.linear.in_features})")
        with torch.autocast(features.device.type, enabled=False):
            return torch.nn.functional.normalize(self.linear(features.to(self.linear.weight.dtype)), dim=1)


def gather(rows):
    """The rows of all ranks in rank order, (world * B, ...); just `rows` (B, ...) outside torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    gathered = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


class ContrastiveMemory(torch.nn.Module):
    """CRD's two memory banks and its loss: equation (6). Tian et al., ICLR 2020; RepDistiller `crd/memory.py`.

    negatives="shared": one draw of J images serves the whole batch, so that the scores are one matrix product;
    "per-image" is the published estimator, J images for every row and a (B, J, d) block from each bank. Draws are
    uniform over the N images, with replacement. `labels` (N,) int64, where given, masks those of the row's own class
    (CRD's "exact" mode), and both estimate one expectation (see `nce_loss`). Nothing but the banks grows with N
    (`labels` is the data set's own tensor); `bank_dtype=torch.float16` halves them, computing stays in float32.

    State, all of it in `state_dict`: the banks (N, d); Z (2,), -1 until the first batch sets it, as published, to
    N * mean exp(v . r / tau); the number of steps, which with `seed` determines the draw. Under an initialised
    torch.distributed all ranks update with the rows of all, of batches of one size, and their states stay equal (so
    give DistributedDataParallel broadcast_buffers=False, or it sends the banks at every step).
    """

    def __init__(self, num_images, d=128, num_negatives=16384, temperature=0.07, momentum=0.5, *, labels=None,
                 negatives="shared", bank_dtype=torch.float32, seed=0):
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"nce_temperature is {temperature}, expected > 0")
        if negatives not in ("shared", "per-image"):
            raise ValueError(f"negatives is {negatives!r}, expected one of: shared, per-image")
        if labels is not None and labels.shape != (num_images,):
            raise ValueError(f"labels have the shape {tuple(labels.shape)}, expected ({num_images},)")
        self.num_negatives, self.temperature, self.momentum = num_negatives, temperature, momentum
        self.negatives, self.seed = negatives, seed
        generator = torch.Generator().manual_seed(seed)
        bound = (3 / d) ** 0.5  # rows of unit length on average
        for name in ("student_bank", "fused_bank"):
            bank = torch.empty(num_images, d, dtype=bank_dtype).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, bank)
        self.register_buffer("Z", torch.full((2,), -1.0))
        self.register_buffer("labels", labels, persistent=False)
        self.step = 0  # on the CPU: reading it from a GPU would stall

    def get_extra_state(self):
        return torch.tensor(self.step)

    def set_extra_state(self, state):
        self.step = int(state)

    def forward(self, student, fused, index, negatives=None):
        """Embeddings (B, d), (B, d) and image numbers (B,) int64 -> (); then both banks are updated at `index`.

        negatives (J,) or (B, J) int64 replaces the draw. The banks carry no gradient, the embeddings do.
        ValueError: shapes, an index outside 0..N-1, NaN; nothing is updated then.
        """
        (N, d), device = self.student_bank.shape, self.student_bank.device
        if not student.shape == fused.shape == (len(index), d):
            raise ValueError(f"student {tuple(student.shape)}, fused {tuple(fused.shape)}, index {tuple(index.shape)}: "
                             f"expected (B, {d}), (B, {d}), (B,)")
        index = index.to(device)
        if index.is_cpu:  # before anything changes
            outside = index[(index < 0) | (index >= N)].tolist()
            if outside or (student + fused).isnan().any():
                raise ValueError(f"index {outside} outside 0..{N - 1}" if outside else "NaN features")
        self.step += 1
        if negatives is None:  # a function of seed and step alone, so that every rank draws the same
            generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + self.step)
            shape = (self.num_negatives,) if self.negatives == "shared" else (len(index), self.num_negatives)
            negatives = torch.randint(N, shape, generator=generator, device=device)
        times, others = None, self.labels
        if negatives.ndim == 1 and len(negatives) >= N:  # score each row once, and count it as often as it was drawn
            times = torch.zeros(N, device=device).index_add_(0, negatives, torch.ones(len(negatives), device=device))
            negatives = None
        elif others is not None:
            others = others[negatives]
        same = None if others is None else others == self.labels[index][:, None]  # (B, J), or (B, N) with times
        pairs = ((student, self.fused_bank), (fused, self.student_bank))
        with torch.autocast(device.type, enabled=False):
            if self.step == 1 and self.Z[0] < 0:
                self.Z.copy_(torch.stack([self.partition(*pair, index, negatives, same, times) for pair in pairs]))
            loss = sum(nce_loss(*pair, index, negatives, Z, self.temperature, same, times)
                       for pair, Z in zip(pairs, self.Z))
        self.update(student.detach(), fused.detach(), index)
        return loss

    @torch.no_grad()
    def partition(self, anchor, bank, index, negatives, same, times):
        """Z = N * mean of exp(v . r / tau) over the positives and the negatives of all ranks: ()."""
        negatives = torch.arange(len(bank), device=index.device) if negatives is None else negatives
        rows = torch.cat([index[:, None], negatives.expand(len(index), -1)], dim=1)  # (B, 1 + J)
        mean = []
        for i, v in enumerate(anchor / self.temperature):  # row by row: once in a training, and no (B, J, d) block
            weight = torch.ones(rows.shape[1], dtype=v.dtype, device=v.device)
            if times is not None:
                weight[1:] = times
            total = weight.sum()
            if same is not None:
                weight[1:] *= ~same[i]
                weight[1:] *= (total - 1) / weight[1:].sum().clamp(min=1)
            mean.append((((bank[rows[i]].to(v.dtype) @ v).exp() * weight) / total).sum())
        return gather(torch.stack(mean)).mean() * len(bank)

    @torch.no_grad()
    def update(self, student, fused, index):
        """r <- unit(momentum * r + (1 - momentum) * v) in both banks, with the rows of all ranks."""
        rows, index = gather(torch.cat([student, fused], dim=1)), gather(index)  # (B, 2d), (B,)
        # An image twice in a batch: every write carries its last row, for the order of writes on a GPU is not defined.
        place = torch.arange(len(index), device=index.device)
        rows = rows[torch.where(index == index[:, None], place, -1).amax(1)]
        for bank, new in zip((self.student_bank, self.fused_bank), rows.chunk(2, dim=1)):
            new = self.momentum * bank[index].to(new.dtype) + (1 - self.momentum) * new
            bank.index_copy_(0, index, torch.nn.functional.normalize(new, dim=1).to(bank.dtype))


class RichKD(torch.nn.Module):
    """The method: cross-entropy, the logit loss and the feature loss against the fused teacher: equation (7).

    student_features, teacher_features, clip_features: widths C of the three features; num_images: N. For several
    teachers give `fuse_teachers(logits)` and the concatenation of their features. RichKD (L) is feature_weight=0,
    (F) is logit_weight=0; a part of weight 0 is not computed, allocated or returned. alpha = lam = 1 is the teacher
    alone (KD, DKD, CRD, ...), 0 is CLIP alone; what has no weight may be None, in the constructor and in `forward`.

    logit_loss: "kd" | "dkd" | "mlkd" (which has its own temperatures); standardize: equation (8) on both logits.
    feature_loss: "crd" (all maps learn) | "mse" (student's map against the fused embedding) | "rkd" (student's features
    against it). Under "mse" and "rkd" the teachers' maps stay random projections: learned, they would collapse.
    labels, negatives, bank_dtype, seed: see `ContrastiveMemory`. The losses compute in float32, under autocast too.
    """

    def __init__(self, student_features, teacher_features, clip_features, num_images, *, alpha=0.7, lam=0.7,
                 temperature=3.0, ce_weight=1.0, logit_weight=3.0, feature_weight=0.8, logit_loss="kd",
                 standardize=False, feature_loss="crd", d=128, num_negatives=16384, nce_temperature=0.07, momentum=0.5,
                 labels=None, negatives="shared", bank_dtype=torch.float32, seed=0):
        super().__init__()
        for name, value in (("alpha", alpha), ("lam", lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, expected a number in [0, 1]")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected > 0")
        for value, known in ((logit_loss, ("kd", "dkd", "mlkd")), (feature_loss, ("crd", "mse", "rkd"))):
            if value not in known:
                raise ValueError(f"unknown loss {value!r}, expected one of: {', '.join(known)}")
        self.alpha, self.lam, self.temperature = alpha, lam, temperature
        self.ce_weight, self.logit_weight, self.feature_weight = ce_weight, logit_weight, feature_weight
        self.logit_loss, self.standardize, self.feature_loss = logit_loss, standardize, feature_loss
        if feature_weight:
            learned = feature_loss == "crd"
            if feature_loss != "rkd":
                self.student_embed = Embed(student_features, d)
            if lam > 0:
                self.teacher_embed = Embed(teacher_features, d).requires_grad_(learned)
            if lam < 1:
                self.clip_embed = Embed(clip_features, d).requires_grad_(learned)
            if feature_loss == "crd":
                self.memory = ContrastiveMemory(num_images, d, num_negatives, nce_temperature, momentum, labels=labels,
                                                negatives=negatives, bank_dtype=bank_dtype, seed=seed)

    def forward(self, student_logits, student_features, teacher_logits, teacher_features, clip_logits, clip_features,
                target, index):
        """Logits (B, K), features (B, C), target and index (B,) int64 -> (loss (), {"ce", "logit", "feature"}).

        The parts are weighted and detached: they add up to the loss. ValueError: shapes, index outside 0..N-1, NaN.
        """
        logit, feature, a, l = self.logit_weight > 0, self.feature_weight > 0, self.alpha, self.lam
        for name, value, needed in (
                ("teacher_logits", teacher_logits, logit and a > 0), ("clip_logits", clip_logits, logit and a < 1),
                ("teacher_features", teacher_features, feature and l > 0), ("index", index, feature),
                ("clip_features", clip_features, feature and l < 1), ("student_features", student_features, feature)):
            if needed and value is None:
                raise ValueError(f"{name} is None, but alpha {a}, lam {l} and the weights of the losses ask for it")
        student_logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
        losses = {}
        if self.ce_weight:
            losses["ce"] = self.ce_weight * torch.nn.functional.cross_entropy(student_logits, target)
        if self.logit_weight:
            # A teacher alone is taken as it is: alpha = 1 is KD to the bit, and lam = 1 below is CRD.
            fused = teacher_logits if self.alpha == 1 else clip_logits
            if 0 < self.alpha < 1:
                fused = fuse_logits(teacher_logits, clip_logits, self.alpha)
            pair = [standardize_logits(z) if self.standardize else z for z in (student_logits, fused)]
            if self.logit_loss == "kd":
                loss = kd_loss(*pair, self.temperature)
            elif self.logit_loss == "dkd":
                loss = dkd_loss(*pair, target, temperature=self.temperature)
            else:
                loss = mlkd_loss(*pair)
            losses["logit"] = self.logit_weight * loss
        if self.feature_weight:
            teacher = self.teacher_embed(teacher_features) if self.lam > 0 else None
            fused = self.clip_embed(clip_features) if self.lam < 1 else teacher
            if 0 < self.lam < 1:
                fused = fuse_features(teacher, fused, self.lam)
            if self.feature_loss == "crd":
                loss = self.memory(self.student_embed(student_features), fused, index)
            elif self.feature_loss == "mse":
                loss = mse_loss(self.student_embed(student_features), fused)
            else:
                loss = rkd_loss(student_features, fused)
            losses["feature"] = self.feature_weight * loss
        loss = sum(losses.values())
        if loss.is_cpu and loss.isnan():
            raise ValueError("the loss is NaN: student logits or features hold NaN or infinity")
        return loss, {name: part.detach() for name, part in losses.items()}
