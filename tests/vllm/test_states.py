"""Follow-up questions on another replica, or after a restart: from the state that came with the answer."""

import asyncio
import base64
import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from prometheus_client import REGISTRY
from vllm import __version__ as vllm_version
from vllm.config import ModelConfig
from vllm.lora.request import LoRARequest

from vilavt_core.errors import StateError
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn
from vilavt_core.results import Finished
from vilavt_core.state import StateKey
from vilavt_vllm import AsyncVilavtLLM, register, support

if problem := support.server_problem(vllm_version):
    pytest.skip(problem, allow_module_level=True)

from vilavt_vllm.server.endpoint import Loop, VilavtEndpoint
from vilavt_vllm.server.history import History
from vilavt_vllm.server.options import ServerOptions
from vilavt_vllm.server.requests import ChatRequest
from vilavt_vllm.server.states import KEY_VARIABLE

ROOT = Path(__file__).parents[2]
CHECKPOINT, PICTURES = str(ROOT / "examples" / "vilavt-tiny"), ROOT / "examples" / "pictures"
ASKED = json.loads((PICTURES / "questions.json").read_text())
ZOOM = format_turn(ToolCall((Region(0, (8.0, 8.0, 60.0, 60.0)),), "the card", "Look."))
NESTED = format_turn(ToolCall((Region(1, (2.0, 2.0, 40.0, 40.0)),), "the digit"))
MODELS = SimpleNamespace(is_base_model=lambda name: name == "tiny", model_name=lambda: "tiny")


def image(path: Path = PICTURES / "scene-1.png", **more) -> dict:
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": url}, **more}


def messages(*texts: str, first: dict | None = None) -> list[dict]:
    """Questions and answers in turn; the first question is about a picture."""
    roles = [("user", "assistant")[number % 2] for number in range(len(texts))]
    out = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    out[0]["content"] = [first or image(), {"type": "text", "text": texts[0]}]
    return out


@pytest.fixture
def key(tmp_path) -> str:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef" * 4 + "\n")
    return str(path)


@pytest.fixture(scope="module")
def config():
    register()
    return ModelConfig(model=CHECKPOINT)


class Replica:
    """A server whose model says the same turns to every question: it looks twice, then answers."""

    def __init__(
        self, config: ModelConfig, answer: str = "7", turns: tuple[str, ...] = (ZOOM, NESTED), **options
    ) -> None:
        self.app, endpoint = FastAPI(), VilavtEndpoint()
        endpoint.attach_router(self.app)
        self.app.state.openai_serving_models = MODELS
        arguments = Namespace(vilavt=ServerOptions(**options))
        asyncio.run(endpoint.init_state(SimpleNamespace(model_config=config), self.app.state, arguments))
        self.loop: Loop = self.app.state.vilavt_loop
        self.drivers = []

        async def events(driver, handling):
            self.drivers.append(driver)
            for event in driver.start():
                yield event
            for turn in (*turns, format_turn(Answer(answer))):
                if driver.request is not None:
                    for event in driver.take_text(turn):
                        yield event

        self.loop.llm.events = events

    def post(self, talk: list[dict], state: str | None = None, /, **fields):
        body = {"messages": talk, **fields}
        if state is not None:
            body["vilavt"] = {**fields.get("vilavt", {}), "state": state}

        async def send():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.post("/v1/chat/completions", json=body)

        return asyncio.run(send())

    def told(self, talk: list[dict], state: str | None = None, /, **fields) -> dict:
        """The field ``vilavt`` of the response."""
        response = self.post(talk, state, **fields)
        assert response.status_code == 200, response.text
        if not fields.get("stream"):
            return response.json()["vilavt"]
        chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        (end,) = [chunk["vilavt"] for chunk in chunks if chunk.get("vilavt", {}).get("type") == "end"]
        return end

    def refused(self, talk: list[dict], state: str, /, **fields) -> str:
        response = self.post(talk, state, **fields)
        error = response.json()["error"]
        assert (response.status_code, error["type"]) == (400, "StateError"), response.text
        assert "zooms" in error["message"]  # what to do instead
        return error["message"]

    @property
    def streams(self) -> list[list[int]]:
        return [driver.result.record.token_ids for driver in self.drivers]


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_never_saw_a_conversation_goes_on_with_it_exactly(config, key, stream):
    one, other = Replica(config, state_key_file=key), Replica(config, state_key_file=key)
    first = one.told(messages("Which digit?"), stream=stream)
    assert first["history"] is None
    assert first["state_bytes"] == len(first["state"]) > 200
    talk = messages("Which digit?", "7", "Sure?")
    kept, moved = one.told(talk, first["state"], stream=stream), other.told(talk, first["state"], stream=stream)
    assert [kept["history"], moved["history"]] == ["kept", "state"]
    assert other.streams[0] == one.streams[1]
    (ours, theirs) = [server.drivers[-1].conversation for server in (one, other)]
    assert len(theirs.views) == 5
    assert [view.image.tobytes() for view in theirs.views] == [view.image.tobytes() for view in ours.views]
    # The next answer brings a state again: of the whole conversation, on whichever replica it was.
    talk = messages("Which digit?", "7", "Sure?", "7", "Really?")
    third = Replica(config, state_key_file=key)
    assert third.told(talk, moved["state"])["history"] == "state"
    assert one.told(talk, moved["state"])["history"] == "kept"
    assert third.streams[0] == one.streams[-1]


