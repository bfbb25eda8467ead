"""Mathematical answers: equal as expressions, found by math_verify (the ``math`` extra)."""

from __future__ import annotations

import functools
import re
import threading
from typing import Any

from ..errors import ScoringError
from ..protocol import unbox

MAX_CHARS = 300
"""A longer answer is not parsed."""
SECONDS = 5
"""Time for one parse or comparison; can be enforced in the main thread only."""

_LIST = re.compile(r",(?!\d{3}(?!\d))")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
# Several answers in one, or numbers whose evaluation could run away in a thread that no timer stops.
_REFUSED = re.compile(
    r"\d\s+\d|[\w)}]\s*\|\s*\w|\$|\b(?:or|and)\b|[;\n]|\^[^\s]*\^|\*\*|\^\{?\s*-?\d{4,}|\d{4,}\s*!|!!|\d{40,}"
)


def bare(text: str) -> str:
    r"""The expression without ``\boxed{}`` and math delimiters around it."""
    text = unbox(text.strip()).strip().rstrip(".").strip()
    for opening, closing in _DELIMITERS:
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            return text[len(opening) : -len(closing)].strip()
    return text


def target_expression(target: str) -> str:
    """The expression of a right answer.

    Raises:
        ScoringError: it is blank.
    """
    expression = bare(target)
    if not expression:
        raise ScoringError(f"the target {target!r} of a math question holds no expression")
    return expression


def same_expression(prediction: str, target: str) -> float:
    """1.0 if both parse to equal expressions, else 0.0: ``1/2`` is ``0.5`` and ``\\frac12``. One expression counts; a
    list of guesses is none.

    Raises:
        ScoringError: math_verify is not installed, or the target is blank.
    """
    found, wanted = bare(prediction), target_expression(target)
    parse, verify, config = _math_verify()
    if found == wanted:
        return 1.0
    if (
        not found
        or len(found) > MAX_CHARS
        or _REFUSED.search(found)
        or (_LIST.search(found) and not _LIST.search(wanted))
    ):
        return 0.0
    # SIGALRM, which math_verify uses, works in the main thread only.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    sides = [
        parse(f"${side}$", extraction_config=[config], fallback_mode="no_fallback", parsing_timeout=seconds)
        for side in (wanted, found)
    ]
    return float(all(sides) and bool(verify(*sides, timeout_seconds=seconds)))


@functools.cache
def _math_verify() -> tuple[Any, Any, Any]:
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        raise ScoringError(
            'math questions are compared by math_verify, which is not installed; pip install "vilavt-hf[math]"'
        ) from None
    return parse, verify, LatexExtractionConfig()
