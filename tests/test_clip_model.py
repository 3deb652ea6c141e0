"""clip_model.py against other implementations.

`golden_clip.json` holds what open_clip_torch 3.3.0 (both towers of two small models) and
openai-clip 1.0.1 (tokenizer, with ftfy 6.3.1 and regex 2026.11.15) compute;
`python bench/bench_clip.py --golden` wrote it. `shared` has the real vocabulary and a trained CLIP.
"""

import clip_model
import gzip
import hashlib
import json
import pytest
import random
import torch
import torch.nn.functional as F
import torchvision
import warnings
import zipfile
from clip_model import CLIP, Tokenizer, build_clip, load_clip, load_merges, load_templates
from helpers import ROOT, assert_golden, noise, refused, relative, small_clip_state, small_images
from PIL import Image
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

GOLDEN = json.loads((ROOT / "tests/golden_clip.json").read_text())

@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_CLIP_equals_open_clip(kind):
    assert_golden(build_clip(small_clip_state(kind)), GOLDEN[kind])

@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_CLIP_trains_in_bfloat16(kind):
    """Every parameter gets a finite gradient."""
    clip = build_clip(small_clip_state(kind))
    with torch.autocast("cpu", torch.bfloat16):
        image = clip.encode_image(small_images(clip))
        text = clip.encode_text(Tokenizer()(["one", "two", "two"], 12))
    cosines = F.normalize(image.float(), dim=1) @ F.normalize(text.float(), dim=1).T
    (clip.logit_scale.exp() * cosines).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in clip.parameters())

def test_CLIP_initialisation():
    """OpenAI's standard deviations (openai/CLIP, `initialize_parameters`)."""
    torch.manual_seed(0)
    clip = CLIP(64, 32, (1, 1, 1, 1), 32, None, 12, 514, 128, 2, 2)
    for name, std in {
            "token_embedding.weight": 0.02, "positional_embedding": 0.01,
            "text_projection": 128**-0.5, "visual.attnpool.k_proj.weight": 1024**-0.5,
            "transformer.resblocks.1.attn.in_proj_weight": 128**-0.5,
            "transformer.resblocks.1.attn.out_proj.weight": 512**-0.5,
            "transformer.resblocks.1.mlp.c_fc.weight": 256**-0.5,
            "transformer.resblocks.1.mlp.c_proj.weight": 512**-0.5}.items():
        assert clip.get_parameter(name).std().item() == pytest.approx(std, rel=0.05)
    assert not clip.visual.layer2[0].bn3.weight.any()

@pytest.mark.parametrize("causal", [False, True])
def test_ResidualAttentionBlock_by_torch(causal):
    """Value and gradient of nn.MultiheadAttention and of QuickGELU as silu(1.702 x) / 1.702."""
    block = clip_model.ResidualAttentionBlock(128, 2, causal, "quickgelu", 512).double()
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
    grads = [torch.autograd.grad(y.square().sum(), parts) for y in (found, expected)]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(*grads))

def test_encode_text_ignores_what_stands_behind_the_end_token():
    clip = build_clip(small_clip_state("vit"))
    tokens = Tokenizer()(["red", "a blue one"], 12)
    other = tokens.clone()
    other[0, 5:] = 7
    assert torch.equal(clip.encode_text(tokens)[0], clip.encode_text(other)[0])
    short = clip.encode_text(tokens[:1, :5])
    assert torch.allclose(clip.encode_text(tokens)[:1], short, atol=1e-6)

def test_encode_image_refuses_another_size():
    clip = build_clip(small_clip_state("vit"))
    for shape in ((1, 3, 64, 64), (1, 3, 39, 39), (3, 32, 32)):  # of 39 pixels the ViT cuts 7
        assert "(B, 3, 32, 32)" in refused(clip.encode_image, torch.zeros(shape))

@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_build_clip_copies_and_converts(kind):
    whole = small_clip_state(kind)
    state = {name: tensor.half() for name, tensor in whole.items() if "num_batches" not in name}
    state |= {"input_resolution": torch.tensor(64), "vocab_size": torch.tensor(514)}
    before = {name: value.clone() for name, value in state.items()}
    clip = build_clip(state)
    assert not clip.training and clip.context_length == 12 and clip.embed_dim == 32
    assert clip.visual.input_resolution == {"vit": 32, "resnet": 64}[kind]  # not the file's 64
    assert {p.dtype for p in clip.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in clip.parameters())
    build_clip(whole).text_projection.data.zero_()  # of the right dtype, it is copied, too
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert whole["text_projection"].any()

