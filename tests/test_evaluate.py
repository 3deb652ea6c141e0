"""evaluate.py's metrics, corruptions and readers against hand-computed values, loops and the public code's numbers.

golden_evaluate.json holds what the public corruption code (hendrycks/robustness, ImageNet-C/create_c) makes of
`picture`: python tests/bench_corruptions.py robustness/ImageNet-C/create_c --golden tests/golden_evaluate.json
with Pillow 13.0.0, OpenCV 5.0.0, scikit-image 0.26.0, SciPy 1.17.1, NumPy 2.4.6, ImageMagick 6.9.11-60. A key is "name
severity size"; its values are pixels of one image where nothing is random, else `strength` over many.
"""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import clip_model
import data
import evaluate
import models
import train

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
ALL = {**evaluate.COMMON, **evaluate.EXTRA}
FIXED = (
    "defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur", "saturate")
RANDOM = tuple(name for name in ALL if name not in FIXED)
PIXELS = torch.arange(10) * 5003 + 77  # positions in the flattened image, modulo its size
SIZES = (32, 64, 224)


def picture(size):
    """uint8 (1, 3, size, size) from whole numbers: slopes and a chequerboard, with a white, a black and a grey square
    and one of one-pixel stripes."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    u, v = x * 224 // size, y * 224 // size  # the same picture at every size, but for the stripes
    image = torch.stack([(u + v) // 2, 223 - u, (v + 60 * ((u // 28 + v // 28) % 2)) % 256])
    for k, value in enumerate((255, 0, 128, 200 * (x % 2))):
        image = torch.where((u // 40 == k) & (v // 40 == k % 3), value, image)
    return image.to(torch.uint8)[None]


def strength(before, after):
    """[mean change, mean |change|, standard deviation of the change, gradient energy of the result], in grey levels."""
    change, after = after.double() - before.double(), after.double()
    gradient = after.diff(dim=2).square().mean() + after.diff(dim=3).square().mean()
    return [change.mean().item(), change.abs().mean().item(), change.std().item(), gradient.item()]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def golden():
    return json.loads((Path(__file__).parent / "golden_evaluate.json").read_text())


# ---------------------------------------------------------------------------------------------------------- metrics


def probabilities_as_logits(rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_top_k_accuracy():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    target = torch.tensor([0, 2, 0, 1])
    assert [evaluate.top_k_accuracy(logits, target, k) for k in (1, 2, 3, 5)] == [0.25, 0.5, 1.0, 1.0]


def test_nll_and_brier_by_hand():
    logits, target = probabilities_as_logits([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), torch.tensor([2, 1])
    assert evaluate.nll(logits, target) == pytest.approx(-(math.log(0.2) + math.log(0.8)) / 2)
    assert evaluate.brier(logits, target) == pytest.approx(((0.25 + 0.09 + 0.64) + (0.01 + 0.04 + 0.01)) / 2)
    certain = torch.tensor([[0.0, 1e4], [0.0, 1e4]])
    assert evaluate.brier(certain, torch.tensor([1, 0])) == 1.0  # 0 and 2
    assert evaluate.nll(logits.bfloat16(), target) == pytest.approx(evaluate.nll(logits, target), rel=0.02)


def test_ece_by_hand():
    rows = [[0.95, 0.05], [0.92, 0.08], [0.65, 0.35], [0.62, 0.38], [0.45, 0.55]]
    logits, target = probabilities_as_logits(rows), torch.tensor([0, 1, 0, 0, 1])
    # width 0.1: {.95, .92} half right, {.65, .62} all right, {.55} right
    assert evaluate.ece(logits, target, bins=10) == pytest.approx((2 * (0.935 - 0.5) + 2 * (1 - 0.635) + 0.45) / 5)
    # mass 2, 2, 1: {.55, .62} {.65, .92} {.95}
    expected = (2 * (1 - 0.585) + 2 * (0.785 - 0.5) + (1 - 0.95)) / 5
    assert evaluate.ece(logits, target, bins=3, equal_mass=True) == pytest.approx(expected)
    confidence, accuracy, count = evaluate.calibration_bins(logits, target, bins=10)
    assert count.tolist() == [0, 0, 0, 0, 0, 1, 2, 0, 0, 2]
    assert confidence[9].item() == pytest.approx(0.935) and accuracy[9] == 0.5 and confidence[0] == accuracy[0] == 0


def test_ece_puts_an_edge_into_the_lower_bin_and_has_fifteen():
    _, _, count = evaluate.calibration_bins(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), bins=2)
    assert count.tolist() == [3, 0]  # confidence exactly 0.5
    assert len(evaluate.calibration_bins(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))[2]) == 15
    logits, target = torch.randn(100, 5, generator=seeded()), torch.zeros(100, dtype=torch.long)
    _, _, count = evaluate.calibration_bins(logits, target, equal_mass=True)
    assert count.tolist() == [7] * 10 + [6] * 5


@pytest.mark.parametrize("temperature", (0.02, 0.5, 3.0, 40.0))
def test_temperature_recovers_the_one_that_was_applied(temperature):
    # ten equal rows whose targets come in proportion to the probabilities: the best temperature undoes the scaling
    logits = probabilities_as_logits([[0.5, 0.3, 0.2]] * 10) * temperature
    target = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    assert evaluate.fit_temperature(logits, target) == pytest.approx(temperature, rel=1e-6)


def test_temperature_has_the_least_nll():
    logits, target = 4 * torch.randn(500, 10, generator=seeded(1)), torch.randint(10, (500,), generator=seeded(2))
    target[:300] = logits[:300].argmax(dim=1)
    best = evaluate.fit_temperature(logits, target)
    for factor in (0.98, 1.02):
        assert evaluate.nll(logits / best, target) < evaluate.nll(logits / (best * factor), target)


def test_quadrants():
    logits = probabilities_as_logits([[0.95, 0.05], [0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])
    target = torch.tensor([0, 1, 1, 1, 1])
    assert evaluate.quadrants(logits, target, 0.75) == {
        "confident_right": 2, "confident_wrong": 1, "unsure_right": 1, "unsure_wrong": 1}
    assert sum(evaluate.quadrants(logits, target, 0.5).values()) == 5
    assert evaluate.quadrants(torch.zeros(1, 2), torch.tensor([0]), 0.5)["confident_right"] == 1  # the threshold counts


def test_bootstrap_interval():
    values = (torch.arange(400) % 4 == 0).double()  # mean 0.25, standard error sqrt(.25 * .75 / 400) = 0.02165
    low, high = evaluate.bootstrap_interval(torch.mean, [values], seeded(), resamples=2000)
    assert (low, high) == pytest.approx((0.25 - 1.96 * 0.02165, 0.25 + 1.96 * 0.02165), abs=0.004)
    assert evaluate.bootstrap_interval(torch.mean, [values], seeded(), resamples=2000) == (low, high)
    narrow = evaluate.bootstrap_interval(torch.mean, [values], seeded(), resamples=2000, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    together = evaluate.bootstrap_interval(lambda a, b: (a - b).abs().max(), [values, values], seeded(), resamples=20)
    assert together == (0.0, 0.0)


def test_alexnet_errors_belong_to_their_names():
    assert list(evaluate.ALEXNET_ERRORS) == list(evaluate.COMMON)
    assert list(evaluate.ALEXNET_ERRORS.values()) == [
        0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816, 0.826572, 0.819324, 0.564592,
        0.853204, 0.646056, 0.717840, 0.606500]
    assert list(evaluate.COMMON) == [
        "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
        "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"]
    assert list(evaluate.EXTRA) == ["speckle_noise", "gaussian_blur", "spatter", "saturate"]


def test_mean_corruption_error():
    flat = dict.fromkeys(evaluate.COMMON, 0.4)
    assert evaluate.mean_corruption_error(flat) == pytest.approx(0.4)
    assert evaluate.mean_corruption_error({**flat, "fog": 0.7, "spatter": 1.0}) == pytest.approx(0.42)
    assert evaluate.mean_corruption_error(flat, clean_error=0.1) == pytest.approx(0.3)
    assert evaluate.mean_corruption_error(evaluate.ALEXNET_ERRORS, alexnet=True) == pytest.approx(1)
    half = {name: error / 2 for name, error in evaluate.ALEXNET_ERRORS.items()}
    assert evaluate.mean_corruption_error(half, alexnet=True) == pytest.approx(0.5)
    relative = {name: 0.2 + 2 * (error - 0.43478) for name, error in evaluate.ALEXNET_ERRORS.items()}
    assert evaluate.mean_corruption_error(relative, clean_error=0.2, alexnet=True) == pytest.approx(2)
    only_fog = {**dict.fromkeys(evaluate.COMMON, 0.0), "fog": 0.819324}
    assert evaluate.mean_corruption_error(only_fog, alexnet=True) == pytest.approx(1 / 15)
    with pytest.raises(ValueError, match="missing are snow, fog$"):
        evaluate.mean_corruption_error({name: 0.1 for name in evaluate.COMMON if name not in ("snow", "fog")})


# ------------------------------------------------------------------------------------------------------ corruptions


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FIXED)
def test_pixels_of_the_public_code(golden, name, size):
    for severity in range(1, 6):
        ours = evaluate.corrupt(picture(size), name, severity, seeded())
        ours = ours[0].flatten(1)[:, PIXELS % (size * size)].flatten().tolist()
        difference = np.abs(np.subtract(ours, golden[f"{name} {severity} {size}"]))
        limit = 0.6 if name == "defocus_blur" else 0.2  # a slope stays at whole levels: the kernel's last bit decides
        assert difference.mean() <= limit and difference.max() <= 2, (severity, difference)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RANDOM)
def test_strength_of_the_public_code(golden, name, size):
    varied = name in ("motion_blur", "frost", "fog", "elastic_transform")  # a few random numbers an image decide
    images = picture(size).repeat({32: 250, 64: 64, 224: 32 if varied else 6}[size], 1, 1, 1)
    for severity in range(1, 6):
        theirs = golden[f"{name} {severity} {size}"]
        ours = strength(images, evaluate.corrupt(images, name, severity, seeded(severity)))
        assert ours[1:] == pytest.approx(theirs[1:], rel=0.15), (severity, ours, theirs)
        assert ours[0] == pytest.approx(theirs[0], abs=0.25 * theirs[1]), (severity, ours, theirs)


@pytest.mark.parametrize("name", ALL)
def test_contract_of_every_corruption(name):
    images = picture(32).repeat(3, 1, 1, 1)
    before = images.clone()
    after = evaluate.corrupt(images, name, 3, seeded(7))
    assert after.shape == images.shape and after.dtype == torch.uint8 and after.data_ptr() != images.data_ptr()
    assert images.equal(before)
    assert after.equal(evaluate.corrupt(images, name, 3, seeded(7)))
    assert after.equal(evaluate.corrupt(images.to(memory_format=torch.channels_last), name, 3, seeded(7)))
    if name in RANDOM:  # every image its own draws, every seed its own
        assert not after[0].equal(after[1]) and not after[0].equal(evaluate.corrupt(images, name, 3, seeded(8))[0])
    else:
        assert after[0].equal(after[1]) and after.equal(ALL[name](images, 3))
    for height, width in ((33, 47), (50, 40), (130, 121)):
        some = torch.randint(256, (2, 3, height, width), dtype=torch.uint8, generator=seeded())
        assert evaluate.corrupt(some, name, 5, seeded()).shape == some.shape
    for severity in (0, 6, -1, 2.5, "3"):
        with pytest.raises(ValueError, match=f"severity {severity!r} is not one of 1, 2, 3, 4, 5"):
            ALL[name](images, severity, seeded())
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    assert evaluate.corrupt(black, name, 1, seeded()).float().mean() < 100  # no NaN on the way


def test_corrupt_refuses():
    images = picture(32)
    with pytest.raises(ValueError) as error:
        evaluate.corrupt(images, "gauss", 1, seeded())
    assert all(name in str(error.value) for name in ALL) and "\n" not in str(error.value)
    for bad in (images.float(), images[0], images[:, :1], images[:0]):
        with pytest.raises(ValueError, match=r"expected torch.uint8 \(N, 3, H, W\)"):
            evaluate.corrupt(bad, "fog", 1, seeded())


def test_parts_follow_each_other():
    images = picture(64).repeat(70, 1, 1, 1)  # 64 to a part
    generator = seeded(3)
    parts = [evaluate.corrupt(some, "gaussian_noise", 2, generator) for some in (images[:64], images[64:])]
    assert torch.cat(parts).equal(evaluate.corrupt(images, "gaussian_noise", 2, seeded(3)))


def test_the_table_goes_by_the_shorter_side():
    for height, width, row in ((32, 300, 0), (47, 47, 0), (48, 64, 1), (119, 500, 1), (120, 120, 2), (224, 300, 2)):
        assert evaluate.published(torch.empty(1, 3, height, width), 2, "abcde", "fghij", "klmno") == "bgl"[row]


def test_glass_blur_is_the_published_loop(monkeypatch):
    """The literal loop with NumPy's aliasing swap, on the same draws, where chains occur (offsets up to +1)."""
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=seeded(5))
    monkeypatch.setattr(evaluate, "blur", lambda x, sigma: x)
    ours = evaluate.glass_blur(images, 5, seeded(6))
    generator, reach = seeded(6), 2
    x = images.permute(0, 2, 3, 1).numpy().copy()
    for _ in range(2):
        dy, dx = (torch.rand(2, 2, 64, 64, generator=generator) * 2 * reach).long().numpy() - reach
        for i in range(2):
            for h in range(64 - reach, reach, -1):
                for w in range(64 - reach, reach, -1):
                    a, b = (h, w), (h + dy[i, h, w], w + dx[i, h, w])
                    x[i][a], x[i][b] = x[i][b], x[i][a]
    difference = ours.permute(0, 2, 3, 1).int().numpy() - x
    assert np.abs(difference).max() <= 1  # / 255 * 255, truncated
    assert (ours != images).float().mean() > 0.5


