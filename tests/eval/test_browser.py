"""Recorded conversations as pages: what is read, that pictures are those the model saw, and that no file breaks it."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from clips import clip, marked, number_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from recorded import Elements, crop, original, zoomed
from typer.testing import CliRunner

from vilavt_core.attention import AttentionPicture, Heat, Layer
from vilavt_core.cli import app
from vilavt_core.conversation import FinishReason, Result, Usage
from vilavt_core.errors import EvaluationError
from vilavt_core.presets import Limits, Sampling
from vilavt_core.protocol import Region, ToolCall, format_turn
from vilavt_core.results import ChatResult, Provenance, Work
from vilavt_core.sources import Video, file_paths
from vilavt_core.video import read_frames
from vilavt_eval.browser import BrowsedRun, write_browser
from vilavt_eval.definition import load_benchmark
from vilavt_eval.pictures import PictureFolder, picture_roots
from vilavt_eval.questions import Question
from vilavt_eval.recordings import read_recordings
from vilavt_eval.runner import row_of

HOSTILE = "<script>alert('x')</script> & </pre>\" \ud800"
IMAGES = (original(0, name="a.png"), crop(1, (100, 0, 200, 100)), crop(2, (0, 0, 28, 28), 1, (0.5, 0.0, 0.75, 0.5)))


def result(images=IMAGES, answer: str | None = "A", sample_id: str | None = None) -> ChatResult:
    """A conversation with two crops, the second out of the first."""
    trace = zoomed(*images)
    provenance = Provenance("default", Limits(), Sampling(), 0, "default", "0" * 64, "x", None, "f", "cpu", "sdpa", {})
    finish = FinishReason.ANSWER if answer else FinishReason.TURN_LIMIT
    episode = Result(
        answer, finish, "", tuple(trace.turns), tuple(images), (), (), Usage(1, 1, 1, 3, 2), "default", Limits(),
        "default", "0" * 64, {}, sample_id,
    )  # fmt: skip
    return ChatResult("Which?", sample_id, episode, None, provenance, Work(10, 10, 5, 5, 10), 1.5)


def write_results(path: Path, answers: dict[str, str], **more) -> Path:
    """A result file as `vilavt eval` writes it; the right answer is A."""
    lines = []
    for key, answer in answers.items():
        record = {"images": ["a.png"], "question": "Which?"} | more
        question = Question(key, record, (path.parent / "a.png",), (), "Which?", "multiple choice", (), "A", None)
        lines.append(json.dumps(row_of(question, result(answer=answer))))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def picture(tmp_path) -> Path:
    """Left half red, right half blue, its upper left quarter green."""
    image = Image.new("RGB", (800, 400), "red")
    draw = ImageDraw.Draw(image)
    draw.rectangle((400, 0, 800, 400), fill="blue")
    draw.rectangle((400, 0, 599, 199), fill="lime")
    image.save(tmp_path / "a.png")
    return tmp_path / "a.png"


def shown(arguments: list, out: Path) -> Path:
    done = CliRunner().invoke(app, ["view", *map(str, arguments), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_a_run_becomes_an_index_and_a_page_of_every_question(tmp_path, picture):
    out = shown([write_results(tmp_path / "r.jsonl", {"x": "A", "y": "B"})], tmp_path / "out")
    index = Elements((out / "index.html").read_text(encoding="utf-8"))
    rows = [attrs for tag, attrs in index.found if tag == "li"]
    assert [(row["data-verdict"], row["data-turns"], row["data-finish"]) for row in rows] == [
        ("right", "2", "answer"),
        ("wrong", "2", "answer"),
    ]
    links = [attrs["href"] for tag, attrs in index.found if tag == "a"]
    assert links == ["pages/00001.html", "pages/00002.html"]
    page = (out / links[1]).read_text(encoding="utf-8")
    assert 'rel="prev" href="00001.html"' in page
    assert "right answer: <b>A</b>" in page
    assert ">wrong<" in page


def test_every_address_on_the_pages_is_a_file_that_was_written(tmp_path, picture):
    out = shown([write_results(tmp_path / "r.jsonl", {"x": "A", "y": "B"})], tmp_path / "out")
    for page in (out / "index.html", *(out / "pages").glob("*.html")):
        for _, attrs in Elements(page.read_text(encoding="utf-8")).found:
            for address in (attrs.get("src"), attrs.get("href")):
                if address and not address.startswith("#"):
                    assert (page.parent / unquote(address)).is_file(), address


def test_crops_are_cut_again_from_the_picture_as_the_model_saw_them(tmp_path, picture):
    path = write_results(tmp_path / "r.jsonl", {"x": "A"})
    (recording,) = read_recordings(path).entries
    trace = recording.pictured(PictureFolder(tmp_path / "p", ""), picture_roots(path, None))
    assert [(image.index, image.box, image.parent) for image in trace.images] == [
        (image.index, image.box, image.parent) for image in IMAGES
    ]
    blue, lime = (Image.open(tmp_path / "p" / trace.pictures[index]) for index in (1, 2))
    assert blue.size == lime.size == (56, 56)
    assert all(abs(a - b) < 12 for a, b in zip(blue.getpixel((40, 40)), (0, 0, 255), strict=True))
    assert all(abs(a - b) < 12 for a, b in zip(lime.getpixel((28, 28)), (0, 255, 0), strict=True))
    assert [turn.image_indices for turn in trace.turns] == [(1, 2), ()]


def test_rows_that_do_not_say_what_was_shown_are_cropped_by_the_rule(tmp_path, picture):
    """As the gallery does: the box is on the picture as shown, 196 x 84 px within the limits of the run."""
    limits = {**vars(Limits()), "max_pixels": 22_400, "min_pixels": 3136}
    path = write_results(tmp_path / "r.jsonl", {"x": "A"})
    row = json.loads(path.read_text())
    row["turns"][0] = format_turn(ToolCall((Region(0, (98, 0, 196, 84)), Region(0, (98, 0, 147, 42))), "look"))
    del row["shown"]
    for ablation, count in ((None, 3), ("random-box", 0)):
        run = {"run": {"provenance": {"limits": limits, "preset": "default"}, "ablation": ablation}}
        path.write_text(json.dumps(run) + "\n" + json.dumps(row) + "\n")
        (recording,) = read_recordings(path).entries
        folder = PictureFolder(tmp_path / "p", "")
        trace = recording.replayed(folder, [tmp_path]).pictured(folder, [tmp_path])
        assert len(trace.images) == len(trace.pictures) == count
    run["run"]["ablation"] = None
    path.write_text(json.dumps(run) + "\n" + json.dumps(row) + "\n")
    (recording,) = read_recordings(path).entries
    trace = recording.replayed(folder, [tmp_path]).pictured(folder, [tmp_path])
    assert (trace.images[0].width, trace.images[0].height) == (196, 84)
    assert [image.region for image in trace.images[1:]] == [(0.5, 0.0, 1.0, 1.0), (0.5, 0.0, 0.75, 0.5)]
    lime = Image.open(tmp_path / "p" / trace.pictures[2])
    assert all(abs(a - b) < 12 for a, b in zip(lime.getpixel((28, 28)), (0, 255, 0), strict=True))


def test_two_runs_stand_side_by_side_and_the_index_says_what_changed(tmp_path, picture):
    first = write_results(tmp_path / "first.jsonl", {"a": "A", "b": "B", "c": "A", "d": "A"})
    second = write_results(tmp_path / "second.jsonl", {"a": "B", "b": "A", "c": "A", "e": "A"})
    out = shown([first, second], tmp_path / "out")
    index = Elements((out / "index.html").read_text(encoding="utf-8"))
    assert [attrs["data-change"] for tag, attrs in index.found if tag == "li"] == [
        "worse",
        "better",
        "equally right",
        "answered by one only",
        "answered by one only",
    ]
    page = Elements((out / "pages" / "00001.html").read_text(encoding="utf-8"))
    assert len(page.with_class("talk")) == 2
    ids = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_results_of_ask_and_traces_of_vlmevalkit_are_read(tmp_path, picture):
    (tmp_path / "ask.json").write_text(json.dumps(result().to_json()))
    (asked,) = read_recordings(tmp_path / "ask.json").entries
    rows = [
        {**result(sample_id="7").to_json(), "key": "k", "model": "m", "benchmark": "b", "image_files": [str(picture)]},
        {"question": "q", "answer": None, "finish": "error", "error": "ValueError: boom", "key": "", "sample_id": "8"},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    traced, failed = read_recordings(tmp_path / "t.jsonl").entries
    assert failed.trace.error == "ValueError: boom"
    for entry in (asked, traced):
        found = entry.pictured(PictureFolder(tmp_path / "p", ""), [tmp_path])
        assert set(found.pictures) == {0, 1, 2}
        assert found.answer == "A"
    shown([tmp_path / "ask.json"], tmp_path / "out")


def test_pictures_that_are_inside_a_file_need_no_other(tmp_path):
    data = result().to_json()
    buffer = tmp_path / "x.png"
    Image.new("RGB", (56, 56), "lime").save(buffer)
    for image in data["images"]:
        image["png"] = "data:image/png;base64," + base64.b64encode(buffer.read_bytes()).decode()
    (tmp_path / "ask.json").write_text(json.dumps(data))
    (entry,) = read_recordings(tmp_path / "ask.json").entries
    trace = entry.pictured(PictureFolder(tmp_path / "p", ""), [])
    assert set(trace.pictures) == {0, 1, 2}


def test_missing_pictures_are_named_and_the_pages_are_written(tmp_path):
    path = write_results(tmp_path / "r.jsonl", {"x": "A"})
    done = CliRunner().invoke(app, ["view", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0
    (line,) = [line for line in done.output.splitlines() if "a.png" in line]
    assert re.search(r"\b1 .*\ba\.png: no such file; .*--image-root", line)
    page = (tmp_path / "out/pages/00001.html").read_text(encoding="utf-8")
    assert 'class="blank"' in page
    assert 'class="box"' in page


def test_paths_that_leave_the_folder_and_files_that_are_no_pictures_are_not_shown(tmp_path, picture):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "key.txt").write_text("secret")
    folder = PictureFolder(tmp_path / "p", "")
    assert folder.find("../a.png", [inner]) is None
    assert folder.find("a.png\0", [tmp_path]) is None
    assert folder.address_of(inner / "key.txt", IMAGES[0]) is None
    assert "secret" not in "".join(folder.missing.values())
    assert not (tmp_path / "p").exists()


def test_text_of_files_is_escaped(tmp_path):
    more = {"question": HOSTILE, "problem_type": "multiple choice", "images": [HOSTILE]}
    path = write_results(tmp_path / "r.jsonl", {"x": HOSTILE}, **more)
    out = shown([path, path], tmp_path / "out")
    for page in (out / "index.html", out / "pages" / "00001.html"):
        source = page.read_text(encoding="utf-8")
        assert "<script>alert" not in source
        assert [tag for tag, _ in Elements(source).found].count("script") == 1


def test_files_without_a_conversation_are_refused_by_name(tmp_path):
    for name, text, why in (
        ("empty.jsonl", "", "no conversation in it"),
        ("other.json", "[1, {}]", "entry 1: not a JSON object"),
        ("broken.json", "{", "no JSON"),
        ("rollouts.jsonl", '{"row": {}, "prompts_sha256": "x"}\n', "vilavt-rl replay shows them"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(EvaluationError, match=why) as refused:
            read_recordings(tmp_path / name)
        assert name in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_no_row_stops_it_whatever_is_in_its_fields(tmp_path, data):
    path = write_results(tmp_path / "r.jsonl", {"x": "A", "good": "A"})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    where = data.draw(st.sampled_from(["row", "shown", "crop", "result", "image", "turn"]))
    told = result(sample_id="good").to_json()
    part = {
        "row": rows[0],
        "shown": rows[0]["shown"],
        "crop": rows[0]["shown"]["crops"][0],
        "result": (other := json.loads(json.dumps(told)) | {"sample_id": "x"}),
        "image": other["images"][1],
        "turn": other["turns"][0],
    }[where]
    name = data.draw(st.sampled_from(sorted(set(part) - {"question_id"})))
    part[name] = data.draw(JSON)
    lines = rows if where in ("row", "shown", "crop") else [other, told]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recordings = read_recordings(path)
    written = write_browser(tmp_path / "out", [BrowsedRun("run", [(recordings, [tmp_path])])], title="t", date="")
    assert "good" in [entry.key for entry in recordings.entries]
    assert written.pages == len(recordings.entries)


def with_maps() -> dict:
    """A result of `vilavt ask --json --attention-maps`, with attention of its first crop."""
    heats = tuple(Heat.of(name, "share", [np.eye(4)]) for name in ("received", "query", "word 0"))
    layer = Layer(None, None, ((0.25, 0.75),), (0.75,), heats)
    picture = AttentionPicture("look", ("look",), ("image 1",), ((56, 56),), (), (layer,), (1,))
    return replace(result(sample_id="good"), attention=(picture,)).to_json()


def test_attention_in_a_result_is_over_the_crop_on_its_page(tmp_path, picture):
    (tmp_path / "one.json").write_text(json.dumps(with_maps()))
    out = shown([tmp_path / "one.json"], tmp_path / "out")
    page = Elements((out / "pages/00001.html").read_text(encoding="utf-8"))
    assert [attrs["data-heat"] for attrs in page.with_class("heat")] == ["1", "2", "3"]
    assert len([attrs for tag, attrs in page.found if tag == "option"]) == 4


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_no_attention_stops_it_whatever_is_in_its_fields(tmp_path, data):
    told = json.loads(json.dumps(with_maps())) | {"sample_id": "x"}
    parts = {
        "result": (told, ["attention"]),
        "picture": (told["attention"][0], sorted(told["attention"][0])),
        "layer": (told["attention"][0]["layers"][0], ["block", "head", "mass", "words", "heats"]),
        "heat": (told["attention"][0]["layers"][0]["heats"][0], ["name", "unit", "scale", "highest", "maps", "signed"]),
    }
    part, names = parts[data.draw(st.sampled_from(sorted(parts)))]
    part[data.draw(st.sampled_from(names))] = data.draw(JSON)
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(told) + "\n" + json.dumps(with_maps()) + "\n")
    recordings = read_recordings(path)
    written = write_browser(tmp_path / "out", [BrowsedRun("run", [(recordings, [tmp_path])])], title="t", date="")
    assert "good" in [entry.key for entry in recordings.entries]
    assert written.pages == len(recordings.entries)


def test_folders_are_read_and_what_is_no_conversation_in_them_is_left_out(tmp_path, picture):
    folder = tmp_path / "run"
    folder.mkdir()
    write_results(folder / "a.jsonl", {"x": "A"})
    write_results(folder / "b.jsonl", {"x": "B"})
    (folder / "scores.json").write_text("{}")
    done = CliRunner().invoke(app, ["view", str(folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "left out" in done.output
    assert len(list((tmp_path / "out/pages").iterdir())) == 2


def test_failed_questions_are_shown_with_their_error(tmp_path):
    failed = replace(result(), episode=None, error=ValueError("boom"))
    question = Question("x", {"images": ["a.png"]}, (), (), "Which?", "multiple choice", (), "A", None)
    (tmp_path / "r.jsonl").write_text(json.dumps(row_of(question, failed)) + "\n")
    out = shown([tmp_path / "r.jsonl"], tmp_path / "out")
    assert "ValueError: boom" in (out / "pages/00001.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------- files of results, and videos


def asked(tmp_path, images, files: list, where: str = "results/one.json", **more) -> Path:
    """What `vilavt ask --json` writes, in a folder of its own."""
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result(images).to_json() | {"image_files": files} | more))
    return path


def pictured(path: Path, benchmark=None):
    """The only conversation of a file with its pictures, looked for where `vilavt view` looks."""
    recordings = read_recordings(path, benchmark)
    (entry,) = recordings.entries
    folder = PictureFolder(path.parent / "pages", str(path.parent / "pages") + "/")
    return entry.pictured(folder, picture_roots(path, recordings.benchmark)), folder


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The current folder is not that of the pictures."""
    folder = tmp_path / "a" / "b" / "c" / "d" / "e"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_a_result_is_shown_with_its_pictures_wherever_it_lies(tmp_path, picture, elsewhere):
    for files in ([str(picture)], ["a.png"], []):
        there = {"results/one.json"} if files != [str(picture)] else {"results/one.json", "a/b/c/d/e/one.json"}
        for where in there:  # named as it is, or beside the result and in the folders above it
            trace, _ = pictured(asked(tmp_path, IMAGES, files, where))
            assert set(trace.pictures) == {0, 1, 2}
            assert trace.missing == {}


