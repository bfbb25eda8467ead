"""Tokenised conversations to padded batches, with joint image groups and training-only targets.

Shapes: B samples, L tokens, N patches, n images, Q groups, T query columns, K targets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

IGNORE = -100


@dataclass(frozen=True)
class ImageGroup:
    """Images encoded together under one query ("" for none); sides are multiples of 28 pixels."""

    images: tuple[Image.Image, ...]
    query: str = ""


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
    """What the head's kind expects for one image, see `losses.AuxiliaryHead`."""


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


def mrope_positions(input_ids: Sequence[int], grids: Sequence[tuple[int, int]], image_token_id: int) -> np.ndarray:
    """Positions of Qwen2.5-VL's multimodal RoPE.

    Args:
        input_ids: (L,) one conversation without padding.
        grids: height and width in merged tokens of every image, in prompt order.
        image_token_id: the placeholder.

    Returns:
        (3, L) int64: time, row and column.
    """
    out = np.empty((3, len(input_ids)), np.int64)
    position, i, grid = 0, 0, iter(grids)
    while i < len(input_ids):
        if input_ids[i] != image_token_id:
            out[:, i] = position
            position, i = position + 1, i + 1
            continue
        height, width = next(grid)
        n = height * width
        out[0, i : i + n] = position
        out[1, i : i + n] = position + np.repeat(np.arange(height), width)
        out[2, i : i + n] = position + np.tile(np.arange(width), height)
        position, i = position + max(height, width), i + n
    return out


class VilavtCollator:
    """Batches of `Example`.

    Args:
        encode_inquiries: image groups to tensors, usually `VilavtProcessor.encode_inquiries`.
        pad_token_id: fills ``input_ids``.
        image_token_id: the image placeholder.
        merge_size: patches per side of a merged token.
        pad_to_multiple_of: of the token length; fixed shapes are faster on CPUs.
    """

    def __init__(
        self,
        encode_inquiries: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
        *,
        pad_token_id: int,
        image_token_id: int,
        merge_size: int = 2,
        pad_to_multiple_of: int = 1,
    ):
        self.encode_inquiries = encode_inquiries
        self.pad_token_id, self.image_token_id = pad_token_id, image_token_id
        self.merge_size, self.pad_to_multiple_of = merge_size, pad_to_multiple_of

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Pad on the right and concatenate the images.

        Returns:
            ``input_ids``, ``attention_mask``, ``labels`` (B, L), ``position_ids`` (3, B, L), and with images
            ``pixel_values``, ``image_grid_thw``, ``query_ids``, ``query_attention_mask``, ``images_per_query``.
            Examples without tokens have no row. ``label_weights`` (B, L) if an example has weights; ``aux`` if any has
            targets or extra groups: the image groups of ``extra_groups`` then follow all others.

        Raises:
            ValueError: an example's placeholders and images disagree; names the example.
        """
        rows = [e for e in examples if len(e.input_ids)]
        if any(e.groups for e in examples if not len(e.input_ids)):
            raise ValueError("an example without tokens can only have extra_groups")
        groups = [g for e in rows for g in e.groups] + [g for e in examples for g in e.extra_groups]
        batch: dict[str, Any] = {}
        if groups:
            batch |= self.encode_inquiries(groups)
        grids = (batch["image_grid_thw"][:, 1:] // self.merge_size).tolist() if groups else []
        batch |= self._text(rows, grids)
        if any(e.attention or e.tokens or e.extra_groups for e in examples):
            batch["aux"] = self._targets(examples, rows)
        return batch

    def _text(self, rows: Sequence[Example], grids: list[list[int]]) -> dict[str, torch.Tensor]:
        if not rows:
            return {}
        step = self.pad_to_multiple_of
        length = -(-max(len(e.input_ids) for e in rows) // step) * step
        shape = (len(rows), length)
        ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORE)
        mask, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        positions = torch.ones((3, *shape), dtype=torch.long)
        first = 0
        for i, example in enumerate(rows):
            n = len(example.input_ids)
            count = sum(len(g.images) for g in example.groups)
            mine = [(h, w) for h, w in grids[first : first + count]]
            first += count
            wanted, found = sum(h * w for h, w in mine), list(example.input_ids).count(self.image_token_id)
            if wanted != found:
                raise ValueError(
                    f"example {i} of the batch: {found} image placeholders, but its {count} images make {wanted} "
                    "tokens; "
                    "put height / 28 x width / 28 placeholders per image into the stream"
                )
            if len(example.labels) != n or (example.weights and len(example.weights) != n):
                raise ValueError(
                    f"example {i} of the batch: {n} tokens, {len(example.labels)} labels, {len(example.weights)} "
                    "weights; all three need one entry per token"
                )
            ids[i, :n] = torch.tensor(example.input_ids)
            labels[i, :n] = torch.tensor(example.labels)
            mask[i, :n] = 1
            weights[i, :n] = torch.tensor(example.weights) if example.weights else 1.0
            positions[:, i, :n] = torch.from_numpy(mrope_positions(example.input_ids, mine, self.image_token_id))
        out = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}
        if any(len(e.weights) for e in rows):
            out["label_weights"] = weights
        return out

    @staticmethod
    def _targets(examples: Sequence[Example], rows: Sequence[Example]) -> dict[str, Any]:
        attention: dict[tuple[int, tuple[int, ...]], list[tuple[int, int, int]]] = {}
        for row, example in enumerate(rows):
            for t in example.attention:
                attention.setdefault((t.layer, t.heads), []).append((row, t.query, t.key))
        extra = sum(len(g.images) for e in rows for g in e.groups)
        images: dict[str, list[int]] = {}
        values: dict[str, list[np.ndarray]] = {}
        own = 0
        for example in examples:
            n_own = sum(len(g.images) for g in example.groups)
            for target in example.tokens:
                inside = target.image < n_own
                images.setdefault(target.head, []).append(
                    own + target.image if inside else extra + target.image - n_own
                )
                values.setdefault(target.head, []).append(target.values)
            own += n_own
            extra += sum(len(g.images) for g in example.extra_groups)
        return {
            "attention": [(layer, heads, torch.tensor(at)) for (layer, heads), at in attention.items()],
            "tokens": {
                head: (torch.tensor(images[head]), torch.from_numpy(np.concatenate(values[head]))) for head in images
            },
        }
