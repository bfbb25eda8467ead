"""What came of every sample, one JSON line each, written the moment it is known."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vilavt_core.json_text import parse_json

from .errors import SettingsError

logger = logging.getLogger(__name__)


class Traces:
    """Lines of one model on one benchmark; every rank has its file, all ranks' files are read.

    Args:
        folder: see `make_folder`.
        model: its name.
        benchmark: its name.
        rank: of this process.
    """

    def __init__(self, folder: Path, model: str, benchmark: str, rank: int) -> None:
        stem = "_".join(re.sub(r"[^\w.-]+", "-", part) for part in (model, benchmark))
        self.path = folder / f"{stem}_rank{rank}.jsonl"
        self._lock = threading.Lock()
        self._answers = {
            row["key"]: row["answer"]
            for path in sorted(folder.glob(f"{stem}_rank*.jsonl"))
            for row in read(path)
            if row["error"] is None
        }

    def __len__(self) -> int:
        return len(self._answers)

    def answer(self, key: str) -> str | None:
        """The answer under a key, ``""`` if the model gave none; None: it was not asked yet, or that failed."""
        return (self._answers[key] or "") if key in self._answers else None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line; one that cannot be written is logged, and the evaluation goes on."""
        line = json.dumps(row, ensure_ascii=True, separators=(",", ":"), default=str) + "\n"
        with self._lock:
            try:
                with self.path.open("a+b") as file:
                    if file.tell() and not _ends_line(self.path):
                        line = "\n" + line  # a process was killed while it wrote
                    file.write(line.encode())
            except OSError as error:
                logger.error("%s: sample %s cannot be traced: %s", self.path, row.get("sample_id"), error.strerror)


def make_folder(folder: Path) -> None:
    """Make the folder of the traces if it is missing.

    Raises:
        SettingsError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"trace_dir {folder}: cannot be made: {error.strerror}; name another folder") from None


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; lines that were cut off are left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict) and {"key", "answer", "error"} <= row.keys():
                yield row


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
