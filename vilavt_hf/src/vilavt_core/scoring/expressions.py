"""Mathematical answers: equal as expressions, found by math_verify (the ``math`` extra)."""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import threading

from ..errors import ScoringError
from ..protocol import unbox
from .numbers import NUMBER_WORD, Number, meanings, parse_number

MAX_CHARS = 300
"""A longer answer is not compared."""
SECONDS = 4.0
"""Processor time for one comparison; an answer that needs more earns nothing."""

_LIST = re.compile(r",(?!\d{3}(?!\d))")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_BLANK = re.compile(r"\\(?:[,;:!\s]|q?quad(?![A-Za-z]))|~")
_EQUALS = re.compile(r"\\(?:approx|simeq)(?![A-Za-z])|≈|(?<![<>!])=")
# What it is that equals: x =, x_1 =, f(x) =, \text{Area} =
_NAME = re.compile(r"(?:[A-Za-z\\(){},'\s]|_\w|_\{\w+\})+=")
# Several answers in one, of which math_verify would pick one, or which it would calculate with.
_SEVERAL = re.compile(
    r"\d\s+\d|[\w)}]\s*\|\s*\w|\$|\\[(\[]|\b(?:or|and)\b|[;\n]|\d\s*_|\d\s*[\"']"
    r"|\\(?:text\w*|mbox|mathrm)\s*\{[^{}\d]*\d"
)
# Letters that belong to a number: 1.5e3, \frac, minus.
_NUMERIC = re.compile(r"(?<=\d)[eE](?=[-+]?\d)|\\[A-Za-z]+|\b(?:minus|negative)\b")
_LETTER = re.compile(r"[^\W\d_]|!")
DIGITS = 2e-6
"""Relative difference up to which a decimal fraction is another number: 0.333333 is 1/3, 0.33 is not."""


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
    list of guesses or a chain of equations is none.

    Numbers are compared as such, with percent signs, currencies and units; everything else by math_verify.

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
    if not found or len(found) > MAX_CHARS:
        return 0.0
    found, wanted = (_EQUALS.sub("=", side) for side in (found, wanted))
    if not ("=" in found and "=" in wanted):
        found, wanted = (_NAME.sub("", side, count=1).strip() for side in (found, wanted))
    if (number := _number(found)) is not None and (target_number := _number(wanted)) is not None:
        return float(_same_value(number, target_number))
    if found.count("=") > wanted.count("=") or any(
        pattern.search(_BLANK.sub(" ", found)) and not pattern.search(_BLANK.sub(" ", wanted))
        for pattern in (_SEVERAL, _LIST, NUMBER_WORD)
    ):
        return 0.0
    return float(_comparer.equal(wanted, found))


def _number(text: str) -> Number | None:
    """The number that a text is, not one with a letter (``7x``) or a factorial."""
    number = parse_number(text)
    return None if number is None or (not number.unit and _LETTER.search(_NUMERIC.sub("", text))) else number


def _same_value(found: Number, wanted: Number) -> bool:
    room = DIGITS if found.decimals or wanted.decimals else 1e-12
    return any(math.isclose(value, wanted.value, rel_tol=room) for value in meanings(found, wanted))


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
            if self._process is not None and self._process.poll() is not None:
                self._stop()  # it ended by itself: its pipes are still open
            if self._process is None:
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
            # -P: modules of the current folder are not ours
            [sys.executable, "-P", "-m", f"{__package__}.expression_process", str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.kill()
            process.communicate()  # closes the pipes
            raise ScoringError(
                f"the process that compares expressions ended with {process.returncode} as it started; its own error "
                f"is above; can {sys.executable} import math_verify?"
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
