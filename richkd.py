"""RichKD: knowledge distillation from a teacher fused with CLIP, in plain PyTorch.

Mansourian, Babaei, Kasaei, "Enriching Knowledge Distillation with Cross-Modal Teacher Fusion",
CVPR 2026 Findings, arXiv 2511.09286. Leaf functions first, the method `RichKD` last. A function
needs nothing but torch: copy it alone. The equations are numbered here, not as in the paper. Half
precision is computed in float32 (embeddings: by `Embed`). train.py looks for NaN, this file not.

  multi-prompt (1)  w_k   = unit( mean_m unit(t_km) )            t_km: text of class k, template m
  zero shot    (2)  z_C   = s * unit(x) . w_k                    x: CLIP's feature of the image
  fusion       (3)  z_F   = a z_T + (1 - a) z_C                  logits of teacher and CLIP
               (4)  f_F   = unit( l g_T(f_T) + (1 - l) g_C(f_C) )      features; g: linear, unit
  logit loss   (5)  L_log = T^2 KL( softmax(z_F / T) || softmax(z_S / T) )
                    or (9) DKD, or (10) MLKD; after (8), standardisation, if that is wanted
  feature loss (6)  L_fea = - log [P+ / (P+ + c)] - sum_j log [(J/N) / (P_j + c)],  c = J/N + 1e-7
                    P = exp(v . r / tau) / Z: P+ with the image's own row r of the bank, P_j with
                    J drawn rows; Z = N mean exp(v . r / tau) of the first batch, then fixed. Sum
                    of v = g_S(f_S) against the bank of f_F and v = f_F against that of g_S(f_S)
  total        (7)  L     = w_ce CE(z_S, y) + w_log L_log + w_fea L_fea

  a alpha .7   l lam .7   T temperature 3   w_ce 1   w_log logit_weight 3   w_fea feature_weight .8
  J num_negatives 16384   tau nce_temperature .07    s scale: CLIP's exp(logit_scale), about 100
  B batch, K classes, M templates, N images; widths: D CLIP's, C a classifier's, d (128) both mapped
"""

import torch


def ensemble_text_features(text_features: torch.Tensor) -> torch.Tensor:
    """Equation (1): the text feature of each class, unit length. (K, M, D) -> (K, D).

    The paper's multi-prompt guidance; Radford et al. (CLIP), arXiv 2103.00020, section 3.1.4.

    >>> ensemble_text_features(torch.tensor([[[3.0, 0.0], [0.0, 0.5]]]))
    tensor([[0.7071, 0.7071]])
    """
    normalize = torch.nn.functional.normalize
    text_features = text_features.to(torch.promote_types(text_features.dtype, torch.float32))
    return normalize(normalize(text_features, dim=2).mean(1), dim=1)


def zero_shot_logits(image_features: torch.Tensor, class_features: torch.Tensor,
                     scale: float) -> torch.Tensor:
    """Equation (2): CLIP's logits, scale * cosine. (B, D), (K, D) -> (B, K).

    scale: CLIP's learned exp(logit_scale), about 100; the authors' script keeps raw cosines (1).

    >>> zero_shot_logits(torch.tensor([[0.0, 9.0]]), torch.tensor([[5.0, 0.0], [0.0, 5.0]]), 100)
    tensor([[  0., 100.]])
    """
    normalize = torch.nn.functional.normalize
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    with torch.autocast(image_features.device.type, enabled=False):  # the product, too, in float32
        image_features = normalize(image_features.to(dtype), dim=1)
        return scale * image_features @ normalize(class_features.to(dtype), dim=1).T


def fuse_teachers(logits: list[torch.Tensor], weights: list[float] | None = None) -> torch.Tensor:
    """Several conventional teachers as one: the weighted mean of n logits (B, K) -> (B, K).

    weights: n numbers >= 0, divided here by their sum; None: equal ones.

    >>> fuse_teachers([torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, -2.0]])], [3, 1])
    tensor([[2., 1.]])
    """
    weights = weights or [1.0] * len(logits)
    shapes = [tuple(z.shape) for z in logits]
    if len(set(shapes)) != 1 or len(weights) != len(logits) or not min(weights) >= 0 < sum(weights):
        raise ValueError(f"teacher logits of the shapes {shapes}, weights {list(weights)}: "
                         "expected one shape (B, K) and a weight each, >= 0, not all 0")
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    return sum(weight / sum(weights) * z.to(dtype) for weight, z in zip(weights, logits))


