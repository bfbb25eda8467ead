"""YAML configuration: a file's keys, ``KEY=VALUE`` changes of a command line, one mapping laid over another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .failures import quoted, quoted_error

_MOST_VALUES = 100_000
"""Of a file, aliases resolved."""

Fail = Callable[[str], Exception]
"""Makes the error that is raised out of its message: an error class."""


def read_keys(path: Path, fail: Fail) -> dict[str, Any]:
    """The keys and values of a file; an empty one has none.

    Raises:
        Exception: what `fail` makes: the file cannot be read, is no YAML, or holds no keys; names it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise fail(f"{path}: cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise fail(f"{path}: not YAML: {quoted_error(error)}") from None
    try:
        values = _load(text)
    except ValueError as error:
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
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise fail(f"{quoted(text)!r} is not KEY=VALUE{example and f'; write {example}'}")
    try:
        return key.strip(), _load(value)
    except ValueError:
        raise fail(f"{quoted(text)!r}: the value is not YAML") from None


def _load(text: str) -> Any:
    """The value of a text, of plain types.

    Raises:
        ValueError: it is no YAML, or would take no end of memory or depth.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: Any) -> None:
            super().flatten_mapping(node)
            if len(node.value) > _MOST_VALUES:
                raise ValueError(f"a mapping merges more than {_MOST_VALUES} keys")

    try:
        values = yaml.load(text, Loader)  # a SafeLoader, see above  # nosec B506
        _count(values, {}, ())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    return values


def _count(value: Any, known: dict[int, int], inside: tuple[int, ...]) -> int:
    """Values in it, those that stand for an alias counted again: whoever walks or prints it meets them all."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in inside:
        raise ValueError("a value contains itself")
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known, (*inside, id(value))) for part in parts)
    if known[id(value)] > _MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_VALUES} values")
    return known[id(value)]


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
