"""The only module that knows which trainer the module ``verl`` is, and what has no seam in it.

Two projects install a top-level module ``verl``: verl itself, and EasyR1.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from .errors import HostError

SUPPORTED = ((0, 9), (0, 10))
"""Versions of verl, from and below."""
INSTALL_VERL = 'pip install "vilavt-rl[verl]"'
INSTALL_VERL_VLLM = 'pip install "vilavt-rl[verl-vllm]"'
"""What puts a set together in which verl, vLLM and transformers fit."""

Trainer = Literal["verl", "easyr1", "other"]


def flavour() -> Trainer | None:
    """Which trainer ``import verl`` would find, without importing it; None: none is installed."""
    spec = importlib.util.find_spec("verl")
    if spec is None:
        return None
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if any((place / "workers" / "engine_workers.py").is_file() for place in places):
        return "verl"
    if any(
        (place / "workers" / "fsdp_workers.py").is_file() and (place / "trainer" / "data_loader.py").is_file()
        for place in places
    ):
        return "easyr1"
    return "other"


def require_verl() -> None:
    """Make sure that the module ``verl`` is a verl we know.

    Raises:
        HostError: it is EasyR1, an unknown version, or not there.
    """
    found = flavour()
    if found is None:
        raise HostError(f"verl is not installed; {INSTALL_VERL}")
    if found != "verl":
        what = "EasyR1" if found == "easyr1" else "neither verl 0.9 nor EasyR1"
        raise HostError(
            f"the module verl is {what} ({_place()}), but verl from the package index is needed; use another "
            f"environment, or run `python -m vilavt_rl.easyr1.main` if you meant EasyR1"
        )
    version = metadata.version("verl")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not SUPPORTED[0] <= (int(numbers[1]), int(numbers[2])) < SUPPORTED[1]:
        raise HostError(f"verl {version} is installed, tested is 0.9; {INSTALL_VERL}")


def require_easyr1() -> None:
    """Make sure that the module ``verl`` is EasyR1's.

    Raises:
        HostError: it is verl from the package index, something else, or not there.
    """
    found = flavour()
    if found == "easyr1":
        return
    if found is None:
        raise HostError("EasyR1 is not importable; put your checkout on PYTHONPATH (it is on no package index)")
    what = "verl from the package index" if found == "verl" else "neither EasyR1 nor verl 0.9"
    raise HostError(
        f"the module verl is {what} ({_place()}), but EasyR1 is needed, whose module has the same name: use an "
        "environment without that package and put your EasyR1 checkout on PYTHONPATH; for verl itself the command is "
        "`vilavt-rl verl CONFIG`"
    )


def _place() -> str:
    spec = importlib.util.find_spec("verl")
    return str(spec.origin) if spec else "nowhere"


def patch_processor_factory() -> None:
    """Let verl's ``hf_processor`` know our processor.

    The one function of verl 0.9 that ViLaVT needs and that has no seam: it matches on class names and answers None,
    with a warning, for a class it does not know. Everything that is not a ViLaVT checkpoint still goes to the original.
    """
    import verl.utils.tokenizer.tokenizer as home

    original = home.hf_processor
    if getattr(original, "vilavt", False):
        return

    @functools.wraps(original)
    def hf_processor(name_or_path: str, **kwargs: Any) -> Any:
        from .verl.processing import load_processor

        return load_processor(name_or_path, **kwargs) or original(name_or_path, **kwargs)

    hf_processor.vilavt = True  # type: ignore[attr-defined]
    names = (
        "verl.utils",
        "verl.utils.tokenizer",
        "verl.utils.tokenizer.tokenizer",
        "verl.workers.config.model",
        "verl.model_merger.base_model_merger",
    )
    for name in names:
        module = sys.modules.get(name)
        if module is not None and getattr(module, "hf_processor", None) is original:
            module.hf_processor = hf_processor  # type: ignore[attr-defined]


def use_gloo() -> None:
    """Let verl's workers meet over gloo alone: it asks torch for a CPU and a device backend, which are one and the
    same on a CPU and refused as duplicates. The backend is a parameter of the function; nobody passes it.
    """
    import verl.utils.distributed as distributed

    original = distributed.initialize_global_process_group_ray
    if not isinstance(original, functools.partial):
        distributed.initialize_global_process_group_ray = functools.partial(original, backend="gloo")
