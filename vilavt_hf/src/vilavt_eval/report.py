"""Summaries and comparisons as files: JSON for programs, Markdown for people, a plot, every row as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vilavt_core.checkpoint import command_line
from vilavt_core.markdown import markdown_table, plain

from .comparison import Comparison, Contrast
from .scores import Difference, Problem, ScoredFile
from .summary import Figure, FigureKind, Summary, other_scorer

LISTED = 20
"""Rows of a listing in Markdown; JSON has all."""
PLOTTED = 100
"""Figures of a benchmark in the plot; an image of thousands of categories would need gigabytes."""


def write_report(
    folder: str | Path, settings: Sequence[tuple[Summary, Sequence[ScoredFile]]], comparison: Comparison | None = None
) -> list[Path]:
    """Write ``scores.json``, ``scores.md``, ``scores.png`` and ``rows.csv`` into a folder, which is made if missing.

    Args:
        folder: where.
        settings: each summary with the files it is of.
        comparison: of the first setting with the second.

    Returns:
        What was written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scores.{suffix}" for suffix in ("json", "md", "png")]
    whole = {
        "command": command_line(),
        "settings": [_setting(summary, files) for summary, files in settings],
        "comparison": None if comparison is None else asdict(comparison),
    }
    paths[0].write_text(json.dumps(whole) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(settings, comparison), encoding="utf-8")
    plot([summary for summary, _ in settings], paths[2])
    rows = folder / "rows.csv"
    _write_rows([file for _, files in settings for file in files], rows)
    return [*paths, rows]


def markdown(settings: Sequence[tuple[Summary, Sequence[ScoredFile]]], comparison: Comparison | None = None) -> str:
    """All tables of a report."""
    parts = ["# Scores", *(_section(summary, files) for summary, files in settings)]
    if comparison is not None:
        parts.append(_comparison(comparison))
    return "\n\n".join(parts) + "\n"


def cells(figure: Figure) -> tuple[str, str, str, str]:
    """Questions, score with its spread over seeds, interval, and the other scorer's score, in percent."""
    score = f"{100 * figure.score:.2f}"
    if figure.spread is not None:
        score += f" ± {100 * figure.spread:.2f} over {len(figure.per_seed)}"
    interval = f"{100 * figure.interval.low:.2f} to {100 * figure.interval.high:.2f}"
    return f"{figure.questions:,}", score, interval, f"{100 * figure.other:.2f}"


def label(figure: Figure) -> str:
    """A figure's name in a table."""
    name = (
        figure.name
        if figure.kind in (FigureKind.OVERALL, FigureKind.ALL, FigureKind.CIRCULAR, FigureKind.CATEGORY)
        else (f"{figure.kind} {figure.name}")
    )
    return name if figure.counted else f"{name} (not counted)"


def shown(text: str, width: int = 120) -> str:
    """A text from a result file as one line that a terminal, a page and a plot can show.

    Without control characters and lone surrogates, which such a file may hold, and of at most `width` characters.
    """
    flat = " ".join(text.split())
    line = flat if len(flat) <= width else flat[: width - 1] + "…"
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)


def contrast_cells(contrast: Contrast) -> tuple[str, ...]:
    """Questions, both scores, difference, its interval (in percent), how many are better and worse, and p."""
    low, high = contrast.interval.low, contrast.interval.high
    return (
        f"{contrast.questions:,}",
        f"{100 * contrast.first:.2f}",
        f"{100 * contrast.second:.2f}",
        f"{100 * contrast.difference:+.2f}",
        f"{100 * low:+.2f} to {100 * high:+.2f}",
        f"{contrast.better} / {contrast.worse}",
        f"{contrast.p_value:.3g}",
    )


