"""What serving a checkpoint takes: memory by part, tokens of a conversation, and how many fit into a GPU.

From ``config.json`` and the headers alone, so that it can be asked before there is a GPU. vLLM measures its own numbers
at start; these are what the choice of a machine needs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .architecture import Part, counted_part, expected_tensors, is_tied, query_aware_blocks, text_fields
from .checkpoint.companions import image_processor_size
from .checkpoint.inspection import PartSize
from .checkpoint.layout import Checkpoint
from .errors import CheckpointError, PlanError
from .regions import FACTOR, MAX_PIXELS, smart_resize
from .settings import fitting_limits, preset_of

GIB = 1024**3
ServedDtype = Literal["bfloat16", "float16", "float32"]
DTYPES: Mapping[ServedDtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Types that a model is served in, and bytes of one element."""
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored types that are cast to the type that is served; what is quantised stays as it is."""
REPLICATED: tuple[Part, ...] = ("text_encoder", "text_proj")
"""Parts that every GPU holds whole; the others are shared out."""
BLOCK = 16
"""Tokens of a block of vLLM's key-value cache."""
MAX_REGIONS = 16
"""Regions that are encoded together, unless the engine is told otherwise."""
PATCHES = 4
"""Patches of the vision tower per token of the language model."""


def largest_inquiry_pixels(max_image_pixels: int, regions: int = MAX_REGIONS) -> int:
    """Pixels of the largest inquiry that an engine lets in, unless it is told otherwise: as many full-size images as
    it may hold regions, but no more pixels than the largest image that the stock processor allows. Query-aware blocks
    attend over the whole inquiry, so time and memory grow with its square.

    Args:
        max_image_pixels: of one image, after resizing.
        regions: that are encoded together.
    """
    return min(regions * max_image_pixels, max(max_image_pixels, MAX_PIXELS))


@dataclass(frozen=True)
class Machine:
    """What serves: GPUs that hold one replica together (``--tensor-parallel-size``)."""

    gpu_memory: float = 80.0
    """GiB of one GPU."""
    gpus: int = 1
    utilization: float = 0.92
    """Share of it that vLLM takes (``--gpu-memory-utilization``)."""
    reserve: float = 4.0
    """GiB of one GPU for activations and CUDA graphs. vLLM measures it at start, with the largest inquiry."""
    batched_tokens: int = 8192
    """``--max-num-batched-tokens``."""

    def __post_init__(self) -> None:
        for name, fits in (
            ("gpu_memory", self.gpu_memory > 0),
            ("gpus", self.gpus >= 1),
            ("utilization", 0 < self.utilization <= 1),
            ("reserve", self.reserve >= 0),
            ("batched_tokens", self.batched_tokens >= 1),
        ):
            if not fits:
                raise PlanError(f"{name} is {getattr(self, name)}: no machine is like that")


@dataclass(frozen=True)
class PlannedTalk:
    """A conversation to plan with."""

    picture: tuple[int, int] = (4000, 3000)
    """Width and height in pixels, as sent."""
    pictures: int = 1
    crops: int = 4
    """Each as large as the checkpoint's limits let a crop be."""
    text_tokens: int = 1500
    """Of everything that is not an image: system text, questions, turns."""

    def __post_init__(self) -> None:
        for name in ("pictures", "crops", "text_tokens"):
            if getattr(self, name) < 0:
                raise PlanError(f"{name} is {getattr(self, name)}, it must be at least 0")
        if self.pictures + self.crops + self.text_tokens == 0:
            raise PlanError("a conversation without images and text has no tokens to plan with")


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Bytes are of one GPU unless something else is said."""

    parts: Mapping[str, PartSize]
    """Parameters and bytes of each part, as served, of all GPUs together; a replicated part once."""
    dtype: ServedDtype
    weight_bytes: int
    encoder_cache_bytes: int
    """Embeddings of images that wait to be read: of the largest inquiry or ``batched_tokens``, whichever is more."""
    kv_bytes_per_token: int
    kv_cache_bytes: int
    """What is left for keys and values; 0 if the weights do not fit."""
    picture_tokens: int
    """Of one original."""
    crop_tokens: int
    """Of one crop, at most."""
    conversation_tokens: int
    """Of the whole conversation, at most the context."""
    context: int
    """Tokens of the longest conversation that this checkpoint and its limits allow."""
    conversations: int
    """That fit at the same time."""
    full_conversations: int
    """That fit if each is as long as the context."""
    vision_flops: float
    """Floating-point operations of encoding the conversation's images once, on all GPUs together."""
    language_flops: float
    """Of reading its tokens once. A turn reads again only what no cache holds."""

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(part.parameters for part in self.parts.values())

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return asdict(self) | {"parameters": self.parameters}


