"""ViLaVT's reward as a verl reward function (``reward.custom_reward_function``).

The agent loop computes the reward itself unless told otherwise (``reward: null`` in its configuration); then verl's
reward workers call this one, with what the loop put into ``extra_info``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vilavt_core.scoring import read_options

from .. import equal_rewards
from ..rewards import Reward, RewardSettings, Task, Trajectory, reward


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """The reward of one trajectory, in verl's signature.

    Args:
        data_source: prefix of metrics.
        solution_str: the decoded response; read only if `extra_info` has no ``messages``.
        ground_truth: the right answer.
        extra_info: ``question_type``; of a multiple choice ``options`` if they are known; and from our agent loop
            ``messages``, ``sampled_tokens`` and ``reward_step``.
        settings: fields of `vilavt_rl.rewards.RewardSettings` (``reward.custom_reward_function.reward_kwargs``).

    Returns:
        ``score`` and the metrics of `score_fields`.
    """
    info = extra_info or {}
    tokens = int(info.get("sampled_tokens") or 0)
    if info.get("messages"):
        trajectory = Trajectory.from_json(info["messages"], sampled_tokens=tokens)
    else:
        trajectory = Trajectory.read(solution_str, sampled_tokens=tokens)
    given = info.get("options")  # a list, or an array once verl has collated it
    options = read_options(None if given is None else list(given))
    task = Task(ground_truth, str(info.get("question_type") or "free-form"), data_source, options)
    found = reward(trajectory, task, RewardSettings(**settings))
    equal_rewards.seen.see([found.overall], info.get("reward_step"))
    return {"score": found.overall, **score_fields(found)}


def score_fields(found: Reward) -> dict[str, float]:
    """Metrics under the names that verl knows: it averages each per ``data_source``, and calls ``acc`` the core one."""
    metrics = found.metrics()
    return {"acc": found.accuracy, **{name: metrics[name] for name in ("format", "zooms", "zoomed", "turns")}}
