"""clip_model.py against other implementations.

`golden_clip.json` holds what open_clip_torch 3.3.0 (both towers of two small models) and
openai-clip 1.0.1 (tokenizer, with ftfy 6.3.1 and regex 2026.11.15) compute;
`python bench/bench_clip.py --golden` wrote it. The tests that take `shared` run on the real
vocabulary and on a small trained checkpoint.
"""

import gzip
import hashlib
import io
import json
import math
import random
import zipfile
from pathlib import Path

import PIL
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    PILToTensor,
    Resize,
    ToTensor,
)

import clip_model
from clip_model import (
    CLIP,
    Tokenizer,
    build_clip,
    class_features,
    load_clip,
    load_merges,
    load_templates,
    preprocess,
)
from support import clip_layout, files

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests/golden_clip.json").read_text())
SMALL = {  # embed_dim, resolution, layers, width, patch, context, vocabulary, then the text tower
    "vit": (32, 32, 2, 128, 8, 12, 514, 128, 2, 2),
    "resnet": (32, 64, (1, 2, 1, 1), 16, None, 12, 514, 128, 2, 2),
}


def noise(shape, seed):
    """Reproducible numbers in (-1/2, 1/2) from integer arithmetic, the same everywhere."""
    i = torch.arange(torch.Size(shape).numel())
    i = (((i * i + seed * 7919) % 1000003) * 48271 + i * 69621) % 2147483647
    return (i / 2147483647 - 0.5).float().view(shape)


def filled(shapes):
    """{name: shape} -> a state dict whose every tensor is filled and exact in float16."""
    state = {}
    for seed, (name, shape) in enumerate(sorted(shapes.items())):
        bound = 2 * math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.4
        fill = noise(shape, seed) * bound
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            fill = 1 + fill
        fill = torch.tensor(2.5) if name == "logit_scale" else fill
        state[name] = fill.half().float()
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
    return state


def small_state(kind):
    """A state dict in OpenAI's layout, `filled`."""
    return filled({name: tensor.shape for name, tensor in CLIP(*SMALL[kind]).state_dict().items()})


def small_images(kind):
    side = SMALL[kind][1]
    return 4 * noise((3, 3, side, side), 1)


def small_tokens():
    """Four texts, of which the last one is cut at 12 tokens, as OpenAI's `truncate` does."""
    texts = ["a red circle", "x", "blue star?", "0123456789 overlong"]
    tokens = Tokenizer()(texts, 77)[:, :12]
    tokens[3, 11] = Tokenizer().end
    return tokens


def relative(found, expected):
    expected = torch.as_tensor(expected)
    return ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


# Towers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_CLIP_equals_open_clip(kind):
    clip = build_clip(small_state(kind))
    assert relative(clip.encode_image(small_images(kind)), GOLDEN[kind]["image"]) < 1e-5
    assert relative(clip.encode_text(small_tokens()), GOLDEN[kind]["text"]) < 1e-5


@pytest.mark.parametrize("kind", SMALL)
def test_CLIP_trains_in_bfloat16(kind):
    """Every parameter gets a finite gradient."""
    torch.manual_seed(0)
    clip = CLIP(*SMALL[kind])
    images, tokens = small_images(kind), Tokenizer()(["one", "two", "two"], 12)
    with torch.autocast("cpu", torch.bfloat16):
        image, text = clip.encode_image(images), clip.encode_text(tokens)
    cosines = F.normalize(image.float(), dim=1) @ F.normalize(text.float(), dim=1).T
    (clip.logit_scale.exp() * cosines).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in clip.parameters())


