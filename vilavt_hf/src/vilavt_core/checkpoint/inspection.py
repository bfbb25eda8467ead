"""Say what a checkpoint is and what it lacks, from its headers."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..architecture import (
    counted_part,
    is_added,
    query_aware_blocks,
    query_encoder_part,
    stored_query_blocks,
    text_fields,
)
from ..errors import CheckpointError
from .build_info import fingerprint
from .companions import PROMPTS, Missing, missing_companions
from .config import ARCHITECTURE, derived_text_encoder_config
from .layout import Checkpoint, disagreements
from .quantisation import Quantisation, quantisation_of


class Flavour(StrEnum):
    """What kind of checkpoint a folder holds."""

    OURS = "vilavt-hf"
    PUBLISHED_RL = "published RL/vLLM format"
    PUBLISHED_SFT = "published SFT format"
    STOCK = "stock Qwen2.5-VL"
    QUERY_ENCODER = "query encoder (Qwen3)"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class PartSize:
    """Parameters and bytes of one part of the model."""

    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """Findings of `inspect_checkpoint`."""

    folder: Path
    flavour: Flavour
    nested_names: bool
    """Tensor names are ``model.visual.*`` rather than the published ``visual.*``."""
    architectures: tuple[str, ...]
    model_type: str | None
    integration_point: str | None
    depth: int | None
    """Number of vision blocks."""
    query_aware_blocks: tuple[int, ...]
    fullatt_block_indexes: tuple[int, ...]
    parts: Mapping[str, PartSize]
    """By the names of `vilavt_core.architecture.counted_part`."""
    dtypes: Mapping[str, int]
    """Safetensors type -> parameters stored in it."""
    quantisation: Quantisation | None
    """What the configuration says of quantised weights; None: they are whole."""
    files: Mapping[str, int]
    """Weight file -> bytes."""
    fingerprint: str | None
    """None if the files are damaged."""
    prompts: bool
    """Whether the checkpoint carries its own prompt set."""
    problems: tuple[str, ...] = field(default=())
    """What is damaged, missing or contradictory among weights and configuration."""
    missing: tuple[Missing, ...] = field(default=())
    """Companion files that are not there."""
    notes: tuple[str, ...] = field(default=())

    @property
    def complete(self) -> bool:
        """Whether nothing is damaged or missing."""
        return not self.problems and not self.missing

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(part.parameters for part in self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        out = asdict(self) | {
            "folder": str(self.folder),
            "flavour": self.flavour.name.lower(),
            "parameters": self.parameters,
            "complete": self.complete,
        }
        return out


def inspect_checkpoint(folder: str | os.PathLike) -> Inspection:
    """Read configuration and headers; damage is reported in the result, not raised.

    Raises:
        CheckpointError: the folder holds no checkpoint at all.
    """
    root = Path(folder)
    checkpoint = Checkpoint.open(root)
    config = checkpoint.config
    vision = config.get("vision_config") or {}
    flavour = detect_flavour(checkpoint)
    problems = list(checkpoint.problems)
    notes: list[str] = []
    if flavour in (Flavour.OURS, Flavour.PUBLISHED_RL, Flavour.PUBLISHED_SFT):
        errors, notes = _model_problems(checkpoint)
        problems += errors
    if flavour is Flavour.PUBLISHED_SFT:
        notes.append("model_type qwen2_5_vl: Auto classes load it as a stock Qwen2.5-VL; run `vilavt convert`")
    if flavour is Flavour.STOCK:
        notes.append("no query encoder: make a ViLaVT from it with `vilavt init`")
    if checkpoint.nested:
        notes.append("nested tensor names: `vilavt convert` writes the published ones")
    depth = vision.get("depth")
    return Inspection(
        folder=root,
        flavour=flavour,
        nested_names=checkpoint.nested,
        architectures=tuple(config.get("architectures") or text_fields(config).get("architectures") or ()),
        model_type=config.get("model_type"),
        integration_point=vision.get("integration_point"),
        depth=depth if isinstance(depth, int) else None,
        query_aware_blocks=_query_aware(checkpoint),
        fullatt_block_indexes=tuple(vision.get("fullatt_block_indexes") or ()),
        parts=_parts(checkpoint),
        dtypes=_dtypes(checkpoint),
        quantisation=quantisation_of(config),
        files={shard.path.name: shard.size for shard in checkpoint.shards},
        fingerprint=None if checkpoint.problems else fingerprint(root),
        prompts=(root / PROMPTS).is_dir(),
        problems=tuple(problems),
        missing=() if flavour in (Flavour.QUERY_ENCODER, Flavour.UNKNOWN) else _missing(root, flavour),
        notes=tuple(notes),
    )


def detect_flavour(checkpoint: Checkpoint) -> Flavour:
    """By ``model_type``, ``text_encoder_config``, the integration point and the tensors; class names decide nothing."""
    return flavour_of(checkpoint.config, checkpoint.tensors)


def flavour_of(config: Mapping[str, Any], tensors: Iterable[str] = ()) -> Flavour:
    """`detect_flavour` by ``config.json`` and the published names of the tensors, if they are known."""
    if config.get("model_type") == "vilavt" or isinstance(config.get("text_encoder_config"), dict):
        ours = ARCHITECTURE in (config.get("architectures") or ())
        return Flavour.OURS if ours else Flavour.PUBLISHED_RL
    if config.get("model_type") in ("qwen2_5_vl", "qwen2_5_vl_text"):
        vision = config.get("vision_config") or {}
        added = any(is_added(name) for name in tensors)
        return Flavour.PUBLISHED_SFT if added or vision.get("integration_point") else Flavour.STOCK
    return Flavour.QUERY_ENCODER if config.get("model_type") == "qwen3" else Flavour.UNKNOWN


def _parts(checkpoint: Checkpoint) -> dict[str, PartSize]:
    totals: dict[str, tuple[int, int]] = {}
    for name, tensor in checkpoint.tensors.items():
        part = counted_part(name)
        parameters, nbytes = totals.get(part, (0, 0))
        totals[part] = (parameters + tensor.numel, nbytes + tensor.nbytes)
    return {part: PartSize(*total) for part, total in sorted(totals.items())}


def _dtypes(checkpoint: Checkpoint) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel
    return counts


def _query_aware(checkpoint: Checkpoint) -> tuple[int, ...]:
    try:
        return tuple(sorted(query_aware_blocks(checkpoint.config.get("vision_config") or {})))
    except CheckpointError:
        return tuple(sorted(stored_query_blocks(checkpoint.tensors)))


def _model_problems(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    config: dict[str, Any] = dict(checkpoint.config)
    try:
        if not config.get("text_encoder_config"):
            config["text_encoder_config"] = derived_text_encoder_config(query_encoder_part(shapes))
        return disagreements(config, shapes)
    except CheckpointError as error:
        return [str(error)], []


def _missing(root: Path, flavour: Flavour) -> tuple[Missing, ...]:
    found: Iterable[Missing] = missing_companions(root)
    if flavour is Flavour.STOCK:
        found = (item for item in found if not item.name.startswith("query_tokenizer"))
    return tuple(found)
