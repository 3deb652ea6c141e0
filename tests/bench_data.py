"""Peak memory of making the cache of CLIP's targets, at 10,000 and at 50,000 images: it must not grow with the number.

    python tests/bench_data.py

A CLIP of random weights (ResNet tower, 64x64) sees random images, made a block at a time; each size runs in a process of
its own and reads its own high-water mark.
"""

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
import data  # noqa: E402


def peak_memory(images):
    """MiB at the most while the targets of `images` images are made, and the MiB of the file."""
    torch.manual_seed(0)
    clip = clip_model.CLIP(256, 64, (1, 1, 1, 1), 32, None, 24, 514, 128, 2, 1).eval()
    classes = F.normalize(torch.randn(100, 256), dim=1)

    @torch.inference_mode()
    def blocks(start):
        for first in range(start, images, 250):
            block = torch.randint(256, (min(250, images - first), 3, 64, 64), dtype=torch.uint8)
            features = F.normalize(clip.encode_image(clip_model.preprocess(block, 64)), dim=1)
            yield features @ classes.T, features

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "targets.bin"
        data.cached_targets(path, {"split": str(images)}, (images, 100, 256), blocks)
        size = path.stat().st_size / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, size


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(peak_memory(int(sys.argv[1]))))
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\nimages   peak MiB   file MiB")
        for images in (10_000, 50_000):
            done = subprocess.run([sys.executable, __file__, str(images)], stdout=subprocess.PIPE, check=True)
            print("{:6d}   {:8.0f}   {:8.1f}".format(images, *json.loads(done.stdout)))
