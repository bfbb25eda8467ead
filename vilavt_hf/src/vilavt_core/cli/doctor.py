"""``vilavt doctor``: what is installed, and whether it works; ``vilavt version``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .showing import markup


def doctor(
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Checkpoint folder to check too.")] = None,
    load: Annotated[
        bool, typer.Option("--load", help="Load the checkpoint's weights and run them, in every package installed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout.")] = False,
) -> None:
    """Check this installation; exit code 1 if something has to be done."""
    from rich.console import Console

    from ..doctor import Check, Status, examine

    if load and model is None:
        raise typer.BadParameter("--load needs --model")
    colours = {Status.OK: "green", Status.NOTE: "yellow", Status.FAILED: "red"}
    console = Console(soft_wrap=True, highlight=False)
    found: list[Check] = []
    for check in examine(model, load=load):
        found.append(check)
        if not as_json:
            mark = f"[{colours[check.status]}]{check.status.value:>6}[/]"
            console.print(f"{mark}  [bold]{markup(check.name)}[/]: {markup(check.detail)}")
            if check.remedy:
                console.print(f"        {markup(check.remedy)}")
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in found], indent=2))
    if any(check.status is Status.FAILED for check in found):
        raise typer.Exit(1)


def version() -> None:
    """Print the versions that decide a result."""
    from ..versions import DECIDING, version_of

    for package in DECIDING:
        typer.echo(f"{package} {version_of(package) or 'not installed'}")