@pytest.mark.parametrize("missing, changed, name", [
    ("ln_final.weight", {}, "ln_final.weight"), ("text_projection", {}, "text_projection"),
    ("visual.positional_embedding", {}, "visual.positional_embedding"),
    ("transformer.", {}, "transformer.resblocks.0"),
    ("visual.proj", {}, "visual.layer1.0.conv1.weight"),
    ("?", {"foo.bar": torch.zeros(1)}, "foo.bar"),
    ("?", {"ln_final.bias": torch.zeros(7)}, "ln_final.bias"),
    ("?", {"text_projection": torch.zeros(7)}, "Dimension"),
    ("?", {"visual.conv1.weight": torch.zeros(128, 3, 0, 0)}, "zero"),
    ("?", {"visual.conv1.weight": torch.zeros(128, 3, 8, 16)}, "visual.conv1.weight"),
    ("?", {"token_embedding.weight": torch.ones(514, 128).int()}, "token_embedding.weight"),
    ("?", {"positional_embedding": torch.zeros(12, 96)}, "a width of 96")])
def test_load_clip_names_what_does_not_fit(missing, changed, name, tmp_path):
    state = {key: tensor for key, tensor in small_clip_state("vit").items()
             if not key.startswith(missing)}
    torch.save({**state, **changed}, tmp_path / "bad.pt")
    message = refused(load_clip, tmp_path / "bad.pt")
    assert "bad.pt: " in message and name in message and len(message) < 600

@pytest.mark.parametrize("said, name", [
    ({"vision_layers": 3}, "visual.transformer.resblocks.2"), ({"embed_dim": 64}, "visual.proj"),
    ({"vision_width": 64}, "visual.class_embedding"), ({"transformer_heads": 3}, "128"),
    ({"transformer_layers": 1}, "transformer.resblocks.1"), ({"vision_heads": 3}, "128"),
    ({"transformer_width": 192}, "positional_embedding"), ({"activation": "relu"}, "relu")])
def test_build_clip_refuses_what_a_listing_says_otherwise(said, name):
    assert name in refused(build_clip, small_clip_state("vit"), said)

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

def test_Tokenizer_of_bytes():
    tokenizer = Tokenizer()
    assert tokenizer.vocab_size == 514
    # Ids 0-255 in GPT-2's order: "!" first, "a" 64th.
    assert tokenizer.encode("ab !") == [64, 65 + 256, 256]
    assert tokenizer.encode("\u00e9") == [tokenizer.ids["Ã"], tokenizer.ids["©</w>"]]
    assert tokenizer.encode("A &amp;amp; <|endoftext|>") == [64 + 256, 5 + 256, 513]
    assert Tokenizer([("a", "b"), ("ab", "c</w>")]).encode("abc abd") == [513, 512, 256 + 67]

def test_Tokenizer_fills_and_refuses():
    tokens = Tokenizer()(["ab", "abc"], 5)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[512, 64, 65 + 256, 513, 0], [512, 64, 65, 66 + 256, 513]]
    assert Tokenizer()("ab", 4).tolist() == [[512, 64, 65 + 256, 513]]
    assert "'abcdef'" in refused(Tokenizer(), ["ab", "abcdef"], 5)

def test_load_merges_plain_and_packed(tmp_path):
    text = b'"bpe#version: 0.2\ni n\nt h\n'
    for name, content in {
            "plain": text, "bare": text.split(b"\n", 1)[1], "packed.gz": gzip.compress(text),
            "bad": b"i n\none two three\n", "cut.gz": gzip.compress(text)[:-9],
            "image": b"\x80\xff"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("plain", "bare", "packed.gz"):
        assert load_merges(tmp_path / name) == [("i", "n"), ("t", "h")]
    for name in ("bad", "cut.gz", "image", "absent"):
        assert name in refused(load_merges, tmp_path / name)

@pytest.mark.parametrize("H, W, resolution", [
    (64, 64, 64), (32, 32, 64), (32, 32, 224), (64, 64, 224), (300, 300, 224), (375, 500, 224),
    (97, 61, 96), (28, 224, 64), (225, 224, 224), (1, 3, 32), (90, 200, 96), (64, 64, 63)])
def test_preprocess_equals_pil(H, W, resolution):
    """In all but 2 % of the values, and there by at most 2 of 256 levels."""
    images = (noise((2, 3, H, W), H) * 256 + 128).to(torch.uint8)
    images[1] = (images[1] > 127) * 255  # hard edges
    transform = Compose([Resize(resolution, InterpolationMode.BICUBIC), CenterCrop(resolution),
                         PILToTensor()])
    expected = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
                            for image in images])
    before = images.clone()
    found = clip_model.preprocess(images, resolution)
    assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(images, before)
    mean, std = (torch.tensor(value)[:, None, None] for value in (clip_model.MEAN, clip_model.STD))
    levels = 255 * (found * std + mean)
    assert (levels - levels.round()).abs().max() < 1e-3
    difference = (levels.round() - expected).abs()
    assert difference.max() <= 2 and (difference > 0).float().mean() < 0.02
    assert H != resolution or not difference.any()

