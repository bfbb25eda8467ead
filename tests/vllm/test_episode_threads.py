"""The threads in which a server's episodes load, cut and hash pictures; the engine is a stand-in."""

import asyncio
import json
import runpy
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from vllm.config import ParallelConfig

from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.presets import Limits, get_preset
from vilavt_core.prompts import PromptSet
from vilavt_core.regions import Picture
from vilavt_core.results import Finished, Sample
from vilavt_core.tokenizer import FileTokenizer, SharedTokenizer
from vilavt_vllm import AsyncVilavtLLM

TINY = Path(__file__).parents[2] / "examples" / "vilavt-tiny"
TURNS = (
    '<think>Closer.</think><tool>{"region": [{"index": 0, "bbox_2d": [0, 0, 28, 28]}], "query": "a digit"}</tool>',
    "<think>Red.</think><answer>4</answer>",
)


def settings() -> ConversationSettings:
    preset = get_preset("default")
    tokenizer = SharedTokenizer(FileTokenizer(TINY))
    limits = Limits(max_pixels=64 * 784)
    return ConversationSettings(tokenizer, PromptSet.load("default"), preset, limits, preset.sampling)


async def ends(llm: AsyncVilavtLLM, driver: Driver) -> str | None:
    (end,) = [event async for event in llm.events(driver) if isinstance(event, Finished)]
    assert end.result.error is None
    return end.result.answer


class Engine:
    """Samples `TURNS`, and notes of every inquiry it is shown whether its pictures are named already."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.named, self.renderer = tokenizer, [], SimpleNamespace(render_cmpl_async=self.render)
        self.vllm_config = SimpleNamespace(parallel_config=ParallelConfig())

    async def render(self, prompts, **_):
        (prompt,) = prompts
        self.named.append(["identities" in vars(one) for one in prompt["multi_modal_data"]["image"]])
        return prompts

    async def generate(self, prompt, params, name, **_):
        ids = self.tokenizer.encode(TURNS[int(name.split("-")[1])], split_special_tokens=True)
        completion = SimpleNamespace(token_ids=[*ids, params.stop_token_ids[0]], finish_reason="stop", logprobs=None)
        yield SimpleNamespace(outputs=[completion], finished=True, num_cached_tokens=0)


def test_pictures_are_named_before_they_reach_the_one_thread_of_the_renderer():
    own = settings()
    engine = Engine(own.tokenizer)
    llm = AsyncVilavtLLM(engine, own)
    driver = Driver(Sample([Picture(Image.new("RGB", (64, 64)))], "Which?"), own)
    assert asyncio.run(ends(llm, driver)) == "4"
    assert engine.named == [[True], [True, True]]


def test_two_questions_are_prepared_side_by_side():
    own = settings()
    together = threading.Barrier(2, timeout=60)  # broken unless two threads wait at it at once

    class Waiting(Driver):
        def start(self):
            together.wait()
            return super().start()

    llm = AsyncVilavtLLM(Engine(own.tokenizer), own, threads=2)
    drivers = [Waiting(Sample([Picture(Image.new("RGB", (64, 64)))], "Which?"), own) for _ in range(2)]

    async def both():
        return await asyncio.gather(*(ends(llm, driver) for driver in drivers))

    assert asyncio.run(both()) == ["4", "4"]


def test_the_front_end_benchmark_tells_both_ways_apart(monkeypatch, tmp_path):
    file, script = tmp_path / "figures.json", TINY.parents[1] / "benchmarks" / "front_end.py"
    options = ["--small", "--originals", "3", "--repeats", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [script.name, *options])
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    figures = json.loads(file.read_text())
    for key in ("per_second", "per_second_and_core"):
        assert figures[f"ratio_{key}"] == figures["default"][key] / figures["plain"][key]
