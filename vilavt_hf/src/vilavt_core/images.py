"""Getting an image from an untrusted place into memory: RGB, upright, within caps that are checked before anything
is decoded."""

from __future__ import annotations

import base64
import binascii
import errno
import glob
import io
import logging
import mimetypes
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .download import UrlPolicy, download, shown_url
from .errors import ImageError
from .failures import quoted, quoted_error
from .protocol import Rules
from .regions import MAX_ASPECT
from .sources import (
    ACCEPTED,
    ImageSource,
    Video,
    array_image,
    array_size,
    is_array,
    is_file,
    is_video_path,
    of_row,
    read_open_file,
    type_name,
)

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are tried. Left out are those that hand the data to another program, such as EPS, that are decoded
before their size is known (ICO), or that any data may be taken for (TGA, DIB)."""

HELD_BYTES = 4
"""Bytes that a pixel of a decoded RGB image takes: PIL pads it."""
_PEAK_BYTES = {"JPEG": 13, "MPO": 13, "PNG": 14, "GIF": 10, "BMP": 14, "PPM": 10, "TIFF": 18}
_ANY_PEAK_BYTES = 32
"""Bytes per pixel that decoding takes at its peak, the result included; as measured, and rounded up. Formats that are
not listed (WEBP, JPEG 2000, AVIF) take the most."""
_SCANS = 12
"""Times `ImageLimits.max_pixels` that a progressive JPEG may have its pixels gone over."""
_PYTHON_PIXELS = 4_000_000
"""Pixels of images that Pillow decodes in Python, which takes a second per million."""
_REFUSED_CODECS = {"ppm_plain": "a PPM written as text", "bmp_rle": "a BMP that is run-length encoded"}
_STRIP_PIXELS = 1 << 18
_SEGMENTS = 100_000
"""Chunks or segments of a file before its pixels: each takes time, and the notes among them memory."""
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)
"""Errors of the system that say nothing about the file."""

_EXIF_ORIENTATION = 0x0112
_LINE_BREAKS = b"\r\n\t"
_PLAIN_ALPHABET = bytes.maketrans(b"-_", b"+/")
_PERCENT = {"%2B": "+", "%2F": "/", "%3D": "=", "%2D": "-", "%5F": "_", "%0A": "\n", "%0D": "\r", "%20": " "}
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTED_TEXT = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")
"""Text of a PNG that may state its orientation."""
_MAX_TEXT = 1024 * 1024
"""Bytes of a text or profile in a PNG, unpacked, above which Pillow refuses the image."""
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]*)://")


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost. Every cap is checked before the pixels are decoded."""

    max_bytes: int = 64 * 1024 * 1024
    """Of the file, as stored or received."""
    max_pixels: int = 100_000_000
    """Width times height as stored. Decoded, a pixel takes 4 bytes, and up to 32 while it is decoded; see
    `decoding_cost`."""
    max_aspect: float = MAX_ASPECT
    """Longest side over shortest side."""


BENCHMARK_IMAGES = ImageLimits(max_bytes=1024**3, max_pixels=1_000_000_000)
"""Caps on a benchmark's own files, which the user has chosen: HR-Bench holds images of 33 million pixels as PNG."""


def load_image(
    source: ImageSource,
    limits: ImageLimits = ImageLimits(),
    *,
    allow_urls: bool = False,
    allow_paths: bool = True,
    url_policy: UrlPolicy = UrlPolicy(),  # noqa: B008 (frozen)
    rules: Rules = "strict",
    name: str | None = None,
) -> Image.Image:
    """Load an image.

    The EXIF orientation is applied, transparency is composited on white, 16-bit and floating-point images are
    scaled to 8 bits, of an animation the first frame is taken. The argument is never modified or closed.

    Args:
        source: a path, the bytes of a file (``bytes``, ``bytearray``, ``memoryview``), an open binary file, a
            ``{"bytes": …, "path": …}`` dict of `datasets`, a ``data:`` URL, an http(s) URL (only with ``allow_urls``),
            a PIL image, or pixels as an array or tensor; see `vilavt_core.sources.array_image`. An open file is
            read from its beginning and left where it was.
        limits: caps.
        allow_urls: whether the network may be used.
        allow_paths: whether files of this machine may be read; switch it off for text that comes from a client.
        url_policy: which URLs, if any.
        rules: ``published`` leaves the EXIF orientation unapplied, as the published system does.
        name: what errors call the image; default: its path or URL.

    Returns:
        An RGB image at full resolution.

    Raises:
        ImageError: names the image, both numbers where a cap is broken, and the remedy.
    """
    if isinstance(source, Image.Image):
        label = name or "the image"
        _check_size(source.size, limits, label)
        return _decode(source, label, rules)
    if is_array(source):
        label = name or "the array"
        _check_size(array_size(source, label), limits, label)  # type: ignore[arg-type]
        return to_rgb(array_image(source, label))  # type: ignore[arg-type]
    data, label = stored(source, limits, name, allow_urls, allow_paths, url_policy)
    return _open(data, limits, label, rules)


