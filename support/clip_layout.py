"""What a CLIP checkpoint is: its sizes, the config beside it, other programs' names of tensors.

    said = read_listing(path)                   # {"activation": "gelu", "vision_layers": 12, ...}
    state = to_openai_layout(tensors)           # of OpenAI, transformers or open_clip
    sizes = read_sizes(state)                   # {"vision_layers": 12, "vision_width": 768, ...}

Sizes bear the names of CLIP's arguments. Facts are those of openai/CLIP, transformers, open_clip.
"""

import json
import math

import torch

from support import files

# What the shapes say ------------------------------------------------------------------------------

ARCHIVE = {"input_resolution", "context_length", "vocab_size"}  # integers in OpenAI's archives


def read_sizes(state, said):
    """The sizes of a CLIP in OpenAI's layout, arguments of CLIP by name, from the tensors' shapes.
    Raises ValueError for an image tower of unknown kind, for a missing tensor, for patches or
    positions that are no square, and where a listing `said` otherwise."""
    def shape(name, dims):
        if name not in state or state[name].ndim != dims or 0 in state[name].shape:
            raise ValueError(f"no CLIP in OpenAI's layout: no {dims}-dimensional tensor {name!r}")
        return state[name].shape

    def count(prefix):  # of blocks; at least 1, so that load_state_dict names what is missing
        names = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
        return max(1, len({name.split(".")[0] for name in names}))

    def side(name):  # of the square of positions that stand behind the first one
        length = shape(name, 2)[0]
        if math.isqrt(length - 1) ** 2 != length - 1:
            raise ValueError(f"{name} has {length} positions; expected a square of them and one")
        return math.isqrt(length - 1)

    if "visual.proj" in state:
        vision_width, _, height, patch = shape("visual.conv1.weight", 4)
        if height != patch:
            raise ValueError(f"its patches have {height}x{patch} pixels; expected a square")
        vision_layers = count("visual.transformer.resblocks.")
        resolution = patch * side("visual.positional_embedding")
    elif "visual.layer1.0.conv1.weight" in state:
        vision_width, patch = shape("visual.layer1.0.conv1.weight", 4)[0], None
        vision_layers = [count(f"visual.layer{number}.") for number in (1, 2, 3, 4)]
        resolution = 32 * side("visual.attnpool.positional_embedding")
    else:
        raise ValueError("a vision tower of unknown kind: neither OpenAI's ViT ('visual.proj') nor "
                         "its ModifiedResNet")
    context_length, width = shape("positional_embedding", 2)
    sizes = {"vocab_size": shape("token_embedding.weight", 2)[0],
             "embed_dim": shape("text_projection", 2)[1],
             "vision_width": vision_width, "vision_layers": vision_layers,
             "vision_patch_size": patch, "image_resolution": resolution,
             "context_length": context_length, "transformer_width": width,
             "transformer_layers": count("transformer.resblocks.")}
    for name, size in sizes.items():
        if said.get(name, size) != size:
            raise ValueError(f"its tensors have {name} {size}, the config beside it says "
                             f"{said[name]}; one of the two is of another CLIP")
    return sizes


# What a listing says ------------------------------------------------------------------------------

ACTIVATIONS = ("quickgelu", "gelu")  # OpenAI's; that of most of open_clip's own
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of images
LISTINGS = {  # a snapshot's weights in order of choice, and what describes them
    "model.safetensors": "config.json",
    "open_clip_model.safetensors": "open_clip_config.json",
    "pytorch_model.bin": "config.json",
    "open_clip_pytorch_model.bin": "open_clip_config.json",
}
ARGUMENTS = {  # of CLIP: part of a listing; transformers' key and default; open_clip's
    "embed_dim": ("", "projection_dim", 512, "embed_dim", 512),
    "image_resolution": ("vision", "image_size", 224, "image_size", 224),
    "vision_layers": ("vision", "num_hidden_layers", 12, "layers", 12),
    "vision_width": ("vision", "hidden_size", 768, "width", 768),
    "vision_patch_size": ("vision", "patch_size", 32, "patch_size", 16),
    "vision_heads": ("vision", "num_attention_heads", 12, "head_width", 64),  # open_clip's: a width
    "context_length": ("text", "max_position_embeddings", 77, "context_length", 77),
    "vocab_size": ("text", "vocab_size", 49408, "vocab_size", 49408),
    "transformer_width": ("text", "hidden_size", 512, "width", 512),
    "transformer_heads": ("text", "num_attention_heads", 8, "heads", 8),
    "transformer_layers": ("text", "num_hidden_layers", 12, "layers", 12),
}
PLAIN = {  # what changes results and not the tensors, with the values that are read here
    "model_type": ("clip", "clip_vision_model", "clip_text_model"), "pool_type": ("tok", "argmax"),
    "hidden_act": ("quick_gelu", "gelu"), "act_kwargs": (), "norm_kwargs": (), "no_causal_mask": (),
    "layer_norm_eps": (1e-5,), "hf_tokenizer_name": (), "tokenizer_kwargs": (),
    "mean": (list(MEAN),), "std": (list(STD),), "image_mean": (list(MEAN),),
    "image_std": (list(STD),),
}
RESIZING = {"interpolation": "bicubic", "resize_mode": "shortest", "resample": 3}  # 3 is bicubic


