"""Draw docs/architecture.svg from the code: packages, their modules, and who imports whom.

    python docs/make_architecture_figure.py

Boxes are import packages; a module below another may be imported by it (the layers are import-linter's, in
pyproject.toml). The number at an arrow counts the modules that import from the package it points to.
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "architecture.svg"
WIDTH, LINE, PAD, CHARACTER, GAP = 1180, 15, 10, 6.65, 46
COLUMNS = {  # left and right edge; the gaps are the ways of arrows that pass a row
    "vilavt_vllm": (0, 370),
    "vilavt_rl": (400, 770),
    "vilavt_vlmeval": (800, 1180),
    "vilavt_hf": (50, 660),
    "vilavt_eval": (720, 1130),
    "vilavt_core": (0, 1180),
}
ROWS = (("vilavt_vllm", "vilavt_rl", "vilavt_vlmeval"), ("vilavt_hf", "vilavt_eval"), ("vilavt_core",))
PASSING = {"vilavt_vllm": 25, "vilavt_rl": 690, "vilavt_vlmeval": 1155}
"""Where an arrow from the first row to the last one goes down."""
FILLS = ("#fdf3e3", "#e6f0fa", "#e9f5e9")


def modules() -> dict[str, list[str]]:
    """Package -> dotted names of its modules below it; a package inside it has its name too."""
    found: dict[str, list[str]] = {}
    for source in sorted(ROOT.glob("vilavt_*/src")):
        for file in sorted(source.rglob("*.py")):
            package, *rest = file.relative_to(source).with_suffix("").parts
            names = found.setdefault(package, [])
            if rest != ["__init__"]:
                names.append(".".join(rest).removesuffix(".__init__"))
    return found


def imports() -> Counter[tuple[str, str]]:
    """(package, other package) -> number of modules of the first that import from the second."""
    counted: Counter[tuple[str, str]] = Counter()
    for source in ROOT.glob("vilavt_*/src"):
        for file in source.rglob("*.py"):
            own = file.relative_to(source).parts[0]
            named = {name.partition(".")[0] for name in _imported(ast.parse(file.read_text(encoding="utf-8")))}
            counted.update((own, other) for other in named & set(COLUMNS) - {own})
    return counted


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module


def layers(package: str, names: list[str]) -> list[str]:
    """Lines for a box: a line per layer of import-linter's contract, then what no layer holds."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    top = [name for name in names if "." not in name]
    lines = []
    for contract in settings["importlinter"]["contracts"]:
        if contract["type"] == "layers" and contract["layers"][0].startswith(f"{package}."):
            for layer in contract["layers"]:
                here = [name.strip().removeprefix(f"{package}.") for name in layer.split("|")]
                lines.append("   ".join(_named(name, names) for name in here))
                top = [name for name in top if name not in here]
    rest = [_named(name, names) for name in top]
    return [*lines, *(["   ".join(rest)] if rest else [])]


def _named(name: str, names: list[str]) -> str:
    inner = [one for one in names if one.startswith(f"{name}.")]
    return f"{name}\u00a0({len(inner)})" if inner else name


def draw() -> str:
    """The figure as SVG."""
    found, counted = modules(), imports()
    parts: list[str] = []
    edges: dict[str, tuple[float, float]] = {}
    y = 1.0
    for row, fill in zip(ROWS, FILLS, strict=True):
        texts = {}
        for package in row:
            left, right = COLUMNS[package]
            width = int((right - left - 2 * PAD) / CHARACTER)
            texts[package] = [part for line in layers(package, found[package]) for part in textwrap.wrap(line, width)]
        height = (max(map(len, texts.values())) + 1) * LINE + 2 * PAD
        for package, lines in texts.items():
            left, right = COLUMNS[package]
            box = f'x="{left + 0.5}" y="{y}" width="{right - left - 1}" height="{height}" rx="6" fill="{fill}"'
            parts.append(f'<rect {box} stroke="#555"/>')
            title = f'<text x="{left + PAD}" y="{y + PAD + 11}" font-weight="bold">{package}</text>'
            parts.append(title)
            for number, line in enumerate(lines, 1):
                below = y + PAD + 11 + number * LINE
                text = escape(line).replace("   ", "\u2002\u2002")
                parts.append(f'<text x="{left + PAD}" y="{below}">{text}</text>')
            edges[package] = (y, y + height)
        y += height + GAP
    for (start, end), number in sorted(counted.items()):
        parts.append(_arrow(start, end, edges, number))
    size = f'width="{WIDTH}" height="{y - GAP + 1:.0f}" viewBox="0 0 {WIDTH} {y - GAP + 1:.0f}"'
    head = '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
    head += '<path d="M0,0 L8,4 L0,8 z" fill="#333"/></marker></defs>'
    style = 'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="11" fill="#111"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', head, *parts, "</svg>"],
    )


def _arrow(start: str, end: str, edges: dict[str, tuple[float, float]], number: int) -> str:
    row = {package: place for place, several in enumerate(ROWS) for package in several}
    if row[end] == row[start]:  # beside each other
        y = (edges[start][0] + edges[start][1]) / 2
        x = (COLUMNS[start][1], COLUMNS[end][0] - 2)
        return _line(x[0], y, x[1], y, number, above=True)
    top, bottom = edges[start][1], edges[end][0] - 2
    left, right = (max(COLUMNS[start][0], COLUMNS[end][0]), min(COLUMNS[start][1], COLUMNS[end][1]))
    if row[end] - row[start] > 1:
        x = (PASSING[start], PASSING[start])
    elif left < right:
        x = ((left + right) / 2, (left + right) / 2)
    else:
        x = (COLUMNS[start][0] + 15, COLUMNS[end][1] - 15)
    return _line(x[0], top, x[1], bottom, number)


def _line(x1: float, y1: float, x2: float, y2: float, number: int, *, above: bool = False) -> str:
    place = ((x1 + x2) / 2, y1 - 4) if above else ((x1 + x2) / 2 + 5, y1 + GAP / 2 + 4)
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#333" marker-end="url(#head)"/>'
    return f'{line}<text x="{place[0]}" y="{place[1]}" fill="#333">{number}</text>'


if __name__ == "__main__":
    FIGURE.write_text(draw() + "\n", encoding="utf-8")
    print(FIGURE)
