"""Numbers in answers: read with signs, separators, fractions, units; compared exactly or by relative error."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass

from ..errors import ScoringError

_NUMBER = re.compile(
    r"""(?<![\w.,^/])(?P<sign>[-+]?)\s?(?P<currency>[$€£¥]?)\s?
    (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
    (?:\s?/\s?(?P<over>\d+(?:\.\d+)?)|\s?(?:[eE]|[x×]\s?10\s?\^\s?)\{?(?P<exponent>[-+]?\d{1,3})\}?)?
    (?![\d]|[.,/]\d)""",
    re.VERBOSE,
)
_UNIT = re.compile(r"\s?(?P<unit>%|°\s?[CF]?|[^\W\d_]+(?:\s?/\s?[^\W\d_]+)?(?:\s?\^?[23²³])?)")
_UNITS = {
    "percent": "%",
    "meter": "m",
    "metre": "m",
    "centimeter": "cm",
    "centimetre": "cm",
    "millimeter": "mm",
    "millimetre": "mm",
    "kilometer": "km",
    "kilometre": "km",
    "foot": "ft",
    "feet": "ft",
    "inch": "in",
    "inche": "in",
    "second": "s",
    "minute": "min",
    "hour": "h",
    "degree": "°",
    "gram": "g",
    "kilogram": "kg",
    "kilo": "kg",
}
_KNOWN_UNITS = {*_UNITS.values(), "$", "€", "£", "¥"}
MAX_CHARS = 200
"""A longer answer is no number."""

THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))
"""Of the mean relative accuracy: 0.50, 0.55, … 0.95 (VSI-Bench)."""


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: float
    decimals: int
    """Digits after the point; 3 for a fraction that is not whole."""
    unit: str = ""
    """One of a few units that matter (``m``, ``cm``, ``%``, ``$`` …), else empty."""


def parse_number(text: str) -> Number | None:
    """The one number in an answer, or None if there is none, or more than one.

    Read are signs, thousands separators (``1,234``), decimals, fractions (``3/4``), ``1.5e3`` and ``1.5 × 10^3``,
    currencies, percent signs and units. ``3-4``, ``3 or 4`` and ``3,4`` are two numbers; ``m2`` and ``m^2`` are none.
    """
    text = text.strip().replace("−", "-").replace("\\%", "%").replace("\\$", "$")
    if not text or len(text) > MAX_CHARS:
        return None
    match = _NUMBER.search(text)
    # What is left may hold the digit of a unit (m2, m^2), but no second number.
    if match is None or re.search(r"(?<![^\W\d_])(?<!\^)\d", text[: match.start()] + " " + text[match.end() :]):
        return None
    digits = match["digits"].replace(",", "")
    value = float(digits)
    decimals = len(digits.partition(".")[2])
    if match["over"] is not None:
        if float(match["over"]) == 0:
            return None
        value /= float(match["over"])
        decimals = 0 if value.is_integer() else 3
    if match["exponent"] is not None:
        value = float(f"{digits}e{match['exponent']}")
        decimals = max(0, decimals - int(match["exponent"]))
    if not math.isfinite(value):
        return None
    unit = match["currency"]
    if not unit and (after := _UNIT.match(text, match.end())):
        unit = _unit(after["unit"])
    return Number(-value if match["sign"] == "-" else value, decimals, unit)


def _unit(word: str) -> str:
    plain = word.lower().replace("²", "2").replace("³", "3").replace("^", "").replace(" ", "")
    plain = _UNITS.get(plain) or _UNITS.get(plain.removesuffix("s")) or plain
    return plain if plain in _KNOWN_UNITS else ""


def target_number(target: str) -> Number:
    """The number of a right answer.

    Raises:
        ScoringError: there is none, or more than one.
    """
    number = parse_number(target)
    if number is None:
        raise ScoringError(f"the target {target!r} holds no number, or several; its question type must be another")
    return number


def _values(prediction: str, target: str) -> tuple[list[float], Number]:
    """What the prediction may mean, in the target's unit; and the target.

    A percent sign on one side only may mean the number before it or a hundredth of it. Two different units never agree.
    """
    wanted, found = target_number(target), parse_number(prediction)
    if found is None or (found.unit and wanted.unit and found.unit != wanted.unit):
        return [], wanted
    if found.unit == "%" and not wanted.unit:
        return [found.value, found.value / 100], wanted
    return [found.value], wanted


def same_number(prediction: str, target: str) -> float:
    """1.0 if the prediction is the target, else 0.0.

    A whole target is met exactly; one with decimals to half a unit of its last one: ``3.14`` by 3.141, not by 3.15.

    Raises:
        ScoringError: the target is no number.
    """
    values, wanted = _values(prediction, target)
    room = 0.5 * 10.0**-wanted.decimals if wanted.decimals else 0.0
    room += 1e-9 * max(1.0, abs(wanted.value))
    return float(any(abs(value - wanted.value) <= room for value in values))


def regression_score(prediction: str, target: str) -> float:
    """Mean relative accuracy of the number in the prediction.

    Raises:
        ScoringError: the target is no number.
    """
    values, wanted = _values(prediction, target)
    return max((mean_relative_accuracy(value, wanted.value) for value in values), default=0.0)


def mean_relative_accuracy(prediction: float, target: float, *, inclusive: bool = True) -> float:
    """Share of the thresholds θ with ``|p - t| / (|t| + 1e-8) <= 1 - θ``, in tenths.

    Args:
        prediction: p.
        target: t.
        inclusive: False compares with ``<``, as the published reward does; the published evaluation uses ``<=``.

    Both sides are rounded to single precision first, as the published code does: that decides the boundaries.
    """
    if not (math.isfinite(prediction) and math.isfinite(target)):
        return 0.0
    error = _single(min(abs(prediction - target) / (abs(target) + 1e-8), 1e30))
    met = sum(error <= bound if inclusive else error < bound for bound in _BOUNDS)
    return met / len(THRESHOLDS)


def _single(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


_BOUNDS = tuple(_single(1 - _single(threshold)) for threshold in THRESHOLDS)
