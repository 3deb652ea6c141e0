"""RichKD: knowledge distillation from a teacher fused with CLIP, in plain PyTorch.

Mansourian, Babaei, Kasaei, "Enriching Knowledge Distillation with Cross-Modal Teacher Fusion",
CVPR 2026 Findings, arXiv 2511.09286. Leaf functions first, the method `RichKD` last. A function
needs nothing but torch and the helpers that it names: copy them together. An equation's number is
its place in this table; the paper numbers its own otherwise.

  multi-prompt (1)  w_k   = unit( mean_m unit(t_km) )            t_km: text of class k, template m
  zero shot    (2)  z_C   = s * unit(x) . w_k                    x: CLIP's feature of the image
  fusion       (3)  z_F   = a z_T + (1 - a) z_C                  logits of teacher and CLIP
               (4)  f_F   = unit( l g_T(f_T) + (1 - l) g_C(f_C) )      features; g: linear, unit
  logit loss   (5)  L_log = T^2 KL( softmax(z_F / T) || softmax(z_S / T) )
                    or (9) DKD, or (10) MLKD; after (8), standardisation, if that is wanted
  feature loss (6)  L_fea = - log [P+ / (P+ + c)] - sum_j log [n / (P_j + c)],    c = n + 1e-7
                    n = J/N, P = exp(v . r / tau) / Z: P+ with the image's own row r of the bank,
                    P_j with J drawn rows; Z = N mean exp(v . r / tau), set by the first batch.
                    Two v, added: g_S(f_S) against the bank of f_F, f_F against that of g_S(f_S)
  total        (7)  L     = w_ce CE(z_S, y) + w_log L_log + w_fea L_fea

  a alpha .7   l lam .7   T temperature 3   w_ce 1   w_log logit_weight 3   w_fea feature_weight .8
  J num_negatives 16384   tau nce_temperature .07    s scale: CLIP's exp(logit_scale), about 100
  B batch, K classes, M templates, N images; widths: D CLIP's, C a classifier's, d (128) mapped"""

import math
import torch
import torch.nn.functional as F

def unit(x: torch.Tensor) -> torch.Tensor:
    """x / |x| along the last dimension: `F.normalize`, in 14 kernels instead of 17. 0 stays 0."""
    x = x if x.dtype == torch.float64 else x.float()
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-24)

def expect(name: str, x, shape=(), low=None, high=None, dtype=None):
    """x itself, a number or tensor. ValueError: of another shape or dtype, or (with `low`) not from
    low to high; a tensor's numbers are looked at where that is free: not on a GPU, nor compiled."""
    tensor = isinstance(x, torch.Tensor)
    size = x.shape if tensor else ()
    if x is None or size != shape or dtype and not (tensor and x.dtype == dtype):
        given = f"{x.dtype} {tuple(x.shape)}" if hasattr(x, "shape") else repr(x)[:40]
        raise ValueError(f"{name}: {given}, expected {dtype or 'shape'} {tuple(shape)}")
    if low is not None and (not tensor or x.is_cpu and not torch.compiler.is_compiling()):
        least, most = x.aminmax() if tensor else (x, x)
        if not low <= least <= most <= high:
            raise ValueError(f"{name}: {least:g} to {most:g}, expected {low:g} to {high:g}")
    return x

