"""clip_model.py beside open_clip: speed, parity on the nine public architectures, and the tests' golden numbers.

    python tests/bench_clip.py             images/s of encode_image at ViT-B/32, and the ratios (some minutes)
    python tests/bench_clip.py --parity    largest relative difference, architecture x encoder (also transformers)
    python tests/bench_clip.py --golden    rewrite tests/golden_clip.json (also needs openai-clip's tokenizer)

Needs open_clip_torch, which the project itself does not use. Weights are random; nothing is downloaded.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_clip_model as tests  # noqa: E402
from clip_model import CLIP, Tokenizer, build_clip  # noqa: E402

try:
    import open_clip
except ImportError:
    sys.exit("error: this benchmark compares with open_clip: pip install open_clip_torch")

PUBLIC = {  # embed_dim, resolution, layers, width, patch, context, vocabulary, text width, heads, layers
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 77, 49408, 640, 10, 12),
    "RN50x16 (fewer layers)": (768, 384, (2, 2, 2, 2), 96, None, 77, 49408, 768, 12, 4),
    "RN50x64 (fewer layers)": (1024, 448, (1, 2, 2, 1), 128, None, 77, 49408, 1024, 16, 4),
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "ViT-L/14 (fewer layers)": (768, 224, 6, 1024, 14, 77, 49408, 768, 12, 6),
    "ViT-L/14@336px (fewer layers)": (768, 336, 4, 1024, 14, 77, 49408, 768, 12, 4),
}


def reference(state):
    """open_clip's model with these weights. It keeps them in float16 on the way: they must be exact there."""
    return open_clip.model.build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32).float().eval()


def random_state(sizes, seed=0):
    """A state dict of these sizes, all tensors random, exact in float16."""
    torch.manual_seed(seed)
    state = CLIP(*sizes).state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 1:
            spread = torch.rand_like(tensor) if "bn" in name or "downsample" in name else torch.randn_like(tensor) / 10
            state[name] = spread / 2 + (0.5 if name.endswith(("weight", "running_var")) else 0)
        elif name.endswith("bn3.weight"):
            state[name] = torch.rand_like(tensor)
    return {name: t.half().float() if t.is_floating_point() else t for name, t in state.items()}


