"""Training records with videos: frames are images, lengths come from headers."""

import json

import pytest
from clips import clip, marked, number_of
from PIL import Image

from vilavt_core.data import rendering
from vilavt_core.data.dataset import SftDataset
from vilavt_core.data.registry import DataSource
from vilavt_core.data.rendering import Renderer, RenderSettings
from vilavt_core.data.schema import read_record
from vilavt_core.errors import DataError
from vilavt_core.presets import get_preset
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn

pytest.importorskip("av", reason='videos need the extra "video"')

ANSWER = format_turn(Answer("7"))
CALL = format_turn(ToolCall((Region(1, (0, 0, 28, 28)),), "the sign"))


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (112, 56), "blue").save(tmp_path / "a.png")
    (tmp_path / "clip.mp4").write_bytes(clip(marked(20, (84, 56))))
    (tmp_path / "short.mp4").write_bytes(clip(marked(2, (84, 56))))
    return tmp_path


def renderer(tokenizer, **settings):
    wanted = RenderSettings(**{"max_pixels": 100_000, "min_pixels": 784, **settings})
    return Renderer(tokenizer, PromptSet.load("default"), wanted, get_preset("default"))


@pytest.fixture
def render(tokenizer, folder):
    def run(record, crops="files", decode=True, **settings):
        made = renderer(tokenizer, **settings)
        return made.render(read_record(record, "s[0]"), "s[0]", folder, crops, decode=decode)

    return run


def published(*values, **more):
    roles = ["human", "gpt"] * len(values)
    return {"conversations": [{"from": r, "value": v} for r, v in zip(roles, values, strict=False)], **more}


def images(rendered):
    return [image for group in rendered.example.groups for image in group.images]


def test_frames_take_the_place_of_the_mark_among_pictures(render):
    record = published("<image><video>What?<video>", "x", images=["a.png"], videos=[
        {"path": "clip.mp4", "frames": 3}, "short.mp4",
    ])  # fmt: skip
    shown = images(render(record))
    assert [image.size for image in shown] == [(112, 56)] + [(84, 56)] * 5
    assert [number_of(image) for image in shown[1:]] == [0, 9, 19, 0, 1]
    spelled_out = published("<image><image><image><image>What?<image><image>", "x", images=["a.png"] * 6)
    assert len(render(record).example.input_ids) - len(render(spelled_out).example.input_ids) == 5 * (6 - 8)


@pytest.mark.parametrize("keys", [{"video": "short.mp4"}, {"video": ["short.mp4"]}, {"videos": ["short.mp4"]}])
def test_one_video_may_be_named_alone(render, keys):
    record = published("<video>What?", "x", **keys)
    assert [number_of(image) for image in images(render(record))] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "entry", "taken"),
    [
        ({}, "clip.mp4", list(range(20))),
        ({"frames": 3}, "clip.mp4", [0, 9, 19]),
        ({"fps": 2}, "clip.mp4", [0, 5, 10, 15]),
        ({"fps": 2}, {"path": "clip.mp4", "frames": 2}, [0, 19]),
        ({"frames": 3}, {"video": "clip.mp4", "fps": 1}, [0, 10]),
    ],
)
def test_a_record_s_own_frames_win_over_the_run_s(render, settings, entry, taken):
    shown = images(render(published("<video>?", "x", videos=[entry]), **settings))
    assert [number_of(image) for image in shown] == taken


def test_every_frame_is_an_original_that_may_be_zoomed_into(render):
    record = published("<video>What?", CALL, "<image>", ANSWER, videos=[{"path": "clip.mp4", "frames": 2}])
    groups = render(record, crops="cut").example.groups
    assert [(group.query, len(group.images)) for group in groups] == [("", 1), ("", 1), ("the sign", 1)]
    assert number_of(groups[1].images[0]) == 19


def test_a_mapping_counts_frames(render):
    two = {"path": "clip.mp4", "frames": 2}
    record = published("<video>What?", "x", videos=[two], queries=["", "q"], image_to_query_mapping=[0, 1])
    assert [group.query for group in render(record).example.groups] == ["", "q"]
    with pytest.raises(DataError, match="mapping has 1 entries, there are 2 images"):
        render({**record, "image_to_query_mapping": [0]})


def test_an_episode_shows_pictures_then_frames_with_their_times(render, tokenizer):
    record = {"images": ["a.png"], "videos": [{"path": "clip.mp4", "fps": 1}], "question": "?", "turns": [CALL, ANSWER]}
    rendered = render(record)
    assert [image.size for image in images(rendered)][:3] == [(112, 56), (84, 56), (84, 56)]
    assert "1.0" in tokenizer.decode(rendered.example.input_ids)
    assert [group.query for group in rendered.example.groups][-1] == "the sign"


@pytest.mark.parametrize(
    "record",
    [
        published("<image><video>What?", "x", images=["a.png"], videos=[{"path": "clip.mp4", "frames": 5}]),
        {"images": [], "videos": ["clip.mp4"], "question": "?", "turns": [CALL, ANSWER]},
    ],
)
def test_lengths_are_those_of_the_decoded_record(render, record, monkeypatch):
    full = render(record)
    monkeypatch.setattr(rendering, "read_frames", lambda video: pytest.fail("a frame was decoded"))
    planned = render(record, decode=False)
    assert planned.example.input_ids == full.example.input_ids
    assert planned.example.labels == full.example.labels
    assert [image.size for image in images(planned)] == [image.size for image in images(full)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (published("What?", "x", videos=["clip.mp4"]), "s[0]: 0 <video> in user turns, 1 videos; they must be as many"),
        (published("<video><video>?", "x", video="clip.mp4"), "2 <video> in user turns, 1 videos"),
        (published("<video>?", "x", video="clip.mp4", videos=["clip.mp4"]), "it has both video and videos"),
        (published("<video>?", "x", video="nowhere.mp4"), "nowhere.mp4: the video cannot be read"),
        (published("<video>?", "x", video="a.png"), "a.png: "),
        (published("<video>?", "x", video={"path": "clip.mp4", "nframe": 3, "fps": 1}), "give one of the two"),
        (published("<video>?", "x", video={"path": "clip.mp4", "start": 1}), "a video has no 'start' here"),
        (published("<video>?", "x", video=3), "videos"),
        ({"videos": ["clip.mp4"], "question": "<video>?", "turns": [ANSWER]}, "the question holds <video>"),
        ({"video": "clip.mp4", "question": "?", "turns": [ANSWER]}, "video"),
    ],
)
def test_what_cannot_be_used_is_named(render, record, message):
    with pytest.raises(DataError) as caught:
        render(record)
    assert message in str(caught.value)


def test_without_videos_the_mark_is_text(render, tokenizer):
    rendered = render(published("Which tag: <video> or <audio>?", "x"))
    assert "<video> or <audio>" in tokenizer.decode(rendered.example.input_ids)


def test_a_data_set_measures_videos_again_when_they_change(tokenizer, folder):
    (folder / "d.jsonl").write_text(json.dumps(published("<video>?", "x", video="short.mp4")) + "\n")
    source = DataSource(name="d", annotations=folder / "d.jsonl", images=folder, crops="files")
    dataset = SftDataset([source], renderer(tokenizer), max_length=4096)
    before = dataset.measure(0)
    assert (before.images, before.kind) == (2, "")
    assert len(dataset[0].input_ids) == before.tokens
    (folder / "short.mp4").write_bytes(clip(marked(3, (84, 56))))
    assert dataset.picture_mark(0) != before.pictures
    assert dataset.measure(0).images == 3
