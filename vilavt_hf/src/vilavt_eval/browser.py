"""A folder of pages out of recorded conversations: an index with thumbnails and filters, and a page of each; of two
runs, side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vilavt_core.pages import render
from vilavt_core.protocol import Malformed, ToolCall
from vilavt_core.viewer import SCRIPT, Trace, shown_talk

from .pictures import PictureFolder
from .recordings import MALFORMED, Recording, Recordings

TEMPLATES = Path(__file__).parent / "templates"

INDEX_SCRIPT = "index.js"
_TEXT = 300
"""Characters of a question in the index."""
_SEARCHED = 800
"""Characters of thoughts and queries that the index is searched for."""


@dataclass(frozen=True, eq=False)
class BrowsedRun:
    """The files of one run, and where their images may be."""

    name: str
    files: Sequence[tuple[Recordings, Sequence[Path]]]


@dataclass
class Written:
    """What was written."""

    index: Path
    pages: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    """Images that could not be shown, and why."""
    problems: list[str] = field(default_factory=list)
    """Lines that hold no conversation, and why."""


def write_browser(
    out: Path, runs: Sequence[BrowsedRun], *, title: str, date: str, progress: Any = lambda entries: entries
) -> Written:
    """Write the pages of one run, or of two on the same questions.

    Args:
        out: folder; made if missing.
        runs: one or two.
        title: of the index.
        date: of the results, in words.
        progress: wraps the conversations while they are written, as `vilavt_core.progress.counted` does.
    """
    pages = out / "pages"
    pages.mkdir(parents=True, exist_ok=True)
    folder = PictureFolder(out / "pictures", "../pictures/")
    written = Written(out / "index.html", missing=folder.missing)
    for run in runs:
        for recordings, _ in run.files:
            written.problems += recordings.problems
    pairs = _paired(runs)
    rows: list[dict[str, Any]] = []
    for number, pair in enumerate(progress(pairs), 1):
        name = f"{number:05d}.html"
        try:
            pair = [None if found is None else (found[0].replayed(folder, found[1]), found[1]) for found in pair]
            talks = []
            for place, (found, run) in enumerate(zip(pair, runs, strict=True)):
                if found is None:
                    continue
                recording, roots = found
                trace = recording.pictured(folder, roots)
                if len(runs) > 1:
                    trace = replace(trace, run=run.name)
                talks.append(shown_talk([trace], place))
            first, roots = next(found for found in pair if found is not None)
            page = render(
                "view_page.html",
                TEMPLATES,
                script=SCRIPT,
                pictures_at="beside",
                title=_short(first.trace.question, 80) or first.key,
                talks=talks,
                place=f"{number} of {len(pairs)}",
                before=f"{number - 1:05d}.html" if number > 1 else "",
                after=f"{number + 1:05d}.html" if number < len(pairs) else "",
            )
            row = _row(pair, f"pages/{name}", first.thumbnail(folder, roots, "pictures/"))
        except MALFORMED as error:
            key = next(found[0].key for found in pair if found is not None)
            page = render(
                "view_page.html",
                TEMPLATES,
                title=f"{key}: no conversation: {error}",
                talks=[],
                place=f"{number} of {len(pairs)}",
                before="",
                after="",
            )
            row = None
            written.problems.append(f"{key}: {error}")
        (pages / name).write_text(page, encoding="utf-8")
        written.pages += 1
        if row is not None:
            rows.append(row)
    index = render(
        "view_index.html",
        TEMPLATES,
        script=INDEX_SCRIPT,
        pictures_at="beside",
        title=title,
        date=date,
        runs=[run.name for run in runs],
        rows=rows,
        right=[_right(run) for run in runs],
        verdicts=_distinct(row["verdict"] for row in rows),
        finishes=_distinct(finish for row in rows for finish in row["finishes"]),
        turns=sorted({row["turns"] for row in rows}),
        categories=_distinct(row["category"] for row in rows),
        changes=_distinct(row["change"] for row in rows),
        problems=written.problems[:100],
    )
    written.index.write_text(index, encoding="utf-8")
    return written


_Found = tuple[Recording, Sequence[Path]] | None


def _paired(runs: Sequence[BrowsedRun]) -> list[list[_Found]]:
    """The same question of every run; None where a run has no answer to it."""
    places: dict[str, list[_Found]] = {}
    for number, run in enumerate(runs):
        for recordings, roots in run.files:
            for entry in recordings.entries:
                # Several files of one run may number their questions alike.
                key = entry.key if len(run.files) == 1 else f"{recordings.path.name}\0{entry.key}"
                places.setdefault(key, [None] * len(runs))[number] = (entry, roots)
    return list(places.values())


def _row(pair: Sequence[_Found], page: str, thumbnail: str | None) -> dict[str, Any]:
    """A question in the index."""
    traces = [None if found is None else found[0].trace for found in pair]
    there = [trace for trace in traces if trace is not None]
    last = there[-1]
    entry = next(found[0] for found in pair if found is not None)
    said = " ".join(text for trace in there for turn in trace.turns for text in _said(turn.action))
    return {
        "page": page,
        "thumbnail": thumbnail,
        "id": entry.key,
        "category": entry.category,
        "question": _short(last.question, _TEXT),
        "target": None if last.target is None else _short(last.target, 120),
        "verdict": last.verdict,
        "finishes": [trace.finish for trace in there],
        "turns": max(len(trace.turns) for trace in there),
        "answers": [
            None
            if trace is None
            else {
                "text": _short(trace.answer or trace.error or "(none)", 120),
                "verdict": trace.verdict,
                "meta": f"{len(trace.turns)} turns, {trace.finish}"
                + ("" if trace.seconds is None else f", {trace.seconds:.1f} s"),
            }
            for trace in traces
        ],
        "change": _change(traces) if len(pair) > 1 else "",
        "searched": _short(said, _SEARCHED),
    }


def _said(action: Any) -> Iterable[str]:
    if isinstance(action, ToolCall):
        yield action.query
    if not isinstance(action, Malformed):
        yield action.thought


def _change(traces: Sequence[Trace | None]) -> str:
    first, second = traces
    if first is None or second is None:
        return "answered by one only"
    if first.score is None or second.score is None:
        return "same answer" if first.answer == second.answer else "another answer"
    if abs(first.score - second.score) <= 1e-9:
        return "equally right"
    return "better" if second.score > first.score else "worse"


def _right(run: BrowsedRun) -> str:
    scores = [e.trace.score for recordings, _ in run.files for e in recordings.entries if e.trace.score is not None]
    count = sum(len(recordings.entries) for recordings, _ in run.files)
    return f"{count:,} conversations" + (f", {100 * sum(scores) / len(scores):.1f} % right" if scores else "")


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted({value for value in values if value})


def _short(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
