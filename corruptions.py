"""Common corruptions of images (Hendrycks and Dietterich 2019, arXiv 1903.12261): the benchmark's 15 and four more.

    images = corrupt(images, "fog", severity=3, generator=torch.Generator().manual_seed(0))

After hendrycks/robustness, ImageNet-C/create_c: make_cifar_c.py, make_tinyimagenet_c.py and make_imagenet_c.py. Imports
torch and torchvision alone. A function can be copied together with the few helpers it names.
"""

import math

import torch
import torch.nn.functional as F
from torchvision.io import decode_jpeg, encode_jpeg

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
