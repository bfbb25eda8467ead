"""Answers that pick one of a few options."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ScoringError
from .chinese import HAN, half_width, simplified, spaced
from .options import bare_option
from .text import normalise

# Every pattern is matched against text whose blanks are single, and none has two ways to match the same text, so that
# the time grows with the length only.
_LATEX = re.compile(r"\\(?:text|mathrm|mathbf)[a-z]{0,6}\{([^{}]*)\}|\\[()\[\]]")
_QUOTES = re.compile(r"[*`$\"“”„«»「」『』《》〈〉]|(?<!\w)['‘’]|['‘’](?!\w)")
_UNDERLINED = re.compile(r"(?<!\w)(__?)([A-Za-z])\1(?!\w)")
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:i (?:think|believe|guess|would say)(?: that)?,? )?"
    r"(?:(?:(?:the|my) )?(?:(?:correct|right|best|final) ){0,2}(?:answer|option|choice)\b(?: is\b)?"
    r"|it(?: is|['’]s)\b|i (?:would )?(?:choose|pick|select)\b) ?:? ?(?:(?:option|choice)\b ?:?)?",
    re.IGNORECASE,
)
_CHINESE_LEAD = re.compile(
    r"(?:(?:所以|因此|因而|故|综上所述|综上|我认为|我觉得|我|应该|应当|应|最终|最后|正确"
    r"|答案|选项|选择|选|的|了|是|为|就)[ :,]{0,3})+"
)
_LETTER = re.compile(
    r"[(\[{]? ?(?P<letter>[A-Za-z])"
    r"(?:(?P<mark> ?[)\]}>.:;,!?][)\]}>.:;,!? ]*| ?[-–](?: |$)| ?—+ ?|(?=\([^\W\d_]{2}))|$|(?P<blank> ))(?P<rest>.*)"
)
# A mark as between the letters of a list.
_LIST_MARK = re.compile("[,;]")
# A letter that is no part of a word (X-ray, it's), and no unit (3 m).
_ALONE = re.compile(r"(?<![\w'’])(?<!\d )[A-Za-z](?!\w|['’]\w|-\w\w)")
# Before a letter: what sets it off from the text; at the start of a sentence.
_SEPARATOR = re.compile(
    r"(?:[,;/|&+(\[]|\b(?:or|and|nor|then|not|maybe|perhaps|possibly|vs|versus|either|both|option|choice|answer)"
    r"|或|或者|还是|還是|和|与|與|及|可能|可能是|选|選|选项|選項|答案|答案是) ?$",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?:^|[.:!?] ) ?$")
# After a letter: what makes it an option's.
_BRACKET = re.compile(r" ?[)\]]| [-–—](?: |$)")
_POINT = re.compile(r" ?[.:]")
# Words before a letter that is the name of a thing in the image.
_NAMED = re.compile(
    r"\b(?:than|to|from|of|as|by|with|near|behind|above|below|beside|under|over|between"
    r"|and|or|nor|object|point|person) $",
    re.IGNORECASE,
)
_STATES = re.compile(r" (?:is|are|was|has|lies|looks|seems|stands|sits|appears)\b")
_WORD = re.compile(r" [^\W\d_]{2}")
_ONE = r"[(\[]?[A-Za-z][)\]]?"
_SEVERAL = re.compile(
    rf"{_ONE}(?: ?(?:[,;/&|+]|\b(?:and|or)\b|[和或与與及]) ?(?:(?:and|or) )?{_ONE}| {_ONE})+"
    r"|\([A-Za-z]\)(?:\([A-Za-z]\))+|(?=[A-H]{2,8}$)A?B?C?D?E?F?G?H?"
)
# The text of an option that is about other options or about things with letters: "Both A and B", "A, B and C".
_ABOUT_BOTH = re.compile(r"(?:both|either|neither|all|none|only)\b", re.IGNORECASE)
_LISTED = re.compile(r"[A-Za-z](?: ?[,;/] ?[A-Za-z])*,? ?(?:\b(?:and|or|nor)\b|[和或与與及]) ?[A-Za-z]", re.IGNORECASE)
_BARE_LIST = re.compile(rf"{_ONE}(?:[ ,;/&|.:-]+{_ONE})*[ -]*")
_REACH = 12
"""Characters before a letter that tell what it is."""


@dataclass(frozen=True)
class Option:
    """An option as a right answer names it."""

    letter: str | None
    """Upper case; None: it is the text alone."""
    text: str
    """Empty if it is the letter alone."""


def option_letter(text: str) -> str | None:
    """The letter an answer picks, upper case, or None if it picks none or several. The options are not known.

    A letter counts alone (``B``), in brackets (``(B)``, ``[b]``), or with a mark before the option's text (``B. left``,
    ``B) left``, ``B: left``, ``B - left``, ``B、左边``), and a capital one without a mark unless it may be a word
    (``B left``, not ``A cat``). "The answer is" or ``答案是`` may stand before it, and quotes, Markdown stars and ``$``
    around it.

    The text after a mark may begin with a letter, speak of letters, or be the letter again (``B. B is closer``, ``C.
    Both A and B``, ``C. C``). Another letter makes the answer no choice if it heads an option of its own (``A. left B.
    right``), if it is offered after a separator or a word such as "or" (``A. left or b``), or if letters are all there
    is (``A. B``, ``A, B``). The last word of an option's text is none (``A. Vitamin C``), nor is the article ``a``.
    """
    match = _LETTER.match(_without_lead(_plain(text)))
    return None if match is None else _letter_of(match)


def _letter_of(match: re.Match[str]) -> str | None:
    letter, rest = match["letter"], match["rest"].rstrip(" .,;:!?")
    if match["blank"] and rest.startswith(("because ", "since ")):
        return None if _names_another(letter, f"it {rest}", in_list=False) else letter.upper()
    if match["blank"]:
        word = letter in "AI" and not rest.startswith(("is ", "because "))
        if (not letter.isupper() or word) and not re.match(f"[{HAN}]", rest):
            return None
        if any(not _is_word(rest, found, strict=True) for found in _ALONE.finditer(rest)):
            return None
    elif _names_another(letter, rest, in_list=bool(_LIST_MARK.search(match["mark"] or ""))):
        return None
    return letter.upper()


def _plain(text: str) -> str:
    """Without LaTeX, quotes and stars around things; lines are sentences; single blanks; Chinese with our marks."""
    text = _LATEX.sub(lambda match: match[1] or "", half_width(unicodedata.normalize("NFKC", text)))
    text = spaced(_UNDERLINED.sub(r"\2", _QUOTES.sub("", text)))
    return " ".join(". ".join(line for line in text.splitlines() if line.strip()).split())


def _without_lead(plain: str) -> str:
    """Plain text without "the answer is" before it."""
    plain = re.sub(r"^[^\w(\[{]+", "", plain)
    if lead := _LEAD.match(plain) or _CHINESE_LEAD.match(simplified(plain)):
        plain = re.sub(r"^[^\w(\[{]+", "", plain[lead.end() :])
    return plain


def _is_word(rest: str, found: re.Match[str], *, strict: bool) -> bool:
    """Whether a letter by itself is an article or a pronoun."""
    if found[0] not in "aAI" or not _WORD.match(rest, found.end()):
        return False
    before = rest[max(0, found.start() - _REACH) : found.start()]
    return found[0] != "A" or (bool(_SENTENCE.search(before)) and not strict)


def _names_another(letter: str, rest: str, *, in_list: bool) -> bool:
    """Whether the text after an option's letter and mark names another option beside it.

    Args:
        letter: the option's.
        rest: the text.
        in_list: the mark is one as between the letters of a list.
    """
    again = _LETTER.match(rest)
    if again and again["letter"].upper() == letter.upper() and not again["blank"] and not in_list:
        if _LIST_MARK.search(again["mark"] or ""):
            return True
        rest = again["rest"]
        if not rest:
            return False
        if _BARE_LIST.fullmatch(rest):
            return True
    if not in_list and _LISTED.fullmatch(rest):
        return False
    letters = [found for found in _ALONE.finditer(rest) if not _is_word(rest, found, strict=False)]
    if not letters:
        return False
    first, begins = letters[0], letters[0].start() == 0
    if begins and (in_list or _BARE_LIST.fullmatch(rest)):
        return True
    if any(_heads(rest, found, begins) for found in letters):
        return True
    if begins or _ABOUT_BOTH.match(rest):
        return False
    before = rest[max(0, first.start() - _REACH) : first.start()]
    if _SENTENCE.search(before):
        return not _STATES.match(rest, first.end())
    return bool(_SEPARATOR.search(before))


def _heads(rest: str, found: re.Match[str], about_letters: bool) -> bool:
    """Whether a letter stands before an option's text. In a text about letters a sentence may end with one."""
    if _BRACKET.match(rest, found.end()):
        return True
    before = rest[max(0, found.start() - _REACH) : found.start()]
    return bool(_POINT.match(rest, found.end())) and not (about_letters and _NAMED.search(before))


