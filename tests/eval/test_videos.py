"""Benchmarks whose questions have video files: VSI-Bench as it is downloaded, definitions of one's own."""

import json
import sys

import pytest
from clips import clip, marked
from PIL import Image
from typer.testing import CliRunner

from vilavt_core.cli import app
from vilavt_core.errors import BenchmarkError, ImageError
from vilavt_core.shipped import shipped
from vilavt_core.sources import Video
from vilavt_core.video import read_frames
from vilavt_eval.definition import load_benchmark
from vilavt_eval.evaluation_preset import EvaluationPreset
from vilavt_eval.questions import Questions
from vilavt_eval.runner import sample_of

pytest.importorskip("av", reason='videos need the extra "video"')

DOWNLOADED = [
    {
        "id": 0, "dataset": "arkitscenes", "scene_name": "41069025", "question_type": "object_counting",
        "question": "How many tables are in this room?", "ground_truth": "4", "options": None,
    },
    {
        "id": 1, "dataset": "scannet", "scene_name": "scene0011_00", "question_type": "object_rel_direction_hard",
        "question": "To which side is the sofa?", "ground_truth": "B", "options": ["A. front-left", "B. back-left"],
    },
]  # fmt: skip


@pytest.fixture
def downloaded(tmp_path):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOWNLOADED))
    for row in DOWNLOADED:
        path = tmp_path / row["dataset"] / f"{row['scene_name']}.mp4"
        path.parent.mkdir()
        path.write_bytes(clip(marked(20)))
    return tmp_path


def own(folder, text, *records):
    (folder / "own.yaml").write_text(
        "name: own\ntitle: t\nfile: q.jsonl\noptions: question\nkeys: {id: null, type: null}\n"
        f"types: {{multiple choice: {{metric: multiple choice}}}}\n{text}"
    )
    (folder / "q.jsonl").write_text("".join(json.dumps({"question": "?", "answer": "A", **r}) + "\n" for r in records))
    return Questions(load_benchmark(folder / "own.yaml"), folder)


def test_vsi_bench_as_it_is_downloaded(downloaded):
    questions = Questions(load_benchmark("VSI-Bench-video"), downloaded)
    questions.require_images()
    first, second = questions
    assert first.videos[0].source == downloaded / "arkitscenes" / "41069025.mp4"
    assert (first.images, first.videos[0].frames, first.videos[0].fps) == ((), 32, None)
    assert second.text.splitlines()[1:3] == ["A. front-left", "B. back-left"]
    assert (first.category, second.category) == ("object_counting", "object_rel_direction")
    sample = sample_of(first, EvaluationPreset.load("default"), 0)
    assert len(read_frames(sample.images[0])) == 20  # the clip has no more


def test_vsi_bench_as_parquet(downloaded):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(DOWNLOADED)
    parquet.write_table(table, downloaded / "test.parquet")
    benchmark = load_benchmark("VSI-Bench-video")
    as_lines, as_table = Questions(benchmark, downloaded), Questions(benchmark, downloaded / "test.parquet")
    assert as_table.sha256 == as_lines.sha256


def test_a_missing_video_is_told_before_a_model_is_loaded(downloaded):
    (downloaded / "scannet" / "scene0011_00.mp4").unlink()
    with pytest.raises(
        BenchmarkError, match=r"of 1 of 2 questions are missing, first .*scene0011_00\.mp4 \(question 1"
    ):
        Questions(load_benchmark("VSI-Bench-video"), downloaded).require_images()


def test_frames_or_rate_are_settings_of_a_definition(downloaded, tmp_path):
    path = tmp_path / "rate.yaml"
    path.write_text("base: VSI-Bench-video\nname: VSI-1fps\nvideos: {frames: null, fps: 1, rule: centres}\n")
    (video,) = Questions(load_benchmark(path), downloaded)[0].videos
    assert (video.frames, video.fps, video.rule) == (None, 1, "centres")


def test_pictures_come_first_and_a_key_alone_may_hold_a_list(tmp_path):
    records = {"images": "a.png", "clips": ["a.mp4", "b.mp4"]}, {"clips": "c.mp4"}
    both, one = own(tmp_path, "videos: {path: '{clips}', fps: 2}\n", *records)
    sample = sample_of(both, EvaluationPreset.load("default"), 0)
    assert [str(s.source if isinstance(s, Video) else s) for s in sample.images] == [
        str(tmp_path / name) for name in ("a.png", "a.mp4", "b.mp4")
    ]
    assert (one.images, [video.source for video in one.videos]) == ((), [tmp_path / "c.mp4"])


