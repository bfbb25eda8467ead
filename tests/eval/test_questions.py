"""Questions of a benchmark: prompts built from records of every published schema, wrong records refused."""

import json
import re
import tracemalloc
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vilavt_core.errors import BenchmarkError
from vilavt_eval.definition import load_benchmark
from vilavt_eval.evaluation_preset import EvaluationPreset
from vilavt_eval.questions import Questions

LETTER = "Reply with nothing but the letter of the right option."
NUMBER = "Reply with nothing but one number, for example 7 or 2.5."


def record(**more: Any) -> dict[str, Any]:
    return {
        "question_id": 7,
        "question": "Where is the cup?",
        "answer": "B",
        "images": ["a.jpg"],
        "problem_type": "multiple choice",
        "options": None,
        **more,
    }


FOUR = ["A. left", "B. right", "C. above", "D. below"]
PUBLISHED = {
    "ERQA": (
        record(
            question="<image>Then <image> which? A. x B. y C. z D. w. One letter.",
            images=["a.jpg", "b.jpg"],
            category="Action",
        ),
        "<image>Then <image> which? A. x B. y C. z D. w. One letter.",
        "Action",
    ),
    "EmbSpatial": (
        record(question_id="mp3d_3", options=FOUR, task="mp3d", split="test", dataset="EmbSpatial", data_type="image"),
        "\n".join(["Where is the cup?", *FOUR, LETTER]),
        "mp3d",
    ),
    "HRBench4K": (
        record(options=FOUR, category="single", cycle_category=2),
        "\n".join(["Where is the cup?", *FOUR, LETTER]),
        "single",
    ),
    "HRBench8K": (
        record(options=["left", "right", "above", "below"], category="cross", cycle_category=0),
        "\n".join(["Where is the cup?", *FOUR, LETTER]),
        "cross",
    ),
    "SpatialEval-real": (
        record(question="Where?\nA. left\nB. right", task="spatialreal", split="test"),
        f"Where?\nA. left\nB. right\n{LETTER}",
        "spatialreal",
    ),
    "MMSI-Bench": (
        record(
            question="<image>Where?\nA. x, B. y, C. z, D. w",
            thought="SECRET",
            original_question_type="MSR",
            images=["a.jpg", "b.jpg"],
        ),
        f"Where?\nA. x, B. y, C. z, D. w\n{LETTER}",
        "MSR",
    ),
    "ViewSpatial": (
        record(options=FOUR, answer="C. above", original_question_type="Camera Perspective", data_type="x"),
        "\n".join(["Where is the cup?", *FOUR, LETTER]),
        "Camera Perspective",
    ),
    "VSI-Bench": (
        record(
            problem_type="regression", answer=3.2, original_question_type="object_abs_distance", images=["a.jpg"] * 32
        ),
        f"Where is the cup?\n{NUMBER}",
        "object_abs_distance",
    ),
    "SPAR-Bench": (
        record(problem_type="vci", answer="move_right:0.5,rotate_up:30", original_question_type="view_change_infer"),
        "Where is the cup?",
        "view_change_infer",
    ),
    "VStarBench": (
        {
            "question_id": "0",
            "image": "direct_attributes/a.jpg",
            "text": "What colour?\n(A) red\n(B) blue\nOne letter, please.",
            "label": "A",
            "category": "direct_attributes",
        },
        "What colour?\n(A) red\n(B) blue\nOne letter, please.",
        "direct_attributes",
    ),
}


def write(folder: Path, records: Any, name: str = "questions.json") -> Path:
    path = folder / name
    lines = name.endswith(".jsonl")
    text = "".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


def refused(tmp_path: Path, benchmark: str, *records: Any) -> str:
    with pytest.raises(BenchmarkError) as caught:
        Questions(load_benchmark(benchmark), write(tmp_path, list(records)))
    return str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_record_of_the_published_schema_becomes_the_right_prompt(name, tmp_path):
    data, text, category = PUBLISHED[name]
    benchmark = load_benchmark(name)
    write(tmp_path, [data], benchmark.file)
    (question,) = Questions(benchmark, tmp_path)
    assert question.text == text
    assert question.category == category
    assert question.id == data["question_id"]
    assert question.target == str(data.get("answer", data.get("label")))
    paths = [data["image"]] if "image" in data else data["images"]
    assert question.images == tuple(tmp_path / path for path in paths)