def fuse_logits(teacher_logits: torch.Tensor, clip_logits: torch.Tensor,
                alpha: float = 0.7) -> torch.Tensor:
    """Equation (3): alpha * teacher + (1 - alpha) * CLIP. (B, K), (B, K) -> (B, K).

    >>> fuse_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[11.0, -8.0]]), alpha=0.7)
    tensor([[ 4.0000, -1.0000]])
    """
    if teacher_logits.shape != clip_logits.shape:
        raise ValueError(f"teacher logits {tuple(teacher_logits.shape)}, CLIP's "
                         f"{tuple(clip_logits.shape)}: expected one shape (B, K)")
    dtype = torch.promote_types(teacher_logits.dtype, torch.float32)
    return alpha * teacher_logits.to(dtype) + (1 - alpha) * clip_logits.to(dtype)


def fuse_features(teacher: torch.Tensor, clip: torch.Tensor, lam: float = 0.7) -> torch.Tensor:
    """Equation (4): lam * teacher + (1 - lam) * CLIP, unit length. (B, d), (B, d) -> (B, d).

    >>> fuse_features(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), lam=0.5)
    tensor([[0.7071, 0.7071]])
    """
    if teacher.shape != clip.shape:
        raise ValueError(f"embeddings {tuple(teacher.shape)} of the teacher, {tuple(clip.shape)} "
                         "of CLIP: expected one shape (B, d)")
    fused = lam * teacher + (1 - lam) * clip
    return torch.nn.functional.rms_norm(fused, fused.shape[1:], eps=1e-24) / fused.shape[1]**0.5


class Embed(torch.nn.Module):
    """The map g of equation (4): linear, then unit length. (B, in_features) -> (B, d)."""

    def __init__(self, in_features: int, d: int = 128):
        super().__init__()
        self.linear = torch.nn.Linear(in_features, d)

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):
            x = self.linear(features.to(self.linear.weight.dtype))  # then x / |x|, in few kernels
            return torch.nn.functional.rms_norm(x, x.shape[1:], eps=1e-24) / x.shape[1]**0.5


