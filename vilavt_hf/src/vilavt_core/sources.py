"""What an image may be given as: paths, bytes, files, rows of `datasets`, arrays and tensors, PIL images.

Every entry of every package takes an image, or several, through `image_list` and
`vilavt_core.images.load_image`; tensors are recognised by what they have, torch is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, get_args

import numpy as np
from PIL import Image

from .errors import ImageError
from .failures import quoted, quoted_error

ACCEPTED = (
    "a path, a data URL, the bytes of a file, an open binary file, a dict with 'bytes' or 'path', a PIL image, or an "
    "array or tensor of pixels (height x width, with 3 or 4 channels last or first)"
)
"""One image, in words for errors."""

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv",
)  # fmt: skip
"""By which a path is taken for a video where one may stand beside images."""

_CHANNELS = (1, 3, 4)
_SINGLE = (str, os.PathLike, bytes, bytearray, memoryview, Mapping, Image.Image)

FRAMES = 32
"""Frames of a video that the published evaluation of VSI-Bench shows."""

Rule = Literal["ends", "centres"]
"""Which frames ``frames=N`` takes, uniform in time: ``ends``, the first, the last, and N - 2 between them; ``centres``,
those in the middle of N equal parts of the duration."""


@dataclass(frozen=True, eq=False)
class Video:
    """A video among the images of a question; its frames become images of the conversation, in order of time.

    Args:
        source: a path, the bytes of a file, an open binary file, a ``data:`` URL, or an http(s) URL where allowed.
        frames: how many, uniform in time by `rule`; all if the file has fewer. Defaults to 32 if `fps` is None.
        fps: instead, frames per second from the first frame on.
        rule: see `Rule`.
        name: what errors and pages call it; defaults to the file's name.

    Raises:
        ImageError: both or impossible numbers, or an unknown rule.
    """

    source: str | Path | bytes | BinaryIO
    frames: int | None = None
    fps: float | None = None
    rule: Rule = "ends"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and self.fps is not None:
            raise ImageError(f"{self.label}: frames={self.frames} and fps={self.fps}; give one of the two")
        if self.frames is not None and (isinstance(self.frames, bool) or self.frames != int(self.frames)):
            raise ImageError(f"{self.label}: frames={self.frames!r} must be a whole number")
        if self.frames is not None and self.frames < 1:
            raise ImageError(f"{self.label}: frames={self.frames}, at least 1 must be taken")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ImageError(f"{self.label}: fps={self.fps} must be above 0")
        if self.rule not in get_args(Rule):
            raise ImageError(f"{self.label}: unknown rule {self.rule!r}; known are {', '.join(get_args(Rule))}")

    @classmethod
    def of(cls, entry: Any, default: Video | None = None, *, root: Path | None = None) -> Video:
        """A video as records and messages name it.

        Args:
            entry: a video; a path; or a mapping of ``path`` (or ``video``, ``url``, ``value``) and ``frames`` (or
                ``nframes``, ``num_frames``, ``nframe``), ``fps`` or ``rule``; null says nothing.
            default: whose frames are taken where the entry says nothing of them.
            root: folder that a relative path starts from.

        Raises:
            ImageError: it is something else, says a thing twice, or has keys that have no effect; names them.
        """
        if isinstance(entry, Video):
            return entry
        said: dict[str, Any] = {}
        for key, value in (entry if isinstance(entry, Mapping) else {"path": entry}).items():
            name = _VIDEO_KEYS.get(key, key)
            if value is None or (name == "type" and value in ("video", "video_url")):
                continue
            if name not in ("source", "frames", "fps", "rule"):
                raise ImageError(f"a video has no {str(key)[:80]!r} here; its keys are path, frames, fps and rule")
            if name in said:
                raise ImageError(f"a video says its {name} twice, {said[name]!r} and as {key} {value!r}; say it once")
            said[name] = value
        source = said.pop("source", None)
        if not isinstance(source, str | os.PathLike) or not os.fspath(source):
            raise ImageError(f"a video is a path, or a path with frames or fps, not a {type_name(source)}")
        for name in ("frames", "fps"):
            if name in said and (isinstance(said[name], bool) or not isinstance(said[name], int | float)):
                raise ImageError(f"{str(source)[:200]}: {name} is {said[name]!r}, it must be a number")
        if default is not None:
            if "frames" not in said and "fps" not in said:
                said |= {"frames": default.frames, "fps": default.fps}
            said.setdefault("rule", default.rule)
        local = "://" not in os.fspath(source)[:20] and os.fspath(source)[:5].lower() != "data:"
        return cls(root / source if root is not None and local else source, **said)  # type: ignore[arg-type]

    @property
    def wanted(self) -> dict[str, Any]:
        """Which frames, without what is not said: keys that `of` takes."""
        said = {"frames": self.frames, "fps": self.fps, "rule": None if self.rule == "ends" else self.rule}
        return {name: value for name, value in said.items() if value is not None}

    @property
    def label(self) -> str:
        """What errors call it."""
        if self.name:
            return self.name
        if isinstance(self.source, str) and self.source[:5].lower() == "data:":
            return "the video"
        if isinstance(self.source, str | Path):
            return str(self.source)[:200]
        return str(getattr(self.source, "name", "the video"))


_VIDEO_KEYS = {
    **dict.fromkeys(("path", "video", "url", "value"), "source"),
    **dict.fromkeys(("nframes", "num_frames", "nframe"), "frames"),
}


class PixelArray(Protocol):
    """A numpy array, or a tensor of any framework that turns into one."""

    @property
    def shape(self) -> Any:
        """Sizes of its axes."""
        ...

    @property
    def dtype(self) -> Any:
        """Of its values."""
        ...


ImageSource = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | Mapping[str, Any]
    | PixelArray
    | Image.Image
    | Video
)
"""One image: a file's path, its bytes, the open file, a ``data:`` URL, an http(s) URL (where allowed), a row
``{"bytes": …, "path": …}`` of `datasets`, pixels as an array or tensor, or a PIL image. Where a question is asked, also
a `Video`, whose frames are images."""


def image_list(images: ImageSource | Iterable[ImageSource]) -> list[ImageSource]:
    """One image or several as a list; an array with four axes, and an array of paths or rows, are several.

    Raises:
        ImageError: it is neither an image nor an ordered collection; names its type.
    """
    if is_array(images):
        axes = len(images.shape)  # type: ignore[union-attr, arg-type]
        several = axes == 4 or (axes == 1 and not _is_numeric(images))
        return list(images) if several else [images]  # type: ignore[arg-type, list-item]
    if isinstance(images, (*_SINGLE, Video)) or is_file(images):
        return [images]  # type: ignore[list-item]
    if isinstance(images, Iterable) and not isinstance(images, set | frozenset):
        return list(images)
    raise ImageError(f"a {type_name(images)} is no image and no list of images; an image is {ACCEPTED}")


def source_name(source: ImageSource) -> str:
    """Name of an image's file without its folder, for people; empty where none is known."""
    if isinstance(source, Mapping):
        source = source.get("path") or ""
    if isinstance(source, str) and source[:5].lower() == "data:":
        return ""
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source).partition("?")[0].rstrip("/").rpartition("/")[2][:200]
    name = getattr(source, "name", None) or getattr(source, "filename", None)
    return source_name(name) if isinstance(name, str) else ""


