"""Rows of RL data with videos: frames are images of the episode, filtered by headers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from clips import clip, marked, number_of
from PIL import Image

from vilavt_core.driver import ConversationSettings
from vilavt_core.errors import ImageError
from vilavt_core.video import VideoLimits
from vilavt_rl.data import Row, read_rows
from vilavt_rl.errors import RowError
from vilavt_rl.rollout import first_turn_fits, settings_of_checkpoint, start_row

pytest.importorskip("av", reason='videos need the extra "video" of vilavt-hf')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (56, 56), "blue").save(tmp_path / "a.png")
    (tmp_path / "clip.mp4").write_bytes(clip(marked(20, (84, 56))))
    return tmp_path


@pytest.fixture
def settings(processor, tmp_path: Path) -> ConversationSettings:
    return settings_of_checkpoint(tmp_path / "checkpoint", processor)


def read(folder: Path, **keys) -> Row:
    record = {"question": "Which?", "answer": "yes", "question_type": "judgment", **keys}
    (folder / "rows.jsonl").write_text(json.dumps(record) + "\n")
    (row,) = read_rows(folder / "rows.jsonl")
    return row


def shown(driver) -> list[int]:
    return [number_of(image) for image in driver.episode.gallery.sources if image.size == (84, 56)]


@pytest.mark.parametrize(
    "entry",
    [
        {"path": "clip.mp4", "frames": 3},
        {"video": "clip.mp4", "nframes": 3, "fps": None},
        {"type": "video", "video": "clip.mp4", "nframes": 3},
    ],
)
def test_an_episode_shows_images_then_frames(folder, settings, entry):
    row = read(folder, image_path=["a.png"], videos=[entry])
    assert row.videos == ({"path": str(folder / "clip.mp4"), "frames": 3},)
    driver = start_row(Row.from_json(json.loads(json.dumps(row.to_json()))), settings, max_prompt=9999, max_response=9)
    assert [image.size for image in driver.episode.gallery.sources] == [(56, 56), *[(84, 56)] * 3]
    assert shown(driver) == [0, 9, 19]


def test_a_row_may_have_videos_alone(folder, settings):
    driver = start_row(read(folder, videos=["clip.mp4"]), settings, max_prompt=99999, max_response=9)
    assert shown(driver) == list(range(20))


def test_a_row_fits_exactly_if_its_episode_can_start_and_nothing_is_decoded_for_it(folder, settings, monkeypatch):
    row = read(folder, image_path=["a.png"], videos=[{"path": "clip.mp4", "fps": 2}])
    length = len(start_row(row, settings, max_prompt=9999, max_response=9).episode.record.token_ids)
    monkeypatch.setattr("vilavt_core.video._File.frames", lambda *_: pytest.fail("frames were decoded"))
    assert first_turn_fits(row, settings, length)
    assert not first_turn_fits(row, settings, length - 1)


def test_more_frames_than_a_conversation_may_have_do_not_fit(folder, settings):
    few = replace(settings, limits=replace(settings.limits, max_images=5))
    assert not first_turn_fits(read(folder, videos=["clip.mp4"]), few, 99999)


def test_the_caps_of_the_run_hold(folder, settings):
    capped = replace(settings, video_limits=VideoLimits(max_frames=4))
    row = read(folder, id="r7", videos=["clip.mp4"])
    with pytest.raises(ImageError, match="20 frames would be taken, at most 4 are allowed"):
        first_turn_fits(row, capped, 9999)
    with pytest.raises(ImageError, match=r"sample r7: .*20 frames would be taken"):
        start_row(row, capped, max_prompt=9999, max_response=9)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"videos": ["nowhere.mp4"]}, "video 0: no video 'nowhere.mp4', neither as it is nor beside rows.jsonl"),
        ({"videos": "clip.mp4"}, "'videos' must be a list, it is str"),
        ({"videos": [{"path": "clip.mp4", "start": 3}]}, "video 0: a video has no 'start' here"),
        ({"videos": [{"path": "clip.mp4", "fps": 1, "nframes": 3}]}, "frames=3 and fps=1; give one of the two"),
        ({"videos": [{"bytes": "AAAA"}]}, "video 0: a video has no 'bytes' here"),
        ({"videos": ["clip.mp4"], "question": "<video>Which?"}, "the question holds <video>; videos are shown before"),
    ],
)
def test_a_broken_row_is_named(folder, keys, message):
    with pytest.raises(RowError) as caught:
        read(folder, **keys)
    assert message in str(caught.value)
