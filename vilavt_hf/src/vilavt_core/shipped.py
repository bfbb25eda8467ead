"""What comes with the packages: the tiny checkpoint and the demo's images, and recipes of training."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError, TrainingError
from .spelling import did_you_mean

RECIPES = Path(__file__).with_name("recipes")
"""Those of fine-tuning. A recipe is a complete configuration: run by its name, or printed, copied and edited."""


def shipped(name: str, instead: str = "name a checkpoint of your own") -> Path:
    """A shipped example: inside an installed wheel, or beside the package in a checkout.

    Args:
        name: below ``examples/``, e.g. ``vilavt-tiny``.
        instead: what the user can do if it is not there.

    Raises:
        CheckpointError: it is not there.
    """
    package = Path(__file__).resolve().parent
    for root in (package / "_examples", *(parent / "examples" for parent in package.parents[:4])):
        if (root / name).exists():
            return root / name
    raise CheckpointError(f"examples/{name} is not here; {instead}, or run from a checkout of the project")


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Names of the recipes in a package's folder, without ``.yaml``."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_recipe(given: str | Path, folder: Path = RECIPES) -> Path | None:
    """The user's file, else the recipe of that name, else None.

    Args:
        given: path of a file, or name of a recipe, with or without ``.yaml``.
        folder: where the package has its recipes.
    """
    path = Path(given)
    if path.is_file():
        return path
    recipe = folder / f"{path.name.removesuffix('.yaml')}.yaml"
    return recipe if path.name == str(given) and recipe.is_file() else None


def recipe_text(name: str | None, folder: Path = RECIPES) -> str:
    """A recipe as it is; without a name the names of all, one a line.

    Raises:
        TrainingError: there is none of that name.
    """
    if name is None:
        return "".join(f"{one}\n" for one in recipe_names(folder))
    stem = name.removesuffix(".yaml")
    if stem not in recipe_names(folder):
        raise TrainingError(
            f"no recipe {name!r}; there are {', '.join(recipe_names(folder))}{did_you_mean(stem, recipe_names(folder))}"
        )
    return (folder / f"{stem}.yaml").read_text(encoding="utf-8")
