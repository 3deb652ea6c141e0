"""clip_layout.py: CLIP as other programs write it.

`golden_clip_layout.json` holds names and shapes of small models of transformers 5.24.0 and
open_clip_torch 3.3.0, what these programs say of them in a config, and what the models give with
their tensors `filled`; `python bench/bench_clip.py --layouts` wrote it.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
from test_clip_model import filled, noise, relative, small_state, small_tokens

from clip_model import build_clip, load_clip
from support import clip_layout, files

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests/golden_clip_layout.json").read_text())


def write_safetensors(path, state):
    header, blobs, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in state.items():
        blobs.append(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        dtype = {torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
        offsets = [end, end + len(blobs[-1])]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def write_snapshot(folder, kind, listing=None, suffix=".bin", change=None):
    """A folder as Hugging Face has it: weights and what describes them. -> the weights' path."""
    state = filled(GOLDEN[kind]["tensors"])
    if change:
        change(state)
    name = "pytorch_model.bin" if suffix == ".bin" else "model.safetensors"
    config = "config.json"
    if kind.startswith("open_clip"):
        name, config = f"open_clip_{name}", "open_clip_config.json"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / config).write_text(json.dumps(listing or GOLDEN[kind]["listing"]))
    if suffix == ".bin":
        torch.save(state, folder / name)
    else:
        write_safetensors(folder / name, state)
    return folder / name


def changed(kind, **changes):
    """The listing of a golden model with other values; `vision__layers` is that of "vision..."."""
    listing = json.loads(json.dumps(GOLDEN[kind]["listing"]))
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        place = listing.get("model_cfg", listing)
        if part == "preprocess":
            place = listing.setdefault("preprocess_cfg", {})
        elif part:
            place = place[f"{part}_config" if f"{part}_config" in place else f"{part}_cfg"]
        place[key] = value
    return listing


def said():
    lines = sorted(files.note.said)
    files.note.said.clear()
    return lines


# Outputs ------------------------------------------------------------------------------------------


@torch.no_grad()
def assert_golden(clip, kind):
    side = clip.visual.input_resolution
    image = clip.encode_image(4 * noise((3, 3, side, side), 1))
    assert relative(image, GOLDEN[kind]["image"]) < 1e-5
    assert relative(clip.encode_text(small_tokens()), GOLDEN[kind]["text"]) < 1e-5


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("kind", [kind for kind in GOLDEN if "ViT" not in kind])
def test_load_clip_of_a_snapshot_equals_the_program_that_wrote_it(kind, suffix, tmp_path):
    """Layouts, activations, heads of 16, 32 and 64 numbers: nothing has to be guessed."""
    said()
    write_snapshot(tmp_path / "snapshot", kind, suffix=suffix)
    assert_golden(load_clip(tmp_path / "snapshot"), kind)
    assert not said()


@pytest.mark.parametrize("kind", ["open_clip, ViT-H", "open_clip, ViT-g"])
def test_build_clip_knows_the_heads_of_the_giants(kind, tmp_path):
    """Heads of 80 and 88, without a listing as with one."""
    assert_golden(build_clip(filled(GOLDEN[kind]["tensors"]), {"activation": "gelu"}), kind)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(GOLDEN[kind]["listing"]))
    found = clip_layout.read_listing(tmp_path / "open_clip_pytorch_model.bin")
    assert (found["vision_heads"], found["activation"]) == (16, "gelu")


def test_to_openai_layout_keeps_every_tensor():
    """Prefixed, with position_ids, in float16; what comes out is OpenAI's names and no others."""
    state = filled(GOLDEN["transformers"]["tensors"])
    expected = clip_layout.to_openai_layout(state)
    prefixed = {f"clip.{name}": tensor.half() for name, tensor in state.items()}
    prefixed["clip.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    before = list(prefixed)
    found = clip_layout.to_openai_layout(prefixed)
    assert list(prefixed) == before and found.keys() == expected.keys() == small_state("vit").keys()
    assert all(torch.equal(found[name].float(), expected[name]) for name in found)
    own = small_state("resnet")
    assert clip_layout.to_openai_layout(own).keys() == own.keys()


# Activation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked, kind", [(None, "open_clip"), ("quickgelu", "open_clip"),
                                         ("gelu", "open_clip, CustomTextCLIP")])