def test_CLIP_initialisation():
    """OpenAI's standard deviations (openai/CLIP, `initialize_parameters`)."""
    clip = CLIP(64, 32, (1, 1, 1, 1), 32, None, 12, 514, 128, 2, 2)
    block = clip.transformer.resblocks[1]
    for weight, std in ((clip.token_embedding.weight, 0.02), (clip.positional_embedding, 0.01),
                        (clip.text_projection, 128**-0.5), (block.attn.in_proj_weight, 128**-0.5),
                        (block.attn.out_proj.weight, 512**-0.5), (block.mlp.c_fc.weight, 256**-0.5),
                        (block.mlp.c_proj.weight, 512**-0.5),
                        (clip.visual.attnpool.k_proj.weight, 1024**-0.5)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert not clip.visual.layer2[0].bn3.weight.any()


@pytest.mark.parametrize("causal", [False, True])
def test_ResidualAttentionBlock_by_torch(causal):
    """Value and gradient of nn.MultiheadAttention and of QuickGELU as silu(1.702 x) / 1.702."""
    block = clip_model.ResidualAttentionBlock(128, 2, causal).double()
    attention = nn.MultiheadAttention(128, 2, batch_first=True).double()
    attention.load_state_dict(block.attn.state_dict())
    x = noise((2, 5, 128), 3).double().requires_grad_()
    later = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    y = block.ln_1(x)
    expected = x + attention(y, y, y, attn_mask=later, need_weights=False)[0]
    hidden = block.mlp.c_fc(block.ln_2(expected))
    expected = expected + block.mlp.c_proj(F.silu(1.702 * hidden) / 1.702)
    found = block(x)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    parts = [x, *block.ln_1.parameters(), *block.ln_2.parameters(), *block.mlp.parameters()]
    pairs = zip(torch.autograd.grad(found.square().sum(), parts),
                torch.autograd.grad(expected.square().sum(), parts))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs)


def test_encode_text_ignores_what_stands_behind_the_end_token():
    clip = build_clip(small_state("vit"))
    tokens = Tokenizer()(["red", "a blue one"], 12)
    other = tokens.clone()
    other[0, 5:] = 7
    assert torch.equal(clip.encode_text(tokens)[0], clip.encode_text(other)[0])
    short = clip.encode_text(tokens[:1, :5])
    assert torch.allclose(clip.encode_text(tokens)[:1], short, atol=1e-6)


def test_encode_image_and_encode_text_name_bad_input():
    clip = build_clip(small_state("vit"))
    for shape, dtype in (((1, 3, 64, 64), torch.float32), ((1, 1, 32, 32), torch.float32),
                         ((3, 32, 32), torch.float32), ((1, 3, 32, 32), torch.uint8)):
        with pytest.raises(ValueError, match=r"takes float \(B, 3, 32, 32\) .*, found torch"):
            clip.encode_image(torch.zeros(shape, dtype=dtype))
    for shape in ((1, 77), (12,)):
        with pytest.raises(ValueError, match="up to 12"):
            clip.encode_text(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="32 does not divide into heads of 64"):
        CLIP(32, 32, 1, 32, 8, 12, 514, 64, 1, 1)


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SMALL)
def test_build_clip_copies_and_converts(kind):
    state = {name: tensor.half() if tensor.is_floating_point() else tensor
             for name, tensor in small_state(kind).items()
             if not name.endswith("num_batches_tracked")}
    state |= {"input_resolution": torch.tensor(64), "context_length": torch.tensor(12),
              "vocab_size": 514}
    before = {name: torch.as_tensor(value).clone() for name, value in state.items()}
    clip = build_clip(state)
    assert not clip.training and clip.context_length == 12 and clip.embed_dim == 32
    assert clip.visual.input_resolution == SMALL[kind][1]
    assert {p.dtype for p in clip.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in clip.parameters())
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.zero_()
    assert state.keys() == before.keys()
    assert all(torch.equal(torch.as_tensor(state[name]), before[name]) for name in before)
    state = small_state(kind)  # of the right dtype, it is copied, too
    build_clip(state).text_projection.data.zero_()
    assert state["text_projection"].any()


def remove(prefix):
    def change(state):
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]
    return change


