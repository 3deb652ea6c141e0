"""Training steps on one GPU beside their floor, called and as a CUDA graph; CLIP; corruptions.

    python bench/bench_gpu.py [--parts steps,clip,corruptions] [--steps 300]     # some 3 minutes
    python bench/bench_gpu.py --device cpu --steps 2 --images 256 --small        # a smoke test

Steps are train.py's own, of batches of 64 random images of CIFAR-100's size on the device, J =
16384, CLIP's width 768: everything from the batch's indices to the optimiser. ms: called one by
one, and replayed as a CUDA graph; the floor: the kernels of teacher forward, student forward and
backward alone, as a graph; kernels and device ms of a called step, by torch's profiler; peak
memory; minutes of 240 epochs with the test images after each, as a graph; the last column: that
graph's time by KD's. f32 is float32 with TF32 products. Absolute times hold for the card alone.
"""

import argparse
import dataclasses
import gc
import sys
import time
import torch
import torch.nn.functional as F
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clip_model  # noqa: E402
import corruptions  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402
from support import command  # noqa: E402

K, D, TEST = 100, 768, 10_000
PAIRS = ("resnet110", "resnet20"), ("resnet32x4", "resnet8x4")
SMALL_PAIRS = (("resnet8", "resnet8"),)
METHODS = "scratch", "kd", "richkd-l", "richkd"

def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()

def ms(function, arguments, device):
    """Milliseconds of a call, the mean over the arguments."""
    synchronize(device)
    began = time.perf_counter()
    for argument in arguments:
        function(argument)
    synchronize(device)
    return 1000 * (time.perf_counter() - began) / len(arguments)

