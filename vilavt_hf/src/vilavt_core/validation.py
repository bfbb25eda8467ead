"""What is wrong with data from outside, as text for an error of ours."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

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
) -> str:
    """One line: every value with what is wrong with it.

    Args:
        error: pydantic's.
        name: what a value is called, by its location; empty: the problem stands without a name.
        values: whether to show the value. Not of a stranger's request.
        most: of several problems, how many are told.
    """
    lines = []
    for found in error.errors(include_url=False, include_input=values)[:most]:
        text = found["msg"].removeprefix("Value error, ")
        label = name(found["loc"])
        if label and values:
            label += f" is {found['input']!r}"
        lines.append(f"{label}: {text}" if label else text)
    return "; ".join(lines)


def closest(name: str, names: Iterable[str]) -> str | None:
    """The one of some names that was probably meant; None: none is like it."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return found[0] if found else None
