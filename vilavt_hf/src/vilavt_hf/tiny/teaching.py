"""What the tiny model's training adds to SFT: heads on image features, supervised attention, images without text."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vilavt_core.architecture import MODULE_NAMES
from vilavt_core.data.example import IGNORE, ImageGroup
from vilavt_core.errors import TrainingError

from .. import compat
from ..configuration_vilavt import VilavtConfig
from ..train.collator import BatchCounts, VilavtCollator
from ..train.trainer import VilavtTrainer
from ..train.training_model import VilavtForTraining
from .heads import AttentionInputs, AuxiliaryLosses, BlockOutputs
from .lesson import Lesson

compat.register_key_names("VilavtForTeaching", MODULE_NAMES)

_HEADS = "auxiliary."

SHARED_HEADS = ("ink", "digit")
"""Heads that can only tell of a plate's features what two plates that were encoded together say."""


class TeachingCollator(VilavtCollator):
    """Batches of `Lesson`."""

    alone = False
    """Encode every image alone, for a control that never sees two regions at once: then there are no partners, and
    heads are not asked what only partners know."""

    def __call__(self, samples: Sequence[Lesson]) -> dict[str, Any]:  # type: ignore[override]
        """The parent's batch, with targets.

        Returns:
            As the parent; images of extra groups come last. ``aux`` if any lesson has targets or extra groups. Lessons
            without tokens have no row; a batch without any row has ``labels`` (1, 0) and no ``input_ids``.

        Raises:
            ValueError: a lesson's placeholders and images disagree, or the batch is packed and has targets.
        """
        samples = [_alone(lesson) for lesson in samples] if self.alone else samples
        rows = [lesson for lesson in samples if len(lesson.input_ids)]
        if any(lesson.groups for lesson in samples if not len(lesson.input_ids)):
            raise ValueError("a lesson without tokens can only have extra_groups")
        groups = [g for lesson in rows for g in lesson.groups] + [g for lesson in samples for g in lesson.extra_groups]
        batch = self.images(self.grouped(groups))
        batch |= self.text(rows, batch) if rows else {"labels": torch.full((1, 0), IGNORE)}
        if any(lesson.attention or lesson.tokens or lesson.partners or lesson.extra_groups for lesson in samples):
            if self.packed:
                raise ValueError("targets name rows: they need padded batches")
            batch["aux"] = _targets(samples, rows)
        batch["counts"] = BatchCounts(
            samples=len(samples),
            tokens=sum(len(lesson.input_ids) for lesson in rows),
            slots=batch["labels"].numel(),
            images=sum(len(group.images) for group in groups),
        )
        return batch

    def grouped(self, groups: Sequence[ImageGroup]) -> Sequence[ImageGroup]:
        """The groups as they are encoded: as they are, or every image alone under the query of its group."""
        if not self.alone:
            return groups
        return [replace(group, images=(image,)) for group in groups for image in group.images]


def _alone(lesson: Lesson) -> Lesson:
    """The lesson without partners, and without what only they can know together."""
    together = {image for pair in lesson.partners for image in pair}
    tokens = tuple(t for t in lesson.tokens if t.image not in together or t.head not in SHARED_HEADS)
    return replace(lesson, tokens=tokens, partners=())


def _targets(lessons: Sequence[Lesson], rows: Sequence[Lesson]) -> dict[str, Any]:
    attention: dict[tuple[int, tuple[int, ...]], list[tuple[int, int, int]]] = {}
    for row, lesson in enumerate(rows):
        for t in lesson.attention:
            attention.setdefault((t.layer, t.heads), []).append((row, t.query, t.key))
    extra = sum(len(g.images) for lesson in rows for g in lesson.groups)
    images: dict[str, list[int]] = {}
    values: dict[str, list[np.ndarray]] = {}
    partners: list[list[int]] = []
    own = 0
    for lesson in lessons:
        n_own = sum(len(g.images) for g in lesson.groups)
        partners += [[own + i if i < n_own else extra + i - n_own for i in pair] for pair in lesson.partners]
        for target in lesson.tokens:
            inside = target.image < n_own
            images.setdefault(target.head, []).append(own + target.image if inside else extra + target.image - n_own)
            values.setdefault(target.head, []).append(target.values)
        own += n_own
        extra += sum(len(g.images) for g in lesson.extra_groups)
    return {
        "attention": [(layer, heads, torch.tensor(at)) for (layer, heads), at in attention.items()],
        "partners": torch.tensor(partners, dtype=torch.long).reshape(-1, 2),
        "tokens": {
            head: (torch.tensor(images[head]), torch.from_numpy(np.concatenate(values[head]))) for head in images
        },
    }


