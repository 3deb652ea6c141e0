"""study/: comparisons by hand-computed values, what fusing does, pictures, the READMEs' tables."""

import data
import evaluate
import io
import itertools
import json
import math
import metrics
import numpy as np
import os
import pytest
import re
import shutil
import subprocess
import sys
import torch
import torch.nn.functional as F
import train
import zipfile
from helpers import ROOT, class_pictures, python, refused, seeded
from pathlib import Path
from PIL import Image
from study import compare, fusion, plot, published
from support import command, files

def report(method, seed, top1, teacher="resnet20", test="t1", train="a1", epochs=30, files=(),
           shift=None, **changes):
    """A report with nothing but what runs are compared by; `changes` of its settings."""
    settings = {"dataset": "shapes", "method": method, "teacher": [teacher] if teacher else [],
                "student": "resnet8", "seed": seed, "epochs": epochs, "alpha": 0.7, **changes}
    corrupted = {"source": "generated", "content": "seed 0 on cpu", "share": 1.0}
    sets = {"test": {"key": {}, "student": {"top1": top1, "nll": top1 / 100, "ece": 7.0},
                     "teacher": {"top1": 85.6}},
            "fog 1": {"key": corrupted, "student": {"top1": 0.0}},
            "corruptions": {"key": corrupted, "student": {"top1": top1 / 2}}}
    if shift:
        sets["shift val"] = {"key": {"content": shift}, "student": {"top1": 50.0}}
    return {"about": {"settings": settings, "inputs": {"train": train, "files": dict(files)},
                      "test": test}, "sets": sets}

def compared(*reports):
    return compare.groups([compare.run_of(report) for report in reports])

def test_statistics_by_hand_and_published_quantiles():
    for df, quantile in {1: 12.7062, 2: 4.3027, 4: 2.7764, 30: 2.0423, 1000: 1.9623}.items():
        assert compare.student_t(df) == pytest.approx(quantile, abs=2e-4)
    assert compare.statistics([3.0]) == {"n": 1, "mean": 3.0}
    std, half = math.sqrt(7), 4.3027 * math.sqrt(7 / 3)
    expected = {"n": 3, "mean": 3, "std": std, "low": 3 - half, "high": 3 + half}
    assert compare.statistics([1.0, 2.0, 6.0]) == pytest.approx(expected, rel=1e-4)

def test_groups_pairs_differences_by_seed():
    group, = compared(report("kd", 0, 70), report("kd", 1, 74), report("kd", 2, 99),
                      report("richkd", 1, 77), report("richkd", 0, 71), report("richkd", 5, 10))
    assert list(group["rows"]) == ["teacher", "kd", "richkd"] and group["teacher"] == "resnet20"
    cell = group["rows"]["richkd"]["test top-1 %"]
    assert cell["n"] == 3 and cell["mean"] == pytest.approx(158 / 3)
    expected = {"n": 2, "mean": 2, "std": math.sqrt(2), "low": 2 - 12.7062, "high": 2 + 12.7062}
    assert cell["difference"] == pytest.approx(expected, rel=1e-4)  # seeds 0 and 1: +1 and +3
    assert group["rows"]["richkd"]["NLL"]["difference"]["mean"] == pytest.approx(0.02)
    assert "difference" not in group["rows"]["kd"]["test top-1 %"]
    assert group["rows"]["teacher"] == {"test top-1 %": {"n": 1, "mean": 85.6}}

def test_groups_holds_a_row_against_the_kd_of_its_own_flags():
    group, = compared(report("kd", 0, 70, amp=False), report("kd", 0, 60, amp=True),
                      report("richkd", 0, 75, amp=False), report("richkd", 0, 66, amp=True),
                      report("richkd", 0, 68, amp=True, alpha=0.5))
    found = {label: row["test top-1 %"]["difference"]["mean"]
             for label, row in group["rows"].items() if "difference" in row["test top-1 %"]}
    assert found == {"kd --amp True": -10, "richkd": 5, "richkd --amp True": 6,
                     "richkd --alpha 0.5 --amp True": 8}

