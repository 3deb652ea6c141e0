"""Evaluation of trained classifiers: metrics on logits, image corruptions, and readers for the published test sets.

Three sections, leaves first: metrics (they take logits, never a model), corruptions (uint8 images in, uint8 images out)
and published files. Every function can be copied alone, together with the few helpers it names.

References
    Hendrycks and Dietterich 2019, arXiv 1903.12261: the corruptions, mCE and relative mCE; the published code is
        hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py, make_tinyimagenet_c.py and make_imagenet_c.py
    Guo et al. 2017, arXiv 1706.04599: expected calibration error, temperature scaling
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.io import ImageReadMode, decode_image, decode_jpeg, encode_jpeg, read_file

# ---------------------------------------------------------------------------------------------------------- metrics
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
    """The temperature T in 0.001 ... 1000 at which logits / T have the least NLL (Guo 2017, section 4.2).

    The NLL is convex in 1 / T, so that bisecting on the sign of its derivative finds the one minimum. Fit it on images
    that are not reported.
    """
    logits = logits.double()
    right = logits.gather(1, target[:, None]).mean()
    low, high = 1e-3, 1e3
    for _ in range(60):
        temperature = math.sqrt(low * high)
        expected = ((logits / temperature).softmax(dim=1) * logits).sum(dim=1).mean()
        low, high = (low, temperature) if expected < right else (temperature, high)  # underconfident: sharpen
    return temperature


def quadrants(logits, target, threshold):
    """Counts of images that are confident (confidence >= threshold) or unsure, and right or wrong."""
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    confident, right = confidence >= threshold, predicted == target
    return {"confident_right": (confident & right).sum().item(), "confident_wrong": (confident & ~right).sum().item(),
            "unsure_right": (~confident & right).sum().item(), "unsure_wrong": (~confident & ~right).sum().item()}


def bootstrap_interval(statistic, samples, generator, resamples=1000, level=0.95):
    """(low, high): the percentile interval of statistic(*samples) over images drawn with replacement (Efron 1979).

    samples are tensors (N, ...) that are resampled together; statistic returns a number. For a mean, pass torch.mean and
    [the value of each image]; for a paired difference, the differences.
    """
    def resample():
        index = torch.randint(len(samples[0]), (len(samples[0]),), generator=generator, device=generator.device)
        return float(statistic(*(sample[index.to(sample.device)] for sample in samples)))

    values = torch.tensor([resample() for _ in range(resamples)], dtype=torch.float64)
    return tuple(values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist())


# AlexNet's top-1 errors on ImageNet-C, mean over the five severities (hendrycks/robustness), and on the clean images
# (torchvision's weights: 56.522 % right; 43.5 % error in the paper).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840,
    "jpeg_compression": 0.606500}
ALEXNET_CLEAN_ERROR = 0.43478


def mean_corruption_error(errors, alexnet=False, clean_error=None):
    """mCE: the mean over the fifteen corruptions of a classifier's error, itself the mean over severities.

    errors maps each of the fifteen names to that error; further names are left out. alexnet=False is the unnormalised
    mean, as on CIFAR-C; alexnet=True divides each error by AlexNet's, as on ImageNet-C. With clean_error it is the
    relative mCE: the clean error is first taken off, from AlexNet's too (paper, section 4.1). Raises on a missing name.
    """
    missing = [name for name in ALEXNET_ERRORS if name not in errors]
    if missing:
        raise ValueError(f"mCE needs all fifteen corruptions; missing are {', '.join(missing)}")
    relative = clean_error is not None
    ratios = [(errors[name] - (clean_error if relative else 0))
              / ((baseline - (ALEXNET_CLEAN_ERROR if relative else 0)) if alexnet else 1)
              for name, baseline in ALEXNET_ERRORS.items()]
    return sum(ratios) / len(ratios)


# ------------------------------------------------------------------------------------------------------ corruptions
# Each takes images uint8 (N, 3, H, W), a severity 1-5 and a torch.Generator (ignored where nothing is random) and returns
# new uint8 images on the same device; each image has its own random draws. The first line is the published table.


def published(images, severity, cifar, tiny, imagenet):
    """The entry for `severity` in the table of CIFAR-C (made for 32 pixels), Tiny-ImageNet-C (64) or ImageNet-C (224).

    The shorter side chooses: below 48, below 120, or above. The entries are in pixels and do not scale with the side.
    """
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity {severity!r} is not one of 1, 2, 3, 4, 5")
    side = min(images.shape[-2:])
    return (cifar if side < 48 else tiny if side < 120 else imagenet)[int(severity) - 1]


def to_uint8(x):
    """float 0...1 -> uint8, cut off and truncated (not rounded), as np.uint8 does in the published code."""
    return (x * 255).clamp(0, 255).to(torch.uint8)


def draw(sampler, shape, generator, device):
    """sampler(shape) from the generator, on the generator's own device, so that one seed gives one result everywhere."""
    return sampler(shape, generator=generator, device=generator.device).to(device)


