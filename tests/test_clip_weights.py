"""clip_weights.py: which file a name means. Downloads are files.py's, and tested there; here the
addresses are, and one download whole, from a server of this machine."""

import hashlib
import http.server
import threading

import pytest
import torch
from test_clip_layout import GOLDEN, assert_golden, said, write_snapshot
from test_clip_model import filled, small_state

from clip_model import load_clip
from support import clip_weights, files

L14 = "openai/clip-vit-large-patch14"


@pytest.fixture(autouse=True)
def no_other_cache(monkeypatch, tmp_path):
    """A home without Hugging Face's cache."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def attempts(monkeypatch):
    """(addresses, path, digest) of each call of files.fetch, which has nothing."""
    made = []

    def fetch(urls, path, digest, advice):
        made.append((urls, path, digest))
        raise FileNotFoundError(f"could not download {' or '.join(urls)}; put it at {path}, or "
                                f"{advice}")

    monkeypatch.setattr(files, "fetch", fetch)
    return made


# Addresses ----------------------------------------------------------------------------------------


def test_find_public_names_lead_to_openai_then_to_hugging_face(attempts, tmp_path):
    for name in clip_weights.PUBLIC_CLIPS:
        with pytest.raises(FileNotFoundError) as error:
            clip_weights.find(name, tmp_path)
        assert "\n" not in str(error.value) and "pass --clip PATH" in str(error.value)
    names = "RN50 RN101 RN50x4 RN50x16 RN50x64 ViT-B-32 ViT-B-16 ViT-L-14 ViT-L-14-336px".split()
    archives = [attempt for attempt in attempts if attempt[1].suffix == ".pt"]
    assert [path for _, path, _ in archives] == [tmp_path / f"{name}.pt" for name in names]
    for urls, path, digest in archives:
        file = f"/clip/models/{digest.removeprefix('sha256:')}/{path.name}"
        assert len(digest) == 7 + 64 and urls == [
            f"https://openaipublic.blob.core.windows.net{file}",
            f"https://openaipublic.azureedge.net{file}"]
    order = [path.name for _, path, _ in attempts]
    assert order[order.index("ViT-B-32.pt") :][:4] == [
        "ViT-B-32.pt", "vit_base_patch32_clip_224.openai.safetensors",
        "clip-vit-base-patch32.bin", "ViT-B-16.pt"]
    assert order[order.index("ViT-L-14.pt") :][:4] == [
        "ViT-L-14.pt", "clip-vit-large-patch14.safetensors", "clip-vit-large-patch14.bin",
        "ViT-L-14-336px.pt"]
    mirrors = [attempt for attempt in attempts if attempt[1].suffix != ".pt"]
    assert mirrors[2][0] == [f"https://huggingface.co/{L14}/resolve/"
                             "32bd64288804d66eefd0ccbe215aa642df71cc41/model.safetensors"]
    assert mirrors[2][2].startswith("sha256:a2bf730a0c7d")
    assert all(len(digest) == 7 + 64 for _, _, digest in mirrors)


def test_find_names_every_address_when_all_fail(attempts, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        clip_weights.find("ViT-L/14", tmp_path)
    for part in (*clip_weights.HOSTS, "model.safetensors", "pytorch_model.bin", "ViT-L-14.pt"):
        assert part in str(error.value)
    attempts.clear()
    with pytest.raises(FileNotFoundError, match="huggingface.co/openai/clip-vit-base-patch32/"):
        clip_weights.find("openai/clip-vit-base-patch32", tmp_path)
    assert len(attempts) == 1  # of a repository that is asked for by name, its own file alone


def test_find_takes_what_is_in_the_cache_first(attempts, monkeypatch, tmp_path):
    there = tmp_path / "clip-vit-large-patch14.bin"
    there.write_bytes(b"weights")
    monkeypatch.setattr(files, "fetch", lambda urls, path, digest, advice: attempts.append(path))
    for name in ("ViT-L/14", L14):
        assert clip_weights.find(name, tmp_path) == (there, {"activation": "quickgelu"})
    assert attempts == [there, there]  # whose digest is checked


def test_load_clip_downloads_from_the_mirror_whole(monkeypatch, tmp_path):
    """OpenAI's host has nothing; at $HF_ENDPOINT lie the weights in transformers' layout. They are
    OpenAI's by their digest: no activation is guessed."""
    folder = tmp_path / L14 / "resolve" / "abc"
    weights = write_snapshot(folder, "transformers", suffix=".safetensors")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", here)
    monkeypatch.setattr(clip_weights, "HOSTS", (f"{here}/clip",))
    monkeypatch.setattr(clip_weights, "MIRRORS", (
        ("ViT-L/14", L14, "abc", "model.safetensors", digest),))
    said()
    try:
        clip = load_clip("ViT-L/14", tmp_path / "cache")
    finally:
        server.shutdown()
        server.server_close()
    assert_golden(clip, "transformers")
    assert not [line for line in said() if "activation" in line]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [
        "clip-vit-large-patch14.safetensors"]


