"""Turn an SFT checkpoint (``model_type: qwen2_5_vl``) into the RL/vLLM format (``model_type: vilavt``)."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..architecture import published_name, query_encoder_part
from ..errors import CheckpointError
from ..progress import Advance, counting
from .build_info import PROVENANCE, fingerprint, write_build_info
from .card import write_card
from .companions import Companions, Missing, bring_companions
from .config import (
    ARCHITECTURE,
    check_query_encoder,
    derived_text_encoder_config,
    query_encoder_config,
    vilavt_config,
)
from .layout import CONFIG, INDEX, Checkpoint, ShardFile, disagreements, read_json
from .writing import (
    check_destination,
    file_range,
    from_entry,
    place_file,
    separate_folders,
    sha256_of,
    staged_folder,
    write_json,
    write_safetensors,
)

logger = logging.getLogger(__name__)


class Weights(StrEnum):
    """How the weights got into the new folder."""

    LINKED = "hard-linked"
    COPIED = "copied"
    RENAMED = "copied, tensors renamed"


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_checkpoint` did."""

    source: Path
    destination: Path
    weights: Weights
    tensors: int
    nbytes: int
    text_encoder_config: str
    """Where the query encoder's configuration came from."""
    companions: Companions
    verified: bool = False
    """Whether names, shapes, dtypes and bytes were compared; a difference is an error, never ``False``."""
    notes: tuple[str, ...] = field(default=())

    @property
    def missing(self) -> tuple[Missing, ...]:
        """Parts that no source had; the weights are complete regardless."""
        return self.companions.missing


def convert_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    query_encoder: str | os.PathLike | None = None,
    processor: str | os.PathLike | None = None,
    architecture: str = ARCHITECTURE,
    link: bool = True,
    force: bool = False,
    verify: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Write `source` as a checkpoint that `VilavtForConditionalGeneration` and the hosts load; `source` stays as it is.

    Tensors keep their bytes. Files are hard-linked where the file system allows, else streamed; nested tensor names
    (``model.visual.*``) become the published flat ones. The destination appears complete or not at all.

    Args:
        source: folder of either published flavour, sharded or not, flat or nested names.
        destination: new folder.
        query_encoder: folder of the query encoder, for its configuration and tokenizer; default: what `source` carries.
        processor: folder whose processor and tokenizer files fill in what `source` lacks.
        architecture: class name written to ``config.json``; the published one serves the published plug-ins.
        link: hard-link rather than copy. A hard-linked file is shared: training *in place* would change both.
        force: replace an existing destination, as a whole.
        verify: afterwards compare names, shapes, dtypes and SHA-256 of every tensor.
        progress: show bars.

    Raises:
        CheckpointError: the source is damaged, incomplete or no ViLaVT, the destination exists or overlaps with it, or
            verification found a difference.
    """
    source, destination = Path(source), Path(destination)
    separate_folders(source, destination)
    check_destination(destination, force)
    checkpoint = Checkpoint.open(source).require_sound()
    encoder, origin = _text_encoder(checkpoint, Path(query_encoder) if query_encoder else None)
    config = vilavt_config(checkpoint.config, encoder, architecture=architecture)
    errors, notes = disagreements(config, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    if errors:
        raise CheckpointError(f"{source} is not a complete ViLaVT checkpoint: {'; '.join(errors)}")
    with staged_folder(destination, force) as partial:
        with counting(checkpoint.file_bytes, "weights", "B", shown=progress) as advance:
            weights = _place_weights(checkpoint, partial, link, advance)
        companions = bring_companions(
            partial,
            [source, *([Path(processor)] if processor else [])],
            _query_tokenizer_sources(checkpoint, query_encoder),
        )
        _record(checkpoint, partial, weights)
        write_json(partial / CONFIG, config)  # last: without it the folder is no checkpoint
        write_card(partial)
        if verify:
            verify_same_tensors(source, partial, progress=progress)
    if "prompts/" not in companions.brought:
        notes.append("no prompts/ folder in the source: the built-in default prompt set applies")
    return ConversionReport(
        source=source,
        destination=destination,
        weights=weights,
        tensors=len(checkpoint.tensors),
        nbytes=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        text_encoder_config=origin,
        companions=companions,
        verified=verify,
        notes=tuple(notes),
    )


def verify_same_tensors(first: str | os.PathLike, second: str | os.PathLike, *, progress: bool = False) -> int:
    """Compare two checkpoints tensor by tensor (published names, shapes, dtypes, SHA-256 of the bytes), streaming.

    With `progress` a bar is shown.

    Returns:
        How many tensors were compared.

    Raises:
        CheckpointError: naming the tensors that differ.
    """
    one, two = _readable(first), _readable(second)
    if one.keys() != two.keys():
        only = sorted(one.keys() ^ two.keys())
        raise CheckpointError(f"{len(only)} tensors are in one of {first} and {second} only: {', '.join(only[:6])}")
    with counting(sum(tensor.nbytes for tensor in one.values()), "verifying", "B", shown=progress) as advance:
        for name, a in one.items():
            b = two[name]
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise CheckpointError(
                    f"{name} is {a.dtype} {list(a.shape)} in {first}, {b.dtype} {list(b.shape)} in {second}"
                )
            digest = sha256_of(file_range(a.path, a.start, a.stop), advance)
            if (a.start, a.stop) == (b.start, b.stop) and a.path.samefile(b.path):
                continue  # the same bytes on disk: that they were read proves they can be
            other = sha256_of(file_range(b.path, b.start, b.stop))
            if digest != other:
                raise CheckpointError(f"{name} has SHA-256 {digest[:16]}… in {first}, {other[:16]}… in {second}")
    return len(one)


def _readable(folder: str | os.PathLike) -> Mapping[str, Any]:
    return Checkpoint.open(folder).require_sound().tensors


def _text_encoder(checkpoint: Checkpoint, folder: Path | None) -> tuple[dict[str, Any], str]:
    """The query encoder's configuration and where it came from."""
    tensors = query_encoder_part(checkpoint.tensors)
    if not tensors:
        raise CheckpointError(
            f"{checkpoint.folder} has no query encoder tensors (text_encoder.*): it looks like a stock Qwen2.5-VL; "
            "make a new ViLaVT from it with `vilavt init`"
        )
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if folder is not None:
        encoder, origin = query_encoder_config(folder), str(folder / CONFIG)
    elif checkpoint.config.get("text_encoder_config"):
        encoder, origin = checkpoint.config["text_encoder_config"], f"{checkpoint.folder / CONFIG}: text_encoder_config"
    else:
        dtype = next(iter(tensors.values())).dtype
        encoder = derived_text_encoder_config(shapes, dtype)
        origin = "tensor shapes, with Qwen3-Embedding's RoPE base, norm epsilon and context length"
    check_query_encoder(encoder, shapes, origin)
    return encoder, origin


