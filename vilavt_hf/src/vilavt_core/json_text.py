"""JSON out of files and messages that somebody else wrote: whatever is wrong with it is a `ValueError`."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100
"""Deepest nesting that is read: nothing of ours comes near it, and Python's recursion ends at 1,000."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, not of the encoding that it begins with, holds an integer of more digits than Python
            reads, or is nested deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested too deeply, at most {MAX_DEPTH} levels are read") from None
    opening = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if opening > MAX_DEPTH and _is_deep(value):
        raise ValueError(f"it is nested too deeply, at most {MAX_DEPTH} levels are read")
    return value


def _is_deep(data: Any) -> bool:
    """Whether data is nested deeper than `MAX_DEPTH`; goes down level by level, without recursion."""
    level = [data]
    for _ in range(MAX_DEPTH):
        below = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list))
        level = [child for children in below for child in children]
        if not level:
            return False
    return True
