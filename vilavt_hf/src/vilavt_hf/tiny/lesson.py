"""One generated conversation of the tiny model, with what its training-only losses need to know."""

from dataclasses import dataclass

import numpy as np

from vilavt_core.data.example import Example, ImageGroup


@dataclass(frozen=True)
class AttentionTarget:
    """Where some heads should look."""

    layer: int
    """Index of the language model layer."""
    heads: tuple[int, ...]
    query: int
    """Position in the lesson's token stream."""
    key: int
    """Position whose share of the attention should be 1."""


@dataclass(frozen=True)
class TokenTarget:
    """What an auxiliary head should find in the features of one image."""

    head: str
    image: int
    """Index among the lesson's images, those of `Lesson.groups` first."""
    values: np.ndarray
    """What the head's kind expects for one image, see `vilavt_hf.tiny.heads.AuxiliaryHead`."""


@dataclass(frozen=True)
class Lesson(Example):
    """An `Example` with targets. A lesson without tokens trains the tower alone, through ``tokens``."""

    extra_groups: tuple[ImageGroup, ...] = ()
    """Encoded for the auxiliary heads only."""
    attention: tuple[AttentionTarget, ...] = ()
    tokens: tuple[TokenTarget, ...] = ()
    partners: tuple[tuple[int, int], ...] = ()
    """Images of one group, of one size, whose patches should look at each other's in the joint blocks; indices as in
    `TokenTarget`."""
