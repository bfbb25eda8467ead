"""Crops that are not encoded: an ablation of the local engine, wrapped around where its features come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from vilavt_core.conversation import Inquiry
from vilavt_core.regions import FACTOR, Box, View
from vilavt_core.results import Sample

from .engine import EncodedImage, Features

Change = Callable[[Sample, Inquiry], Sequence[Inquiry]]


@dataclass(frozen=True, eq=False)
class Reused(Inquiry):
    """Images whose features are cut out of those of the originals they come from."""

    origins: tuple[tuple[Inquiry, Box], ...] = ()
    """For each image the inquiry of its original, which is alone in it, and where the image lies on it: ``(x1, y1, x2,
    y2)`` as fractions of its width and height.
    """


class ReusedFeatures:
    """`Features` that encode originals only, and cut a crop's features out of its original's.

    Args:
        features: of what is encoded.
    """

    def __init__(self, features: Features) -> None:
        self.features = features
        self._kept: WeakKeyDictionary[Inquiry, torch.Tensor] = WeakKeyDictionary()
        """Of originals, (h, w, C)."""

    def __call__(self, inquiries: Sequence[Inquiry]) -> list[EncodedImage]:
        """Encode originals, cut out the others."""
        new = [inquiry for inquiry in inquiries if not isinstance(inquiry, Reused)]
        encoded = iter(self.features(new) if new else ())
        out: list[EncodedImage] = []
        for inquiry in inquiries:
            if isinstance(inquiry, Reused):
                out += [
                    self._cut(image.size, self._kept[origin], box)
                    for image, (origin, box) in zip(inquiry.images, inquiry.origins, strict=True)
                ]
                continue
            images = [next(encoded) for _ in inquiry.images]
            if len(images) == 1:
                (one,) = images
                self._kept[inquiry] = one.features.view(*(one.grid[1:] // 2).tolist(), -1)
            out += images
        return out

    @staticmethod
    def _cut(size: tuple[int, int], features: torch.Tensor, box: Box) -> EncodedImage:
        height, width = size[1] // FACTOR, size[0] // FACTOR
        return EncodedImage(
            _cut_out(features, box, height, width), torch.tensor([1, 2 * height, 2 * width]), computed=False
        )


def reused(inquiry: Inquiry, views: Sequence[View], inquiries: Sequence[Inquiry]) -> Inquiry:
    """A crop's inquiry with the places of its images on the originals they come from; an original's as it is.

    Args:
        inquiry: a new one.
        views: all images of the conversation so far.
        inquiries: of the conversation so far.
    """
    origins = []
    for index in inquiry.image_indices:
        view = views[index]
        if view.kind == "original":
            return inquiry
        original = next(i for i, v in enumerate(views) if v.kind == "original" and v.source == view.source)
        origins.append((next(i for i in inquiries if i.image_indices == (original,)), view.region))
    return Reused(inquiry.images, inquiry.query, inquiry.image_indices, origins=tuple(origins))


def _cut_out(features: torch.Tensor, box: Box, height: int, width: int) -> torch.Tensor:
    """Part of an image's features (h, w, C) at another resolution, (height * width, C): bilinear between the tokens'
    centres.
    """
    x1, y1, x2, y2 = box
    x = x1 + (torch.arange(width) + 0.5) / width * (x2 - x1)
    y = y1 + (torch.arange(height) + 0.5) / height * (y2 - y1)
    grid = torch.stack(torch.meshgrid(2 * y - 1, 2 * x - 1, indexing="ij")[::-1], -1).to(features.device)
    image = features.permute(2, 0, 1)[None].float()
    cut = torch.nn.functional.grid_sample(image, grid[None], padding_mode="border", align_corners=False)
    return cut[0].flatten(1).T.to(features.dtype)
