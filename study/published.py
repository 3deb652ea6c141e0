"""What the field published for its thirteen pairs on CIFAR-100, and what was measured here.

    python study/published.py study/results/cifar100-published-*.json     # ours beside theirs

Top-1 in percent after 240 epochs. Teacher, student alone, KD, CRD (Tian 2020) and DKD (Zhao 2022)
stand in the tables of RepDistiller and mdistiller; KD+LS in Sun 2024 (arXiv 2403.01427). Which of
them is the last epoch's and which the best one's differs by source; ours is the last one's, mean ±
standard deviation over seeds.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from study import compare
from support import command

ROWS = """
wrn_40_2    wrn_16_2      75.61 73.26 74.92 75.48 76.23 -
wrn_40_2    wrn_40_1      75.61 71.98 73.54 74.14 74.81 -
resnet56    resnet20      72.34 69.06 70.66 71.16 71.97 -
resnet110   resnet20      74.31 69.06 70.67 71.46 -     71.48
resnet110   resnet32      74.31 71.14 73.08 73.48 74.11 -
resnet32x4  resnet8x4     79.42 72.50 73.33 75.51 76.32 76.62
vgg13       vgg8          74.64 70.36 72.98 73.94 74.68 74.36
vgg13       mobilenetv2   74.64 64.60 67.37 69.73 69.71 -
resnet50    mobilenetv2   79.34 64.60 67.35 69.11 70.35 -
resnet50    vgg8          79.34 70.36 73.81 74.30 -     -
resnet32x4  shufflenetv1  79.42 70.50 74.07 75.11 76.45 -
resnet32x4  shufflenetv2  79.42 71.82 74.45 75.65 77.07 -
wrn_40_2    shufflenetv1  75.61 70.50 74.83 76.05 76.70 -
"""
METHODS = {  # what each was published with, as `study.sh published` passes it to train.py
    "scratch": {},
    "kd": {"temperature": 4.0, "ce_weight": 0.1, "logit_weight": 0.9},
    "crd": {"feature_weight": 0.8},
    "dkd": {"temperature": 4.0, "logit_weight": 1.0},
    "kd-ls": {"temperature": 2.0, "ce_weight": 0.1, "logit_weight": 9.0},
}

def measured(runs, teacher, student, method):
    """Top-1 of the runs of a pair with the published settings, on all training images; [] where
    there is none. runs: as `compare.read_reports` returns them."""
    expected = {"dataset": "cifar100", "epochs": 240, "fraction": 1.0, "holdout": 0.0,
                "method": method, "student": student, **METHODS[method]}
    if method != "scratch":  # whose students have no teacher
        expected["teacher"] = [teacher]
    return [run.figures["test top-1 %"] for run in runs
            if expected.items() <= {**run.settings}.items()]

def as_markdown(runs):
    """A row a pair, a cell "published / ours"."""
    lines = ["| teacher → student | teacher | " + " | ".join(METHODS) + " |",
             "| --- " * (2 + len(METHODS)) + "|"]
    for row in ROWS.strip().splitlines():
        teacher, student, of_teacher, *published = row.split()
        cells = [f"{teacher} → {student}", of_teacher]
        for method, value in zip(METHODS, published):
            ours = measured(runs, teacher, student, method)
            text = compare.cell_text(compare.statistics(ours) if ours else None, 2)
            cells.append(f"{value} / {text}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

if __name__ == "__main__":
    command.main(lambda: print(as_markdown(
        [run for path in sys.argv[1:] for run in compare.read_reports(path)])))