def test_motion_kernel_is_one_sided():
    spot = torch.zeros(2, 1, 32, 32)
    spot[:, 0, 16, 16] = 255
    across, down = evaluate.motion(spot, 6, 1, torch.tensor([0.0, 90.0]))[:, 0]
    assert across[16, 10:20].tolist() == [0, 0, 0, 1, 19, 88, 145, 0, 0, 0]  # ImageMagick 6.9.11's own row
    assert down[10:20, 16].tolist() == [0, 0, 0, 1, 19, 88, 145, 0, 0, 0]
    flat = torch.full((1, 3, 40, 40), 100.0)
    assert evaluate.motion(flat, 9, 2.5, torch.tensor([30.0])).equal(flat)


def test_snow_falls_and_motion_goes_across():
    """Streaks: along their direction neighbours differ less than across it."""
    flat = torch.full((20, 3, 32, 32), 100, dtype=torch.uint8)
    snow = evaluate.corrupt(flat, "snow", 5, seeded()).float()
    assert snow.diff(dim=2).abs().mean() < 0.8 * snow.diff(dim=3).abs().mean()
    noise = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    noise = evaluate.corrupt(noise, "motion_blur", 5, seeded()).float()
    assert noise.diff(dim=3).abs().mean() < 0.8 * noise.diff(dim=2).abs().mean()


