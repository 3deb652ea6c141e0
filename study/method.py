"""The picture of the method: `python study/method.py` writes study/method.svg, for light and dark
pages. The numbers in it are those of richkd.py's equations."""

from pathlib import Path

STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328; text-anchor: middle; }
.small { font-size: 12px; } .math { font-style: italic; }
rect { fill: #f6f8fa; stroke: #59636e; stroke-width: 1.4; rx: 7; }
.clip rect { fill: #ddf4ff; stroke: #0969da; } .fused rect { fill: #fff8c5; stroke: #9a6700; }
.loss rect { fill: #dafbe1; stroke: #1a7f37; } .trained rect { stroke-dasharray: 6 3; }
path { fill: none; stroke: #59636e; stroke-width: 1.6; marker-end: url(#head); }
#head path { fill: #59636e; stroke: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } rect { fill: #21262d; stroke: #8d96a0; }
  .clip rect { fill: #0c2d4a; stroke: #58a6ff; } .fused rect { fill: #3b2f0b; stroke: #d29922; }
  .loss rect { fill: #12361f; stroke: #3fb950; } path { stroke: #8d96a0; }
  #head path { fill: #8d96a0; }
}
"""

# class, left, top, width, lines of text
BOXES = [
    ("", 10, 90, 120, ["plain image"]),
    ("", 10, 220, 120, ["the same image", "crop and flip"]),
    ("clip", 10, 10, 150, ["M prompts a class", "a photo of a {} ..."]),
    ("clip", 215, 10, 150, ["CLIP, text", "frozen"]),
    ("clip", 215, 90, 150, ["CLIP, image", "frozen; once, cached"]),
    ("", 215, 180, 150, ["teacher", "frozen"]),
    ("trained", 215, 280, 150, ["student", "trained"]),
    ("clip", 420, 30, 150, ["mean of prompts (1)", "scale · cosines (2)"]),
    ("fused", 625, 60, 150, ["fused logits (3)", "α zT + (1 − α) zC"]),
    ("fused", 625, 165, 150, ["fused features (4)", "λ gT(fT) + (1 − λ) gC(fC)"]),
    ("loss", 850, 60, 140, ["logit loss (5)", "KD, T = 3"]),
    ("loss", 850, 165, 140, ["feature loss (6)", "contrastive memory"]),
    ("loss", 850, 280, 140, ["cross-entropy", "with the label"]),
]
# Points of each arrow, and a word beside its middle with its place.
ARROWS = [
    ("M160 33 H213", ""), ("M130 113 H213", ""), ("M130 236 H170 V203 H213", ""),
    ("M130 250 H170 V303 H213", ""), ("M365 33 H395 V45 H418", ""), ("M365 105 H395 V62 H418", ""),
    ("M570 53 H597 V72 H623", "zC 606 44"), ("M365 122 H520 V180 H623", "fC 470 116"),
    ("M365 192 H560 V96 H623", "zT 480 186"), ("M365 210 H623", "fT 480 227"),
    ("M775 83 H848", ""), ("M775 188 H848", ""), ("M365 303 H848", "zS, fS 600 296"),
    ("M830 303 V96 H848", ""), ("M830 250 V205 H848", ""),
]


def method_svg():
    """The picture as SVG text."""
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 350" role="img">'
             f"<title>RichKD: teacher and CLIP are fused and teach a student</title>"
             f"<style>{STYLE}</style>"
             '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
             'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 Z"/></marker></defs>']
    for path, word in ARROWS:
        parts.append(f'<path d="{path}"/>')
        if word:
            text, x, y = word.rsplit(" ", 2)
            parts.append(f'<text class="small math" x="{x}" y="{y}">{text}</text>')
    for kind, left, top, width, lines in BOXES:
        parts.append(f'<g class="{kind}"><rect x="{left}" y="{top}" width="{width}" height="46"/>')
        for number, line in enumerate(lines):
            y = top + (28 if len(lines) == 1 else 20 + 17 * number)
            size = ' class="small"' if number else ""
            parts.append(f'<text{size} x="{left + width / 2:g}" y="{y}">{line}</text>')
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("method.svg").write_text(method_svg(), encoding="utf-8")