def test_a_result_that_was_moved_together_with_its_pictures_is_shown_with_them(tmp_path, picture, elsewhere):
    path = asked(tmp_path, IMAGES, ["/another/machine/a.png"])
    assert set(pictured(path)[0].pictures) == {0, 1, 2}
    picture.unlink()
    assert set(pictured(path)[0].missing.values()) == {"a.png: no such file"}


def test_ask_writes_where_its_pictures_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["a.png", Video("clip.mp4"), tmp_path / "b.png", "http://x.org/c.png", "data:image/png;base64,", b"bytes"]
    assert file_paths(given) == [
        *(str(tmp_path / name) for name in ("a.png", "clip.mp4", "b.png")),
        "http://x.org/c.png",
    ]


def test_pictures_of_one_name_in_two_folders_are_told_apart(tmp_path, picture, elsewhere):
    other = tmp_path / "other" / "a.png"
    other.parent.mkdir()
    Image.new("RGB", (800, 400), "blue").save(other)
    trace, _ = pictured(
        asked(tmp_path, [original(0, name="a.png"), original(1, name="a.png")], [str(other), str(picture)])
    )
    blue, red = (Image.open(trace.pictures[index]).getpixel((10, 300)) for index in (0, 1))
    assert blue[2] > 200 > blue[0]
    assert red[0] > 200 > red[2]


