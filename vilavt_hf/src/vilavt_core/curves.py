"""Curves over the steps of training runs, drawn below each other; several runs share each panel, a colour for each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from .errors import LogError
from .json_text import parse_json
from .spelling import did_you_mean

Points = Sequence[tuple[float, float]]
"""(step, value), by step."""


class Style(StrEnum):
    """How a curve is drawn."""

    LINE = "line"
    FAINT = "faint"
    """What another curve is the mean of."""
    MARKED = "marked"
    """Few points, each of them measured."""
    DASHED = "dashed"


_LOOK: dict[Style, dict[str, Any]] = {
    Style.LINE: {},
    Style.FAINT: {"alpha": 0.3, "linewidth": 1},
    Style.MARKED: {"marker": "o", "markersize": 4},
    Style.DASHED: {"linestyle": "--", "marker": ".", "alpha": 0.8},
}


@dataclass(frozen=True)
class Curve:
    """One figure of one run."""

    run: str
    label: str
    points: Points
    style: Style = Style.LINE


@dataclass(frozen=True)
class Panel:
    """What is drawn on one pair of axes."""

    label: str
    """Of the vertical axis, with the unit."""
    curves: tuple[Curve, ...]
    limits: tuple[float, float] | None = None
    """Of the vertical axis; None: as the values need."""
    weight: float = 1.0
    """Height, beside other panels."""


def running_mean(points: Points) -> list[tuple[float, float]]:
    """Mean that forgets: each value counts a twentieth, the first ones as much as all before. What is no number (the
    loss of a step that overflowed) is left out."""
    found: list[tuple[float, float]] = []
    mean = 0.0
    for count, (step, value) in enumerate([(s, v) for s, v in points if math.isfinite(v)], 1):
        mean += (value - mean) * max(0.05, 1 / count)
        found.append((step, mean))
    return found


def points_of(lines: Iterable[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines of a log that have a figure of that name."""
    return [(line["step"], float(line[name])) for line in lines if line.get(name) is not None and "step" in line]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log, each a JSON object; a missing file has none. A line that is not whole yet is left out: the run
    may be writing it.
    """
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step", 0), int):
            lines.append(line)
    return lines


def run_names(runs: Sequence[Path]) -> list[str]:
    """What runs are called in a figure: the last parts of their paths, as many as tell them apart.

    Raises:
        LogError: a run is named twice.
    """
    whole = [path.absolute().with_suffix("" if path.suffix == ".jsonl" else path.suffix).parts for path in runs]
    if twice := [path for number, path in enumerate(runs) if whole[number] in whole[:number]]:
        raise LogError(f"{twice[0]}: this run is named twice")
    for length in range(1, max(map(len, whole), default=1) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            break
    return names


def check_chart_file(path: Path) -> None:
    """Whether charts can be written with that ending.

    Raises:
        LogError: not; names endings that can.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    ending = path.suffix.lower().removeprefix(".")
    if ending not in known:
        hint = did_you_mean(ending, known)
        raise LogError(
            f"{path}: charts cannot be written as {path.suffix or 'a file without an ending'}; "
            f"name a .png, .svg or .pdf file{hint}"
        )


def draw(panels: Sequence[Panel], path: str | Path) -> Path:
    """Draw panels below each other, over the same steps; the ending of the file says how (.png, .svg, .pdf).

    Args:
        panels: those without a point are left out.
        path: the file.

    Raises:
        LogError: no panel has a point.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [panel for panel in panels if any(curve.points for curve in panel.curves)]
    if not shown:
        raise LogError(f"{path}: there is nothing to draw yet; no step was logged")
    runs = list(dict.fromkeys(curve.run for panel in shown for curve in panel.curves))
    heights = [panel.weight for panel in shown]
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=(8, 1 + 2.2 * sum(heights)), sharex=True, squeeze=False, height_ratios=heights
    )
    for axis, panel in zip(axes[:, 0], shown, strict=True):
        for curve in panel.curves:
            if not curve.points:
                continue
            label = f"{curve.run}: {curve.label}" if len(runs) > 1 else curve.label
            steps, values = zip(*curve.points, strict=True)
            colour = f"C{runs.index(curve.run) % 10}"
            axis.plot(steps, values, color=colour, label=_literal(label), **_LOOK[curve.style])
        axis.set(ylabel=panel.label)
        if panel.limits is not None:
            axis.set(ylim=panel.limits)
        axis.grid(alpha=0.2)
        axis.legend(fontsize="small")
    axes[-1, 0].set(xlabel="step")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return Path(path)


def _literal(text: str) -> str:
    """Text that matplotlib takes neither for a formula nor for a label to hide."""
    return text.replace("$", r"\$").removeprefix("_")
