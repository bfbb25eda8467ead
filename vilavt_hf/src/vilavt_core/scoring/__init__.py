"""How right an answer is: pure functions of two strings, the same in training and in evaluation.

:func:`score_answer` is the one entrance. ``strict`` (default) reads an answer by stated rules and gives nothing for an
empty one, a repeated one, or one that names everything at once. ``published`` is what the published reward computes,
bit for bit, for comparison; what the published evaluation computes, which differs, is `published.evaluation_score`. No
torch, no host, no judge model; only ``math`` questions need a package more
(``vilavt-hf[math]``).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Literal

from ..errors import ScoringError
from ..protocol import unbox
from . import published
from .boxes import box_score, iou, parse_box, target_box
from .choices import option_letter, same_option, same_verdict, target_option, target_verdict, yes_or_no
from .expressions import same_expression, target_expression
from .numbers import Number, mean_relative_accuracy, parse_number, regression_score, same_number, target_number
from .text import normalise, rouge_l, target_words, text_score
from .view_change import parse_view_change, target_view_change, view_change_score

ScorerVersion = Literal["strict", "published"]


class QuestionType(StrEnum):
    """What kind of answer a question wants; the values are those of published data sets."""

    MULTIPLE_CHOICE = "multiple choice"
    """A letter: right or wrong."""
    NUMERICAL = "numerical"
    """A number: right or wrong, to the decimals that the target is written with."""
    REGRESSION = "regression"
    """A number: mean relative accuracy."""
    JUDGMENT = "judgment"
    """Yes or no."""
    MATH = "math"
    """An expression: equal or not, as math_verify finds."""
    FREE_FORM = "free-form"
    """A text: the same words, or ROUGE-L of most of them."""
    BOX = "box"
    """``[x1, y1, x2, y2]``: intersection over union."""
    VIEW_CHANGE = "vci"
    """``move_right:0.5,rotate_left:30``: mean relative accuracy over five axes."""

    @classmethod
    def read(cls, name: str) -> QuestionType:
        """A type by its name; case, surrounding blanks, ``-`` and ``_`` do not matter.

        Raises:
            ScoringError: unknown name.
        """
        plain = " ".join(name.strip().lower().replace("_", " ").replace("-", " ").split())
        for kind in cls:
            if kind.value.replace("-", " ") == plain:
                return kind
        raise ScoringError(f"no question type {name!r}; known are {', '.join(cls)}")


_TARGET: dict[QuestionType, Callable[[str], object]] = {
    QuestionType.MULTIPLE_CHOICE: target_option,
    QuestionType.NUMERICAL: target_number,
    QuestionType.REGRESSION: target_number,
    QuestionType.JUDGMENT: target_verdict,
    QuestionType.MATH: target_expression,
    QuestionType.FREE_FORM: target_words,
    QuestionType.BOX: target_box,
    QuestionType.VIEW_CHANGE: target_view_change,
}


def check_target(kind: QuestionType, target: str) -> None:
    """Refuse a right answer that no answer could meet by the strict rules; what checks data calls it. Needs no extra.

    Raises:
        ScoringError: it is blank or not what its type wants, as ``three`` for a number.
    """
    _TARGET[kind](target)


_STRICT: dict[QuestionType, Callable[[str, str], float]] = {
    QuestionType.MULTIPLE_CHOICE: same_option,
    QuestionType.NUMERICAL: same_number,
    QuestionType.REGRESSION: regression_score,
    QuestionType.JUDGMENT: same_verdict,
    QuestionType.MATH: same_expression,
    QuestionType.FREE_FORM: text_score,
    QuestionType.BOX: box_score,
    QuestionType.VIEW_CHANGE: view_change_score,
}


def score_answer(
    prediction: str | None, target: str, question_type: str | QuestionType, *, version: ScorerVersion = "strict"
) -> float:
    """How right an answer is, 0 to 1.

    Args:
        prediction: the bare answer, without its tag; None: there is none. ``strict`` takes what is in its
            ``\\boxed{}``; several are no answer.
        target: the right answer.
        question_type: see :class:`QuestionType`. ``published`` scores a type it does not know as 0.
        version: whose rules.

    Raises:
        ScoringError: unknown type, a target that its type cannot read, or a missing package.
    """
    if version == "published":
        return published.reward_score(prediction or "", target, question_type)
    kind, answer = QuestionType.read(question_type), prediction or ""
    if answer.count("\\boxed{") > 1:
        check_target(kind, target)
        return 0.0
    return _STRICT[kind](unbox(answer), target)


__all__ = [
    "Number",
    "QuestionType",
    "Version",
    "check_target",
    "iou",
    "mean_relative_accuracy",
    "normalise",
    "option_letter",
    "parse_box",
    "parse_number",
    "parse_view_change",
    "rouge_l",
    "same_expression",
    "same_number",
    "score_answer",
    "yes_or_no",
]