def test_groups_are_of_one_teacher_student_epochs_and_test_split():
    scratch = report("scratch", 0, 45, teacher=None)
    groups = compared(scratch, report("kd", 0, 70), report("kd", 0, 80, teacher="resnet110"),
                      report("kd", 0, 60, epochs=15), report("kd", 2, 50, test="t2" * 32))
    found = [(group["teacher"], group["epochs"], list(group["rows"])[1:]) for group in groups]
    assert found == [("resnet20", 30, ["scratch", "kd"]), ("resnet110", 30, ["scratch", "kd"]),
                     ("resnet20", 15, ["kd"]), ("resnet20", 30, ["kd"])]
    difference = groups[1]["rows"]["scratch"]["test top-1 %"]["difference"]
    assert difference == {"n": 1, "mean": -35}  # scratch stands beside every teacher
    assert "t2t2t2t2" in compare.as_markdown(groups)

def test_by_method_names_settings_that_differ():
    kd = report("kd", 0, 70, lr=0.02)
    group, = compared(kd, report("richkd", 0, 72, lr=0.02), report("richkd", 1, 72, lr=0.02),
                      report("richkd", 0, 71, lr=0.02, alpha=0.5), report("mlkd", 0, 72, lr=0.2))
    assert list(group["rows"])[1:] == ["kd", "richkd", "richkd --alpha 0.5", "mlkd --lr 0.2"]
    assert "kd with seed 0" in refused(compared, kd, kd)
    # None is a value, too, whichever report comes first
    pair = [report("richkd", 0, 72, clip_scale=None), report("richkd", 1, 70, clip_scale=1.0)]
    for reports in (pair, pair[::-1]):
        group, = compared(report("kd", 0, 70), *reports)
        assert [row["test top-1 %"]["n"] for row in list(group["rows"].values())[2:]] == [1, 1]

def test_by_method_never_averages_runs_of_other_data_or_files():
    """All with the same settings: other training images, another prompts file; another place of
    the same file is no other method."""
    same = [report("richkd", seed, 70, files={"prompts": "p1"}, prompts=f"{seed}.txt")
            for seed in (0, 1)]
    others = [report("richkd", 2, 60, train="a2", files={"prompts": "p1"}, prompts="0.txt"),
              report("richkd", 3, 60, files={"prompts": "p2"}, prompts="0.txt")]
    group, = compared(*same, *others)
    labels = [f"richkd (other data or files: {files.json_digest(other['about']['inputs'])[:8]})"
              for other in others]
    assert {label: row["test top-1 %"]["n"] for label, row in group["rows"].items()} == {
        "teacher": 1, "richkd": 2, labels[0]: 1, labels[1]: 1}
    # a difference to kd is one to kd on the same training images
    group, = compared(report("kd", 0, 50), same[0], report("richkd", 0, 60, train="a2"))
    rows = list(group["rows"].values())
    assert rows[2]["test top-1 %"]["difference"]["mean"] == 20
    assert "difference" not in rows[3]["test top-1 %"]

def test_told_apart_are_shift_sets_of_one_name():
    pair = [report("kd", 0, 70, shift="a" * 64), report("richkd", 0, 70, shift="b" * 64)]
    columns = {column for row in compared(*pair)[0]["rows"].values() for column in row}
    assert {f"shift val top-1 % ({letter * 13})" for letter in "ab"} <= columns
    pair[1] = report("richkd", 0, 70, shift="a" * 64)
    assert "difference" in compared(*pair)[0]["rows"]["richkd"]["shift val top-1 %"]

def test_as_markdown_and_as_text_are_tables():
    found = compared(report("kd", 0, 70, shift="a"), report("kd", 1, 74), report("richkd", 0, 71),
                     report("richkd", 1, 77))
    lines = compare.as_markdown(found).splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert table[0] == ["", "runs", "test top-1 %", "generated corruptions top-1 %",
                        "shift val top-1 %", "NLL", "ECE %"]
    assert table[2] == ["teacher", "1", "85.60", *["not run"] * 4]
    assert table[4][:3] == ["richkd", "2", "74.00 ± 4.24 (+2.00; -10.71 to +14.71)"]
    assert table[4][5] == "0.740 ± 0.042 (+0.020; -0.107 to +0.147)"
    assert len({len(row) for row in table}) == 1
    lines = compare.as_text(found).splitlines()
    assert "richkd      2  74.00 ± 4.24 (+2.00; -10.71 to +14.71)" in lines
    assert max(map(len, lines)) <= 100

