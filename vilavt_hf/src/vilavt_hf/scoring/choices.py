"""Answers that pick one of a few: option letters, yes or no."""

from __future__ import annotations

import re

from ..errors import ScoringError
from .text import normalise

# Blanks are taken whole (*+, ++): no letter, word or mark begins with one, and giving them back piece by piece to three
# parts in a row would cost their number cubed.
_LEAD = r"(?:(?:the\s++)?(?:correct\s++|final\s++)?(?:answer|option|choice)\s*+(?:is)?\s*+:?\s*+)?"
_LETTER = re.compile(
    rf"^\W*?{_LEAD}[(\[]?(?P<letter>[A-Za-z])(?P<mark>[)\].:,]+|$)(?P<rest>.*)$", re.DOTALL | re.IGNORECASE
)
_OTHER_MARK = re.compile(
    r"(?<![A-Za-z])(?:[(\[][A-Za-z][)\]]|[A-Z][).:])|^\W*[A-Za-z]\W*$|(?<![A-Za-z])[A-Z](?=\s*(?:,|/|&|$))"
)

_VERDICTS = {"true": "yes", "false": "no"}


def option_letter(text: str) -> str | None:
    """The letter an answer picks, upper case, or None if it picks none or several.

    A letter counts alone (``B``), in brackets (``(B)``, ``[b]``), or with a mark before the option's text (``B. left``,
    ``B) left``, ``B: left``), with or without "the answer is" before it and Markdown stars around it. A word's first
    letter is none (``Apple``, ``A cat``), and a second option mark makes the answer no choice (``A. B. C.``).
    """
    match = _LETTER.match(text.strip().replace("*", "").strip())
    if match is None:
        return None
    rest = match["rest"].strip()
    if rest and _OTHER_MARK.search(rest):
        return None
    return match["letter"].upper()


def _option_text(text: str) -> str:
    """What stands after the letter; the whole text if there is none."""
    match = _LETTER.match(text.strip())
    return normalise(match["rest"] if match else text)


def target_option(target: str) -> str | None:
    """The letter of a right answer; None if it is an option's text alone.

    Raises:
        ScoringError: it is neither.
    """
    letter = option_letter(target)
    if letter is None and not normalise(target):
        raise ScoringError(f"the target {target!r} of a multiple choice question names no option")
    return letter


def same_option(prediction: str, target: str) -> float:
    """1.0 if the prediction picks the target's option, else 0.0.

    The target may be a letter, a letter with the option's text, or the text alone; a prediction that is exactly the
    option's text is right too.

    Raises:
        ScoringError: the target is blank.
    """
    wanted = target_option(target)
    if normalise(prediction) and normalise(prediction) == normalise(target):
        return 1.0
    found = option_letter(prediction)
    if found is not None:
        return float(found == wanted)
    text = _option_text(target)
    return float(bool(text) and text == normalise(prediction))


def yes_or_no(text: str) -> str | None:
    """``yes`` or ``no`` if exactly that one word occurs, exactly once; else None. ``True`` and ``False`` count when
    they are the whole answer: in a sentence ("that is not true") they may mean the opposite."""
    words = re.findall(r"\b(?:yes|no)\b", text.lower()) or [_VERDICTS.get(normalise(text))]
    return words[0] if len(words) == 1 else None


def target_verdict(target: str) -> str:
    """Whether the right answer is ``yes`` or ``no``.

    Raises:
        ScoringError: it is neither, or both.
    """
    verdict = yes_or_no(target)
    if verdict is None:
        raise ScoringError(f"the target {target!r} of a judgment must be yes or no, or true or false")
    return verdict


def same_verdict(prediction: str, target: str) -> float:
    """1.0 if both say yes or both say no, else 0.0.

    Raises:
        ScoringError: the target is neither yes nor no, or both.
    """
    return float(yes_or_no(prediction) == target_verdict(target))
