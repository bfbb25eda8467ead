"""A new ViLaVT from a Qwen2.5-VL and a Qwen3-Embedding checkpoint; only the tensors that neither has are random."""

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..architecture import as_query_encoder_part, expected_tensors, is_new, published_name, query_aware_blocks
from ..errors import CheckpointError
from ..progress import Advance, counting
from .build_info import fingerprint, write_build_info
from .card import write_card
from .companions import PROMPTS, Companions, Missing, bring_companions, has_tokenizer
from .config import check_query_encoder, query_encoder_config, vilavt_config
from .inspection import Flavour, detect_flavour
from .layout import CONFIG, Checkpoint, TensorEntry, disagreements
from .writing import (
    TensorSource,
    check_destination,
    from_entry,
    place_file,
    separate_folders,
    shard_names,
    staged_folder,
    write_index,
    write_json,
    write_safetensors,
)

logger = logging.getLogger(__name__)

STANDARD_DEVIATION = 0.02
"""Of the new weights; new biases are zero. What the published model started from."""
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class InitialisationReport:
    """What `initialise_checkpoint` did."""

    destination: Path
    new_tensors: tuple[str, ...]
    """Published names of the random tensors."""
    new_parameters: int
    base_tensors: int
    query_encoder_tensors: int
    ignored: tuple[str, ...]
    """Tensors of either source that a ViLaVT has no place for (an embedding model's LM head)."""
    query_aware_blocks: tuple[int, ...]
    seed: int
    companions: Companions
    notes: tuple[str, ...] = field(default=())

    @property
    def missing(self) -> tuple[Missing, ...]:
        """Parts that no source had."""
        return self.companions.missing


def initialise_checkpoint(
    base: str | os.PathLike,
    query_encoder: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    integration_point: str = "late",
    fullatt_block_indexes: Sequence[int] | None = None,
    prompts: str | os.PathLike = "default",
    seed: int = 0,
    link: bool = True,
    force: bool = False,
    progress: bool = False,
) -> InitialisationReport:
    """Write a ViLaVT whose weights are those of `base` and `query_encoder`, plus new ``instruct_*`` and ``text_proj``.

    New weights are N(0, 0.02), new biases zero. Each new tensor has its own random stream, derived from `seed` and its
    name, so the same seed gives the same tensor whatever else is new. Tensors of the sources keep their bytes and
    types; new ones have the type of the vision tower.

    Args:
        base: a Qwen2.5-VL checkpoint, old flat or nested tensor names.
        query_encoder: a Qwen3(-Embedding) checkpoint, names with or without ``model.``.
        destination: new folder.
        integration_point: which vision blocks become query-aware.
        fullatt_block_indexes: blocks with full attention inside an image; default: those of `base`.
        prompts: name or folder of the prompt set to put in.
        seed: of the new weights.
        link: hard-link weight files that need no change, where possible.
        force: replace an existing destination.
        progress: show a bar.

    Raises:
        CheckpointError: a source is damaged or of the wrong kind, or the destination exists or overlaps with one.
    """
    base, query_encoder, destination = Path(base), Path(query_encoder), Path(destination)
    separate_folders(base, destination)
    separate_folders(query_encoder, destination)
    check_destination(destination, force)
    stock, encoder = Checkpoint.open(base).require_sound(), Checkpoint.open(query_encoder).require_sound()
    if (kind := detect_flavour(stock)) is not Flavour.STOCK:
        raise CheckpointError(
            f"{base} is not a stock Qwen2.5-VL but: {kind.value}; name the folder of a Qwen2.5-VL checkpoint first"
        )
    encoder_config = query_encoder_config(query_encoder)
    encoder_entries, ignored = _encoder_entries(encoder)
    check_query_encoder(
        encoder_config, {name: e.shape for name, e in encoder_entries.items()}, str(query_encoder / CONFIG)
    )
    depth = stock.config.get("vision_config", {}).get("depth", 0)
    outside = [i for i in fullatt_block_indexes or () if not 0 <= i < depth]
    if outside:
        raise CheckpointError(
            f"fullatt block {outside[0]} does not exist: the vision tower has blocks 0 to {depth - 1}"
        )
    config = vilavt_config(
        stock.config,
        encoder_config,
        integration_point=integration_point,
        fullatt_block_indexes=None if fullatt_block_indexes is None else list(fullatt_block_indexes),
    )
    shapes = {name: entry.shape for name, entry in stock.tensors.items()}
    shapes |= as_query_encoder_part({name: entry.shape for name, entry in encoder_entries.items()})
    new = {n: s for n, s in expected_tensors(config).items() if n not in shapes and is_new(n)}
    errors, notes = disagreements(config, shapes | new)
    if errors:
        raise CheckpointError(f"{base} does not make a ViLaVT: {'; '.join(errors)}")
    dtype = stock.tensors["visual.patch_embed.proj.weight"].dtype
    added = [from_entry(entry, name) for name, entry in as_query_encoder_part(encoder_entries).items()]
    added += [_new_tensor(name, shape, dtype, seed) for name, shape in new.items()]
    with staged_folder(destination, force) as partial:
        total = stock.file_bytes + sum(source.nbytes for source in added)
        with counting(total, "weights", "B", shown=progress) as advance:
            _write_weights(stock, added, partial, link, advance)
        companions = bring_companions(partial, [base], [query_encoder] if has_tokenizer(query_encoder) else [])
        _write_prompts(prompts, partial)
        write_build_info(
            partial,
            {
                "made_by": "init",
                "base": base.name,
                "base_fingerprint": fingerprint(base),
                "query_encoder": query_encoder.name,
                "query_encoder_fingerprint": fingerprint(query_encoder),
                "seed": seed,
                "standard_deviation": STANDARD_DEVIATION,
            },
        )
        write_json(partial / CONFIG, config)
        write_card(partial)
    return InitialisationReport(
        destination=destination,
        new_tensors=tuple(new),
        new_parameters=sum(math.prod(shape) for shape in new.values()),
        base_tensors=len(stock.tensors),
        query_encoder_tensors=len(encoder_entries),
        ignored=tuple(ignored),
        query_aware_blocks=tuple(sorted(query_aware_blocks(config["vision_config"]))),
        seed=seed,
        companions=companions,
        notes=tuple(notes),
    )


