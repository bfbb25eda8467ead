"""Tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without a line end at its end.

    Cells are Markdown: text that is not ours goes through `plain` first. All rows are as long as the header.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Text of one line that stays in its cell and is no markup."""
    return re.sub(r"([\\|<>`*\[\]])", r"\\\1", text)