def option_texts(options: Sequence[str]) -> dict[str, str]:
    """Letter -> text of options, plain, which are in the order of their letters."""
    return {
        letter: _plain(bare_option(option)) for letter, option in zip(string.ascii_uppercase, options, strict=False)
    }


def picked(prediction: str, texts: Mapping[str, str]) -> frozenset[str]:
    """Letters of the options that an answer picks: one, none, or those that share the text it gives.

    Args:
        prediction: the answer.
        texts: of the options that are known, see `option_texts`; no other is picked.

    A letter alone is that option. A text that is an option's is that option, also if it begins with a letter (``B is
    closer``). A letter with its own text, and a reason after it, is that option; with the text of another it is none.
    Everything else is read as by `option_letter`.
    """
    plain = _plain(prediction)
    body = _without_lead(plain)
    match = _LETTER.match(body)
    rest = "" if match is None else match["rest"].strip(" .,;:!?")
    if match is not None and not rest:
        return frozenset(match["letter"].upper()) & texts.keys()
    words = {letter: normalise(text) for letter, text in texts.items()}
    # Where a mark follows the letter, "A: B is closer" must not lose its A as an article.
    marked = match is not None and not match["blank"]
    said, exact = set() if marked else {normalise(plain), normalise(body)} - {""}, {plain.casefold(), body.casefold()}
    if named := frozenset(
        letter for letter, text in texts.items() if words[letter] in said or (text and text.casefold() in exact)
    ):
        return named
    if match is None:
        return frozenset()
    letter, own = match["letter"].upper(), texts.get(match["letter"].upper(), "")
    if own and not match["blank"] and rest.casefold().startswith(own.casefold()):
        reason = rest[len(own) :]
        if not re.match(r"\w", reason):
            return frozenset() if _names_another(letter, f"it{reason}", in_list=False) else frozenset(letter)
    if (said_text := normalise(rest)) in words.values() and said_text:
        return frozenset(letter) if words.get(letter) == said_text else frozenset()
    found = _letter_of(match)
    return frozenset(() if found is None else found) & texts.keys()


