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
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..architecture import (
    expected_tensors,
    integration_points_of,
    is_query_projection,
    is_tied,
    published_name,
    query_aware_blocks,
    stored_query_blocks,
)
from ..errors import CheckpointError
from ..failures import quoted, quoted_error
from ..json_text import parse_json
from ..spelling import did_you_mean
from .quantisation import quantisation_of, whole_shapes

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
PARTIAL, REPLACED = ".partial-", ".replaced-"
"""Between the name of a folder and the number of the process that makes or replaces it."""
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element, by the safetensors name of its type."""

_MAX_HEADER = 100_000_000  # the limit of the reference reader
_MAX_DIMENSIONS = 64
_MOST_NAMED = 8
"""Missing files that are named one by one."""
_KINDS: Mapping[str, type] = {
    "vision_config": dict,
    "text_config": dict,
    "text_encoder_config": dict,
    "architectures": list,
    "model_type": str,
}
_VISION_KINDS: Mapping[str, type] = {"integration_point": str, "fullatt_block_indexes": list}
"""Fields of ``config.json`` that are read, and what each must be if it is there."""


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
class ShardFile:
    """One safetensors file: its tensors in file order, and its metadata."""

    path: Path
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    size: int


def _size_of(path: Path) -> int:
    """Bytes of a file that can be read to its end: a pipe may never come to one."""
    try:
        if not os.path.lexists(path):
            raise CheckpointError(f"{path} does not exist")
        if not path.exists():
            raise CheckpointError(f"{path} is a link to nothing; copy the file that it meant")
        if not path.is_file():
            raise CheckpointError(f"{path} is no regular file")
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is not there, not JSON, or not an object.
    """
    size = _size_of(path)
    if size > _MAX_HEADER:
        raise CheckpointError(f"{path} has {size} bytes, at most {_MAX_HEADER} are read")
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({quoted_error(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_shard(path: Path) -> ShardFile:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is truncated, has trailing or overlapping data, or a malformed header.
    """
    size = _size_of(path)
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: its header should take {length} bytes, the file "
                    f"has {size}; copy it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError(f"its __metadata__ is a {type(metadata).__name__}, expected an object")
        tensors = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if len(shape) > _MAX_DIMENSIONS or not isinstance(entry["dtype"], str):
                raise ValueError(f"{name} is of type {entry['dtype']!r} and has {len(shape)} dimensions")
            if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
                raise ValueError(f"{name} has shape {shape} at {begin}..{end}")
            tensors.append(TensorEntry(name, entry["dtype"], shape, path, begin + 8 + length, end + 8 + length))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed safetensors header: {quoted_error(error)}") from error
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
    return ShardFile(path, tuple(tensors), metadata, size)


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
    shards: tuple[ShardFile, ...]
    index: dict[str, Any] | None
    problems: tuple[str, ...] = field(default=())

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Checkpoint":
        """Read headers only; never raises for a damaged checkpoint, only for a folder that is none.

        Raises:
            CheckpointError: no folder, no readable ``config.json``.
        """
        root = Path(folder)
        if not (root / CONFIG).exists():
            raise CheckpointError(no_checkpoint(root))
        problems: list[str] = []
        config = read_json(root / CONFIG)
        problems += _take_out_wrong_types(config)
        on_disk = sorted(path.name for path in root.glob("*.safetensors"))
        index = None
        if (root / INDEX).exists():
            try:
                found = read_json(root / INDEX)
                _check_index(root, found, on_disk, problems)
                index = found
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

    @property
    def file_bytes(self) -> int:
        """Size of the weight files, headers included."""
        return sum(shard.path.stat().st_size for shard in self.shards)

    def require_sound(self) -> "Checkpoint":
        """Itself, if files, headers and index agree.

        Raises:
            CheckpointError: listing every problem.
        """
        if self.problems:
            raise CheckpointError("; ".join(self.problems))
        return self


def _take_out_wrong_types(config: dict[str, Any]) -> list[str]:
    """Remove fields that are not what they must be; what is wrong with each."""
    problems = []
    for title, kinds in (("", _KINDS), ("vision_config", _VISION_KINDS)):
        section = config.get(title) or {} if title else config
        for name, kind in kinds.items():
            value = section.get(name)
            if value is not None and not isinstance(value, kind):
                where = f"{title}.{name}" if title else name
                problems.append(f"{CONFIG}: {where} is {quoted(repr(value))}, expected a {kind.__name__}")
                del section[name]
    vision = config.get("vision_config") or {}
    for section, name, kind in ((config, "architectures", str), (vision, "fullatt_block_indexes", int)):
        if any(type(one) is not kind for one in section.get(name) or ()):
            problems.append(f"{CONFIG}: {name} is {quoted(repr(section[name]))}, expected a list of {kind.__name__}")
            del section[name]
    return problems


def interrupted(target: str | os.PathLike) -> str:
    """Where the former content of a folder is that was being replaced when its process was killed; empty: nowhere, or
    the folder is there.
    """
    target = Path(os.path.abspath(target))
    try:
        left = [] if os.path.lexists(target) else left_by_killed(target)
    except OSError:
        return ""
    former = [path for path in left if path.name.startswith(f"{target.name}{REPLACED}")]
    if not former:
        return ""
    whole = [path for path in left if path not in former and (path / CONFIG).is_file()]
    new = f"; {whole[0]} is what should have taken its place" if whole else ""
    return f"{target} was being replaced when its process was killed: what it was is {former[0]}, rename it back{new}"


def left_by_killed(target: Path) -> list[Path]:
    """Folders beside it that killed processes left: half made ones, and former ones."""
    beginnings = (f"{target.name}{PARTIAL}", f"{target.name}{REPLACED}")
    found = target.parent.iterdir() if target.parent.is_dir() else ()
    return sorted(path for path in found if path.name.startswith(beginnings))


def no_checkpoint(root: Path) -> str:
    """What a folder is that is no checkpoint, and what to do."""
    if not os.path.lexists(root):
        if hint := interrupted(root):
            return hint
        found = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
        hint = did_you_mean(root.name, found) or "; check the path"
        return f"{root}: no such folder, and not a hub id (owner/name){hint}"
    if not root.is_dir():
        here = f", {root.parent}" if (root.parent / CONFIG).is_file() else ""
        return f"{root} is not a folder; name the folder of the checkpoint{here}"
    if any(root.glob("model_world_size_*_rank_*.pt")) or any(root.glob("actor/model_world_size_*_rank_*.pt")):
        return f"{root} holds FSDP shards; merge them with `vilavt-rl merge {root} DST`, then use DST"
    if (root / ADAPTER_CONFIG).is_file():
        return f"{root} is an adapter (LoRA), not a checkpoint; make one with `vilavt merge-lora {root} NEW`"
    if inner := sorted(path.parent for pattern in ("*", "snapshots/*") for path in root.glob(f"{pattern}/{CONFIG}")):
        more = ", …" if len(inner) > 3 else ""
        return f"{root} has no {CONFIG}: it is not a checkpoint, but holds {', '.join(map(str, inner[:3]))}{more}"
    if adapters := sorted(path.parent for path in root.glob(f"*/{ADAPTER_CONFIG}")):
        return (
            f"{root} has no {CONFIG}, but {len(adapters)} adapters (LoRA): it is not a checkpoint; make one with "
            f"`vilavt merge-lora {adapters[-1]} NEW`"
        )
    if not any(root.iterdir()):
        return f"{root} is empty, it has no {CONFIG}: it is not a checkpoint; check the path, or copy it again"
    return f"{root} has no {CONFIG}: it is not a checkpoint; check the path, or copy it again"


def _check_index(root: Path, index: dict[str, Any], on_disk: list[str], problems: list[str]) -> None:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{root / INDEX} has no weight_map from tensor to file names")
    listed = set(weight_map.values())
    outside = sorted(name for name in listed if Path(name).name != name)
    if outside:
        raise CheckpointError(f"{root / INDEX} names files outside the folder: {outside[:4]}")
    counts, missing = Counter(weight_map.values()), sorted(listed - set(on_disk))
    for name in missing[:_MOST_NAMED]:
        problems.append(f"{root / name} is missing: the index places {counts[name]} tensors there; copy it again")
    if len(missing) > _MOST_NAMED:
        problems.append(f"{len(missing)} of {len(listed)} files that {root / INDEX} names are missing in all")
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
    if checkpoint.index is None:
        return
    weight_map = checkpoint.index["weight_map"]
    present = {tensor.name: shard.path.name for shard in checkpoint.shards for tensor in shard.tensors}
    read = {shard.path.name for shard in checkpoint.shards}
    wrong = sorted(name for name, file in weight_map.items() if file in read and present.get(name) != file)
    if wrong:
        yield f"{INDEX} places {wrong[0]} in {weight_map[wrong[0]]}, which does not hold it ({len(wrong)} such tensors)"
    listed = set(weight_map.values())
    unlisted = sorted(name for name, file in present.items() if name not in weight_map and file in listed)
    if unlisted:
        yield f"{present[unlisted[0]]} holds {unlisted[0]}, which {INDEX} does not list ({len(unlisted)} such tensors)"


# ---------------------------------------------------------------------- what the configuration calls for


def disagreements(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """What keeps tensors of these published names and shapes from being the model of `config`.

    Returns:
        (errors, notes): errors make the model wrong or unloadable, notes (unused tensors) do not.
    """
    expected = expected_tensors(config)
    if quantisation_of(config) is not None:
        shapes = whole_shapes(shapes, expected)
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
        if name not in shapes and name not in optional and not (is_query_projection(name) and stored != called)
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
    extra = sorted(name for name in shapes if name not in expected and not is_query_projection(name))
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
