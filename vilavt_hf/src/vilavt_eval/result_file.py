"""Results of one run on one benchmark: JSON Lines, one line when a question is answered, never rewritten.

Line 1 is ``{"run": {…}}``, everything the answers depend on. Every process appends to a file of its own,
``NAME.shard-I-of-N.jsonl``, line by line and down to the disk; when all questions are answered the files are merged, in
the order of the questions, into ``NAME.jsonl``, which therefore does not depend on how the work was shared or how often
it was interrupted. A line that was cut off by a crash is dropped and its question asked again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from vilavt_core.errors import EvaluationError
from vilavt_core.failures import quoted, quoted_error
from vilavt_core.json_text import parse_json
from vilavt_core.outputs import whole_file

from .sharding import PATIENCE, Shard

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of the files; counted up when their meaning changes."""

QuestionId = str | int

PLACING = (
    "cpu_offload_gb",
    "device_map",
    "disable_log_stats",
    "distributed_executor_backend",
    "gpu_memory_utilization",
    "max_num_batched_tokens",
    "max_num_seqs",
    "pipeline_parallel_size",
    "tensor_parallel_size",
)
"""Engine options that say where work is done and how much at once. Like the device and the number of shards they may
change within a run; every other option counts as one that changes answers."""
_FREE = (
    "shard",
    "provenance.device",
    "preset.description",
    "benchmark.definition.title",
    *(f"engine.{option}" for option in PLACING),
)
"""Parts of a run line in which files of one run may differ."""
_NAMES = ("model", "provenance.checkpoint")
"""Where the checkpoint was found; may differ too if its fingerprint is the same."""


@dataclass(frozen=True)
class Line:
    """A complete line of a file."""

    offset: int
    """In bytes."""
    length: int
    data: Mapping[str, Any]


def lines(path: Path) -> Iterator[Line]:
    """Complete lines of a result file; an incomplete or unreadable last one is left out.

    Raises:
        EvaluationError: a line in the middle is no JSON object.
    """
    with path.open("rb") as file:
        offset = 0
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                data = parse_json(raw)
                if not isinstance(data, dict):
                    raise ValueError("no JSON object")
            except ValueError as error:
                raise EvaluationError(
                    f"{path}, line {number}: {quoted_error(error)}; the file was changed by something else, move it "
                    "away"
                ) from None
            question = data.get("question_id")
            if isinstance(question, bool) or not isinstance(question, QuestionId | None):
                raise EvaluationError(
                    f"{path}, line {number}: question_id is {quoted(repr(question))}, it must be a text or a whole "
                    "number; the file was changed by something else, move it away"
                )
            yield Line(offset, len(raw), data)
            offset += len(raw)