@pytest.mark.parametrize("images", [
    torch.zeros(3, 8, 8).byte(), torch.zeros(1, 1, 8, 8).byte(), torch.zeros(1, 3, 0, 8).byte(),
    torch.zeros(1, 3, 8, 8)])
def test_preprocess_names_bad_images(images):
    assert "uint8 (B, 3, H, W)" in refused(clip_model.preprocess, images, 32)

def test_load_templates(tmp_path):
    templates = load_templates(ROOT / "prompts.txt")
    assert (len(templates), templates[0]) == (12, "a photo of a {}")
    assert templates[-1] == "a high quality photo of a {}"
    path = tmp_path / "prompts.txt"
    for text, expected in ((b"# comment\n\n  a {} \n#{}\nthe {}.\n", ["a {}", "the {}."]),
                           (b"\xef\xbb\xbf# Windows\r\na {}\r\nthe {}\r\n", ["a {}", "the {}"])):
        path.write_bytes(text)
        assert load_templates(path) == expected
    for text in (b"a {}\n\nno place\n", b"# nothing\n", b"a \xff {}", b"'a {}',\n", b"a {c}\n",
                 b"- a {}\n", b"[a {}]\n", "a {}\n".encode("utf-16"), b"a {}; the {}\n",
                 b"1,a photo of a {}\n", b"a {}|2\n"):
        path.write_bytes(text)
        assert str(path) in refused(load_templates, path)
    path.write_text("a {}\nthe {}\n\na {}\n")
    with pytest.warns(UserWarning, match="prompts.txt: 'a {}'"):
        assert load_templates(path) == ["a {}", "the {}", "a {}"]

@pytest.mark.parametrize("line", [
    "{0: 'tench, Tinca tinca',", " 1: 'goldfish',", "'goldfish'", '"goldfish",', "1. tench",
    "2) tench", "0: tench", "tench: 0", "names = (", "['tench', 'goldfish']", "- tench",
    "<li>tench</li>", "tench,", "a photo of a {}"])
def test_load_lines_of_names_refuses_programs_and_numbered_lists(line, tmp_path):
    names = ["Bird's nest", "7 up", "cat (wild)", "goldfish, Carassius auratus", "n01440764\ttench"]
    (tmp_path / "names.txt").write_text("\n".join(["# names", "", *names]))
    assert clip_model.load_lines(tmp_path / "names.txt") == names
    (tmp_path / "names.txt").write_text("\n".join([*names, line]))
    assert "names.txt" in refused(clip_model.load_lines, tmp_path / "names.txt")

@pytest.mark.parametrize("names, expected", [
    (["n02085620-Chihuahua", "n02085782-Toy_spaniel"], ["Chihuahua", "Toy spaniel"]),
    (["1 001.Wren", "2 002.My_Bird"], ["Wren", "My Bird"]), (["cat_2", "dog_1"], ["cat", "dog"]),
    (["AnnualCrop", "TVSet", "iPad"], ["Annual Crop", "TV Set", "iPad"]),
    (["ice%20cream", "hot+dog", "C++"], ["ice cream", "hot dog", "C++"])])
def test_in_words_says_what_it_changes(names, expected):
    with pytest.warns(UserWarning, match=f"{expected[0]!r} for {names[0]!r}"):
        assert clip_model.in_words(names) == expected

PLAIN = [
    ["Boeing 747", "Airbus 320"], ["1 finger", "2 fingers", "10 fingers"], ["3D", "2D"],
    ["gold-fish", "gold.fish", "goldfish"], ["T-shirt", "x-ray"], ["hot dog", "gold-fish", "aB"],
    ["n02085620-Chihuahua"], ["F-16A", "C-130"], ["007.x", "8y"], ["\u91d1\u9c7c", "caf\xe9"]]

@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names, expected", [
    *zip(PLAIN, PLAIN),
    (["aquarium_fish", "goldfish, Carassius auratus", " T-shirt ", ", ,_,x", "_"],
     ["aquarium fish", "goldfish", "T-shirt", "x", "_"]),
    (["bank, river bank", "bank, savings bank"], ["river bank", "savings bank"]),
    (["Crane, x", "crane,  x, hoist", "x"], ["Crane", "hoist", "x"]),
    (["missile", "projectile, missile"], ["missile", "projectile"])])
def test_prompt_names_are_plain_and_distinct(names, expected):
    for given in (names, expected):
        assert clip_model.prompt_names(given, Tokenizer()) == expected

