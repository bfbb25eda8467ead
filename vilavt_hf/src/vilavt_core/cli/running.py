"""What all our commands with subcommands share: how they end, ``--version``, choices, and outputs that are tried before
the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from ..ending import STOPPED, say, tell
from ..outputs import file_problem, folder_problem
from ..spelling import did_you_mean
from ..versions import version_of

_UsageError: Any = typer.BadParameter.__mro__[1]
"""Of whichever click this typer stands on, its own or the package."""


class Group(TyperGroup):
    """A group of subcommands, at whatever level: says what a misspelt name meant."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The subcommand that `args` begin with."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            names = self.list_commands(ctx)
            hint = did_you_mean(args[0], names) or f"; there are {', '.join(names)}"
            raise typer.BadParameter(f"there is no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)


class Commands(Group):
    """The root of a command with subcommands: tells wrong use of it and of all below it, and Ctrl-C, in a line.

    Errors are told by `ending`, around it.
    """

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """See the parent's; reads the options before the subcommand."""
        with self._telling():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        with self._telling():
            return super().invoke(ctx)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except _UsageError as error:  # typer would draw a box around it
            if type(error).__name__ == "NoArgsIsHelpError":  # prints the help page
                raise
            say(str(self.name), _misuse(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            raise typer.Exit(tell(str(self.name), error) or STOPPED) from None


def group(help: str) -> typer.Typer:
    """An empty group of subcommands below one of our commands.

    Args:
        help: of its help page.
    """
    return typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=help)


def _misuse(error: Any) -> str:
    """One line on how a command was misused."""
    option = getattr(error, "option_name", None)
    if option is None or error.ctx is None or isinstance(error, typer.BadParameter):
        return error.format_message().removeprefix("Invalid value: ")
    known = [name for parameter in error.ctx.command.get_params(error.ctx) for name in parameter.opts]
    if option in known:  # without its value
        return error.format_message()
    hint = did_you_mean(option, known) or f"; `{error.ctx.command_path} --help` lists them"
    return f"there is no option {option}{hint}"


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
    """`check_output_files` for images: the name must end in a format that can be written."""
    check_output_files(**options)
    for name, path in options.items():
        if path is None:
            continue
        from PIL import Image

        known = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}
        if path.suffix.lower() not in known:
            hint = did_you_mean(path.suffix, (".png", ".jpg", ".jpeg", ".webp"))
            raise typer.BadParameter(
                f"{path}: images cannot be written as {path.suffix or 'a file without an ending'}; name a .png file"
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