def test_missing_files_are_named_on_the_page_in_place_of_their_pictures(tmp_path, picture, elsewhere):
    images = [original(0, name="a.png"), original(1, name="gone<b>.png"), original(2, name="far.png")]
    path = asked(tmp_path, images, [str(picture), "/nowhere/gone<b>.png", "https://x.org/far.png"])
    trace, folder = pictured(path)
    assert trace.missing == {1: "gone<b>.png: no such file", 2: "far.png: an image on the network"}
    assert folder.missing["/nowhere/gone<b>.png"] == "no such file"
    page = (shown([path], tmp_path / "out") / "pages/00001.html").read_text(encoding="utf-8")
    assert "<span>gone&lt;b&gt;.png: no such file</span>" in page
    (tmp_path / "broken.png").write_bytes(b"no picture")
    trace, _ = pictured(asked(tmp_path, [original(0, name="broken.png")], ["broken.png"]))
    assert trace.missing[0].startswith("broken.png: ")


@pytest.fixture
def film(tmp_path) -> Path:
    """20 frames that say which they are, ten a second."""
    pytest.importorskip("av", reason='videos need the extra "video"')
    (tmp_path / "film").mkdir()
    path = tmp_path / "film" / "clip.mp4"
    path.write_bytes(clip(marked(20)))
    return path


