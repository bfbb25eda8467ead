"""What a checkpoint folder holds, read from ``config.json``, the index and the safetensors headers alone.

Nothing here loads a tensor or imports torch: a header is some hundred kilobytes for a model of any size.
The safetensors format: 8 bytes little-endian length of the header, the header (JSON: name -> dtype, shape, data_offsets
relative to the end of the header), then the data without holes.

The header is not read by safetensors' own `safe_open` (0.8): it does not tell where a tensor's bytes are, which moving
them without loading needs, it takes a name that occurs twice, and its errors name neither file nor numbers.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element, by the safetensors name of its type."""

_MAX_HEADER = 100_000_000  # the limit of the reference reader

# Newer transformers and FSDP name modules by attribute path; published checkpoints use the flat names.
_NESTED = (
    ("model.visual.", "visual."),
    ("model.text_encoder.", "text_encoder."),
    ("model.text_proj.", "text_proj."),
    ("model.language_model.", "model."),
)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies on disk: bytes ``start`` to ``stop`` of ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in file order, and its metadata."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    size: int


def published_name(name: str) -> str:
    """The flat key of published checkpoints for a flat or nested one (``model.visual.x`` -> ``visual.x``)."""
    for nested, flat in _NESTED:
        if name.startswith(nested):
            return flat + name[len(nested) :]
    return name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is not there, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_shard(path: Path) -> Shard:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is truncated, has trailing or overlapping data, or a malformed header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: its header should take {length} bytes, the file "
                f"has {size}; copy it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
        metadata = header.pop("__metadata__", {})
        tensors = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise ValueError(f"{name} has shape {shape} at {begin}..{end}")
            tensors.append(TensorEntry(name, entry["dtype"], shape, path, begin + 8 + length, end + 8 + length))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed safetensors header: {error}") from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    position = 8 + length
    for tensor in tensors:
        expected = tensor.numel * DTYPE_BYTES[tensor.dtype] if tensor.dtype in DTYPE_BYTES else tensor.nbytes
        if tensor.start != position or tensor.nbytes != expected:
            raise CheckpointError(
                f"{path}: {tensor.name} ({tensor.dtype}, {list(tensor.shape)}) takes bytes "
                f"{tensor.start}..{tensor.stop}, expected {position}..{position + expected}; "
                "the file is damaged, copy it again"
            )
        position = tensor.stop
    if position != size:
        problem = "is truncated" if size < position else "has trailing bytes"
        raise CheckpointError(f"{path} {problem}: {size} bytes, its header describes {position}; copy it again")
    return Shard(path, tuple(tensors), metadata, size)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a name occurs twice")
    return keys


