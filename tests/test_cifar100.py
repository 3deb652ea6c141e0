"""study/cifar100.sh in miniature, the table of published numbers, and honest subsets."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import train
from study import compare, published
from support import command

ROOT = Path(__file__).resolve().parents[1]


def fake_run(top1, **change):
    settings = {"dataset": "cifar100", "epochs": 240, "fraction": 1.0, "holdout": 0.0,
                "method": "kd", "teacher": ["resnet110"], "student": "resnet20", "seed": 0,
                **published.METHODS["kd"], **change}
    return compare.Run({}, "resnet110", "kd", 0, settings, {}, {"test top-1 %": top1}, {})


def test_as_markdown_has_ours_beside_the_published():
    runs = [fake_run(70.0), fake_run(71.0), fake_run(9.0, epochs=60), fake_run(9.0, fraction=0.5),
            fake_run(9.0, temperature=3.0), fake_run(9.0, ce_weight=1.0),
            fake_run(69.0, method="scratch", teacher=[])]
    header, _, *rows = published.as_markdown(runs).splitlines()
    assert header == "| teacher → student | teacher | scratch | kd | crd | dkd | kd-ls |"
    row = next(row for row in rows if "resnet110 → resnet20" in row)
    assert row == ("| resnet110 → resnet20 | 74.31 | 69.06 / 69.00 | 70.67 / 70.50 ± 0.71 | "
                   "71.46 / not run | - / not run | 71.48 / not run |")
    assert len(rows) == 13 and sum("69.06 / 69.00" in row for row in rows) == 2  # and resnet56's


def test_rows_are_those_of_the_reference(shared):
    text = (shared / "reference/published.md").read_text("utf-8")
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if " → " in line]
    table = [[*row[0].split(" → "), *row[1:]] for row in table[1:14]]
    ours = [row.split()[:7] for row in published.ROWS.strip().splitlines()]
    assert table == ours


def test_subset_of_a_tenth_or_a_half_has_nothing_that_the_shared_clip_has_seen(shared):
    """The pictures in the order in which `data.cifar_pictures` has them."""
    with zipfile.ZipFile(shared / "data/cifar100.zip") as archive:
        names = sorted(name for name in archive.namelist()
                       if name.startswith("cifar100/train/") and name.endswith(".png"))
    classes = sorted({name.split("/")[2] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[2]) for name in names])
    split = data.Split(torch.arange(len(names)), labels, classes)
    seen = set((shared / "clip/clip-cifar-seen.txt").read_text("utf-8").split())
    for share in (0.1, 0.5):
        taken = {names[i] for i in data.subset(split, 0, share).images.tolist()}
        assert len(taken) == share * len(names)
        assert not {"/".join(name.split("/")[-3:]) for name in taken} & {
            "/".join(name.split("/")[-3:]) for name in seen}
    assert len(seen) == 25_000


def test_study_script_passes_the_published_settings():
    text = (ROOT / "study/study.sh").read_text("utf-8").split("published)")[-1].split(";;")[0]
    found = {}
    for flags in re.findall(r"-published\$end (.*)\"", text):
        own = command.parse(train.Config, "", flags.split())
        found[own.method] = {name: getattr(own, name) for name in published.METHODS[own.method]}
    assert found == {name: published.METHODS[name] for name in ("kd", "dkd", "kd-ls")}
    assert published.METHODS["crd"].items() <= vars(train.Config()).items()  # of `crd` as it is


@pytest.mark.slow
def test_cifar100_script_in_miniature(tmp_path, clip_file):
    """The part for a CPU, with two images a class and two epochs."""
    for pattern in ("*.py", "prompts.txt", "study/*.py", "study/*.sh"):
        for path in ROOT.glob(pattern):
            (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / path.relative_to(ROOT))
    for split, count in (("train", 2), ("test", 1)):
        for k, name in enumerate(data.CIFAR_CLASSES["cifar100"]):
            (tmp_path / "cifar100" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (32, 32), (2 * k, 100 * i, 255 - 2 * k))
                image.save(tmp_path / "cifar100" / split / name / f"{i}.png")
    environment = {**os.environ, "PAIRS": "resnet8:resnet8", "OMP_NUM_THREADS": "1",
                   "RICHKD_CACHE": str(tmp_path / "cache"),
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(part, *flags):
        done = subprocess.run(
            ["bash", "study/cifar100.sh", part, "1", "2", "--data-dir", "cifar100", *flags],
            cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run("tenth", "--clip", clip_file)
    assert "core-10: 0 of 4 runs are finished" in said and "| richkd-l | 1 |" in said
    found = json.loads((tmp_path / "study/results/cifar100-core-10-resnet8-resnet8.json")
                       .read_text("utf-8"))
    assert [len(report["corruptions"]["top1"]) for report in found] == [15] * 4
    assert found[1]["corruptions"]["share"] == 0.2 and "quadrants" in found[1]["fused"]