@pytest.mark.parametrize("change, message", [
    (remove("ln_final.weight"), 'Missing key.*"ln_final.weight"'),
    (remove("text_projection"), "no 2-dimensional tensor 'text_projection'"),
    (remove("visual.positional_embedding"), "no 2-dim.*'visual.positional_embedding'"),
    (remove("transformer."), 'Missing key.*"transformer.resblocks.0'),
    (remove("visual.proj"), "vision tower of unknown kind"),
    (lambda s: s.update({"foo.bar": torch.zeros(1)}), 'Unexpected key.*"foo.bar"'),
    (lambda s: s.update({"ln_final.bias": torch.zeros(7)}), "size mismatch for ln_final.bias"),
    (lambda s: s.update({"text_projection": torch.zeros(7)}), "no 2-dim.*'text_projection'"),
    (lambda s: s.update({"visual.conv1.weight": torch.zeros(128, 3, 0, 0)}), "no 4-dimensional"),
    (lambda s: s.update({"token_embedding.weight": torch.ones(514, 128).int()}), "floating point"),
    (lambda s: s.update({"positional_embedding": torch.zeros(12, 32)}), "32 does not divide"),
])
def test_load_clip_names_what_does_not_fit(change, message, tmp_path):
    state = small_state("vit")
    change(state)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=f"bad.pt: .*{message}") as error:
        load_clip(tmp_path / "bad.pt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("ignore")
def test_load_clip_from_a_torchscript_archive(kind, dtype, tmp_path):
    """OpenAI's files are traced modules with some integers beside the weights, in float16."""
    clip = build_clip(small_state(kind))
    del clip.vocab_size
    clip.register_buffer("vocab_size", torch.tensor(514))
    clip.register_buffer("input_resolution", torch.tensor(1))
    images = small_images(kind).to(dtype)
    traced = torch.jit.trace_module(clip.to(dtype), {"encode_image": images}, check_trace=False)
    traced.save(tmp_path / "clip.pt")
    found, expected = load_clip(tmp_path / "clip.pt").state_dict(), small_state(kind)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Tokenizer ----------------------------------------------------------------------------------------


def strings(count):
    """Strings that try a tokenizer: scripts, emoji, HTML, mojibake, contractions, digits,
    controls, empty, long."""
    rng = random.Random(0)
    words = (
        "a photo of the don't I'll we've they're it's he'd I'm naïve café 北京 東京 Привет שלום "
        "مرحبا 12345 3.14 ½ Ⅷ x² foo_bar <b>hi</b> &amp; &amp;amp;lt; &lt;p&gt; &#39; &amp;#39; "
        "&nbsp; &eacute; ’ “quoted” — … 😀 👩‍👩‍👧 🇫🇷 ﬁ ＦＵＬＬ İstanbul ß ſ 'S 'LL ''s 's's "
        "<|startoftext|> <|endoftext|> <|ſtartoftext|> schÃ¶n Ã©tÃ© l’humanitÃ© "
        "Ð¿Ñ€Ð¸Ð²ÐµÑ‚ â€œquotedâ€ Â£10").split(" ")
    ranges = [(0, 32), (32, 127), (127, 160), (160, 592), (880, 1328), (1424, 1792), (2304, 3456),
              (8192, 8304), (8448, 11264), (12288, 12544), (19968, 40959), (44032, 55204),
              (64256, 65535), (127744, 129536)]
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
    parts = [json.dumps(ids[i : i + 1000]).encode() for i in range(0, len(ids), 1000)]
    return [hashlib.sha256(part).hexdigest()[:16] for part in parts]


def test_Tokenizer_equals_openai_on_10000_strings(shared):
    tokenizer = Tokenizer(load_merges(shared / "clip/bpe_simple_vocab_16e6.txt.gz"))
    assert (tokenizer.vocab_size, tokenizer.start, tokenizer.end) == (49408, 49406, 49407)
    ids = tokenizer(["a photo of a cat"], 8).tolist()
    assert ids == [[49406, 320, 1125, 539, 320, 2368, 49407, 0]]
    assert digest(tokenizer, strings(10000)) == GOLDEN["tokenizer"]
    texts = ("A red  circle", "don't", "naïve 北京 😀")
    decoded = [tokenizer.decode(tokenizer.encode(text)) for text in texts]
    assert decoded == ["a red circle", "don 't", "naïve 北京 😀"]


def test_Tokenizer_of_bytes():
    tokenizer = Tokenizer()
    assert tokenizer.vocab_size == 514
    # Ids 0-255 in GPT-2's order: "!" first, "a" 64th.
    assert tokenizer.encode("ab !") == [64, 65 + 256, 256]
    assert tokenizer.encode("\u00e9") == [tokenizer.ids["Ã"], tokenizer.ids["©</w>"]]
    assert tokenizer.encode("A &amp;amp; <|endoftext|>") == [64 + 256, 5 + 256, 513]
    for text in ("naïve café", "北京 東京", "😀 👩 x", "a b c 1 2 3", "ünï ç"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([512, 64, 65 + 256, 513]) == "<|startoftext|>ab <|endoftext|>"
    assert Tokenizer([("a", "b"), ("ab", "c</w>")]).encode("abc abd") == [513, 512, 256 + 67]


def test_Tokenizer_fills_and_refuses():
    tokens = Tokenizer()(["ab", "abc"], 5)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[512, 64, 65 + 256, 513, 0], [512, 64, 65, 66 + 256, 513]]
    with pytest.raises(ValueError, match="8 tokens, over the context length 5: 'abcdef'"):
        Tokenizer()(["ab", "abcdef"], 5)
    assert Tokenizer()("abcdef", 5, truncate=True).tolist() == [[512, 64, 65, 66, 513]]


def test_load_merges_plain_and_packed(tmp_path, monkeypatch):
    text = '"bpe#version: 0.2\ni n\nt h\n'
    (tmp_path / "plain").write_text(text)
    (tmp_path / "bare").write_text(text[text.index("\n") + 1 :])
    (tmp_path / "packed.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("plain", "bare", "packed.gz"):
        assert load_merges(tmp_path / name) == [("i", "n"), ("t", "h")]
    (tmp_path / "bad").write_text("i n\none two three\n")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(text.encode())[:-9])
    (tmp_path / "image").write_bytes(bytes(range(128, 256)))
    for name in ("bad", "cut.gz", "image"):
        with pytest.raises(ValueError, match=f"{name}: no BPE file"):
            load_merges(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_merges(tmp_path / "absent")

    def fetch(urls, path, digest, advice):
        assert all(url.endswith("/clip/bpe_simple_vocab_16e6.txt.gz") for url in urls)
        assert len(urls) == 2 and digest.startswith("sha256:924691ac288e54") and "--bpe" in advice
        path.write_text(text)

    monkeypatch.setattr(files, "fetch", fetch)
    assert load_merges(cache_dir=tmp_path) == [("i", "n"), ("t", "h")]


# Images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("H, W, resolution", [
    (32, 32, 224), (64, 64, 64), (300, 300, 224), (375, 500, 224), (97, 61, 96), (28, 224, 64),
    (225, 224, 224), (1, 3, 32), (90, 200, 96), (64, 64, 63), (293, 116, 96)])
