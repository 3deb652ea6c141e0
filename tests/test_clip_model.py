"""clip_model.py against other implementations.

`golden_clip.json` holds what open_clip_torch 3.3.0 (both towers of two small models) and openai-clip 1.0.1 (tokenizer,
with ftfy 6.3.1 and regex 2026.11.15) compute; `python tests/bench_clip.py --golden` wrote it. The tests that take
`shared` run on the real vocabulary and on a small trained checkpoint.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import PIL
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, PILToTensor, Resize, ToTensor

import clip_model
from clip_model import CLIP, Tokenizer, build_clip, class_features, load_clip, load_merges, preprocess, read_tensors

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests/golden_clip.json").read_text()) if (ROOT / "tests/golden_clip.json").exists() else {}
SMALL = {  # embed_dim, resolution, layers, width, patch, context, vocabulary, text width, heads, layers
    "vit": (32, 32, 2, 128, 8, 12, 514, 128, 2, 2),
    "resnet": (32, 64, (1, 2, 1, 1), 16, None, 12, 514, 128, 2, 2),
}
TEXTS = ["a red circle", "x", "blue star?", "0123456789 overlong"]


def noise(shape, seed):
    """Reproducible numbers in (-1/2, 1/2) from integer arithmetic, the same in every version and on every device."""
    i = torch.arange(torch.Size(shape).numel())
    return ((((i * i + seed * 7919) % 1000003) * 48271 + i * 69621) % 2147483647 / 2147483647 - 0.5).float().view(shape)


def small_state(kind):
    """A state dict in OpenAI's layout whose every tensor is filled and exact in float16."""
    torch.manual_seed(0)
    state = CLIP(*SMALL[kind]).state_dict()
    for seed, (name, tensor) in enumerate(sorted(state.items())):
        if name.endswith("num_batches_tracked"):
            continue
        fill = noise(tensor.shape, seed) * (2 * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.4)
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            fill = 1 + fill
        state[name] = (torch.tensor(2.5) if name == "logit_scale" else fill).half().float()
    return state


def relative(found, expected):
    expected = torch.as_tensor(expected)
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


# Towers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_towers_equal_open_clip(kind):
    clip = build_clip(small_state(kind))
    images = 4 * noise((3, 3, clip.visual.input_resolution, clip.visual.input_resolution), 1)
    tokens = Tokenizer()(TEXTS, 12, truncate=True)
    assert relative(clip.encode_image(images), GOLDEN[kind]["image"]) < 1e-5
    assert relative(clip.encode_text(tokens), GOLDEN[kind]["text"]) < 1e-5


def test_text_behind_the_end_token_has_no_influence():
    clip = build_clip(small_state("vit"))
    tokens = Tokenizer()(["red", "a blue one"], 12)
    other = tokens.clone()
    other[0, 5:] = 7
    assert torch.equal(clip.encode_text(tokens)[0], clip.encode_text(other)[0])
    assert torch.allclose(clip.encode_text(tokens)[:1], clip.encode_text(tokens[:1, :5]), atol=1e-6)