def blur(x, sigma, truncate=4, border="nearest"):
    """scipy's gaussian_filter over the last two axes, float (..., H, W): taps up to int(truncate * sigma + 0.5) pixels away,
    borders "nearest" (the edge pixel repeats) or "symmetric" (mirrored, the edge pixel twice).

    The filter is one matrix per axis, which takes in every border rule and any sigma, wider than the image too.
    """
    taps = torch.arange(-int(truncate * sigma + 0.5), int(truncate * sigma + 0.5) + 1, device=x.device)
    weight = torch.exp(-taps.double() ** 2 / (2 * max(sigma, 1e-6) ** 2))
    weight = (weight / weight.sum()).float()

    def matrix(size):
        source = torch.arange(size, device=x.device)[:, None] + taps  # (size, taps)
        if border == "nearest":
            source = source.clamp(0, size - 1)
        else:
            source = source % (2 * size)
            source = torch.minimum(source, 2 * size - 1 - source)
        return torch.zeros(size, size, device=x.device).scatter_add_(1, source, weight.expand(size, -1))

    return matrix(x.shape[-2]) @ (x @ matrix(x.shape[-1]).T)


def clipped_zoom(x, factor):
    """Enlarges the centre of x float (N, C, H, W) by the factor: bilinear, corners aligned, cut to the old size."""
    height, width = x.shape[-2:]
    h, w = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - h) // 2, (width - w) // 2
    x = F.interpolate(x[..., top:top + h, left:left + w], size=(round(h * factor), round(w * factor)),
                      mode="bilinear", align_corners=True)
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top:top + height, left:left + width]


def motion(x, radius, sigma, angle):
    """ImageMagick's motion blur of x float (N, C, H, W) in grey levels, along angle (N,) in degrees, one per image.

    The kernel is one-sided: taps 0 ... 2 radius of a Gaussian, each at the nearest pixel of the line; edge pixels repeat.
    """
    height, width = x.shape[-2:]
    taps = torch.arange(2 * radius + 1, device=x.device)
    weight = torch.exp(-taps ** 2 / (2 * sigma ** 2))
    weight = weight / weight.sum()
    dx = (taps * angle.deg2rad().cos()[:, None] - 0.5).ceil().long()  # (N, taps)
    dy = (taps * angle.deg2rad().sin()[:, None] - 0.5).ceil().long()
    columns = (torch.arange(width, device=x.device) + dx[..., None]).clamp(0, width - 1)  # (N, taps, W)
    rows = (torch.arange(height, device=x.device) + dy[..., None]).clamp(0, height - 1)  # (N, taps, H)
    pixels, total = x.flatten(2), torch.zeros_like(x)
    for t in range(len(taps)):
        index = (rows[:, t, :, None] * width + columns[:, t, None, :]).flatten(1)  # (N, H * W)
        total += weight[t] * pixels.gather(2, index[:, None].expand(pixels.shape)).view(x.shape)
    return (total + 1e-3).floor()  # truncated; the margin keeps what is flat as it was


def plasma(n, size, decay, generator, device):
    """n cloud fields in 0...1, float (n, size, size): diamond-square on a torus, size a power of two. At each halving of
    the step the random part shrinks by `decay`."""
    height = torch.zeros(n, size, size, device=device)
    step, wibble = size, 100.0

    def mean(total):
        return total / 4 + wibble ** 2 * (2 * draw(torch.rand, total.shape, generator, device) - 1)

    while step >= 2:
        half = step // 2
        corner = height[:, ::step, ::step]
        pair = corner + corner.roll(-1, 1)
        height[:, half::step, half::step] = mean(pair + pair.roll(-1, 2))
        centre = height[:, half::step, half::step]
        height[:, ::step, half::step] = mean(centre + centre.roll(1, 1) + corner + corner.roll(-1, 2))
        height[:, half::step, ::step] = mean(centre + centre.roll(1, 2) + corner + corner.roll(-1, 1))
        step, wibble = half, wibble / decay
    height -= height.amin(dim=(1, 2), keepdim=True)
    return height / height.amax(dim=(1, 2), keepdim=True)