def target_option(target: str) -> Option:
    """The option that a right answer names: a letter, a letter with the option's text, or the text alone.

    Raises:
        ScoringError: it names none, or several, or is a number, which may be a text or a place in the list.
    """
    plain = _plain(target)
    match = _LETTER.match(_without_lead(plain))
    if _SEVERAL.fullmatch(plain) or (match is None and not normalise(plain)):
        raise ScoringError(
            f"the target {target!r} of a multiple choice question must name one option: its letter, its text, or both"
        )
    if match is None or match["blank"]:
        if normalise(plain).isdecimal():
            raise ScoringError(
                f"the target {target!r} of a multiple choice question may be an option's text or its place in the "
                "list; give its letter, or the question's options, of which it must be one"
            )
        return Option(None, plain)
    return Option(match["letter"].upper(), match["rest"].strip(" .,;:!?"))


def target_letters(target: str, options: Sequence[str]) -> frozenset[str]:
    """Letters of the options that a right answer names, where all options are known; several if they share a text.

    Raises:
        ScoringError: it names none of them, or a letter and the text of another.
    """
    texts = {letter: normalise(text) for letter, text in option_texts(options).items()}
    plain = _plain(target)
    match = _LETTER.match(plain)
    if match is not None and not match["blank"] and match["letter"].upper() in texts:
        letter, words = match["letter"].upper(), normalise(match["rest"])
        if words in ("", texts[letter]):
            return frozenset(letter)
    if named := frozenset(letter for letter, text in texts.items() if text and text == normalise(plain)):
        return named
    raise ScoringError(
        f"the target {target!r} is none of the options {', '.join(map(repr, options))}; it must be an option's letter, "
        "its text, or both"
    )


def same_option(prediction: str, target: str, options: Sequence[str] = ()) -> float:
    """1.0 if the prediction picks the target's option, else 0.0.

    Args:
        prediction: the answer.
        target: the right answer.
        options: all options of the question with their letters, in order; empty if they are not known. Then a
            prediction that is exactly the target's text is right, if it has one.

    Raises:
        ScoringError: the target names no option, or several.
    """
    if options:
        return float(bool(picked(prediction, option_texts(options)) & target_letters(target, options)))
    wanted = target_option(target)
    # The whole target to the letter: `normalise` drops the article, so "A. B. left" would be "B. left".
    if _plain(prediction).casefold() == _plain(target).casefold():
        return 1.0
    return float(bool(picked(prediction, {wanted.letter or "": wanted.text})))
