"""The pictures of a run, for black and white print. Needs matplotlib.

    python study/plot.py RUN                     # RUN/report.png, of report.json and fusion.json
    python study/plot.py RUN --corruptions       # RUN/samples.png, too: two images, corrupted

The panels of report.png: top-1 of student, teacher, CLIP and fused teacher (with what evaluate.py
--fused has found) on every set, reliability, corruptions, the sweep over alpha, confidence.

evaluate.py makes RUN/report.json, study/fusion.py RUN/fusion.json. Flags are those of evaluate.py.
"""

import importlib.util
import io
import math
import sys
import torch
import torch.nn.functional as F
import torchvision
from pathlib import Path
from PIL import Image, ImageDraw

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import evaluate
import metrics
from corruptions import COMMON
from support import command, files

def draw(config):
    """Write the pictures of a run beside its report; config: an evaluate.Config."""
    if not importlib.util.find_spec("matplotlib"):
        raise ValueError("the pictures need matplotlib, which is not installed: pip install "
                         "matplotlib")
    folder = Path(config.run[0] if config.run else evaluate.newest_run(config.fused))
    report = files.read_json(folder / "report.json", f"python evaluate.py --run {folder} makes it")
    fusion = None
    if (folder / "fusion.json").is_file():
        advice = f"python study/fusion.py {folder} makes it anew"
        fusion = files.read_json(folder / "fusion.json", advice)
        if fusion["weights"] != report["about"]["weights"]:
            raise ValueError(f"{folder / 'fusion.json'} is of other weights; {advice}")
    picture = pictures(report["sets"], fusion, folder.name)
    files.write_atomically(folder / "report.png", lambda file: file.write(picture))
    files.note(f"{folder / 'report.png'} has the panels")
    if config.corruptions:
        config, splits, _ = evaluate.prepare(config)
        test = splits["test"]
        few = test._replace(images=data.take(test.images, slice(2)), labels=test.labels[:2])
        sets = evaluate.corrupted_sets(config, few)
        cells = {images.name: next(iter(images.blocks))[:2].cpu() for images in sets}
        files.write_atomically(folder / "samples.png", lambda file: file.write(samples(cells)))
        files.note(f"{folder / 'samples.png'} has two images under every corruption")

def pictures(sets, fusion, title):
    """A panel each for what a report's sets have, top-1, reliability and corruptions, and for the
    sweep over alpha and the quadrants of fusion.json, if that is there. -> the bytes of a PNG."""
    from matplotlib.figure import Figure  # optional; without the global state of pyplot

    panels = [(subjects, sets), (reliability, sets)]
    if "corruptions" in sets:
        panels.append((corruptions, sets["corruptions"]))
    if fusion:
        panels += [(sweep, fusion), (quadrants, fusion)]
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    figure = Figure(figsize=(7.5 * columns, 6 * rows), layout="constrained")
    for i, (panel, table) in enumerate(panels, 1):
        panel(figure.add_subplot(rows, columns, i), table)
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    return picture.getvalue()

# Of each subject: shade and hatch of its bars, line and marker of its points.
STYLES = {"student": ("0.2", "", "o-"), "teacher": ("0.55", "", "v:"), "CLIP": ("0.95", "//", "^:"),
          "fused": ("0.75", "xx", "d:")}

def subjects(axes, sets):
    """Bars: top-1 of every subject on every set but the corruptions one by one."""
    shown = {name: rows for name, rows in sets.items() if name not in evaluate.CORRUPTED}
    known = [who for who in STYLES if any(who in rows for rows in shown.values())]
    for i, who in enumerate(known):
        shade, hatch, _ = STYLES[who]
        bars = {x + i / (1 + len(known)): rows[who]["top1"]
                for x, rows in enumerate(shown.values()) if who in rows}
        drawn = axes.bar(bars.keys(), bars.values(), 1 / (1 + len(known)), color=shade, hatch=hatch,
                         edgecolor="k", label=who)
        axes.bar_label(drawn, fmt="%.0f")
    axes.set(xticks=[x + (len(known) - 1) / 2 / (1 + len(known)) for x in range(len(shown))],
             xticklabels=[name.replace(" ", "\n") for name in shown], ylim=(0, 119),
             yticks=range(0, 101, 20), ylabel="top-1 accuracy, %",
             title="Accuracy on every set of images")
    axes.legend(loc="upper center", ncol=4)

def reliability(axes, sets):
    table = sets["test"]["student"]["calibration"]
    bound = {metrics.LEAST_TEMPERATURE: "≤", metrics.MOST_TEMPERATURE: "≥"}  # the best is beyond
    T = f"{table['temperature']:.3g}"
    axes.plot([0, 100], [0, 100], color="0.7", label="calibrated")
    for part, style, shade, label in (
            ("before", "o-", "k", "student"),
            ("after", "s--", "0.5", f"student, T {bound.get(float(T), '=')} {T}")):
        points = [(100 * confidence, 100 * accuracy)
                  for confidence, accuracy, count in zip(*table[part]["bins"]) if count]
        axes.plot(*zip(*points), style, color=shade,
                  label=f"{label}: ECE {table[part]['ece']:.1f} %, NLL {table[part]['nll']:.2f}")
    for who in [who for who in ("teacher", "CLIP", "fused") if who in sets["test"]]:
        before = sets["test"][who]["calibration"]["before"]
        points = [(100 * x, 100 * y) for x, y, count in zip(*before["bins"]) if count]
        label = f"{who}: ECE {before['ece']:.1f} %, NLL {before['nll']:.2f}"
        axes.plot(*zip(*points), STYLES[who][2], color="0.5", label=label)
    axes.set(xlabel="confidence, % (mean of a bin)", ylabel="accuracy, %", xlim=(0, 100),
             ylim=(0, 100), title=f"Reliability, test split ({table['before']['images']} images)")
    axes.legend(loc="upper left")

