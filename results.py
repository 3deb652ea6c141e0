"""What is made of reports, the dicts that evaluate.py writes to report.json: comparisons, tables, pictures.

    groups = compare([json.loads(Path(path).read_text()) for path in paths])   # methods over seeds
    print(comparison(groups))                                                   # as Markdown

Nothing is evaluated here. Imports torch; matplotlib in `plot` alone.
"""

import functools
import io
import math

import torch

# Several runs ---------------------------------------------------------------------------------------------------------


@functools.cache  # thousands of cells, few degrees of freedom
def student_t(df, level=0.95):
    """The t for which P(|T| <= t) = level under Student's distribution of `df` degrees of freedom (12.706 for 1). In
    u = atan(T / sqrt(df)) its density is cos(u) ** (df - 1), which is added up here."""
    angle = torch.linspace(0, math.pi / 2, 10 ** 6 + 1, dtype=torch.float64)
    share = torch.cumulative_trapezoid(angle.cos() ** (df - 1), angle)
    return math.sqrt(df) * angle[1 + torch.searchsorted(share, level * share[-1])].tan().item()


def statistics(values):
    """{"n", "mean", "std", "low", "high"} of numbers: the unbiased standard deviation, the mean's 95 % interval by
    Student's t. One number alone has {"n", "mean"}."""
    n, values = len(values), torch.tensor(values, dtype=torch.float64)
    mean = values.mean().item()
    if n == 1:
        return {"n": 1, "mean": mean}
    half = student_t(n - 1) * values.std().item() / math.sqrt(n)
    return {"n": n, "mean": mean, "std": values.std().item(), "low": mean - half, "high": mean + half}


def figures(report):
    """The numbers of a report by which runs are compared: {column: number}."""
    found = {f"{name} top-1 %": row["top1"] for name, row in report.items() if isinstance(row, dict) and "brier" in row}
    corruptions = report.get("corruptions", {})
    if "mean_error" in corruptions:
        found[f"{corruptions['source']} corruptions top-1 %"] = 100 - corruptions["mean_error"]
    return {**found, "NLL": report["test"]["nll"], "ECE %": report["test"]["ece"]}


def by_method(reports):
    """{(method, flag, ...): {seed: figures}}: the method's name and the settings, save the seed, that differ from those
    of its first report. Raises ValueError where two reports are of one method and seed."""
    methods, first = {}, {}
    for report in reports:
        of, settings = report["of"], report.get("settings", {})
        usual = first.setdefault(of.get("method"), settings)
        own = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()
               if name != "seed" and value not in (None, []) and usual.get(name) != value]
        method = (of.get("method") or of["checkpoint"], *own)
        if of.get("seed") in methods.setdefault(method, {}):
            raise ValueError(f"two reports are of {' '.join(method)} with seed {of.get('seed')}; expected each run "
                             "once")
        methods[method][of.get("seed")] = figures(report)
    return methods


def compare(reports):
    """Methods over seeds, from reports as evaluate.py writes them.

    -> a list of groups {"dataset", "teacher", "student", "epochs", "rows": {method: {column: cell}}}; runs without a
    teacher join every group of their student. A cell is `statistics` of the method's runs, with "difference" the same
    of what they have more than the `kd` run of their seed, among several of `kd` that with most of the row's own flags
    and no other ones. The first rows are the group's own CLIP, teacher and fused teacher, where its runs know them.
    """
    def key(report):
        return {name: report["of"].get(name) for name in ("dataset", "student", "epochs")}

    groups, told = [], []
    for report in reports:
        group = {**key(report), "teacher": report["of"].get("teacher")}
        alike = [other for other in reports if key(other) == key(report)]
        if group in told or not group["teacher"] and any(other["of"].get("teacher") for other in alike):
            continue
        told.append(group)
        members = [other for other in alike if other["of"].get("teacher") in (group["teacher"], None)]
        rows = {}
        for who, name in (("clip", "CLIP zero-shot"), ("teacher", "teacher"), ("fused", "fused teacher")):
            for other in members:
                splits = other.get("teachers", {}).get(who, {})
                if corrupted := other.get("fused", {}).get("corruptions"):
                    splits = {**splits, f"{corrupted['source']} corruptions": corrupted[who]}
                rows.setdefault(name, {}).update(
                    {f"{split} top-1 %": statistics([top1]) for split, top1 in splits.items()})
        rows = {name: row for name, row in rows.items() if row}
        methods = by_method(members)
        for method, runs in methods.items():
            baselines = [other for other in methods
                         if other[0] == "kd" and other != method and {*other[1:]} < {*method}]
            baseline, label = methods[max(baselines, key=len)] if baselines else {}, " ".join(method)
            rows[label] = {}
            for column in dict.fromkeys(column for run in runs.values() for column in run):
                values = {seed: run[column] for seed, run in runs.items() if column in run}
                more = [value - baseline[seed][column] for seed, value in values.items()
                        if column in baseline.get(seed, {})]
                rows[label][column] = {**statistics(list(values.values())),
                                       **({"difference": statistics(more)} if more else {})}
        groups.append({**group, "rows": rows})
    return groups


