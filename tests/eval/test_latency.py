"""The latency report: what each backend can tell, and nothing that it cannot."""

import json
from pathlib import Path

import pytest

from vilavt_core.errors import EvaluationError
from vilavt_eval.definition import load_benchmark
from vilavt_eval.evaluation_preset import EvaluationPreset
from vilavt_eval.latency import Spread, measure_latency
from vilavt_eval.questions import Questions
from vilavt_eval.runner import Setting
from vilavt_hf.tiny.benchmark import tasks, write_benchmark

TINY = str(Path(__file__).parents[2] / "examples" / "vilavt-tiny")
PRESET = EvaluationPreset.load("default", {"precision": "float32"})


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    definition = write_benchmark(tmp_path_factory.mktemp("tiny"), tasks("heldout", 22))
    return Questions(load_benchmark(definition), definition.parent)


def test_a_local_model_splits_its_time_and_counts_what_it_reuses(questions):
    backend = Setting(TINY, "hf", PRESET).open()
    report = measure_latency(backend, "hf", PRESET, questions, levels=(1, 8), count=6)
    assert [level.concurrency for level in report.levels] == [1, 8]
    for level in report.levels:
        assert (level.questions, level.failed) == (6, 0)
        parts = [level.split.encoder, level.split.prefill, level.split.decode]
        assert min(parts) > 0
        assert sum(parts) + level.split.other == pytest.approx(level.seconds)
        assert 1.5 <= level.turns <= 3  # one of the six is answered at first look
        assert 0.3 < level.reuse.tokens < 0.8
        assert 0.2 < level.reuse.patches < 0.8
        assert level.per_turn.median <= level.per_answer.median
    assert json.loads(json.dumps(report.to_json()))["provenance"]["dtype"] == "float32"
    table = report.to_markdown().splitlines()
    assert len(table) == 6
    assert "?" not in table[4]


def test_a_server_tells_answers_and_turns_and_the_rest_is_left_open(questions, start_stub):
    stub = start_stub()
    preset = EvaluationPreset.load("default")
    report = measure_latency(
        Setting(stub.url, "server", preset).open(), "server", preset, questions, levels=(1, 4), count=5
    )
    level = report.levels[1]
    assert (level.per_turn, level.split, level.reuse.tokens, level.reuse.patches) == (None, None, 0.4, None)
    assert (level.turns, level.failed) == (2, 0)
    assert level.per_answer.mean > 0
    assert report.to_markdown().splitlines()[-1].count("?") == 3
    texts = [request["messages"][0]["content"] for request in stub.requests]
    assert len(texts) == 4 + 2 * 5  # no level asks what another one asked


def test_too_few_questions_are_refused_with_both_numbers(questions):
    with pytest.raises(EvaluationError, match=r"3 levels of 9 questions and 4 to warm up need 31, vilavt-tiny has 2\d"):
        measure_latency(None, "hf", PRESET, questions, levels=(1, 2, 3), count=9)


def test_a_spread_is_mean_median_and_the_95th_percentile():
    spread = Spread.of([float(i) for i in range(101)])
    assert (spread.mean, spread.median, spread.p95) == pytest.approx((50, 50, 95))
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([]) is None
