"""Cost of one training step of KD, CRD and RichKD: milliseconds (median) and peak memory, with ratios to KD in one run.

    OMP_NUM_THREADS=2 python tests/bench_richkd.py [--steps 15] [--threads 2]

Student resnet20, teacher resnet56, batch 64 of 32x32 images, 100 classes, CLIP features of width 768 (ViT-L/14),
N = 50,000, J = 16384, d = 128. Times: the variants take turns, step by step, in one process, so that a busy machine
slows all of them alike; on a shared machine the CPU time with --threads 1 is the steadier figure. Memory: a fresh
process for each variant reads its own high-water mark.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models import build_model  # noqa: E402
from richkd import RichKD  # noqa: E402

B, K, N, D = 64, 100, 50_000, 768
VARIANTS = {
    "KD": dict(alpha=1, feature_weight=0),
    "CRD per-image": dict(lam=1, logit_weight=0, negatives="per-image"),
    "CRD shared": dict(lam=1, logit_weight=0),
    "RichKD (L)": dict(feature_weight=0),
    "RichKD (F)": dict(logit_weight=0),
    "RichKD (L+F)": dict(),
    "RichKD (L+F) fp16 banks": dict(bank_dtype=torch.float16),
}


def make_step(settings):
    """A function that trains the student for one step, and the bytes of the memory banks."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(B, 3, 32, 32, generator=generator)
    labels = torch.randint(K, (N,), generator=generator)
    clip_logits = torch.randn(B, K, generator=generator)
    clip_features = torch.randn(B, D, generator=generator)
    student, teacher = build_model("resnet20", K), build_model("resnet56", K).eval()
    method = RichKD(student.num_features, teacher.num_features, D, N, labels=labels, **settings)
    optimizer = torch.optim.SGD([*student.parameters(), *method.parameters()], lr=0.05, momentum=0.9)

    def step():
        index = torch.randint(N, (B,), generator=generator)
        with torch.no_grad():
            teacher_logits, teacher_features = teacher(images)
        loss, _ = method(*student(images), teacher_logits, teacher_features, clip_logits, clip_features, labels[index],
                         index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    banks = sum(buffer.nbytes for name, buffer in method.named_buffers() if name.endswith("bank"))
    return step, banks


def peak_memory(name):
    """High-water mark in MB of a process that takes 4 steps, and its banks."""
    step, banks = make_step(VARIANTS[name])
    for _ in range(4):
        step()
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "banks": banks / 2**20}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="timed steps of every variant")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--memory-of", choices=VARIANTS, help="print one variant's memory as JSON (for the run itself)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(peak_memory(args.memory_of)))
        return

    memory = {name: json.loads(subprocess.check_output(
        [sys.executable, __file__, "--memory-of", name, "--threads", str(args.threads)])) for name in VARIANTS}
    steps = {name: make_step(settings)[0] for name, settings in VARIANTS.items()}
    wall, cpu = {name: [] for name in VARIANTS}, {name: [] for name in VARIANTS}
    for turn in range(args.steps + 2):  # the first two warm up
        for name, step in steps.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            step()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - began_cpu)
    wall, cpu = ({name: 1000 * statistics.median(values[2:]) for name, values in times.items()}
                 for times in (wall, cpu))

    print(f"torch {torch.__version__}, {args.threads} threads, medians of {args.steps} steps; B {B}, N {N}, J 16384")
    print(f"{'':24} {'ms':>8} {'of KD':>6} {'CPU ms':>8} {'of KD':>6} {'peak MB':>8} {'of KD':>6} {'banks MB':>9} "
          f"{'(peak - banks) of KD':>21}")
    for name in VARIANTS:
        peak, banks, base = memory[name]["peak"], memory[name]["banks"], memory["KD"]["peak"]
        print(f"{name:24} {wall[name]:8.1f} {wall[name] / wall['KD']:6.3f} {cpu[name]:8.1f} "
              f"{cpu[name] / cpu['KD']:6.3f} {peak:8.0f} {peak / base:6.3f} {banks:9.1f} {(peak - banks) / base:21.3f}")


if __name__ == "__main__":
    main()