def comparison(groups):
    """What `compare` returns, as Markdown: a table a group."""
    lines = []
    for group in groups:
        columns = sorted(dict.fromkeys(column for row in group["rows"].values() for column in row),
                         key=("NLL", "ECE %").__contains__)  # these last
        architectures = " → ".join(filter(None, (group["teacher"], group["student"])))
        lines += [f"{group['dataset']}, {architectures}, {group['epochs']} epochs. Mean ± "
                  "standard deviation over seeds; in brackets the paired difference to kd (the one with most of a "
                  "row's flags) and its 95 % interval (Student's t).", "", "| | runs | " + " | ".join(columns) + " |",
                  "| --- " * (len(columns) + 2) + "|"]
        for label, row in group["rows"].items():
            cells = [label, str(max(cell["n"] for cell in row.values()))]
            for column in columns:
                cell, digits, text = row.get(column, {}), 3 if column == "NLL" else 2, "not run"
                if cell:
                    text = f"{cell['mean']:.{digits}f}"
                if "std" in cell:
                    text += f" ± {cell['std']:.{digits}f}"
                if "difference" in cell:
                    more = cell["difference"]
                    text += f" ({more['mean']:+.{digits}f}"
                    text += f"; {more['low']:+.{digits}f} to {more['high']:+.{digits}f})" if "low" in more else ")"
                cells.append(text)
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


# Tables and pictures --------------------------------------------------------------------------------------------------

UNITS = {"top1": "top-1 %", "nll": "NLL, nats", "ece": "ECE %"}


def tables(reports):
    """The reports as text: a table of test sets each, one of corruptions by severity, and what fusion does."""
    lines = []
    for report in reports:
        lines.append(describe(report))
        lines.append(f"{'':28}{'top-1 %':>10}{'top-5 %':>10}{'NLL':>10}{'Brier':>10}{'ECE %':>10}{'ECE mass %':>12}")
        for name, row in report.items():
            if isinstance(row, dict) and "brier" in row:
                before, after = row["calibration"]["before"], row["calibration"]["after"]
                half = "half of it, " if before["images"] < row["images"] else ""
                for label, part in ((name, row), *([(f"  {half}T = 1", before)] if half else []),
                                    (f"  {half}T = {row['calibration']['temperature']:.3g}", after)):
                    lines.append(f"{label:28}{part['top1']:10.2f}{part['top5']:10.2f}{part['nll']:10.3f}"
                                 f"{part['brier']:10.3f}{part['ece']:10.2f}{part['ece_equal_mass']:12.2f}")
        if "mean_error" in report.get("corruptions", {}):
            found = report["corruptions"]
            lines.append(f"{'top-1 %, severity':28}{1:>10}{2:>10}{3:>10}{4:>10}{5:>10}{'mean':>12}")
            for name, row in found["top1"].items():
                lines.append(f"{name:28}" + "".join(f"{value:10.2f}" for value in row) + f"{sum(row) / 5:12.2f}")
            lines.append(f"over the fifteen ({found['source']}): mean error {found['mean_error']:.2f} %, less the "
                         f"clean error {found['relative_mean_error']:.2f} %")
            if "mce" in found:
                lines.append(f"against AlexNet: mCE {found['mce']:.1f} %, relative mCE {found['relative_mce']:.1f} %")
        if "fused" in report:
            lines += fused_table(report["fused"])
    return "\n".join(lines)


def describe(report):
    return ", ".join(f"{key} {value}" for key, value in report["of"].items() if value is not None)


def fused_table(fused):
    """What evaluate.py's `analyse` found, as lines."""
    def line(label, models, name):
        text = f"{label:28}"
        for model in ("teacher", "clip", "fused"):
            (value, low, high), change = models[model][name]["value"], models[model][name].get("change")
            cell = f"{value:.2f} [{low:.2f}, {high:.2f}]" + (f" {change[0]:+.2f}" if change else "")
            text += f"{cell:32}"
        return text.rstrip()

    lines = [f"fusion at alpha {fused['alpha']}, CLIP's scale {fused['clip_scale']:.3g}, softmax at T = 1: value, 95 % "
             "interval, change against the teacher", f"{'':28}{'teacher':32}{'CLIP':32}fused"]
    for i, (threshold, models) in enumerate(fused["quadrants"].items()):
        for name in models["teacher"]:
            if name in UNITS:
                lines += [line(UNITS[name], models, name)] if i == 0 else []
            else:
                lines.append(line(f"{name.replace('_', ', ')} at {threshold}, %", models, name))
    for name in fused["non_target"]["teacher"]:
        unit = " %" if name.startswith("same") else ", nats" if name == "entropy" else ""
        lines.append(line(f"non-target {name.replace('_', ' ')}{unit}", fused["non_target"], name))
    if "corruptions" in fused:
        found = fused["corruptions"]
        row = "".join(f"{found[who]:<32.2f}" for who in ("teacher", "clip", "fused"))
        lines.append(f"{'top-1 %, corruptions':28}{row}".rstrip())
    names = [name for name in fused["sweep"][0] if name != "alpha"]
    lines.append(f"{'alpha, quadrants at 0.7':28}"
                 + "".join(f"{UNITS.get(name, name.replace('_', ', ')):>18}" for name in names))
    for row in fused["sweep"]:
        lines.append(f"{row['alpha']:<28}" + "".join(f"{row[name][0]:18.2f}" for name in names))
    return lines