def _encoder_entries(encoder: Checkpoint) -> tuple[dict[str, TensorEntry], list[str]]:
    """A Qwen3 checkpoint's tensors without ``model.``, and the names that are not part of the bare model."""
    entries, ignored = {}, []
    for shard in encoder.shards:
        for entry in shard.tensors:
            name = entry.name.removeprefix("model.")
            if name.split(".")[0] in ("embed_tokens", "layers", "norm"):
                entries[name] = entry
            else:
                ignored.append(entry.name)
    return entries, ignored


def _write_weights(stock: Checkpoint, added: list[TensorSource], partial: Path, link: bool, advance: Advance) -> None:
    """The base's files, then one file with everything added."""
    files = shard_names(len(stock.shards) + 1)
    weight_map: dict[str, str] = {}
    for shard, file in zip(stock.shards, files, strict=False):
        names = [published_name(entry.name) for entry in shard.tensors]
        if names == [entry.name for entry in shard.tensors]:
            place_file(shard.path, partial / file, link, advance)
        else:
            renamed = [from_entry(entry, name) for entry, name in zip(shard.tensors, names, strict=True)]
            write_safetensors(partial / file, renamed, shard.metadata, advance)
        weight_map |= dict.fromkeys(names, file)
    write_safetensors(partial / files[-1], added, advance=advance)
    weight_map |= {source.name: files[-1] for source in added}
    stored = [(t.nbytes, t.numel) for t in stock.tensors.values()]
    stored += [(source.nbytes, math.prod(source.shape)) for source in added]
    write_index(partial, weight_map, sum(n for n, _ in stored), sum(n for _, n in stored))


def _new_tensor(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> TensorSource:
    if dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(f"the vision tower is stored as {dtype}; new weights can be F32, F16 or BF16")
    size = math.prod(shape)
    return TensorSource(
        name, dtype, shape, size * (4 if dtype == "F32" else 2), lambda: _normal_chunks(name, size, dtype, seed)
    )


def _normal_chunks(name: str, size: int, dtype: str, seed: int) -> Iterator[bytes]:
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    for start in range(0, size, _CHUNK_ELEMENTS):
        count = min(_CHUNK_ELEMENTS, size - start)
        if name.endswith(".bias"):
            values = np.zeros(count, dtype=np.float32)
        else:
            values = generator.standard_normal(count, dtype=np.float32) * np.float32(STANDARD_DEVIATION)
        yield _encode(values, dtype)


def _encode(values: np.ndarray, dtype: str) -> bytes:
    """Little-endian bytes of fp32 values in a safetensors type."""
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    bits = values.astype("<f4").view("<u4")
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # bf16 is the upper half, rounded to nearest, ties to even
    return (rounded >> 16).astype("<u2").tobytes()


def _write_prompts(prompts: str | os.PathLike, partial: Path) -> None:
    if (partial / PROMPTS).is_dir():
        return
    from ..prompts import PromptSet

    PromptSet.load(str(prompts)).save(partial / PROMPTS)
