"""Backends by name: a local model, and a server spoken to through the ordinary OpenAI client."""

import base64
import io
import json
import threading
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

from vilavt_core.backends import BackendOptions, backends, open_backend
from vilavt_core.client import ServerClient
from vilavt_core.errors import EngineError, StateError
from vilavt_core.presets import PRESETS, Limits
from vilavt_core.regions import Picture, PixelBounds
from vilavt_core.results import (
    AnswerEvent,
    ChatResult,
    CropsEvent,
    Finished,
    Intervention,
    Provenance,
    Sample,
    TextDelta,
    ToolCallEvent,
)
from vilavt_hf.chat import VilavtChat

TINY = str(Path(__file__).parents[2] / "examples" / "vilavt-tiny")
PICTURE = Path(__file__).parents[2] / "examples" / "pictures" / "scene-1.png"


def answers(backend, samples):
    return dict(backend.iter_many(samples))


def test_the_backends_of_this_package_are_entry_points():
    assert {"hf", "server"} <= set(backends())
    assert backends()["hf"].dist.name == "vilavt-hf"


def test_a_local_backend_is_a_chat_with_the_changes_asked_for():
    options = BackendOptions(
        limits={"max_turns": 2}, sampling={"temperature": 0.5}, seed=3, concurrency=4, dtype="float32"
    )
    chat, plain = open_backend(TINY, "hf", options), VilavtChat.from_pretrained(TINY)
    assert isinstance(chat, VilavtChat)
    assert chat.settings.limits == replace(plain.settings.limits, max_turns=2)
    assert chat.settings.sampling == replace(plain.settings.sampling, temperature=0.5)
    assert (chat.settings.seed, chat.concurrency) == (3, 4)
    result = answers(chat, [Sample([PICTURE], "Which digit is on the blue card?", id="a")])[0]
    assert result.provenance == chat.provenance(Sample([], "", id="a").seed_from(3))


def test_a_local_backend_is_asked_in_another_way_as_if_it_had_been_opened_so():
    chat = open_backend(TINY, options=BackendOptions(limits={"max_turns": 3}))
    before = chat.settings
    changes = {"limits": {"max_pixels": 10_000}, "sampling": {"temperature": 0.5}}
    other = chat.varied(**changes)
    assert other.model is chat.model
    assert chat.settings is before
    assert other.settings.limits == replace(before.limits, max_pixels=10_000)
    for name in PRESETS:
        preset = BackendOptions(preset=name).preset_for(TINY)
        opened = open_backend(TINY, options=BackendOptions(preset=name, **changes))
        assert chat.varied(preset=preset, **changes).provenance(0) == opened.provenance(0)
    conversation = chat.varied(sampling={"temperature": 1.5}).conversation(PICTURE, seed=3)
    result = conversation.ask("Which digit is on the blue card?")
    conversation.close()
    assert result.provenance.sampling.temperature == 1.5
    again = open_backend(TINY, options=BackendOptions(limits={"max_turns": 3}, sampling={"temperature": 1.5}))
    assert [turn.text for turn in result.turns] == [
        turn.text for turn in again.ask(PICTURE, "Which digit is on the blue card?", seed=3).turns
    ]


@pytest.mark.parametrize(
    "model, name, options, words",
    [
        (TINY, "nope", {}, "no backend 'nope' is installed"),
        ("http://127.0.0.1:1/v1", "hf", {}, "does not fit"),
        (TINY, "server", {}, "does not fit"),
        ("http://127.0.0.1:1/v1", None, {}, "no vilavt-serve of this version answers"),
        ("http://127.0.0.1:1/v1", None, {"dtype": "float16"}, "does not support dtype='float16'"),
        ("http://127.0.0.1:1/v1", None, {"limits": {"min_pixels": 9}}, "restart the server"),
    ],
)
def test_what_cannot_be_opened_is_refused_with_the_remedy(model, name, options, words):
    with pytest.raises(EngineError, match=words):
        open_backend(model, name, BackendOptions(**options))


def test_unknown_limits_and_sampling_are_refused_by_name():
    with pytest.raises(EngineError, match="unknown limits max_turn;"):
        BackendOptions(limits={"max_turn": 2})
    with pytest.raises(EngineError, match="unknown sampling heat;"):
        BackendOptions(sampling={"heat": 2})


def test_a_missing_vllm_backend_says_what_to_install(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda **_: [])
    with pytest.raises(EngineError, match="pip install vilavt-vllm"):
        open_backend(TINY, "vllm")


