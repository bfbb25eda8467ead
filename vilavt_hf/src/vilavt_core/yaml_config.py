"""YAML configuration: a file's keys, ``KEY=VALUE`` changes of a command line, one mapping laid over another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Fail = Callable[[str], Exception]
"""Makes the error that is raised out of its message: an error class."""


def read_keys(path: Path, fail: Fail) -> dict[str, Any]:
    """The keys and values of a file; an empty one has none.

    Raises:
        Exception: what `fail` makes: the file cannot be read, is no YAML, or holds no keys; names it.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise fail(f"{path}: cannot be read: {error.strerror}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise fail(f"{path}: not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise fail(f"{path}: it must hold keys and values, it is a {type(values).__name__}")
    return values


def parse_change(text: str, fail: Fail, example: str = "") -> tuple[str, Any]:
    """Key and value of ``KEY=VALUE``. The value is YAML: numbers are numbers, ``null`` and nothing are None.

    Args:
        text: as typed.
        fail: see `Fail`.
        example: how it may look, for the error.

    Raises:
        Exception: what `fail` makes: no key, or the value is no YAML.
    """
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise fail(f"{text!r} is not KEY=VALUE{example and f'; write {example}'}")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise fail(f"{text!r}: the value is not YAML") from None


def set_key(values: dict[str, Any], key: str, value: Any, fail: Fail) -> None:
    """Set ``section.key`` in place; sections that are missing or null are made.

    Raises:
        Exception: what `fail` makes: one of the sections is a value.
    """
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise fail(f"{key}: {section} is a value, not a section")
        values = inner
    values[last] = value


def get_key(values: Mapping[str, Any], key: str) -> Any:
    """The value of ``section.key``; None if it or a section is not there."""
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`: mappings key by key, everything else replaced."""
    both = {
        key: merged(base[key], value)
        for key, value in changes.items()
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
    }
    return {**base, **changes, **both}