def test_read_reports_alone_or_as_a_list(tmp_path):
    path, one = tmp_path / "reports.json", report("kd", 0, 70)
    files.write_json(path, one)
    assert compare.read_reports(path) == [compare.run_of(one)]
    path.write_text(json.dumps([one, one]))  # as study/results has them
    assert compare.read_reports(path) == [compare.run_of(one)] * 2
    for content in (json.dumps(one), "{", "[]", "3", '[{"about": 1}]'):
        path.write_text(content)
        assert str(path) in refused(compare.read_reports, path)

def test_fusion_table_is_of_teacher_clip_and_both():
    target = torch.randint(5, (200,), generator=seeded(0))
    teacher, clip = (3 * torch.randn(200, 5, generator=seeded(k)) + 2 * F.one_hot(target, 5)
                     for k in (1, 2))
    fused = fusion.fusion_table(teacher, clip, target, 0.4, torch.eye(5),
                                {"kind": torch.arange(5) % 2}, seeded())
    logits = {"teacher": teacher, "CLIP": clip, "fused": 0.4 * teacher + 0.6 * clip}
    for model, z in logits.items():
        masks = metrics.quadrants(z, target, 0.7)
        assert fused["quadrants"]["0.7"][model] == pytest.approx({
            "top1": 100 * metrics.top_k_accuracy(z, target), "nll": metrics.nll(z, target),
            "ece": 100 * metrics.ece(z, target),
            **{name: mask.sum().item() / 2 for name, mask in masks.items()}}, rel=1e-5)
    assert [row["alpha"] for row in fused["sweep"]] == [k / 10 for k in range(11)]
    for place, model in ((0, "CLIP"), (10, "teacher"), (4, "fused")):
        expected = {"alpha": place / 10, **fused["quadrants"]["0.7"][model]}
        assert fused["sweep"][place] == pytest.approx(expected, rel=1e-5)
    for name, (change, low, high) in fused["changes"].items():  # paired
        before, after = (fused["quadrants"]["0.7"][who][name] for who in ("teacher", "fused"))
        assert change == pytest.approx(after - before) and low < change < high
    same = fusion.confident_changes(teacher, teacher, target, seeded())
    assert same == dict.fromkeys(fused["changes"], [0, 0, 0])  # image by image
    [line] = [line for line in fusion.lines({"clip_scale": 100.0, "images": "", **fused})
              if line.startswith("unsure, wrong at 0.9")]
    assert f"{fused['quadrants']['0.9']['fused']['unsure_wrong']:.2f}" in line

