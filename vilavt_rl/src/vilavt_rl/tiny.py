"""Something to learn on a CPU: questions of the tiny world, and a model that has not learned all of it.

The checkpoint comes from the stages of `vilavt tiny build`, the last one cut short, and from a few more steps in which
half of the answers come at first look, where they can only be guessed. So it can zoom and read, not well, and mostly
does not. That zooming pays is for GRPO to find out, from right and wrong alone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vilavt_core.progress import counted
from vilavt_hf.tiny.scenes import QuestionKind, Split, ask_about

SHARES = {
    QuestionKind.ONE: 0.1,
    QuestionKind.PAIR: 0.2,
    QuestionKind.NESTED: 0.2,
    QuestionKind.SUM: 0.3,
    QuestionKind.LARGER: 0.2,
}
"""Of the kinds of questions."""
TALK_STEPS = 300
"""Steps of the last stage, instead of 1000."""
GUESS_STEPS = 24
"""Steps of half conversations, half guesses."""


def write_data(out: str | Path, *, count: int, split: Split, seed: int, name: str, progress: bool = False) -> Path:
    """Write pictures and ``<name>.jsonl``, in the format that `vilavt_rl.data` reads.

    Args:
        out: folder.
        count: questions, each about a picture of its own.
        split: whose digit scans may appear: ``train``, ``dev`` or ``heldout``.
        seed: of everything.
        name: of the file, and of the folder of its pictures.
        progress: show a bar.
    """
    from vilavt_hf.tiny.build import _scene_for

    out = Path(out)
    (out / name).mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.jsonl"
    kinds = list(SHARES)
    with path.open("w", encoding="utf-8") as file:
        for i in counted(range(count), name, "question", shown=progress):
            rng = np.random.default_rng([seed, i])
            kind = kinds[int(rng.choice(len(kinds), p=list(SHARES.values())))]
            scene = _scene_for(rng, kind, split)
            question = ask_about(rng, scene, kind)
            image = f"{name}/{i:06d}.png"
            scene.image.save(out / image, compress_level=1)  # grain does not compress
            row = {
                "id": f"{name}-{i}",
                "question": question.text,
                "answer": question.answer,
                "image_path": [image],
                "question_type": "numerical",
                "data_type": f"tiny-{kind}",
                "max_num_steps": 4,
            }
            file.write(json.dumps(row) + "\n")
    return path


def build_start(
    out: str | Path,
    *,
    talk_steps: int = TALK_STEPS,
    guess_steps: int = GUESS_STEPS,
    seed: int = 0,
    work: Path | None = None,
) -> dict[str, Any]:
    """Train the checkpoint to start from: `vilavt_hf.tiny.build.build`, its last stage cut to `talk_steps`, then
    `guess_steps` more in which every second answer is a guess.
    """
    from vilavt_hf.tiny.build import STAGES, new_model, publish, run_stage
    from vilavt_hf.tiny.tiny_model import tiny_processor

    out = Path(out)
    work = work or out.with_name(out.name + "-work")
    talk = replace(STAGES[-1], steps=talk_steps)
    mix = (("episode", 0.5), ("guess", 0.5))
    guess = replace(talk, name="guess", steps=guess_steps, mix=mix, learning_rate=4e-4, warmup=3)
    stages = [*STAGES[:-1], talk, guess]
    processor = tiny_processor()
    model = new_model(processor, seed)
    for number, stage in enumerate(stages, 1):
        run_stage(stage, model, processor, work, seed=10 * seed + number, workers=0)
    model.auxiliary = None
    note = f"made by `vilavt-rl tiny checkpoint`: the last stage stops after {talk_steps} steps, then come guesses"
    return publish(model, processor, [work / stage.name for stage in stages], out, seed, notes=[note])
