"""study/: comparisons by hand-computed values, what fusing does, pictures, the READMEs' tables."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import metrics
from study import compare, fusion, plot
from support import files

ROOT = Path(__file__).resolve().parents[1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def report(method, seed, top1, teacher="resnet20", **changes):
    """A report with nothing but what runs are compared by; `changes` of its settings."""
    return {"of": {"dataset": "shapes", "method": method, "teacher": teacher, "student": "resnet8",
                   "seed": seed, "epochs": 30},
            "settings": {"seed": seed, "alpha": 0.7, **changes},
            "teachers": {"teacher": {"test": 85.6}},
            "test": {"top1": top1, "nll": top1 / 100, "brier": 0.5, "ece": 7.0},
            "corruptions": {"source": "generated", "mean_error": 100 - top1 / 2}}


def compared(*reports):
    return compare.groups([compare.run_of(report) for report in reports])


# Methods over seeds -------------------------------------------------------------------------------


def test_student_t_has_the_published_quantiles():
    published = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 1000: 1.9623}
    for df, quantile in published.items():
        assert compare.student_t(df) == pytest.approx(quantile, abs=2e-4)
    assert compare.student_t(5, level=0.9) == pytest.approx(2.0150, abs=2e-4)


def test_statistics_by_hand():
    assert compare.statistics([3.0]) == {"n": 1, "mean": 3.0}
    found = compare.statistics([1.0, 2.0, 6.0])
    std = math.sqrt((4 + 1 + 9) / 2)
    half = 4.3027 * std / math.sqrt(3)
    expected = {"n": 3, "mean": 3, "std": std, "low": 3 - half, "high": 3 + half}
    assert found == pytest.approx(expected, rel=1e-4)


def test_compare_pairs_differences_by_seed():
    group, = compared(report("kd", 0, 70), report("kd", 1, 74), report("kd", 2, 99),
                      report("richkd", 1, 77), report("richkd", 0, 71), report("richkd", 5, 10))
    assert list(group["rows"]) == ["teacher", "kd", "richkd"] and group["teacher"] == "resnet20"
    cell = group["rows"]["richkd"]["test top-1 %"]
    assert cell["n"] == 3 and cell["mean"] == pytest.approx(158 / 3)
    expected = {"n": 2, "mean": 2, "std": math.sqrt(2), "low": 2 - 12.7062, "high": 2 + 12.7062}
    assert cell["difference"] == pytest.approx(expected, rel=1e-4)  # seeds 0 and 1: +1 and +3
    corrupted = group["rows"]["richkd"]["generated corruptions top-1 %"]
    assert corrupted["difference"]["mean"] == pytest.approx(1)
    assert group["rows"]["richkd"]["NLL"]["difference"]["mean"] == pytest.approx(0.02)
    assert "difference" not in group["rows"]["kd"]["test top-1 %"]
    assert group["rows"]["teacher"] == {"test top-1 %": {"n": 1, "mean": 85.6}}


def test_compare_holds_a_row_against_the_kd_of_its_own_flags():
    group, = compared(
        report("kd", 0, 70, amp=False), report("kd", 0, 60, amp=True),
        report("richkd", 0, 75, amp=False), report("richkd", 0, 66, amp=True),
        report("richkd", 0, 68, amp=True, alpha=0.5), report("richkd", 0, 73, amp=False, alpha=0.5))
    found = {label: row["test top-1 %"]["difference"]["mean"]
             for label, row in group["rows"].items() if "difference" in row["test top-1 %"]}
    assert found == {"kd --amp True": -10, "richkd": 5, "richkd --amp True": 6,
                     "richkd --alpha 0.5 --amp True": 8, "richkd --alpha 0.5": 3}


def test_compare_has_corruptions_of_what_teaches_where_they_were_analysed():
    found = {"source": "generated", "teacher": 55.0, "clip": 44.0, "fused": 66.0}
    group, = compared(report("kd", 0, 70),
                      {**report("richkd", 0, 75), "fused": {"corruptions": found}})
    assert group["rows"]["teacher"] == {
        "test top-1 %": {"n": 1, "mean": 85.6},
        "generated corruptions top-1 %": {"n": 1, "mean": 55}}


def test_compare_groups_by_teacher_student_and_epochs():
    short = report("kd", 0, 60)
    short["of"]["epochs"] = 15
    reports = [report("scratch", 0, 45, teacher=None), report("kd", 0, 70),
               report("kd", 0, 80, teacher="resnet110"), short]
    groups = compared(*reports)
    found = [(group["teacher"], group["epochs"], list(group["rows"])[1:]) for group in groups]
    assert found == [("resnet20", 30, ["scratch", "kd"]), ("resnet110", 30, ["scratch", "kd"]),
                     ("resnet20", 15, ["kd"])]  # scratch stands beside every teacher
    difference = groups[1]["rows"]["scratch"]["test top-1 %"]["difference"]
    assert difference == {"n": 1, "mean": -35}
    alone, = compared(reports[0])
    assert alone["teacher"] is None and list(alone["rows"]) == ["teacher", "scratch"]


def test_by_method_names_settings_that_differ():
    kd = report("kd", 0, 70)
    group, = compared(kd, report("richkd", 0, 72), report("richkd", 1, 72),
                      report("richkd", 0, 71, alpha=0.5))
    assert list(group["rows"])[1:] == ["kd", "richkd", "richkd --alpha 0.5"]
    with pytest.raises(ValueError, match="two reports are of kd with seed 0; expected each run on"):
        compared(kd, kd)


def test_by_method_tells_apart_what_is_set_from_what_is_not():
    """None is a value, too, whichever report comes first."""
    reports = [report("richkd", 0, 72, clip_scale=None), report("richkd", 1, 70, clip_scale=1.0)]
    for pair in (reports, reports[::-1]):
        group, = compared(report("kd", 0, 70), *pair)
        assert [row["test top-1 %"]["n"] for row in list(group["rows"].values())[2:]] == [1, 1]


def test_by_method_names_shared_settings_that_are_not_those_of_kd():
    group, = compared(report("kd", 0, 70, lr=0.02), report("mlkd", 0, 72, lr=0.2))
    assert list(group["rows"])[1:] == ["kd", "mlkd --lr 0.2"]


def test_told_apart_are_shift_sets_of_one_name():
    pair = []
    for method, content in (("kd", "a" * 64), ("richkd", "b" * 64)):
        row = {"brier": 0, "top1": 50.0, "content": content}
        pair.append({**report(method, 0, 70), "shift val": row})
    columns = {column for row in compared(*pair)[0]["rows"].values() for column in row}
    assert {"shift val top-1 % (aaaaaaaa)", "shift val top-1 % (bbbbbbbb)"} <= columns
    pair[1]["shift val"]["content"] = "a" * 64
    assert "difference" in compared(*pair)[0]["rows"]["richkd"]["shift val top-1 %"]


def of_images(report, test="t1", train="a1", **named):
    return {**report, "how": {"test": {"content": test}},
            "inputs": {"train": train, "files": named}}


def test_groups_are_of_one_test_split():
    reports = [of_images(report("kd", seed, 70 + seed), test=test)
               for seed, test in ((0, "t1" * 32), (1, "t1" * 32), (2, "t2" * 32))]
    groups = compared(*reports)
    assert [group["rows"]["kd"]["test top-1 %"]["n"] for group in groups] == [2, 1]
    assert "shapes (test split t1t1t1t1), resnet20" in compare.as_markdown(groups)
    assert "shapes, resnet20" in compare.as_markdown(groups[:1])


def test_by_method_never_averages_runs_of_other_data_or_files():
    """All with the same settings: other training images, another teacher's or prompts file."""
    same = [of_images(report("richkd", seed, 70), prompts="p1") for seed in (0, 1)]
    others = [of_images(report("richkd", 2, 60), train="a2", prompts="p1"),
              of_images(report("richkd", 3, 60), prompts="p2")]
    group, = compared(*same, *others)
    rows = {label: row["test top-1 %"]["n"] for label, row in group["rows"].items()}
    labels = [f"richkd (other data or files: {files.json_digest(other['inputs'])[:8]})"
              for other in others]
    assert rows == {"teacher": 1, "richkd": 2, labels[0]: 1, labels[1]: 1}
    # the same file in another place is no other method
    moved = of_images(report("richkd", 1, 70, prompts="there/p.txt"), prompts="p1")
    group, = compared(of_images(report("richkd", 0, 70, prompts="p.txt"), prompts="p1"), moved)
    assert group["rows"]["richkd"]["test top-1 %"]["n"] == 2
    # a difference to kd is one to kd on the same training images
    group, = compared(of_images(report("kd", 0, 50)), same[0],
                      {**others[0], "of": {**others[0]["of"], "seed": 0}})
    assert group["rows"]["richkd"]["test top-1 %"]["difference"]["mean"] == 20
    assert "difference" not in group["rows"][labels[0]]["test top-1 %"]


