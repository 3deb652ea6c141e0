"""Peak memory of making the cache of CLIP's targets: it must not grow with the number of images.

    python bench/bench_data.py [--images 10000 50000]

A CLIP of random weights (ResNet tower, 64x64) sees random images, made a block at a time; each size
runs in a process of its own and reads its own high-water mark.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clip_model  # noqa: E402
import targets  # noqa: E402


def peak_memory(images):
    """MiB at the most while the targets of `images` images are made, and the MiB of the file."""
    torch.manual_seed(0)
    clip = clip_model.CLIP(256, 64, (1, 1, 1, 1), 32, None, 24, 514, 128, 2, 1).eval()
    classes = F.normalize(torch.randn(100, 256), dim=1)

    @torch.inference_mode()
    def views(start, stop):
        for first in range(start, stop, 250):
            count = min(250, stop - first)
            block = torch.randint(256, (count, 3, 64, 64), dtype=torch.uint8)
            features = F.normalize(clip.encode_image(clip_model.preprocess(block, 64)), dim=1)
            yield features @ classes.T, features

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"targets-random-{images}-0.bin"
        targets.cached_targets(path, {}, (images, 100, 256), views)
        size = path.stat().st_size / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 50_000])
    parser.add_argument("--memory-of", type=int, help="print one size's as JSON (for the run)")
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(peak_memory(args.memory_of)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("images   peak MiB   of the first   file MiB")
    first = None
    for images in args.images:
        command = [sys.executable, __file__, "--memory-of", str(images)]
        peak, size = json.loads(subprocess.check_output(command))
        first = first or peak
        print(f"{images:6d}   {peak:8.0f}   {peak / first:12.3f}   {size:8.1f}", flush=True)


if __name__ == "__main__":
    main()
