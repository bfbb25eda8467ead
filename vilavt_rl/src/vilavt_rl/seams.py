"""Names of a trainer that we subclass, call or replace, looked up before a run and not in it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable

Seam = tuple[str, str, tuple[str, ...]]
"""(module, name, parameters that must exist)."""


def seam_problems(seams: Iterable[Seam]) -> list[str]:
    """What is gone, or has lost a parameter; each with its name."""
    return [problem for seam in seams if (problem := _problem(*seam))]


def _problem(module: str, name: str, parameters: tuple[str, ...]) -> str | None:
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return f"{module}.{name}: {error}"
    if parameters:
        have = inspect.signature(found).parameters  # type: ignore[arg-type]
        if missing := [parameter for parameter in parameters if parameter not in have]:
            return f"{module}.{name} takes no {', '.join(missing)}"
    return None