def plot(summaries: Sequence[Summary], path: Path) -> None:
    """Bars with intervals: overall, groups and categories; one panel per benchmark, one colour per setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys(summary.benchmark for summary in summaries))
    settings = {name: [s for s in summaries if s.benchmark == name] for name in panels}
    found = {
        name: list(dict.fromkeys(label(f) for s in several for f in s.figures if f.kind is not FigureKind.ROTATION))
        for name, several in settings.items()
    }
    names = {name: labels[:PLOTTED] for name, labels in found.items()}
    heights = [1 + 0.28 * len(names[name]) * len(settings[name]) for name in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, sum(heights) + 0.5), squeeze=False, height_ratios=heights
    )
    for axis, name in zip(axes[:, 0], panels, strict=True):
        several = settings[name]
        width = 0.8 / len(several)
        for place, summary in enumerate(several):
            figures = {label(f): f for f in summary.figures}
            rows = [(i, figures[text]) for i, text in enumerate(names[name]) if text in figures]
            at = [i + (place - (len(several) - 1) / 2) * width for i, _ in rows]
            scores = [100 * f.score for _, f in rows]
            below = [max(0.0, 100 * (f.score - f.interval.low)) for _, f in rows]
            above = [max(0.0, 100 * (f.interval.high - f.score)) for _, f in rows]
            axis.barh(at, scores, width, xerr=(below, above), capsize=2, label=_literal(summary.name))
        axis.set_yticks(range(len(names[name])), [_literal(text) for text in names[name]])
        axis.invert_yaxis()
        axis.set(xlim=(0, 100), xlabel=f"score, % ({several[0].scorer}), with 95 % intervals")
        more = f", the first {PLOTTED} of {len(found[name])} figures" * (len(found[name]) > PLOTTED)
        axis.set_title(_literal(name or "no benchmark named") + more)
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _literal(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return shown(text, 80).replace("$", r"\$")


def _setting(summary: Summary, files: Sequence[ScoredFile]) -> dict[str, Any]:
    return asdict(summary) | {
        "problems": [asdict(problem) | {"file": str(file.path)} for file in files for problem in file.problems],
        "differences": [asdict(row) | {"file": str(file.path)} for file in files for row in file.differences],
    }


def _section(summary: Summary, files: Sequence[ScoredFile]) -> str:
    seeds = ", ".join("?" if seed is None else str(seed) for seed in summary.seeds)
    lines = [
        f"## {_cell(summary.benchmark or 'no benchmark named')}: {_cell(summary.name)}",
        f"Scorer {summary.scorer}; {summary.rows:,} rows of {len(files)} file{'s' * (len(files) > 1)}; seeds {seeds}. "
        "Percent; intervals are 95 %, over questions: Wilson's where each has one score of 0 or 1, else a bootstrap's."
        + (" After ± stands the standard deviation over seeds." if len(files) > 1 else ""),
        _table(
            ("", "questions", "score", "interval", other_scorer(summary.scorer)),
            ((label(figure), *cells(figure)) for figure in summary.figures),
        ),
    ]
    if summary.finishes:
        lines.append("How they ended: " + ", ".join(f"{_cell(k)} {n:,}" for k, n in summary.finishes.items()) + ".")
    if summary.flaws:
        problems = [(file, problem) for file in files for problem in file.problems]
        counts = ", ".join(f"{name} {count:,}" for name, count in summary.flaws.items())
        lines += ["### Flawed rows", f"{counts}.", _problem_table(problems[:LISTED]), *_rest(len(problems))]
    if summary.upstream_aborts:
        lines.append(
            f"At {summary.upstream_aborts:,} rows the published program would have ended with an error; they score 0."
        )
    if summary.disagreements:
        rows = [row for file in files for row in file.differences]
        share = 100 * summary.disagreements / summary.rows
        lines += [
            "### Where strict and published disagree",
            f"{summary.disagreements:,} rows ({share:.2f} %).",
            _difference_table(rows[:LISTED]),
            *_rest(len(rows)),
        ]
    return "\n\n".join(lines)


def _comparison(comparison: Comparison) -> str:
    header = (
        "",
        "questions",
        comparison.first,
        comparison.second,
        "difference",
        "interval",
        "better / worse",
        "p",
        "test",
    )
    flips = [
        (flip.question_id, flip.category or "", f"{flip.first:.2f}", f"{flip.second:.2f}") for flip in comparison.flips
    ]
    lines = [
        f"## {_cell(comparison.second)} against {_cell(comparison.first)}",
        "Paired over the questions that both answered; p is two-sided and not corrected for the number of rows.",
        _table(
            header, ((contrast.name, *contrast_cells(contrast), contrast.test) for contrast in comparison.contrasts)
        ),
        *(
            f"{len(ids):,} questions {why} and are left out: {_cell(', '.join(ids[:LISTED]))}"
            for ids, why in (
                (comparison.only_first, f"were answered by {_cell(comparison.first)} only"),
                (comparison.only_second, f"were answered by {_cell(comparison.second)} only"),
                (comparison.other_targets, "have another right answer in the other file"),
            )
            if ids
        ),
        f"### {len(flips):,} questions are scored differently",
        _table(("question", "category", comparison.first, comparison.second), flips[:LISTED]),
        *_rest(len(flips)),
    ]
    return "\n\n".join(lines)


def _problem_table(problems: Iterable[tuple[ScoredFile, Problem]]) -> str:
    rows = ((f.path.name, str(p.line), p.question_id, str(p.flaw), p.detail) for f, p in problems)
    return _table(("file", "line", "question", "flaw", "detail"), rows)


def _difference_table(rows: Iterable[Difference]) -> str:
    return _table(
        ("question", "type", "answered", "right answer", "strict", "published"),
        (
            (row.question_id, row.problem_type, row.prediction, row.target, f"{row.strict:g}", f"{row.published:g}")
            for row in rows
        ),
    )


def _rest(number: int) -> Iterator[str]:
    if number > LISTED:
        yield f"… and {number - LISTED:,} more, in scores.json."


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells may hold text of a result file."""
    return markdown_table([_cell(text) for text in header], ([_cell(text) for text in row] for row in rows))


def _cell(text: str) -> str:
    return plain(shown(text))


def _write_rows(files: Iterable[ScoredFile], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "line", "question_id", "problem_type", "category", "finish", "strict", "published"))
        for scored in files:
            writer.writerows(
                map(
                    _inert,
                    (scored.path, r.line, r.question_id, r.problem_type, r.category, r.finish, r.strict, r.published),
                )
                for r in scored.rows
            )


_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _inert(value: Any) -> Any:
    """A cell; text that a spreadsheet would run as a formula has an apostrophe before it, as spreadsheets write it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
