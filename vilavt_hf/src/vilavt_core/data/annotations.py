"""Annotation files: JSON lines, one JSON list, or Parquet."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..json_text import parse_json


class Annotations:
    """Records of a file, parsed when they are asked for.

    Only offsets (and, of a JSON list, its bytes) are held in memory, outside of Python objects, so that the processes
    of a data loader share them.

    Args:
        path: ``.jsonl`` for one record per line, ``.parquet``, anything else for a JSON list.

    Raises:
        DataError: the file cannot be read, or is no list.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._bytes = b""
        try:
            ends, starts = self._scan_lines() if self.path.suffix == ".jsonl" else self._scan_list()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}; check the path", "annotations") from None
        except ValueError as error:
            raise DataError(f"{self.path}: not a JSON list: {error}; name JSON lines *.jsonl", "annotations") from None
        except RecursionError:
            raise DataError(
                f"{self.path}: a record is nested too deeply to be read; remove it", "annotations"
            ) from None
        self._starts, self._ends = np.array(starts, np.int64), np.array(ends, np.int64)

    def _scan_lines(self) -> tuple[list[int], list[int]]:
        starts, ends, at = [], [], 0
        with self.path.open("rb") as file:
            for line in file:
                if line.removeprefix(BOM_UTF8).strip():
                    starts.append(at)
                    ends.append(at + len(line))
                at += len(line)
        return ends, starts

    def _scan_list(self) -> tuple[list[int], list[int]]:
        records = self._rows() if self.path.suffix == ".parquet" else parse_json(self.path.read_bytes())
        if not isinstance(records, list):
            raise ValueError(f"it holds a {type(records).__name__}")
        parts = [json.dumps(record).encode() for record in records]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64).tolist() if parts else []
        self._bytes = b"".join(parts)
        return ends, [0, *ends[:-1]] if ends else []

    def _rows(self) -> list[Any]:
        """Of a Parquet file, as JSON has them."""
        try:
            import pyarrow.parquet
        except ImportError:
            raise DataError(f"{self.path}: reading it needs pyarrow: pip install pyarrow", "annotations") from None
        rows = pyarrow.parquet.read_table(self.path).to_pylist()
        for i, row in enumerate(rows):
            if odd := sorted(key for key, value in row.items() if isinstance(value, bytes | dict)):
                raise ValueError(f"row {i} holds an image or other data in {odd[0]}; save it as a file, name its path")
        return rows

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Any:
        start, end = int(self._starts[i]), int(self._ends[i])
        if self.path.suffix == ".jsonl":
            with self.path.open("rb") as file:
                file.seek(start)
                raw = file.read(end - start)
        else:
            raw = self._bytes[start:end]
        try:
            return parse_json(raw)
        except ValueError as error:
            raise DataError(f"{self.path}, record {i}: not JSON: {error}", "schema") from None

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))
