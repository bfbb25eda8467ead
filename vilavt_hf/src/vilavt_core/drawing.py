"""What every drawn picture shares: colours, fonts, line breaks, and how a picture becomes a data URL."""

from __future__ import annotations

import base64
import io
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
    """The picture as a PNG data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines no wider than `width`; at most six, a longer text ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    for n, line in enumerate(lines):
        while len(line) > 1 and font.getlength(line) > width:
            line = line[:-2] + "…"
        lines[n] = line
    return [*lines[:5], lines[5] + " …"] if len(lines) > 6 else lines or [""]


def load_font(size: int, *, bold: bool = False) -> Font:
    """DejaVu Sans where the system or matplotlib has it, else the font that PIL carries."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    candidates = [name]
    try:
        from matplotlib import get_data_path

        candidates.append(str(Path(get_data_path()) / "fonts" / "ttf" / name))
    except ImportError:
        pass
    for candidate in candidates:
        try:
            return ImageFont.truetype(candidate, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
