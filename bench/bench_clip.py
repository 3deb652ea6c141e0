"""clip_model.py beside open_clip: speed, parity on the nine public architectures, golden numbers.

    python bench/bench_clip.py                  images/s of encode_image: ViT-B/32 and RN50
    python bench/bench_clip.py --bfloat16       the same under autocast
    python bench/bench_clip.py --parity         largest relative difference of features
    python bench/bench_clip.py --golden FILE    rewrite tests/golden_clip.json;
                                                FILE: openai-clip's simple_tokenizer.py
    python bench/bench_clip.py --layouts        rewrite tests/golden_clip_layout.json

Needs open_clip_torch, which the project itself does not use; --parity compares with transformers,
too, where that is installed, and --layouts needs it. Weights are random; nothing is downloaded.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
import torch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers  # noqa: E402
import test_clip_model as tests  # noqa: E402
from clip_model import CLIP, build_clip  # noqa: E402
from support import clip_files  # noqa: E402

try:
    import open_clip
except ImportError:
    open_clip = None

TEXT = (77, 49408)  # context length and vocabulary
PUBLIC = {  # embed_dim, resolution, layers, width, patch, context, vocabulary, then the text tower
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, *TEXT, 512, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, *TEXT, 512, 8, 12),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, *TEXT, 640, 10, 12),
    "RN50x16 (fewer layers)": (768, 384, (2, 2, 2, 2), 96, None, *TEXT, 768, 12, 4),
    "RN50x64 (fewer layers)": (1024, 448, (1, 2, 2, 1), 128, None, *TEXT, 1024, 16, 4),
    "ViT-B/32": (512, 224, 12, 768, 32, *TEXT, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, *TEXT, 512, 8, 12),
    "ViT-L/14 (fewer layers)": (768, 224, 6, 1024, 14, *TEXT, 768, 12, 6),
    "ViT-L/14@336px (fewer layers)": (768, 336, 4, 1024, 14, *TEXT, 768, 12, 4),
}

def open_clip_model(state):
    """open_clip's model with these weights, which it keeps in float16 on the way."""
    build = open_clip.model.build_model_from_openai_state_dict
    return build(dict(state), cast_dtype=torch.float32).float().eval()

def random_state(sizes):
    """A state dict of these sizes, all tensors random, exact in float16."""
    torch.manual_seed(0)
    state = CLIP(*sizes).state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 1:
            normed = "bn" in name or "downsample" in name
            spread = torch.rand_like(tensor) if normed else torch.randn_like(tensor) / 10
            least = 0.5 if name.endswith(("weight", "running_var")) else 0
            state[name] = spread / 2 + least
        elif name.endswith("bn3.weight"):
            state[name] = torch.rand_like(tensor)
    return {name: t.half().float() if t.is_floating_point() else t for name, t in state.items()}

# Parity -------------------------------------------------------------------------------------------
def transformers_model(sizes, activation="quick_gelu", vision_heads=None):
    """transformers' CLIPModel (ViT only) of these sizes, random."""
    from transformers import CLIPConfig, CLIPModel

    embed, resolution, layers, width, patch, context, vocabulary = sizes[:7]
    text_width, text_heads, text_layers = sizes[7:]
    common = {"hidden_act": activation, "projection_dim": embed}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(
        projection_dim=embed,
        text_config={
            "vocab_size": vocabulary, "hidden_size": text_width,
            "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers,
            "num_attention_heads": text_heads, "max_position_embeddings": context,
            "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, **common},
        vision_config={
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": vision_heads or width // 64, "image_size": resolution,
            "patch_size": patch, **common})).eval()

def features(model, images, tokens):
    """(image, text) features of a model of open_clip, transformers or this project."""
    if hasattr(model, "encode_image"):
        return model.encode_image(images), model.encode_text(tokens)
    outputs = (model.get_image_features(pixel_values=images),
               model.get_text_features(input_ids=tokens))
    return tuple(getattr(output, "pooler_output", output) for output in outputs)

@torch.no_grad()
def parity():
    print(f"torch {torch.__version__}, open_clip {open_clip.__version__}: "
          "largest relative difference of a feature")
    print(f"{'architecture':31}{'image':>9}{'text':>9}   against")
    for name, sizes in PUBLIC.items():
        state = random_state(sizes)
        clip = build_clip(state)
        images = torch.randn(2, 3, sizes[1], sizes[1])
        tokens = torch.randint(1, 49406, (4, 77))
        for row, end in enumerate((76, 5, 1, 40)):
            tokens[row, 0], tokens[row, end], tokens[row, end + 1 :] = 49406, 49407, 0
        pairs = {"open_clip": (clip, open_clip_model(state))}
        if isinstance(sizes[2], int) and importlib.util.find_spec("transformers"):
            model = transformers_model(sizes)
            model.load_state_dict({name: tensor + 0.02 * torch.randn_like(tensor)
                                   for name, tensor in model.state_dict().items()})
            ours = build_clip(clip_files.to_openai_layout(model.state_dict()))
            pairs["transformers"] = (ours, model)
        for other, models in pairs.items():
            found, expected = (features(model, images, tokens) for model in models)
            image, text = map(helpers.relative, found, expected)
            print(f"{name:31}{image:9.1e}{text:9.1e}   {other}", flush=True)

