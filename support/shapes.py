"""The embedded example: rendered pictures of coloured shapes, and a tiny CLIP that reads them.

A picture shows one shape, in a style between plain (0: dark background, middle size, roughly
upright, in the middle) and wild (1: any rotation, size and place, bright and textured backgrounds,
clutter, uneven paint). Train and test are plain, the shift split is wild; CLIP's captions tell of
more colours, more shapes, every style. Mirrored, a shape is itself: a flip keeps the label."""

import math
import re
import torch
import torch.nn.functional as F

SIDE = 32
SIZES = {"train": 250, "test": 1000, "shift": 1000}  # images of each split
COLOURS = {"red": (0.86, 0.16, 0.16), "yellow": (0.93, 0.87, 0.15), "green": (0.15, 0.70, 0.22),
           "blue": (0.18, 0.32, 0.90), "purple": (0.55, 0.18, 0.78), "cyan": (0.15, 0.83, 0.86),
           "white": (0.95, 0.95, 0.95)}
SHAPES = ("circle", "triangle", "heart", "cross", "ring", "star", "crescent")
CLASSES = [f"{colour} {shape}" for colour in list(COLOURS)[:5] for shape in SHAPES[:5]]
# No caption says these two words together. The first four are classes. No word is in two of them.
HELD_OUT = ("red cross", "yellow circle", "green heart", "blue triangle", "white ring", "cyan star")
PHRASES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES
           if f"{colour} {shape}" not in HELD_OUT]
CAPTIONS = [f"a {manner}{medium} of a {{}}{place}"
            for medium in ("photo", "picture", "image", "sketch")
            for manner in ("", "blurry ", "cropped ", "close-up ", "bright ", "detailed ",
                           "natural ", "realistic ", "low resolution ", "high quality ")
            for place in ("", " in the wild")]

def turn(angle, x, y):
    """The coordinates of (x, y) on axes turned by `angle` radians."""
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

def star_distance(x, y, tips, notch):
    """A star, one tip up at radius 1, its notches at radius `notch`; cos(pi / tips): a polygon."""
    half = math.pi / tips
    radius = torch.hypot(x, y)
    angle = ((torch.atan2(x, -y) + half) % (2 * half) - half).abs()
    dx, dy = notch * math.cos(half) - 1, notch * math.sin(half)  # the edge left after folding
    return ((radius * angle.cos() - 1) * dy - radius * angle.sin() * dx) / math.hypot(dx, dy)

def distance(shape, x, y):
    """Of (x, y), y downwards, from the outline of a shape of radius about 1; inside it is < 0."""
    ax, ay = x.abs(), y.abs()
    if shape == "circle":
        return torch.hypot(x, y) - 0.88
    if shape == "triangle":
        return star_distance(x, y - 0.15, 3, 0.5)
    if shape == "star":
        return star_distance(x, y, 5, 0.45)
    if shape == "heart":  # a square on its corner and two discs
        square = (ax + (y - 0.1).abs() - 0.85) / math.sqrt(2)
        return torch.minimum(square, torch.hypot(ax - 0.425, y + 0.325) - 0.6)
    if shape == "cross":
        return torch.maximum(torch.maximum(ax, ay) - 0.95, torch.minimum(ax, ay) - 0.28)
    if shape == "ring":
        return (torch.hypot(x, y) - 0.74).abs() - 0.22
    return torch.maximum(torch.hypot(x, y) - 0.95, 0.8 - torch.hypot(x - 0.5, y))  # crescent

def render(phrases, style, generator):
    """N phrases, style (N,) from 0 (plain) to 1 (wild) -> images uint8 (N,3,32,32)."""
    N = len(phrases)
    colours, shapes = zip(*(phrase.split() for phrase in phrases))
    def draw(plain, wild, size=(1, 1)):  # (N,1,1): one an image, for use with maps (N,H,W)
        """Uniform numbers (N, *size) between bounds that go from `plain` to `wild` with style."""
        weight = style.view(N, *[1] * len(size))
        low, high = (p + (w - p) * weight for p, w in zip(plain, wild))
        return low + (high - low) * torch.rand(N, *size, generator=generator)
    def cover(canvas, paint, coverage):  # coverage (N,H,W), 0 to 1; edges are as soft as a pixel
        return canvas + (paint - canvas) * coverage.clamp(0, 1).unsqueeze(1)
    middle = torch.arange(SIDE) + 0.5 - SIDE / 2
    py, px = middle.view(1, SIDE, 1), middle.view(1, 1, SIDE)  # pixel centres
    colour = torch.tensor([COLOURS[c] for c in colours]) + draw((-0.12, 0.12), (-0.12, 0.12), [3])
    back = (draw((0.05, 0.3), (0, 1), [1]) + draw((-0.02, 0.02), (-0.25, 0.25), [3])).clamp(0, 1)
    hidden = ((back - colour).norm(dim=1, keepdim=True) < 0.45) & (style.view(N, 1) > 0)
    back = torch.where(hidden, (back + 0.5) % 1, back).view(N, 3, 1, 1)  # at least 0.41 apart
    u, v = turn(draw((0, 0), (0, math.pi)), px, py)  # background texture: stripes to checks
    waves = (u * draw((0.3, 0.3), (0.2, 1.2))).sin() * (v * draw((0.3, 0.3), (0, 1))).cos()
    canvas = back + (waves * draw((0, 0), (-0.2, 0.2))).unsqueeze(1)  # (N,3,H,W)
    for _ in range(4):  # clutter: short strokes of any colour; none in the plain style
        angle = draw((0, 0), (0, math.pi))
        u, v = turn(angle, px - draw((0, 0), (-16, 16)), py - draw((0, 0), (-16, 16)))
        length = draw((0, 0), (0, 7))
        stroke = torch.hypot((u.abs() - length).clamp(min=0), v) - draw((-1, -1), (0.3, 1.5))
        canvas = cover(canvas, torch.rand(N, 3, 1, 1, generator=generator), 0.5 - stroke)
    radius = draw((5.5, 8), (5, 12))
    room = (SIDE / 2 - radius).clamp(max=6 + 10 * style.view(N, 1, 1))  # how far from the middle
    x, y = px - room * draw((-1, 1), (-1, 1)), py - room * draw((-1, 1), (-1, 1))
    x, y = turn(draw((-0.35, 0.35), (0, 2 * math.pi)), x, y)
    outside = torch.empty(N, SIDE, SIDE)
    for shape in set(shapes):
        rows = torch.tensor([s == shape for s in shapes])
        outside[rows] = distance(shape, x[rows] / radius[rows], y[rows] / radius[rows])
    uneven = draw((0, 0), (0, 0.25)) * (x * draw((1, 1), (0.4, 1.5))).sin()
    paint = colour.view(N, 3, 1, 1) * (1 + uneven).unsqueeze(1)
    canvas = cover(canvas, paint, 0.5 - outside * radius)
    noise = torch.randn(N, 3, SIDE, SIDE, generator=generator)
    canvas = canvas + noise * draw((0.08, 0.08), (0.02, 0.08), [1, 1, 1])
    return canvas.clamp(0, 1).mul(255).round().to(torch.uint8)

