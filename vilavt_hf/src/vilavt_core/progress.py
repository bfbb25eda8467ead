"""How far long work is, on stderr: on a terminal a bar with the time that is left, elsewhere a plain line now and then.

Nothing is shown of work that ends within two seconds, and no control character is written to a file or a pipe.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

Item = TypeVar("Item")
Advance = Callable[[int], object]
"""Told how much was done since the last time."""

DELAY = 2.0
"""Seconds of work before anything is shown."""
EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


@contextmanager
def counting(total: int, title: str, unit: str, *, done: int = 0, shown: bool = True) -> Iterator[Advance]:
    """Around work of known length; the value is called with what was done.

    Args:
        total: how much there is.
        title: what is done, as ``pages``.
        unit: of `total`: ``question``; ``B`` are bytes.
        done: how much was done before.
        shown: False: count in silence.
    """
    if not shown:
        yield unseen
    elif (bar := _bar_class()) is not None:
        with bar(total=total, initial=done, desc=title, unit=unit, unit_scale=unit == "B", delay=DELAY) as opened:
            yield opened.update
    else:
        yield _Lines(total, title, unit, done)


def counted(items: Sequence[Item], title: str, unit: str, *, shown: bool = True) -> Iterator[Item]:
    """The items, one after the other, with `counting` around them."""
    with counting(len(items), title, unit, shown=shown) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def waiting(title: str, *, shown: bool = True) -> Iterator[None]:
    """Around work that does not tell how far it is: on a terminal its title and the time it takes, until it ends.

    Args:
        title: what is done, as ``loading vilavt-7b``.
        shown: False: wait in silence.
    """
    if not (shown and sys.stderr.isatty()):
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_spin, args=(title, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def time_left(seconds: float, done: int, to_do: int) -> str:
    """What remains of work, as ``left 1:02:03``, if it goes on as fast as it did.

    Args:
        seconds: that the work took so far.
        done: of its parts.
        to_do: parts.
    """
    return f"left {timedelta(seconds=round(seconds / max(1, done) * to_do))}"


class _Lines:
    """What a bar is where there is no terminal."""

    def __init__(self, total: int, title: str, unit: str, done: int) -> None:
        self.total, self.title, self.unit = total, title, unit
        self.done, self.before = done, done
        self.began = self.told = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told < EVERY or self.done >= self.total:
            return
        self.told = now
        left = time_left(now - self.began, self.done - self.before, self.total - self.done)
        print(f"{self.title}: {self._amount()}, {left}", file=sys.stderr, flush=True)

    def _amount(self) -> str:
        if self.unit == "B":
            return f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB"
        return f"{self.done:,} of {self.total:,} {self.unit}{'es' if self.unit.endswith('ch') else 's'}"


def _spin(title: str, ended: threading.Event) -> None:
    if ended.wait(DELAY):
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # what others print meanwhile is left to them: streams are not replaced from a thread
    quiet: dict[str, Any] = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, console=Console(stderr=True), **quiet) as progress:
        progress.add_task(escape(title), total=None)
        ended.wait()


def _bar_class() -> Any:
    """tqdm's bar, if there is a terminal or a notebook to show it."""
    from tqdm.auto import tqdm

    notebook = any(parent.__module__ == "tqdm.notebook" for parent in tqdm.__mro__)
    return tqdm if notebook or sys.stderr.isatty() else None


def unseen(count: int) -> None:
    """What is told of progress that nobody looks at."""
