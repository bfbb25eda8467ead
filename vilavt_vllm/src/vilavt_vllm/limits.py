"""How large one inquiry may be: vLLM reserves memory for the largest one at start, so none above it may be let in."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from vilavt_core.presets import Limits
from vilavt_core.sizing import MAX_REGIONS, largest_inquiry_pixels

from .errors import LimitError

TOKEN_SIDE = 28
"""Pixels on a side of what one language-model token stands for."""


@dataclass(frozen=True)
class EncoderLimits:
    """Caps on one inquiry: ``--hf-overrides '{"vilavt_max_regions": 16, "vilavt_max_group_pixels": 12845056}'``."""

    max_regions: int
    """Regions encoded together under one query."""
    max_group_pixels: int
    """Pixels of all regions of one inquiry after resizing."""

    @classmethod
    def of(cls, config: Any, max_image_pixels: int) -> "EncoderLimits":
        """Read the caps from the model's configuration.

        How many pixels an inquiry has by default: `vilavt_core.sizing.largest_inquiry_pixels`.

        Args:
            config: the HF configuration, with vLLM's ``hf_overrides`` applied.
            max_image_pixels: ``max_pixels`` of the image processor.

        Raises:
            LimitError: a cap is no positive integer.
        """
        regions = _positive(config, "vilavt_max_regions", MAX_REGIONS)
        pixels = largest_inquiry_pixels(max_image_pixels, regions)
        return cls(regions, _positive(config, "vilavt_max_group_pixels", pixels))

    def within(self, limits: Limits) -> Limits:
        """An episode's limits under which no inquiry breaks these caps: what is unlimited there gets the cap.

        Raises:
            LimitError: a limit is looser than the cap; names both numbers and the flag.
        """
        caps = {
            "max_inquiry_images": ("vilavt_max_regions", self.max_regions),
            "max_inquiry_pixels": ("vilavt_max_group_pixels", self.max_group_pixels),
        }
        for name, (override, cap) in caps.items():
            wanted = getattr(limits, name)
            if wanted is not None and wanted > cap:
                raise LimitError(
                    f"{name} is {wanted:.0f}, at most {cap} are encoded together by this engine; lower it, or raise "
                    f"the engine's with {flag(override, math.ceil(wanted))}"
                )
        return limits.with_caps_of(replace(limits, **{name: cap for name, (_, cap) in caps.items()}))

    @property
    def max_group_tokens(self) -> int:
        """Language-model tokens of the largest inquiry."""
        return self.max_group_pixels // TOKEN_SIDE**2

    def check(self, number: int, sizes: list[tuple[int, int]], query: str) -> None:
        """Refuse an inquiry that is too large.

        Args:
            number: of the inquiry in its prompt, counted from 0.
            sizes: (height, width) in pixels of every region, after resizing.
            query: for the message.

        Raises:
            LimitError: names both numbers and the flag.
        """
        what = f"inquiry {number} ({query[:60]!r})" if query else f"inquiry {number} (no query)"
        if len(sizes) > self.max_regions:
            raise LimitError(
                f"{what} has {len(sizes)} regions, at most {self.max_regions} are encoded together; "
                f"raise it with {flag('vilavt_max_regions', len(sizes))}"
            )
        pixels = sum(height * width for height, width in sizes)
        if pixels > self.max_group_pixels:
            raise LimitError(
                f"{what} has {pixels} pixels in {len(sizes)} regions after resizing, at most {self.max_group_pixels} "
                f"are encoded together; send smaller images, or raise it with {flag('vilavt_max_group_pixels', pixels)}"
            )

    def largest_group(self, max_image_pixels: int, min_image_pixels: int, max_tokens: int) -> list[tuple[int, int]]:
        """(width, height) of regions that together are the most expensive inquiry within the caps and `max_tokens`."""
        left = min(self.max_group_tokens, max_tokens)
        sizes: list[tuple[int, int]] = []
        while len(sizes) < self.max_regions:
            tokens = min(left, max_image_pixels // TOKEN_SIDE**2)
            if tokens * TOKEN_SIDE**2 < min_image_pixels or tokens < 1:
                break
            rows = isqrt(tokens)
            columns = tokens // rows
            sizes.append((columns * TOKEN_SIDE, rows * TOKEN_SIDE))
            left -= rows * columns
        return sizes or [(TOKEN_SIDE, TOKEN_SIDE)]


def _positive(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LimitError(f"hf_overrides: {name}={value!r} must be a positive whole number, the default is {default}")
    return value


def flag(name: str, value: int) -> str:
    """The command line that sets a cap."""
    return f"--hf-overrides '{{\"{name}\": {value}}}'"


def pixel_bounds(size: Mapping[str, int]) -> tuple[int, int]:
    """(min, max) pixels of an image processor's ``size``."""
    return size["shortest_edge"], size["longest_edge"]
