"""An unmodified VLMEvalKit runs the shipped checkpoint, and scores what ``vilavt tiny eval`` scores."""

import json
import time
from collections import defaultdict

import pytest

BENCHMARK, MODEL = "VilavtTinyHeldout", "ViLaVT-Tiny"
ARGUMENTS = ("--data", BENCHMARK, "--judge", "exact_matching")


def by_kind(reference) -> dict[str, float]:
    """Accuracies as the toolkit's table has them."""
    kinds = defaultdict(list)
    for kind, right in reference:
        kinds["Overall"].append(right)
        kinds[kind].append(right)
    return {kind: sum(rights) / len(rights) for kind, rights in kinds.items()}


@pytest.fixture(scope="module")
def resumed(toolkit, tmp_path_factory):
    """A run that is killed after six answers, and the same command again."""
    folder = tmp_path_factory.mktemp("resumed")
    command = ("-m", "vlmeval", *ARGUMENTS, "--model", MODEL)
    process = toolkit.start(folder, *command)
    deadline = time.monotonic() + 240
    while len(toolkit.rows(folder, MODEL, BENCHMARK)) < 6:
        assert process.poll() is None, toolkit.log(folder)
        assert time.monotonic() < deadline, toolkit.log(folder)
        time.sleep(0.02)
    process.kill()
    process.wait()
    folder.joinpath("first.json").write_text(json.dumps(toolkit.rows(folder, MODEL, BENCHMARK)))
    return toolkit.run(folder, *command)


def test_the_score_is_that_of_vilavt_tiny_eval(toolkit, resumed, reference):
    assert toolkit.table(resumed, MODEL, BENCHMARK) == pytest.approx(by_kind(reference), abs=1e-12)
    assert toolkit.status(resumed, MODEL)[BENCHMARK]["status"] == "done"


def test_after_a_kill_only_what_is_missing_is_asked(toolkit, resumed, reference):
    first = json.loads(resumed.joinpath("first.json").read_text())
    rows = toolkit.rows(resumed, MODEL, BENCHMARK)
    assert 6 <= len(first) < len(rows) == len(reference)
    assert rows[: len(first)] == first
    assert sorted(int(row["sample_id"]) for row in rows) == list(range(len(reference)))


def test_a_trace_holds_the_whole_conversation(toolkit, resumed):
    rows = toolkit.rows(resumed, MODEL, BENCHMARK)
    row = next(r for r in rows if len(r["turns"]) > 1 and len(r["image_files"]) == 1)
    assert row["turns"][0]["action"]["type"] == "tool_call"
    assert row["turns"][0]["action"]["query"]
    assert row["turns"][-1]["text"].endswith(f"<answer>{row['answer']}</answer>")
    assert row["finish"] == "answer"
    assert row["error"] is None
    assert [image["kind"] for image in row["images"]][:2] == ["original", "crop"]
    assert row["image_files"] == [str(toolkit.data / "images" / BENCHMARK / f"{row['sample_id']}-0.png")]
    assert row["provenance"]["seed"] is not None
    assert len(row["provenance"]["fingerprint"]) == 64


@pytest.mark.nightly("two more processes of the toolkit")
def test_two_ranks_give_the_table_of_one_through_the_wrapper_without_the_hook(toolkit, resumed, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    wrapper = ("-m", "vilavt_vlmeval", *ARGUMENTS, "--model", MODEL)
    toolkit.run(tmp_path, *torchrun, *wrapper, VILAVT_VLMEVAL_AUTOLOAD="0")
    assert toolkit.table(tmp_path, MODEL, BENCHMARK) == toolkit.table(resumed, MODEL, BENCHMARK)
    alone, together = (toolkit.rows(folder, MODEL, BENCHMARK) for folder in (resumed, tmp_path))
    assert {r["key"]: r["answer"] for r in alone} == {r["key"]: r["answer"] for r in together}
    files = [path.read_text().splitlines() for path in (tmp_path / "vilavt_traces").iterdir()]
    assert sorted(map(len, files)) == [len(alone) // 2, (len(alone) + 1) // 2]


@pytest.mark.engine
@pytest.mark.parametrize(
    "backends",
    [
        ["by-server"],
        pytest.param(
            ["by-vllm", "by-server"], marks=pytest.mark.nightly("one more engine; test_evaluation.py has one")
        ),
    ],
    ids=" and ".join,
)
def test_vllm_and_a_server_give_the_same_score_from_a_config_file(
    toolkit, server, resumed, vllm_settings, tmp_path, backends
):
    engine = {"enforce_eager": True, "block_size": 32, "max_num_seqs": 8, "disable_log_stats": True}
    models = {
        "by-vllm": {"checkpoint": "tiny", "backend": "vllm", "dtype": "float32", "engine": engine},
        "by-server": {"backend": server.url},
    }
    models = {name: models[name] for name in backends}
    models = {name: {"class": "ViLaVT", "name": name, **settings} for name, settings in models.items()}
    data = {BENCHMARK: {"class": "CustomMCQDataset", "dataset": BENCHMARK}}
    (tmp_path / "config.json").write_text(json.dumps({"model": models, "data": data}))
    arguments = ("--config", "config.json", "--judge", "exact_matching", "--api-nproc", "8")
    toolkit.run(tmp_path, "-m", "vlmeval", *arguments, **vllm_settings, VILAVT_API_KEY=server.key)
    expected = toolkit.table(resumed, MODEL, BENCHMARK)
    for model in models:
        assert toolkit.table(tmp_path, model, BENCHMARK) == expected
        rows = toolkit.rows(tmp_path, model, BENCHMARK)
        assert len(rows) == len(toolkit.rows(resumed, MODEL, BENCHMARK))
        assert {row["provenance"]["attention"] for row in rows} == {"vllm"}
