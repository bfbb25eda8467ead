"""The model a trainer trains: ViLaVT that cannot say a vision placeholder, nor an id that stands for no token.

Rollout engines never sample these, so their probability is 0 there and everything else is renormalised. A trainer that
took its softmax over all ids would compute other log-probabilities for the same text.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import torch
from transformers import AutoTokenizer

from vilavt_core.architecture import MODULE_NAMES
from vilavt_hf import VilavtForConditionalGeneration, compat

logger = logging.getLogger(__name__)

NEVER = -1e4
"""Logit of what is never sampled: probability 0 in any precision, and finite, because entropies multiply it by 0."""

compat.register_key_names("VilavtPolicy", MODULE_NAMES)


class VilavtPolicy(VilavtForConditionalGeneration):
    """`VilavtForConditionalGeneration` whose logits exclude ``<|vision_start|>``, ``<|vision_end|>``,
    ``<|image_pad|>``, ``<|video_pad|>`` and the ids from the tokenizer's length on (a Qwen2.5-VL has 399 of them, which
    verl's rollouts exclude too); saves and loads the same tensors.
    """

    @cached_property
    def n_tokens(self) -> int | None:
        """Length of the checkpoint's tokenizer; None, with a warning, if the model comes from no folder that has one:
        then only the placeholders are excluded."""
        name = self.config.name_or_path
        try:
            return len(AutoTokenizer.from_pretrained(name, trust_remote_code=False)) if name else None
        except (OSError, ValueError) as error:
            logger.warning("%s: no tokenizer (%s); ids without a token stay in the softmax", name, error)
            return None

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
        if self.n_tokens is not None:
            output.logits[..., self.n_tokens :] = NEVER
        return output

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """The parent's. It leaves the class's name in the configuration, which verl reads when it saves again; the
        name that hosts know stays.
        """
        names = self.config.architectures
        super().save_pretrained(*args, **kwargs)
        self.config.architectures = names
