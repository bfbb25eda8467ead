"""Numbers in answers: read with signs, separators, fractions, units; compared exactly or by relative error."""

from __future__ import annotations

import math
import re
import struct
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from ..errors import ScoringError
from .chinese import plain_number_words

_NUMBER = re.compile(
    r"""(?<![\w.,^/-])(?P<sign>[-+]?)(?P<gap>\s?)(?P<currency>[$€£¥]?)\s?(?:(?P<whole>\d+)\s(?=\d+\s?/\s?\d))?
    (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
    (?:\s?/\s?(?P<over>\d+(?:\.\d+)?)|\s?(?:[eE]|[x×·]\s?10\s?\^\s?)\{?(?P<exponent>[-+]?\d{1,3})\}?)?
    (?![\d]|[.,/]\d)""",
    re.VERBOSE,
)
_UNIT = re.compile(
    r"""\s?(?:[%$€£¥]|°\s?[CF]?(?!\w)
    |(?:(?P<power>square|sq|cubic|cu)\.?\s)?(?P<name>[^\W\d_]+)(?:\s?(?:/|per\b)\s?(?P<per>[^\W\d_]+))?
    (?:(?:\s?\^\s?\{?)?(?P<exponent>[23])\}?)?(?!\w))""",
    re.VERBOSE | re.IGNORECASE,
)
_UNITS = {
    "m": "meter metre",
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "km": "kilometer kilometre",
    "ft": "foot feet",
    "in": "inch inche",
    "yd": "yard",
    "mi": "mile",
    "s": "second sec",
    "min": "minute",
    "h": "hour hr",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr",
    "°": "degree deg",
    "g": "gram",
    "kg": "kilogram kilo",
    "lb": "pound",
    "oz": "ounce",
    "l": "liter litre",
    "ml": "milliliter millilitre",
    "px": "pixel",
    "%": "percent",
    "$": "dollar",
    "€": "euro",
    "km/h": "kmh kph",
    "mi/h": "mph",
}
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in (unit, *names.split())}
_POWERS = {"2": "²", "3": "³", "square": "²", "sq": "²", "cubic": "³", "cu": "³"}
_NO_MORE = re.compile(
    r"(?:^|\s)[<>≤≥]=?\s?$|\b(?:(?:less|more|fewer|greater|larger|smaller|longer|shorter|farther|closer) than"
    r"|at (?:least|most)|not|isn't|aren't)(?: (?:about|exactly))? ?$"
    r"|(?:不是|并非|至少|至多|最多|最少|超过|超過|不足|不到|[多少大小高低]于|[多少大小高低]於)\s?$",
    re.IGNORECASE,
)
"""Before a number: it is not meant, or only a bound of it."""
NUMBER_WORD = re.compile(
    r"\b(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|dozen|hundred|thousand|[mb]illion|half|minus|negative)\b",
    re.IGNORECASE,
)
"""A number in words, or a sign: beside digits it makes another number of them, or is a second one."""
_FRACTIONS = {
    chr(code): "/".join(map(str, Fraction(unicodedata.numeric(chr(code))).limit_denominator(10).as_integer_ratio()))
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))
}
"""½ and its like -> 1/2."""
_GROUPS = re.compile(
    r"(?<![\w.,/^])(\d{1,3})((?:[ \u00a0\u2007\u2009\u202f]\d{3})+)(?![\d/]|\s?/|,\d|[ \u00a0\u2007\u2009\u202f]\d)"
)
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORD_VALUES = (
    {word: value for value, word in enumerate((_ONES + " eighteen nineteen").split())}
    | {word: 10 * tens for tens, word in enumerate(_TENS.split(), 2)}
    | {word: value for value, word in enumerate("零一二三四五六七八九十")}
    | {"两": 2}
)
_TWICE = re.compile(
    r"(?<![\d.,])(?P<digits>\d+) ?\( ?(?P<gloss>[^\W\d_]+(?:[- ][a-z]+)?) ?\)"
    r"|(?<![^\W\d_])(?P<word>[^\W\d_]+(?:-[a-z]+)?) ?\( ?(?P<after>\d+) ?\)",
    re.IGNORECASE,
)
_SPELLINGS = (
    (re.compile(f"\\s?([{''.join(_FRACTIONS)}])"), lambda match: f" {_FRACTIONS[match[1]]}"),
    (re.compile(r"(?<=\d)\u2044(?=\d)"), "/"),
    (_GROUPS, lambda match: match[1] + re.sub(r"\s", ",", match[2])),
    (re.compile(r"[−–—]"), "-"),
    (re.compile("²"), "^2"),
    (re.compile("³"), "^3"),
    (re.compile(r"\\([%$])|\\(?:text|mathrm)\s?\{([^{}]*)\}|\*\*"), r"\1\2"),
    (re.compile(r"(?<=\d)(?:\\[,!]|\{,\})(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\[,;:! ]|~|\\(?:approx|sim)\b"), " "),
    (re.compile(r"\\(?:times|cdot)\b"), "×"),
    (re.compile(r"\s?\^\s?\{?\\circ\}?|\s?\\degree\b"), "°"),
    (re.compile(r"\\[dtc]?frac\s?(?:\{\s?(\d+)\s?\}|(\d))\s?(?:\{\s?(\d+)\s?\}|(\d))"), r" \1\2/\3\4"),
    (re.compile(r"^(?:\$\$?|\\\()(.*?)(?:\$\$?|\\\))$"), r"\1"),
    (re.compile(r"\b(?:minus|negative)\s(?=[\d.$€£¥])", re.IGNORECASE), "-"),
    (re.compile(r"\s+"), " "),
)
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
    """One of those that matter (``m``, ``cm``, ``m²``, ``%``, ``$`` …), else empty."""


