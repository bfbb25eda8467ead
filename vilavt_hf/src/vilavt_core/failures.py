"""What other libraries raise, in one line: for errors that are no fault of ours, and whose traceback helps nobody."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import CheckpointError, EngineError, VilavtError

_LONGEST = 400
"""Characters of a library's message that are shown."""
_QUOTED = 200
"""Characters of somebody else's text that an error quotes."""
_LIBRARIES = frozenset(
    (
        "PIL", "accelerate", "concurrent", "filelock", "httpx", "huggingface_hub", "openai", "peft", "ray", "requests",
        "safetensors", "safetensors_rust", "tokenizers", "torch", "transformers", "urllib", "vllm",
    )
)  # fmt: skip
"""An error of a class that these define says what is wrong with a file, the network or the machine."""


def is_from_outside(error: BaseException) -> bool:
    """Whether an error speaks of files, the network, memory or a library's input: what the user can change."""
    outside = isinstance(error, OSError | MemoryError | ImportError)
    return outside or type(error).__module__.partition(".")[0] in _LIBRARIES


def printable(text: str) -> str:
    """In one line, and without characters that a terminal would act upon."""
    line = " ".join(text.splitlines())
    return line if line.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def printable_text(text: str) -> str:
    """Without control characters but line breaks and tabs: what a model or a file says must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


class PrintableFormatter(logging.Formatter):
    """Of log lines, which quote files, models and servers."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with the traceback if there is one."""
        return printable_text(super().format(record))


def quoted(text: object) -> str:
    """Somebody else's text as an error quotes it: printable, at most 200 characters and how many there are."""
    whole = str(text)
    # Cut first: to be made printable, megabytes would take seconds.
    line = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(printable(whole[: _QUOTED + 1]).split()))
    return line if len(whole) <= _QUOTED else f"{line[:_QUOTED]}… ({len(whole)} characters)"


def quoted_error(error: BaseException) -> str:
    """The message of an error as another one quotes it; its class if it has none."""
    return quoted(error) or type(error).__name__


def one_line(error: BaseException) -> str:
    """Class and message of an error, in one line.

    An `OSError` of the system is its path and what is wrong with it; of a longer text, the paragraph that comes first
    is shown.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return printable(f"{error.filename}: {error.strerror}")
    if isinstance(error, MemoryError):
        return f"out of memory {error}".rstrip()
    paragraph = re.split(r"\n\s*\n", str(error).strip())[0]
    text = printable(" ".join(paragraph.split()))
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Around the loading of a model or an engine: whatever a library raises becomes one line that names `what`.

    Raises:
        EngineError: it was given an argument that it does not take.
        CheckpointError: anything else.
    """
    try:
        yield
    except VilavtError:
        raise
    except Exception as error:
        if isinstance(error, TypeError) and (found := re.search(r"unexpected keyword argument '(\w+)'", str(error))):
            raise EngineError(
                f"{what}: there is no option {found[1]!r}; take it out of --engine, or of the arguments"
            ) from error
        raise CheckpointError(f"{what}: cannot be loaded: {one_line(error)}") from error