@pytest.mark.parametrize("kind", SMALL)
def test_training_in_bfloat16_reaches_every_parameter(kind):
    torch.manual_seed(0)
    clip = CLIP(*SMALL[kind])
    images, tokens = torch.randn(8, 3, *[clip.visual.input_resolution] * 2), Tokenizer()(["one", "two"] * 4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        image, text = clip.encode_image(images), clip.encode_text(tokens)
    loss = (clip.logit_scale.exp() * F.normalize(image.float()) @ F.normalize(text.float()).T).square().mean()
    loss.backward()
    zero = {name for name, p in clip.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not zero
    for module, std in ((clip.token_embedding.weight, 0.02), (clip.text_projection, 128**-0.5),
                        (clip.transformer.resblocks[1].mlp["c_fc"].weight, 256**-0.5)):
        assert module.std().item() == pytest.approx(std, rel=0.05)  # OpenAI's initialisation


def test_gradient_equals_quick_gelu_written_out():
    block = build_clip(small_state("vit")).double().transformer.resblocks[0]
    x = noise((2, 5, 128), 3).double().requires_grad_()

    def plain(x):
        attention = F.multi_head_attention_forward(
            *[block.ln_1(x).transpose(0, 1)] * 3, 128, 2, block.attn.in_proj_weight, block.attn.in_proj_bias, None,
            None, False, 0.0, block.attn.out_proj.weight, block.attn.out_proj.bias, need_weights=False)[0]
        attention = attention.transpose(0, 1)
        hidden = block.mlp["c_fc"](block.ln_2(x + attention))
        return x + attention + block.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))

    for found, expected in zip(*(torch.autograd.grad(f(x).square().sum(), [x, *block.parameters()])
                                 for f in (lambda x: block(x, False, None), plain))):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_encoders_name_bad_input():
    clip = build_clip(small_state("vit"))
    for images in (torch.zeros(1, 3, 64, 64), torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"takes float \(B, 3, 32, 32\) from preprocess, found torch"):
            clip.encode_image(images)
    with pytest.raises(ValueError, match="at most 12"):
        clip.encode_text(torch.zeros(1, 77, dtype=torch.int64))
    with pytest.raises(ValueError, match="0 heads"):
        CLIP(32, 32, 1, 32, 8, 12, 514, 64, 1, 1)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_build_clip_copies_and_converts():
    state = {name: tensor.half() if tensor.is_floating_point() else tensor
             for name, tensor in small_state("resnet").items() if not name.endswith("num_batches_tracked")}
    state |= {"input_resolution": torch.tensor(64), "context_length": torch.tensor(12), "vocab_size": 514}
    before = {name: tensor.clone() if isinstance(tensor, torch.Tensor) else tensor for name, tensor in state.items()}
    clip = build_clip(state)
    assert not clip.training and clip.visual.input_resolution == 64 and clip.context_length == 12
    assert {p.dtype for p in clip.parameters()} == {torch.float32} and all(p.requires_grad for p in clip.parameters())
    with torch.no_grad():
        for p in clip.parameters():
            p.zero_()
    assert state.keys() == before.keys() and all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(before[k]))
                                                 for k in before)
    same = small_state("vit")
    build_clip(same).text_projection.data.zero_()
    assert same["text_projection"].any()


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("ignore")
def test_torchscript_archive_is_read_exactly(kind, dtype, tmp_path):
    clip = build_clip(small_state(kind))
    for name, value in (("input_resolution", 1), ("vocab_size", 514)):
        clip.__dict__.pop(name, None)
        clip.register_buffer(name, torch.tensor(value))
    images = torch.zeros(1, 3, *[clip.visual.input_resolution] * 2, dtype=dtype)
    traced = torch.jit.trace_module(clip.to(dtype), {"encode_image": images}, check_trace=False)
    traced.save(tmp_path / "clip.pt")
    expected = torch.jit.load(tmp_path / "clip.pt").state_dict()
    found = read_tensors(tmp_path / "clip.pt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in expected)
    assert torch.equal(load_clip(tmp_path / "clip.pt").text_projection, small_state(kind)["text_projection"])


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s},
                                  lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
                                  lambda s: {k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in s.items()}])