def kernels(function, argument):
    """(kernels, their milliseconds) of one call on a GPU."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function(argument)
        torch.cuda.synchronize()
    events = [event for event in profile.events()
              if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(events), sum(event.device_time for event in events) / 1000

def warm(function, drawn, device):
    """The calls before a measurement: cuDNN chooses, a graph is captured."""
    for argument in drawn[:5 if device.type == "cuda" else 1]:
        function(argument)

def floor_of(run, drawn):
    """The networks alone, as a function of one batch of images."""
    inputs = data.to_input(data.look_up(run.split, (), drawn)[0], run.mean, run.std)

    def floor(inputs):
        if run.teachers:
            run.teachers(inputs)
        with command.autocast(run.config):
            loss = run.student(inputs)[0].float().logsumexp(1).mean()
        run.optimizer.zero_grad()
        loss.backward()

    return floor, inputs

def measure(teacher, student, method, amp, args):
    """A row of the table: {column: number}."""
    config = train.resolve(train.Config(dataset="cifar100", teacher=(teacher,), student=student,
                                        method=method, amp=amp, device=args.device))
    device = config.device
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(K, (args.images,), generator=generator)
    split = data.Split(images.to(device), labels, [""] * K)
    cosines = torch.rand(args.images, K, generator=generator) - 0.5
    features = F.normalize(torch.randn(args.images, D, generator=generator), dim=1)
    tables = (cosines.half(), features.half()) if config.clip else ()
    torch.manual_seed(0)
    teachers = None
    if config.teacher:
        network = models.freeze(models.build_model(teacher, K))
        teachers = train.Teachers([network], amp).to(device)
    if device.type == "cuda":
        gc.collect()  # the graphs of the rows before
        torch.cuda.reset_peak_memory_stats()
    run = train.begin(config, split, teachers, tables, 100.0)
    drawn = list(data.epoch(run.split, run.tables, config.batch_size, 0, device=device))
    drawn = (drawn[:-1] or drawn) * (1 + args.steps // len(drawn))  # without the smaller one

    called = train.step_of(run._replace(config=dataclasses.replace(config, no_graph=True)))
    warm(called, drawn, device)
    row = {"called": ms(called, drawn[:max(2, args.steps // 10)], device)}
    floor, inputs = floor_of(run, drawn[0])
    if device.type == "cuda":
        row["kernels"], row["device"] = kernels(called, drawn[0])
        step = train.step_of(run)
        warm(step, drawn, device)
        row["graph"] = ms(step, drawn[:args.steps], device)
        row["MiB"] = torch.cuda.max_memory_allocated() / 2**20
        floor = command.CudaGraph(floor)
    warm(floor, [inputs] * 5, device)
    row["floor"] = ms(floor, [inputs] * args.steps, device)

    subjects = {"student": train.classifier(run.student, config, 32)}

    def test(images):
        train.predict(subjects, data.blocks(images, None, 0, device))

    images = split.images[:TEST]
    test(images)
    row["test"] = ms(test, [images], device) * TEST / len(images)
    epoch = 50_000 / config.batch_size * row.get("graph", row["called"]) + row["test"]
    row["minutes"] = 240 * epoch / 60_000
    return row

def steps(args):
    columns = "called", "graph", "floor", "kernels", "device", "test", "MiB", "minutes"
    print(f"\n{'teacher, student, method':34}{'':5}" + "".join(f"{name:>9}" for name in columns)
          + f"{'of kd':>7}")
    for teacher, student in SMALL_PAIRS if args.small else PAIRS:
        for amp, methods in ((True, METHODS), (False, METHODS[-1:])):
            base = None
            for method in methods:
                row = measure(teacher, student, method, amp, args)
                took = row.get("graph", row["called"])
                base = took if method == "kd" else base
                cells = "".join(f"{row[name]:9.{0 if name in ('kernels', 'MiB') else 2}f}"
                                if name in row else f"{'-':>9}" for name in columns)
                print(f"{teacher + ', ' + student + ', ' + method:34}{'amp' if amp else 'f32':5}"
                      f"{cells}" + (f"{took / base:7.2f}" if base else f"{'-':>7}"), flush=True)

def clip(args):
    """ViT-L/14 of random weights, as the targets are made: preprocessing and image tower."""
    if args.small:
        model, side = clip_model.CLIP(32, 32, 1, 64, 16, 64, 514, 64, 1, 1), 32
    else:
        model, side = clip_model.CLIP(768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12), 224
    model = model.eval().to(args.device)
    images = torch.randint(256, (250, 3, 32, 32), dtype=torch.uint8, device=args.device)
    classes = torch.randn(K, model.embed_dim, device=args.device)
    few, rows = 4, {}

    def preprocess(images):
        clip_model.preprocess(images, side)

    def views(images):
        train.clip_view(model, classes, images)

    for name, function in (("preprocess", preprocess), ("float32", views), ("float16", views)):
        if name == "float16":
            exact = train.clip_view(model, classes, images)[0]
            model.visual.half()
            change = (train.clip_view(model, classes, images)[0] - exact).abs().max()
        function(images)
        rows[name] = 250_000 / ms(function, [images] * few, args.device)
    try:
        from transformers import CLIPVisionConfig, CLIPVisionModel
    except ImportError:
        pass
    else:
        settings = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                    num_attention_heads=16, patch_size=14, image_size=224)
        if args.small:
            settings.num_hidden_layers = 1
        theirs = CLIPVisionModel(settings).eval().to(args.device, torch.float16)
        count = 250 if args.device.type == "cuda" else 2
        pixels = torch.randn(count, 3, 224, 224, device=args.device,
                             dtype=torch.float16)
        with torch.inference_mode():
            theirs(pixels)
            rows["transformers, float16"] = 1000 * len(pixels) / ms(theirs, [pixels] * few,
                                                                    args.device)
    print(f"\nCLIP {'(tiny)' if args.small else 'ViT-L/14'}, batches of 250{'images/s':>18}")
    for name, rate in rows.items():
        print(f"{name:34}{rate:12.0f}")
    print(f"float16 changes a cosine by at most {change:.1e}")

def corrupt(args):
    """The fifteen corruptions of CIFAR-sized images, severity 3."""
    device, count = args.device, 32 if args.small else 5000
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, device=device)
    total = 0.0
    print(f"\n{'corruption':34}{'images/s':>12}")
    for name in corruptions.COMMON:
        generator = torch.Generator(device).manual_seed(0)

        def one(severity, name=name, generator=generator):
            corruptions.corrupt(images, name, severity, generator)

        one(3)
        seconds = ms(one, [3, 3], device) / 1000
        total += seconds
        print(f"{name:34}{count / seconds:12.0f}")
    print(f"{'the fifteen, one after the other':34}{15 * count / total:12.0f}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="steps,clip,corruptions", help="which of the tables")
    parser.add_argument("--steps", type=int, default=300, help="timed steps of a graph")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="small networks, for a smoke test")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --device cpu --small is a smoke test")
    args.device = command.use_device(args.device)
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}; "
          f"{args.images} images, graphs of {args.steps} steps")
    for part, function in (("steps", steps), ("clip", clip), ("corruptions", corrupt)):
        if part in args.parts.split(","):
            function(args)

if __name__ == "__main__":
    main()
