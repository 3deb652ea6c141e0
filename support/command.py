"""A script as a command: settings, command line, errors; its device, CUDA graphs, its processes.

What a user can mend is one line on stderr and exit status 2. torchrun starts a process a GPU."""

import argparse
import contextlib
import dataclasses
import functools
import os
import signal
import sys
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
    """A dataclass field with its line of help. metadata: argparse's nargs, metavar, const, choices;
    `within`, the bounds of a number; `above`, what it must exceed."""
    return dataclasses.field(default=default, metadata={"help": text, **metadata})

def flag(name):
    return "--" + name.replace("_", "-")

def check(config):
    """Raises ValueError for a value that its field's metadata rule out, naming the valid ones."""
    for field in dataclasses.fields(config):
        value, known, expected = getattr(config, field.name), field.metadata, None
        if value is None:
            continue
        if "choices" in known and value not in known["choices"]:
            expected = f"one of {', '.join(known['choices'])}"
        if "above" in known and not value > known["above"]:
            expected = f"more than {known['above']}"
        if "within" in known and not known["within"][0] <= value <= known["within"][1]:
            expected = "{} to {}".format(*known["within"])
        if expected:
            raise ValueError(f"{flag(field.name)} {value!r}: expected {expected}")

def parse(config_class, text, arguments=None):
    """Command line -> a config: a flag a field. A wrong command line is one line and exit 2."""
    parser = argparse.ArgumentParser(description=text, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def refuse(message):
        raise ValueError(f"{message}; --help lists the flags")

    parser.error = refuse
    for field in dataclasses.fields(config_class):
        extra = {key: value for key, value in field.metadata.items()
                 if key not in ("within", "above")}
        if field.type is bool:
            extra["action"] = "store_true"
        elif field.type is not tuple:
            extra["type"] = field.type
        told = "" if field.default in (None, False) else f" ({field.default})"
        extra["help"] = extra["help"].replace("%", "%%") + told
        parser.add_argument(flag(field.name), default=field.default, **extra)
    return config_class(**vars(parser.parse_args(arguments)))

def show(text):
    """Print what the command found, once for all ranks."""
    if rank() == 0:
        print(text)

def main(job):
    """Run a script's job. What the user can mend is one line on stderr and exit status 2; SIGINT
    and SIGTERM end it wherever it is, by a KeyboardInterrupt, with one line and, as shells have
    it, status 128 + the signal's number. A warning is one line, too."""
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    warnings.showwarning = lambda message, *_: files.note(str(message))
    clear = "\r\033[K" if sys.stderr.isatty() else ""  # what is left of a progress line
    try:
        job()
        if dist.is_initialized():  # whose threads must end before Python does
            dist.destroy_process_group()
    except (ValueError, OSError, FloatingPointError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:  # without "[Errno 2]"
            said = f"{error.filename}: {error.strerror}"
        print(f"{clear}error: {' '.join(said.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        if rank() == 0:
            print(f"{clear}interrupted; the same command goes on", file=sys.stderr)
        sys.exit(128 + (error.args or (signal.SIGINT,))[0])

def use_device(name, deterministic=False):
    """-> the torch.device, a GPU told how to compute. ValueError where torch cannot use it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # `meta` has no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # whose streams are used
        torch.backends.cudnn.benchmark = not deterministic
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions have it anyway
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)  # what has none is named
    return device

def autocast(config):
    """bfloat16 autocast on config.device where config.amp asks for it."""
    return torch.autocast(config.device.type, torch.bfloat16, enabled=config.amp)

@functools.cache
def second_stream(device):
    """Another stream of a GPU, the same one at every call."""
    return torch.cuda.Stream(device)

@contextlib.contextmanager
def beside(device):
    """What a GPU is given here runs beside what follows, until the function is called that comes
    with it: `with beside(device) as join: ...`. Elsewhere it runs in its turn."""
    if device.type != "cuda" or not torch.cuda.is_available():
        yield lambda: None
        return
    stream, current = second_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield lambda: current.wait_stream(stream)

class CudaGraph:
    """A function of one tensor on a GPU as a CUDA graph, which costs the CPU one launch a call, not
    one a kernel. The first calls are plain ones, in which cuDNN chooses its kernels and everything
    that lasts is allocated; then it is captured, and from then on replayed. What it returns is
    overwritten by the next call. An argument of another shape, an epoch's last batch, is called.

    The function must neither read from the device nor copy to it; a replay runs no Python."""
    def __init__(self, function, plain_calls=3):
        self.function, self.plain_calls = function, plain_calls
        self.argument, self.graph = None, None

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
    needed = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if not needed <= os.environ.keys():
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
