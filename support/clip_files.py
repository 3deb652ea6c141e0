"""CLIP's public files: which one a name means, what is known of it, its tensors in one layout.

    path, tensors, said = load("ViT-L/14")  # or a file, a folder, "openai/clip-vit-large-patch14"

The layout is OpenAI's; said are arguments of CLIP by name: what the tensors' shapes do not tell
(heads, activation), and some sizes. Facts are those of openai/CLIP, transformers and open_clip."""

import json
import os
import torch
from pathlib import Path
from support import checkpoints, files

HOST = "https://openaipublic.blob.core.windows.net/clip"  # the one in OpenAI's code is dead
PUBLIC_CLIPS = {  # name: MB and SHA-256 of OpenAI's archive (openai/CLIP, clip/clip.py)
    "RN50": (244, "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": (278, "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": (402, "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": (630, "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": (1260, "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": (338, "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": (335, "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": (890, "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": (891, "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02")}
MIRRORS = (  # the same weights on Hugging Face: name, repository, revision, file, SHA-256
    ("ViT-L/14", "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41",
     "model.safetensors", "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"),
    ("ViT-B/32", "timm/vit_base_patch32_clip_224.openai",
     "a6f597a30f7b82c51704746581f9a4e41421e878", "open_clip_model.safetensors",
     "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31"))

def fetch_bpe(cache_dir=None):
    """The path of the public BPE file, downloaded where it is absent. Raises as `files.fetch`."""
    file = "bpe_simple_vocab_16e6.txt.gz"
    urls = [f"https://raw.githubusercontent.com/openai/CLIP/main/clip/{file}", f"{HOST}/{file}"]
    digest = "sha256:924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    return files.fetch(urls, files.cache_folder(cache_dir) / file, digest, "pass --bpe PATH")

WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin",
           "open_clip_pytorch_model.bin")  # of a folder as Hugging Face has it, in order of choice
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # of images
PLAIN = {  # what changes results and not the tensors, with the values that are read here
    "model_type": ("clip", "clip_vision_model", "clip_text_model"), "pool_type": ("tok", "argmax"),
    "hidden_act": ("quick_gelu", "gelu"), "act_kwargs": (), "norm_kwargs": (), "no_causal_mask": (),
    "layer_norm_eps": (1e-5,), "hf_tokenizer_name": (), "tokenizer_kwargs": (),
    "mean": (MEAN,), "std": (STD,), "image_mean": (MEAN,), "image_std": (STD,)}

def read_listing(path):
    """What the config beside weights named as in WEIGHTS says of them: arguments of CLIP by name,
    or {}. Raises ValueError where it tells of another kind of network, or of other images."""
    open_clips = path.name.startswith("open_clip")
    listing = path.with_name("open_clip_config.json" if open_clips else "config.json")
    if path.name not in WEIGHTS or not listing.is_file():
        return {}
    with files.undamaged(listing, "expected what transformers or open_clip writes"):
        config = json.loads(files.read_text(listing))
        if open_clips:
            images, config = config.get("preprocess_cfg") or {}, config["model_cfg"]
            vision, text = config["vision_cfg"], config["text_cfg"]
            vision["heads"] = vision.get("width", 768) // vision.get("head_width", 64)
            width, layers, heads = "width", "layers", "heads"
            activation = "quickgelu" if config.get("quick_gelu") else "gelu"
        else:
            beside = path.with_name("preprocessor_config.json")
            images = json.loads(files.read_text(beside)) if beside.is_file() else {}
            vision, text = ({**(config.get(f"{tower}_config") or {}),  # older files have both
                             **(config.get(f"{tower}_config_dict") or {})}
                            for tower in ("vision", "text"))
            width, layers, heads = "hidden_size", "num_hidden_layers", "num_attention_heads"
            names = {tower.get("hidden_act", "quick_gelu") for tower in (vision, text)}
            activation = " and ".join(sorted(names)).replace("quick_gelu", "quickgelu")
        said = {"vision_width": vision.get(width, 768), "vision_layers": vision.get(layers, 12),
                "vision_heads": vision.get(heads, 12), "transformer_width": text.get(width, 512),
                "transformer_layers": text.get(layers, 12), "activation": activation,
                "transformer_heads": text.get(heads, 8)}  # these are both programs' defaults
        items = [item for part in (config, vision, text, images) for item in part.items()]
    for key, value in items:
        if value and value not in PLAIN.get(key, [value]):
            raise ValueError(f"{listing}: {key} is {value!r}, expected {PLAIN[key]}, as OpenAI's")
    return said

NAMES = (  # parts of transformers' names, and what OpenAI's have
    ("vision_model.", "visual."), ("text_model.", ""), ("embeddings.", ""),
    ("patch_embedding.", "conv1."), ("position_embedding.weight", "positional_embedding"),
    ("pre_layrnorm.", "ln_pre."), ("post_layernorm.", "ln_post."),  # the former so spelt
    ("encoder.layers.", "transformer.resblocks."), ("self_attn.", "attn."),
    ("layer_norm1.", "ln_1."), ("layer_norm2.", "ln_2."), ("final_layer_norm.", "ln_final."),
    ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."),
    ("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection"))

def to_openai_layout(state):
    """A state dict of OpenAI, transformers (behind any prefix) or open_clip (whose CustomTextCLIP
    has "text.") under OpenAI's names. Query, key and value are joined; too short if one lacks."""
    mark = "vision_model.embeddings.class_embedding"
    prefix = next((name.removesuffix(mark) for name in state if name.endswith(mark)), "text.")
    renamed = {}
    for theirs, tensor in state.items():
        name = theirs.removeprefix(prefix)
        for part, ours in NAMES:
            name = name.replace(part, ours)
        name = f"{theirs}, another {name}" if name in renamed else name  # which no CLIP has
        if not name.endswith("position_ids"):  # 0, 1, 2, ...
            renamed[name] = tensor.T if theirs.endswith("_projection.weight") else tensor
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{x}_proj"), torch.empty(0)) for x in "qkv"]
        renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return renamed

def find(name, cache_dir=None):
    """-> (path of the weights, what is said of them: arguments of CLIP by name). name: one of
    PUBLIC_CLIPS, a file, a folder that holds one of WEIGHTS, or a name on Hugging Face: from its
    programs' cache, else downloaded to ours where the digest is known. Raises FileNotFoundError."""
    path = Path(name)
    if name in PUBLIC_CLIPS or not path.exists():
        home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
        hub = os.path.expanduser(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")
        path = Path(hub, f"models--{name.replace('/', '--')}")
        newest = path / "refs" / "main"  # a file with the name of a snapshot
        path = path / "snapshots" / (newest.read_text().strip() if newest.is_file() else "")
    for weights in (path, *(path / file for file in WEIGHTS)):
        if weights.is_file():
            return weights, read_listing(weights)
    folder, own = files.cache_folder(cache_dir), name.replace("/", "-").replace("@", "-") + ".pt"
    known = [(folder / own, f"{HOST}/models/{digest}/{own}", digest)
             for public, (_, digest) in PUBLIC_CLIPS.items() if public == name]
    known += [(folder / f"{repository.split('/')[1]}.safetensors",
               f"https://huggingface.co/{repository}/resolve/{revision}/{file}", digest)
              for public, repository, revision, file, digest in MIRRORS
              if name in (public, repository)]
    message = (f"{name!r} is no file, no folder with one of {WEIGHTS}, no "
               f"{', '.join(PUBLIC_CLIPS)}, nor of `hf download`'s")
    for path, url, digest in sorted(known, key=lambda one: not one[0].exists()):
        try:
            files.fetch([url], path, f"sha256:{digest}", "pass --clip FILE")
            return path, {"activation": "quickgelu"}  # OpenAI's, by their digest
        except FileNotFoundError as error:
            size = f" ({PUBLIC_CLIPS[name][0]} MB)" if name in PUBLIC_CLIPS else ""
            message = (f"could not download CLIP {name}{size}: {error.__cause__}; put "
                       f"{known[0][1]} at {known[0][0]}, or pass --clip FILE")
    raise FileNotFoundError(message)

def load(name_or_path, cache_dir=None, activation=None):
    """As `find`, with tensors in OpenAI's layout between. The activation is the one asked for, else
    the listing's or layout's, else QuickGELU; a guess and a contradiction are said."""
    path, said = find(str(name_or_path), cache_dir)
    tensors = to_openai_layout(checkpoints.read_state_dict(path))
    known = said.get("activation", "quickgelu" if "input_resolution" in tensors else None)
    if activation and known not in (None, activation):
        files.note(f"{path} has the activation {known}; {activation} is used, as asked")
    if not activation and not known:
        files.note(f"{path.name}: QuickGELU assumed; most of open_clip need --clip-activation gelu")
    return path, tensors, {**said, "activation": activation or known or "quickgelu"}
