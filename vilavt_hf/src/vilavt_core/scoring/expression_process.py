"""Compares expressions in a process of its own, which `expressions` starts with the seconds that one may take.

A short answer can ask sympy for a number that no memory holds (``(9^{99})!``). Nothing stops that calculation in the
process that began it, not even a signal: it holds the interpreter until it ends. Here the system ends the process.

Each line read is a JSON list of two expressions in LaTeX, each line written 1 (equal) or 0; the first line written says
that it is ready.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import sys

MAX_BYTES = 2 << 30
"""Of address space. A number that needs more is not calculated, and the answer is not equal."""


def main(seconds: float) -> None:
    """Answers until its input ends; one comparison may take so many seconds of processor time."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # it warns that it has no time limit
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started it decides when it ends
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    answers, sys.stdout = sys.stdout, open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    config = LatexExtractionConfig()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        # The default action of SIGPROF ends the process wherever it is.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            wanted, found = (
                parse(f"${side}$", extraction_config=[config], fallback_mode="no_fallback", parsing_timeout=None)
                for side in json.loads(line)
            )
            equal = bool(wanted and found and verify(wanted, found, timeout_seconds=None))
        except Exception:  # whatever a library makes of a text that is no expression, it is not equal
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(equal), file=answers, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