def test_comparison_is_markdown():
    first = {**report("kd", 0, 70), "shift": report("kd", 0, 20)["test"]}
    groups = compared(first, report("kd", 1, 74), report("richkd", 0, 71), report("richkd", 1, 77))
    lines = compare.as_markdown(groups).splitlines()
    assert lines[0].startswith("shapes, resnet20 → resnet8, 30 epochs.") and lines[1] == ""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert table[0] == ["", "runs", "test top-1 %", "shift top-1 %",
                        "generated corruptions top-1 %", "NLL", "ECE %"]
    assert table[1] == ["---"] * 7 and table[2] == ["teacher", "1", "85.60", *["not run"] * 4]
    assert table[3][:4] == ["kd", "2", "72.00 ± 2.83", "20.00"]
    assert table[4][:4] == ["richkd", "2", "74.00 ± 4.24 (+2.00; -10.71 to +14.71)", "not run"]
    assert table[4][5] == "0.740 ± 0.042 (+0.020; -0.107 to +0.147)"
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_read_reports_alone_or_as_a_list(tmp_path):
    path, one = tmp_path / "reports.json", report("kd", 0, 70)
    files.write_json(path, one)
    assert compare.read_reports(path) == [compare.run_of(one)]
    first_edition = json.dumps([one, one])  # as study/results has them: a list without formats
    path.write_text(first_edition)
    assert compare.read_reports(path) == [compare.run_of(one)] * 2
    path.write_text(json.dumps(one))
    with pytest.raises(ValueError, match="reports.json has format 1, this version reads 2; python"):
        compare.read_reports(path)
    damaged = {**one, "test": {**one["test"], "nll": "text"}}
    for content in ("{", "[]", "3", '[{"of": 1}]', '[{"of": {}, "test": {}}]',
                    json.dumps([damaged])):
        path.write_text(content)
        with pytest.raises(ValueError, match="reports.json is damaged; expected a report.json, or"):
            compare.read_reports(path)
    files.write_json(path, {"of": {}, "test": {}})
    with pytest.raises(ValueError, match="reports.json is damaged; expected a report.json, or"):
        compare.read_reports(path)


