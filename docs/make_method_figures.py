"""Draw docs/method_attention.svg and docs/method_positions.svg: what the vision encoder does with one conversation.

    python docs/make_method_figures.py

Segments and positions are those that `vilavt_hf.vision_layout` computes for one original of 8 x 8 patches and a zoom
with two crops of 4 x 4 patches and a query of four tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from vilavt_hf.configuration_vilavt import VilavtVisionConfig
from vilavt_hf.vision_layout import VisionLayout

FOLDER = Path(__file__).resolve().parent
GRID = torch.tensor([[1, 8, 8], [1, 4, 4], [1, 4, 4]])
IMAGES_PER_QUERY = torch.tensor([1, 2])
QUERY_MASK = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
PARTS = {"original": 64, "crop a": 16, "crop b": 16, "query": 4}
"""Patches of each image, and tokens of the query, in packed order."""
COLOURS = {"original": "#4c78a8", "crop a": "#e45756", "crop b": "#f2a93b", "query": "#54a24b"}
BLOCKS = {
    "window": ("window block", "a patch sees its window of 4 x 4 patches"),
    "frame": ("full block", "it sees its image"),
    "group": ("query-aware block", "it sees its group, the query included"),
}
CELL, STEP = 2.4, 15
"""Pixels of a patch: in a matrix, in a grid."""


def layout() -> VisionLayout:
    """Of the example."""
    config = VilavtVisionConfig(patch_size=14, spatial_merge_size=2, window_size=56, hidden_size=64, num_heads=2)
    return VisionLayout(GRID, IMAGES_PER_QUERY, QUERY_MASK, config, torch.device("cpu"))


def attention() -> str:
    """Who attends to whom, in each kind of block."""
    made, side = layout(), CELL * sum(PARTS.values())
    rows = CELL * (sum(PARTS.values()) - PARTS["query"])
    lines = []
    for i, (kind, (title, what)) in enumerate(BLOCKS.items()):
        left, top = 70 + i * (side + 75), 64
        lines += [_text(left, 16, title, bold=True), _text(left, 31, what)]
        lines += _axes(left, top, rows)
        q, k = made.segments[kind].cu_q.tolist(), made.segments[kind].cu_k.tolist()
        for (q0, q1), (k0, k1) in zip(pairwise(q), pairwise(k), strict=True):
            lines.append(_box(left + CELL * k0, top + CELL * q0, CELL * (k1 - k0), CELL * (q1 - q0), "#3d5a80"))
        lines.append(_box(left, top, side, rows, "none"))
    lines.append(_text(70, 64 + rows + 22, "A row is a patch that looks, a column what it looks at; filled: it does."))
    return _svg(3 * (side + 75) + 30, 64 + rows + 36, lines)


def positions() -> str:
    """Rows and columns that the rotary embedding gets, group by group."""
    place = layout().position.tolist()
    starts = [0, 64, 80, 96, 100]
    lines = []
    for i, (title, names) in enumerate(
        {"the original": ["original"], "the zoom": ["crop a", "crop b", "query"]}.items()
    ):
        left, top = 24 + i * 230, 46
        lines.append(_text(left, 18, f"group {i + 1}: {title}", bold=True))
        for at in range(12):
            lines.append(_text(left + STEP * at + 2, top - 5, str(at), small=True))
            lines.append(_text(left - 16, top + STEP * at + 11, str(at), small=True))
        lines.append(_box(left, top, STEP * 12, STEP * 12, "none"))
        for name in names:
            start = starts[list(PARTS).index(name)]
            for row, column in place[start : start + PARTS[name]]:
                lines.append(_box(left + STEP * column, top + STEP * row, STEP - 1, STEP - 1, COLOURS[name]))
    for i, (name, colour) in enumerate(COLOURS.items()):
        lines += [_box(490, 60 + 22 * i, 12, 12, colour), _text(508, 70 + 22 * i, name)]
    lines.append(
        _text(24, 246, "Vertical: row, horizontal: column. Images of a group follow each other along the diagonal,")
    )
    lines.append(_text(24, 262, "then the tokens of its query: no two of them share a place. Groups start anew at 0."))
    return _svg(600, 274, lines)


def _axes(left: float, top: float, rows: float) -> Iterator[str]:
    at = 0
    for name, size in PARTS.items():
        yield _box(left + CELL * at, top - 10, CELL * size - 1, 6, COLOURS[name])
        yield _text(left + CELL * at, top - 14, name, small=True)
        if name != "query":
            yield _box(left - 10, top + CELL * at, 6, CELL * size - 1, COLOURS[name])
            yield _text(left - 58, top + CELL * (at + size / 2), name, small=True)
        at += size
    yield _box(left, top, CELL * at, rows, "#eef1f5")


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    line = ' stroke="#888"' if fill == "none" else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{line}/>'


def _text(x: float, y: float, text: str, *, bold: bool = False, small: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{10 if small else 12}"{weight}>{escape(text)}</text>'


def _svg(width: float, height: float, lines: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        'font-family="DejaVu Sans, Verdana, sans-serif">'
    )
    return "\n".join([head, _box(0, 0, width, height, "white"), *lines, "</svg>"]) + "\n"


FIGURES = {"method_attention.svg": attention, "method_positions.svg": positions}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
