"""Pictures that somebody made to hurt, each with what must come of it; made here, so that none has to be stored."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

MEGABYTE = 2**20
SIDE = 2000
PIXELS = SIDE * SIDE
UNREAD = "not an image in a format we read"


@dataclass(frozen=True)
class Hostile:
    """One file."""

    name: str
    make: Callable[[], bytes]
    refused: str | None
    """What the error says, as a pattern; None: it loads, or is refused as damaged."""
    seconds: float = 20.0
    megabytes: int = 100
    """That reading it may take, beside the file."""


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def webp(width: int, height: int) -> bytes:
    """A whole lossless WEBP of one colour, in 28 bytes at any size."""
    bits = [(0x2F, 8), (width - 1, 14), (height - 1, 14), (0, 4), (0, 3), *[(1, 1), (0, 3)] * 5]
    value = at = 0
    for number, count in bits:
        value, at = value | number << at, at + count
    data = value.to_bytes(-(-at // 16) * 2, "little")
    body = b"WEBPVP8L" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(width: int, height: int, *between: bytes, depth: int = 8, colours: int = 2, data: bytes = b"") -> bytes:
    """Header, chunks, and data that may be too short."""
    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    parts = chunk(b"IHDR", header), *between, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded(Image.new("L", (side, side)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + b"\xff\xd9"


def bmp_rle(width: int, height: int) -> bytes:
    """A BMP of one colour, run-length encoded."""
    rows = (b"\xff\x00" * (width // 255) + bytes([width % 255, 0]) + b"\0\0") * height + b"\0\1"
    palette = bytes(4 * 256)
    start = 14 + 40 + len(palette)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + info + palette + rows


def bmp(width: int, height: int) -> bytes:
    """A header that promises pixels."""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def tiff(*tags: tuple[int, int, int, int]) -> bytes:
    """A TIFF of these tags: number, type, count, value."""
    body = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4)


def of_size(width: int, height: int) -> tuple[tuple[int, int, int, int], ...]:
    """Tags of a grey TIFF."""
    return (
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, height),
        (279, 4, 1, width * height % 2**32),
    )


def _bombs() -> Iterator[Hostile]:
    """More pixels than allowed, by header alone."""
    for width, height in ((60_000, 60_000), (100_001, 1000), (16_000, 16_000), (2**31 - 1, 2**31 - 1)):
        yield Hostile(f"png-{width}x{height}", lambda w=width, h=height: png(w, h), "pixels|not an image")
        yield Hostile(f"bmp-{width}x{height}", lambda w=width, h=height: bmp(w, h), "pixels|not an image")
        yield Hostile(f"tiff-{width}x{height}", lambda w=width, h=height: tiff(*of_size(w, h)), "pixels|not an image")
        yield Hostile(f"ppm-{width}x{height}", lambda w=width, h=height: b"P6 %d %d 255\n" % (w, h), "pixels")
        if max(width, height) < 65536:
            gif = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6)
            gif += b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\x02\x02D\x01\0;"
            yield Hostile(f"gif-{width}x{height}", lambda data=gif: data, "pixels|not an image")
    yield Hostile("webp-16000x16000", lambda: webp(16_000, 16_000), "256000000 pixels")


def _long() -> Iterator[Hostile]:
    for width, height in ((1, 201), (201, 1), (1, 60_000), (60_000, 2)):
        yield Hostile(f"long-{width}x{height}", lambda w=width, h=height: png(w, h), "side ratio")
    for width, height in ((0, 5), (5, 0), (0, 0)):
        yield Hostile(f"empty-{width}x{height}", lambda w=width, h=height: png(w, h), "at least one pixel|not an image")


def _slow() -> Iterator[Hostile]:
    """What takes Pillow seconds to minutes."""
    yield Hostile("ppm-text", lambda: b"P3 2000 2000 255\n" + b"1 " * (3 * PIXELS), "PPM written as text")
    yield Hostile("ppm-text-1", lambda: b"P1 2000 2000\n" + b"1" * PIXELS, "PPM written as text")
    yield Hostile("ppm-text-2", lambda: b"P2 2000 2000 255\n" + b"1 " * PIXELS, "PPM written as text")
    yield Hostile("ppm-comment", lambda: b"P3 2 2 255\n#" + b"x" * 20_000_000, "PPM written as text|not an image")
    yield Hostile("ppm-odd-maximum", lambda: b"P6 4000 4000 254\n" + bytes(48_000_000), "at most 4000000 are read")
    yield Hostile("bmp-rle", lambda: bmp_rle(4000, 4000), "run-length")
    yield Hostile("bmp-rle-idle", lambda: bmp_rle(100, 1)[:-4] + bytes(20_000_000), "run-length")
    yield Hostile("jpeg-400-scans", lambda: scans(400, 4000), "scans of 16000000 pixels, at most 1200000000")
    yield Hostile("jpeg-50000-scans", lambda: scans(50_000, 400), "scans")
    yield Hostile("png-chunks", lambda: png(9, 9, chunk(b"prVt", b"") * 1_000_000), "more than 100000 parts", 5)
    yield Hostile("png-texts", lambda: png(9, 9, chunk(b"tEXt", b"a\0b") * 1_000_000), "more than 100000 parts", 5)
    yield Hostile("jpeg-segments", lambda: b"\xff\xd8" + b"\xff\xe1\0\2" * 5_000_000, "more than 100000 parts", 5)
    gif = b"GIF89a" + struct.pack("<HH", 9, 9) + bytes(3)
    yield Hostile("gif-comment", lambda: gif + b"\x21\xfe" + (b"\xff" + bytes(255)) * 100_000, "100000 parts", 5)
    yield Hostile("gif-comments", lambda: gif + b"\x21\xfe\1a\0" * 1_000_000, "100000 parts", 5)
    yield Hostile("tiff-tags", lambda: tiff(*((n, 4, 2**31, 8) for n in range(300, 60_000, 2))), "not an image|damaged")


def _other_formats() -> Iterator[Hostile]:
    """Formats that are not read: decoded before their size is known, or anything looks like them."""
    for kind in ("ICO", "TGA", "DIB", "SGI", "PCX", "EPS", "PDF"):
        image = Image.new("RGB", (64, 64))
        yield Hostile(f"format-{kind.lower()}", lambda i=image, k=kind: encoded(i, k), UNREAD)
    inner = png(20_000, 20_000)
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(inner), 22) + inner
    yield Hostile("ico-with-a-bomb", lambda: icon, UNREAD)
    for name, data in {
        "nothing": b"",
        "zeros": bytes(1000),
        "html": b"<html><script>alert(1)</script></html>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "zip": b"PK\3\4" + bytes(100),
        "pickle": b"\x80\4cos\nsystem\n(S'true'\ntR.",
        "escape": b"\x1b]0;title\7\x1b[2J",
    }.items():
        yield Hostile(f"other-{name}", lambda d=data: d, UNREAD)


def _notes() -> Iterator[Hostile]:
    """Texts and profiles that unpack to much."""
    packed = zlib.compress(bytes(200 * MEGABYTE), 9)
    pixels = b"\0" + bytes(27)
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0")):
        data = png(9, 9, chunk(kind, head + packed), data=pixels * 9)
        yield Hostile(f"note-{kind.decode()}", lambda d=data: d, None)
    yield Hostile("idat-bomb", lambda: png(9, 9, data=bytes(200 * MEGABYTE)), None, megabytes=100)


def _damaged() -> Iterator[Hostile]:
    """Files cut short and files with bytes changed, of every format."""
    noise = Image.effect_noise((96, 64), 90).convert("RGB")
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"):
        data = encoded(noise, kind)
        for part in (0.05, 0.3, 0.6, 0.95):
            cut = data[: int(len(data) * part)]
            yield Hostile(f"cut-{kind.lower()}-{part}", lambda d=cut: d, None)
        for number in range(8):
            changed = bytearray(data)
            for at in random.integers(8, min(len(data), 400), 12):
                changed[at] = random.integers(256)
            yield Hostile(f"changed-{kind.lower()}-{number}", lambda d=bytes(changed): d, None, 5, 700)


CORPUS = [one for group in (_bombs, _long, _slow, _other_formats, _notes, _damaged) for one in group()]


def whole() -> dict[str, Callable[[], bytes]]:
    """Pictures of `PIXELS` pixels in every format and depth, which load: for the memory that they take."""
    square = (SIDE, SIDE)
    kinds: dict[str, tuple[Callable[[], Image.Image], str, dict[str, object]]] = {
        "png": (lambda: Image.new("RGB", square), "PNG", {}),
        "png-alpha": (lambda: Image.new("RGBA", square), "PNG", {}),
        "png-grey-alpha": (lambda: Image.new("LA", square), "PNG", {}),
        "png-palette": (lambda: Image.new("P", square), "PNG", {"transparency": 0}),
        "png-key": (lambda: Image.new("RGB", square), "PNG", {"transparency": (1, 2, 3)}),
        "png-16": (lambda: Image.fromarray(np.zeros(square, np.uint16)), "PNG", {}),
        "tiff-16": (lambda: Image.fromarray(np.zeros(square, np.uint16)), "TIFF", {}),
        "tiff-32": (lambda: Image.fromarray(np.zeros(square, np.int32)), "TIFF", {}),
        "tiff-float": (lambda: Image.fromarray(np.zeros(square, np.float32)), "TIFF", {}),
        "tiff-packed": (lambda: Image.new("RGBA", square), "TIFF", {"compression": "tiff_adobe_deflate"}),
        "jpeg": (lambda: Image.new("RGB", square), "JPEG", {}),
        "jpeg-progressive": (lambda: Image.new("RGB", square), "JPEG", {"progressive": True}),
        "jpeg-cmyk": (lambda: Image.new("CMYK", square), "JPEG", {}),
        "jp2": (lambda: Image.new("RGBA", square), "JPEG2000", {}),
        "avif": (lambda: Image.new("RGBA", square), "AVIF", {}),
        "gif": (lambda: Image.new("P", square), "GIF", {}),
        "bmp": (lambda: Image.new("RGB", square), "BMP", {}),
        "ppm": (lambda: Image.new("RGB", square), "PPM", {}),
    }
    found: dict[str, Callable[[], bytes]] = {
        name: lambda made=made, kind=kind, options=options: encoded(made(), kind, **options)
        for name, (made, kind, options) in kinds.items()
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    found["jpeg-turned"] = lambda: encoded(Image.new("RGB", square), "JPEG", exif=exif)
    found["webp"] = lambda: webp(*square)
    return found