def kd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor,
            temperature: float = 3.0) -> torch.Tensor:
    """Equation (5): T^2 KL(teacher || student), batch mean. Logits (B, K) -> ().

    Hinton et al., arXiv 1503.02531, section 2; its T^2 keeps the scale of the gradient.

    >>> round(kd_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), temperature=1.0).item(), 4)
    0.3278
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {tuple(student_logits.shape)}, teacher logits "
                         f"{tuple(teacher_logits.shape)}: expected one shape (B, K)")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = (student_logits.to(dtype) / temperature).log_softmax(1)
    teacher = (teacher_logits.to(dtype) / temperature).softmax(1)
    return temperature**2 * torch.nn.functional.kl_div(student, teacher, reduction="batchmean")


def standardize_logits(logits: torch.Tensor) -> torch.Tensor:
    """Equation (8): (z - mean z) / (1e-7 + std z) by rows, std the unbiased one. (B, K) -> (B, K).

    Sun et al., CVPR 2024: student's and teacher's logits, before the softmax.

    >>> standardize_logits(torch.tensor([[1.0, 3.0]]))
    tensor([[-0.7071,  0.7071]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits - logits.mean(1, keepdim=True)) / (1e-7 + logits.std(1, keepdim=True))


def dkd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, target: torch.Tensor,
             alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> torch.Tensor:
    """Equation (9): T^2 (alpha KL(b_T || b_S) + beta KL(q_T || q_S)), batch mean.

    b = (p_y, 1 - p_y), q = p without y, of sum 1; alpha: DKD's. Logits (B, K), target (B,) -> ().
    Zhao et al., CVPR 2022, equation 7; mdistiller's defaults (it ramps the weight up at first).

    >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
    >>> round(dkd_loss(student, teacher, target=torch.tensor([0])).item(), 3)
    1.248
    """
    if student_logits.shape != teacher_logits.shape or target.shape != student_logits.shape[:1]:
        raise ValueError(f"logits {tuple(student_logits.shape)}, {tuple(teacher_logits.shape)}, "
                         f"target {tuple(target.shape)}: expected (B, K), (B, K), (B,)")
    dtype, y = torch.promote_types(student_logits.dtype, torch.float32), target[:, None]
    hide = torch.zeros_like(student_logits, dtype=dtype).scatter_(1, y, 1000.0)  # -inf gives NaN
    log_b, log_q = [], []
    for logits in (student_logits, teacher_logits):
        log_p = (logits.to(dtype) / temperature).log_softmax(1)                 # (B, K)
        rest = (log_p - hide).logsumexp(1, keepdim=True)                        # (B, 1) log(1-p_y)
        log_b.append(torch.cat([log_p.gather(1, y), rest], dim=1))              # (B, 2)
        log_q.append((log_p - hide).log_softmax(1))                             # (B, K)
    tckd, nckd = (torch.nn.functional.kl_div(student, teacher.exp(), reduction="batchmean")
                  for student, teacher in (log_b, log_q))
    return temperature**2 * (alpha * tckd + beta * nckd)


def mlkd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor,
              temperatures: tuple = (2.0, 3.0, 4.0, 5.0, 6.0)) -> torch.Tensor:
    """Equation (10); p, q: teacher's and student's softmax at T, (B, K). Logits (B, K) -> ().

    sum_T  T^2 KL(p || q)  +  |p p^t - q q^t|^2 / B   +  |p^t p - q^t q|^2 / K     ^t: transposed
           batch mean         between images, (B, B)     between classes, (K, K)
    Jin et al., CVPR 2023; its public code's temperatures and norms, one view, no confidence masks.

    >>> round(mlkd_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])).item(), 4)
    2.5195
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {tuple(student_logits.shape)}, teacher logits "
                         f"{tuple(teacher_logits.shape)}: expected one shape (B, K)")
    B, K = student_logits.shape
    dtype, loss = torch.promote_types(student_logits.dtype, torch.float32), 0.0
    student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.to(dtype)
    with torch.autocast(student_logits.device.type, enabled=False):  # the products, too, in float32
        for T in temperatures:
            log_student = (student_logits / T).log_softmax(1)
            student, teacher = log_student.exp(), (teacher_logits / T).softmax(1)
            kl = torch.nn.functional.kl_div(log_student, teacher, reduction="batchmean")
            images = (teacher @ teacher.T - student @ student.T).square().sum() / B
            classes = (teacher.T @ teacher - student.T @ student).square().sum() / K
            loss = loss + T**2 * kl + images + classes
    return loss


def nce_loss(anchor: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, negatives: torch.Tensor,
             Z: torch.Tensor, temperature: float = 0.07, same: torch.Tensor | None = None):
    """Equation (6), for one of its two v; batch mean, ().

    anchor v (B, d), bank r (N, d), index (B,): its own rows; negatives: drawn rows, (J,) for the
    batch or (B, J); Z (). same (B, J) masks negatives of an image's own class; the rest of its row
    stands for all J. Tian et al., "Contrastive Representation Distillation", ICLR 2020, eq. 18;
    RepDistiller `crd/criterion.py`, without its overflow: -log P/(P + c) = softplus(-log P/c).

    >>> v, r, j, Z = torch.eye(3)[:1], torch.eye(3), torch.tensor([1, 2]), torch.tensor(1e4)
    >>> round(nce_loss(v, r, torch.tensor([0]), j, Z, temperature=0.1).item(), 4)
    0.2647
    """
    N, J = len(bank), negatives.shape[-1]
    c = J / N + 1e-7
    log_Zc = (Z * c).log()
    product = "bd,jd->bj" if negatives.ndim == 1 else "bd,bjd->bj"
    anchor = anchor / temperature
    positive = (anchor * bank.index_select(0, index)).sum(1) - log_Zc           # (B,) log P+/c
    negative = torch.einsum(product, anchor, bank[negatives]) - log_Zc          # (B, J) log P_j/c
    noise, kept = torch.nn.functional.softplus(negative), J                     # log (P_j + c)/c
    if same is not None:
        noise, kept = noise.masked_fill(same, 0), (J - same.sum(1)).clamp(min=1)
    constant = J * torch.tensor(c * N / J, dtype=torch.float64).log().item()    # log c - log J/N
    return (torch.nn.functional.softplus(-positive) + J / kept * noise.sum(1)).mean() + constant


def gather(rows):
    """The rows of all ranks in rank order, (world * B, ...); `rows` without torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    gathered = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


