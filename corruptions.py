"""The fifteen common corruptions of images (Hendrycks and Dietterich 2019, arXiv 1903.12261), after
hendrycks/robustness, ImageNet-C/create_c/make_*.py.

Each function takes images uint8 (N, 3, H, W), a severity 1-5 and a torch.Generator (None: torch's
own) and returns new uint8 images on the same device; every image has its own draws. Its first line
is the published table: CIFAR-C, Tiny-ImageNet-C, ImageNet-C. Copy it with the helpers it names."""

import math
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.io import decode_jpeg, encode_jpeg

def published(images, severity, cifar, tiny, imagenet=None):
    """The entry for `severity` in the table made for 32, 64 or 224 pixels, as the shorter side is
    below 48, below 120, or above. ValueError, for all: wrong images, wrong severity."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"{images.dtype} {[*images.shape]}: expected uint8 (N, 3, H, W), N > 0")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity {severity!r} is not one of 1, 2, 3, 4, 5")
    side = min(images.shape[-2:])
    table = cifar if side < 48 else tiny if side < 120 or not imagenet else imagenet
    return table[int(severity) - 1]

def to_uint8(x):
    """float 0...1 -> uint8, clipped and truncated (not rounded), as np.uint8 does in the published
    code. The margin keeps flat areas as they are: float32 can land just below a whole level."""
    return (x * 255 + 1e-4).clamp(0, 255).to(torch.uint8)

def draw(sampler, shape, images, generator):
    """sampler(shape), torch.randn or torch.rand, drawn where the generator lives (None: torch's own
    of the images' device) and moved to the images: a generator of the CPU serves any device."""
    device = (generator or images).device
    return sampler(shape, generator=generator, device=device).to(images.device)

def gaussian(taps, sigma):
    """The weights of a Gaussian at whole numbers `taps`; their sum is 1."""
    return (-taps ** 2 / (2 * max(sigma, 1e-6) ** 2)).softmax(dim=0)

def blur(x, sigma, truncate=4, mirror=False):
    """scipy's gaussian_filter over the last two axes of x float (..., H, W), by a matrix an axis.
    Beyond the border the edge pixel repeats, or (mirror) all pixels do, from the edge's own on."""
    reach = int(truncate * sigma + 0.5)
    taps = torch.arange(-reach, reach + 1)
    weight = gaussian(taps, sigma)
    def matrix(size):
        source = torch.arange(size)[:, None] + taps  # (size, taps), on the CPU: one order of sums
        if mirror:
            source = torch.minimum(source % (2 * size), (-1 - source) % (2 * size))
        source = source.clamp(0, size - 1)
        return torch.zeros(size, size).scatter_add_(1, source, weight.expand(size, -1)).to(x.device)
    return matrix(x.shape[-2]) @ (x @ matrix(x.shape[-1]).T)

def crop_centre(x, height, width):
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top:top + height, left:left + width]

def clipped_zoom(x, factor):
    """Enlarges x float (N, C, H, W), bilinear with aligned corners, and cuts it to its old size."""
    height, width = x.shape[-2:]
    x = crop_centre(x, math.ceil(height / factor), math.ceil(width / factor))
    size = [int(side * factor + 0.5) for side in x.shape[-2:]]
    x = F.interpolate(x, size, mode="bilinear", align_corners=True)
    return crop_centre(x, height, width)

def motion(x, radius, sigma, angle):
    """ImageMagick's motion blur of x float (N, C, H, W), grey levels, at angle (N,) in degrees: one
    side of a Gaussian along a line, at nearest pixels. Edge pixels repeat; levels are truncated."""
    height, width = x.shape[-2:]
    taps = torch.arange(2 * radius + 1, device=x.device)
    angle = angle.deg2rad()[:, None]
    dx = (taps * angle.cos() - 0.5).ceil().long()  # (N, taps)
    dy = (taps * angle.sin() - 0.5).ceil().long()
    column = (torch.arange(width, device=x.device) + dx[..., None]).clamp(0, width - 1)
    row = (torch.arange(height, device=x.device) + dy[..., None]).clamp(0, height - 1)
    pixels, total = x.flatten(2), torch.zeros_like(x)
    for tap, weight in enumerate(gaussian(taps, sigma)):
        index = row[:, tap, :, None] * width + column[:, tap, None, :]  # (N, H, W)
        index = index.flatten(1)[:, None].expand(pixels.shape)  # (N, C, H * W)
        total += weight * pixels.gather(2, index).view(x.shape)
    return (total + 1e-3).floor()  # the margin keeps flat areas as they are

