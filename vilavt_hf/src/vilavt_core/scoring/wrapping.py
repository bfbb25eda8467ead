"""What an answer or a right answer is wrapped in: tags, boxes, a thought before it. Only here it is taken off."""

from __future__ import annotations

import re

from ..errors import ScoringError
from ..protocol import ANSWER_CLOSE, ANSWER_OPEN, TAGS, THINK_CLOSE, THINK_OPEN

MAX_WRAPPINGS = 8
"""One inside the other, at most; what is wrapped deeper is no answer."""

_BOX = re.compile(r"\\f?box(?:ed)?\s?\{")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|mbox)[a-z]{0,6}\s?\{([^{}]*)\}")


def unwrapped(text: str) -> str | None:
    """An answer without its tag, its ``\\boxed{}`` and the thought before it; stripped.

    None: there are several tags or boxes, one is not closed, or a tag of the protocol stands inside (a thought in the
    answer tag, too), so that what the answer is stays open.
    """
    text, tagged = text.strip(), False
    for _ in range(MAX_WRAPPINGS):
        if ANSWER_OPEN in text:
            inner, tagged = _in_tag(text), True
        elif not tagged and text.startswith(THINK_OPEN) and THINK_CLOSE in text:
            inner = text.partition(THINK_CLOSE)[2]
        elif box := _BOX.search(text):
            inner = _in_box(text, box.end())
        else:
            return None if any(tag in text for tag in TAGS) else text
        if inner is None:
            return None
        text = inner.strip()
    return None


def _in_tag(text: str) -> str | None:
    content, closed, after = text.partition(ANSWER_OPEN)[2].partition(ANSWER_CLOSE)
    return content if closed and ANSWER_OPEN not in content + after and ANSWER_CLOSE not in after else None


def _in_box(text: str, begin: int) -> str | None:
    depth = 1
    for brace in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            end = begin + brace.start()
            return None if _BOX.search(text, end) else text[begin:end]
    return None


def unwrapped_target(target: str) -> str:
    """`unwrapped` of a right answer.

    Raises:
        ScoringError: it is wrapped in a way that leaves open what it is.
    """
    found = unwrapped(target)
    if found is None:
        raise ScoringError(
            f"the target {target!r} must be one answer: at most one {ANSWER_OPEN}…{ANSWER_CLOSE} and one \\boxed{{}} "
            "around it, closed, and no other tag in it"
        )
    return found


def without_delimiters(text: str) -> str:
    r"""Text without math delimiters and ``\text{}`` around all of it."""
    for _ in range(MAX_WRAPPINGS):
        text = text.strip()
        if whole := _TEXT.fullmatch(text):
            text = whole[1]
            continue
        inner = next(
            (
                text[len(opening) : -len(closing)]
                for opening, closing in _DELIMITERS
                if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing)
            ),
            None,
        )
        if inner is None or "$" in inner:
            break
        text = inner
    return text
