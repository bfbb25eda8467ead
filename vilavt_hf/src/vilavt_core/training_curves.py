"""What `vilavt sft` wrote about a run, as curves: loss, right answers, learning rate, gradient norm."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .curves import Curve, Panel, Style, points_of, read_log, running_mean
from .errors import LogError

LOG, VALIDATION = "log.jsonl", "validation.jsonl"
"""Files of a run: one line per logged step, one per validation."""
STATE = "trainer_state.json"
"""The same of any run of transformers' trainer, in its checkpoints."""


@dataclass(frozen=True)
class TrainingLog:
    """What a run has logged so far."""

    steps: tuple[Mapping[str, Any], ...]
    """Each with ``step``, ``loss``, and what else was logged: ``learning_rate``, ``grad_norm``."""
    validations: tuple[Mapping[str, Any], ...] = ()
    """Each with ``step``, ``loss``, and ``answers_right`` where questions were asked."""

    @classmethod
    def read(cls, run: Path) -> TrainingLog:
        """Of a run's folder, finished or not; of a folder with a checkpoint of another trainer of transformers; or of
        one file of either.

        Raises:
            LogError: there is no log.
        """
        if run.name == STATE or not (run.is_file() or (run / LOG).is_file()):
            return cls._of_state(_newest_state(run))
        log = run if run.is_file() else run / LOG
        found = cls(tuple(read_log(log)), tuple(read_log(log.with_name(VALIDATION))))
        if found.steps and not any("loss" in line for line in found.steps):
            raise LogError(f"{log}: no line has a loss; name the folder of a run of `vilavt sft`, or its {LOG}")
        return found

    @classmethod
    def _of_state(cls, path: Path) -> TrainingLog:
        try:
            lines = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            return cls(
                tuple(line for line in lines if "loss" in line),
                tuple(
                    {"step": line["step"], **{k.removeprefix("eval_"): v for k, v in line.items() if k[:5] == "eval_"}}
                    for line in lines
                    if "eval_loss" in line
                ),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise LogError(f"{path}: not the state of a trainer: {type(error).__name__} {error}") from None


def _newest_state(run: Path) -> Path:
    """The last ``trainer_state.json`` of a folder of checkpoints."""
    if run.name == STATE and run.is_file():
        return run
    if not run.is_dir():
        raise LogError(f"{run}: there is no such file or folder")
    states = [run / STATE, *run.glob(f"checkpoint-*/{STATE}")]
    found = [path for path in states if path.is_file()]
    if not found:
        raise LogError(
            f"{run}: no {LOG}, and no {STATE} in it or its checkpoints; name the folder of a run (output.folder)"
        )
    return max(found, key=_step_of)


def _step_of(state: Path) -> tuple[bool, int]:
    number = re.search(r"\d+$", state.parent.name)
    return number is None, int(number[0]) if number else 0


def training_panels(runs: Sequence[tuple[str, TrainingLog]]) -> list[Panel]:
    """Loss, right answers on the validation questions, learning rate and gradient norm of runs, by name."""
    losses, answers, rates, norms = [], [], [], []
    for name, log in runs:
        loss = points_of(log.steps, "loss")
        losses += [
            Curve(name, "loss", loss, Style.FAINT),
            Curve(name, "running mean", running_mean(loss)),
            Curve(name, "validation", points_of(log.validations, "loss"), Style.MARKED),
        ]
        answers.append(Curve(name, "answers right", points_of(log.validations, "answers_right"), Style.MARKED))
        rates.append(Curve(name, "learning rate", points_of(log.steps, "learning_rate")))
        norms.append(Curve(name, "gradient norm", points_of(log.steps, "grad_norm")))
    return [
        Panel("loss per token", tuple(losses), weight=1.6),
        Panel("share of questions", tuple(answers), limits=(0, 1)),
        Panel("learning rate", tuple(rates), weight=0.7),
        Panel("gradient norm", tuple(norms), weight=0.7),
    ]
