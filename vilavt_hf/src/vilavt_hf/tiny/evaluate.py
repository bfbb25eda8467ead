"""The held-out evaluation of the tiny model: every ablation through the public engine, on digit scans it never saw."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vilavt_core.markdown import markdown_table
from vilavt_core.protocol import format_turn
from vilavt_core.results import ChatResult, Intervention, Sample
from vilavt_eval.ablation import ABLATIONS, with_query

from ..chat import VilavtChat
from .scenes import CELL, Card, QuestionKind, Scene, SceneQuestion, Split, examples, make_scene, query_for

COUNTS = {
    QuestionKind.ONE: 110,
    QuestionKind.PAIR: 150,
    QuestionKind.NESTED: 110,
    QuestionKind.SUM: 110,
    QuestionKind.LARGER: 80,
}
"""Questions of each kind in the full evaluation: 560."""

SEED = 2024

MODES = ("full", "teacher_boxes", "no_zoom", "random_box", "no_query", "no_joint")
"""Ways to run every question; ``follows_swap`` runs on the pair questions with two different digits."""


@dataclass(frozen=True)
class Rate:
    """A share with its count and 95% Wilson interval."""

    right: int
    count: int

    @property
    def share(self) -> float:
        """0 to 1; 0 of nothing is 0."""
        return self.right / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson, 95%."""
        from scipy.stats import binomtest  # comes with scikit-learn, whose digits are on the cards

        if not self.count:
            return 0.0, 1.0
        found = binomtest(self.right, self.count).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)

    def to_json(self) -> dict[str, Any]:
        """Share, counts and interval."""
        low, high = self.interval
        return {
            "share": round(self.share, 4),
            "right": self.right,
            "count": self.count,
            "low": round(low, 4),
            "high": round(high, 4),
        }


@dataclass(frozen=True)
class SceneTask:
    """One question, with what the hooks and the scoring need."""

    scene: Scene
    question: SceneQuestion
    other: Card | None = None
    """Pair questions whose digits differ: the other card of the cell."""


def tasks(split: Split = "heldout", limit: int | None = None) -> list[SceneTask]:
    """The fixed question set of a split, kinds interleaved; `limit` keeps that many, in the same proportions."""
    counts = dict(COUNTS)
    if limit is not None:
        total = sum(COUNTS.values())
        counts = {kind: max(1, round(n * limit / total)) for kind, n in COUNTS.items()}
    out = []
    for scene, question in examples(SEED, split, counts):
        other = None
        if question.kind is QuestionKind.PAIR:
            (card,) = question.targets
            other = next(c for c in scene.in_cell(card) if c is not card)
            other = other if other.digit != card.digit else None
        out.append(SceneTask(scene, question, other))
    order = np.random.default_rng(SEED).permutation(len(out))
    return [out[i] for i in order]


# ---------------------------------------------------------------------------------------------------- modes


def _teacher(sample: Sample, turn: int) -> str | None:
    calls = sample.data.question.calls()
    return format_turn(calls[turn]) if turn < len(calls) else None


def _swapped(sample: Sample) -> str:
    return query_for([sample.data.other])


INTERVENTIONS: dict[str, Intervention] = {
    "full": Intervention(),
    "no_zoom": Intervention(),
    "teacher_boxes": Intervention(forced_turns=_teacher),
    "random_box": ABLATIONS["random-box"],
    "no_query": ABLATIONS["no-query"],
    "no_joint": ABLATIONS["no-joint"],
    "follows_swap": Intervention(transform_inquiry=with_query(_swapped)),
}
"""What each mode changes behind the back of the text; ``no_zoom`` is a limit of one turn."""


def run(chat: VilavtChat, todo: Sequence[SceneTask], mode: str) -> list[ChatResult]:
    """Ask all questions in one mode."""
    limits = replace(chat.settings.limits, max_turns=1) if mode == "no_zoom" else None
    samples = [
        Sample([task.scene.image], task.question.text, id=str(i), limits=limits, data=task)
        for i, task in enumerate(todo)
    ]
    return chat.ask_many(samples, intervention=INTERVENTIONS[mode])


# ---------------------------------------------------------------------------------------------------- scoring


def covers(result: ChatResult, task: SceneTask) -> bool:
    """Whether the last crops show every wanted card to at least 90% of its area, at the scale it can be read."""
    crops = [view for view in result.views if view.kind == "crop"]
    shown = 0
    for card in task.question.targets:
        x1, y1, x2, y2 = card.box
        for view in crops:
            a, b, c, d = (v * task.scene.image.width for v in view.region)
            width, height = min(x2, c) - max(x1, a), min(y2, d) - max(y1, b)
            big_enough = view.image.width / (c - a) >= (1.0 if card.small else 0.5) - 1e-6
            if width > 0 and height > 0 and width * height >= 0.9 * (x2 - x1) * (y2 - y1) and big_enough:
                shown += 1
                break
    return shown == len(task.question.targets)


