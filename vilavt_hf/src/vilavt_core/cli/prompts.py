"""``vilavt prompts``: show the wording a checkpoint is given, or read it from a checkout of the published system."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..failures import printable, printable_text, quoted
from .running import check_output_folders, group

prompts_app = group("Prompt sets: show one, or import one from a checkout of the published system.")


@prompts_app.command("import")
def import_command(
    checkout: Annotated[
        Path, typer.Argument(help="Root of your own checkout of the published repository; its files are never run.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write, usually CHECKPOINT/prompts.")],
    name: Annotated[str, typer.Option(help="Name of the set.")] = "imported",
    force: Annotated[bool, typer.Option("--force", help="Replace a set that is there already.")] = False,
) -> None:
    """Read the prompts of a checkout into a folder that a checkpoint can carry."""
    from ..errors import PromptError
    from ..prompts.importer import import_prompts

    check_output_folders(out=out)
    if (out / "prompts.json").exists() and not force:
        raise PromptError(f"{out}: holds a prompt set already; pass --force to replace it")
    report = import_prompts(checkout, name)
    report.prompts.save(out)
    for line in report.lines():
        typer.echo(printable(line))
    typer.echo(f"wrote {len(report.prompts.templates)} templates to {out} (sha256 {report.prompts.sha256[:16]})")


@prompts_app.command("show")
def show_command(
    name: str = typer.Argument(
        help="A built-in set (default, tiny), a prompt folder, or a checkpoint that carries one."
    ),
    template: str = typer.Option("", help="Only this template, exactly as it is."),
) -> None:
    """Print every template of a set."""
    from ..errors import PromptError
    from ..prompts import TEMPLATES, PromptSet

    folder = Path(name) / "prompts"
    prompts = PromptSet.load(folder if (folder / "prompts.json").is_file() else name)
    if template:
        if template not in prompts.templates:
            raise PromptError(
                f"prompt set {prompts.name!r} has no template {template!r}; it has {sorted(prompts.templates)}"
            )
        text = prompts.templates[template]
        typer.echo(printable_text(text) if sys.stdout.isatty() else text, nl=False)
        return
    typer.echo(f"{quoted(prompts.name)}, version {quoted(prompts.version)}, sha256 {prompts.sha256}")
    for key, text in prompts.templates.items():
        typer.echo(f"\n--- {key}: {TEMPLATES[key].purpose}\n{printable_text(text)}")