class RunFiles:
    """The files of one run on one benchmark.

    Args:
        folder: made if missing.
        name: of the merged file, without ``.jsonl``.
        run: what the answers depend on, JSON data (other values become text); its ``shard`` is filled in here.

    Raises:
        EvaluationError: the folder cannot be made, or holds results of this name that depend on something else.
    """

    def __init__(self, folder: Path, name: str, run: Mapping[str, Any]) -> None:
        self.folder, self.name = folder, name
        self.run = json.loads(json.dumps({"format": FORMAT, **run}, default=str))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EvaluationError(f"{folder}: cannot be made: {error.strerror}; name another --out") from None
        self.merged = folder / f"{name}.jsonl"
        for path in self._existing():
            self._check(path)

    @property
    def parts(self) -> list[Path]:
        """Files that are not merged yet."""
        prefix = f"{self.name}.shard-"
        return sorted(p for p in self.folder.glob("*.jsonl") if p.name.startswith(prefix))

    def answered(self) -> set[QuestionId]:
        """Ids of the questions that have an answer in any of the files, whatever errors other rows hold."""
        return {
            line.data["question_id"]
            for path in self._existing()
            for line in lines(path)
            if line.data.get("question_id") is not None and not line.data.get("error")
        }

    def writer(self, shard: Shard) -> Writer:
        """Appends to the file of a shard.

        Raises:
            EvaluationError: another process is writing it, or it cannot be written.
        """
        path = self.folder / f"{self.name}.shard-{shard.index}-of-{shard.count}.jsonl"
        return Writer(path, self.run | {"shard": [shard.index, shard.count]}, self._lock(path.stem))

    def merge(self, ids: Sequence[QuestionId]) -> bool:
        """Merge all files into one if every question has a row, and remove the parts.

        Args:
            ids: of all questions, in order; rows of others (a run with a larger ``--limit``) follow them.

        Returns:
            Whether the merged file is complete; not while another process is writing, which merges when it is done. Of
            several rows of a question the last without an error counts.
        """
        with ExitStack() as held:
            held.enter_context(self._lock(self.name).acquire(timeout=600))
            try:
                for path in self.parts:
                    held.enter_context(self._lock(path.stem).acquire(timeout=0))
            except Timeout:
                return False
            found = self._existing()
            where = self._where(found)
            if any(question not in where for question in ids):
                return False
            if found == [self.merged]:
                return True
            files = [path.open("rb") for path in found]
            try:
                with whole_file(self.merged) as out:
                    out.write(_encoded({"run": self.run | {"shard": None}}))
                    for question in dict.fromkeys((*ids, *where)):
                        number, offset, length, _ = where[question]
                        files[number].seek(offset)
                        out.write(files[number].read(length))
            finally:
                for file in files:
                    file.close()
            for path in found:
                if path != self.merged:
                    path.unlink()
            return True

    def _where(self, paths: list[Path]) -> dict[QuestionId, tuple[int, int, int, bool]]:
        """Question -> number of its file, offset and length of its row, and whether that failed."""
        where: dict[QuestionId, tuple[int, int, int, bool]] = {}
        for number, path in enumerate(paths):
            for line in lines(path):
                if (question := line.data.get("question_id")) is not None:
                    failed = bool(line.data.get("error"))
                    if not failed or question not in where or where[question][3]:
                        where[question] = number, line.offset, line.length, failed
        return where

    def _existing(self) -> list[Path]:
        return [*([self.merged] if self.merged.is_file() else []), *self.parts]

    def _check(self, path: Path) -> None:
        first = next(lines(path), None)
        if first is None:
            return
        before = first.data.get("run")
        if not isinstance(before, dict):
            raise EvaluationError(f"{path} does not begin with a run line; move it away, or name another --out")
        if changes := differences(before, self.run):
            said = "; ".join(
                f"{quoted(name)} was {quoted(repr(old))}, now it is {quoted(repr(new))}"
                for name, old, new in changes[:4]
            )
            more = f" (and {len(changes) - 4} more)" if len(changes) > 4 else ""
            raise EvaluationError(
                f"{path} holds results of another run: {said}{more}. Go on as it was begun, name another --out, or "
                "move the file away"
            )

    def _lock(self, what: str) -> FileLock:
        return FileLock(self.folder / f".{what}.lock")


class Writer:
    """Appends rows to one file; a context manager. Made by `RunFiles.writer`."""

    def __init__(self, path: Path, run: Mapping[str, Any], lock: FileLock) -> None:
        self.path, self._run, self._lock = path, run, lock

    def __enter__(self) -> Self:
        try:
            self._lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise EvaluationError(
                f"{self.path} is being written by another process; wait for it, or give each its own --shard"
            ) from None
        try:
            end = _end_of_last_line(self.path)
            self._file = self.path.open("ab")
            if self._file.tell() != end:
                logger.warning("%s: its last line was cut off; that question is asked again", self.path)
                self._file.truncate(end)
            if end == 0:
                self._append({"run": self._run})
        except OSError as error:
            self._lock.release()
            raise EvaluationError(f"{self.path}: cannot be written: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.release()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; it is on the disk when this returns."""
        self._append(row)

    def _append(self, data: Mapping[str, Any]) -> None:
        self._file.write(_encoded(data))
        self._file.flush()
        os.fsync(self._file.fileno())


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs between two run lines of the same results: name, then, now."""
    old, new = _flat(before), _flat(now)
    fingerprint = old.get("provenance.fingerprint")
    free = _FREE + (_NAMES if fingerprint and fingerprint == new.get("provenance.fingerprint") else ())
    names = [*old, *(name for name in new if name not in old)]
    return [(n, old.get(n), new.get(n)) for n in names if n not in free and old.get(n) != new.get(n)]


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _end_of_last_line(path: Path) -> int:
    """Bytes up to and with the last newline."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        at = file.seek(0, os.SEEK_END)
        while at > 0:
            start = max(0, at - 65536)
            file.seek(start)
            newline = file.read(at - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            at = start
    return 0


def _encoded(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str) + "\n").encode("utf-8", "replace")