def read_json(path):
    with files.undamaged(path, "expected a JSON object"):
        return dict(json.loads(files.read_text(path)))


def transformers_says(config):
    """A config.json -> (arguments of CLIP by name, the objects in which keys of PLAIN can be)."""
    parts = {"": config}
    for part in ("vision", "text"):  # older files have both, and then the second counts
        parts[part] = {**(config.get(f"{part}_config") or {}),
                       **(config.get(f"{part}_config_dict") or {})}
    said = {argument: parts[part].get(key, default)
            for argument, (part, key, default, _, _) in ARGUMENTS.items()}
    names = {parts[part].get("hidden_act", "quick_gelu") for part in ("vision", "text")}
    said["activation"] = " and ".join(sorted(names)).replace("quick_gelu", "quickgelu")
    return said, list(parts.values())


def open_clip_says(config):
    """An open_clip_config.json -> the same."""
    model = config["model_cfg"]
    parts = {"": model, "vision": model["vision_cfg"], "text": model["text_cfg"]}
    said = {argument: parts[part].get(key, default)
            for argument, (part, _, _, key, default) in ARGUMENTS.items()}
    said["vision_heads"] = said["vision_width"] // said["vision_heads"]
    if isinstance(said["vision_layers"], list):  # a ResNet
        said["vision_heads"] = said["vision_patch_size"] = None
    said["activation"] = "quickgelu" if model.get("quick_gelu") else "gelu"
    return said, [*parts.values(), config.get("preprocess_cfg") or {}]


def read_listing(path):
    """What the listing beside a snapshot's weights says of them: arguments of CLIP by name; {}
    where there is none. Raises ValueError, naming it, where it tells of another kind of network or
    of other images than OpenAI's CLIP takes."""
    listing = path.with_name(LISTINGS.get(path.name, path.name))
    if listing == path or not listing.is_file():
        return {}
    config = read_json(listing)
    with files.undamaged(listing, "expected what transformers or open_clip writes"):
        if listing.name == "config.json":
            said, parts = transformers_says(config)
            images = path.with_name("preprocessor_config.json")
            parts += [read_json(images)] if images.is_file() else []
        else:
            said, parts = open_clip_says(config)
        for name in ("vision_heads", "transformer_heads"):
            said[name] = said[name] and int(said[name])
        items = [item for part in parts for item in part.items() if item[1]]
    for key, value in items:
        if key in PLAIN and value not in PLAIN[key]:
            raise ValueError(f"{listing}: {key} is {value!r} there or beside it; expected "
                             f"{' or '.join(map(str, PLAIN[key])) or 'none'}, as in OpenAI's CLIP")
        if key in RESIZING and value != RESIZING[key]:
            files.note(f"{listing}: {key} is {value!r} there or beside it; images are resized as "
                       f"for OpenAI's CLIP, {RESIZING[key]}")
    return said


# Other programs' names of tensors -----------------------------------------------------------------

NAMES = (  # transformers' and OpenAI's
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),  # so spelt
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_projection.weight", "text_projection"),
    (".self_attn.", ".attn."), (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."),
)
MARK = "vision_model.embeddings.class_embedding"


def from_transformers(state):
    """transformers' state dict, behind any prefix -> OpenAI's names. Query, key and value, apart
    there, are one tensor here; both projections are transposed."""
    prefix = next(name for name in state if name.endswith(MARK)).removesuffix(MARK)
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix(prefix)
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        if not name.endswith("position_ids"):  # 0, 1, 2, ...
            renamed[name] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        apart = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
        if not all(part in renamed for part in apart):
            raise ValueError(f"one of {', '.join(apart)} is missing; expected all three")
        joined = torch.cat([renamed.pop(part) for part in apart])
        renamed[name.replace("q_proj.", "in_proj_")] = joined
    return renamed


def to_openai_layout(state):
    """A state dict of OpenAI, transformers or open_clip -> the same under OpenAI's names; `state`
    is left as it is. Raises ValueError for SigLIP, and where query, key and value are not three."""
    if any(name.endswith("logit_bias") for name in state):
        raise ValueError("a SigLIP (it has 'logit_bias'), whose scores are no softmax; expected a "
                         "CLIP; choose other weights")
    if any(name.endswith(MARK) for name in state):
        return from_transformers(state)
    if "text.token_embedding.weight" in state:  # open_clip's CustomTextCLIP
        return {name.removeprefix("text."): tensor for name, tensor in state.items()}
    return dict(state)


def find_activation(path, state, said, asked):
    """The activation of the weights of `path`, in OpenAI's layout: `asked`, else what a listing
    said or the layout tells, else QuickGELU. A guess and a contradiction are said."""
    bytes_alone = state.get("token_embedding.weight", torch.empty(0)).shape[:1] == (514,)
    known = said.get("activation")
    if not known and (state.keys() >= ARCHIVE or bytes_alone):  # OpenAI's; this program's own
        known = "quickgelu"
    if asked and known and asked != known:
        files.note(f"{path} has the activation {known}; {asked} is used, as asked")
    if not asked and not known:
        files.note(f"{path} does not say its activation: QuickGELU is assumed, OpenAI's; what "
                   "open_clip trained (LAION, DataComp) needs --clip-activation gelu, unless its "
                   "name ends in -quickgelu")
    activation = asked or known or "quickgelu"
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}; expected {' or '.join(ACTIVATIONS)}")
    return activation
