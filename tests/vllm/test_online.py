"""`AsyncVilavtLLM`: conversations over vLLM's async engine, streamed, cancelled and continued."""

import asyncio
import json
import threading
from pathlib import Path

import pytest
from family import picture

from vilavt_core.driver import Driver
from vilavt_core.results import AnswerEvent, CropsEvent, Finished, Sample, TextDelta, ToolCallEvent
from vilavt_vllm import AsyncVilavtLLM
from vilavt_vllm.episodes import to_prompt

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "vilavt-tiny"
ASKED = json.loads((EXAMPLES / "pictures" / "questions.json").read_text())[:3]  # of one picture


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def llm(loop):
    engine = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "gpu_memory_utilization": 0.3}

    async def begin():
        return AsyncVilavtLLM.from_checkpoint(str(CHECKPOINT), engine_args=engine)

    llm = loop.run_until_complete(begin())
    yield llm
    llm.shutdown()
    loop.run_until_complete(asyncio.sleep(0))  # vLLM's reader of outputs is cancelled; here it notices


@pytest.fixture
def finish(loop):
    """Runs a coroutine to its end, or tells at which of its awaits it hangs."""
    return lambda coroutine: loop.run_until_complete(asyncio.wait_for(coroutine, 240))


def sample(number: int) -> Sample:
    asked = ASKED[number]
    return Sample([EXAMPLES / "pictures" / asked["image"]], asked["question"], id=asked["image"])


async def events_of(llm, run):
    return [event async for event in llm.events(run)]


def test_events_arrive_in_order_and_the_text_is_whole(finish, llm):
    events = finish(events_of(llm, Driver(sample(0), llm.settings, stream=True)))
    result = events[-1].result
    assert isinstance(events[-1], Finished)
    assert result.answer == ASKED[0]["answer"]
    kinds = [type(event) for event in events if not isinstance(event, TextDelta)]
    assert kinds == [ToolCallEvent, CropsEvent] * (len(result.turns) - 1) + [AnswerEvent, Finished]
    assert sum(isinstance(event, TextDelta) for event in events) > 2 * len(result.turns)
    for turn in result.turns:
        text = "".join(event.text for event in events if isinstance(event, TextDelta) and event.turn == turn.index)
        assert text == turn.text


def test_many_at_once_give_the_answers_of_one_after_the_other(finish, llm):
    async def both():
        together = await llm.ask_many([*map(sample, range(3)), Sample(["/no/such"], "What?")])
        return together, [(await llm.ask_many([sample(i)]))[0] for i in range(3)]

    together, alone = finish(both())
    assert [r.answer for r in together[:3]] == [r.answer for r in alone] == [asked["answer"] for asked in ASKED]
    assert "no such file" in str(together[3].error)


def test_a_follow_up_continues_the_stream_and_computes_only_what_it_adds(finish, llm):
    async def talk():
        first = Driver(sample(1), llm.settings)
        await events_of(llm, first)
        second = await llm.follow_up(first, Sample([], ASKED[1]["question"]))
        await events_of(llm, second)
        return first, second

    first, second = finish(talk())
    before = first.result.record.token_ids
    assert second.result.record.token_ids[: len(before)] == before
    assert second.result.answer is not None
    new = len(second.result.record.token_ids) - len(before)
    computed = second.work.tokens_prefilled + second.work.tokens_decoded
    assert computed <= new + 32 * len(second.result.turns)


def test_cancelling_a_task_aborts_its_request_and_the_engine_goes_on(finish, llm):
    async def cancel():
        run, seen = Driver(sample(0), llm.settings, stream=True), asyncio.Event()

        async def watch():
            async for event in llm.events(run):
                if isinstance(event, TextDelta):
                    seen.set()
            return event

        task = asyncio.create_task(watch())
        text = asyncio.create_task(seen.wait())
        await asyncio.wait([text, task], return_when=asyncio.FIRST_COMPLETED)
        assert text.done(), f"it ended before it said anything: {task.result()}"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(50):
            if not llm.engine.output_processor.has_unfinished_requests():
                break
            await asyncio.sleep(0.1)
        return llm.engine.output_processor.has_unfinished_requests(), (await llm.ask_many([sample(0)]))[0]

    unfinished, result = finish(cancel())
    assert not unfinished
    assert result.answer == ASKED[0]["answer"]


def test_pictures_are_encoded_in_the_one_thread_that_vllm_has_for_them(finish, llm, monkeypatch):
    processor, threads = llm.engine.renderer.mm_processor, set()

    def watched(*args, **kwargs):
        threads.add(threading.get_ident())
        return type(processor).apply(processor, *args, **kwargs)

    monkeypatch.setattr(processor, "apply", watched)

    async def ask():
        own = asyncio.get_running_loop().run_in_executor(llm.engine.renderer._mm_executor, threading.get_ident)
        return await own, await llm.ask_many([sample(0), sample(1)])

    thread, results = finish(ask())
    assert [result.answer for result in results] == [asked["answer"] for asked in ASKED[:2]]
    assert threads == {thread}


def test_a_picture_that_vllm_takes_for_sent_already_is_sent_again(finish, llm):
    async def ask():
        question = Sample([picture(77, 112, 112)], "What is it?")
        lost = Driver(question, llm.settings)
        lost.start()
        # Its client hangs up here: rendered, and never handed to the engine.
        await llm.engine.renderer.render_cmpl_async([to_prompt(lost.request)])
        return (await llm.ask_many([question]))[0]

    result = finish(ask())
    assert result.error is None
    assert result.turns