class VilavtForTeaching(VilavtForTraining):
    """`VilavtForTraining` with heads that are trained along and never saved."""

    def __init__(self, config: VilavtConfig):
        super().__init__(config)
        self.auxiliary: AuxiliaryLosses | None = None
        """Assign a module to train it along; None: targets are ignored."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor | None = None, *, aux: dict[str, Any] | None = None, **batch: Any
    ) -> Any:
        """Losses of a batch of `TeachingCollator`.

        Returns:
            The parent's, and ``auxiliary``: the mean losses of the heads and of the attention, summed.
        """
        if not self.training:
            return super().forward(input_ids=input_ids, **batch)
        teacher = self.auxiliary if aux is not None else None
        pairs: torch.Tensor | None = aux["partners"] if teacher is not None and aux is not None else None
        if pairs is not None and not len(pairs):
            pairs = None
        with (
            BlockOutputs(self.model.visual, teacher.blocks if teacher is not None else []) as blocks,
            AttentionInputs(
                self.model.visual, [teacher.partner_block] if teacher is not None and pairs is not None else []
            ) as seen,
        ):
            features = self.encode(batch)
        auxiliary = torch.zeros((), device=self.lm_head.weight.device)
        figures: dict[str, torch.Tensor] = {}
        if teacher is not None and aux is not None and aux["tokens"]:
            assert features is not None
            sizes = (batch["image_grid_thw"].prod(-1) // self.model.visual.spatial_merge_unit).tolist()
            auxiliary, figures = teacher.features_loss(aux["tokens"], features, sizes, blocks)
            figures["heads"] = auxiliary.detach()
        if teacher is not None and pairs is not None:
            counts = batch["images_per_query"]
            attention = self.model.visual.blocks[teacher.partner_block].attn
            loss, mass = teacher.partner_loss(
                pairs,
                attention,
                seen[teacher.partner_block],
                batch["image_grid_thw"].prod(-1),
                torch.arange(int((counts > 0).sum())).repeat_interleave(counts[counts > 0]),
            )
            auxiliary, figures = auxiliary + loss, figures | mass
        if input_ids is None:
            return {"loss": torch.zeros_like(auxiliary), "auxiliary": auxiliary, "figures": figures}
        wanted = aux["attention"] if teacher is not None and aux is not None else []
        output, idle = self.language(input_ids, features, batch, **({"output_attentions": True} if wanted else {}))
        loss, found = self.text_loss(output.last_hidden_state, batch)
        figures |= found
        if wanted and teacher is not None:
            more, mass = teacher.attention_loss(wanted, output.attentions)
            auxiliary, figures = auxiliary + more, figures | mass
        return {"loss": loss + idle, "auxiliary": auxiliary, "figures": figures}

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The parent's checkpoint, without the heads."""
        state = self.state_dict() if state_dict is None else state_dict
        state = {name: value for name, value in state.items() if not name.startswith(_HEADS)}
        super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)


class TeachingTrainer(VilavtTrainer):
    """`VilavtTrainer` for a `VilavtForTeaching` and batches of a `TeachingCollator`."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The parent's and the auxiliary losses, which are means, averaged over micro-batches and ranks."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + outputs["auxiliary"] / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def learning_rate_of(self, parameter: str) -> float:
        """The parent's; the heads learn at ``args.learning_rate``."""
        return self.args.learning_rate if parameter.startswith(_HEADS) else super().learning_rate_of(parameter)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        raise TrainingError(f"{resume_from_checkpoint} holds no training-only heads: this run cannot be resumed")