@pytest.mark.parametrize("decay, roughness", ((3, 0.02015), (2, 0.02454), (1.75, 0.02892)))  # the public plasma_fractal
def test_plasma_roughness(decay, roughness):
    clouds = evaluate.plasma(500, 32, decay, seeded(), "cpu")
    assert clouds.amin() == 0 and clouds.amax() == 1 and clouds[3].amax() == 1
    assert clouds.diff(dim=1).abs().mean().item() == pytest.approx(roughness, rel=0.03)


def test_defocus_mirrors_at_the_border():
    """A bright first column: mirrored without the edge pixel, a 3 x 3 kernel sees it once from the first column."""
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[..., 0] = 200
    first, second = evaluate.corrupt(image, "defocus_blur", 3, seeded())[0, 0, 16, :2].tolist()
    side = math.exp(-1 / (2 * 0.6 ** 2))  # the disk of radius 0.5 is one pixel, smoothed with sigma 0.6
    assert first == pytest.approx(200 / (1 + 2 * side), abs=1) and second == pytest.approx(
        200 * side / (1 + 2 * side), abs=1)


def test_blur_matrix_borders():
    x = torch.rand(2, 3, 10, 14, generator=seeded(), dtype=torch.float32)
    taps = torch.exp(-torch.arange(-4, 5) ** 2 / 2.0)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    padded = F.pad(x, [4] * 4, mode="replicate").flatten(0, 1)[:, None]
    expected = F.conv2d(padded, kernel[None, None]).view(x.shape)
    torch.testing.assert_close(evaluate.blur(x, 1.0), expected)
    ramp = torch.arange(3.0).expand(3, 3)  # mirrored at the rim: 2 1 0 | 0 1 2 | 2 1 0
    assert evaluate.blur(ramp, 100.0, truncate=3, border="mirror").sub(1).abs().max() < 0.02  # wider than the image
    assert evaluate.blur(x, 0.0).equal(x)


