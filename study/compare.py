"""Methods over seeds, from reports alone: mean, standard deviation, paired difference to kd.

    python study/compare.py runs/*/report.json              # or lists of them, as study.sh gathers:
    python study/compare.py study/results/shapes-methods.json --markdown

prints tables for each data set, pair of networks and number of epochs, with --markdown as in
study/README.md. Nothing is evaluated here. Reference: Student 1908, The probable error of a mean.
"""

import functools
import json
import math
import sys
import torch
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import command, files

# What every method has, so that it is said where it is not that of the first kd.
SHARED = ("image_size", "lr", "weight_decay", "batch_size", "temperature", "ce_weight", "amp")
UNSET = ("clip_scale", "clip_activation")  # in which None is a value
TEACHER_ROWS = {"CLIP": "CLIP zero-shot", "teacher": "teacher", "fused": "fused teacher"}

# Statistics ---------------------------------------------------------------------------------------
@functools.cache  # thousands of cells, few degrees of freedom
def student_t(df, level=0.95):
    """The t with P(|T| <= t) = level under Student's distribution of `df` degrees of freedom.

    For one degree it is 12.706. In u = atan(T / sqrt(df)) the density is cos(u) ** (df - 1), which
    is added up here."""
    angle = torch.linspace(0, math.pi / 2, 10**6 + 1, dtype=torch.float64)
    share = torch.cumulative_trapezoid(angle.cos() ** (df - 1), angle)
    place = torch.searchsorted(share, level * share[-1])
    return math.sqrt(df) * angle[1 + place].tan().item()

def statistics(values):
    """{"n", "mean", "std", "low", "high"} of numbers: std is the unbiased one, low and high are the
    ends of the mean's 95 % interval by Student's t. One number alone has {"n", "mean"}."""
    n = len(values)
    values = torch.tensor(values, dtype=torch.float64)
    mean = values.mean().item()
    if n == 1:
        return {"n": 1, "mean": mean}
    std = values.std().item()
    half = student_t(n - 1) * std / math.sqrt(n)
    return {"n": n, "mean": mean, "std": std, "low": mean - half, "high": mean + half}

# Reports ------------------------------------------------------------------------------------------
class Run(NamedTuple):
    """What is compared of a report."""
    group: dict      # dataset, test split, student, epochs: what runs in one table have in common
    teacher: str     # or None
    method: str
    seed: int
    settings: dict
    inputs: dict     # "train": content of the training images; "files": {setting: of its file}
    figures: dict    # {column: number} of the student
    teaching: dict   # {row of TEACHER_ROWS: {column: number}}
    content: dict    # {column: what tells its images from others}

def column_of(name, key):
    """The column of a set's top-1; another share of the images, corrupted, is another column."""
    if name != "corruptions":
        return f"{name} top-1 %"
    part = f", {100 * key['share']:.3g} % of the images," if key["share"] < 1 else ""
    return f"{key['source']} corruptions{part} top-1 %"

def run_of(report):
    """The Run in a report, as evaluate.py writes it. Another dict raises what reading it raises."""
    about, sets, settings = report["about"], report["sets"], report["about"]["settings"]
    figures, content, teaching = {}, {}, {label: {} for label in TEACHER_ROWS.values()}
    for name, rows in sets.items():
        if "source" in rows["key"] and name != "corruptions":  # one of the fifteen
            continue
        column = column_of(name, rows["key"])
        figures[column] = float(rows["student"]["top1"])
        content[column] = str(rows["key"].get("content"))[:13]
        for who in TEACHER_ROWS.keys() & rows.keys():
            teaching[TEACHER_ROWS[who]][column] = float(rows[who]["top1"])
    figures["NLL"] = float(sets["test"]["student"]["nll"])
    figures["ECE %"] = float(sets["test"]["student"]["ece"])
    group = {name: settings.get(name) for name in ("dataset", "student", "epochs")}
    return Run({**group, "test": about["test"]}, "+".join(settings.get("teacher") or ()) or None,
               settings.get("method") or settings["checkpoint"], settings.get("seed"), settings,
               about.get("inputs", {"train": None, "files": {}}), figures, teaching, content)

def read_reports(path):
    """The Runs in a file: a report.json, or a list of reports. Raises ValueError for another."""
    advice = "expected a report.json of evaluate.py, or a list of such reports"
    with files.undamaged(path, advice):
        content = json.loads(Path(path).read_text("utf-8"))
    if isinstance(content, dict):
        content = [files.read_json(path, "python evaluate.py --run makes it anew")]
    with files.undamaged(path, advice):
        first, *rest = [run_of(report) for report in content]
    return [first, *rest]  # an empty list was refused above

# Several runs -------------------------------------------------------------------------------------
def by_method(runs):
    """{(method, flag, ...): {seed: Run}}: the method's name and the settings, save the seed, that
    differ from those of its first run; where the settings are the same and data or files are not,
    these by their digest. Raises ValueError where two have all of it and the seed in common."""
    methods, first = {}, {}
    common = next((run for run in runs if run.method == "kd"), *runs[:1])
    for run in runs:
        usual = first.setdefault(run.method, run)
        named, there = run.inputs["files"], usual.inputs["files"]
        flags = [f"{command.flag(name)} {value}" for name, value in run.settings.items()
                 if name != "seed" and (value not in (None, []) or name in UNSET)
                 and value != (common if name in SHARED else usual).settings.get(name)
                 and not (name in named and named[name] == there.get(name))]  # one file, two places
        method = (run.method, *flags)
        if run.inputs != first.setdefault(method, run.inputs):
            method = (*method, f"(other data or files: {files.json_digest(run.inputs)[:8]})")
        seeds = methods.setdefault(method, {})
        if run.seed in seeds:
            raise ValueError(f"two reports are of {' '.join(method)} with seed {run.seed}; "
                             "expected each run once")
        seeds[run.seed] = run
    return methods

