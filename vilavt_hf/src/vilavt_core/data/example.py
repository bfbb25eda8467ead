"""One tokenised conversation: what rendering and generated lessons make, and what the collator batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

IGNORE = -100
"""Label of a token that is not trained."""


@dataclass(frozen=True)
class ImageGroup:
    """Images encoded together under one query ("" for none); sides are multiples of 28 pixels."""

    images: tuple[Image.Image, ...]
    query: str = ""
    query_prefix: str | None = None
    """Put before a query that is not blank; None: the processor's."""


@dataclass(frozen=True)
class AttentionTarget:
    """Where some heads should look: training only."""

    layer: int
    """Index of the language model layer."""
    heads: tuple[int, ...]
    query: int
    """Position in the example's token stream."""
    key: int
    """Position whose share of the attention should be 1."""


@dataclass(frozen=True)
class TokenTarget:
    """What an auxiliary head should find in the features of one image: training only."""

    head: str
    image: int
    """Index among the example's images, those of `Example.groups` first."""
    values: np.ndarray
    """What the head's kind expects for one image, see `vilavt_hf.train.losses.AuxiliaryHead`."""


@dataclass(frozen=True)
class Example:
    """One tokenised conversation.

    ``labels`` equal ``input_ids`` where the model is trained and -100 elsewhere (they are shifted by the loss, not
    here); ``weights`` scale single labels. An example without tokens trains the tower alone, through ``tokens``.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    weights: Sequence[float] = ()
    groups: tuple[ImageGroup, ...] = ()
    """In prompt order: their images fill the placeholders."""
    extra_groups: tuple[ImageGroup, ...] = ()
    """Encoded for the auxiliary heads only."""
    attention: tuple[AttentionTarget, ...] = ()
    tokens: tuple[TokenTarget, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """Stands where a sample cannot be used: the collator leaves it out, the trainer counts and reports it."""

    sample: str
    kind: str
    reason: str
