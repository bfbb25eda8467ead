"""The Responses and the Messages API, through their routes, with a model that says what a test tells it: which requests
are accepted or refused in which words, what comes back whole and as a stream, and how errors are said."""

import asyncio
import base64
import io
import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from vllm import __version__ as vllm_version
from vllm.config import ModelConfig

from vilavt_core.protocol import Answer, Region, ToolCall, format_turn
from vilavt_core.wire import read_chunk, read_told
from vilavt_vllm import register, support

if problem := support.server_problem(vllm_version):
    pytest.skip(problem, allow_module_level=True)

from vilavt_vllm.server.dialects import CHAT, DIALECTS, MESSAGES, RESPONSES, dialect_of
from vilavt_vllm.server.endpoint import VilavtEndpoint
from vilavt_vllm.server.options import ServerOptions
from vilavt_vllm.server.requests import exchanges

ROOT = Path(__file__).parents[2]
CHECKPOINT, README = str(ROOT / "examples" / "vilavt-tiny"), ROOT / "vilavt_vllm" / "README.md"
ZOOM = format_turn(ToolCall((Region(0, (8.0, 8.0, 60.0, 60.0)),), "the card", "Look."))
ANSWER = format_turn(Answer("4", "Red."))


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (84, 84), "red").save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


DATA = picture()
URL = f"data:image/png;base64,{DATA}"
SOURCE = {"type": "base64", "media_type": "image/png", "data": DATA}


class Served:
    """A server whose model says these turns to every question."""

    def __init__(self, *turns: str, key: str | None = None, **options) -> None:
        register()
        self.turns, self.app, endpoint = turns or (ZOOM, ANSWER), FastAPI(), VilavtEndpoint()
        self.app.state.args = Namespace(api_key=key and [key])
        endpoint.attach_router(self.app)
        names = SimpleNamespace(is_base_model=lambda name: name == "tiny", model_name=lambda: "tiny")
        self.app.state.openai_serving_models = names
        engine = SimpleNamespace(model_config=ModelConfig(model=CHECKPOINT))
        asyncio.run(endpoint.init_state(engine, self.app.state, Namespace(vilavt=ServerOptions(**options))))
        self.loop = self.app.state.vilavt_loop
        self.error: Exception | None = None

        async def events(driver, handling):
            for event in driver.start():
                yield event
            for turn in self.turns:
                if driver.request is not None:
                    for event in driver.take_text(turn):
                        yield event
                if self.error is not None:
                    raise self.error

        self.loop.llm.events = events

    def post(self, path: str, body: dict, **headers: str) -> httpx.Response:
        async def send():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.post(path, json=body, headers=headers)

        return asyncio.run(send())


@pytest.fixture(scope="module")
def served() -> Served:
    return Served()


def question(path: str, **fields) -> dict:
    """The same question in each protocol, with an image."""
    if path == RESPONSES.path:
        image, text = (
            {"type": "input_image", "image_url": URL, "detail": "auto"},
            {"type": "input_text", "text": "What?"},
        )
        return {"input": [{"role": "user", "content": [image, text]}], **fields}
    if path == MESSAGES.path:
        content = [{"type": "image", "source": SOURCE}, {"type": "text", "text": "What?"}]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 1000, **fields}
    content = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}], **fields}


def events_of(response: httpx.Response) -> list[dict]:
    """The events of a stream, each of which has its name twice."""
    out = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        out.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {out[-1]['type']}"
    return out


# Requests: accepted, accepted and listed as ignored, or refused in which words

OK = ()
TOOL = {"type": "function", "name": "f", "parameters": {}}
SAID = {"role": "assistant", "content": "4"}
OURS = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "4", "annotations": [], "logprobs": []}],
}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Red."}]}
USER = {"role": "user", "content": "What?"}


def asked(*content) -> dict:
    return {"input": [{"role": "user", "content": [*content, {"type": "input_text", "text": "What?"}]}]}