@pytest.mark.parametrize("names, said", [
    (["crane", "Crane_", "dog"], ": crane, Crane;"),
    (["cat", "n01443537", "12", "n014x", "4x4"], ": n01443537, 12;")])
def test_prompt_names_says_what_clip_cannot_tell(names, said):
    with pytest.warns(UserWarning, match=f"2 of {len(names)} .*{said} .*--class-names") as warned:
        found = clip_model.prompt_names(names, Tokenizer())
    assert found == [name.strip("_") for name in names] and len(warned) == 1

@pytest.mark.filterwarnings("error")
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
    found = clip_model.prompt_names(names, tokenizer)
    assert [k for k in range(1000) if found[k] != names[k]] == [264]
    ids = {tuple(tokenizer.encode(template.replace("{}", name)))
           for name in found for template in load_templates(ROOT / "prompts.txt")}
    assert len(ids) == 12_000

def test_class_features_are_unit_prompts():
    clip, seen = build_clip(small_clip_state("vit")), []
    found = clip_model.class_features(clip, Tokenizer(), ["a_b, c", "xy"], ["{}", "a {}!", "{} {}"],
                                      batch_size=4, progress=seen.append)
    texts = ["a b", "a a b!", "a b a b", "xy", "a xy!", "xy xy"]
    with torch.no_grad():
        expected = F.normalize(clip.encode_text(Tokenizer()(texts, 12)), dim=1)
    assert found.shape == (2, 3, 32) and torch.allclose(found.flatten(0, 1), expected, atol=1e-6)
    assert seen == [4, 6] and not found.requires_grad
    with pytest.raises(ValueError, match="515 token ids"):
        clip_model.class_features(clip, Tokenizer([("a", "b")]), ["x"], ["{}"])
    for names, templates in (("x", ["{}"]), ([], ["{}"]), (["x"], "a {}"), (["x"], ["a"])):
        refused(clip_model.class_features, clip, Tokenizer(), names, templates)

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
        words, classes_of = (
            dict(line.split("\t")[:2] for line in archive.read(top + name).decode().splitlines())
            for name in ("words.txt", "val/val_annotations.txt"))
        images = torch.stack([
            PILToTensor()(Image.open(archive.open(f"{top}val/images/{name}")).convert("RGB"))
            for name in classes_of])
    names = [words[wnid].split(",")[0] for wnid in classes_of.values()]
    labels = torch.tensor([expected["classes"].index(name) for name in names])
    features = torch.cat([clip.encode_image(clip_model.preprocess(part, 64))
                          for part in images.split(250)])
    rows = [list(classes_of).index(name) for name in expected["images"]]
    assert labels[rows].tolist() == expected["labels"]
    numbers = expected["image_features_unnormalised_first_16"]
    assert relative(features[rows, :16], numbers) < 1e-5
    norms = torch.tensor(expected["image_feature_norms"])
    assert torch.allclose(features[rows].norm(dim=1), norms, rtol=1e-5)
    text_features = clip_model.class_features(clip, tokenizer, expected["classes"], templates)
    for count, key in ((1, "one_template"), (12, "twelve_templates")):
        classes = F.normalize(text_features[:, :count].mean(dim=1), dim=1)
        logits = clip.logit_scale.exp() * F.normalize(features, dim=1) @ classes.T
        top1 = (logits.argmax(dim=1) == labels).float().mean().item()
        assert top1 == pytest.approx(expected["zero_shot_top1"][key], abs=1e-6)
    assert (logits[rows] - torch.tensor(expected["logits_twelve_templates"])).abs().max() < 2e-4
    ids = {words[id].split(",")[0]: id for id in set(classes_of.values())}
    for form in ("{id}-{_}", "{id} {name}", "{_}_{id}", "{k:03}.{_}", "{k}_{_}", "{_}-{k}", "{-}",
                 "{id}.{Camel}", "({k}) {name}", "{id}-{-}", "{Camel}", "{+}", "{%20}", "{NAME}"):
        found = [form.format(id=ids[name], k=k, name=name, NAME=name.upper(), Camel="".join(
            word[:1].upper() + word[1:] for word in name.split()), **{
                sign: name.replace(" ", sign) for sign in ("_", "-", "+", "%20")})
            for k, name in enumerate(expected["classes"])]
        with warnings.catch_warnings(action="ignore"):
            text = clip_model.class_features(clip, tokenizer, found, templates[:1])[:, 0]
        right = ((F.normalize(features, dim=1) @ text.T).argmax(dim=1) == labels).float().mean()
        assert right > expected["zero_shot_top1"]["one_template"] - 0.03, form
