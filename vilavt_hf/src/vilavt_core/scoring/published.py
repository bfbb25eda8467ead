"""What the published code gives for an answer, its accidents included: for reproduction only.

There are two sets of rules, the reward's and the evaluation's. Weak spots, each a test: the first character alone
decides a multiple choice; a percent sign or a unit makes a number unreadable. In the reward, "yes or no" agrees with
both, an expression equals only its own spelling, and a target of 0 cannot be met. In the evaluation, 3 is not 3.0, a
blank after a comma hides a direction, and an empty answer to a multiple choice ended the whole program.
"""

from __future__ import annotations

import re

from ..protocol import ANSWER_CLOSE, ANSWER_OPEN
from .numbers import mean_relative_accuracy
from .view_change import axes_score


def reward_score(prediction: str, target: str, question_type: str) -> float:
    """0 to 1 by the rules of the reward; 0 for a blank side or a type it does not know."""
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


def evaluation_score(prediction: str, target: str, question_type: str) -> float | None:
    """0 to 1 by the rules of the evaluation; 0 for a type it does not know, whose names are read to the letter.

    None: the published program ends with an error here, which is for a multiple choice with a blank side.
    """
    prediction, target = tagged_answer(prediction), tagged_answer(target)
    if question_type == "multiple choice":
        if not prediction.strip() or not target.strip():
            return None
        return float(prediction.strip()[0].lower() == target.strip()[0].lower())
    if question_type in ("numerical", "regression"):
        found, wanted = plain_number(prediction), plain_number(target)
        if found is None or wanted is None:
            return 0.0
        if question_type == "regression":
            return mean_relative_accuracy(found, wanted)
        alike = bool(re.search("[.,]", prediction)) == bool(re.search("[.,]", target))
        return float(alike and round(found, 2) == round(wanted, 2))
    if question_type == "vci":
        try:
            return axes_score(_plain_pairs(prediction), _plain_pairs(target))
        except ValueError:
            return 0.0
    return 0.0


def tagged_answer(text: str) -> str:
    """What the first ``<answer>`` holds, else the text as it is."""
    _, opened, rest = text.partition(ANSWER_OPEN)
    content, closed, _ = rest.partition(ANSWER_CLOSE)
    return content.strip() if opened and closed else text


def _plain_pairs(text: str) -> dict[str, float]:
    pairs = [item.split(":") for item in text.split(",")]
    return {key: float(value) for key, value in pairs}


def plain_number(text: str) -> float | None:
    """What ``float`` reads once commas are gone."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _verdicts(text: str) -> set[str]:
    return set(re.findall(r"\b(?:yes|no)\b", text.lower()))
