"""Answers that pick one of a few: option letters, yes or no."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from ..errors import ScoringError
from .text import normalise

# Every pattern is matched against text whose blanks are single, and none has two ways to match the same text, so that
# the time grows with the length only.
_LATEX = re.compile(r"\\(?:text|mathrm|mathbf)[a-z]{0,6}\{([^{}]*)\}|\\[()\[\]]")
_QUOTES = re.compile(r"[*`$\"“”„«»]|(?<!\w)['‘’]|['‘’](?!\w)")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my) )?(?:(?:correct|right|best|final) ){0,2}"
    r"(?:answer|option|choice)\b(?: is\b)? ?:? ?(?:(?:option|choice)\b ?:?)?",
    re.IGNORECASE,
)
_LETTER = re.compile(
    r"[(\[{]? ?(?P<letter>[A-Za-z])(?: ?[)\]}>.:,!][)\]}>.:,! ]*| ?[-–—](?: |$)|$|(?P<blank> ))(?P<rest>.*)"
)
# A letter that is no part of a word (X-ray, it's), and no unit (3 m).
_ALONE = re.compile(r"(?<![\w'’])(?<!\d )[A-Za-z](?!\w|['’]\w|-\w\w)")
# Before a letter: what sets it off from the text; at the start of a sentence; after it: what makes it an option's.
_SEPARATOR = re.compile(
    r"(?:[,;/|&+(\[]|\b(?:or|and|nor|then|not|maybe|perhaps|possibly|vs|versus|either|both|option|choice|answer)) ?$",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?:^|[.:!?] ) ?$")
_MARK = re.compile(r" ?[)\].:]| [-–—] ")
_WORD = re.compile(r" [^\W\d_]{2}")
_SEVERAL = re.compile(r"[A-Za-z](?: ?(?:[,;/&]|\b(?:and|or)\b) ?[A-Za-z])+")
_REACH = 12
"""Characters before a letter that tell what it is."""
_VERDICTS = {"true": "yes", "false": "no"}


@dataclass(frozen=True)
class Option:
    """An option as a right answer names it."""

    letter: str | None
    """Upper case; None: it is the text alone."""
    text: str
    """Normalised; empty if it is the letter alone."""


def option_letter(text: str) -> str | None:
    """The letter an answer picks, upper case, or None if it picks none or several.

    A letter counts alone (``B``), in brackets (``(B)``, ``[b]``), or with a mark before the option's text (``B. left``,
    ``B) left``, ``B: left``, ``B - left``), and a capital one without a mark unless it may be a word (``B left``, not
    ``A cat``). "The answer is" may stand before it, and quotes, Markdown stars and ``$`` around it.

    Another letter makes the answer no choice if it is set off like an option's: by a mark after it, or by a separator
    or a word such as "or" before it (``A. B. C.``, ``A. left or b``). The last word of an option's text is none
    (``A. Vitamin C``), nor is the article ``a``.
    """
    match = _read(text)
    if match is None:
        return None
    letter, rest = match["letter"], match["rest"].rstrip(" .,;:!?")
    if match["blank"] and (not letter.isupper() or (letter in "AI" and not rest.startswith(("is ", "because ")))):
        return None
    if any(_is_option(rest, found, strict=bool(match["blank"])) for found in _ALONE.finditer(rest)):
        return None
    return letter.upper()


def _plain(text: str) -> str:
    """Without LaTeX, quotes and stars around things; lines are sentences; single blanks."""
    text = _QUOTES.sub("", _LATEX.sub(lambda match: match[1] or "", unicodedata.normalize("NFKC", text)))
    return " ".join(". ".join(line for line in text.splitlines() if line.strip()).split())


def _read(text: str) -> re.Match[str] | None:
    plain = re.sub(r"^[^\w(\[{]+", "", _plain(text))
    if lead := _LEAD.match(plain):
        plain = re.sub(r"^[^\w(\[{]+", "", plain[lead.end() :])
    return _LETTER.match(plain)


def _is_option(rest: str, found: re.Match[str], *, strict: bool) -> bool:
    """Whether a letter in the text after the first one is another option's. Strict: every one that is no article is."""
    letter, start, end = found[0], found.start(), found.end()
    before = rest[max(0, start - _REACH) : start]
    if letter in "aAI" and _WORD.match(rest, end) and (letter != "A" or (_SENTENCE.search(before) and not strict)):
        return False
    return strict or bool(_SENTENCE.search(before) or _SEPARATOR.search(before) or _MARK.match(rest, end))


def target_option(target: str) -> Option:
    """The option that a right answer names: a letter, a letter with the option's text, or the text alone.

    Raises:
        ScoringError: it names none, or several.
    """
    plain = _plain(target)
    match = _read(target)
    if _SEVERAL.fullmatch(plain) or (match is None and not normalise(plain)):
        raise ScoringError(
            f"the target {target!r} of a multiple choice question must name one option: its letter, its text, or both"
        )
    if match is None or match["blank"]:
        return Option(None, normalise(plain))
    return Option(match["letter"].upper(), normalise(match["rest"]))


def same_option(prediction: str, target: str) -> float:
    """1.0 if the prediction picks the target's option, else 0.0.

    Where the target has the option's text, a prediction that is exactly this text is right too.

    Raises:
        ScoringError: the target names no option, or several.
    """
    wanted, found = target_option(target), option_letter(prediction)
    if found is not None and wanted.letter is not None:
        return float(found == wanted.letter)
    if not wanted.text:
        return 0.0
    plain = _plain(prediction)
    # The whole target to the letter: `normalise` drops the article, so "A. B. left" would be "B. left".
    return float(normalise(plain) == wanted.text or plain.casefold() == _plain(target).casefold())


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