def gaussian_noise(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """Normal noise of standard deviation c, of a range of 1."""
    c = published(images, severity, [.04, .06, .08, .09, .10],
                  [.04, .08, .12, .15, .18], [.08, .12, .18, .26, .38])
    return to_uint8(images / 255 + c * draw(torch.randn, images.shape, images, generator))

def shot_noise(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """Poisson noise of c photons at full brightness."""
    c = published(images, severity, [500, 250, 100, 75, 50],
                  [250, 100, 50, 30, 15], [60, 25, 12, 5, 3])
    photons = torch.poisson((images / 255 * c).to((generator or images).device), generator)
    return to_uint8(photons.to(images.device) / c)

def impulse_noise(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """Salt and pepper in equal parts, each channel on its own."""
    c = published(images, severity, [.01, .02, .03, .05, .07],
                  [.01, .02, .05, .08, .14], [.03, .06, .09, .17, .27])
    chance = draw(torch.rand, images.shape, images, generator)
    return images.masked_fill(chance < c, 0).masked_fill(chance < c / 2, 255)

def defocus_blur(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """A disk, itself smoothed by a Gaussian of 3 x 3 or 5 x 5; both mirror at the border."""
    radius, sigma = published(images, severity, [(.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)],
                              [(.5, .6), (1, .1), (1.5, .1), (2.5, .01), (3, .1)],
                              [(3, .1), (4, .5), (6, .5), (8, .5), (10, .5)])
    grid, margin = (8, 1) if radius <= 8 else (radius, 2)
    axis = torch.arange(-grid, grid + 1, device=images.device)
    disk = (axis[:, None] ** 2 + axis ** 2 <= radius ** 2).float()
    disk = F.pad(disk[None, None] / disk.sum(), [margin] * 4, mode="reflect")
    taps = gaussian(torch.arange(-margin, margin + 1, device=images.device), sigma)
    kernel = F.conv2d(disk, torch.outer(taps, taps)[None, None])  # (1, 1, 2 grid + 1, 2 grid + 1)
    reach = min(grid, math.ceil(radius) + margin)  # beyond it the kernel is 0
    kernel = crop_centre(kernel, 2 * reach + 1, 2 * reach + 1)
    x = F.pad(images / 255, [reach] * 4, mode="reflect")
    x = x.flatten(0, 1)[None]  # (1, N * 3, ...): ten times faster as the channels of one image
    x = F.conv2d(x, kernel.expand(x.shape[1], -1, -1, -1), groups=x.shape[1])
    return to_uint8(x.view(images.shape))

def glass_blur(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """Blurs, gives every pixel the value of one at most `reach` away, blurs again. The published
    loop, from the last pixel to the first, means to swap; NumPy's views make it a copy. So a pixel
    may read one overwritten in the same pass: such chains are followed, twice as far each step."""
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
        offset = 2 * reach * draw(torch.rand, (2, n, height, width), images, generator)
        dy, dx = offset.long() - reach
        source = torch.where(moves, here + dy * width + dx, here).flatten(1)  # (N, H * W)
        overwritten = source > here.flatten()
        while overwritten.any():
            further = overwritten & overwritten.gather(1, source)
            source = torch.where(overwritten, source.gather(1, source), source)
            overwritten = further
        x = x.gather(2, source[:, None].expand(x.shape))
    return to_uint8(blur(x.view(images.shape) / 255, sigma))

def motion_blur(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """Along a line at an angle between -45 and 45 degrees."""
    radius, sigma = published(images, severity, [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
                              [(10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)],
                              [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)])
    angle = 90 * draw(torch.rand, len(images), images, generator) - 45
    return motion(images.float(), radius, sigma, angle).to(torch.uint8)

def zoom_blur(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """The mean of the image and `count` enlargements of it, by 1, 1 + step, 1 + 2 step ..."""
    small = [(7, .01), (12, .01), (16, .01), (21, .01), (26, .01)]
    count, step = published(images, severity, small, small,
                            [(12, .01), (16, .01), (11, .02), (13, .02), (11, .03)])
    x = images / 255
    total = sum((clipped_zoom(x, 1 + i * step) for i in range(count)), start=x)
    return to_uint8(total / (count + 1))

def snow(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """Thresholded noise, enlarged, blurred along a steep line, laid twice on the whitened image."""
    mean, deviation, zoom, threshold, radius, sigma, keep = published(
        images, severity,
        [(.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
         (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)],
        [(.1, .2, 1, .6, 8, 3, .8), (.1, .2, 1, .5, 10, 4, .8), (.15, .3, 1.75, .55, 10, 4, .7),
         (.25, .3, 2.25, .6, 12, 6, .65), (.3, .3, 1.25, .65, 14, 12, .6)],
        [(.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
         (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)])
    x = images / 255
    flakes = mean + deviation * draw(torch.randn, x[:, :1].shape, images, generator)
    flakes = clipped_zoom(flakes, zoom)
    flakes = to_uint8(flakes * (flakes >= threshold)).float()
    angle = 90 * draw(torch.rand, len(images), images, generator) - 135
    flakes = motion(flakes, radius, sigma, angle) / 255
    grey = (x * x.new_tensor([.299, .587, .114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
    x = keep * x + (1 - keep) * torch.maximum(x, grey * 1.5 + 0.5)
    return to_uint8(x + flakes + flakes.flip(2, 3))

def frost(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """The image and frost, each at its weight. The published code cuts frost from five photographs,
    which are not ours to ship. Here it is bright ridges along the zero lines of power-law noise, in
    colour, contrast and roughness like one of the five: as strong, but other pictures."""
    keep, weight = published(images, severity, [(1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)],
                             [(1, .3), (.9, .4), (.8, .45), (.75, .5), (.7, .55)],
                             [(1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)])
    photographs = [[77, 148, 165, 14], [198, 203, 212, 19], [198, 203, 212, 19],
                   [145, 160, 173, 25], [102, 114, 125, 34]]  # mean R, G, B; deviation
    n, _, height, width = images.shape
    down, across = (torch.fft.fftfreq(side, device=images.device) for side in (height, width))
    frequency = torch.hypot(down[:, None], across).clamp(min=0.5 / max(height, width))
    slope = 1.12 - 8 / min(height, width)  # small images: photographs are shrunk, hence rougher
    gain = frequency ** -slope
    noise = torch.fft.fft2(draw(torch.randn, (n, height, width), images, generator))
    noise = torch.fft.ifft2(noise * gain / gain.square().mean().sqrt()).real
    ridges = (0.8 - noise.abs()) / 0.6  # |normal variable| has mean 0.8 and deviation 0.6
    choice = (5 * draw(torch.rand, n, images, generator)).long()
    look = torch.tensor(photographs, device=images.device)[choice, :, None, None]  # (N, 4, 1, 1)
    ice = (look[:, :3] + look[:, 3:] * ridges[:, None]).clamp(0, 255)
    return to_uint8((keep * images + weight * ice) / 255)

def plasma(n, size, decay, images, generator):
    """n cloud fields in 0...1, float (n, size, size), size a power of two: diamond-square on a
    torus, the random part divided by `decay` at each halving of the step."""
    cloud = torch.zeros(n, size, size, device=images.device)
    step, wibble = size, 100.0
    def mean(total):
        return total / 4 + wibble ** 2 * (2 * draw(torch.rand, total.shape, images, generator) - 1)
    while step >= 2:
        half = step // 2
        corner = cloud[:, ::step, ::step]
        pair = corner + corner.roll(-1, 1)
        mid = mean(pair + pair.roll(-1, 2))
        cloud[:, half::step, half::step] = mid
        cloud[:, ::step, half::step] = mean(mid + mid.roll(1, 1) + corner + corner.roll(-1, 2))
        cloud[:, half::step, ::step] = mean(mid + mid.roll(1, 2) + corner + corner.roll(-1, 1))
        step, wibble = half, wibble / decay
    cloud -= cloud.amin(dim=(1, 2), keepdim=True)
    return cloud / cloud.amax(dim=(1, 2), keepdim=True)

def fog(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """Adds clouds and scales back to the image's own maximum."""
    weight, decay = published(images, severity, [(.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)],
                              [(.4, 3), (.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)],
                              [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)])
    n, _, height, width = images.shape
    x = images / 255
    peak = x.amax(dim=(1, 2, 3), keepdim=True)
    size = 2 ** math.ceil(math.log2(max(height, width)))
    clouds = plasma(n, size, decay, images, generator)[:, None, :height, :width]
    return to_uint8((x + weight * clouds) * peak / (peak + weight))

def brightness(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """Adds to the HSV value, which scales R, G and B alike."""
    c = published(images, severity, [.05, .1, .15, .2, .3], [.1, .2, .3, .4, .5])
    x = images / 255
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + c).clamp(max=1)
    return to_uint8(torch.where(value > 0, x * (brighter / value), brighter))

def contrast(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """Pulls every channel towards its own mean over the image."""
    c = published(images, severity, [.75, .5, .4, .3, .15], [.4, .3, .2, .1, .05])
    x = images / 255
    mean = x.mean(dim=(2, 3), keepdim=True)
    return to_uint8((x - mean) * c + mean)

def elastic_transform(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """A random affine map, which moves three points by up to `jitter` pixels, then smooth noise.
    Both bilinear; the first mirrors at the centre of the edge pixel, the second at its rim."""
    amount, sigma, jitter = published(
        images, severity,
        [(0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, .96, .96)],
        [(0, 0, 5.12), (3.2, 19.2, 3.84), (6.4, 5.12, 3.84), (6.4, 1.92, 1.92),
         (10.24, 1.92, 1.28)],
        [(488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88),
         (29.28, 2.44, 4.88)])
    n, _, height, width = images.shape
    axes = (torch.arange(side, device=images.device) for side in (width, height))
    pixel = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1).float()  # (H, W, 2): x, y
    size = torch.tensor([width, height], device=images.device)
    corners = torch.tensor([[1, 1], [1, -1], [-1, -1]], device=images.device)
    points = (size // 2 + corners * (min(height, width) // 3)).float().expand(n, 3, 2)
    moved = points + jitter * (2 * draw(torch.rand, (n, 3, 2), images, generator) - 1)
    back = torch.linalg.solve(F.pad(moved, [0, 1], value=1), points)  # (N, 3, 2), result to image
    source = torch.einsum("hwi,nij->nhwj", pixel, back[:, :2]) + back[:, None, None, 2]
    grid = 2 * source / (size - 1) - 1  # (N, H, W, 2), in -1...1
    x = F.grid_sample(images / 255, grid, padding_mode="reflection", align_corners=True)
    shift = 2 * draw(torch.rand, (n, 2, height, width), images, generator) - 1
    shift = blur(shift, sigma, truncate=3, mirror=True).permute(0, 2, 3, 1)
    grid = (2 * (pixel + amount * shift) + 1) / size - 1
    return to_uint8(F.grid_sample(x, grid, padding_mode="reflection", align_corners=False))

def pixelate(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """Shrinks and enlarges with Pillow's box filter: windows go by pixel centre, passes round."""
    c = published(images, severity, [.95, .9, .85, .75, .65],
                  [.9, .8, .7, .6, .5], [.6, .5, .4, .3, .25])
    def resize(x, size):  # the last axis
        scale = x.shape[-1] / size
        half = max(scale, 1) / 2
        centre = (torch.arange(size, dtype=torch.float64, device=x.device)[:, None] + 0.5) * scale
        first, end = (centre - half + 0.5).floor(), (centre + half + 0.5).floor()
        pixel = torch.arange(x.shape[-1], device=x.device)
        window = (pixel >= first) & (pixel < end)  # (size, old size)
        return (x @ (window / window.sum(dim=1, keepdim=True)).T + 0.5).floor()
    height, width = images.shape[-2:]
    small = resize(resize(images.float(), int(width * c)).mT, int(height * c)).mT
    return resize(resize(small, width).mT, height).mT.to(torch.uint8)

def jpeg_compression(images: Tensor, severity: int, generator: Generator | None = None) -> Tensor:
    """There and back through libjpeg (4:2:0 chroma), on the CPU: a GPU's coder differs from it."""
    quality = published(images, severity, [80, 65, 58, 50, 40],
                        [65, 58, 50, 40, 25], [25, 18, 15, 10, 7])
    return torch.stack(decode_jpeg(encode_jpeg(list(images.cpu()), quality))).to(images.device)

COMMON = {f.__name__: f for f in (  # the benchmark's fifteen, in its order
    gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur,
    snow, frost, fog, brightness, contrast, elastic_transform, pixelate, jpeg_compression)}

def corrupt(images: Tensor, name: str, severity: int, generator: Generator | None = None) -> Tensor:
    """Corrupts images, uint8 (N, 3, H, W) to the same; name: one of COMMON, severity: 1-5. Goes by
    parts of 2 ** 18 pixels, on a GPU 2 ** 21, to bound the memory; a call split elsewhere draws
    otherwise, and so does a generator of another kind of device. ValueError: see `published`.
    >>> images = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    >>> corrupt(images, "fog", severity=3, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 3, 32, 32])"""
    if name not in COMMON:
        raise ValueError(f"unknown corruption {name!r}; known are {', '.join(COMMON)}")
    pixels = 2 ** 21 if images.is_cuda else 2 ** 18
    parts = images.split(max(1, pixels // max(1, math.prod(images.shape[2:]))))
    with torch.autocast(images.device.type, enabled=False):  # whatever is around the call
        return torch.cat([COMMON[name](part.contiguous(), severity, generator) for part in parts])
