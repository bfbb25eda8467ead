"""Where the patches of one inquiry look, reduced to small images and numbers: for figures, traces and web pages.

`vilavt_hf.attention_maps` measures it; nothing here needs a model. A map has one grey pixel per patch (14 x 14 pixels
of the crop), so a crop's map is a PNG of some hundred bytes.

Shapes: R images of the inquiry, W words of the query, h and w patches of one image.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from .drawing import png_url
from .errors import AttentionError

Unit = Literal["times even", "share", "distance"]
"""Of a heat. ``times even``: how often more than if attention were spread evenly over all keys; ``share``: of a patch's
attention, from 0 to 1; ``distance``: 1 - cosine of two feature vectors."""

MOST_PATCHES = 2**18
"""Of one map that is read from JSON: a crop of 7,000 x 7,000 pixels has fewer."""

MOST_PIXELS = 2**25
"""Of one image that is read from JSON."""

CLIPPED = 99.0
"""Percentile that a map's full brightness stands for: one patch that draws a hundred times what the others do would
leave the rest black."""


@dataclass(frozen=True, eq=False)
class Heat:
    """One number per patch of every image of an inquiry, in 8 bits.

    A pixel p stands for ``p / 255 * scale``, in a signed heat for ``(p - 128) / 127 * scale``; what is above the scale
    is clipped, `highest` says how far above.
    """

    name: str
    """``received``: how much a patch is looked at; ``query``: how much it looks at the query; ``region 0``: how much
    image 0 looks at it; ``patch 0``: how much the first chosen patch looks at it; ``word 2``: how much it looks at that
    word; ``features``: how much its merged feature moved.
    """
    unit: Unit
    scale: float
    """What full brightness stands for; above 0."""
    highest: float
    """Largest absolute value."""
    maps: tuple[np.ndarray, ...]
    """For each image (h, w) uint8."""
    signed: bool = False

    @classmethod
    def of(cls, name: str, unit: Unit, values: Sequence[np.ndarray], *, signed: bool = False) -> Heat:
        """The heat of (h, w) float arrays, one for each image."""
        size = np.abs(np.concatenate([value.ravel() for value in values]))
        highest = float(size.max())
        scale = float(np.percentile(size, CLIPPED)) or highest or 1.0
        if signed:
            maps = [np.round(np.clip(value / scale, -1, 1) * 127 + 128) for value in values]
        else:
            maps = [np.round(np.clip(value / scale, 0, 1) * 255) for value in values]
        return cls(name, unit, scale, highest, tuple(one.astype(np.uint8) for one in maps), signed)

    def values(self, image: int) -> np.ndarray:
        """(h, w) float, as exact as 8 bits are."""
        pixels = self.maps[image].astype(np.float64)
        return (pixels - 128) / 127 * self.scale if self.signed else pixels / 255 * self.scale

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; every map as a grey PNG data URL."""
        maps = [png_url(Image.fromarray(one)) for one in self.maps]
        return {**vars(self), "maps": maps}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Heat:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        maps = tuple(np.asarray(_decode(url, "L", MOST_PATCHES)) for url in data["maps"])
        scale, highest = float(data["scale"]), float(data["highest"])
        if not (0 < scale < float("inf") and 0 <= highest < float("inf")):
            raise ValueError(f"a heat of scale {scale} and highest value {highest}")
        return cls(str(data["name"]), data["unit"], scale, highest, maps, bool(data["signed"]))


