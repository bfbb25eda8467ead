"""Episodes in lock-step, and as the padded tensors that EasyR1 trains on. Neither EasyR1 nor vLLM is imported here.

All ranks of a tensor-parallel engine run this with the same inputs and must make the same calls, so nothing depends on
time or on anything a rank could see alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vilavt_hf.episode import Episode, Request
from vilavt_hf.train.collator import mrope_positions

from ..data import Row
from ..errors import RolloutError
from ..replay import Rollout
from ..rewards import Trajectory
from ..rollout import TokenRecord

Generate = Callable[[list[dict[str, Any]], list[Any]], Sequence[Any]]
"""Prompts and one sampling parameter object each, to vLLM's request outputs in the same order."""

_NEVER = -100.0


def run_episodes(
    episodes: Sequence[Episode], generate: Generate, sampling: Any, prompt_of: Callable[[Request], dict[str, Any]]
) -> None:
    """Drive all episodes to their end, one turn of all unfinished ones per call.

    Args:
        episodes: started.
        generate: the engine.
        sampling: vLLM's ``SamplingParams``; copied for every request, with its limits and bans.
        prompt_of: a request as an engine prompt.

    Raises:
        RolloutError: the engine answered another number of prompts.
    """
    while active := [(episode, request) for episode in episodes if (request := episode.next_request()) is not None]:
        prompts = [prompt_of(request) for _, request in active]
        outputs = generate(prompts, [_sampling(sampling, request) for _, request in active])
        if len(outputs) != len(active):
            raise RolloutError(f"the engine answered {len(outputs)} of {len(active)} prompts")
        for (episode, request), output in zip(active, outputs, strict=True):
            ids = list(output.outputs[0].token_ids)
            stopped = bool(ids) and ids[-1] in request.stop_token_ids
            episode.feed(ids, finish="stop" if stopped else "length")


def _sampling(sampling: Any, request: Request) -> Any:
    params = copy.copy(sampling)
    params.n = 1
    params.max_tokens = request.max_new_tokens
    params.stop_token_ids = list(request.stop_token_ids)
    params.ignore_eos = False
    params.logit_bias = dict.fromkeys(request.banned_token_ids, _NEVER)
    return params


def engine_prompt(request: Request, queries: str, processor: Any) -> dict[str, Any]:
    """A request as a vLLM prompt; ``queries`` as in :class:`vilavt_rl.easyr1.settings.Settings`."""
    images = [image for inquiry in request.inquiries for image in inquiry.images]
    prompt: dict[str, Any] = {"prompt_token_ids": _one_placeholder_each(request)}
    if not images:
        return prompt
    prompt["multi_modal_data"] = {"image": images}
    if queries == "tensors":
        ids, mask = processor.tokenize_queries([inquiry.query for inquiry in request.inquiries])
        counts = torch.tensor([len(inquiry.images) for inquiry in request.inquiries])
        prompt["multi_modal_data"] |= {
            "query_ids": ids,
            "query_attention_mask": mask,
            "image_to_query_mapping": torch.repeat_interleave(torch.arange(len(counts)), counts),
        }
    return prompt


def _one_placeholder_each(request: Request) -> list[int]:
    """vLLM's Qwen processors expand one placeholder per image; an episode's stream holds one per image token."""
    *_, image_pad, _ = request.banned_token_ids
    ids = request.all_token_ids
    return [token for i, token in enumerate(ids) if token != image_pad or i == 0 or ids[i - 1] != image_pad]


def pack(
    episodes: Sequence[Episode], *, prompt_length: int, response_length: int, pad_token_id: int, image_token_id: int
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Finished episodes as EasyR1's batch.

    Returns:
        Tensors: ``prompts`` (B, P) padded left, ``responses`` (B, R) padded right, ``input_ids`` and
        ``attention_mask`` (B, P + R), ``position_ids`` (B, 4, P + R): text, then M-RoPE; ``response_mask`` (B, R), the
        loss mask: EasyR1 uses it for advantages, loss and token counts alike.
        Object arrays (B,): ``multi_modal_data`` (images, queries, images_per_query) and ``messages`` for the reward.
    """
    records = [TokenRecord.of(episode) for episode in episodes]
    total = prompt_length + response_length
    shape = (len(records), total)
    ids, attention = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long)
    loss = torch.zeros(len(records), response_length, dtype=torch.long)
    positions = torch.zeros(len(records), 4, total, dtype=torch.long)
    for row, record in enumerate(records):
        stream = record.prompt_ids + record.response_ids
        begin = prompt_length - len(record.prompt_ids)
        end = prompt_length + len(record.response_ids)
        ids[row, begin:end] = torch.tensor(stream)
        attention[row, begin:end] = 1
        loss[row, : len(record.response_ids)] = torch.tensor(record.response_mask)
        grids = [(image.height // 28, image.width // 28) for image in record.images]
        positions[row, 0, begin:end] = torch.arange(len(stream))
        positions[row, 1:, begin:end] = torch.from_numpy(mrope_positions(stream, grids, image_token_id))
    tensors = {
        "prompts": ids[:, :prompt_length],
        "responses": ids[:, prompt_length:],
        "input_ids": ids,
        "attention_mask": attention,
        "response_mask": loss,
        "position_ids": positions,
    }
    objects: dict[str, list[Any]] = {
        "multi_modal_data": [
            {"images": r.images, "queries": r.queries, "images_per_query": r.images_per_query} for r in records
        ],
        "messages": [Trajectory.of(episode.result).to_json() for episode in episodes],
    }
    return tensors, {name: _array(values) for name, values in objects.items()}


def traces(rows: Sequence[Row], episodes: Sequence[Episode], temperature: float) -> np.ndarray:
    """Finished episodes as plain data of `vilavt_rl.replay.Rollout`; step, group and reward come later."""
    return _array(
        [
            Rollout.of(row, episode, temperature=temperature, step=0, group="", reward=None).to_json()
            for row, episode in zip(rows, episodes, strict=True)
        ]
    )


def model_inputs(data: Any, processor: Any) -> np.ndarray:
    """Model inputs of every row of ``multi_modal_data``. Nothing is shared by uid: a trajectory has its own crops."""
    out: list[dict[str, torch.Tensor]] = []
    for row in data:
        if not row["images"]:
            out.append({})
            continue
        encoded = processor.image_processor(images=row["images"], return_tensors="pt", do_resize=False)
        ids, mask = processor.tokenize_queries(row["queries"])
        out.append(
            {
                "pixel_values": encoded["pixel_values"],
                "image_grid_thw": encoded["image_grid_thw"],
                "query_ids": ids,
                "query_attention_mask": mask,
                "images_per_query": torch.tensor(row["images_per_query"]),
            }
        )
    return _array(out)


def _array(values: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array
