"""How right an answer is: pure functions of two strings, the same in training and in evaluation.

`score_answer` is the one entrance. ``strict`` (default) reads an answer by stated rules and gives nothing for an
empty one, a repeated one, or one that names everything at once. ``published`` is what the published reward computes,
bit for bit, for comparison; what the published evaluation computes, which differs, is `published.evaluation_score`. No
torch, no host, no judge model; only ``math`` questions need a package more
(``vilavt-hf[math]``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, Literal

from ..errors import ScoringError
from ..spelling import did_you_mean
from . import published
from .boxes import box_score, iou, parse_box, target_box
from .choices import option_letter, same_option, target_letters, target_option
from .expressions import same_expression, target_expression
from .judgments import same_verdict, target_verdict, yes_or_no
from .numbers import Number, mean_relative_accuracy, parse_number, regression_score, same_number, target_number
from .options import bare_option, listed_options, read_options, with_letters
from .text import normalise, rouge_l, target_words, text_score
from .view_change import parse_view_change, target_view_change, view_change_score
from .wrapping import unwrapped, unwrapped_target, without_delimiters

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
        raise ScoringError(f"no question type {name!r}; known are {', '.join(cls)}{did_you_mean(name, cls)}")


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


def check_target(kind: QuestionType, target: str, options: Sequence[str] = ()) -> str:
    """Refuse a right answer that no answer could meet by the strict rules; what checks data calls it. Needs no extra.

    Args:
        kind: of the question.
        target: the right answer, as data holds it: an answer tag or a ``\\boxed{}`` may be around it.
        options: see `score_answer`.

    Returns:
        The target without what it was wrapped in.

    Raises:
        ScoringError: it is blank or not what its type wants, as ``three`` for a number, or ``AB`` for a choice.
    """
    bare = unwrapped_target(target)
    wanted = without_delimiters(bare)
    _check_options(kind, options)
    if options:
        target_letters(wanted, options)
    else:
        _TARGET[kind](wanted)
    # The expression's package is optional, and an expression is equal to itself.
    if kind is not QuestionType.MATH and _strict(kind, wanted, wanted, options) < 1:
        raise ScoringError(f"the target {target!r} cannot be met: as an answer it would be wrong itself")
    return bare


def known_options(given: Any, question: str, target: str) -> tuple[str, ...]:
    """The options of a multiple choice, with letters: those that a record gives, else those that its question lists.

    Args:
        given: see `read_options`; None or empty: the record has none.
        question: its text, see `listed_options`.
        target: the right answer. Lines of a question that do not hold it are no options.

    Returns:
        Empty if they are not known.

    Raises:
        ScoringError: what is given cannot be read.
    """
    if options := read_options(given):
        return options
    listed = listed_options(question)
    try:
        return listed if listed and target_letters(without_delimiters(unwrapped_target(target)), listed) else ()
    except ScoringError:
        return ()


def _check_options(kind: QuestionType, options: Sequence[str]) -> None:
    if options and kind is not QuestionType.MULTIPLE_CHOICE:
        raise ScoringError(f"options belong to a multiple choice, the question type is {str(kind)!r}; leave them out")


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


def _strict(kind: QuestionType, answer: str, target: str, options: Sequence[str]) -> float:
    return same_option(answer, target, options) if options else _STRICT[kind](answer, target)


def score_answer(
    prediction: str | None,
    target: str,
    question_type: str | QuestionType,
    *,
    options: Sequence[str] = (),
    version: ScorerVersion = "strict",
) -> float:
    """How right an answer is, 0 to 1.

    Args:
        prediction: the answer; None: there is none. ``strict`` takes what is in its answer tag and its
            ``\\boxed{}``; several are no answer.
        target: the right answer; ``strict`` reads it the same way.
        question_type: see `QuestionType`. ``published`` scores a type it does not know as 0.
        options: of a multiple choice, all of them, in order and with their letters (see `with_letters`); empty if they
            are not known. ``published`` does not look at them.
        version: whose rules.

    Raises:
        ScoringError: unknown type, a target that its type cannot read or that is none of the options, options of
            another type of question, or a missing package.
    """
    if version == "published":
        return published.reward_score(prediction or "", target, question_type)
    kind = QuestionType.read(question_type)
    _check_options(kind, options)
    wanted = without_delimiters(unwrapped_target(target))
    found = unwrapped(prediction or "")
    # A target that cannot be read is an error whatever the prediction is.
    return _strict(kind, "" if found is None else without_delimiters(found), wanted, options)


__all__ = [
    "Number",
    "QuestionType",
    "ScorerVersion",
    "bare_option",
    "check_target",
    "iou",
    "known_options",
    "listed_options",
    "mean_relative_accuracy",
    "normalise",
    "option_letter",
    "parse_box",
    "parse_number",
    "parse_view_change",
    "read_options",
    "rouge_l",
    "same_expression",
    "same_number",
    "score_answer",
    "unwrapped",
    "unwrapped_target",
    "with_letters",
    "without_delimiters",
    "yes_or_no",
]