# What fusing does ---------------------------------------------------------------------------------


def random_logits(N=200, K=5):
    target = torch.randint(K, (N,), generator=seeded(0))
    teacher, clip = (3 * torch.randn(N, K, generator=seeded(k)) + 2 * F.one_hot(target, K)
                     for k in (1, 2))
    return teacher, clip, target


def test_measures_are_the_metrics():
    logits, _, target = random_logits()
    masks = metrics.quadrants(logits, target, 0.7)
    assert fusion.measures(logits, target, 0.7) == pytest.approx({
        "top1": 100 * metrics.top_k_accuracy(logits, target), "nll": metrics.nll(logits, target),
        "ece": 100 * metrics.ece(logits, target),
        **{name: mask.sum().item() / 2 for name, mask in masks.items()}})


def test_sweep_alpha_goes_from_clip_to_the_teacher():
    teacher, clip, target = random_logits()
    sweep = fusion.sweep_alpha(teacher, clip, target)
    assert [row.pop("alpha") for row in sweep] == [k / 10 for k in range(11)]
    for row, logits in ((sweep[0], clip), (sweep[10], teacher),
                        (sweep[3], 0.3 * teacher + 0.7 * clip)):
        assert row == pytest.approx(fusion.measures(logits, target, 0.7), rel=1e-5)


