"""How far is the tiny model from having learned its training scenes by heart?

    python benchmarks/tiny_generalisation.py [--checkpoint DIR] [--questions N] [--split dev|heldout] [--json FILE]

One row per question: the scans and photographs of training, in scenes it never saw; those of the split; 2, 4 and 8
images (training has two to four); the frames of a clip backwards; the encoder asked in other words. Everything is
asked greedily, in float32. Needs the ``tiny`` extra of vilavt-hf.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vilavt_core.markdown import markdown_table
from vilavt_core.results import Intervention, Sample
from vilavt_eval.ablation import with_query
from vilavt_eval.statistics import wilson
from vilavt_hf.chat import VilavtChat
from vilavt_hf.tiny.benchmark import SceneTask, make_task
from vilavt_hf.tiny.scenes import CLIP_KINDS, QuestionKind, Split

CHECKPOINT = Path(__file__).parents[1] / "examples" / "vilavt-tiny"
SINGLE = (QuestionKind.ONE, QuestionKind.PAIR, QuestionKind.NESTED, QuestionKind.SUM, QuestionKind.SHARED)
SEVERAL = (QuestionKind.WHICH, QuestionKind.SUM_ACROSS, QuestionKind.SHARED_ACROSS)
SEED = 4048
"""Of the scenes: other ones than those of the table and of training."""


@dataclass(frozen=True)
class Asked:
    """One question as it is asked here."""

    sample: Sample
    answer: str


def plain(task: SceneTask) -> Asked:
    """The question as it is."""
    return Asked(Sample(list(task.images), task.question.text), task.question.answer)


def backwards(task: SceneTask) -> Asked:
    """The frames in the opposite order: another frame, and of two cards the other one is first."""
    last = task.question.pictures - 1
    if task.question.kind is QuestionKind.FRAME:
        answer = str(last - task.question.named[0].picture)
    else:
        answer = str(max(task.question.named, key=lambda card: card.picture).digit)
    return Asked(Sample(list(reversed(task.images)), task.question.text), answer)


def reworded(words: Callable[[str], str]) -> Intervention:
    """Encode crops under the model's query in other words; its text stays as it wrote it."""

    def change(sample: Sample, inquiry: Any) -> Sequence[Any]:
        return [replace(inquiry, query=words(inquiry.query))] if inquiry.query else [inquiry]

    return Intervention(transform_inquiry=change)


def rows(split: Split, count: int) -> list[tuple[str, list[Asked], Intervention | None]]:
    """Name, questions, and what is changed behind the model's back."""

    def some(
        kinds: Sequence[QuestionKind], which: Split = split, ask: Callable[[SceneTask], Asked] = plain, **options: int
    ) -> list[Asked]:
        each = -(-count // len(kinds))
        return [ask(make_task(which, kind, i, seed=SEED, **options)) for kind in kinds for i in range(each)]

    out: list[tuple[str, list[Asked], Intervention | None]] = [
        ("scans and photographs of training, new scenes", some(SINGLE, "train"), None),
        (f"{split}: scans, photographs and scenes never seen", some(SINGLE), None),
    ]
    out += [(f"{n} images", some(SEVERAL, pictures=n), None) for n in (2, 4, 8)]
    out += [
        ("clips, forwards", some(CLIP_KINDS), None),
        ("clips, backwards", some(CLIP_KINDS, ask=backwards), None),
        ("pairs, query as the model writes it", some((QuestionKind.PAIR,)), None),
        ("pairs, 'the COLOUR card'", some((QuestionKind.PAIR,)), reworded(lambda q: q.removeprefix("digit on "))),
        ("pairs, 'COLOUR'", some((QuestionKind.PAIR,)), reworded(lambda q: q.split()[-2])),
        ("pairs, 'which number is on the COLOUR one?'", some((QuestionKind.PAIR,)),
         reworded(lambda q: f"which number is on the {q.split()[-2]} one?")),
        ("pairs, no query", some((QuestionKind.PAIR,)), Intervention(transform_inquiry=with_query(lambda sample: ""))),
    ]  # fmt: skip
    return out


def measure(chat: VilavtChat, split: Split, count: int) -> list[dict[str, Any]]:
    """Per row: name, questions, share of right answers, and its 95 % interval."""
    out = []
    for name, asked, intervention in rows(split, count):
        results = chat.ask_many([one.sample for one in asked], intervention=intervention)
        right = sum(result.answer == one.answer for result, one in zip(results, asked, strict=True))
        interval = wilson(right, len(asked))
        figures = {"row": name, "questions": len(asked), "right": right / len(asked)}
        out.append(figures | {"low": interval.low, "high": interval.high})
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--questions", type=int, default=200, help="of each row")
    parser.add_argument("--split", choices=("dev", "heldout"), default="heldout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    chat = VilavtChat.from_pretrained(args.checkpoint, dtype="float32", concurrency=64)
    figures = measure(chat, args.split, args.questions)
    lines = [
        (f["row"], str(f["questions"]), f"{100 * f['right']:.1f} ({100 * f['low']:.1f} to {100 * f['high']:.1f})")
        for f in figures
    ]
    Console(width=200).print(markdown_table(("", "questions", "percent right (95 % interval)"), lines), markup=False)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
