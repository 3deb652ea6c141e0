"""clip_files.py: which file a name means, what lies beside it, CLIP as other programs write it.

`golden_clip_layout.json` holds names and shapes of small models of transformers 5.24.0 and
open_clip_torch 3.3.0, what these programs say of them in a config, and what the models give with
their tensors `filled`; `python bench/bench_clip.py --layouts` wrote it."""

import clip_model
import hashlib
import json
import pytest
import torch
from clip_model import build_clip, load_clip
from helpers import assert_golden, filled, refused, safetensors, small_clip_state, web_server
from pathlib import Path
from support import clip_files, files

GOLDEN = json.loads(Path(__file__).with_name("golden_clip_layout.json").read_text())
L14 = "openai/clip-vit-large-patch14"

@pytest.fixture(autouse=True)
def no_other_cache(monkeypatch, tmp_path):
    """A home without Hugging Face's cache."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

@pytest.fixture
def attempts(monkeypatch):
    """(address, path, digest) of each file that files.fetch is asked for; it has nothing."""
    made = []
    def fetch(urls, path, digest, advice):
        made.extend((url, path, digest) for url in urls)
        raise FileNotFoundError(f"could not download {urls} to {path}; {advice}") from OSError("no")
    monkeypatch.setattr(files, "fetch", fetch)
    return made

def write_snapshot(folder, kind, listing=None, **tensors):
    """A folder as Hugging Face has it: weights, some with other `tensors` (None: without), and what
    describes them. -> the weights' path."""
    state = {**filled(GOLDEN[kind]["tensors"]), **tensors}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    program = "open_clip_" * kind.startswith("open_clip")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{program}config.json").write_text(json.dumps(listing or GOLDEN[kind]["listing"]))
    torch.save(state, folder / f"{program}pytorch_model.bin")
    return folder / f"{program}pytorch_model.bin"

def test_find_of_public_names_leads_to_openai_then_to_hugging_face(attempts, tmp_path):
    for name in (*clip_files.PUBLIC_CLIPS, L14):
        message = refused(clip_files.find, name, tmp_path)
        assert "pass --clip FILE" in message and message.count("https://") == 1
    assert "--bpe" in refused(clip_files.fetch_bpe, tmp_path)
    urls, paths, digests = zip(*attempts)
    assert [path.relative_to(tmp_path).name for path in paths[5:]] == [
        "ViT-B-32.pt", "vit_base_patch32_clip_224.openai.safetensors", "ViT-B-16.pt",
        "ViT-L-14.pt", "clip-vit-large-patch14.safetensors", "ViT-L-14-336px.pt",
        "clip-vit-large-patch14.safetensors", *["bpe_simple_vocab_16e6.txt.gz"] * 2]
    assert urls[0].endswith(f"blob.core.windows.net/clip/models/{digests[0][7:]}/RN50.pt")
    assert urls[9] == urls[11] == (f"https://huggingface.co/{L14}/resolve/"
                                   "32bd64288804d66eefd0ccbe215aa642df71cc41/model.safetensors")
    assert all(digest.startswith("sha256:") and len(digest) == 7 + 64 for digest in digests)

def test_find_takes_what_is_in_the_cache_first(attempts, monkeypatch, tmp_path):
    there = tmp_path / "clip-vit-large-patch14.safetensors"
    there.write_bytes(b"weights")
    monkeypatch.setattr(files, "fetch",
                        lambda urls, path, digest, advice: attempts.append(path) or path)
    for name in ("ViT-L/14", L14):
        assert clip_files.find(name, tmp_path) == (there, {"activation": "quickgelu"})
    assert attempts == [there, there]  # whose digest is checked

def test_load_clip_downloads_from_the_mirror_whole(monkeypatch, tmp_path, capsys):
    """OpenAI's host has nothing; at $HF_ENDPOINT lie the weights in transformers' layout. They are
    OpenAI's by their digest: no activation is guessed."""
    content = safetensors(filled(GOLDEN["transformers"]["tensors"]))
    monkeypatch.setattr(clip_files, "MIRRORS", (
        ("ViT-L/14", L14, "abc", "model.safetensors", hashlib.sha256(content).hexdigest()),))
    with web_server(content) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/good")
        monkeypatch.setattr(clip_files, "HOST", f"{server.url}/clip")
        clip = load_clip("ViT-L/14", tmp_path / "cache")
        assert server.asked[-1] == f"/good/{L14}/resolve/abc/model.safetensors"
    assert_golden(clip, GOLDEN["transformers"])
    assert "activation" not in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [
        "clip-vit-large-patch14.safetensors"]

