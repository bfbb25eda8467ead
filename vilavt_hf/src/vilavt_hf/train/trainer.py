"""HF Trainer for ViLaVT: our batches and losses, one global order, a rate per part, checkpoints that are whole."""

import itertools
import logging
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from vilavt_core.architecture import PARTS, Part, part_of
from vilavt_core.checkpoint import write_build_info
from vilavt_core.checkpoint.writing import replace_folder
from vilavt_core.data.example import Dropped
from vilavt_core.data.order import Order, RankShare
from vilavt_core.errors import TrainingError
from vilavt_core.sft_config import LossMean

from .collator import BatchCounts, label_weight

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint-"
"""Start of the names of checkpoint folders; the number of finished steps follows."""


@dataclass(frozen=True)
class StableDecay:
    """A learning rate that rises linearly, stays, and falls linearly."""

    decay_from: float = 0.6
    """Fraction of the steps after which it falls."""
    final_rate: float = 0.03
    """What it falls to, as a fraction of its peak."""

    def factor(self, step: int, warmup: int, steps: int) -> float:
        """Share of the peak at a step."""
        rise = min(1.0, (step + 1) / max(1, warmup))
        start = self.decay_from * steps
        if step < start:
            return rise
        left = (steps - step) / max(1.0, steps - start)
        return rise * (self.final_rate + (1 - self.final_rate) * left)


