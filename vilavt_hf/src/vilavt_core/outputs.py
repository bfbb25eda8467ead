"""Whether a command can write its results where it is told to, found out before the work; a file written whole or not
at all.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TRIAL = b"\0" * 4096
"""What is written, and removed again, to find out."""


def file_problem(path: str | Path) -> str | None:
    """What keeps a file from being written; None if nothing does.

    Its folder must be there, and take a trial file; a file that is there stays as it is.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return f"{path} is a folder; name a file"
        folder = path.absolute().parent
        if not folder.is_dir():
            if folder.exists():
                return f"{path}: {folder} is not a folder"
            return f"{path}: the folder {folder} does not exist; create it first"
        if path.exists():
            return _present_file_problem(path)
        return _trial(folder, path)
    except (OSError, ValueError) as error:  # a name too long, with a null byte, …
        return _cannot(path, error)


def folder_problem(path: str | Path) -> str | None:
    """What keeps a folder from being made, with those it is in, and written to; None if nothing does.

    Nothing is left behind; a folder that is there may hold files.
    """
    path = Path(path)
    try:
        place = path.absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            return f"{path} is a file; name a folder" if place == path.absolute() else f"{path}: {place} is a file"
        return _trial(place, path)
    except (OSError, ValueError) as error:
        return _cannot(path, error)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its name when the block succeeds, and is gone if it fails.

    It is made anew: nothing that lies under its name, a link say, is written through.
    """
    partial = path.with_name(f".{path.name[:40]}.{os.getpid()}.partial")  # the name alone may be as long as one can be
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _present_file_problem(path: Path) -> str | None:
    mode = path.stat().st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        return None  # opening one waits for its reader
    with path.open("r+b" if stat.S_ISREG(mode) else "wb", buffering=0) as file:
        if stat.S_ISCHR(mode) and not file.isatty():
            file.write(b"\n")
    if stat.S_ISREG(mode) and os.access(path.absolute().parent, os.W_OK):
        return _trial(path.absolute().parent, path)  # the disk may be full
    return None


def _trial(folder: Path, path: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(_TRIAL)
    except OSError as error:
        return _cannot(path, error)
    return None


def _cannot(path: Path, error: Exception) -> str:
    return f"{str(path)[:200]}: cannot be written: {getattr(error, 'strerror', None) or error}; choose another place"
