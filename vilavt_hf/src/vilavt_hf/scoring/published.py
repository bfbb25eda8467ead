"""What the published reward gives for an answer, its accidents included: for reproduction only.

Its weak spots, each a test: the first character alone decides a multiple choice; "yes or no" agrees with both; an
expression equals only its own spelling; a percent sign or a unit makes a number unreadable; a target of 0 cannot be
met.
"""

from __future__ import annotations

import re

from .numbers import mean_relative_accuracy


def score(prediction: str, target: str, question_type: str) -> float:
    """0 to 1; 0 for a blank side or a type it does not know."""
    prediction, target = prediction.strip(), target.strip()
    if not prediction or not target:
        return 0.0
    kind = question_type.strip().lower()
    if kind == "multiple choice":
        return float(prediction[0].lower() == target[0].lower())
    if kind in ("numerical", "regression"):
        found, wanted = plain_number(prediction), plain_number(target)
        return 0.0 if found is None or wanted is None else mean_relative_accuracy(found, wanted, inclusive=False)
    if kind == "judgment":
        return float(bool(_verdicts(prediction) & _verdicts(target)))
    if kind == "math":  # math_verify compares two unparsed strings by their characters
        return float(prediction == target)
    return 0.0


def plain_number(text: str) -> float | None:
    """What ``float`` reads once commas are gone."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _verdicts(text: str) -> set[str]:
    return set(re.findall(r"\b(?:yes|no)\b", text.lower()))
