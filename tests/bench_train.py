"""Speed of training, as ratios of one run: augmentation, the frozen teacher, a RichKD epoch, torch.compile, the bank.

    python tests/bench_train.py [--threads 2] [--rounds 3] [--steps 8] [--images 10000]        # a few minutes

RichKD (L+F), resnet56 -> resnet20, batches of 64 random 32x32 images of 100 classes, CLIP features of width 768, 16384
negatives. What is compared takes turns in one process, round by round, so that a busy machine slows all of it alike;
the numbers are medians over the rounds. `--rounds 1 --steps 2 --images 640` is a smoke test.

The straightforward loop is written out as public code has it: PIL transforms and each image's own negatives in a
DataLoader, float32, a plain teacher in eval mode, each image's rows gathered from each bank; the losses are the same.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data  # noqa: E402
import models  # noqa: E402
import richkd  # noqa: E402
import train  # noqa: E402

B, K, D, J, d = 64, 100, 768, 16384, 128


def take_turns(functions, rounds):
    """{name: median seconds of a call}, after one call each to warm up."""
    times = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


class Straightforward(torch.utils.data.Dataset):
    """Images one by one through PIL; with J > 0 also the image's number and its own negatives (CRD's dataset)."""

    def __init__(self, split, mean, std, negatives=0):
        self.images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in split.images]
        self.labels, self.negatives = split.labels.tolist(), negatives
        self.others = [np.flatnonzero(split.labels.numpy() != k) for k in range(K)]
        self.transform = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(),
                                    T.Normalize(mean, std)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image, label = self.transform(self.images[i]), self.labels[i]
        if not self.negatives:
            return image, label
        return image, label, i, np.random.choice(self.others[label], self.negatives, replace=True)


def straightforward_epoch(loader, steps, student, teacher, memory, embed, optimizer, cosines, features):
    for step, (images, labels, index, negatives) in enumerate(loader):
        if step == steps:
            return
        with torch.no_grad():
            teacher_logits, teacher_features = teacher(images)
        logits, student_features = student(images)
        clip_logits = 100 * torch.stack([cosines[i] for i in index]).float()
        clip_features = torch.stack([features[i] for i in index]).float()
        fused = richkd.fuse_features(embed["teacher"](teacher_features), embed["clip"](clip_features))
        loss = (F.cross_entropy(logits, labels)
                + 3 * richkd.kd_loss(logits, richkd.fuse_logits(teacher_logits, clip_logits))
                + 0.8 * memory(embed["student"](student_features), fused, index, negatives))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps a turn")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--parts", default="abcde", help="which of the tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    N, rounds, info = args.images, args.rounds, data.DATASETS["cifar100"]
    images = min(args.steps * B, N)
    split = data.Split(torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8), torch.randint(K, (N,)), [""] * K)
    targets = [torch.rand(N, K).sub(0.5).half(), F.normalize(torch.randn(N, D), dim=1).half()]
    config = train.resolve(train.Config(dataset="cifar100", teacher=("resnet56",), student="resnet20", device="cpu"))
    print(f"torch {torch.__version__}, {args.threads} threads, {N} images; {rounds} rounds of {args.steps} steps")

    def make():
        """A student with its criterion and optimiser, and the plain teacher."""
        torch.manual_seed(0)
        student, teacher = models.build_model("resnet20", K), models.build_model("resnet56", K).eval()
        criterion = richkd.RichKD(64, 64, D, N, labels=split.labels)
        step = train.Step(student, criterion).to(memory_format=torch.channels_last)
        return step, torch.optim.SGD(step.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True), teacher

    def epoch(step, optimizer, teachers):
        """The last `images` images of an epoch, by train.py's own loop."""
        part = {"images": N - images, "steps": 0, "seconds": 0.0, "sums": {}}
        train.train_epoch(config, 0, split, step, optimizer, teachers, targets, 100.0, data.Progress("", N), part)

    if "a" in args.parts:
        images_one_by_one = Straightforward(split, info.mean, info.std)
        loader = torch.utils.data.DataLoader(images_one_by_one, B, shuffle=True, num_workers=2)

        def ours():
            for pixels, _, _ in data.batches(split, B, seed=0):
                train.to_input(pixels, info.mean, info.std)
        seconds = take_turns({"torchvision, 2 workers": lambda: [None for _ in loader], "ours": ours}, rounds)
        print("\n(a) crop, flip, normalise              images/s   ratio")
        for name, value in seconds.items():
            print(f"{name:36}{N / value:11.0f}{seconds['torchvision, 2 workers'] / value:8.1f}")

    step, optimizer, teacher = make()
    pixels, labels, index = next(data.batches(split, B, seed=0))
    inputs = train.to_input(pixels, info.mean, info.std)
    both = {dtype: train.Teachers([models.freeze(teacher)], None, dtype) for dtype in ("float32", "bfloat16")}
    teachers = both[train.fast_dtype("cpu")]
    if "b" in args.parts:
        plain = inputs.contiguous()
        both["float32, --compile"] = train.Teachers([models.freeze(teacher)], None, "float32")
        both["float32, --compile"].teachers[0].compile()
        both["float32, --compile"](inputs)
        with torch.no_grad():
            seconds = take_turns({"plain, eval mode": lambda: teacher(plain),
                                  **{f"frozen, {dtype}": lambda frozen=frozen: frozen(inputs) for dtype, frozen in
                                     both.items()}}, 3 * rounds)
            expected = teacher(inputs)[0]
        print("\n(b) teacher resnet56                   images/s   ratio   logits differ, of their std")
        for name, value in seconds.items():
            found = both.get(name.removeprefix("frozen, "), teacher)(inputs)[0]
            print(f"{name:36}{B / value:11.0f}{seconds['plain, eval mode'] / value:8.2f}"
                  f"{((found - expected).abs().max() / expected.std()).item():12.1e}")

    if "c" in args.parts or "d" in args.parts:
        clip = [targets[0][index].float() * 100, targets[1][index].float()]
        outputs = [x.detach().requires_grad_() for x in step.student(inputs)]
        supervision = (*teachers(inputs), *clip, labels, index)

        def floor():
            for _ in range(images // B):
                with torch.no_grad():
                    teachers(inputs)
                F.cross_entropy(step.student(inputs)[0], labels).backward()

        def losses():
            for _ in range(images // B):
                step.criterion(*outputs, *supervision)[0].backward()

        def augmentation():
            for pixels, *_ in data.batches(split, B, 0, N - images, tables=targets):
                train.to_input(pixels, info.mean, info.std)

        functions = {"RichKD epoch, train.py": lambda: epoch(step, optimizer, teachers), "floor": floor}
    if "c" in args.parts:
        plain_step, plain_optimizer, _ = make()
        criterion, student = plain_step.criterion, plain_step.student.to(memory_format=torch.contiguous_format)
        embed = {"teacher": criterion.teacher_embed, "clip": criterion.clip_embed, "student": criterion.student_embed}
        memory = richkd.ContrastiveMemory(N, negatives="per-image")
        loader = torch.utils.data.DataLoader(Straightforward(split, info.mean, info.std, J), B, shuffle=True,
                                             num_workers=2)
        few = min(4, args.steps)
        seconds = take_turns({**functions, "losses": losses, "augmentation, look-up": augmentation,
                              "optimiser": lambda: [optimizer.step() for _ in range(images // B)],
                              "straightforward loop": lambda: straightforward_epoch(
                                  loader, few, student, teacher, memory, embed, plain_optimizer, *targets)}, rounds)
        seconds["straightforward loop"] *= images / B / few
        print("\n(c) RichKD (L+F)                       images/s   ratio to straightforward   to the floor   ms a step")
        for name in ("straightforward loop", "RichKD epoch, train.py", "floor", "losses", "augmentation, look-up",
                     "optimiser"):
            value, shown = seconds[name], name[:5] in ("strai", "RichK", "floor")
            print(f"{name:36}{images / value:11.0f}" + (f"{seconds['straightforward loop'] / value:27.2f}"
                  f"{seconds['floor'] / value:15.2f}" if shown else " " * 42) + f"{1000 * value * B / images:12.1f}")

    if "d" in args.parts:
        compiled, compiled_optimizer, _ = make()
        frozen = train.Teachers([models.freeze(teacher)], None, teachers.dtype)
        for module in (compiled.student, frozen.teachers[0]):
            module.compile()
        began = time.perf_counter()
        epoch(compiled, compiled_optimizer, frozen)
        began = time.perf_counter() - began
        seconds = take_turns({"as it is": functions["RichKD epoch, train.py"],
                              "--compile": lambda: epoch(compiled, compiled_optimizer, frozen)}, rounds)
        print(f"\n(d) torch.compile: {began:.0f} s for the first {images // B} steps; then\n"
              f"{'':36}   images/s   ratio")
        for name, value in seconds.items():
            print(f"{name:36}{images / value:11.0f}{seconds['as it is'] / value:8.2f}")

    if "e" in args.parts:
        functions = {}
        for size in (10**4, 10**5, 10**6):
            memory = richkd.ContrastiveMemory(size, labels=torch.arange(size) % K)
            student, fused = (F.normalize(torch.randn(B, d), dim=1).requires_grad_() for _ in range(2))
            functions[f"{size:,}"] = lambda memory=memory, student=student, fused=fused, size=size: memory(
                student, fused, torch.randint(size, (B,))).backward()
        seconds = take_turns(functions, 5 * rounds)
        print("\n(e) feature loss and bank, N           ms a step   of 10,000's")
        for name, value in seconds.items():
            print(f"{name:36}{1000 * value:12.1f}{value / seconds['10,000']:14.2f}")


if __name__ == "__main__":
    main()
