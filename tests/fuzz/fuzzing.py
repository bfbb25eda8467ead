"""One test, three lengths: a few fixed examples in CI, new ones for a given time in `nox -s fuzz`, and such as reach
new code in `nox -s fuzz_guided` (guided.py).
"""

import functools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

SECONDS = float(os.environ.get("VILAVT_FUZZ_SECONDS", "0"))
"""That each target runs; 0: its few examples."""
REPORT = os.environ.get("VILAVT_FUZZ_REPORT")
"""File that gets a line per target: how many inputs it had."""
BATCH = 500
"""Inputs of one seed."""


def fuzzed(*inputs: SearchStrategy, examples: int = 40, kept: tuple[tuple[Any, ...], ...] = ()) -> Callable:
    """Make a test of a function that must hold for every input.

    Args:
        inputs: its arguments.
        examples: how many it gets in CI, always the same.
        kept: inputs that were wrong once; they come first.
    """

    def decorate(check: Callable[..., None]) -> Callable[[], None]:
        def test() -> None:
            for values in kept:
                check(*values)
            if SECONDS:
                _for_a_time(check, inputs)
            else:
                settings(_settings, max_examples=examples, derandomize=True, database=None)(given(*inputs)(check))()

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        test.of_bytes = settings(_settings, database=None)(given(*inputs)(check)).hypothesis.fuzz_one_input
        return test

    return decorate


_settings = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


def _for_a_time(check: Callable[..., None], inputs: tuple[SearchStrategy, ...]) -> None:
    number = first = random.SystemRandom().randrange(2**32)
    executions, end = 0, time.monotonic() + SECONDS

    @functools.wraps(check)
    def counted(*values: Any, **named: Any) -> None:
        nonlocal executions
        executions += 1
        check(*values, **named)

    try:
        while time.monotonic() < end:
            seed(number)(settings(_settings, max_examples=BATCH)(given(*inputs)(counted)))()
            number += 1
    finally:
        if REPORT:
            with Path(REPORT).open("a") as file:
                file.write(f"{check.__name__}: {executions:,} inputs, seeds {first} to {number}\n")
