"""One verl trajectory = one ViLaVT episode (``rollout.agent.agent_loop_config_path``).

Token-exact: what the engine sampled is what is trained on; images and tool responses carry no loss. The engine is
verl's vLLM server, with the model of vilavt-vllm in it, or our CPU engine. Both get the episode's inquiries in the
place of images: which images belong to which query, and what is put before it, is never read off the prompt again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from typing import Any
from uuid import uuid4

from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput

from vilavt_core.episode import Episode, Request

from .. import equal_rewards
from ..data import Row
from ..errors import HostError, RolloutError
from ..replay import Rollout, write_rollouts
from ..rewards import RewardSettings, Trajectory, reward
from ..rollout import TokenRecord, cached_settings, finished_episode, start_row
from ..run_settings import file_names, note_settings
from .cpu.names import ROLLOUT
from .reward import score_fields

ROLLOUTS = ("vllm", ROLLOUT)
"""Values of ``actor_rollout_ref.rollout.name``."""


class VilavtAgentLoop(AgentLoopBase):
    """Carries out a conversation with verl's server.

    Args:
        preset: how episodes run; None: what the checkpoint asks for.
        inference: ``preset`` and ``limits`` of the trained checkpoint, where they differ from these.
        limits: fields of `vilavt_core.presets.Limits`; a row's ``max_turns`` wins, its ``max_pixels`` can only lower.
        reward: fields of `vilavt_rl.rewards.RewardSettings`; None leaves the reward to verl's reward workers.
        trace_every: write the rollouts of every so many steps for `vilavt-rl replay`; 0: of none.

    Raises:
        HostError: verl's rollout engine is one that has no ViLaVT.
    """

    def __init__(
        self,
        *args: Any,
        preset: str | None = None,
        limits: Mapping[str, Any] | None = None,
        inference: Mapping[str, Any] | None = None,
        reward: Mapping[str, Any] | None = None,
        trace_every: int = 0,
        **kwargs: Any,
    ) -> None:
        # Prompts are the episode's; naming the parent's family only spares a warning per trajectory.
        super().__init__(*args, **{**kwargs, "hf_model_type": "qwen2_5_vl"})
        if (name := self.rollout_config.name) not in ROLLOUTS:
            raise HostError(
                f"actor_rollout_ref.rollout.name is {name!r}: ViLaVT runs in {' and '.join(ROLLOUTS)}; there is no "
                "model of it for other engines"
            )
        self.preset = preset
        self.limits = tuple(sorted((limits or {}).items()))
        self.reward = None if reward is None else RewardSettings(**reward)
        self.trace_every = trace_every
        trainer = self.config.trainer
        if int(trainer.get("save_freq", -1)) > 0:
            # Hydra hands sections over as its own kind of dictionary
            given = OmegaConf.create({"preset": preset, "limits": limits, "inference": inference})
            settings = json.dumps(OmegaConf.to_container(given), sort_keys=True)
            files = file_names(self.config.data.get("train_files"))
            note_settings(trainer.default_local_dir, self.tokenizer.name_or_path, settings, files)

    async def run(self, sampling_params: dict[str, Any], **fields: Any) -> AgentLoopOutput:
        """See the parent's.

        Raises:
            RolloutError: the first turn is too long, or the engine broke off.
        """
        row = Row.from_json(fields["row"])
        settings = cached_settings(self.tokenizer.name_or_path, self.preset, self.limits)
        lengths = self.rollout_config.prompt_length, self.rollout_config.response_length
        start = partial(start_row, row, settings, max_prompt=lengths[0], max_response=lengths[1])
        driver = await self.loop.run_in_executor(None, start)
        session, generating, zooming = uuid4().hex, 0.0, 0.0
        versions: dict[str, Any] = {}
        while (request := driver.request) is not None:
            began = time.perf_counter()
            out = await self.server_manager.generate(
                request_id=session,  # the same for all turns: they go to the engine that has the cache
                prompt_ids=request.all_token_ids,
                sampling_params=_sampling(sampling_params, request),
                image_data=list(request.inquiries) or None,
            )
            sampled = time.perf_counter()
            if out.stop_reason in ("aborted", "abort"):
                raise RolloutError(f"sample {row.id}, turn {request.turn}: the engine aborted it")
            versions.setdefault("min_global_steps", out.extra_fields.get("min_global_steps"))
            versions["max_global_steps"] = out.extra_fields.get("max_global_steps")
            finish = "stop" if out.token_ids and out.token_ids[-1] in request.stop_token_ids else "length"
            await self.loop.run_in_executor(None, partial(driver.take, out.token_ids, out.log_probs, finish))
            generating += sampled - began
            zooming += time.perf_counter() - sampled
        episode = finished_episode(driver)
        return await self._output(
            row,
            episode,
            AgentLoopMetrics(generate_sequences=generating, tool_calls=zooming),
            versions,
            fields,
            temperature=float(sampling_params["temperature"]),
        )

    async def _output(
        self,
        row: Row,
        episode: Episode,
        metrics: AgentLoopMetrics,
        versions: dict[str, Any],
        fields: Mapping[str, Any],
        *,
        temperature: float,
    ) -> AgentLoopOutput:
        tokens, trajectory = TokenRecord.of(episode), Trajectory.of(episode.result)
        extra: dict[str, Any] = {
            **versions,
            "finish": str(episode.finish),
            "turn_scores": [],
            "tool_rewards": [],
        }
        earned = None
        if self.reward is not None:
            began = time.perf_counter()
            earned = await self.loop.run_in_executor(None, partial(reward, trajectory, row.task, self.reward))
            metrics.compute_score = time.perf_counter() - began
            extra["reward_extra_info"] = score_fields(earned)
            equal_rewards.seen.see([earned.overall], fields.get("global_steps"))
        else:
            extra |= {"messages": trajectory.to_json(), "sampled_tokens": trajectory.sampled_tokens}
            extra["reward_step"] = int(fields.get("global_steps") or 0)
        if self.trace_every and (step := int(fields.get("global_steps") or 0)) % self.trace_every == 0:
            group = str(fields.get("uid", ""))
            rollout = Rollout.of(row, episode, temperature=temperature, step=step, group=group, reward=earned)
            write_rollouts(self.config.trainer.default_local_dir, [rollout])
        output = AgentLoopOutput(
            prompt_ids=tokens.prompt_ids,
            response_ids=tokens.response_ids,
            response_mask=tokens.response_mask,
            response_logprobs=tokens.response_logprobs,
            multi_modal_data={"images": tokens.images} if tokens.images else None,
            num_turns=1 + len(trajectory.messages),
            metrics=metrics,
            extra_fields=extra,
        )
        # Set only when there is something: verl tells fields that were set from those that were not.
        if tokens.images:
            output.mm_processor_kwargs = _groups(episode.inquiries, episode.preset.query_prefix)
        if earned is not None:
            output.reward_score = earned.overall
        return output


def _groups(inquiries: Any, query_prefix: str) -> dict[str, Any]:
    """What `VerlVilavtProcessor` needs beside the images. Counts per query, not a mapping: verl concatenates."""
    groups: dict[str, Any] = {
        "queries": [inquiry.query for inquiry in inquiries],
        "images_per_query": [len(inquiry.images) for inquiry in inquiries],
    }
    return groups | ({"query_prefix": query_prefix} if query_prefix else {})


def _sampling(params: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """A copy for every call: servers take keys out of it."""
    return {
        **params,
        "max_tokens": request.max_new_tokens,
        "stop_token_ids": list(request.stop_token_ids),
        "logit_bias": request.logit_bias(),
    }