def test_state_dicts_of_every_wrapping_load(wrap, tmp_path):
    state = small_state("resnet")
    torch.save(wrap(state), tmp_path / "clip.pt")
    loaded = load_clip(str(tmp_path / "clip.pt")).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_malicious_files_are_refused_by_name(tmp_path):
    bomb = Malicious(tmp_path / "executed")
    torch.save({"state_dict": {"a": bomb}}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(bomb))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "script.pt") as old, zipfile.ZipFile(tmp_path / "jit.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle.dumps(bomb, 2) if name.endswith("/data.pkl") else old.read(name))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name, culprit in (("zip", f"{os.name}.system"), ("raw", f"{os.name}.system"), ("jit", f"{os.name}.system"),
                          ("module", "torch.nn.modules.linear.Linear")):
        with pytest.raises(ValueError, match=f"{name}.pt: .*{culprit}, which is refused$"):
            load_clip(tmp_path / f"{name}.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("ln_final.weight"), 'Missing key.*"ln_final.weight"'),
    (lambda s: s.pop("text_projection"), "'text_projection' is missing"),
    (lambda s: s.pop("visual.positional_embedding"), "'visual.positional_embedding' is missing"),
    (lambda s: [s.pop(k) for k in list(s) if k.startswith("transformer.")], 'Missing key.*"transformer.resblocks.0'),
    (lambda s: s.update({"foo.bar": torch.zeros(1)}), 'Unexpected key.*"foo.bar"'),
    (lambda s: s.update({"ln_final.bias": torch.zeros(7)}), "size mismatch for ln_final.bias"),
    (lambda s: s.update({"ln_final.bias": "text"}), '"ln_final.bias", expected torch.Tensor'),
    (lambda s: s.update({"epoch": 3}), 'Unexpected key.*"epoch"'),
    (lambda s: s.update({"text_projection": torch.zeros(7)}), "has not 2 dimensions"),
    (lambda s: s.pop("visual.proj"), "vision tower of unknown kind"),
])
def test_bad_state_dicts_are_one_clear_line(change, message, tmp_path):
    state = small_state("vit")
    change(state)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=f"bad.pt: .*{message}") as error:
        load_clip(tmp_path / "bad.pt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_damaged_and_foreign_files_are_one_clear_line(tmp_path):
    torch.save(small_state("vit"), tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    buffer = io.BytesIO()
    torch.save([1], buffer)
    for data, message in ((good[: len(good) // 2], "damaged: BadZipFile"), (bytes(flipped), "is damaged"),
                          (b"", "EOFError"), (b"some text", "damaged"), (buffer.getvalue(), "holds a list")):
        (tmp_path / "bad.pt").write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            load_clip(tmp_path / "bad.pt")
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="ViT-L/14@336px"):
        load_clip(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="'ViT-B/33' is neither.*RN50, RN101, RN50x4, RN50x16, RN50x64, ViT-B/32"):
        load_clip("ViT-B/33")


def test_public_files_are_fetched_once_and_checked(tmp_path, monkeypatch, capsys):
    source, content = tmp_path / "source" / "x.pt", b"weights"
    source.parent.mkdir()
    source.write_bytes(content)
    digest, url, cache = hashlib.sha256(content).hexdigest(), source.as_uri(), tmp_path / "cache" / "deep"
    assert clip_model.fetch(url, 7, digest, cache, "--clip").read_bytes() == content
    source.unlink()
    monkeypatch.setenv("RICHKD_CACHE", str(cache))
    assert clip_model.fetch(url, 7, digest, None, "--clip") == cache / "x.pt"  # no second download
    with pytest.raises(FileNotFoundError, match="could not download.*y.pt.*--clip PATH"):
        clip_model.fetch(url.replace("x.pt", "y.pt"), 7, digest, cache, "--clip")
    with pytest.raises(ValueError, match=f"x.pt: SHA-256 is {digest}, expected {'0' * 64}"):
        clip_model.fetch(url, 7, "0" * 64, cache, "--clip")
    assert (cache / "x.pt").read_bytes() == content  # the user's file stays
    source.write_bytes(b"other")
    with pytest.raises(FileNotFoundError, match="invalid hash"):
        clip_model.fetch(url, 7, digest, tmp_path / "new", "--clip")
    assert not list((tmp_path / "new").iterdir())


def test_public_names_lead_to_openai(tmp_path, monkeypatch):
    urls = []
    monkeypatch.setattr(clip_model, "fetch", lambda url, *_: urls.append(url) or tmp_path / "none.pt")
    for name in clip_model.PUBLIC_CLIPS:
        with pytest.raises(FileNotFoundError):
            load_clip(name)
    files = "RN50 RN101 RN50x4 RN50x16 RN50x64 ViT-B-32 ViT-B-16 ViT-L-14 ViT-L-14-336px"
    assert [url.split("/")[-1] for url in urls] == [f"{name}.pt" for name in files.split()]
    assert all(url.startswith("https://openaipublic.azureedge.net/clip/models/") for url in urls)


# Tokenizer -----------------------------------------------------------------------------------------------------------


def strings(count):
    """Strings that try a tokenizer: scripts, emoji, HTML, mojibake, contractions, digits, controls, empty, long."""
    rng = random.Random(0)
    words = ("a photo of the don't I'll we've they're it's he'd I'm naïve café 北京 東京 Привет שלום مرحبا 12345 3.14 "
             "½ Ⅷ x² foo_bar <b>hi</b> &amp; &amp;amp;lt; &lt;p&gt; &#39; &amp;#39; &nbsp; &eacute; ’ “quoted” — … 😀 "
             "👩‍👩‍👧 🇫🇷 ﬁ ＦＵＬＬ İstanbul ß ſ 'S 'LL ''s 's's <|startoftext|> <|endoftext|> <|ſtartoftext|> schÃ¶n Ã©tÃ© "
             "l’humanitÃ© Ð¿Ñ€Ð¸Ð²ÐµÑ‚ â€œquotedâ€ Â£10").split(" ")
    ranges = [(0, 32), (32, 127), (127, 160), (160, 592), (880, 1328), (1424, 1792), (2304, 3456), (8192, 8304),
              (8448, 11264), (12288, 12544), (19968, 40959), (44032, 55204), (64256, 65535), (127744, 129536)]
    space = ["", " ", "\t", "\r\n", "\x1c", "\x85", "\u2028", "\u200b", "\xa0", "\u3000"]
    out = ["", " ", "\n", "x" * 3000, "a " * 1000, "😀" * 300, "!" * 1000]
    while len(out) < count:
        low, high = rng.choice(ranges)
        text = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(12)))
        kind = len(out) % 4
        if kind == 0:
            text += rng.choice(space) * rng.randrange(3) + rng.choice(words)
        elif kind == 1:
            text = rng.choice(space).join(rng.choices(words, k=rng.randrange(8)))
        elif kind == 2:
            text = str(rng.randrange(10 ** rng.randrange(1, 12))) + rng.choice(words) + text
        out.append(text)
    return out


def digest(tokenizer, texts):
    """SHA-256 over the ids of the texts, 1,000 at a time, so that a difference can be placed."""
    ids = [list(map(int, tokenizer.encode(text))) for text in texts]
    return [hashlib.sha256(json.dumps(ids[i : i + 1000]).encode()).hexdigest()[:16] for i in range(0, len(ids), 1000)]


def test_ids_equal_openai_on_10000_strings(shared):
    tokenizer = Tokenizer(load_merges(shared / "clip/bpe_simple_vocab_16e6.txt.gz"))
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (49408, 49406, 49407)
    assert tokenizer("a photo of a cat", 8).tolist() == [[49406, 320, 1125, 539, 320, 2368, 49407, 0]]
    assert digest(tokenizer, strings(10000)) == GOLDEN["tokenizer"]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in ("A red  circle", "don't", "naïve 北京 😀")] == [
        "a red circle", "don 't", "naïve 北京 😀"]