def test_preprocess_equals_pil(H, W, resolution):
    if H > 2 * W and H > resolution and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before version 13 resizes the width of such a tall image first")
    images = (noise((2, 3, H, W), H) * 256 + 128).to(torch.uint8)
    images[1] = (images[1] > 127) * 255  # hard edges
    transform = Compose([Resize(resolution, InterpolationMode.BICUBIC), CenterCrop(resolution),
                         ToTensor(), Normalize(clip_layout.MEAN, clip_layout.STD)])
    expected = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
                            for image in images])
    before = images.clone()
    found = preprocess(images, resolution)
    assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(images, before)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape, dtype", [
    ((3, 8, 8), torch.uint8), ((1, 1, 8, 8), torch.uint8), ((1, 3, 0, 8), torch.uint8),
    ((1, 3, 8, 8), torch.float32)])
def test_preprocess_names_bad_images(shape, dtype):
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\), found"):
        preprocess(torch.zeros(shape, dtype=dtype), 32)


# Prompts ------------------------------------------------------------------------------------------


def test_load_templates(tmp_path):
    templates = load_templates(ROOT / "prompts.txt")
    assert len(templates) == 12
    assert (templates[0], templates[-1]) == ("a photo of a {}", "a high quality photo of a {}")
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\n\n  a {} \n#{}\nthe {}.\n")
    assert load_templates(path) == ["a {}", "the {}."]
    for text, found in (("a {}\n\nno place\n", "3: .*'no place'"), ("# nothing\n", "1: .*''")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"prompts.txt:{found}"):
            load_templates(path)
    path.write_bytes(b"\xef\xbb\xbf# what Windows saves\r\na photo of a {}\r\na sketch of a {}\r\n")
    assert load_templates(path) == ["a photo of a {}", "a sketch of a {}"]
    said()
    path.write_text("a {}\nthe {}\n\na {}\n")
    assert load_templates(path) == ["a {}", "the {}", "a {}"]
    assert said() == [f"{path}:4: 'a {{}}' is there again, and counts twice"]
    path.write_bytes(b"a \xff {}")
    with pytest.raises(ValueError, match="prompts.txt.*UTF-8"):
        load_templates(path)


