"""The model a trainer trains: ViLaVT that cannot say a vision placeholder.

Rollout engines never sample these tokens, so their probability is 0 there and everything else is renormalised. A
trainer that took its softmax over all tokens would compute other log-probabilities for the same text.
"""

from __future__ import annotations

from typing import Any

import torch

from vilavt_hf import VilavtForConditionalGeneration, compat
from vilavt_hf.modeling_vilavt import FLAT_KEYS

NEVER = -1e4
"""Logit of a placeholder: probability 0 in any precision, and finite, because entropies multiply it by 0."""

compat.register_key_names("VilavtPolicy", FLAT_KEYS)


class VilavtPolicy(VilavtForConditionalGeneration):
    """`VilavtForConditionalGeneration` whose logits exclude ``<|vision_start|>``, ``<|vision_end|>``,
    ``<|image_pad|>`` and ``<|video_pad|>``; saves and loads the same tensors."""

    def forward(self, *args: Any, images_seqlens: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The parent's, masked. `images_seqlens` is what verl counts its work with."""
        output = super().forward(*args, **kwargs)
        config: Any = self.config
        banned = [
            config.vision_start_token_id,
            config.vision_end_token_id,
            config.image_token_id,
            config.video_token_id,
        ]
        # In place: a copy of the logits would be the largest tensor of the step.
        output.logits.index_fill_(-1, torch.tensor(banned, device=output.logits.device), NEVER)
        return output

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """The parent's. It leaves the class's name in the configuration, which verl reads when it saves again; the
        name that hosts know stays.
        """
        names = self.config.architectures
        super().save_pretrained(*args, **kwargs)
        self.config.architectures = names