def gaussian_noise(images, severity, generator):
    """Adds normal noise of standard deviation c (of a range of 1)."""
    c = published(images, severity,
                  cifar=[.04, .06, .08, .09, .10], tiny=[.04, .08, .12, .15, .18], imagenet=[.08, .12, .18, .26, .38])
    return to_uint8(images / 255 + c * draw(torch.randn, images.shape, generator, images.device))


def shot_noise(images, severity, generator):
    """Photon noise: Poisson with mean c at full brightness."""
    c = published(images, severity,
                  cifar=[500, 250, 100, 75, 50], tiny=[250, 100, 50, 30, 15], imagenet=[60, 25, 12, 5, 3])
    rate = (images / 255 * c).to(generator.device)
    return to_uint8(torch.poisson(rate, generator).to(images.device) / c)


def impulse_noise(images, severity, generator):
    """Salt and pepper: a share c of the values (each channel on its own) becomes 0 or 255, evenly."""
    c = published(images, severity,
                  cifar=[.01, .02, .03, .05, .07], tiny=[.01, .02, .05, .08, .14], imagenet=[.03, .06, .09, .17, .27])
    chance = draw(torch.rand, images.shape, generator, images.device)
    return images.masked_fill(chance < c, 0).masked_fill(chance < c / 2, 255)


def speckle_noise(images, severity, generator):
    """Normal noise in proportion to the value."""
    c = published(images, severity,
                  cifar=[.06, .1, .12, .16, .2], tiny=[.15, .2, .25, .3, .35], imagenet=[.15, .2, .35, .45, .6])
    return to_uint8(images / 255 * (1 + c * draw(torch.randn, images.shape, generator, images.device)))


def gaussian_blur(images, severity, generator=None):
    """Gaussian blur of standard deviation c pixels, edge pixels repeated."""
    c = published(images, severity, cifar=[.4, .6, .7, .8, 1], tiny=[.5, .75, 1, 1.25, 1.5], imagenet=[1, 2, 3, 4, 6])
    return to_uint8(blur(images / 255, c))


