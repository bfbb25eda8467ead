"""The `vilavt` command. Each module of this package adds the commands of one area to the same application."""

import io
import logging
import sys

import typer

from ..errors import VilavtError

app = typer.Typer(
    name="vilavt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="ViLaVT: a vision-language model whose vision encoder can be asked.",
)


@app.callback()
def _options(verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what the libraries do.")) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that it cannot show must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


@app.command("version")
def version_command() -> None:
    """Print the versions that decide a result."""
    from importlib.metadata import PackageNotFoundError, version

    for package in ("vilavt-hf", "transformers", "torch", "pillow"):
        try:
            typer.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package} not installed")


def _register_all() -> None:
    from . import chat, checkpoint, data, doctor, eval, prompts, score, sft, tiny

    for module in (chat, eval, score, checkpoint, prompts, data, sft, tiny, doctor):
        module.register(app)


_register_all()


_EXTRAS = {"pydantic": "train", "yaml": "train", "accelerate": "train", "matplotlib": "train", "sklearn": "tiny"}
"""Packages that some commands need -> the extra that brings them."""
_EVALUATION = ("eval", "eval-latency", "score")
"""Commands for which the smaller extra ``eval`` is enough."""


def main() -> None:
    """Entry point: an error we raise on purpose is one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        extra = "eval" if extra == "train" and set(_EVALUATION) & set(sys.argv[1:3]) else extra
        typer.secho(f'vilavt: this command needs {error.name}: pip install "vilavt-hf[{extra}]"', fg="red", err=True)
        sys.exit(1)
    except VilavtError as error:
        typer.secho(f"vilavt: {type(error).__name__}: {error}", fg="red", err=True)
        sys.exit(1)
