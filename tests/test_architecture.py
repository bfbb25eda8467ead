"""docs/architecture.md says what is there: every module once, words that exist, a figure drawn from this code; and one
name means one thing.
"""

import ast
import re
import runpy
from collections import defaultdict
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


MAY_REPEAT = {
    "main": "entry point of a program",
    "checks": "what `vilavt doctor` asks every package for",
    "register": "what each host calls to learn of us",
    "compute_score": "verl and EasyR1 look a reward up by this name",
    "ViLaVT": "VLMEvalKit and lmms-eval show the class's name",
    "VilavtForConditionalGeneration": "a checkpoint's `architectures` name the class, in transformers and in vLLM",
}
"""Public names that several modules define, and why."""


def test_a_public_class_function_or_type_has_a_name_of_its_own():
    found = defaultdict(set)
    for path in sorted(ROOT.glob("vilavt_*/src/**/*.py")):
        for name in public_names(ast.parse(path.read_text(encoding="utf-8")), types="cli" not in path.parts):
            found[name].add(str(path.relative_to(ROOT)))
    repeated = {name: sorted(places) for name, places in found.items() if len(places) > 1}
    assert {name: places for name, places in repeated.items() if name not in MAY_REPEAT} == {}
    assert set(MAY_REPEAT) <= set(repeated), "take names off that stand in one module only"


def public_names(module: ast.Module, types: bool) -> list[str]:
    """Classes and functions of a module, and named types (options of a command are no types)."""
    names = [
        node.name for node in module.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for node in module.body:
        if types and isinstance(node, ast.Assign) and "TypeVar(" not in ast.unparse(node.value):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_") and not name.isupper() and name not in ("logger", "app")]
