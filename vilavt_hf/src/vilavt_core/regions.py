"""The crop and zoom rule: shown images in, regions of their *sources* out, enlarged, with their lineage.

A region is named in pixels of an image as it was shown, which is a scaled-down view of a source image. Its crop
is taken from the source at full resolution, so a nested zoom always reads pixels that no earlier look has blurred.
Rule and constants: the published system's ``zoomin``, restated in `docs/protocol.md`; `tests/core/test_regions.py`
holds its golden table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from .errors import ImageError, RegionError
from .protocol import Box, Region, ToolCall

FACTOR = 28
"""Side of the square of pixels that one language-model token stands for: 2 x 2 merged patches of 14."""
MIN_PIXELS = 4 * FACTOR**2
MAX_PIXELS = 16384 * FACTOR**2
MAX_ASPECT = 200
"""Longest side over shortest side beyond which an image is refused."""
MAX_MAGNIFICATION = 2.0
"""A crop is shown at most this many times larger than its region was on the image that showed it."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def smart_resize(
    height: float,
    width: float,
    *,
    min_pixels: float = MIN_PIXELS,
    max_pixels: float = MAX_PIXELS,
    factor: int = FACTOR,
) -> tuple[int, int]:
    """Size at which the encoder sees an image: sides are multiples of ``factor``, the area is within the bounds,
    the shape is kept.

    The rule of ``qwen-vl-utils`` (``smart_resize``), with Python's round-half-to-even.

    Args:
        height: pixels.
        width: pixels.
        min_pixels: smaller images are enlarged to at least this area.
        max_pixels: larger images are shrunk to at most this area; may be fractional (a total divided by a count).
        factor: the grid.

    Returns:
        ``(height, width)`` in pixels.

    Raises:
        ImageError: an empty image, a side ratio above 200, or bounds that leave no pixel.
    """
    if height < 1 or width < 1:
        raise ImageError(f"an image of {width} x {height} px has no pixels")
    if max_pixels < min_pixels:
        raise ImageError(
            f"max_pixels {max_pixels:.0f} is below min_pixels {min_pixels:.0f}; raise the first or lower the second"
        )
    if max(height, width) / min(height, width) > MAX_ASPECT:
        ratio = max(height, width) / min(height, width)
        raise ImageError(
            f"an image of {width} x {height} px has a side ratio of {ratio:.0f}, at most {MAX_ASPECT} is allowed; "
            "crop it"
        )
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = math.floor(height / shrink / factor) * factor
        new_width = math.floor(width / shrink / factor) * factor
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    if new_height == 0 or new_width == 0:
        raise ImageError(
            f"an image of {width} x {height} px has no {factor}-px row left within max_pixels {max_pixels:.0f}; "
            "raise max_pixels"
        )
    return new_height, new_width


def share_budget(max_pixels: float, count: int, split: Literal["per_image", "total"]) -> float:
    """Pixels each of ``count`` originals may have: all of ``max_pixels``, or its equal share if the budget is a
    total."""
    return max_pixels / max(1, count) if split == "total" else max_pixels


