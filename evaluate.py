"""Evaluate trained classifiers: accuracy, calibration, shift and corruptions; and CLIP itself.

    python evaluate.py                                       # the newest finished run on its test split
    python evaluate.py --shift --corruptions                 # its shift splits and the 15 common corruptions, too
    python evaluate.py --run runs/A runs/B --corruptions CIFAR-100-C        # several runs; the published files
    python evaluate.py --checkpoint FILE --model resnet20 --dataset cifar100
    python evaluate.py --zero-shot --clip ViT-B/32 --dataset cifar100

Four sections, leaves first: metrics (they take logits, never a model), corruptions (uint8 images in, uint8 images out),
published files, and runs with their report. A function can be copied alone, together with the few helpers it names.

References
    Hendrycks and Dietterich 2019, arXiv 1903.12261: the corruptions, mCE and relative mCE; the published code is
        hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py, make_tinyimagenet_c.py and make_imagenet_c.py
    Guo et al. 2017, arXiv 1706.04599: expected calibration error, temperature scaling
"""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.io import decode_jpeg, encode_jpeg

import clip_model
import data
import models
import train

# Metrics --------------------------------------------------------------------------------------------------------------
# Logits are (N, K) of any float dtype, targets (N,) int64. Everything is computed in float64; shares and errors lie
# between 0 and 1. An image's confidence is its largest probability.


def top_k_accuracy(logits, target, k=1):
    """Share of the rows whose target is among the k largest logits (among all of them if there are fewer)."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices  # (N, k)
    return top.eq(target[:, None]).any(dim=1).double().mean().item()


def nll(logits, target):
    """Mean negative log-likelihood of the targets, in nats."""
    return F.cross_entropy(logits.double(), target).item()


def brier(logits, target):
    """Mean squared distance of the probabilities from the one-hot target, summed over classes: 0 to 2 (Brier 1950)."""
    probabilities = logits.double().softmax(dim=1)
    return (probabilities - F.one_hot(target, logits.shape[1])).square().sum(dim=1).mean().item()


def calibration_bins(logits, target, bins=15, equal_mass=False):
    """The points of a reliability diagram: (confidence, accuracy, count), each (bins,) float64.

    Bins of equal width hold (b / bins, (b + 1) / bins]; bins of equal mass are the sorted confidences in parts whose
    sizes differ by at most one, the larger first. An empty bin has confidence and accuracy 0.
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    if equal_mass:
        index = torch.empty_like(predicted)
        for b, part in enumerate(confidence.argsort(stable=True).tensor_split(bins)):
            index[part] = b
    else:
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)
        index = torch.bucketize(confidence, edges[1:-1])
    count = torch.bincount(index, minlength=bins).double()
    confidence, accuracy = (torch.bincount(index, value, minlength=bins) / count.clamp(min=1)
                            for value in (confidence, predicted.eq(target).double()))
    return confidence, accuracy, count


def ece(logits, target, bins=15, equal_mass=False):
    """Expected calibration error: |confidence - accuracy| of the bins, weighted by their counts (Guo 2017, eq. 3)."""
    confidence, accuracy, count = calibration_bins(logits, target, bins, equal_mass)
    return ((confidence - accuracy).abs() * count).sum().item() / len(target)


def fit_temperature(logits, target):
    """The T in 0.001 ... 1000 at which logits / T have the least NLL (Guo 2017, section 4.2); fit it on images that are
    not reported. The NLL is convex in 1 / T: bisecting on the sign of its derivative finds the one minimum."""
    logits = logits.double()
    right = logits.gather(1, target[:, None]).mean()
    low, high = 1e-3, 1e3
    for _ in range(60):
        temperature = math.sqrt(low * high)
        expected = ((logits / temperature).softmax(dim=1) * logits).sum(dim=1).mean()
        low, high = (low, temperature) if expected < right else (temperature, high)
    return temperature


