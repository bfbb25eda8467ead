"""Merge the shards that FSDP training (EasyR1, verl) writes per process into one safetensors checkpoint.

``model_world_size_W_rank_R.pt`` holds rank R's part of every tensor as a DTensor. The files are memory-mapped and read
with ``weights_only=True`` (no code in a pickle runs); a few megabytes at a time are cast and written, so memory
does not grow with the model.
"""

import itertools
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from vilavt_core.architecture import expected_tensors, is_tied, published_name, query_encoder_part
from vilavt_core.checkpoint.build_info import write_build_info
from vilavt_core.checkpoint.card import write_card
from vilavt_core.checkpoint.companions import Companions, Missing, bring_companions
from vilavt_core.checkpoint.config import (
    ARCHITECTURE,
    check_query_encoder,
    derived_text_encoder_config,
    query_encoder_config,
    set_dtype,
    vilavt_config,
)
from vilavt_core.checkpoint.layout import CONFIG, disagreements, read_json
from vilavt_core.checkpoint.writing import (
    TensorSource,
    check_destination,
    plan_shards,
    separate_folders,
    shard_names,
    staged_folder,
    write_index,
    write_json,
    write_safetensors,
)
from vilavt_core.errors import CheckpointError, EpisodeError
from vilavt_core.failures import one_line, quoted
from vilavt_core.progress import Advance, counting
from vilavt_core.settings import ChatSettings, describe_preset, preset_of, read_chat_settings

from .run_settings import noted_provenance, noted_settings

logger = logging.getLogger(__name__)

_SHARD_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "keep": None}
_CHUNK_ELEMENTS = 4 << 20
_RENEW_AFTER = 256 << 20


@dataclass(frozen=True)
class MergeReport:
    """What `merge_shards` did."""

    source: Path
    destination: Path
    world_size: int
    mesh: str
    """Mesh dimension names and sizes, as ``ddp=2 x fsdp=4``."""
    tensors: int
    nbytes: int
    dtype: str
    companions: Companions
    runs_as: str
    """How the checkpoint is run by whoever names nothing else."""
    notes: tuple[str, ...] = field(default=())

    @property
    def missing(self) -> tuple[Missing, ...]:
        """Parts that no source had."""
        return self.companions.missing