class ContrastiveMemory(torch.nn.Module):
    """CRD's two memory banks and its loss: equation (6), both ways. Tian et al., ICLR 2020.

    Negatives are drawn from the N images, with replacement: "shared", one draw of J for the batch,
    makes the scores one matrix product; "per-image", J for every image, is a (B, J, d) block. Both
    estimate one expectation. labels (N,) int64 masks those of an image's own class; RepDistiller
    draws J of the other classes instead, without replacement. Ranks of torch.distributed update
    with the rows of all and stay equal: broadcast_buffers=False spares sending the banks.
    """

    def __init__(self, num_images, d=128, num_negatives=16384, temperature=0.07, momentum=0.5, *,
                 labels=None, negatives="shared", seed=0):
        super().__init__()
        if negatives not in ("shared", "per-image"):
            raise ValueError(f"negatives {negatives!r}: expected one of shared, per-image")
        self.num_negatives, self.shared = num_negatives, negatives == "shared"
        self.temperature, self.momentum = temperature, momentum
        generator, bound = torch.Generator().manual_seed(seed), (3 / d) ** 0.5  # mean length 1
        for name in ("student_bank", "fused_bank"):
            bank = torch.empty(num_images, d).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, bank)
        self.start = torch.randint(2**62, (1,), generator=generator).item()  # of `draw`
        self.register_buffer("Z", torch.full((2,), -1.0))  # set by the first batch, as published
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("step", torch.tensor(0))
        self.has_Z = False  # what is known of Z without reading it, which would stall a GPU

    def forward(self, student, fused, index, negatives=None):
        """Embeddings (B, d), (B, d), image numbers (B,) int64 -> (); then both banks are updated
        at `index`. negatives (J,) or (B, J) int64 replaces the draw. The banks have no gradient."""
        d, B, device = self.student_bank.shape[1], len(index), index.device
        if not student.shape == fused.shape == (B, d):
            raise ValueError(f"embeddings {tuple(student.shape)}, {tuple(fused.shape)}: expected "
                             f"both ({B}, {d}), B of index {tuple(index.shape)}")
        negatives = self.draw(B) if negatives is None else negatives
        labels = self.labels
        same = None if labels is None else labels[negatives] == labels[index][:, None]  # (B, J)
        pairs = (student, self.fused_bank), (fused, self.student_bank)
        with torch.autocast(device.type, enabled=False):
            if not self.has_Z and self.Z[0] < 0:
                Z = [self.partition(*pair, index, negatives, same) for pair in pairs]
                self.Z.copy_(torch.stack(Z))
            self.has_Z = True
            loss = sum(nce_loss(*pair, index, negatives, Z, self.temperature, same)
                       for pair, Z in zip(pairs, self.Z))
        self.update(student.detach(), fused.detach(), index)
        self.step.add_(1)
        return loss

    def draw(self, B):
        """J or (B, J) uniform numbers below N, a function of seed and step, on any device and in a
        CUDA graph. SplitMix64: Steele et al., OOPSLA 2014, figure 17."""
        shape = (self.num_negatives,) if self.shared else (B, self.num_negatives)
        x = torch.arange(torch.Size(shape).numel(), device=self.step.device).view(shape)
        x = (x + (self.start + self.step * 2**32)) * -0x61C8864680B583EB
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor  # the mask: no sign comes in
        return (x & (1 << 63) - 1) % len(self.student_bank)

    @torch.no_grad()
    def partition(self, anchor, bank, index, negatives, same):
        """Z = N * mean of exp(v . r / tau) over the positives and negatives of all ranks: ()."""
        rows = torch.cat([index[:, None], negatives.expand(len(index), -1)], dim=1)     # (B, 1 + J)
        scores = torch.stack([(bank[row] @ v / self.temperature).exp()  # row by row: (B, J, d) is
                              for v, row in zip(anchor, rows)])         # large, and this is once
        if same is not None:
            kept = same.shape[1] - same.sum(1, keepdim=True, dtype=scores.dtype)        # (B, 1)
            scores[:, 1:] *= ~same * (same.shape[1] / kept.clamp(min=1))
        return gather(scores.mean(1)).mean() * len(bank)

    @torch.no_grad()
    def update(self, student, fused, index):
        """r <- unit(momentum * r + (1 - momentum) * v) in both banks, by the rows of all ranks."""
        student, fused, index = gather(student), gather(fused), gather(index)
        # An image twice (DistributedSampler pads so): each write, in any order, is of its last row.
        order = torch.arange(len(index), device=index.device)
        last = torch.where(index == index[:, None], order, -1).amax(1)                  # (B,)
        for bank, v in ((self.student_bank, student), (self.fused_bank, fused)):
            rows = torch.lerp(v[last], bank[index], self.momentum)
            bank.index_copy_(0, index, torch.nn.functional.normalize(rows, dim=1))


