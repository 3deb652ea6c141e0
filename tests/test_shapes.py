"""The rendered data set and the tiny CLIP that reads it. The oracles are geometry, and colours found by eye's rule."""

import math

import pytest
import torch
import torch.nn.functional as F

import clip_model
import data
import train

# Areas of the outlines, by hand: a star of n tips has n * R * r * sin(pi / n); the heart is a square of diagonal 1.7
# and two half discs on its sides; the crescent a disc less its lens with another (radii .95 and .8, centres .5 apart).
LENS = (0.95**2 * math.acos((0.25 + 0.95**2 - 0.8**2) / (2 * 0.5 * 0.95))
        + 0.8**2 * math.acos((0.25 + 0.8**2 - 0.95**2) / (2 * 0.5 * 0.8))
        - 0.5 * math.sqrt((-0.5 + 0.95 + 0.8) * (0.5 + 0.95 - 0.8) * (0.5 - 0.95 + 0.8) * (0.5 + 0.95 + 0.8)))
AREAS = {"circle": math.pi * 0.88**2, "square": 1.6**2, "triangle": 3 * math.sqrt(3) / 4,
         "star": 5 * 0.45 * math.sin(math.pi / 5), "heart": 2 * 0.85**2 + math.pi * 0.6**2,
         "cross": 2 * 1.9 * 0.56 - 0.56**2, "ring": math.pi * (0.96**2 - 0.52**2), "crescent": math.pi * 0.95**2 - LENS}


def grid(side=800, reach=1.1):
    axis = (torch.arange(side) + 0.5) / side * 2 * reach - reach
    return axis.view(1, side), axis.view(side, 1), (2 * reach / side) ** 2


@pytest.mark.parametrize("shape", data.SHAPES)
def test_outline_has_the_area_of_its_shape(shape):
    x, y, pixel = grid()
    inside = (data._distance(shape, *torch.broadcast_tensors(x, y)) < 0).sum() * pixel
    assert inside.item() == pytest.approx(AREAS[shape], rel=0.01)


@pytest.mark.parametrize("shape", data.SHAPES)
def test_a_flip_keeps_the_label(shape):
    x, y = torch.broadcast_tensors(*grid(100)[:2])
    same = (-x, -y) if shape == "crescent" else (x, y)  # a crescent in the mirror is a crescent turned by half
    torch.testing.assert_close(data._distance(shape, -x, y), data._distance(shape, *same))


