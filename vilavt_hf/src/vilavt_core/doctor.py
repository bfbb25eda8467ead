"""Is this installation able to run a ViLaVT? One line per check, each with its remedy.

Every installed package of ours adds its own checks through the entry point group ``vilavt.checks``: a function
``checks(checkpoint: Path | None, load: bool) -> Iterable[Check]``. Those of the group ``vilavt.checkpoint_checks`` are
asked only if there is a checkpoint to check: they import torch and transformers.
"""

import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from .versions import OURS, installed

GROUP, CHECKPOINT_GROUP = "vilavt.checks", "vilavt.checkpoint_checks"
TRANSFORMERS = ((4, 57), (6, 0))
"""Supported versions, from and below."""


class Status(StrEnum):
    """Outcome of a check."""

    OK = "ok"
    NOTE = "note"
    """Works, but is worth knowing."""
    FAILED = "failed"


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    """What to do; empty if nothing has to be done."""


Checks = Callable[[Path | None, bool], Iterable[Check]]


def guarded(name: str, run: Callable[[], Check | str], remedy: str = "") -> Check:
    """The check that `run` returns, ``ok`` with the text it returns, or ``failed`` with what it raised."""
    try:
        found = run()
    except Exception as error:
        return Check(name, Status.FAILED, f"{type(error).__name__}: {error}", remedy)
    return found if isinstance(found, Check) else Check(name, Status.OK, found)


def in_range(name: str, version: str, low: tuple[int, int], high: tuple[int, int], install: str) -> Check:
    """Whether ``low <= version < high``, by major and minor number."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    wanted = f"{low[0]}.{low[1]} to below {high[0]}.{high[1]}"
    if numbers and low <= (int(numbers[1]), int(numbers[2])) < high:
        return Check(name, Status.OK, f"{version}, tested from {wanted}")
    return Check(name, Status.FAILED, f"{version}, tested from {wanted}", f'pip install "{install}"')


def examine(checkpoint: str | Path | None = None, *, load: bool = False) -> Iterator[Check]:
    """All checks of all installed packages, as they are made.

    Args:
        checkpoint: folder to check too.
        load: also load its weights and compute with them, in every package that can.
    """
    folder = None if checkpoint is None else Path(checkpoint)
    yield _versions()
    yield guarded("transformers", _transformers)
    entries = list(metadata.entry_points(group=GROUP))
    if folder is not None:
        yield guarded("checkpoint", lambda: _checkpoint(folder), f"vilavt inspect {folder} says more")
        entries += metadata.entry_points(group=CHECKPOINT_GROUP)
    for entry in sorted(entries, key=lambda entry: entry.name):
        try:
            checks: Checks = entry.load()
            yield from checks(folder, load)
        except Exception as error:  # a broken host must not hide what the others found
            yield Check(entry.name, Status.FAILED, f"{type(error).__name__}: {error}", f"reinstall {entry.name}")


def _versions() -> Check:
    found = installed(OURS)
    detail = ", ".join(f"{package} {version}" for package, version in found.items())
    detail = f"Python {platform.python_version()}, {detail}"
    if len(set(found.values())) > 1:
        return Check("packages", Status.FAILED, detail, "they are released together: install one version of all")
    return Check("packages", Status.OK, detail)


def _transformers() -> Check:
    return in_range("transformers", metadata.version("transformers"), *TRANSFORMERS, "transformers>=4.57,<6")


def _checkpoint(folder: Path) -> Check:
    from .checkpoint import inspect_checkpoint

    found = inspect_checkpoint(folder)
    detail = f"{folder}: {found.flavour.value}, {found.parameters / 1e6:.1f} M parameters"
    wrong = [*found.problems, *(f"{missing.name} is missing" for missing in found.missing)]
    remedies = [missing.remedy for missing in found.missing] or [f"vilavt inspect {folder} says more"]
    if wrong:
        return Check("checkpoint", Status.FAILED, f"{detail}; {'; '.join(wrong)}", "; ".join(remedies))
    return Check("checkpoint", Status.OK, detail)
