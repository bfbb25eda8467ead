"""Versions of installed distributions, for records of how something came about and for ``vilavt doctor``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib import metadata

OURS = ("vilavt-hf", "vilavt-vllm", "vilavt-rl", "vilavt-vlmeval")
"""Distributions of this project; they are released together."""
DECIDING = ("vilavt-hf", "torch", "transformers", "pillow")
"""What a result depends on, whatever engine it came from."""


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution; None if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def installed(distributions: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    return {name: version for name in distributions if (version := version_of(name)) is not None}


@cache
def running_version(distribution: str) -> str | None:
    """`version_of`, looked up once: it reads a file, every result asks for it, and what runs does not change."""
    return version_of(distribution)


def versions(*more: str) -> dict[str, str]:
    """Versions of what decides a result, `DECIDING`, and of the `more` distributions that are installed."""
    return {name: version for name in (*DECIDING, *more) if (version := running_version(name)) is not None}
