"""Which part of the method an answer owes to what: the same questions with one part taken away.

The text of the conversation stays what the model wrote; the features that it gets change
(`vilavt_core.results.Intervention`). Only a local model can be treated so (backend ``hf``); ``no-zoom`` is a
limit of one turn, which every backend can set.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vilavt_core.conversation import Inquiry
from vilavt_core.errors import EvaluationError
from vilavt_core.presets import Limits
from vilavt_core.protocol import Region
from vilavt_core.regions import View
from vilavt_core.results import Intervention, Sample
from vilavt_core.spelling import meant

NO_ZOOM = "no-zoom"
NO_REENCODE = "no-reencode"


def with_query(query: Callable[[Sample], str]) -> Callable[[Sample, Inquiry], Sequence[Inquiry]]:
    """Encode crops under another query than the one the model wrote."""

    def change(sample: Sample, inquiry: Inquiry) -> Sequence[Inquiry]:
        return [replace(inquiry, query=query(sample))] if inquiry.query else [inquiry]

    return change


def one_by_one(sample: Sample, inquiry: Inquiry) -> Sequence[Inquiry]:
    """Encode every crop alone, under the same query."""
    return [
        replace(inquiry, images=(image,), image_indices=(index,))
        for image, index in zip(inquiry.images, inquiry.image_indices, strict=True)
    ]


def random_boxes(sample: Sample, regions: Sequence[Region], views: Sequence[View]) -> Sequence[Region]:
    """Boxes of the same size elsewhere on the same images.

    A box moves by whole multiples of its own width and height, so that it never overlaps the one that was asked for,
    and lands on the same grid if there is one. A box too large for that goes anywhere it fits. Drawn from the sample's
    seed and its number of images, whatever else is in the batch. Regions that cannot be carried out stay as they are.
    """
    rng = random.Random(f"{sample.seed_from(0)}:{len(views)}")  # repeatable on purpose  # nosec B311
    return [_moved(region, views, rng) for region in regions]


def _moved(region: Region, views: Sequence[View], rng: random.Random) -> Region:
    if not 0 <= region.index < len(views):
        return region
    image = views[region.index].image
    x1, y1, x2, y2 = region.box
    width, height = x2 - x1, y2 - y1
    if width < 1 or height < 1 or width > image.width or height > image.height:
        return region
    columns, rows = _steps(x1, width, image.width), _steps(y1, height, image.height)
    others = len(columns) * len(rows) - 1
    if others > 0:
        own = -columns.start * len(rows) - rows.start
        place = rng.randrange(others)
        column, row = divmod(place + (place >= own), len(rows))
        x, y = x1 + columns[column] * width, y1 + rows[row] * height
    else:
        x, y = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    return Region(region.index, (x, y, x + width, y + height))


def _steps(start: float, step: float, size: float) -> range:
    """Whole numbers k for which start + k * step to start + (k + 1) * step lies within 0 and the size."""
    return range(-int(start // step), max(1, int((size - start) // step)))


ABLATIONS: dict[str, Intervention] = {
    NO_ZOOM: Intervention(),
    "no-query": Intervention(transform_inquiry=with_query(lambda sample: "")),
    "no-joint": Intervention(transform_inquiry=one_by_one),
    "random-box": Intervention(transform_regions=random_boxes),
    NO_REENCODE: Intervention(reencode=False),
}
"""What each takes away; ``no-zoom`` is a limit, see `Ablation.limits`."""


@dataclass(frozen=True)
class Ablation:
    """One or several parts taken away at once; none: the method as it is."""

    parts: tuple[str, ...] = ()
    own: Mapping[str, Intervention] = field(default_factory=dict, compare=False, repr=False)
    """Interventions beside `ABLATIONS`, by name: those that know the questions of one benchmark."""

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts if part not in self._known]:
            raise EvaluationError(
                f"no ablation {', '.join(map(repr, unknown))}; known are {', '.join(self._known)}; join those that "
                f"shall happen together with +{meant(unknown, self._known)}"
            )

    @classmethod
    def parse(cls, text: str, own: Mapping[str, Intervention] | None = None) -> Ablation:
        """``no-query``, or ``no-query+no-joint`` for both in one run; blank is the method as it is."""
        return cls(tuple(sorted(dict.fromkeys(part for part in text.split("+") if part))), own or {})

    @property
    def _known(self) -> Mapping[str, Intervention]:
        return {**ABLATIONS, **self.own}

    def __str__(self) -> str:
        return "+".join(self.parts) or "full"

    def limits(self, limits: Limits) -> Limits | None:
        """Instead of the backend's own, or None."""
        return replace(limits, max_turns=1) if NO_ZOOM in self.parts else None

    @property
    def intervention(self) -> Intervention | None:
        """What the backend shall change, if anything."""
        found = [self._known[part] for part in self.parts if part != NO_ZOOM]
        if not found:
            return None
        inquiries = [i.transform_inquiry for i in found if i.transform_inquiry is not None]
        boxes = [i.transform_regions for i in found if i.transform_regions is not None]
        turns = [i.forced_turns for i in found if i.forced_turns is not None]
        if len(boxes) > 1 or len(turns) > 1:
            raise EvaluationError(f"{self}: two of them change the same boxes or turns; run them one by one")
        return Intervention(
            transform_regions=boxes[0] if boxes else None,
            transform_inquiry=_one_after_another(inquiries) if inquiries else None,
            forced_turns=turns[0] if turns else None,
            reencode=all(i.reencode for i in found),
        )

    def check(self, backend: str) -> None:
        """Refuse what a backend cannot do.

        Raises:
            EvaluationError: names both, and the remedy.
        """
        if backend != "hf" and (parts := [part for part in self.parts if part != NO_ZOOM]):
            raise EvaluationError(
                f"--ablate {'+'.join(parts)} changes what a local model is shown, the backend {backend!r} runs the "
                f"model as it is; use --backend hf with a checkpoint ({NO_ZOOM} works everywhere)"
            )


_Change = Callable[[Sample, Inquiry], Sequence[Inquiry]]


def _one_after_another(changes: Sequence[_Change]) -> _Change:
    def change(sample: Sample, inquiry: Inquiry) -> Sequence[Inquiry]:
        inquiries: list[Inquiry] = [inquiry]
        for one in changes:
            inquiries = [new for old in inquiries for new in one(sample, old)]
        return inquiries

    return change
