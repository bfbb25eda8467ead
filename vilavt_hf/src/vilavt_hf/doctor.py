"""Is this installation able to run a ViLaVT? One line per check, each with its remedy.

Every installed package of ours adds its own checks through the entry point group ``vilavt.checks``: a function
``checks(checkpoint: Path | None, load: bool) -> Iterable[Check]``.
"""

import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

GROUP = "vilavt.checks"
PACKAGES = ("vilavt-hf", "vilavt-vllm", "vilavt-rl", "vilavt-vlmeval")
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
    yield from _own_checks(folder, load)
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            checks: Checks = entry.load()
            yield from checks(folder, load)
        except Exception as error:  # a broken host must not hide what the others found
            yield Check(entry.name, Status.FAILED, f"{type(error).__name__}: {error}", f"reinstall {entry.name}")


def _own_checks(folder: Path | None, load: bool) -> Iterator[Check]:
    yield _versions()
    yield guarded("transformers", _transformers)
    yield guarded("device", _device)
    yield guarded("Auto classes", _auto_classes, "reinstall vilavt-hf")
    if folder is not None:
        yield guarded("checkpoint", lambda: _checkpoint(folder), f"vilavt inspect {folder} says more")
        yield guarded("processor", lambda: _processor(folder), f"vilavt convert {folder} DST adds what is missing")
        if load:
            yield guarded("weights", lambda: _load(folder), f"vilavt inspect {folder} says more")


def _versions() -> Check:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    detail = ", ".join(f"{package} {version}" for package, version in found.items())
    detail = f"Python {platform.python_version()}, {detail}"
    if len(set(found.values())) > 1:
        return Check("packages", Status.FAILED, detail, "they are released together: install one version of all")
    return Check("packages", Status.OK, detail)


def _transformers() -> Check:
    return in_range("transformers", metadata.version("transformers"), *TRANSFORMERS, "transformers>=4.57,<6")


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("device", Status.OK, f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    return Check("device", Status.NOTE, f"torch {torch.__version__}, CPU only, {torch.get_num_threads()} threads")


def _auto_classes() -> str:
    from transformers import AutoConfig, AutoModelForImageTextToText

    from . import VilavtConfig, VilavtForConditionalGeneration

    config = AutoConfig.for_model("vilavt")
    model = AutoModelForImageTextToText._model_mapping[VilavtConfig]
    if type(config) is not VilavtConfig or model is not VilavtForConditionalGeneration:
        raise RuntimeError(f"model type vilavt leads to {type(config)} and {model}")
    return "model type vilavt is registered"


def _checkpoint(folder: Path) -> Check:
    from .checkpoint import inspect_checkpoint

    found = inspect_checkpoint(folder)
    detail = f"{folder}: {found.flavour.value}, {found.parameters / 1e6:.1f} M parameters"
    wrong = [*found.problems, *(f"{missing.name} is missing" for missing in found.missing)]
    remedies = [missing.remedy for missing in found.missing] or [f"vilavt inspect {folder} says more"]
    if wrong:
        return Check("checkpoint", Status.FAILED, f"{detail}; {'; '.join(wrong)}", "; ".join(remedies))
    return Check("checkpoint", Status.OK, detail)


def _processor(folder: Path) -> str:
    from .processing_vilavt import VilavtProcessor
    from .stream import SpecialTokens

    processor = VilavtProcessor.from_pretrained(folder)
    SpecialTokens.of(processor.tokenizer)
    if processor.query_tokenizer is None:
        raise RuntimeError(f"{folder} has no query_tokenizer/: the encoder cannot be asked")
    return "loads, with its query tokenizer" + (" and its own prompts" if processor.prompts else "")


def _load(folder: Path) -> str:
    from PIL import Image

    from .chat import VilavtChat

    chat = VilavtChat.from_pretrained(folder)
    picture = Image.linear_gradient("L").convert("RGB")
    result = chat.ask_many([([picture], "What is this?")])[0]
    if result.error is not None:
        raise result.error
    return f"load on {chat.model.device} in {chat.model.dtype} and answer a question ({result.finish})"