def test_a_provenance_survives_json():
    chat = open_backend(TINY, options=BackendOptions(limits={"max_context": None}))
    provenance = chat.provenance(5)
    assert Provenance.from_json(provenance.to_json()) == provenance


def test_a_server_gets_pictures_question_limits_sampling_and_seed(stub_server):
    options = BackendOptions(limits={"max_turns": 3}, sampling={"temperature": 0.7}, seed=9)
    client = open_backend(stub_server.url, options=options)
    picture = Image.new("RGB", (40, 30), "red")
    sample = Sample([PICTURE, picture, PICTURE.read_bytes()], "What?", id="a", limits=Limits(max_turns=1))
    result = answers(client, [sample])[0]
    (request,) = stub_server.requests
    parts = request["messages"][0]["content"]
    data = [base64.b64decode(part["image_url"]["url"].split(",")[1]) for part in parts[:3]]
    assert data[0] == data[2] == PICTURE.read_bytes()
    assert Image.open(io.BytesIO(data[1])).size == (40, 30)
    assert parts[3] == {"type": "text", "text": "What?"}
    assert request["vilavt"] == {"max_turns": 1}
    assert request["temperature"] == 0.7
    assert request["seed"] == sample.seed_from(9) == result.provenance.seed
    assert result.answer == "A"
    assert result.finish == "answer"
    told = result.to_json()
    assert [turn["action"]["type"] for turn in told["turns"]] == ["tool_call", "answer"]
    assert told["images"][1]["query"] == "digit"
    assert result.thoughts == "I looked."
    assert (result.billed.prompt, result.billed.cached, result.billed.sampled) == (10, 4, 25)
    assert told["provenance"]["checkpoint"] == f"{stub_server.url} stub"
    assert told["provenance"]["fingerprint"] == "f" * 64


def test_a_server_gets_the_bounds_of_each_picture_whoever_says_them(stub_server):
    client = open_backend(stub_server.url)
    image, low, high = Image.open(PICTURE), PixelBounds(max_pixels=784.0), PixelBounds(min_pixels=3136.0)
    carried = [Picture(image, bounds=low), PICTURE, Picture(image, bounds=high)]
    client.ask(carried, "?")
    answers(client, [Sample(carried, "?", bounds=[PixelBounds(), high, low])])
    client.conversation(carried[0]).ask("?", images=carried[2])
    sent = [
        [{key: value for key, value in part.items() if key.endswith("pixels")} for part in parts if "image_url" in part]
        for parts in (request["messages"][0]["content"] for request in stub_server.requests)
    ]
    most, least = {"max_pixels": 784.0}, {"min_pixels": 3136.0}
    assert sent == [[most, {}, least], [{}, least, most], [most, least]]


def test_the_provenance_of_a_server_is_known_before_it_is_asked(stub_server):
    client = ServerClient(stub_server.url, BackendOptions(limits={"max_turns": 3}, sampling={"top_p": 0.5}))
    provenance = client.provenance(7)
    assert (provenance.limits.max_turns, provenance.sampling.top_p, provenance.seed) == (3, 0.5, 7)
    assert provenance.fingerprint == "f" * 64


def test_a_server_that_runs_another_preset_is_refused(stub_server):
    with pytest.raises(EngineError, match="runs the preset 'default', 'rl' was asked for"):
        ServerClient(stub_server.url, BackendOptions(preset="rl"))


def test_a_request_that_fails_stops_no_other_and_no_answer_is_none(stub_server):
    stub_server.answer = lambda request: {"b": 400, "c": None}.get(request["messages"][0]["content"][-1]["text"], "7")
    samples = [Sample([], name, id=name) for name in "abcd"]
    found = answers(ServerClient(stub_server.url), [*samples, Sample(["missing.png"], "e", id="e")])
    assert [found[place].answer for place in range(5)] == ["7", None, None, "7", None]
    assert [found[place].finish for place in range(5)] == ["answer", "error", "turn_limit", "answer", "error"]
    assert "sample b" in str(found[1].error)
    assert "told to fail" in str(found[1].error)
    assert "missing.png" in str(found[4].error)


def test_questions_are_asked_side_by_side_and_drawn_when_their_turn_comes(stub_server):
    drawn, together = [], threading.Barrier(3)
    stub_server.answer = lambda request: str(together.wait(10) >= 0)

    def samples():
        for i in range(6):
            drawn.append(i)
            yield Sample([], str(i), id=str(i))

    client = ServerClient(stub_server.url, BackendOptions(concurrency=3))
    results = client.iter_many(samples())
    next(results)
    assert len(drawn) == 3
    assert {place for place, _ in results} <= set(range(6))
    assert len(drawn) == 6


