"""Frames of video files: which, when, which way up, and what is refused."""

import contextlib
import hashlib
import io
import time

import numpy as np
import pytest
from clips import clip, marked, number_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vilavt_core.errors import ImageError
from vilavt_core.sources import Video
from vilavt_core.video import VideoLimits, frames_at, is_video_path, read_frames, video_info

pytest.importorskip("av", reason='videos need the extra "video"')


@pytest.fixture(scope="module")
def twenty() -> bytes:
    return clip(marked(20))


def taken(video: Video, **limits) -> list[int]:
    return [number_of(picture.image) for picture in read_frames(video, VideoLimits(**limits))]


def test_uniform_frames_are_those_of_linspace_over_the_indices(twenty):
    for count in (2, 3, 5, 7, 19):
        expected = np.linspace(0, 19, count, dtype=int).tolist()
        assert taken(Video(twenty, frames=count)) == expected


def test_frames_have_their_times_and_the_files_name(tmp_path, twenty):
    path = tmp_path / "clip.mp4"
    path.write_bytes(twenty)
    pictures = read_frames(Video(path, frames=3))
    assert [picture.time for picture in pictures] == pytest.approx([0, 0.9, 1.9])
    assert {picture.name for picture in pictures} == {"clip.mp4"}
    assert {picture.image.mode for picture in pictures} == {"RGB"}


def test_centres_take_the_middle_of_equal_parts(twenty):
    assert taken(Video(twenty, frames=4, rule="centres")) == [2, 7, 12, 17]
    assert taken(Video(twenty, frames=1, rule="centres")) == [10]


def test_one_frame_by_ends_is_the_first(twenty):
    assert taken(Video(twenty, frames=1)) == [0]


def test_a_rate_takes_what_is_shown_at_its_ticks(twenty):
    assert taken(Video(twenty, fps=2)) == [0, 5, 10, 15]
    assert taken(Video(twenty, fps=1000)) == list(range(20))


def test_a_short_file_gives_every_frame_once(twenty):
    assert taken(Video(twenty, frames=500)) == list(range(20))
    assert taken(Video(clip(marked(1)))) == [0]


def test_frames_that_are_shown_for_different_times_are_chosen_by_time():
    data = clip(marked(5), milliseconds=[0, 100, 200, 300, 2000], container="matroska")
    assert taken(Video(data, frames=3)) == [0, 3, 4]  # at 1.0 s the fourth frame is still shown
    assert [p.time for p in read_frames(Video(data, frames=3))] == pytest.approx([0, 0.3, 2.0])


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_files_come_upright(rotation):
    stored = marked(3)
    shown = read_frames(Video(clip(stored, rotation=rotation), frames=1))[0].image
    expected = stored[0].rotate(rotation, expand=True)
    assert shown.size == expected.size
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(expected)).mean() < 8
    info = video_info(Video(clip(stored, rotation=rotation)))
    assert (info.width, info.height, info.rotation) == (*expected.size, rotation)


@pytest.mark.parametrize(
    ("container", "codec"),
    [("matroska", "libx264"), ("webm", "libvpx-vp9"), ("webm", "libvpx"), ("avi", "mpeg4"), ("mpegts", "libx264")],
)
def test_other_containers(container, codec):
    data = clip(marked(20), container=container, codec=codec)
    assert taken(Video(data, frames=5)) == [0, 4, 9, 14, 19]
    assert len(video_info(Video(data)).times) == 20


def test_transparency_is_put_on_white():
    clear = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(2)]
    data = clip(clear, container="matroska", codec="ffv1", pix_fmt="bgra")
    assert np.asarray(read_frames(Video(data))[0].image).min() == 255


def test_seeking_gives_the_frames_of_reading_through():
    data = clip(marked(24), gop=4)
    every = [picture.image.tobytes() for picture in read_frames(Video(data, frames=24))]
    sparse = read_frames(Video(data, frames=3))
    assert [picture.image.tobytes() for picture in sparse] == [every[0], every[11], every[23]]


