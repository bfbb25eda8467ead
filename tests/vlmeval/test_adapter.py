"""From a message to a bare answer: settings, prompts, traces, resuming, failures. No toolkit is imported."""

import json
import logging
from pathlib import Path

import pytest
from new_limit import with_a_new_limit
from PIL import Image

from vilavt_core.sources import Video
from vilavt_vlmeval.adapter import Adapter
from vilavt_vlmeval.errors import MessageError, SettingsError
from vilavt_vlmeval.messages import INDEX, BenchmarkQuestion, question_of, with_options
from vilavt_vlmeval.settings import PREFIX, AdapterSettings
from vilavt_vlmeval.tiny_benchmark import options
from vilavt_vlmeval.traces import Traces, make_folder

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "examples" / "pictures"
SCENE = str(PICTURES / "scene-1.png")


def text(value, **more):
    return {"type": "text", "value": value, **more}


def image(value):
    return {"type": "image", "value": value}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


@pytest.fixture
def served(stub_server, tmp_path):
    """`served(**settings)`: an adapter in front of the stub, with its traces below `tmp_path`."""

    def make(**settings) -> Adapter:
        given = {"backend": stub_server.url, "trace_dir": tmp_path / "traces", **settings}
        return Adapter(AdapterSettings.resolve(given, {}), "model")

    return make


# ---------------------------------------------------------------------- settings


def test_what_is_given_wins_over_the_environment_and_that_over_defaults():
    environment = {f"{PREFIX}MAX_TURNS": "3", f"{PREFIX}SEED": "7", f"{PREFIX}ENGINE": '{"a": 1}', "HOME": "x"}
    settings = AdapterSettings.resolve({"max_turns": 2}, environment)
    assert (settings.max_turns, settings.seed, settings.engine, settings.backend) == (2, 7, {"a": 1}, "hf")
    assert settings.options().limits == {"max_turns": 2}


@pytest.mark.parametrize(
    "given, environment, words",
    [
        ({"max_turn": 2}, {}, "unknown setting 'max_turn'; known are"),
        ({}, {f"{PREFIX}MODELPATH": "x"}, f"unknown setting {PREFIX}MODELPATH; known are"),
        ({}, {f"{PREFIX}MAX_TURNS": "many"}, f"{PREFIX}MAX_TURNS is 'many'"),
        ({"temperature": "hot"}, {}, "'temperature' is 'hot'"),
        ({}, {f"{PREFIX}ENGINE": "{"}, f"{PREFIX}ENGINE is '{{'"),
    ],
)
def test_unknown_settings_and_unusable_values_are_refused_by_name(given, environment, words):
    with pytest.raises(SettingsError, match=words):
        AdapterSettings.resolve(given, environment)


def test_the_switch_of_the_hook_is_no_setting_and_an_empty_trace_folder_is_none():
    settings = AdapterSettings.resolve({}, {f"{PREFIX}AUTOLOAD": "1", f"{PREFIX}TRACE_DIR": ""})
    assert settings.trace_dir is None


def test_a_name_says_which_path_is_its_checkpoint():
    environment = {f"{PREFIX}MODEL_PATH": "/rl", f"{PREFIX}SFT_MODEL_PATH": "/sft"}
    paths = [AdapterSettings.resolve({"checkpoint": name}, environment).path for name in ("rl", "sft", "tiny")]
    assert paths[:2] == ["/rl", "/sft"]
    assert paths[2].endswith("vilavt-tiny")
    with pytest.raises(SettingsError, match=f"set {PREFIX}SFT_MODEL_PATH to a folder"):
        _ = AdapterSettings.resolve({"checkpoint": "sft"}, {}).path


def test_every_setting_is_described_in_the_readme():
    readme = (ROOT / "vilavt_vlmeval" / "README.md").read_text()
    for name, field in AdapterSettings.model_fields.items():
        assert f"| `{PREFIX}{name.upper()}` | {field.description} |" in readme


