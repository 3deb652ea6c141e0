"""The layout and what the texts say of it: what stands alone, which way imports run, links."""

import ast
import pytest
import re
import shutil
from helpers import ROOT, python

TEXTS = ["README.md", "CONTRIBUTING.md", "study/README.md", "bench/README.md"]
CONCEPTS = ["richkd", "metrics", "corruptions", "clip_model", "models", "data", "train", "evaluate"]
# What stands alone: its main function called, of the packages that it needs, in an empty folder.
ALONE = {
    "richkd": "z = torch.randn(4, 3); f = torch.randn(4, 8)\n"
              "criterion = richkd.RichKD(8, 8, 8, 10, d=4, num_negatives=5)\n"
              "loss, _ = criterion(z, f, z, f, z, f, torch.arange(4) % 3, torch.arange(4))\n"
              "assert loss > 0",
    "metrics": "assert metrics.ece(torch.eye(3), torch.arange(3)) > 0",
    "corruptions": "images = torch.full((1, 3, 32, 32), 99, dtype=torch.uint8)\n"
                   "generator = torch.Generator().manual_seed(0)\n"
                   "for name in corruptions.COMMON:\n"
                   "    assert corruptions.corrupt(images, name, 3, generator).shape[1] == 3",
    "clip_model": "clip = clip_model.CLIP(32, 32, 1, 64, 16, 64, 514, 64, 1, 1)\n"
                  "clip = clip_model.build_clip(clip.state_dict())\n"
                  "images = torch.zeros(2, 3, 40, 50, dtype=torch.uint8)\n"
                  "assert clip.encode_image(clip_model.preprocess(images, 32)).shape == (2, 32)\n"
                  "words = clip, clip_model.Tokenizer(), ['cat'], ['a {}']\n"
                  "assert clip_model.class_features(*words).shape == (1, 1, 32)",
    "models": "logits, features = models.build_model('resnet8', 5)(torch.randn(2, 3, 32, 32))\n"
              "assert logits.shape == (2, 5)",
}

def test_files_that_stand_alone_work_in_an_empty_folder(tmp_path):
    code = "import os, sys, torch\n"
    for name, lines in ALONE.items():
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
        code += f"os.chdir({str(tmp_path / name)!r})\nimport {name}\n{lines}\n"
        code += f"del sys.modules['{name}']\n"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

def test_imports_run_one_way():
    """train.py and evaluate.py alone import concepts, clip_model.py alone what CLIP needs; nothing
    imports study/, bench/ or tests/."""
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(CONCEPTS)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        modules = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.split(".")[0])
        assert not modules & {"study", "bench", "tests"}, path
        assert path.stem in CONCEPTS[-2:] or not modules & {*CONCEPTS}, path
        assert path.stem == "clip_model" or not modules & {"ftfy", "regex"}, path

@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
        assert "://" in target or (path.parent / target).exists(), target

def test_links_to_lines_lead_to_what_they_name():
    text = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)#L(\d+)\)", text)
    assert len(links) > 20
    wrong = []
    for name, file, number in links:
        lines = (ROOT / file).read_text("utf-8").splitlines()
        starts = re.compile(rf"\s*((def|class) {name}\b|{name}(:| =))")
        here = [i for i, line in enumerate(lines, 1) if starts.match(line)]
        assert here, f"{file} has no {name}"
        if int(number) != here[0]:
            wrong.append(f"`{name}`]({file}#L{here[0]})")
    assert not wrong, "these links should be: " + ", ".join(wrong)

def test_readme_is_at_most_200_lines_and_names_every_file():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 200
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        assert path.name in text, path.name
