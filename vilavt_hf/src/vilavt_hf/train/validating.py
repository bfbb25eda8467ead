"""Validation of a run: loss and right answers on samples that are not trained on, and the checkpoint that is best."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from vilavt_core.checkpoint.build_info import PROVENANCE
from vilavt_core.data.dataset import Lengths, SftDataset
from vilavt_core.data.order import Order, RankShare, digest
from vilavt_core.data.schema import EpisodeRecord, read_record
from vilavt_core.errors import ImageError, TrainingError
from vilavt_core.failures import one_line, quoted
from vilavt_core.json_text import parse_json
from vilavt_core.presets import Limits, Preset, Sampling
from vilavt_core.progress import Advance
from vilavt_core.protocol import Answer, parse_turn, unbox
from vilavt_core.results import Sample
from vilavt_core.scoring import normalise
from vilavt_core.sft_config import SftConfig
from vilavt_core.sources import ImageSource

from ..chat import VilavtChat
from ..processing_vilavt import VilavtProcessor
from .collator import VilavtCollator, label_weight
from .measuring import measure_all
from .ranks import rank_and_world

logger = logging.getLogger(__name__)

Counting = Callable[[int, str, str], AbstractContextManager[Advance]]
"""`vilavt_core.progress.counting`, or what shows the same elsewhere."""

CONCURRENCY = 32
"""Questions of a rank that are asked side by side."""


@dataclass(frozen=True)
class Figures:
    """What one validation found, over all ranks."""

    loss: float
    """Mean over the labelled tokens."""
    tokens_right: float
    """Share of the labelled tokens that the model predicts, 0 to 1."""
    answers_right: float | None = None
    """Share of the questions whose answer is that of the record, 0 to 1; None: none was asked."""
    questions: int = 0

    def to_json(self) -> dict[str, float]:
        """Those that there are."""
        found = {"loss": round(self.loss, 5), "tokens_right": round(self.tokens_right, 4)}
        if self.answers_right is not None:
            found |= {"answers_right": round(self.answers_right, 4), "questions": self.questions}
        return found

    def __str__(self) -> str:
        if self.answers_right is None:
            return f"loss {self.loss:.4f}"
        return f"loss {self.loss:.4f}, {round(self.answers_right * self.questions)} of {self.questions} answers right"


class Validation:
    """The validation data of a run: measured, ordered, and asked.

    Make it on every rank.

    Args:
        config: of the run.
        dataset: of `DataConfig.validation`.
        processor: of the model.
        collate: makes batches.
        preset: how the run trains, and so how questions are asked.
        make_order: which samples make which micro-batch, by their lengths.
        cache: folder for the lengths.
        first: whether this rank reports.

    Raises:
        TrainingError: more of its samples than data.max_dropped cannot be used, or there is nothing to measure.
    """

    def __init__(
        self,
        config: SftConfig,
        dataset: SftDataset,
        processor: VilavtProcessor,
        *,
        collate: VilavtCollator,
        preset: Preset,
        make_order: Callable[[SftConfig, Lengths], Order],
        cache: Path,
        first: bool,
    ):
        self.config, self.dataset, self.processor = config, dataset, processor
        self.collate, self.preset = collate, preset
        self.lengths = measure_all(dataset, workers=config.data.workers, cache=cache, progress=first)
        self._check(first)
        self.order = make_order(config, self.lengths)
        self.questions = self._chosen()
        """Samples that are asked."""
        if config.validation.best == "answers_right" and not self.questions:
            raise TrainingError(
                f"validation.best is answers_right, but {', '.join(config.data.validation)}: no episode records"
            )

    def _check(self, first: bool) -> None:
        bad = [text for kind, text in self.lengths.problems.values() if kind != "too long"]
        allowed = self.config.data.max_dropped
        if len(bad) > allowed * len(self.dataset):
            raise TrainingError(
                f"data.validation: {len(bad)} of {len(self.dataset)} samples cannot be used, data.max_dropped allows "
                f"{allowed:.2%}: {'; '.join(bad)[:600]}; restore their files or correct their records"
            )
        if self.lengths.problems and first:
            logger.warning("data.validation: %d samples are left out: %s", len(self.lengths.problems),
                           dict(self.lengths.dropped))  # fmt: skip

    @property
    def digest(self) -> str:
        """Tells whether two validations measure the same, as far as lengths show it."""
        return f"{self.lengths.digest}-{digest(self.order)}-{len(self.questions)}"

    def _chosen(self) -> list[int]:
        """As many episodes as are to be asked, spread over all of them."""
        episodes = [i for i in self.lengths.kept.tolist() if self._episode(i) is not None]
        wanted = min(len(episodes), self.config.validation_questions)
        return [episodes[i] for i in np.linspace(0, len(episodes) - 1, wanted).round().astype(int)] if wanted else []

    def _episode(self, i: int) -> tuple[EpisodeRecord, str] | None:
        """A sample's record and the answer it ends in; None: it is no episode."""
        record = read_record(self.dataset.record(i), self.dataset.name(i))
        if not isinstance(record, EpisodeRecord):
            return None
        last = parse_turn(record.turns[-1].text, self.preset.rules)
        return (record, last.text) if isinstance(last, Answer) else None

    def figures(self, trainer: Trainer, model: Any, counting: Counting) -> Figures:
        """Loss and answers of the model as it is; every rank has to ask, and gets the same.

        Args:
            trainer: of the run.
            model: in eval mode, as the trainer calls it.
            counting: shows how far it is.
        """
        mine = [*self._loss(trainer, model, counting)]
        mine += self._answers(trainer.accelerator.unwrap_model(model), counting)
        device = trainer.args.device
        everyone: Any = trainer.accelerator.reduce(torch.tensor(mine, dtype=torch.float64, device=device), "sum")
        loss, tokens_right, weight, right, asked = everyone.tolist()
        weight = max(weight, 1e-6)
        return Figures(loss / weight, tokens_right / weight, right / asked if asked else None, int(asked))

    @torch.no_grad()
    def _loss(self, trainer: Trainer, model: Any, counting: Counting) -> tuple[float, float, float]:
        """Summed over this rank's share: loss, weight of the tokens that are predicted, weight of all with a label."""
        args = trainer.args
        batches: DataLoader = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=RankShare(self.order, args.process_index, args.world_size, lambda: 0),  # type: ignore[arg-type]
            collate_fn=self.collate,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator(),  # the run's random numbers stay what they would be without validation
        )
        sums = [0.0, 0.0, 0.0]
        with counting(len(batches), "validation loss", "batch") as advance:
            for batch in batches:
                for dropped in batch.pop("counts").dropped:
                    logger.warning("dropped from data.validation: %s", dropped.reason)
                weight = label_weight(batch)
                with trainer.accelerator.autocast():
                    found = model(**trainer._prepare_inputs(batch), summed_loss=True)
                for i, value in enumerate((found["loss"], found["figures"]["tokens_right"], weight)):
                    sums[i] += float(value)
                advance(1)
        return sums[0], sums[1], sums[2]

    def _answers(self, model: Any, counting: Counting) -> tuple[int, int]:
        """How many of this rank's questions are answered as in their records, and how many were asked."""
        rank, world = rank_and_world()
        mine = self.questions[rank::world]
        if not mine:
            return 0, 0
        chat = VilavtChat(
            model.get_base_model() if hasattr(model, "get_base_model") else model,
            self.processor,
            preset=self.preset,
            sampling=Sampling(),
            concurrency=CONCURRENCY,
        )
        targets, samples = [], []
        for i in mine:
            if (sample := self._sample(i, chat.settings.limits)) is not None:
                samples.append(sample)
                targets.append(sample.data)
        right = 0
        autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=self.config.model.precision == "bf16")
        with autocast, counting(len(samples), "validation answers", "question") as advance:
            for place, result in chat.iter_many(samples):
                right += same_answer(result.answer, targets[place])
                advance(1)
        return right, len(samples)

    def _sample(self, i: int, limits: Limits) -> Sample | None:
        """The question of a sample, its images decoded, its target as `data`; None: an image is damaged."""
        episode = self._episode(i)
        assert episode is not None
        record, target = episode
        renderer, root = self.dataset.renderer, self.dataset.image_root(i)
        try:
            images: list[ImageSource] = [renderer.load(root / name) for name in record.images]
            for video in renderer.videos(record, root):
                renderer.frames(video, decode=True)
                images.append(video)
        except ImageError:
            return None  # told by `_loss`
        if record.max_turns:
            limits = replace(limits, max_turns=record.max_turns)
        if (cap := record.max_pixels) is not None:
            limits = replace(limits, max_pixels=cap, crop_max_pixels=cap, min_pixels=min(limits.min_pixels, cap))
        return Sample(images, record.question, self.dataset.name(i), limits=limits, data=target)


