"""corruptions.py against hand-computed values, loops and the public code's numbers.

golden_corruptions.json holds what the public corruption code (hendrycks/robustness) makes of
`picture`: `python bench/bench_corruptions.py robustness/ImageNet-C/create_c --golden
tests/golden_corruptions.json` with Pillow 13.0.0, OpenCV 5.0.0, scikit-image 0.26.0, SciPy 1.17.1,
NumPy 2.4.6, ImageMagick 6.9.11-60. A key is "name severity size"; its values are pixels of one
image where nothing is random, else `strength` over many.
"""

import corruptions
import json
import math
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corruptions import COMMON
from helpers import refused, seeded
from pathlib import Path

pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding capabilities:DeprecationWarning")
GOLDEN = json.loads((Path(__file__).parent / "golden_corruptions.json").read_text())
FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
RANDOM = tuple(name for name in COMMON if name not in FIXED)
PIXELS = torch.arange(10) * 5003 + 77  # positions in the flattened image, modulo its size

def picture(size):
    """uint8 (1, 3, size, size) from whole numbers: slopes and a chequerboard, with a white, a black
    and a grey square and one of one-pixel stripes."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    u, v = x * 224 // size, y * 224 // size  # the same picture at every size, but for the stripes
    image = torch.stack([(u + v) // 2, 223 - u, (v + 60 * ((u // 28 + v // 28) % 2)) % 256])
    for k, value in enumerate((255, 0, 128, 200 * (x % 2))):
        image = torch.where((u // 40 == k) & (v // 40 == k % 3), value, image)
    return image.to(torch.uint8)[None]

def strength(before, after):
    """[mean change, mean |change|, standard deviation of the change, gradient energy of the
    result], in grey levels."""
    change, after = after.double() - before.double(), after.double()
    gradient = after.diff(dim=2).square().mean() + after.diff(dim=3).square().mean()
    return [change.mean().item(), change.abs().mean().item(), change.std().item(), gradient.item()]

@pytest.mark.parametrize("size", (32, 64, 224))
@pytest.mark.parametrize("name", FIXED)
def test_corrupt_has_the_pixels_of_the_public_code(name, size):
    # At defocus_blur a slope stays at whole levels: the kernel's last bit decides.
    limit = 0.6 if name == "defocus_blur" else 0.2
    for severity in range(1, 6):
        ours = corruptions.corrupt(picture(size), name, severity, seeded())
        ours = ours[0].flatten(1)[:, PIXELS % (size * size)].flatten().tolist()
        difference = np.abs(np.subtract(ours, GOLDEN[f"{name} {severity} {size}"]))
        assert difference.mean() <= limit and difference.max() <= 2, (severity, difference)

@pytest.mark.parametrize("size", (32, 64, pytest.param(224, marks=pytest.mark.slow)))
@pytest.mark.parametrize("name", RANDOM)
def test_corrupt_has_the_strength_of_the_public_code(name, size):
    # In four a few random numbers an image decide.
    varied = name in ("motion_blur", "frost", "fog", "elastic_transform")
    count = {32: 250, 64: 64, 224: 32 if varied else 6}[size]
    images = picture(size).repeat(count, 1, 1, 1)
    for severity in range(1, 6):
        theirs = GOLDEN[f"{name} {severity} {size}"]
        ours = strength(images, corruptions.corrupt(images, name, severity, seeded(severity)))
        assert ours[1:] == pytest.approx(theirs[1:], rel=0.15), (severity, ours, theirs)
        assert ours[0] == pytest.approx(theirs[0], abs=0.25 * theirs[1]), (severity, ours, theirs)

@pytest.mark.parametrize("name", COMMON)
def test_corrupt_keeps_its_contract(name):
    images = picture(32).repeat(3, 1, 1, 1)
    before = images.clone()
    after = corruptions.corrupt(images, name, 3, seeded(7))
    assert after.shape == images.shape and after.dtype == torch.uint8
    assert after.data_ptr() != images.data_ptr() and images.equal(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert after.equal(corruptions.corrupt(images, name, 3, seeded(7)))
    strided = images.to(memory_format=torch.channels_last)
    assert after.equal(corruptions.corrupt(strided, name, 3, seeded(7)))
    if name in RANDOM:  # every image its own draws, every seed its own; torch's own generator
        assert not after[0].equal(after[1])
        assert not after[0].equal(corruptions.corrupt(images, name, 3, seeded(8))[0])
        torch.manual_seed(7)  # which draws the same numbers
        assert after.equal(COMMON[name](images, 3))
        assert not after.equal(corruptions.corrupt(images, name, 3))
    else:
        assert after[0].equal(after[1]) and after.equal(COMMON[name](images, 3))
    for shape in ((2, 3, 33, 47), (2, 3, 50, 40), (2, 3, 130, 121)):
        some = torch.randint(256, shape, dtype=torch.uint8, generator=seeded())
        assert corruptions.corrupt(some, name, 5, seeded()).shape == shape
    for severity in (0, 6, -1, 2.5, "3"):
        assert f"severity {severity!r}" in refused(COMMON[name], images, severity)
    for bad in (images / 255, images.int(), images[0], images[:, :1], images[:0], images > 9,
                images[None], images.permute(0, 2, 3, 1)):
        assert "uint8" in refused(COMMON[name], bad, 3)
        assert "uint8" in refused(corruptions.corrupt, bad, name, 3)
    black = corruptions.corrupt(torch.zeros_like(images), name, 1, seeded())
    assert black.float().mean() < 100  # no NaN on the way

def test_corrupt_refuses_an_unknown_name():
    assert all(word in refused(corruptions.corrupt, picture(32), "gauss", 1)
               for word in ("'gauss'", *COMMON))

def test_corrupt_goes_on_from_part_to_part():
    images = picture(64).repeat(70, 1, 1, 1)  # 64 to a part
    generator = seeded(3)
    parts = [corruptions.gaussian_noise(some, 2, generator) for some in images.split(64)]
    whole = corruptions.corrupt(images, "gaussian_noise", 2, seeded(3))
    assert torch.cat(parts).equal(whole)

def test_published_goes_by_the_shorter_side():
    for height, width, entry in ((32, 300, "b"), (47, 47, "b"), (48, 64, "g"), (119, 500, "g"),
                                 (120, 120, "l"), (224, 300, "l")):
        images = torch.empty(1, 3, height, width, dtype=torch.uint8)
        assert corruptions.published(images, 2, "abcde", "fghij", "klmno") == entry
        assert corruptions.published(images, 2, "abcde", "fghij") == entry.replace("l", "g")

def test_glass_blur_is_the_published_loop(monkeypatch):
    """The literal loop with NumPy's aliasing swap, on the same draws, where chains occur (offsets
    up to +1)."""
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=seeded(5))
    monkeypatch.setattr(corruptions, "blur", lambda x, sigma: x)
    ours = corruptions.glass_blur(images, 5, seeded(6))
    generator, reach = seeded(6), 2
    x = images.permute(0, 2, 3, 1).numpy().copy()
    for _ in range(2):
        draws = torch.rand(2, 2, 64, 64, generator=generator)
        dy, dx = (draws * 2 * reach).long().numpy() - reach
        for i in range(2):
            for h in range(64 - reach, reach, -1):
                for w in range(64 - reach, reach, -1):
                    a, b = (h, w), (h + dy[i, h, w], w + dx[i, h, w])
                    x[i][a], x[i][b] = x[i][b], x[i][a]
    assert np.abs(ours.permute(0, 2, 3, 1).int().numpy() - x).max() <= 1  # / 255 * 255, truncated
    assert (ours != images).float().mean() > 0.5

def test_motion_is_one_sided():
    spot = torch.zeros(2, 1, 32, 32)
    spot[:, 0, 16, 16] = 255
    across, down = corruptions.motion(spot, 6, 1, torch.tensor([0.0, 90.0]))[:, 0]
    row = [0, 0, 0, 1, 19, 88, 145, 0, 0, 0]  # ImageMagick 6.9.11's own
    assert across[16, 10:20].tolist() == down[10:20, 16].tolist() == row
    flat = torch.full((1, 3, 40, 40), 100.0)
    assert corruptions.motion(flat, 9, 2.5, torch.tensor([30.0])).equal(flat)

def test_snow_falls_and_motion_blur_goes_across():
    """Streaks: along their direction neighbours differ less than across it."""
    flat = torch.full((20, 3, 32, 32), 100, dtype=torch.uint8)
    snow = corruptions.corrupt(flat, "snow", 5, seeded()).float()
    assert snow.diff(dim=2).abs().mean() < 0.8 * snow.diff(dim=3).abs().mean()
    noise = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    noise = corruptions.corrupt(noise, "motion_blur", 5, seeded()).float()
    assert noise.diff(dim=3).abs().mean() < 0.8 * noise.diff(dim=2).abs().mean()

def test_defocus_blur_mirrors_at_the_border():
    """A bright first column: mirrored without the edge pixel, a 3 x 3 kernel sees it once from the
    first column."""
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[..., 0] = 200
    first, second = corruptions.corrupt(image, "defocus_blur", 3, seeded())[0, 0, 16, :2].tolist()
    side = math.exp(-1 / (2 * 0.6 ** 2))  # radius 0.5 is a disk of one pixel, smoothed, sigma 0.6
    assert first == pytest.approx(200 / (1 + 2 * side), abs=1)
    assert second == pytest.approx(200 * side / (1 + 2 * side), abs=1)

def test_blur_at_its_borders():
    x = torch.rand(2, 3, 10, 14, generator=seeded(), dtype=torch.float32)
    taps = torch.exp(-torch.arange(-4, 5) ** 2 / 2.0)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    padded = F.pad(x, [4] * 4, mode="replicate").flatten(0, 1)[:, None]
    expected = F.conv2d(padded, kernel[None, None]).view(x.shape)
    torch.testing.assert_close(corruptions.blur(x, 1.0), expected)
    ramp = torch.arange(3.0).expand(3, 3)  # mirrored at the rim: 2 1 0 | 0 1 2 | 2 1 0
    wide = corruptions.blur(ramp, 100.0, truncate=3, mirror=True)  # wider than the image
    assert wide.sub(1).abs().max() < 0.02
    assert corruptions.blur(x, 0.0).equal(x)
