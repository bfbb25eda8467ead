"""EasyR1's worker and rollout, by subclass. The classes of EasyR1 are arguments, so that this file needs no checkout.

A plain subclass of its worker cannot be placed: EasyR1 takes the first base of the class it is given as the base of a
colocated worker and calls its constructor without arguments. Hence an empty class of its own stands first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vilavt_core.conversation import SpecialTokens
from vilavt_hf import VilavtConfig

from ..data import Row
from ..rollout import finished_episode, start_row
from .batch import engine_prompt, model_inputs, pack, run_drivers, traces
from .block import Settings
from .engine import settable


def make_rollout(base: type, data_proto: Any, tensor_dict: Any) -> type:
    """EasyR1's vLLM rollout over episodes.

    Args:
        base: its ``vLLMRollout``.
        data_proto: its ``DataProto``.
        tensor_dict: ``tensordict.TensorDict``.
    """

    class VilavtRollout(base):  # type: ignore[misc, valid-type]
        """Whole conversations instead of single responses."""

        def __init__(self, model_path: str, config: Any, tokenizer: Any, processor: Any, **kwargs: Any) -> None:
            super().__init__(model_path, config, tokenizer, processor, **kwargs)
            self.vilavt, self.processor, self.batches = Settings.of_environment(), processor, 0
            self.episodes = self.vilavt.episodes(model_path, processor)
            self.never: Sequence[int] = ()
            if self.vilavt.queries == "tensors":  # vilavt-vllm's model leaves these ids out by itself
                vocabulary = VilavtConfig.from_pretrained(model_path).get_text_config().vocab_size
                self.never = range(len(processor.tokenizer), vocabulary)

        def generate_sequences(self, prompts: Any) -> Any:
            """``rollout.n`` trajectories per row, those of a row next to each other."""
            config = self.config
            self.batches += 1
            with self.update_sampling_params(**settable(self.sampling_params, prompts.meta_info)):
                count, temperature = self.sampling_params.n, self.sampling_params.temperature
                rows = [
                    row
                    for entry in prompts.non_tensor_batch["multi_modal_data"]
                    for row in [Row.from_json(entry["row"])] * count
                ]
                started = [
                    start_row(row, self.episodes, max_prompt=config.prompt_length, max_response=config.response_length)
                    for row in rows
                ]
                run_drivers(
                    started,
                    lambda asked, params: self.inference_engine.generate(
                        prompts=asked, sampling_params=params, use_tqdm=False
                    ),
                    self.sampling_params,
                    lambda request: engine_prompt(request, self.vilavt.queries, self.processor),
                    never=self.never,
                    batch=self.batches,
                )
            episodes = [finished_episode(driver) for driver in started]
            tensors, objects = pack(
                episodes,
                prompt_length=config.prompt_length,
                response_length=config.response_length,
                pad_token_id=self.pad_token_id,
                image_token_id=SpecialTokens.of(self.episodes.tokenizer).image_pad,
            )
            if self.vilavt.trace_every:
                objects["rollout"] = traces(rows, episodes, temperature)
            return data_proto(
                batch=tensor_dict(tensors, batch_size=len(started)),
                non_tensor_batch=objects,
                meta_info=prompts.meta_info,
            )

    return VilavtRollout


def _never_prefetch(module: Any) -> None:
    """On one GPU, keep FSDP from preparing a frozen unit for a backward pass that it does not have.

    It is left without its parameters then, and the next state dict, for vLLM or a checkpoint, fails: what FSDP does at
    the end of a backward pass for such units it does only where they are sharded.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    unit: Any
    for unit in FullyShardedDataParallel.fsdp_modules(module):
        unit.backward_prefetch = None


def make_worker(
    pivot_base: type,
    base: type,
    workers_module: Any,
    patch_module: Any,
    rollout: type,
    translation: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> type:
    """EasyR1's FSDP worker for ViLaVT.

    Args:
        pivot_base: its ``Worker``.
        base: its ``FSDPWorker``.
        workers_module: the module of `base`: its name ``vLLMRollout`` is looked up when the rollout is built.
        patch_module: its ``monkey_patch`` module: the model types it accepts are listed there.
        rollout: see `make_rollout`.
        translation: entered while the rollout is built, see `vilavt_rl.easyr1.engine.translated`.
    """

    class Pivot(pivot_base):  # type: ignore[misc, valid-type]
        """First base, constructed without arguments; see the module's docstring."""

    class VilavtWorker(Pivot, base):  # type: ignore[misc, valid-type]
        """Actor, rollout and reference of one rank."""

        def __init__(self, config: Any, role: str) -> None:
            base.__init__(self, config, role)  # type: ignore[misc]

        def _build_model_optimizer(self, model_config: Any, fsdp_config: Any, **kwargs: Any) -> None:
            from transformers import AutoModelForImageTextToText

            from ..policy import VilavtPolicy

            AutoModelForImageTextToText.register(VilavtConfig, VilavtPolicy, exist_ok=True)
            if "vilavt" not in patch_module.SUPPORTED_MODEL_TYPE:
                patch_module.SUPPORTED_MODEL_TYPE += ("vilavt",)
            frozen = Settings.of_environment().frozen
            model_config.override_config = {**model_config.override_config, "frozen": list(frozen)}
            if frozen:  # FSDP flattens parameters with and without gradient together otherwise
                fsdp_config.use_orig_params = True
            super()._build_model_optimizer(model_config=model_config, fsdp_config=fsdp_config, **kwargs)
            if self.world_size == 1:
                _never_prefetch(self.fsdp_module)

        def _build_rollout(self) -> None:
            workers_module.vLLMRollout = rollout
            with translation():
                super()._build_rollout()

        def _process_multi_modal_inputs(self, data: Any) -> None:
            if "multi_modal_data" in data.non_tensor_batch:
                rows = data.non_tensor_batch["multi_modal_data"]
                data.non_tensor_batch["multi_modal_inputs"] = model_inputs(rows, self.processor)

    return VilavtWorker
