"""What a run has logged, as curves: reward, accuracy, the share of episodes that zoom, turns. verl and EasyR1 alike.

Both trainers' file loggers are read (``trainer.logger=[console,file]``), and the rollouts that ``trace_every`` keeps:
verl logs no figure of ours about training episodes, only about those of validations.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from vilavt_core.curves import Curve, Panel, Points, Style, points_of, read_log, running_mean
from vilavt_core.errors import LogError

from .replay import FOLDER, Rollout, read_rollouts

EASYR1_LOG = "experiment_log.jsonl"
"""In the folder of an EasyR1 run's checkpoints."""
CHECKPOINTS = "checkpoints"
"""Where verl keeps those of PROJECT/EXPERIMENT, unless told otherwise; its log is PROJECT/EXPERIMENT.jsonl."""


@dataclass(frozen=True)
class RewardLog:
    """What a run has logged so far; each is (step, value) by step, and empty where nothing says it."""

    reward: Points = ()
    """Mean over the episodes of a step, sampled as in training."""
    accuracy: Points = ()
    """Share of training episodes whose answer is right."""
    zoomed: Points = ()
    """Share of training episodes with at least one zoom that was carried out."""
    turns: Points = ()
    """Mean assistant turns of a training episode."""
    held_out_accuracy: Points = field(default=())
    """On the validation questions: mean over their data sources."""
    held_out_zoomed: Points = field(default=())
    """The same, of episodes that zoom."""

    @classmethod
    def read(cls, run: Path, rollouts: Path | None = None) -> RewardLog:
        """Of a trainer's log; of a folder of checkpoints, EasyR1's with its log or any with rollouts.

        Args:
            run: the file or folder; the run may still be going on.
            rollouts: where `run` is a log: the folder of its checkpoints, or of rollouts. Default: where verl puts
                them, seen from its log, and EasyR1, if they are there.

        Raises:
            LogError: there is no log, or one of something else.
            RowError: `rollouts` is given and holds none.
        """
        log = run / EASYR1_LOG if run.is_dir() else run
        if run.is_dir() and not log.is_file():
            return _of_rollouts(run)
        if not log.is_file():
            raise LogError(f"{run}: there is no such file or folder")
        lines = read_log(log)
        if verls := [line for line in lines if isinstance(line.get("data"), dict)]:
            found = _of_verl([{**line["data"], "step": line.get("step")} for line in verls])
        else:
            found = _of_easyr1([_flat(line) for line in lines])
        if lines and not (found.reward or found.held_out_accuracy):
            raise LogError(
                f"{log}: no reward in it; name what verl's or EasyR1's file logger wrote "
                f"(trainer.logger=[console,file]), or a folder with {FOLDER}/"
            )
        kept = rollouts or _place_of_rollouts(log)
        if found.zoomed or kept is None:
            return found
        more = _of_rollouts(kept)
        return cls(
            found.reward,
            found.accuracy or more.accuracy,
            more.zoomed,
            found.turns or more.turns,
            found.held_out_accuracy,
            found.held_out_zoomed,
        )


def reward_panels(runs: Sequence[tuple[str, RewardLog]]) -> list[Panel]:
    """Reward, accuracy, share of zooming episodes and turns of runs, by name."""
    rewards, accuracies, shares, turns = [], [], [], []
    for name, log in runs:
        rewards += [
            Curve(name, "reward", log.reward, Style.FAINT),
            Curve(name, "running mean", running_mean(log.reward)),
        ]
        accuracies += [
            Curve(name, "in training", log.accuracy),
            Curve(name, "held out", log.held_out_accuracy, Style.DASHED),
        ]
        shares += [
            Curve(name, "in training", log.zoomed),
            Curve(name, "held out", log.held_out_zoomed, Style.DASHED),
        ]
        turns.append(Curve(name, "turns", log.turns))
    return [
        Panel("reward of an episode", tuple(rewards)),
        Panel("answers right", tuple(accuracies), limits=(0, 1)),
        Panel("episodes that zoom", tuple(shares), limits=(0, 1)),
        Panel("turns of an episode", tuple(turns)),
    ]


def _of_verl(lines: Sequence[Mapping[str, Any]]) -> RewardLog:
    return RewardLog(
        reward=points_of(lines, "critic/score/mean"),
        # verl counts messages, the question too: two for each turn
        turns=[(step, count / 2) for step, count in points_of(lines, "num_turns/mean")],
        held_out_accuracy=_over_sources(lines, r"val-(core|aux)/.+/acc/mean@\d+"),
        held_out_zoomed=_over_sources(lines, r"val-(core|aux)/.+/zoomed/mean@\d+"),
    )


def _over_sources(lines: Sequence[Mapping[str, Any]], name: str) -> Points:
    found = []
    for line in lines:
        values = [float(value) for key, value in line.items() if re.fullmatch(name, key)]
        if values:
            found.append((line["step"], fmean(values)))
    return found


def _of_easyr1(lines: Sequence[Mapping[str, Any]]) -> RewardLog:
    return RewardLog(
        reward=points_of(lines, "reward/overall"),
        accuracy=points_of(lines, "reward/accuracy"),
        zoomed=points_of(lines, "reward/zoomed"),
        turns=points_of(lines, "reward/turns"),
        held_out_accuracy=points_of(lines, "val/accuracy_reward"),
        held_out_zoomed=points_of(lines, "val/zoomed_reward"),
    )


def _flat(line: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """EasyR1's log, which nests ``reward/overall`` as {"reward": {"overall": …}}."""
    found: dict[str, Any] = {}
    for name, value in line.items():
        found |= _flat(value, f"{before}{name}/") if isinstance(value, Mapping) else {before + name: value}
    return found


def _of_rollouts(folder: Path) -> RewardLog:
    """Of the steps whose rollouts were kept; greedy ones are a validation's."""
    steps: dict[int, list[Rollout]] = defaultdict(list)
    for rollout in read_rollouts(folder):
        if rollout.temperature > 0:
            steps[rollout.step].append(rollout)

    def mean(name: str) -> Points:
        each = {s: [r.reward[name] for r in rollouts if name in r.reward] for s, rollouts in sorted(steps.items())}
        return [(step, fmean(values)) for step, values in each.items() if values]

    zooms = {s: [r.reward["zooms"] > 0 for r in found if "zooms" in r.reward] for s, found in sorted(steps.items())}
    return RewardLog(
        reward=mean("overall"),
        accuracy=mean("accuracy"),
        zoomed=[(step, fmean(map(float, values))) for step, values in zooms.items() if values],
        turns=[(step, fmean(len(rollout.turns) for rollout in found)) for step, found in sorted(steps.items())],
    )


def _place_of_rollouts(log: Path) -> Path | None:
    """Where a run's rollouts are by default, seen from its log; None if none are there."""
    log = log.absolute()
    beside = log.parent
    verls = beside.parent / CHECKPOINTS / beside.name / log.stem
    return next((place for place in (beside, verls) if any((place / FOLDER).glob("step-*.jsonl"))), None)
