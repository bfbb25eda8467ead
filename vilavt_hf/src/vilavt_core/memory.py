"""What a model takes on one GPU, by what is done with it: asked, fine-tuned, taught by GRPO. One formula for all:

    weights + gradients + optimiser states + keys and values + gathered + activations

`gathered` is what sharded training brings together for a moment, and copies of weights in the type that computes. Sizes
follow from ``config.json``. Factors of activations are those that were measured on small models in torch 2.13 with the
layers of transformers 5.24; tests hold all of it to measurements.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from .architecture import PARTS, Part, find_part, is_query_projection, part_of, published_name, text_fields
from .checkpoint.config import QWEN3_EMBEDDING_SIZES
from .checkpoint.layout import Checkpoint
from .errors import PlanError
from .markdown import markdown_table
from .regions import FACTOR
from .sizing import DTYPES, GIB, PATCHES, REPLICATED, LanguageSizes, ServedDtype, configured_shapes, tensor_shapes

Quantized = Literal["int8", "int4"]
Method = Literal["full", "lora", "qlora"]
Strategy = Literal["ddp", "zero2", "zero3", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "zero2", "zero3", "fsdp2")

_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15],
    "integration_point": "late",
}


def _shape(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, vision: int) -> dict[str, Any]:
    return {
        "model_type": "vilavt",
        "text_config": {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "max_position_embeddings": 128000,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {**_VISION, "intermediate_size": vision, "out_hidden_size": hidden},
        "text_encoder_config": dict(QWEN3_EMBEDDING_SIZES),
        "tie_word_embeddings": vocabulary == 151936,
    }


SHAPES: Mapping[str, dict[str, Any]] = {
    "3b": _shape(2048, 11008, 36, 16, 2, 151936, 3420),
    "7b": _shape(3584, 18944, 28, 28, 4, 152064, 3420),
    "32b": _shape(5120, 27648, 64, 40, 8, 152064, 3456),
    "72b": _shape(8192, 29568, 80, 64, 8, 152064, 3456),
}
"""``config.json`` of a ViLaVT made of each size of Qwen2.5-VL and of Qwen3-Embedding-0.6B."""

_BLOCK = 64
"""Weights that share a scale of 4 bytes in int4."""
_LOSS_CHUNK = 4096
"""Labelled tokens whose logits are in fp32 at a time."""
_BUCKETS = 4 * 500_000_000
"""Bytes of the two buckets of ``zero2.json``, in bf16, each held twice."""
_GATHERED_BY_ZERO3 = 1_000_000_000
"""Parameters that ZeRO-3 holds whole at a time, at most."""


@dataclass(frozen=True)
class Load:
    """What is done at a time."""

    tokens: int = 16384
    """Of a conversation, or of a pack."""
    picture_tokens: int = 8192
    """Of them, those of images that are encoded at once; each is four patches."""
    labelled: int = 2048
    """Of them, those that carry loss."""
    conversations: int = 1
    """At the same time, where it is asked."""

    def __post_init__(self) -> None:
        for field in fields(self):
            low = 0 if field.name in ("picture_tokens", "labelled") else 1
            if (value := getattr(self, field.name)) < low:
                raise PlanError(f"{field.name} is {value}, it must be at least {low}")
        for name in ("picture_tokens", "labelled"):
            if (value := getattr(self, name)) > self.tokens:
                raise PlanError(f"{name} is {value}, more than all {self.tokens} tokens")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, at most."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    cache: int = 0
    """Keys and values."""
    gathered: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class ModelSizes:
    """Sizes that memory follows from."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor, by its published name; of an LM head that is tied none."""
    text: LanguageSizes
    inner: int
    """Width of the language model's MLP."""
    vocabulary: int
    vision_hidden: int
    vision_inner: int
    vision_blocks: int

    @classmethod
    def of(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> ModelSizes:
        """From ``config.json``.

        Args:
            config: its content.
            shapes: of the tensors that are there, by any of their names; None: of those that it asks for.

        Raises:
            CheckpointError: it lacks a size.
        """
        shapes = configured_shapes(config) if shapes is None else shapes
        text, vision = text_fields(config), config["vision_config"]
        return cls(
            shapes={published_name(name): shape for name, shape in shapes.items() if find_part(name) is not None},
            text=LanguageSizes.of(config),
            inner=text["intermediate_size"],
            vocabulary=text["vocab_size"],
            vision_hidden=vision["hidden_size"],
            vision_inner=vision["intermediate_size"],
            vision_blocks=vision["depth"],
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: str | os.PathLike) -> ModelSizes:
        """From a folder, with weights or without.

        Raises:
            CheckpointError: there is no checkpoint, it is damaged, or its configuration lacks a size.
        """
        found = Checkpoint.open(Path(checkpoint))
        return cls.of(found.config, tensor_shapes(found))

    def count(self, parts: tuple[Part, ...] = PARTS) -> int:
        """Parameters of these parts."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if part_of(name) in parts)

    def adapter(self, rank: int) -> int:
        """Parameters of an adapter on the seven linear layers of each block of the language model."""
        return sum(rank * sum(shape) for name, shape in self.shapes.items() if _is_block_matrix(name, shape))

    @property
    def block(self) -> int:
        """Parameters of one block of the language model."""
        return sum(math.prod(s) for name, s in self.shapes.items() if name.startswith("model.layers.0."))

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding; the LM head has as many."""
        return self.vocabulary * self.text.hidden


def stored_bytes(
    sizes: ModelSizes, element: int, quantize: Quantized | None = None, parts: tuple[Part, ...] = PARTS
) -> int:
    """Bytes of weights.

    Args:
        sizes: of the model.
        element: bytes of a weight that is not quantised.
        quantize: ``int8`` has 4 bytes a row for its scale, ``int4`` 4 bytes in every block of 64; what keeps its type
            is said in `vilavt_hf.quantization`.
        parts: that are counted.
    """
    total = 0
    for name, shape in sizes.shapes.items():
        if part_of(name) not in parts:
            continue
        count = math.prod(shape)
        if quantize is None or not _is_quantized(name, shape, quantize):
            total += count * element
        elif quantize == "int8":
            total += count + 4 * shape[0]
        else:
            total += math.ceil(count / 2) + 4 * math.ceil(count / _BLOCK)
    return total


def asked(
    sizes: ModelSizes, work: Load = Load(), *, dtype: ServedDtype = "bfloat16", quantize: Quantized | None = None
) -> Memory:  # fmt: skip
    """What answering takes in transformers (`VilavtChat`): keys and values have a quarter of room to grow.

    Args:
        sizes: of the model.
        work: ``labelled`` counts nothing.
        dtype: that it computes in.
        quantize: how weights are stored.
    """
    element, text = DTYPES[dtype], sizes.text
    tokens = work.tokens * work.conversations
    cache = 2 * text.layers * text.kv_heads * text.head * element * tokens
    reading = tokens * element * (4 * text.hidden + 3 * sizes.inner + 2 * text.head)
    return Memory(
        weights=stored_bytes(sizes, element, quantize),
        cache=cache + cache // 4,
        activations=max(_encoding(sizes, work, element), reading),
    )


def trained(
    sizes: ModelSizes,
    work: Load = Load(),
    *,
    method: Method = "full",
    strategy: Strategy = "ddp",
    gpus: int = 1,
    frozen: tuple[Part, ...] = ("text_encoder",),
    rank: int = 64,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> Memory:  # fmt: skip
    """What a step of ``vilavt sft`` takes, with gradient checkpointing and one pack at a time.

    Args:
        sizes: of the model.
        work: its ``tokens`` are those of a pack.
        method: all weights; adapters; adapters over weights in 4 bits.
        strategy: how GPUs share the work.
        gpus: that share it.
        frozen: parts that a full run leaves as they are.
        rank: of adapters.
        dtype: that it computes in; weights and optimiser states are fp32, but in 4 bits.

    Raises:
        PlanError: weights in 4 bits cannot be shared out.
    """
    if method == "qlora" and strategy != "ddp":
        raise PlanError(f"weights in 4 bits are not shared out: {strategy} trains adapters with method lora")
    element = DTYPES[dtype]
    rest = tuple(part for part in PARTS if part not in frozen) if method == "full" else ()
    learns = sizes.count(rest) if method == "full" else sizes.adapter(rank)
    fixed = sizes.count() - sizes.count(rest)
    share = 1 if strategy == "ddp" else gpus
    if method == "qlora":
        still = stored_bytes(sizes, element, "int4")
    elif strategy == "zero2":
        still = fixed * element
    elif strategy == "zero3":
        still = math.ceil(fixed * element / share)
    else:
        still = math.ceil(fixed * 4 / share)
    activations = _training_activations(sizes, work, element, method)
    if strategy == "ddp":
        # Autocast keeps copies of what learns through the forward pass, and drops them before the backward pass.
        copies = learns * element + _kept_for_backward(sizes, work, element, method) if element < 4 else 0
        return Memory(still + 4 * learns, 4 * learns, 8 * learns, activations=max(activations, copies))
    if strategy == "zero2":
        states = math.ceil(12 * learns / share)  # fp32 weights with the optimiser's two
        gradients = math.ceil(learns * element / share)
        return Memory(still + learns * element, gradients, states, 0, _BUCKETS, activations)
    if strategy == "zero3":
        whole = min(_GATHERED_BY_ZERO3, sizes.count()) * element
        own = math.ceil(learns * element / share)
        return Memory(still + own, own, math.ceil(12 * learns / share), 0, whole, activations)
    root = (2 if "lm_head.weight" in sizes.shapes else 1) * sizes.embedding
    # what belongs to no block is whole through the step; two blocks are, while one is awaited, and gradients of one
    gathered = element * (root + 2 * sizes.block) + (4 * sizes.block if method == "full" else 0)
    own = math.ceil(4 * learns / share)
    return Memory(still + own, own, math.ceil(8 * learns / share), 0, gathered, activations)


def taught(
    sizes: ModelSizes,
    work: Load = Load(conversations=8),
    *,
    gpus: int = 8,
    tensor_parallel: int = 2,
    frozen: tuple[Part, ...] = ("vision_tower", "merger", "text_encoder"),
) -> Memory:  # fmt: skip
    """What a step of GRPO takes in verl, as the recipe ``vilavt_7b_grpo`` has it: FSDP2, vLLM on the same GPUs, no
    reference model, nothing offloaded. The larger of its two phases: rollout, beside the states; or the update.

    Args:
        sizes: of the model.
        work: ``conversations`` are those that one vLLM engine holds at the same time.
        gpus: that share the states.
        tensor_parallel: GPUs of one vLLM engine.
        frozen: parts that do not learn.
    """
    update = trained(sizes, work, method="full", strategy="fsdp2", gpus=gpus, frozen=frozen)
    text, engine = sizes.text, tensor_parallel
    whole = stored_bytes(sizes, 2, parts=REPLICATED)
    weights = whole + math.ceil((stored_bytes(sizes, 2) - whole) / engine)
    cache = 4 * text.layers * max(1, text.kv_heads // engine) * text.head * work.tokens * work.conversations
    rollout = Memory(
        update.weights + weights, update.gradients, update.optimizer, cache, 0, _encoding(sizes, work, 2)
    )  # fmt: skip
    return max(update, rollout, key=lambda memory: memory.total)


def ways(work: Load = Load(), gpus: int = 8) -> dict[str, Any]:
    """What is done with a model -> a function from its sizes to memory: the rows of the table."""
    rows: dict[str, Any] = {
        "asked, bf16": lambda sizes: asked(sizes, work),
        "asked, int8": lambda sizes: asked(sizes, work, quantize="int8"),
        "asked, int4": lambda sizes: asked(sizes, work, quantize="int4"),
    }
    for method, strategy in (
        ("full", "ddp"),
        *(("full", strategy) for strategy in STRATEGIES[1:]),
        ("lora", "ddp"),
        ("lora", "fsdp2"),
        ("qlora", "ddp"),
    ):
        name = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}[method]
        rows[f"SFT, {name}, {strategy}"] = lambda sizes, method=method, strategy=strategy: trained(
            sizes, work, method=method, strategy=strategy, gpus=gpus
        )
    eight = replace(work, conversations=8)
    rows["GRPO, fsdp2 and vLLM"] = lambda sizes: taught(sizes, eight, gpus=gpus, tensor_parallel=min(2, gpus))
    return rows


def memory_table(models: Mapping[str, ModelSizes], work: Load = Load(), gpus: int = 8) -> str:
    """GiB on one GPU as Markdown: a column for each model."""
    rows = [
        ["parameters", *(f"{sizes.count() / 1e9:.2f} B" for sizes in models.values())],
        *(
            [way, *(f"{memory(sizes).total / GIB:,.1f}" for sizes in models.values())]
            for way, memory in ways(work, gpus).items()
        ),
    ]
    return markdown_table(["GiB of each GPU", *models], rows)


# ------------------------------------------------------------------------------------------------------ the formula


def _is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("model.layers.") and len(shape) == 2


def _is_quantized(name: str, shape: tuple[int, ...], quantize: Quantized) -> bool:
    """Linear layers; not those of `vilavt_hf.quantization.unquantised`, in int4 not those of the tower."""
    if len(shape) != 2 or name.endswith("embed_tokens.weight") or name.startswith(("lm_head.", "text_proj.")):
        return False
    return not is_query_projection(name) and not (quantize == "int4" and name.startswith("visual."))


def _encoding(sizes: ModelSizes, work: Load, element: int) -> int:
    """Of images that are encoded together, without gradient: attention, whose rotation is in fp32, or the MLP; and
    the pixels of every patch in fp32, and in the type that computes.
    """
    hidden, inner = sizes.vision_hidden, sizes.vision_inner
    widest = max(hidden * (7.5 * element + 16), (2 * hidden + 3 * inner) * element)
    return int(PATCHES * work.picture_tokens * (widest + _pixels(element)))


def _pixels(element: int) -> int:
    values = 3 * 2 * FACTOR**2 // PATCHES  # two frames, three colours
    return values * (4 + (element if element < 4 else 0))


def _kept_for_backward(sizes: ModelSizes, work: Load, element: int, method: Method) -> int:
    """With gradient checkpointing: what enters every block, in fp32, the tower's in the type that computes. Adapters
    need no gradient of the tower.
    """
    kept = 4 * sizes.text.layers * work.tokens * sizes.text.hidden
    if method == "full":
        patches = PATCHES * work.picture_tokens
        kept += patches * (sizes.vision_blocks * sizes.vision_hidden * element + _pixels(element))
    return kept


def _training_activations(sizes: ModelSizes, work: Load, element: int, method: Method) -> int:
    """In the backward pass: what is kept, and all of one block, or the logits."""
    hidden, inner, patches = sizes.text.hidden, sizes.inner, PATCHES * work.picture_tokens
    wide, cast = (5.5, 0) if method == "full" else (4.5, element * sizes.block)  # frozen weights are cast each time
    of_block = work.tokens * (44 * hidden + (2 + wide * element) * inner) + cast
    in_fp32 = min(work.labelled, _LOSS_CHUNK)
    logits = sizes.vocabulary * (work.labelled * element + in_fp32 * (12.5 - element))
    logits += sizes.embedding * (4 + element if method == "full" else element)
    kept = _kept_for_backward(sizes, work, element, method)
    reading = kept + max(of_block, logits)
    if method != "full":
        return int(max(reading, _encoding(sizes, work, element)))
    of_vision = patches * (sizes.vision_hidden * (25 + 6.2 * element) + (2 + 5.5 * element) * sizes.vision_inner)
    of_text = 4 * sizes.text.layers * work.tokens * hidden  # free again when the tower's turn has come
    return int(max(reading, kept - of_text + of_vision))
