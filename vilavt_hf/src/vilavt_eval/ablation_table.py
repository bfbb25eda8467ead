"""What every ablation costs: scores with intervals, and the paired difference to the method as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vilavt_core.markdown import markdown_table

from .comparison import Contrast, compare
from .scores import ScoredFile, Scorer
from .summary import Figure, FigureKind, summarise


@dataclass(frozen=True)
class AblationRow:
    """One ablation."""

    name: str
    figures: tuple[Figure, ...]
    """The overall score first, then categories."""
    difference: Contrast | None
    """To the method as it is, over the same questions; None for that itself, and for what is no answer to them."""


@dataclass(frozen=True)
class AblationTable:
    """All ablations of one checkpoint on one benchmark."""

    benchmark: str
    scorer: Scorer
    rows: tuple[AblationRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table in percent, one row per ablation; intervals are 95 %."""
        counts: dict[str, int] = {}
        for figure in (figure for row in self.rows for figure in row.figures):
            counts.setdefault(figure.name, figure.questions)
        names = list(counts)
        head = ["", *(f"{name} (n={counts[name]})" for name in names), "difference", "p"]
        lines = []
        for row in self.rows:
            found = {figure.name: figure for figure in row.figures}
            cells = [_figure(found[name], counts[name]) if name in found else "" for name in names]
            lines.append([row.name, *cells, *_difference(row.difference)])
        return markdown_table(head, lines) + "\n"


def ablation_table(
    full: Sequence[ScoredFile],
    ablated: Mapping[str, Sequence[ScoredFile]],
    scorer: Scorer = "strict",
    *,
    alone: Mapping[str, Sequence[ScoredFile]] | None = None,
) -> AblationTable:
    """Put runs side by side.

    Args:
        full: the method as it is; one file per seed.
        ablated: name -> files of the same seeds.
        scorer: whose scores.
        alone: further rows without a difference, below the method as it is: name -> files of other questions, or that
            score something else than the answer.
    """
    rows = [AblationRow("full", _figures(full, scorer), None)]
    rows += [AblationRow(name, _figures(files, scorer), None) for name, files in (alone or {}).items()]
    for name, files in ablated.items():
        rows.append(AblationRow(name, _figures(files, scorer), compare(full, files, scorer).overall))
    return AblationTable(summarise(full, scorer).benchmark or "", scorer, tuple(rows))


def _figures(files: Sequence[ScoredFile], scorer: Scorer) -> tuple[Figure, ...]:
    shown = (FigureKind.OVERALL, FigureKind.CATEGORY)
    return tuple(figure for figure in summarise(files, scorer).figures if figure.kind in shown)


def _figure(figure: Figure, usual: int) -> str:
    """Score and interval; the number of questions where it is not that of the column's head."""
    low, high = figure.interval.low, figure.interval.high
    cell = f"{100 * figure.score:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    return cell if figure.questions == usual else f"{cell}, n={figure.questions}"


def _difference(contrast: Contrast | None) -> tuple[str, str]:
    if contrast is None:
        return "", ""
    low, high = contrast.interval.low, contrast.interval.high
    return f"{100 * contrast.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})", f"{contrast.p_value:.2g}"