def said():
    """The lines that were said, since the last call."""
    lines = sorted(files.note.said)
    files.note.said.clear()
    return lines


@pytest.mark.parametrize("names, expected", [
    (["aquarium_fish", "goldfish, Carassius auratus", " T-shirt ", ", ,_,x"],
     ["aquarium fish", "goldfish", "T-shirt", "x"]),
    (["Cardigan, Cardigan Welsh corgi", "cardigan"], ["Cardigan Welsh corgi", "cardigan"]),
    (["maillot", "maillot, tank suit"], ["maillot", "tank suit"]),
    (["bank, river bank", "bank, savings bank"], ["river bank", "savings bank"]),
    (["Crane, x", "crane,  x, hoist", "x"], ["Crane", "hoist", "x"]),
    (["missile", "projectile, missile"], ["missile", "projectile"]),
    (["p, x", "p", "x, y", "x, z"], ["x", "p", "y", "z"]),  # x is free only when two have left it
    ([""], [""])])
def test_prompt_names_are_distinct(names, expected):
    said()
    assert clip_model.prompt_names(names, Tokenizer()) == expected
    assert clip_model.prompt_names(expected, Tokenizer()) == expected and not said()


def test_prompt_names_says_what_cannot_be_told_apart():
    said()
    names = ["crane", "Crane_", "dog", "a, b", "a, b", "B", "c", "c", "d", "d", "d"]
    found = clip_model.prompt_names(names, Tokenizer())
    assert found == ["crane", "Crane", "dog", "a", "a", "B", "c", "c", "d", "d", "d"]
    (line,) = said()
    assert line == ("CLIP cannot tell classes apart that have the same prompt, 4 times: "
                    "'crane' and 'Crane_'; 'a, b' and 'a, b'; 'c' and 'c'; name the classes, one a "
                    "line, by --class-names FILE")


def test_prompt_names_says_what_is_no_word():
    said()
    clip_model.prompt_names(["cat", "n01443537", "12", "n0144353", "4x4", "n01440764"], Tokenizer())
    (line,) = said()
    assert line == ("3 of 6 class names are no words: CLIP is asked for 'a photo of a n01443537'; "
                    "put words.txt (id<tab>name) or LOC_synset_mapping.txt beside train/, or name "
                    "the classes, one a line, by --class-names FILE")