def same_shape(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """All float32, or float64 if one is. ValueError: not all are one (B, K), B > 0 and K > 1."""
    shapes = [tuple(getattr(x, "shape", ())) for x in tensors]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or shapes[0][0] < 1 or shapes[0][1] < 2:
        raise ValueError(f"shapes {shapes}: expected one and the same, (B, K), B > 0 and K > 1")
    dtype = torch.float64 if torch.float64 in {x.dtype for x in tensors} else torch.float32
    return [x.to(dtype) for x in tensors]

def ensemble_text_features(text_features: torch.Tensor) -> torch.Tensor:
    """Equation (1): the text feature of each class, unit length. (K, M, D) -> (K, D).
    The paper's multi-prompt guidance; Radford et al. (CLIP), arXiv 2103.00020, section 3.1.4.
    >>> ensemble_text_features(torch.tensor([[[3.0, 0.0], [0.0, 0.5]]]))
    tensor([[0.7071, 0.7071]])"""
    expect("(K, M, D)", text_features, (*text_features.shape[:2], text_features.shape[-1]))
    return unit(unit(text_features).mean(1))

def zero_shot_logits(image_features: torch.Tensor, class_features: torch.Tensor,
                     scale: float) -> torch.Tensor:
    """Equation (2): CLIP's logits, scale * cosine. (B, D), (K, D) -> (B, K).
    >>> zero_shot_logits(torch.tensor([[0.0, 9.0]]), torch.tensor([[5.0, 0.0], [0.0, 5.0]]), 100)
    tensor([[  0., 100.]])"""
    expect("class_features", class_features, (len(class_features), image_features.shape[-1]))
    with torch.autocast(image_features.device.type, enabled=False):  # the product, too, in float32
        return expect("scale", scale, (), 1e-9, 1e9) * unit(image_features) @ unit(class_features).T

def fuse_teachers(logits: list[torch.Tensor], weights: list[float] | None = None) -> torch.Tensor:
    """Several teachers as one: the mean of n logits (B, K), by n weights >= 0 of any sum above 0.
    One of weight 0 may be None; one that is left alone is itself, to the bit.
    >>> fuse_teachers([torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, -2.0]])], [3, 1])
    tensor([[2., 1.]])"""
    weights = [1.0] * len(logits) if weights is None else weights
    if not (min(weights, default=0) >= 0 and 0 < sum(weights) < math.inf):
        raise ValueError(f"teachers' weights {weights}: expected none below 0, and one above")
    shares = [w / sum(weights) for w in weights if w]
    first, *others = same_shape(*(z for w, z in zip(weights, logits, strict=True) if w))
    return sum((s * z for s, z in zip(shares[1:], others)), shares[0] * first) if others else first

def fuse_logits(teacher_logits: torch.Tensor | None, clip_logits: torch.Tensor | None,
                alpha: float = 0.7) -> torch.Tensor:
    """Equation (3): alpha * teacher + (1 - alpha) * CLIP. (B, K), (B, K) -> (B, K).
    >>> fuse_logits(torch.tensor([[1.0, 2.0]]), torch.tensor([[11.0, -8.0]]), alpha=0.7)
    tensor([[ 4.0000, -1.0000]])"""
    return fuse_teachers([teacher_logits, clip_logits], [alpha, 1 - alpha])

def fuse_features(teacher: torch.Tensor, clip: torch.Tensor, lam: float = 0.7) -> torch.Tensor:
    """Equation (4): lam * teacher + (1 - lam) * CLIP, unit length. (B, d), (B, d) -> (B, d).
    >>> fuse_features(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), lam=0.5)
    tensor([[0.7071, 0.7071]])"""
    return unit(fuse_logits(teacher, clip, lam))

class Embed(torch.nn.Module):
    """The map g of equation (4): linear, then unit length. (B, in_features) -> (B, d)."""
    def __init__(self, in_features: int, d: int = 128, name: str = "features"):
        super().__init__()
        self.linear, self.name = torch.nn.Linear(in_features, d), name

    def forward(self, features):
        expect(self.name, features, (*getattr(features, "shape", "B")[:1], self.linear.in_features))
        with torch.autocast(features.device.type, enabled=False):
            # A copy: of torch.inference_mode's tensors autograd keeps none.
            return unit(self.linear(features.to(self.linear.weight.dtype, copy=True)))

def kl(log_q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """KL(p || q), batch mean, log q, p (B, K) -> (). 0 where p is, as of classes ruled out."""
    return F.kl_div(log_q.masked_fill(p == 0, 0), p, reduction="batchmean")

def kd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor,
            temperature: float = 3.0) -> torch.Tensor:
    """Equation (5): T^2 KL(teacher || student), batch mean. Logits (B, K) -> ().
    Hinton et al., arXiv 1503.02531, section 2; its T^2 keeps the scale of the gradient.
    >>> round(kd_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), temperature=1.0).item(), 4)
    0.3278"""
    expect("temperature", temperature, (), 1e-9, 1e9)
    student, teacher = same_shape(student_logits, teacher_logits)
    log_q, p = (student / temperature).log_softmax(1), (teacher.detach() / temperature).softmax(1)
    return temperature**2 * kl(log_q, p)

def standardize_logits(logits: torch.Tensor) -> torch.Tensor:
    """Equation (8): (z - mean z) / (1e-7 + std z) by rows, std the unbiased one. (B, K) -> (B, K).
    Sun et al., CVPR 2024: student's and teacher's logits, before the softmax.
    >>> standardize_logits(torch.tensor([[1.0, 3.0]]))
    tensor([[-0.7071,  0.7071]])"""
    logits, = same_shape(logits)
    return (logits - logits.mean(1, keepdim=True)) / (1e-7 + logits.std(1, keepdim=True))

def dkd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, target: torch.Tensor,
             alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> torch.Tensor:
    """Equation (9): T^2 (alpha KL(b_T || b_S) + beta KL(q_T || q_S)), batch mean.
    b = (p_y, 1 - p_y), q = p without y, of sum 1; alpha: DKD's. Logits (B, K), target (B,) -> ().
    Zhao et al., CVPR 2022, equation 7; mdistiller's defaults (it ramps the weight up at first).
    >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
    >>> round(dkd_loss(student, teacher, target=torch.tensor([0])).item(), 3)
    1.248"""
    expect("temperature", temperature, (), 1e-9, 1e9)
    student, teacher = same_shape(student_logits, teacher_logits)
    y = expect("target", target, student.shape[:1], 0, student.shape[1] - 1, torch.int64)[:, None]
    hide = torch.zeros_like(student).scatter_(1, y, 1000.0)                     # -inf gives NaN
    log_p = [(z / temperature).log_softmax(1) for z in (student, teacher.detach())]
    rest = [(z - hide).logsumexp(1, keepdim=True) for z in log_p]               # (B, 1) log(1-p_y)
    log_b = [torch.cat([z.gather(1, y), r], dim=1) for z, r in zip(log_p, rest)]            # (B, 2)
    log_q = [(z - hide).log_softmax(1) for z in log_p]                          # (B, K)
    tckd, nckd = (kl(s, t.exp()) for s, t in (log_b, log_q))
    return temperature**2 * (alpha * tckd + beta * nckd)

def mlkd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor,
              temperatures: tuple = (2.0, 3.0, 4.0, 5.0, 6.0)) -> torch.Tensor:
    """Equation (10); p, q: teacher's and student's softmax at T, (B, K). Logits (B, K) -> ().
    sum_T  T^2 KL(p || q)  +  |p p^t - q q^t|^2 / B   +  |p^t p - q^t q|^2 / K     ^t: transposed
           batch mean         between images, (B, B)     between classes, (K, K)
    Jin et al., CVPR 2023; its public code's temperatures and norms, one view, no confidence masks.
    >>> round(mlkd_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])).item(), 4)
    2.5195"""
    student, teacher = same_shape(student_logits, teacher_logits)
    B, K = student.shape
    loss = 0.0
    with torch.autocast(student.device.type, enabled=False):  # the products, too, in float32
        for T in tuple(temperatures) or (0,):  # no temperature: refused, as 0 is
            expect("temperature", T, (), 1e-9, 1e9)
            log_q, p = (student / T).log_softmax(1), (teacher.detach() / T).softmax(1)
            q = log_q.exp()
            images = (p @ p.T - q @ q.T).square().sum() / B
            classes = (p.T @ p - q.T @ q).square().sum() / K
            loss = loss + T**2 * kl(log_q, p) + images + classes
    return loss