# Files and folders --------------------------------------------------------------------------------


def test_find_takes_a_folders_files_in_order(tmp_path):
    for name in ("open_clip_pytorch_model.bin", "pytorch_model.bin", "open_clip_model.safetensors",
                 "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
        assert clip_weights.find(str(tmp_path)) == (tmp_path / name, {})
    assert clip_weights.find(str(tmp_path / "pytorch_model.bin"))[0].name == "pytorch_model.bin"


def test_find_names_what_a_folder_lacks(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="holds no CLIP; expected one of model.safetensors, "
                                                "open_clip_model.safetensors, pytorch_model.bin"):
        clip_weights.find(str(tmp_path))


@pytest.mark.parametrize("name, kind", [("ViT-B/33", ValueError), ("org/name", ValueError),
                                        ("absent.pt", FileNotFoundError)])
def test_find_without_a_file(name, kind):
    with pytest.raises(kind, match=f"'{name}' is neither.*RN50x64, ViT-B/32, ViT-B.*hf download"):
        clip_weights.find(name)


# Hugging Face's cache -----------------------------------------------------------------------------


def snapshot_in(hub, repository, kind="transformers", revision="0123abcd"):
    """The layout of huggingface_hub: snapshots link to blobs, refs/main names one of them."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    weights = write_snapshot(folder / "snapshots" / revision, kind)
    (folder / "blobs").mkdir(exist_ok=True)
    blob = folder / "blobs" / hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.rename(blob)
    weights.symlink_to(blob)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(revision)
    return weights


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", None])
def test_load_clip_finds_a_snapshot_in_the_hugging_face_cache(variable, monkeypatch, tmp_path):
    hub = tmp_path / "home/.cache/huggingface/hub"
    if variable:
        hub = tmp_path / "elsewhere" / ("hub" if variable == "HF_HOME" else "")
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    snapshot_in(hub, "org/other")
    for repository in ("openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14"):
        weights = snapshot_in(hub, repository, revision="old")
        weights = snapshot_in(hub, repository, revision="new")
        path, listing = clip_weights.find(repository)
        assert path == weights and listing["vision_layers"] == 2
        assert_golden(load_clip(repository), "transformers")


def test_find_passes_over_a_snapshot_without_weights(attempts, tmp_path):
    """As who has loaded a tokenizer alone has it, or has deleted the blob."""
    hub = tmp_path / "home/.cache/huggingface/hub"
    weights = snapshot_in(hub, L14)
    weights.resolve().unlink()
    with pytest.raises(FileNotFoundError, match="could not download"):
        clip_weights.find(L14, tmp_path)
    snapshot_in(hub, "org/name").unlink()
    with pytest.raises(ValueError, match="'org/name' is neither"):
        clip_weights.find("org/name", tmp_path)


def test_load_clip_of_a_file_needs_no_name_of_its_own(tmp_path):
    """What is known of an OpenAI archive by name does not depend on where it lies."""
    torch.save(small_state("vit"), tmp_path / "model.safetensors.pt")
    torch.save(filled(GOLDEN["open_clip"]["tensors"]), tmp_path / "mine")
    assert load_clip(tmp_path / "model.safetensors.pt").embed_dim == 32
    assert_golden(load_clip(tmp_path / "mine"), "open_clip")
