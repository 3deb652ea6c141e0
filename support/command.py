"""A script as a command: settings, command line, errors; its device, CUDA graphs, its processes."""

import argparse
import dataclasses
import numbers
import os
import re
import signal
import sys
import threading
import warnings
from datetime import timedelta

if sys.version_info < (3, 11):  # met before a module that an older one cannot evaluate
    print("error: this is Python {}.{}, expected 3.11 or newer: install requirements.txt for a "
          "newer one and start it with that".format(*sys.version_info), file=sys.stderr)
    sys.exit(2)

import torch
import torch.distributed as dist
from support import files

def setting(default, text, **metadata):
    """A dataclass field with its line of help. metadata: argparse's; within: a number's bounds."""
    return dataclasses.field(default=default, metadata={"help": text, **metadata})

def flag(name):
    return "--" + name.replace("_", "-")

def normalize(config):
    """For a config's `__post_init__`: what Python users write becomes what the command line has,
    paths strings, `~` a home, one name or a list of them a tuple, NumPy's numbers Python's."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        path = isinstance(value, (str, os.PathLike))
        if kind is tuple and value is not None:
            value = tuple(map(os.path.expanduser, [value] if path else value))
        elif path:
            value = os.path.expanduser(value)
        elif isinstance(value, numbers.Real) and (kind is float or kind is int and value % 1 == 0):
            value = kind(value)
        object.__setattr__(config, field.name, value)

def check(config):
    """Raises ValueError for a value that its field's type or metadata rule out, naming others."""
    for field in dataclasses.fields(config):
        value, known = getattr(config, field.name), field.metadata
        if value is None or field.name == "device":  # which torch knows
            continue
        low, high = known.get("within", (value, value))
        right = type(value) is field.type and low <= value <= high
        if not right or value not in known.get("choices", [value]):
            expected = f"{low} to {high}" if "within" in known else field.type.__name__
            expected = ", ".join(known.get("choices", [expected]))
            raise ValueError(f"{flag(field.name)} {value!r}: expected {expected}")

def parse(config_class, text, arguments=None, unread=lambda config: ()):
    """Command line -> a config: a flag a field. ValueError for a wrong command line, also for flags
    that are given and named by unread(config), those without an effect."""
    def refuse(message):
        raise ValueError(f"{message}; --help lists the flags")
    parser = argparse.ArgumentParser(description=text, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    for field in dataclasses.fields(config_class):
        extra = {key: value for key, value in field.metadata.items() if key != "within"}
        if field.type is bool:
            extra["action"] = "store_true"
        elif field.type is not tuple:
            extra["type"] = field.type
        told = f" ({field.default})" * bool(field.default)
        extra["help"] = extra["help"].replace("%", "%%") + told
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, **extra)
    given = vars(parser.parse_args(arguments))
    config = config_class(**given)
    for name in unread(config):
        if name in given:
            refuse(f"{flag(name)} has no effect with the other settings")
    return config

OUT_OF_MEMORY = re.compile("out of memory|(shared|allocate) memory|ALLOC_FAILED|No space left|"
                           r"worker \(pid.*(killed|exited)")  # torch has no class for most of these

def main(job):
    """Print the text that a script's job returns. A line on stderr says what one can mend (status
    2), that memory ran out (1), a signal (128 + its number, as shells have it), a warning."""
    process, caught = os.getpid(), []
    def interrupt(number, frame):
        if os.getpid() != process:  # a loader's worker, which was sent it, too, ends without a word
            os._exit(0)
        caught.append(number)
        raise KeyboardInterrupt(number)
    sys.unraisablehook = lambda lost: (  # what a fork or a destructor drops: a signal, once more
        threading.Timer(0.1, signal.raise_signal, caught[:1]).start() if caught
        else sys.__unraisablehook__(lost))
    if threading.current_thread() is threading.main_thread():  # no other may handle signals
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # what a terminal lacks
    warnings.showwarning = lambda message, *_: files.note(str(message))
    try:
        text = job()
        if isinstance(text, str) and rank() == 0:
            print(text, flush=True)
        if dist.is_initialized():  # whose threads must end before Python does
            dist.destroy_process_group()
    except BaseException as error:
        if isinstance(error, BrokenPipeError):  # who read what is printed has left, as `head` does
            sys.stdout = sys.stderr = None  # Python would write the rest once more
            sys.exit(128 + 13)
        if caught:  # whatever came of it, a worker's end perhaps
            status, text = 128 + caught[0], "interrupted; the same command goes on"
        elif isinstance(error, (ValueError, OSError, FloatingPointError)):
            status, text = 2, f"error: {error}"
        elif isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            status, text = 1, (f"error: {str(error)[:200]}: out of memory? Less is needed "
                               "by a smaller --batch-size, fewer --workers or --num-negatives")
        else:
            raise
        files.say(text, every_rank=not caught)
        sys.exit(status)

def use_device(name, deterministic=False):
    """-> the torch.device, a GPU told how to compute. ValueError where torch cannot use it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # `meta` has no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # whose streams are used
        torch.backends.cudnn.benchmark = not deterministic
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions have it anyway
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)  # what has none is named
    return device

def autocast(config):
    return torch.autocast(config.device.type, torch.bfloat16, enabled=config.amp)

class CudaGraph:
    """A function of one tensor on a GPU as a CUDA graph: one launch a call, not one a kernel. First
    it is called, so that cuDNN chooses kernels, then captured, and replayed without Python: it must
    neither read from the device nor copy to it. The next call overwrites what it returned."""
    def __init__(self, function, plain_calls=3):
        self.function, self.plain_calls = function, plain_calls
        self.argument = self.graph = None

    def __call__(self, argument):
        if self.argument is None:
            self.argument = argument.clone()
        if argument.shape != self.argument.shape:
            return self.function(argument)
        if self.plain_calls:
            self.plain_calls -= 1
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):  # capture wants no traces of the default stream
                result = self.function(argument)
            current.wait_stream(stream)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function(self.argument)
        self.argument.copy_(argument)
        self.graph.replay()
        return self.result

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    return dist.get_world_size() if dist.is_initialized() else 1

def join_ranks(config):
    """Where torchrun started this process, join the others; -> the config with its own device. Some
    of torchrun's variables alone are left over in a shell, or a cluster's: this is one process."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return config
    backend, device = "gloo", None
    if config.device.type == "cuda":  # torchrun may start more processes than there are GPUs
        device = use_device(f"cuda:{os.environ['LOCAL_RANK']}", config.deterministic)
        backend, config = "nccl", dataclasses.replace(config, device=device)
    if not dist.is_initialized():  # ranks wait while one of them reads or makes what all need
        dist.init_process_group(backend, timeout=timedelta(days=2), device_id=device)
    return config

def rank_zero_first(work):
    """work() on every rank, on rank 0 before the others, which find what it made or downloaded."""
    if rank() > 0:
        dist.barrier()
    result = work()
    if rank() == 0 and world() > 1:
        dist.barrier()
    return result
