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


def same_option(prediction: str, target: str) -> float:
    """1.0 if the prediction picks the target's option, else 0.0.

    The target may be a letter, a letter with the option's text, or the text alone; a prediction that is exactly the
    option's text is right too.

    Raises:
        ScoringError: the target is blank.
    """
    if not target.strip():
        raise ScoringError("the target of a multiple choice question is blank; it must name an option")
    if normalise(prediction) and normalise(prediction) == normalise(target):
        return 1.0
    wanted = option_letter(target)
    if wanted is None:
        return 0.0
    found = option_letter(prediction)
    if found is not None:
        return float(found == wanted)
    text = _option_text(target)
    return float(bool(text) and text == normalise(prediction))


def yes_or_no(text: str) -> str | None:
    """``yes`` or ``no`` if exactly that one word occurs, exactly once; else None."""
    words = re.findall(r"\b(?:yes|no)\b", text.lower())
    return words[0] if len(words) == 1 else None