def parse_number(text: str) -> Number | None:
    """The one number in an answer, or None if there is none, or more than one.

    Read are signs (``minus`` too), thousands separators (``1,234``), decimals, fractions (``3/4``, ``1 1/2``,
    ``2½``, ``\\frac{3}{4}``), ``1.5e3`` and ``1.5 × 10^3``, currencies, percent signs and units, in English and in
    Chinese (``约3米``, ``百分之50``). Blanks between groups of three digits separate thousands (``1 234``). A number
    may be repeated in words, in brackets (``3 (three)``). ``3-4``, ``3 or 4``, ``3 or four``, ``3 (four)`` and ``3,4``
    are two numbers; what has to be calculated (``2^3``, ``√9``), a bound (``> 3``, ``at least 3``) and what is denied
    (``not 3``) are none.
    """
    text = text.strip()
    if len(text) > MAX_CHARS:
        return None
    text = plain_number_words(text)
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text).strip()
    text = _TWICE.sub(_once, text)
    match = _NUMBER.search(text)
    if match is None:
        return None
    before, unit, end = text[: match.start()], match["currency"], match.end()
    if (match["sign"] and match["gap"] and before.strip()) or _NO_MORE.search(before):
        return None  # a dash between words or a sign; more or less than the number
    if after := _UNIT.match(text, end):
        named = _unit(after)
        if after["exponent"] and not named:
            return None
        unit, end = unit or named, after.end()
    words, rest = before + text[match.end() :], before + text[end:]
    if NUMBER_WORD.search(words) or any(c.isnumeric() and not c.isdecimal() for c in words):
        return None  # 3 or four, 3½
    if any(c.isdecimal() or c in "^√∛π±+\\" for c in rest):
        return None
    value, decimals = _value(match)
    if not math.isfinite(value):
        return None
    return Number(-value if match["sign"] == "-" else value, decimals, unit)


def _once(match: re.Match[str]) -> str:
    """A number that is said in digits and in words, in digits; as it is if both differ."""
    digits, words = match["digits"] or match["after"], match["gloss"] or match["word"]
    values = [_WORD_VALUES.get(part, -1) for part in re.split("[- ]", words.lower())]
    if min(values) < 0 or (len(values) == 2 and not (values[0] % 10 == 0 < values[1] < 10 < values[0])):
        return match[0]
    return digits if sum(values) == int(digits) else match[0]


def _value(match: re.Match[str]) -> tuple[float, int]:
    """What the digits of a number say, and how many decimals; not a number if they make none."""
    digits = match["digits"].replace(",", "")
    decimals = len(digits.partition(".")[2])
    if match["exponent"] is not None:
        return float(f"{digits}e{match['exponent']}"), max(0, decimals - int(match["exponent"]))
    if match["over"] is None:
        return float(digits), decimals
    whole, part, over = float(match["whole"] or 0), float(digits), float(match["over"])
    if over == 0 or (match["whole"] and part >= over):
        return math.nan, 0
    value = whole + part / over
    return value, 0 if value.is_integer() else 3


def _unit(match: re.Match[str]) -> str:
    """The unit that was read, as `Number` has it."""
    if match["name"] is None:
        return match[0].replace(" ", "").upper()
    names = [
        _UNIT_OF.get(plain) or _UNIT_OF.get(plain.removesuffix("s"), "")
        for plain in (match["name"].lower(), (match["per"] or "").lower())
    ]
    if not names[0] or (match["per"] and not names[1]):
        return ""
    unit = f"{names[0]}/{names[1]}" if match["per"] else names[0]
    return unit + _POWERS.get((match["exponent"] or match["power"] or "").lower(), "")


def target_number(target: str) -> Number:
    """The number of a right answer.

    Raises:
        ScoringError: there is none, or more than one.
    """
    number = parse_number(target)
    if number is None:
        raise ScoringError(f"the target {target!r} holds no number, or several; its question type must be another")
    return number


def meanings(found: Number, wanted: Number) -> list[float]:
    """What a number may mean, in another's unit; nothing if the units differ.

    A percent sign on one side only may mean the number before it or a hundredth of it.
    """
    if found.unit and wanted.unit and found.unit != wanted.unit:
        return []
    if found.unit == "%" and not wanted.unit:
        return [found.value, found.value / 100]
    if wanted.unit == "%" and not found.unit:
        return [found.value, found.value * 100]
    return [found.value]


def _values(prediction: str, target: str) -> tuple[list[float], Number]:
    """What the prediction may mean, in the target's unit; and the target."""
    wanted, found = target_number(target), parse_number(prediction)
    return [] if found is None else meanings(found, wanted), wanted


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
