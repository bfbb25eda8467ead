"""ViLaVT's reward for EasyR1: as a reward file for its configuration, and as a manager that sees whole trajectories.

As a file (``worker.reward.reward_function=…/vilavt_rl/easyr1/reward.py:compute_score``) it works in an unchanged
EasyR1, but only for one turn: EasyR1's own manager decodes the first ``response_mask.sum()`` tokens, which in a
conversation are other tokens than the sampled ones. ``python -m vilavt_rl.easyr1.main`` uses the manager.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vilavt_core.json_text import parse_json
from vilavt_core.scoring import read_options
from vilavt_rl import equal_rewards
from vilavt_rl.data import Row
from vilavt_rl.replay import Rollout, write_rollouts
from vilavt_rl.rewards import Reward, RewardSettings, Task, Trajectory, reward

REWARD_NAME = "vilavt"
REWARD_TYPE = "batch"


def compute_score(reward_inputs: Sequence[dict[str, Any]], **settings: Any) -> list[dict[str, float]]:
    """EasyR1's batch signature.

    Args:
        reward_inputs: ``response`` (decode with ``skip_special_tokens=false``), ``response_length``, and
            ``ground_truth``: the answer, or JSON with ``answer``, ``question_type``, ``data_type`` and ``options``.
        settings: fields of `vilavt_rl.rewards.RewardSettings` (``worker.reward.reward_function_kwargs``).

    Returns:
        ``overall``, ``format``, ``accuracy`` and the other metrics of each.
    """
    how = RewardSettings(**settings)
    out = []
    for given in reward_inputs:
        task = _task(given["ground_truth"])
        trajectory = Trajectory.read(given["response"], sampled_tokens=int(given.get("response_length") or 0))
        out.append(reward(trajectory, task, how).metrics(task.data_type))
    equal_rewards.seen.see([found["overall"] for found in out], object())
    return out


def _task(ground_truth: Any) -> Task:
    try:
        found = parse_json(ground_truth)
    except (TypeError, ValueError):
        found = None
    if isinstance(found, dict) and "answer" in found:
        return Task(
            found["answer"],
            str(found.get("question_type", "free-form")),
            str(found.get("data_type", "")),
            read_options(found.get("options")),
        )
    return Task(ground_truth, "free-form")


class VilavtRewardManager:
    """Takes the place of EasyR1's reward manager; a Ray actor there.

    Args:
        config: EasyR1's ``worker.reward``; only ``reward_function_kwargs`` is used, as reward settings.
        trace_every: write the rollouts of every so many batches for `vilavt-rl replay`; 0: of none. EasyR1 does not
            tell the step, so batches are counted, from 1.
        run: folder of the run's checkpoints, where they are written.
    """

    def __init__(self, config: Any, trace_every: int = 0, run: str = "") -> None:
        self.settings = RewardSettings(**dict(config.reward_function_kwargs))
        self.trace_every, self.run, self.batches = trace_every, run, 0
        self.equal = equal_rewards.EqualRewards()

    def compute_reward(self, data: Any) -> tuple[torch.Tensor, dict[str, list[float]]]:
        """EasyR1's signature: (B, R) rewards, each on the last sampled token, and lists of metrics."""
        mask = data.batch["response_mask"]
        out = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        metrics: dict[str, list[float]] = defaultdict(list)
        rewards: list[Reward] = []
        for i, (row, messages) in enumerate(
            zip(data.non_tensor_batch["row"], data.non_tensor_batch["messages"], strict=True)
        ):
            task = Row.from_json(row).task
            trajectory = Trajectory.from_json(messages, sampled_tokens=int(mask[i].sum()))
            earned = reward(trajectory, task, self.settings)
            rewards.append(earned)
            out[i, int(mask[i].nonzero()[-1])] = earned.overall
            for name, value in earned.metrics(task.data_type).items():
                metrics[name].append(value)
        self.batches += 1
        self.equal.see([earned.overall for earned in rewards], self.batches)
        if self.trace_every and self.batches % self.trace_every == 0:
            columns = (data.non_tensor_batch[name] for name in ("rollout", "uid"))
            write_rollouts(
                self.run,
                [
                    replace(Rollout.from_json(kept), step=self.batches, group=str(uid), reward=earned.metrics())
                    for kept, uid, earned in zip(*columns, rewards, strict=True)
                ],
            )
        return out, metrics