def test_a_new_limit_is_one_edit():
    found = with_a_new_limit(f"""
from vilavt_vlmeval.settings import AdapterSettings

settings = AdapterSettings.resolve({{}}, {{"{PREFIX}MAX_ZOOMS": "3"}})
found = {{"limits": settings.options().limits, "help": AdapterSettings.model_fields["max_zooms"].description}}
""")
    assert found == {"limits": {"max_zooms": 3}, "help": "zooms of a conversation"}


# ---------------------------------------------------------------------- messages


def test_images_come_first_and_texts_are_joined():
    question = question_of([image("a/1.png"), image("a/2.png"), text("Look."), text("What?")])
    assert question == BenchmarkQuestion("Look.\nWhat?", ("a/1.png", "a/2.png"))


def test_images_between_texts_leave_marks_in_their_places():
    question = question_of([text("First"), image("1"), text("then"), image("2"), text("differ how?")])
    assert question.text == "First\n<image>\nthen\n<image>\ndiffer how?"
    assert question_of([text("This"), image("1"), text("is what?")]).text == "This\nis what?"


def test_a_message_may_have_no_image_but_nothing_that_is_not_seen():
    assert question_of([text("1 + 1?")]) == BenchmarkQuestion("1 + 1?")
    with pytest.raises(MessageError, match="the message holds a audio; ViLaVT is shown texts, images and videos"):
        question_of([{"type": "audio", "value": "a.wav"}, text("What?")])


def test_a_video_is_a_file_with_its_frames_or_the_list_of_them():
    def shown(item, frames=None):
        return question_of([{"type": "video", **item}, text("What?")], frames).images

    (video,) = shown({"value": "a.mp4", "nframe": 16})
    assert (video.source, video.frames, video.fps) == ("a.mp4", 16, None)
    assert shown({"value": "a.mp4", "fps": 2.0, "nframe": None}, Video("", 4))[0].wanted == {"fps": 2.0}
    assert shown({"value": "a.mp4"}, Video("", 4))[0].wanted == {"frames": 4}
    assert shown({"value": "a.mp4"})[0].wanted == {}
    frame = Image.new("RGB", (8, 8))
    assert shown({"value": ["1.png", frame], "fps": None}) == ("1.png", frame)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"value": "a.mp4", "start_time": 2.0}, "holds a video: a video has no 'start_time' here"),
        ({"value": "a.mp4", "nframe": 3, "fps": 1}, "give one of the two"),
        ({"value": ["1.png"], "fps": 1}, "a video comes as 1 frames, fps has no effect on them"),
        ({"value": 7}, "a video is a path"),
    ],
)
def test_what_a_message_says_of_a_video_is_heeded_or_refused(item, message):
    with pytest.raises(MessageError, match=message):
        question_of([{"type": "video", **item}, text("What?")])


def test_beside_a_video_pictures_leave_no_marks():
    question = question_of([text("See"), image("1"), {"type": "video", "value": "a.mp4"}, text("and"), image("2")])
    assert question.text == "See\nand"
    assert [one if isinstance(one, str) else one.source for one in question.images] == ["1", "a.mp4", "2"]


