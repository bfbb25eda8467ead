"""Something to learn on a CPU: questions of the tiny world, and a model that has not learned all of it.

The checkpoint comes from the stages of `vilavt tiny build`, the last one cut short, and from a few more steps in which
half of the answers come at first look, where they can only be guessed. So it can zoom and read, not well, and mostly
does not. That zooming pays is for GRPO to find out, from right and wrong alone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vilavt_core.progress import counted
from vilavt_hf.tiny.scenes import QuestionKind, Split, ask_about

if TYPE_CHECKING:
    from vilavt_hf.tiny.build import Stage

SHARES = {
    QuestionKind.ONE: 0.1,
    QuestionKind.PAIR: 0.15,
    QuestionKind.NESTED: 0.15,
    QuestionKind.SUM: 0.2,
    QuestionKind.LARGER: 0.15,
    QuestionKind.SUM_ACROSS: 0.15,
    QuestionKind.FIRST: 0.1,
}
"""Of the kinds of questions; the frames of a clip are images here."""
STAGES = ("read", "place", "talk")
"""Those of `vilavt tiny build` that the start goes through: it is not asked for digits that two cards share."""
TALK_STEPS = 300
"""Steps of the last stage, instead of 1500."""
GUESS_STEPS = 24
"""Steps of half conversations, half guesses."""


def write_data(out: str | Path, *, count: int, split: Split, seed: int, name: str, progress: bool = False) -> Path:
    """Write images and ``<name>.jsonl``, in the format that `vilavt_rl.data` reads.

    Args:
        out: folder.
        count: questions, each about an image of its own.
        split: whose digit scans may appear: ``train``, ``dev`` or ``heldout``.
        seed: of everything.
        name: of the file, and of the folder of its images.
        progress: show a bar.
    """
    from vilavt_hf.tiny.build import training_scene

    out = Path(out)
    (out / name).mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.jsonl"
    kinds = list(SHARES)
    with path.open("w", encoding="utf-8") as file:
        for i in counted(range(count), name, "question", shown=progress):
            rng = np.random.default_rng([seed, i])
            kind = kinds[int(rng.choice(len(kinds), p=list(SHARES.values())))]
            scene = training_scene(rng, kind, split)
            question = ask_about(rng, scene, kind)
            images = [f"{name}/{i:06d}-{n}.png" for n in range(len(scene.images))]
            for path_of, picture in zip(images, scene.images, strict=True):
                picture.save(out / path_of, compress_level=1)  # grain does not compress
            row = {
                "id": f"{name}-{i}",
                "question": question.text,
                "answer": question.answer,
                "image_path": images,
                "question_type": "numerical",
                "data_type": f"tiny-{kind}",
                "max_num_steps": 4,
            }
            file.write(json.dumps(row) + "\n")
    return path


def start_stages() -> list[Stage]:
    """Those of `vilavt tiny build` that `STAGES` names, the last one cut short, and one more in which every second
    answer is a guess.
    """
    from vilavt_hf.tiny import build

    *before, talk = (stage for stage in build.STAGES if stage.name in STAGES)
    talk = replace(talk, steps=TALK_STEPS)
    mix = (("episode", 0.5), ("guess", 0.5))
    return [*before, talk, replace(talk, name="guess", steps=GUESS_STEPS, mix=mix, learning_rate=4e-4, warmup=3)]


def build_start(out: str | Path, *, seed: int = 0, resume: bool = False) -> dict[str, Any]:
    """Train the checkpoint to start from, as `vilavt_hf.tiny.build.build` does, on any number of ranks."""
    from vilavt_hf.tiny.build import build

    note = f"made by `vilavt-rl tiny checkpoint`: the last stage stops after {TALK_STEPS} steps, then come guesses"
    return build(Path(out), seed=seed, resume=resume, stages=start_stages(), notes=[note])