@dataclass(frozen=True)
class DecodingCost:
    """Memory that an image will take, told from its header."""

    pixels: int
    held: int
    """Bytes of the RGB image that comes out."""
    peak: int
    """Bytes at the most while it is decoded, `held` included."""


def decoding_cost(data: bytes, limits: ImageLimits = ImageLimits(), *, name: str | None = None) -> DecodingCost:
    """What it will cost to decode the bytes of a file, which are not decoded for it.

    Raises:
        ImageError: as `load_image`, where the header shows it.
    """
    with _opened(data, limits, name or f"the image ({len(data)} bytes)") as image:
        pixels = image.width * image.height
        return DecodingCost(pixels, pixels * HELD_BYTES, pixels * _PEAK_BYTES.get(image.format or "", _ANY_PEAK_BYTES))


def image_file(
    source: ImageSource, limits: ImageLimits = ImageLimits(), *, rules: Rules = "strict", name: str | None = None
) -> bytes:
    """An image as the bytes of a file: its own, unread, where it comes as one; of pixels in memory, a PNG.

    URLs are not followed; the other arguments and errors are those of `load_image`.
    """
    if isinstance(source, Image.Image) or is_array(source):
        buffer = io.BytesIO()
        load_image(source, limits, rules=rules, name=name).save(buffer, "PNG")
        return buffer.getvalue()
    return stored(source, limits, name, False, True, UrlPolicy())[0]


def is_url(source: str) -> bool:
    """Whether `load_image` takes it for a URL; a ``data:`` URL holds the image itself and is none."""
    return source[:5].lower() != "data:" and _URL.match(source) is not None


def image_size(
    source: ImageSource, limits: ImageLimits = ImageLimits(), *, rules: Rules = "strict", name: str | None = None
) -> tuple[int, int]:
    """Width and height that `load_image` would give, from the header alone; of a path, no more is read.

    What comes behind the header goes unseen: damage, and the orientation of a PNG that states it after its pixels.

    Raises:
        ImageError: as `load_image`, which URLs it does not follow.
    """
    if is_array(source):
        label = name or "the array"
        size = array_size(source, label)  # type: ignore[arg-type]
        _check_size(size, limits, label)
        return size
    if isinstance(source, Image.Image):
        return _header(source, limits, name or "the image", rules)
    if isinstance(source, Mapping):
        source, own = of_row(source, name or "the image")
        name = name or own
    file: Any = source
    if isinstance(source, os.PathLike) or (isinstance(source, str) and not re.match(r"data:|\w+://", source, re.I)):
        label = name or _shown(os.fsdecode(source))
        _check_file(Path(source), limits, label)
    else:
        data, label = stored(source, limits, name, False, True, UrlPolicy())
        file = io.BytesIO(_without_notes(data))
    try:
        try:
            return _file_header(file, limits, label, rules)
        except ImageError:
            raise
        except ValueError:
            if isinstance(file, io.BytesIO):
                raise
            data = _read_file(file, limits, label)  # only a PNG with a large profile or text has to be read for it
            return _file_header(io.BytesIO(_without_notes(data)), limits, label, rules)
    except ImageError:
        raise
    except Exception as error:
        _unless_machine(error, label)
        plain = f"not an image in a format we read: {quoted_error(error)}"
        raise ImageError(f"{label}: {_other_kind(label) or plain}") from None


def _header(image: Image.Image, limits: ImageLimits, label: str, rules: Rules) -> tuple[int, int]:
    """Width and height of an open image, turned as its orientation says, without decoding it."""
    _check_size(image.size, limits, label)
    turned = rules == "strict" and _orientation(partial(Image.Image.getexif, image), label) >= 5  # a PNG's own decodes
    return (image.height, image.width) if turned else image.size