def test_load_clip_of_a_bare_file_assumes_quickgelu_or_is_told(asked, kind, tmp_path):
    state = filled(GOLDEN[kind]["tensors"])
    for name in [name for name in state if name.endswith("token_embedding.weight")]:
        state[name] = torch.cat([state[name], torch.zeros(86, 128)])  # no vocabulary of bytes
    torch.save(state, tmp_path / "clip.pt")
    said()
    assert_golden(load_clip(tmp_path / "clip.pt", activation=asked), kind)
    lines = said()
    assert len(lines) == (asked is None)
    assert not lines or ("clip.pt does not say its activation: QuickGELU is assumed" in lines[0]
                         and "--clip-activation gelu" in lines[0])


def test_find_activation_of_openai_and_of_this_program():
    said()
    archive = {name: None for name in (*clip_layout.ARCHIVE, "visual.proj")}
    archive["token_embedding.weight"] = torch.zeros(49408, 1)
    for state in (archive, small_state("vit"), small_state("resnet")):
        assert clip_layout.find_activation("clip.pt", state, {}, None) == "quickgelu"
    assert clip_layout.find_activation("x", {}, {"activation": "gelu"}, None) == "gelu"
    assert clip_layout.find_activation("x", archive, {"activation": "gelu"}, "gelu") == "gelu"
    assert not said()
    assert clip_layout.find_activation("x", archive, {}, "gelu") == "gelu"
    assert said() == ["x has the activation quickgelu; gelu is used, as asked"]
    with pytest.raises(ValueError, match="activation 'relu'; expected quickgelu or gelu"):
        clip_layout.find_activation("x", {}, {}, "relu")


# Refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, changes, message", [
    ("transformers", {"vision__num_hidden_layers": 3}, "have vision_layers 2, .* beside it says 3"),
    ("transformers", {"text__num_hidden_layers": 1}, "have transformer_layers 2, .* says 1"),
    ("transformers", {"projection_dim": 64}, "have embed_dim 32, the config beside it says 64"),
    ("transformers", {"vision__patch_size": 16}, "have vision_patch_size 8, .* says 16"),
    ("transformers", {"vision__image_size": 64}, "have image_resolution 32, .* says 64"),
    ("transformers", {"vision__num_attention_heads": 3}, "128 does not divide into 3 heads"),
    ("transformers", {"text__hidden_act": "gelu"}, "activation 'gelu and quickgelu'; expected"),
    ("transformers", {"text__hidden_act": "gelu_new"}, "config.json: hidden_act is 'gelu_new'"),
    ("transformers", {"vision__layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
    ("transformers", {"model_type": "siglip"}, "model_type is 'siglip'"),
    ("transformers", {"vision__num_attention_heads": "x"}, "config.json is damaged"),
    ("open_clip", {"vision__layers": 4}, "have vision_layers 2, the config beside it says 4"),
    ("open_clip", {"text__width": 256}, "have transformer_width 128, .* says 256"),
    ("open_clip", {"vision__head_width": 100, "vision__width": 128, "text__heads": 3},
     "128 does not divide into 3 heads"),
    ("open_clip", {"vision__pool_type": "avg"}, "pool_type is 'avg'"),
    ("open_clip", {"text__no_causal_mask": True}, "no_causal_mask is True there .* expected none"),
    ("open_clip", {"text__hf_tokenizer_name": "bert"}, "hf_tokenizer_name is 'bert'"),
    ("open_clip", {"preprocess__mean": [0.5, 0.5, 0.5]}, "mean is .0.5, 0.5, 0.5. .*0.48145466"),
])
def test_load_clip_refuses_two_listings_that_differ(kind, changes, message, tmp_path):
    write_snapshot(tmp_path, kind, changed(kind, **changes))
    with pytest.raises(ValueError, match=message) as error:
        load_clip(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_read_listing_defaults_and_neighbours(tmp_path):
    """transformers' defaults where config.json is silent; the images' mean in a file of its own;
    resizing is said, not refused; a file with a name of its own has no listing."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "clip", "text_config": None, "vision_config": {"num_attention_heads": 16},
        "vision_config_dict": {"num_attention_heads": 6, "hidden_act": "quick_gelu"}}))
    found = clip_layout.read_listing(weights)
    assert found == {"embed_dim": 512, "image_resolution": 224, "vision_layers": 12,
                     "vision_width": 768, "vision_patch_size": 32, "vision_heads": 6,
                     "context_length": 77, "vocab_size": 49408, "transformer_width": 512,
                     "transformer_heads": 8, "transformer_layers": 12, "activation": "quickgelu"}
    assert clip_layout.read_listing(tmp_path / "clip.safetensors") == {}
    assert clip_layout.read_listing(tmp_path / "open_clip_model.safetensors") == {}
    said()
    images = tmp_path / "preprocessor_config.json"
    images.write_text(json.dumps({"image_mean": list(clip_layout.MEAN), "resample": 2}))
    assert clip_layout.read_listing(weights) == found
    assert [line.partition(": ")[2] for line in said()] == [
        "resample is 2 there or beside it; images are resized as for OpenAI's CLIP, 3"]
    images.write_text(json.dumps({"image_std": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match="image_std is .*; expected .0.26862954"):
        clip_layout.read_listing(weights)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json is damaged; expected a JSON object"):
        clip_layout.read_listing(weights)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", '{"model_cfg": []}', '{"model_cfg": {}}',
    '{"model_cfg": {"vision_cfg": {"head_width": 0}, "text_cfg": {}}}',
    '{"model_cfg": {"vision_cfg": {}, "text_cfg": {"heads": [8]}}}',
    '{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": [1]}', "[" * 100_000])
def test_read_listing_of_damage_is_one_line(text, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(ValueError, match="open_clip_config.json is damaged; expected") as error:
        clip_layout.read_listing(tmp_path / "open_clip_model.safetensors")
    assert "\n" not in str(error.value)


def test_read_listing_of_a_resnet(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {
        "embed_dim": 1024, "quick_gelu": True, "text_cfg": {},
        "vision_cfg": {"layers": [3, 4, 6, 3], "width": 64, "patch_size": None}}}))
    found = clip_layout.read_listing(tmp_path / "open_clip_pytorch_model.bin")
    assert found["vision_layers"] == [3, 4, 6, 3] and found["vision_heads"] is None
    assert (found["vision_patch_size"], found["activation"]) == (None, "quickgelu")


def remove(*names):
    def change(state):
        for name in names:
            del state[name]
    return change


@pytest.mark.parametrize("kind, change, message", [
    ("transformers", remove("vision_model.encoder.layers.1.self_attn.k_proj.bias"),
     "one of .*visual.transformer.resblocks.1.attn.k_proj.bias, .* is missing"),
    ("transformers", remove("vision_model.pre_layrnorm.weight"), 'Missing.*"visual.ln_pre.weight"'),
    ("transformers", remove("visual_projection.weight"), "vision tower of unknown kind"),
    ("transformers", remove("text_model.embeddings.position_embedding.weight"),
     "no 2-dimensional tensor 'positional_embedding'"),
    ("transformers", lambda s: s.update({"vision_model.head.bias": torch.zeros(2)}), "Unexpected"),
    ("transformers", lambda s: s.update({"logit_bias": torch.zeros(1)}), "a SigLIP .*'logit_bias'"),
    ("open_clip, CustomTextCLIP", lambda s: s.update(logit_bias=torch.zeros(1)), "a SigLIP"),
    ("open_clip", remove("visual.ln_pre.weight", "visual.ln_pre.bias"), 'Missing.*"visual.ln_pre.'),
    ("open_clip", lambda s: s.update({"transformer.resblocks.0.ls_1.gamma": torch.ones(128)}),
     'Unexpected.*"transformer.resblocks.0.ls_1.gamma"'),
    ("open_clip", lambda s: s.update({"visual.positional_embedding": torch.zeros(16, 128)}),
     "visual.positional_embedding has 16 positions; expected a square"),
    ("open_clip", lambda s: s.update({"visual.conv1.weight": torch.zeros(128, 3, 8, 16)}),
     "patches have 8x16 pixels; expected a square"),
])
def test_load_clip_names_what_is_no_clip(kind, change, message, tmp_path):
    path = write_snapshot(tmp_path, kind, change=change)
    with pytest.raises(ValueError, match=message) as error:
        load_clip(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")


def test_read_sizes_refuses_a_resnet_whose_positions_are_no_square():
    state = small_state("resnet")
    name = "visual.attnpool.positional_embedding"
    state[name] = state[name][:4]
    with pytest.raises(ValueError, match=f"{name} has 4 positions"):
        build_clip(state)


@pytest.mark.parametrize("tower, width", [("vision", 96), ("text", 96), ("vision", 1320)])
def test_build_clip_refuses_a_width_that_heads_do_not_divide(tower, width):
    """Named by its number, where nothing says how many heads there are."""
    shapes = {"visual.conv1.weight": (width if tower == "vision" else 128, 3, 8, 8),
              "visual.proj": (1, 1), "visual.positional_embedding": (17, 1),
              "positional_embedding": (12, width if tower == "text" else 128),
              "token_embedding.weight": (514, 1), "text_projection": (1, 32)}
    with pytest.raises(ValueError, match=f"a width of {width} does not divide into heads of 64"):
        build_clip({name: torch.zeros(shape) for name, shape in shapes.items()})