def plot(report):
    """What a report has as a picture, for black and white print: reliability, corruptions, the sweep over alpha,
    quadrants. -> the bytes of a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure  # optional; without the global state of pyplot

    panels = [plot_reliability]
    panels += [plot_corruptions] if "mean_error" in report.get("corruptions", {}) else []
    panels += [plot_sweep, plot_quadrants] if "fused" in report else []
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    figure = Figure(figsize=(7.5 * columns, 6 * rows), layout="constrained")
    for i, panel in enumerate(panels, 1):
        panel(figure.add_subplot(rows, columns, i), report)
    figure.suptitle(describe(report))
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    return picture.getvalue()


def plot_reliability(axes, report):
    table = report["test"]["calibration"]
    axes.plot([0, 100], [0, 100], color="0.7", label="calibrated")
    for part, style, shade, label in (("before", "o-", "k", "T = 1"),
                                      ("after", "s--", "0.5", f"T = {table['temperature']:.3g}")):
        bins = table[part]["bins"]
        points = [(100 * c, 100 * a) for c, a, n in zip(bins["confidence"], bins["accuracy"], bins["count"]) if n]
        axes.plot(*zip(*points), style, color=shade,
                  label=f"{label}: ECE {table[part]['ece']:.1f} %, NLL {table[part]['nll']:.2f}")
    axes.set(xlabel="confidence, % (mean of a bin)", ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100),
             title=f"Reliability, test split ({table['before']['images']} images)")
    axes.legend(loc="upper left")


def plot_corruptions(axes, report):
    table = report["corruptions"]["top1"]
    picture = axes.imshow(list(table.values()), cmap="Greys_r", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(table.values()):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", color="k" if value > 45 else "w")
    axes.set(xlabel="severity", xticks=range(5), xticklabels=range(1, 6), yticks=range(len(table)),
             yticklabels=[name.replace("_", " ") for name in table],
             title=f"Corruptions, {report['corruptions']['source']}")
    axes.figure.colorbar(picture, ax=axes, label="top-1 accuracy, %")


def plot_sweep(axes, report):
    fused, right = report["fused"], axes.twinx()
    alphas = [row["alpha"] for row in fused["sweep"]]
    for side, name, style, label in ((axes, "top1", "o-", "top-1, %"), (axes, "ece", "s--", "ECE, %"),
                                     (right, "nll", "^:", "NLL, nats")):
        values, low, high = zip(*(row[name] for row in fused["sweep"]))
        spread = [[max(0, v - a) for v, a in zip(values, low)], [max(0, b - v) for v, b in zip(values, high)]]
        side.errorbar(alphas, values, spread, fmt=style, color="k", capsize=3, label=label)
    axes.axvline(fused["alpha"], color="0.8", linewidth=6, zorder=0)
    axes.set(xlabel="alpha, the teacher's share (0: CLIP alone, 1: the teacher alone)", ylabel="top-1 and ECE, %",
             ylim=(0, 115), yticks=range(0, 101, 20),
             title="Fused logits on the test split, 95 % intervals; grey: the run's alpha")
    right.set(ylabel="NLL, nats", ylim=(0, None))
    handles = [side.get_legend_handles_labels() for side in (axes, right)]
    axes.legend(*(a + b for a, b in zip(*handles)), loc="upper center", ncol=3)


def plot_quadrants(axes, report):
    table = report["fused"]["quadrants"]
    bars = [(threshold, model) for threshold in table for model in table[threshold]]
    places, base = [i + i // 3 for i in range(len(bars))], [0.0] * len(bars)
    quadrants = [name for name in table[bars[0][0]]["fused"] if name not in UNITS]
    for name, shade, hatch in zip(quadrants, ("0.55", "0.2", "0.95", "0.75"), ("", "", "//", "xx")):
        shares = [table[threshold][model][name]["value"][0] for threshold, model in bars]
        axes.bar(places, shares, bottom=base, color=shade, hatch=hatch, edgecolor="k", label=name.replace("_", ", "))
        for x, y, share in zip(places, base, shares):
            if share >= 4:
                axes.text(x, y + share / 2, f"{share:.0f}", ha="center", va="center", color="w" if shade == "0.2" else
                          "k", bbox={"facecolor": shade, "edgecolor": "none", "pad": 1})
        base = [a + b for a, b in zip(base, shares)]
    axes.set(xticks=places, xticklabels=[f"{model}\n{threshold}" for threshold, model in bars], ylim=(0, 122),
             yticks=range(0, 101, 20), xlabel="model, and the confidence from which it counts as confident",
             ylabel="test images, %", title="Confident or unsure, right or wrong")
    axes.legend(loc="upper center", ncol=2)