@given(st.lists(st.integers(0, 19), min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_frames_are_found_again_by_the_times_they_had(twenty, numbers):
    frames = read_frames(Video(twenty))
    again = frames_at(Video(twenty), [frames[n].time for n in numbers])
    assert [picture.time for picture in again] == [frames[n].time for n in numbers]
    assert [picture.image.tobytes() for picture in again] == [frames[n].image.tobytes() for n in numbers]


def test_times_of_another_video_and_more_frames_than_allowed_are_refused(twenty):
    for wrong in (0.05, -0.1, 2.0, float("nan"), float("inf")):
        with pytest.raises(ImageError, match=r"no frame begins at .* another video"):
            frames_at(Video(twenty, name="clip.mp4"), [0.0, wrong])
    with pytest.raises(ImageError, match="3 frames would be taken, at most 2"):
        frames_at(Video(twenty), [0.0, 0.1, 0.2], VideoLimits(max_frames=2))


def test_the_same_file_gives_the_same_frames(twenty):
    digests = {
        hashlib.sha256(b"".join(p.image.tobytes() for p in read_frames(Video(twenty, frames=7)))).hexdigest()
        for _ in range(3)
    }
    assert len(digests) == 1


def test_a_file_object_stays_open_and_can_be_read_twice(twenty):
    file = io.BytesIO(twenty)
    assert taken(Video(file, frames=2)) == taken(Video(file, frames=2)) == [0, 19]
    assert not file.closed


def test_info_tells_size_duration_and_times(twenty):
    info = video_info(Video(twenty))
    assert (info.width, info.height, info.codec) == (64, 48, "h264")
    assert info.duration == pytest.approx(2.0)
    assert info.fps == pytest.approx(10.0)
    assert len(info.times) == 20


@pytest.mark.parametrize(
    ("limits", "numbers"),
    [
        ({"max_bytes": 500}, "500"),
        ({"max_duration": 1.0}, "1"),
        ({"max_packets": 10}, "10"),
        ({"max_frames": 4}, "4"),
        ({"max_pixels": 1000}, "3072.*1000"),
        ({"max_total_pixels": 10000}, "15360.*10000"),
        ({"max_seconds": 0.0}, "0"),
    ],
)
def test_caps_name_the_video_and_both_numbers(tmp_path, twenty, limits, numbers):
    path = tmp_path / "long.mp4"
    path.write_bytes(twenty)
    with pytest.raises(ImageError, match=rf"(?s)long\.mp4.*{numbers}"):
        read_frames(Video(path, frames=5), VideoLimits(**limits))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a video",
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
        clip(marked(1))[:-200],
    ],
)
def test_what_is_no_video_is_an_error_that_names_it(tmp_path, data):
    path = tmp_path / "odd.mp4"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"odd\.mp4"):
        read_frames(Video(path))


def test_a_video_cut_short_says_what_is_missing():
    data = clip(marked(20), container="mpegts")
    with pytest.raises(ImageError, match=r"cut\.mp4"):
        read_frames(Video(clip(marked(20))[:1200], name="cut.mp4"))
    assert len(read_frames(Video(data, frames=5))) == 5


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_damage_anywhere_is_an_image_error_or_frames(data):
    file = bytearray(clip(marked(6)))
    for _ in range(data.draw(st.integers(1, 12))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    began = time.monotonic()
    with contextlib.suppress(ImageError):
        read_frames(Video(bytes(file), frames=3), VideoLimits(max_seconds=5))
    assert time.monotonic() - began < 60  # it ends: max_seconds is 5, and a loaded machine is slow


@pytest.mark.parametrize(
    "wrong",
    [{"frames": 3, "fps": 1}, {"frames": 0}, {"frames": -1}, {"fps": 0}, {"fps": float("nan")}, {"rule": "random"}],
)
def test_impossible_choices_are_refused(wrong):
    with pytest.raises(ImageError):
        Video("clip.mp4", **wrong)


def test_paths_of_videos():
    for path in ("a/B.MP4", "https://x/y.webm?token=1"):
        assert is_video_path(path)
    for path in ("a.png", b"x.mp4", "mp4"):
        assert not is_video_path(path)
