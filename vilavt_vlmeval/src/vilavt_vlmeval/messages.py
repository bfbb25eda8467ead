"""From a benchmark's message to a question: texts and images in the order they came."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vilavt_core.protocol import IMAGE_MARK

from .errors import MessageError

INDEX = "vilavt_index"
"""Key of a message's last item: the row it was made from. The toolkit hands items through as they are."""


@dataclass(frozen=True)
class BenchmarkQuestion:
    """What is asked of the model."""

    text: str
    images: tuple[str | Image.Image, ...] = ()
    id: str | None = None
    """Of the sample; None: `sample_id` makes one."""

    @property
    def sample_id(self) -> str:
        """The row's index, else the first image's folder and name, and 8 hex digits of everything that is asked:
        questions may share an image, and the same question must have the same id in every run on every machine.
        """
        if self.id is not None:
            return self.id
        names = ["/".join(Path(i).parts[-2:]) if isinstance(i, str) else f"{i.size}" for i in self.images]
        digest = hashlib.sha256("\0".join([self.text, *names]).encode("utf-8", "replace")).hexdigest()[:8]
        return f"{names[0]}-{digest}" if names else digest

    def digest(self) -> str:
        """SHA-256 (hex) of the text and of what is in the images."""
        whole = hashlib.sha256(self.text.encode("utf-8", "replace"))
        for image in self.images:
            data = Path(image).read_bytes() if isinstance(image, str) else f"{image.size}".encode() + image.tobytes()
            whole.update(hashlib.sha256(data).digest())
        return whole.hexdigest()


def question_of(message: Sequence[Mapping[str, Any]]) -> BenchmarkQuestion:
    """A message (items of ``type`` text or image and ``value``) as a question.

    Images that stand between texts leave an ``<image>`` mark where they stood: the preset ``eval-hf`` puts them back
    there, the others show all images first and leave the marks in the text, as the published vLLM evaluation does.

    Raises:
        MessageError: an item is neither text nor image.
    """
    if odd := [item["type"] for item in message if item["type"] not in ("text", "image")]:
        raise MessageError(
            f"the message holds a {odd[0]}; ViLaVT is shown frames as images: use a variant of the benchmark with a "
            "number of frames, e.g. VSI-Bench_32frame"
        )
    kinds = [item["type"] for item in message]
    images = tuple(_image(item["value"]) for item in message if item["type"] == "image")
    between = len(images) > 1 and "image" in kinds[kinds.index("text") :] if "text" in kinds else False
    pieces = [str(item["value"]) if item["type"] == "text" else IMAGE_MARK for item in message]
    text = "\n".join(piece for piece, kind in zip(pieces, kinds, strict=True) if between or kind == "text")
    index = next((item[INDEX] for item in message if INDEX in item), None)
    return BenchmarkQuestion(text, images, None if index is None else str(index))


def _image(value: Any) -> str | Image.Image:
    return value if isinstance(value, Image.Image) else str(value)


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
