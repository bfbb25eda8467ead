"""Where the shipped examples are: the tiny checkpoint, the demo's pictures."""

from pathlib import Path

from .errors import CheckpointError


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
