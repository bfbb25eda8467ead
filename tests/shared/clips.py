"""Small videos, written by PyAV."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from PIL import Image


def marked(count: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """Pictures that say which one they are: grey level 10 times the number, and a white block in the upper left."""
    pictures = []
    for n in range(count):
        pixels = np.full((size[1], size[0], 3), n * 10, np.uint8)
        pixels[:8, :16] = 255
        pictures.append(Image.fromarray(pixels))
    return pictures


def number_of(image: Image.Image) -> int:
    """Which of `marked` a decoded frame is."""
    pixels = np.asarray(image.convert("L")).astype(float)
    height, width = pixels.shape
    return round(float(np.median(pixels[height // 4 : -height // 4, width // 3 : -width // 4])) / 10)


def clip(
    pictures: Sequence[Image.Image],
    *,
    rate: int = 10,
    container: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    milliseconds: Sequence[int] | None = None,
    gop: int = 12,
) -> bytes:
    """A video file.

    Args:
        pictures: its frames.
        rate: frames per second.
        container, codec, pix_fmt: FFmpeg's names.
        rotation: degrees that a player turns the frames counter-clockwise.
        milliseconds: when each frame is shown, instead of by `rate`.
        gop: frames from one key frame to the next.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, pix_fmt
        stream.codec_context.gop_size = gop
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for n, picture in enumerate(pictures):
            layout = "rgba" if picture.mode == "RGBA" else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format=layout)
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[n], Fraction(1, 1000)
            for packet in stream.encode(frame):
                output.mux(packet)
        for packet in stream.encode():
            output.mux(packet)
    return buffer.getvalue()