def test_the_key_comes_from_the_environment_or_the_options_and_never_from_openai(stub_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "for-the-judge")
    answers(ServerClient(stub_server.url), [Sample([], "a")])
    monkeypatch.setenv("VILAVT_API_KEY", "ours")
    answers(ServerClient(stub_server.url), [Sample([], "a")])
    answers(ServerClient(stub_server.url, BackendOptions(engine={"api_key": "given"})), [Sample([], "a")])
    assert stub_server.keys == ["Bearer none", "Bearer ours", "Bearer given"]


def test_a_streamed_answer_of_a_server_has_the_events_of_any_backend(stub_server):
    client = ServerClient(stub_server.url)
    events = list(client.stream(PICTURE, "What?", id="a", seed=3))
    assert [type(event) for event in events] == [TextDelta, ToolCallEvent, CropsEvent, AnswerEvent, Finished]
    assert (events[0].text, events[2].images[0].box) == ("I looked.", (0.0, 0.0, 28.0, 28.0))
    streamed, asked = events[-1].result, client.ask(PICTURE, "What?", id="a", seed=3)
    assert replace(streamed, seconds=0).to_json() == replace(asked, seconds=0).to_json()
    stub_server.answer = lambda request: 500
    with pytest.raises(EngineError, match=r"sample a: .*told to fail"):
        list(ServerClient(stub_server.url, BackendOptions(engine={"max_retries": 0})).stream(PICTURE, "What?", id="a"))


def test_a_conversation_with_a_server_sends_what_was_said(stub_server):
    talk = ServerClient(stub_server.url).conversation(PICTURE)
    assert talk.ask("first").answer == "A"
    assert talk.ask("second", images=PICTURE).answer == "A"
    messages = stub_server.requests[1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "A"
    assert [len(message["content"]) for message in messages[::2]] == [2, 2]
    events = talk.stream("third")
    next(events)
    with pytest.raises(EngineError, match="still being answered"):
        talk.ask("fourth")
    events.close()
    with pytest.raises(EngineError, match="was closed, or an earlier question failed"):
        talk.ask("fourth")


def test_a_conversation_with_a_server_sends_the_state_of_its_last_answer(stub_server):
    client = ServerClient(stub_server.url, BackendOptions(limits={"max_turns": 3}))
    talk = client.conversation(PICTURE)
    talk.ask("first")
    list(talk.stream("second"))
    talk.ask("third")
    client.ask(PICTURE, "another")
    sent = [request["vilavt"] for request in stub_server.requests]
    limits = {"max_turns": 3}
    assert sent == [limits, {**limits, "state": "state-1"}, {**limits, "state": "state-3"}, limits]


@pytest.mark.parametrize("stream", [False, True])
def test_a_state_that_a_server_refuses_is_left_out_with_a_warning(stub_server, stream, caplog):
    """The server was started again without the key that others share: better without zooms than not at all."""
    refusal = StateError("vilavt.state was signed with another key")
    stub_server.answer = lambda request: refusal if "state" in request["vilavt"] else "A"
    talk = ServerClient(stub_server.url).conversation(PICTURE)
    talk.ask("first")
    again = [*talk.stream("second")][-1].result if stream else talk.ask("second")
    assert again.answer == "A"
    assert ["state" in request["vilavt"] for request in stub_server.requests] == [False, True, False]
    assert stub_server.requests[1]["messages"] == stub_server.requests[2]["messages"]
    (warning,) = caplog.records
    assert "goes on without its zooms" in warning.getMessage()
    assert "signed with another key" in warning.getMessage()


def test_any_other_refusal_is_an_error_at_once(stub_server):
    talk = ServerClient(stub_server.url, BackendOptions(engine={"max_retries": 0})).conversation(PICTURE)
    talk.ask("first")
    stub_server.answer = lambda request: EngineError("no")
    with pytest.raises(EngineError, match="no"):
        talk.ask("second")
    assert len(stub_server.requests) == 2


def test_a_server_refuses_interventions(stub_server):
    with pytest.raises(EngineError, match="a server does not support interventions"):
        list(ServerClient(stub_server.url).iter_many([], intervention=Intervention()))


def test_a_result_survives_json(stub_server):
    request = {"seed": 1, "messages": [{"content": [{"text": "?"}]}]}
    for answer in ("7", None):
        result = stub_server.result(request, answer)
        again = ChatResult.from_json(json.loads(json.dumps(result.to_json())))
        assert again.to_json() == result.to_json()
        assert [turn.action for turn in again.turns] == [turn.action for turn in result.turns]
