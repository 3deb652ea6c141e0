"""Fixtures that several test files use."""

import clip_model
import models
import os
import pytest
import torch
from helpers import BYTES_CLIP
from pathlib import Path
from support import files, shapes

torch.set_num_threads(1)  # of small tensors one thread is as fast as two, and gives the same bits

@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    """What is said once a process is said once a test; nothing has to outlast a power cut."""
    files.note.cache_clear()
    monkeypatch.setattr(os, "fsync", lambda file: None)

@pytest.fixture(scope="session")
def shared():
    """Optional real data (`../shared` beside the repository); its tests skip where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("no ../shared beside the repository")
    return path

@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    """The path of a byte-level CLIP of random weights: 16x16 patches of 32x32 images, width 64."""
    torch.manual_seed(0)
    clip = clip_model.CLIP(*BYTES_CLIP)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    files.save(path, {"model": clip.state_dict()})
    return str(path)

@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """The path of a resnet8 of random weights for the 25 classes of `shapes`."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "resnet8.pt"
    torch.save(models.build_model("resnet8", 25).state_dict(), path)
    return str(path)

@pytest.fixture(scope="module")
def few_shapes():
    """The embedded data set with few images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SIZES", {"train": 150, "test": 50, "shift": 50})
        yield