def test_confident_changes_are_paired():
    teacher, clip, target = random_logits()
    before, after = (metrics.quadrants(z, target, 0.7) for z in (teacher, clip))
    changes = fusion.confident_changes(teacher, clip, target, seeded())
    assert list(changes) == ["confident_right", "confident_wrong"]
    for name, (change, low, high) in changes.items():
        difference = after[name].sum().item() - before[name].sum().item()
        assert change == pytest.approx(difference / 2) and low < change < high
    same = fusion.confident_changes(teacher, teacher, target, seeded())
    assert same == dict.fromkeys(changes, [0, 0, 0])  # image by image


def test_mean_ranks_shares_ties():
    assert fusion.mean_ranks(torch.tensor([3.0, 1.0, 3.0, 7.0, 3.0])).tolist() == [3, 1, 3, 5, 3]


def test_non_target_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.01, 0.09], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]])
    logits, target = logits.double().log(), torch.tensor([0, 0, 1, 2])
    similarity = torch.tensor([[1, 0.3, 0.5], [0.3, 1, 0.1], [0.5, 0.1, 1]])
    found = fusion.non_target(logits, target, similarity, {"kind": torch.tensor([0, 0, 1])})
    rows = [(0.6, 0.4), (0.1, 0.9), (0.5, 0.5), (0.25, 0.75)]  # the other two classes, in order
    entropy = -sum(p * math.log(p) for row in rows for p in row) / 4
    assert found["entropy"] == pytest.approx(entropy)
    assert found["same kind"] == pytest.approx(100 * (0.6 + 0.1 + 0.5 + 0) / 4)
    # Means of (0,1) (0,2) (1,0) (1,2) (2,0) (2,1): .35 .65 .5 .5 .25 .75; similarities .3 .5 .3 .1
    # .5 .1; of both the ranks:
    a, b = np.array([2, 5, 3.5, 3.5, 1, 6]), np.array([3.5, 5.5, 3.5, 1.5, 5.5, 1.5])
    assert found["rank_correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    certain = fusion.non_target(torch.tensor([[500.0, 1.0, 0.0]]), target[:1], similarity, {})
    entropy = -sum(p * math.log(p) for p in (0.7310586, 0.2689414))
    assert certain["entropy"] == pytest.approx(entropy)  # no underflow


def test_superclasses(tmp_path):
    members = [row.split() for row in fusion.CIFAR100_SUPERCLASSES.split(",")]
    names = sorted(name for row in members for name in row)
    assert [len(row) for row in members] == [5] * 20 and len(set(names)) == 100
    group = fusion.superclasses("cifar100", names)["superclass"]
    assert len(group) == 100 and len(group.unique()) == 20

    def together(a, b):
        return group[names.index(a)] == group[names.index(b)]

    for pair in (("maple_tree", "willow_tree"), ("streetcar", "lawn_mower"), ("man", "woman")):
        assert together(*pair)
    for pair in (("man", "maple_tree"), ("bus", "streetcar"), ("seal", "shark")):
        assert not together(*pair)
    groups = fusion.superclasses("shapes", ["red star", "blue star", "red heart"])
    assert groups["colour"].tolist() == [0, 1, 0] and groups["form"].tolist() == [0, 0, 2]
    (tmp_path / "is_a").write_text("n9 n1\nn8 n2\nn9 n3\nn7 n9\n")
    groups = fusion.superclasses("imagenet", list("abcd"), ["n1", "n2", "n3", "n4"],
                                 tmp_path / "is_a")
    assert groups["WordNet parent"].tolist() == [0, 1, 0, 3]
    assert fusion.superclasses("imagenet", ["a"], ["n1"], tmp_path / "none") == {}
    assert fusion.superclasses("tiny-imagenet", ["cat"]) == {}


@pytest.fixture
def fused():
    teacher, clip, target = random_logits()
    kinds = {"kind": torch.arange(5) % 2}
    found = fusion.fusion_table(teacher, clip, target, 0.4, torch.eye(5), kinds, seeded())
    return {"clip_scale": 100.0, **found}


def test_fusion_is_of_teacher_clip_and_both(fused):
    teacher, clip, target = random_logits()
    logits = {"teacher": teacher, "clip": clip, "fused": 0.4 * teacher + 0.6 * clip}
    for threshold in ("0.5", "0.7", "0.9"):
        assert list(fused["quadrants"][threshold]) == list(logits)
        for model, z in logits.items():
            expected = fusion.measures(z, target, float(threshold))
            assert fused["quadrants"][threshold][model] == pytest.approx(expected, rel=1e-5)
    change = fused["changes"]["confident_right"][0]
    rows = fused["quadrants"]["0.7"]
    before, after = (rows[model]["confident_right"] for model in ("teacher", "fused"))
    assert change == pytest.approx(after - before)
    assert list(fused["non_target"]["fused"]) == ["rank_correlation", "entropy", "same kind"]


def test_tables_of_what_fusing_does(fused):
    source = {"source": "generated", "folder": None}
    fused["corruptions"] = {**source, "teacher": 50.0, "clip": 40.0, "fused": 62.5}
    lines = fusion.tables(fused)
    assert max(map(len, lines)) <= 100
    found = {line[:28].strip(): line[28:].split() for line in lines}
    assert found[""] == ["teacher", "CLIP", "fused", "change"]
    assert found["top-1 %, corruptions"] == ["50.00", "40.00", "62.50", "12.50"]
    rows = fused["quadrants"]["0.9"]
    shares = [rows[model]["unsure_wrong"] for model in ("teacher", "clip", "fused")]
    expected = [f"{value:.2f}" for value in (*shares, shares[2] - shares[0])]
    assert found["unsure, wrong at 0.9, %"] == expected
    once = [line for line in lines if line.startswith(("top-1 % ", "NLL", "ECE"))]
    assert len(once) == 3  # not for every threshold
    assert found["alpha 0.4"][0] == f"{fused['sweep'][4]['top1']:.2f}"
    assert "non-target same kind %" in found and "95 % interval" in "\n".join(lines)


# Pictures -----------------------------------------------------------------------------------------


def decode(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))  # (H, W, 3)


