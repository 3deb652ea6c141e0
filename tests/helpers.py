"""What several test files build."""

import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image



def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


ROOT = Path(__file__).resolve().parents[1]
WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361"]


def class_folders(root, classes=WNIDS[:2], first=0, n=8, size=32, parts=("train", "val")):
    """A folder a class of n one-coloured pictures in each part, whose names are the same whatever
    they show: the colours begin with number `first`."""
    for part in parts:
        for k, name in enumerate(classes):
            place = Path(root, part, name)
            place.mkdir(parents=True)
            for i in range(n):
                colour = tuple((67 * (k + first + 1) * (j + 1) + 3 * i) % 256 for j in range(3))
                Image.new("RGB", (size, size), colour).save(place / f"{i}.png")
    return Path(root)


def small(place, **changes):
    """The settings of a run on class folders: resnet8 teaches resnet8, an epoch of batches of 8."""
    import train  # here, for tests of a file that stands alone
    return train.Config(**{"dataset": "imagenet", "data_dir": str(place / "a"), "image_size": 32,
                           "student": "resnet8", "teacher": ("resnet8",), "method": "kd",
                           "epochs": 1, "batch_size": 8, "lr": 0.05, "workers": 0, "device": "cpu",
                           "cache_dir": str(place / "cache"), "out": str(place / "run"), **changes})


def weights(folder):
    """The tensors of the student of a run."""
    from support import checkpoints
    return checkpoints.read_state_dict(Path(folder) / "student.pt")


def equal(a, b):
    """Whether two state dicts are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def script(path, text):
    """A Python file that can import the project."""
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + text)
    return path


def python(*arguments, **settings):
    """This Python as another process, finished: returncode, stdout, stderr."""
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                          **settings)
