"""A rollout engine for verl on the CPU: `vilavt_hf.engine` behind verl's token-in/token-out server interface.

Every image group is encoded once and every token prefilled once: between the turns of an episode its keys and values
wait, and the next turn finds them by its own tokens and images, as a prefix cache would. A weight update drops them.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from vilavt_core.architecture import module_name
from vilavt_core.episode import Inquiry, Request
from vilavt_core.presets import Sampling
from vilavt_hf import VilavtForConditionalGeneration, VilavtProcessor
from vilavt_hf.engine import Engine, EngineRow, Sampler

from ...errors import RolloutError
from .names import ROLLOUT

MAX_WAITING_ROWS = 256
"""Conversations whose keys and values are kept for a next turn; the one unused for longest goes first."""


@dataclass
class _Job:
    """A request on its way."""

    done: asyncio.Future
    images: tuple[str, ...]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Choose:
    """Each row by its own sampling settings; keeps the log-probability that a trainer will compute: of the logits
    divided by the temperature, placeholders excluded, before top-k and top-p.
    """

    def __init__(self) -> None:
        self.sampling: dict[EngineRow, Sampling] = {}
        self.logprobs: dict[EngineRow, float] = {}

    def __call__(self, rows: Sequence[EngineRow], logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.empty(len(rows), dtype=torch.long)
        for sampling in dict.fromkeys(self.sampling[row] for row in rows):
            places = [i for i, row in enumerate(rows) if self.sampling[row] == sampling]
            picked = Sampler(sampling)([rows[i] for i in places], logits[places])
            scaled = logits[places] / (sampling.temperature or 1.0)
            values = scaled.log_softmax(-1).gather(-1, picked[:, None])[:, 0].tolist()
            chosen[places] = picked
            self.logprobs.update(zip([rows[i] for i in places], values, strict=True))
        return chosen


class VilavtServer:
    """Generates for one replica; a Ray actor. All methods run on one event loop, so nothing is locked.

    Args:
        path: the checkpoint.
        max_batch_size: conversations that run side by side.
        seed: of all sampling; request number i draws from a generator of its own.
    """

    def __init__(self, path: str, max_batch_size: int, seed: int) -> None:
        self.model: Any = VilavtForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = VilavtProcessor.from_pretrained(path)
        self.choose = _Choose()
        self.engine = Engine(
            self.model,
            self.processor.encode_inquiries,
            choose=self.choose,
            max_batch_size=max_batch_size,
            n_tokens=len(self.processor.tokenizer),
        )
        self.seed, self.started, self.global_steps = seed, 0, 0
        self.jobs: dict[EngineRow, _Job] = {}
        self.waiting: OrderedDict[EngineRow, tuple[str, ...]] = OrderedDict()
        """Rows between two turns, and what images they hold."""
        self._task: asyncio.Task | None = None

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: Sequence[Inquiry] | None = None,
        video_data: Any = None,
        audio_data: Any = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> TokenOutput:
        """Sample one turn.

        Args:
            prompt_ids: the whole stream so far, one placeholder per image token.
            sampling_params: ``temperature``, ``top_p``, ``top_k``, ``max_tokens``, ``stop_token_ids``, ``logit_bias``
                (-100 bans a token).
            request_id: not needed: a conversation is found by its tokens.
            image_data: all inquiries so far, as an episode has them.

        Raises:
            RolloutError: images without an inquiry, videos, sound or processor settings came along.
        """
        if video_data or audio_data or mm_processor_kwargs:
            raise RolloutError("the CPU rollout takes inquiries only; send frames as images of an episode")
        inquiries = list(image_data or [])
        if wrong := next((entry for entry in inquiries if not isinstance(entry, Inquiry)), None):
            raise RolloutError(
                f"the CPU rollout got {type(wrong).__name__} in the place of an inquiry (images and their query); use "
                "the agent loop vilavt_rl.verl.agent_loop.VilavtAgentLoop"
            )
        keys = tuple(_key(inquiry) for inquiry in inquiries)
        row, known = self._find(prompt_ids, keys)
        if row is None:
            row = self.engine.open(self.seed * 1_000_003 + self.started)
            self.started += 1
        self.choose.sampling[row] = _sampling(sampling_params)
        request = Request(
            new_token_ids=prompt_ids[len(row.tokens) :],
            all_token_ids=prompt_ids,
            new_inquiries=tuple(inquiries[known:]),
            inquiries=tuple(inquiries),
            max_new_tokens=int(sampling_params["max_tokens"]),
            stop_token_ids=tuple(sampling_params["stop_token_ids"]),
            banned_token_ids=tuple(
                int(token) for token, bias in (sampling_params.get("logit_bias") or {}).items() if bias <= -100
            ),
            turn=0,
        )
        job = _Job(asyncio.get_running_loop().create_future(), keys)
        self.jobs[row] = job
        self.engine.submit(row, request)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        finish = await job.done
        return TokenOutput(
            token_ids=job.ids,
            log_probs=job.logprobs if sampling_params.get("logprobs") else None,
            stop_reason="completed" if finish == "stop" else finish,
            extra_fields={"global_steps": self.global_steps},
        )

    def _find(self, prompt_ids: list[int], keys: tuple[str, ...]) -> tuple[EngineRow | None, int]:
        """The waiting row that this prompt continues, and how many of its groups are in it."""
        for row in reversed(self.waiting):
            held, length = self.waiting[row], len(row.tokens)
            if length < len(prompt_ids) and row.tokens == prompt_ids[:length] and held == keys[: len(held)]:
                del self.waiting[row]
                return row, len(held)
        return None, 0

    async def _run(self) -> None:
        """Advance all rows until none has work, letting new requests in between two steps."""
        while self.engine.busy:
            for sampled in self.engine.step():
                job = self.jobs[sampled.row]
                if sampled.error is not None:
                    self._settle(sampled.row).set_exception(sampled.error)
                    continue
                assert sampled.token_id is not None
                job.ids.append(sampled.token_id)
                job.logprobs.append(self.choose.logprobs.pop(sampled.row))
                if sampled.finish is not None:
                    self.waiting[sampled.row] = job.images
                    self._settle(sampled.row).set_result(sampled.finish)
            while len(self.waiting) > MAX_WAITING_ROWS:
                self.engine.close(self.waiting.popitem(last=False)[0])
            await asyncio.sleep(0)

    def _settle(self, row: EngineRow) -> asyncio.Future:
        self.choose.sampling.pop(row, None)
        return self.jobs.pop(row).done

    async def update_weights(self, tensors: Mapping[str, torch.Tensor], global_steps: int | None) -> None:
        """Take new weights, under published or module names.

        Raises:
            RolloutError: a tensor is missing or unknown; names them.
        """
        self._forget()
        renamed = {module_name(name): tensor for name, tensor in tensors.items()}
        found = self.model.load_state_dict(renamed, strict=False)
        if found.missing_keys or found.unexpected_keys:
            raise RolloutError(
                f"weight update: {len(found.missing_keys)} tensors missing {found.missing_keys[:3]}, "
                f"{len(found.unexpected_keys)} unknown {found.unexpected_keys[:3]}; trainer and rollout must load the "
                "same checkpoint"
            )
        self.global_steps = self.global_steps if global_steps is None else global_steps

    def _forget(self) -> None:
        """Drop all keys and values."""
        while self.waiting:
            self.engine.close(self.waiting.popitem()[0])

    async def set_global_steps(self, global_steps: int) -> None:
        """Version of the weights, reported with every output."""
        self.global_steps = global_steps

    async def work(self) -> dict[str, float]:
        """What the rows that wait have cost, see `vilavt_core.results.Work`: both ratios are 1.00."""
        rows = list(self.waiting)
        total = sum((row.work for row in rows[1:]), rows[0].work) if rows else None
        return {} if total is None else {"patches_ratio": total.patches_ratio, "tokens_ratio": total.tokens_ratio}

    async def sleep(self) -> None:
        """verl is about to train: free what the next weights make worthless."""
        self._forget()

    async def clear_kv_cache(self) -> None:
        """Free keys and values."""
        self._forget()

    async def release_kv_cache(self) -> None:
        """Free keys and values."""
        self._forget()

    async def wake_up(self) -> None:
        """Nothing was put away."""

    async def resume_kv_cache(self) -> None:
        """Nothing was put away."""

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Only asked by asynchronous trainers, which this mode does not serve; running turns are finished."""

    async def resume_generation(self) -> None:
        """Nothing was stopped."""


