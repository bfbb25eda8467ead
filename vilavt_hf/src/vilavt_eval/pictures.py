"""The images of recorded conversations: found again where their files are, cut as the model saw them, and written as
small files that a page refers to.

A result file may come from anybody: what it names is opened as an image only, within the caps of
`vilavt_core.images`, and a path that leaves the folders it is looked for in is not followed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from vilavt_core.conversation import ShownImage
from vilavt_core.errors import ImageError
from vilavt_core.images import load_image
from vilavt_core.protocol import Box
from vilavt_core.sources import Rule, Video
from vilavt_core.video import VideoLimits, frame_times, frames_at

from .definition import Benchmark

LARGEST = 1600
"""Pixels of the longest side of a written image."""
THUMBNAIL = 160
FRAME_LIMITS = VideoLimits(max_total_pixels=200_000_000, max_seconds=60)
"""Caps on the frames of a video that one conversation is shown with: 600 MB in memory."""
_DECODED = 4
"""Sources that are kept decoded: neighbouring questions share them."""


def picture_roots(
    result: Path, benchmark: Benchmark | None, given: Iterable[Path] = (), data: Path | None = None
) -> list[Path]:
    """Folders that the image paths of a result file may start from, in the order they are tried.

    Args:
        result: the file.
        benchmark: whose definition says where its images are, seen from its questions.
        given: folders that are tried first.
        data: the benchmark's file, or the folder (data root) that holds it.
    """
    bases = [] if data is None else [data if data.is_dir() else data.parent]
    bases += [result.absolute().parent, *list(result.absolute().parents)[1:4], Path.cwd()]
    roots = list(given)
    for base in bases:
        if benchmark is not None:
            roots += [(base / benchmark.file).parent / benchmark.images, base / benchmark.images]
        roots.append(base)
    return list(dict.fromkeys(roots))


@dataclass(frozen=True)
class Frame:
    """A frame of a video file."""

    path: Path
    time: float
    """Seconds after the first one."""
    times: tuple[float, ...]
    """Of all frames of the conversation that come from this file: they are decoded together."""

    def __str__(self) -> str:
        return str(self.path)


class PictureFolder:
    """Writes images into a folder, each once.

    Args:
        folder: where; made when the first image is written.
        address: of the folder, as the pages that show them say it, with a slash at the end.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        self.missing: dict[str, str] = {}
        """Images that could not be shown, and why."""
        self.open = lru_cache(_DECODED)(load_image)
        """An image, decoded; see `vilavt_core.images.load_image`."""
        self._frames = lru_cache(1)(_frames)
        self.times = lru_cache(_DECODED)(_times)
        """Times of the frames that are taken of a video file; an error if it cannot be read."""

    def find(self, name: str, roots: Sequence[Path]) -> Path | None:
        """The file of an image or video, or None. One that is not where its absolute path says is looked for by its
        name: results are moved together with their images.
        """
        path = Path(name)
        if not name or "\0" in name or ".." in path.parts:
            return None
        if path.is_absolute():
            if os.path.isfile(path):
                return path
            path = Path(path.name)
        return next((root / path for root in roots if os.path.isfile(root / path)), None)

    def address_of(self, source: Path | Frame | str, image: ShownImage) -> str | None:
        """Write what an image showed of its source, a file, a frame or a ``data:`` URL; None if that cannot be read."""
        return self._write(source, image.region, (image.width, image.height), self.address, whole=image.parent is None)

    def thumbnail(self, source: Path | Frame | str, address: str) -> str | None:
        """Write a source as a thumbnail, for a page that knows the folder under another address."""
        return self._write(source, (0.0, 0.0, 1.0, 1.0), (THUMBNAIL, THUMBNAIL), address, whole=True, name="thumb-")

    def _decoded(self, source: Path | Frame | str) -> Image.Image:
        if not isinstance(source, Frame):
            return self.open(source)
        frames = self._frames(source.path, source.times)
        if isinstance(frames, ImageError):
            raise frames
        return frames[source.time]

    def _write(
        self,
        source: Path | Frame | str,
        region: Box,
        size: tuple[int, int],
        address: str,
        *,
        whole: bool,
        name: str = "",
    ) -> str | None:
        try:
            file = source.path if isinstance(source, Frame) else source
            stamp = os.stat(file).st_mtime_ns if isinstance(file, Path) else 0
            time = source.time if isinstance(source, Frame) else ""
            key = f"{source}\0{time}\0{stamp}\0{region}\0{size}\0{whole}"
            path = self.folder / f"{name}{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:20]}.jpg"
            if not path.is_file():
                picture = self._decoded(source)
                if not whole:
                    picture = _cut(picture, region, size)
                largest = THUMBNAIL if name else LARGEST
                picture = picture.copy() if whole else picture
                picture.thumbnail((largest, largest), Image.Resampling.LANCZOS, reducing_gap=2.0)
                self.folder.mkdir(parents=True, exist_ok=True)
                picture.save(path, "JPEG", quality=80 if name else 88)
        except (ImageError, OSError) as error:
            self.missing.setdefault(str(source)[:200], str(error)[:300])
            return None
        return address + path.name


def _times(path: Path, frames: int | None, fps: float | None, rule: Rule) -> tuple[float, ...] | ImageError:
    try:
        return frame_times(Video(path, frames, fps, rule), FRAME_LIMITS).times
    except ImageError as error:
        return error


def _frames(path: Path, times: tuple[float, ...]) -> dict[float, Image.Image] | ImageError:
    """Frames by their times; an error is kept too, so that a broken file is not read again for each of its frames."""
    try:
        found = frames_at(Video(path), times, FRAME_LIMITS)
    except ImageError as error:
        return error
    return {time: frame.image for time, frame in zip(times, found, strict=True)}


def _cut(picture: Image.Image, region: Box, size: tuple[int, int]) -> Image.Image:
    """A region, given in fractions, at the size that it was shown at."""
    width, height = picture.size
    left, top = int(region[0] * width), int(region[1] * height)
    right, bottom = int(region[2] * width), int(region[3] * height)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ImageError(f"region {list(region)} is no part of an image of {width} x {height} px")
    scale = min(1.0, LARGEST / max(size))
    shown = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    return picture.crop((left, top, right, bottom)).resize(shown, Image.Resampling.LANCZOS)
