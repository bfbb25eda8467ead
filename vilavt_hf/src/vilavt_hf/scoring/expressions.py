"""Mathematical answers: equal as expressions, found by math_verify (the ``math`` extra)."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

from ..errors import ScoringError
from ..protocol import unbox

MAX_CHARS = 300
"""A longer answer is not compared."""
SECONDS = 4.0
"""Processor time for one comparison; an answer that needs more earns nothing."""

_LIST = re.compile(r",(?!\d{3}(?!\d))")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
# Several answers in one.
_REFUSED = re.compile(r"\d\s+\d|[\w)}]\s*\|\s*\w|\$|\b(?:or|and)\b|[;\n]")


def bare(text: str) -> str:
    r"""The expression without ``\boxed{}`` and math delimiters around it."""
    text = unbox(text.strip()).strip().rstrip(".").strip()
    for opening, closing in _DELIMITERS:
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            return text[len(opening) : -len(closing)].strip()
    return text


def target_expression(target: str) -> str:
    """The expression of a right answer.

    Raises:
        ScoringError: it is blank.
    """
    expression = bare(target)
    if not expression:
        raise ScoringError(f"the target {target!r} of a math question holds no expression")
    return expression


def same_expression(prediction: str, target: str) -> float:
    """1.0 if both parse to equal expressions, else 0.0: ``1/2`` is ``0.5`` and ``\\frac12``. One expression counts; a
    list of guesses is none.

    Raises:
        ScoringError: math_verify is not installed, or the target is blank.
    """
    found, wanted = bare(prediction), target_expression(target)
    if importlib.util.find_spec("math_verify") is None:
        raise ScoringError(
            'math questions are compared by math_verify, which is not installed; pip install "vilavt-hf[math]"'
        )
    if found == wanted:
        return 1.0
    if (
        not found
        or len(found) > MAX_CHARS
        or _REFUSED.search(found)
        or (_LIST.search(found) and not _LIST.search(wanted))
    ):
        return 0.0
    return float(_comparer.equal(wanted, found))


class Comparer:
    """A process that compares expressions, started when it is first asked and again after an answer that ended it.

    Threads share it, one at a time; a forked process starts its own.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.forget()

    def forget(self) -> None:
        """Leave the process to whoever else holds it."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, wanted: str, found: str) -> bool:
        """Whether two expressions in LaTeX are equal. False if that took more time or memory than there is.

        Raises:
            ScoringError: the process does not start.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                print(json.dumps([wanted, found]), file=process.stdin, flush=True)
                reply = process.stdout.readline()
            except OSError:
                reply = ""
            if not reply:
                self._stop()
            return reply == "1\n"

    def stop(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            # -P: the modules beside it are not to be found as modules, one of them is called numbers
            [sys.executable, "-P", str(Path(__file__).with_name("expression_process.py")), str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.kill()
            raise ScoringError(
                f"the process that compares expressions ended with {process.wait()} as it started; its own error is "
                f"above; can {sys.executable} import math_verify?"
            )
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_comparer = Comparer()
atexit.register(_comparer.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_comparer.forget)