def test_pictures_have_a_panel_for_each_part(fused):
    pytest.importorskip("matplotlib")
    teacher, _, target = random_logits()
    row = {**evaluate.scores(teacher, target), "calibration": evaluate.calibration(teacher, target)}
    table = {"source": "generated", "mean_error": 50.0, "top1": {"fog": [9.0] * 5}}
    small = decode(plot.pictures({"test": row}, "title"))
    large = decode(plot.pictures({"test": row, "corruptions": table, "fused": fused}, "title"))
    assert [large.shape[k] / small.shape[k] for k in (0, 1)] == [2, 2]  # four panels, not one


def test_samples_have_corruptions_as_columns():
    cells = [[torch.full((2, 3, 32, 32), 10 * severity + c, dtype=torch.uint8) for c in range(15)]
             for severity in range(5)]
    picture = decode(plot.samples(cells))
    assert picture.shape == (10 * 98 + 2, 15 * 98 + 2, 3)  # 32 pixels are enlarged to 96
    assert (picture[8 * 98 + 2:9 * 98, 10 * 98 + 2:11 * 98] == 40).all()  # the second's severity 4


# The READMEs --------------------------------------------------------------------------------------


def groups_of(name):
    return compare.groups(compare.read_reports(ROOT / f"study/results/{name}.json"))