def file_paths(sources: Iterable[ImageSource | Video]) -> list[str]:
    """For each image or video that is a file where it is, as an absolute path; of the network, its URL; others are
    left out. A result that is written to disk says by them where its images can be found again.
    """
    out = []
    for one in sources:
        source = one.source if isinstance(one, Video) else one
        if not isinstance(source, str | os.PathLike):
            continue
        path = os.fsdecode(source)
        if path[:5].lower() != "data:":
            out.append(path if "://" in path else os.path.abspath(path))
    return out


def is_video_path(source: object) -> bool:
    """Whether a path or URL ends like a video's."""
    return isinstance(source, str | Path) and str(source).partition("?")[0].lower().endswith(VIDEO_SUFFIXES)


def is_file(source: object) -> bool:
    """Whether it is an open file, or something that is read like one."""
    return callable(getattr(source, "read", None))


def is_array(source: object) -> bool:
    """Whether it is a numpy array or a tensor of any framework."""
    if isinstance(source, str | bytes):
        return False  # numpy's strings, which have both
    return hasattr(source, "shape") and hasattr(source, "dtype")


def of_row(row: Mapping[str, Any], label: str) -> tuple[ImageSource, str | None]:
    """The image in a ``{"bytes": …, "path": …}`` dict, and its path if that only names it.

    Raises:
        ImageError: it holds neither, or something else as well.
    """
    unknown = sorted(str(key) for key in row if key not in ("bytes", "path"))
    data: Any = row.get("bytes")
    path: Any = row.get("path")
    if unknown or (data is None and path is None):
        found = quoted(", ".join(map(repr, unknown[:10]))) or "neither"
        raise ImageError(
            f"{label}: a dict is an image if it has 'bytes' or 'path' (the rows of `datasets`), this one has {found}"
        )
    if data is None:
        return path, None
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ImageError(f"{label}: 'bytes' of the dict is a {type_name(data)}, it must be the bytes of a file")
    return data, None if path is None else str(path)


