"""Videos as people, records and messages name them, and where they cannot be given."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
from clips import clip, marked, number_of

from vilavt_core.errors import ImageError
from vilavt_core.images import image_file, image_size, load_image
from vilavt_core.results import Sample
from vilavt_core.sources import Video, image_list
from vilavt_core.video import VideoLimits, frame_times, read_frames

pytest.importorskip("av", reason='videos need the extra "video"')


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "clip.mp4"
    file.write_bytes(clip(marked(20), codec="libx264", gop=5))
    return file


@pytest.mark.parametrize(
    ("entry", "frames", "fps", "rule"),
    [
        ("a.mp4", None, None, "ends"),
        ({"path": "a.mp4", "frames": 4, "rule": "centres"}, 4, None, "centres"),
        ({"type": "video", "video": "a.mp4", "nframes": 8.0}, 8.0, None, "ends"),
        ({"video": "a.mp4", "fps": 2, "num_frames": None}, None, 2, "ends"),
    ],
)
def test_a_record_names_a_video(entry, frames, fps, rule):
    video = Video.of(entry)
    assert (str(video.source), video.frames, video.fps, video.rule) == ("a.mp4", frames, fps, rule)
    assert Video.of({"path": "a.mp4", **video.wanted}).wanted == video.wanted


def test_a_record_that_says_nothing_takes_the_frames_of_the_run_and_one_that_says_something_does_not(tmp_path):
    run = Video("", fps=2.0, rule="centres")
    assert Video.of("a.mp4", run, root=tmp_path).fps == 2.0
    assert Video.of("a.mp4", run, root=tmp_path).source == tmp_path / "a.mp4"
    own = Video.of({"path": "https://example.org/a.mp4", "frames": 3}, run, root=tmp_path)
    assert (own.source, own.frames, own.fps, own.rule) == ("https://example.org/a.mp4", 3, None, "centres")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a.mp4", "video_start": 3.0}, "a video has no 'video_start' here; its keys are path, frames, fps"),
        ({"path": "a.mp4", "frames": 4, "nframes": 8}, "says its frames twice, 4 and as nframes 8; say it once"),
        ({"path": "a.mp4", "fps": "2"}, "a.mp4: fps is '2', it must be a number"),
        ({"path": "a.mp4", "frames": 2, "fps": 1}, "a.mp4: frames=2 and fps=1; give one of the two"),
        ({"frames": 2}, "a video is a path, or a path with frames or fps, not a NoneType"),
        (["a.png", "b.png"], "a video is a path, or a path with frames or fps, not a list"),
    ],
)
def test_what_a_record_says_of_a_video_is_heeded_or_refused_by_name(entry, message):
    with pytest.raises(ImageError) as caught:
        Video.of(entry)
    assert message in str(caught.value)


def test_a_video_is_one_source_of_a_sample(path):
    video = Video(path)
    assert image_list(video) == [video]
    assert image_list([path, video]) == [path, video]
    assert Sample(video, "?").images == [video]


@pytest.mark.parametrize("use", [load_image, image_file, image_size])
def test_where_only_a_picture_can_be_a_video_is_refused_with_the_remedy(path, use):
    with pytest.raises(ImageError, match=r"clip\.mp4: a Video is taken where a question is asked"):
        use(Video(path))


@pytest.mark.parametrize("use", [load_image, image_size])
def test_a_video_taken_for_a_picture_names_the_remedy(path, use):
    with pytest.raises(ImageError, match=r"clip\.mp4: it is a video; give it as one: `--video` on the command line"):
        use(path)


@pytest.mark.parametrize("wanted", [{"frames": 7}, {"fps": 3.0}, {"frames": 4, "rule": "centres"}, {"frames": 99}])
def test_times_and_sizes_are_known_without_decoding(path, wanted):
    planned = frame_times(Video(path, **wanted))
    frames = read_frames(Video(path, **wanted))
    assert list(planned.times) == [frame.time for frame in frames]
    assert {(planned.width, planned.height)} == {frame.image.size for frame in frames}
    assert {planned.name} == {frame.name for frame in frames} == {"clip.mp4"}


def test_the_size_is_that_of_the_upright_frames(tmp_path):
    path = tmp_path / "turned.mp4"
    path.write_bytes(clip(marked(3), codec="libx264", rotation=90))
    planned = frame_times(Video(path))
    assert (planned.width, planned.height) == read_frames(Video(path))[0].image.size == (48, 64)


def test_caps_hold_before_times_are_told(path):
    with pytest.raises(ImageError, match="7 frames would be taken, at most 4 are allowed"):
        frame_times(Video(path, frames=7), VideoLimits(max_frames=4))


def test_the_same_file_gives_the_same_frames_on_every_version(path):
    """The literals are what every supported environment must choose; pixels differ between builds of FFmpeg alone."""
    frames = read_frames(Video(path, frames=7))
    assert [number_of(frame.image) for frame in frames] == [0, 3, 6, 9, 12, 15, 19]
    assert [round(frame.time or 0, 6) for frame in frames] == [0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.9]
    program = (
        "import hashlib, sys\n"
        "from vilavt_core.sources import Video\n"
        "from vilavt_core.video import read_frames\n"
        "data = b''.join(f.image.tobytes() for f in read_frames(Video(sys.argv[1], frames=7)))\n"
        "print(hashlib.sha256(data).hexdigest())\n"
    )
    told = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    own = hashlib.sha256(b"".join(frame.image.tobytes() for frame in frames)).hexdigest()
    assert told.stdout.strip() == own


def test_without_the_extra_it_is_one_line_that_names_it(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for use in (read_frames, frame_times):
        with pytest.raises(
            ImageError, match=r'^reading videos needs the package av: pip install "vilavt-hf\[video\]"$'
        ):
            use(Video(path))


def test_a_gif_is_a_picture_or_a_video(tmp_path):
    path = tmp_path / "a.gif"
    first, *others = marked(3)
    first.save(path, save_all=True, append_images=others, duration=100)
    assert load_image(path).size == (64, 48)
    assert len(read_frames(Video(path))) == 3
