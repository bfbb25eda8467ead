"""The six benchmarks through the toolkit's own data set classes and scorers, on eight rows each.

A stub in place of the model says what is right, so that scores, prompts and images are known in advance; then the real
tiny model goes through the same.
"""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

IMAGES = ("HRBench4K", "EmbSpatialBench", "SparBench", "ERQA", "MMSIBench_wo_circular")
VIDEO = "VSI-Bench_16frame"  # ms-vlmeval 0.0.20 builds a video benchmark from a --config file only
ROW = re.compile(r"(\S+) row (\d): where is the lamp\?")


@pytest.fixture(scope="module")
def stub(start_stub, standins):
    by_word = {standin.word: standin for standin in standins.STANDINS}

    def answer(request):
        word, row = ROW.search(request["messages"][0]["content"][-1]["text"]).groups()
        return by_word[word].reply(int(row))

    server = start_stub()
    server.answer = answer
    return server


@pytest.fixture(scope="module")
def scored(toolkit, stub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    short = {"max_turns": 2, "max_new_tokens_per_turn": 32}
    models = {
        "ViLaVT-7B": {"class": "ViLaVT", "name": "ViLaVT-7B", "backend": stub.url},
        "ViLaVT-Tiny": {"class": "ViLaVT", "name": "ViLaVT-Tiny", "checkpoint": "tiny", **short},
    }
    (folder / "config.json").write_text(json.dumps({"model": models, "data": {VIDEO: {}}}))
    by_name = ("--judge", "exact_matching", "--data", *IMAGES, "--model")
    limits = {f"VILAVT_VLMEVAL_{name.upper()}": str(value) for name, value in short.items()}
    runs = [
        ((*by_name, "ViLaVT-7B"), {"VILAVT_VLMEVAL_BACKEND": stub.url}),
        ((*by_name, "ViLaVT-Tiny"), limits),
        (("--judge", "exact_matching", "--config", "config.json"), {}),
    ]
    script = str(Path(__file__).with_name("several_runs.py"))
    return toolkit.run(folder, script, json.dumps(runs))


def asked(stub, standin) -> dict[int, tuple[str, list[Image.Image]]]:
    """What the model was asked about a benchmark: row -> text and images."""
    out = {}
    for request in stub.requests:
        *images, text = request["messages"][0]["content"]
        found = ROW.search(text["text"])
        if found[1] == standin.word:
            data = [base64.b64decode(image["image_url"]["url"].split(",")[1]) for image in images]
            out[int(found[2])] = (text["text"], [Image.open(io.BytesIO(d)) for d in data])
    assert sorted(out) == list(range(8))
    return out


def test_six_of_eight_right_answers_are_scored_as_such_by_every_benchmark(scored, toolkit):
    """Rows 6 (wrong) and 7 (no answer) count as wrong. Means over tasks or cycles are the scorers' own."""
    status = toolkit.status(scored, "ViLaVT-7B")
    metrics = {name: status[name]["metrics"] for name in (*IMAGES, VIDEO)}
    hrbench = metrics["HRBench4K"]
    assert [hrbench[f"type=all|accuracy{n}"] for n in ("", "#3", "#6")] == [1.0, 0.5, 0.75]  # cycles 0, 1, their mean
    thirds = {"mp3d_accuracy": 200 / 3, "ai2thor_accuracy": 200 / 3, "scannet_accuracy": 100}
    assert metrics["EmbSpatialBench"] == pytest.approx({"overall": 75, **thirds})
    by_task = {"position_matching_accuracy": 1, "depth_prediction_oc_MRA:.5:.95:.05": 0.5}
    assert metrics["SparBench"] == pytest.approx({"overall": 0.75, "Low": 0.5, "Middle": 1, "High": 0, **by_task})
    assert metrics["ERQA"]["Category=Overall|Accuracy (%)"] == 75
    assert metrics["MMSIBench_wo_circular"] == pytest.approx(
        {"overall": 75, "Motion-Cam_accuracy": 75, "MSR_accuracy": 75}
    )
    by_type = {"object_counting_MRA:.5:.95:.05": 50, "object_rel_distance_accuracy": 100}
    assert metrics[VIDEO] == pytest.approx({"overall": 75, **by_type})


def test_options_and_instructions_of_every_benchmark_reach_the_model(scored, stub, standins):
    for standin in standins.STANDINS:
        for row, (text, _) in asked(stub, standin).items():
            for part in standin.told(row):
                assert part in text, (standin.name, row)


def test_every_image_of_a_row_reaches_the_model_in_order(scored, stub, standins):
    for standin in standins.STANDINS:
        if standin.word != "VSI-Bench":
            for row, (_, images) in asked(stub, standin).items():
                cells = standins.cells(standin.rows[row][-1])
                assert [i.tobytes() for i in images] == [c.tobytes() for c in cells], (standin.name, row)


def test_a_video_arrives_as_its_frames_in_order(scored, stub, standins):
    (vsi,) = (standin for standin in standins.STANDINS if standin.word == "VSI-Bench")
    for _, images in asked(stub, vsi).values():
        greys = [image.convert("L").resize((1, 1)).getpixel((0, 0)) for image in images]
        assert len(greys) == 16
        assert greys == sorted(greys)
        assert greys[-1] - greys[0] > 200


def test_images_between_texts_leave_their_marks(scored, stub, standins):
    (erqa,) = (standin for standin in standins.STANDINS if standin.word == "ERQA")
    texts = {row: text for row, (text, _) in asked(stub, erqa).items()}
    assert [texts[row].count("<image>") for row in range(8)] == [n if n > 1 else 0 for n in erqa.images]
    assert "Frame 0:\n<image>\nFrame 1:\n<image>\nFrame 2:\n<image>\nChoices:" in texts[3]


def test_the_real_model_goes_through_every_benchmark(scored, toolkit):
    status = toolkit.status(scored, "ViLaVT-Tiny")
    for name in (*IMAGES, VIDEO):
        assert status[name]["status"] == "done", status[name]
        assert "error_message" not in status[name]
        assert status[name]["metrics"]
        rows = toolkit.rows(scored, "ViLaVT-Tiny", name.removesuffix("_16frame"))
        assert len(rows) == len({row["sample_id"] for row in rows}) == 8
        assert [row["error"] for row in rows] == [None] * 8


def test_a_row_without_answer_says_why_in_its_trace(scored, toolkit):
    for name in (*IMAGES, VIDEO):
        rows = toolkit.rows(scored, "ViLaVT-7B", name.removesuffix("_16frame"))
        (silent,) = (row for row in rows if row["answer"] is None)
        assert silent["finish"] == "turn_limit"
        assert " row 7:" in silent["question"]
