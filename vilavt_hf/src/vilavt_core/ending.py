"""How our commands end: an error is one line on stderr, Ctrl-C too; only a fault of ours shows a traceback.

Exit codes: 1 an error, 2 wrong options, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import VilavtError
from .failures import PrintableFormatter, is_from_outside, one_line, printable

logger = logging.getLogger(__name__)

STOPPED = 130
"""Exit code after Ctrl-C."""
_EXTRAS = {
    "pydantic": "train",
    "yaml": "train",
    "accelerate": "train",
    "matplotlib": "train",
    "filelock": "train",
    "sklearn": "tiny",
    "peft": "lora",
    "deepspeed": "deepspeed",
    "math_verify": "math",
    "openai": "server",
    "ray": "ray",
}
"""Packages that some commands need -> the extra that brings them."""
_EVALUATION = ("eval", "eval-latency", "score", "view", "curve")
"""Commands for which the smaller extra ``eval`` is enough."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with what becomes of the work."""


@contextmanager
def ending(program: str) -> Iterator[None]:
    """Around a whole command: ends the process as the module says.

    Raises:
        SystemExit: after an error.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        code = tell(program, error)
        if code is None:
            raise
        sys.exit(code)


@contextmanager
def resumable(how: str = "the same command goes on where it stopped") -> Iterator[None]:
    """Around work that can be continued: Ctrl-C says how."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(how) from stop


def start_logging(level: int) -> None:
    """Log lines on stderr, for a whole command: printable, whatever they quote."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def tell(program: str, error: BaseException) -> int | None:
    """Print the line that tells an error; its exit code, None if the error is none that a line can tell."""
    if isinstance(error, KeyboardInterrupt):
        say(program, f"stopped; {error}" if str(error) else "stopped")
        return STOPPED
    if isinstance(error, BrokenPipeError):
        return None  # whoever read our output has gone
    if isinstance(error, ModuleNotFoundError):
        say(program, _missing(error.name or str(error)))
        return 1
    if isinstance(error, VilavtError):
        text = f"{type(error).__name__}: {error}"
    elif is_from_outside(error):
        text = one_line(error)
    else:
        return None
    logger.info("the traceback", exc_info=error)
    say(program, text)
    return 1


def say(program: str, text: str) -> None:
    """One line on stderr, whatever line breaks the text has: they would look like several errors."""
    line = printable(f"{program}: {text}")
    colours = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    sys.stderr.write(f"\x1b[31m{line}\x1b[0m\n" if colours else f"{line}\n")


def _missing(module: str) -> str:
    top = module.partition(".")[0]
    extra = _EXTRAS.get(top)
    if extra is None:
        return f"this command needs {module}, which is not installed; `vilavt doctor` says what is missing"
    extra = "eval" if extra == "train" and set(_EVALUATION) & set(sys.argv[1:3]) else extra
    return f'this command needs {module}: pip install "vilavt-hf[{extra}]"'
