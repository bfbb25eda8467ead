"""Changes of view as answers (SPAR-Bench): ``move_right:0.5,rotate_left:30``, compared axis by axis."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ..errors import ScoringError
from .chinese import half_width
from .numbers import mean_relative_accuracy

AXES = (
    ("move_right", "move_left"),
    ("move_up", "move_down"),
    ("move_forward", "move_backward"),
    ("rotate_right", "rotate_left"),
    ("rotate_up", "rotate_down"),
)
"""Positive and negative direction of each axis."""

_PAIR = re.compile(r"\s*(?P<key>\w+)\s*:\s*(?P<value>[-+]?(?:\d+(?:\.\d*)?|\.\d+))\s*")
_KNOWN = {name for axis in AXES for name in axis}


def parse_view_change(text: str) -> dict[str, float] | None:
    """Direction -> amount, or None if the text is anything but such pairs, or names a direction twice."""
    found: dict[str, float] = {}
    for part in half_width(text).strip().rstrip(".。").split(","):
        match = _PAIR.fullmatch(part)
        if match is None or match["key"].lower() not in _KNOWN or match["key"].lower() in found:
            return None
        found[match["key"].lower()] = float(match["value"])
    return found if all(map(math.isfinite, found.values())) else None


def axes_score(prediction: Mapping[str, float], target: Mapping[str, float]) -> float:
    """Mean over the five axes of the mean relative accuracy of the net amount; a target of 0 is met by 0 only."""
    nets = [
        [side.get(positive, 0.0) - side.get(negative, 0.0) for side in (prediction, target)]
        for positive, negative in AXES
    ]
    return sum(mean_relative_accuracy(found, wanted) for found, wanted in nets) / len(nets)


def target_view_change(target: str) -> dict[str, float]:
    """The change of view of a right answer.

    Raises:
        ScoringError: it is none.
    """
    view_change = parse_view_change(target)
    if view_change is None:
        known = ", ".join(name for axis in AXES for name in axis)
        raise ScoringError(f"the target {target!r} is no change of view; it must be name:number,… out of {known}")
    return view_change


def view_change_score(prediction: str, target: str) -> float:
    """`axes_score` of two texts; 0.0 for a prediction that cannot be read.

    Raises:
        ScoringError: the target cannot be read.
    """
    wanted = target_view_change(target)
    found = parse_view_change(prediction)
    return 0.0 if found is None else axes_score(found, wanted)
