"""What a server says to requests of other people's clients: accepted, accepted and listed as ignored, or refused in
which words. One table, through the route, with a model that always says the same."""

import asyncio
import base64
import io
import json
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from vllm import __version__ as vllm_version
from vllm.config import ModelConfig

from vilavt_core.wire import read_chunk, read_told
from vilavt_vllm import register, support

if problem := support.server_problem(vllm_version):
    pytest.skip(problem, allow_module_level=True)

from vilavt_vllm.server.endpoint import VilavtEndpoint
from vilavt_vllm.server.options import ServerOptions
from vilavt_vllm.server.requests import ChatRequest

CHECKPOINT = str(Path(__file__).parents[2] / "examples" / "vilavt-tiny")
README = Path(__file__).parents[2] / "vilavt_vllm" / "README.md"
RAW = "run the loop yourself against /v1/raw/chat/completions"


def picture(width: int = 56, height: int = 56) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


DATA = picture()
URL = f"data:image/png;base64,{DATA}"
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
TEXT = {"type": "text", "text": "What?"}

OK = ()
"""Accepted, and nothing is ignored."""

FIELDS = [
    # values that cannot change the answer
    ({"n": 1}, OK),
    ({"best_of": 1}, OK),
    ({"num_return_sequences": 1}, OK),
    ({"logit_bias": {}}, OK),
    ({"logit_bias": None}, OK),
    ({"min_p": 0}, OK),
    ({"min_p": 0.0}, OK),
    ({"top_a": 0}, OK),
    ({"typical_p": 1.0}, OK),
    ({"tfs_z": 1}, OK),
    ({"mirostat": 0}, OK),
    ({"presence_penalty": 0}, OK),
    ({"presence_penalty": 0.0, "frequency_penalty": 0.0}, OK),
    ({"length_penalty": 1}, OK),
    ({"length_penalty": 1.0}, OK),
    ({"early_stopping": False}, OK),
    ({"use_beam_search": False}, OK),
    ({"stop": []}, OK),
    ({"stop": ""}, OK),
    ({"stop": [""]}, OK),
    ({"stop": None}, OK),
    ({"stop_token_ids": []}, OK),
    ({"ignore_eos": False}, OK),
    ({"min_tokens": 0}, OK),
    ({"skip_special_tokens": True}, OK),
    ({"chat_template_kwargs": {}}, OK),
    ({"chat_template_kwargs": {"enable_thinking": True, "add_generation_prompt": True}}, OK),
    ({"chat_template_kwargs": {"enable_thinking": None}}, OK),
    ({"enable_thinking": True}, OK),
    ({"add_generation_prompt": True}, OK),
    ({"continue_final_message": False}, OK),
    ({"add_special_tokens": False}, OK),
    ({"logprobs": False}, OK),
    ({"top_logprobs": 0}, OK),
    ({"logprobs": None, "top_logprobs": None}, OK),
    ({"prompt_logprobs": None}, OK),
    ({"echo": False}, OK),
    ({"modalities": ["text"]}, OK),
    ({"response_format": {"type": "text"}}, OK),
    ({"response_format": None}, OK),
    ({"tools": []}, OK),
    ({"tools": None, "tool_choice": "auto"}, OK),
    ({"tool_choice": "none"}, OK),
    ({"functions": [], "function_call": "none"}, OK),
    ({"bad_words": []}, OK),
    ({"mm_processor_kwargs": {}}, OK),
    ({"mm_processor_kwargs": None, "media_io_kwargs": {}}, OK),
    ({"structured_outputs": None}, OK),
    ({"extra_body": {}}, OK),
    ({"return_token_ids": False}, OK),
    ({"routed_experts_prompt_start": 0}, OK),
    ({"user": None, "metadata": None}, OK),
    ({"stream_options": None}, OK),
    ({"stream_options": {"include_usage": True}}, OK),
    ({"stream_options": {"include_usage": True, "continuous_usage_stats": False}}, OK),
    ({"vilavt": None}, OK),
    ({"vilavt": {}}, OK),
    ({"stream": None}, OK),
    # what is honoured
    ({"temperature": 0}, OK),
    ({"temperature": None, "top_p": None, "seed": None, "max_tokens": None}, OK),
    ({"temperature": 0.7, "top_p": 0.9, "top_k": -1, "repetition_penalty": 1.1, "seed": 5}, OK),
    ({"seed": -1}, OK),
    ({"max_tokens": 10}, OK),
    ({"max_completion_tokens": 10**6}, OK),
    ({"vilavt": {"max_turns": 1, "max_pixels": 20_000}}, OK),
    # hints, and what nobody knows
    ({"user": "me"}, ("user",)),
    ({"metadata": {"a": "b"}}, ("metadata",)),
    ({"store": True}, ("store",)),
    ({"service_tier": "auto"}, ("service_tier",)),
    ({"safety_identifier": "x"}, ("safety_identifier",)),
    ({"prompt_cache_key": "k"}, ("prompt_cache_key",)),
    ({"prompt_cache_retention": "24h"}, ("prompt_cache_retention",)),
    ({"reasoning_effort": "low"}, ("reasoning_effort",)),
    ({"verbosity": "low"}, ("verbosity",)),
    ({"prediction": {"type": "content", "content": "x"}}, ("prediction",)),
    ({"parallel_tool_calls": True}, ("parallel_tool_calls",)),
    ({"include_reasoning": True}, ("include_reasoning",)),
    ({"request_id": "r", "session_id": "s", "priority": 3}, ("priority", "request_id", "session_id")),
    ({"provider": {"order": ["x"]}, "transforms": []}, ("provider", "transforms")),
    ({"keep_alive": "5m"}, ("keep_alive",)),
    ({"x-my-own": 1}, ("x-my-own",)),
    ({"drop_params": True, "caching": False}, ("caching", "drop_params")),
    ({"stream_options": {"include_obfuscation": False}}, ("stream_options.include_obfuscation",)),
    # what would change the answer
    (
        {"n": 2},
        "n=2 is not supported here, where the server runs the model's zoom loop; send the request several times",
    ),
    ({"n": True}, "n=true is not supported here"),
    ({"n": "two"}, 'n="two" is not supported here'),
    ({"best_of": 4}, "best_of=4 is not supported here"),
    ({"use_beam_search": True}, "use_beam_search=true is not supported here"),
    ({"logit_bias": {"5": 100}}, "logit_bias="),
    ({"min_p": 0.1}, "min_p=0.1 is not supported here"),
    ({"top_a": 0.2}, "top_a=0.2 is not supported here"),
    ({"typical_p": 0.5}, "typical_p=0.5 is not supported here"),
    ({"mirostat": 2}, "mirostat=2"),
    ({"presence_penalty": 0.5}, "presence_penalty=0.5 is not supported here"),
    ({"frequency_penalty": -1}, "frequency_penalty=-1 is not supported here"),
    ({"length_penalty": 0.8}, "length_penalty=0.8"),
    (
        {"do_sample": False},
        "do_sample=false is not supported here, where the server runs the model's zoom loop; say temp",
    ),
    (
        {"stop": "x"},
        f'stop="x" is not supported here, where the server runs the model\'s zoom loop; leave it out, or {RAW}',
    ),
    ({"stop": ["", "x"]}, "stop="),
    ({"stop": 5}, "stop=5"),
    ({"stop_sequences": ["x"]}, "stop_sequences="),
    ({"stop_token_ids": [5]}, "stop_token_ids=[5]"),
    ({"ignore_eos": True}, "ignore_eos=true"),
    ({"min_tokens": 5}, "min_tokens=5"),
    (
        {"max_new_tokens": 5},
        "max_new_tokens=5 is not supported here, where the server runs the model's zoom loop; say max_",
    ),
    ({"max_length": 5}, "say max_tokens"),
    ({"num_predict": 5}, "say max_tokens"),
    ({"thinking_token_budget": 5}, "say max_tokens"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens=5"),
    ({"response_format": {"type": "json_object"}}, "ask for the format in the question"),
    ({"response_format": {"type": "json_schema", "json_schema": {"a": "b" * 500}}}, "response_format="),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs="),
    ({"guided_json": {"type": "object"}}, "guided_json="),
    ({"guided_choice": ["a"]}, "guided_choice="),
    ({"format": "json"}, 'format="json"'),
    ({"skip_special_tokens": False}, "skip_special_tokens=false"),
    ({"modalities": ["text", "audio"]}, "the answer is text"),
    ({"audio": {"voice": "alloy"}}, "the answer is text"),
    ({"logprobs": True}, "logprobs=true is not supported here"),
    ({"top_logprobs": 5}, "top_logprobs=5"),
    ({"prompt_logprobs": 0}, "prompt_logprobs=0"),
    ({"return_token_ids": True}, "return_token_ids=true"),
    ({"echo": True}, "echo=true"),
    ({"tools": [{}]}, "carries out the model's own zooms and calls no functions"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools="),
    ({"tool_choice": "required"}, "tool_choice="),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice="),
    ({"functions": [{"name": "f"}]}, "functions="),
    ({"web_search_options": {}}, "web_search_options={}"),
    (
        {"prompt": "Hi"},
        'prompt="Hi" is not supported here, where the server runs the model\'s zoom loop; put it into mess',
    ),
    ({"system": "Be brief."}, "with the role system"),
    ({"images": [URL]}, "images="),
    ({"documents": [{"text": "x"}]}, "documents="),
    ({"chat_template": "{{ x }}"}, "chat_template="),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs="),
    ({"chat_template_kwargs": {"a": 1}}, 'chat_template_kwargs={"a": 1}'),
    ({"enable_thinking": False}, "the model always thinks before it zooms or answers"),
    ({"add_generation_prompt": False}, "add_generation_prompt=false"),
    ({"continue_final_message": True}, "continue_final_message=true"),
    ({"mm_processor_kwargs": {"max_pixels": 5}}, "say min_pixels and max_pixels beside image_url"),
    ({"max_pixels": 5000}, 'put it into the field vilavt: {"max_pixels": …}'),
    ({"max_turns": 2}, 'put it into the field vilavt: {"max_turns": …}'),
    ({"cache_salt": "x"}, "cache_salt="),
    ({"lora_request": "x"}, "name the model in the field model"),
    ({"extra_body": {"seed": 1}}, "put its keys beside the other fields"),
    # misspelt
    ({"temprature": 0.5}, "temprature: there is no such field; did you mean temperature?"),
    ({"maxTokens": 5}, "maxTokens: there is no such field; did you mean max_tokens?"),
    ({"topP": 0.5}, "topP: there is no such field; did you mean top_p?"),
    ({"max_token": 5}, "max_token: there is no such field; did you mean max_tokens?"),
    ({"max_completion_token": 5}, "did you mean max_completion_tokens?"),
    ({"repetition_penality": 5}, "did you mean repetition_penalty?"),
    ({"streams": True}, "did you mean stream?"),
    (
        {"stream_options": {"include_usages": True}},
        "stream_options.include_usages: there is no such field; did you mean",
    ),
    ({"vilavt": {"max_turn": 3}}, "vilavt.max_turn: Extra inputs"),
    # out of range, or of another kind
    ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
    ({"temperature": 3}, "temperature: "),
    ({"temperature": "hot"}, "temperature: "),
    ({"top_p": 0}, "top_p: "),
    ({"top_k": -2}, "top_k: "),
    ({"top_k": 1e29}, "top_k: "),
    ({"top_k": 0.5}, "top_k: "),
    ({"seed": 2**64}, "seed: "),
    ({"seed": "x"}, "seed: "),
    ({"max_tokens": 0}, "max_tokens: "),
    ({"max_completion_tokens": -1}, "max_completion_tokens: "),
    ({"stream": "perhaps"}, "stream: "),
    ({"stream_options": 5}, "stream_options: "),
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": "Hi"}, "messages: "),
    ({"messages": ["Hi"]}, "messages[0]: "),
    ({"vilavt": {"max_turns": 50}}, "vilavt.max_turns is 50, this server allows at most 5"),
    ({f"field {number}": 1 for number in range(65)}, "the request has 65 further fields, at most 64 are looked at"),
]

CONTENTS = [
    # accepted as they are
    ("What?", OK),
    ([TEXT], OK),
    ([TEXT, TEXT], OK),
    (["What?"], OK),
    ([IMAGE, TEXT], OK),
    ([{"text": "What?"}], OK),
    ([{"type": "input_text", "text": "What?"}], OK),
    ([{"type": "image_url", "image_url": URL}, TEXT], OK),
    ([{"image_url": {"url": URL}}, TEXT], OK),
    ([{"type": "input_image", "image_url": URL}, TEXT], OK),
    ([{"type": "image_url", "image_url": {"url": URL, "detail": "auto"}}, TEXT], OK),
    ([{"type": "image_url", "image_url": {"url": URL, "detail": None}}, TEXT], OK),
    ([{"type": "image_url", "image_url": {"url": URL}, "max_pixels": 20_000}, TEXT], OK),
    ([{"type": "image_url", "image_url": {"url": URL, "max_pixels": 20_000}}, TEXT], OK),
    ([{"type": "image_url", "image_url": {"url": URL}, "min_pixels": 3136, "max_pixels": 20_000.0}, TEXT], OK),
    ([{"type": "image_url", "image_url": {"url": URL}, "max_pixels": None}, TEXT], OK),
    ([{"type": "image_url", "image_url": {"url": URL.replace("base64,", "base64,\n") + "\n"}}, TEXT], OK),
    ([], OK),
    # with harmless extras
    ([{**TEXT, "cache_control": {"type": "ephemeral"}}], ("messages[0].content[0].cache_control",)),
    ([{**TEXT, "cache_control": None, "annotations": []}], OK),
    ([{**TEXT, "id": "x"}, {**IMAGE, "uuid": "y"}], ("messages[0].content[0].id", "messages[0].content[1].uuid")),
    (
        [{"type": "image_url", "image_url": {"url": URL, "detail": "high"}}, TEXT],
        ("messages[0].content[0].image_url.detail",),
    ),
    (
        [{"type": "image_url", "image_url": {"url": URL, "format": "image/png"}}, TEXT],
        ("messages[0].content[0].image_url.format",),
    ),
    ([{**IMAGE, "format": "png", "detail": "low"}], ("messages[0].content[0].detail", "messages[0].content[0].format")),
    # of another kind
    (None, "messages[0].content: it is null, it must be a text or a list of parts"),
    (5, "messages[0].content: it is a number, it must be a text or a list of parts"),
    (True, "messages[0].content: it is true or false"),
    ({"type": "text", "text": "x"}, "messages[0].content: it is an object, it must be a text or a list of parts"),
    ([5], "messages[0].content[0]: a part is an object or a text, this is a number"),
    ([TEXT, None], "messages[0].content[1]: a part is an object or a text, this is null"),
    ([[TEXT]], "messages[0].content[0]: a part is an object or a text, this is a list"),
    ([{}], "messages[0].content[0]: type is missing, it must be text, image_url or video_url"),
    ([{"type": 5}], "messages[0].content[0]: type is a number, it must be text, image_url or video_url"),
    ([{"type": "text"}], "messages[0].content[0].text: Field required"),
    ([TEXT, {"type": "text", "text": None}], "messages[0].content[1].text: Input should be a valid string"),
    ([{"type": "text", "text": ["x"]}], "messages[0].content[0].text: Input should be a valid string"),
    ([{"type": "image_url"}], "messages[0].content[0].image_url: Field required"),
    ([{"type": "image_url", "image_url": {}}], "messages[0].content[0].image_url.url: Field required"),
    ([{"type": "image_url", "image_url": None}], "messages[0].content[0].image_url: "),
    ([{"type": "image_url", "image_url": {"url": 5}}], "messages[0].content[0].image_url.url: Input should be a valid"),
    ([{"type": "image_url", "image_url": ""}, TEXT], "'' is no URL; "),
    ([{"type": "image_url", "image_url": DATA}, TEXT], " characters is no URL; "),
    ([{"type": "image_url", "image_url": "a.png"}, TEXT], "'a.png' is no URL; "),
    ([{"type": "image_url", "url": URL}], "messages[0].content[0].image_url: Field required"),
    # kinds that this route cannot use
    (
        [{"type": "image"}],
        'messages[0].content[0]: type \'image\' is not supported: send an image as {"type": "image_url"',
    ),
    (
        [TEXT, {"type": "image", "image": URL}],
        "messages[0].content[1]: type 'image' is not supported: ",
    ),
    (
        [{"type": "image", "source": {"type": "base64", "data": DATA}}],
        "type 'image' is not supported: ",
    ),
    ([{"type": "image_pil"}], "type 'image_pil' is not supported"),
    ([{"type": "input_audio", "input_audio": {}}], "type 'input_audio' is not supported: the model does not hear"),
    ([{"type": "file", "file": {}}], "type 'file' is not supported: send pages as image_url parts, or their text"),
    ([{"type": "tool_result", "content": "x"}], "type 'tool_result' is not supported: the loop calls no functions"),
    ([{"type": "hologram"}], "type 'hologram' is not supported: known are text, image_url and video_url"),
    ([{"type": "x" * 10_000}], "messages[0].content[0]: type 'xxx"),
    # what would be lost
    ([{**TEXT, "image_url": {"url": URL}}], "messages[0].content[0].image_url="),
    ([{**IMAGE, "text": "What?"}], 'messages[0].content[0].text="What?" is not supported here'),
    ([{**IMAGE, "resized_height": 28}], "messages[0].content[0].resized_height=28 is not supported here"),
    (
        [{**IMAGE, "resized_width": 28}, TEXT],
        "min_pixels and max_pixels",
    ),
    (
        [{**IMAGE, "max_pixel": 5000}],
        "messages[0].content[0].max_pixel: there is no such field; did you mean max_pixels?",
    ),
    # bounds
    ([{**IMAGE, "max_pixels": 10**9}], "messages[0].content[0].max_pixels is 1000000000, this request allows 3136 to"),
    ([{**IMAGE, "max_pixels": 1}], "messages[0].content[0].max_pixels is 1, this request allows 3136 to"),
    ([{**IMAGE, "min_pixels": 10**9}], "messages[0].content[0].min_pixels is 1000000000, this request allows 3136 to"),
    ([{**IMAGE, "max_pixels": 0}], "messages[0].content[0].max_pixels: Input should be greater than 0"),
    ([{**IMAGE, "max_pixels": "many"}], "messages[0].content[0].max_pixels: "),
    ([{**IMAGE, "min_pixels": 20_000, "max_pixels": 10_000}], "min_pixels 20000 is above max_pixels 10000"),
    (
        [{"type": "image_url", "image_url": {"url": URL, "max_pixels": 5000}, "max_pixels": 6000}],
        "messages[0].content[0]: max_pixels is 6000 beside image_url and 5000 in it; say it once",
    ),
]

USER, SAID = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "4"}
MESSAGES = [
    ([{"role": "system", "content": "Be brief."}, USER], OK),
    ([{"role": "developer", "content": "Be brief."}, USER], OK),
    ([{"role": "system", "content": [TEXT]}, {"role": "developer", "content": "b"}, USER], OK),
    ([USER, USER], OK),
    ([USER, SAID, USER], OK),
    ([USER, SAID, SAID, USER], OK),
    ([USER, {"role": "assistant", "content": None}, USER], OK),
    ([USER, {"role": "assistant"}, USER], OK),
    ([USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, USER], OK),
    ([USER, {**SAID, "refusal": None, "audio": None, "tool_calls": None, "function_call": None}, USER], OK),
    ([USER, {**SAID, "tool_calls": [], "prefix": False}, USER], OK),
    ([USER, {**SAID, "annotations": []}, USER], OK),
    ([USER, {**SAID, "annotations": [{"type": "url_citation"}]}, USER], ("messages[1].annotations",)),
    ([USER, {**SAID, "reasoning_content": "I thought."}, USER], ("messages[1].reasoning_content",)),
    ([{**USER, "name": "Ann"}], ("messages[0].name",)),
    ([{**USER, "cache_control": {"type": "ephemeral"}}], ("messages[0].cache_control",)),
    ([{"role": "user"}], "messages[0].content: it is null"),
    ([{"role": "system", "content": None}, USER], "messages[0].content: it is null"),
    ([{"content": "What?"}], "messages[0].role: Field required"),
    ([{"role": 5, "content": "What?"}], "messages[0].role: Input should be a valid string"),
    (
        [{"role": "human", "content": "x"}],
        "messages[0].role: role 'human' is not supported: known are system, developer",
    ),
    (
        [USER, SAID, {"role": "tool", "content": "4"}],
        "messages[2].role: role 'tool' is not supported: the loop calls no",
    ),
    ([USER, {**SAID, "tool_calls": [{"id": "x"}]}, USER], "messages[1].tool_calls="),
    ([USER, {**SAID, "prefix": True}, USER], "an answer cannot be begun for the model"),
    ([{**USER, "images": [DATA]}], "messages[0].images="),
    ([{**USER, "contents": "x"}], "messages[0].contents: there is no such field; did you mean content?"),
    ([USER, SAID], "the last message is the assistant's, it must be the user's"),
    ([SAID, USER], "messages[0] has the role 'assistant', the first question is the user's"),
    (
        [USER, {"role": "assistant", "content": [IMAGE]}, USER],
        "messages[1]: a message of the role assistant holds no image",
    ),
    ([{"role": "system", "content": [IMAGE]}, USER], "messages[0]: a message of the role system holds no image"),
]

SHAPES = [
    *(({"messages": [USER], **fields}, expected) for fields, expected in FIELDS),
    *(({"messages": [{"role": "user", "content": content}]}, expected) for content, expected in CONTENTS),
    *(({"messages": messages}, expected) for messages, expected in MESSAGES),
]


def named(shape) -> str:
    body = {key: value for key, value in shape[0].items() if key != "messages" or shape[0]["messages"] != [USER]}
    return json.dumps(body.get("messages", body) or body).replace(DATA, "…")[:60]


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """A server whose model answers every question at once."""
    register()
    app, endpoint = FastAPI(), VilavtEndpoint()
    endpoint.attach_router(app)
    app.state.openai_serving_models = SimpleNamespace(is_base_model=lambda name: False, model_name=lambda: "tiny")
    engine = SimpleNamespace(model_config=ModelConfig(model=CHECKPOINT))
    asyncio.run(endpoint.init_state(engine, app.state, Namespace(vilavt=ServerOptions())))

    async def events(driver, handling):
        for event in [*driver.start(), *driver.take_text("<think>Red.</think><answer>4</answer>")]:
            yield event

    app.state.vilavt_loop.llm.events = events
    return app


def post(app: FastAPI, body: dict) -> httpx.Response:
    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post("/v1/chat/completions", json=body)

    return asyncio.run(send())


@pytest.mark.parametrize("body, expected", SHAPES, ids=map(named, SHAPES))
def test_a_request_is_accepted_or_refused_in_these_words(app, body, expected):
    response = post(app, body)
    if isinstance(expected, str):
        message = response.json()["error"]["message"]
        assert response.status_code == 400
        assert expected in message
        assert len(message) < 400
        return
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        told = response.json()["vilavt"]
        assert told["finish"] == "answer"
        assert sorted(told["ignored"]) == sorted(expected)
        assert read_told(told).ignored == tuple(told["ignored"])


def test_the_table_is_long_enough_and_has_every_outcome():
    assert len(SHAPES) >= 150
    kinds = [expected == OK or isinstance(expected, str) or "ignored" for _, expected in SHAPES]
    assert min(kinds.count(kind) for kind in (True, "ignored")) > 20


def test_a_stream_says_in_its_end_what_was_ignored(app):
    response = post(app, {"messages": [USER], "stream": True, "user": "me"})
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    (end,) = [chunk["vilavt"] for chunk in chunks if chunk.get("vilavt", {}).get("type") == "end"]
    *_, finished = read_chunk(end)
    assert finished.result.ignored == ("user",)


def test_many_ignored_fields_are_counted_instead_of_listed():
    notes = [{**TEXT, "cache_control": {"type": "ephemeral"}}] * 150
    ignored = ChatRequest.model_validate({"messages": [{"role": "user", "content": notes}]}).ignored()
    assert (len(ignored), ignored[-1]) == (101, "… and 50 more")


LONG = " ".join(f"It was {number} o'clock." for number in range(60))


@pytest.mark.parametrize(
    "limits",
    [{"max_tokens": 16}, {"max_completion_tokens": 1}, {"vilavt": {"max_new_tokens_per_turn": 8, "max_turns": 1}}],
    ids=str,
)
@pytest.mark.parametrize("said", [LONG, "", "<answer>", "<tool>{}</tool>", "<think>", "</answer>x", " \n", None])
def test_no_limit_of_a_request_bounds_what_was_said_before_it(app, limits, said, monkeypatch):
    allowed = []

    async def cut_off(driver, handling):
        driver.start()
        allowed.append(driver.request.max_new_tokens)
        for event in driver.take([], finish="length"):
            yield event

    with monkeypatch.context() as patch:
        patch.setattr(app.state.vilavt_loop.llm, "events", cut_off)
        response = post(app, {"messages": [USER, {"role": "assistant", "content": said}, USER], **limits})
    assert response.status_code == 200, response.text
    assert response.json()["vilavt"]["finish"] == "length"
    assert allowed == [next(iter(limits.get("vilavt", limits).values()))]


def test_a_history_beyond_the_context_is_refused_with_the_numbers(app):
    response = post(app, {"messages": [USER, {**SAID, "content": LONG}, USER], "vilavt": {"max_context": 300}})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert re.search(r"so far has \d{3,4} tokens, at most 300 are allowed", message)
    assert "--max-model-len" in message


def test_the_readme_shows_the_rule():
    text = " ".join(README.read_text().split())
    for word in ("`vilavt.ignored`", "did you mean", "`max_pixels`"):
        assert word in text
