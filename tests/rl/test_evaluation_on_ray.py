"""``vilavt eval --ray`` through ``ray.data``. Here because this environment has Ray."""

import json
from pathlib import Path

import pytest

from vilavt_core.errors import EvaluationError
from vilavt_eval.ablation import Ablation
from vilavt_eval.definition import load_benchmark
from vilavt_eval.evaluation_preset import EvaluationPreset
from vilavt_eval.questions import Questions
from vilavt_eval.ray_data import Cluster
from vilavt_eval.runner import Setting, asking, run
from vilavt_hf.tiny.benchmark import tasks, write_benchmark

TINY = str(Path(__file__).parents[2] / "examples" / "vilavt-tiny")
PRESET = EvaluationPreset.load("default", {"precision": "float32"})
SETTING = Setting(TINY, "hf", PRESET, Ablation.parse("random-box"), device="cpu")


@pytest.fixture
def questions(tmp_path_factory):
    definition = write_benchmark(tmp_path_factory.mktemp("tiny"), tasks("heldout", 20))
    return Questions(load_benchmark(definition), definition.parent)


@pytest.fixture
def cluster():
    import ray

    already = ray.is_initialized()
    yield Cluster("local", actors=2)
    if not already:
        ray.shutdown()


def rows(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in found]


@pytest.mark.nightly("one more start of Ray")
def test_a_cluster_goes_on_with_a_local_run_and_writes_the_same_file(questions, cluster, tmp_path, monkeypatch):
    backend = SETTING.open()
    provenance, ask = backend.provenance(0), asking(backend, SETTING, 0)
    alone = run(SETTING, questions, tmp_path / "alone", provenance=provenance, ask=ask)
    run(SETTING, questions, tmp_path / "ray", provenance=provenance, ask=ask, limit=5)
    told = cluster.provenance(SETTING)(0)
    assert told == provenance
    # Places are handed out: actors read the questions, this process none.
    monkeypatch.setattr(Questions, "__getitem__", None)
    outcome = run(SETTING, questions, tmp_path / "ray", provenance=told, ask=cluster.asking(SETTING, 0))
    assert (outcome.complete, outcome.failed, outcome.asked) == (True, 0, len(questions) - 5)
    assert rows(outcome.path) == rows(alone.path)


def test_a_cluster_that_does_not_answer_is_named_with_the_remedy(monkeypatch):
    import ray

    def init(**settings):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(
        EvaluationError, match=r"--ray 127.0.0.1:1: nobody there; start a cluster with `ray start --head`"
    ):
        Cluster("127.0.0.1:1")