@dataclass(frozen=True)
class _Plan:
    """How to assemble one tensor: the parts of `ranks`, in that order, along `dim`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ranks: tuple[int, ...]
    dim: int = 0


def merge_shards(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    dtype: Literal["bf16", "fp32", "keep"] = "bf16",
    max_shard_bytes: int = 5_000_000_000,
    config: str | os.PathLike | None = None,
    query_encoder: str | os.PathLike | None = None,
    processor: str | os.PathLike | None = None,
    architecture: str = ARCHITECTURE,
    force: bool = False,
    preset: str | None = None,
    limits: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> MergeReport:
    """Merge ``model_world_size_W_rank_R.pt`` files into `destination`, under published names, with an index.

    The checkpoint says how it is run: as the episodes of the run, whose folder tells, unless `preset` or `limits` name
    another way.

    Args:
        source: the folder with the shards (``global_step_N/actor``), or one that holds it as ``actor/``.
        destination: new folder.
        dtype: of floating-point tensors; the shards are usually fp32.
        max_shard_bytes: size of an output file.
        config: folder with ``config.json`` and the processor; default: ``huggingface/`` beside the shards.
        query_encoder: folder of the query encoder, if the configuration or the query tokenizer is missing.
        processor: folder whose processor and tokenizer files fill in what is missing.
        architecture: class name written to ``config.json``.
        force: replace an existing destination.
        preset: how the checkpoint is run; None: as in training.
        limits: fields of `vilavt_core.presets.Limits` that differ from those of training.
        progress: show a bar.

    Raises:
        CheckpointError: an unknown preset or limit, a rank is missing, ranks disagree, tensors are sharded over several
            mesh dimensions (tensor parallelism), or the result is not the model of the configuration.
    """
    if dtype not in _DTYPES:
        raise CheckpointError(f"dtype {dtype!r}, expected one of {sorted(_DTYPES)}")
    folder, destination = _shards_folder(Path(source)), Path(destination)
    separate_folders(folder, destination)
    check_destination(destination, force)
    files = _rank_files(folder)
    settings = Path(config) if config else folder / "huggingface"
    if not (settings / CONFIG).is_file():
        raise CheckpointError(f"{settings / CONFIG} does not exist; pass --config with the folder of the trained model")
    raw_config = read_json(settings / CONFIG)
    settings_of_run = _chat_settings(folder, settings, preset, limits)
    ranks = _Ranks(files)
    plans, mesh = _plan(ranks.states, files, _expected_or_empty(raw_config))
    encoder = _text_encoder(raw_config, settings, query_encoder, plans)
    final = vilavt_config(raw_config, encoder, architecture=architecture)
    if is_tied(final) and plans.pop("lm_head.weight", None) is not None:
        logger.info("lm_head.weight is tied to the embedding and left out, as published checkpoints do")
    errors, notes = disagreements(final, {name: plan.shape for name, plan in plans.items()})
    if errors:
        raise CheckpointError(f"the shards in {folder} are not the model of {settings / CONFIG}: {'; '.join(errors)}")
    target_dtype = _DTYPES[dtype]
    if target_dtype is not None:
        set_dtype(final, str(target_dtype).removeprefix("torch."))
    sources = [_tensor_source(plan, ranks, target_dtype) for plan in plans.values()]
    with staged_folder(destination, force) as partial:
        total = sum(source.nbytes for source in sources)
        with counting(total, "weights", "B", shown=progress) as advance:
            _write_weights(sources, partial, max_shard_bytes, advance)
        companions = bring_companions(
            partial,
            [settings, *([Path(processor)] if processor else [])],
            [Path(query_encoder)] if query_encoder else [],
        )
        details: dict[str, Any] = {"made_by": "merge", "source": folder.name, "world_size": len(files), "mesh": mesh}
        details["dtype"] = dtype
        if (origin := noted_provenance(folder)) is not None:
            details["source_provenance"] = origin
        write_build_info(partial, details)
        write_json(partial / CONFIG, final)
        if settings_of_run is not None:
            settings_of_run.save(partial)
        runs_as = describe_preset(preset_of(partial))
        write_card(partial)
    return MergeReport(
        source=folder,
        destination=destination,
        world_size=len(files),
        mesh=mesh,
        tensors=len(sources),
        nbytes=sum(source.nbytes for source in sources),
        dtype=dtype,
        companions=companions,
        notes=tuple(notes),
        runs_as=runs_as,
    )


# ---------------------------------------------------------------------- finding and reading the shards


def _shards_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "actor"):
        if candidate.is_dir() and any(_SHARD_FILE.fullmatch(path.name) for path in candidate.iterdir()):
            return candidate
    raise CheckpointError(f"{folder} has no model_world_size_W_rank_R.pt files; pass the folder that holds them")


def _chat_settings(
    folder: Path, config: Path, preset: str | None, limits: Mapping[str, Any] | None
) -> ChatSettings | None:
    """Those of the run, else of the folder with the configuration, changed as asked; None: there are none."""
    found = noted_settings(folder) or read_chat_settings(config)
    if found is None and preset is None and not limits:
        return None
    settings = (found or ChatSettings()).changed(preset, limits)
    try:
        settings.apply()
    except EpisodeError as error:
        raise CheckpointError(f"how {folder} is to be run: {error}") from None
    return settings


def _rank_files(folder: Path) -> list[Path]:
    found: dict[int, dict[int, Path]] = {}
    for path in folder.iterdir():
        if match := _SHARD_FILE.fullmatch(path.name):
            ranks = found.setdefault(int(match[1]), {})
            if (rank := int(match[2])) in ranks:
                raise CheckpointError(f"{path} and {ranks[rank]} are the same rank; move one of them away")
            ranks[rank] = path
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds shards of world sizes {sorted(found)}; move all but one run's away")
    ((world_size, ranks),) = found.items()
    if world_size < 1:
        raise CheckpointError(f"{folder} has shards of world size {world_size}; it was not written by FSDP")
    # Not a set of all ranks: a file's name can make it as large as it likes.
    missing = list(itertools.islice((rank for rank in range(world_size) if rank not in ranks), 8))
    if missing:
        raise CheckpointError(
            f"{folder} has {len(ranks)} of {world_size} shards; missing rank {', '.join(map(str, missing))} "
            f"(model_world_size_{world_size}_rank_{missing[0]}.pt); copy it from the machine that wrote it"
        )
    if extra := sorted(ranks.keys() - set(range(world_size))):
        raise CheckpointError(
            f"{folder} has rank {extra[0]} of world size {world_size}; ranks are 0 to {world_size - 1}"
        )
    return [ranks[rank] for rank in range(world_size)]


@contextmanager
def _readable_dtensors() -> Iterator[None]:
    """Let ``weights_only`` build DTensors, also those pickled by torch before 2.5 under private module names."""
    old = "torch.distributed._tensor"
    names: list[Any] = [
        (DTensor, f"{old}.DTensor"),
        (DTensor, f"{old}.api.DTensor"),
        (DTensorSpec, f"{old}.placement_types.DTensorSpec"),
        (TensorMeta, f"{old}.placement_types.TensorMeta"),
        (DTensorSpec, f"{old}._dtensor_spec.DTensorSpec"),
        (TensorMeta, f"{old}._dtensor_spec.TensorMeta"),
        (Shard, f"{old}.placement_types.Shard"),
        (Replicate, f"{old}.placement_types.Replicate"),
    ]
    # A DeviceMesh that is read without its process groups logs a warning per file; nothing here communicates.
    mesh_logger = logging.getLogger("torch.distributed.device_mesh")
    level = mesh_logger.level
    mesh_logger.setLevel(logging.ERROR)
    try:
        with torch.serialization.safe_globals(names):
            yield
    finally:
        mesh_logger.setLevel(level)


class _Ranks:
    """The shards of all ranks, memory-mapped. Mappings are renewed now and then, to let go of the pages read so far."""

    def __init__(self, files: list[Path]):
        self.files = files
        self._read = 0
        self.states: list[dict[str, torch.Tensor]] = []
        self._map()

    def _map(self) -> None:
        self.states = []  # unmap before mapping again
        self.states = [_load_rank(path) for path in self.files]
        self._read = 0

    def local(self, rank: int, name: str) -> torch.Tensor:
        """What `rank` holds of a tensor."""
        value = self.states[rank][name]
        return (value._local_tensor if isinstance(value, DTensor) else value).detach()

    def chunks(self, rank: int, name: str) -> Iterator[torch.Tensor]:
        """The elements of `local`, flat, a few megabytes at a time."""
        total = self.local(rank, name).numel()
        for start in range(0, total, _CHUNK_ELEMENTS):
            chunk = self.local(rank, name).reshape(-1)[start : start + _CHUNK_ELEMENTS]
            yield chunk
            self.count(chunk.nbytes)

    def count(self, nbytes: int) -> None:
        """Note that `nbytes` were read, and renew the mappings if that makes too many."""
        self._read += nbytes
        if self._read > _RENEW_AFTER:
            self._map()


def _load_rank(path: Path) -> dict[str, torch.Tensor]:
    try:
        with _readable_dtensors():
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, … for damaged files
        hint = "sharded without a device mesh" if "ShardedTensor" in str(error) else "damaged, or not written by FSDP"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({reason[:300]}); it is {hint}") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, it must hold tensors by name")
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            continue
        if not isinstance(name, str) or not _is_plain(value):
            raise CheckpointError(
                f"{path}: {quoted(repr(name))} is no ordinary tensor with a name; it was not written by FSDP"
            )
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if published_name(name) in tensors:
            raise CheckpointError(f"{path} holds {quoted(published_name(name))} twice")
        tensors[published_name(name)] = value
    return tensors


def _is_plain(value: torch.Tensor) -> bool:
    """Whether what a rank holds of a tensor is dense, in memory, and of a type that a checkpoint may have."""
    local = getattr(value, "_local_tensor", None) if isinstance(value, DTensor) else value
    return (
        isinstance(local, torch.Tensor)
        and local.layout is torch.strided
        and local.device.type == "cpu"
        and local.dtype in _SAFETENSORS_DTYPES
        and (local.is_contiguous() or local.numel() <= local.untyped_storage().nbytes() // local.itemsize)
    )


def _expected_or_empty(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """`expected_tensors`, to tell a replicated plain tensor from a part of one; nothing if the sizes are unknown."""
    try:
        return expected_tensors(config)
    except CheckpointError:
        return {}


def _plan(
    ranks: list[dict[str, torch.Tensor]], files: list[Path], expected: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, _Plan], str]:
    names = list(ranks[0])
    for rank, state in enumerate(ranks):
        if state.keys() != ranks[0].keys():
            name = sorted(state.keys() ^ ranks[0].keys())[0]
            raise CheckpointError(f"{files[rank]} and {files[0]} disagree on whether there is a tensor {name}")
    plans, mesh = {}, "none"
    for name in names:
        values = [state[name] for state in ranks]
        if all(isinstance(value, DTensor) for value in values):
            try:
                plans[name], mesh = _plan_dtensor(name, values, files)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{quoted(name)}: how it is placed on the ranks cannot be read ({one_line(error)}); the shards are "
                    "damaged, or not written by FSDP"
                ) from error
        elif any(isinstance(value, DTensor) for value in values):
            raise CheckpointError(f"{name} is a DTensor on some ranks only")
        else:
            plans[name] = _plan_plain(name, values, expected.get(name))
    return plans, mesh


def _plan_dtensor(name: str, values: list[Any], files: list[Path]) -> tuple[_Plan, str]:
    spec = values[0]._spec
    ranks = _mesh_ranks(spec.mesh)
    dim_names = spec.mesh.mesh_dim_names or tuple(f"dim{i}" for i in range(ranks.dim()))
    mesh = " x ".join(f"{dim}={size}" for dim, size in zip(dim_names, ranks.shape, strict=True))
    sharded = [i for i, placement in enumerate(spec.placements) if not placement.is_replicate()]
    if len(sharded) > 1 or any(type(spec.placements[i]) is not Shard for i in sharded):
        raise CheckpointError(
            f"{name} is placed as {spec.placements} on the mesh {mesh}; only one sharded dimension (FSDP, HSDP with a "
            "replicated one) can be merged, not tensor parallelism"
        )
    if sorted(ranks.flatten().tolist()) != list(range(len(values))):
        raise CheckpointError(
            f"{name} lies on ranks {ranks.flatten().tolist()} of a mesh {mesh}, there are {len(values)} shards"
        )
    shape = tuple(spec.tensor_meta.shape)
    if any(tuple(value._spec.tensor_meta.shape) != shape for value in values):
        raise CheckpointError(f"{name} has different full shapes on different ranks; the shards are of different runs")
    # along the sharded mesh dimension, at coordinate 0 of every replicated one
    index = tuple(slice(None) if i in sharded else 0 for i in range(ranks.dim()))
    order = ranks[index].flatten().tolist()
    dim = spec.placements[sharded[0]].dim if sharded else 0
    parts = [tuple(values[rank]._local_tensor.shape) for rank in order]
    others = [(*part[:dim], *part[dim + 1 :]) for part in (shape, *parts)]
    if any(one != others[0] for one in others) or any(len(part) != len(shape) for part in parts):
        raise CheckpointError(f"{name} has parts of shapes {parts[:4]}, which cannot make up {list(shape)}")
    length = sum(part[dim] for part in parts) if shape else 0
    if shape and length != shape[dim]:
        raise CheckpointError(
            f"{name}: the parts of {[files[rank].name for rank in order]} add up to {length} along dimension {dim}, "
            f"the tensor has {shape[dim]}"
        )
    return _Plan(name, shape, values[0]._local_tensor.dtype, tuple(order), dim), mesh


def _mesh_ranks(mesh: Any) -> torch.Tensor:
    """(mesh shape) ranks. A mesh pickled by an older torch has them as an attribute; newer ones compute them."""
    stored = vars(mesh).get("mesh")
    return stored if isinstance(stored, torch.Tensor) else mesh.mesh


def _plan_plain(name: str, values: list[torch.Tensor], expected: tuple[int, ...] | None) -> _Plan:
    """Not a DTensor: a single process, a tensor FSDP left alone, or (old versions) parts along the first dimension."""
    first = values[0]
    shape = tuple(first.shape)
    if any(value.shape[1:] != first.shape[1:] or value.dim() != first.dim() for value in values):
        raise CheckpointError(
            f"{name} has parts of shapes {[list(value.shape) for value in values[:4]]}, which make up no tensor"
        )
    joined = (sum(len(value) for value in values), *shape[1:]) if shape else ()
    if len(values) == 1 or (expected is None and not shape) or shape == expected:
        return _Plan(name, shape, first.dtype, (0,))
    if expected is None and all(torch.equal(value, first) for value in values):
        return _Plan(name, shape, first.dtype, (0,))
    if joined == expected:
        return _Plan(name, joined, first.dtype, tuple(range(len(values))))
    raise CheckpointError(
        f"{name} is a plain tensor of shape {list(shape)} on each of {len(values)} ranks; config.json calls for "
        f"{list(expected) if expected else 'no such tensor'}, so it is unclear how the parts go together"
    )


def _text_encoder(
    config: Mapping[str, Any], settings: Path, query_encoder: str | os.PathLike | None, plans: Mapping[str, _Plan]
) -> dict[str, Any]:
    shapes = {name: plan.shape for name, plan in query_encoder_part(plans).items()}
    if not shapes:
        raise CheckpointError("the shards hold no query encoder (text_encoder.*): they are not of a ViLaVT")
    if query_encoder is not None:
        encoder, origin = query_encoder_config(Path(query_encoder)), str(Path(query_encoder) / CONFIG)
    elif config.get("text_encoder_config"):
        encoder, origin = config["text_encoder_config"], str(settings / CONFIG)
    else:
        encoder, origin = derived_text_encoder_config(shapes), "tensor shapes"
    check_query_encoder(encoder, shapes, origin)
    return encoder


# ---------------------------------------------------------------------- writing


def _tensor_source(plan: _Plan, ranks: "_Ranks", dtype: torch.dtype | None) -> TensorSource:
    out = dtype if dtype is not None and plan.dtype.is_floating_point else plan.dtype
    if out not in _SAFETENSORS_DTYPES:
        raise CheckpointError(f"{plan.name} has dtype {out}, which safetensors files of ours do not hold")
    nbytes = math.prod(plan.shape) * out.itemsize
    return TensorSource(plan.name, _SAFETENSORS_DTYPES[out], plan.shape, nbytes, lambda: _bytes(plan, ranks, out))


def _bytes(plan: _Plan, ranks: "_Ranks", dtype: torch.dtype) -> Iterator[memoryview]:
    if plan.dim == 0:
        chunks = itertools.chain.from_iterable(ranks.chunks(rank, plan.name) for rank in plan.ranks)
    else:  # rows of the parts interleave: one whole tensor
        whole = torch.cat([ranks.local(rank, plan.name) for rank in plan.ranks], plan.dim)
        ranks.count(whole.nbytes)
        chunks = iter(whole.reshape(-1).split(_CHUNK_ELEMENTS))
    for chunk in chunks:
        yield chunk.to(dtype, copy=True).view(torch.uint8).numpy().data


def _write_weights(sources: list[TensorSource], partial: Path, max_shard_bytes: int, advance: Advance) -> None:
    shards = plan_shards(sources, max_shard_bytes)
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        logger.info("writing %s (%d tensors)", name, len(shard))
        write_safetensors(partial / name, shard, advance=advance)
    if len(shards) > 1:
        weight_map = {source.name: name for name, shard in zip(names, shards, strict=True) for source in shard}
        write_index(
            partial,
            weight_map,
            sum(source.nbytes for source in sources),
            sum(math.prod(source.shape) for source in sources),
        )
