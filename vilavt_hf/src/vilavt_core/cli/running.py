"""How our commands end: an error is one line on stderr, Ctrl-C too; only a fault of ours shows a traceback.

Exit codes: 1 an error, 2 wrong options, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import VilavtError
from ..failures import is_from_outside, one_line
from ..outputs import file_problem, folder_problem
from ..spelling import did_you_mean
from ..versions import version_of

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
_EVALUATION = ("eval", "eval-latency", "score")
"""Commands for which the smaller extra ``eval`` is enough."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C, with what becomes of the work."""


class Commands(TyperGroup):
    """The root of a command with subcommands: tells wrong options and Ctrl-C in a line, and what a misspelt name meant.

    Errors are told by `ending`, around it.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, typer.BadParameter) as error:  # which typer would tell in its own ways
            raise typer.Exit(_told(str(self.name), error) or 1) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The subcommand that `args` begin with."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            names = self.list_commands(ctx)
            hint = did_you_mean(args[0], names) or f"; there are {', '.join(names)}"
            raise typer.BadParameter(f"there is no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)


@contextmanager
def ending(program: str) -> Iterator[None]:
    """Around a whole command: ends the process as the module says.

    Raises:
        SystemExit: after an error.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        code = _told(program, error)
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


def version_option(program: str, distribution: str) -> Any:
    """``--version``: prints program and version, and stops."""

    def show(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{program} {version_of(distribution) or 'not installed'}")
            raise typer.Exit

    return typer.Option(False, "--version", callback=show, is_eager=True, help="Print the version and stop.")


def check_output_files(**options: Path | None) -> None:
    """Stop before the work if one of these files cannot be written.

    Args:
        options: by the option's name, as ``json`` for ``--json``; None was not given.
    """
    for name, path in options.items():
        if path is not None and (problem := file_problem(path)):
            raise typer.BadParameter(problem, param_hint=_option(name))


def check_output_folders(**options: Path | None) -> None:
    """Stop before the work if one of these folders cannot be made and written to. A name in capitals is
    an argument's, one with a dot a key's.
    """
    for name, path in options.items():
        if path is not None and (problem := folder_problem(path)):
            raise typer.BadParameter(problem, param_hint=_option(name))


def check_picture_file(**options: Path | None) -> None:
    """:func:`check_output_files` for pictures: the name must end in a format that can be written."""
    check_output_files(**options)
    for name, path in options.items():
        if path is None:
            continue
        from PIL import Image

        known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}
        if path.suffix.lower() not in known:
            hint = did_you_mean(path.suffix, (".png", ".jpg", ".jpeg", ".webp"))
            raise typer.BadParameter(
                f"{path}: pictures cannot be written as {path.suffix or 'a file without an ending'}; name a .png file"
                f"{hint}",
                param_hint=_option(name),
            )


def choice(value: str, known: Sequence[str], option: str) -> str:
    """The value, if it is one of the known ones.

    Raises:
        typer.BadParameter: it is not; says what was meant.
    """
    if value not in known:
        raise typer.BadParameter(f"{value!r}: choose {_or(known)}{did_you_mean(value, known)}", param_hint=option)
    return value


def _or(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _option(name: str) -> str:
    return name if name.isupper() or "." in name else f"--{name.rstrip('_').replace('_', '-')}"


def _told(program: str, error: BaseException) -> int | None:
    """Print the line that tells an error; its exit code, None if the error is none that a line can tell."""
    if isinstance(error, KeyboardInterrupt):
        _say(program, f"stopped; {error}" if str(error) else "stopped")
        return STOPPED
    if isinstance(error, BrokenPipeError):
        return None  # whoever read our output has gone
    if isinstance(error, typer.BadParameter):
        _say(program, _one_line(error.format_message().removeprefix("Invalid value: ")))
        return 2
    if isinstance(error, ModuleNotFoundError):
        _say(program, _missing(error.name or str(error)))
        return 1
    if isinstance(error, VilavtError):
        text = f"{type(error).__name__}: {_one_line(str(error))}"
    elif is_from_outside(error):
        text = one_line(error)
    else:
        return None
    logger.info("the traceback", exc_info=error)
    _say(program, text)
    return 1


def _one_line(text: str) -> str:
    """Line breaks would look like several errors."""
    return " ".join(text.splitlines())


def _say(program: str, text: str) -> None:
    typer.secho(f"{program}: {text}", fg="red", err=True)


def _missing(module: str) -> str:
    top = module.partition(".")[0]
    extra = _EXTRAS.get(top)
    if extra is None:
        return f"this command needs {module}, which is not installed; `vilavt doctor` says what is missing"
    extra = "eval" if extra == "train" and set(_EVALUATION) & set(sys.argv[1:3]) else extra
    return f'this command needs {module}: pip install "vilavt-hf[{extra}]"'
