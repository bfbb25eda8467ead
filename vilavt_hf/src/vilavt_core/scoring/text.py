"""Short free text: the same words, or most of them in the same order."""

from __future__ import annotations

import re

from ..errors import ScoringError
from .chinese import HAN, half_width

MAX_WORDS = 2_000
"""Words of an answer that are compared; the cost grows with the product of both lengths."""

_TOKEN = re.compile(rf"[{HAN}]|[^\W{HAN}]+")
"""What is compared: a word, or one Chinese character."""
_CORE = re.compile(r"\w(?:.*\w)?", re.DOTALL)
"""From the first letter or digit of a word to its last."""


def normalise(text: str) -> str:
    """Lower case and half width, without punctuation at word ends, articles, and repeated blanks (as SQuAD compares
    answers)."""
    cores = (_CORE.search(word) for word in half_width(text).lower().split())
    return " ".join(core[0] for core in cores if core and core[0] not in ("a", "an", "the"))


def _longest_common(a: list[str], b: list[str]) -> int:
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]


def rouge_l(prediction: str, target: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of the longest common subsequence of words (Lin 2004, equally weighted); a Chinese
    character is a word."""
    a, b = (_TOKEN.findall(normalise(text))[:MAX_WORDS] for text in (prediction, target))
    common = _longest_common(a, b) if a and b else 0
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(a), common / len(b)
    return precision, recall, 2 * precision * recall / (precision + recall)


def target_words(target: str) -> str:
    """A right answer in free form, normalised.

    Raises:
        ScoringError: nothing is left of it, as of ``the``.
    """
    words = normalise(target)
    if not words:
        raise ScoringError(f"the target {target!r} of a free-form question holds no word besides articles")
    return words


def text_score(prediction: str, target: str) -> float:
    """1.0 for the same words, else the F1 of ROUGE-L if more than half of both texts is common, else 0.0.

    The bar is what keeps a repeated answer and a list of guesses at nothing: twice the target has precision 1/2.

    Raises:
        ScoringError: the target holds no word.
    """
    if normalise(prediction) == target_words(target):
        return 1.0
    precision, recall, f1 = rouge_l(prediction, target)
    return f1 if precision > 0.5 and recall > 0.5 else 0.0