def render_shapes(split, seed=0):
    """-> images uint8 (N,3,32,32), labels int64 (N,), class names; "shift" is wild."""
    generator = torch.Generator().manual_seed(10 * seed + list(SIZES).index(split))
    labels = torch.arange(SIZES[split]) % len(CLASSES)
    style = torch.zeros(len(labels))
    if split == "shift":
        style = 0.2 + 0.8 * torch.rand(len(labels), generator=generator)
    return render([CLASSES[label] for label in labels], style, generator), labels, list(CLASSES)

def render_captions(n, seed=0):
    """-> images uint8 (n,3,32,32) of the wider world and what each shows, n of PHRASES."""
    generator = torch.Generator().manual_seed(10 * seed + 9)
    phrases = [PHRASES[i] for i in torch.randint(len(PHRASES), (n,), generator=generator)]
    style = (2 * torch.rand(n, generator=generator) - 1).clamp(min=0)  # half of them plain
    images = [render(phrases[i : i + 1000], style[i : i + 1000], generator)
              for i in range(0, n, 1000)]  # blocks bound the memory
    return torch.cat(images), phrases

WORDS = sorted(set(re.findall("[a-z]+", " ".join((*CAPTIONS, *COLOURS, *SHAPES)))))
# Byte pairs, joined from a word's last letter on: each of WORDS is one token, other words are more.
MERGES = list(dict.fromkeys((word[i - 1], word[i:] + "</w>")
                            for word in WORDS for i in range(len(word) - 1, 0, -1)))
TINY_CLIP = {  # the arguments of clip_model.CLIP; 514 ids are those of bytes alone
    "embed_dim": 64, "image_resolution": SIDE, "vision_layers": (1, 1, 1, 1), "vision_width": 16,
    "vision_patch_size": None, "context_length": 56, "vocab_size": 514 + len(MERGES),
    "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 2}
VERSION = 2  # of the tiny CLIP: raised when its pictures, captions, sizes or training change

def train_tiny_clip(clip, tokenizer, preprocess, images, phrases, templates, seed=0, steps=500,
                    batch_size=128, progress=lambda done: None):
    """Trains a small CLIP on pictures uint8 (N,3,H,W) and N phrases that templates make captions
    of. -> the same CLIP in eval mode, on its device. Tokenizer and preprocess are clip_model's;
    progress(steps done) follows every step. Contrastive both ways (Radford 2021, section 2.3), but
    for two things. Captions of a step share their template, and equal ones are encoded once: none
    is its own negative. And captions that differ in their templates alone are positives, or the
    text tower, to which all look alike at first, does not tell them apart within so few steps."""
    generator, device = torch.Generator().manual_seed(seed), clip.logit_scale.device
    texts = sorted(set(phrases))
    text_of = torch.tensor([texts.index(phrase) for phrase in phrases])  # (N,)
    tokens = torch.stack([tokenizer([template.format(text) for text in texts], clip.context_length)
                          for template in templates]).to(device)  # (templates, texts, L)
    optimizer = torch.optim.AdamW(clip.parameters(), betas=(.9, .98), weight_decay=.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.5e-3, steps, pct_start=0.15,
                                                   cycle_momentum=False)
    for step in range(steps):
        shown = torch.randint(len(images), (batch_size,), generator=generator)
        two = torch.randint(len(tokens), (2,), generator=generator)  # templates
        present, column = text_of[shown].to(device).unique(return_inverse=True)  # (T,), (B,)
        pixels = preprocess(images[shown].to(device), clip.visual.input_resolution)
        image = F.normalize(clip.encode_image(pixels), dim=1)  # (B,D)
        text = clip.encode_text(tokens[two][:, present].flatten(0, 1))
        text, reworded = F.normalize(text, dim=1).chunk(2)  # (T,D) each
        scale = clip.logit_scale.exp()
        logits = scale * image @ text.T  # (B,T)
        share = F.normalize(F.one_hot(column, len(text)).float(), p=1, dim=0)  # a text's images
        loss = (F.cross_entropy(logits, column) + F.cross_entropy(logits.T, share.T)) / 2
        same = torch.arange(len(text), device=device)
        loss = loss + F.cross_entropy(scale * text @ reworded.T, same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        clip.logit_scale.data.clamp_(max=math.log(100))
        progress(step + 1)
    return clip.eval()
