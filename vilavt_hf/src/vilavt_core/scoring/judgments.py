"""Answers that are yes or no, in English and in Chinese."""

from __future__ import annotations

import re

from ..errors import ScoringError
from .chinese import HAN, simplified, spaced
from .text import normalise

_WORD = re.compile(r"\b(?:yes|no)\b", re.IGNORECASE)
_CLAUSE_END = re.compile(rf"[,.;:!?()\[\]/|\n]+|(?<=[{HAN}])\s|\s(?=[{HAN}])|\b(?:or|and)\b|或者?|还是")
_BEFORE = r"^\s*(?:所以|因此|故|我认为|最终的?|正确的?)*(?:答案|判断|结论)?(?:应该|应)?"
_ANNOUNCED = re.compile(rf"{_BEFORE}[是为]?\s?:")
_SAID = re.compile(rf"(?=所以|因此|故|我认为|最终|正确答案|答案|判断|结论|应){_BEFORE}[是为]?(?=.)")
_CLAUSES = {
    "yes": "true 是 是的 对 对的 是对的 正确 正确的 是正确的 真 真的 是真的 有 有的 没错 存在 可以 能 会",
    "no": "false 否 不 不是 不是的 不对 错 错的 是错的 错误 错误的 是错误的 不正确 假 假的 是假的 没有 没 无 "
    "不存在 不可以 不能 不会",
}
_VERDICT_OF = {word: verdict for verdict, words in _CLAUSES.items() for word in words.split()}


def yes_or_no(text: str) -> str | None:
    """``yes`` or ``no`` if one of both is named, however often, and the other is not; else None.

    The English words count wherever they stand (``No, there is no dog``). ``True``, ``False``, and in Chinese ``是``,
    ``否``, ``对``, ``错``, ``有``, ``没有`` and their like, count where they stand alone between punctuation, as in
    ``否，没有狗``: in a sentence they may mean the opposite ("that is not true", ``是否``).
    """
    plain = _ANNOUNCED.sub("", simplified(spaced(text)), count=1)
    found = {word.lower() for word in _WORD.findall(plain)}
    for clause in _CLAUSE_END.split(plain):
        words = normalise(clause)
        for said in (words, _SAID.sub("", words, count=1)):
            if verdict := _VERDICT_OF.get(said):
                found.add(verdict)
                break
    return found.pop() if len(found) == 1 else None


def target_verdict(target: str) -> str:
    """Whether the right answer is ``yes`` or ``no``.

    Raises:
        ScoringError: it is neither, or both.
    """
    verdict = yes_or_no(target)
    if verdict is None:
        raise ScoringError(f"the target {target!r} of a judgment must be yes or no, true or false, or 是 or 否")
    return verdict


def same_verdict(prediction: str, target: str) -> float:
    """1.0 if both say yes or both say no, else 0.0.

    Raises:
        ScoringError: the target is neither yes nor no, or both.
    """
    return float(yes_or_no(prediction) == target_verdict(target))