def of_film(film: Path, count: int, first: int = 0) -> list:
    """Frames as a conversation shows them, and a crop of the last one."""
    frames = read_frames(Video(film, count))
    shown = [original(first + n, name=film.name, time=frame.time) for n, frame in enumerate(frames)]
    last = shown[-1]
    return [*shown, replace(crop(last.index + 1, (0, 0, 100, 50), last.index, source=last.source), time=last.time)]


def test_frames_of_a_video_are_those_that_were_shown_and_crops_are_cut_out_of_theirs(
    tmp_path, film, picture, elsewhere
):
    images = [original(0, name="a.png"), *of_film(film, 5, first=1)]
    for files in ([str(picture), str(film)], ["a.png", "film/clip.mp4"]):
        trace, folder = pictured(asked(tmp_path, images, files))
        assert trace.missing == folder.missing == {}
        assert set(trace.pictures) == set(range(7))
        numbers = [number_of(Image.open(trace.pictures[index])) for index in range(1, 6)]
        assert numbers == [number_of(frame.image) for frame in read_frames(Video(film, 5))] == [0, 4, 9, 14, 19]
        assert Image.open(trace.pictures[6]).size == (56, 56)
        assert max(Image.open(trace.pictures[6]).convert("L").crop((0, 0, 14, 8)).getextrema()) > 230  # its white block
    out = shown([asked(tmp_path, images, [str(picture), str(film)])], tmp_path / "out")
    page = (out / "pages/00001.html").read_text(encoding="utf-8")
    assert 'class="blank"' not in page
    assert page.count("../pictures/") == 7


