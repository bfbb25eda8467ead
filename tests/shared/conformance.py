"""What every backend is held to, whatever computes: the suite of `vilavt_core.backends.Backend`.

It asks the shipped tiny checkpoint about the demo pictures. An async backend is wrapped by `Synchronous`.
"""

import asyncio
import inspect
import io
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from clips import clip
from PIL import Image

from vilavt_core.backends import Backend
from vilavt_core.errors import EngineError, ImageError
from vilavt_core.presets import Limits
from vilavt_core.regions import Picture, PixelBounds
from vilavt_core.results import (
    AnswerEvent,
    CropsEvent,
    Finished,
    Intervention,
    Provenance,
    Sample,
    TextDelta,
    ToolCallEvent,
)
from vilavt_core.sources import Video

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
ASKED = json.loads((PICTURES / "questions.json").read_text())[:3]  # of one picture
METHODS = ("ask", "ask_many", "iter_many", "stream", "conversation", "provenance")


class Synchronous:
    """An async backend, called from ordinary code on one event loop."""

    def __init__(self, backend: Any, loop: asyncio.AbstractEventLoop) -> None:
        vars(self).update(_backend=backend, _loop=loop)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._backend, name, value)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name == "conversation":
            return lambda *args, **kwargs: Synchronous(found(*args, **kwargs), self._loop)
        if inspect.isasyncgenfunction(found):
            return lambda *args, **kwargs: self._drawn(found(*args, **kwargs))
        if name == "stream":  # of a conversation: returns an async generator
            return lambda *args, **kwargs: self._drawn(found(*args, **kwargs))
        if inspect.iscoroutinefunction(found):
            return lambda *args, **kwargs: self._loop.run_until_complete(found(*args, **kwargs))
        return found

    def _drawn(self, generator: Any) -> Any:
        try:
            while True:
                try:
                    yield self._loop.run_until_complete(anext(generator))
                except StopAsyncIteration:
                    return
        finally:
            self._loop.run_until_complete(generator.aclose())


def picture(number: int) -> Path:
    """Of a demo question."""
    return PICTURES / ASKED[number]["image"]


def signatures_are_those_of_the_protocol(backend: type, protocol: type = Backend) -> None:
    """The same names, arguments, kinds and defaults."""
    for name in METHODS:
        wanted = list(inspect.signature(getattr(protocol, name)).parameters.values())
        given = list(inspect.signature(getattr(backend, name)).parameters.values())
        told = [[(p.name, p.kind, p.default) for p in parameters] for parameters in (wanted, given)]
        assert told[0] == told[1], f"{backend.__name__}.{name}"
        is_async = [inspect.iscoroutinefunction(getattr(kind, name)) for kind in (protocol, backend)]
        assert is_async[0] == is_async[1], f"{backend.__name__}.{name}"


def conforms(backend: Backend, *, local: bool = False, pixels: bool = True) -> None:
    """Run the whole suite.

    Args:
        backend: over ``examples/vilavt-tiny``, in fp32.
        local: whether it takes interventions.
        pixels: whether its results hold pictures and token streams (a server's do not).
    """
    results = _asks(backend, pixels)
    _streams(backend, results, pixels)
    _continues(backend)
    _heeds_samples(backend)
    _fails_alone(backend)
    _leaves_early(backend)
    if find_spec("av") is not None:  # a distribution may be tested without the extra
        _sees_videos(backend)
    assert isinstance(backend.provenance(3), Provenance)
    assert backend.provenance(3, Limits(max_turns=2)).limits.max_turns == 2
    if not local:
        with pytest.raises(EngineError, match="does not support interventions"):
            list(backend.iter_many([], intervention=Intervention()))