def test_saturating_turns_grey_red_and_keeps_value():
    grey = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)
    red, green, blue = evaluate.corrupt(grey, "saturate", 5, seeded())[0, :, 0, 0].tolist()
    assert (red, green, blue) == (200, 160, 160) or (red, green, blue) == (199, 159, 159)  # shifted by 0.2
    assert evaluate.corrupt(grey, "saturate", 2, seeded()).float().mean().item() == pytest.approx(200, abs=1)


# -------------------------------------------------------------------------------------------------- published files


@pytest.fixture
def cifar_c(tmp_path):
    """Five severities of four images: an image's first value is 10 * severity + its number."""
    images = np.zeros((20, 32, 32, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = [10 * severity + i for severity in range(1, 6) for i in range(4)]
    images[:, 5, 9, 2] = 99
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "labels.npy", np.array([3, 1, 4, 1] * 5, dtype=np.uint8))
    return tmp_path


def test_read_cifar_c(cifar_c):
    images, labels = evaluate.read_cifar_c(cifar_c, "fog", 4)
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8 and images.is_contiguous()
    assert images[:, 0, 0, 0].tolist() == [40, 41, 42, 43] and (images[:, 2, 5, 9] == 99).all()
    assert labels.tolist() == [3, 1, 4, 1] and labels.dtype == torch.int64


def test_read_cifar_c_refuses(cifar_c):
    with pytest.raises(ValueError, match="severity 0"):
        evaluate.read_cifar_c(cifar_c, "fog", 0)
    with pytest.raises(FileNotFoundError, match="snow.npy is missing"):
        evaluate.read_cifar_c(cifar_c, "snow", 1)
    for shape in ((20, 3, 32, 32), (21, 32, 32, 3), (0, 32, 32, 3), (20, 32, 32)):
        np.save(cifar_c / "snow.npy", np.zeros(shape, dtype=np.uint8))
        with pytest.raises(ValueError, match=r"snow.npy is uint8 .*; expected uint8 \(50000, 32, 32, 3\)"):
            evaluate.read_cifar_c(cifar_c, "snow", 1)
    np.save(cifar_c / "snow.npy", np.zeros((20, 32, 32, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="float32"):
        evaluate.read_cifar_c(cifar_c, "snow", 1)
    (cifar_c / "snow.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="snow.npy is no NumPy array file"):
        evaluate.read_cifar_c(cifar_c, "snow", 1)
    (cifar_c / "snow.npy").write_bytes((cifar_c / "fog.npy").read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut short"):
        evaluate.read_cifar_c(cifar_c, "snow", 1)
    for labels in (np.arange(20), np.zeros(19, dtype=np.int64)):  # not five times the same; another number
        np.save(cifar_c / "labels.npy", labels)
        with pytest.raises(ValueError, match="labels.npy"):
            evaluate.read_cifar_c(cifar_c, "fog", 1)


def write_images(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        torchvision.io.write_png(torch.zeros(3, 4, 4, dtype=torch.uint8), str(folder / f"{i}.png"))


def test_imagenet_c_folder(tmp_path):
    write_images(tmp_path / "fog" / "2" / "n01", 1)
    write_images(tmp_path / "blur" / "defocus_blur" / "1" / "n01", 1)
    assert evaluate.imagenet_c_folder(tmp_path, "fog", 2) == tmp_path / "fog" / "2"
    assert evaluate.imagenet_c_folder(tmp_path, "defocus_blur", 1) == tmp_path / "blur" / "defocus_blur" / "1"
    for name, severity in (("fog", 1), ("snow", 2)):
        with pytest.raises(FileNotFoundError, match=f"no {name}/{severity}"):
            evaluate.imagenet_c_folder(tmp_path, name, severity)


def test_list_folder_masks_logits(tmp_path):
    for folder, count in (("n30", 2), ("n10", 1), ("n15", 3)):
        write_images(tmp_path / folder, count)
    (tmp_path / "n10" / "notes.txt").write_text("no image")
    paths, labels, columns = evaluate.list_folder(tmp_path, ["n05", "n15", "n20", "n10", "n30"])
    assert [path.parent.name for path in paths] == ["n10"] + ["n15"] * 3 + ["n30"] * 2
    assert columns.tolist() == [1, 3, 4] and labels.tolist() == [1, 0, 0, 0, 2, 2]
    logits = torch.tensor([[9.0, 1.0, 8.0, 2.0, 0.0]])  # a class outside the set wins without the mask
    assert evaluate.top_k_accuracy(logits[:, columns], labels[:1]) == 1 and logits.argmax() not in columns
    assert evaluate.nll(logits[:, columns], labels[:1]) == pytest.approx(
        math.log(math.exp(1) + math.exp(2) + math.exp(0)) - 2)  # probabilities among the three


def test_list_folder_maps_and_refuses(tmp_path):
    write_images(tmp_path / "set" / "1", 1)
    write_images(tmp_path / "set" / "2", 1)
    _, labels, columns = evaluate.list_folder(tmp_path / "set", ["cat", "dog", "bird"], {"1": "bird", "2": "cat"})
    assert columns.tolist() == [0, 2] and labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="'1' is not a class of the model; its classes are like 'cat'"):
        evaluate.list_folder(tmp_path / "set", ["cat", "dog"])
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no images"):
        evaluate.list_folder(tmp_path / "empty", ["cat"])
    with pytest.raises(FileNotFoundError, match="is no folder"):
        evaluate.list_folder(tmp_path / "absent", ["cat"])


# ---- runs and their reports


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a few rendered images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHAPES_SIZES", {"train": 100, "test": 60, "shift": 50})
        folder = tmp_path_factory.mktemp("runs") / "run"
        train.run(train.Config(method="scratch", student="resnet8", epochs=1, out=str(folder), device="cpu"))
        yield folder


def config(*runs, **changes):
    return evaluate.Config(run=tuple(map(str, runs)), device="cpu", **changes)


def test_report_of_a_run_is_that_of_its_weights(run):
    report, = evaluate.evaluate(config(run, shift=True, corruptions="generated"))
    assert report == json.loads((run / "report.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert report["test"]["top1"] == pytest.approx(summary["student_accuracy"])
    assert report["shift"]["top1"] == pytest.approx(summary["shift_accuracy"])
    model = models.load_weights("resnet8", run / "student.pt")
    test, info = data.load_dataset("shapes", "", "test"), data.DATASETS["shapes"]
    with torch.no_grad():
        logits = model(data.normalize(test.images, info.mean, info.std))[0].double()
    log_p = logits.log_softmax(1)[torch.arange(60), test.labels]
    assert report["test"]["nll"] == pytest.approx(-log_p.mean().item(), rel=1e-5)
    rank = (logits > logits[torch.arange(60), test.labels][:, None]).sum(1)
    assert report["test"]["top5"] == pytest.approx(100 * (rank < 5).double().mean().item())

    rows = report["corruptions"]["top1"]
    assert list(rows) == list(evaluate.COMMON) and all(len(row) == 5 for row in rows.values())
    bright = evaluate.corrupt(test.images, "brightness", 4, None)
    with torch.no_grad():
        right = model(data.normalize(bright, info.mean, info.std))[0].argmax(1) == test.labels
    assert rows["brightness"][3] == pytest.approx(100 * right.double().mean().item())
    assert report["corruptions"]["mean_error"] == pytest.approx(100 - sum(map(sum, rows.values())) / 75)
    again, = evaluate.evaluate(config(run, shift=True, corruptions="generated"))
    assert again == report  # the same noise
    assert "gaussian_noise" in evaluate.tables([report])


def test_newest_run_and_none(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished run below runs/: python train.py makes one"):
        evaluate.evaluate(config())
    for i, name in enumerate(("older", "newest")):
        shutil.copytree(run, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "summary.json", (i, i))
    assert evaluate.newest_run() == Path("runs/newest")
    (tmp_path / "runs/newest/summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished run in runs/newest"):
        evaluate.evaluate(config("runs/newest"))


def test_a_bare_checkpoint(run, tmp_path):
    path = tmp_path / "bare.pt"
    torch.save(torch.load(run / "student.pt", weights_only=True)["model"], path)
    report, = evaluate.evaluate(evaluate.Config(checkpoint=str(path), model="resnet8", dataset="shapes", device="cpu"))
    summary = json.loads((run / "summary.json").read_text())
    assert report["test"]["top1"] == pytest.approx(summary["student_accuracy"])
    assert (tmp_path / "bare.report.json").is_file()
    with pytest.raises(ValueError, match="--model NAME and --dataset NAME"):
        evaluate.evaluate(evaluate.Config(checkpoint=str(path)))
    torch.save(models.build_model("resnet8", 7).state_dict(), path)
    with pytest.raises(ValueError, match="7 classes"):
        evaluate.evaluate(evaluate.Config(checkpoint=str(path), model="resnet8", dataset="shapes", device="cpu"))


def test_other_classes_are_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    student = torch.load(run / "student.pt", weights_only=True)
    student["class_names"][3] = "red banana"
    torch.save(student, tmp_path / "run/student.pt")
    with pytest.raises(ValueError, match="class 3 is 'red banana' there and 'red star' here"):
        evaluate.evaluate(config(tmp_path / "run"))


def test_zero_shot_table(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHAPES_SIZES", {"train": 100, "test": 60, "shift": 50})
    torch.manual_seed(0)
    clip = clip_model.CLIP(32, 32, 1, 64, 16, 64, 514, 64, 1, 1).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    (tmp_path / "prompts.txt").write_text("a photo of a {}\n{} in the wild\n")
    table = evaluate.zero_shot(evaluate.Config(clip=str(tmp_path / "clip.pt"), prompts=str(tmp_path / "prompts.txt"),
                                               dataset="shapes", cache_dir=str(tmp_path), device="cpu"))
    assert list(table) == ["all 2 templates", "a photo of a {}", "{} in the wild"]
    test = data.load_dataset("shapes", "", "test")
    with torch.no_grad():
        image = F.normalize(clip.encode_image(clip_model.preprocess(test.images, 32)), dim=1)
    for templates, name in ((["a photo of a {}"], "a photo of a {}"),
                            (["a photo of a {}", "{} in the wild"], "all 2 templates")):
        classes = clip_model.class_features(clip, clip_model.Tokenizer(), test.class_names, templates)
        expected = 100 * ((image @ classes.T).argmax(1) == test.labels).double().mean().item()
        assert table[name] == pytest.approx(expected, abs=2)  # features are kept as float16: a tie may fall otherwise
