"""corruptions.py beside the public corruption code: agreement, and speed, with ratios of one run.

    git clone https://github.com/hendrycks/robustness
    pip install opencv-python-headless scikit-image scipy Wand    # Wand needs ImageMagick
    python bench/bench_corruptions.py robustness/ImageNet-C/create_c

Runs the public make_cifar_c.py, make_tinyimagenet_c.py and make_imagenet_c.py as they are, but for
names that today's NumPy, SciPy and scikit-image have changed. `--golden
tests/golden_corruptions.json` writes the public code's numbers that test_corruptions.py checks.
"""

import argparse
import json
import numpy as np
import sys
import time
import torch
import zipfile
from pathlib import Path
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import corruptions  # noqa: E402
from support import files  # noqa: E402
from test_corruptions import COMMON, FIXED, PIXELS, picture, strength  # noqa: E402

FILES = {32: "make_cifar_c.py", 64: "make_tinyimagenet_c.py", 224: "make_imagenet_c.py"}
RENAMED = {
    "scipy.ndimage.interpolation": "scipy.ndimage", "multichannel=True": "channel_axis=-1",
    "np.float_)": "np.float64)", "np.fromstring": "np.frombuffer", ", mode='L')": ")"}

def public_code(directory, size):
    """The names that the public script for this image size defines; its loop over a data set does
    not run."""
    source = (directory / FILES[size]).read_text().split("# /////////////// End Distortions")[0]
    for old, new in RENAMED.items():
        source = source.replace(old, new)
    source = source.replace("'./frost", f"'{directory}/frost")
    space = {}
    exec(compile(source, FILES[size], "exec"), space)
    return space

def real_images(size, n):
    """uint8 (n, 3, size, size): CIFAR-10, Tiny-ImageNet or that enlarged, from ../shared; else the
    test's picture."""
    shared = ROOT.parent / "shared" / "data"
    if not shared.is_dir():
        return picture(size).repeat(n, 1, 1, 1)
    if size == 32:
        paths = sorted((shared / "cifar10-test-100").glob("*.png"))
    else:
        archive = zipfile.ZipFile(shared / "tiny-imagenet-20.zip")
        names = [name for name in archive.namelist() if "/val/images/" in name]
        paths = [archive.open(name) for name in names if name.endswith("JPEG")][::10]
    images = []
    for path in paths[:n]:
        image = Image.open(path).convert("RGB").resize((size, size), Image.BICUBIC)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    images = torch.stack(images)
    return images.repeat(-(-n // len(images)), 1, 1, 1)[:n]

def run_public(function, images, severity):
    np.random.seed(severity)
    pictures = images.permute(0, 2, 3, 1).numpy()
    out = [np.uint8(function(Image.fromarray(picture), severity)) for picture in pictures]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)

def timed(function, *args):
    began = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - began

def compare(name, public, images, golden):
    """Both codes at severities 1-5: a cell of agreement for each, and their seconds an image.
    Adds the public code's numbers to `golden`."""
    cells, seconds = [], torch.zeros(2)
    corruptions.corrupt(images[:2], name, 1, torch.Generator().manual_seed(0))  # warm
    for severity in range(1, 6):
        theirs, spent = timed(run_public, public[name], images, severity)
        generator = torch.Generator().manual_seed(severity)
        ours, own = timed(corruptions.corrupt, images, name, severity, generator)
        seconds += torch.tensor([spent, own]) / 5 / len(images)
        if name in FIXED:
            cells.append(f"{(ours.float() - theirs.float()).abs().mean():.3f}")
            size = images.shape[2]
            numbers = theirs[0].flatten(1)[:, PIXELS % (size * size)].flatten().tolist()
        else:
            public_strength, own_strength = strength(images, theirs), strength(images, ours)
            ratios = np.divide(own_strength[1:], public_strength[1:])
            cells.append("/".join(f"{ratio:.2f}" for ratio in ratios))
            numbers = [round(number, 2) for number in public_strength]
        golden[f"{name} {severity} {images.shape[2]}"] = numbers
    return cells, seconds

def print_comparison(directory, size, n, for_golden, golden):
    public = public_code(directory, size)
    images = picture(size) if for_golden else real_images(size, n)
    print(f"\n{size} pixels, {n} images. For severities 1-5: mean |difference| in grey levels "
          "where nothing is random,\nelse ours / public of mean |change|, deviation of the change, "
          "gradient energy. Then ms an image")
    total = torch.zeros(2)
    for name in COMMON:
        some = images
        if for_golden and name not in FIXED:  # the slowest less often, the most varied more often
            copies = {"glass_blur": n, "elastic_transform": 20 * n}.get(name, 4 * n)
            some = images.repeat(copies, 1, 1, 1)
        cells, seconds = compare(name, public, some, golden)
        total += seconds
        theirs, ours = (1000 * seconds).tolist()
        print(f"  {name:18s} {'  '.join(cells)}   {theirs:.2f} -> {ours:.2f}", flush=True)
    theirs, ours = (15 / total).tolist()
    print(f"  the fifteen together: public {theirs:.0f} images/s, ours {ours:.0f}, ratio "
          f"{ours / theirs:.1f} (torch {torch.__version__}, {torch.get_num_threads()} threads)")

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="ImageNet-C/create_c of the public repository")
    parser.add_argument("--images", type=int, default=100,
                        help="of 32 pixels; of 64 half as many, of 224 a tenth")
    parser.add_argument("--golden", type=Path, help="write the public code's numbers there instead")
    args = parser.parse_args()
    try:
        import cv2, skimage, wand  # noqa: E401, F401, I001
    except ImportError as error:
        sys.exit(f"error: {error}; the public code needs opencv-python-headless, scikit-image, "
                 "scipy and Wand")
    if not (args.directory / FILES[32]).is_file():
        sys.exit(f"error: no {FILES[32]} in {args.directory}; expected ImageNet-C/create_c of "
                 "hendrycks/robustness")
    golden = {}
    for size, part in {32: 1, 64: 2, 224: 10}.items():
        n = max(4, args.images // part)
        print_comparison(args.directory, size, n, args.golden is not None, golden)
    if args.golden:
        lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}"
                 for key, value in golden.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        files.write_atomically(args.golden, lambda file: file.write(text.encode()))

if __name__ == "__main__":
    main()
