"""The model in training: one forward pass from a batch to summed losses."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vilavt_core.architecture import MODULE_NAMES, Part, part_of
from vilavt_core.data.example import IGNORE

from .. import compat
from ..configuration_vilavt import VilavtConfig
from ..modeling_vilavt import VilavtForConditionalGeneration
from .collator import BOUNDARIES
from .losses import AuxiliaryLosses, BlockOutputs

compat.register_key_names("VilavtForTraining", MODULE_NAMES)

LOSS_CHUNK = 4096
"""Labelled tokens whose logits are held in fp32 at a time."""


class VilavtForTraining(VilavtForConditionalGeneration):
    """`VilavtForConditionalGeneration` that computes its own loss while it trains; in eval mode it is the parent.

    Everything happens inside `forward`, because sharded training (FSDP, ZeRO) gathers parameters around it. Saved
    checkpoints are the parent's: training-only heads stay out.
    """

    def __init__(self, config: VilavtConfig):
        super().__init__(config)
        self.auxiliary: AuxiliaryLosses | None = None
        """Training-only heads on image features; assign a module to train it along."""

    def forward(self, input_ids: torch.Tensor | None = None, **batch: Any) -> Any:  # type: ignore[override]
        """Losses of a batch of `VilavtCollator`.

        Logits are computed only where there are labels.

        Returns:
            ``loss``: cross-entropy times weight, summed over the labelled tokens; ``auxiliary``: its mean losses,
            summed; ``figures``: names to log -> detached tensors, ``tokens_right`` as a sum of weights.
        """
        if not self.training:
            return super().forward(input_ids=input_ids, **batch)
        base, aux = self.model, batch.get("aux") if self.auxiliary is not None else None
        device = self.lm_head.weight.device
        loss, auxiliary = torch.zeros((), device=device), torch.zeros((), device=device)
        figures: dict[str, torch.Tensor] = {}
        features = None
        if batch.get("pixel_values") is not None:
            features, auxiliary, figures = self._encode(batch, aux)
        if input_ids is None:
            return {"loss": loss, "auxiliary": auxiliary, "figures": figures}
        embeds = base.get_input_embeddings()(input_ids)
        if features is not None:
            placeholders = input_ids == self.config.image_token_id
            shown = int(placeholders.sum())
            embeds = embeds.masked_scatter(placeholders[..., None].expand_as(embeds), features[:shown].to(embeds.dtype))
            # images without a placeholder take part in every step, and count nothing
            loss = loss + 0.0 * features[shown:].float().sum()
        wanted = aux["attention"] if aux else []
        output = base.language_model(
            inputs_embeds=embeds,
            position_ids=batch["position_ids"],
            attention_mask=None,  # right padding or packing: causal attention needs no mask
            use_cache=False,
            **({"output_attentions": True} if wanted else {}),
            **{name: batch[name] for name in BOUNDARIES if name in batch},
        )
        known = batch["labels"][:, 1:] != IGNORE
        logits = self.lm_head(output.last_hidden_state[:, :-1][known])
        target = batch["labels"][:, 1:][known]
        weights = batch["label_weights"][:, 1:][known].float() if "label_weights" in batch else None
        loss = loss + _summed_cross_entropy(logits, target, weights)
        right = (logits.detach().argmax(-1) == target).float()
        figures["tokens_right"] = (right if weights is None else right * weights).sum()
        if wanted and self.auxiliary is not None:
            more, mass = self.auxiliary.attention_loss(wanted, output.attentions)
            auxiliary, figures = auxiliary + more, figures | mass
        return {"loss": loss, "auxiliary": auxiliary, "figures": figures}

    def _encode(
        self, batch: dict[str, Any], aux: dict[str, Any] | None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Features of all images (tokens, hidden), and what the heads make of them."""
        visual, grid = self.model.visual, batch["image_grid_thw"]
        with BlockOutputs(visual, self.auxiliary.blocks if self.auxiliary is not None and aux else []) as blocks:
            encoded = self.model.get_image_features(
                batch["pixel_values"],
                grid,
                query_ids=batch["query_ids"],
                query_attention_mask=batch["query_attention_mask"],
                images_per_query=batch["images_per_query"],
            )
        features = torch.cat(tuple(compat.pooled(encoded)))
        if self.auxiliary is None or not aux or not aux["tokens"]:
            return features, torch.zeros((), device=features.device), {}
        sizes = (grid.prod(-1) // visual.spatial_merge_unit).tolist()
        loss, figures = self.auxiliary.features_loss(aux["tokens"], features, sizes, blocks)
        return features, loss, {**figures, "heads": loss.detach()}

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The parent's checkpoint, without the training-only heads."""
        compat.save_under(self, MODULE_NAMES)
        state = self.state_dict() if state_dict is None else state_dict
        state = {name: value for name, value in state.items() if not name.startswith("auxiliary.")}
        super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)


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
