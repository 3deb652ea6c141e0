"""The pictures of `python evaluate.py --plot`, for black and white print. Needs matplotlib."""

import io
import math

import torch
import torchvision
from PIL import Image

import data
import evaluate
from corruptions import COMMON
from support import files


def draw(config, test, subject):
    """Write report.png and, of corruptions, samples.png beside a report; config: evaluate's."""
    title = evaluate.describe(subject.report)
    files.write_atomically(subject.path.with_suffix(".png"), pictures(subject.report, title))
    if config.corruptions:
        images = next(iter(evaluate.device_blocks(test.images, config)))[:2].cpu()
        few = data.Split(images, test.labels[:2], test.class_names)
        rows = []
        for severity in range(1, 6):
            first = [next(iter(evaluate.corrupted(few, name, severity, config)[0]))
                     for name in COMMON]
            rows.append([block[:2].cpu() for block in first])
        files.write_atomically(subject.path.with_name("samples.png"), samples(rows))


def pictures(report, title):
    """What a report has, a panel each: reliability, corruptions, the sweep over alpha, quadrants.
    Returns the bytes of a PNG."""
    from matplotlib.figure import Figure  # optional; without the global state of pyplot

    panels = [reliability]
    if "mean_error" in report.get("corruptions", {}):
        panels.append(corruptions)
    if "fused" in report:
        panels += [sweep, quadrants]
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    figure = Figure(figsize=(7.5 * columns, 6 * rows), layout="constrained")
    for i, panel in enumerate(panels, 1):
        panel(figure.add_subplot(rows, columns, i), report)
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    return picture.getvalue()


def reliability(axes, report):
    table = report["test"]["calibration"]
    axes.plot([0, 100], [0, 100], color="0.7", label="calibrated")
    fitted = evaluate.temperature_text(table["temperature"])
    for part, style, shade, label in (("before", "o-", "k", "T = 1"),
                                      ("after", "s--", "0.5", fitted)):
        bins = table[part]["bins"]
        points = [(100 * confidence, 100 * accuracy) for confidence, accuracy, count
                  in zip(bins["confidence"], bins["accuracy"], bins["count"]) if count]
        axes.plot(*zip(*points), style, color=shade,
                  label=f"{label}: ECE {table[part]['ece']:.1f} %, NLL {table[part]['nll']:.2f}")
    axes.set(xlabel="confidence, % (mean of a bin)", ylabel="accuracy, %", xlim=(0, 100),
             ylim=(0, 100), title=f"Reliability, test split ({table['before']['images']} images)")
    axes.legend(loc="upper left")


def corruptions(axes, report):
    table = report["corruptions"]["top1"]
    picture = axes.imshow(list(table.values()), cmap="Greys_r", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(table.values()):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.1f}", ha="center", va="center",
                      color="k" if value > 45 else "w")
    axes.set(xlabel="severity", xticks=range(5), xticklabels=range(1, 6), yticks=range(len(table)),
             yticklabels=[name.replace("_", " ") for name in table],
             title=f"Corruptions, {report['corruptions']['source']}")
    axes.figure.colorbar(picture, ax=axes, label="top-1 accuracy, %")


def sweep(axes, report):
    fused, right = report["fused"], axes.twinx()
    alphas = [row["alpha"] for row in fused["sweep"]]
    for side, name, style, label in ((axes, "top1", "o-", "top-1, %"),
                                     (axes, "ece", "s--", "ECE, %"),
                                     (right, "nll", "^:", "NLL, nats")):
        side.plot(alphas, [row[name] for row in fused["sweep"]], style, color="k", label=label)
    axes.axvline(fused["alpha"], color="0.8", linewidth=6, zorder=0)
    axes.set(xlabel="alpha, the teacher's share (0: CLIP alone, 1: the teacher alone)",
             ylabel="top-1 and ECE, %", ylim=(0, 115), yticks=range(0, 101, 20),
             title="Fused logits on the test split; grey: the run's alpha")
    right.set(ylabel="NLL, nats", ylim=(0, None))
    handles = [side.get_legend_handles_labels() for side in (axes, right)]
    axes.legend(*(a + b for a, b in zip(*handles)), loc="upper center", ncol=3)


def quadrants(axes, report):
    table = report["fused"]["quadrants"]
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


def samples(cells):
    """A picture of images under corruptions: `cells` is a list of uint8 (n, 3, H, W), a corruption
    each, for every severity. Corruptions are the columns, images and their severities the rows;
    small images are enlarged. Returns the bytes of a PNG."""
    columns = len(cells[0])
    images = torch.stack([image for row in cells for image in row], dim=1)  # (n, 5 * columns, ...)
    times = max(1, 96 // images.shape[-1])
    images = images.flatten(0, 1).repeat_interleave(times, 2).repeat_interleave(times, 3)
    grid = torchvision.utils.make_grid(images, nrow=columns, pad_value=255)  # (3, H, W)
    picture = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(picture, format="png")
    return picture.getvalue()