def _file_header(file: Path | str | io.BytesIO, limits: ImageLimits, label: str, rules: Rules) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file, formats=[f for f in FORMATS if f in _registered()]) as image:
            return _header(image, limits, label, rules)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any PIL mode, transparency on white; an RGB image without transparency is returned as it is.

    16-bit integers are scaled by 1/257. 32-bit integers are read as 16-bit ones, or, if they exceed 65535, scaled
    to their maximum. Floats in 0–1 are scaled by 255, others are clipped to 0–255.
    """
    if image.mode.startswith("I;16"):
        return _in_strips(image, lambda strip: _grey(np.asarray(strip).astype(np.float64) / 257))
    if image.mode in ("I", "F"):
        highest = max((float(_values(strip).max(initial=0)) for _, strip in _strips(image)), default=0.0)
        if image.mode == "F":
            factor = 255.0 if highest <= 1 else 1.0
        elif highest > 65535:
            factor = 255 / highest
        else:
            return _in_strips(image, lambda strip: _grey(_values(strip) / 257))
        return _in_strips(image, lambda strip: _grey(_values(strip) * factor))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _in_strips(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in bands of about 260,000 pixels, each with its first row: what is computed with more than 8 bits a
    channel then takes the memory of a band."""
    rows = max(1, _STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    if image.width * image.height <= _STRIP_PIXELS:
        return convert(image)
    whole = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        whole.paste(convert(strip), (0, top))
    return whole


def _values(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.float64)
    return np.nan_to_num(values, posinf=0, neginf=0) if image.mode == "F" else np.clip(values, 0, None)


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")


def stored(
    source: ImageSource,
    limits: ImageLimits,
    name: str | None,
    allow_urls: bool,
    allow_paths: bool,
    url_policy: UrlPolicy,
) -> tuple[bytes, str]:
    """The file of an image that is not decoded yet, and what errors call it."""
    if isinstance(source, Video):
        raise ImageError(
            f"{name or source.label}: a Video is taken where a question is asked, not here; pass its frames "
            "(vilavt_core.video.read_frames) as images"
        )
    if isinstance(source, Mapping):
        source, own = of_row(source, name or "the image")
        name = name or own
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        label = name or f"the image ({len(data)} bytes)"
    elif is_file(source):
        own = getattr(source, "name", None)
        label = name or (own if isinstance(own, str) else "the open file")
        data = read_open_file(source, limits.max_bytes + 1, label)
    elif isinstance(source, str) and source[:5].lower() == "data:":
        label = name or "the data URL"
        data = _read_data_url(source, limits, label)
    elif isinstance(source, str) and (match := _URL.match(source)):
        label = name or _shown(source)
        if match.group(1).lower() == "file" and allow_paths:
            raise ImageError(f"{label}: the scheme 'file' is not read; give the path itself, without file://")
        if not allow_urls:
            raise ImageError(
                f"{label}: URLs are not allowed here; pass allow_urls=True, or download the file and pass its path"
            )
        if match.group(1).lower() not in url_policy.schemes:
            scheme, known = quoted(match.group(1)), ", ".join(url_policy.schemes)
            raise ImageError(f"{label}: the scheme {scheme!r} is not allowed, allowed are {known}")
        data = download(source, limits.max_bytes, url_policy, label)
    elif isinstance(source, str | os.PathLike):
        label = name or _shown(os.fsdecode(source))
        if not allow_paths:
            raise ImageError(f"{label}: paths are not allowed here; send the image itself as a data URL")
        data = _read_file(os.fsdecode(source), limits, label)
    else:
        raise ImageError(f"{name or 'the image'}: cannot load a {type_name(source)}; pass {ACCEPTED}")
    _check_bytes(len(data), limits, label)
    return data, label


def _open(data: bytes, limits: ImageLimits, label: str, rules: Rules) -> Image.Image:
    with _opened(data, limits, label) as image:
        return _decode(image, label, rules)


def _opened(data: bytes, limits: ImageLimits, label: str) -> Image.Image:
    """An open image of which the header has been read, within the caps."""
    _check_segments(data, label)
    try:
        with warnings.catch_warnings():
            # Our own cap below decides; PIL's warning would only repeat it.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(_without_notes(data)), formats=[f for f in FORMATS if f in _registered()])
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{label}: too many pixels to decode ({error}); at most {limits.max_pixels} are allowed, shrink it"
        ) from None
    except Exception as error:
        _unless_machine(error, label)
        kinds = ", ".join(FORMATS)
        why = "" if isinstance(error, UnidentifiedImageError) else f": {quoted_error(error)}"
        plain = f"{len(data)} bytes that are not an image in a format we read ({kinds}){why}"
        raise ImageError(f"{label}: {_other_kind(label) or plain}") from None
    try:
        _check_size(image.size, limits, label)
        _check_work(image, data, limits, label)
    except ImageError:
        image.close()
        raise
    return image


