"""Boxes as answers: read, and compared by intersection over union."""

from __future__ import annotations

import math
import re

from ..errors import ScoringError
from ..protocol import Box, unbox

MIN_IOU = 0.5
"""Least overlap that counts, as in grounding benchmarks; below it a box around everything would earn."""

MAX_CHARS = 500
"""A longer answer is no box; its end is read like its beginning, where another box may stand."""

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")


def parse_box(text: str) -> Box | None:
    """``(x1, y1, x2, y2)`` if the text holds exactly four numbers with x1 < x2 and y1 < y2; key names are ignored."""
    text = unbox(text).strip()
    if len(text) > MAX_CHARS:
        return None
    plain = re.sub(r"[A-Za-z_]\w*", " ", text)
    values = [float(number) for number in _NUMBER.findall(plain)]
    if len(values) != 4 or not all(map(math.isfinite, values)):
        return None
    x1, y1, x2, y2 = values
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def iou(a: Box, b: Box) -> float:
    """Area of the intersection over the area of the union, 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def target_box(target: str) -> Box:
    """The box of a right answer.

    Raises:
        ScoringError: it is none.
    """
    box = parse_box(target)
    if box is None:
        raise ScoringError(f"the target {target!r} is no box; it must be [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    return box


def box_score(prediction: str, target: str) -> float:
    """The overlap of the predicted box with the target, 0.0 below `MIN_IOU`.

    Raises:
        ScoringError: the target is no box.
    """
    wanted = target_box(target)
    found = parse_box(prediction)
    overlap = iou(found, wanted) if found is not None else 0.0
    return overlap if overlap >= MIN_IOU else 0.0