def test_comparison_of_each_study_is_in_the_readme():
    readme, paths = (ROOT / "study/README.md").read_text(), ROOT.glob("study/results/*.json")
    names = [path.stem for path in paths]
    assert len(names) == 12
    for name in names:
        assert f"study/results/{name}.json" in readme
        for table in compare.as_markdown(groups_of(name)).split("\n\n"):
            assert table in readme, (name, table)


METHODS, THIRTY, TEN, SWEEPS = ("tiny-imagenet-methods", "tiny-imagenet-fraction-30",
                                "tiny-imagenet-fraction-10", "tiny-imagenet-sweeps-30")
CIFAR = "cifar100-core-10-resnet20-resnet8"
TOP1, CORRUPTED = "test top-1 %", "generated corruptions top-1 %"
FIFTH = "generated corruptions, 20 % of the images, top-1 %"


def test_comparison_is_what_the_table_of_claims_says():
    readme = (ROOT / "study/README.md").read_text()
    claims = [line for line in readme.split("**In short.**")[0].splitlines() if line[:1] == "|"][2:]
    fused, confident, better, nll, corrupted, features, alpha = claims
    reports = json.loads((ROOT / f"study/results/{CIFAR}.json").read_text())
    [quadrants] = [report["fused"]["quadrants"] for report in reports if "fused" in report]
    for threshold in ("0.5", "0.7"):
        for quadrant in ("confident_right", "confident_wrong"):
            before, after = (quadrants[threshold][who][quadrant] for who in ("teacher", "fused"))
            assert f"{before:.2f} → {after:.2f}" in confident
    for name in (CIFAR, METHODS, THIRTY, TEN):
        teacher, both = (groups_of(name)[0]["rows"][who][TOP1]["mean"]
                         for who in ("teacher", "fused teacher"))
        assert f"{teacher:.2f} → {both:.2f}" in fused
    for claim, name, row, column in (
            (better, CIFAR, "richkd", TOP1), (nll, CIFAR, "richkd", "NLL"),
            (corrupted, CIFAR, "richkd", FIFTH), (features, CIFAR, "richkd-l", TOP1),
            (better, METHODS, "richkd", TOP1), (better, THIRTY, "richkd", TOP1),
            (better, TEN, "richkd", TOP1), (better, "shapes-methods", "richkd", TOP1),
            (nll, METHODS, "richkd", "NLL"), (nll, THIRTY, "richkd", "NLL"),
            (nll, TEN, "richkd", "NLL"), (corrupted, METHODS, "richkd", CORRUPTED),
            (corrupted, THIRTY, "richkd", CORRUPTED), (corrupted, TEN, "richkd", CORRUPTED),
            (features, METHODS, "richkd-f", TOP1), (features, "shapes-methods", "richkd-f", TOP1),
            (alpha, SWEEPS, "richkd", TOP1), (alpha, SWEEPS, "richkd --alpha 0.0", TOP1),
            (alpha, SWEEPS, "richkd --alpha 0.3", TOP1),
            (alpha, SWEEPS, "richkd --alpha 1.0", TOP1)):
        more, digits = groups_of(name)[0]["rows"][row][column]["difference"], 2 + (column == "NLL")
        mean, low, high = (f"{more[end]:+.{digits}f}" for end in ("mean", "low", "high"))
        assert f"{mean} ({low} to {high})" in claim
    for line in (ROOT / "README.md").read_text().splitlines():  # what it repeats, it repeats whole
        if line.split("|")[1:2] in [claim.split("|")[1:2] for claim in claims]:
            assert line in claims
