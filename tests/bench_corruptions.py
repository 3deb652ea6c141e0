"""Agreement with the public corruption code, and speed against it.

    git clone https://github.com/hendrycks/robustness
    pip install opencv-python-headless scikit-image scipy Wand        # Wand needs ImageMagick (libmagickwand)
    python tests/bench_corruptions.py robustness/ImageNet-C/create_c [--golden tests/golden_corruptions.json]

Runs the public make_cifar_c.py, make_tinyimagenet_c.py and make_imagenet_c.py as they are, but for names that today's
NumPy, SciPy and scikit-image have changed. --golden writes the public code's numbers that test_corruptions.py checks.
"""

import argparse
import json
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import corruptions
from test_corruptions import FIXED, PIXELS, picture, strength

FILES = {32: "make_cifar_c.py", 64: "make_tinyimagenet_c.py", 224: "make_imagenet_c.py"}
RENAMED = {"scipy.ndimage.interpolation": "scipy.ndimage", "multichannel=True": "channel_axis=-1",
           "np.float_)": "np.float64)", "np.fromstring": "np.frombuffer", ", mode='L')": ")"}


def public_code(directory, size):
    """The names that the public script for this image size defines, without running its loop over a data set."""
    source = (directory / FILES[size]).read_text().split("# /////////////// End Distortions")[0]
    for old, new in RENAMED.items():
        source = source.replace(old, new)
    space = {}
    exec(compile(source.replace("'./frost", f"'{directory}/frost"), FILES[size], "exec"), space)
    return space


def real_images(size, n):
    """uint8 (n, 3, size, size): CIFAR-10, Tiny-ImageNet or that enlarged, from ../shared; else the test's picture."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not shared.is_dir():
        return picture(size).repeat(n, 1, 1, 1)
    if size == 32:
        files = sorted((shared / "cifar10-test-100").glob("*.png"))
    else:
        archive = zipfile.ZipFile(shared / "tiny-imagenet-20.zip")
        names = [name for name in archive.namelist() if "/val/images/" in name and name.endswith("JPEG")]
        files = [archive.open(name) for name in names[::10]]
    images = [Image.open(file).convert("RGB").resize((size, size), Image.BICUBIC) for file in files[:n]]
    images = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    return images.repeat(-(-n // len(images)), 1, 1, 1)[:n]


def run_public(function, images, severity):
    out = [np.uint8(function(Image.fromarray(image), severity)) for image in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="ImageNet-C/create_c of the public repository")
    parser.add_argument("--images", type=int, default=100, help="of 32 pixels; of 64 half as many, of 224 a tenth")
    parser.add_argument("--golden", type=Path, help="write the public code's numbers there instead")
    args = parser.parse_args()
    try:
        import cv2, skimage, wand  # noqa: E401, F401
    except ImportError as error:
        sys.exit(f"error: {error}; the public code needs opencv-python-headless, scikit-image, scipy and Wand")
    if not (args.directory / FILES[32]).is_file():
        sys.exit(f"error: no {FILES[32]} in {args.directory}; expected ImageNet-C/create_c of hendrycks/robustness")
    functions, golden = {**corruptions.COMMON, **corruptions.EXTRA}, {}
    for size in FILES:
        public = public_code(args.directory, size)
        n = max(4, args.images // {32: 1, 64: 2, 224: 10}[size])
        images = picture(size) if args.golden else real_images(size, n)
        seconds = {"public": 0.0, "ours": 0.0}
        print(f"\n{size} pixels, {n} images. For severities 1-5: mean |difference| in grey levels if not random,\n"
              "else ours / public of mean |change|, deviation of the change, gradient energy. Milliseconds an image")
        for name, function in functions.items():
            cells, spent = [], {"public": 0.0, "ours": 0.0}
            some = images
            if args.golden and name not in FIXED:  # the slowest less often, the one that varies most more often
                some = images.repeat({"glass_blur": n, "elastic_transform": 20 * n}.get(name, 4 * n), 1, 1, 1)
            function(some[:2], 1, torch.Generator().manual_seed(0))  # warm
            for severity in range(1, 6):
                np.random.seed(severity)
                start = time.perf_counter()
                theirs = run_public(public[name], some, severity)
                middle = time.perf_counter()
                ours = corruptions.corrupt(some, name, severity, torch.Generator().manual_seed(severity))
                spent["public"] += middle - start
                spent["ours"] += time.perf_counter() - middle
                if name in FIXED:
                    cells.append(f"{(ours.float() - theirs.float()).abs().mean():.3f}")
                    numbers = theirs[0].flatten(1)[:, PIXELS % (size * size)].flatten().tolist()
                else:
                    a, b = strength(some, theirs), strength(some, ours)
                    cells.append("/".join(f"{y / x:.2f}" for x, y in zip(a[1:], b[1:])))
                    numbers = [round(x, 2) for x in a]
                golden[f"{name} {severity} {size}"] = numbers
            if name in corruptions.COMMON:
                seconds = {who: seconds[who] + spent[who] / len(some) for who in seconds}
            print(f"  {name:18s} {'  '.join(cells)}   {spent['public'] / 5 / len(some) * 1e3:.2f} -> "
                  f"{spent['ours'] / 5 / len(some) * 1e3:.2f}")
        rates = {who: 15 * 5 / seconds[who] for who in seconds}
        print(f"  the fifteen together: public {rates['public']:.0f} images/s, ours {rates['ours']:.0f}, ratio "
              f"{rates['ours'] / rates['public']:.1f} (torch {torch.__version__}, {torch.get_num_threads()} threads)")
    if args.golden:
        partial = args.golden.with_suffix(".partial")
        partial.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}"
                                              for k, v in golden.items()) + "\n}\n")
        os.replace(partial, args.golden)


if __name__ == "__main__":
    main()