def _asks(backend: Backend, pixels: bool) -> list[Any]:
    many = backend.ask_many(
        [(picture(0), ASKED[0]["question"]), *(Sample([picture(i)], ASKED[i]["question"], id=f"q{i}") for i in (1, 2))]
    )
    assert [result.answer for result in many] == [asked["answer"] for asked in ASKED]
    for number, result in enumerate(many):
        assert (result.finish, result.error, result.question) == ("answer", None, ASKED[number]["question"])
        assert result.sample_id == (f"q{number}" if number else None)
        assert [turn.index for turn in result.turns] == list(range(len(result.turns)))
        assert len(result.turns) > 1
        assert result.turns[-1].action.text == result.answer
        crops = [image for image in result.images if image.kind == "crop"]
        assert crops
        assert all(image.query and image.parent is not None and image.width % 28 == 0 for image in crops)
        assert result.thoughts.count("\n") == len(result.turns) - 1
        assert result.seconds > 0
        assert result.episode.usage.sampled_tokens == sum(turn.token_count for turn in result.turns)
        assert (result.record is not None, len(result.views)) == (pixels, len(result.images) * pixels)
        assert result.provenance.seed == Sample([], "", id=result.sample_id).seed_from(0)
        json.dumps(result.to_json())
    alone = backend.ask(picture(1), ASKED[1]["question"], id="q1")
    assert [turn.text for turn in alone.turns] == [turn.text for turn in many[1].turns]
    places = dict(backend.iter_many((picture(i), ASKED[i]["question"]) for i in range(3)))
    assert {place: result.answer for place, result in places.items()} == {i: ASKED[i]["answer"] for i in range(3)}
    return many


def _sees_videos(backend: Backend) -> None:
    scene = clip([Image.open(picture(2)).convert("RGB")] * 10, codec="libx264rgb", pix_fmt="rgb24")  # without loss
    for video in (Video(scene, frames=2), [Video(io.BytesIO(scene), fps=1)]):
        result = backend.ask(video, ASKED[2]["question"])
        assert result.answer == ASKED[2]["answer"]
        originals = [image for image in result.images if image.kind == "original"]
        assert [image.time for image in originals] == ([0, 0.9] if len(originals) == 2 else [0])
    broken = backend.ask_many([(Video(b"none", frames=1), "?"), (Video(scene, frames=1), ASKED[2]["question"])])
    assert [type(result.error) for result in broken] in ([ImageError, type(None)], [EngineError, type(None)])
    assert "not a video that can be read" in str(broken[0].error)
    assert broken[1].answer == ASKED[2]["answer"]


def _streams(backend: Backend, results: list[Any], pixels: bool) -> None:
    events = list(backend.stream(picture(2), ASKED[2]["question"], id="q2", seed=5))
    kinds = [type(event) for event in events if not isinstance(event, TextDelta)]
    result = events[-1].result
    assert kinds == [ToolCallEvent, CropsEvent] * (len(result.turns) - 1) + [AnswerEvent, Finished]
    assert [turn.text for turn in result.turns] == [turn.text for turn in results[2].turns]
    assert (result.sample_id, result.provenance.seed) == ("q2", 5)
    crops = next(event for event in events if isinstance(event, CropsEvent))
    assert crops.images == tuple(result.images[image.index] for image in crops.images)
    assert len(crops.views) == len(crops.images) * pixels
    assert {event.turn for event in events if isinstance(event, TextDelta)} == set(range(len(result.turns)))


def _continues(backend: Backend) -> None:
    talk = backend.conversation(picture(1))
    first = talk.ask(ASKED[1]["question"])
    assert first.answer == ASKED[1]["answer"]
    second = list(talk.stream(ASKED[1]["question"]))[-1].result
    assert [turn.index for turn in second.turns] == list(range(len(second.turns)))
    assert len(second.images) >= len(first.images)
    third = talk.ask(ASKED[0]["question"], images=picture(0))
    assert sum(image.kind == "original" for image in third.images) == 2
    with pytest.raises(ImageError, match="missing"):
        talk.ask("?", images="/missing.png")
    events = talk.stream(ASKED[1]["question"])
    next(events)
    with pytest.raises(EngineError, match="still being answered"):
        talk.ask("?")
    events.close()
    with pytest.raises(EngineError, match="was closed, or an earlier question failed"):
        talk.ask("?")
    closed = backend.conversation(picture(1))
    closed.close()
    with pytest.raises(EngineError, match="was closed"):
        closed.ask("?")


