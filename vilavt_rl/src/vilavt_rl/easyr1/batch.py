"""Episodes in lock-step, and as the padded tensors that EasyR1 trains on. Neither EasyR1 nor vLLM is imported here.

All ranks of a tensor-parallel engine run this with the same inputs and must make the same calls, so nothing depends on
time or on anything a rank could see alone.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from vilavt_core.driver import Driver
from vilavt_core.episode import Episode, Request
from vilavt_hf.positions import mrope_positions

from ..data import Row
from ..errors import RolloutError
from ..replay import Rollout
from ..rewards import Trajectory
from ..rollout import TokenRecord
from .engine import Queries

Generate = Callable[[list[dict[str, Any]], list[Any]], Sequence[Any]]
"""Prompts and one sampling parameter object each, to vLLM's request outputs in the same order."""


def run_drivers(
    drivers: Sequence[Driver],
    generate: Generate,
    sampling: Any,
    prompt_of: Callable[[Request], dict[str, Any]],
    *,
    never: Iterable[int] = (),
    batch: int = 0,
) -> None:
    """Carry out all conversations, one turn of all unfinished ones per call.

    Args:
        drivers: started.
        generate: the engine.
        sampling: vLLM's ``SamplingParams``; copied for every request, with its limits, bans and a seed of its own.
        prompt_of: a request as an engine prompt.
        never: ids that must not be sampled, beside those of the requests: those of the model's vocabulary that the
            tokenizer has no token for.
        batch: number of the batch, so that the same question does not draw the same numbers again.

    Raises:
        RolloutError: the engine answered another number of prompts.
    """
    banned, turn = tuple(never), 0
    while active := [(number, driver) for number, driver in enumerate(drivers) if driver.request is not None]:
        requests = [driver.request for _, driver in active if driver.request is not None]
        drawn = [(batch, number, turn) for number, _ in active]
        params = [_sampling(sampling, request, banned, draw) for request, draw in zip(requests, drawn, strict=True)]
        outputs = generate([prompt_of(request) for request in requests], params)
        turn += 1
        if len(outputs) != len(active):
            raise RolloutError(f"the engine answered {len(outputs)} of {len(active)} prompts")
        for (_, driver), request, output in zip(active, requests, outputs, strict=True):
            ids = list(output.outputs[0].token_ids)
            stopped = bool(ids) and ids[-1] in request.stop_token_ids
            driver.take(ids, finish="stop" if stopped else "length")


def _sampling(sampling: Any, request: Request, never: Iterable[int], draw: tuple[int, int, int]) -> Any:
    params = copy.copy(sampling)
    if params.seed is not None:
        # EasyR1 gives all requests one seed and lets vLLM count up over a request's n answers. Ours are requests of
        # their own: with the same seed all trajectories of a question would be the same.
        params.seed = zlib.crc32(repr((params.seed, *draw)).encode())
    params.n = 1
    params.max_tokens = request.max_new_tokens
    params.stop_token_ids = list(request.stop_token_ids)
    params.ignore_eos = False
    params.logit_bias = request.logit_bias(*never)
    return params


def engine_prompt(request: Request, queries: Queries, processor: Any) -> dict[str, Any]:
    """A request as a vLLM prompt.

    Args:
        request: of an episode.
        queries: ``inquiries``: the episode's tokens and inquiries as they are, so nothing is read off the prompt again;
            ``tensors``: flat images with query rows and a mapping, and one placeholder per image.
        processor: tokenizes the queries of ``tensors``.
    """
    if not request.inquiries:
        return {"prompt_token_ids": list(request.all_token_ids)}
    if queries == "inquiries":
        return {
            "prompt_token_ids": list(request.all_token_ids),
            "multi_modal_data": {"image": list(request.inquiries)},
        }
    ids, mask = processor.tokenize_queries(
        [inquiry.query for inquiry in request.inquiries], [inquiry.query_prefix for inquiry in request.inquiries]
    )
    counts = torch.tensor([len(inquiry.images) for inquiry in request.inquiries])
    return {
        "prompt_token_ids": _one_placeholder_each(request),
        "multi_modal_data": {
            "image": [image for inquiry in request.inquiries for image in inquiry.images],
            "query_ids": ids,
            "query_attention_mask": mask,
            "image_to_query_mapping": torch.repeat_interleave(torch.arange(len(counts)), counts),
        },
    }


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
        Object arrays (B,): ``multi_modal_data`` (images, queries, query_prefixes, images_per_query) and ``messages``
        for the reward.
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
        positions[row, 1:, begin:end] = mrope_positions(stream, grids, image_token_id)
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
            {
                "images": r.images,
                "queries": r.queries,
                "query_prefixes": r.query_prefixes,
                "images_per_query": r.images_per_query,
            }
            for r in records
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
        ids, mask = processor.tokenize_queries(row["queries"], row["query_prefixes"])
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