def test_a_rationale_is_neither_in_the_prompt_nor_in_the_record(tmp_path):
    (question,) = Questions(load_benchmark("MMSI-Bench"), write(tmp_path, [PUBLISHED["MMSI-Bench"][0]]))
    assert "SECRET" not in repr(question)
    assert set(question.record) == set(PUBLISHED["MMSI-Bench"][0]) - {"thought"}


def test_a_question_is_frozen(tmp_path):
    (question,) = Questions(load_benchmark("ERQA"), write(tmp_path, [PUBLISHED["ERQA"][0]]))
    with pytest.raises(FrozenInstanceError):
        question.text = "x"


def test_a_json_list_and_json_lines_hold_the_same_questions(tmp_path):
    records = [record(question_id=i, options=FOUR, task="x") for i in range(5)]
    benchmark = load_benchmark("EmbSpatial")
    one, other = (Questions(benchmark, write(tmp_path, records, name)) for name in ("q.json", "q.jsonl"))
    assert list(one) == list(other)
    assert one.sha256 == other.sha256
    assert len(one) == 5
    assert one[-1] == one[4]
    assert [q.id for q in one[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        one[5]


def test_the_hash_follows_what_is_asked_and_the_right_answers(tmp_path):
    def sha(benchmark: str = "EmbSpatial", **changes: Any) -> str:
        return Questions(load_benchmark(benchmark), write(tmp_path, [record(options=FOUR, task="x", **changes)])).sha256

    plain = sha()
    assert plain == sha(note="not shown")
    assert plain != sha(answer="A")
    assert plain != sha(question="Where is the pot?")
    assert plain != sha(images=["b.jpg"])
    own = tmp_path / "own.yaml"
    own.write_text("base: EmbSpatial\ntypes: {multiple choice: {suffix: Which one}}\n")
    assert plain != sha(str(own))


def test_images_start_where_the_caller_or_the_definition_says(tmp_path):
    path = write(tmp_path, [record(options=FOUR, task="x", images=["sub/a.png"])])
    benchmark = load_benchmark("EmbSpatial")
    assert Questions(benchmark, path)[0].images == (tmp_path / "sub/a.png",)
    assert Questions(benchmark, path, tmp_path / "pictures")[0].images == (tmp_path / "pictures/sub/a.png",)
    elsewhere = benchmark.model_copy(update={"images": Path("other")})
    assert Questions(elsewhere, path)[0].images == (tmp_path / "other/sub/a.png",)


def test_the_documented_definition_asks_for_a_letter_where_erqa_does_not(tmp_path):
    docs = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (definition,) = re.findall(r"```yaml\n(base: ERQA\n.*?)```", docs, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(definition)
    data = [record(question="<image> Which one? Answer with a letter.", category="Other")]
    for benchmark, said in (("ERQA", "a letter."), (tmp_path / "mine.yaml", f"a letter.\n{LETTER}")):
        (question,) = Questions(load_benchmark(benchmark), write(tmp_path, data))
        assert question.text == f"<image> Which one? Answer with {said}"
    assert "ERQA" in EvaluationPreset.load("eval-vllm").description


def test_missing_images_are_counted_before_anything_is_loaded(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    records = [record(question_id=i, options=FOUR, task="x", images=[f"{name}.jpg"]) for i, name in enumerate("abcde")]
    questions = Questions(load_benchmark("EmbSpatial"), write(tmp_path, records))
    with pytest.raises(BenchmarkError, match=r"images of 4 of 5 questions are missing, first .*--image-root") as error:
        questions.require_images()
    assert re.findall(r"(\w\.jpg) \(question (\d)\)", str(error.value)) == [
        ("b.jpg", "1"),
        ("c.jpg", "2"),
        ("d.jpg", "3"),
    ]
    Questions(load_benchmark("EmbSpatial"), write(tmp_path, records[:1])).require_images()


def test_looking_for_images_takes_no_memory_per_image(tmp_path):
    def peak(count):
        records = [
            record(question_id=i, options=FOUR, task="x", images=[f"{i}/{frame}.jpg" for frame in range(32)])
            for i in range(count)
        ]
        (tmp_path / f"{count}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        questions = Questions(load_benchmark("EmbSpatial"), tmp_path / f"{count}.jsonl")
        tracemalloc.start()
        with pytest.raises(BenchmarkError):
            questions.require_images()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(800) < 1.2 * peak(200)


def test_an_answer_in_words_gets_the_letter_that_its_option_is_shown_with(tmp_path):
    data = record(options=["left", "right"], answer="right", original_question_type="x")
    (question,) = Questions(load_benchmark("ViewSpatial"), write(tmp_path, [data]))
    assert question.text == f"Where is the cup?\nA. left\nB. right\n{LETTER}"
    assert question.target == "B. right"


def test_records_can_be_numbered_instead_of_named(tmp_path):
    benchmark = load_benchmark("EmbSpatial")
    numbered = benchmark.model_copy(update={"keys": benchmark.keys.model_copy(update={"id": None})})
    data = record(options=FOUR, task="x")
    del data["question_id"]
    assert [q.id for q in Questions(numbered, write(tmp_path, [data, data]))] == [0, 1]


@pytest.mark.parametrize(
    ("benchmark", "changes", "message"),
    [
        ("EmbSpatial", {"question": None}, "record 1, question: it is missing or null"),
        ("EmbSpatial", {"question": "  "}, "record 1, question: it is blank"),
        ("EmbSpatial", {"question_id": None}, "record 1, question_id: it is missing or null"),
        ("EmbSpatial", {"question_id": "7"}, "record 1, id: '7' is also the id of record 0"),
        ("EmbSpatial", {"images": []}, "record 1, images: it is a list of 0"),
        ("EmbSpatial", {"images": [3]}, "record 1, images"),
        ("EmbSpatial", {"answer": "E"}, "record 1, answer: 'E' is none of the letters A to D"),
        ("EmbSpatial", {"answer": "B. right"}, "set answers: option"),
        ("EmbSpatial", {"answer": True}, "record 1, answer: it is a bool"),
        ("EmbSpatial", {"options": None}, "record 1, options: it is missing or null"),
        ("EmbSpatial", {"options": ["only"]}, "record 1, options: it is a list of 1; it must be a list of at least 2"),
        ("EmbSpatial", {"options": ["x"] * 27}, "it lists 27 options, there are 26 letters"),
        ("EmbSpatial", {"options": ["<image>", "x"]}, "an option holds <image>"),
        ("EmbSpatial", {"task": None}, "record 1, task: it is missing; set report.category"),
        ("EmbSpatial", {"problem_type": "vci"}, "record 1, problem_type: 'vci' is none of the types of EmbSpatial"),
        ("EmbSpatial", {"problem_type": 3}, "record 1, problem_type: 3 is none of the types"),
        ("ViewSpatial", {"answer": "up"}, "record 1, answer: 'up' is none of its 4 options"),
        ("ERQA", {"question": "<image><image> which?"}, "it holds 2 <image>, images lists 1 images"),
        ("VSI-Bench", {"images": ["a.jpg"] * 33}, "it lists 33 frames, VSI-Bench has 32"),
        (
            "VSI-Bench",
            {"problem_type": "regression", "answer": "far"},
            "record 1, answer: the target 'far' holds no number",
        ),
        (
            "SPAR-Bench",
            {"problem_type": "vci", "answer": "up:3"},
            "record 1, answer: the target 'up:3' is no change of view",
        ),
    ],
)
def test_a_wrong_record_is_refused_with_file_number_field_and_remedy(benchmark, changes, message, tmp_path):
    keys = {"task": "x", "category": "x", "original_question_type": "x"}
    question = "<image> Which?" if benchmark == "ERQA" else "Which?"
    answer = "B. right" if benchmark == "ViewSpatial" else "B"
    right = record(options=FOUR, question=question, answer=answer, **keys)
    said = refused(tmp_path, benchmark, right, right | {"question_id": 8} | changes)
    assert "questions.json, record 1" in said
    assert message in said


def test_wrong_files_are_refused(tmp_path):
    assert "there is no question in it" in refused(tmp_path, "ERQA")
    assert "record 0, record: it is a list; it must be a JSON object" in refused(tmp_path, "ERQA", [])
    with pytest.raises(BenchmarkError, match=r"ERQA: .*ERQA\.json: cannot be read: No such file"):
        Questions(load_benchmark("ERQA"), tmp_path)
    with pytest.raises(BenchmarkError, match="it holds a dict"):
        Questions(load_benchmark("ERQA"), write(tmp_path, {"a": 1}))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question_id": 1,\n')
    with pytest.raises(BenchmarkError, match="record 0: not JSON"):
        Questions(load_benchmark("ERQA"), broken)