def _heeds_samples(backend: Backend) -> None:
    """Everything that a `Sample` and a `Picture` say has its effect: alone, among others, in a follow-up."""
    small, plain = Image.open(picture(0)).convert("RGB"), Image.open(picture(1)).convert("RGB")
    low, high = PixelBounds(max_pixels=9 * 784), PixelBounds(min_pixels=30 * 784)
    icon = plain.resize((56, 56))
    one_turn = _one_turn(backend)
    said = Sample([small, icon, plain], "Which?", id="own", seed=7, limits=one_turn, bounds=[low, high, PixelBounds()])
    carried = replace(said, images=[Picture(small, bounds=low), Picture(icon, bounds=high), plain], bounds=())
    over = replace(carried, bounds=[PixelBounds(), low, high])  # a sample's bounds win over its pictures'
    usual = replace(said, bounds=())
    results = backend.ask_many([said, carried, over, usual])
    shown = [[image.width * image.height for image in result.images] for result in results]
    full, tiny = shown[3][0], shown[3][1]
    assert full > 9 * 784
    assert tiny == 4 * 784
    assert shown[0] == shown[1]
    assert shown[0][0] <= 9 * 784
    assert shown[0][1] >= 30 * 784
    assert shown[0][2] == full
    assert shown[2][:2] == [full, tiny]
    assert shown[2][2] == full
    for result in results:
        assert (result.sample_id, result.provenance.seed, len(result.turns)) == ("own", 7, 1)
        assert result.provenance.limits.max_turns == 1
    talk = backend.conversation(Picture(small, bounds=low), limits=one_turn)
    first = talk.ask("Which?")
    second = talk.ask("And this?", images=[Picture(icon, bounds=high), plain])
    assert first.images[0].width * first.images[0].height == shown[0][0]
    assert [image.width * image.height for image in second.images] == shown[0]
    streamed = list(backend.stream([Picture(small, bounds=low)], "Which?", limits=one_turn))[-1].result
    assert [image.width * image.height for image in streamed.images] == shown[0][:1]


def _fails_alone(backend: Backend) -> None:
    missing = Sample(["/no/such.png"], "What?", id="gone")
    limited = Sample([picture(0)], ASKED[0]["question"], id="short", limits=_one_turn(backend))
    results = backend.ask_many([missing, (picture(0), ASKED[0]["question"]), limited])
    assert isinstance(results[0].error, ImageError)
    assert (results[0].finish, results[0].answer, results[0].turns, results[0].images) == ("error", None, (), ())
    assert "such.png" in str(results[0].error)
    assert results[1].answer == ASKED[0]["answer"]
    assert len(results[2].turns) == 1
    with pytest.raises(ImageError, match=r"such\.png"):
        backend.ask("/no/such.png", "What?")
    with pytest.raises(ImageError, match=r"such\.png"):
        list(backend.stream("/no/such.png", "What?"))


def _one_turn(backend: Backend) -> Limits:
    return replace(backend.provenance(0).limits, max_turns=1)


def _leaves_early(backend: Backend) -> None:
    drawn = []

    def samples():
        for number in range(40):
            drawn.append(number)
            yield Sample([picture(number % 3)], ASKED[number % 3]["question"], id=str(number))

    before, backend.concurrency = backend.concurrency, 2
    try:
        results = backend.iter_many(samples())
        next(results)
        results.close()
        assert len(drawn) < 10, "samples are drawn when their turn comes"
        assert backend.ask(picture(0), ASKED[0]["question"]).answer == ASKED[0]["answer"]
    finally:
        backend.concurrency = before
