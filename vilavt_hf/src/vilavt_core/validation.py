"""What is wrong with data from outside, as text for an error of ours."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from .spelling import did_you_mean

if TYPE_CHECKING:
    from pydantic import ValidationError


def dotted(location: tuple[Any, ...]) -> str:
    """Keys and places on the way to a value, joined by dots."""
    return ".".join(map(str, location))


def problems(
    error: ValidationError,
    *,
    name: Callable[[tuple[Any, ...]], str] = dotted,
    values: bool = False,
    most: int | None = None,
    known: Collection[str] = (),
) -> str:
    """One line: every value with what is wrong with it.

    Args:
        error: pydantic's.
        name: what a value is called, by its location; empty: the problem stands without a name.
        values: whether to show the value. Not of a stranger's request.
        most: of several problems, how many are told.
        known: names of values that there may be, dotted or not: what an unknown one may have meant.
    """
    lines = []
    for found in error.errors(include_url=False, include_input=values)[:most]:
        text = found["msg"].removeprefix("Value error, ")
        label = name(found["loc"])
        if found["type"] == "extra_forbidden":
            text += did_you_mean(dotted(found["loc"]), known) or did_you_mean(found["loc"][-1], known)
        if label and values:
            label += f" is {found['input']!r}"
        lines.append(f"{label}: {text}" if label else text)
    return "; ".join(lines)
