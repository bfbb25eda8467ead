"""Frames of a video file as ordinary images: chosen by a named rule, upright, with their times, within caps.

PyAV reads the files: its wheels carry FFmpeg for every platform, so the frames depend on the installed `av` alone,
whereas torchcodec takes the FFmpeg of the machine and is tied to one version of torch. Nothing is decoded before the
caps hold.
"""

from __future__ import annotations

import io
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .errors import ImageError, VilavtError
from .images import ImageLimits, UrlPolicy, stored, to_rgb
from .regions import Picture
from .sources import FRAMES, Video, is_video_path

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

CONTAINERS = ("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "gif", "apng")
"""FFmpeg's names of the container formats that are read. Playlists (HLS, DASH, concat) are not among them: they make
FFmpeg open further files and addresses."""


_POLICY = UrlPolicy()


@dataclass(frozen=True)
class VideoLimits:
    """What a video may cost. All but the last three are checked before a frame is decoded."""

    max_bytes: int = 2 * 1024**3
    """Of the file."""
    max_duration: float = 4 * 3600.0
    """Seconds from the first frame to the last."""
    max_packets: int = 1_000_000
    """Frames in the file."""
    max_frames: int = 1024
    """Frames that are taken out of it."""
    max_pixels: int = 36_000_000
    """Width times height of a frame; 8K has 33 million."""
    max_total_pixels: int = 600_000_000
    """Of all frames that are taken; each takes 3 bytes."""
    max_seconds: float = 300.0
    """That reading may take."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself, and the times of its frames."""

    width: int
    """Pixels as shown: upright."""
    height: int
    duration: float
    """Seconds from the first frame to the end of the last."""
    times: tuple[float, ...]
    """Seconds of every frame after the first one, in order."""
    rotation: int
    """Degrees counter-clockwise by which stored frames are turned to be upright."""
    container: str
    codec: str

    @property
    def fps(self) -> float | None:
        """Frames per second on average; None for a single frame."""
        return (len(self.times) - 1) / self.times[-1] if len(self.times) > 1 and self.times[-1] > 0 else None


@dataclass(frozen=True)
class FrameTimes:
    """The frames that `read_frames` takes of a video."""

    width: int
    """Pixels as shown: upright."""
    height: int
    name: str
    times: tuple[float, ...]
    """Seconds after the first frame of the file, one for each."""


def frame_times(
    video: Video,
    limits: VideoLimits = VideoLimits(),
    *,
    allow_urls: bool = False,
    allow_paths: bool = True,
    url_policy: UrlPolicy = _POLICY,
) -> FrameTimes:
    """Size, number and times of the frames that `read_frames` would give, without decoding more than one.

    Damage further on in the file goes unseen.

    Args and errors are those of `read_frames`.
    """
    with _opened(video, limits, allow_urls=allow_urls, allow_paths=allow_paths, url_policy=url_policy) as file:
        ticks = file.chosen()
        width, height = _upright_size(file.first_frame())
        return FrameTimes(width, height, file.name, tuple(map(file.seconds, ticks)))


def video_info(
    video: Video, limits: VideoLimits = VideoLimits(), *, allow_urls: bool = False, url_policy: UrlPolicy = _POLICY
) -> VideoInfo:
    """Read a file's headers and the times of its frames, without decoding more than one frame.

    Raises:
        ImageError: as `read_frames`.
    """
    with _opened(video, limits, allow_urls=allow_urls, allow_paths=True, url_policy=url_policy) as file:
        first = file.first_frame()
        width, height = _upright_size(first)
        return VideoInfo(
            width=width,
            height=height,
            duration=file.seconds(file.end),
            times=tuple(file.seconds(tick) for tick in file.ticks),
            rotation=_rotation(first),
            container=file.container.format.name,
            codec=file.stream.codec_context.name,
        )


def read_frames(
    video: Video,
    limits: VideoLimits = VideoLimits(),
    *,
    allow_urls: bool = False,
    allow_paths: bool = True,
    url_policy: UrlPolicy = _POLICY,
) -> list[Picture]:
    """Frames of a video, RGB, upright, at full resolution, each with its time in seconds after the first frame.

    A frame is chosen by what a player shows at a time: the last one that has begun. Transparency is composited on
    white; pixels that are not square stay as stored. The same file gives the same frames.

    Args:
        video: the file and which frames.
        limits: caps.
        allow_urls: whether the network may be used.
        allow_paths: whether files of this machine may be read.
        url_policy: which URLs, if any.

    Raises:
        ImageError: names the video: it cannot be read, it holds no frames, it is damaged before the last frame that is
            taken, or a cap is broken (both numbers and the remedy).
    """
    with _opened(video, limits, allow_urls=allow_urls, allow_paths=allow_paths, url_policy=url_policy) as file:
        return file.frames(file.chosen())


def frames_at(
    video: Video, times: Sequence[float], limits: VideoLimits = VideoLimits(), *, allow_paths: bool = True
) -> list[Picture]:
    """The frames that a conversation was shown, by the times that it recorded; see `read_frames`.

    Args:
        video: the file; its `frames` and `fps` say nothing here.
        times: seconds after the first frame.
        limits: caps.
        allow_paths: whether files of this machine may be read.

    Returns:
        One for each time, in their order.

    Raises:
        ImageError: as `read_frames`, or no frame begins at such a time.
    """
    with _opened(video, limits, allow_urls=False, allow_paths=allow_paths, url_policy=_POLICY) as file:
        ticks = [file.tick_at(time) for time in times]
        file.check_count(len(set(ticks)))
        wanted = sorted(set(ticks))
        found = dict(zip(wanted, file.frames(wanted), strict=True))
        return [found[tick] for tick in ticks]


# ---------------------------------------------------------------------- parts


_SAME_TIME = 1e-3
"""Seconds that a recorded time may be off."""


class _BadIndexError(Exception):
    """The index of a file names other places for its key frames than they have."""


class _File:
    """A video file: the times of its frames are known, none is decoded."""

    def __init__(self, video: Video, file: Any, limits: VideoLimits, began: float) -> None:
        self.file, self.video, self.limits, self.began, self.label = file, video, limits, began, video.label
        self.container, self.stream = self._open()
        self.time_base = self.stream.time_base or Fraction(1)
        self.width, self.height = self.stream.width or 0, self.stream.height or 0
        self._check_pixels(self.width, self.height)
        self.ticks, self.keys, self.end = self._read_times()
        duration = self.seconds(self.ticks[-1])
        if duration > limits.max_duration:
            raise ImageError(
                f"{self.label}: {duration:.0f} seconds, at most {limits.max_duration:.0f} are allowed; cut it or raise "
                "VideoLimits.max_duration"
            )

    def _open(self) -> tuple[InputContainer, VideoStream]:
        """The file from its beginning."""
        av = _av()
        if hasattr(self.file, "seek"):
            self.file.seek(0)
        container = av.open(self.file, metadata_errors="ignore", container_options={"format_whitelist": _whitelist(av)})
        if not container.streams.video:
            raise ImageError(f"{self.label}: it holds no video stream; check the file")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ImageError(f"{self.label}: its codec is not supported by the installed av")
        stream.codec_context.options = {"max_pixels": str(self.limits.max_pixels)}  # a header may lie about the size
        stream.thread_type = "AUTO"
        return container, stream

    def close(self) -> None:
        self.container.close()

    def _read_times(self) -> tuple[list[int], list[int], int]:
        """Presentation times of all frames in ticks of the stream, those of the key frames, and the end of the last."""
        ticks: list[int] = []
        keys: list[int] = []
        missing, end = 0, 0
        for packet in self.container.demux(self.stream):
            self._check_time()
            if not packet.size or packet.is_discard:
                continue
            if len(ticks) + missing >= self.limits.max_packets:
                raise ImageError(
                    f"{self.label}: more than {self.limits.max_packets} frames, which is the most allowed; cut it or "
                    "raise VideoLimits.max_packets"
                )
            tick = packet.pts if packet.pts is not None else packet.dts
            if tick is None:
                missing += 1
                continue
            ticks.append(tick)
            end = max(end, tick + (packet.duration or 0))
            if packet.is_keyframe:
                keys.append(tick)
        if not ticks:
            what = f"{missing} frames without times" if missing else "no frames"
            raise ImageError(f"{self.label}: it holds {what}; convert it, for instance to MP4")
        return sorted(set(ticks)), sorted(keys), end

    @property
    def name(self) -> str:
        """For people."""
        return Path(self.label).name or self.label

    def seconds(self, tick: int) -> float:
        """Seconds after the first frame."""
        return float((tick - self.ticks[0]) * self.time_base)

    def tick_at(self, seconds: float) -> int:
        """The frame that begins then."""
        at = bisect_left(self.ticks, seconds, key=self.seconds)
        near = min(self.ticks[max(0, at - 1) : at + 1], key=lambda tick: abs(self.seconds(tick) - seconds))
        if not abs(self.seconds(near) - seconds) <= _SAME_TIME:
            raise ImageError(
                f"{self.label}: no frame begins at {seconds:g} s, the nearest one at {self.seconds(near):g} s; it is "
                "another video than the one that was shown"
            )
        return near

    def chosen(self) -> list[int]:
        """Ticks of the frames to take, ascending, each once."""
        first, last, video = self.ticks[0], self.ticks[-1], self.video
        if video.fps is not None:
            step = 1 / (Fraction(video.fps).limit_denominator(10**6) * self.time_base)
            count = int((last - first) / step) + 1
            self.check_count(min(count, len(self.ticks)))
            targets: Iterator[Fraction] = (first + step * n for n in range(count))
        else:
            count = video.frames or FRAMES
            if count >= len(self.ticks):
                self.check_count(len(self.ticks))
                return self.ticks
            self.check_count(count)
            if video.rule == "centres":
                targets = (first + Fraction(2 * n + 1, 2 * count) * (self.end - first) for n in range(count))
            elif count == 1:
                targets = iter([Fraction(first)])
            else:
                targets = (first + Fraction(n, count - 1) * (last - first) for n in range(count))
        ticks: dict[int, None] = {}
        at = 0
        for target in targets:
            while at + 1 < len(self.ticks) and self.ticks[at + 1] <= target:
                at += 1
            ticks[self.ticks[at]] = None
        return list(ticks)

    def check_count(self, count: int) -> None:
        """Stop if so many frames are too many."""
        if count > self.limits.max_frames:
            raise ImageError(
                f"{self.label}: {count} frames would be taken, at most {self.limits.max_frames} are allowed; lower "
                "frames or fps, or raise VideoLimits.max_frames"
            )
        pixels = count * self.width * self.height
        if pixels > self.limits.max_total_pixels:
            raise ImageError(
                f"{self.label}: {count} frames of {self.width} x {self.height} px have {pixels} pixels, "
                f"at most {self.limits.max_total_pixels} are allowed; take fewer or raise VideoLimits.max_total_pixels"
            )

    def first_frame(self) -> VideoFrame:
        """Decoded alone."""
        for _, frame in self._decoded(self.ticks[:1], seek=False):
            return frame
        raise ImageError(f"{self.label}: no frame can be decoded; it is damaged")

    def frames(self, ticks: Sequence[int]) -> list[Picture]:
        """Decode the frames that a player shows at these ticks: of each, the last that has begun."""
        try:
            return self._frames(ticks, seek=True)
        except _BadIndexError:
            return self._frames(ticks, seek=False)

    def _frames(self, ticks: Sequence[int], *, seek: bool) -> list[Picture]:
        taken: list[Picture] = []
        todo, shown = list(ticks), None

        def take(tick: int, frame: VideoFrame) -> None:
            image = self._picture(frame)
            taken.append(Picture(image, self.name, max(0.0, self.seconds(tick))))
            if (pixels := sum(one.image.width * one.image.height for one in taken)) > self.limits.max_total_pixels:
                raise ImageError(
                    f"{self.label}: its frames grew to {pixels} pixels, at most {self.limits.max_total_pixels} are "
                    "allowed; take fewer or raise VideoLimits.max_total_pixels"
                )
            del todo[0]

        for tick, frame in self._decoded(ticks, seek=seek):
            while todo and tick > todo[0]:
                take(*(shown or (tick, frame)))
            shown = (tick, frame)
            while todo and tick == todo[0]:
                take(tick, frame)
            if not todo:
                return taken
        last = "no frame" if shown is None else f"nothing after {self.seconds(shown[0]):.2f} s"
        raise ImageError(
            f"{self.label}: {last} can be decoded, but {len(todo)} of {len(ticks)} frames are missing, up to "
            f"{self.seconds(ticks[-1]):.2f} s; it is damaged or cut short: save it again"
        )

    def _decoded(self, ticks: Sequence[int], *, seek: bool) -> Iterator[tuple[int, VideoFrame]]:
        """Frames with their ticks, ascending, at least those that are shown at `ticks`.

        Args:
            ticks: ascending.
            seek: whether stretches without any may be skipped by going on at the last key frame before the next one.

        Raises:
            _BadIndexError: seeking led past the frame that was looked for, or past the end.
        """
        self.container.close()
        self.container, self.stream = self._open()
        frames, at, skipped = self.container.decode(self.stream), self.ticks[0] - 1, False
        for wanted in ticks:
            key = max((key for key in self.keys if key <= wanted), default=self.ticks[0])
            sought = seek and key > at + 1 and key > self.ticks[0]
            if sought:
                skipped = True
                self.container.seek(key, stream=self.stream)
                frames = self.container.decode(self.stream)
            while at < wanted:
                frame = next(frames, None)
                if frame is None:
                    if skipped:
                        raise _BadIndexError
                    return
                self._check_time()
                tick = frame.pts if frame.pts is not None else frame.dts
                if tick is None or tick <= at:
                    continue
                if sought and tick > wanted:
                    raise _BadIndexError
                sought, at = False, tick
                yield tick, frame

    def _picture(self, frame: VideoFrame) -> Image.Image:
        self._check_pixels(frame.width, frame.height)
        alpha = any(component.is_alpha for component in frame.format.components)
        image = Image.fromarray(frame.to_ndarray(format="rgba" if alpha else "rgb24"))
        image = to_rgb(image)
        rotation = _rotation(frame)
        return image.rotate(rotation, expand=True) if rotation else image

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self.limits.max_pixels:
            raise ImageError(
                f"{self.label}: frames of {width} x {height} = {width * height} pixels, at most "
                f"{self.limits.max_pixels} are allowed; scale it down or raise VideoLimits.max_pixels"
            )

    def _check_time(self) -> None:
        if (spent := time.monotonic() - self.began) > self.limits.max_seconds:
            raise ImageError(
                f"{self.label}: reading it has taken {spent:.0f} seconds, at most {self.limits.max_seconds:.0f} are "
                "allowed; cut it or raise VideoLimits.max_seconds"
            )


@contextmanager
def _opened(
    video: Video, limits: VideoLimits, *, allow_urls: bool, allow_paths: bool, url_policy: UrlPolicy
) -> Iterator[_File]:
    """An open video; whatever FFmpeg says is an error that names it."""
    av = _av()
    began, label = time.monotonic(), video.label
    file = _readable(video, limits, allow_urls=allow_urls, allow_paths=allow_paths, url_policy=url_policy)
    opened: _File | None = None
    try:
        opened = _File(video, file, limits, began)
        yield opened
    except VilavtError:
        raise
    except (av.FFmpegError, OSError, ValueError, EOFError) as error:
        raise ImageError(
            f"{label}: not a video that can be read ({type(error).__name__}: {str(error)[:200]}); read are the formats "
            f"{', '.join(CONTAINERS)}"
        ) from None
    finally:
        if opened is not None:
            opened.close()
        if file is not video.source and hasattr(file, "close"):
            file.close()


def _readable(video: Video, limits: VideoLimits, *, allow_urls: bool, allow_paths: bool, url_policy: UrlPolicy) -> Any:
    """An open binary file that can be sought in; files of this machine are not read into memory."""
    source: Any = video.source
    label = video.label
    local = isinstance(source, Path) or (
        isinstance(source, str) and source[:5].lower() != "data:" and "://" not in source[:20]
    )
    if not local and not hasattr(source, "seek"):
        of_bytes = ImageLimits(max_bytes=limits.max_bytes)
        data, _ = stored(source, of_bytes, label, allow_urls, allow_paths, url_policy)
        return io.BytesIO(data)
    if local and not allow_paths:
        raise ImageError(f"{label[:80]}: paths are not allowed here; send the video itself as a data URL")
    try:
        file = Path(source).open("rb") if local else source  # noqa: SIM115 (closed by the caller)
        size = file.seek(0, io.SEEK_END)
    except (OSError, ValueError, TypeError) as error:
        raise ImageError(f"{label}: the video cannot be read: {str(error)[:200]}; check the path") from None
    if size > limits.max_bytes:
        raise ImageError(
            f"{label}: {size} bytes, at most {limits.max_bytes} are allowed; cut it or raise VideoLimits.max_bytes"
        )
    return file


def _whitelist(av: Any) -> str:
    """FFmpeg compares whole names, and some formats have several."""
    names = [name for name in av.formats_available if set(name.split(",")) & set(CONTAINERS)]
    return ",".join([*CONTAINERS, *names])


def _rotation(frame: VideoFrame) -> int:
    return round(frame.rotation / 90) * 90 % 360


def _upright_size(frame: VideoFrame) -> tuple[int, int]:
    turned = _rotation(frame) in (90, 270)
    return (frame.height, frame.width) if turned else (frame.width, frame.height)


def video_file(video: Video, limits: VideoLimits = VideoLimits()) -> bytes:
    """A video as the bytes of its file, unread; URLs are not followed.

    Raises:
        ImageError: it cannot be read, or is larger than allowed.
    """
    file = _readable(video, limits, allow_urls=False, allow_paths=True, url_policy=_POLICY)
    try:
        file.seek(0)
        data: bytes = file.read()
    except (OSError, ValueError) as error:
        raise ImageError(f"{video.label}: the video cannot be read: {str(error)[:200]}") from None
    finally:
        if file is not video.source:
            file.close()
    return data


def require_reader() -> None:
    """Make sure that videos can be read here.

    Raises:
        ImageError: the package av is missing; names the extra.
    """
    _av()


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ImageError('reading videos needs the package av: pip install "vilavt-hf[video]"') from None
    av.logging.set_level(None)
    return av


__all__ = [
    "FrameTimes",
    "VideoInfo",
    "VideoLimits",
    "frame_times",
    "is_video_path",
    "read_frames",
    "require_reader",
    "video_file",
    "video_info",
]
