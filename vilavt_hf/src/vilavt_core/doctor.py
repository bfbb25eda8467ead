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
from functools import partial
from importlib import metadata
from pathlib import Path

from .versions import OURS, installed, version_of

GROUP, CHECKPOINT_GROUP = "vilavt.checks", "vilavt.checkpoint_checks"
TRANSFORMERS = ((4, 57), (6, 0))
"""Accepted versions, from and below: what vilavt-hf asks for."""
TESTED_TRANSFORMERS = ((4, 57), (5, 24))
"""The first and the last version that the tests were run with."""


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


def in_range(
    name: str,
    version: str,
    low: tuple[int, int],
    high: tuple[int, int],
    install: str,
    *,
    tested: tuple[tuple[int, int], tuple[int, int]] | None = None,
) -> Check:
    """Whether ``low <= version < high``, by major and minor number, and whether tests have seen such a version.

    Args:
        name: of the check.
        version: what is installed.
        low, high: what is accepted, from and below.
        install: requirement for pip.
        tested: the first and the last version that was tested. None: all that are accepted.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    accepted = f"{_dotted(low)} to below {_dotted(high)}"
    found = numbers and (int(numbers[1]), int(numbers[2]))
    if not found or not low <= found < high:
        return Check(name, Status.FAILED, f"{version}, accepted from {accepted}", f'pip install "{install}"')
    if tested is None:
        return Check(name, Status.OK, f"{version}, tested from {accepted}")
    span = f"tested from {_dotted(tested[0])} to {_dotted(tested[1])}"
    if tested[0] <= found <= tested[1]:
        return Check(name, Status.OK, f"{version}, {span}")
    return Check(name, Status.NOTE, f"{version}, not tested: accepted from {accepted}, {span}; nothing stops it")


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def examine(checkpoint: str | Path | None = None, *, load: bool = False) -> Iterator[Check]:
    """All checks of all installed packages, as they are made.

    Args:
        checkpoint: folder to check too.
        load: also load its weights and compute with them, in every package that can.
    """
    folder = None if checkpoint is None else Path(checkpoint)
    yield _versions()
    yield guarded("transformers", _transformers)
    yield guarded("extras", _extras)
    entries = list(metadata.entry_points(group=GROUP))
    if folder is not None:
        judged = guarded("checkpoint", partial(_checkpoint, folder), f"vilavt inspect {folder} says more")
        yield judged
        if judged.status is Status.FAILED:
            folder = None  # what every command refuses needs no second opinion
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
    version = metadata.version("transformers")
    return in_range("transformers", version, *TRANSFORMERS, "transformers>=4.57,<6", tested=TESTED_TRANSFORMERS)


def _checkpoint(folder: Path) -> Check:
    from .checkpoint import inspect_checkpoint, judge_checkpoint

    if (verdict := judge_checkpoint(folder)) is not None:
        return Check("checkpoint", Status.FAILED, verdict.problem, verdict.remedy)
    found = inspect_checkpoint(folder)
    detail = f"{folder}: {found.flavour.value}, {found.parameters / 1e6:.1f} M parameters"
    if found.quantisation is not None:
        detail += f"; {found.quantisation}"
    if found.missing:
        lacks = ", ".join(missing.name for missing in found.missing)
        remedies = "; ".join(missing.remedy for missing in found.missing)
        return Check("checkpoint", Status.NOTE, f"{detail}; {lacks} is missing", remedies)
    return Check("checkpoint", Status.OK, detail)


def _extras() -> Check:
    """Which extras of our installed packages lack something, and the command that brings it."""
    lacking = {
        f"{package}[{extra}]": missing
        for package in installed(OURS)
        for extra in metadata.metadata(package).get_all("Provides-Extra") or ()
        if (missing := _missing(package, extra))
    }
    if not lacking:
        return Check("extras", Status.OK, "all are installed")
    detail = "; ".join(f"{name} lacks {', '.join(missing)}" for name, missing in lacking.items())
    wanted = " ".join(f'"{name}"' for name in lacking)
    return Check("extras", Status.NOTE, detail, f"what you need of: pip install {wanted}")


def _missing(package: str, extra: str) -> list[str]:
    """Distributions of an extra that are not installed, or in another version than it asks for."""
    from packaging.requirements import Requirement

    found = []
    for text in metadata.requires(package) or ():
        requirement = Requirement(text)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.marker.evaluate({"extra": ""}) or requirement.name in OURS:
            continue  # a requirement of the package itself, or one of our extras, which is told on its own
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(str(requirement).partition(";")[0].strip())
    return found