def test_non_target_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.01, 0.09], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]])
    logits, target = logits.double().log(), torch.tensor([0, 0, 1, 2])
    similarity = torch.tensor([[1, 0.3, 0.5], [0.3, 1, 0.1], [0.5, 0.1, 1]])
    found = fusion.non_target(logits, target, similarity, {"kind": torch.tensor([0, 0, 1])})
    others = (0.6, 0.4, 0.1, 0.9, 0.5, 0.5, 0.25, 0.75)  # the other two classes, in order
    assert found["entropy"] == pytest.approx(-sum(p * math.log(p) for p in others) / 4)
    assert found["same kind"] == pytest.approx(100 * (0.6 + 0.1 + 0.5 + 0) / 4)
    # Means of (0,1) (0,2) (1,0) (1,2) (2,0) (2,1): .35 .65 .5 .5 .25 .75; similarities .3 .5 .3 .1
    # .5 .1; of both the ranks:
    a, b = np.array([2, 5, 3.5, 3.5, 1, 6]), np.array([3.5, 5.5, 3.5, 1.5, 5.5, 1.5])
    assert found["rank_correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    certain = fusion.non_target(torch.tensor([[500.0, 1.0, 0.0]]), target[:1], similarity, {})
    assert certain["entropy"] == pytest.approx(0.5822030, rel=1e-5)  # no underflow

def test_superclasses(tmp_path):
    names = sorted(data.CIFAR_CLASSES["cifar100"])
    group = fusion.superclasses("cifar100", names)["superclass"]
    assert group.unique(return_counts=True)[1].tolist() == [5] * 20
    for a, b, together in (("streetcar", "lawn_mower", True), ("bus", "streetcar", False)):
        assert (group[names.index(a)] == group[names.index(b)]) == together
    groups = fusion.superclasses("shapes", ["red star", "blue star", "red heart"])
    assert groups["colour"].tolist() == [0, 1, 0] and groups["form"].tolist() == [0, 0, 2]
    (tmp_path / "is_a").write_text("n9 n1\nn8 n2\nn9 n3\nn7 n9\n")
    ids = ["n1", "n2", "n3", "n4"]
    groups = fusion.superclasses("imagenet", list("abcd"), ids, tmp_path / "is_a")
    assert groups["WordNet parent"].tolist() == [0, 1, 0, 3]
    assert fusion.superclasses("imagenet", list("abcd"), ids, tmp_path / "none") == {}

def test_commands_of_a_run(tmp_path, few_shapes, clip_file):
    """fusion.json and the pictures, of the run's own teacher, CLIP and alpha."""
    pytest.importorskip("matplotlib")
    folder, cache = tmp_path / "run", str(tmp_path / "cache")
    train.run(train.Config(teacher=("resnet8",), student="resnet8", clip=clip_file, epochs=1,
                           cache_dir=cache, out=str(folder), device="cpu"))
    own = evaluate.Config(run=(str(folder),), cache_dir=cache, device="cpu")
    assert "report.json" in refused(plot.draw, own)
    evaluate.evaluate(own)
    plot.draw(own)
    small = Image.open(folder / "report.png").height
    found = fusion.analyse(own)
    assert found == files.read_json(folder / "fusion.json", "")
    summary = json.loads((folder / "summary.json").read_text())
    for model, row in found["quadrants"]["0.5"].items():
        assert row["top1"] == pytest.approx(summary[f"{model.lower()}_accuracy"])
    assert found["alpha"] == 0.7 and found["clip_scale"] == pytest.approx(1 / 0.07, rel=1e-4)
    assert {"same colour", "same form"} < found["non_target"]["fused"].keys()
    plot.draw(own)
    assert Image.open(folder / "report.png").height > small  # reliability, and two further panels
    files.write_json(folder / "fusion.json", {**found, "weights": "others"})
    assert "fusion.json" in refused(plot.draw, own)

def test_samples_have_the_clean_images_and_corruptions_as_columns():
    cells = {name: torch.full((2, 3, 32, 32), place, dtype=torch.uint8)
             for place, name in enumerate(["clean", *evaluate.CORRUPTED])}
    picture = np.asarray(Image.open(io.BytesIO(plot.samples(cells))))  # (H, W, 3)
    assert picture.shape == (plot.TOP + 10 * 98 + 2, plot.LEFT + 16 * 98 + 2, 3)  # enlarged to 96
    assert (picture[:plot.TOP, plot.LEFT:] < 99).any()  # names
    picture = picture[plot.TOP + 8 * 98 + 2 : plot.TOP + 9 * 98, plot.LEFT:]  # severity 4
    assert (picture[:, 11 * 98 + 2 : 12 * 98] == 54).all() and (picture[:, 2:98] == 0).all()

def test_comparison_of_each_study_is_in_the_readme():
    readme = (ROOT / "study/README.md").read_text()
    for path in ROOT.glob("study/results/*.json"):
        assert f"study/results/{path.name}" in readme
        for table in compare.as_markdown(compare.groups(compare.read_reports(path))).split("\n\n"):
            assert table in readme, (path, table)

def test_comparison_is_what_both_readmes_claim():
    """Intervals and changes are those of the study's tables, whose confident rows a report has."""
    claims, tables = (ROOT / "study/README.md").read_text().split("**In short.**")
    for text in (claims, (ROOT / "README.md").read_text()):
        intervals = re.findall(r"([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)", text)
        changes = re.findall(r"(\d+\.\d\d) → (\d+\.\d\d)", text)
        assert len(intervals) > 2 and len(changes) > 2
        for mean, low, high in intervals:
            assert f"({mean}; {low} to {high})" in tables
        for number in sum(changes, ()):
            assert f"| {number} |" in tables
    path = ROOT / "study/results/cifar100-core-10-resnet20-resnet8.json"
    [test] = [report["sets"]["test"] for report in json.loads(path.read_text())
              if "fusion" in report]
    for place, kind in itertools.product((5, 7), ("right", "wrong")):
        row = [f"{test[who][f'confident_{kind} 0.{place}']:.2f}"
               for who in ("teacher", "CLIP", "fused")]
        assert f"| confident (above .{place}) and {kind} | {' | '.join(row)} |" in tables

def test_published_has_ours_beside_theirs():
    def run(top1, **change):
        settings = {"dataset": "cifar100", "epochs": 240, "fraction": 1.0, "holdout": 0.0,
                    "method": "kd", "teacher": ["resnet110"], "student": "resnet20",
                    **published.METHODS["kd"], **change}
        return compare.Run({}, "resnet110", "kd", 0, settings, {}, {"test top-1 %": top1}, {}, {})
    _, _, *rows = published.as_markdown([
        run(70.0), run(71.0), run(9.0, epochs=60), run(9.0, fraction=0.5), run(9.0, ce_weight=1.0),
        run(69.0, method="scratch", teacher=[])]).splitlines()
    assert ("| resnet110 → resnet20 | 74.31 | 69.06 / 69.00 | 70.67 / 70.50 ± 0.71 | "
            "71.46 / not run | - / not run | 71.48 / not run |") in rows
    assert len(rows) == 13 and sum("69.06 / 69.00" in row for row in rows) == 2  # and resnet56's

def test_subset_of_a_tenth_or_a_half_has_nothing_that_the_shared_clip_has_seen(shared):
    """The pictures in the order in which `data.cifar_pictures` has them."""
    with zipfile.ZipFile(shared / "data/cifar100.zip") as archive:
        names = sorted(name.removeprefix("cifar100/") for name in archive.namelist()
                       if name.startswith("cifar100/train/") and name.endswith(".png"))
    classes = sorted({name.split("/")[1] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[1]) for name in names])
    seen = set((shared / "clip/clip-cifar-seen.txt").read_text("utf-8").split())
    seen = {"/".join(name.split("/")[-3:]) for name in seen}
    for share in (0.1, 0.5):
        part = data.subset(data.Split(torch.arange(len(names)), labels, classes), 0, share)
        assert len(part.images) == share * len(names)
        assert len(seen) == 25_000 and not {names[i] for i in part.images.tolist()} & seen

