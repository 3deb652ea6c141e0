"""shapes.py: rendered data set and tiny CLIP. The oracles are geometry and a rule of colours."""

import clip_model
import math
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, equal, seeded
from support import shapes

# Areas of the outlines, by hand: a star of n tips has n * R * r * sin(pi / n); the heart is a
# square of diagonal 1.7 and two half discs on its sides; the crescent a disc less its lens with
# another: radii .95 and .8, centres .5 apart, .5125 and -.0125 from the corners' line.
LENS = 0.95**2 * math.acos(0.5125 / 0.95) + 0.8**2 * math.acos(-0.0125 / 0.8) - 0.39995
AREAS = {"circle": math.pi * 0.88**2, "triangle": 3 * math.sqrt(3) / 4,
         "star": 5 * 0.45 * math.sin(math.pi / 5), "heart": 2 * 0.85**2 + math.pi * 0.6**2,
         "cross": 2 * 1.9 * 0.56 - 0.56**2, "ring": math.pi * (0.96**2 - 0.52**2),
         "crescent": math.pi * 0.95**2 - LENS}

@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_distance_has_the_shapes_area_inside_and_its_mirror_images(shape):
    axis = (torch.arange(800) + 0.5) / 800 * 2.2 - 1.1
    x, y = torch.broadcast_tensors(axis.view(1, 800), axis.view(800, 1))
    found = shapes.distance(shape, x, y)
    area = (found < 0).sum().item() * (2.2 / 800) ** 2
    assert area == pytest.approx(AREAS[shape], rel=0.01)
    same = shapes.distance(shape, -x, -y) if shape == "crescent" else found  # turned by half
    torch.testing.assert_close(shapes.distance(shape, -x, y), same)

def named_colours(images):
    """The named colour nearest to the mean of the 12 pixels that differ most from a plain back."""
    x = F.avg_pool2d(images.float() / 255, 3, 1).flatten(2)  # (N,3,900)
    back = x.median(dim=2, keepdim=True).values
    pixels = (x - back).norm(dim=1).topk(12).indices.unsqueeze(1).expand(-1, 3, -1)
    colours = torch.tensor(list(shapes.COLOURS.values()))
    nearest = torch.cdist(x.gather(2, pixels).mean(2), colours).argmin(1)
    return [list(shapes.COLOURS)[i] for i in nearest]

@pytest.mark.parametrize("split, total", [
    ("train", 40392710), ("test", 157087371), ("shift", 320678754)])
def test_render_shapes_draws_what_it_always_did(split, total):
    """total: of all pixels; one that is rounded otherwise is no matter."""
    state = torch.get_rng_state()
    images, labels, names = shapes.render_shapes(split)
    N = shapes.SIZES[split]
    assert images.shape == (N, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.shape == (N,) and labels.dtype == torch.int64
    counts = labels.bincount(minlength=len(names))
    assert len(set(names)) == len(names) == len(counts) and counts.max() - counts.min() <= 1
    right = [names[k].split()[0] == found for k, found in zip(labels, named_colours(images))]
    assert sum(right) / len(right) > 0.9
    assert torch.equal(images, shapes.render_shapes(split)[0])
    assert (images != shapes.render_shapes(split, seed=1)[0]).float().mean() > 0.5
    assert torch.equal(state, torch.get_rng_state())
    top = images[:, :, 0].float() / 255  # (N,3,32): of the plain style, dark and of one brightness
    plain = top.mean((1, 2)).max() < 0.4 and top.std((1, 2)).max() < 0.2
    assert plain == (split != "shift")
    if torch.randint(10**6, (1,), generator=seeded()).item() == 136044:  # as torch always drew
        assert images.sum().item() == pytest.approx(total, rel=1e-5)

def test_render_captions_tells_of_a_wider_world_but_never_of_the_held_out():
    images, phrases = shapes.render_captions(2000)
    assert images.shape == (2000, 3, 32, 32) and images.dtype == torch.uint8
    assert len(phrases) == 2000 and torch.equal(images, shapes.render_captions(2000)[0])
    right = [phrase.split()[0] == found for phrase, found in zip(phrases, named_colours(images))]
    assert sum(right) / len(right) > 0.9
    assert len(set(phrases)) > 1.5 * len(shapes.CLASSES)
    assert not set(phrases) & set(shapes.HELD_OUT)
    words = {word for phrase in phrases for word in phrase.split()}
    held = [word for phrase in shapes.HELD_OUT for word in phrase.split()]
    assert words > {word for name in shapes.CLASSES for word in name.split()}
    assert set(held) <= words and len(set(held)) == len(held)
    assert len(set(shapes.CLASSES) & set(shapes.HELD_OUT)) >= 4
    assert all(caption.count("{}") == 1 for caption in shapes.CAPTIONS)

# The tiny CLIP ------------------------------------------------------------------------------------
TOKENIZER = clip_model.Tokenizer(shapes.MERGES)

def tiny_clip(captions, seed=0, **settings):
    """The tiny CLIP, trained with that many pictures and settings."""
    torch.manual_seed(seed)
    clip = clip_model.CLIP(**shapes.TINY_CLIP)
    return shapes.train_tiny_clip(clip, TOKENIZER, clip_model.preprocess,
                                  *shapes.render_captions(captions), shapes.CAPTIONS, seed,
                                  **settings)

def test_train_tiny_clip_is_fixed_by_its_seed():
    calls, trained = [], []
    for seed in (0, 0, 1):
        clip = tiny_clip(300, seed, steps=2, batch_size=16, progress=calls.append)
        state = torch.get_rng_state()
        assert not clip.training
        trained.append(clip.state_dict())
    one, same, other = trained
    assert equal(one, same) and not equal(one, other)
    assert calls == [1, 2] * 3
    torch.manual_seed(1)  # training draws from its own generator
    clip_model.CLIP(**shapes.TINY_CLIP)
    assert torch.equal(state, torch.get_rng_state())

@torch.no_grad()
def predictions(clip, order=slice(None), split="test"):
    """Zero-shot with the templates of prompts.txt, the class names in the given order -> class
    (N,), labels (N,)."""
    images, labels, names = shapes.render_shapes(split)
    names = [names[k] for k in torch.arange(len(names))[order]]
    text = clip_model.class_features(clip, TOKENIZER, names,
                                     clip_model.load_templates(ROOT / "prompts.txt"))
    image = clip.encode_image(clip_model.preprocess(images, clip.visual.input_resolution))
    return (image @ text.mean(dim=1).T).argmax(1), labels

@pytest.mark.slow
def test_train_tiny_clip_reads_class_names_and_words_that_no_caption_put_together():
    """After a shorter training than the default run's."""
    assert all(len(TOKENIZER.encode(word)) == 1 for word in shapes.WORDS)
    clip = tiny_clip(6000, steps=300)
    K, generator = len(shapes.CLASSES), seeded()
    for split, times in (("shift", 6), ("test", 10)):
        found, labels = predictions(clip, split=split)
        assert (found == labels).float().mean() > times / K
    held = torch.tensor([name in shapes.HELD_OUT for name in shapes.CLASSES])[labels]
    assert held.sum() >= 80
    assert (found == labels)[held].float().mean() > 4 / K
    orders = [torch.randperm(K, generator=generator) for _ in range(8)]
    right = [torch.eq(*predictions(clip, order)).float().mean() for order in orders]
    assert sum(right) / len(right) < 2 / K
    assert clip.logit_scale.exp() <= 100.001