def test_find_takes_a_folders_files_in_order(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert str(tmp_path) in refused(clip_files.find, str(tmp_path))
    for name in reversed(clip_files.WEIGHTS):
        (tmp_path / name).write_bytes(b"")
        assert clip_files.find(str(tmp_path)) == (tmp_path / name, {})

def snapshot_in(hub, repository, revision="0123abcd"):
    """The layout of huggingface_hub: snapshots link to blobs, refs/main names one of them."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    weights = write_snapshot(folder / "snapshots" / revision, "transformers")
    for part in ("blobs", "refs"):
        (folder / part).mkdir(exist_ok=True)
    weights.symlink_to(weights.rename(folder / "blobs" / revision))
    (folder / "refs" / "main").write_text(revision)
    return weights

@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", None])
def test_load_clip_finds_a_snapshot_in_the_hugging_face_cache(variable, monkeypatch, tmp_path):
    hub = tmp_path / "home/.cache/huggingface/hub"
    if variable:
        hub = tmp_path / "elsewhere" / ("hub" if variable == "HF_HOME" else "")
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    snapshot_in(hub, "org/other")
    snapshot_in(hub, L14, revision="old")
    weights = snapshot_in(hub, L14, revision="new")
    path, said = clip_files.find(L14)
    assert path == weights and said["vision_layers"] == 2
    assert_golden(load_clip(L14), GOLDEN["transformers"])

def test_find_without_a_file_and_of_a_snapshot_without_weights(attempts, tmp_path):
    """As who has loaded a tokenizer alone has it, or has deleted the blob."""
    hub = tmp_path / "home/.cache/huggingface/hub"
    snapshot_in(hub, L14).resolve().unlink()
    assert "could not download" in refused(clip_files.find, L14, tmp_path)
    snapshot_in(hub, "org/name").unlink()
    for name in ("org/name", "ViT-B/33", "absent.pt"):
        message = refused(clip_files.find, name)
        assert f"'{name}'" in message and "RN50x64, ViT-B/32" in message

@pytest.mark.parametrize("kind", [kind for kind in GOLDEN if "ViT" not in kind])
def test_load_clip_of_a_snapshot_equals_the_program_that_wrote_it(kind, tmp_path, capsys):
    """Layouts, activations, heads of 16, 32 and 64 numbers: nothing has to be guessed."""
    write_snapshot(tmp_path / "snapshot", kind)
    assert_golden(load_clip(tmp_path / "snapshot"), GOLDEN[kind])
    assert not capsys.readouterr().err

@pytest.mark.parametrize("kind", ["open_clip, ViT-H", "open_clip, ViT-g"])
def test_build_clip_knows_the_heads_of_the_giants(kind, tmp_path):
    """Heads of 80 and 88, without a listing as with one."""
    assert_golden(build_clip(filled(GOLDEN[kind]["tensors"]), {"activation": "gelu"}), GOLDEN[kind])
    (tmp_path / "open_clip_config.json").write_text(json.dumps(GOLDEN[kind]["listing"]))
    said = clip_files.read_listing(tmp_path / "open_clip_pytorch_model.bin")
    assert (said["vision_heads"], said["activation"]) == (16, "gelu")

def test_to_openai_layout_of_a_prefix_and_of_what_has_it_already(tmp_path):
    state = {f"clip.{name}": tensor.half()
             for name, tensor in filled(GOLDEN["transformers"]["tensors"]).items()}
    state["clip.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(state, tmp_path / "clip.pt")
    assert_golden(load_clip(tmp_path / "clip.pt"), GOLDEN["transformers"])
    own = small_clip_state("resnet")
    same = clip_files.to_openai_layout(own)
    assert same.keys() == own.keys() and all(same[name] is own[name] for name in own)

@pytest.mark.parametrize("kind, changed, value, named", [
    ("transformers", "vision_model.encoder.layers.1.self_attn.k_proj.bias", None,
     "visual.transformer.resblocks.1.attn.in_proj_bias"),
    ("transformers", "text_model.embeddings.position_embedding.weight", None, "positional_emb"),
    ("transformers", "vision_model.head.bias", torch.zeros(1), "visual.head.bias"),
    ("open_clip, CustomTextCLIP", "logit_bias", torch.zeros(1), "logit_bias"),  # a SigLIP's
    ("open_clip", "visual.ln_pre.weight", None, "visual.ln_pre.weight"),
    ("open_clip", "text.ln_final.bias", torch.zeros(128), "another ln_final.bias"),
    ("open_clip", "transformer.resblocks.0.ls_1.gamma", torch.zeros(1), "resblocks.0.ls_1.gamma")])
def test_load_clip_names_what_is_no_clip(kind, changed, value, named, tmp_path):
    path = write_snapshot(tmp_path, kind, **{changed: value})
    message = refused(load_clip, path)
    assert message.startswith(f"{path}: ") and named in message

@pytest.mark.parametrize("asked, kind", [(None, "open_clip"), ("quickgelu", "open_clip"),
                                         ("gelu", "open_clip, CustomTextCLIP")])
def test_load_clip_of_a_bare_file_assumes_quickgelu_or_is_told(asked, kind, tmp_path, capsys):
    torch.save(filled(GOLDEN[kind]["tensors"]), tmp_path / "model.pt")
    assert_golden(load_clip(tmp_path / "model.pt", activation=asked), GOLDEN[kind])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (asked is None)
    assert all("model.pt" in line and "--clip-activation" in line for line in lines)

def test_load_knows_the_activation_of_openais_archives(tmp_path, capsys):
    path = tmp_path / "clip.pt"
    torch.save({**small_clip_state("vit"), "input_resolution": torch.tensor(1)}, path)
    assert clip_files.load(path)[2] == {"activation": "quickgelu"}
    assert not capsys.readouterr().err
    assert clip_files.load(path, activation="gelu")[2] == {"activation": "gelu"}
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "quickgelu" in line
    assert "'relu'" in refused(load_clip, path, None, "relu")

def changed(kind, place, value):
    """The listing of a golden model with another value; place: "key" or "part/key"."""
    listing = json.loads(json.dumps(GOLDEN[kind]["listing"]))
    *part, key = place.split("/")
    where = listing if part == ["preprocess"] else listing.get("model_cfg", listing)
    for name in part:
        where = where.get(f"{name}_config") or where.setdefault(f"{name}_cfg", {})
    where[key] = value
    return listing

@pytest.mark.parametrize("kind, place, value, named", [
    ("transformers", "vision/num_hidden_layers", 3, "resblocks.2"),
    ("transformers", "text/hidden_size", 256, "positional_embedding"),
    ("transformers", "vision/num_attention_heads", 3, "128"),
    ("transformers", "text/hidden_act", "gelu", "'gelu and quickgelu'"),
    ("transformers", "text/hidden_act", "gelu_new", "config.json: hidden_act is 'gelu_new'"),
    ("transformers", "vision/layer_norm_eps", 1e-6, "config.json: layer_norm_eps is 1e-06"),
    ("transformers", "model_type", "siglip", "config.json: model_type is 'siglip'"),
    ("open_clip", "vision/layers", 4, "resblocks.2"),
    ("open_clip", "vision/pool_type", "avg", "open_clip_config.json: pool_type is 'avg'"),
    ("open_clip", "text/no_causal_mask", True, "no_causal_mask is True"),
    ("open_clip", "text/hf_tokenizer_name", "bert", "hf_tokenizer_name is 'bert'"),
    ("open_clip", "preprocess/mean", [0.5, 0.5, 0.5], "mean is [0.5, 0.5, 0.5]")])
def test_load_clip_refuses_two_listings_that_differ(kind, place, value, named, tmp_path):
    write_snapshot(tmp_path, kind, changed(kind, place, value))
    message = refused(load_clip, tmp_path)
    assert str(tmp_path) in message and named in message

def test_read_listing_defaults_and_neighbours(tmp_path):
    """transformers' defaults where config.json is silent; the images' mean in a file of its own; a
    file with a name of its own has no listing."""
    weights = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "clip", "text_config": None, "vision_config": {"num_attention_heads": 16},
        "vision_config_dict": {"num_attention_heads": 6, "hidden_size": 384}}))
    said = clip_files.read_listing(weights)
    assert said == {"vision_heads": 6, "vision_width": 384, "vision_layers": 12,
                    "transformer_heads": 8, "transformer_width": 512, "transformer_layers": 12,
                    "activation": "quickgelu"}
    for other in ("clip.safetensors", "open_clip_model.safetensors"):
        assert clip_files.read_listing(tmp_path / other) == {}
    images = tmp_path / "preprocessor_config.json"
    images.write_text(json.dumps({"image_mean": clip_model.MEAN, "image_std": clip_model.STD}))
    assert clip_files.read_listing(weights) == said
    images.write_text(json.dumps({"image_std": [0.5, 0.5, 0.5]}))
    assert "image_std" in refused(clip_files.read_listing, weights)

@pytest.mark.parametrize("text", ["", "[1]", "{", "null", '{"model_cfg": []}', '{"model_cfg": {}}',
    '{"model_cfg": {"vision_cfg": {"head_width": 0}, "text_cfg": {}}}',
    '{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": [1]}', "[" * 100_000])
def test_read_listing_of_damage_is_one_line(text, tmp_path):
    (tmp_path / "open_clip_config.json").write_text(text)
    message = refused(clip_files.read_listing, tmp_path / "open_clip_model.safetensors")
    assert "open_clip_config.json is damaged" in message