@torch.no_grad()
def golden(tokenizer_file):
    """What open_clip's towers and OpenAI's tokenizer give for the tests' inputs."""
    spec = importlib.util.spec_from_file_location("openai_tokenizer", tokenizer_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = {"tokenizer": tests.digest(module.SimpleTokenizer(), tests.strings(10000))}
    for kind in helpers.SMALL_CLIPS:
        model = open_clip_model(helpers.small_clip_state(kind))
        features = {"image": model.encode_image(tests.small_images(kind)),
                    "text": model.encode_text(helpers.small_tokens())}
        numbers[kind] = {key: [[round(value, 7) for value in row] for row in rows.tolist()]
                         for key, rows in features.items()}
    (ROOT / "tests/golden_clip.json").write_text(json.dumps(numbers))

def layouts():
    """{name: (model, its listing)}: small models as other programs write them."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    def of_open_clip(kind, vision, **more):
        config = {"embed_dim": 32, "vision_cfg": vision, **more,
                  "text_cfg": {"context_length": 12, "vocab_size": 514, "width": 128, "heads": 2,
                               "layers": 1}}
        towers = CLIPVisionCfg(**vision), CLIPTextCfg(**config["text_cfg"])
        return kind(32, *towers, **more).eval(), {"model_cfg": config}

    plain = {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32}
    huge = {"layers": 1, "width": 1280, "head_width": 80, "patch_size": 14, "image_size": 28}
    narrow = (32, 32, 2, 96, 8, 12, 514, 64, 4, 1)
    models = {"transformers": transformers_model(helpers.SMALL_CLIPS["vit"]),
              "transformers, GELU, other heads": transformers_model(narrow, "gelu", 3)}
    return {
        **{name: (model, json.loads(model.config.to_json_string())) for name, model in
           models.items()},
        "open_clip": of_open_clip(open_clip.CLIP, plain, quick_gelu=True),
        "open_clip, CustomTextCLIP": of_open_clip(open_clip.CustomTextCLIP, plain),
        "open_clip, ViT-H": of_open_clip(open_clip.CLIP, huge),
        "open_clip, ViT-g": of_open_clip(open_clip.CLIP, {
            **huge, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637})}

@torch.no_grad()
def golden_layouts():
    """What other programs' models give with their tensors filled by name, in their own layout."""
    numbers = {}
    for name, (model, listing) in layouts().items():
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        model.load_state_dict(helpers.filled(shapes))
        side = 28 if "ViT" in name else 32
        images = 4 * helpers.noise((3, 3, side, side), 1)
        found = features(model, images, helpers.small_tokens())
        rows = [[[round(value, 7) for value in row] for row in each.tolist()] for each in found]
        numbers[name] = {"listing": listing, "tensors": shapes, "image": rows[0], "text": rows[1]}
    (ROOT / "tests/golden_clip_layout.json").write_text(json.dumps(numbers))

# Speed --------------------------------------------------------------------------------------------
@torch.no_grad()
def speed(name, rounds, batch, bfloat16):
    """Best images/s of each side, and the median over the rounds of how much faster clip_model is.
    The sides take turns, so that a busy machine hits both."""
    models = {"clip_model": build_clip(random_state(PUBLIC[name]))}
    for suffix in ("", "-quickgelu"):  # GELU, another function, and CLIP's own QuickGELU
        theirs = name.replace("/", "-") + suffix
        models[f"open_clip {theirs}"] = open_clip.create_model(theirs).eval()
    images = torch.randn(batch, 3, 224, 224)
    seconds = {who: [] for who in models}
    order = list(models.items())
    for _ in range(rounds + 1):  # the first one warms up
        order = order[1:] + order[:1]  # no side is always the first
        for who, model in order:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                start = time.perf_counter()
                model.encode_image(images)
                seconds[who].append(time.perf_counter() - start)
    seconds = {who: torch.tensor(times[1:]) for who, times in seconds.items()}
    print(f"{name}: encode_image in {'bfloat16' if bfloat16 else 'float32'}, {rounds} rounds at "
          f"batch {batch}, load {os.getloadavg()[0]:.1f}")
    for who, times in seconds.items():
        ratio = (times / seconds["clip_model"]).median().item()
        rate = batch / times.min().item()
        print(f"{who:32}{rate:8.1f} images/s   clip_model / this: {ratio:.3f}", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--golden", metavar="FILE")
    parser.add_argument("--layouts", action="store_true")
    arguments = parser.parse_args()
    if open_clip is None:
        parser.error("this benchmark compares with open_clip: pip install open_clip_torch")
    if arguments.parity:
        parity()
    elif arguments.golden:
        golden(arguments.golden)
    elif arguments.layouts:
        golden_layouts()
    else:
        print(f"torch {torch.__version__}, open_clip {open_clip.__version__}, "
              f"{torch.get_num_threads()} threads")
        for name in ("ViT-B/32", "RN50"):
            speed(name, arguments.rounds, arguments.batch, arguments.bfloat16)

if __name__ == "__main__":
    main()