class VilavtReplica(RolloutReplica):
    """One server per training process, on its node."""

    async def launch_servers(self) -> None:
        """Start the server."""
        node = await self.workers[0].__ray_call__.remote(lambda worker: ray.get_runtime_context().get_node_id())
        server = (
            ray.remote(VilavtServer)
            .options(
                name=_server_name(self.replica_rank),
                num_cpus=0,
                max_concurrency=self.max_concurrency,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(self.model_config.path, self.config.max_num_seqs, self.config.seed + self.replica_rank)
        )
        await server.set_global_steps.remote(0)  # it has loaded
        self.servers, self._server_handle = [server], server
        self._server_address = f"{ROLLOUT}:{self.replica_rank}"


class VilavtRollout(BaseRollout):
    """The training process's end: it sends weights to its server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        self.rank = int(os.environ["RANK"]) if replica_rank < 0 else replica_rank

    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Send all weights.

        Raises:
            RolloutError: a wire format of asynchronous trainers.
        """
        if wire_format != "named_tensors":
            raise RolloutError(f"the CPU rollout takes whole weights, not {wire_format!r}")
        tensors = {name: tensor.detach().float().cpu() for name, tensor in weights}
        server = ray.get_actor(_server_name(self.rank))
        await server.update_weights.remote(tensors, global_steps)

    async def resume(self, tags: list[str]) -> None:
        """Nothing was put away."""

    async def release(self) -> None:
        """Nothing to put away."""


def _server_name(rank: int) -> str:
    return f"{ROLLOUT}_server_{rank}"


def _key(inquiry: Inquiry) -> str:
    digest = hashlib.blake2b(repr((inquiry.query_prefix, inquiry.query)).encode(), digest_size=16)
    for image in inquiry.images:
        digest.update(str(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def _sampling(params: Mapping[str, Any]) -> Sampling:
    top_k = int(params.get("top_k") or 0)
    return Sampling(
        temperature=float(params.get("temperature", 1.0)),
        top_p=float(params.get("top_p", 1.0)),
        top_k=max(0, top_k),  # verl's -1 is off
        repetition_penalty=float(params.get("repetition_penalty") or 1.0),
    )
