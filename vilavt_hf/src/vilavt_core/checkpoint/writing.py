"""Writing a checkpoint so that it is either complete or not there, with a few megabytes of memory."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..outputs import folder_problem
from ..progress import Advance, unseen
from .layout import CONFIG, INDEX, PARTIAL, REPLACED, TensorEntry, interrupted, left_by_killed

logger = logging.getLogger(__name__)

CHUNK = 8 << 20
"""Bytes held at a time when data is streamed."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: its header entry, and its bytes on demand."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[bytes | memoryview]]


def check_destination(destination: str | os.PathLike, force: bool = False) -> None:
    """Refuse a folder that `staged_folder` could not write, before any work.

    Raises:
        CheckpointError: the destination exists and `force` is off, it is something else than a checkpoint folder, or
            nothing can be written there.
    """
    target = Path(os.path.abspath(destination))
    if os.path.lexists(target):
        if not force:
            raise CheckpointError(f"{target} exists; choose another folder, or pass --force to replace it")
        if not target.is_dir() or target.is_symlink():
            raise CheckpointError(f"{target} is not a plain folder and is not replaced; choose another destination")
        if not (target / CONFIG).exists() and any(target.iterdir()):
            raise CheckpointError(
                f"{target} has files but no {CONFIG}: not a checkpoint, so --force does not delete it"
            )
    if problem := folder_problem(target.parent):
        raise CheckpointError(f"{target} cannot be made: {problem}")


@contextlib.contextmanager
def staged_folder(destination: str | os.PathLike, force: bool = False) -> Iterator[Path]:
    """A sibling folder ``DESTINATION.partial-<pid>`` that takes the destination's name when the block succeeds.

    Whatever happens, a folder called `destination` is never half written: an exception removes the partial folder, a
    killed process leaves it under its partial name. With `force` an existing destination is replaced as a whole.

    Raises:
        CheckpointError: see `check_destination`.
    """
    check_destination(destination, force)
    target = Path(os.path.abspath(destination))
    if hint := interrupted(target):
        logger.warning("%s", hint)
    else:
        for stale in left_by_killed(target):
            logger.warning("%s was left by an interrupted run and can be deleted", stale)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}{PARTIAL}{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        replace_folder(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_folder(partial: Path, target: Path) -> None:
    """Give a finished folder its name, once all of it is on disk; a folder of that name is replaced as a whole.

    No system call does both at once everywhere: killed between the two, the former folder is there under another name,
    which `interrupted` tells.
    """
    _sync_tree(partial)
    if os.path.lexists(target):
        replaced = target.with_name(f"{target.name}{REPLACED}{os.getpid()}")
        os.rename(target, replaced)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(replaced, target)
            raise
        shutil.rmtree(replaced)
    else:
        os.rename(partial, target)
    _sync(target.parent)


def separate_folders(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    """Refuse a destination that is the source, inside it, or around it.

    Raises:
        CheckpointError: as said.
    """
    inner, outer = Path(source).resolve(), Path(destination).resolve()
    if inner == outer:
        raise CheckpointError(f"source and destination are the same folder, {inner}; choose another destination")
    if inner in outer.parents or outer in inner.parents:
        raise CheckpointError(f"{outer} and {inner} contain one another; choose a destination outside the source")


def place_file(source: Path, target: Path, link: bool = True, advance: Advance = unseen) -> bool:
    """Hard-link `source` to `target` if asked to and possible, else copy it in chunks. True if it was linked.

    `advance` is told the bytes.
    """
    real = source.resolve()  # the hub's cache holds symbolic links; a link to a link would dangle once moved
    if link:
        try:
            os.link(real, target)
            advance(real.stat().st_size)
            return True
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logger.info("%s cannot be hard-linked (%s); copying", source, error.strerror)
    with real.open("rb") as reader, target.open("wb") as writer:
        for chunk in iter(lambda: reader.read(CHUNK), b""):
            writer.write(chunk)
            advance(len(chunk))
    return False


def file_range(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Bytes ``start`` to ``stop`` of a file, in chunks.

    Raises:
        CheckpointError: the file ends early (it changed since its header was read).
    """
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop:
            chunk = file.read(min(CHUNK, stop - start))
            if not chunk:
                raise CheckpointError(f"{path} ends at byte {start}, expected {stop}; it changed while being read")
            start += len(chunk)
            yield chunk


def from_entry(entry: TensorEntry, name: str) -> TensorSource:
    """The raw bytes of a stored tensor under another name."""
    return TensorSource(
        name, entry.dtype, entry.shape, entry.nbytes, lambda: file_range(entry.path, entry.start, entry.stop)
    )


def write_safetensors(
    path: Path,
    sources: Sequence[TensorSource],
    metadata: Mapping[str, str] | None = None,
    advance: Advance = unseen,
) -> None:
    """Write a safetensors file tensor by tensor, in the given order; `advance` is told the bytes.

    Raises:
        CheckpointError: a source yields another number of bytes than it announced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for source in sources:
        end = offset + source.nbytes
        header[source.name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # aligns the data
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for source in sources:
            written = 0
            for chunk in source.chunks():
                file.write(chunk)
                written += len(chunk)
                advance(len(chunk))
            if written != source.nbytes:
                raise CheckpointError(
                    f"{source.name} gave {written} bytes, {source.dtype} {list(source.shape)} needs {source.nbytes}"
                )


def plan_shards(sources: Iterable[TensorSource], max_shard_bytes: int) -> list[list[TensorSource]]:
    """Cut a sequence of tensors into consecutive shards of at most `max_shard_bytes` (a larger tensor stands alone)."""
    shards: list[list[TensorSource]] = []
    size = 0
    for source in sources:
        if not shards or size + source.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += source.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """The usual file names of a checkpoint in `count` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int, total_parameters: int) -> None:
    """Write ``model.safetensors.index.json``."""
    write_json(
        folder / INDEX,
        {
            "metadata": {"total_parameters": total_parameters, "total_size": total_size},
            "weight_map": dict(sorted(weight_map.items())),
        },
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does: two spaces, a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of(chunks: Iterable[bytes | memoryview], advance: Advance = unseen) -> str:
    """Hex digest of streamed bytes; `advance` is told them."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        advance(len(chunk))
    return digest.hexdigest()


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))