def told_apart(runs):
    """The runs of one test split, with columns of one name and of other images renamed by these."""
    def name(column, run):
        several = len({other.content.get(column) for other in runs} - {None}) > 1
        return f"{column} ({run.content[column]})" if several and column in run.content else column

    return [run._replace(figures={name(column, run): value
                                  for column, value in run.figures.items()}) for run in runs]

def groups(runs):
    """Methods over seeds -> [{"dataset", "student", "epochs", "teacher", "rows"}], a group a table.

    runs: as `read_reports` returns them. rows: {method: {column: cell}}, a cell being `statistics`
    of the method's runs, with "difference" the same of what they have more than the `kd` run of
    their seed and training images. Runs without a teacher join every group of their student. The
    first rows are the group's own CLIP, teacher and fused teacher, where its runs know them.
    """
    found = []
    for run in runs:
        group = {**run.group, "teacher": run.teacher}
        alike = [other for other in runs if other.group == run.group]
        joins_others = run.teacher is None and any(other.teacher for other in alike)
        if joins_others or any(group.items() <= other.items() for other in found):
            continue
        members = told_apart([other for other in alike if other.teacher in (run.teacher, None)])
        found.append({**group, "rows": {**teaching_rows(members), **method_rows(members)}})
    return found

def teaching_rows(runs):
    """The rows of CLIP, teacher and fused teacher: of each column, what the last run knows."""
    rows = {label: {} for label in TEACHER_ROWS.values()}
    for run in runs:
        for label, figures in run.teaching.items():
            rows[label] |= {column: statistics([value]) for column, value in figures.items()}
    return {label: row for label, row in rows.items() if row}

def method_rows(runs):
    """The rows of the students, a method with its flags each."""
    rows, methods = {}, by_method(runs)
    for method, seeds in methods.items():
        # Of several kinds of kd, the one with most of this row's flags and with no others.
        baselines = [other for other in methods
                     if other[0] == "kd" and other != method and set(other[1:]) <= set(method[1:])]
        baseline = methods[max(baselines, key=len)] if baselines else {}
        rows[" ".join(method)] = row = {}
        for column in dict.fromkeys(column for run in seeds.values() for column in run.figures):
            values = {seed: run.figures[column] for seed, run in seeds.items()
                      if column in run.figures}
            row[column] = statistics(list(values.values()))
            more = [value - baseline[seed].figures[column] for seed, value in values.items()
                    if seed in baseline and column in baseline[seed].figures
                    and baseline[seed].inputs["train"] == seeds[seed].inputs["train"]]
            if more:
                row[column]["difference"] = statistics(more)
    return rows

CAPTION = ("Mean ± standard deviation over seeds; in brackets how much more than kd of the same "
           "seeds, with its 95 % interval (Student's t).")

def titled(groups):
    """Yield (title, columns, rows) of what `groups` returns: the title says what the runs have in
    common, the columns are those of any row, NLL and ECE last."""
    for group in groups:
        columns = list(dict.fromkeys(column for row in group["rows"].values() for column in row))
        columns.sort(key=lambda column: column in ("NLL", "ECE %"))
        networks = " → ".join(filter(None, (group["teacher"], group["student"])))
        alike = {other["test"] for other in groups if other["dataset"] == group["dataset"]}
        images = f" (test split {str(group['test'])[:8]})" if len(alike) > 1 else ""
        title = f"{group['dataset']}{images}, {networks}, {group['epochs']} epochs."
        yield title, columns, group["rows"]

def as_markdown(groups):
    """What `groups` returns, as Markdown: a table a group."""
    lines = []
    for title, columns, rows in titled(groups):
        lines += [f"{title} {CAPTION}", "", "| | runs | " + " | ".join(columns) + " |",
                  "| --- " * (len(columns) + 2) + "|"]
        for label, row in rows.items():
            runs = max(cell["n"] for cell in row.values())
            cells = [cell_text(row.get(column), 3 if column == "NLL" else 2) for column in columns]
            lines.append("| " + " | ".join([label, str(runs), *cells]) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()

def as_text(groups):
    """What `groups` returns, as text for a terminal: a table a group and column."""
    lines = []
    for title, columns, rows in titled(groups):
        width = max(map(len, rows))
        lines.append(title)
        for column in columns:
            lines += ["", f"{column:{width}}  runs"]
            lines += [f"{label:{width}} {row[column]['n']:5}  "
                      + cell_text(row[column], 3 if column == "NLL" else 2)
                      for label, row in rows.items() if column in row]
        lines.append("")
    return "\n".join([*lines, CAPTION.replace("; ", ";\n")])

def cell_text(cell, digits):
    """ "54.20 ± 0.44 (+2.73; -0.35 to +5.82)", as much of it as the cell has."""
    if not cell:
        return "not run"
    text = f"{cell['mean']:.{digits}f}"
    if "std" in cell:
        text += f" ± {cell['std']:.{digits}f}"
    if "difference" in cell:
        more = cell["difference"]
        text += f" ({more['mean']:+.{digits}f}"
        if "low" in more:
            text += f"; {more['low']:+.{digits}f} to {more['high']:+.{digits}f}"
        text += ")"
    return text

def job(arguments):
    """The tables of some files. Raises ValueError where there are none."""
    paths = [path for path in arguments if path != "--markdown"]
    if not paths:
        raise ValueError("expected FILE...: reports, or lists of them, and --markdown or not")
    shown = as_text if paths == arguments else as_markdown
    return shown(groups([run for path in paths for run in read_reports(path)]))

if __name__ == "__main__":
    command.main(lambda: job(sys.argv[1:]))
