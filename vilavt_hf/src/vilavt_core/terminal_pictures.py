"""Images inside a terminal: through its own protocol where it has one (kitty, iTerm2), as sixels where it has these
(foot, mlterm, xterm as a VT340, Windows Terminal, tmux, …), else as coloured half blocks.

Environment variables tell the first two. Nothing there tells sixel: the terminal itself is asked, by the control
sequence that every one answers (DA1, "primary device attributes" of the VT series; 4 among them is sixel).
"""

from __future__ import annotations

import base64
import io
import os
import re
import select
import time
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

Way = Literal["kitty", "iterm", "sixel", "blocks"]

PATIENCE = 1.0
"""Seconds that a terminal may take to answer; far more than one needs, over a slow line too."""

_KITTY_TERMS, _KITTY_PROGRAMS = ("xterm-kitty", "xterm-ghostty"), ("ghostty",)
_ITERM_PROGRAMS = ("iTerm.app", "WezTerm", "mintty")
_CHUNK = 4096
"""Most bytes of base64 in one escape sequence of kitty's protocol."""
_CELL = 8
"""Pixels that a cell is taken to be wide; it is taken to be twice as high."""
_ATTRIBUTES = re.compile(rb"\x1b\[\?([0-9;]*)c")
_LONGEST_REPLY = 256
_SIXEL = "4"
_COLOURS = 256
"""Of an image in sixels: what terminals have at least, if they have not just the 16 of a VT340."""
_BAND = 6
"""Rows of pixels in one row of sixels."""


def way_of(environment: Mapping[str, str]) -> Way:
    """How a terminal with these environment variables shows images. Inside tmux and screen, which swallow what they
    do not know: half blocks.
    """
    program, term = environment.get("TERM_PROGRAM", ""), environment.get("TERM", "")
    if "TMUX" in environment or term.startswith(("screen", "tmux")):
        return "blocks"
    if term in _KITTY_TERMS or "KITTY_WINDOW_ID" in environment or program in _KITTY_PROGRAMS:
        return "kitty"
    return "iterm" if program in _ITERM_PROGRAMS else "blocks"


def way_here(environment: Mapping[str, str], keyboard: int, screen: int) -> Way:
    """How the terminal of these file descriptors shows images. Call it before people are expected to type: what the
    terminal is asked, it answers as if it were typed.
    """
    way = way_of(environment)
    return "sixel" if way == "blocks" and shows_sixel(keyboard, screen) else way


def shows_sixel(keyboard: int, screen: int) -> bool:
    """Ask a terminal whether it shows sixels. Not if something was typed already: that would be lost.

    Args:
        keyboard: file descriptor that its answer comes from; reads no byte behind it.
        screen: file descriptor that it is asked through.

    Returns:
        False, too, if one of them is no terminal, or no answer comes within `PATIENCE` seconds.
    """
    try:
        import termios
        import tty
    except ImportError:  # Windows
        return False
    if not (os.isatty(keyboard) and os.isatty(screen)):
        return False
    before = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard, termios.TCSANOW)
        if select.select([keyboard], [], [], 0)[0]:
            return False
        os.write(screen, b"\x1b[c")
        reply, until = b"", time.monotonic() + PATIENCE
        while (found := _ATTRIBUTES.search(reply)) is None:
            left = max(0.0, until - time.monotonic())
            if len(reply) == _LONGEST_REPLY or not select.select([keyboard], [], [], left)[0]:
                return False
            reply += os.read(keyboard, 1)
        return _SIXEL in found[1].decode().split(";")[1:]  # the first one is what kind of terminal it is
    except OSError:
        return False
    finally:
        termios.tcsetattr(keyboard, termios.TCSANOW, before)


def print_picture(console: Console, image: Image.Image, way: Way, columns: int) -> None:
    """Show an image at the beginning of a line.

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
    if way == "sixel":
        console.file.write(f"{_sixels(image, min(image.width, _CELL * columns))}\n")
        console.file.flush()
        return
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


def _sixels(image: Image.Image, wide: int) -> str:
    """An image as sixels: a palette, then rows of six pixels' height, one colour of a row after the other."""
    high = max(1, round(wide * image.height / image.width))
    small = image.convert("RGB").resize((wide, high), Image.Resampling.LANCZOS) if wide < image.width else image
    drawn = small.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    palette, pixels = drawn.getpalette() or [], np.asarray(drawn, dtype=int)
    out = [f'\x1bP0;1;0q"1;1;{drawn.width};{drawn.height}']
    for number in np.unique(pixels):
        red, green, blue = (round(value / 2.55) for value in palette[3 * number : 3 * number + 3])
        out.append(f"#{number};2;{red};{green};{blue}")
    for top in range(0, drawn.height, _BAND):
        band = pixels[top : top + _BAND]
        weights = 1 << np.arange(len(band))
        for number in np.unique(band):
            sixels = "".join(chr(63 + bits) for bits in weights @ (band == number))
            out.append(f"#{number}{''.join(_run(sixel, len(list(run))) for sixel, run in groupby(sixels))}$")
        out.append("-")
    return "".join([*out, "\x1b\\"])


def _run(sixel: str, count: int) -> str:
    return f"!{count}{sixel}" if count > 3 else sixel * count


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
