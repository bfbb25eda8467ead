"""The Responses and the Messages API of a real `vilavt-serve`, asked by the clients of OpenAI and Anthropic."""

import base64
import json
import time
from pathlib import Path

import anthropic
import openai
import pytest
import vllm
from anthropic import Anthropic
from openai import OpenAI

from vilavt_vllm import support

pytestmark = pytest.mark.engine
if problem := support.server_problem(vllm.__version__):
    pytest.skip(problem, allow_module_level=True)

ROOT = Path(__file__).parents[2]
MODEL, PICTURES = str(ROOT / "examples" / "vilavt-tiny"), ROOT / "examples" / "pictures"
ASKED = json.loads((PICTURES / "questions.json").read_text())
PATIENCE = 300


@pytest.fixture(scope="module")
def openais(server):
    with OpenAI(base_url=server.url, api_key=server.key, max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def anthropics(server):
    with Anthropic(base_url=server.base, auth_token=server.key, max_retries=0, timeout=PATIENCE) as client:
        yield client


def image(number: int) -> str:
    return base64.b64encode((PICTURES / ASKED[number]["image"]).read_bytes()).decode()


def items(number: int) -> list[dict]:
    shown = {"type": "input_image", "image_url": f"data:image/png;base64,{image(number)}", "detail": "auto"}
    return [{"role": "user", "content": [shown, {"type": "input_text", "text": ASKED[number]["question"]}]}]


def messages(number: int) -> list[dict]:
    source = {"type": "base64", "media_type": "image/png", "data": image(number)}
    text = {"type": "text", "text": ASKED[number]["question"]}
    return [{"role": "user", "content": [{"type": "image", "source": source}, text]}]


@pytest.fixture(scope="module")
def expected(openais):
    """What chat completions say of question 2, which takes a zoom: (answer, thoughts, completion tokens)."""
    url = {"url": f"data:image/png;base64,{image(2)}"}
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": ASKED[2]["question"]}]
    reply = openais.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}])
    assert [event["type"] for event in reply.vilavt["events"]] == ["zoom", "crops"]
    return reply.choices[0].message.content, reply.choices[0].message.reasoning, reply.usage.completion_tokens


def test_a_response_is_the_answer_of_chat_completions(openais, expected):
    answer, thoughts, tokens = expected
    response = openais.responses.create(model=MODEL, input=items(2), max_output_tokens=2000)
    assert (response.output_text, response.status) == (answer, "completed")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == thoughts
    assert response.usage.output_tokens == tokens
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < tokens
    assert response.usage.input_tokens_details.cached_tokens > 0
    assert [event["type"] for event in response.vilavt["events"]] == ["zoom", "crops"]


def test_a_streamed_response_adds_up_and_a_follow_up_continues_it(openais, server, expected):
    answer, thoughts, _ = expected
    kept = server.metric('vilavt_follow_ups_total{history="kept"}')
    with openais.responses.stream(model=MODEL, input=items(2)) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert ("".join(deltas), final.output_text) == (thoughts, answer)
    zooms = [event.vilavt["type"] for event in events if getattr(event, "vilavt", None)]
    assert [kind for kind in zooms if kind != "thought"] == ["zoom", "crops"]
    talk = [*items(2), *(item.to_dict() for item in final.output)]
    more = openais.responses.create(model=MODEL, input=[*talk, {"role": "user", "content": ASKED[2]["question"]}])
    assert more.vilavt["history"] == "kept"
    assert server.metric('vilavt_follow_ups_total{history="kept"}') == kept + 1


def test_a_message_is_the_answer_of_chat_completions(anthropics, expected):
    answer, thoughts, tokens = expected
    message = anthropics.messages.create(model=MODEL, messages=messages(2), max_tokens=2000)
    thinking, text = message.content
    assert (thinking.thinking, text.text, message.stop_reason) == (thoughts, answer, "end_turn")
    assert message.usage.output_tokens == tokens
    assert message.usage.cache_read_input_tokens > 0
    assert [event["type"] for event in message.vilavt["events"]] == ["zoom", "crops"]


def test_a_streamed_message_adds_up_and_a_follow_up_continues_it(anthropics, expected):
    answer, thoughts, tokens = expected
    with anthropics.messages.stream(model=MODEL, messages=messages(2), max_tokens=2000) as stream:
        events = list(stream)
        final = stream.get_final_message()
    thinking, text = final.content
    assert (thinking.thinking, text.text, final.stop_reason) == (thoughts, answer, "end_turn")
    assert final.usage.output_tokens == tokens
    raw = [event for event in events if event.type == "content_block_delta" and getattr(event, "vilavt", None)]
    assert [event.vilavt["type"] for event in raw if event.vilavt["type"] != "thought"] == ["zoom", "crops"]
    blocks = [block.to_dict() for block in final.content]
    talk = [*messages(2), {"role": "assistant", "content": blocks}, {"role": "user", "content": "And now?"}]
    more = anthropics.messages.create(model=MODEL, messages=talk, max_tokens=2000)
    assert more.vilavt["history"] == "kept"
    assert "messages[1].content[0]" in more.vilavt["ignored"]


def test_a_budget_on_the_answer_holds_in_both(openais, anthropics):
    response = openais.responses.create(model=MODEL, input=items(0), max_output_tokens=4)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    message = anthropics.messages.create(model=MODEL, messages=messages(0), max_tokens=4)
    assert message.stop_reason == "max_tokens"
    assert response.usage.output_tokens == message.usage.output_tokens == 4


def test_errors_are_those_of_the_clients(openais, anthropics, server):
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        openais.responses.create(model=MODEL, input="What?", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError, match="no model 'rude' here"):
        openais.responses.create(model="rude", input="What?")
    with pytest.raises(anthropic.BadRequestError, match="stop_sequences") as refused:
        anthropics.messages.create(model=MODEL, messages=messages(0), max_tokens=9, stop_sequences=["x"])
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError, match="no model 'rude' here"):
        anthropics.messages.create(model="rude", messages=messages(0), max_tokens=9)
    with pytest.raises(anthropic.BadRequestError, match="count_tokens is not answered here"):
        anthropics.messages.count_tokens(model=MODEL, messages=messages(0))
    with pytest.raises(openai.BadRequestError, match="is not answered here"):
        openais.responses.retrieve("resp_1")
    with (
        Anthropic(base_url=server.base, auth_token="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(model=MODEL, messages=messages(0), max_tokens=9)


def test_hanging_up_aborts_the_question_in_both(openais, anthropics, server):
    aborted = server.metric('vilavt_episodes_total{finish="aborted"}')
    stream = openais.responses.create(model=MODEL, input=items(0), stream=True)
    next(iter(stream))
    stream.close()
    stream = anthropics.messages.create(model=MODEL, messages=messages(0), max_tokens=2000, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(600):
        if server.metric('vilavt_episodes_total{finish="aborted"}') >= aborted + 2:
            break
        time.sleep(0.1)
    assert server.metric('vilavt_episodes_total{finish="aborted"}') >= aborted + 2
    assert server.metric("vilavt_episodes_running") == 0