def quadrants(logits, target, threshold):
    """Counts of the images that are confident (confidence >= threshold) or unsure, and right or wrong."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    confident, right = confidence >= threshold, predicted == target
    return {"confident_right": (confident & right).sum().item(), "confident_wrong": (confident & ~right).sum().item(),
            "unsure_right": (~confident & right).sum().item(), "unsure_wrong": (~confident & ~right).sum().item()}


def bootstrap_interval(statistic, samples, generator, resamples=1000, level=0.95):
    """(low, high) of statistic(*samples), a number, over images drawn with replacement: percentiles (Efron 1979).

    samples are tensors (N, ...), resampled together. For a mean pass torch.mean and [the images' values]; for a paired
    difference, the differences.
    """
    n, values = len(samples[0]), []
    for _ in range(resamples):
        index = torch.randint(n, (n,), generator=generator, device=generator.device)
        values.append(float(statistic(*(sample[index.to(sample.device)] for sample in samples))))
    values = torch.tensor(values, dtype=torch.float64)
    return values.quantile((1 - level) / 2).item(), values.quantile((1 + level) / 2).item()


# AlexNet's top-1 errors on ImageNet-C, mean over the five severities (hendrycks/robustness), and on the clean images
# (torchvision's weights, 56.522 % right; the paper says 43.5 % wrong).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500}
ALEXNET_CLEAN_ERROR = 0.43478


def mean_corruption_error(errors, clean_error=None, alexnet=False):
    """mCE: the mean over the fifteen corruptions of the error, itself the mean over severities (paper, section 4).

    errors maps each of the fifteen names to that error; further names are left out. Plain on CIFAR-C; as on ImageNet-C
    with alexnet=True: each error is divided by AlexNet's. With clean_error it is the relative mCE: the clean error is
    first taken off, from AlexNet's too. Raises ValueError on a missing name.
    """
    missing = [name for name in ALEXNET_ERRORS if name not in errors]
    if missing:
        raise ValueError(f"mCE needs all fifteen corruptions; missing are {', '.join(missing)}")
    clean, alexnet_clean = (0, 0) if clean_error is None else (clean_error, ALEXNET_CLEAN_ERROR)
    return sum((errors[name] - clean) / (baseline - alexnet_clean if alexnet else 1)
               for name, baseline in ALEXNET_ERRORS.items()) / len(ALEXNET_ERRORS)


# Corruptions ----------------------------------------------------------------------------------------------------------
# Each takes images uint8 (N, 3, H, W), a severity 1-5 and a torch.Generator (ignored where nothing is random) and
# returns new uint8 images on the same device; every image has its own random draws. The first line is the published
# table: CIFAR-C, Tiny-ImageNet-C, ImageNet-C.


def check_severity(severity):
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity {severity!r} is not one of 1, 2, 3, 4, 5")


def published(images, severity, cifar, tiny, imagenet):
    """The entry for `severity` in the table that was made for 32, 64 or 224 pixels, whichever fits: the shorter side is
    below 48, below 120, or above. Entries are in pixels and do not scale with the side."""
    check_severity(severity)
    side = min(images.shape[-2:])
    return (cifar if side < 48 else tiny if side < 120 else imagenet)[int(severity) - 1]


def to_uint8(x):
    """float 0...1 -> uint8, clipped and truncated (not rounded), as np.uint8 does in the published code. The margin
    keeps flat areas as they are, where float32 lands just below a whole level and the published float64 does not."""
    return (x * 255 + 1e-4).clamp(0, 255).to(torch.uint8)


def draw(sampler, shape, generator, device):
    """sampler(shape), torch.randn or torch.rand, drawn where the generator lives: a CPU generator serves any device."""
    return sampler(shape, generator=generator, device=generator.device).to(device)


def blur(x, sigma, truncate=4, border="nearest"):
    """scipy's gaussian_filter over the last two axes of x float (..., H, W); border "nearest" (the edge pixel repeats)
    or "mirror" (the edge pixel twice). One matrix per axis takes any border, and a sigma wider than the image."""
    reach = int(truncate * sigma + 0.5)
    taps = torch.arange(-reach, reach + 1)
    weight = (-taps ** 2 / (2 * max(sigma, 1e-6) ** 2)).softmax(dim=0)

    def matrix(size):
        source = torch.arange(size)[:, None] + taps  # (size, taps), on the CPU: there the sum has one order
        source = (source.clamp(0, size - 1) if border == "nearest"
                  else torch.minimum(source % (2 * size), (-1 - source) % (2 * size)))
        return torch.zeros(size, size).scatter_add_(1, source, weight.expand(size, -1)).to(x.device)

    return matrix(x.shape[-2]) @ (x @ matrix(x.shape[-1]).T)


def clipped_zoom(x, factor):
    """Enlarges the centre of x float (N, C, H, W) by the factor: bilinear, corners aligned, cut to the old size."""
    height, width = x.shape[-2:]
    h, w = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - h) // 2, (width - w) // 2
    x = F.interpolate(x[..., top:top + h, left:left + w], size=(int(h * factor + 0.5), int(w * factor + 0.5)),
                      mode="bilinear", align_corners=True)
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top:top + height, left:left + width]


def motion(x, radius, sigma, angle):
    """ImageMagick's motion blur of x float (N, C, H, W) in grey levels, at angle (N,) in degrees: one side of a
    Gaussian, taps 0 ... 2 radius at the nearest pixels of the line; edge pixels repeat; truncated to whole levels."""
    height, width = x.shape[-2:]
    taps = torch.arange(2 * radius + 1, device=x.device)
    weight = (-taps ** 2 / (2 * sigma ** 2)).softmax(dim=0)
    dx = (taps * angle.deg2rad().cos()[:, None] - 0.5).ceil().long()  # (N, taps)
    dy = (taps * angle.deg2rad().sin()[:, None] - 0.5).ceil().long()
    column = (torch.arange(width, device=x.device) + dx[..., None]).clamp(0, width - 1)  # (N, taps, W)
    row = (torch.arange(height, device=x.device) + dy[..., None]).clamp(0, height - 1)  # (N, taps, H)
    pixels, total = x.flatten(2), torch.zeros_like(x)
    for t in range(len(taps)):
        index = (row[:, t, :, None] * width + column[:, t, None, :]).flatten(1)  # (N, H * W)
        total += weight[t] * pixels.gather(2, index[:, None].expand(pixels.shape)).view(x.shape)
    return (total + 1e-3).floor()  # the margin keeps flat areas as they are


def gaussian_noise(images, severity, generator):
    """Normal noise of standard deviation c, of a range of 1."""
    c = published(images, severity, [.04, .06, .08, .09, .10], [.04, .08, .12, .15, .18], [.08, .12, .18, .26, .38])
    return to_uint8(images / 255 + c * draw(torch.randn, images.shape, generator, images.device))


def shot_noise(images, severity, generator):
    """Poisson noise of c photons at full brightness."""
    c = published(images, severity, [500, 250, 100, 75, 50], [250, 100, 50, 30, 15], [60, 25, 12, 5, 3])
    photons = torch.poisson((images / 255 * c).to(generator.device), generator)
    return to_uint8(photons.to(images.device) / c)


def impulse_noise(images, severity, generator):
    """Salt and pepper in equal parts, each channel on its own."""
    c = published(images, severity, [.01, .02, .03, .05, .07], [.01, .02, .05, .08, .14], [.03, .06, .09, .17, .27])
    chance = draw(torch.rand, images.shape, generator, images.device)
    return images.masked_fill(chance < c, 0).masked_fill(chance < c / 2, 255)


def speckle_noise(images, severity, generator):
    """Normal noise in proportion to the value."""
    c = published(images, severity, [.06, .1, .12, .16, .2], [.15, .2, .25, .3, .35], [.15, .2, .35, .45, .6])
    return to_uint8(images / 255 * (1 + c * draw(torch.randn, images.shape, generator, images.device)))


def gaussian_blur(images, severity, generator=None):
    """Edge pixels repeat."""
    sigma = published(images, severity, [.4, .6, .7, .8, 1], [.5, .75, 1, 1.25, 1.5], [1, 2, 3, 4, 6])
    return to_uint8(blur(images / 255, sigma))


def defocus_blur(images, severity, generator=None):
    """A disk, itself smoothed by a Gaussian of 3 x 3 or 5 x 5; both mirror without repeating the edge pixel."""
    radius, sigma = published(images, severity, [(.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)],
                              [(.5, .6), (1, .1), (1.5, .1), (2.5, .01), (3, .1)],
                              [(3, .1), (4, .5), (6, .5), (8, .5), (10, .5)])
    grid, margin = (8, 1) if radius <= 8 else (radius, 2)
    axis = torch.arange(-grid, grid + 1, device=images.device)
    disk = (axis[:, None] ** 2 + axis ** 2 <= radius ** 2).float()
    disk = F.pad(disk[None, None] / disk.sum(), [margin] * 4, mode="reflect")
    taps = (-torch.arange(-margin, margin + 1, device=images.device) ** 2 / (2 * sigma ** 2)).softmax(dim=0)
    kernel = F.conv2d(disk, torch.outer(taps, taps)[None, None])  # (1, 1, 2 grid + 1, 2 grid + 1)
    rim = grid - min(grid, math.ceil(radius) + margin)  # of zeros
    kernel = kernel[..., rim:kernel.shape[2] - rim, rim:kernel.shape[3] - rim]
    x = F.pad(images / 255, [kernel.shape[3] // 2] * 4, mode="reflect")
    x = x.flatten(0, 1)[None]  # (1, N * 3, ...): as channels of one image it takes a tenth of the time
    return to_uint8(F.conv2d(x, kernel.expand(x.shape[1], -1, -1, -1), groups=x.shape[1]).view(images.shape))


def glass_blur(images, severity, generator):
    """Blurs, gives every pixel the value of one at most `reach` away, and blurs again.

    The published loop runs from the last pixel to the first and means to swap; NumPy's views make it a copy. Offsets go
    from -reach to reach - 1, so that a pixel may read one that the same pass has overwritten: such chains are followed
    to their end, twice as far at each step.
    """
    sigma, reach, passes = published(
        images, severity, [(.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)],
        [(.1, 1, 1), (.5, 1, 1), (.6, 1, 2), (.7, 2, 1), (.9, 2, 2)],
        [(.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)])
    n, _, height, width = images.shape
    row = torch.arange(height, device=images.device)[:, None]
    column = torch.arange(width, device=images.device)
    here = row * width + column  # (H, W)
    moves = (row > reach) & (row <= height - reach) & (column > reach) & (column <= width - reach)
    x = to_uint8(blur(images / 255, sigma)).flatten(2)  # (N, 3, H * W)
    for _ in range(passes):
        dy, dx = (2 * reach * draw(torch.rand, (2, n, height, width), generator, images.device)).long() - reach
        source = torch.where(moves, here + dy * width + dx, here).flatten(1)  # (N, H * W)
        overwritten = source > here.flatten()
        while overwritten.any():
            source, overwritten = (torch.where(overwritten, source.gather(1, source), source),
                                   overwritten & overwritten.gather(1, source))
        x = x.gather(2, source[:, None].expand(x.shape))
    return to_uint8(blur(x.view(images.shape) / 255, sigma))


def motion_blur(images, severity, generator):
    """Along a line at an angle between -45 and 45 degrees."""
    radius, sigma = published(images, severity, [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
                              [(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
                              [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)])
    angle = 90 * draw(torch.rand, (len(images),), generator, images.device) - 45
    return motion(images.float(), radius, sigma, angle).to(torch.uint8)


def zoom_blur(images, severity, generator=None):
    """The mean of the image and `count` enlargements of it, by 1, 1 + step, 1 + 2 step ..."""
    count, step = published(images, severity, [(7, .01), (12, .01), (16, .01), (21, .01), (26, .01)],
                            [(7, .01), (12, .01), (16, .01), (21, .01), (26, .01)],
                            [(12, .01), (16, .01), (11, .02), (13, .02), (11, .03)])
    x = images / 255
    return to_uint8(sum((clipped_zoom(x, 1 + i * step) for i in range(count)), start=x) / (count + 1))


def snow(images, severity, generator):
    """Thresholded noise, enlarged and blurred along a steep line, laid on twice (once turned by 180 degrees) over the
    whitened image."""
    mean, deviation, zoom, threshold, radius, sigma, keep = published(
        images, severity,
        [(.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
         (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)],
        [(.1, .2, 1, .6, 8, 3, .8), (.1, .2, 1, .5, 10, 4, .8), (.15, .3, 1.75, .55, 10, 4, .7),
         (.25, .3, 2.25, .6, 12, 6, .65), (.3, .3, 1.25, .65, 14, 12, .6)],
        [(.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
         (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)])
    n, _, height, width = images.shape
    x = images / 255
    flakes = clipped_zoom(mean + deviation * draw(torch.randn, (n, 1, height, width), generator, x.device), zoom)
    flakes = to_uint8(flakes * (flakes >= threshold)).float()
    flakes = motion(flakes, radius, sigma, 90 * draw(torch.rand, (n,), generator, x.device) - 135) / 255
    grey = (x * x.new_tensor([.299, .587, .114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    x = keep * x + (1 - keep) * torch.maximum(x, grey * 1.5 + 0.5)
    return to_uint8(x + flakes + flakes.flip(2, 3))


def frost(images, severity, generator):
    """The image and frost, each at its weight.

    The published code cuts its frost from five photographs, which are not ours to ship. Here it is procedural: bright
    ridges along the zero lines of power-law noise, in colour, contrast and roughness like one of the five, drawn per
    image. The strength agrees with the published one; the pictures do not.
    """
    keep, weight = published(images, severity, [(1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)],
                             [(1, .3), (.9, .4), (.8, .45), (.75, .5), (.7, .55)],
                             [(1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)])
    looks = torch.tensor([[77, 148, 165, 14], [198, 203, 212, 19], [198, 203, 212, 19], [145, 160, 173, 25],
                          [102, 114, 125, 34]], device=images.device)  # mean R, G, B; standard deviation
    n, _, height, width = images.shape
    vertical, horizontal = (torch.fft.fftfreq(side, device=images.device) for side in (height, width))
    frequency = torch.hypot(vertical[:, None], horizontal).clamp(min=0.5 / max(height, width))
    slope = 1.12 - 8 / min(height, width)  # for small images the photographs are shrunk, hence rougher
    gain = frequency ** -slope
    noise = torch.fft.fft2(draw(torch.randn, (n, height, width), generator, images.device))
    noise = torch.fft.ifft2(noise * gain / gain.square().mean().sqrt()).real
    ridges = (0.8 - noise.abs()) / 0.6  # the absolute value of a normal variable has mean 0.8 and deviation 0.6
    look = looks[(5 * draw(torch.rand, (n,), generator, images.device)).long()][..., None, None]  # (N, 4, 1, 1)
    ice = (look[:, :3] + look[:, 3:] * ridges[:, None]).clamp(0, 255)
    return to_uint8((keep * images + weight * ice) / 255)


def plasma(n, size, decay, generator, device):
    """n cloud fields in 0...1, float (n, size, size), size a power of two: diamond-square on a torus, the random part
    divided by `decay` at each halving of the step."""
    height = torch.zeros(n, size, size, device=device)
    step, wibble = size, 100.0

    def mean(total):
        return total / 4 + wibble ** 2 * (2 * draw(torch.rand, total.shape, generator, device) - 1)

    while step >= 2:
        half = step // 2
        corner = height[:, ::step, ::step]
        pair = corner + corner.roll(-1, 1)
        centre = mean(pair + pair.roll(-1, 2))
        height[:, half::step, half::step] = centre
        height[:, ::step, half::step] = mean(centre + centre.roll(1, 1) + corner + corner.roll(-1, 2))
        height[:, half::step, ::step] = mean(centre + centre.roll(1, 2) + corner + corner.roll(-1, 1))
        step, wibble = half, wibble / decay
    height -= height.amin(dim=(1, 2), keepdim=True)
    return height / height.amax(dim=(1, 2), keepdim=True)


def fog(images, severity, generator):
    """Adds clouds and scales back to the image's own maximum."""
    weight, decay = published(images, severity, [(.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)],
                              [(.4, 3), (.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
                              [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)])
    n, _, height, width = images.shape
    x = images / 255
    peak = x.amax(dim=(1, 2, 3), keepdim=True)
    size = 2 ** math.ceil(math.log2(max(height, width)))
    clouds = plasma(n, size, decay, generator, images.device)[:, None, :height, :width]
    return to_uint8((x + weight * clouds) * peak / (peak + weight))


def brightness(images, severity, generator=None):
    """Adds to the HSV value, which scales R, G and B alike."""
    c = published(images, severity, [.05, .1, .15, .2, .3], [.1, .2, .3, .4, .5], [.1, .2, .3, .4, .5])
    x = images / 255
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + c).clamp(max=1)
    return to_uint8(torch.where(value > 0, x * (brighter / value), brighter))


def contrast(images, severity, generator=None):
    """Pulls every channel towards its own mean over the image."""
    c = published(images, severity, [.75, .5, .4, .3, .15], [.4, .3, .2, .1, .05], [.4, .3, .2, .1, .05])
    x = images / 255
    mean = x.mean(dim=(2, 3), keepdim=True)
    return to_uint8((x - mean) * c + mean)


def elastic_transform(images, severity, generator):
    """A random affine map, which moves three points by up to `jitter` pixels, then a displacement by smooth noise.
    Bilinear both times; the first mirrors at the centre of the edge pixel, the second at its rim."""
    amount, sigma, jitter = published(
        images, severity, [(0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, .96, .96)],
        [(0, 0, 5.12), (3.2, 19.2, 3.84), (6.4, 5.12, 3.84), (6.4, 1.92, 1.92), (10.24, 1.92, 1.28)],
        [(488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)])
    n, _, height, width = images.shape
    x, y = torch.meshgrid(*(torch.arange(side, device=images.device) for side in (width, height)), indexing="xy")
    pixel = torch.stack([x, y], dim=-1).float()  # (H, W, 2)
    size = torch.tensor([width, height], device=images.device)
    square = torch.tensor([[1, 1], [1, -1], [-1, -1]], device=images.device) * (min(height, width) // 3)
    points = (size // 2 + square).float().expand(n, 3, 2)
    moved = points + jitter * (2 * draw(torch.rand, (n, 3, 2), generator, images.device) - 1)
    back = torch.linalg.solve(F.pad(moved, [0, 1], value=1), points)  # (N, 3, 2), from the result to the image
    source = torch.einsum("hwi,nij->nhwj", pixel, back[:, :2]) + back[:, None, None, 2]  # (N, H, W, 2)
    x = F.grid_sample(images / 255, 2 * source / (size - 1) - 1, padding_mode="reflection", align_corners=True)
    shift = 2 * draw(torch.rand, (n, 2, height, width), generator, images.device) - 1
    source = pixel + amount * blur(shift, sigma, truncate=3, border="mirror").permute(0, 2, 3, 1)
    return to_uint8(F.grid_sample(x, (2 * source + 1) / size - 1, padding_mode="reflection", align_corners=False))


def pixelate(images, severity, generator=None):
    """Shrinks and enlarges with Pillow's box filter: windows go by pixel centre, every pass rounds to whole levels."""
    c = published(images, severity, [.95, .9, .85, .75, .65], [.9, .8, .7, .6, .5], [.6, .5, .4, .3, .25])

    def resize(x, size):  # the last axis
        scale = x.shape[-1] / size
        centre = (torch.arange(size, dtype=torch.float64, device=x.device)[:, None] + 0.5) * scale
        half, pixel = max(scale, 1) / 2, torch.arange(x.shape[-1], device=x.device)
        window = (pixel >= (centre - half + 0.5).floor()) & (pixel < (centre + half + 0.5).floor())  # (size, old size)
        return (x @ (window / window.sum(dim=1, keepdim=True)).T + 0.5).floor()

    height, width = images.shape[-2:]
    small = resize(resize(images.float(), int(width * c)).mT, int(height * c)).mT
    return resize(resize(small, width).mT, height).mT.to(torch.uint8)


def jpeg_compression(images, severity, generator=None):
    """There and back through libjpeg (4:2:0 chroma), on the CPU."""
    quality = published(images, severity, [80, 65, 58, 50, 40], [65, 58, 50, 40, 25], [25, 18, 15, 10, 7])
    return torch.stack([decode_jpeg(encode_jpeg(image, quality)) for image in images.cpu()]).to(images.device)


def edges(x):
    """Edges of whole numbers x float (N, 1, H, W), as 0.0 or 1.0: OpenCV's Canny above its upper threshold 150, without
    the weak edges that it joins on. Sobel, size |dx| + |dy|, peaks across the edge along one of four directions."""
    sobel = x.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    dx, dy = F.conv2d(F.pad(x, [1] * 4, mode="replicate"), torch.stack([sobel, sobel.T])[:, None]).split(1, dim=1)
    size = dx.abs() + dy.abs()
    near = F.unfold(size, 3, padding=1).unflatten(-1, x.shape[2:])  # (N, 9, H, W), the pixel itself is number 4
    flat, steep = dy.abs() < 0.41421356 * dx.abs(), dy.abs() > 2.41421356 * dx.abs()  # tan 22.5 and 67.5 degrees
    before = torch.where(flat, 3, torch.where(steep, 1, torch.where((dx < 0) == (dy < 0), 0, 2)))
    after = near.gather(1, 8 - before)
    peak = (size > near.gather(1, before)) & ((size > after) | (size == after) & (flat | steep))
    return (peak & (size > 150)).float()


def spatter(images, severity, generator):
    """Drops: noise, blurred and thresholded. Water (severities 1-3) gets a relief from the distance to its edges,
    equalised and filtered; mud (4-5) is opaque."""
    mean, deviation, sigma, threshold, strength, is_mud = published(
        images, severity, [(.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
                           (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1)],
        [(.62, .1, .7, .7, .6, 0), (.65, .1, .8, .7, .6, 0), (.65, .3, 1, .69, .6, 0),
         (.65, .1, .7, .68, .6, 1), (.65, .1, .5, .67, .6, 1)],
        [(.65, .3, 4, .69, .6, 0), (.65, .3, 3, .68, .6, 0), (.65, .3, 2, .68, .5, 0),
         (.65, .3, 1, .65, 1.5, 1), (.67, .4, 1, .65, 1.5, 1)])
    n, _, height, width = images.shape
    x = images / 255
    liquid = blur(mean + deviation * draw(torch.randn, (n, 1, height, width), generator, x.device), sigma)
    if is_mud:
        mud = blur((liquid > threshold).float(), strength)
        mud = mud * (mud >= 0.8)
        return to_uint8(x * (1 - mud) + mud * x.new_tensor([63, 42, 20]).view(3, 1, 1) / 255)

    def mean_filter(y):
        return F.avg_pool2d(F.pad(y, [1] * 4, mode="reflect"), 3, 1)

    liquid = (liquid * (liquid >= threshold) * 255).floor()
    near, distance = edges(liquid), 0
    for step in range(20):  # up to 20 pixels; growing by squares and diamonds in turn comes close to Euclid's distance
        distance = distance + 1 - near
        near = F.max_pool2d(near, 3, 1, 1) if step % 2 == 0 else torch.maximum(
            F.max_pool2d(near, (3, 1), 1, (1, 0)), F.max_pool2d(near, (1, 3), 1, (0, 1)))
    depth = mean_filter(distance).long().flatten(1)  # (N, H * W), 0 ... 20
    rank = F.one_hot(depth, 21).sum(dim=1).cumsum(dim=1)  # (N, 21), for the histogram equalisation
    first = rank.gather(1, depth.amin(dim=1, keepdim=True))
    depth = ((rank.gather(1, depth) - first) * 255 / (height * width - first).clamp(min=1)).round()
    kernel = x.new_tensor([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])[None, None]
    relief = F.conv2d(F.pad(depth.view(n, 1, height, width), [1] * 4, mode="reflect"), kernel).clamp(0, 255)
    water = liquid * mean_filter(relief).round()
    water = strength * water / water.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)  # no drop at all stays none
    return to_uint8(x + water * x.new_tensor([175, 238, 238]).view(3, 1, 1) / 255)


def saturate(images, severity, generator=None):
    """Scales and shifts the HSV saturation. What is grey has hue 0, so that a shift turns it red, as published."""
    scale, shift = published(images, severity, [(.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2)],
                             [(.3, 0), (.1, 0), (2, 0), (5, .1), (30, .2)],
                             [(.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)])
    x = images / 255
    value = x.amax(dim=1, keepdim=True)
    spread = value - x.amin(dim=1, keepdim=True)
    saturation = torch.where(value > 0, spread / value, 0)
    below = torch.where(spread > 0, (value - x) / spread, x.new_tensor([0, 1, 1]).view(3, 1, 1))  # 0...1, the hue
    return to_uint8(value * (1 - (saturation * scale + shift).clamp(max=1) * below))


COMMON = {f.__name__: f for f in (
    gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog,
    brightness, contrast, elastic_transform, pixelate, jpeg_compression)}  # the benchmark's fifteen, in its order
EXTRA = {f.__name__: f for f in (speckle_noise, gaussian_blur, spatter, saturate)}


def corrupt(images, name, severity, generator):
    """images uint8 (N, 3, H, W) under the corruption `name` of COMMON or EXTRA at severity 1-5: uint8, on their device.

    Parts of 2 ** 18 pixels, one after the other, bound the memory. The result depends on the generator's state and
    device and on the order of the images; splitting a call changes the draws, unless it is split between two parts.
    Raises ValueError on an unknown name, a severity outside 1-5, and images of another type or shape.
    """
    known = {**COMMON, **EXTRA}
    if name not in known:
        raise ValueError(f"unknown corruption {name!r}; known are {', '.join(known)}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected torch.uint8 (N, 3, H, W), N > 0")
    parts = images.split(max(1, 2 ** 18 // (images.shape[2] * images.shape[3])))
    return torch.cat([known[name](part.contiguous(), severity, generator) for part in parts])


# Published files ------------------------------------------------------------------------------------------------------


def read_cifar_c(directory, name, severity):
    """One severity of CIFAR-10-C or CIFAR-100-C: images uint8 (N, 3, 32, 32), labels int64 (N,).

    The folder holds <name>.npy uint8 (5 N, 32, 32, 3), severity-major, and labels.npy (5 N,); N is 10,000 as published.
    Only the part asked for is read. Raises FileNotFoundError, and ValueError on a file of another shape.
    """
    check_severity(severity)
    arrays = []
    for path in (Path(directory) / f"{name}.npy", Path(directory) / "labels.npy"):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; expected the unpacked CIFAR-10-C or CIFAR-100-C")
        try:
            arrays.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no NumPy array file, or is cut short; unpack it again") from error
    images, labels = arrays
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) % 5 or not len(images):
        raise ValueError(f"{directory}/{name}.npy is {images.dtype} {images.shape}; expected uint8 (50000, 32, 32, 3)")
    n = len(images) // 5
    if labels.shape != (5 * n,) or (labels.reshape(5, n) != labels[:n]).any():
        raise ValueError(f"{directory}/labels.npy is {labels.shape}; expected {n} labels, five times over")
    part = slice((severity - 1) * n, severity * n)
    return torch.from_numpy(images[part].transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels[part].astype(np.int64))


def imagenet_c_folder(directory, name, severity):
    """The ImageFolder of one corruption of ImageNet-C or Tiny-ImageNet-C: <name>/<severity>, there or in a subfolder
    as the archives unpack (blur/defocus_blur/1). Raises FileNotFoundError."""
    check_severity(severity)
    for path in (Path(directory) / name, *sorted(Path(directory).glob(f"*/{name}"))):
        if (path / str(severity)).is_dir():
            return path / str(severity)
    raise FileNotFoundError(f"{directory} has no {name}/{severity}; expected the unpacked folders of ImageNet-C")


def list_folder(root, class_ids, folder_classes=None):
    """The images of an ImageFolder with some of a classifier's classes: paths, labels int64 (N,), columns int64 (k,).

    class_ids are the classes in the order of the logits, by the names of the folders (ImageNet-V2, -A, -R and -Sketch:
    WordNet ids); folder_classes {folder: class} renames folders. columns are the classes that occur, ascending, and
    the labels count within them: evaluate logits[:, columns] against labels. The mask is thus on the logits, before
    anything is computed from them, and the choice is among the set's own classes (200 for ImageNet-A and -R). Raises
    FileNotFoundError without the folder, ValueError on a folder of no known class and where there are no images.
    """
    root, column = Path(root), {name: k for k, name in enumerate(class_ids)}
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; expected one with a subfolder for each class")
    paths, classes = [], []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        name = (folder_classes or {}).get(folder.name, folder.name)
        if name not in column:
            raise ValueError(f"{folder}: {name!r} is not a class of the model; its classes are like {class_ids[0]!r}")
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpeg", ".jpg", ".png"))
        paths += found
        classes += [column[name]] * len(found)
    if not paths:
        raise ValueError(f"{root} holds no images; expected <class>/<image>.jpeg, .jpg or .png")
    columns, labels = torch.tensor(classes).unique(return_inverse=True)
    return paths, labels, columns


# Runs and reports -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting with its line of help; the command line is made from it."""
    run: tuple = train.setting(None, "run folders; without, the newest finished one below runs/", nargs="+")
    checkpoint: str = train.setting(None, "a bare checkpoint instead, with --model and --dataset", type=str)
    model: str = train.setting(None, "the checkpoint's architecture", type=str)
    dataset: str = train.setting(None, "the data set; without, the run's own", type=str)
    data_dir: str = train.setting(None, "where the data set lies; without, where the run found it", type=str)
    shift: bool = train.setting(False, "evaluate the data set's shift splits, too")
    corruptions: str = train.setting(None, "evaluate corrupted test images, too: the published files below DIR, or "
                                     "generated ones", nargs="?", const="generated", metavar="DIR")
    zero_shot: bool = train.setting(False, "evaluate --clip itself on --dataset, by one template, each, and all")
    clip: str = train.setting("ViT-L/14", "as in train.py", type=str)
    bpe: str = train.setting(None, "as in train.py", type=str)
    prompts: str = train.setting(None, "as in train.py", type=str)
    seed: int = train.setting(0, "of generated corruptions")
    amp: bool = train.setting(False, "bfloat16 autocast")
    device: str = train.setting(train.Config.device, "cpu, cuda, cuda:1")
    workers: int = train.setting(8, "loader processes where images stream (imagenet)")
    cache_dir: str = train.setting(train.Config.cache_dir, "as in train.py")


class Classifier(NamedTuple):
    """A trained network and what reading its answers takes."""
    model: torch.nn.Module
    mean: list
    std: list
    image_size: int
    about: dict  # what the report says of it
    report: Path


def newest_run(root="runs"):
    """The folder below `root` whose run finished last. FileNotFoundError, saying how to make one, if there is none."""
    finished = sorted(Path(root).glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise FileNotFoundError(f"no finished run below {root}/: python train.py makes one; --run names one elsewhere, "
                                "--checkpoint a bare checkpoint")
    print(f"evaluating {finished[-1].parent}", file=sys.stderr)
    return finished[-1].parent


def load_run(folder, dataset, class_names):
    """-> Classifier of a finished run. Raises ValueError for a damaged one, and for one of other classes than the data
    set's, naming the first that differs."""
    student, summary = train.read_checkpoint(folder / "student.pt"), json.loads((folder / "summary.json").read_text())
    for k, (own, other) in enumerate(itertools.zip_longest(student["class_names"], class_names)):
        if own != other:
            raise ValueError(f"{folder} was trained on other classes than {dataset} has: class {k} is {own!r} there "
                             f"and {other!r} here")
    model = models.load_weights(student["model_name"], folder / "student.pt")
    about = {key: summary[key] for key in ("dataset", "method", "teacher", "student", "seed", "epochs")}
    return Classifier(model, student["mean"], student["std"], student["image_size"], about, folder / "report.json")


def scores(logits, labels):
    """The metrics of one test set: top-1, top-5 and ECE in percent, NLL in nats."""
    return {"top1": 100 * top_k_accuracy(logits, labels), "top5": 100 * top_k_accuracy(logits, labels, 5),
            "nll": nll(logits, labels), "ece": 100 * ece(logits, labels)}


@torch.inference_mode()
def predict(classifiers, blocks, config):
    """Blocks of uint8 images (b,3,H,W) -> a list of logits (N,K), one a classifier, each seeing the images at its own
    size; a block is made once for all of them."""
    logits = [[] for _ in classifiers]
    for images in blocks:
        for classifier, rows in zip(classifiers, logits):
            inputs = train.to_input(data.resize(images, classifier.image_size), classifier.mean, classifier.std)
            with train.autocast(config):
                rows.append(classifier.model(inputs)[0].float().cpu())
    return [torch.cat(rows) for rows in logits]


def load_test(name, config):
    """A test split, its images at their own size; where they stream or differ, as the data set's customary crop."""
    split = data.load_dataset(config.dataset, config.data_dir, name)
    if isinstance(split.images, torch.Tensor):
        return split
    return split._replace(images=data.resize(split.images, data.DATASETS[config.dataset].image_size))


def blocks(split, config):
    """A split's images, uint8 (b,3,H,W) a block, on the device."""
    for images, _, _ in data.batches(split, 250, workers=config.workers, device=config.device):
        yield images


def corrupted(test, name, severity, config):
    """-> (blocks of corrupted test images, their labels): generated, or read from the published files. Each generated
    corruption and severity has its own generator, so that it can be repeated alone."""
    if config.corruptions == "generated":
        seed = 1000 * config.seed + 10 * list(COMMON).index(name) + severity
        generator = torch.Generator().manual_seed(seed)
        return (corrupt(images, name, severity, generator) for images in blocks(test, config)), test.labels
    if config.dataset.startswith("cifar"):
        split = data.Split(*read_cifar_c(config.corruptions, name, severity), test.class_names)
    else:
        folder = torchvision.datasets.ImageFolder(imagenet_c_folder(config.corruptions, name, severity))
        size = data.DATASETS[config.dataset].image_size  # the published images have it already
        images = data.Stream([path for path, _ in folder.samples], size, size)
        split = data.Split(images, torch.tensor(folder.targets), test.class_names)
        if len(folder.classes) != len(test.class_names):
            raise ValueError(f"{folder.root} has {len(folder.classes)} classes, {config.dataset} "
                             f"{len(test.class_names)}: expected a folder for each")
    return blocks(split, config), split.labels


def evaluate(config):
    """What the command does with classifiers: -> their reports, dicts that also lie in report.json beside each run."""
    folders = []
    if config.checkpoint:
        if not (config.model and config.dataset):
            raise ValueError("--checkpoint takes --model NAME and --dataset NAME with it")
        config = dataclasses.replace(config, data_dir=config.data_dir or "data")
    else:
        folders = [Path(folder) for folder in config.run or [newest_run()]]
        unfinished = [str(folder) for folder in folders if not (folder / "summary.json").is_file()]
        if unfinished:
            raise FileNotFoundError(f"no finished run in {', '.join(unfinished)} (no summary.json); python train.py "
                                    "makes one, and finishes one that it began")
        known = [json.loads((folder / "config.json").read_text()) for folder in folders]
        datasets = {run["settings"]["dataset"] for run in known}
        if not config.dataset and len(datasets) > 1:
            raise ValueError(f"these runs are on different data sets, {', '.join(sorted(datasets))}: evaluate them one "
                             "data set at a time")
        config = dataclasses.replace(config, dataset=config.dataset or datasets.pop(),
                                     data_dir=config.data_dir or known[0]["places"]["data_dir"])
    test = load_test("test", config)
    classifiers = [load_run(folder, config.dataset, test.class_names) for folder in folders]
    if config.checkpoint:
        info, path = data.DATASETS[config.dataset], Path(config.checkpoint)
        model = models.load_weights(config.model, path, len(test.class_names))
        about = {"checkpoint": str(path), "dataset": config.dataset, "student": config.model}
        classifiers = [Classifier(model, info.mean, info.std, info.image_size, about, path.with_suffix(".report.json"))]
    for classifier in classifiers:
        classifier.model.eval().to(config.device, memory_format=torch.channels_last)

    reports = [{"of": classifier.about} for classifier in classifiers]
    for name in ("test", *(data.DATASETS[config.dataset].shifts if config.shift else ())):
        split = test if name == "test" else load_test(name, config)
        for report, logits in zip(reports, predict(classifiers, blocks(split, config), config)):
            report[name] = scores(logits, split.labels)
    if config.corruptions:
        source = "generated" if config.corruptions == "generated" else "published"
        for report in reports:
            report["corruptions"] = {"source": source, "top1": {}}
        tasks = [(name, severity) for name in COMMON for severity in range(1, 6)]
        progress = data.Progress(f"corruptions ({source})", len(tasks), "sets")
        for done, (name, severity) in enumerate(tasks, 1):
            images, labels = corrupted(test, name, severity, config)
            for report, logits in zip(reports, predict(classifiers, images, config)):
                report["corruptions"]["top1"].setdefault(name, []).append(100 * top_k_accuracy(logits, labels))
            progress.update(done, f"{name} {severity}", keep=done == len(tasks))
        for report in reports:
            errors = {name: 1 - sum(row) / 500 for name, row in report["corruptions"]["top1"].items()}
            report["corruptions"]["mean_error"] = 100 * mean_corruption_error(errors)
    for classifier, report in zip(classifiers, reports):
        data.write_atomically(classifier.report, json.dumps(report, indent=2).encode())
    return reports


def zero_shot(config):
    """CLIP itself on a data set's test split: {"all N templates": top-1 in percent, then an entry a template}."""
    config = dataclasses.replace(config, dataset=config.dataset or "shapes", data_dir=config.data_dir or "data")
    test = data.load_dataset(config.dataset, config.data_dir, "test")
    templates = clip_model.load_templates(config.prompts or train.PROMPTS)
    clip, tokenizer = train.load_clip(config)
    _, features = train.load_targets(config, clip, tokenizer, {"test": test})["test"]  # (N,D), unit length
    each = [clip_model.class_features(clip, tokenizer, test.class_names, [t]).cpu() for t in templates]  # M times (K,D)
    classes = {f"all {len(each)} templates": F.normalize(sum(each), dim=1), **dict(zip(templates, each))}
    return {name: 100 * top_k_accuracy(features.float() @ rows.T, test.labels) for name, rows in classes.items()}


def tables(reports):
    """The reports as text: a table of test sets each, and one of corruptions by severity."""
    lines = []
    for report in reports:
        lines.append(" ".join(f"{key} {value}" for key, value in report["of"].items() if value is not None))
        lines.append(f"{'':20}{'top-1 %':>10}{'top-5 %':>10}{'NLL':>10}{'ECE %':>10}")
        for name, row in report.items():
            if isinstance(row, dict) and "ece" in row:
                lines.append(f"{name:20}{row['top1']:10.2f}{row['top5']:10.2f}{row['nll']:10.3f}{row['ece']:10.2f}")
        if "corruptions" in report:
            lines.append(f"{'top-1 %, severity':20}{1:>10}{2:>10}{3:>10}{4:>10}{5:>10}{'mean':>10}")
            for name, row in report["corruptions"]["top1"].items():
                lines.append(f"{name:20}" + "".join(f"{value:10.2f}" for value in [*row, sum(row) / 5]))
            lines.append(f"mean error over the fifteen ({report['corruptions']['source']}): "
                         f"{report['corruptions']['mean_error']:.2f} %")
    return "\n".join(lines)


def job(config):
    if config.zero_shot:
        for template, top1 in zero_shot(config).items():
            print(f"{top1:6.2f} %  {template}")
    else:
        print(tables(evaluate(config)))


if __name__ == "__main__":
    train.main(lambda: job(train.parse(Config, __doc__)))
