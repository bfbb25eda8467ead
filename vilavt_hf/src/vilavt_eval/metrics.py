"""Metrics by name: every question type of `vilavt_core.scoring`, and functions of the user's own."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

from vilavt_core.errors import BenchmarkError, ScoringError
from vilavt_core.scoring import QuestionType, score_answer

Metric = Callable[..., float]
"""(prediction, target) -> 0 to 1; that of a multiple choice may also get the options, with their letters. Raises
`ScoringError` for a target that it cannot read, for a prediction never."""


@functools.lru_cache(maxsize=1024)
def type_metric(name: str) -> Metric:
    """The metric of a question type. Whatever the name, nothing is imported: it may come from a file of anybody's.

    Raises:
        ScoringError: unknown type.
    """
    return functools.partial(_score, QuestionType.read(name))


def is_choice(name: str) -> bool:
    """Whether a metric compares options, which are then its third argument."""
    return not is_function(name) and QuestionType.read(name) is QuestionType.MULTIPLE_CHOICE


def is_function(name: str) -> bool:
    """Whether a metric is a function of the user's own, whose module is imported to find it."""
    return ":" in name


@functools.cache
def find_metric(name: str) -> Metric:
    """A metric by the name that a definition gives it.

    Args:
        name: a `QuestionType`, or ``package.module:function`` for a metric of your own, which is imported.

    Raises:
        BenchmarkError: there is no such metric, or its module cannot be imported.
    """
    if not is_function(name):
        try:
            return type_metric(name)
        except ScoringError:
            known = ", ".join(QuestionType)
            raise BenchmarkError(f"no metric {name!r}; known are {known}, or package.module:function") from None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module of a user's own may raise anything
        raise BenchmarkError(
            f"metric {name!r} cannot be imported: {type(error).__name__}: {error}; is its package on the path?"
        ) from None
    if not callable(found):
        raise BenchmarkError(
            f"metric {name!r} is a {type(found).__name__}; it must be a function of (prediction, target)"
        )
    metric: Metric = found
    return metric


def _score(kind: QuestionType, prediction: str, target: str, options: Sequence[str] = ()) -> float:
    return score_answer(prediction, target, kind, options=options)