def same_answer(found: str | None, target: str) -> bool:
    """Whether two answers are the same text, but for case, articles and punctuation around words."""
    found = unbox(found or "").strip().casefold()
    return found == target.strip().casefold() or normalise(found) == normalise(target) != ""


class Best:
    """Keeps the checkpoint that did best so far, in a folder of its own.

    Args:
        folder: where it is.
        measured_by: name of the figure.
        data: `Validation.digest`.
        resumed: whether a run is gone on with; what it found best stays best.
    """

    def __init__(self, folder: Path, measured_by: str, data: str, resumed: bool):
        self.folder, self.measured_by, self.data = folder, measured_by, data
        self.record = self._kept() if resumed else None
        """Of the best so far: its step, its figures, the data they were measured on; None: there is none yet."""

    def _kept(self) -> dict[str, Any] | None:
        try:
            record = parse_json((self.folder / PROVENANCE).read_text(encoding="utf-8"))["details"]
            kept = {"step": record["step"], **record["validation"]}
            figure = kept.get(self.measured_by, 0.0)
            if not isinstance(figure, int | float):
                raise ValueError(f"{self.measured_by} is {quoted(figure)!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if self.folder.exists():
                logger.warning("%s does not say how it was measured (%s): it is replaced", self.folder, one_line(error))
            return None
        if kept.get("data") == self.data and self.measured_by in kept:
            return kept
        logger.warning("%s was measured on other validation data, or by another figure: it is replaced", self.folder)
        return None

    def improved_by(self, figures: Figures, step: int) -> bool:
        """Whether these are better than all before, which they then are."""
        new = {"step": step, "data": self.data, **figures.to_json()}
        if self.measured_by not in new:
            return False
        if self.record is not None:
            now, before = new[self.measured_by], self.record[self.measured_by]
            if not (now < before if self.measured_by == "loss" else now > before):
                return False
        self.record = new
        return True