class RichKD(torch.nn.Module):
    """Equation (7): cross-entropy, the logit loss and the feature loss, from the fused teacher.

    Here, student_features, teacher_features, clip_features are widths; num_images: N. RichKD (L) is
    feature_weight=0, (F) logit_weight=0: a part of weight 0 is neither computed nor allocated.
    alpha = lam = 1 is the teacher alone (KD, DKD, CRD, ...), 0 is CLIP alone; what has no weight
    may be None. For several teachers: `fuse_teachers(logits)` and their features concatenated.
    logit_loss: "kd", "dkd", "mlkd" (with its own temperatures); standardize: equation (8); all from
    d on: see `ContrastiveMemory`. The parameters are the maps g: give them to the optimiser.
    """

    def __init__(self, student_features, teacher_features, clip_features, num_images, *, alpha=0.7,
                 lam=0.7, temperature=3.0, ce_weight=1.0, logit_weight=3.0, feature_weight=0.8,
                 logit_loss="kd", standardize=False, d=128, num_negatives=16384,
                 nce_temperature=0.07, momentum=0.5, labels=None, negatives="shared", seed=0):
        super().__init__()
        if not (0 <= alpha <= 1 and 0 <= lam <= 1 and temperature > 0 and nce_temperature > 0):
            raise ValueError(f"alpha {alpha}, lam {lam}: expected 0 to 1; temperatures "
                             f"{temperature}, {nce_temperature}: expected more than 0")
        if logit_loss not in ("kd", "dkd", "mlkd"):
            raise ValueError(f"logit_loss {logit_loss!r}: expected one of kd, dkd, mlkd")
        self.alpha, self.lam, self.temperature = alpha, lam, temperature
        self.ce_weight, self.logit_weight, self.logit_loss = ce_weight, logit_weight, logit_loss
        self.feature_weight, self.standardize = feature_weight, standardize
        if feature_weight:
            self.student_embed = Embed(student_features, d)
            self.teacher_embed = Embed(teacher_features, d) if lam > 0 else None
            self.clip_embed = Embed(clip_features, d) if lam < 1 else None
            self.memory = ContrastiveMemory(num_images, d, num_negatives, nce_temperature, momentum,
                                            labels=labels, negatives=negatives, seed=seed)

    def forward(self, student_logits, student_features, teacher_logits, teacher_features,
                clip_logits, clip_features, target, index):
        """Logits (B, K), features (B, C), (B, C), (B, D), target (B,) int64, index (B,) int64 of
        the images among all N -> (loss (), its weighted parts {"ce", "logit", "feature"})."""
        student_logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
        losses, cross_entropy = {}, torch.nn.functional.cross_entropy
        if self.ce_weight:
            losses["ce"] = self.ce_weight * cross_entropy(student_logits, target)
        if self.logit_weight:
            # One teacher alone is taken as it is: alpha = 1 is KD, and lam = 1 CRD, to the bit.
            fused = teacher_logits if self.alpha == 1 else clip_logits
            if 0 < self.alpha < 1:
                fused = fuse_logits(teacher_logits, clip_logits, self.alpha)
            if self.standardize:
                student_logits = standardize_logits(student_logits)
                fused = standardize_logits(fused)
            if self.logit_loss == "dkd":
                loss = dkd_loss(student_logits, fused, target, temperature=self.temperature)
            elif self.logit_loss == "mlkd":
                loss = mlkd_loss(student_logits, fused)
            else:
                loss = kd_loss(student_logits, fused, self.temperature)
            losses["logit"] = self.logit_weight * loss
        if self.feature_weight:
            teacher = self.teacher_embed(teacher_features) if self.lam > 0 else None
            clip = self.clip_embed(clip_features) if self.lam < 1 else None
            fused = teacher if self.lam == 1 else clip
            if 0 < self.lam < 1:
                fused = fuse_features(teacher, clip, self.lam)
            loss = self.memory(self.student_embed(student_features), fused, index)
            losses["feature"] = self.feature_weight * loss
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}