def test_without_a_state_a_replica_says_that_it_has_rebuilt_the_conversation_and_so_does_its_state(config, key):
    one, other = Replica(config, state_key_file=key), Replica(config, state_key_file=key)
    one.told(messages("Which digit?"))
    talk = messages("Which digit?", "7", "Sure?")
    rebuilt = other.told(talk)
    assert rebuilt["history"] == "rebuilt"
    assert len(other.drivers[0].conversation.views) == 3  # the zooms of the new question only
    again = Replica(config, state_key_file=key)
    talk = messages("Which digit?", "7", "Sure?", "7", "Really?")
    assert again.told(talk, rebuilt["state"])["history"] == "state"
    assert other.told(talk)["history"] == "kept"
    assert again.streams[0] == other.streams[-1]


def test_a_question_that_ended_without_an_answer_keeps_its_zooms(config, key):
    one, other = Replica(config, state_key_file=key), Replica(config, state_key_file=key)
    first = one.told(messages("Which digit?"), vilavt={"max_turns": 2})
    assert (first["finish"], first["images"]) == ("turn_limit", 2)
    talk = messages("Which digit?", "", "Go on.")
    assert one.told(talk)["history"] == "kept"
    assert other.told(talk, first["state"])["history"] == "state"
    assert other.streams[0] == one.streams[1]


def test_a_state_decides_between_two_conversations_of_the_same_words(config, key):
    server = Replica(config, state_key_file=key)
    looked = server.told(messages("Which digit?"))
    plain = Replica(config, turns=(), state_key_file=key)
    direct = plain.told(messages("Which digit?"))
    talk = messages("Which digit?", "7", "Sure?")
    assert server.told(talk, looked["state"])["history"] == "kept"
    assert server.told(talk, direct["state"])["history"] == "state"
    assert server.streams[-1][: len(plain.streams[0])] == plain.streams[0]


