"""Unpack the archives of a downloaded training set: where they lie, safely, and again from where it stopped."""

import json
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..json_text import parse_json
from ..outputs import whole_file
from ..progress import counting

DONE = ".unpacked.json"
"""In the folder: archives that are unpacked, so that they are not read again."""

_CHUNK = 1 << 20


@dataclass
class UnpackReport:
    """What was done."""

    archives: int = 0
    written: int = 0
    """Files."""
    kept: int = 0
    """Files that were there already."""
    nbytes: int = 0
    """Bytes written."""
    failures: list[str] = field(default_factory=list)
    """One line per archive that could not be unpacked, or not wholly."""


def unpack(folder: str | os.PathLike, *, remove: bool = False, progress: bool = False) -> UnpackReport:
    """Unpack every zip archive under a folder into the archive's own folder.

    A file appears under its name only when it is whole and its checksum is right. Files that are there with the right
    size and checksum are kept. An archive with an entry that would land outside its folder, with a link or with an
    encrypted entry is refused as a whole.

    Args:
        folder: searched with its subfolders.
        remove: delete an archive once all of it is unpacked and verified.
        progress: show a bar.

    Raises:
        DataError: there is no such folder, or no archive in it and never was: removed ones are remembered.
    """
    root = Path(folder)
    archives = sorted(p for p in root.rglob("*") if p.suffix.lower() == ".zip" and p.is_file())
    done = _read_done(root)
    if not archives and not done:
        raise DataError(f"{root}: {'there is no zip archive in it' if root.is_dir() else 'no such folder'}", "unpack")
    report = UnpackReport()
    for archive in archives:
        key = str(archive.relative_to(root))
        mark = [archive.stat().st_size, archive.stat().st_mtime_ns]
        report.archives += 1
        try:
            with zipfile.ZipFile(archive) as opened:
                entries = _safe_entries(opened, archive)
                if done.get(key) == mark and all(_same_size(path, info) for path, info in entries):
                    report.kept += len(entries)
                else:
                    _extract(opened, archive, entries, report, progress)
        except Exception as error:  # every decoder has errors of its own, and none may keep the other archives from us
            report.failures.append(
                str(error) if isinstance(error, DataError) else f"{archive}: {str(error) or type(error).__name__}"
            )
            continue
        done[key] = mark
        _write_done(root, done)
        if remove:
            archive.unlink()
    return report


def _safe_entries(opened: zipfile.ZipFile, archive: Path) -> list[tuple[Path, zipfile.ZipInfo]]:
    home = archive.parent.resolve()
    entries = []
    for info in opened.infolist():
        name = info.filename
        parts = [part for part in name.rstrip("/").split("/") if part != "."]
        escapes = name.startswith("/") or re.match(r"[A-Za-z]:", name) or "\\" in info.orig_filename
        path = home.joinpath(*parts)
        if escapes or ".." in parts or "" in parts or not path.resolve().is_relative_to(home):
            raise DataError(
                f"{archive}: the entry {name!r} would land outside {home}; nothing of it is unpacked", "unpack"
            )
        if stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(f"{archive}: the entry {name!r} is a link; nothing of it is unpacked", "unpack")
        if not info.is_dir() and (not parts or path in (archive.parent.resolve() / archive.name, home / DONE)):
            raise DataError(
                f"{archive}: the entry {name!r} is no name for a file of a training set; nothing of it is unpacked",
                "unpack",
            )
        if info.flag_bits & 1:
            raise DataError(f"{archive}: the entry {name!r} is encrypted; nothing of it is unpacked", "unpack")
        if not info.is_dir():
            entries.append((path, info))
    return entries


def _extract(
    opened: zipfile.ZipFile,
    archive: Path,
    entries: list[tuple[Path, zipfile.ZipInfo]],
    report: UnpackReport,
    progress: bool,
) -> None:
    missing = sum(info.file_size for path, info in entries if not _same_size(path, info))
    free = shutil.disk_usage(archive.parent).free
    if missing > free:
        raise DataError(f"{archive}: {missing} bytes to write, {free} are free; make room", "unpack")
    total = sum(info.file_size for _, info in entries)
    with counting(total, archive.name, "B", shown=progress) as advance:
        for path, info in entries:
            if _same_size(path, info) and _checksum(path) == info.CRC:
                report.kept += 1
                advance(info.file_size)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(info) as source, whole_file(path) as target:
                while chunk := source.read(_CHUNK):  # the end of the entry checks its checksum
                    target.write(chunk)
                    advance(len(chunk))
            report.written += 1
            report.nbytes += info.file_size


def _same_size(path: Path, info: zipfile.ZipInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.file_size


def _checksum(path: Path) -> int:
    value = 0
    for chunk in _chunks(path):
        value = zlib.crc32(chunk, value)
    return value


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _read_done(root: Path) -> dict[str, Any]:
    try:
        found = parse_json((root / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_done(root: Path, done: dict[str, Any]) -> None:
    with whole_file(root / DONE) as file:
        file.write((json.dumps(done, indent=1) + "\n").encode())
