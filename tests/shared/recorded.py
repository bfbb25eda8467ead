"""Recorded conversations without a model, and a reader of the pages they are shown on."""

from html.parser import HTMLParser

from vilavt_core.conversation import ShownImage, Turn
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn
from vilavt_core.viewer import Trace

WHOLE = (0.0, 0.0, 1.0, 1.0)


def original(index: int, **more) -> ShownImage:
    return ShownImage(index, "original", 200, 100, index, WHOLE, None, None, "", **more)


def crop(index: int, box, parent: int = 0, region=None, source: int = 0) -> ShownImage:
    region = region or tuple(value / size for value, size in zip(box, (200, 100) * 2, strict=True))
    return ShownImage(index, "crop", 56, 56, source, region, parent, box, "look")


def zoomed(*images: ShownImage, **more) -> Trace:
    """A trace whose first turn asked for all crops."""
    crops = [image for image in images if image.parent is not None]
    call = ToolCall(tuple(Region(image.parent, image.box) for image in crops), "look", "I think")
    turns = (
        Turn(0, format_turn(call), call, 20, image_indices=tuple(image.index for image in crops), seconds=0.5),
        Turn(1, "<answer>seven</answer>", Answer("seven"), 5, seconds=0.25),
    )
    return Trace("Which?", turns, images, answer="seven", finish="answer", **more)


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of the script."""

    def __init__(self, source: str):
        super().__init__()
        self.found, self.script, self._inside = [], "", False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._inside = tag == "script"

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        self.script += data if self._inside else ""

    def with_class(self, name: str) -> list[dict]:
        return [attrs for _, attrs in self.found if name in (attrs.get("class") or "").split()]
