"""Tokenised conversations to batches, padded or packed, with joint image groups.

Shapes: B rows, L tokens, N patches, n images, Q groups, T query columns, S samples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from PIL import Image

from vilavt_core.data.example import IGNORE, Dropped, Example, ImageGroup

from ..positions import mrope_positions

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Keys of a packed batch that say where its samples begin, under the names that transformers gives them."""


@dataclass(frozen=True)
class BatchCounts:
    """What a micro-batch holds, for the log; ``batch["counts"]``."""

    samples: int = 0
    tokens: int = 0
    """Without padding."""
    slots: int = 0
    """With padding."""
    images: int = 0
    dropped: tuple[Dropped, ...] = ()


class VilavtCollator:
    """Batches of `Example`.

    Args:
        encode_inquiries: image groups to tensors, usually `VilavtProcessor.encode_inquiries`.
        pad_token_id: fills ``input_ids``.
        image_token_id: the image placeholder.
        merge_size: patches per side of a merged token.
        pad_to_multiple_of: of the token length; fixed shapes are faster on CPUs.
        packed: put all samples into one row, each in a segment of its own, instead of one row each.
        ask_always: where no group of a batch has a query, add one whose features count nothing. Then tower, query
            encoder and projections have a gradient in every step of every rank, which sharded training needs: ranks
            that skip a part would wait for one another, or reduce different gradients.
    """

    def __init__(
        self,
        encode_inquiries: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
        *,
        pad_token_id: int,
        image_token_id: int,
        merge_size: int = 2,
        pad_to_multiple_of: int = 1,
        packed: bool = False,
        ask_always: bool = True,
    ):
        self.encode_inquiries = encode_inquiries
        self.pad_token_id, self.image_token_id = pad_token_id, image_token_id
        self.merge_size, self.pad_to_multiple_of = merge_size, pad_to_multiple_of
        self.packed, self.ask_always = packed, ask_always
        self.idle = ImageGroup((Image.new("RGB", (28, 28)),), "nothing")

    def __call__(self, samples: Sequence[Example | Dropped]) -> dict[str, Any]:
        """Put tokens into rows and concatenate the images.

        Returns:
            ``input_ids``, ``labels`` (B, L), ``position_ids`` (3, B, L) which begin anew with every sample, and with
            images ``pixel_values``, ``image_grid_thw``, ``query_ids``, ``query_attention_mask``,
            ``images_per_query``; images that no placeholder stands for come last. Padded: ``attention_mask`` (B, L).
            Packed: `BOUNDARIES`, for the one row. ``label_weights`` (B, L) if an example has weights. ``counts``: a
            `BatchCounts`. A batch without any example has two tokens that nothing is learnt from.

        Raises:
            ValueError: an example's placeholders and images disagree; names the example.
        """
        examples = [s for s in samples if isinstance(s, Example)]
        groups = [group for example in examples for group in example.groups]
        batch = self.images(groups)
        batch |= self.text(examples or [Example([self.pad_token_id] * 2, [IGNORE] * 2)], batch)
        batch["counts"] = BatchCounts(
            samples=len(examples),
            tokens=sum(len(e.input_ids) for e in examples),
            slots=batch["input_ids"].numel() if examples else 0,
            images=sum(len(group.images) for group in groups),
            dropped=tuple(s for s in samples if isinstance(s, Dropped)),
        )
        return batch

    def images(self, groups: Sequence[ImageGroup]) -> dict[str, Any]:
        """The tensors of all images of a batch, of one more where `ask_always` calls for it; nothing without images."""
        if self.ask_always and not any(group.query.strip() for group in groups):
            groups = [*groups, self.idle]
        return dict(self.encode_inquiries(groups)) if groups else {}

    def text(self, rows: Sequence[Example], images: dict[str, Any]) -> dict[str, Any]:
        """The tensors of all tokens of a batch; `images` are those of their groups, others may follow."""
        grids = (images["image_grid_thw"][:, 1:] // self.merge_size).tolist() if images else []
        positions, first = [], 0
        for i, example in enumerate(rows):
            count = sum(len(g.images) for g in example.groups)
            mine = [(h, w) for h, w in grids[first : first + count]]
            first += count
            self._check(i, example, mine)
            positions.append(mrope_positions(example.input_ids, mine, self.image_token_id))
        lines = [list(range(len(rows)))] if self.packed else [[i] for i in range(len(rows))]
        step = self.pad_to_multiple_of
        length = -(-max(sum(len(rows[i].input_ids) for i in line) for line in lines) // step) * step
        shape = (len(lines), length)
        ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORE)
        mask, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        places = torch.ones((3, *shape), dtype=torch.long)
        for row, line in enumerate(lines):
            at = 0
            for i in line:
                example, own = rows[i], slice(at, at + len(rows[i].input_ids))
                ids[row, own] = torch.tensor(example.input_ids)
                labels[row, own] = torch.tensor(example.labels)
                labels[row, at] = IGNORE  # nothing of its sample comes before it
                mask[row, own] = 1
                weights[row, own] = torch.tensor(example.weights) if example.weights else 1.0
                places[:, row, own] = positions[i]
                at = own.stop
        out: dict[str, Any] = {"input_ids": ids, "labels": labels, "position_ids": places}
        if self.packed:
            ends = list(accumulate(len(e.input_ids) for e in rows))
            ends += [length] if length > ends[-1] else []
            starts = torch.tensor([0, *ends], dtype=torch.int32)
            longest = int(starts.diff().max())
            out |= dict(zip(BOUNDARIES, (starts, starts, longest, longest), strict=True))
        else:
            out["attention_mask"] = mask
        if any(len(e.weights) for e in rows):
            out["label_weights"] = weights
        return out

    def _check(self, i: int, example: Example, grids: Sequence[tuple[int, int]]) -> None:
        n = len(example.input_ids)
        wanted, found = sum(h * w for h, w in grids), list(example.input_ids).count(self.image_token_id)
        if wanted != found:
            raise ValueError(
                f"example {i} of the batch: {found} image placeholders, but its {len(grids)} images make {wanted} "
                "tokens; put height / 28 x width / 28 placeholders per image into the stream"
            )
        if len(example.labels) != n or (example.weights and len(example.weights) != n):
            raise ValueError(
                f"example {i} of the batch: {n} tokens, {len(example.labels)} labels, {len(example.weights)} "
                "weights; all three need one entry per token"
            )


def label_weight(batch: Mapping[str, Any]) -> torch.Tensor:
    """Weights of a batch's labelled tokens, summed; their number if it has no weights."""
    known = batch["labels"][:, 1:] != IGNORE
    if "label_weights" in batch:
        return batch["label_weights"][:, 1:][known].float().sum()
    return known.sum().float()