def _check_work(image: Image.Image, data: bytes, limits: ImageLimits, label: str) -> None:
    """Refuse what would take minutes to decode."""
    pixels = image.width * image.height
    tiles = getattr(image, "tile", None)
    codec = str(tiles[0][0]) if tiles else ""
    if codec in _REFUSED_CODECS:
        raise ImageError(f"{label}: {_REFUSED_CODECS[codec]} takes too long to read; save it as PNG")
    if codec in Image.DECODERS and pixels > _PYTHON_PIXELS:
        raise ImageError(
            f"{label}: {image.width} x {image.height} = {pixels} pixels, of this kind of {image.format} at most "
            f"{_PYTHON_PIXELS} are read; save it as PNG"
        )
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        scans, most = data.count(b"\xff\xda"), int(_SCANS * limits.max_pixels)
        if scans * pixels > most:
            raise ImageError(
                f"{label}: {scans} scans of {pixels} pixels, at most {most} pixels are gone over in all; save it again"
            )


def _check_segments(data: bytes, label: str) -> None:
    """Refuse a file of too many parts: they are read one by one, and what is said in the comments of a GIF is copied
    with each."""
    count, at = 0, 0
    if data.startswith(_PNG):
        at = len(_PNG)
        while at + 8 <= len(data) and count <= _SEGMENTS:
            at += 12 + int.from_bytes(data[at : at + 4], "big")
            count += 1
    elif data.startswith(b"\xff\xd8"):
        at = 2
        while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA and count <= _SEGMENTS:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            count += 1
    elif data.startswith((b"GIF87a", b"GIF89a")) and len(data) > 13:
        at = 13 + (3 * 2 ** ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
        while at + 2 < len(data) and data[at] == 0x21 and count <= _SEGMENTS // 10:
            at += 2
            while at < len(data) and data[at] and count <= _SEGMENTS // 10:
                at += 1 + data[at]
                count += 1
            at, count = at + 1, count + 1
        count *= 10
    if count > _SEGMENTS:
        raise ImageError(f"{label}: an image in more than {_SEGMENTS} parts is not read; save it again")


def _unless_machine(error: BaseException, label: str) -> None:
    """Pass on what says nothing about the image, under its own class: taken for damage, it would thin out data.

    Raises:
        MemoryError: there was none left.
        OSError: no file can be opened any more, or the disk is full.
    """
    if isinstance(error, MemoryError):
        raise MemoryError(f"{label}: not enough memory to decode it") from error
    if isinstance(error, OSError) and error.errno in _MACHINE:
        raise error


def _without_notes(data: bytes) -> bytes:
    """A file without what Pillow may refuse it for and we do not use: colour profile and texts of a PNG."""
    if not data.startswith(_PNG):
        return data
    kept, start, at = [], 0, len(_PNG)
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if kind in (b"iCCP", b"tEXt", b"zTXt", b"iTXt") and not _states_orientation(kind, data[at + 8 : end - 4]):
            kept.append(data[start:at])
            start = end
        at = end
    return b"".join([*kept, data[start:]]) if kept else data


def _states_orientation(kind: bytes, text: bytes) -> bool:
    """Whether a text chunk may hold an orientation, and is small enough for Pillow."""
    if not text.startswith(_ORIENTED_TEXT):
        return False
    body = text.partition(b"\0")[2]
    if kind == b"zTXt":
        body = body[1:]
    elif kind == b"iTXt":
        packed, body = body[:1] != b"\0", body[2:].partition(b"\0")[2].partition(b"\0")[2]
        if not packed:
            return True
    else:
        return True
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(body, _MAX_TEXT)
    except zlib.error:
        return True
    return not unpacking.unconsumed_tail


def _other_kind(label: str) -> str | None:
    """What a file is, by its name, that is no image but often taken for one; with the remedy."""
    kind = mimetypes.guess_type(label)[0] or ""
    if kind.startswith("video/") or is_video_path(label):
        return "it is a video; give it as one: `--video` on the command line, `Video(…)` in Python"
    if kind == "application/pdf":
        return "it is a PDF; save its pages as images and give those"
    return None


def _decode(image: Image.Image, label: str, rules: Rules) -> Image.Image:
    """Any decoder failure, of whatever class, becomes an error that names the image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            orientation = _orientation(image.getexif, label) if rules == "strict" else 1
            rgb = to_rgb(image)
            if orientation != 1:
                rgb = ImageOps.exif_transpose(_tagged(rgb, orientation))
    except Exception as error:
        _unless_machine(error, label)
        raise ImageError(f"{label}: the image is damaged or cut short: {quoted_error(error)}; save it again") from None
    if rgb is image:
        return rgb if not hasattr(image, "fp") else rgb.copy()
    return rgb


def _orientation(read_exif: Callable[[], Image.Exif], label: str) -> int:
    try:
        value = read_exif().get(_EXIF_ORIENTATION, 1)
    except Exception as error:
        logger.info("%s: unreadable EXIF data is ignored: %s", label, quoted_error(error))
        return 1
    return value if value in range(1, 9) else 1


def _tagged(image: Image.Image, orientation: int) -> Image.Image:
    """The converted image with just the orientation tag: conversions may drop the original's EXIF data."""
    image = image.copy()
    image.info.clear()
    image.getexif()[_EXIF_ORIENTATION] = orientation
    return image


def _check_size(size: tuple[int, int], limits: ImageLimits, label: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{label}: {width} x {height} px, an image needs at least one pixel")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{label}: {width} x {height} = {width * height} pixels, at most {limits.max_pixels} are allowed; "
            "shrink it or raise ImageLimits.max_pixels"
        )
    ratio = max(size) / min(size)
    if ratio > limits.max_aspect:
        raise ImageError(
            f"{label}: {width} x {height} px has a side ratio of {ratio:.0f}, at most {limits.max_aspect:g} is "
            "allowed; crop it"
        )


def _check_bytes(count: int, limits: ImageLimits, label: str) -> None:
    if count > limits.max_bytes:
        raise ImageError(
            f"{label}: {count} bytes, at most {limits.max_bytes} are allowed; save it smaller or raise "
            "ImageLimits.max_bytes"
        )


def _read_file(path: str | Path, limits: ImageLimits, label: str) -> bytes:
    try:
        path = Path(path)
        _check_file(path, limits, label)
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        _unless_machine(error, label)
        raise ImageError(f"{label}: cannot be read: {quoted_error(error)}") from None
    _check_bytes(len(data), limits, label)
    return data


def _check_file(path: Path, limits: ImageLimits, label: str) -> None:
    if not os.path.isfile(path):  # Path.is_file raises for a very long name
        kind = "there is no such file" if not os.path.exists(path) else "it is not a regular file"
        remedy = "check the path"
        if os.path.isdir(path):
            kind, remedy = "it is a folder, not a regular file", "name the images in it"
        elif glob.has_magic(str(path)):
            remedy = "patterns are not expanded here, name each image"
        raise ImageError(f"{label}: {kind}; {remedy}")
    _check_bytes(path.stat().st_size, limits, label)


def _read_data_url(source: str, limits: ImageLimits, label: str) -> bytes:
    head, comma, body = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"{label}: a data URL must read data:<type>;base64,<data>")
    try:
        plain = plain_base64(body)
        _check_bytes(len(plain) * 3 // 4, limits, label)
        return base64.b64decode(plain, validate=True)
    except ImageError:
        raise
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{label}: its base64 data cannot be read: {quoted_error(error)}") from None


def plain_base64(text: str) -> bytes:
    """Base64 as it is found in data URLs, in its plain form: padded, without line breaks, percent codes and the
    alphabet of URLs.

    Raises:
        ValueError: it holds characters that no base64 has.
    """
    for code, character in _PERCENT.items():  # not `unquote`, which takes two hundred times the text's memory
        text = text.replace(code, character).replace(code.lower(), character)
    plain = text.strip().encode("ascii").translate(_PLAIN_ALPHABET, _LINE_BREAKS).rstrip(b"=")
    return plain + b"=" * (-len(plain) % 4)


def _registered() -> set[str]:
    Image.init()
    return set(Image.OPEN)


def _shown(source: str) -> str:
    """A path or URL as errors call it: text that was taken for a path may be a whole image."""
    return shown_url(source) if is_url(source) else quoted(source)


__all__ = [
    "FORMATS",
    "HELD_BYTES",
    "DecodingCost",
    "ImageLimits",
    "UrlPolicy",
    "decoding_cost",
    "image_file",
    "image_size",
    "load_image",
    "plain_base64",
    "stored",
    "to_rgb",
]