def test_two_videos_and_one_given_twice_are_told_apart(tmp_path, film, elsewhere):
    other = tmp_path / "clip.mp4"
    other.write_bytes(clip(list(reversed(marked(20)))))
    frames = [image for image in of_film(film, 3) if image.parent is None]
    images = [replace(image, index=n, source=n) for n, image in enumerate([*frames, *frames, *frames])]
    trace, _ = pictured(asked(tmp_path, images, [str(film), str(other), str(film)]))
    numbers = [number_of(Image.open(trace.pictures[n])) for n in range(9)]
    assert numbers == [0, 9, 19, 19, 10, 0, 0, 9, 19]


def test_a_video_that_is_gone_broken_or_another_one_is_named(tmp_path, film, elsewhere):
    images = of_film(film, 4)
    path = asked(tmp_path, images, [str(film)])
    film.write_bytes(clip(marked(5)))
    trace, _ = pictured(path)
    assert trace.pictures == {}
    assert set(trace.missing) == set(range(5))
    assert "no frame begins at" in trace.missing[0]
    film.write_bytes(b"no video")
    assert pictured(path)[0].missing[4].startswith("clip.mp4: ")
    film.unlink()
    assert set(pictured(path)[0].missing.values()) == {"clip.mp4: no such file"}
    done = CliRunner().invoke(app, ["view", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0
    assert "no such file" in done.output


def film_row(tmp_path, film: Path, count: int) -> Path:
    """A row of VSI-Bench with video files."""
    benchmark = load_benchmark("VSI-Bench-video")
    record = {
        "id": 0, "dataset": "film", "scene_name": "clip", "question_type": "object_counting", "question": "How many?",
        "ground_truth": "4", "options": None,
    }  # fmt: skip
    question = Question(0, record, (), (benchmark.videos.video(film),), "How many?", "regression", (), "4", None)
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row_of(question, result(of_film(film, count)))) + "\n")
    return path


def test_a_row_of_a_benchmark_with_videos_is_shown_with_their_frames(tmp_path, film, elsewhere):
    path = film_row(tmp_path, film, 32)  # the clip has 20
    trace, folder = pictured(path, load_benchmark("VSI-Bench-video"))
    assert trace.missing == folder.missing == {}
    assert [number_of(Image.open(trace.pictures[n])) for n in range(20)] == list(range(20))
    assert [image.time for image in trace.images[:20]] == [n / 10 for n in range(20)]
    assert set(trace.pictures) == set(range(21))
    path = film_row(tmp_path, film, 7)
    trace, _ = pictured(path, load_benchmark("VSI-Bench-video"))
    assert trace.missing[0] == "clip.mp4: 7 frames were shown, not the 20 that the definition takes now"
    film.unlink()
    trace, _ = pictured(path, load_benchmark("VSI-Bench-video"))
    assert set(trace.missing.values()) == {"clip.mp4: no such file"}