def read_open_file(file: Any, most: int, label: str) -> bytes:
    """At most `most` bytes of an open file from its beginning; where it can seek, it is left where it was.

    Raises:
        ImageError: it cannot be read, or gives no bytes.
    """
    try:
        place = file.tell() if file.seekable() else None
    except Exception:
        place = None  # a response, or a wrapper without these methods: it is read once
    try:
        if place is not None:
            file.seek(0)
        data = file.read(most)
        if place is not None:
            file.seek(place)
    except Exception as error:
        raise ImageError(f"{label}: the open file cannot be read: {quoted_error(error)}") from None
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ImageError(
            f"{label}: reading the {type_name(file)} gives a {type_name(data)}, not bytes; open the file with mode 'rb'"
        )
    return bytes(data)


def array_size(array: PixelArray, label: str) -> tuple[int, int]:
    """Width and height of an image given as an array.

    Raises:
        ImageError: it has another shape than an image, or one that can be read in two ways.
    """
    height, width = _axes(array, label)
    return int(array.shape[width]), int(array.shape[height])


def array_image(array: PixelArray, label: str) -> Image.Image:
    """An image given as an array or tensor: (H, W), (H, W, C) or (C, H, W), with 1, 3 or 4 channels.

    Integers are 0 to 255, those of the type ``uint16`` 0 to 65535. Floats are 0 to 1 if none is above 1, else 0 to
    255. Booleans are black and white.

    Raises:
        ImageError: the shape is no image's, or a value is outside of its range (an image that was normalised).
    """
    height, _ = _axes(array, label)
    values = _numpy(array, label)
    if values.ndim == 3:
        values = values if height == 0 else np.moveaxis(values, 0, -1)
        values = values[..., 0] if values.shape[-1] == 1 else values
    if values.dtype == np.bool_:
        values = values * np.uint8(255)
    elif values.dtype == np.uint16:
        values = np.rint(values / 257)
    elif values.dtype != np.uint8:
        if values.dtype.kind not in "iuf":
            raise ImageError(f"{label}: an array of {values.dtype} is no image; pass integers or floats")
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        if not (low >= 0 and high <= 255):  # written so that NaN is refused
            raise ImageError(
                f"{label}: the array has values from {low:g} to {high:g}; pixels are 0 to 255, or floats 0 to 1 "
                "(an image that was normalised cannot be used: pass it as it was before)"
            )
        values = np.rint(values * 255 if values.dtype.kind == "f" and high <= 1 else values)
    return Image.fromarray(np.ascontiguousarray(values, dtype=np.uint8))


def type_name(value: object) -> str:
    """Of a value, with its module unless it is Python's own."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _axes(array: PixelArray, label: str) -> tuple[int, int]:
    """Which axes are height and width."""
    shape: Sequence[int] = tuple(array.shape)
    last, first = (len(shape) == 3 and shape[axis] in _CHANNELS for axis in (-1, 0))
    if len(shape) == 2:
        return 0, 1
    if last == first:
        why = "can be read with channels first or last" if last else "is no image's"
        raise ImageError(
            f"{label}: the shape {shape} of a {type_name(array)} {why}; pass (height, width), (height, width, "
            "channels) or (channels, height, width) with 1, 3 or 4 channels, or a PIL image"
        )
    return (0, 1) if last else (1, 2)


def _numpy(array: Any, label: str) -> np.ndarray:
    """An array as numpy's, from any device and of any type."""
    try:
        if hasattr(array, "detach"):  # torch
            array = array.detach().cpu()
            array = array.float() if array.is_floating_point() else array
        return np.asarray(array)
    except Exception as error:
        raise ImageError(f"{label}: a {type_name(array)} cannot be read as an array: {quoted_error(error)}") from None


def _is_numeric(array: Any) -> bool:
    return getattr(array.dtype, "kind", "f") in "biufcV"
