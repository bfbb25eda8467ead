"""README and docs say what is true: figures of the shipped checkpoint, imports and commands that exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from pydantic import TypeAdapter

from vilavt_core.checkpoint import fingerprint
from vilavt_core.cli import app
from vilavt_eval.ablation_table import AblationTable
from vilavt_eval.statistics import wilson
from vilavt_hf.tiny.evaluate import ROWS

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "vilavt-tiny"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "vilavt_hf" / "README.md",
]


@pytest.mark.parametrize("page", ["docs/benchmarks.md", "docs/tiny.md"])
def test_the_held_out_table_is_the_measured_one(page):
    empty = re.compile(r"\|  (?=\|)")  # mdformat leaves one space in an empty cell
    assert empty.sub("| ", measured_table().to_markdown()) in empty.sub("| ", (ROOT / page).read_text())


def measured_table() -> AblationTable:
    """The one in ``heldout.json``."""
    report = json.loads((TINY / "heldout.json").read_text())
    return TypeAdapter(AblationTable).validate_python(report["table"])


def test_the_first_page_is_short_and_its_figures_are_those_of_the_page_that_says_how_they_were_measured():
    readme, figures = (ROOT / "README.md").read_text(), (ROOT / "docs" / "benchmarks.md").read_text()
    assert len(readme.splitlines()) < 80
    measured = {row.name: {figure.name: figure for figure in row.figures} for row in measured_table().rows}
    full, no_zoom, no_query = (
        f"{100 * measured[name]['overall'].score:.1f} %" for name in ("full", "no-zoom", "no-query")
    )
    asked = measured["full"]["overall"].questions
    assert (
        f"**{full}** of {asked} held-out questions; without the zoom {no_zoom}, without the query {no_query}" in readme
    )
    joint, alone = (f"{100 * measured[name]['shared'].score:.1f} %" for name in ("full", "no-joint"))
    assert f"hold only together: **{joint}**, encoded alone {alone}" in readme
    rows = {cells[0]: cells for line in figures.splitlines() if len(cells := line.strip("| ").split(" | ")) > 2}
    seen = [rows["`VilavtChat`'s engine"][5].strip("*")]
    seen += [cells[1] for name, cells in rows.items() if name.startswith(("a quiet machine", "the same machine"))]
    assert f"takes **{min(seen)} to {max(seen)}** times less CPU time" in readme
    speedups = [float(rows[count][3].strip("*")) for count in ("1", "8", "32")]
    assert f"**{min(speedups)}** to {max(speedups)} times as fast" in readme
    assert "tiny model from 8.2 to 80.2 % in 40 steps" in " ".join(
        (ROOT / "vilavt_rl" / "README.md").read_text().split()
    )
    assert f"all {asked} held-out questions have word for word the same transcript" in figures


def test_the_measured_checkpoint_is_the_shipped_one():
    report = json.loads((TINY / "heldout.json").read_text())
    assert report["fingerprint"] == fingerprint(TINY)
    assert report["checkpoint"] == "examples/vilavt-tiny"


def test_the_measured_table_is_what_the_command_would_print_today():
    rows = {row.name: row.figures for row in measured_table().rows}
    assert set(rows) == {"full", "coverage", *ROWS}
    for figures in rows.values():
        for figure in figures:
            rules = wilson(round(figure.score * figure.questions), figure.questions)
            assert (figure.interval.low, figure.interval.high) == pytest.approx((rules.low, rules.high), abs=1e-12)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_imports_exists(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, str(page), "exec")
        for line in re.findall(r"^(?:from|import) vilavt_(?:core|eval|hf).*$", block, re.MULTILINE):
            exec(line, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_exist_with_their_options(page):
    for block in re.findall(r"```(?:console)?\n(.*?)```", page.read_text(), re.DOTALL):
        for line in re.findall(r"^vilavt .*$", block, re.MULTILINE):
            words = shlex.split(line, comments=True)[1:]
            command = typer.main.get_command(app)
            while hasattr(command, "resolve_command"):
                with command.make_context("vilavt", [words[0]], resilient_parsing=True) as context:
                    _, command, _ = command.resolve_command(context, [words.pop(0)])
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("-")} <= known, line


ALL_PAGES = [*PAGES, *sorted(ROOT.glob("vilavt_*/README.md"))]


@pytest.mark.parametrize("page", sorted(set(ALL_PAGES)), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_are_there(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []
    sources = [ROOT, *sorted(ROOT.glob("vilavt_*/src"))]
    named = re.findall(
        r"`((?:vilavt_core|vilavt_eval|vilavt_hf|vilavt_vllm|vilavt_rl|tests|docs|benchmarks|examples)/[\w./-]+)`", text
    )
    assert [name for name in named if not any((source / name).exists() for source in sources)] == []