def test_byte_level_tokenizer():
    tokenizer = Tokenizer()
    assert tokenizer.vocab_size == 514
    assert tokenizer.encode("ab !") == [64, 65 + 256, 256]  # ids 0-255 in GPT-2's order: "!" first, "a" 64th
    assert tokenizer.encode("\u00e9") == [tokenizer.ids["Ã"], tokenizer.ids["©</w>"]]
    for text in ("naïve café", "北京 東京", "😀 👩 x", "a b c 1 2 3", "ünï ç"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("Red Circle, 北京 &amp;amp; 😀")) == "red circle , 北京 & 😀"
    assert tokenizer.encode("<|endoftext|>") == [513]
    assert Tokenizer([("a", "b"), ("ab", "c</w>")]).encode("abc abd") == [513, 512, 256 + 67]


def test_context_length():
    tokenizer = Tokenizer()
    tokens = tokenizer(["ab", "abcdef"], 5, truncate=True)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[512, 64, 65 + 256, 513, 0], [512, 64, 65, 66, 513]]
    with pytest.raises(ValueError, match="8 tokens, over the context length 5: 'abcdef'"):
        tokenizer(["ab", "abcdef"], 5)


def test_merges_files(tmp_path):
    text = '"bpe#version: 0.2\ni n\nt h\n'
    (tmp_path / "plain").write_text(text)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(text.encode()))
    assert load_merges(tmp_path / "plain") == load_merges(tmp_path / "packed.gz") == [("i", "n"), ("t", "h")]
    (tmp_path / "bad").write_text("i n\none two three\n")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(text.encode())[:-9])
    for name in ("bad", "cut.gz"):
        with pytest.raises(ValueError, match=f"{name}: no BPE file"):
            load_merges(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_merges(tmp_path / "absent")


# Images --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("H, W, resolution", [(32, 32, 224), (64, 64, 64), (300, 300, 224), (375, 500, 224),
                                              (97, 61, 96), (28, 224, 64), (225, 224, 224), (1, 3, 32), (90, 200, 96),
                                              (64, 64, 63), (293, 116, 96)])
def test_preprocess_equals_pil(H, W, resolution):
    if H > 2 * W and H > resolution and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before version 13 resizes the width of such a tall image first")
    images = (noise((2, 3, H, W), H) * 256 + 128).to(torch.uint8)
    images[1] = (images[1] > 127) * 255  # hard edges
    transform = Compose([Resize(resolution, InterpolationMode.BICUBIC), CenterCrop(resolution), ToTensor(),
                         Normalize(clip_model.MEAN, clip_model.STD)])
    expected = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    before = images.clone()
    found = preprocess(images, resolution)
    assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(images, before)
    assert (found - expected).abs().max() < 1e-5