@dataclass(frozen=True, eq=False)
class Layer:
    """The attention of one block, or the mean of several."""

    block: int | None
    """None: the mean of all its blocks."""
    head: int | None
    """None: the mean of all heads."""
    mass: tuple[tuple[float, ...], ...]
    """(R, R + 1): how much the patches of image r look at each image, and at the query; rows sum to 1. In a difference:
    what was added, rows sum to 0.
    """
    words: tuple[float, ...]
    """(W,): how much a patch looks at each word, on average; they sum to its share on the query."""
    heats: tuple[Heat, ...]

    @property
    def title(self) -> str:
        """Block and head in words."""
        where = "mean of blocks" if self.block is None else f"block {self.block}"
        return where if self.head is None else f"{where}, head {self.head}"

    def heat(self, name: str) -> Heat:
        """The heat of this name.

        Raises:
            AttentionError: there is none.
        """
        found = next((heat for heat in self.heats if heat.name == name), None)
        if found is None:
            raise AttentionError(f"{self.title} has no heat {name!r}; it has {[heat.name for heat in self.heats]}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "block": self.block,
            "head": self.head,
            "mass": [list(row) for row in self.mass],
            "words": list(self.words),
            "heats": [heat.to_json() for heat in self.heats],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layer:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        block, head = (None if data[name] is None else int(data[name]) for name in ("block", "head"))
        return cls(
            block,
            head,
            tuple(tuple(map(float, row)) for row in data["mass"]),
            tuple(map(float, data["words"])),
            tuple(map(Heat.from_json, data["heats"])),
        )


@dataclass(frozen=True, eq=False)
class AttentionPicture:
    """Where the patches of one inquiry look, block by block."""

    query: str
    words: tuple[str, ...]
    """The query as the encoder reads it, prefix and end token included; none without a query."""
    captions: tuple[str, ...]
    """What each image is: a name, then perhaps a colon and more."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each image, pixels."""
    patches: tuple[tuple[int, int, int], ...]
    """(image, row, column) of the chosen patches, whose heats are ``patch 0``, …"""
    layers: tuple[Layer, ...]
    """The mean of the blocks first, if there are several; it alone has the heats of single words."""
    image_indices: tuple[int, ...] = ()
    """Place of each image in its conversation, counted from 0."""
    images: tuple[Image.Image, ...] = ()
    """As the encoder gets them; none if it was read from JSON that left them out."""

    def to_json(self, *, include_images: bool = False) -> dict[str, Any]:
        """Plain JSON data; a trace has the images already, so they are left out unless asked for."""
        out: dict[str, Any] = {
            "query": self.query,
            "words": list(self.words),
            "captions": list(self.captions),
            "sizes": [list(size) for size in self.sizes],
            "patches": [list(patch) for patch in self.patches],
            "image_indices": list(self.image_indices),
            "layers": [layer.to_json() for layer in self.layers],
        }
        return out | ({"images": [png_url(image) for image in self.images]} if include_images else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttentionPicture:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        picture = cls(
            str(data["query"]),
            tuple(map(str, data["words"])),
            tuple(map(str, data["captions"])),
            tuple((int(width), int(height)) for width, height in data["sizes"]),
            tuple((int(image), int(row), int(column)) for image, row, column in data["patches"]),
            tuple(map(Layer.from_json, data["layers"])),
            tuple(map(int, data.get("image_indices", ()))),
            tuple(_decode(url, "RGB", MOST_PIXELS) for url in data.get("images", ())),
        )
        picture._check()
        return picture

    def _check(self) -> None:
        """Raise what a file can say that no measuring gives.

        Raises:
            ValueError: numbers of images or words disagree.
        """
        images = len(self.sizes)
        counts = {len(self.captions), len(self.image_indices or self.sizes)}
        counts |= {len(heat.maps) for layer in self.layers for heat in layer.heats}
        counts |= {len(layer.mass) for layer in self.layers}
        counts |= {len(row) - 1 for layer in self.layers for row in layer.mass}
        if counts - {images}:
            raise ValueError(f"attention of {images} images with parts of {sorted(counts - {images})}")
        for layer in self.layers:
            if len(layer.words) != len(self.words):
                raise ValueError(f"attention at {len(layer.words)} words of a query of {len(self.words)}")


@dataclass(frozen=True, eq=False)
class QueryDifference:
    """What another query about the same images changes: what the language does to the encoder."""

    before: AttentionPicture
    after: AttentionPicture
    features: Heat
    """Distance (1 - cosine) between the two merged features of every 2 x 2 patches; a pixel per feature."""
    feature_change: tuple[float, ...]
    """(R,): mean length of an image's feature differences over the mean length of its features before."""
    moved: tuple[float, ...]
    """For each layer, the share of attention that went elsewhere: half of the sum of absolute differences between what
    the patches of an image look at, all words of a query taken as one; mean of the images.
    """
    layers: tuple[Layer, ...]
    """After minus before, without words: signed heats ``received`` and ``query``."""

    def to_json(self, *, include_images: bool = False) -> dict[str, Any]:
        """Plain JSON data; the images once, with the first query."""
        return {
            "before": self.before.to_json(include_images=include_images),
            "after": self.after.to_json(),
            "features": self.features.to_json(),
            "feature_change": list(self.feature_change),
            "moved": list(self.moved),
            "layers": [layer.to_json() for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QueryDifference:
        """Inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(
            AttentionPicture.from_json(data["before"]),
            AttentionPicture.from_json(data["after"]),
            Heat.from_json(data["features"]),
            tuple(data["feature_change"]),
            tuple(data["moved"]),
            tuple(map(Layer.from_json, data["layers"])),
        )


def _decode(url: str, mode: str, most_pixels: int) -> Image.Image:
    """The image of a PNG data URL, which may come from anybody.

    Raises:
        ValueError: it is none, has another mode, or more pixels.
    """
    head, _, data = url.partition(",")
    if head != "data:image/png;base64":
        raise ValueError(f"{head[:80]!r} is not a PNG data URL")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"])
        if image.width * image.height > most_pixels:
            raise ValueError(f"a map of {image.width} x {image.height}, at most {most_pixels} pixels are read")
        if image.mode != mode:
            raise ValueError(f"a map of mode {image.mode}; it must be {mode}")
        image.load()
    except ValueError:
        raise
    except Exception as error:  # of a broken file PIL raises whatever happens
        raise ValueError(f"a map that cannot be read: {error}") from None
    return image