@dataclass(frozen=True)
class Checkpoint:
    """A folder's configuration and tensors. ``problems`` lists what is wrong with it; `require_sound` raises on any.

    ``tensors`` is keyed by published (flat) name; ``TensorEntry.name`` keeps the name on disk.
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    problems: tuple[str, ...] = field(default=())

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Checkpoint":
        """Read headers only; never raises for a damaged checkpoint, only for a folder that is none.

        Raises:
            CheckpointError: no folder, no readable ``config.json``.
        """
        root = Path(folder)
        if not root.is_dir():
            raise CheckpointError(f"{root} is not a folder")
        problems: list[str] = []
        config = read_json(root / CONFIG)
        on_disk = sorted(path.name for path in root.glob("*.safetensors"))
        index = None
        if (root / INDEX).exists():
            try:
                index = read_json(root / INDEX)
                _check_index(root, index, on_disk, problems)
            except CheckpointError as error:
                problems.append(str(error))
        elif len(on_disk) > 1:
            problems.append(f"{root} has {len(on_disk)} safetensors files {on_disk[:4]} but no {INDEX}; add the index")
        elif not on_disk:
            pickled = sorted(path.name for path in root.glob("*.bin"))
            problems.append(
                f"{root} has no safetensors files"
                + (
                    f", only {pickled[:3]}: save it with safe_serialization=True (pickles are not read)"
                    if pickled
                    else ""
                )
            )
        shards = []
        for name in on_disk:
            try:
                shards.append(read_shard(root / name))
            except CheckpointError as error:
                problems.append(str(error))
        checkpoint = cls(root, config, tuple(shards), index, ())
        problems += _check_names(checkpoint)
        return cls(root, config, tuple(shards), index, tuple(problems))

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by its published name, in file order."""
        return {published_name(tensor.name): tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def nested(self) -> bool:
        """Whether any tensor has a nested name on disk."""
        return any(name != tensor.name for name, tensor in self.tensors.items())

    def require_sound(self) -> "Checkpoint":
        """Itself, if files, headers and index agree.

        Raises:
            CheckpointError: listing every problem.
        """
        if self.problems:
            raise CheckpointError("; ".join(self.problems))
        return self


def _check_index(root: Path, index: dict[str, Any], on_disk: list[str], problems: list[str]) -> None:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{root / INDEX} has no weight_map from tensor to file names")
    listed = set(weight_map.values())
    outside = sorted(name for name in listed if Path(name).name != name)
    if outside:
        raise CheckpointError(f"{root / INDEX} names files outside the folder: {outside[:4]}")
    for name in sorted(listed - set(on_disk)):
        count = sum(file == name for file in weight_map.values())
        problems.append(f"{root / name} is missing: the index places {count} tensors there; copy it again")
    for name in sorted(set(on_disk) - listed):
        problems.append(f"{root / name} is not in {INDEX}; move it away or rebuild the index")


def _check_names(checkpoint: Checkpoint) -> Iterable[str]:
    seen: dict[str, Path] = {}
    for shard in checkpoint.shards:
        for tensor in shard.tensors:
            name = published_name(tensor.name)
            if name in seen:
                yield f"{name} is stored twice, in {seen[name].name} and {shard.path.name}; keep one"
            seen[name] = shard.path
    if checkpoint.index is None or not isinstance(checkpoint.index.get("weight_map"), dict):
        return
    weight_map = checkpoint.index["weight_map"]
    present = {tensor.name: shard.path.name for shard in checkpoint.shards for tensor in shard.tensors}
    read = {shard.path.name for shard in checkpoint.shards}
    wrong = sorted(name for name, file in weight_map.items() if file in read and present.get(name) != file)
    if wrong:
        yield f"{INDEX} places {wrong[0]} in {weight_map[wrong[0]]}, which does not hold it ({len(wrong)} such tensors)"
    unlisted = sorted(name for name, file in present.items() if name not in weight_map and file in weight_map.values())
    if unlisted:
        yield f"{present[unlisted[0]]} holds {unlisted[0]}, which {INDEX} does not list ({len(unlisted)} such tensors)"


# ---------------------------------------------------------------------- what the configuration calls for


def text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's settings: nested since transformers 4.52, at the top level before."""
    return config.get("text_config") or config


def query_aware_blocks(vision: Mapping[str, Any]) -> frozenset[int]:
    """Indices of the blocks that see a query, from a ``vision_config`` (see `VilavtVisionConfig` for the names).

    Raises:
        CheckpointError: ``integration_point`` is not a known name.
    """
    depth, point = _size(vision, "vision_config", "depth"), vision.get("integration_point")
    spans: dict[str | None, Iterable[int]] = {
        "all": range(depth),
        "early": range(depth // 2),
        "late": range(depth // 2, depth),
        "late2": range(3 * depth // 4, depth),
        "late3": range(depth // 4, depth),
        "sparse": vision.get("fullatt_block_indexes") or (),
        "none": (),
        None: (),
    }
    if point not in spans:
        raise CheckpointError(f"vision_config.integration_point={point!r}, expected one of {sorted(map(str, spans))}")
    return frozenset(spans[point])


def integration_points_of(blocks: Iterable[int], vision: Mapping[str, Any]) -> list[str]:
    """Names of the integration points that make exactly these blocks query-aware; several can coincide."""
    wanted = frozenset(blocks)
    names = ("late", "early", "late2", "late3", "all", "sparse")
    return [name for name in names if query_aware_blocks({**vision, "integration_point": name}) == wanted]


def stored_query_blocks(names: Iterable[str]) -> frozenset[int]:
    """Indices of the vision blocks for which `names` holds query projections."""
    found = (re.match(r"visual\.blocks\.(\d+)\.attn\.instruct_(key|value)_proj\.", name) for name in names)
    return frozenset(int(match[1]) for match in found if match)


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor that a ViLaVT with this ``config.json`` has.

    Without ``text_encoder_config`` the query encoder's tensors and ``text_proj`` are left out.

    Raises:
        CheckpointError: the configuration lacks a size, or names an unknown integration point.
    """
    vision, encoder = config.get("vision_config") or {}, config.get("text_encoder_config")
    tensors = _language_model(config) | _vision_tower(vision)
    if encoder:
        hidden = _size(vision, "vision_config", "hidden_size")
        tensors |= {f"text_encoder.{name}": shape for name, shape in query_encoder_tensors(encoder).items()}
        tensors |= {
            "text_proj.weight": (hidden, _size(encoder, "text_encoder_config", "hidden_size")),
            "text_proj.bias": (hidden,),
        }
    return tensors


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the LM head shares the embedding's weight and may therefore be absent."""
    return bool(config.get("tie_word_embeddings", text_fields(config).get("tie_word_embeddings", False)))


def _language_model(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    text = text_fields(config)

    def size(key: str) -> int:
        return _size(text, "text_config", key)

    hidden, inner, heads = size("hidden_size"), size("intermediate_size"), size("num_attention_heads")
    head = text.get("head_dim") or hidden // heads
    query, key = heads * head, size("num_key_value_heads") * head
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (size("vocab_size"), hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (size("vocab_size"), hidden),
    }
    for i in range(size("num_hidden_layers")):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.self_attn.q_proj.weight": (query, hidden),
            f"{layer}.self_attn.q_proj.bias": (query,),
            f"{layer}.self_attn.k_proj.weight": (key, hidden),
            f"{layer}.self_attn.k_proj.bias": (key,),
            f"{layer}.self_attn.v_proj.weight": (key, hidden),
            f"{layer}.self_attn.v_proj.bias": (key,),
            f"{layer}.self_attn.o_proj.weight": (hidden, query),
        } | _mlp_and_norms(layer, hidden, inner)
    return tensors


def _mlp_and_norms(layer: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{layer}.mlp.gate_proj.weight": (inner, hidden),
        f"{layer}.mlp.up_proj.weight": (inner, hidden),
        f"{layer}.mlp.down_proj.weight": (hidden, inner),
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
    }


def _vision_tower(vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    def size(key: str, default: int | None = None) -> int:
        return _size(vision, "vision_config", key, default)

    hidden, inner, patch = size("hidden_size"), size("intermediate_size"), size("patch_size", 14)
    merged = hidden * size("spatial_merge_size", 2) ** 2
    channels = size("in_channels", vision.get("in_chans") or 3)
    tensors: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (hidden, channels, size("temporal_patch_size", 2), patch, patch),
        "visual.merger.ln_q.weight": (hidden,),
        "visual.merger.mlp.0.weight": (merged, merged),
        "visual.merger.mlp.0.bias": (merged,),
        "visual.merger.mlp.2.weight": (size("out_hidden_size"), merged),
        "visual.merger.mlp.2.bias": (size("out_hidden_size"),),
    }
    linear = {
        "attn.qkv": (3 * hidden, hidden),
        "attn.proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    query = {"attn.instruct_key_proj": (hidden, hidden), "attn.instruct_value_proj": (hidden, hidden)}
    joint = query_aware_blocks(vision)
    for i in range(size("depth")):
        block = f"visual.blocks.{i}"
        tensors |= {f"{block}.norm1.weight": (hidden,), f"{block}.norm2.weight": (hidden,)}
        for name, shape in (linear | (query if i in joint else {})).items():
            tensors |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return tensors


def query_encoder_tensors(encoder: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name (without prefix) -> shape of a Qwen3 model's tensors.

    Raises:
        CheckpointError: the configuration lacks a size.
    """

    def size(key: str, default: int | None = None) -> int:
        return _size(encoder, "text_encoder_config", key, default)

    hidden, inner, heads = size("hidden_size"), size("intermediate_size"), size("num_attention_heads")
    head = size("head_dim", hidden // heads)
    query, key = heads * head, size("num_key_value_heads") * head
    tensors: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (size("vocab_size"), hidden),
        "norm.weight": (hidden,),
    }
    for i in range(size("num_hidden_layers")):
        layer = f"layers.{i}"
        tensors |= {
            f"{layer}.self_attn.q_proj.weight": (query, hidden),
            f"{layer}.self_attn.k_proj.weight": (key, hidden),
            f"{layer}.self_attn.v_proj.weight": (key, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, query),
            f"{layer}.self_attn.q_norm.weight": (head,),
            f"{layer}.self_attn.k_norm.weight": (head,),
        } | _mlp_and_norms(layer, hidden, inner)
        if encoder.get("attention_bias"):
            tensors |= {
                f"{layer}.self_attn.q_proj.bias": (query,),
                f"{layer}.self_attn.k_proj.bias": (key,),
                f"{layer}.self_attn.v_proj.bias": (key,),
                f"{layer}.self_attn.o_proj.bias": (hidden,),
            }
    return tensors


def _size(section: Mapping[str, Any], title: str, key: str, default: int | None = None) -> int:
    value = section.get(key)
    value = default if value is None else value
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"config.json: {title}.{key} is {value!r}, expected a positive whole number")
    return value


def disagreements(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """What keeps tensors of these published names and shapes from being the model of `config`.

    Returns:
        (errors, notes): errors make the model wrong or unloadable, notes (unused tensors) do not.
    """
    expected = expected_tensors(config)
    optional = {"lm_head.weight"} if is_tied(config) else set()
    errors, notes = [], []
    vision = config.get("vision_config") or {}
    stored, called = stored_query_blocks(shapes), query_aware_blocks(vision)
    if stored != called:
        fitting = integration_points_of(stored, vision)
        errors.append(
            f"query projections are stored for vision blocks {_ranges(stored)}, but "
            f"vision_config.integration_point={vision.get('integration_point')!r} calls for {_ranges(called)}"
            + (f"; {' or '.join(map(repr, fitting))} would fit" if fitting else "")
        )
    missing = sorted(
        name
        for name in expected
        if name not in shapes and name not in optional and not ("instruct_" in name and stored != called)
    )
    if missing:
        errors.append(
            f"{len(missing)} tensors are missing: {', '.join(missing[:6])}{', …' if len(missing) > 6 else ''}"
        )
    wrong = [name for name in expected if name in shapes and tuple(shapes[name]) != expected[name]]
    for name in wrong[:4]:
        errors.append(f"{name} has shape {list(shapes[name])}, config.json calls for {list(expected[name])}")
    if len(wrong) > 4:
        errors.append(f"{len(wrong) - 4} more tensors have another shape than config.json calls for")
    extra = sorted(name for name in shapes if name not in expected and "instruct_" not in name)
    if extra:
        notes.append(
            f"{len(extra)} tensors are not part of the model: {', '.join(extra[:6])}{', …' if len(extra) > 6 else ''}"
        )
    return errors, notes


def _ranges(numbers: Iterable[int]) -> str:
    ordered = sorted(numbers)
    spans: list[list[int]] = []
    for n in ordered:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"
