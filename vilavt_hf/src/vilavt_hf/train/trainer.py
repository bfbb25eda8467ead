"""HF Trainer for ViLaVT: our collator's batches, auxiliary losses, a rate per part of the model."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from .losses import AuxiliaryLosses, weighted_loss

logger = logging.getLogger(__name__)

PARTS = ("model.visual", "model.text_encoder", "model.text_proj", "model.language_model", "lm_head")


class VilavtTrainer(Trainer):
    """Trainer whose batches come from `VilavtCollator`.

    Args:
        auxiliary: training-only losses, or None. Their heads are trained along and never saved by `save_model`.
        rates: factors on the learning rate by parameter-name prefix (see `PARTS`).
        decay_from: fraction of the steps after which the rate falls linearly to `final_rate` of its peak.
        final_rate: see there.
        in_order: visit the data set in order (generated data with a curriculum) instead of shuffled.
        kwargs: the parent's.
    """

    def __init__(
        self,
        *args: Any,
        auxiliary: AuxiliaryLosses | None = None,
        rates: Mapping[str, float] | None = None,
        decay_from: float = 0.6,
        final_rate: float = 0.03,
        in_order: bool = False,
        **kwargs: Any,
    ):
        self.auxiliary, self.rates = auxiliary, dict(rates or {})
        self.decay_from, self.final_rate, self.in_order = decay_from, final_rate, in_order
        self.optimizer: Any
        self.lr_scheduler: Any
        self._figures: dict[str, list[float]] = defaultdict(list)
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = (
            False  # our loss is a mean per micro-batch: let the parent average over accumulation
        )

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """`losses.weighted_loss`; its figures go to the log."""
        loss, figures = weighted_loss(self.accelerator.unwrap_model(model), inputs, self.auxiliary)
        for name, value in figures.items():
            self._figures[name].append(value)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the loss figures since the last log."""
        if "loss" in logs:
            logs |= {name: round(sum(v) / len(v), 4) for name, v in self._figures.items() if v}
            self._figures.clear()
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """AdamW with one group per rate; biases and norms without decay."""
        if self.optimizer is not None:
            return self.optimizer
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        if self.auxiliary is not None:
            named += [(f"auxiliary.{n}", p) for n, p in self.auxiliary.named_parameters()]
        groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = defaultdict(list)
        for name, parameter in named:
            rate = next((f for prefix, f in self.rates.items() if name.startswith(prefix)), 1.0)
            if rate > 0:
                groups[rate, parameter.dim() > 1].append(parameter)
            else:
                parameter.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": self.args.learning_rate * rate,
                    "weight_decay": self.args.weight_decay * decays,
                }
                for (rate, decays), parameters in groups.items()
            ],
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            fused=True,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Linear warm-up, constant, then linear decay."""
        warmup = self.args.get_warmup_steps(num_training_steps)
        start = self.decay_from * num_training_steps

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / max(1, warmup))
            if step < start:
                return rise
            left = (num_training_steps - step) / max(1.0, num_training_steps - start)
            return rise * (self.final_rate + (1 - self.final_rate) * left)

        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.in_order:
            return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)
        return super()._get_train_sampler(train_dataset)
