"""Speed of training, as ratios of one run: augmentation, the frozen teacher, an epoch, the banks.

    python bench/bench_train.py [--threads 2] [--rounds 3] [--steps 8] [--images 10000]

RichKD (L+F), resnet56 -> resnet20, batches of 64 random 32x32 images of 100 classes, CLIP features
of width 768, 16384 negatives; some minutes. What is compared takes turns in one process, round by
round, so that a busy machine slows all of it alike; the numbers are medians over the rounds.
`--rounds 1 --steps 2 --images 640` is a smoke test.

The straightforward loop is written out as public code has it: PIL transforms and each image's own
negatives in a DataLoader, float32, a plain teacher in eval mode, each image's rows gathered from
each bank; the losses are the same.
"""

import argparse
import numpy as np
import statistics
import sys
import time
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from pathlib import Path
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import models  # noqa: E402
import richkd  # noqa: E402
import train  # noqa: E402
from support import files  # noqa: E402

B, K, D, J, d = 64, 100, 768, 16384, 128
INFO = data.DATASETS["cifar100"]
CONFIG = train.resolve(train.Config(dataset="cifar100", teacher=("resnet56",), student="resnet20",
                                    device="cpu"))

def take_turns(functions, rounds):
    """{name: median seconds of a call}, after one call each to warm up."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}

class Straightforward(torch.utils.data.Dataset):
    """Images one by one through PIL; with J > 0 also the image's number and its own negatives
    (CRD's data set)."""

    def __init__(self, split, negatives=0):
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in split.images]
        self.labels, self.negatives = split.labels.tolist(), negatives
        self.others = [np.flatnonzero(split.labels.numpy() != k) for k in range(K)]
        self.transform = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(),
                                    T.ToTensor(), T.Normalize(INFO.mean, INFO.std)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, label = self.transform(self.images[i]), self.labels[i]
        if not self.negatives:
            return image, label
        return image, label, i, np.random.choice(self.others[label], self.negatives, replace=True)

def straightforward_loader(split, negatives=0):
    images = Straightforward(split, negatives)
    return torch.utils.data.DataLoader(images, B, shuffle=True, num_workers=2)

def straightforward_epoch(loader, steps, student, teacher, criterion, memory, optimizer, tables):
    cosines, features = tables
    for number, (images, labels, index, negatives) in enumerate(loader):
        if number == steps:
            return
        with torch.no_grad():
            teacher_logits, teacher_features = teacher(images)
        logits, student_features = student(images)
        clip_logits = 100 * torch.stack([cosines[i] for i in index]).float()
        clip_features = torch.stack([features[i] for i in index]).float()
        fused_logits = richkd.fuse_logits(teacher_logits, clip_logits)
        fused_features = richkd.fuse_features(
            criterion.teacher_embed(teacher_features), criterion.clip_embed(clip_features))
        own_features = criterion.student_embed(student_features)
        loss = (F.cross_entropy(logits, labels)
                + 3 * richkd.kd_loss(logits, fused_logits)
                + 0.8 * memory(own_features, fused_features, index, negatives))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

def new_run(split, tables):
    """-> a train.Run of a new student, and its teacher as it was before it was frozen."""
    torch.manual_seed(0)
    teacher = models.build_model("resnet56", K).eval()
    frozen = train.Teachers([models.freeze(teacher)], False)
    return train.begin(CONFIG, split, frozen, tables, 100.0), teacher

def augmentation(split, rounds):
    loader = straightforward_loader(split)

    def torchvisions():
        for _ in loader:
            pass

    def ours():
        for drawn in data.epoch(split, (), B, seed=0):
            data.to_input(data.look_up(split, (), drawn)[0], INFO.mean, INFO.std)

    seconds = take_turns({"torchvision, 2 workers": torchvisions, "data.epoch": ours}, rounds)
    print(f"\n(a) crop, flip, normalise{'images/s':>22}{'ratio':>8}")
    for name, value in seconds.items():
        ratio = seconds["torchvision, 2 workers"] / value
        print(f"{name:36}{len(split.labels) / value:11.0f}{ratio:8.1f}")

def frozen_teacher(split, rounds):
    torch.manual_seed(0)
    teacher = models.build_model("resnet56", K).eval()
    inputs = data.to_input(split.images[:B], INFO.mean, INFO.std)
    plain = inputs.contiguous()
    frozen = train.Teachers([models.freeze(teacher)], False)
    bfloat16 = train.Teachers([models.freeze(teacher)], True)
    with torch.no_grad():
        expected = teacher(plain)[0]
        functions = {"plain, eval mode": lambda: teacher(plain), "frozen": lambda: frozen(inputs),
                     "frozen, --amp": lambda: bfloat16(inputs)}
        seconds = take_turns(functions, 3 * rounds)
        print(f"\n(b) teacher resnet56{'images/s':>27}{'ratio':>8}   logits differ, of their std")
        for name, value in seconds.items():
            error = (functions[name]()[0] - expected).abs().max() / expected.std()
            ratio = seconds["plain, eval mode"] / value
            print(f"{name:36}{B / value:11.0f}{ratio:8.2f}{error.item():12.1e}")