def defocus_blur(images, severity, generator=None):
    """Convolves with a disk of radius c[0] smoothed by a Gaussian of c[1]; borders reflect without the edge pixel."""
    c = published(images, severity,
                  cifar=[(.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)],
                  tiny=[(.5, .6), (1, .1), (1.5, .1), (2.5, .01), (3, .1)],
                  imagenet=[(3, .1), (4, .5), (6, .5), (8, .5), (10, .5)])
    radius, margin = (8, 1) if c[0] <= 8 else (c[0], 2)  # the grid of the disk, half the width of its smoothing
    axis = torch.arange(-radius, radius + 1, device=images.device)
    disk = (axis[:, None] ** 2 + axis ** 2 <= c[0] ** 2).float()
    taps = torch.arange(-margin, margin + 1, device=images.device)
    taps = torch.exp(-taps ** 2 / (2 * c[1] ** 2))
    smooth = torch.outer(taps, taps) / taps.sum() ** 2
    disk = F.pad(disk[None, None] / disk.sum(), [margin] * 4, mode="reflect")
    kernel = F.conv2d(disk, smooth[None, None])  # (1, 1, 2 radius + 1, 2 radius + 1)
    cut = radius - min(radius, math.ceil(c[0]) + margin)  # rows and columns of zeros around the disk
    kernel = kernel[..., cut:kernel.shape[-2] - cut, cut:kernel.shape[-1] - cut]
    x = F.pad(images / 255, [kernel.shape[-1] // 2] * 4, mode="reflect")
    x = x.flatten(0, 1)[None]  # (1, N * 3, ...): as channels of one image it takes a tenth of the time
    return to_uint8(F.conv2d(x, kernel.expand(x.shape[1], -1, -1, -1), groups=x.shape[1]).view(images.shape))


def glass_blur(images, severity, generator):
    """Gaussian blur of c[0], then c[2] times every pixel takes the value of one at most c[1] away, then the blur again.

    The published loop runs from the last pixel to the first and means to swap; NumPy's views make it a copy. Offsets are
    -c[1] ... c[1] - 1, so that a pixel may read one that the same pass has already overwritten: such chains are followed
    to their end, twice as far at each step.
    """
    c = published(images, severity,
                  cifar=[(.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)],
                  tiny=[(.1, 1, 1), (.5, 1, 1), (.6, 1, 2), (.7, 2, 1), (.9, 2, 2)],
                  imagenet=[(.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)])
    sigma, reach, passes = c
    n, _, height, width = images.shape
    row = torch.arange(height, device=images.device)[:, None]
    column = torch.arange(width, device=images.device)
    here = row * width + column  # (H, W)
    moves = (row > reach) & (row <= height - reach) & (column > reach) & (column <= width - reach)

    def offsets(shape, generator, device):
        return torch.randint(-reach, reach, shape, generator=generator, device=device)

    x = to_uint8(blur(images / 255, sigma)).flatten(2)  # (N, 3, H * W)
    for _ in range(passes):
        dy, dx = draw(offsets, (2, n, height, width), generator, images.device)
        source = torch.where(moves, here + dy * width + dx, here).flatten(1)  # (N, H * W)
        overwritten = source > here.flatten()
        while overwritten.any():
            source, overwritten = (torch.where(overwritten, source.gather(1, source), source),
                                   overwritten & overwritten.gather(1, source))
        x = x.gather(2, source[:, None].expand(x.shape))
    return to_uint8(blur(x.view(images.shape) / 255, sigma))


def motion_blur(images, severity, generator):
    """Motion blur of radius c[0] and standard deviation c[1] at an angle between -45 and 45 degrees."""
    c = published(images, severity,
                  cifar=[(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
                  tiny=[(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
                  imagenet=[(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)])
    angle = 90 * draw(torch.rand, (len(images),), generator, images.device) - 45
    return motion(images.float(), *c, angle).to(torch.uint8)


def zoom_blur(images, severity, generator=None):
    """The mean of the image and c[0] enlargements of it, by 1, 1 + c[1], 1 + 2 c[1] ..."""
    c = published(images, severity,
                  cifar=[(7, .01), (12, .01), (16, .01), (21, .01), (26, .01)],
                  tiny=[(7, .01), (12, .01), (16, .01), (21, .01), (26, .01)],
                  imagenet=[(12, .01), (16, .01), (11, .02), (13, .02), (11, .03)])
    x = images / 255
    total = x.clone()
    for i in range(c[0]):
        total += clipped_zoom(x, 1 + i * (1 + c[1] - 1))  # np.arange's own rounding, which decides a crop at 1.25
    return to_uint8(total / (c[0] + 1))


def snow(images, severity, generator):
    """Flakes: normal noise (mean c[0], deviation c[1]) enlarged by c[2], cut below c[3], blurred along a steep line (c[4],
    c[5]); laid on twice, once turned by 180 degrees, over the image whitened by 1 - c[6]."""
    c = published(images, severity,
                  cifar=[(.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
                         (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)],
                  tiny=[(.1, .2, 1, .6, 8, 3, .8), (.1, .2, 1, .5, 10, 4, .8), (.15, .3, 1.75, .55, 10, 4, .7),
                        (.25, .3, 2.25, .6, 12, 6, .65), (.3, .3, 1.25, .65, 14, 12, .6)],
                  imagenet=[(.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
                            (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)])
    n, _, height, width = images.shape
    x = images / 255
    flakes = clipped_zoom(c[0] + c[1] * draw(torch.randn, (n, 1, height, width), generator, images.device), c[2])
    flakes = to_uint8(flakes * (flakes >= c[3])).float()
    angle = -135 + 90 * draw(torch.rand, (n,), generator, images.device)
    flakes = motion(flakes, c[4], c[5], angle) / 255
    grey = (x * x.new_tensor([.299, .587, .114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    x = c[6] * x + (1 - c[6]) * torch.maximum(x, grey * 1.5 + 0.5)
    return to_uint8(x + flakes + flakes.flip(2, 3))


def frost(images, severity, generator):
    """c[0] times the image plus c[1] times frost.

    The published code cuts its frost from five photographs, which are not ours to ship. Here it is procedural: bright
    ridges along the zero lines of power-law noise, in colour, contrast and roughness like one of the five, drawn per image.
    The strength agrees with the published one, the pictures do not.
    """
    c = published(images, severity,
                  cifar=[(1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)],
                  tiny=[(1, .3), (.9, .4), (.8, .45), (.75, .5), (.7, .55)],
                  imagenet=[(1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)])
    looks = torch.tensor([[77, 148, 165, 14], [198, 203, 212, 19], [198, 203, 212, 19], [145, 160, 173, 25],
                          [102, 114, 125, 34]], device=images.device)  # mean R, G, B and standard deviation
    n, _, height, width = images.shape
    slope = 1.12 - 8 / min(height, width)  # the photographs are shrunk for small images, hence rougher there
    down, right = (torch.fft.fftfreq(side, device=images.device) for side in (height, width))
    frequency = torch.hypot(down[:, None], right).clamp(min=0.5 / max(height, width))
    noise = draw(torch.randn, (n, height, width), generator, images.device)
    noise = torch.fft.ifft2(torch.fft.fft2(noise) * frequency ** -slope).real / (frequency ** -slope).square().mean().sqrt()
    ridges = (0.8 - noise.abs()) / 0.6  # mean 0, deviation 1: a half-normal has mean 0.8 and deviation 0.6
    look = looks[(5 * draw(torch.rand, (n,), generator, images.device)).long()][..., None, None]  # (N, 4, 1, 1)
    ice = (look[:, :3] + look[:, 3:] * ridges[:, None]).clamp(0, 255)
    return to_uint8((c[0] * images + c[1] * ice) / 255)


def fog(images, severity, generator):
    """Adds c[0] times a cloud field that is the rougher the smaller c[1], then rescales to the image's own maximum."""
    c = published(images, severity,
                  cifar=[(.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)],
                  tiny=[(.4, 3), (.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
                  imagenet=[(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)])
    n, _, height, width = images.shape
    x = images / 255
    peak = x.amax(dim=(1, 2, 3), keepdim=True)
    size = 2 ** math.ceil(math.log2(max(height, width)))
    clouds = plasma(n, size, c[1], generator, images.device)[:, None, :height, :width]
    return to_uint8((x + c[0] * clouds) * peak / (peak + c[0]))


def brightness(images, severity, generator=None):
    """Adds c to the HSV value, which scales R, G and B alike."""
    c = published(images, severity,
                  cifar=[.05, .1, .15, .2, .3], tiny=[.1, .2, .3, .4, .5], imagenet=[.1, .2, .3, .4, .5])
    x = images / 255
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + c).clamp(max=1)
    return to_uint8(torch.where(value > 0, x * (brighter / value), brighter))


def contrast(images, severity, generator=None):
    """Pulls every channel towards its own mean over the image."""
    c = published(images, severity,
                  cifar=[.75, .5, .4, .3, .15], tiny=[.4, .3, .2, .1, .05], imagenet=[.4, .3, .2, .1, .05])
    x = images / 255
    mean = x.mean(dim=(2, 3), keepdim=True)
    return to_uint8((x - mean) * c + mean)


def elastic_transform(images, severity, generator):
    """A random affine map that moves three points by up to c[2] pixels, then a displacement field: uniform noise smoothed
    by c[1] pixels, times c[0]. Bilinear both times; the first mirrors at the edge pixel's centre, the second at its rim."""
    c = published(images, severity,
                  cifar=[(0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, .96, .96)],
                  tiny=[(0, 0, 5.12), (3.2, 19.2, 3.84), (6.4, 5.12, 3.84), (6.4, 1.92, 1.92), (10.24, 1.92, 1.28)],
                  imagenet=[(488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88),
                            (29.28, 2.44, 4.88)])
    n, _, height, width = images.shape
    size = torch.tensor([width, height], device=images.device)
    y, x = torch.meshgrid(*(torch.arange(side, device=images.device) for side in (height, width)), indexing="ij")
    pixel = torch.stack([x, y], dim=-1).float()  # (H, W, 2)

    def uniform(*shape):
        return 2 * draw(torch.rand, shape, generator, images.device) - 1

    square = min(height, width) // 3
    points = size // 2 + square * torch.tensor([[1, 1], [1, -1], [-1, -1]], device=images.device)  # (3, 2)
    moved = torch.cat([points + c[2] * uniform(n, 3, 2), torch.ones(n, 3, 1, device=images.device)], dim=2)
    affine = torch.linalg.solve(moved, points.float().expand(n, 3, 2))  # (N, 3, 2), from the result back to the image
    source = torch.einsum("hwi,nij->nhwj", pixel, affine[:, :2]) + affine[:, None, None, 2]  # (N, H, W, 2)
    image = F.grid_sample(images / 255, 2 * source / (size - 1) - 1, padding_mode="reflection", align_corners=True)

    shift = c[0] * blur(uniform(n, 2, height, width), c[1], truncate=3, border="symmetric")
    source = pixel + shift.permute(0, 2, 3, 1)
    return to_uint8(F.grid_sample(image, (2 * source + 1) / size - 1, padding_mode="reflection", align_corners=False))


def pixelate(images, severity, generator=None):
    """Shrinks both sides by c and enlarges again, with Pillow's box filter: windows go by pixel centre, and each of the
    passes (width, height) rounds to whole grey levels."""
    c = published(images, severity,
                  cifar=[.95, .9, .85, .75, .65], tiny=[.9, .8, .7, .6, .5], imagenet=[.6, .5, .4, .3, .25])

    def resize(x, size):  # the last axis; x float of whole numbers
        scale = x.shape[-1] / size
        centre = (torch.arange(size, dtype=torch.float64, device=x.device)[:, None] + 0.5) * scale
        half = max(scale, 1) / 2
        pixel = torch.arange(x.shape[-1], device=x.device)
        window = (pixel >= (centre - half + 0.5).floor()) & (pixel < (centre + half + 0.5).floor())
        window = window / window.sum(dim=1, keepdim=True)  # (size, old size)
        return (x @ window.float().T + 0.5).floor()

    height, width = images.shape[-2:]
    x = images.float()
    for h, w in ((int(height * c), int(width * c)), (height, width)):
        x = resize(resize(x, w).mT, h).mT
    return x.clamp(0, 255).to(torch.uint8)


def jpeg_compression(images, severity, generator=None):
    """JPEG of quality c through libjpeg (4:2:0 chroma), there and back, on the CPU."""
    c = published(images, severity, cifar=[80, 65, 58, 50, 40], tiny=[65, 58, 50, 40, 25], imagenet=[25, 18, 15, 10, 7])
    return torch.stack([decode_jpeg(encode_jpeg(image, c)) for image in images.cpu()]).to(images.device)


def canny(x, low, high):
    """OpenCV's Canny edges of whole numbers x float (N, 1, H, W), as bool: Sobel, gradient |dx| + |dy|, thinned to its
    peaks along the nearest of four directions, kept above `high` and, where connected to those, above `low`."""
    sobel = x.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    dx, dy = F.conv2d(F.pad(x, [1] * 4, mode="replicate"), torch.stack([sobel, sobel.T])[:, None]).split(1, dim=1)
    size = dx.abs() + dy.abs()
    near = F.unfold(size, 3, padding=1).unflatten(1, (3, 3)).unflatten(-1, x.shape[2:])  # (N, 3, 3, H, W), 1 1 is here
    horizontal, vertical = dy.abs() < 0.41421356 * dx.abs(), dy.abs() > 2.41421356 * dx.abs()  # tan 22.5 and 67.5 degrees

    def peak(y, x, strict):  # against the neighbour at (y, x) and the opposite one, of which the latter may tie
        before, after = near[:, 1 + y, 1 + x, None], near[:, 1 - y, 1 - x, None]
        return (size > before) & ((size > after) if strict else (size >= after))

    diagonal = torch.where((dx < 0) == (dy < 0), peak(-1, -1, True), peak(-1, 1, True))
    peaks = torch.where(horizontal, peak(0, -1, False), torch.where(vertical, peak(-1, 0, False), diagonal))
    edge = peaks & (size > high)
    while True:
        grown = peaks & (size > low) & (F.max_pool2d(edge.float(), 3, stride=1, padding=1) > 0)
        if grown.equal(edge):
            return edge
        edge = grown


def distance(edge, limit):
    """Euclidean distance to the nearest edge pixel of bool (N, 1, H, W), at most `limit`."""
    square = torch.where(edge, 0.0, float(limit ** 2))
    step = torch.arange(-limit, limit + 1, device=edge.device)
    for axis in (-1, -2):
        square = F.pad(square.transpose(axis, -1), [limit, limit], value=limit ** 2)
        square = (square.unfold(-1, 2 * limit + 1, 1) + step ** 2).amin(dim=-1).transpose(axis, -1)
    return square.sqrt()


def spatter(images, severity, generator):
    """Drops of water (severities 1-3) or mud (4-5): normal noise (mean c[0], deviation c[1]) blurred by c[2], kept above
    c[3]. Water is bright towards its rims, by a distance transform of its edges, up to c[4]; mud is blurred by c[4]."""
    c = published(images, severity,
                  cifar=[(.62, .1, .7, .7, .5, 0), (.65, .1, .8, .7, .5, 0), (.65, .3, 1, .69, .5, 0),
                         (.65, .1, .7, .69, .6, 1), (.65, .1, .5, .68, .6, 1)],
                  tiny=[(.62, .1, .7, .7, .6, 0), (.65, .1, .8, .7, .6, 0), (.65, .3, 1, .69, .6, 0),
                        (.65, .1, .7, .68, .6, 1), (.65, .1, .5, .67, .6, 1)],
                  imagenet=[(.65, .3, 4, .69, .6, 0), (.65, .3, 3, .68, .6, 0), (.65, .3, 2, .68, .5, 0),
                            (.65, .3, 1, .65, 1.5, 1), (.67, .4, 1, .65, 1.5, 1)])
    n, _, height, width = images.shape
    x = images / 255
    liquid = blur(c[0] + c[1] * draw(torch.randn, (n, 1, height, width), generator, images.device), c[2])
    if c[5]:
        mud = blur((liquid > c[3]).float(), c[4])
        mud = mud * (mud >= 0.8)
        return to_uint8(x * (1 - mud) + mud * x.new_tensor([63, 42, 20]).view(3, 1, 1) / 255)

    def box(y):
        return F.avg_pool2d(F.pad(y, [1] * 4, mode="reflect"), 3, stride=1)

    liquid = (liquid * (liquid >= c[3]) * 255).floor()
    depth = box(distance(canny(liquid, 50, 150), 20)).floor().long().flatten(1)  # (N, H * W), whole pixels up to 20
    rank = F.one_hot(depth, 21).sum(dim=1).cumsum(dim=1)  # (N, 21), histogram equalisation
    first = rank.gather(1, depth.amin(dim=1, keepdim=True))
    depth = (rank.gather(1, depth) - first) * 255 / (height * width - first).clamp(min=1)
    depth = depth.round().view(n, 1, height, width)
    relief = x.new_tensor([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])[None, None]
    depth = box(F.conv2d(F.pad(depth, [1] * 4, mode="reflect"), relief).clamp(0, 255)).round()
    water = liquid * depth
    water = c[4] * water / water.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1)  # none at all stays none
    return to_uint8(x + water * x.new_tensor([175, 238, 238]).view(3, 1, 1) / 255)


def saturate(images, severity, generator=None):
    """HSV saturation times c[0] plus c[1]; hue and value stay. What is grey has hue 0, so that c[1] > 0 turns it red."""
    c = published(images, severity,
                  cifar=[(.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2)],
                  tiny=[(.3, 0), (.1, 0), (2, 0), (5, .1), (30, .2)],
                  imagenet=[(.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)])
    x = images / 255
    value = x.amax(dim=1, keepdim=True)
    spread = value - x.amin(dim=1, keepdim=True)
    saturation = torch.where(value > 0, spread / value, 0)
    below = torch.where(spread > 0, (value - x) / spread, x.new_tensor([0, 1, 1]).view(3, 1, 1))  # 0...1, by the hue
    return to_uint8(value * (1 - (saturation * c[0] + c[1]).clamp(max=1) * below))


COMMON = {f.__name__: f for f in (
    gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog,
    brightness, contrast, elastic_transform, pixelate, jpeg_compression)}  # the fifteen of the benchmark, in its order
EXTRA = {f.__name__: f for f in (speckle_noise, gaussian_blur, spatter, saturate)}


def corrupt(images, name, severity, generator):
    """images uint8 (N, 3, H, W) under the corruption of that name (COMMON or EXTRA), severity 1-5: uint8, same device.

    The images go through in parts of 2 ** 18 pixels, which bounds the memory at some 100 MB. The result depends on the
    generator's state and device and on the order of the images; splitting a call changes the draws, unless it is split
    between two parts. A generator on the CPU serves images on any device. Raises ValueError on bad arguments.
    """
    known = {**COMMON, **EXTRA}
    if name not in known:
        raise ValueError(f"unknown corruption {name!r}; known are {', '.join(known)}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected torch.uint8 (N, 3, H, W), N > 0")
    parts = images.split(max(1, 2 ** 18 // (images.shape[2] * images.shape[3])))
    return torch.cat([known[name](part.contiguous(), severity, generator) for part in parts])


# -------------------------------------------------------------------------------------------------- published files


def read_cifar_c(directory, name, severity):
    """One severity of CIFAR-10-C or CIFAR-100-C: images uint8 (N, 3, 32, 32), labels int64 (N,).

    The folder holds <name>.npy uint8 (5 N, 32, 32, 3), severity-major, and labels.npy (5 N,), N being 10,000 as published.
    Only the part asked for is read. Raises FileNotFoundError, or ValueError on a file of another shape.
    """
    def load(file):
        path = Path(directory) / file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; unpack CIFAR-10-C.tar or CIFAR-100-C.tar there")
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no NumPy array file, or is cut short: download it again") from error

    images, labels = load(f"{name}.npy"), load("labels.npy")
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) % 5 or not len(images):
        raise ValueError(f"{name}.npy is {images.dtype} {images.shape}; expected uint8 (50000, 32, 32, 3)")
    if labels.shape != images.shape[:1] or (labels.reshape(5, -1) != labels[:len(labels) // 5]).any():
        raise ValueError(f"labels.npy is {labels.shape}; expected the labels of {name}.npy, {images.shape[:1]}, five times over")
    published(images, severity, *[range(5)] * 3)  # refuses other severities
    part = slice((severity - 1) * len(labels) // 5, severity * len(labels) // 5)
    return torch.from_numpy(images[part].transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels[part].astype(np.int64))


def imagenet_c_folder(directory, name, severity):
    """The ImageFolder of one corruption of ImageNet-C or Tiny-ImageNet-C: <name>/<severity>, or one level further down as
    the published archives unpack (blur/defocus_blur/1)."""
    for path in (Path(directory) / name, *sorted(Path(directory).glob(f"*/{name}"))):
        if (path / str(severity)).is_dir():
            return path / str(severity)
    raise FileNotFoundError(f"{directory} has no {name}/{severity}; expected the unpacked folders of ImageNet-C")


def list_folder(root, class_names, folder_classes=None):
    """The images of an ImageFolder whose classes are some of the classifier's: (paths, labels, columns).

    A folder is called like its class (for ImageNet-V2, -A, -R and -Sketch: a WordNet id), or folder_classes maps it to one.
    columns int64 (k,) are the classes that occur, ascending, and labels int64 (N,) count within them. Evaluate
    logits[:, columns] against labels: the other classes are masked out before anything is computed from the logits, so
    that the choice is among the set's own 200, as ImageNet-A and -R prescribe. Raises on unknown folders and on none.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; expected one with a subfolder for each class")
    classes = {folder: (folder_classes or {}).get(folder.name, folder.name)
               for folder in sorted(root.iterdir()) if folder.is_dir()}
    unknown = [name for name in classes.values() if name not in class_names]
    if unknown:
        raise ValueError(f"{root}: {len(unknown)} of {len(classes)} folders are no classes of the model, "
                         f"first {unknown[0]!r}; the model's are {', '.join(class_names[:3])} ...")
    files = [(path, class_names.index(name)) for folder, name in classes.items() for path in sorted(folder.iterdir())
             if path.suffix.lower() in (".jpeg", ".jpg", ".png")]
    if not files:
        raise ValueError(f"{root} holds no images; expected <class>/<image>.jpeg, .jpg or .png")
    paths, labels = zip(*files)
    columns, labels = torch.tensor(labels).unique(return_inverse=True)
    return list(paths), labels, columns


def read_images(paths):
    """Image files of one size as uint8 (N, 3, H, W) in RGB; ValueError where one does not decode or differs in size."""
    images = []
    for path in paths:
        try:
            images.append(decode_image(read_file(str(path)), ImageReadMode.RGB))
        except RuntimeError as error:
            raise ValueError(f"{path} does not decode: {str(error).splitlines()[0]}") from error
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{path} is {tuple(images[-1].shape)}; the images before are {tuple(images[0].shape)}")
    return torch.stack(images)
