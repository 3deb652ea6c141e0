"""Conventional teachers: several as one, and each from its checkpoint, which may know its classes.

    teacher = given_teacher(config, "resnet32x4", "resnet32x4.pth", split)
    logits, features = Teachers([teacher], config)(images)      # (B,K), (B,C), no gradient

`config` is train.py's: its data set, image_size, teacher_shares and amp are read.
"""

import torch

import data
import models
import richkd
from support import checkpoints, files, runs


class OwnInput(torch.nn.Module):
    """A teacher that was trained with another mean and std of images in 0..1 than `shared`, those
    by which its input (B,3,H,W) is normalised."""

    def __init__(self, teacher, own, shared):
        super().__init__()
        self.teacher, self.num_features = teacher, teacher.num_features
        (mean, std), (shared_mean, shared_std) = (
            [torch.tensor(value).view(3, 1, 1) for value in pair] for pair in (own, shared))
        self.register_buffer("scale", shared_std / std)
        self.register_buffer("shift", (shared_mean - mean) / std)

    def forward(self, images):
        images = images * self.scale + self.shift
        return self.teacher(images.to(next(self.teacher.parameters()).dtype))


class Teachers(torch.nn.Module):
    """Frozen conventional teachers as one: mean logits, concatenated features, float32. With --amp
    their weights are bfloat16 once and for all: autocast would cast them at every step."""

    def __init__(self, teachers, config):
        super().__init__()
        self.teachers, self.config = torch.nn.ModuleList(teachers), config
        self.num_features = sum(teacher.num_features for teacher in teachers)
        self.dtype = torch.bfloat16 if config.amp else torch.float32
        for teacher in teachers:
            (teacher.teacher if isinstance(teacher, OwnInput) else teacher).to(self.dtype)

    @torch.no_grad()
    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):
            logits, features = zip(*(
                teacher(images if isinstance(teacher, OwnInput) else images.to(self.dtype))
                for teacher in self.teachers))
        mean = richkd.fuse_teachers(logits, self.config.teacher_shares)
        return mean, torch.cat(features, 1).float()                                # (B,K), (B,C)


def given_teacher(config, name, path, split):
    """A teacher from its checkpoint, or from "imagenet", frozen, that reads what the student reads.
    Raises ValueError where the file says that its classes or the side of its images are others."""
    model = models.freeze(models.load_weights(name, path, len(split.class_names)))
    info, imagenet = data.DATASETS[config.dataset], data.DATASETS["imagenet"]
    about = {"mean": imagenet.mean, "std": imagenet.std}
    if path != "imagenet":
        about = checkpoints.read_about(path)
    with files.undamaged(path, "expected what train.py leaves"):
        differ = runs.class_difference(about, split)
        *own, size = runs.input_of(about, info._replace(image_size=config.image_size))
        if own != [info.mean, info.std]:
            model = OwnInput(model, own, (info.mean, info.std))
    if differ:
        raise ValueError(f"{path} knows other classes: {differ}")
    if size != config.image_size:
        raise ValueError(f"{path} reads images of {size} x {size}, here they are of "
                         f"{config.image_size}: --image-size {size}, or another teacher")
    return model
