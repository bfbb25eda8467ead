"""From a benchmark's message to a question: texts and images in the order they came."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vilavt_core.errors import ImageError
from vilavt_core.protocol import IMAGE_MARK
from vilavt_core.sources import Video

from .errors import MessageError

INDEX = "vilavt_index"
"""Key of a message's last item: the row it was made from. The toolkit hands items through as they are."""


@dataclass(frozen=True)
class BenchmarkQuestion:
    """What is asked of the model."""

    text: str
    images: tuple[str | Image.Image | Video, ...] = ()
    """A video's frames are shown in its place."""
    id: str | None = None
    """Of the sample; None: `sample_id` makes one."""

    @property
    def sample_id(self) -> str:
        """The row's index, else the first image's folder and name, and 8 hex digits of everything that is asked:
        questions may share an image, and the same question must have the same id in every run on every machine.
        """
        if self.id is not None:
            return self.id
        names = [_short_name(image) for image in self.images]
        digest = hashlib.sha256("\0".join([self.text, *names]).encode("utf-8", "replace")).hexdigest()[:8]
        return f"{names[0]}-{digest}" if names else digest

    def digest(self) -> str:
        """SHA-256 (hex) of the text and of what is in the images."""
        whole = hashlib.sha256(self.text.encode("utf-8", "replace"))
        for image in self.images:
            if isinstance(image, Image.Image):
                whole.update(hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest())
                continue
            with Path(image.label if isinstance(image, Video) else image).open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
            if isinstance(image, Video):
                whole.update(json.dumps(image.wanted).encode())
        return whole.hexdigest()

    @property
    def files(self) -> list[str]:
        """Paths of the images and videos that are files."""
        return [i.label if isinstance(i, Video) else i for i in self.images if not isinstance(i, Image.Image)]


def question_of(message: Sequence[Mapping[str, Any]], frames: Video | None = None) -> BenchmarkQuestion:
    """A message (items of ``type`` text, image or video, and ``value``) as a question.

    The value of a video is its file, beside which ``nframe`` or ``fps`` may stand, or the list of its frames.

    Images that stand between texts leave an ``<image>`` mark where they stood: the preset ``eval-hf`` puts them back
    there, the others show all images first and leave the marks in the text, as the published vLLM evaluation does.
    Beside a video there are no marks: images and videos come first, in their order.

    Args:
        message: the items.
        frames: which are taken of a video that says nothing; None: 32.

    Raises:
        MessageError: an item is something else, or says of a video what has no effect.
    """
    if odd := [item["type"] for item in message if item["type"] not in ("text", "image", "video")]:
        raise MessageError(f"the message holds a {odd[0]}; ViLaVT is shown texts, images and videos")
    kinds = [item["type"] for item in message]
    images = tuple(one for item in message if item["type"] != "text" for one in _shown(item, frames))
    after = kinds[kinds.index("text") :] if "text" in kinds else []
    between = len(images) > 1 and "image" in after and "video" not in kinds
    pieces = [str(item["value"]) if item["type"] == "text" else IMAGE_MARK for item in message]
    text = "\n".join(piece for piece, kind in zip(pieces, kinds, strict=True) if between or kind == "text")
    index = next((item[INDEX] for item in message if INDEX in item), None)
    return BenchmarkQuestion(text, images, None if index is None else str(index))


def _shown(item: Mapping[str, Any], frames: Video | None) -> list[str | Image.Image | Video]:
    """What an item shows: an image, a video, or the frames that a toolkit has taken out of one."""
    value = item["value"]
    if item["type"] == "image":
        return [_image(value)]
    said = {key: one for key, one in item.items() if key not in ("type", "value", INDEX)}
    if isinstance(value, list | tuple):
        if odd := sorted(key for key, one in said.items() if one is not None):
            raise MessageError(f"a video comes as {len(value)} frames, {odd[0]} has no effect on them; leave it out")
        return [_image(frame) for frame in value]
    try:
        return [Video.of({"path": value, **said}, frames)]
    except ImageError as error:
        raise MessageError(f"the message holds a video: {error}") from None


def _image(value: Any) -> str | Image.Image:
    return value if isinstance(value, Image.Image) else str(value)


def _short_name(image: str | Image.Image | Video) -> str:
    if isinstance(image, Image.Image):
        return f"{image.size}"
    if isinstance(image, Video):
        return "/".join([*Path(image.label).parts[-2:], *(f"{key}={value}" for key, value in image.wanted.items())])
    return "/".join(Path(image).parts[-2:])


def _given(line: Mapping[str, Any], name: str) -> str | None:
    value = line.get(name)
    return None if value is None or value != value else str(value)  # a missing cell of a table is NaN


def with_options(line: Mapping[str, Any]) -> str:
    """Hint, question, options, and a request for the letter alone."""
    options = [f"{name}. {text}" for name in string.ascii_uppercase if (text := _given(line, name)) is not None]
    ending = "Answer with the letter of the right option only."
    return "\n".join(piece for piece in (_given(line, "hint"), str(line["question"]), *options, ending) if piece)


def question_only(line: Mapping[str, Any]) -> str:
    """The question as it is."""
    return str(line["question"])


TINY_BENCHMARK = "VilavtTinyHeldout"
"""Made by `tiny_benchmark`."""

CUSTOM_PROMPTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    **dict.fromkeys(("HRBench4K", "HRBench8K", "VStarBench", "MMSIBench_circular"), with_options),
    TINY_BENCHMARK: question_only,
}
"""Benchmarks whose options are in columns A, B, …; the others know best how to ask, with options, units and images."""
