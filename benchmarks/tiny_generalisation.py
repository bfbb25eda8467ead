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


@dataclass(frozen=True)
class Row:
    """Questions of some kinds, and what is changed behind the model's back."""

    name: str
    kinds: Sequence[QuestionKind]
    split: Split
    images: int | None = None
    ask: Callable[[SceneTask], Asked] = plain
    intervention: Intervention | None = None

    def questions(self, count: int) -> list[Asked]:
        """As many of every kind, `count` in all; drawn when they are asked, since 200 take half a gigabyte."""
        each = -(-count // len(self.kinds))
        options: dict[str, int] = {} if self.images is None else {"pictures": self.images}
        return [self.ask(make_task(self.split, k, i, seed=SEED, **options)) for k in self.kinds for i in range(each)]


def rows(split: Split) -> list[Row]:
    """What is asked."""
    pairs = (QuestionKind.PAIR,)
    return [
        Row("scans and photographs of training, new scenes", SINGLE, "train"),
        Row(f"{split}: scans, photographs and scenes never seen", SINGLE, split),
        *(Row(f"{n} images", SEVERAL, split, images=n) for n in (2, 4, 8)),
        Row("clips, forwards", CLIP_KINDS, split),
        Row("clips, backwards", CLIP_KINDS, split, ask=backwards),
        Row("pairs, query as the model writes it", pairs, split),
        Row("pairs, 'the COLOUR card'", pairs, split, intervention=reworded(lambda q: q.removeprefix("digit on "))),
        Row("pairs, 'COLOUR'", pairs, split, intervention=reworded(lambda q: q.split()[-2])),
        Row("pairs, 'which number is on the COLOUR one?'", pairs, split,
            intervention=reworded(lambda q: f"which number is on the {q.split()[-2]} one?")),
        Row("pairs, no query", pairs, split, intervention=Intervention(transform_inquiry=with_query(lambda _: ""))),
    ]  # fmt: skip


def measure(chat: VilavtChat, split: Split, count: int) -> list[dict[str, Any]]:
    """Per row: name, questions, share of right answers, and its 95 % interval."""
    out = []
    for row in rows(split):
        asked = row.questions(count)
        results = chat.ask_many([one.sample for one in asked], intervention=row.intervention)
        right = sum(result.answer == one.answer for result, one in zip(results, asked, strict=True))
        interval = wilson(right, len(asked))
        figures = {"row": row.name, "questions": len(asked), "right": right / len(asked)}
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
