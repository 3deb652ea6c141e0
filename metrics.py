"""Metrics of classifiers: accuracy, calibration, proper scores, errors under corruptions.

logits (N, K) of any float dtype, target (N,) integers below K. Computed in float64; shares and
errors lie between 0 and 1. p = softmax(logits); an image's confidence is its largest probability.

>>> logits, target = torch.tensor([[4.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
>>> top_k_accuracy(logits, target), round(ece(logits, target), 3)
(0.5, 0.449)

References: Brier 1950; Efron 1979; Guo 2017, arXiv 1706.04599; Hendrycks and Dietterich 2019, arXiv
1903.12261; Nguyen and O'Connor 2015, arXiv 1508.05154. Needs torch alone."""

import math
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e3

def checked(logits: Tensor, target: Tensor, setting=1, low=1, high=math.inf):
    """logits as float64, target as int64. ValueError: they, or a setting (k, bins, threshold, from
    low to high), are out of order. A logit may be -inf, a class ruled out, but not all of a row."""
    whole = not target.is_floating_point() and target.dtype != torch.bool
    if not (whole and logits.ndim == 2 and target.shape == logits.shape[:1] and len(target)
            and 0 <= target.min() and target.max() < logits.shape[1]
            and logits.amax(dim=1).isfinite().all() and low <= setting <= high):
        raise ValueError(f"logits {[*logits.shape]}, target {target.dtype} {[*target.shape]}: "
                         f"expected (N, K), no NaN, integers (N,) below K; {setting}: {low}-{high}")
    return logits.double(), target.long()

def top_k_accuracy(logits: Tensor, target: Tensor, k: int = 1) -> float:
    """Share of the images whose target is among the k largest logits (all of them, if fewer)."""
    logits, target = checked(logits, target, k)
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices  # (N, k)
    return (top == target[:, None]).any(dim=1).double().mean().item()

def nll(logits: Tensor, target: Tensor) -> float:
    """Negative log-likelihood, mean over the images of -log p[target], in nats."""
    return F.cross_entropy(*checked(logits, target)).item()

def brier(logits: Tensor, target: Tensor) -> float:
    """Brier score, mean over the images of sum_k (p[k] - [k = target])^2: 0 to 2 (Brier 1950)."""
    logits, target = checked(logits, target)
    p = logits.softmax(dim=1)
    return (p - F.one_hot(target, logits.shape[1])).square().sum(dim=1).mean().item()

def calibration_bins(logits: Tensor, target: Tensor, bins: int = 15,
                     equal_mass: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The points of a reliability diagram: mean confidence, accuracy and count, (bins,) float64.
    Bin b of equal width holds the confidences in (b / bins, (b + 1) / bins] (Guo 2017, section 2).
    Bins of equal mass are the sorted confidences in parts whose sizes differ by at most one, the
    larger first (Nguyen and O'Connor 2015). An empty bin has confidence and accuracy 0."""
    logits, target = checked(logits, target, bins)
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    if equal_mass:
        bin_of = torch.empty_like(predicted)
        for b, images in enumerate(confidence.argsort(stable=True).tensor_split(bins)):
            bin_of[images] = b
    else:
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)
        bin_of = torch.bucketize(confidence, edges[1:-1])
    count = torch.bincount(bin_of, minlength=bins).double()
    mean_confidence = torch.bincount(bin_of, confidence, bins) / count.clamp(min=1)
    accuracy = torch.bincount(bin_of, predicted == target, bins) / count.clamp(min=1)
    return mean_confidence, accuracy, count

def ece(logits: Tensor, target: Tensor, bins: int = 15, equal_mass: bool = False) -> float:
    """Expected calibration error, sum_b count_b/N |accuracy_b - confidence_b| (Guo 2017, eq. 3)."""
    confidence, accuracy, count = calibration_bins(logits, target, bins, equal_mass)
    return (count / len(target) * (accuracy - confidence).abs()).sum().item()

def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The T in 0.001 ... 1000 at which logits / T have the least NLL (Guo 2017, section 4.2).
    Fit it on images that are not reported. The NLL is convex in 1 / T, with the derivative
    mean(E_p[z] - z[target]), p z = 0 at z = -inf: its sign tells on which side of T it lies."""
    logits, target = checked(logits, target)
    of_target = logits.gather(1, target[:, None]).mean()
    low, high = LEAST_TEMPERATURE, MOST_TEMPERATURE
    for _ in range(60):
        temperature = math.sqrt(low * high)
        expected = ((logits / temperature).softmax(dim=1) * logits).nan_to_num().sum(dim=1).mean()
        # equal: in rounding, where all are right already
        low, high = (low, temperature) if expected <= of_target else (temperature, high)
    return temperature

def quadrants(logits: Tensor, target: Tensor, threshold: float) -> dict[str, Tensor]:
    """Which images are confident (confidence >= threshold) or unsure, and right or wrong: bool (N,)
    each. The paper's abstract: fusing makes more confident_right and fewer confident_wrong."""
    logits, target = checked(logits, target, threshold, 0, 1)
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    confident, right = confidence >= threshold, predicted == target
    return {"confident_right": confident & right, "confident_wrong": confident & ~right,
            "unsure_right": ~confident & right, "unsure_wrong": ~confident & ~right}

def bootstrap_interval(values: Tensor, generator: Generator, resamples: int = 1000,
                       level: float = 0.95) -> tuple[float, float]:
    """(low, high) of the mean of values (N,): percentiles of the means of N images drawn from these
    with replacement (Efron 1979). For a paired difference, pass each image's difference."""
    N, values = len(values), values.double().cpu()
    if values.shape != (N,) or not N or not values.isfinite().all() or not 0 < level < 1:
        raise ValueError(f"values {tuple(values.shape)}, {level}: expected finite (N,), 0 to 1")
    draws = (torch.randint(N, (N,), generator=generator) for _ in range(resamples))
    means = torch.stack([values[drawn].mean() for drawn in draws])
    return means.quantile((1 - level) / 2).item(), means.quantile((1 + level) / 2).item()

# AlexNet's top-1 errors on ImageNet-C, mean over the five severities (hendrycks/robustness), and on
# the clean images (torchvision's weights, 56.522 % right; the paper says 43.5 % wrong).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500}
ALEXNET_CLEAN_ERROR = 0.43478

def mean_corruption_error(errors: dict[str, float], clean_error: float | None = None,
                          alexnet: bool = False) -> float:
    """mCE: the mean over the fifteen corruptions c of E_c, the error averaged over severities; on
    ImageNet-C (alexnet=True) of E_c / E_c(AlexNet). With clean_error the relative mCE, of E_c -
    E_clean (Hendrycks, Dietterich 2019, section 4). errors {name: E_c}: shares, else ValueError."""
    given = {**errors, "clean_error": clean_error or 0}
    wrong = [x for x in (*ALEXNET_ERRORS, "clean_error") if not 0 <= given.get(x, math.nan) <= 1]
    if wrong:
        raise ValueError(f"mCE needs all fifteen errors, as shares 0 to 1: see {', '.join(wrong)}")
    own, theirs = (0, 0) if clean_error is None else (clean_error, ALEXNET_CLEAN_ERROR)
    pairs = [(errors[name] - own, error - theirs) for name, error in ALEXNET_ERRORS.items()]
    return sum(error / baseline if alexnet else error for error, baseline in pairs) / len(pairs)
