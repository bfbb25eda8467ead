"""What `vilavt doctor` and `vilavt-rl doctor` say about training: which trainer is here, which of our plugs are live.

verl swallows what a plug-in raises: a run without us looks like a run with us until it fails somewhere else.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

from vilavt_hf.doctor import Check, Status, guarded

from .compat import INSTALL_VERL, flavour, require_easyr1, require_verl

NEEDED = ("transfer_queue", "cachetools", "ray", "uvicorn", "fastapi")
"""Modules that verl's trainer imports and its wheel does not always bring."""


def checks(checkpoint: Path | None, load: bool) -> Iterator[Check]:
    """See `vilavt_hf.doctor`."""
    yield _math()
    found = flavour()
    if found is None:
        yield Check("trainer", Status.NOTE, "neither verl nor EasyR1 is importable", INSTALL_VERL)
    elif found == "easyr1":
        yield guarded("trainer", _easyr1)
        yield guarded("EasyR1 seams", _easyr1_seams, "use the commit that docs/easyr1.md names")
    else:
        trainer = guarded("trainer", _verl)
        yield trainer
        if trainer.status is not Status.FAILED:
            yield from _verl_plugs()


def _math() -> Check:
    try:
        return Check("math questions", Status.OK, f"math_verify {metadata.version('math-verify')}")
    except metadata.PackageNotFoundError:
        remedy = 'pip install "vilavt-hf[math]"'
        return Check("math questions", Status.NOTE, "math_verify is not installed, they cannot be rewarded", remedy)


def _verl() -> str:
    require_verl()
    return f"verl {metadata.version('verl')}"


def _easyr1() -> str:
    require_easyr1()
    return "EasyR1, from a checkout"


def _easyr1_seams() -> str:
    from .easyr1 import seams

    seams.check()
    return f"{len(seams.SEAMS)} names that we subclass or call are there"


def _verl_plugs() -> Iterator[Check]:
    yield guarded("verl needs", _needed, INSTALL_VERL)
    yield guarded("verl plug-in", _plugin, "reinstall vilavt-rl in the environment of verl")
    yield guarded("processor", _processor, "the version of verl is not the one that was tested; see docs/verl.md")
    for name, module in (
        ("agent loop", "vilavt_rl.verl.agent_loop"),
        ("dataset", "vilavt_rl.verl.dataset"),
        ("reward", "vilavt_rl.verl.reward"),
    ):
        yield guarded(name, partial(_importable, module), "see the error; docs/verl.md lists what is needed")
    yield guarded("CPU mode", _cpu)
    yield guarded("trl", _trl)


def _needed() -> str:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}")
    return ", ".join(NEEDED)


def _plugin() -> str:
    found = [entry for entry in metadata.entry_points(group="verl.plugins") if entry.name == "vilavt"]
    if not found:
        raise ImportError("no entry point 'vilavt' in the group verl.plugins")
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and "vilavt" not in policy.split(","):
        raise ImportError(f"VERL_USE_EXTERNAL_PLUGINS={policy!r} leaves 'vilavt' out")
    from .verl import plugin

    plugin.register()
    return f"live: {', '.join(plugin.LIVE)}"


def _processor() -> str:
    import verl.utils

    if not getattr(verl.utils.hf_processor, "vilavt", False):
        raise RuntimeError("verl's processor factory is its own: images would be dropped with a warning")
    return "verl's factory knows VilavtProcessor"


def _importable(module: str) -> str:
    importlib.import_module(module)
    return module


def _cpu() -> Check:
    import torch

    if os.environ.get("VERL_PLATFORM", "").lower() == "cpu":
        return Check("CPU mode", Status.OK, "VERL_PLATFORM=cpu: platform, FSDP2 engine and rollout are registered")
    if torch.cuda.is_available():
        return Check("CPU mode", Status.OK, "off, there is a GPU")
    return Check(
        "CPU mode", Status.NOTE, "off, and there is no GPU", "export VERL_PLATFORM=cpu; `vilavt-rl verl` does it"
    )


def _trl() -> str:
    if importlib.util.find_spec("trl") is None:
        return "not installed, verl does not need it"
    version = metadata.version("trl")
    if int(version.partition(".")[0]) >= 1:
        raise RuntimeError(f"trl {version}: verl 0.9 stops with an ImportError beside trl 1 and newer; uninstall trl")
    return version