def plan(
    checkpoint: str | os.PathLike,
    machine: Machine | None = None,
    talk: PlannedTalk | None = None,
    *,
    dtype: ServedDtype = "bfloat16",
) -> Plan:
    """Plan how a checkpoint is served.

    Args:
        checkpoint: folder; without weights in it, sizes follow from ``config.json``.
        machine: what serves; None: one GPU of 80 GiB.
        talk: what is asked; None: four crops of a 12-megapixel image.
        dtype: that it is served in.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or its configuration lacks a size.
        PlanError: the GPUs cannot share the model's heads out.
    """
    machine, talk, root = machine or Machine(), talk or PlannedTalk(), Path(checkpoint)
    found = Checkpoint.open(root)
    config, element = found.config, DTYPES[dtype]
    shapes = tensor_shapes(found)
    parts = _parts(found, shapes, element)
    text = LanguageSizes.of(config)
    tower_heads = (config.get("vision_config") or {}).get("num_heads") or text.heads
    for part, heads in (("language model", text.heads), ("vision tower", tower_heads)):
        if heads % machine.gpus:
            raise PlanError(f"the {part}'s {heads} attention heads cannot be shared out among {machine.gpus} GPUs")

    size = image_processor_size(root)
    limits = fitting_limits(preset_of(root).limits, size, text.context)
    context = min(limits.max_context or text.context, text.context)
    width, height = talk.picture
    rows, columns = smart_resize(height, width, min_pixels=limits.min_pixels, max_pixels=limits.max_pixels)
    picture = rows * columns // FACTOR**2
    crop = int(limits.crop_max_pixels or limits.max_pixels) // FACTOR**2
    tokens = min(context, talk.pictures * picture + talk.crops * crop + talk.text_tokens)

    weights = sum(
        part.nbytes if name in REPLICATED else math.ceil(part.nbytes / machine.gpus) for name, part in parts.items()
    )
    inquiry = int(limits.max_inquiry_pixels or largest_inquiry_pixels(size["longest_edge"] or MAX_PIXELS)) // FACTOR**2
    encoder_cache = max(inquiry, machine.batched_tokens) * text.hidden * element
    kv = 2 * text.layers * max(1, text.kv_heads // machine.gpus) * text.head * element
    free = int((machine.gpu_memory * machine.utilization - machine.reserve) * GIB) - weights - encoder_cache
    free = max(0, free)
    pictures = [picture] * talk.pictures + [crop] * talk.crops
    return Plan(
        parts=parts,
        dtype=dtype,
        weight_bytes=weights,
        encoder_cache_bytes=encoder_cache,
        kv_bytes_per_token=kv,
        kv_cache_bytes=free,
        picture_tokens=picture,
        crop_tokens=crop,
        conversation_tokens=tokens,
        context=context,
        conversations=free // (_in_blocks(tokens) * kv),
        full_conversations=free // (_in_blocks(context) * kv),
        vision_flops=sum(_encoding(config, parts, count) for count in pictures),
        language_flops=_reading(parts, shapes, text, tokens),
    )


@dataclass(frozen=True)
class LanguageSizes:
    """Sizes of the language model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    context: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LanguageSizes:
        """From ``config.json``.

        Raises:
            CheckpointError: it lacks a size.
        """
        expected_tensors({**config, "text_encoder_config": None})  # names a size that is missing
        text = text_fields(config)
        hidden, heads, context = text["hidden_size"], text["num_attention_heads"], text.get("max_position_embeddings")
        if type(context) is not int or context <= 0:
            raise CheckpointError(f"config.json: max_position_embeddings is {context!r}, expected a positive number")
        head = text.get("head_dim") or hidden // heads
        return cls(hidden, text["num_hidden_layers"], heads, text["num_key_value_heads"], head, context)


def tensor_shapes(found: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of the tensors that are there, or that the configuration asks for if there are no weights yet.

    Raises:
        CheckpointError: weights are damaged, or the configuration lacks a size.
    """
    if any(found.folder.glob("*.safetensors")) or found.index is not None:
        found.require_sound()
        return {name: tensor.shape for name, tensor in found.tensors.items()}
    if not isinstance(found.config.get("text_encoder_config"), dict):
        raise CheckpointError(f"{found.folder} has neither weights nor a text_encoder_config: its sizes are unknown")
    return configured_shapes(found.config)


def configured_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the tensors that ``config.json`` asks for, but of an LM head that is tied.

    Raises:
        CheckpointError: it lacks a size.
    """
    tied = is_tied(config)
    return {n: shape for n, shape in expected_tensors(config).items() if not (tied and n.startswith("lm_head."))}


def _parts(found: Checkpoint, shapes: Mapping[str, tuple[int, ...]], element: int) -> dict[str, PartSize]:
    totals: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        stored, count = found.tensors.get(name), math.prod(shape)
        nbytes = count * element if stored is None or stored.dtype in _FLOATS else stored.nbytes
        parameters, before = totals.get(part := counted_part(name), (0, 0))
        totals[part] = (parameters + count, before + nbytes)
    return {part: PartSize(*total) for part, total in sorted(totals.items())}


def _in_blocks(tokens: int) -> int:
    return math.ceil(tokens / BLOCK) * BLOCK


def _of(parts: Mapping[str, PartSize], name: str) -> int:
    return parts[name].parameters if name in parts else 0


def _encoding(config: Mapping[str, Any], parts: Mapping[str, PartSize], tokens: int) -> float:
    """Operations of encoding one image: two per weight and patch, and attention over the whole image in the blocks
    that have it. Attention within windows is left out.
    """
    vision, patches = config["vision_config"], tokens * PATCHES
    whole = query_aware_blocks(vision) | {b for b in vision.get("fullatt_block_indexes") or () if type(b) is int}
    weights = 2.0 * (_of(parts, "vision_tower") * patches + _of(parts, "merger") * tokens)
    return weights + 4.0 * len(whole) * vision["hidden_size"] * patches**2


def _reading(
    parts: Mapping[str, PartSize], shapes: Mapping[str, tuple[int, ...]], text: LanguageSizes, tokens: int
) -> float:
    """Operations of reading so many tokens: two per weight that is not the embedding, and causal attention."""
    embedding = math.prod(shapes.get("model.embed_tokens.weight", (0,)))
    weights = 2.0 * (_of(parts, "language_model") - embedding) * tokens
    return weights + 2.0 * text.layers * text.heads * text.head * tokens**2