def test_it_works_within_one_process_without_any_key_when_the_history_is_full(config, caplog, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    caplog.set_level("WARNING", logger="vilavt_vllm")
    server = Replica(config, max_conversations=0)
    assert "a key of this process alone" in caplog.text
    first = server.told(messages("Which digit?"))
    talk = messages("Which digit?", "7", "Sure?")
    assert server.told(talk, first["state"])["history"] == "state"
    assert server.told(talk)["history"] == "rebuilt"
    message = Replica(config).refused(talk, first["state"])
    assert re.search(r"signed with another key \(\w{8}, this server has \w{8}\).*--state-key-file", message)


def test_a_state_is_refused_by_what_disagrees(config, key, tmp_path, monkeypatch):
    server, question = Replica(config, state_key_file=key), messages("Which digit?")
    state = server.told(question)["state"]
    talk = messages("Which digit?", "7", "Sure?")
    assert "changed on its way" in server.refused(talk, state[:100] + ("A" if state[100] != "A" else "B") + state[101:])
    assert "no base64url of a state" in server.refused(talk, "mine")
    assert "characters, at most 524288 are read" in server.refused(talk, "A" * 600_000)
    assert "1 questions, the messages have 0 before the last one" in server.refused(question, state)
    assert "question 0 had another text" in server.refused(messages("Which?", "7", "Sure?"), state)
    assert "question 0 had another answer" in server.refused(messages("Which digit?", "8", "Sure?"), state)
    for other in (image(PICTURES / "scene-2.png"), image(max_pixels=9000.0)):
        text = server.refused(messages("Which digit?", "7", "Sure?", first=other), state)
        assert "question 0 had another image 0" in text
    rules = Replica(config, state_key_file=key, preset="rl").refused(talk, state)
    assert "another preset: default, this server has rl" in rules
    prompts = Replica(config, state_key_file=key, prompts="default").refused(talk, state)
    assert "another prompt set" in prompts
    limits = Replica(config, state_key_file=key, limits={"max_turns": 2}).refused(talk, state)
    assert "asked with max_turns 5, this server has 2; start all replicas with the same limits" in limits
    monkeypatch.setattr("vilavt_vllm.server.states.time", SimpleNamespace(time=lambda: 4e9))
    old = Replica(config, state_key_file=key, state_max_age=3600.0).refused(talk, state)
    assert re.search(r"is \d+ s old, at most 3600 are allowed", old)
    assert server.told(talk, state)["history"] == "kept"  # of any age
    assert server.loop.running == 0
    assert server.loop.budget.bytes == 0


def test_a_state_of_another_model_is_refused(config, key, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    server = Replica(config, state_key_file=key)
    server.loop.models = SimpleNamespace(**vars(MODELS), lora_requests={"polite": LoRARequest("p", 1, str(tmp_path))})
    state = server.told(messages("Which digit?"))["state"]
    text = server.refused(messages("Which digit?", "7", "Sure?"), state, model="polite")
    assert "was made with another checkpoint" in text


def test_the_same_pixels_from_another_file_are_the_same_picture(config, key, tmp_path):
    one, other = Replica(config, state_key_file=key), Replica(config, state_key_file=key)
    state = one.told(messages("Which digit?"))["state"]
    Image.open(PICTURES / "scene-1.png").convert("RGB").save(tmp_path / "a.bmp")
    talk = messages("Which digit?", "7", "Sure?", first=image(tmp_path / "a.bmp"))
    assert other.told(talk, state)["history"] == "state"


def test_this_requests_limits_do_not_hold_for_what_was_said_before(config, key):
    one, other = Replica(config, state_key_file=key), Replica(config, turns=(), state_key_file=key)
    state = one.told(messages("Which digit?"))["state"]
    assert max(len(turn.token_ids) for turn in one.drivers[0].conversation.fed) > 12
    told = other.told(messages("Which digit?", "7", "Sure?"), state, max_tokens=12, vilavt={"max_turns": 1})
    assert (told["history"], told["turns"], told["finish"]) == ("state", 1, "answer")


@pytest.mark.parametrize(
    "field, status",
    [({"state": "x"}, 400), ({"vilavt": {"state": 3}}, 400), ({"vilavt": {"stat": "x"}}, 400), ({"state": None}, 200)],
)
def test_a_state_in_the_wrong_place_is_not_lost_in_silence(config, key, field, status):
    response = Replica(config, state_key_file=key).post(messages("Which digit?"), **field)
    assert response.status_code == status
    if status == 400:
        assert "stat" in response.json()["error"]["message"]


def test_follow_ups_are_counted_by_their_history_and_states_by_their_size(config, key):
    def count(history):
        return REGISTRY.get_sample_value("vilavt_follow_ups_total", {"history": history}) or 0

    def sizes():
        return [REGISTRY.get_sample_value(f"vilavt_state_bytes_{name}") or 0 for name in ("count", "sum")]

    server, before = Replica(config, state_key_file=key), {name: count(name) for name in ("kept", "state", "rebuilt")}
    (number, total), other = sizes(), Replica(config, state_key_file=key)
    first, talk = server.told(messages("Which digit?")), messages("Which digit?", "7", "Sure?")
    assert sizes() == [number + 1, total + len(first["state"])]
    other.told(talk, first["state"])
    other.loop.history = History(0, 0)
    other.told(talk)
    server.told(talk)
    assert {name: count(name) - before[name] for name in before} == {"kept": 1, "state": 1, "rebuilt": 1}


# Keys


def test_replicas_see_whether_they_have_the_same_key(config, key, monkeypatch):
    def says(**options):
        server = Replica(config, **options)

        async def get():
            transport = httpx.ASGITransport(server.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return (await client.get("/v1/vilavt")).json()["state"]

        return asyncio.run(get())

    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    shared = says(state_key_file=key, state_max_age=60.0)
    name = StateKey.from_file(key).name
    assert shared == {"version": 1, "key": name, "shared": True, "max_age": 60.0}
    alone = says()
    assert (alone["shared"], alone["max_age"]) == (False, None)
    assert alone["key"] != name
    monkeypatch.setenv(KEY_VARIABLE, Path(key).read_text())
    assert says()["key"] == name


@pytest.mark.parametrize(
    "options, variable, words",
    [
        ({"state_key_file": "/no/such/key"}, None, "/no/such/key: cannot be read"),
        ({"state_key_file": "KEY"}, "x" * 40, "named twice, by --state-key-file and VILAVT_STATE_KEY"),
        ({}, "short", "VILAVT_STATE_KEY: a key for states has 5 bytes, it must have at least 32"),
        ({"state_max_age": 0.0}, None, "--state-max-age is 0, it must be above 0"),
        ({"state_max_age": float("nan")}, None, "--state-max-age is nan"),
    ],
)
def test_a_key_that_cannot_be_used_stops_the_start(config, key, options, variable, words, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(KEY_VARIABLE, variable)
    if options.get("state_key_file") == "KEY":
        options = {"state_key_file": key}
    with pytest.raises(StateError, match=words):
        Replica(config, **options)


# A real engine


@pytest.mark.engine
def test_a_replica_answers_from_a_state_as_the_one_that_kept_the_conversation(key):
    """The same token stream, the same log-probabilities to the last bit, the same answer; rebuilt it is another."""
    engine_args = {"dtype": "float32", "enforce_eager": True, "block_size": 32, "gpu_memory_utilization": 0.3}
    more = "And which digit is on the card beside it?"

    async def run():
        llm = AsyncVilavtLLM.from_checkpoint(CHECKPOINT, engine_args=engine_args)
        engine = llm.engine
        state = SimpleNamespace(openai_serving_models=MODELS)
        loops = [Loop(engine, state, ServerOptions(state_key_file=key)) for _ in range(3)]

        async def ask(loop: Loop, *texts: str, state: str | None = None):
            await engine.reset_prefix_cache()  # every answer is computed from nothing
            about = PICTURES / ASKED[0]["image"]
            body = {"messages": messages(*texts, first=image(about)), "vilavt": {"state": state}}
            request = ChatRequest.model_validate(body)
            handling = replace(loop.handling(request, "test", {}), logprobs=True)
            events = [event async for event in loop.answer(request, handling)]
            assert isinstance(events[-1], Finished)
            return events[-1].result

        try:
            one, other, forgetful = loops
            first = await ask(one, ASKED[0]["question"])
            talk = (ASKED[0]["question"], first.answer, more)
            kept = await ask(one, *talk, state=first.state)
            moved = await ask(other, *talk, state=first.state)
            rebuilt = await ask(forgetful, *talk)
            one.history = History(64, 2**30)  # as after a restart
            again = await ask(one, *talk, state=first.state)
            return first, kept, moved, rebuilt, again
        finally:
            for loop in loops:
                loop.llm.worker.shutdown()
            llm.shutdown()
            await asyncio.sleep(0)  # vLLM's reader of outputs is cancelled; here it notices

    first, kept, moved, rebuilt, again = asyncio.run(asyncio.wait_for(run(), 600))
    assert first.answer == ASKED[0]["answer"]
    assert len(first.views) > 1
    assert [one.history for one in (first, kept, moved, rebuilt, again)] == [None, "kept", "state", "rebuilt", "state"]
    assert kept.record.token_ids[: len(first.record.token_ids)] == first.record.token_ids
    new = slice(len(first.record.token_ids), None)
    assert any(value is not None for value in kept.record.logprobs[new])
    for one in (moved, again):
        assert one.record.token_ids == kept.record.token_ids
        assert one.record.logprobs[new] == kept.record.logprobs[new]
        assert one.answer == kept.answer
        assert [inquiry.identities for inquiry in one.record.inquiries] == [
            inquiry.identities for inquiry in kept.record.inquiries
        ]
    assert rebuilt.record.token_ids[: len(first.record.token_ids)] != first.record.token_ids
