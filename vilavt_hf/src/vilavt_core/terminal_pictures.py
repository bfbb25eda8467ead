"""Pictures inside a terminal: through its own protocol where it has one (kitty, iTerm2), else as coloured half blocks.

Which it has is told by its environment variables; asking the terminal itself would mean reading its replies from the
keyboard's stream. Sixel is left out: nothing in the environment tells it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from PIL import Image

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

Way = Literal["kitty", "iterm", "blocks"]

_KITTY_TERMS, _KITTY_PROGRAMS = ("xterm-kitty", "xterm-ghostty"), ("ghostty",)
_ITERM_PROGRAMS = ("iTerm.app", "WezTerm", "mintty")
_CHUNK = 4096
"""Most bytes of base64 in one escape sequence of kitty's protocol."""
_CELL = 8
"""Pixels that a cell is taken to be wide; it is taken to be twice as high."""


def way_of(environment: Mapping[str, str]) -> Way:
    """How a terminal with these environment variables shows pictures. Inside tmux and screen, which swallow what they
    do not know: half blocks.
    """
    program, term = environment.get("TERM_PROGRAM", ""), environment.get("TERM", "")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return "blocks"
    if term in _KITTY_TERMS or "KITTY_WINDOW_ID" in environment or program in _KITTY_PROGRAMS:
        return "kitty"
    return "iterm" if program in _ITERM_PROGRAMS else "blocks"


def print_picture(console: Console, image: Image.Image, way: Way, columns: int) -> None:
    """Show a picture at the beginning of a line.

    Args:
        console: whose file is the terminal; half blocks take its colours.
        image: RGB.
        way: see `way_of`.
        columns: most cells that it may be wide.
    """
    if way == "blocks":
        from rich.segment import Segments

        console.print(Segments(_blocks(image, max(1, min(columns, image.width)))), end="")
        return
    wide = max(1, min(columns, image.width // _CELL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    if way == "iterm":
        size = len(buffer.getvalue())
        text = f"\x1b]1337;File=inline=1;width={wide};preserveAspectRatio=1;size={size}:{data}\a"
    else:
        text = "".join(_kitty(data, wide))
    console.file.write(f"{text}\n")
    console.file.flush()


def _kitty(data: str, columns: int) -> Iterator[str]:
    pieces = [data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK)]
    for place, piece in enumerate(pieces):
        head = f"a=T,f=100,q=2,c={columns}," if place == 0 else ""
        yield f"\x1b_G{head}m={int(place < len(pieces) - 1)};{piece}\x1b\\"


def _blocks(image: Image.Image, wide: int) -> list[Segment]:
    """Two pixels a cell: the upper one in front, the lower one behind it."""
    from rich.color import Color
    from rich.segment import Segment
    from rich.style import Style

    high = max(2, round(wide * image.height / image.width))
    small = image.convert("RGB").resize((wide, high + high % 2), Image.Resampling.LANCZOS)
    pixels = list(zip(*[iter(small.tobytes())] * 3, strict=True))
    rows = [pixels[at : at + wide] for at in range(0, len(pixels), wide)]
    out = []
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        for front, behind in zip(upper, lower, strict=True):
            out.append(Segment("▀", Style(color=Color.from_rgb(*front), bgcolor=Color.from_rgb(*behind))))
        out.append(Segment.line())
    return out