def epoch(split, tables, steps, rounds):
    """train.py's own loop over `steps` batches, beside the straightforward one; then its parts."""
    N, images = len(split.labels), steps * B
    few = data.Split(split.images[:images], split.labels[:images], split.class_names)
    few_tables = tuple(table[:images] for table in tables)
    run, _ = new_run(split, tables)  # with banks of N rows
    run = run._replace(split=few, tables=few_tables)
    step, teachers = train.step_of(run), run.teachers

    drawn = next(data.epoch(few, few_tables, B, 0))
    pixels, labels, index, cosines, features = data.look_up(few, few_tables, drawn)
    inputs = data.to_input(pixels, INFO.mean, INFO.std)
    outputs = [x.detach().requires_grad_() for x in run.student(inputs)]
    supervision = (*teachers(inputs), 100 * cosines.float(), features.float(), labels, index)

    def ours():
        train.train_epoch(run, step, 0, files.Progress("", N))

    def floor():
        for _ in range(steps):
            teachers(inputs)
            F.cross_entropy(run.student(inputs)[0], labels).backward()

    def losses():
        for _ in range(steps):
            run.criterion(*outputs, *supervision)[0].backward()

    def look_up():
        for drawn in data.epoch(few, few_tables, B, 0):
            data.to_input(data.look_up(few, few_tables, drawn)[0], INFO.mean, INFO.std)

    def optimise():
        for _ in range(steps):
            run.optimizer.step()

    plain, plain_teacher = new_run(split, tables)
    plain.student.to(memory_format=torch.contiguous_format)
    memory = richkd.ContrastiveMemory(N, d, J, negatives="per-image")
    loader = straightforward_loader(split, J)
    fewer = min(4, steps)  # of its steps, which are slow

    def straightforward():
        straightforward_epoch(loader, fewer, plain.student, plain_teacher, plain.criterion, memory,
                              plain.optimizer, tables)

    seconds = take_turns({
        "straightforward loop": straightforward, "epoch of train.py": ours, "floor": floor,
        "losses": losses, "augmentation, look-up": look_up, "optimiser": optimise}, rounds)
    seconds["straightforward loop"] *= steps / fewer
    print(f"\n(c) RichKD (L+F){'images/s':>31}{'ratio':>8}{'of the floor':>14}{'ms a step':>11}")
    for name, value in seconds.items():
        rates = " " * 33  # a part alone has none
        if name in ("straightforward loop", "epoch of train.py", "floor"):
            rates = (f"{images / value:11.0f}{seconds['straightforward loop'] / value:8.2f}"
                     f"{seconds['floor'] / value:14.2f}")
        print(f"{name:36}{rates}{1000 * value / steps:11.1f}")

def banks(rounds):
    functions = {}
    for size in (10**4, 10**5, 10**6):
        memory = richkd.ContrastiveMemory(size, d, J, labels=torch.arange(size) % K)
        student, fused = F.normalize(torch.randn(2, B, d), dim=2)
        student.requires_grad_()

        def step(memory=memory, student=student, fused=fused, size=size):
            memory(student, fused, torch.randint(size, (B,))).backward()

        functions[f"{size:,}"] = step
    seconds = take_turns(functions, 5 * rounds)
    print(f"\n(d) feature loss and banks, N{'ms a step':>18}{'of the first':>14}")
    for name, value in seconds.items():
        print(f"{name:36}{1000 * value:11.1f}{value / seconds['10,000']:14.2f}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps a turn")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--parts", default="abcd", help="which of the tables")
    args = parser.parse_args()
    if args.images < args.steps * B:
        parser.error(f"--images {args.images}: {args.steps} steps need {args.steps * B}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    N, rounds = args.images, args.rounds
    images = torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8)
    split = data.Split(images, torch.randint(K, (N,)), [""] * K)
    cosines, features = torch.rand(N, K) - 0.5, F.normalize(torch.randn(N, D), dim=1)
    tables = (cosines.half(), features.half())
    print(f"torch {torch.__version__}, {args.threads} threads, {N} images; {rounds} rounds of "
          f"{args.steps} steps")
    if "a" in args.parts:
        augmentation(split, rounds)
    if "b" in args.parts:
        frozen_teacher(split, rounds)
    if "c" in args.parts:
        epoch(split, tables, args.steps, rounds)
    if "d" in args.parts:
        banks(rounds)

if __name__ == "__main__":
    main()
