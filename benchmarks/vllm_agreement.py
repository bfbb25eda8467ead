"""Do transformers and vLLM hold the same conversations? The tiny model's held-out questions through both, greedy, fp32.

    python benchmarks/vllm_agreement.py [--checkpoint DIR] [--questions N] [--json FILE]

Counted are conversations whose assistant turns are equal, word for word, and the answers that are right. Needs the
``tiny`` extra of vilavt-hf beside vLLM.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from vilavt_core.results import Sample
from vilavt_hf.chat import VilavtChat
from vilavt_hf.tiny.benchmark import tasks
from vilavt_vllm import VilavtLLM

CHECKPOINT = Path(__file__).parents[1] / "examples" / "vilavt-tiny"


def compare(chat: VilavtChat, llm: VilavtLLM, questions: int | None = None) -> dict[str, Any]:
    """Ask both the same held-out questions.

    Returns:
        ``same_transcripts`` (0 to 1), ``accuracy_transformers``, ``accuracy_vllm``, counts, seconds, and the first
        pairs of transcripts that differ.
    """
    todo = tasks("heldout", questions)
    samples = [Sample(list(task.images), task.question.text, id=str(i)) for i, task in enumerate(todo)]
    began = time.perf_counter()
    theirs = llm.ask_many(samples)
    middle = time.perf_counter()
    ours = chat.ask_many(samples)
    ended = time.perf_counter()
    pairs = [([t.text for t in a.turns], [t.text for t in b.turns]) for a, b in zip(ours, theirs, strict=True)]
    right = [
        [result.answer == task.question.answer for result, task in zip(results, todo, strict=True)]
        for results in (ours, theirs)
    ]
    return {
        "questions": len(todo),
        "failed": sum(result.error is not None for result in (*ours, *theirs)),
        "same_transcripts": sum(a == b for a, b in pairs) / len(todo),
        "accuracy_transformers": sum(right[0]) / len(todo),
        "accuracy_vllm": sum(right[1]) / len(todo),
        "seconds_transformers": ended - middle,
        "seconds_vllm": middle - began,
        "first_differences": [pair for pair in pairs if pair[0] != pair[1]][:5],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--questions", type=int, help="of the 980, in the same proportions; all by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    engine = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": True}
    llm = VilavtLLM(args.checkpoint, **engine)
    chat = VilavtChat.from_pretrained(args.checkpoint, dtype="float32", concurrency=64)
    figures = compare(chat, llm, args.questions)
    Console().print(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
