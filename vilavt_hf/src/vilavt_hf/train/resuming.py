"""Going on with a run that was broken off: only if it is the same run."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from vilavt_core.checkpoint import fingerprint
from vilavt_core.checkpoint.build_info import PROVENANCE, public_name
from vilavt_core.data.dataset import Lengths
from vilavt_core.data.order import Order, digest
from vilavt_core.errors import TrainingError
from vilavt_core.json_text import parse_json
from vilavt_core.sft_config import SftConfig

from .trainer import checkpoints

logger = logging.getLogger(__name__)

SECTIONS_MAY_CHANGE = frozenset({"output", "validation", "inference"})
MAY_CHANGE = frozenset({
    "model.path", "model.attention", "model.gradient_checkpointing", "data.registry", "data.root", "data.max_dropped",
    "data.validation", "data.workers", "batch.accumulation", "parallel.settings", "parallel.timeout", "parallel.cpu",
    "lora.merge",
})  # fmt: skip
"""Keys that a resumed run may have other values of, beside those of `SECTIONS_MAY_CHANGE`: they change what it costs,
what is measured or where things are, not what it learns. The base's weights, the samples and the micro-batches of a
step are compared as such."""


def describe_run(
    config: SftConfig, base: Path, lengths: Lengths, order: Order, args: TrainingArguments
) -> dict[str, Any]:
    """What every checkpoint's provenance says; `resume_from` reads ``config`` and ``resume``."""
    weights = fingerprint(base)
    return {
        "made_by": "sft",
        "config": config.model_dump(mode="json"),
        "base": public_name(config.model.path),
        "base_fingerprint": weights,
        "ranks": args.world_size,
        "resume": {
            "micro-batches of a step (ranks x batch.accumulation)": args.world_size * config.batch.accumulation,
            "model.path (its fingerprint)": weights,
            "data": lengths.digest,
            "order of the samples": digest(order),
        },
    }


def resume_from(config: SftConfig, record: Mapping[str, Any]) -> Path | None:
    """The checkpoint that a run goes on from; None: it starts anew.

    Args:
        config: of the run.
        record: `describe_run` of it.

    Raises:
        TrainingError: there is one, and it is not of this run; the message has every key that differs, and both values.
    """
    wanted = config.output.resume
    found = checkpoints(config.output.folder)
    if wanted == "never":
        if found:
            raise TrainingError(
                f"{config.output.folder} holds {found[-1].name} of an earlier run; choose another output.folder, or go "
                "on with output.resume=auto"
            )
        return None
    if wanted == "auto":
        if not found:
            return None
        wanted = found[-1]
    folder = Path(wanted)
    try:
        details = parse_json((folder / PROVENANCE).read_text(encoding="utf-8"))["details"]
        then = _what_decides_the_curve(SftConfig.model_validate(details["config"])) | details["resume"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{folder} is no checkpoint of a run of ours: {PROVENANCE}: {error}") from None
    now = _what_decides_the_curve(config) | record["resume"]
    changed = [key for key in now | then if then.get(key) != now.get(key)]
    if changed:
        told = "; ".join(f"{key} was {then.get(key)!r} and is {now.get(key)!r} now" for key in changed)
        raise TrainingError(
            f"{folder}: {told}: it would not be the run that was broken off; restore it, or start anew in another "
            "output.folder"
        )
    logger.info("going on from %s", folder)
    return folder


def _what_decides_the_curve(config: SftConfig) -> dict[str, Any]:
    """Keys and values that a resumed run must share."""
    values: dict[str, Any] = {}
    for section, content in config.model_dump(mode="json", exclude=set(SECTIONS_MAY_CHANGE)).items():
        values |= {f"{section}.{k}": v for k, v in content.items()} if isinstance(content, dict) else {section: content}
    free = MAY_CHANGE
    if config.optimizer.schedule == "constant" and not 0 < config.optimizer.warmup < 1:
        free |= {"optimizer.epochs", "optimizer.max_steps"}  # no rate depends on the number of steps
    return {key: value for key, value in values.items() if key not in free}