def test_preprocess_names_bad_images():
    for bad in (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
                torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 0, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\), found"):
            preprocess(bad, 32)


# Prompts -------------------------------------------------------------------------------------------------------------


def test_prompt_files(tmp_path):
    templates = clip_model.load_templates(ROOT / "prompts.txt")
    assert len(templates) == 12
    assert (templates[0], templates[-1]) == ("a photo of a {}", "a high quality photo of a {}")
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\n\n  a {} \n#{}\nthe {}.\n")
    assert clip_model.load_templates(path) == ["a {}", "the {}."]
    path.write_text("a {}\n\nno place\n")
    with pytest.raises(ValueError, match="prompts.txt:3: expected a template"):
        clip_model.load_templates(path)
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="prompts.txt:1: expected a template"):
        clip_model.load_templates(path)


@pytest.mark.parametrize("name, cleaned", [
    ("aquarium_fish", "aquarium fish"), ("sweet_pepper", "sweet pepper"), ("goldfish, Carassius auratus", "goldfish"),
    ("lion, king of beasts, Panthera leo", "lion"), (" T-shirt ", "T-shirt"), ("red circle", "red circle")])
def test_class_names(name, cleaned):
    assert clip_model.clean_class_name(name) == cleaned


def test_class_features_is_the_mean_of_unit_prompts():
    clip, seen = build_clip(small_state("vit")), []
    found = class_features(clip, Tokenizer(), ["a_b, c", "xy"], ["{}", "a {}!", "{} {}"], batch_size=4,
                           progress=lambda done, total: seen.append((done, total)))
    with torch.no_grad():
        prompts = [["a b", "a a b!", "a b a b"], ["xy", "a xy!", "xy xy"]]
        units = torch.stack([F.normalize(clip.encode_text(Tokenizer()(texts, 12)), dim=1) for texts in prompts])
    assert torch.allclose(found, F.normalize(units.mean(dim=1), dim=1), atol=1e-6)
    assert seen == [(4, 6), (6, 6)] and not found.requires_grad
    with pytest.raises(ValueError, match="the tokenizer has 515 ids, this CLIP 514"):
        class_features(clip, Tokenizer([("a", "b")]), ["x"], ["{}"])


# The real checkpoint -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_real_checkpoint_equals_open_clip(shared):
    expected = json.loads((shared / "clip/clip-mini.json").read_text())
    clip = load_clip(shared / "clip/clip-mini.pt")
    tokenizer = Tokenizer(load_merges(shared / "clip/bpe_simple_vocab_16e6.txt.gz"))
    names = clip_model.load_templates(ROOT / "prompts.txt")
    assert names == expected["templates"]
    assert clip.logit_scale.exp().item() == pytest.approx(expected["logit_scale"], abs=1e-4)

    root = "tiny-imagenet-200/val/"
    with zipfile.ZipFile(shared / "data/tiny-imagenet-20.zip") as archive:
        read = lambda name: archive.read(name).decode().splitlines()  # noqa: E731
        words = dict(line.split("\t") for line in read("tiny-imagenet-200/words.txt"))
        annotations = dict(line.split("\t")[:2] for line in read(root + "val_annotations.txt"))
        images = torch.stack([
            PILToTensor()(Image.open(io.BytesIO(archive.read(f"{root}images/{name}"))).convert("RGB"))
            for name in annotations])
    names_of = {wnid: clip_model.clean_class_name(words[wnid]) for wnid in annotations.values()}
    labels = torch.tensor([expected["classes"].index(names_of[wnid]) for wnid in annotations.values()])
    features = torch.cat([clip.encode_image(preprocess(part, 64)) for part in images.split(250)])

    rows = [list(annotations).index(name) for name in expected["images"]]
    assert labels[rows].tolist() == expected["labels"]
    assert relative(features[rows, :16], expected["image_features_unnormalised_first_16"]) < 1e-5
    assert torch.allclose(features[rows].norm(dim=1), torch.tensor(expected["image_feature_norms"]), rtol=1e-5)
    for templates, key in ((names[:1], "one_template"), (names, "twelve_templates")):
        weights = class_features(clip, tokenizer, expected["classes"], templates)
        logits = clip.logit_scale.exp() * F.normalize(features, dim=1) @ weights.T
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        assert accuracy == pytest.approx(expected["zero_shot_top1"][key], abs=1e-6)
    assert (logits[rows] - torch.tensor(expected["logits_twelve_templates"])).abs().max() < 2e-4