def rows(bank: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Copies of the bank's rows at `index`. (..., N, d), int64 of any shape -> (..., *shape, d).
    Compiled, they are joined from two parts: what `cat` makes is kept for backward. One part might
    be copied there again, from a bank that the memory has updated in place by then."""
    parts = index.flatten().tensor_split(2 if torch.compiler.is_compiling() else 1)
    copies = [bank.index_select(-2, part) for part in parts]
    return (torch.cat(copies, -2) if len(copies) > 1 else copies[0]).unflatten(-2, index.shape)

def scores(v: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, negatives: torch.Tensor,
           tau: float = 0.07) -> tuple[torch.Tensor, torch.Tensor]:
    """v . r / tau with the images' own rows r of the bank, (..., B), and with drawn ones,
    (..., B, J). v (..., B, d), bank (..., N, d), where `...` is nothing for one v and 2 for both;
    index (B,) int64, negatives (J,) for the whole batch or (B, J), both from 0 to N - 1.
    >>> scores(torch.eye(3)[:1], torch.eye(3), torch.tensor([0]), torch.tensor([1, 0]), tau=0.5)
    (tensor([2.]), tensor([[0., 2.]]))"""
    B, N, J = v.shape[-2], bank.shape[-2], negatives.shape[-1]
    expect("v", v, (*bank.shape[:-2], B, bank.shape[-1]))
    expect("bank, float32 or float64 as v,", bank, bank.shape, dtype=v.dtype)
    expect("index, below num_images,", index, (B,), 0, N - 1, torch.int64)
    expect("negatives", negatives, (J,) if negatives.ndim == 1 else (B, J), 0, N - 1, torch.int64)
    v = v / expect("tau", tau, (), 1e-9, 1e9)
    own, drawn = rows(bank, index), rows(bank, negatives)       # (..., B, d), (..., [B,] J, d)
    product = "...bd,...jd->...bj" if negatives.ndim == 1 else "...bd,...bjd->...bj"
    return (v * own).sum(-1), torch.einsum(product, v, drawn)

def sum_kept(terms: torch.Tensor, same: torch.Tensor | None = None):
    """Terms of the drawn rows, (..., B, J), summed: (..., B), and of how many: (B,), at least 1, or
    J. same (B, J) leaves out those of an image's own class. terms is overwritten: it is large."""
    if same is None:
        return terms.sum(-1), terms.shape[-1]
    expect("same", same, terms.shape[-2:], dtype=torch.bool)
    others = (~same).float()
    return terms.mul_(others).sum(-1), others.sum(-1).clamp(min=1)

def nce_loss(own: torch.Tensor, drawn: torch.Tensor, Z: torch.Tensor, N: int,
             same: torch.Tensor | None = None) -> torch.Tensor:
    """Equation (6), batch mean. `scores` (..., B), (..., B, J), Z (...) -> (...).
    With s = v . r / tau, so that nothing overflows as the published ratios do:
    - log [P+ / (P+ + c)] = softplus(log Zc - s),  - log [c / (P_j + c)] = softplus(s_j - log Zc).
    Tian et al., "Contrastive Representation Distillation", ICLR 2020, eq. 18; RepDistiller
    `crd/criterion.py`. same: see `sum_kept`; the negatives that are kept stand for all J.
    >>> own, drawn = torch.tensor([2.0]), torch.tensor([[0.0, 1.0]])
    >>> round(nce_loss(own, drawn, Z=torch.tensor(2.0), N=4).item(), 4)
    2.1333"""
    expect("own", own, drawn.shape[:-1])
    expect("Z", Z, own.shape[:-1])
    J = drawn.shape[-1]
    n, c = J / N, J / N + 1e-7
    log_Zc = (Z * c).log()[..., None]
    positive = F.softplus(log_Zc - own)                                         # (..., B)
    negative, kept = sum_kept(F.softplus(drawn - log_Zc[..., None]), same)      # (..., B)
    return (positive + J / kept * negative).mean(-1) + J * math.log(c / n)

def gather(rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The rows of all ranks, joined in rank order; `rows` without torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    gathered = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered, dim)

class ContrastiveMemory(torch.nn.Module):
    """CRD's two memory banks and its loss: equation (6), both ways. Tian et al., ICLR 2020.
    Negatives are drawn from the N images, with replacement, by torch's own generator: "shared", one
    draw of J a batch, is one matrix product; "per-image", J for each image, a (B, J, d) block. Both
    estimate one expectation. labels (N,) int64 masks an image's own class; RepDistiller draws J of
    the others, without replacement. `seed` draws the first banks. torch.distributed joins ranks."""
    def __init__(self, num_images, d=128, num_negatives=16384, temperature=0.07, momentum=0.5, *,
                 labels=None, negatives="shared", seed=0):
        super().__init__()
        if negatives not in ("shared", "per-image"):
            raise ValueError(f"negatives {negatives!r}: expected one of shared, per-image")
        sizes = torch.tensor((num_images, d, num_negatives))
        expect("num_images, d, num_negatives", sizes, (3,), 1, 1e12, torch.int64)
        if labels is not None:
            expect("labels of num_images", labels, (num_images,), 0, 1e12, torch.int64)
        self.num_negatives, self.shared = num_negatives, negatives == "shared"
        self.temperature, self.momentum = temperature, momentum
        generator, bound = torch.Generator().manual_seed(seed), (3 / d) ** 0.5  # mean length 1
        bank = torch.empty(2, num_images, d).uniform_(-bound, bound, generator=generator)
        self.register_buffer("bank", bank.flip(0))  # [0] of f_F, which g_S(f_S) meets; [1] of it
        self.register_buffer("Z", torch.full((2,), -1.0))  # set by the first batch, as published
        self.register_buffer("labels", labels, persistent=False)
        self.has_Z = False  # known without reading Z, which would stall a GPU

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        self.has_Z = False

    def forward(self, student, fused, index, negatives=None):
        """Embeddings (B, d), (B, d), image numbers (B,) int64 -> (). In training mode the first
        batch sets Z, each updates both banks, without gradient, at `index`; NaN and inf change
        neither, but Z when compiled. negatives (J,) or (B, J) int64 replaces the draw."""
        v = torch.stack(same_shape(student, fused))                             # (2, B, d)
        B, N, Z, same = v.shape[1], self.bank.shape[1], self.Z, None
        if negatives is None:
            shape = (self.num_negatives,) if self.shared else (B, self.num_negatives)
            negatives = torch.randint(N, shape, device=v.device)
        with torch.autocast(v.device.type, enabled=False):
            own, drawn = scores(v, self.bank, index, negatives, self.temperature)
            if self.labels is not None:
                same = self.labels[negatives] == self.labels[index][:, None]    # (B, J)
            if not self.has_Z:
                J = negatives.shape[-1]
                negative, kept = sum_kept(drawn.detach().exp(), same)           # (2, B)
                mean = (own.detach().exp() + J * negative / kept) / (1 + J)
                mean = gather(mean, 1) if self.training else mean               # of all ranks
                Z = torch.where(Z.log().isfinite(), Z, N * mean.mean(1))  # a loaded one stays
                if self.training:
                    self.Z.copy_(Z)
                    self.has_Z = torch.compiler.is_compiling() or bool(Z.isfinite().all())
            loss = nce_loss(own, drawn, Z, N, same).sum()
        if self.training:
            # r <- unit(momentum * r + (1 - momentum) * v) in both banks, by the rows of all ranks.
            v, index = gather(v.detach().flip(0), 1), gather(index)             # (2, B, d), (B,)
            # An image twice (DistributedSampler pads so): each write is of its last row.
            order = torch.arange(len(index), device=index.device)
            last = (order * (index == index[:, None])).amax(1)                  # (B,)
            old = self.bank[:, index]
            new = unit(torch.lerp(v[:, last], old, self.momentum))  # of NaN and of inf: with NaN
            self.bank.index_copy_(1, index, torch.where(new.isnan().any(-1, True), old, new))
        return loss

class RichKD(torch.nn.Module):
    """Equation (7): cross-entropy, the logit loss and the feature loss, from the fused teacher.
    Here, student_features, teacher_features, clip_features are widths; num_images: N. RichKD (L) is
    feature_weight=0, (F) logit_weight=0: a part of weight 0 is neither computed nor allocated.
    alpha = lam = 1 is the teacher alone (KD, DKD, CRD, ...), 0 is CLIP alone; what has no weight
    may be None. Several teachers: `fuse_teachers`, features concatenated. logit_loss: "kd", "dkd",
    "mlkd"; standardize: equation (8); from d on: the memory's. Its parameters, g, are trained."""
    def __init__(self, student_features, teacher_features, clip_features, num_images, *, alpha=0.7,
                 lam=0.7, temperature=3.0, ce_weight=1.0, logit_weight=3.0, feature_weight=0.8,
                 logit_loss="kd", standardize=False, d=128, num_negatives=16384,
                 nce_temperature=0.07, momentum=0.5, labels=None, negatives="shared", seed=0):
        super().__init__()
        expect("alpha, lam, momentum", torch.tensor((alpha, lam, momentum)), (3,), 0, 1)
        expect("weights", torch.tensor((ce_weight, logit_weight, feature_weight)), (3,), 0, 1e9)
        if logit_loss not in ("kd", "dkd", "mlkd"):
            raise ValueError(f"logit_loss {logit_loss!r}: expected one of kd, dkd, mlkd")
        self.alpha, self.lam, self.temperature = alpha, lam, temperature
        self.ce_weight, self.logit_weight, self.logit_loss = ce_weight, logit_weight, logit_loss
        self.feature_weight, self.standardize = feature_weight, standardize
        if feature_weight:
            self.student_embed = Embed(student_features, d, "student_features")
            self.teacher_embed = Embed(teacher_features, d, "teacher_features") if lam > 0 else None
            self.clip_embed = Embed(clip_features, d, "clip_features") if lam < 1 else None
            self.memory = ContrastiveMemory(num_images, d, num_negatives, nce_temperature, momentum,
                                            labels=labels, negatives=negatives, seed=seed)

    def forward(self, student_logits, student_features, teacher_logits, teacher_features,
                clip_logits, clip_features, target, index):
        """Logits (B, K), features (B, C), (B, C), (B, D), target (B,) int64, index (B,) int64 of
        the images among all N -> (loss (), its weighted parts {"ce", "logit", "feature"})."""
        losses, (student_logits,) = {}, same_shape(student_logits)
        B, K = student_logits.shape
        if self.ce_weight:
            expect("target", target, (B,), 0, K - 1, torch.int64)
            losses["ce"] = self.ce_weight * F.cross_entropy(student_logits, target)
        if self.logit_weight:
            fused = fuse_logits(teacher_logits, clip_logits, self.alpha)
            if self.standardize:
                student_logits, fused = map(standardize_logits, (student_logits, fused))
            if self.logit_loss == "dkd":
                loss = dkd_loss(student_logits, fused, target, temperature=self.temperature)
            elif self.logit_loss == "mlkd":
                loss = mlkd_loss(student_logits, fused)
            else:
                loss = kd_loss(student_logits, fused, self.temperature)
            losses["logit"] = self.logit_weight * loss
        if self.feature_weight:
            pairs = (self.teacher_embed, teacher_features), (self.clip_embed, clip_features)
            teacher, clip = (embed and embed(x if x is None else x.detach()) for embed, x in pairs)
            # One alone has unit length already: lam = 1 is CRD, to the bit.
            fused = (fuse_features if 0 < self.lam < 1 else fuse_logits)(teacher, clip, self.lam)
            loss = self.memory(self.student_embed(student_features), fused, index)
            losses["feature"] = self.feature_weight * loss
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}
