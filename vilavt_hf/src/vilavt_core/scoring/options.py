"""The options of a question: with letters and without, as a list and as lines of the question."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ScoringError
from .chinese import half_width

_OWN_LETTER = re.compile(r"^\s*[(\[（【]?(?P<letter>[A-Za-zＡ-Ｚ])[)\].:、）】．：]")
_LINE = re.compile(r"^[ \t]*[(\[（【]?(?P<letter>[A-ZＡ-Ｚ])[)\].:、）】．：][ \t]*(?P<text>\S.*)$", re.MULTILINE)


def bare_option(option: str) -> str:
    """An option without the letter before it: ``left`` for ``B. left`` and ``(B) left``."""
    match = _OWN_LETTER.match(option)
    return (option[match.end() :] if match else option).strip()


def with_letters(options: Sequence[str]) -> tuple[str, ...]:
    """Options, each with its letter: as they are if they begin with A, B, … in order, else ``A. …``, ``B. …``.

    Raises:
        ScoringError: there are more options than letters.
    """
    if len(options) > len(string.ascii_uppercase):
        raise ScoringError(f"{len(options)} options are listed, there are {len(string.ascii_uppercase)} letters")
    letters = string.ascii_uppercase[: len(options)]
    own = [half_width(match["letter"]).upper() if (match := _OWN_LETTER.match(option)) else None for option in options]
    if own == list(letters):
        return tuple(options)
    return tuple(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))


def read_options(value: Any) -> tuple[str, ...]:
    """Options of a record as data holds them, with letters: a list of texts, or an object from A, B, … to texts.

    Empty for None and for an empty list.

    Raises:
        ScoringError: it is neither, or holds something that is no text.
    """
    if value is None:
        return ()
    if isinstance(value, Mapping):
        letters = string.ascii_uppercase[: len(value)]
        if list(value) != list(letters):
            raise ScoringError(
                f"options are named {', '.join(map(str, value))}; they must be A, B, … in order, or a list"
            )
        value = list(value.values())
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ScoringError(f"options are a {type(value).__name__}; they must be a list of texts")
    if wrong := next((option for option in value if not isinstance(option, str) or not option.strip()), None):
        raise ScoringError(f"option {wrong!r} must be a text")
    if len(value) == 1:
        raise ScoringError("there is one option only; there must be at least 2")
    return with_letters(value)


def listed_options(question: str) -> tuple[str, ...]:
    """The options that a question lists in its text, one to a line: ``A. left``, ``(A) left``, ``A: left``.

    Empty if it lists none so: letters must run from A in order, each once, on lines that follow each other.
    """
    found, end = list[str](), -1
    for match in _LINE.finditer(question):
        expected = string.ascii_uppercase[len(found)] if len(found) < len(string.ascii_uppercase) else ""
        if half_width(match["letter"]) != expected or (found and question[end : match.start()].strip()):
            return ()
        found.append(f"{expected}. {match['text'].strip()}")
        end = match.end()
    return tuple(found) if len(found) > 1 else ()