RESPONSES_SHAPES = [
    ({}, OK),
    ({"input": [USER]}, OK),
    ({"input": [{"type": "message", **USER}]}, OK),
    ({"input": [{"role": "developer", "content": "Be brief."}, USER]}, OK),
    ({"instructions": "Be brief."}, OK),
    ({"instructions": None, "metadata": {"a": "b"}, "max_output_tokens": 900}, OK),
    ({"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1, "vilavt": {"max_turns": 2}}, OK),
    ({"store": False, "background": False, "tools": [], "tool_choice": "auto", "include": []}, OK),
    ({"truncation": "disabled", "text": {"format": {"type": "text"}}, "top_logprobs": 0}, OK),
    ({"previous_response_id": None, "conversation": None, "prompt": None, "reasoning": None}, OK),
    (asked({"type": "input_image", "image_url": URL, "detail": "auto", "file_id": None}), OK),
    (asked({"type": "input_image", "image_url": URL, "max_pixels": 10_000}), OK),
    ({"input": [USER, OURS, USER]}, OK),
    ({"input": [USER, SAID, USER]}, OK),
    # hints, and what comes back
    ({"user": "me", "reasoning": {"effort": "low"}}, ("reasoning", "user")),
    ({"text": {"verbosity": "low"}}, ("text.verbosity",)),
    ({"parallel_tool_calls": True, "prompt_cache_key": "k"}, ("parallel_tool_calls", "prompt_cache_key")),
    ({"stream_options": {"include_obfuscation": False}}, ("stream_options",)),
    ({"input": [USER, THOUGHT, OURS, USER]}, ("input[1]",)),
    (asked({"type": "input_image", "image_url": URL, "detail": "high"}), ("input[0].content[0].detail",)),
    # what would change the answer
    ({"store": True}, "store=true is not supported here, where the server runs the model's zoom loop; leave it out"),
    ({"previous_response_id": "resp_1"}, 'previous_response_id="resp_1" is not supported here'),
    ({"conversation": "conv_1"}, "send the earlier input and output back in input"),
    ({"background": True}, "background=true is not supported here"),
    ({"tools": [TOOL]}, "carries out the model's own zooms and calls no functions"),
    ({"tools": [{"type": "web_search"}]}, "tools="),
    ({"tool_choice": "required"}, "tool_choice="),
    ({"include": ["reasoning.encrypted_content"]}, "include="),
    ({"text": {"format": {"type": "json_object"}}}, "text.format="),
    ({"truncation": "auto"}, "nothing is cut off here"),
    ({"context_management": [{"type": "compaction"}]}, "context_management="),
    ({"max_tool_calls": 3}, "say vilavt.max_turns"),
    ({"prompt": {"id": "pmpt_1"}}, "put it into input"),
    ({"top_logprobs": 5}, "top_logprobs=5"),
    ({"stop": ["x"]}, "stop="),
    ({"messages": [USER]}, "put it into input"),
    ({"system": "Be brief."}, "put it into instructions"),
    (
        {"max_tokens": 5},
        "max_tokens=5 is not supported here, where the server runs the model's zoom loop; say max_output",
    ),
    ({"max_completion_tokens": 5}, "say max_output_tokens for the whole answer, or vilavt.max_new_tokens_per_turn"),
    ({"images": [URL]}, 'as parts {"type": "input_image"'),
    ({"max_turns": 2}, 'put it into the field vilavt: {"max_turns": …}'),
    # misspelt, out of range, of another kind
    ({"max_output_token": 5}, "max_output_token: there is no such field; did you mean max_output_tokens?"),
    ({"maxOutputTokens": 5}, "did you mean max_output_tokens?"),
    ({"instruction": "x"}, "did you mean instructions?"),
    ({"max_output_tokens": 0}, "max_output_tokens: "),
    ({"temperature": 3}, "temperature: "),
    ({"metadata": {"a": 1}}, "metadata.a: "),
    ({"vilavt": {"max_turn": 3}}, "vilavt.max_turn: Extra inputs"),
    ({"vilavt": {"max_turns": 99}}, "vilavt.max_turns is 99, this server allows at most"),
    ({"input": None}, "input: it is null, it must be a text or a list of items"),
    ({"input": 5}, "input: it is a number, it must be a text or a list of items"),
    ({"input": []}, "input: List should have at least 1 item"),
    ({"input": ["What?"]}, "input[0]: an item of input is an object, this is a text"),
    ({"input": [{"content": "What?"}]}, "input[0].role: Field required"),
    ({"input": [{"type": 5}]}, "input[0]: type is a number, it must be message or reasoning"),
    ({"input": [{"type": "hologram"}]}, "input[0]: type 'hologram' is not supported: known are message and reasoning"),
    (
        {"input": [USER, {"type": "function_call", "name": "f"}]},
        "input[1]: type 'function_call' is not supported: the loop",
    ),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "this server keeps no answers; send the item itself"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role: role 'tool' is not supported"),
    ({"input": [THOUGHT]}, "there is no message, one of the user is needed"),
    ({"input": [USER, OURS]}, "the last message is the assistant's"),
    ({"input": [OURS, USER]}, "input[0] has the role 'assistant', the first question is the user's"),
    ({"input": [{"role": "system", "content": "x"}]}, "input[0] has the role 'system', a message of the user must be"),
    (
        asked({"type": "input_image", "file_id": "file-1"}),
        "input[0].content[0]: file_id is not supported: this server keeps",
    ),
    (asked({"type": "input_image", "image_url": URL, "file_id": "file-1"}), 'input[0].content[0].file_id="file-1"'),
    (
        asked({"type": "input_file", "file_id": "x"}),
        "input[0].content[0]: type 'input_file' is not supported: send pages",
    ),
    (asked({"type": "input_audio"}), "the model does not hear"),
    (asked({"type": "input_image", "image_url": "a.png"}), "'a.png' is no URL"),
    (
        asked({"type": "input_image", "image_url": URL, "max_pixels": 1}),
        "input[0].content[0].max_pixels is 1, this request",
    ),
]

IMAGE, TEXT = {"type": "image", "source": SOURCE}, {"type": "text", "text": "What?"}
THINKING = {"type": "thinking", "thinking": "Red.", "signature": ""}


def told_of(*content) -> dict:
    return {"messages": [{"role": "user", "content": [*content, TEXT]}]}


MESSAGES_SHAPES = [
    ({}, OK),
    (told_of(IMAGE), OK),
    (told_of({**IMAGE, "max_pixels": 10_000}), OK),
    (told_of({"type": "image", "source": {"type": "url", "url": URL}}), OK),
    ({"system": "Be brief."}, OK),
    ({"system": [{"type": "text", "text": "Be brief."}]}, OK),
    ({"system": None, "stop_sequences": [], "tools": [], "tool_choice": {"type": "auto"}}, OK),
    ({"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1, "vilavt": {"max_turns": 2}}, OK),
    ({"thinking": {"type": "adaptive"}, "stop_sequences": None, "mcp_servers": []}, OK),
    ({"messages": [USER, SAID, USER]}, OK),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": ""}]}, USER]}, OK),
    ({"messages": [USER, {"role": "assistant", "content": []}, USER]}, OK),
    # hints, and what comes back
    ({"metadata": {"user_id": "me"}, "service_tier": "auto"}, ("metadata", "service_tier")),
    ({"output_config": {"effort": "low"}}, ("output_config.effort",)),
    ({"system": [{**TEXT, "cache_control": {"type": "ephemeral"}}]}, ("system[0].cache_control",)),
    (told_of({**IMAGE, "cache_control": {"type": "ephemeral"}}), ("messages[0].content[0].cache_control",)),
    ({"messages": [USER, {"role": "assistant", "content": [THINKING, TEXT]}, USER]}, ("messages[1].content[0]",)),
    # what would change the answer
    ({"stop_sequences": ["x"]}, 'stop_sequences=["x"] is not supported here'),
    ({"tools": [TOOL]}, "carries out the model's own zooms and calls no functions"),
    ({"tool_choice": {"type": "any"}}, "tool_choice="),
    ({"thinking": {"type": "disabled"}}, "the model always thinks before it zooms or answers"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking="),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers="),
    ({"container": "c"}, "container="),
    ({"context_management": {"edits": [{}]}}, "context_management="),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format="),
    ({"output_format": {"type": "json_schema"}}, "output_format="),
    ({"input": "What?"}, "put it into messages"),
    ({"instructions": "Be brief."}, "put it into system"),
    ({"max_completion_tokens": 5}, "say max_tokens: here of the whole answer, or vilavt.max_new_tokens_per_turn"),
    ({"images": [URL]}, 'as blocks {"type": "image"'),
    ({"max_turns": 2}, 'put it into the field vilavt: {"max_turns": …}'),
    # misspelt, out of range, of another kind
    ({"maxTokens": 5}, "did you mean max_tokens?"),
    ({"systems": "x"}, "did you mean system?"),
    ({"max_tokens": 0}, "max_tokens: "),
    ({"temperature": -1}, "temperature: "),
    ({"vilavt": {"max_turn": 3}}, "vilavt.max_turn: Extra inputs"),
    ({"system": 5}, "system: it is a number, it must be a text or a list of blocks"),
    ({"system": [IMAGE]}, "system: a message of the role system holds no image"),
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": [{"role": "user"}]}, "messages[0].content: it is null"),
    (
        {"messages": [{"role": "user", "content": ["What?"]}]},
        "messages[0].content[0]: a block is an object, this is a text",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: role 'tool' is not supported"),
    ({"messages": [USER, SAID]}, "the last message is the assistant's"),
    ({"messages": [SAID, USER]}, "messages[0] has the role 'assistant', the first question is the user's"),
    (
        {"messages": [SAID, USER], "system": "x"},
        "system has the role 'system', a message of the user must be beside it",
    ),
    (told_of({"type": "hologram"}), "known are text, image and thinking"),
    (told_of({}), "messages[0].content[0]: type is missing, it must be text, image or thinking"),
    (told_of({"type": "tool_result", "tool_use_id": "x"}), "type 'tool_result' is not supported: the loop calls no"),
    (told_of({"type": "document", "source": SOURCE}), "send pages as image blocks"),
    (told_of({"type": "image_url", "image_url": {"url": URL}}), 'send an image as {"type": "image"'),
    (told_of({"type": "image"}), "messages[0].content[0].source: Field required"),
    (
        told_of({"type": "image", "source": {"type": "file", "file_id": "f"}}),
        "source: type 'file' is not supported: this",
    ),
    (
        told_of({"type": "image", "source": {"type": "ftp"}}),
        "source: type 'ftp' is not supported: known are base64 and url",
    ),
    (
        told_of({"type": "image", "source": {"type": "base64", "data": DATA}}),
        "source: media_type is missing in a source",
    ),
    (
        told_of({"type": "image", "source": {"type": "url"}}),
        "messages[0].content[0].source: url is missing in a source",
    ),
    (told_of({"type": "image", "source": {**SOURCE, "url": URL}}), "url has no place in a source of the type base64"),
    (told_of({"type": "image", "source": {"type": "url", "url": "a.png"}}), "'a.png' is no URL"),
    (told_of({"type": "image", "source": {**SOURCE, "data": "?"}}), "a data URL is not valid base64"),
    (told_of({**IMAGE, "max_pixels": 1}), "messages[0].content[0].max_pixels is 1, this request allows"),
    (told_of({**IMAGE, "min_pixels": 20_000, "max_pixels": 10_000}), "min_pixels 20000 is above max_pixels 10000"),
    (told_of({**IMAGE, "transformations": {"x": {}}}), "messages[0].content[0].transformations="),
    (told_of({**TEXT, "image_url": URL}), "messages[0].content[0].image_url="),
]

SHAPES = [
    *((RESPONSES.path, {"input": "What?", **fields}, expected) for fields, expected in RESPONSES_SHAPES),
    *(
        (MESSAGES.path, {"messages": [USER], "max_tokens": 1000, **fields}, expected)
        for fields, expected in MESSAGES_SHAPES
    ),
]


def named(shape) -> str:
    path, body, _ = shape
    return f"{path} {json.dumps(body)}".replace(DATA, "…")[:90]


@pytest.mark.parametrize("path, body, expected", SHAPES, ids=map(named, SHAPES))
def test_a_request_is_accepted_or_refused_in_these_words(served, path, body, expected):
    response = served.post(path, body)
    if isinstance(expected, str):
        message = response.json()["error"]["message"]
        assert response.status_code == 400
        assert expected in message
        assert len(message) < 400
        return
    assert response.status_code == 200, response.text
    assert sorted(response.json()["vilavt"]["ignored"]) == sorted(expected)


def test_what_is_asked_is_the_same_in_every_protocol(served):
    image = {"type": "image_url", "image_url": {"url": URL}, "max_pixels": 9000}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "One?"}, {"type": "text", "text": "Now."}]},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    shown = {"type": "input_image", "image_url": URL, "max_pixels": 9000}
    first = [shown, {"type": "input_text", "text": "One?"}, {"type": "input_text", "text": "Now."}]
    answer = {**OURS, "content": [{"type": "output_text", "text": "1"}]}
    items = [{"role": "user", "content": first}, THOUGHT, answer, {"role": "user", "content": "Two?"}]
    blocks = [{**IMAGE, "max_pixels": 9000}, {**TEXT, "text": "One?"}, {**TEXT, "text": "Now."}]
    said = [THINKING, {**TEXT, "text": "1"}]
    turns = [("user", blocks), ("assistant", said), ("user", [{**TEXT, "text": "Two?"}])]
    bodies = {
        CHAT: {"messages": chat},
        RESPONSES: {"instructions": "Be brief.", "input": items},
        MESSAGES: {
            "system": [{**TEXT, "text": "Be brief."}],
            "messages": [{"role": r, "content": c} for r, c in turns],
        },
    }
    talks = [exchanges(dialect.request.model_validate(body).placed()) for dialect, body in bodies.items()]
    assert talks[0] == talks[1] == talks[2]
    assert [(one.question, one.answer) for one in talks[0]] == [("Be brief.\n\nOne?\nNow.", "1"), ("Two?", None)]


# Answers


def same(told: dict) -> dict:
    """What does not depend on when it was asked, and whether by a stream."""
    text = json.dumps({name: value for name, value in told.items() if name not in ("type", "state", "state_bytes")})
    return json.loads(text, object_hook=lambda one: {name: one[name] for name in one if name != "seconds"})


def test_an_answer_is_an_object_of_its_protocol_with_the_same_field_vilavt(served):
    bounds = {CHAT: "max_completion_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}
    chat, response, message = (
        served.post(dialect.path, question(dialect.path, **{bound: 1000})).json() for dialect, bound in bounds.items()
    )
    usage = chat["usage"]
    assert same(chat["vilavt"]) == same(response["vilavt"]) == same(message["vilavt"])
    assert (chat["vilavt"]["turns"], chat["vilavt"]["images"]) == (2, 2)
    assert read_told(message["vilavt"]).answer == "4"

    assert (response["object"], response["status"], response["model"]) == ("response", "completed", "tiny")
    assert (response["error"], response["incomplete_details"]) == (None, None)
    thought, said = response["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "Look.\nRed."}]
    assert (said["type"], said["role"], said["status"]) == ("message", "assistant", "completed")
    assert said["content"] == [{"type": "output_text", "text": "4", "annotations": [], "logprobs": []}]
    assert len({response["id"], thought["id"], said["id"]}) == 3

    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "tiny")
    assert message["content"] == [
        {"type": "thinking", "thinking": "Look.\nRed.", "signature": ""},
        {"type": "text", "text": "4"},
    ]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)

    for theirs in (response["usage"], message["usage"]):
        assert theirs["output_tokens"] == usage["completion_tokens"]
    assert response["usage"]["total_tokens"] == usage["total_tokens"]
    assert response["usage"]["input_tokens"] == usage["prompt_tokens"]
    assert (
        sum(message["usage"][f"{name}input_tokens"] for name in ("", "cache_read_", "cache_creation_"))
        == (usage["prompt_tokens"])
    )
    answer = served.loop.count_tokens("4")
    for details in (response["usage"]["output_tokens_details"], message["usage"]["output_tokens_details"]):
        assert list(details.values()) == [max(0, usage["completion_tokens"] - answer)]


def test_what_was_asked_for_comes_back_with_a_response(served):
    asked_for = {"instructions": "Be brief.", "metadata": {"a": "b"}, "temperature": 0.5, "max_output_tokens": 900}
    response = served.post(RESPONSES.path, question(RESPONSES.path, **asked_for)).json()
    assert {name: response[name] for name in asked_for} == asked_for
    assert (response["store"], response["tools"], response["truncation"]) == (False, [], "disabled")


def test_an_answer_without_thoughts_and_zooms_has_no_item_for_them():
    served = Served(format_turn(Answer("4")))
    response, message = (served.post(path, question(path)).json() for path in (RESPONSES.path, MESSAGES.path))
    assert [item["type"] for item in response["output"]] == ["message"]
    assert [block["type"] for block in message["content"]] == ["text"]
    events = events_of(served.post(RESPONSES.path, question(RESPONSES.path, stream=True)))
    assert {event["output_index"] for event in events if "output_index" in event} == {0}
    events = events_of(served.post(MESSAGES.path, question(MESSAGES.path, stream=True)))
    assert {event["index"] for event in events if "index" in event} == {0}


@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_that_ends_the_answer_is_said_as_the_protocol_says_it(served, stream):
    """One turn is allowed, and it zooms."""
    limits = {"vilavt": {"max_turns": 1}, "stream": stream}
    response, message = (served.post(path, question(path, **limits)) for path in (RESPONSES.path, MESSAGES.path))
    if stream:
        *_, last = events_of(response)
        assert last["type"] == "response.incomplete"
        response, events = last["response"], events_of(message)
        (end,) = [event for event in events if event["type"] == "message_delta"]
        stop, told = end["delta"]["stop_reason"], end["vilavt"]
    else:
        response, told = response.json(), message.json()["vilavt"]
        stop = message.json()["stop_reason"]
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert response["output"][-1]["status"] == "incomplete"
    assert response["output"][-1]["content"][0]["text"] == ""
    assert stop == "max_tokens"
    assert told["finish"] == response["vilavt"]["finish"] == "turn_limit"


@pytest.mark.parametrize("path, field", [(RESPONSES.path, "max_output_tokens"), (MESSAGES.path, "max_tokens")])
def test_the_protocols_bound_on_tokens_is_of_the_whole_answer(path, field):
    request = DIALECTS[path].request.model_validate(question(path, **{field: 50}))
    limits = Served().loop.llm.settings.limits
    assert request.limits(limits).max_answer_tokens == 50
    assert request.limits(limits).max_new_tokens_per_turn == limits.max_new_tokens_per_turn


# Streams


def test_a_response_is_streamed_in_the_protocols_order_and_ends_with_the_whole(served):
    whole = served.post(RESPONSES.path, question(RESPONSES.path)).json()
    events = events_of(served.post(RESPONSES.path, question(RESPONSES.path, stream=True)))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    order = [event["type"].removeprefix("response.") for event in events]
    deltas = order.count("reasoning_text.delta")
    assert order == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["reasoning_text.delta"] * deltas,
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    created, done = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["id"]) == ("in_progress", [], done["id"])
    thought, said = done["output"]
    for item, index, kind in ((thought, 0, "reasoning_text"), (said, 1, "output_text")):
        mine = [event for event in events if event.get("output_index") == index]
        assert {event["item_id"] for event in mine if "item_id" in event} == {item["id"]}
        text = item["content"][0]["text"]
        assert "".join(event["delta"] for event in mine if event["type"] == f"response.{kind}.delta") == text
        assert [event["text"] for event in mine if event["type"] == f"response.{kind}.done"] == [text]
        assert [event["part"] for event in mine if event["type"] == "response.content_part.done"] == item["content"]
        assert [event["item"] for event in mine if event["type"] == "response.output_item.done"] == [item]
    assert [item["content"] for item in done["output"]] == [item["content"] for item in whole["output"]]
    assert {key: done[key] for key in ("status", "usage", "metadata")} == (
        {key: whole[key] for key in ("status", "usage", "metadata")}
    )
    assert same(done["vilavt"]) == same(whole["vilavt"])


def test_a_message_is_streamed_in_the_protocols_order_and_adds_up_to_the_whole(served):
    whole = served.post(MESSAGES.path, question(MESSAGES.path)).json()
    events = events_of(served.post(MESSAGES.path, question(MESSAGES.path, stream=True)))
    order = [event["type"] for event in events]
    deltas = order.count("content_block_delta") - 1
    assert order == [
        *("message_start", "content_block_start", *["content_block_delta"] * deltas, "content_block_stop"),
        *("content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"),
    ]
    assert events[0]["message"]["content"] == []
    blocks = [dict(event["content_block"]) for event in events if event["type"] == "content_block_start"]
    for event in events:
        if event["type"] == "content_block_delta":
            kind = event["delta"]["type"].removesuffix("_delta")
            blocks[event["index"]][kind] += event["delta"][kind]
    assert blocks == whole["content"]
    end = events[-2]
    assert (end["delta"]["stop_reason"], end["usage"]) == (whole["stop_reason"], whole["usage"])
    assert same(end["vilavt"]) == same(whole["vilavt"])


def test_zooms_are_told_while_they_happen_as_on_chat_completions(served):
    chat = served.post(CHAT.path, question(CHAT.path, stream=True)).text.splitlines()
    told = [json.loads(line[6:]).get("vilavt") for line in chat if line.startswith("data: {")]
    expected = [one for one in told if one and one["type"] != "end"]
    assert [one["type"] for one in expected if one["type"] != "thought"] == ["zoom", "crops"]
    for path in (RESPONSES.path, MESSAGES.path):
        events = events_of(served.post(path, question(path, stream=True)))
        on_the_way = [event["vilavt"] for event in events if event.get("vilavt", {}).get("type", "end") != "end"]
        assert on_the_way == expected
        assert all(list(read_chunk(one)) for one in on_the_way)


# Follow-up questions


def follow_up(path: str, first: dict, answer: dict, text: str = "And?") -> dict:
    """The conversation as a client sends it back with the next question, thoughts included."""
    body = json.loads(json.dumps(first))
    if path == RESPONSES.path:
        body["input"] += [*answer["output"], {"role": "user", "content": text}]
    else:
        body["messages"] += [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": text}]
    return body


@pytest.mark.parametrize("path", [RESPONSES.path, MESSAGES.path])
def test_a_follow_up_continues_what_was_answered(path):
    served, elsewhere = Served(), Served()
    first = question(path)
    answer = served.post(path, first).json()
    assert answer["vilavt"]["history"] is None
    second = follow_up(path, first, answer)
    assert served.post(path, second).json()["vilavt"]["history"] == "kept"
    assert elsewhere.post(path, second).json()["vilavt"]["history"] == "rebuilt"


@pytest.mark.parametrize("path", [RESPONSES.path, MESSAGES.path])
def test_a_state_continues_it_on_another_server(path, tmp_path):
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 4)
    served, elsewhere = (Served(state_key_file=str(key)) for _ in range(2))
    first = question(path)
    answer = served.post(path, first).json()
    second = follow_up(path, first, answer) | {"vilavt": {"state": answer["vilavt"]["state"]}}
    told = elsewhere.post(path, second).json()["vilavt"]
    assert told["history"] == "state"
    wrong = {**second, "vilavt": {"state": "x" * 100}}
    assert elsewhere.post(path, wrong).status_code == 400


@pytest.mark.parametrize("path", [RESPONSES.path, MESSAGES.path])
def test_a_conversation_goes_on_in_another_protocol(path):
    served = Served()
    served.post(path, question(path))
    chat = question(CHAT.path)
    chat["messages"] += [{"role": "assistant", "content": "4"}, {"role": "user", "content": "And?"}]
    assert served.post(CHAT.path, chat).json()["vilavt"]["history"] == "kept"


# Errors


def kind_of(path: str, body: dict) -> tuple[str, str]:
    """What kind of error it is, in the protocol's words and in ours."""
    assert body["error"]["message"]
    if path == MESSAGES.path:
        assert (set(body), body["type"]) == ({"type", "error"}, "error")
        return body["error"]["type"], body["error"]["code"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return "", body["error"]["type"]


@pytest.mark.parametrize("path", [RESPONSES.path, MESSAGES.path])
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_has_the_protocols_shape_and_the_same_status(served, path, stream):
    def refused(server: Served, **fields) -> tuple[int, str, str]:
        response = server.post(path, question(path, stream=stream, **fields))
        return response.status_code, *kind_of(path, response.json())

    messages = path == MESSAGES.path
    assert refused(served, n=2) == (400, "invalid_request_error" if messages else "", "RequestError")
    assert refused(served, vilavt={"max_turns": 99}) == (400, "invalid_request_error" if messages else "", "LimitError")
    assert refused(served, model="rude") == (404, "not_found_error" if messages else "", "ModelMissingError")
    assert refused(Served(max_episodes=0)) == (503, "overloaded_error" if messages else "", "BusyError")


@pytest.mark.parametrize("path", [RESPONSES.path, MESSAGES.path])
def test_an_error_after_the_header_is_the_last_event(path):
    served = Served(ZOOM)
    served.error = RuntimeError("broken")
    *before, last = events_of(served.post(path, question(path, stream=True)))
    assert before
    assert last["type"] == "error"
    assert kind_of(path, {key: last[key] for key in ("type", "error") if path == MESSAGES.path or key == "error"}) == (
        "api_error" if path == MESSAGES.path else "",
        "RuntimeError",
    )
    assert last["error"]["message"] == "broken"
    if path == RESPONSES.path:
        assert (last["message"], last["sequence_number"]) == ("broken", len(before))


@pytest.mark.parametrize("path", list(DIALECTS))
def test_without_the_key_nothing_is_answered(path):
    served = Served(key="secret")
    missing = served.post(path, question(path))
    assert missing.status_code == 401
    assert kind_of(path, missing.json()) == ("authentication_error" if path == MESSAGES.path else "", "KeyMissingError")
    assert served.post(path, question(path), Authorization="Bearer secret").status_code == 200


@pytest.mark.parametrize(
    "path, dialect",
    [
        ("/v1/responses", RESPONSES),
        ("/v1/responses/resp_1/cancel", RESPONSES),
        ("/v1/messages/count_tokens", MESSAGES),
        ("/v1/raw/messages", MESSAGES),
        ("/v1/messages_of_mine", CHAT),
        ("/v1/models", CHAT),
        ("/tokenize", CHAT),
    ],
)
def test_every_route_says_its_errors_in_one_protocol(path, dialect):
    assert dialect_of(path) is dialect


def test_the_readme_names_both_protocols_and_what_bounds_an_answer():
    text = " ".join(README.read_text().split())
    for word in ("`POST /v1/responses`", "`POST /v1/messages`", "`max_output_tokens`", "anthropic"):
        assert word in text
