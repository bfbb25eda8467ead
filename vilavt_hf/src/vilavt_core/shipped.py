"""What comes with the packages: the tiny checkpoint and the demo's images, and recipes of training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError, ImageError, TrainingError
from .json_text import parse_json
from .sources import VIDEO_SUFFIXES, ImageSource, Video
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


@dataclass(frozen=True)
class DemoQuestion:
    """A question of the demo, with the right answer."""

    files: tuple[Path, ...]
    """Images and videos, in the order in which they are shown."""
    question: str
    answer: str

    @property
    def sources(self) -> list[ImageSource]:
        """The files as a backend takes them."""
        return [Video(path) if path.suffix.lower() in VIDEO_SUFFIXES else path for path in self.files]


def read_demo_questions(path: Path) -> list[DemoQuestion]:
    """Questions of a JSON list of ``{"image", "question", "answer"}``, files beside it; instead of ``image`` an entry
    may have ``images``, a list of images and videos.

    Raises:
        ImageError: the file cannot be read or is no such list.
    """
    try:
        entries = parse_json(path.read_text(encoding="utf-8-sig"))
        out = []
        for entry in entries:
            names = [entry["image"]] if "image" in entry else list(entry["images"])
            files = tuple(path.parent / str(name) for name in names)
            out.append(DemoQuestion(files, str(entry["question"]), str(entry.get("answer", ""))))
        return out
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}; check --data") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise ImageError(f'{path}: not a list of {{"image", "question", "answer"}} ({detail}); check --data') from None


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