def test_study_script_passes_settings_that_train_py_has():
    text, found = (ROOT / "study/study.sh").read_text("utf-8"), {}
    for flags in re.findall(r"\$end (--.*)\"", text):
        own = command.parse(train.Config, "", flags.replace("$method", "kd").replace(
            "$value", "1").split())
        if "--temperature" in flags:  # as published
            found[own.method] = {name: getattr(own, name) for name in published.METHODS[own.method]}
    assert found == {name: published.METHODS[name] for name in ("kd", "dkd", "kd-ls")}

@pytest.mark.slow
def test_cifar100_script_in_miniature(tmp_path, clip_file):
    """The part for a CPU, with two images a class and two epochs."""
    place, parts = tmp_path / "here", shutil.ignore_patterns(".*", "results", "tests", "runs")
    shutil.copytree(ROOT, place, ignore=parts)
    for split, count in (("train", 2), ("test", 1)):
        class_pictures(place / "cifar100" / split, data.CIFAR_CLASSES["cifar100"], count, (32, 32))
    environment = {**os.environ, "PAIRS": "resnet8:resnet8", "OMP_NUM_THREADS": "1",
                   "RICHKD_CACHE": str(tmp_path / "cache"),
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = "bash study/cifar100.sh tenth 1 2 --data-dir cifar100 --clip".split()
    done = subprocess.run([*command, clip_file], cwd=place, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    path = place / "study/results/cifar100-core-10-resnet8-resnet8.json"
    found = [report["sets"]["corruptions"] for report in json.loads(path.read_text("utf-8"))]
    assert [len(rows["student"]["by_severity"]) for rows in found] == [15] * 4
    assert found[1]["key"]["share"] == 0.2 and {"fused", "CLIP"} <= found[1].keys()
    assert python(place / "study/compare.py", path).stdout in done.stdout