def test_which_video_it_is_counts_in_the_hash_of_the_questions(tmp_path):
    text = "videos: {path: '{clips}'}\n"
    assert own(tmp_path, text, {"clips": "a.mp4"}).sha256 != own(tmp_path, text, {"clips": "b.mp4"}).sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("videos: {path: clip.mp4}\n", "must hold keys of a record in braces"),
        ("videos: {path: '{clips'}\n", "path: '{clips'"),
        ("videos: {path: '{clips.__class__}'}\n", "must hold keys of a record in braces"),
        ("videos: {path: '{clips}', frames: 3, fps: 1}\n", "frames=3 and fps=1.0; give one of the two"),
        ("videos: {path: '{clips}'}\nimage_marks: interleaved\n", "interleaved cannot be had with videos"),
        ("videos: {path: '{thought}'}\n", "hidden: thought cannot be hidden"),
        ("videos: {path: '{clips}', start: 3}\n", "start"),
    ],
)
def test_a_wrong_definition_is_refused(tmp_path, text, message):
    with pytest.raises(BenchmarkError) as caught:
        own(tmp_path, text, {"clips": "a.mp4"})
    assert message in str(caught.value)


def test_without_images_there_must_be_videos(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("base: ERQA\nname: x\nkeys: {images: null}\n")
    with pytest.raises(BenchmarkError, match="images is null, so videos must say where the videos are"):
        load_benchmark(path)


@pytest.mark.parametrize("clips", [None, "", [], [3.5], {"a": 1}])
def test_a_record_without_a_video_is_named(tmp_path, clips):
    with pytest.raises(BenchmarkError, match=r"q\.jsonl, record 0, clips: it is .*; videos\.path '\{clips\}' needs"):
        own(tmp_path, "videos: {path: '{clips}'}\n", {"clips": clips})


def test_a_broken_video_fails_its_question_alone(downloaded):
    (downloaded / "scannet" / "scene0011_00.mp4").write_bytes(b"no video")
    _, second = Questions(load_benchmark("VSI-Bench-video"), downloaded)
    with pytest.raises(ImageError, match="not a video that can be read"):
        read_frames(second.videos[0])


def test_a_run_without_the_extra_ends_in_one_line_before_a_model_is_loaded(downloaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    arguments = [
        "--model",
        str(shipped("vilavt-tiny", "")),
        "--data",
        str(downloaded),
        "--out",
        str(downloaded / "out"),
    ]
    result = CliRunner().invoke(app, ["eval", "VSI-Bench-video", *arguments])
    assert result.exit_code == 1
    assert isinstance(result.exception, ImageError)
    assert str(result.exception) == 'reading videos needs the package av: pip install "vilavt-hf[video]"'


def test_the_tiny_model_is_evaluated_on_videos(tmp_path):
    """Two questions of the shipped pictures, asked about clips of them."""
    for number in (1, 2):
        picture = Image.open(shipped(f"pictures/scene-{number}.png", "")).convert("RGB")
        data = clip([picture] * 4, codec="libx264rgb", pix_fmt="rgb24")
        (tmp_path / f"{number}.mp4").write_bytes(data)
    question = "Which digit is on the blue card?"
    records = [{"question": question, "answer": a, "clip": n} for n, a in ((1, "0"), (2, "4"))]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "tiny.yaml").write_text(
        "name: tiny\ntitle: t\nfile: q.jsonl\noptions: question\nkeys: {id: null, type: null, images: null}\n"
        "default_type: numerical\ntypes: {numerical: {metric: numerical}}\nvideos: {path: '{clip}.mp4', frames: 1}\n"
    )
    arguments = ["--model", str(shipped("vilavt-tiny", "")), "--device", "cpu", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "tiny.yaml"), *arguments])
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "out" / "tiny").glob("*.jsonl")
    rows = [row for row in map(json.loads, file.read_text().splitlines()) if "response" in row]
    assert [row["response"] for row in rows] == ["0", "4"]