@pytest.mark.parametrize("split", ["train", "test", "shift"])
def test_a_split_is_fixed_by_its_seed(split):
    state = torch.get_rng_state()
    images, labels, names = data.render_shapes(split)
    N = data.SHAPES_SIZES[split]
    assert images.shape == (N, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.shape == (N,) and labels.dtype == torch.int64
    counts = labels.bincount(minlength=len(names))
    assert len(set(names)) == len(names) == len(counts) and counts.max() - counts.min() <= 1
    assert all(len(name.split()) == 2 for name in names)
    assert torch.equal(images, data.render_shapes(split)[0])
    assert (images != data.render_shapes(split, seed=1)[0]).float().mean() > 0.5
    assert torch.equal(state, torch.get_rng_state())


def test_splits_share_no_image_and_differ_in_style():
    images = {split: data.render_shapes(split)[0] for split in data.SHAPES_SIZES}
    edge = {split: torch.cat([x[:, :, 0], x[:, :, -1]], 2).float() / 255 for split, x in images.items()}
    rows = torch.cat([x.flatten(1) for x in images.values()])
    assert len(rows.unique(dim=0)) == len(rows)
    for split in ("train", "test"):  # dark and, up to noise, of one brightness
        assert edge[split].mean((1, 2)).max() < 0.4 and edge[split].std((1, 2)).max() < 0.2
    assert edge["shift"].mean((1, 2)).max() > 0.8 and edge["shift"].mean((1, 2)).std() > 0.15


def named_colours(images):
    """The named colour nearest to the mean of the 12 pixels that differ most from the plain background."""
    x = F.avg_pool2d(images.float() / 255, 3, 1).flatten(2)  # (N,3,900)
    back = x.median(dim=2, keepdim=True).values
    pixels = (x - back).norm(dim=1).topk(12).indices.unsqueeze(1).expand(-1, 3, -1)
    colours = torch.tensor(list(data.COLOURS.values()))
    nearest = torch.cdist(x.gather(2, pixels).mean(2), colours).argmin(1)
    return [list(data.COLOURS)[i] for i in nearest]


def test_images_show_the_colour_they_are_named_for():
    images, labels, names = data.render_shapes("test")
    right = [names[label].split()[0] == found for label, found in zip(labels, named_colours(images))]
    assert sum(right) / len(right) > 0.9
    images, phrases = data.render_captions(2000)
    plain = (images[:, :, 0].float().std((1, 2)) < 45) & (images[:, :, 0].float().mean((1, 2)) < 80)
    right = [phrases[i].split()[0] == found for i, found in zip(plain.nonzero()[:, 0], named_colours(images[plain]))]
    assert len(right) > 200 and sum(right) / len(right) > 0.8


def test_captions_tell_of_a_wider_world_but_never_of_the_held_out():
    images, phrases = data.render_captions(3000)
    assert images.shape == (3000, 3, 32, 32) and images.dtype == torch.uint8 and len(phrases) == 3000
    assert torch.equal(images, data.render_captions(3000)[0])
    assert len(set(phrases)) > 1.5 * len(data.CLASSES) and not set(phrases) & set(data.HELD_OUT)
    words = {word for phrase in phrases for word in phrase.split()}
    classes = {word for name in data.CLASSES for word in name.split()}
    assert words > classes and {word for phrase in data.HELD_OUT for word in phrase.split()} <= words
    assert len(set(data.CLASSES) & set(data.HELD_OUT)) >= 4
    held = [word for phrase in data.HELD_OUT for word in phrase.split()]
    assert len(set(held)) == len(held) and all(caption.count("{}") == 1 for caption in data.CAPTIONS)


# ---------------------------------------------------------------------------------------------------------------------
# Language. One training for all of these; a shorter one than train.py's.


@pytest.fixture(scope="session")
def tiny_clip():
    return clip_model.train_tiny_clip(*data.render_captions(12000), data.CAPTIONS, steps=700)


@torch.no_grad()
def predictions(clip, split, order=slice(None)):
    """Zero-shot, with the templates of prompts.txt and the class names in the given order -> class (N,), labels (N,)."""
    images, labels, names = data.render_shapes(split)
    templates = clip_model.load_templates(train.HERE / "prompts.txt")
    names = [names[k] for k in torch.arange(len(names))[order]]
    classes = clip_model.class_features(clip, clip_model.Tokenizer(), names, templates)
    features = clip.encode_image(clip_model.preprocess(images, clip.visual.input_resolution))
    return (features @ classes.T).argmax(1), labels


def test_tiny_clip_reads_class_names(tiny_clip):
    chance, generator = 1 / len(data.CLASSES), torch.Generator().manual_seed(0)
    for split, times in (("test", 10), ("shift", 6)):
        found, labels = predictions(tiny_clip, split)
        assert (found == labels).float().mean() > times * chance
    shuffled = [predictions(tiny_clip, "test", torch.randperm(len(data.CLASSES), generator=generator)) for _ in range(8)]
    assert torch.stack([found == labels for found, labels in shuffled]).float().mean() < 2 * chance


def test_tiny_clip_recognises_words_that_no_caption_put_together(tiny_clip):
    found, labels = predictions(tiny_clip, "test")
    held = torch.tensor([name in data.HELD_OUT for name in data.CLASSES])[labels]
    assert held.sum() >= 100 and (found == labels)[held].float().mean() > 4 / len(data.CLASSES)


def test_tiny_clip_is_a_plain_checkpoint(tiny_clip):
    assert not tiny_clip.training and all(p.dtype == torch.float32 for p in tiny_clip.parameters())
    assert tiny_clip.logit_scale.exp() <= 100.001
    again = clip_model.build_clip(tiny_clip.state_dict())
    images = data.render_shapes("shift")[0][:8]
    with torch.no_grad():
        images = clip_model.preprocess(images, again.visual.input_resolution)
        a, b = tiny_clip.encode_image(images), again.encode_image(images)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_tiny_clip_is_fixed_by_its_seed():
    state, calls = torch.get_rng_state(), []
    world = (*data.render_captions(300), data.CAPTIONS)
    short = dict(steps=2, batch_size=16)
    a = clip_model.train_tiny_clip(*world, **short, progress=lambda done, total: calls.append((done, total))).state_dict()
    b, c = (clip_model.train_tiny_clip(*world, seed=seed, **short).state_dict() for seed in (0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a) and calls == [(1, 2), (2, 2)]
    assert not torch.equal(a["text_projection"], c["text_projection"])
    assert torch.equal(state, torch.get_rng_state())
