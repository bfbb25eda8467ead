"""One tokenised conversation: what rendering and generated lessons make, and what the collator batches."""

from collections.abc import Sequence
from dataclasses import dataclass

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
class Example:
    """One tokenised conversation.

    ``labels`` equal ``input_ids`` where the model is trained and -100 elsewhere (they are shifted by the loss, not
    here); ``weights`` scale single labels.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    weights: Sequence[float] = ()
    groups: tuple[ImageGroup, ...] = ()
    """In prompt order: their images fill the placeholders."""


@dataclass(frozen=True)
class Dropped:
    """Stands where a sample cannot be used: the collator leaves it out, the trainer counts and reports it."""

    sample: str
    kind: str
    reason: str
