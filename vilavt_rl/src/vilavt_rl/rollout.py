"""A row of data as an episode, and a finished episode as what a trainer trains on. No trainer is imported here."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vilavt_core.data.rendering import Outline, planned_frames
from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.episode import Episode
from vilavt_core.errors import ImageError
from vilavt_core.images import image_size
from vilavt_core.regions import Picture
from vilavt_core.results import Sample
from vilavt_core.settings import preset_of
from vilavt_core.sources import Video
from vilavt_hf.processing_vilavt import VilavtProcessor

from .data import Row
from .errors import RolloutError, RowError

logger = logging.getLogger(__name__)


def settings_of_checkpoint(
    folder: str | Path,
    processor: VilavtProcessor | None = None,
    *,
    preset: str | None = None,
    limits: Mapping[str, Any] | None = None,
) -> ConversationSettings:
    """Settings of a checkpoint (its ``vilavt_chat.json``, its prompts), changed by those of the run: the same that chat
    and servers start from.

    Args:
        folder: the checkpoint.
        processor: its processor; None loads it.
        preset: name; None: what the checkpoint asks for.
        limits: fields of `vilavt_core.presets.Limits`.
    """
    processor = processor or VilavtProcessor.from_pretrained(folder)
    return ConversationSettings.fitting(
        preset_of(folder, preset).with_limits(**dict(limits or {})),
        tokenizer=processor.tokenizer,
        image_size=processor.image_processor.size,
        context=2**31,  # what a trajectory may have is set for each
        own_prompts=processor.prompts,
        seed=0,  # the trainer draws; a trajectory's record is the same every time
        checkpoint=str(folder),
        packages=("vilavt-rl",),
    )


@functools.lru_cache(maxsize=8)
def cached_settings(folder: str, preset: str | None, limits: tuple[tuple[str, Any], ...]) -> ConversationSettings:
    """`settings_of_checkpoint`, made once per process."""
    return settings_of_checkpoint(folder, preset=preset, limits=dict(limits))


def start_row(row: Row, settings: ConversationSettings, *, max_prompt: int, max_response: int) -> Driver:
    """The driver of a row, its images loaded and its first request prepared.

    Args:
        row: the question.
        settings: of the run.
        max_prompt: tokens that the first turn may have.
        max_response: tokens of everything after it; becomes the episode's context limit, so that nothing is ever cut.

    Raises:
        ImageError: an image cannot be loaded.
        RolloutError: the first turn is too long.
    """
    try:
        images = settings.load(row.sources)
    except ImageError as error:  # an image that the row holds has no name of its own
        raise ImageError(f"sample {row.id}: {error}") from None
    episode = _open(row, settings, images)
    length = len(episode.record.token_ids)
    if episode.finished or length > max_prompt:
        raise RolloutError(
            f"sample {row.id}: its first turn has {length} tokens, at most {max_prompt} are allowed; raise the "
            f"prompt length or lower max_pixels. {episode.result.detail if episode.finished else ''}".rstrip()
        )
    # Known only now, and before the first request is made.
    context = min(length + max_response, episode.limits.max_context or length + max_response)
    episode.limits = replace(episode.limits, max_context=context)
    sample = Sample(row.sources, row.question, row.id, limits=episode.limits)
    driver = Driver(sample, settings, episode=episode, fallback=False)
    driver.start()
    return driver


def first_turn_fits(row: Row, settings: ConversationSettings, max_prompt: int) -> bool:
    """Whether `start_row` would accept the row's first turn; only the headers of its images are read.

    Raises:
        ImageError: an image is none, or has a refused shape.
    """
    pictures: list[Image.Image | Picture] = []
    for source in row.sources:
        if isinstance(source, Video):
            pictures += planned_frames(source, settings.video_limits)
        else:
            pictures.append(Outline(image_size(source, rules=settings.preset.rules)))
    episode = _open(row, settings, pictures)
    return not episode.finished and len(episode.record.token_ids) <= max_prompt


def _open(row: Row, settings: ConversationSettings, images: Sequence[Image.Image | Picture]) -> Episode:
    limits = settings.limits
    if row.max_pixels is not None:
        pixels = max(limits.min_pixels, min(row.max_pixels, limits.max_pixels))
        crop = limits.crop_max_pixels
        limits = replace(limits, max_pixels=pixels, crop_max_pixels=None if crop is None else min(crop, pixels))
    if row.max_turns is not None:
        limits = replace(limits, max_turns=row.max_turns)
    return settings.episode(images, row.question, limits=limits, sample_id=row.id)


def fitting_rows(rows: Sequence[Row], settings: ConversationSettings, max_prompt: int) -> list[Row]:
    """The rows whose first turn has at most `max_prompt` tokens and keeps the limits; the number of others is logged.

    Raises:
        DataError: none does.
        ImageError: an image is none, or has a refused shape.
    """
    kept = [row for row in rows if first_turn_fits(row, settings, max_prompt)]
    if not kept:
        raise RowError(
            f"none of {len(rows)} rows fits: each first turn has more than {max_prompt} tokens or breaks the limits on "
            "images; raise the prompt length or lower max_pixels"
        )
    if len(kept) < len(rows):
        logger.warning(
            "%d of %d rows are left out: their first turn has more than %d tokens or breaks the limits on images",
            len(rows) - len(kept),
            len(rows),
            max_prompt,
        )
    return kept


def finished_episode(driver: Driver) -> Episode:
    """The episode of a driver that has its result.

    Raises:
        Exception: what ended it instead.
    """
    error, episode = driver.result.error, driver.conversation
    if error is not None:
        raise error
    assert episode is not None
    return episode


@dataclass(frozen=True, eq=False)
class TokenRecord:
    """A trajectory as tokens, exactly as sampled. The three response lists have one entry per response token."""

    prompt_ids: list[int]
    """Everything before the first sampled token."""
    response_ids: list[int]
    response_mask: list[int]
    """1 for sampled tokens, the sampled ``<|im_end|>`` included; 0 for tool responses and images."""
    response_logprobs: list[float]
    """As the engine gave them; 0.0 where nothing was sampled."""
    images: list[Image.Image]
    queries: list[str]
    images_per_query: list[int]
    query_prefixes: list[str | None]
    """Of each query: the preset's; None takes the checkpoint's."""

    @classmethod
    def of(cls, episode: Episode) -> TokenRecord:
        """The record of an episode with at least one turn.

        Raises:
            RolloutError: nothing was sampled, or a sampled token has no log-probability.
        """
        record = episode.record
        if 1 not in record.loss_mask:
            raise RolloutError(f"sample {episode.sample_id}: nothing was sampled, there is nothing to train on")
        first = record.loss_mask.index(1)
        mask = record.loss_mask[first:]
        logprobs = record.logprobs[first:]
        missing = sum(m and value is None for m, value in zip(mask, logprobs, strict=True))
        if missing and missing != sum(mask):
            raise RolloutError(
                f"sample {episode.sample_id}: {missing} of {sum(mask)} sampled tokens have no log-probability; the "
                "engine must give one for each, or none"
            )
        return cls(
            record.token_ids[:first],
            record.token_ids[first:],
            mask,
            [0.0 if value is None else value for value in logprobs],
            [image for inquiry in record.inquiries for image in inquiry.images],
            [inquiry.query for inquiry in record.inquiries],
            [len(inquiry.images) for inquiry in record.inquiries],
            [inquiry.query_prefix for inquiry in record.inquiries],
        )
