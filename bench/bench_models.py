"""Speed of every network of the zoo in images/s: forward, frozen, forward and backward.

    python bench/bench_models.py [resnet20 vgg8 ...]

Random images in float32: batches of 32 of 32x32, of 8 of 224x224 (on a GPU 16 times as many).
"""

import argparse
import sys
import torch
from pathlib import Path
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models  # noqa: E402

def images_per_second(function, images):
    timer = Timer("function()", globals={"function": function},
                  num_threads=torch.get_num_threads())  # it waits for the GPU
    return len(images) / timer.blocked_autorange(min_run_time=.5).median

def measure(name, device, scale):
    """[images/s of a forward pass, the same frozen, with a backward pass]."""
    cifar = name in models.CIFAR_MODELS
    size, num_classes, batch_size = (32, 100, 32 * scale) if cifar else (224, 1000, 8 * scale)
    model = models.build_model(name, num_classes).to(device)
    frozen = models.freeze(model)
    images = torch.randn(batch_size, 3, size, size, device=device)
    with torch.no_grad():
        found = [images_per_second(lambda: model(images), images),
                 images_per_second(lambda: frozen(images), images)]
    both = images_per_second(lambda: model(images)[0].sum().backward(), images)
    return [*found, both]

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(models.ZOO), help="which networks")
    names = parser.parse_args().names
    device, scale, hardware = "cpu", 1, f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        device, scale, hardware = "cuda", 16, torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {hardware}, float32, images/s")
    print(f"{'model':18}{'forward':>9}{'frozen':>9}{'ratio':>7}{'+backward':>11}")
    for name in names:
        forward, frozen, both = measure(name, device, scale)
        print(f"{name:18}{forward:9.0f}{frozen:9.0f}{frozen / forward:7.2f}{both:11.0f}",
              flush=True)

if __name__ == "__main__":
    main()
