"""What several test files build."""

import contextlib
import http.server
import io
import json
import math
import pytest
import struct
import subprocess
import sys
import threading
import torch
import warnings
import zipfile
from pathlib import Path
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
            write_files(Path(root, part, name), {f"{i}.png": encoded(tuple(
                (67 * (k + first + 1) * (j + 1) + 3 * i) % 256 for j in range(3)), (size, size))
                for i in range(n)})
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

@torch.no_grad()
def logits_of(folder, images, name="shapes"):
    """What the resnet8 that a run has left says of images, uint8, of a data set."""
    import data
    import models
    path, info = Path(folder) / "student.pt", data.DATASETS[name]
    images = data.resize(images, torch.load(path, weights_only=True)["image_size"])
    model = models.load_weights("resnet8", path).eval()
    return model(data.to_input(images, info.mean, info.std))[0]

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

def random_images(*size, seed=0):
    """uint8 tensor of that size."""
    return torch.randint(256, size, dtype=torch.uint8, generator=seeded(seed))

def refused(call, *arguments):
    """The one line by which a call refuses what it is given, without a warning."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises((ValueError, OSError)) as error:
            call(*arguments)
    assert not warned and "\n" not in str(error.value)
    return str(error.value)

def encoded(colour=(9, 99, 199), size=(8, 8), form="PNG"):
    """The bytes of a picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, form)
    return buffer.getvalue()

def class_pictures(root, classes, n=2, size=(8, 8)):
    """root/<class>/<i>.png, n a class: red tells the class's first letter, green the picture."""
    for name in classes:
        write_files(root / name, {f"{i}.png": encoded((ord(name[0]), i, 0), size)
                                  for i in range(n)})

def write_files(root, content):
    """{name: bytes} below root, which may be there."""
    for name, value in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(value)
    return root

def write_zip(path, content):
    """{name or ZipInfo: bytes} as a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in content.items():
            archive.writestr(name, value)
    return path

@contextlib.contextmanager
def web_server(content):
    """A server of one file on this machine, with `url` and the requests it was `asked`: /good/..
    has the file and goes on where it is asked to, /half/.. likewise, but ends in the middle,
    /all/.. always starts anew, /page/.. is a web page, /other/.. another file; else 404."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range", "")
            server.asked.append(f"{self.path} {asked}".strip())
            kind = self.path.split("/")[1]
            body = {"page": b"<!DOCTYPE html>", "other": content[::-1]}.get(kind, content)
            start = int(asked[len("bytes="):-1]) if asked and kind in ("good", "half") else 0
            if kind not in ("good", "half", "all", "page", "other"):
                self.send_error(404)
            elif start >= len(body):
                self.send_error(416)
            else:
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", len(body) - start)
                self.end_headers()
                end = (start + len(body)) // 2 if kind == "half" else len(body)
                self.wfile.write(body[start:end])

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.asked = f"http://127.0.0.1:{server.server_port}", []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

SMALL_CLIPS = {  # CLIP's arguments: embedding, resolution, image tower, context, vocabulary, text
    "vit": (32, 32, 2, 128, 8, 12, 514, 128, 2, 2),
    "resnet": (32, 64, (1, 2, 1, 1), 16, None, 12, 514, 128, 2, 2),
}
BYTES_CLIP = (32, 32, 1, 64, 16, 64, 514, 64, 1, 1)  # of 64 tokens: for whole prompts in bytes

def noise(shape, seed):
    """Reproducible numbers in (-1/2, 1/2) from integer arithmetic, the same everywhere."""
    i = torch.arange(torch.Size(shape).numel())
    i = (((i * i + seed * 7919) % 1000003) * 48271 + i * 69621) % 2147483647
    return (i / 2147483647 - 0.5).float().view(shape)

def filled(shapes):
    """{name: shape} -> a state dict whose every tensor is filled and exact in float16."""
    state = {}
    for seed, (name, shape) in enumerate(sorted(shapes.items())):
        fill = noise(shape, seed) * (2 * math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.4)
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            fill = 1 + fill
        fill = torch.tensor(2.5) if name == "logit_scale" else fill
        state[name] = fill.half().float()
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
    return state

def small_clip_state(kind):
    """The state dict of one of SMALL_CLIPS in OpenAI's layout, `filled`."""
    from clip_model import CLIP
    state = CLIP(*SMALL_CLIPS[kind]).state_dict()
    return filled({name: tensor.shape for name, tensor in state.items()})

def small_tokens():
    """Four texts, of which the last one is cut at 12 tokens, as OpenAI's tokenizer cuts it."""
    from clip_model import Tokenizer
    tokens = Tokenizer()(["a red circle", "x", "blue star?", "0123456789 overlong"], 77)[:, :12]
    tokens[3, 11] = 513
    return tokens

def small_images(clip):
    """Three pictures for a CLIP."""
    side = clip.visual.input_resolution
    return 4 * noise((3, 3, side, side), 1)

def relative(found, expected):
    """The largest relative difference of two tables' rows."""
    expected = torch.as_tensor(expected)
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()

@torch.no_grad()
def assert_golden(clip, golden):
    """Both towers give what another program's did."""
    assert relative(clip.encode_image(small_images(clip)), golden["image"]) < 1e-5
    assert relative(clip.encode_text(small_tokens()), golden["text"]) < 1e-5

def safetensors(tensors, change=lambda header: None, spaces=0):
    """The bytes of a file of these tensors; `change` changes the header before it is written."""
    from support.checkpoints import DTYPES
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, blobs = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        blob = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [len(blobs), len(blobs) + len(blob)]}
        blobs += blob
    text = (change(header) or json.dumps(header)).encode() + b" " * spaces
    return struct.pack("<Q", len(text)) + text + blobs
