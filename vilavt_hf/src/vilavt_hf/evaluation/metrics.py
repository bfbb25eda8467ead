"""Metrics by name: every question type of `vilavt_hf.scoring`, and functions of the user's own."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from ..errors import BenchmarkError, ScoringError
from ..scoring import QuestionType, score_answer

Metric = Callable[[str, str], float]
"""(prediction, target) -> 0 to 1. Raises `ScoringError` for a target that it cannot read, for a prediction never."""


@functools.cache
def find_metric(name: str) -> Metric:
    """A metric by name.

    Args:
        name: a `QuestionType`, or ``package.module:function`` for a metric of your own.

    Raises:
        BenchmarkError: there is no such metric, or its module cannot be imported.
    """
    module, colon, function = name.partition(":")
    if not colon:
        try:
            return functools.partial(_score, QuestionType.read(name))
        except ScoringError:
            known = ", ".join(QuestionType)
            raise BenchmarkError(f"no metric {name!r}; known are {known}, or package.module:function") from None
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BenchmarkError(f"metric {name!r} cannot be imported: {error}; is its package on the path?") from None
    if not callable(found):
        raise BenchmarkError(
            f"metric {name!r} is a {type(found).__name__}; it must be a function of (prediction, target)"
        )
    metric: Metric = found
    return metric


def _score(kind: QuestionType, prediction: str, target: str) -> float:
    return score_answer(prediction, target, kind)
