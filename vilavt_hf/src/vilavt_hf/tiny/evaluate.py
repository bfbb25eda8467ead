"""The held-out evaluation of the tiny model: `vilavt_eval` on its scenes, with two interventions of their own."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vilavt_core.errors import EvaluationError, RegionError
from vilavt_core.protocol import ToolCall, format_turn, parse_turn
from vilavt_core.regions import Gallery
from vilavt_core.results import Intervention, Sample
from vilavt_eval.ablation import ABLATIONS, Ablation, with_query
from vilavt_eval.ablation_table import AblationTable, ablation_table
from vilavt_eval.definition import load_benchmark
from vilavt_eval.evaluation_preset import EvaluationPreset
from vilavt_eval.questions import Questions
from vilavt_eval.runner import Outcome, Setting, asking, run
from vilavt_eval.scores import ScoredFile, score_file

from .benchmark import SEED, SceneTask, tasks, write_benchmark, write_swapped
from .scenes import CANVAS, CELL, Card, Split, make_scene, query_for

TEACHER_BOXES = "teacher-boxes"
SWAPPED_QUERY = "swapped-query"

ROWS = (TEACHER_BOXES, *ABLATIONS, SWAPPED_QUERY)
"""What is run beside the method as it is; ``swapped-query`` on the pair questions with two different digits."""


def interventions(todo: Sequence[SceneTask]) -> dict[str, Intervention]:
    """The two that only these scenes can have.

    ``teacher-boxes`` forces the ideal calls, the answer is the model's own. ``swapped-query`` encodes crops under the
    query of the other card of the cell, whatever the model wrote.

    Args:
        todo: question i has the id i.
    """
    by_id: dict[str | None, SceneTask] = {str(number): task for number, task in enumerate(todo)}

    def teacher(sample: Sample, turn: int) -> str | None:
        calls = by_id[sample.id].question.calls()
        return format_turn(calls[turn]) if turn < len(calls) else None

    def other_card(sample: Sample) -> str:
        other = by_id[sample.id].other
        if other is None:
            raise EvaluationError(f"question {sample.id}: its cell has no other card with another digit to ask for")
        return query_for([other])

    return {
        TEACHER_BOXES: Intervention(forced_turns=teacher),
        SWAPPED_QUERY: Intervention(transform_inquiry=with_query(other_card)),
    }


@dataclass(frozen=True)
class TinyReport:
    """What the tiny model scores."""

    checkpoint: str
    fingerprint: str | None
    questions: int
    split: Split
    seed: int
    """Of the questions."""
    table: AblationTable
    """The method as it is; how often its crops hold all that was asked for (``coverage``) and how often its answers
    follow a swapped query, without a difference; then the ablations.
    """
    pixel_first_look: float
    """Accuracy of a plain classifier, see `pixel_classifier`."""
    pixel_zoomed: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**vars(self), "table": self.table.to_json()}


def evaluate_tiny(
    checkpoint: str,
    folder: Path,
    *,
    split: Split = "heldout",
    limit: int | None = None,
    concurrency: int = 64,
    progress: bool = False,
) -> TinyReport:
    """Run and score everything; after an interruption the same call goes on.

    Args:
        checkpoint: folder or hub id.
        folder: for questions, images and one file of results per run.
        split: whose scans; everything but ``heldout`` is for development.
        limit: number of questions; None is the full set (`benchmark.COUNTS`).
        concurrency: conversations side by side.
        progress: show a bar per run.

    Raises:
        EvaluationError: a question ended in an error.
    """
    todo = tasks(split, limit)
    fingerprint, table = score_scenes(checkpoint, folder, ROWS, todo, concurrency=concurrency, progress=progress)
    return TinyReport(checkpoint, fingerprint, len(todo), split, SEED, table, **pixel_classifier(split))


def score_scenes(
    checkpoint: str,
    folder: Path,
    rows: Sequence[str],
    todo: Sequence[SceneTask],
    *,
    concurrency: int = 64,
    progress: bool = False,
) -> tuple[str | None, AblationTable]:
    """The checkpoint's fingerprint, and the method as it is beside some of `ROWS` on these questions; see
    `evaluate_tiny`."""
    own = interventions(todo)
    questions = Questions(load_benchmark(write_benchmark(folder, todo)), folder)
    swapped = Questions(load_benchmark(write_swapped(folder, todo)), folder)
    preset = EvaluationPreset.load("default", {"precision": "float32"})
    setting = Setting(checkpoint, "hf", preset, concurrency=concurrency)
    backend = setting.open()
    provenance = backend.provenance(0)

    def scored(name: str, asked: Questions) -> ScoredFile:
        this = replace(setting, ablation=Ablation.parse(name, own))
        outcome = run(
            this, asked, folder / "results", provenance=provenance, ask=asking(backend, this, 0), progress=progress
        )
        _refuse_failures(outcome)
        return score_file(outcome.path, asked.benchmark)

    full = scored("", questions)
    alone = {"coverage": _coverage(full, todo, provenance.limits.min_pixels, provenance.limits.max_pixels)}
    if SWAPPED_QUERY in rows:
        alone[SWAPPED_QUERY] = scored(SWAPPED_QUERY, swapped)
    ablated = {name: [scored(name, questions)] for name in rows if name != SWAPPED_QUERY}
    table = ablation_table([full], ablated, alone={name: [file] for name, file in alone.items()})
    return provenance.fingerprint, table


def _refuse_failures(outcome: Outcome) -> None:
    if outcome.failed:
        raise EvaluationError(
            f"{outcome.failed} of {outcome.asked} questions ended in an error, see `error` in the rows of "
            f"{outcome.path}; the same command asks them again"
        )


def _coverage(file: ScoredFile, todo: Sequence[SceneTask], min_pixels: float, max_pixels: float) -> ScoredFile:
    """The file with 1 for every conversation whose crops hold all that was asked for, else 0, in place of scores."""
    covered = {}
    with file.path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if "run" not in row:
                number = row["question_id"]
                covered[str(number)] = float(covers(row["turns"], todo[number], min_pixels, max_pixels))
    rows = [replace(row, strict=covered[row.question_id], published=covered[row.question_id]) for row in file.rows]
    return replace(file, rows=tuple(rows))


def covers(turns: Sequence[str], task: SceneTask, min_pixels: float, max_pixels: float) -> bool:
    """Whether crops show every wanted card to at least 90 % of its area, at the scale it can be read.

    Args:
        turns: what the model wrote; its calls are carried out again, without it.
        task: what it was asked.
        min_pixels: of a crop, as in the run.
        max_pixels: of the first look and of a crop, as in the run.
    """
    gallery = Gallery(min_pixels=min_pixels)
    for _ in range(task.question.pictures):
        gallery.add_original(Image.new("RGB", (CANVAS, CANVAS)), max_pixels)  # their sizes are enough
    for action in map(parse_turn, turns):
        if isinstance(action, ToolCall):
            with contextlib.suppress(RegionError):  # the model was told so, and shown nothing
                gallery.crop(action, max_pixels)
    crops = [
        (view.source, [v * CANVAS for v in view.region], view.image.width)
        for view in gallery.views
        if view.kind == "crop"
    ]
    return all(
        any(card.picture == picture and _shows(card, region, shown) for picture, region, shown in crops)
        for card in task.question.targets
    )


def _shows(card: Card, region: Sequence[float], width: int) -> bool:
    (x1, y1, x2, y2), (left, top, right, bottom) = card.box, region
    across, down = min(x2, right) - max(x1, left), min(y2, bottom) - max(y1, top)
    legible = width / (right - left) >= (1.0 if card.small else 0.5) - 1e-6
    return across > 0 and down > 0 and across * down >= 0.9 * (x2 - x1) * (y2 - y1) and legible


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
            look = np.asarray(scene.shown()[0].convert("L"), np.float32)
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
