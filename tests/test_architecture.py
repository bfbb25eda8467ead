"""docs/architecture.md says what is there: every module once, words that exist, a figure drawn from this code."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SCRIPT = ROOT / "docs" / "make_architecture_figure.py"
FIGURE = runpy.run_path(str(SCRIPT))
MODULES = FIGURE["modules"]()


@pytest.mark.parametrize("package", MODULES)
def test_every_module_is_named_once_below_its_package_and_no_other(package):
    section = PAGE.split(f"\n## {package}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(named) == len(set(named))
    assert set(named) == set(MODULES[package]), "name new modules in docs/architecture.md, and drop those that are gone"


def test_every_word_is_defined_once_in_a_module_that_exists():
    section = PAGE.split("\n## Words\n")[1].split("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines()[3:] if line.startswith("| ")]
    words = [row[0].removeprefix("| ") for row in rows]
    assert {"inquiry", "group", "view", "gallery", "record", "episode", "turn", "request", "stream"} <= set(words)
    assert len(words) == len(set(words))
    places = [re.findall(r"`(\w+)\.([\w.]+)`", row[-1]) for row in rows]
    assert [place for (place,) in places if place[1] not in MODULES[place[0]]] == []


def test_the_figure_is_drawn_from_this_code():
    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert drawn == FIGURE["draw"]() + "\n", f"run python {SCRIPT.relative_to(ROOT)}"
