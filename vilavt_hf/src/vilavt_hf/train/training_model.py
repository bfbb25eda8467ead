"""The model in training: one forward pass from a batch to summed losses."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vilavt_core.architecture import MODULE_NAMES, Part, part_of
from vilavt_core.data.example import IGNORE

from .. import compat
from ..modeling_vilavt import VilavtForConditionalGeneration
from .collator import BOUNDARIES

compat.register_key_names("VilavtForTraining", MODULE_NAMES)

LOSS_CHUNK = 4096
"""Labelled tokens whose logits are held in fp32 at a time."""


class VilavtForTraining(VilavtForConditionalGeneration):
    """`VilavtForConditionalGeneration` that computes its own loss while it trains; in eval mode it is the parent.

    Everything happens inside `forward`, because sharded training (FSDP, ZeRO) gathers parameters around it. Saved
    checkpoints are the parent's.
    """

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor | None = None, summed_loss: bool = False, **batch: Any
    ) -> Any:
        """Loss of a batch of `VilavtCollator`.

        Args:
            input_ids: (B, L).
            summed_loss: compute it in eval mode, too.
            batch: the rest of what the collator makes.

        Returns:
            ``loss``: cross-entropy times weight, summed over the labelled tokens; ``figures``: names to log ->
            detached tensors, ``tokens_right`` as a sum of weights.
        """
        if not (self.training or summed_loss):
            return super().forward(input_ids=input_ids, **batch)
        assert input_ids is not None
        output, idle = self.language(input_ids, self.encode(batch), batch)
        loss, figures = self.text_loss(output.last_hidden_state, batch)
        return {"loss": loss + idle, "figures": figures}

    def encode(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """Features (tokens, hidden) of all images; None without images."""
        if batch.get("pixel_values") is None:
            return None
        encoded = self.model.get_image_features(
            batch["pixel_values"],
            batch["image_grid_thw"],
            query_ids=batch["query_ids"],
            query_attention_mask=batch["query_attention_mask"],
            images_per_query=batch["images_per_query"],
            return_dict=True,
        )
        return torch.cat(tuple(compat.pooled(encoded)))

    def language(
        self, input_ids: torch.Tensor, features: torch.Tensor | None, batch: dict[str, Any], **options: Any
    ) -> tuple[Any, torch.Tensor | float]:
        """The language model's output over tokens and image features.

        Returns:
            The output, and 0 times the features that no placeholder stands for: added to the loss, their images take
            part in every step, and count nothing.
        """
        embeds = self.model.get_input_embeddings()(input_ids)
        idle: torch.Tensor | float = 0.0
        if features is not None:
            placeholders = input_ids == self.config.image_token_id
            shown = int(placeholders.sum())
            embeds = embeds.masked_scatter(placeholders[..., None].expand_as(embeds), features[:shown].to(embeds.dtype))
            idle = 0.0 * features[shown:].float().sum()
        output = self.model.language_model(
            inputs_embeds=embeds,
            position_ids=batch["position_ids"],
            attention_mask=None,  # right padding or packing: causal attention needs no mask
            use_cache=False,
            **options,
            **{name: batch[name] for name in BOUNDARIES if name in batch},
        )
        return output, idle

    def text_loss(self, hidden: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and figures of `forward`, from the last hidden states (B, L, C); logits only where there are labels."""
        known = batch["labels"][:, 1:] != IGNORE
        logits = self.lm_head(hidden[:, :-1][known])
        target = batch["labels"][:, 1:][known]
        weights = batch["label_weights"][:, 1:][known].float() if "label_weights" in batch else None
        loss = _summed_cross_entropy(logits, target, weights)
        right = (logits.detach().argmax(-1) == target).float()
        return loss, {"tokens_right": (right if weights is None else right * weights).sum()}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """The parent's."""
        compat.save_under(self, MODULE_NAMES)
        super().save_pretrained(*args, **kwargs)


def _summed_cross_entropy(logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Sum over (K, vocab) logits in fp32, whatever their type; chunks are recomputed in the backward pass."""

    def chunk(part: torch.Tensor, wanted: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        losses = F.cross_entropy(part.float(), wanted, reduction="none")
        return (losses if factor is None else losses * factor).sum()

    if len(target) <= LOSS_CHUNK:
        return chunk(logits, target, weights)
    total = logits.new_zeros((), dtype=torch.float32)
    for at in range(0, len(target), LOSS_CHUNK):
        own = slice(at, at + LOSS_CHUNK)
        factor = None if weights is None else weights[own]
        total = total + checkpoint(chunk, logits[own], target[own], factor, use_reentrant=False)
    return total


def freeze(model: nn.Module, parts: Iterable[Part]) -> None:
    """Switch gradients off in these parts and on everywhere else."""
    frozen = set(parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)
