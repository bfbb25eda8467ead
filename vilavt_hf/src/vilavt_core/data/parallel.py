"""One function for many samples, in several processes, in order."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from ..progress import counting

Value = TypeVar("Value")

_CHUNK = 64
"""Samples that a process is sent at once."""
_function: Callable[[int], object] | None = None
"""Of this worker process: sent once, not with every sample."""


def in_processes(
    function: Callable[[int], Value], indices: Sequence[int], *, workers: int = 0, title: str, progress: bool = False
) -> Iterator[Value]:
    """``function(i)`` of every index, in their order.

    Args:
        function: must be picklable where processes are not forked.
        indices: its arguments.
        workers: processes; 0 computes here.
        title: of the bar.
        progress: show a bar.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a process was ended from outside (out of memory, say).
    """
    with counting(len(indices), title, "sample", shown=progress) as advance:
        if workers == 0:
            for i in indices:
                yield function(i)
                advance(1)
            return
        pool = ProcessPoolExecutor(workers, initializer=_prepare, initargs=(function,))
        try:
            for value in pool.map(_call, indices, chunksize=_CHUNK):
                yield value  # type: ignore[misc]
                advance(1)
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare(function: Callable[[int], object]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others


def _call(i: int) -> object:
    assert _function is not None
    return _function(i)