def corruptions(axes, rows):
    table = rows["student"]["by_severity"]
    picture = axes.imshow(list(table.values()), cmap="Greys_r", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(table.values()):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.1f}", ha="center", va="center",
                      color="k" if value > 45 else "w")
    axes.set(xlabel="severity", xticks=range(5), xticklabels=range(1, 6), yticks=range(len(table)),
             yticklabels=[name.replace("_", " ") for name in table],
             title=f"The student under corruptions, {rows['key']['source']}")
    axes.figure.colorbar(picture, ax=axes, label="top-1 accuracy, %")

def sweep(axes, fused):
    right = axes.twinx()
    alphas = [row["alpha"] for row in fused["sweep"]]
    for side, name, style, label in ((axes, "top1", "o-", "top-1, %"),
                                     (axes, "ece", "s--", "ECE, %"),
                                     (right, "nll", "^:", "NLL, nats")):
        side.plot(alphas, [row[name] for row in fused["sweep"]], style, color="k", label=label)
    axes.axvline(fused["alpha"], color="0.8", linewidth=6, zorder=0)
    axes.set(xlabel="alpha, the teacher's share (0: CLIP alone, 1: the teacher alone)",
             ylabel="top-1 and ECE, %", ylim=(0, 115), yticks=range(0, 101, 20),
             title=f"Fused logits on {fused['images']}; grey: the run's alpha")
    right.set(ylabel="NLL, nats", ylim=(0, None))
    handles = [side.get_legend_handles_labels() for side in (axes, right)]
    axes.legend(*(a + b for a, b in zip(*handles)), loc="upper center", ncol=3)

def quadrants(axes, fused):
    table = fused["quadrants"]
    bars = [(threshold, model) for threshold in table for model in table[threshold]]
    places = [i + i // 3 for i in range(len(bars))]
    base = [0.0] * len(bars)
    for name, shade, hatch in (("confident_right", "0.55", ""), ("confident_wrong", "0.2", ""),
                               ("unsure_right", "0.95", "//"), ("unsure_wrong", "0.75", "xx")):
        shares = [table[threshold][model][name] for threshold, model in bars]
        axes.bar(places, shares, bottom=base, color=shade, hatch=hatch, edgecolor="k",
                 label=name.replace("_", ", "))
        for x, y, share in zip(places, base, shares):
            if share >= 4:
                axes.text(x, y + share / 2, f"{share:.0f}", ha="center", va="center",
                          color="w" if shade == "0.2" else "k",
                          bbox={"facecolor": shade, "edgecolor": "none", "pad": 1})
        base = [a + b for a, b in zip(base, shares)]
    axes.set(xticks=places, xticklabels=[f"{model}\n{threshold}" for threshold, model in bars],
             ylim=(0, 122), yticks=range(0, 101, 20), ylabel="test images, %",
             xlabel="model, and the confidence from which it counts as confident",
             title="Confident or unsure, right or wrong")
    axes.legend(loc="upper center", ncol=2)

LEFT, TOP = 72, 32  # of samples.png: room for names

def samples(cells):
    """A picture of images under corruptions, `cells`: {"clean", "fog 1" ...: uint8 (n, 3, H, W)}.
    Its columns are the clean images and the corruptions, by name; its rows are the severities of
    each image. Small images are enlarged. Returns the bytes of a PNG."""
    rows = [["clean", *(f"{name} {severity}" for name in COMMON)] for severity in range(1, 6)]
    images = torch.stack([torch.stack([cells[name] for name in row], 1) for row in rows], 1)
    times = max(1, 96 // images.shape[-1])  # of (n, 5, 16, 3, H, W)
    images = images.flatten(0, 2).repeat_interleave(times, 2).repeat_interleave(times, 3)
    grid = torchvision.utils.make_grid(images, nrow=len(rows[0]), pad_value=255)  # (3, H, W)
    grid = F.pad(grid, (LEFT, 0, TOP, 0), value=255)
    drawn = Image.fromarray(grid.permute(1, 2, 0).numpy())
    pen, side = ImageDraw.Draw(drawn), images.shape[-1] + 2
    for x, name in enumerate(["clean", *COMMON]):
        pen.text((LEFT + x * side + 4, 4), name.replace("_", "\n"), fill="black")
    for y in range(len(images) // len(rows[0])):
        pen.text((4, TOP + y * side + side // 2), f"severity {y % 5 + 1}", fill="black")
    picture = io.BytesIO()
    drawn.save(picture, format="png")
    return picture.getvalue()

if __name__ == "__main__":
    flags = ["--run", *sys.argv[1:]] if sys.argv[1:] not in ([], ["--help"]) else sys.argv[1:]
    command.main(lambda: draw(command.parse(evaluate.Config, __doc__, flags)))