def transformers_model(state, sizes):
    """transformers' CLIPModel (ViT only) with the same weights."""
    from transformers import CLIPConfig, CLIPModel

    embed, resolution, layers, width, patch, context, vocabulary, text_width, heads, text_layers = sizes
    common = {"hidden_act": "quick_gelu", "projection_dim": embed}
    model = CLIPModel(CLIPConfig(
        projection_dim=embed,
        text_config={"vocab_size": vocabulary, "hidden_size": text_width, "intermediate_size": 4 * text_width,
                     "num_hidden_layers": text_layers, "num_attention_heads": heads, "eos_token_id": vocabulary - 1,
                     "max_position_embeddings": context, **common},
        vision_config={"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                       "num_attention_heads": width // 64, "image_size": resolution, "patch_size": patch, **common}))
    names = {"visual.class_embedding": "vision_model.embeddings.class_embedding",
             "visual.conv1.": "vision_model.embeddings.patch_embedding.",
             "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
             "visual.ln_pre.": "vision_model.pre_layrnorm.", "visual.ln_post.": "vision_model.post_layernorm.",
             "visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight",
             "visual.transformer.resblocks.": "vision_model.encoder.layers.",
             "transformer.resblocks.": "text_model.encoder.layers.", "ln_final.": "text_model.final_layer_norm.",
             "token_embedding.": "text_model.embeddings.token_embedding.",
             "positional_embedding": "text_model.embeddings.position_embedding.weight", "logit_scale": "logit_scale"}
    inner = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    mapped = {}
    for key, tensor in state.items():
        ours, theirs = next(pair for pair in names.items() if key.startswith(pair[0]))
        rest = key.removeprefix(ours)
        for old, new in inner.items():
            rest = rest.replace(old, new)
        if "in_proj" in rest:
            for letter, part in zip("qkv", tensor.chunk(3)):
                mapped[theirs + rest.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part
        else:
            mapped[theirs + rest] = tensor.T if key in ("visual.proj", "text_projection") else tensor
    missing = model.load_state_dict(mapped, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in key for key in missing.missing_keys), missing
    return model.eval()


@torch.no_grad()
def parity():
    print(f"torch {torch.__version__}, open_clip {open_clip.__version__}: largest relative difference of a feature\n"
          f"{'architecture':31}{'image':>9}{'text':>9}   against")
    for name, sizes in PUBLIC.items():
        state = random_state(sizes)
        clip = build_clip(state)
        images = torch.randn(2, 3, sizes[1], sizes[1])
        tokens = torch.randint(1, 49406, (4, 77))
        for row, end in enumerate((76, 5, 1, 40)):
            tokens[row, 0], tokens[row, end], tokens[row, end + 1 :] = 49406, 49407, 0
        found = clip.encode_image(images), clip.encode_text(tokens)
        model = reference(state)
        pairs = [("open_clip", (model.encode_image(images), model.encode_text(tokens)))]
        if isinstance(sizes[2], int) and importlib.util.find_spec("transformers"):
            model = transformers_model(state, sizes)
            outputs = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=tokens)
            pairs.append(("transformers", [getattr(output, "pooler_output", output) for output in outputs]))
        for other, expected in pairs:
            image, text = (tests.relative(*pair) for pair in zip(found, expected))
            print(f"{name:31}{image:9.1e}{text:9.1e}   {other}", flush=True)


@torch.no_grad()
def golden(openai_tokenizer):
    """What open_clip's towers and OpenAI's tokenizer give for the tests' inputs. The tokenizer is a file's path."""
    spec = importlib.util.spec_from_file_location("openai_tokenizer", openai_tokenizer)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = {"tokenizer": tests.digest(module.SimpleTokenizer(), tests.strings(10000))}
    for kind, sizes in tests.SMALL.items():
        model = reference(tests.small_state(kind))
        images = 4 * tests.noise((3, 3, sizes[1], sizes[1]), 1)
        tokens = Tokenizer()(tests.TEXTS, 12, truncate=True)
        features = {"image": model.encode_image(images), "text": model.encode_text(tokens)}
        numbers[kind] = {key: [[round(value, 7) for value in row] for row in rows.tolist()]
                         for key, rows in features.items()}
    (ROOT / "tests/golden_clip.json").write_text(json.dumps(numbers))


@torch.no_grad()
def speed(rounds=5, batches=(16, 32)):
    """Best images/s of each side; the sides take turns, so that a busy machine hits both."""
    clip = build_clip(random_state(PUBLIC["ViT-B/32"]))
    models = {"clip_model": clip}
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):  # GELU (faster, another function) and CLIP's QuickGELU
        models[f"open_clip {name}"] = open_clip.create_model(name).eval()
    best = {}
    for batch in batches:
        images = torch.randn(batch, 3, 224, 224)
        for _ in range(rounds):
            for name, model in models.items():
                for dtype in ("float32", "bfloat16 autocast"):
                    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
                        start = time.perf_counter()
                        model.encode_image(images)
                        rate = batch / (time.perf_counter() - start)
                    best[name, dtype] = max(best.get((name, dtype), 0), rate)
    print(f"torch {torch.__version__}, open_clip {open_clip.__version__}, {torch.get_num_threads()} threads, "
          f"load {os.getloadavg()[0]:.1f}; encode_image, ViT-B/32, best of {rounds} rounds at batches {batches}")
    for (name, dtype), rate in best.items():
        print(f"{name:30}{dtype:20}{rate:7.1f} images/s")
    theirs = {dtype: max(rate for (name, d), rate in best.items() if d == dtype and name != "clip_model")
              for _, dtype in best}
    for ours, other in (("float32", "float32"), ("bfloat16 autocast", "float32"),
                        ("bfloat16 autocast", "bfloat16 autocast")):
        print(f"clip_model {ours} / open_clip's best in {other}: {best['clip_model', ours] / theirs[other]:.2f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--parity"]:
        parity()
    elif sys.argv[1:2] == ["--golden"] and len(sys.argv) == 3:
        golden(sys.argv[2])
    elif not sys.argv[1:]:
        speed()
    else:
        sys.exit("error: no option, --parity, or --golden PATH of openai-clip's simple_tokenizer.py; see the docstring")
