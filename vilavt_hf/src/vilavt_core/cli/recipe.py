"""``vilavt recipe``: print a configuration that comes with the package."""

from typing import Annotated

import typer


def recipe(name: Annotated[str | None, typer.Argument(help="Recipe; without it all names are listed.")] = None) -> None:
    """Print a recipe of `vilavt sft`, to copy and edit."""
    from ..shipped import recipe_text

    typer.echo(recipe_text(name), nl=False)
