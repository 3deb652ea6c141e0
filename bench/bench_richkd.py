"""Cost of a training step of KD, CRD and RichKD: milliseconds and peak memory, as ratios to KD.

    OMP_NUM_THREADS=2 python bench/bench_richkd.py [--steps 15] [--threads 2]

Student resnet20, teacher resnet56, batch 64 of 32x32 images, 100 classes, CLIP features of width
768 (ViT-L/14), N = 50,000, J = 16384, d = 128. Times: the variants take turns, step by step, in one
process, so that a busy machine slows all of them alike; on a shared machine the CPU time with
--threads 1 is the steadier figure. Memory: a fresh process for each variant reads its own
high-water mark.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import torch
from pathlib import Path

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
    parameters = [*student.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    def step():
        index = torch.randint(N, (B,), generator=generator)
        with torch.no_grad():
            teacher_logits, teacher_features = teacher(images)
        student_logits, student_features = student(images)
        loss, _ = method(student_logits, student_features, teacher_logits, teacher_features,
                         clip_logits, clip_features, labels[index], index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    banks = [buffer.nbytes for name, buffer in method.named_buffers() if name.endswith("bank")]
    return step, sum(banks)

def peak_memory(name):
    """[MiB at the most of a process that takes four steps, MiB of its banks]."""
    step, banks = make_step(VARIANTS[name])
    for _ in range(4):
        step()
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, banks / 2**20]

def measure_memory(threads):
    """{variant: (peak MiB, MiB of the banks)}."""
    memory = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--memory-of", name, "--threads", str(threads)]
        memory[name] = json.loads(subprocess.check_output(command))
    return memory

def measure_times(count):
    """{variant: median ms of a step}, by the clock and by the CPU."""
    steps = {name: make_step(settings)[0] for name, settings in VARIANTS.items()}
    wall = {name: [] for name in VARIANTS}
    cpu = {name: [] for name in VARIANTS}
    for turn in range(count + 2):
        for name, step in steps.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            step()
            if turn >= 2:  # the first two warm up
                wall[name].append(1000 * (time.perf_counter() - began))
                cpu[name].append(1000 * (time.process_time() - began_cpu))
    return ({name: statistics.median(times[name]) for name in VARIANTS} for times in (wall, cpu))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="timed steps of every variant")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--memory-of", choices=VARIANTS, help="print one's as JSON (for the run)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(peak_memory(args.memory_of)))
        return

    memory = measure_memory(args.threads)
    wall, cpu = measure_times(args.steps)
    print(f"torch {torch.__version__}, {args.threads} threads, medians of {args.steps} steps; "
          f"B {B}, N {N}, J 16384; (-): memory without the banks")
    print(f"{'':16}{'ms':>8}{'of KD':>7}{'CPU ms':>9}{'of KD':>7}{'MiB':>7}{'of KD':>7}"
          f"{'banks':>7}{'(-) of KD':>11}")
    base = memory["KD"][0]
    for name in VARIANTS:
        peak, banks = memory[name]
        print(f"{name:16}{wall[name]:8.1f}{wall[name] / wall['KD']:7.3f}{cpu[name]:9.1f}"
              f"{cpu[name] / cpu['KD']:7.3f}{peak:7.0f}{peak / base:7.3f}{banks:7.1f}"
              f"{(peak - banks) / base:11.3f}")

if __name__ == "__main__":
    main()