def _query_tokenizer_sources(checkpoint: Checkpoint, query_encoder: str | os.PathLike | None) -> list[Path]:
    if query_encoder is not None:
        return [Path(query_encoder)]
    path = checkpoint.config.get(
        "embedding_model_path"
    )  # written by the published training code; a hub id is no folder
    return [Path(path)] if isinstance(path, str) and Path(path).is_dir() else []


def _place_weights(checkpoint: Checkpoint, partial: Path, link: bool, advance: Advance) -> Weights:
    if checkpoint.nested:
        for shard in checkpoint.shards:
            _rename_tensors(shard, partial / shard.path.name, advance)
        weights = Weights.RENAMED
    else:
        linked = [place_file(shard.path, partial / shard.path.name, link, advance) for shard in checkpoint.shards]
        weights = Weights.LINKED if all(linked) else Weights.COPIED
    if checkpoint.index is not None:
        index = dict(checkpoint.index)
        index["weight_map"] = {published_name(name): file for name, file in index["weight_map"].items()}
        write_json(partial / INDEX, index)
    return weights


def _rename_tensors(shard: ShardFile, target: Path, advance: Advance) -> None:
    sources = [from_entry(tensor, published_name(tensor.name)) for tensor in shard.tensors]
    write_safetensors(target, sources, shard.metadata, advance)


def _record(checkpoint: Checkpoint, partial: Path, weights: Weights) -> None:
    details: dict[str, Any] = {
        "made_by": "convert",
        "source": checkpoint.folder.name,
        "source_fingerprint": fingerprint(checkpoint.folder),
        "weights": str(weights),
    }
    if (checkpoint.folder / PROVENANCE).is_file():
        details["source_provenance"] = read_json(checkpoint.folder / PROVENANCE)
    write_build_info(partial, details)
