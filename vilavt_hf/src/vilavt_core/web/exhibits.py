"""What was said, as HTML for the page: questions with their images, zooms, answers. Every text is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..attention import AttentionPicture
from ..attention_figure import heading, mass_lines, most_of, tint
from ..dialogue import Dialogue, Given, ShownCrop
from ..drawing import png_url
from ..pages import render
from ..protocol import Box
from ..results import ChatResult
from ..trace import colour

TEMPLATES = Path(__file__).parent / "templates"

PARENT, CROP, THUMB = 900, 448, 256
"""Longest sides in pixels: of an image with boxes on it, of a crop, of an image beside its question."""
LEAST_PARENT, LEAST_CROP = 224, 168
"""Pixels that they are wide on the page at least; smaller ones are enlarged."""


def question(text: str, given: Sequence[Given]) -> str:
    """A question with the images that came with it."""
    most = PARENT if len(given) == 1 else THUMB
    pictures = [{"label": one.label, "url": data_url(one.preview, most), "size": one.size} for one in given]
    return _exhibit("question", text=text, pictures=pictures)


def thought(text: str, turn: int) -> str:
    """A turn's thoughts, while they arrive and afterwards."""
    return _exhibit("thought", text=text, turn=turn + 1)


@dataclass(frozen=True)
class Zoom:
    """A zoom as it is shown: the images that it was made on with its boxes, and the crops side by side."""

    query: str
    maps: Sequence[Mapping[str, Any]]
    crops: Sequence[Mapping[str, Any]]

    @property
    def indices(self) -> tuple[int, ...]:
        """Numbers of its crops in the conversation."""
        return tuple(crop["index"] for crop in self.crops)

    def exhibit(self, attention: AttentionPicture | None = None, number: int = 0) -> str:
        """As HTML.

        Args:
            attention: of its crops, to be laid over them: the mean of blocks and heads.
            number: that no other zoom of the page has.
        """
        looks, masses, crops = [], [], list(self.crops)
        if attention is not None and attention.layers:
            layer = attention.layers[0]
            looks = [f"{heading(heat.name, attention)} ({most_of(heat)})" for heat in layer.heats]
            masses = mass_lines(layer, attention)
            places = {index: place for place, index in enumerate(attention.image_indices)}
            crops = [
                {**crop, "heats": [png_url(tint(heat, places[crop["index"]])) for heat in layer.heats]}
                for crop in self.crops
            ]
        return _exhibit(
            "zoom", query=self.query, maps=self.maps, crops=crops, looks=looks, masses=masses, number=number
        )


def zoom_of(query: str, cuts: Sequence[ShownCrop], dialogue: Dialogue) -> Zoom:
    """What is shown of a zoom, while the dialogue knows its crops."""
    parents: dict[tuple[int | None, int], list[ShownCrop]] = {}
    for cut in cuts:
        parents.setdefault((cut.parent, cut.given), []).append(cut)
    maps = [_map(parent, given, on_it, dialogue) for (parent, given), on_it in parents.items()]
    crops = [
        {
            "index": cut.index,
            "colour": colour(cut.index),
            "url": data_url(cut.image, CROP),
            "size": cut.image.size,
            "width": min(CROP, max(LEAST_CROP, cut.image.width)),
            "heats": [],
        }
        for cut in cuts
    ]
    return Zoom(query, maps, crops)


def answer(text: str) -> str:
    """The answer."""
    return _exhibit("answer", text=text)


def problem(text: str) -> str:
    """What went wrong."""
    return _exhibit("problem", text=text)


def remark(text: str) -> str:
    """What the app itself has to say."""
    return _exhibit("remark", text=text)


def facts(result: ChatResult) -> str:
    """How an answer came about, in a line."""
    sampled = sum(turn.token_count for turn in result.turns)
    crops = sum(len(turn.image_indices) for turn in result.turns)
    return remark(f"{len(result.turns)} turns, {crops} crops, {sampled} tokens, {result.seconds:.1f} s")


def thread(exhibits: Iterable[str]) -> str:
    """Everything so far."""
    return f'<div class="vv-thread" role="log" aria-live="polite">{"".join(exhibits)}</div>'


def links(token: str) -> str:
    """To the trace of this visitor: it opens, or is saved as a page or as JSON."""
    return _exhibit("links", token=token)


def data_url(image: Image.Image, most: int) -> str:
    """An image inside the page, at most so many pixels wide and high; small ones are kept exact."""
    small = image
    if max(image.size) > most:
        small = image.copy()
        small.thumbnail((most, most), Image.Resampling.LANCZOS)
    kind = "PNG" if small.width * small.height <= 256 * 256 else "JPEG"
    buffer = io.BytesIO()
    small.save(buffer, kind, **({} if kind == "PNG" else {"quality": 85}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _map(parent: int | None, given: int, cuts: Sequence[ShownCrop], dialogue: Dialogue) -> dict[str, Any]:
    source = dialogue.given[given]
    image = source.preview if parent is None else dialogue.crop(parent).image
    return {
        "label": source.label if parent is None else f"image {parent}",
        "url": data_url(image, PARENT),
        "width": max(LEAST_PARENT, image.width),
        "boxes": [{"index": cut.index, "colour": colour(cut.index), "place": _percent(cut.box)} for cut in cuts],
    }


def _percent(box: Box) -> str:
    x1, y1, x2, y2 = (100 * value for value in box)
    return f"left:{x1:.3f}%;top:{y1:.3f}%;width:{x2 - x1:.3f}%;height:{y2 - y1:.3f}%"


def _exhibit(kind: str, **values: Any) -> str:
    return str(render("exhibit.html", TEMPLATES, kind=kind, **values))