@pytest.mark.parametrize("vocabulary", ["CLIP's", "bytes"])
def test_prompt_names_of_imagenet_make_different_prompts(vocabulary, request):
    """12,000 prompts. torchvision's names have a Cardigan to walk and a cardigan to wear."""
    tokenizer = Tokenizer()
    if vocabulary == "CLIP's":
        clip = request.getfixturevalue("shared") / "clip"
        tokenizer = Tokenizer(load_merges(clip / "bpe_simple_vocab_16e6.txt.gz"))
    names = list(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"])
    assert names[264] == "Cardigan"
    names[264] += ", Cardigan Welsh corgi"
    said()
    found = clip_model.prompt_names(names, tokenizer)
    assert not said()
    assert [k for k in range(1000) if found[k] != names[k]] == [264]
    ids = {tuple(tokenizer.encode(template.replace("{}", name)))
           for name in found for template in load_templates(ROOT / "prompts.txt")}
    assert len(ids) == 12_000


def test_class_features_are_unit_prompts():
    clip, seen = build_clip(small_state("vit")), []
    found = class_features(clip, Tokenizer(), ["a_b, c", "xy"], ["{}", "a {}!", "{} {}"],
                           batch_size=4, progress=lambda done, total: seen.append((done, total)))
    with torch.no_grad():
        for texts, rows in zip((["a b", "a a b!", "a b a b"], ["xy", "a xy!", "xy xy"]), found):
            expected = F.normalize(clip.encode_text(Tokenizer()(texts, 12)), dim=1)
            assert torch.allclose(rows, expected, atol=1e-6)
    assert found.shape == (2, 3, 32)
    assert seen == [(4, 6), (6, 6)] and not found.requires_grad
    with pytest.raises(ValueError, match="515 token ids, this CLIP has 514: another BPE file"):
        class_features(clip, Tokenizer([("a", "b")]), ["x"], ["{}"])


# The real checkpoint ------------------------------------------------------------------------------


@torch.no_grad()
def test_load_clip_of_a_trained_checkpoint_equals_open_clip(shared):
    expected = json.loads((shared / "clip/clip-mini.json").read_text())
    clip = load_clip(shared / "clip/clip-mini.pt")
    tokenizer = Tokenizer(load_merges(shared / "clip/bpe_simple_vocab_16e6.txt.gz"))
    templates = load_templates(ROOT / "prompts.txt")
    assert templates == expected["templates"]
    assert clip.logit_scale.exp().item() == pytest.approx(expected["logit_scale"], abs=1e-4)

    top = "tiny-imagenet-200/"
    with zipfile.ZipFile(shared / "data/tiny-imagenet-20.zip") as archive:
        def table(name):
            lines = archive.read(top + name).decode().splitlines()
            return dict(line.split("\t")[:2] for line in lines)

        words, classes_of = table("words.txt"), table("val/val_annotations.txt")
        pictures = [archive.read(f"{top}val/images/{name}") for name in classes_of]
    pictures = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    images = torch.stack([PILToTensor()(picture) for picture in pictures])
    names = [words[wnid].split(",")[0] for wnid in classes_of.values()]
    labels = torch.tensor([expected["classes"].index(name) for name in names])
    features = torch.cat([clip.encode_image(preprocess(part, 64)) for part in images.split(250)])

    rows = [list(classes_of).index(name) for name in expected["images"]]
    assert labels[rows].tolist() == expected["labels"]
    numbers = expected["image_features_unnormalised_first_16"]
    assert relative(features[rows, :16], numbers) < 1e-5
    norms = torch.tensor(expected["image_feature_norms"])
    assert torch.allclose(features[rows].norm(dim=1), norms, rtol=1e-5)
    text_features = class_features(clip, tokenizer, expected["classes"], templates)  # (K, M, D)
    for count, key in ((1, "one_template"), (12, "twelve_templates")):
        classes = F.normalize(text_features[:, :count].mean(dim=1), dim=1)
        logits = clip.logit_scale.exp() * F.normalize(features, dim=1) @ classes.T
        top1 = (logits.argmax(dim=1) == labels).float().mean().item()
        assert top1 == pytest.approx(expected["zero_shot_top1"][key], abs=1e-6)
    assert (logits[rows] - torch.tensor(expected["logits_twelve_templates"])).abs().max() < 2e-4
