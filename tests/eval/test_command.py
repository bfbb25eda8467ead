"""`vilavt eval` and `vilavt eval-latency` from the shell's side."""

import itertools
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vilavt_core.cli import app
from vilavt_core.errors import BenchmarkError, EvaluationError
from vilavt_eval.runner import run
from vilavt_hf.tiny.benchmark import tasks, write_benchmark

TINY = str(Path(__file__).parents[2] / "examples" / "vilavt-tiny")


@pytest.fixture(scope="module")
def definition(tmp_path_factory):
    return str(write_benchmark(tmp_path_factory.mktemp("tiny"), tasks("heldout", 16)))


@pytest.fixture
def vilavt(definition, tmp_path):
    def run(command, *arguments, code=0, benchmark=definition):
        model = [] if "--model" in arguments else ["--model", TINY, "--set", "precision=float32"]
        out = ["--out", str(tmp_path / "out")] if command == "eval" else []
        result = CliRunner().invoke(app, [command, benchmark, *model, *out, *arguments])
        if code is not None:
            assert result.exit_code == code, result.output
        return result

    return run


def test_a_run_is_scored_and_ablations_are_put_beside_it(vilavt, tmp_path):
    result = vilavt("eval", "--ablate", "no-zoom", "--ablate", "random-box", "--ablate", "no-reencode")
    assert "overall" in result.output
    folder = tmp_path / "out" / "vilavt-tiny"
    names = {"default-seed0", *(f"default-seed0-{part}" for part in ("no-zoom", "random-box", "no-reencode"))}
    assert {path.stem for path in folder.glob("*.jsonl")} == names
    with Image.open(folder / "default-scores.png") as chart:
        assert chart.width > 500
    table = json.loads((folder / "default-ablations.json").read_text())
    scores = {row["name"]: row["figures"][0] for row in table["rows"]}
    assert list(scores) == ["full", "no-zoom", "random-box", "no-reencode"]
    assert scores["full"]["score"] > 0.8
    for row in table["rows"][1:]:
        assert row["figures"][0]["score"] < 0.6
        assert row["difference"]["difference"] < -0.3
        assert row["difference"]["interval"]["high"] < 0
    lines = (folder / "default-ablations.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(scores)
    assert "no-zoom |" in result.output


def test_several_seeds_have_a_file_each_and_one_table(vilavt, tmp_path):
    result = vilavt("eval", "--set", "temperature=0.7", "--seeds", "2", "--seed", "5", "--limit", "6")
    files = sorted(path.name for path in (tmp_path / "out" / "vilavt-tiny").glob("*.jsonl"))
    assert files == ["default-seed5.jsonl", "default-seed6.jsonl"]
    assert result.output.count("overall") == 1


def test_shards_are_merged_by_the_last_one(vilavt, tmp_path):
    first = vilavt("eval", "--shard", "0/2", "--limit", "6")
    assert "shard 0/2 is done" in first.output
    assert "overall" not in first.output
    assert "overall" in vilavt("eval", "--shard", "1/2", "--limit", "6").output


@pytest.fixture
def second_rank(vilavt, monkeypatch):
    """A function that runs rank 1 of 2 whole, and returns what it said, while rank 0 is at its run number `at`; this
    process is rank 0 from then on."""

    def arrange(at, *arguments, code):
        said, numbers = [], itertools.count()

        def during(*given, **settings):
            if settings["shard"].index == 0 and next(numbers) == at:
                monkeypatch.setenv("RANK", "1")
                said.append(vilavt("eval", *arguments, code=code))
                monkeypatch.setenv("RANK", "0")
            return run(*given, **settings)

        monkeypatch.setattr("vilavt_eval.runner.run", during)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        return said

    return arrange


def test_ranks_that_merged_a_run_each_show_the_scores_of_all_once(vilavt, second_rank, tmp_path):
    arguments = ("--limit", "6", "--seeds", "2", "--ablate", "no-zoom")
    said = second_rank(2, *arguments, code=0)
    result = vilavt("eval", *arguments)
    assert "wrote" in said[0].output
    assert "overall" not in said[0].output
    assert result.output.count("| no-zoom |") == 1
    assert (tmp_path / "out" / "vilavt-tiny" / "default-ablations.json").is_file()


def test_a_rank_with_failures_ends_well_unless_it_is_the_last_which_counts_those_of_all(
    vilavt, start_stub, second_rank
):
    stub = start_stub()
    stub.answer = lambda request: 400 if len(stub.requests) == 1 else "1"
    arguments = ("--model", stub.url, "--limit", "5", "--concurrency", "1", "--engine", "max_retries=0")
    said = second_rank(0, *arguments, code=0)
    result = vilavt("eval", *arguments, code=3)
    assert "1 of 2 questions ended in an error" in said[0].output
    assert "1 of 5 questions ended in an error" in result.output


def test_a_question_that_fails_gives_exit_code_3_and_is_asked_again(vilavt, start_stub, tmp_path):
    stub = start_stub()
    stub.answer = lambda request: 400 if len(stub.requests) == 2 else "1"
    arguments = ("--model", stub.url, "--limit", "5", "--concurrency", "1", "--engine", "max_retries=0")
    result = vilavt("eval", *arguments, code=3)
    assert "1 of 5 questions ended in an error" in result.output
    asked = len(stub.requests)
    vilavt("eval", *arguments)
    assert len(stub.requests) == asked + 1


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        (("--preset", "nope"), EvaluationError, "no preset 'nope'"),
        (("--set", "heat=1"), EvaluationError, "no 'heat' to set"),
        (("--shard", "2/2"), EvaluationError, "shard 2/2"),
        (("--ablate", "no-text"), EvaluationError, "no ablation 'no-text'"),
        (("--backend", "vllm", "--ablate", "no-query"), EvaluationError, "use --backend hf"),
        (("--image-root", "nowhere"), BenchmarkError, "questions are missing"),
        (("--data", "nowhere"), BenchmarkError, "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(vilavt, monkeypatch, arguments, error, said):
    monkeypatch.setattr("vilavt_eval.runner.open_backend", None)
    result = vilavt("eval", *arguments, code=1)
    assert isinstance(result.exception, error)
    assert said in str(result.exception)


def test_a_pair_that_is_none_is_refused(vilavt):
    assert "is not KEY=VALUE" in vilavt("eval", "--set", "temperature", code=2).output
    assert "no list of numbers" in vilavt("eval-latency", "--concurrency", "1,two", code=2).output


def test_latency_is_one_command_with_json_and_markdown(vilavt, tmp_path):
    files = ("--json", str(tmp_path / "l.json"), "--markdown", str(tmp_path / "l.md"))
    result = vilavt("eval-latency", "--concurrency", "1,8", "--questions", "5", *files)
    report = json.loads((tmp_path / "l.json").read_text())
    assert [level["concurrency"] for level in report["levels"]] == [1, 8]
    assert (tmp_path / "l.md").read_text().strip() in result.output