def evaluate(
    chat: VilavtChat,
    split: Split = "heldout",
    limit: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Run every mode and score it.

    Args:
        chat: the model.
        split: whose scans; everything but ``heldout`` is for development.
        limit: number of questions; None is the full set (`COUNTS`).
        progress: called with each finished mode and its seconds.

    Returns:
        Top level: ``full, teacher_boxes, no_zoom, no_query, no_joint, random_box, follows_swap, coverage`` (0 to 1) and
        ``pixel_first_look, pixel_zoomed`` (a plain classifier); ``kinds``: mode -> kind -> share, counts, interval.
    """
    todo = tasks(split, limit)
    rates: dict[str, dict[str, Rate]] = {}
    for mode in (*MODES, "follows_swap"):
        start = time.time()
        asked = [t for t in todo if t.other is not None] if mode == "follows_swap" else todo
        results = run(chat, asked, mode)
        if mode == "follows_swap":
            right = [r.answer == str(t.other.digit) for r, t in zip(results, asked, strict=True) if t.other]
        else:
            right = [r.answer == t.question.answer for r, t in zip(results, asked, strict=True)]
        rates[mode] = _by_kind([t.question.kind for t in asked], right)
        if mode == "full":
            rates["coverage"] = _by_kind(
                [t.question.kind for t in asked], [covers(r, t) for r, t in zip(results, asked, strict=True)]
            )
        if progress is not None:
            progress(mode, time.time() - start)
    out: dict[str, Any] = {mode: round(by_kind["all"].share, 4) for mode, by_kind in rates.items()}
    out |= {"questions": len(todo), "split": split, "seed": SEED}
    out |= pixel_classifier(split)
    out["kinds"] = {mode: {kind: rate.to_json() for kind, rate in by_kind.items()} for mode, by_kind in rates.items()}
    return out


def _by_kind(kinds: Sequence[QuestionKind], right: Sequence[bool]) -> dict[str, Rate]:
    counts: dict[str, list[bool]] = defaultdict(list)
    for kind, ok in zip(kinds, right, strict=True):
        counts["all"].append(ok)
        counts[str(kind)].append(ok)
    order = ["all", *(str(k) for k in QuestionKind)]
    return {kind: Rate(sum(counts[kind]), len(counts[kind])) for kind in order if kind in counts}


def pixel_classifier(split: Split = "heldout", scenes: int = 900) -> dict[str, float]:
    """A plain classifier's accuracy on single digits, told exactly where each card is.

    A one-layer perceptron on standardised grey pixels, trained on cards made from train scans. ``pixel_first_look`` is
    given the card's 14 x 14 pixels of the first look (big cards; small ones are harder), ``pixel_zoomed`` its 28 x 28
    of the crop.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def cards(which: Split, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first, zoomed, digits = [], [], []
        for i in range(count):
            scene = make_scene(np.random.default_rng([seed, i]), which, singles=6, pairs=0, nests=())
            look = np.asarray(scene.shown().convert("L"), np.float32)
            for card in scene.cards:
                y, x = (c * CELL + q * CELL // 2 for c, q in zip((card.row, card.column), card.quadrant, strict=True))
                first.append(look[y : y + CELL // 2, x : x + CELL // 2].ravel())
                qy, qx = (q * CELL for q in card.quadrant)
                crop = np.asarray(scene.cell(card).convert("L"), np.float32)
                zoomed.append(crop[qy : qy + CELL, qx : qx + CELL].ravel())
                digits.append(card.digit)
        return np.array(first), np.array(zoomed), np.array(digits)

    first, zoomed, digits = cards("train", scenes, 1)
    test_first, test_zoomed, test_digits = cards(split, 150, 2)
    out = {}
    for name, x, test in (("pixel_first_look", first, test_first), ("pixel_zoomed", zoomed, test_zoomed)):
        model = make_pipeline(StandardScaler(), MLPClassifier((128,), max_iter=15, random_state=0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, digits)
        out[name] = round(float(model.score(test, test_digits)), 4)
    return out


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table: one row per mode, one column per kind."""
    kinds = ["all", *(str(k) for k in QuestionKind)]
    counts = report["kinds"]["full"]
    head = ["", *(f"{k} (n={counts[k]['count']})" if k in counts else k for k in kinds)]
    lines = []
    for mode, by_kind in report["kinds"].items():
        cells = []
        for kind in kinds:
            rate = by_kind.get(kind)
            if rate is None:
                cells.append("")
                continue
            cell = f"{100 * rate['share']:.1f} ({100 * rate['low']:.0f}-{100 * rate['high']:.0f})"
            cells.append(cell + (f", n={rate['count']}" if rate["count"] != counts[kind]["count"] else ""))
        lines.append([mode, *cells])
    return markdown_table(head, lines)


def load(path: str | Path, batch_size: int = 64) -> VilavtChat:
    """The checkpoint, ready to evaluate."""
    return VilavtChat.from_pretrained(path, concurrency=batch_size, dtype="float32")
