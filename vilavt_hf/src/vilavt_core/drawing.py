"""What every drawn image shares: colours, fonts, line breaks, and how an image becomes a data URL."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, SOFT, PAPER, LINE = "#1d2430", "#5d6b7e", "#fbfbfc", "#d9dfe7"
"""Of text, of what stands back, of the ground, of borders."""

COLOURS = ("#e4572e", "#2e86ab", "#3a9d5d", "#b5539c", "#d99a00", "#5b5fc7", "#008b8b", "#a0522d")
"""Of regions and crops, in order of appearance; readable on light and dark."""


def colour(index: int) -> str:
    """Colour of shown image number `index`."""
    return COLOURS[(index - 1) % len(COLOURS)]


def png_url(image: Image.Image) -> str:
    """The image as a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_url(image: Image.Image) -> str:
    """The image as a data URL, small ones as PNG; photographs would be huge as PNG and are JPEG."""
    if image.width * image.height <= 512 * 512:
        return png_url(image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines no wider than `width`, with all of the text; a word that is wider is broken, as is text without spaces."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for char in word:
            if lines[-1] and font.getlength(lines[-1] + char) > width:
                lines.append("")
            lines[-1] += char
    return lines or [""]


WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "SourceHanSans.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "uming.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "simsun.ttc",
    "unifont.otf",
    "unifont.ttf",
    "FreeSans.ttf",
)
"""Fonts with many scripts, by the file names of Linux, macOS and Windows; the first that has a text's letters is
taken."""


def written(text: str, size: int, *, bold: bool = False) -> tuple[str, Font]:
    """A text as it can be drawn, and with which font: letters that no font of this machine has are spelled out, as
    ``\\u4e2d``, never drawn as empty boxes.
    """
    font = load_font(size, bold=bold, text=text)
    return "".join(c if c.isspace() or _has(font, c) else _spelled(c) for c in text), font


def _spelled(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def load_font(size: int, *, bold: bool = False, text: str = "") -> Font:
    """DejaVu Sans where the system or matplotlib has it, else the font that PIL carries; for a text with letters that
    it lacks, the first of `WIDE_FONTS` that lacks fewest.
    """
    plain = _plain_font(size, bold)
    wanted = sorted({c for c in text if not c.isspace()})
    fonts = [plain]
    if not all(_has(plain, c) for c in wanted):
        fonts += [font for name in WIDE_FONTS if (font := _named_font(name, size)) is not None]
    return min(fonts, key=lambda font: sum(not _has(font, c) for c in wanted))


@lru_cache(64)
def _plain_font(size: int, bold: bool) -> Font:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    candidates = [name]
    try:
        from matplotlib import get_data_path

        candidates.append(str(Path(get_data_path()) / "fonts" / "ttf" / name))
    except ImportError:
        pass
    for candidate in candidates:
        if (found := _named_font(candidate, size)) is not None:
            return found
    return ImageFont.load_default(size)


@lru_cache(256)
def _named_font(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(4096)
def _has(font: Font, char: str) -> bool:
    """Whether a font has a letter: else it draws what it draws for a code point that is none."""
    try:
        glyph, missing = font.getmask(char), font.getmask("\U0010fffe")
        return (glyph.size, bytes(glyph)) != (missing.size, bytes(missing))
    except (UnicodeError, OSError):
        return False
