"""results.py: comparisons of reports by hand-computed values, and its tables."""

import json
import math
from pathlib import Path

import pytest

import results


def report(method, seed, top1, teacher="resnet20", **changes):
    """A report with nothing but what runs are compared by; `changes` of its settings."""
    return {"of": {"dataset": "shapes", "method": method, "teacher": teacher, "student": "resnet8", "seed": seed,
                   "epochs": 30},
            "settings": {"seed": seed, "alpha": 0.7, **changes}, "teachers": {"teacher": {"test": 85.6}},
            "test": {"top1": top1, "nll": top1 / 100, "brier": 0.5, "ece": 7.0},
            "corruptions": {"source": "generated", "mean_error": 100 - top1 / 2}}


def test_student_t():
    published = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 1000: 1.9623}
    for df, quantile in published.items():
        assert results.student_t(df) == pytest.approx(quantile, abs=2e-4)
    assert results.student_t(5, level=0.9) == pytest.approx(2.0150, abs=2e-4)


def test_statistics():
    assert results.statistics([3.0]) == {"n": 1, "mean": 3.0}
    found = results.statistics([1.0, 2.0, 6.0])
    std = math.sqrt((4 + 1 + 9) / 2)
    half = 4.3027 * std / math.sqrt(3)
    assert found == pytest.approx({"n": 3, "mean": 3, "std": std, "low": 3 - half, "high": 3 + half}, rel=1e-4)


def test_differences_are_paired_by_seed():
    reports = [report("kd", 0, 70), report("kd", 1, 74), report("kd", 2, 99), report("richkd", 1, 77),
               report("richkd", 0, 71), report("richkd", 5, 10)]
    group, = results.compare(reports)
    assert list(group["rows"]) == ["teacher", "kd", "richkd"] and group["teacher"] == "resnet20"
    cell = group["rows"]["richkd"]["test top-1 %"]
    assert cell["n"] == 3 and cell["mean"] == pytest.approx(158 / 3)
    difference = cell["difference"]  # of seeds 0 and 1: +1 and +3
    assert difference == pytest.approx({"n": 2, "mean": 2, "std": math.sqrt(2), "low": 2 - 12.7062,
                                        "high": 2 + 12.7062}, rel=1e-4)
    assert group["rows"]["richkd"]["generated corruptions top-1 %"]["difference"]["mean"] == pytest.approx(1)
    assert group["rows"]["richkd"]["NLL"]["difference"]["mean"] == pytest.approx(0.02)
    assert "difference" not in group["rows"]["kd"]["test top-1 %"]
    assert group["rows"]["teacher"] == {"test top-1 %": {"n": 1, "mean": 85.6}}


def test_a_row_is_held_against_the_kd_of_its_own_flags():
    reports = [report("kd", 0, 70, augmix=False), report("kd", 0, 60, augmix=True),
               report("richkd", 0, 75, augmix=False), report("richkd", 0, 66, augmix=True),
               report("richkd", 0, 68, augmix=True, alpha=0.5), report("richkd", 0, 73, augmix=False, alpha=0.5)]
    group, = results.compare(reports)
    found = {label: row["test top-1 %"]["difference"]["mean"] for label, row in group["rows"].items()
             if "difference" in row["test top-1 %"]}
    assert found == {"kd --augmix True": -10, "richkd": 5, "richkd --augmix True": 6,
                     "richkd --alpha 0.5 --augmix True": 8, "richkd --alpha 0.5": 3}


def test_what_teaches_has_a_column_of_corruptions_where_it_was_analysed():
    reports = [report("kd", 0, 70), {**report("richkd", 0, 75), "fused": {
        "corruptions": {"source": "generated", "teacher": 55.0, "clip": 44.0, "fused": 66.0}}}]
    group, = results.compare(reports)
    assert group["rows"]["teacher"] == {"test top-1 %": {"n": 1, "mean": 85.6},
                                        "generated corruptions top-1 %": {"n": 1, "mean": 55}}


def test_groups():
    reports = [report("scratch", 0, 45, teacher=None), report("kd", 0, 70), report("kd", 0, 80, teacher="resnet110"),
               {**report("kd", 0, 60), "of": {**report("kd", 0, 60)["of"], "epochs": 15}}]
    groups = results.compare(reports)
    found = [(group["teacher"], group["epochs"], list(group["rows"])[1:]) for group in groups]
    assert found == [("resnet20", 30, ["scratch", "kd"]), ("resnet110", 30, ["scratch", "kd"]),
                     ("resnet20", 15, ["kd"])]  # scratch stands beside every teacher
    assert groups[1]["rows"]["scratch"]["test top-1 %"]["difference"] == {"n": 1, "mean": -35}
    alone, = results.compare(reports[:1])
    assert alone["teacher"] is None and list(alone["rows"]) == ["teacher", "scratch"]


def test_settings_that_differ_are_named():
    reports = [report("kd", 0, 70), *(report("richkd", *row, alpha=0.7) for row in ((0, 72), (1, 72))),
               report("richkd", 0, 71, alpha=0.5)]
    group, = results.compare(reports)
    assert list(group["rows"])[1:] == ["kd", "richkd", "richkd --alpha 0.5"]
    with pytest.raises(ValueError, match="two reports are of kd with seed 0; expected each run once"):
        results.compare([reports[0], reports[0]])


def test_comparison_is_markdown():
    first = {**report("kd", 0, 70), "shift": {**report("kd", 0, 20)["test"]}}
    reports = [first, report("kd", 1, 74), report("richkd", 0, 71), report("richkd", 1, 77)]
    lines = results.comparison(results.compare(reports)).splitlines()
    assert lines[0].startswith("shapes, resnet20 → resnet8, 30 epochs.") and lines[1] == ""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert table[0] == ["", "runs", "test top-1 %", "shift top-1 %", "generated corruptions top-1 %", "NLL", "ECE %"]
    assert table[1] == ["---"] * 7 and table[2] == ["teacher", "1", "85.60", *["not run"] * 4]
    assert table[3][:4] == ["kd", "2", "72.00 ± 2.83", "20.00"]
    assert table[4][:4] == ["richkd", "2", "74.00 ± 4.24 (+2.00; -10.71 to +14.71)", "not run"]
    assert table[4][5] == "0.740 ± 0.042 (+0.020; -0.107 to +0.147)"
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_the_readmes_tables_are_those_of_the_reports():
    root = Path(__file__).resolve().parents[1]
    readme, paths = (root / "README.md").read_text(), sorted(root.glob("results/*.json"))
    assert len(paths) > 4
    for path in paths:
        for table in results.comparison(results.compare(json.loads(path.read_text()))).split("\n\n"):
            assert table in readme, (path.name, table)