class VilavtTrainer(Trainer):
    """Trainer whose batches come from `VilavtCollator` and whose model is a `VilavtForTraining`.

    Args:
        order: which samples make which micro-batch.
        learning_rates: by part, where one differs from ``args.learning_rate``; 0 freezes the part.
        stable_decay: a schedule in place of ``args.lr_scheduler_type``.
        loss_mean: ``tokens``: the mean over the labelled tokens of all micro-batches and ranks of a step;
            ``micro_batch``: the mean of the micro-batches' means, as the published trainer takes it.
        decay_norms: whether weight decay applies to norms, as the published trainer has it.
        validate: measures the model; called on every rank every ``args.eval_steps``, and with ``args.eval_on_start``
            before the first step.
        record: for each checkpoint's ``provenance.json``.
        kwargs: the parent's.
    """

    def __init__(
        self,
        *args: Any,
        order: Order,
        learning_rates: Mapping[Part, float] | None = None,
        stable_decay: StableDecay | None = None,
        loss_mean: LossMean = "tokens",
        decay_norms: bool = False,
        validate: Callable[["VilavtTrainer", Any], Mapping[str, float]] | None = None,
        record: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.order, self.learning_rates = order, dict(learning_rates or {})
        if unknown := sorted(set(self.learning_rates) - set(PARTS)):
            raise TrainingError(f"learning rates of {unknown}: parts are {', '.join(PARTS)}")
        self.stable_decay, self.loss_mean, self.decay_norms = stable_decay, loss_mean, decay_norms
        self.validate, self.record = validate, dict(record or {})
        self.optimizer: Any
        self.control: Any
        self.lr_scheduler: Any
        self.on_dropped: Callable[[Dropped], None] | None = None
        self._figures: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._since_log: Counter[str] = Counter()
        self._log_time = time.perf_counter()
        self._staging: Path | None = None
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            logger.warning(
                "one process trains on one of %d GPUs; to use all, start it with torchrun --nproc-per-node %d -m "
                "vilavt_hf.train CONFIG.yaml", self.args.n_gpu, self.args.n_gpu,
            )  # fmt: skip
            self.args._n_gpu = 1  # nn.DataParallel would cut packs and images' patches along their first axis
        # our loss is already scaled for the whole step
        self.model_accepts_loss_kwargs = True

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self) -> DataLoader:
        """This rank's micro-batches; not sharded once more by accelerate."""
        args = self.args
        share = RankShare(self.order, args.process_index, args.world_size, self._current_epoch)
        self._micro_batches = len(share)
        self._log_time = time.perf_counter()
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=share,  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
        )

    def _current_epoch(self) -> int:
        per_epoch = -(-self._micro_batches // self.args.gradient_accumulation_steps)
        return self.state.global_step // per_epoch

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """The micro-batches of one step, and the weight of all labelled tokens of all ranks in it."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        for batch in batches:
            self._count(batch.pop("counts", BatchCounts()))
        # 4.57 asks once more at the end of an epoch that was resumed, and gets nothing
        total = sum((label_weight(batch) for batch in batches), start=torch.zeros(())).to(device)
        return batches, self.accelerator.reduce(total, "sum")  # type: ignore[return-value]

    def _count(self, counts: BatchCounts) -> None:
        self._since_log.update(samples=counts.samples, tokens=counts.tokens, slots=counts.slots, images=counts.images)
        for dropped in counts.dropped:
            self._since_log["dropped"] += 1
            logger.warning("dropped: %s", dropped.reason)
            if self.on_dropped is not None:
                self.on_dropped(dropped)

    # ------------------------------------------------------------------ loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """What this micro-batch adds to the step's loss, times the ranks: gradients are averaged over them."""
        steps = self.current_gradient_accumulation_steps
        outputs = model(**inputs)
        own = label_weight(inputs)
        if self.loss_mean == "tokens" and num_items_in_batch is not None:
            loss = outputs["loss"] * self.args.world_size / num_items_in_batch.clamp(min=1e-6)
        else:
            loss = outputs["loss"] / own.clamp(min=1e-6) / steps
        figures = outputs["figures"]
        if "tokens_right" in figures:
            figures["tokens_right"] = figures["tokens_right"] / own.clamp(min=1e-6)
        for name, value in figures.items():
            self._figures[name].append(value)
        return (loss, outputs) if return_outputs else loss

    # ------------------------------------------------------------------ log

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add throughput over all ranks, and this rank's means of the loss figures, since the last log."""
        if "loss" in logs:
            names = ("samples", "tokens", "slots", "images", "dropped")
            mine = torch.tensor([self._since_log[n] for n in names], dtype=torch.float64, device=self.args.device)
            everyone: Any = self.accelerator.reduce(mine, "sum")
            counts = dict(zip(names, everyone.tolist(), strict=True))
            seconds = max(1e-9, time.perf_counter() - self._log_time)
            logs |= {name: round(torch.stack(v).float().mean().item(), 4) for name, v in self._figures.items()}
            logs |= {
                "tokens_per_second": round(counts["tokens"] / seconds, 1),
                "images_per_second": round(counts["images"] / seconds, 2),
                "padding_share": round(1 - counts["tokens"] / counts["slots"], 4) if counts["slots"] else 0.0,
                "samples": counts["samples"],
                "dropped": counts["dropped"],
            }
            self._figures.clear()
            self._since_log.clear()
            self._log_time = time.perf_counter()
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------ validation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What `validate` finds, each figure under ``eval_`` and its name, as trackers expect it."""
        if self.validate is None:
            return {}
        begin = time.perf_counter()
        model = self.model_wrapped
        model.eval()
        try:
            found = self.validate(self, model)
        finally:
            model.train()
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._log_time += time.perf_counter() - begin
        return metrics

    # ------------------------------------------------------------------ optimiser

    def learning_rate_of(self, parameter: str) -> float:
        """The rate of a parameter's part."""
        return self.learning_rates.get(part_of(parameter), self.args.learning_rate)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """AdamW with one group per rate; biases, and by default norms, without decay."""
        if self.optimizer is not None:
            return self.optimizer
        groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = defaultdict(list)
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            rate = self.learning_rate_of(name)
            if rate > 0:
                decays = parameter.dim() > 1 or (self.decay_norms and not name.endswith("bias"))
                groups[rate, decays].append(parameter)
            else:
                parameter.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "lr": rate, "weight_decay": self.args.weight_decay * decays}
                for (rate, decays), parameters in groups.items()
            ],
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            fused=True,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The parent's, unless `stable_decay` was given."""
        if self.stable_decay is None:
            return super().create_scheduler(num_training_steps, optimizer)
        factor = partial(
            self.stable_decay.factor, warmup=self.args.get_warmup_steps(num_training_steps), steps=num_training_steps
        )
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    # ------------------------------------------------------------------ sharding

    def create_accelerator_and_postprocess(self) -> None:
        """The parent's; FSDP2 in 16 bits reduces gradients in fp32."""
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.fsdp_version == 2 and self.accelerator.mixed_precision == "bf16":
            from torch.distributed.fsdp import MixedPrecisionPolicy

            plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    # ------------------------------------------------------------------ checkpoints

    def whole_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights, gathered from all ranks, on rank 0; call it on every rank."""
        return self.accelerator.get_state_dict(self.model_wrapped)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's; under FSDP also with sharded resume states: the model itself is always saved whole."""
        if self.is_fsdp_enabled:
            state = self.whole_state_dict()
            if self.args.should_save:  # 4.57 saves wherever it is called, and only rank 0 has the weights
                self._save(output_dir, state_dict=state)
            return
        super().save_model(output_dir, _internal_call)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The parent's, in a folder of its own that gets its name when everything is on disk.

        A process that is killed meanwhile leaves the previous checkpoint as it was, and nothing that looks like a
        newer one.
        """
        begin = time.perf_counter()
        output = Path(self.args.output_dir)
        name = f"{CHECKPOINT}{self.state.global_step}"
        staging = output / "unfinished.partial"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = staging / name
            write_build_info(folder, {**self.record, "step": self.state.global_step, "epoch": self.state.epoch})
            replace_folder(folder, output / name)
            shutil.rmtree(staging, ignore_errors=True)
            if self.args.save_total_limit:
                for old in checkpoints(output)[: -self.args.save_total_limit]:
                    shutil.rmtree(old.rename(old.with_suffix(".partial")))  # never half a checkpoint under its name
        self.accelerator.wait_for_everyone()
        self._log_time += time.perf_counter() - begin

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The parent's for sharded models and adapters; it would not know the published tensor names of ours."""
        target = self.model if model is None else model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(saved.state_dict())


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in output.glob(f"{CHECKPOINT}*") if p.name.removeprefix(CHECKPOINT).isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(CHECKPOINT)))
