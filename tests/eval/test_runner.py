"""Runs: what is written per question, shared work, interruptions, and results that belong to another run."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from vilavt_core.conversation import Result, Usage
from vilavt_core.errors import EngineError, EvaluationError
from vilavt_core.presets import Limits, Sampling
from vilavt_core.protocol import FinishReason
from vilavt_core.results import ChatResult, Provenance, Work
from vilavt_eval.ablation import Ablation
from vilavt_eval.definition import load_benchmark
from vilavt_eval.evaluation_preset import EvaluationPreset
from vilavt_eval.questions import Questions
from vilavt_eval.ray_data import Cluster
from vilavt_eval.result_file import lines
from vilavt_eval.runner import Setting, asking, run
from vilavt_eval.sharding import Presence, Shard, take_own_gpu

SETTING = Setting("a-model", "hf", EvaluationPreset.load("default"))
SETTINGS = {
    "name": "made-up",
    "title": "made up",
    "file": "questions.jsonl",
    "options": "question",
    "default_type": "numerical",
    "types": {"numerical": {"metric": "numerical"}},
}


class Fake:
    """Answers out of order, four questions at a time; `fail` decides which fail, `seconds` how long one takes."""

    concurrency = 4
    timings = None

    def __init__(self, seconds: float = 0.0, padding: int = 0):
        self.asked, self.samples, self.seconds, self.padding = [], [], seconds, padding
        self.fail = lambda sample: False

    def provenance(self, seed, limits=None):
        return Provenance(
            "default", limits or Limits(), Sampling(), seed, "default", "0" * 64, "here", "f" * 64, "float32", "cpu",
            "sdpa", {"torch": "2"},
        )  # fmt: skip

    def iter_many(self, samples, **hooks):
        window = []
        for place, sample in enumerate(samples):
            self.asked.append(sample.id)
            window.append((place, sample))
            if len(window) == self.concurrency:
                yield from self._answer(window)
        yield from self._answer(window)

    def _answer(self, window):
        while window:
            place, sample = window.pop()
            time.sleep(self.seconds)
            error = EngineError("out of memory") if self.fail(sample) else None
            answer = f"{sample.question} {sample.seed}" + "x" * self.padding
            provenance = self.provenance(0)
            usage = Usage(2, 1, 0, 0, 1)
            episode = Result(
                answer, FinishReason.ANSWER, "", (), (), (), (), usage, "default", Limits(), "default", "0" * 64, {}
            )
            yield (
                place,
                ChatResult(
                    sample.question, sample.id, None if error else episode, None, provenance, Work(), 0.5, error=error
                ),
            )


@pytest.fixture
def make(tmp_path):
    def make(count: int = 23, text: str = "how many {}?", **settings) -> Questions:
        (tmp_path / "bench.yaml").write_text(yaml.safe_dump(SETTINGS | settings))
        with (tmp_path / "questions.jsonl").open("w") as file:
            for i in range(count):
                record = {
                    "response": "an old one",
                    "finish": "?",
                    "question_id": f"q{i}",
                    "question": text.format(i),
                    "answer": str(i),
                    "images": ["a.png"],
                }
                file.write(json.dumps(record | {"kind": "even" if i % 2 == 0 else "odd", "thought": "leak"}) + "\n")
        return Questions(load_benchmark(tmp_path / "bench.yaml"), tmp_path)

    return make


def go(questions, out, backend=None, setting=SETTING, seed=0, **more):
    backend = backend or Fake()
    return run(
        setting,
        questions,
        out,
        provenance=backend.provenance(seed),
        ask=asking(backend, setting, seed),
        seed=seed,
        **more,
    )


def rows(path):
    """Run line and rows without timings."""
    return [{k: v for k, v in line.data.items() if "seconds" not in k} for line in lines(path)]


def test_a_row_holds_the_record_the_bare_answer_and_what_it_cost(make, tmp_path):
    outcome = go(make(3), tmp_path / "out", seed=7)
    assert outcome.path == tmp_path / "out" / "made-up" / "default-seed7.jsonl"
    assert (outcome.complete, outcome.asked, outcome.failed) == (True, 3, 0)
    header, first, *_ = (line.data for line in lines(outcome.path))
    assert first["question_id"] == "q0"
    assert first["response"].startswith("how many 0?")
    assert (first["answer"], first["problem_type"], first["kind"], first["seed"]) == ("0", "numerical", "even", 7)
    assert (first["finish"], first["error"], first["images"], first["seconds"]) == ("answer", None, ["a.png"], 0.5)
    assert (first["usage"]["prompt_tokens"], first["billed"]["prompt"]) == (2, 0)
    assert "thought" not in first
    told = header["run"]
    assert told["benchmark"]["name"] == "made-up"
    assert len(told["benchmark"]["questions_sha256"]) == 64
    assert told["preset"]["limits"]["max_turns"] == 5
    assert told["preset"]["prompts_sha256"] == told["provenance"]["prompts_sha256"] == "0" * 64
    assert told["provenance"]["versions"] == {"torch": "2"}
    assert (told["seed"], told["ablation"], told["shard"], told["format"]) == (7, None, None, 1)


def test_the_merged_file_has_the_order_of_the_questions_whatever_order_they_were_answered_in(make, tmp_path):
    backend, questions = Fake(), make()
    outcome = go(questions, tmp_path / "out", backend)
    assert [r["question_id"] for r in rows(outcome.path)[1:]] == [q.id for q in questions]
    assert [p.name for p in outcome.path.parent.glob("*.jsonl")] == [outcome.path.name]


def test_four_shards_in_any_order_give_the_file_of_one(make, tmp_path):
    questions = make()
    alone = go(questions, tmp_path / "alone")
    outcomes = [go(questions, tmp_path / "shared", shard=Shard(i, 4)) for i in (2, 0, 3, 1)]
    assert [outcome.complete for outcome in outcomes] == [False, False, False, True]
    assert [outcome.asked for outcome in outcomes] == [6, 6, 5, 6]
    assert rows(outcomes[-1].path) == rows(alone.path)


def test_the_number_of_shards_may_change_between_interruptions(make, tmp_path):
    questions = make()
    go(questions, tmp_path / "out", shard=Shard(1, 3))
    backend = Fake()
    outcome = go(questions, tmp_path / "out", backend)
    assert sorted(backend.asked) == sorted(q.id for i, q in enumerate(questions) if i % 3 != 1)
    assert outcome.complete
    assert rows(outcome.path) == rows(go(questions, tmp_path / "other").path)


def test_a_finished_run_asks_nothing_and_a_larger_limit_asks_the_rest(make, tmp_path):
    questions = make()
    go(questions, tmp_path / "out", limit=5)
    for limit, expected in ((5, 0), (9, 4), (3, 0)):
        backend = Fake()
        outcome = go(questions, tmp_path / "out", backend, limit=limit)
        assert (len(backend.asked), outcome.complete) == (expected, True)
    assert [r["question_id"] for r in rows(outcome.path)[1:]] == [f"q{i}" for i in range(9)]


def test_questions_that_failed_are_asked_again_and_their_new_row_counts(make, tmp_path):
    questions, broken = make(), Fake()
    broken.fail = lambda sample: sample.id in ("q3", "q8")
    outcome = go(questions, tmp_path / "out", broken)
    assert (outcome.complete, outcome.failed) == (True, 2)
    failed = [r for r in rows(outcome.path)[1:] if r["error"]]
    assert [(r["question_id"], r["response"], r["finish"]) for r in failed] == [
        ("q3", "", "error"),
        ("q8", "", "error"),
    ]
    assert "EngineError: out of memory" in failed[0]["error"]
    mended = Fake()
    outcome = go(questions, tmp_path / "out", mended)
    assert sorted(mended.asked) == ["q3", "q8"]
    assert (outcome.complete, outcome.failed) == (True, 0)
    assert rows(outcome.path) == rows(go(questions, tmp_path / "other").path)


def test_an_answer_counts_in_whichever_file_it_stands(make, tmp_path):
    questions, broken = make(4), Fake()
    go(questions, tmp_path / "out", shard=Shard(0, 2))
    (answers,) = (tmp_path / "out" / "made-up").glob("*.jsonl")
    aside = answers.rename(answers.with_suffix(".aside"))
    broken.fail = lambda sample: True
    go(questions, tmp_path / "out", broken, shard=Shard(0, 4))  # fails q0; its file is read last
    aside.rename(answers)
    again = Fake()
    outcome = go(questions, tmp_path / "out", again)
    assert sorted(again.asked) == ["q1", "q3"]
    assert outcome.complete
    assert not [r for r in rows(outcome.path)[1:] if r["error"]]


def test_a_broken_engine_stops_the_run_and_what_was_answered_is_kept(make, tmp_path):
    questions, backend = make(60), Fake()
    backend.fail = lambda sample: int(sample.id[1:]) >= 8
    with pytest.raises(EvaluationError, match=r"20 questions in a row.*out of memory.*same command again"):
        go(questions, tmp_path / "out", backend)
    assert len(backend.asked) < 40
    mended = Fake()
    assert go(questions, tmp_path / "out", mended).complete
    assert sorted(mended.asked) == sorted(f"q{i}" for i in range(8, 60))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: replace(s, preset=s.preset.changed({"max_turns": 2})), "preset.limits.max_turns was 5, now it is 2"),
        (lambda s: replace(s, backend="vllm"), "backend was 'hf', now it is 'vllm'"),
        (
            lambda s: replace(s, engine=(("kv_cache_dtype", "fp8"),)),
            "engine.kv_cache_dtype was None, now it is 'fp8'",
        ),
    ],
)
def test_results_of_another_run_are_refused_with_both_values_and_the_remedy(make, tmp_path, change, said):
    questions = make()
    go(questions, tmp_path / "out", shard=Shard(0, 2))
    with pytest.raises(EvaluationError) as error:
        go(questions, tmp_path / "out", setting=change(SETTING), shard=Shard(1, 2))
    assert said in str(error.value)
    assert "another --out" in str(error.value)
    assert "shard-0-of-2.jsonl" in str(error.value)


def test_engine_options_are_in_the_run_line_without_secrets_and_those_that_place_work_may_change(make, tmp_path):
    questions, options = make(), {"quantization": "fp8", "token": "secret", "hf_overrides": {"a": [1]}}

    def engine(**more):
        return replace(SETTING, engine=tuple((options | more).items()))

    go(questions, tmp_path / "out", setting=engine(tensor_parallel_size=2), shard=Shard(0, 2))
    outcome = go(questions, tmp_path / "out", setting=engine(token="other", max_num_seqs=4), shard=Shard(1, 2))
    told = next(lines(outcome.path)).data["run"]["engine"]
    assert told == {"quantization": "fp8", "hf_overrides": {"a": [1]}, "max_num_seqs": 4}
    with pytest.raises(EvaluationError, match=r"engine\.hf_overrides\.a was \[1\], now it is \[2\]"):
        go(questions, tmp_path / "out", setting=engine(hf_overrides={"a": [2]}))
    served = Setting("http://here/v1", "server", SETTING.preset, engine=(("api_key", "secret"),))
    outcome = go(questions, tmp_path / "served", setting=served)
    assert next(lines(outcome.path)).data["run"]["engine"] == {}


def test_changed_questions_are_another_run(make, tmp_path):
    go(make(4), tmp_path / "out", limit=2)
    with pytest.raises(EvaluationError, match="questions_sha256"):
        go(make(5), tmp_path / "out")


def test_the_same_checkpoint_in_another_place_and_on_another_device_goes_on(make, tmp_path):
    class Moved(Fake):
        def provenance(self, seed, limits=None):
            return replace(super().provenance(seed, limits), checkpoint="there", device="cuda:1")

    go(make(), tmp_path / "out", shard=Shard(0, 2))
    assert go(make(), tmp_path / "out", Moved(), replace(SETTING, model="there")).complete


def test_a_line_that_was_cut_off_is_asked_again(make, tmp_path):
    questions = make()
    go(questions, tmp_path / "out", shard=Shard(0, 2))
    (part,) = (tmp_path / "out" / "made-up").glob("*.shard-0-of-2.jsonl")
    whole = part.read_bytes()
    for cut in (1, 30, len(whole.splitlines()[-1])):
        part.write_bytes(whole[:-cut])
        backend = Fake()
        go(questions, tmp_path / "out", backend, shard=Shard(0, 2))
        assert len(backend.asked) == 1
        assert sorted(r.get("question_id", "") for r in rows(part)) == sorted(
            json.loads(line).get("question_id", "") for line in whole.splitlines()
        )
    part.write_bytes(whole[:20])  # not even the run line is whole
    assert go(questions, tmp_path / "out").complete


def test_a_file_that_something_else_changed_is_named(make, tmp_path):
    questions = make()
    go(questions, tmp_path / "out", shard=Shard(0, 2))
    (part,) = (tmp_path / "out" / "made-up").glob("*.jsonl")
    part.write_text("nonsense\n" + part.read_text())
    with pytest.raises(EvaluationError, match=r"shard-0-of-2\.jsonl, line 1"):
        go(questions, tmp_path / "out")


def _child(folder, out):
    """Asks slowly; started with fork, killed by the parent."""
    questions = Questions(load_benchmark(folder / "bench.yaml"), folder)
    go(questions, out, Fake(seconds=0.004))


def test_killed_at_random_points_and_started_again_it_writes_the_same_file(make, tmp_path):
    questions = make(150)
    expected = rows(go(questions, tmp_path / "alone").path)
    fork, rng, kills = multiprocessing.get_context("fork"), random.Random(0), 0
    out = tmp_path / "out"
    merged = out / "made-up" / "default-seed0.jsonl"
    for _ in range(60):
        process = fork.Process(target=_child, args=(tmp_path, out))
        process.start()
        if kills < 6:
            process.join(rng.uniform(0.02, 0.25))
        process.join(None if kills >= 6 else 0)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += process.exitcode == -signal.SIGKILL
        if merged.is_file():
            break
    assert kills >= 3
    assert rows(merged) == expected


def test_two_processes_cannot_write_one_shard(make, tmp_path, monkeypatch):
    monkeypatch.setattr("vilavt_eval.result_file.PATIENCE", 0.1)
    questions = make()

    class Twice(Fake):
        def iter_many(self, samples, **hooks):
            with pytest.raises(EvaluationError, match=r"is being written by another process.*--shard"):
                go(questions, tmp_path / "out")
            yield from super().iter_many(samples)

    assert go(questions, tmp_path / "out", Twice()).complete


def test_nothing_is_merged_away_while_another_process_is_writing(make, tmp_path):
    questions, broken = make(), Fake()
    broken.fail = lambda sample: sample.id in ("q2", "q5")
    go(questions, tmp_path / "out", broken)

    class First(Fake):
        def iter_many(self, samples, **hooks):
            yield from super().iter_many(samples)
            other = go(questions, tmp_path / "out", shard=Shard(1, 2))  # asks q5, and has a row for every question
            assert other.asked == 1
            assert not other.complete

    outcome = go(questions, tmp_path / "out", First(), shard=Shard(0, 2))
    assert outcome.complete
    assert not [r for r in rows(outcome.path)[1:] if r["error"]]


def test_memory_does_not_grow_with_answers(make, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them take a minute on some disks
    questions = make(600)
    tracemalloc.start()
    outcome = go(questions, tmp_path / "out", Fake(padding=40_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcome.complete
    assert outcome.path.stat().st_size > 24e6
    assert peak < 6e6  # ids and places of rows; the answers are four times that


def test_every_question_has_a_seed_of_its_own_unless_the_preset_gives_all_the_runs(make, tmp_path):
    def seeds(preset, seed):
        backend = Fake()
        samples = []
        ask = asking(backend, replace(SETTING, preset=preset), seed)
        for row in ask(make(4)):
            samples.append(row["response"].rpartition(" ")[2])
        return samples

    own = seeds(SETTING.preset, 0)
    assert len(set(own)) == 4
    assert set(own).isdisjoint(seeds(SETTING.preset, 1))
    assert own == seeds(SETTING.preset, 0)
    assert set(seeds(SETTING.preset.changed({"seeds": "per_run"}), 3)) == {"3"}


def test_a_single_image_comes_first_where_several_stand_between_the_words(make, tmp_path):
    questions = make(1, "<image> how many?", image_marks="interleaved")
    for preset, said in (("default", "how many?"), ("eval-vllm", "<image> how many?")):
        (row,) = asking(Fake(), replace(SETTING, preset=EvaluationPreset.load(preset)), 0)(questions)
        assert row["response"].rpartition(" ")[0] == said


def test_a_server_that_shows_images_first_is_refused_where_they_stand_between_words(make, tmp_path):
    questions, served = make(2, "<image> how many?", image_marks="interleaved"), replace(SETTING, backend="server")
    with pytest.raises(EvaluationError, match=r"made-up puts images between words.*--set interleave=false"):
        go(questions, tmp_path / "out", setting=served)
    for setting in (
        replace(served, preset=EvaluationPreset.load("eval-hf")),
        replace(served, preset=SETTING.preset.changed({"interleave": False})),
    ):
        assert go(questions, tmp_path / "out", setting=setting).complete


def test_an_ablation_has_its_own_file_and_names_itself(make, tmp_path):
    setting = replace(SETTING, ablation=Ablation.parse("no-zoom"))
    outcome = go(make(2), tmp_path / "out", setting=setting)
    assert outcome.path.name == "default-seed0-no-zoom.jsonl"
    assert next(lines(outcome.path)).data["run"]["ablation"] == "no-zoom"


def test_shards_are_shares_by_place():
    assert [list(Shard(i, 3).places(8)) for i in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert Shard.parse("2/4") == Shard(2, 4)
    assert str(Shard(2, 4)) == "2/4"
    for wrong in ("4/4", "1", "a/b", "-1/2", "0/0"):
        with pytest.raises(EvaluationError, match=wrong):
            Shard.parse(wrong)


def test_torchruns_rank_is_the_shard_and_each_rank_sees_its_own_gpu():
    assert Shard.of_launcher({}) == Shard(0, 1)
    assert Shard.of_launcher({"RANK": "3", "WORLD_SIZE": "8"}) == Shard(3, 8)
    for visible, expected in ((None, "1"), ("4,5,6", "5")):
        environment = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"} | (
            {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
        )
        take_own_gpu(environment)
        assert environment["CUDA_VISIBLE_DEVICES"] == expected
    alone = {"CUDA_VISIBLE_DEVICES": "4,5"}
    take_own_gpu(alone)
    assert alone == {"CUDA_VISIBLE_DEVICES": "4,5"}


def test_of_processes_that_share_work_exactly_the_last_to_leave_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr("vilavt_eval.sharding.PATIENCE", 0.1)
    first, second, third = (Presence(tmp_path, ["ERQA", 0], Shard(i, 3)) for i in range(3))
    with first, second, Presence(tmp_path, ["ERQA", 1], Shard(2, 3)):
        with third, pytest.raises(EvaluationError, match=r"another process is asking shard 1/3 of the same.*--shard"):
            Presence(tmp_path, ["ERQA", 0], Shard(1, 3)).__enter__()  # and the third one breaks down
        assert not second.leave()
        assert first.leave()  # whoever asks something else does not matter


def test_a_folder_that_cannot_be_made_is_named(make, tmp_path):
    Path(tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="cannot be made"):
        go(make(1), tmp_path / "file")
    with pytest.raises(EvaluationError, match="file: cannot be made"):
        Presence(tmp_path / "file", [], Shard()).__enter__()


def test_ray_is_an_extra_and_its_absence_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EvaluationError, match=r'pip install "vilavt-hf\[ray\]"'):
        Cluster("local")
