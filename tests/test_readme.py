"""The README: its links lead where they say, it is short, and what it says of itself holds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["README.md", "CONTRIBUTING.md", "study/README.md", "bench/README.md"]


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


def test_links_to_lines_lead_to_what_they_name():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text("utf-8"))
    assert len(links) > 20
    wrong = []
    for name, file, number in links:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        starts = re.compile(rf"\s*((def|class) {name}\b|{name}(:| =))")
        here = [i for i, line in enumerate(lines, 1) if starts.match(line)]
        assert here, f"{file} has no {name}"
        if int(number) != here[0]:
            wrong.append(f"`{name}`]({file}#L{here[0]})")
    assert not wrong, "these links should be: " + ", ".join(wrong)


def test_readme_is_at_most_200_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_readme_names_every_file_of_the_reading_path():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in ROOT.glob("*.py"):
        assert path.name in text, path.name