def token_count(image: Image.Image, factor: int = FACTOR) -> int:
    """Language-model tokens of an encoder-ready image: ``(H / 28) * (W / 28)``."""
    return (image.height // factor) * (image.width // factor)


def fit(image: Image.Image, *, min_pixels: float = MIN_PIXELS, max_pixels: float = MAX_PIXELS) -> Image.Image:
    """The image as the encoder gets it: RGB, resized (bicubic) to `smart_resize`'s size."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    height, width = smart_resize(image.height, image.width, min_pixels=min_pixels, max_pixels=max_pixels)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class PixelBounds:
    """Bounds on the area of one original as the encoder sees it, in pixels, tighter than those of its conversation."""

    min_pixels: float | None = None
    max_pixels: float | None = None

    def within(self, min_pixels: float, max_pixels: float) -> tuple[float, float]:
        """Lower and upper bound where the conversation's are these; the upper one wins."""
        high = max_pixels if self.max_pixels is None else min(self.max_pixels, max_pixels)
        low = min_pixels if self.min_pixels is None else max(self.min_pixels, min_pixels)
        return min(low, high), high


@dataclass(frozen=True, eq=False)
class Picture:
    """A source image, decoded, and what is known of it."""

    image: Image.Image
    """RGB, upright, at full resolution."""
    name: str = ""
    """Of its file, for people; empty: unknown."""
    time: float | None = None
    """Seconds after the first frame of its video; None: it is no frame of a video."""
    bounds: PixelBounds = PixelBounds()

    @classmethod
    def of(cls, image: Image.Image | Picture) -> Picture:
        """A `Picture` as it is, or an image of which nothing else is known."""
        return image if isinstance(image, Picture) else cls(image)


@dataclass(frozen=True, eq=False)
class View:
    """One image as the encoder gets it, and where it comes from."""

    image: Image.Image
    """RGB, both sides multiples of 28."""
    source: int
    """Which source image, counted from 0 in the order they were added."""
    region: Box = WHOLE
    """``(x1, y1, x2, y2)`` within the source, as fractions of its width and height."""
    kind: Literal["original", "crop"] = "original"
    parent: int | None = None
    """Index of the shown image that the region was named on; None for an original."""
    box: Box | None = None
    """The region in pixels of the parent as shown; None for an original."""
    name: str = ""
    """Of the source's file; empty: unknown."""
    time: float | None = None
    """Of the source within its video, in seconds; None: it is no frame."""

    @property
    def tokens(self) -> int:
        """Language-model tokens this image takes."""
        return token_count(self.image)


@dataclass(frozen=True)
class CropPlan:
    """A crop whose geometry is settled and whose pixels are not cut yet. Sizes are ``(width, height)`` in pixels."""

    region: Region
    source: int
    view_region: Box
    """Fractions of the source."""
    source_box: tuple[int, int, int, int]
    """Pixels of the source."""
    zoomed_size: tuple[int, int]
    size: tuple[int, int]
    """As shown: multiples of 28."""

    @property
    def tokens(self) -> int:
        """Language-model tokens the crop will take."""
        return (self.size[0] // FACTOR) * (self.size[1] // FACTOR)


class Gallery:
    """All images of one conversation in the order they were shown; source images are kept decoded, once.

    Args:
        min_pixels: lower bound on the area of a shown image.
    """

    def __init__(self, *, min_pixels: float = MIN_PIXELS) -> None:
        self.min_pixels = min_pixels
        self.sources: list[Image.Image] = []
        self.views: list[View] = []

    def __len__(self) -> int:
        return len(self.views)

    def add_original(
        self, image: Image.Image | Picture, max_pixels: float = MAX_PIXELS, min_pixels: float | None = None
    ) -> View:
        """Show a whole source image, at most ``max_pixels`` and at least ``min_pixels`` large (None: the gallery's).

        Raises:
            ImageError: the image's shape is refused; nothing is added.
        """
        picture = Picture.of(image)
        low = self.min_pixels if min_pixels is None else min_pixels
        shown = fit(picture.image, min_pixels=low, max_pixels=max_pixels)
        view = View(shown, source=len(self.sources), name=picture.name, time=picture.time)
        self.sources.append(picture.image)
        self.views.append(view)
        return view

    def crop(self, call: ToolCall, max_pixels: float = MAX_PIXELS) -> list[View]:
        """Show the regions of a call: all of them, or none if one of them is refused.

        Raises:
            RegionError: names the first region that is refused and why.
        """
        return self.add_crops(self.plan(call.regions, max_pixels))

    def plan(self, regions: Iterable[Region], max_pixels: float = MAX_PIXELS) -> list[CropPlan]:
        """Check regions and work out their crops' sizes without touching a pixel; regions name images shown before
        the call.

        Raises:
            RegionError: as `crop`.
        """
        return [self._plan(i, region, max_pixels) for i, region in enumerate(regions)]

    def fit_together(self, plans: Sequence[CropPlan], max_pixels: float) -> list[CropPlan]:
        """Plans whose crops have at most ``max_pixels`` together: the largest ones are made smaller, all to one bound,
        and no smaller than needed (to the 28-px grid). Plans that fit are returned as they are.

        Raises:
            RegionError: they do not fit even at the gallery's ``min_pixels``; names both numbers.
        """
        plans = list(plans)
        total = _pixels(plans)
        if total <= max_pixels:
            return plans
        fitting: list[CropPlan] = []
        low = max(FACTOR**2, math.ceil(self.min_pixels))
        high = max(plan.size[0] * plan.size[1] for plan in plans)
        while low <= high:  # the bound of every crop, by halving
            bound = (low + high) // 2
            try:
                smaller = [self._within(plan, bound) for plan in plans]
            except ImageError:  # on the grid there is nothing between this and min_pixels, or no row is left
                low = bound + 1
                continue
            if _pixels(smaller) > max_pixels:
                high = bound - 1
            else:
                fitting, low = smaller, bound + 1
        if not fitting:
            raise RegionError(
                f"the {len(plans)} regions have {total} pixels together and cannot be made small enough, at most "
                f"{math.floor(max_pixels)} are encoded together; name fewer or smaller regions",
                len(plans) - 1,
            )
        return fitting

    def add_crops(self, plans: Sequence[CropPlan]) -> list[View]:
        """Cut and show planned crops, in order."""
        views = [self._cut(plan) for plan in plans]
        self.views.extend(views)
        return views

    def fork(self) -> Gallery:
        """A gallery that starts with the same images and then grows on its own; pixels are shared."""
        twin = Gallery(min_pixels=self.min_pixels)
        twin.sources, twin.views = list(self.sources), list(self.views)
        return twin

    def lineage(self, index: int) -> tuple[int, ...]:
        """Indices from a shown image up through its parents to its original."""
        chain = [index]
        while (parent := self.views[chain[-1]].parent) is not None:
            chain.append(parent)
        return tuple(chain)

    def source_box(self, index: int) -> tuple[int, int, int, int]:
        """Where a shown image lies on its source image, ``(x1, y1, x2, y2)`` in source pixels, truncated as the
        crop is."""
        view = self.views[index]
        width, height = self.sources[view.source].size
        x1, y1, x2, y2 = view.region
        return int(x1 * width), int(y1 * height), int(x2 * width), int(y2 * height)

    def _plan(self, i: int, region: Region, max_pixels: float) -> CropPlan:
        if not 0 <= region.index < len(self.views):
            known = f"images 0 to {len(self.views) - 1} were shown" if self.views else "no image was shown"
            raise RegionError(f"region {i} names image {region.index}, but {known}", i)
        parent = self.views[region.index]
        width, height = parent.image.size
        try:
            x1, y1, x2, y2 = map(float, region.box)
        except OverflowError:  # an integer of hundreds of digits
            raise RegionError(f"region {i}: its box holds a number that no pixel has", i) from None
        shown = f"[{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
        for axis, low, high, size in (("x", x1, x2, width), ("y", y1, y2, height)):
            if not low < high:
                raise RegionError(f"region {i}: box {shown} needs {axis}1 < {axis}2, it has {low:g} and {high:g}", i)
            if low < 0 or high > size:
                raise RegionError(
                    f"region {i}: box {shown} leaves image {region.index}, which is {width} x {height} px; keep "
                    f"{axis} within 0 and {size}",
                    i,
                )
        ox1, oy1, ox2, oy2 = parent.region
        nx1, nx2 = (ox1 + x / width * (ox2 - ox1) for x in (x1, x2))
        ny1, ny2 = (oy1 + y / height * (oy2 - oy1) for y in (y1, y2))
        source = self.sources[parent.source]
        left, top, right, bottom = (
            int(nx1 * source.width),
            int(ny1 * source.height),
            int(nx2 * source.width),
            int(ny2 * source.height),
        )
        crop_width, crop_height = right - left, bottom - top
        if crop_width < 1 or crop_height < 1:
            raise RegionError(
                f"region {i}: box {shown} covers {crop_width} x {crop_height} px of its image, less than one "
                "pixel; name a larger box",
                i,
            )
        magnification = width / ((ox2 - ox1) * source.width)
        scale = min(MAX_MAGNIFICATION * magnification, 1 / max(nx2 - nx1, 1e-6), 1 / max(ny2 - ny1, 1e-6))
        new_width, new_height = int(crop_width * scale), int(crop_height * scale)
        try:
            if new_width < 1 or new_height < 1:
                raise ImageError(f"it would be shown at {new_width} x {new_height} px")
            final_height, final_width = smart_resize(
                new_height, new_width, min_pixels=self.min_pixels, max_pixels=max_pixels
            )
        except ImageError as error:
            raise RegionError(f"region {i}: box {shown} cannot be shown: {error}", i) from None
        return CropPlan(
            region,
            parent.source,
            (nx1, ny1, nx2, ny2),
            (left, top, right, bottom),
            (new_width, new_height),
            (final_width, final_height),
        )

    def _within(self, plan: CropPlan, max_pixels: float) -> CropPlan:
        """The plan with a crop of at most this area.

        Raises:
            ImageError: there is no such size of its shape that an encoder would leave as it is.
        """
        width, height = plan.zoomed_size
        new_height, new_width = smart_resize(height, width, min_pixels=self.min_pixels, max_pixels=max_pixels)
        if new_height * new_width < self.min_pixels:
            raise ImageError(f"a crop of {new_width} x {new_height} px is below min_pixels {self.min_pixels:.0f}")
        return replace(plan, size=(new_width, new_height))

    def _cut(self, plan: CropPlan) -> View:
        """Two steps as published: LANCZOS to the zoomed size, then bicubic to the encoder's grid."""
        zoomed = self.sources[plan.source].crop(plan.source_box).resize(plan.zoomed_size, Image.Resampling.LANCZOS)
        zoomed = zoomed if zoomed.mode == "RGB" else zoomed.convert("RGB")
        image = zoomed if zoomed.size == plan.size else zoomed.resize(plan.size, Image.Resampling.BICUBIC)
        parent = self.views[plan.region.index]
        return View(
            image,
            plan.source,
            plan.view_region,
            "crop",
            plan.region.index,
            plan.region.box,
            parent.name,
            parent.time,
        )


def _pixels(plans: Iterable[CropPlan]) -> int:
    """Of all crops together, as shown."""
    return sum(plan.size[0] * plan.size[1] for plan in plans)