def test_which_frames_are_taken_counts_in_name_and_key(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    path = str(tmp_path / "a.mp4")
    asked = [question_of([{"type": "video", "value": path, "nframe": n}, text("Q")]) for n in (2, 3, 3)]
    assert asked[0].sample_id != asked[1].sample_id == asked[2].sample_id
    assert asked[0].digest() != asked[1].digest() == asked[2].digest()
    assert asked[0].files == [path]


def test_frames_and_rate_contradict_one_another_in_the_settings():
    with pytest.raises(SettingsError, match="'frames' is 3 and 'fps' is 1; give one of the two"):
        AdapterSettings.resolve({"frames": 3, "fps": 1.0}, {})
    assert AdapterSettings.resolve({"fps": 2}, {}).video.wanted == {"fps": 2.0}


def test_a_sample_is_named_by_its_row_or_by_its_first_image_and_everything_asked():
    assert question_of([image("x/a/1.png"), text("Q", **{INDEX: "17"})]).sample_id == "17"
    here, elsewhere = (question_of([image(f"{root}/a/1.png"), text("Q")]).sample_id for root in "xy")
    assert here == elsewhere
    assert here.startswith("a/1.png-")
    assert question_of([image("x/a/1.png"), text("R")]).sample_id != here
    assert question_of([image("x/b/1.png"), text("Q")]).sample_id != here


def test_options_of_a_table_are_listed_and_missing_cells_are_not():
    line = {"question": "Where?", "A": "here", "B": 2.5, "C": float("nan"), "hint": float("nan"), "answer": "A"}
    assert with_options(line) == "Where?\nA. here\nB. 2.5\nAnswer with the letter of the right option only."
    assert with_options({**line, "hint": "Look up."}).startswith("Look up.\nWhere?\n")


def test_the_tiny_benchmark_has_options_that_exact_matching_reads_as_themselves():
    for answer in range(19):
        texts = options(str(answer))
        assert texts.count(str(answer)) == 1
        for said in range(19):
            read = [option for option in texts if option in str(said)]  # the toolkit's rule
            assert (read == [str(answer)]) == (said == answer)


# ---------------------------------------------------------------------- answers


def test_an_answer_is_bare_and_its_trace_is_whole(served, tmp_path, stub_server):
    adapter = served()
    assert adapter.answer(BenchmarkQuestion("What?", (SCENE,), "5"), "Bench") == "A"
    (row,) = rows(tmp_path / "traces")
    assert (tmp_path / "traces" / "model_Bench_rank0.jsonl").is_file()
    assert (row["sample_id"], row["benchmark"], row["model"], row["answer"]) == ("5", "Bench", "model", "A")
    assert row["image_files"] == [SCENE]
    assert row["turns"][0]["action"]["thought"] == "I looked."
    assert row["provenance"]["seed"] == stub_server.requests[0]["seed"]


def test_a_question_that_was_answered_is_not_asked_again_unless_something_changed(served, stub_server, tmp_path):
    question = BenchmarkQuestion("What?", (SCENE,), "5")
    served().answer(question, "Bench")
    assert served().answer(question, "Bench") == "A"
    assert len(stub_server.requests) == 1
    changes = [{"resume": False}, {"max_turns": 1}, {"seed": 1}, {"temperature": 0.5}]
    for count, change in enumerate(changes, start=2):
        served(**change).answer(question, "Bench")
        assert len(stub_server.requests) == count, change
    for other in (
        BenchmarkQuestion("Who?", (SCENE,), "5"),
        BenchmarkQuestion("What?", (str(PICTURES / "scene-2.png"),), "5"),
    ):
        served().answer(other, "Bench")
    served().answer(question, "Another")
    assert len(stub_server.requests) == len(changes) + 4


def test_answers_of_another_number_of_ranks_are_found(served, stub_server, monkeypatch):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        served().answer(BenchmarkQuestion("What?", (), rank), "Bench")
    monkeypatch.delenv("RANK")
    adapter = served()
    assert [adapter.answer(BenchmarkQuestion("What?", (), rank), "Bench") for rank in "01"] == ["A", "A"]
    assert len(stub_server.requests) == 2


def test_a_failure_is_an_empty_answer_with_its_reason_and_is_asked_again(served, stub_server, tmp_path, caplog):
    stub_server.answer = lambda request: 400
    with caplog.at_level(logging.WARNING):
        assert served().answer(BenchmarkQuestion("What?", (), "5"), "Bench") == ""
        assert served().answer(BenchmarkQuestion("What?", ("missing.png",), "6"), "Bench") == ""
    assert ["told to fail" in row["error"] or "missing.png" in row["error"] for row in rows(tmp_path / "traces")]
    assert [row["answer"] for row in rows(tmp_path / "traces")] == [None, None]
    assert "Bench, sample 5: counted as no answer" in caplog.text
    assert "missing.png" in caplog.text
    stub_server.answer = lambda request: "B"
    assert served().answer(BenchmarkQuestion("What?", (), "5"), "Bench") == "B"


def test_no_answer_is_an_answer_and_is_not_asked_again(served, stub_server):
    stub_server.answer = lambda request: None
    assert [served().answer(BenchmarkQuestion("What?", (), "5"), "Bench") for _ in range(2)] == ["", ""]
    assert len(stub_server.requests) == 1


def test_an_engine_that_breaks_down_fails_its_questions_and_the_run_goes_on(served, tmp_path):
    adapter = served()

    class Broken:
        provenance = adapter.backend.provenance

        def iter_many(self, samples):
            next(samples)
            raise RuntimeError("CUDA error")
            yield

    adapter.backend = Broken()
    questions = [BenchmarkQuestion("What?", (), str(i)) for i in range(3)]
    assert adapter.answers([*questions[:2], None, questions[2]], "Bench") == [""] * 4
    assert [(row["sample_id"], row["error"]) for row in rows(tmp_path / "traces")] == [
        (str(i), "RuntimeError: CUDA error") for i in range(3)
    ]


def test_questions_are_drawn_when_their_turn_comes(served, stub_server):
    drawn = []

    def questions():
        for i in range(40):
            drawn.append(len(stub_server.requests))
            yield BenchmarkQuestion(f"What is {i}?", (), str(i))

    stub_server.answer = lambda request: request["messages"][0]["content"][-1]["text"]
    assert served().answers(questions(), "Bench") == [f"What is {i}?" for i in range(40)]
    assert drawn[-1] > 0, "all questions were drawn before the first was asked"


def test_without_a_trace_folder_nothing_is_written_or_resumed(served, stub_server, tmp_path):
    for _ in range(2):
        served(trace_dir=None).answer(BenchmarkQuestion("What?", (), "5"), "Bench")
    assert len(stub_server.requests) == 2
    assert not (tmp_path / "traces").exists()


def test_a_line_cut_off_by_a_kill_costs_that_line_only(tmp_path):
    make_folder(tmp_path / "new" / "traces")
    traces = Traces(tmp_path / "new" / "traces", "a/b", "Bench", 0)
    for key in ("one", "two"):
        traces.write({"key": key, "answer": key, "error": None})
    assert traces.path.name == "a-b_Bench_rank0.jsonl"
    data = traces.path.read_bytes()
    traces.path.write_bytes(data[:-5])
    again = Traces(traces.path.parent, "a/b", "Bench", 0)
    assert (again.answer("one"), again.answer("two")) == ("one", None)
    again.write({"key": "three", "answer": "3", "error": None})
    last = Traces(traces.path.parent, "a/b", "Bench", 0)
    assert [last.answer(key) for key in ("one", "two", "three")] == ["one", None, "3"]


def test_a_trace_folder_that_cannot_be_made_is_refused(served, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"trace_dir .* cannot be made"):
        served(trace_dir=tmp_path / "file")


@pytest.mark.parametrize("preset", ["default", "rl", "eval-vllm", "eval-hf", "vlmevalkit"])
def test_every_preset_by_name_asks_with_pictures_and_without(preset, tmp_path):
    """The tiny model really answers; the settings of the preset are in the trace."""
    short = {"max_turns": 2, "max_new_tokens_per_turn": 24}
    given = {"checkpoint": "tiny", "preset": preset, "trace_dir": tmp_path, **short}
    adapter = Adapter(AdapterSettings.resolve(given, {}), "tiny")
    adapter.answer(BenchmarkQuestion("Which digit is on the blue card?", (SCENE,), "picture"), "Bench")
    adapter.answer(BenchmarkQuestion("Which digit comes after 3?", (), "text"), "Bench")
    picture, words = rows(tmp_path)
    assert [picture["error"], words["error"]] == [None, None]
    assert picture["provenance"]["preset"] == preset
    assert picture["provenance"]["limits"]["max_new_tokens_per_turn"] == 24
    assert words["images"] == []
