"""Requests, responses, memory and pictures of the server, without an engine."""

import asyncio
import base64
import dataclasses
import io
import json
import os
import re
from argparse import Namespace
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from hostile_pictures import CORPUS, MEGABYTE, webp
from measuring import measured
from new_limit import with_a_new_limit
from PIL import Image
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from vllm import __version__ as vllm_version
from vllm.config import ModelConfig
from vllm.lora.request import LoRARequest

from vilavt_core.conversation import Thoughts, longest_token
from vilavt_core.driver import Driver
from vilavt_core.images import DecodingCost, ImageLimits
from vilavt_core.presets import Limits, Sampling
from vilavt_core.protocol import FinishReason
from vilavt_core.regions import PixelBounds
from vilavt_core.results import BilledTokens, TextDelta
from vilavt_core.wire import Reply, finish_reason
from vilavt_vllm import register, support
from vilavt_vllm.episodes import Handling
from vilavt_vllm.errors import LimitError, RequestError, UnsupportedError

if problem := support.server_problem(vllm_version):
    pytest.skip(problem, allow_module_level=True)

from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from vilavt_vllm.server.budget import PictureBudget
from vilavt_vllm.server.command import allow_plugins, parser
from vilavt_vllm.server.dialects import DIALECTS
from vilavt_vllm.server.endpoint import VilavtEndpoint
from vilavt_vllm.server.history import History, Kept
from vilavt_vllm.server.media import Pictures
from vilavt_vllm.server.metrics import queued_turns
from vilavt_vllm.server.options import ServerOptions, flags, options_of
from vilavt_vllm.server.requests import ChatRequest, Exchange, SentPicture, exchanges

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = str(EXAMPLES / "vilavt-tiny")
PICTURES = EXAMPLES / "pictures"
README = EXAMPLES.parent / "vilavt_vllm" / "README.md"


def request(**fields) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}], **fields})


def messages(*pairs):
    """A conversation as `exchanges` takes it."""
    return request(messages=[{"role": role, "content": content} for role, content in pairs]).placed()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "png")
    return file.getvalue()


# Conversations


def test_messages_become_questions_and_answers_with_the_system_message_in_front_of_the_first_question():
    image = {"type": "image_url", "image_url": {"url": "u", "detail": "high"}, "max_pixels": 5000}
    talk = exchanges(
        messages(
            ("system", "Be brief."),
            ("user", [image, {"type": "text", "text": "One?"}, {"type": "text", "text": "Now."}]),
            ("assistant", "1"),
            ("user", "Two?"),
        )
    )
    shown = SentPicture("u", PixelBounds(max_pixels=5000))
    assert talk == [Exchange((shown,), "Be brief.\n\nOne?\nNow.", "1"), Exchange((), "Two?")]


@pytest.mark.parametrize(
    "pairs, expected",
    [
        ([("user", "a"), ("user", "b")], [("a\n\nb", None)]),
        ([("developer", "d"), ("system", "s"), ("user", "a")], [("d\n\ns\n\na", None)]),
        ([("user", "a"), ("system", "s")], [("a\n\ns", None)]),
        ([("user", "a"), ("system", "s"), ("user", "b")], [("a\n\ns\n\nb", None)]),
        ([("user", "a"), ("assistant", None), ("user", "b")], [("a", ""), ("b", None)]),
        ([("user", "a"), ("assistant", "1"), ("assistant", "2"), ("user", "b")], [("a", "1\n\n2"), ("b", None)]),
        (
            [("user", "a"), ("assistant", "1"), ("developer", "d"), ("user", "b")],
            [("a", "1"), ("d\n\nb", None)],
        ),
        ([("user", ""), ("user", "b")], [("b", None)]),
    ],
)
def test_messages_in_a_row_of_one_side_are_joined(pairs, expected):
    assert [(one.question, one.answer) for one in exchanges(messages(*pairs))] == expected


def test_joining_loses_no_text_and_changes_no_order():
    """Every order of roles in up to five messages, if it is a conversation."""
    conversations = 0
    for roles in chain.from_iterable(
        product(("system", "developer", "user", "assistant"), repeat=n) for n in range(1, 6)
    ):
        texts = [f"text {number}" for number in range(len(roles))]
        try:
            talk = exchanges(messages(*zip(roles, texts, strict=True)))
        except RequestError:
            continue
        conversations += 1
        said = [text for one in talk for text in (one.question, one.answer) if text is not None]
        assert "\n\n".join(said).split("\n\n") == texts
        assert roles[-1] != "assistant"
    assert conversations > 200


def test_pictures_of_joined_messages_stay_in_order():
    def picture(url):
        return [{"type": "image_url", "image_url": url}]

    (talk,) = exchanges(messages(("user", picture("1")), ("user", picture("2")), ("user", "Which?")))
    assert talk == Exchange((SentPicture("1"), SentPicture("2")), "Which?")


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([("assistant", "1")], r"messages\[0\] has the role 'assistant', the first question is the user's"),
        ([("system", "s"), ("assistant", "1")], r"messages\[0\] has the role 'system', a message of the user must"),
        ([("user", "a"), ("assistant", "b")], "the last message is the assistant's, it must be the user's"),
        ([("system", "s")], r"messages\[0\] has the role 'system', a message of the user must be beside it"),
        ([("user", "a"), ("assistant", "b"), ("developer", "d")], r"messages\[2\] has the role 'developer'"),
    ],
)
def test_messages_out_of_turn_are_refused_by_number(pairs, message):
    with pytest.raises(RequestError, match=message):
        exchanges(messages(*pairs))


def test_an_assistant_message_cannot_bring_an_image():
    image = [{"type": "image_url", "image_url": {"url": "u"}}]
    with pytest.raises(RequestError, match=r"messages\[1\]: a message of the role assistant holds no image"):
        exchanges(messages(("user", "a"), ("assistant", image), ("user", "b")))


def run_of(size: int) -> Kept:
    """A finished run as `History` sees it."""
    return Kept(SimpleNamespace(picture_bytes=size), None)


def test_a_conversation_is_found_by_exactly_what_was_said_and_shown():
    history, run = History(8, 100), run_of(10)
    said = [Exchange((SentPicture("picture"),), "One?", "1")]
    history.keep(said, run)
    assert history.find(said) is run
    smaller = SentPicture("picture", PixelBounds(max_pixels=5000))
    for pictures, question in (
        ((SentPicture("other"),), "One?"),
        ((smaller,), "One?"),
        ((SentPicture("picture"),), "One"),
        ((), "One?"),
    ):
        assert history.find([Exchange(pictures, question, "1")]) is None
    assert history.find([*said, Exchange((), "Two?", "2")]) is None


@pytest.mark.parametrize("returned", [" two  words\n", "two words", "two\r\nwords", "two\nwords\n\n"])
def test_blanks_of_a_returned_answer_do_not_lose_the_conversation(returned):
    history, run = History(8, 100), run_of(10)
    history.keep([Exchange((), "One?", "two\nwords ")], run)
    assert history.find([Exchange((), "One?", returned)]) is run
    assert history.find([Exchange((), "One?", "twowords")]) is None


def test_the_conversation_used_longest_ago_is_forgotten_first_by_number_and_by_bytes():
    def said(n):
        return [Exchange((), str(n), "a")]

    history = History(2, 100)
    for n in (0, 1):
        history.keep(said(n), run_of(10))
    assert history.find(said(0)) is not None
    history.keep(said(2), run_of(10))
    assert [history.find(said(n)) is not None for n in range(3)] == [True, False, True]
    history.keep(said(2), run_of(95))  # the same one, grown
    assert (len(history), history.bytes) == (1, 95)
    history.keep(said(3), run_of(101))
    assert (len(history), history.bytes) == (0, 0)


# Requests


def test_a_request_may_tighten_the_servers_limits_and_not_loosen_them():
    server = Limits(max_turns=4, max_new_tokens_per_turn=100, max_context=1000)
    assert request(vilavt={"max_turns": 2}).limits(server).max_turns == 2
    assert request(max_tokens=50).limits(server).max_new_tokens_per_turn == 50
    assert request(max_tokens=5000).limits(server).max_new_tokens_per_turn == 100
    whole = request(max_completion_tokens=5000, max_tokens=70).limits(server)
    assert (whole.max_answer_tokens, whole.max_new_tokens_per_turn) == (5000, 70)
    assert request(max_completion_tokens=5000).limits(replace(server, max_answer_tokens=300)).max_answer_tokens == 300
    both = request(max_completion_tokens=9, max_tokens=90, vilavt={"max_answer_tokens": 8, "max_turns": 1})
    assert (both.limits(server).max_answer_tokens, both.limits(server).max_new_tokens_per_turn) == (8, 90)
    assert request(vilavt={"max_total_pixels": 5e6}).limits(server).max_total_pixels == 5e6
    for name, value, most in (("max_turns", 5, 4), ("max_context", 1001, 1000), ("crop_max_pixels", 1e8, 6422528)):
        with pytest.raises(LimitError, match=rf"vilavt.{name} is \d+, this server allows at most {most};"):
            request(vilavt={name: value}).limits(server)


def test_sampling_starts_from_the_servers():
    server = Sampling(temperature=0.7, top_p=0.9, top_k=20)
    assert request().sampling(server) == server
    assert request(temperature=0, top_k=-1).sampling(server) == Sampling(temperature=0, top_p=0.9, top_k=0)


# Responses


def test_thoughts_are_the_text_between_the_tags_however_it_is_cut():
    text = "so <think>a < b </th</think><tool>{}</tool><think>no</think>"
    for size in (1, 2, 3, 5, len(text)):
        thoughts = Thoughts()
        assert "".join(thoughts.feed(text[i : i + size]) for i in range(0, len(text), size)) == "a < b </th"


def test_a_budget_that_ends_a_question_is_length_and_everything_else_is_stop():
    for reason in FinishReason:
        budget = reason in ("length", "turn_limit", "image_limit", "context_limit")
        assert finish_reason(SimpleNamespace(answer=None, finish=reason)) == ("length" if budget else "stop")
    assert finish_reason(SimpleNamespace(answer="4", finish=FinishReason.ANSWER)) == "stop"


def test_streamed_thoughts_of_several_turns_join_as_in_a_whole_response():
    reply = Reply("m")
    parts = [TextDelta(0, "<think>one"), TextDelta(0, "</think><tool>"), TextDelta(1, "<think>"), TextDelta(1, "two")]
    chunks = [json.loads(c.removeprefix("data: ")) for p in parts if (c := reply.progress(p)) is not None]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(c["choices"][0]["delta"][name] for c in chunks) == "one\ntwo"
    assert {c["id"] for c in chunks} == {reply.head["id"]}


def test_usage_adds_up():
    assert BilledTokens(prompt=100, cached=60, sampled=7).to_json() == {
        "prompt_tokens": 100,
        "completion_tokens": 7,
        "total_tokens": 107,
        "prompt_tokens_details": {"cached_tokens": 60},
    }


# Pictures


LIMITS = ImageLimits()


def load(url: str, limits: ImageLimits = LIMITS, **allowed):
    config = SimpleNamespace(**{"allowed_local_media_path": "", "allowed_media_domains": None, **allowed})
    pictures = Pictures(config, limits, "strict", max_bytes=10**9)
    return asyncio.run(pictures.decode([url], PictureBudget(10**9, 10**10).reservation()))[url]


def test_pictures_come_from_data_urls_and_from_allowed_folders_only():
    file = PICTURES / "scene-1.png"
    expected = Image.open(file).convert("RGB")
    assert list(load(data_url(file.read_bytes())).getdata()) == list(expected.getdata())
    assert load(file.as_uri(), allowed_local_media_path=str(PICTURES)).size == expected.size
    with pytest.raises(ValueError, match="allowed"):
        load(file.as_uri())
    with pytest.raises(ValueError, match="allowed"):
        load((EXAMPLES / "vilavt-tiny" / "training.png").as_uri(), allowed_local_media_path=str(PICTURES))
    with pytest.raises(ValueError, match="allowed"):
        load(f"{PICTURES.as_uri()}/../vilavt-tiny/training.png", allowed_local_media_path=str(PICTURES))


def test_a_picture_that_cannot_be_fetched_is_the_clients_problem():
    with pytest.raises(RequestError, match=r"http://127\.0\.0\.1:1/a\.png: cannot be fetched"):
        load("http://127.0.0.1:1/a.png", allowed_media_domains=["127.0.0.1"])
    with pytest.raises(ValueError, match=r"gone\.png"):
        load((PICTURES / "gone.png").as_uri(), allowed_local_media_path=str(PICTURES))


def test_urls_are_fetched_from_allowed_domains_only():
    with pytest.raises(RequestError, match="this server fetches no such URL"):
        load("http://127.0.0.1:1/a.png")
    with pytest.raises(ValueError, match="allowed"):
        load("http://127.0.0.1:1/a.png", allowed_media_domains=["example.org"])


@pytest.mark.parametrize(
    "url, message",
    [
        (data_url(png(20_001, 20_000)), "400020000 pixels"),
        (data_url(b"x" * 1_000_004), "holds 1000005 bytes, at most 1000000 are allowed"),
        (data_url(b"no image"), "not an image in a format we read"),
        ("data:image/png;base64,!!!", "not valid base64"),
        ("ftp://host/a.png", "URL"),
        ("/etc/hostname", "URL"),
    ],
)
def test_what_is_no_picture_or_too_large_is_refused_before_it_is_decoded(url, message):
    with pytest.raises(ValueError, match=message):
        load(url, ImageLimits(max_bytes=1_000_000))


# The command


def test_every_option_and_every_limit_has_a_flag_and_a_help_text():
    names = {field.name for kind in (ServerOptions, Limits) for field in dataclasses.fields(kind)}
    assert {flag.name for flag in flags()} == names - {"limits"}
    help_text = " ".join(parser().format_help().split())
    assert all(flag.help and flag.option in help_text for flag in flags())


def test_flags_that_were_given_change_the_options_and_the_limits():
    given = vars(parser().parse_args(["--max-turns", "3", "--max-context", "900", "--seed", "7"]))
    options = options_of(given)
    assert options == ServerOptions(seed=7, limits={"max_turns": 3, "max_context": 900})
    assert options_of(vars(parser().parse_args([]))) == ServerOptions()


def test_the_readme_lists_every_flag():
    text = " ".join(README.read_text().split())
    for flag in flags():
        default = "" if flag.default is None else f"{flag.default} "
        assert f"| `{flag.option}` | {flag.help} | {default}|" in text


def test_a_new_limit_is_one_edit():
    """It is a flag, and a field of a request, held to the server's."""
    found = with_a_new_limit("""
from vilavt_vllm.errors import LimitError
from vilavt_vllm.server.command import parser
from vilavt_vllm.server.options import options_of
from vilavt_vllm.server.requests import ChatRequest
from vilavt_core.presets import Limits

def request(zooms):
    messages = [{"role": "user", "content": "What?"}]
    return ChatRequest.model_validate({"messages": messages, "vilavt": {"max_zooms": zooms}})

server = Limits(max_zooms=5)
try:
    request(6).limits(server)
except LimitError as error:
    above = str(error)
found = {
    "flag": dict(options_of(vars(parser().parse_args(["--max-zooms", "5"]))).limits),
    "help": "zooms of a conversation" in parser().format_help(),
    "request": request(4).limits(server).max_zooms,
    "above": above,
}
""")
    above = found.pop("above")
    assert found == {"flag": {"max_zooms": 5}, "help": True, "request": 4}
    assert "vilavt.max_zooms is 6, this server allows at most 5" in above


def test_allowing_our_plugins_leaves_the_others_allowed(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")  # so that it is put back as it was
    monkeypatch.delenv("VLLM_PLUGINS")
    allow_plugins()
    assert {"vilavt", "vilavt_loop"} <= set(os.environ["VLLM_PLUGINS"].split(","))
    monkeypatch.setenv("VLLM_PLUGINS", "other,vilavt")
    allow_plugins()
    assert os.environ["VLLM_PLUGINS"] == "other,vilavt,vilavt_loop"


# The route, with an engine that must not be asked


@pytest.fixture(scope="module")
def app():
    """`app(**options)` -> the application of a server whose engine fails if it is asked for anything."""
    register()
    config = ModelConfig(model=CHECKPOINT)

    async def render(prompts, **_):
        return prompts

    def build(**options) -> FastAPI:
        engines = SimpleNamespace(local_engines_only=False, data_parallel_size=1)
        engine = SimpleNamespace(
            model_config=config,
            renderer=SimpleNamespace(render_cmpl_async=render),
            vllm_config=SimpleNamespace(parallel_config=engines),
        )
        app, endpoint = FastAPI(), VilavtEndpoint()
        endpoint.attach_router(app)
        app.state.openai_serving_models = SimpleNamespace(
            is_base_model=lambda n: n == "tiny", model_name=lambda: "tiny"
        )
        asyncio.run(endpoint.init_state(engine, app.state, Namespace(vilavt=ServerOptions(**options))))
        return app

    return build


def post(app: FastAPI, body, **headers) -> httpx.Response:
    async def send():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post(
                "/v1/chat/completions", content=content, headers={"Content-Type": "application/json", **headers}
            )

    return asyncio.run(send())


def question(*images: str, **fields) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "Which digit?"}]}], **fields}


def error_of(response: httpx.Response) -> str:
    return response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "Invalid JSON"),
        (b"[" * 100_000, "body"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({}, "messages: Field required"),
        (question(temperature=-1), "temperature"),
        (question(n=3), "n=3 is not supported"),
        (question(vilavt={"max_turn": 3}), "vilavt.max_turn: Extra inputs"),
        (question(vilavt={"max_turns": 50}), "vilavt.max_turns is 50, this server allows at most 5"),
        (question("file:///etc/passwd"), "allowed"),
        (question("http://127.0.0.1/x.png"), "this server fetches no such URL"),
        (question(data_url(png(20_001, 20_000))), "400020000 pixels"),
        (question(*[data_url(png(30, 30))] * 60), "the request has 60 images, at most 52 are allowed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_400_with_the_reason_and_occupies_nothing(app, body, message, stream):
    server = app()
    if isinstance(body, dict):
        body = {**body, "stream": stream}
    response = post(server, body)
    assert response.status_code == 400
    assert message in error_of(response)
    assert server.state.vilavt_loop.running == 0


def test_another_model_is_404_and_another_content_type_is_400(app):
    server = app()
    assert post(server, question(model="gpt-5")).status_code == 404
    assert "gpt-5" in error_of(post(server, question(model="gpt-5")))
    assert "application/json" in error_of(post(server, b"{}", **{"Content-Type": "text/plain"}))


def test_a_refusal_is_one_line_of_the_log_with_the_requests_name_and_nothing_that_moves_a_terminal(app, caplog):
    server = app()
    caplog.clear()
    caplog.set_level("WARNING", logger="vilavt_vllm")
    post(server, question(model="\x1b[2J\ngpt-5"), **{"X-Request-Id": "mine"})
    post(server, question(temperature=-1), **{"X-Request-Id": "mine"})
    post(server, question(temperature=-1))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith("request 'mine': 404")
    assert lines[1].startswith("request 'mine': 400")
    assert "temperature" in lines[1]
    assert lines[2].split(":")[0] not in (lines[1].split(":")[0], "request ''")
    assert all(line.isprintable() for line in lines)


def test_no_log_line_of_any_level_holds_a_pictures_data(app, caplog):
    server = app()
    sampling(server, *TURNS)
    caplog.set_level("DEBUG")
    data = base64.b64encode(photo := np.random.default_rng(0).bytes(3000)).decode()
    good = io.BytesIO()
    Image.frombytes("RGB", (40, 25), photo).save(good, "png")
    urls = [data_url(good.getvalue()), f"data:image/png;base64,{data}", f"data:{data}", f"data:;base64,{data}"]
    urls += [f"data:image/png;base64,{data}%", f"data:image/png,{data}", f"DATA:text/plain;{data};base64,{data}", data]
    statuses = [post(server, question(url, stream=stream)).status_code for url in urls for stream in (False, True)]
    assert statuses == [200] * 2 + [400] * (len(statuses) - 2)
    payloads = [data, base64.b64encode(good.getvalue()).decode()]
    found = [one[at : at + 24] for one in payloads for at in range(len(one) - 24) if one[at : at + 24] in caplog.text]
    assert found == []
    assert "request " in caplog.text


def test_a_body_above_the_cap_is_refused_with_the_flag(app):
    response = post(app(max_body_bytes=1000), question(data_url(b"x" * 2000)))
    assert (response.status_code, "--max-body-bytes" in error_of(response)) == (400, True)


def test_a_full_server_says_so_before_it_loads_anything(app):
    response = post(app(max_episodes=0), question("http://never.fetched/x.png"))
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert "at most 0 may be" in error_of(response)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_text_that_cannot_fit_is_refused_by_its_length(app, role, monkeypatch):
    """Encoding it would keep the thread of all conversations busy for minutes."""
    server = app()
    tokenizer = server.state.vilavt_loop.llm.settings.tokenizer
    longest_token(tokenizer)

    def encode(*_, **__):
        raise AssertionError("it was encoded")

    monkeypatch.setattr(type(tokenizer), "encode", encode)
    messages = [{"role": "user", "content": "Hi"}, {"role": role, "content": "word " * 3_200_000}]
    messages.append({"role": "user", "content": "And now?"})
    body = json.dumps({"messages": messages}).encode()
    response, seconds, _ = measured(lambda: post(server, body))
    assert (response.status_code, server.state.vilavt_loop.running) == (400, 0)
    assert re.search(r"the text has 160000\d\d characters, at most \d+ can fit into the \d+ tokens", error_of(response))
    assert len(error_of(response)) < 400
    assert seconds < 20


def test_pictures_that_are_too_large_together_are_refused_before_any_is_decoded(app):
    server = app()
    urls = [data_url(webp(10_000, 10_000 - number)) for number in range(8)]
    response, seconds, grown = measured(lambda: post(server, question(*urls)))
    assert response.status_code == 400
    assert "8 images have 799720000 pixels, at most 200000000 are allowed" in error_of(response)
    assert seconds < 20
    assert grown < 50 * MEGABYTE
    assert (server.state.vilavt_loop.budget.bytes, server.state.vilavt_loop.running) == (0, 0)


def test_pictures_that_never_fit_are_400_and_those_that_do_not_fit_now_are_503(app):
    server = app(max_picture_memory=100_000)
    budget = server.state.vilavt_loop.budget
    too_many = post(server, question(data_url(png(400, 300))))
    assert (too_many.status_code, "--max-picture-memory" in error_of(too_many)) == (400, True)
    others = budget.reservation()
    others.take([DecodingCost(1, 90_000, 90_000)], 0)
    now = post(server, question(data_url(png(60, 60))))
    assert (now.status_code, now.headers["Retry-After"]) == (503, "1")
    assert "90000 bytes" in error_of(now)
    others.release()
    assert budget.bytes == 0


def test_a_reservation_is_what_decoding_takes_then_what_is_held_then_nothing():
    budget = PictureBudget(1000, 1000)
    reservation = budget.reservation()
    costs = [DecodingCost(10, 40, 320), DecodingCost(20, 80, 280)]
    reservation.take(costs, 7)
    assert budget.bytes == 40 + 80 + 280 + 7
    reservation.decoded(costs)
    assert budget.bytes == 120
    with pytest.raises(LimitError, match="30 pixels, at most 29"):
        PictureBudget(29, 1000).reservation().take(costs, 0)
    reservation.release()
    assert budget.bytes == 0


@pytest.mark.parametrize("file", [one for one in CORPUS if len(one.make()) < 3_000_000], ids=lambda one: one.name)
def test_a_hostile_picture_is_400_and_the_server_goes_on(app, file):
    server = app()
    response = post(server, question(data_url(file.make())))
    assert response.status_code == 400 or file.refused is None
    assert response.status_code in (200, 400, 500)  # the stand-in for an engine answers nothing
    if response.status_code == 400:
        assert len(error_of(response)) < 600
        assert error_of(response).isprintable()
    assert (server.state.vilavt_loop.budget.bytes, server.state.vilavt_loop.running) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "error, status",
    [
        (RuntimeError("out of memory"), 500),
        (VLLMValidationError("too long"), 400),
        (QueueOverflowError(), 503),
        (EngineDeadError(), 503),
    ],
)
def test_an_engine_that_refuses_or_fails_has_its_status_and_frees_its_place(app, error, status, stream):
    server = app()

    def generate(*_, **__):
        raise error

    server.state.vilavt_loop.llm.engine.generate = generate
    response = post(server, question(data_url((PICTURES / "scene-1.png").read_bytes()), stream=stream))
    words = "the engine of this server has died" if isinstance(error, EngineDeadError) else str(error)
    assert (response.status_code, words in error_of(response)) == (status, True)
    assert ("Retry-After" in response.headers) == (status == 503)
    assert server.state.vilavt_loop.running == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "options, fields, message",
    [
        ({"limits": {"max_context": 20}}, {}, r"needs a context of \d+ tokens .*at most 20 are .*--max-model-len"),
        ({}, {"vilavt": {"max_context": 15}}, r"needs a context of \d+ tokens .*at most 15 are .*--max-model-len"),
        ({"limits": {"max_total_pixels": 900}}, {}, r"1 images have \d+ pixels, at most 900 .*--max-total-pixels"),
    ],
)
def test_a_question_that_does_not_fit_is_400_with_the_numbers_and_the_flag(app, options, fields, message, stream):
    server = app(**options)
    picture = data_url((PICTURES / "scene-1.png").read_bytes())
    response = post(server, question(picture, stream=stream, **fields))
    assert response.status_code == 400
    assert re.search(message, error_of(response))
    assert server.state.vilavt_loop.running == 0


def test_an_earlier_question_that_does_not_fit_is_400_with_the_numbers(app):
    body = question(data_url((PICTURES / "scene-1.png").read_bytes()))
    body["messages"] += [{"role": "assistant", "content": "7"}, {"role": "user", "content": "And?"}]
    response = post(app(limits={"max_context": 20}), body)
    assert response.status_code == 400
    assert re.search(r"so far has \d+ tokens, at most 20 are .*--max-model-len", error_of(response))


def test_the_engines_caps_on_an_inquiry_are_limits_of_the_episodes(app):
    def limits(**changes):
        return app(limits=changes).state.vilavt_loop.llm.settings.limits

    most = 16 * limits().max_pixels  # as many full-size images as regions: this checkpoint's are small
    assert (limits().max_inquiry_images, limits().max_inquiry_pixels) == (16, most)
    tighter = limits(max_inquiry_images=3)
    assert (tighter.max_inquiry_images, tighter.max_inquiry_pixels) == (3, most)
    with pytest.raises(LimitError, match=r'max_inquiry_images is 17, at most 16 are .*"vilavt_max_regions": 17'):
        limits(max_inquiry_images=17)
    with pytest.raises(LimitError, match=rf'max_inquiry_pixels is {most + 1}, .*"vilavt_max_group_pixels": {most + 1}'):
        limits(max_inquiry_pixels=most + 1)


def test_a_server_samples_with_a_fresh_seed_unless_it_is_told_one(app):
    def seeds(server, **fields):
        asked = []

        def generate(prompt, params, name, **_):
            asked.append(params.seed)
            raise VLLMValidationError("enough")

        server.state.vilavt_loop.llm.engine.generate = generate
        body = question(data_url((PICTURES / "scene-1.png").read_bytes()), **fields)
        for _ in range(4):
            post(server, body)
        return asked

    assert len(set(seeds(app(), temperature=1.0))) == 4
    assert len(set(seeds(app(), temperature=1.0, seed=3))) == 1
    assert len(set(seeds(app(seed=3), temperature=1.0))) == 1
    assert seeds(app()) == [None] * 4  # greedy


def adapter(folder: Path, weights: bytes = b"weights") -> LoRARequest:
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return LoRARequest("polite", 3, str(folder))


class Answering:
    """A server whose engine answers at once, and remembers what it was told of each question."""

    def __init__(self, server: FastAPI) -> None:
        self.server, self.loop = server, server.state.vilavt_loop
        self.told: list[Handling] = []
        self.drivers: list[Driver] = []

        async def events(driver, handling):
            self.told.append(handling)
            self.drivers.append(driver)
            for event in [*driver.start(), *driver.take_text("<think>Red.</think><answer>4</answer>")]:
                yield event

        self.loop.llm.events = events

    def post(self, *earlier: str, headers=(), **fields) -> httpx.Response:
        body = question(data_url(png(30, 30)), **fields)
        for answer in earlier:
            body["messages"] += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
        return post(self.server, body, **dict(headers))


def test_an_adapter_that_the_models_list_names_answers_and_is_on_record(app, tmp_path):
    served = Answering(app())
    lora = adapter(tmp_path)
    served.loop.models.lora_requests = {"polite": lora}
    alone, adapted = served.post(model="tiny"), served.post(model="polite")
    assert [handling.lora for handling in served.told] == [None, lora]
    assert adapted.json()["model"] == "polite"
    prints = [reply.json()["vilavt"]["provenance"]["fingerprint"] for reply in (alone, adapted)]
    assert prints[1].startswith(f"{prints[0]}+")
    adapter(tmp_path, b"other weights")
    assert served.post(model="polite").json()["vilavt"]["provenance"]["fingerprint"] not in prints
    missing = served.post(model="rude")
    assert (missing.status_code, error_of(missing)) == (404, "no model 'rude' here; GET /v1/models lists them")


def test_on_a_cpu_adapters_leave_a_slot_to_the_model_alone(app, tmp_path):
    served = Answering(app())
    loop = served.loop
    loop.vllm_config = SimpleNamespace(lora_config=SimpleNamespace(max_loras=2))
    assert served.post(model="tiny").status_code == 200
    loop.models.lora_requests = {"polite": adapter(tmp_path)}
    assert [served.post(model=name).status_code for name in ("tiny", "polite")] == [200, 200]
    loop.models.lora_requests["rude"] = adapter(tmp_path)  # loaded while it runs
    for name in ("tiny", "polite"):
        refused = served.post(model=name)
        assert refused.status_code == 400
        assert error_of(refused).startswith("2 LoRA adapters and --max-loras 2: where a batch")
        assert error_of(refused).endswith("start it with --max-loras 3")
    with pytest.raises(UnsupportedError, match="--max-loras 3"):
        loop.check_adapters()
    assert len(served.told) == 3


def test_a_follow_up_continues_what_the_same_adapter_said(app, tmp_path):
    served = Answering(app())
    served.loop.models.lora_requests = {"polite": adapter(tmp_path)}
    served.post(model="polite")
    served.post("4", model="polite")
    served.post("4", model="tiny")  # it has not said that
    thoughts = [driver.result.transcript.count("Red.") for driver in served.drivers]
    assert thoughts == [1, 2, 1]  # what is rebuilt from the messages has no thoughts


def test_the_engines_requests_are_called_after_the_response_and_carry_the_trace(app):
    server, asked = app(), []

    def generate(prompt, params, name, **more):
        asked.append((name, more))
        assert params.logprobs is None  # nobody could see them
        raise VLLMValidationError("enough")

    server.state.vilavt_loop.llm.engine.generate = generate
    body = question(data_url(png(30, 30)))
    for _ in range(2):
        post(server, body, **{"X-Request-Id": "mine", "traceparent": "00-1-2-01"})
    (first, more), (second, _) = asked
    assert first.startswith("chatcmpl-mine-0-")
    assert second.startswith("chatcmpl-mine-0-")
    assert first != second
    assert more["trace_headers"] == {"traceparent": "00-1-2-01"}


def test_questions_and_refusals_are_measured(app):
    names = ["preparation_seconds", "first_thought_seconds", "answer_seconds", "question_turns"]

    def counts() -> list[float]:
        refused = REGISTRY.get_sample_value("vilavt_refusals_total", {"status": "400"}) or 0
        return [REGISTRY.get_sample_value(f"vilavt_{name}_count") for name in names] + [refused]

    served = Answering(app())
    before = counts()
    served.post()
    served.post(stream=True)
    served.post(temperature=-1)
    served.post(temprature=1)
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [2, 1, 2, 2, 2]


def test_a_priority_in_a_header_goes_before_the_field_and_what_has_no_effect_is_listed(app):
    served = Answering(app())
    header = {"X-Vllm-Priority": "-3"}

    def ignored(headers=(), **fields):
        return served.post(headers=headers, **fields).json()["vilavt"]["ignored"]

    assert ignored(header, priority=2) == ["priority", "X-Vllm-Priority"]
    assert ignored({"X-Vllm-Priority": "0"}) == []
    served.loop.by_priority = True
    assert ignored(header) == []
    assert ignored(header, priority=2) == ["priority"]
    assert ignored(header, priority=-3) == []
    assert [handling.priority for handling in served.told] == [0, 0, -3, -3, -3]
    for wrong in ("high", "", str(2**63), "9" * 5000):
        refused = served.post(headers={"X-Vllm-Priority": wrong})
        assert refused.status_code == 400
        assert "X-Vllm-Priority is " in error_of(refused)
        assert len(error_of(refused)) < 200


def test_load_tells_running_questions_from_waiting_ones(app, monkeypatch):
    server = app()
    loop, seen, queued = server.state.vilavt_loop, [], [0]
    monkeypatch.setattr("vilavt_vllm.server.endpoint.queued_turns", lambda: queued[0])

    async def load() -> dict:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url="http://server") as client:
            return (await client.get("/load")).json()

    decode = loop.pictures.load

    async def watched(*arguments):
        seen.append(await load())
        return await decode(*arguments)

    async def events(driver, handling):
        for queued[0] in (0, 1, 5):
            seen.append(await load())
        for event in [*driver.start(), *driver.take_text("<think>Red.</think><answer>4</answer>")]:
            yield event

    loop.pictures.load, loop.llm.events = watched, events
    assert post(server, question(data_url(png(30, 30)))).status_code == 200
    running, waiting = ({"server_load": 1, "running": r, "waiting": 1 - r} for r in (1, 0))
    assert seen == [waiting, running, waiting, waiting]
    assert asyncio.run(load()) == {"server_load": 0, "running": 0, "waiting": 0}
    post(server, question("http://nowhere/x.png"))  # refused while it is prepared
    server.state.server_load_metrics = 2  # vLLM's own routes
    assert asyncio.run(load()) == {"server_load": 2, "running": 0, "waiting": 0}


def test_queued_turns_are_those_of_all_ranks():
    registry = CollectorRegistry()
    assert queued_turns(registry) == 0
    gauge = Gauge("vllm:num_requests_waiting", "…", ["engine"], registry=registry)
    gauge.labels("0").set(2)
    gauge.labels("1").set(3)
    Gauge("vllm:num_requests_running", "…", registry=registry).set(9)
    assert queued_turns(registry) == 5


def sampling(server: FastAPI, *turns: str) -> list[tuple[str, dict, int]]:
    """Let the engine sample these turns; (name, arguments, most tokens) of every request that it gets."""
    asked, tokenizer = [], server.state.vilavt_loop.llm.settings.tokenizer

    async def generate(prompt, params, name, **more):
        asked.append((name, more, params.max_tokens))
        ids = tokenizer.encode(turns[(len(asked) - 1) % len(turns)], split_special_tokens=True)[: params.max_tokens]
        finish = "length" if len(ids) == params.max_tokens else "stop"
        ids += [] if finish == "length" else params.stop_token_ids[:1]
        completion = SimpleNamespace(token_ids=ids, finish_reason=finish, logprobs=None)
        yield SimpleNamespace(outputs=[completion], finished=True, num_cached_tokens=0)

    server.state.vilavt_loop.llm.engine.generate = generate
    return asked


TURNS = (
    '<think>Closer.</think><tool>{"region": [{"index": 0, "bbox_2d": [0, 0, 28, 28]}], "query": "a digit"}</tool>',
    "<think>Red.</think><answer>4</answer>",
)


def test_every_turn_carries_the_requests_name_priority_and_trace(app):
    server = app()
    server.state.vilavt_loop.by_priority = True
    asked = sampling(server, *TURNS)
    headers = {"X-Request-Id": "mine", "X-Vllm-Priority": "7", "traceparent": "00-1-2-01", "tracestate": "a=b"}
    answer = post(server, question(data_url(png(64, 64))), **headers).json()
    assert (answer["choices"][0]["message"]["content"], answer["vilavt"]["turns"]) == ("4", 2)
    assert answer["id"] == "chatcmpl-mine"
    assert [name.rsplit("-", 1)[0] for name, _, _ in asked] == ["chatcmpl-mine-0", "chatcmpl-mine-1"]
    for _, more, _ in asked:
        assert more["trace_headers"] == {"traceparent": "00-1-2-01", "tracestate": "a=b"}
        assert more["priority"] == 7


def parallel(server: FastAPI) -> SimpleNamespace:
    """The configuration that says how many engines there are."""
    return server.state.vilavt_loop.llm.engine.vllm_config.parallel_config


def about(size: int, *earlier: str) -> dict:
    """A conversation about a picture of this size, after these answers."""
    body = question(data_url(png(size, size)))
    for answer in earlier:
        body["messages"] += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And?"}]
    return body


def test_all_turns_and_follow_ups_of_a_conversation_go_to_one_engine(app):
    server = app()
    asked = sampling(server, *TURNS)

    def ranks(*conversations: dict) -> list[int]:
        asked.clear()
        for body in conversations:
            assert post(server, body).status_code == 200
        return [more["data_parallel_rank"] for _, more, _ in asked]

    assert ranks(about(56)) == [None, None]  # there is one
    parallel(server).data_parallel_size = 2
    first = [about(size) for size in (60, 64, 68)]
    assert ranks(*first) == [0, 0, 1, 1, 0, 0]
    again = [about(size, "4") for size in (64, 60, 68, 64)]
    assert ranks(*again) == [1, 1, 0, 0, 0, 0, 1, 1]
    assert ranks(about(60, "4", "4")) == [0, 0]
    parallel(server).local_engines_only, parallel(server).data_parallel_size_local = True, 1
    assert ranks(about(64, "4")) == [None, None]  # this server has one of the two


def test_a_client_may_say_which_engine_as_on_vllms_own_routes(app):
    server, header = app(), "X-data-parallel-rank"
    asked = sampling(server, *TURNS)
    assert post(server, about(56), **{header: "0"}).status_code == 200
    refused = post(server, about(56), **{header: "1"})
    assert (refused.status_code, len(asked)) == (400, 2)
    assert "X-Data-Parallel-Rank is 1, and there is one engine, of rank 0" in error_of(refused)
    parallel(server).data_parallel_size = 3
    asked.clear()
    for earlier, more in ((), {header: "2"}), (("4",), {}), (("4", "4"), {header: "1"}), (("4", "4", "4"), {}):
        assert post(server, about(60, *earlier), **more).status_code == 200
    assert [more["data_parallel_rank"] for _, more, _ in asked] == [2, 2, 2, 2, 1, 1, 1, 1]
    for wrong, words in (
        ("3", "ranks 0 to 2"),
        ("-1", "ranks 0 to 2"),
        ("one", "a whole number"),
        ("", "a whole number"),
    ):
        refused = post(server, about(60), **{header: wrong})
        assert (refused.status_code, words in error_of(refused)) == (400, True), error_of(refused)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_bounds_a_turn_and_max_completion_tokens_all_of_them(app, field, stream):
    server = app()
    asked = sampling(server, *TURNS)
    tokenizer = server.state.vilavt_loop.llm.settings.tokenizer
    first, second = (len(tokenizer.encode(turn, split_special_tokens=True)) + 1 for turn in TURNS)

    def ask(most: int):
        asked.clear()
        response = post(server, question(data_url(png(64, 64)), stream=stream, **{field: most}))
        assert response.status_code == 200, response.text
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")] if stream else []
        body = json.loads(lines[-1]) if stream else response.json()
        told = body["vilavt"]
        tokens = sum(turn["tokens"] for turn in told["conversation"]["turns"])
        return [most for _, _, most in asked], told["finish"], body["choices"][0]["finish_reason"], tokens

    assert max(first, second) < 90  # within what the checkpoint allows a turn
    if field == "max_tokens":
        assert ask(first + 1) == ([first + 1] * 2, "answer", "stop", first + second)
        assert ask(5) == ([5], "length", "length", 5)
    else:
        assert ask(first + second + 1)[1:] == ("answer", "stop", first + second)
        bounds, finish, reason, tokens = ask(first + 4)
        assert (bounds[1], finish, reason, tokens) == (4, "length", "length", first + 4)
        assert ask(5) == ([5], "length", "length", 5)


def test_a_priority_reaches_an_engine_that_schedules_by_it_and_is_listed_as_ignored_by_others(app):
    served = Answering(app())
    assert served.post(priority=-2).json()["vilavt"]["ignored"] == ["priority"]
    served.loop.by_priority = True
    assert served.post(priority=-2).json()["vilavt"]["ignored"] == []
    assert served.post(priority=None).json()["vilavt"]["ignored"] == []
    assert [handling.priority for handling in served.told] == [0, -2, 0]


def test_hanging_up_while_a_picture_loads_is_counted_as_aborted_and_frees_its_place(app):
    server = app()

    async def never(*_):
        await asyncio.sleep(3600)

    def aborted():
        return REGISTRY.get_sample_value("vilavt_episodes_total", {"finish": "aborted"}) or 0

    server.state.vilavt_loop.pictures.load = never
    before = aborted()
    body = json.dumps(question("http://slow/x.png")).encode()
    came = iter([{"type": "http.request", "body": body}, {"type": "http.disconnect"}])
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}

    async def receive():
        await asyncio.sleep(0)
        return next(came)

    async def send(message):
        pass

    asyncio.run(asyncio.wait_for(server(scope, receive, send), 30))
    assert aborted() == before + 1
    assert server.state.vilavt_loop.running == 0


class Streaming:
    """One streamed question over ASGI, to a server whose engine samples when `go` is set."""

    def __init__(self, server: FastAPI, keep_alive: float = 0, path: str = "/v1/chat/completions") -> None:
        self.server, self.go, self.gone, self.path = server, asyncio.Event(), asyncio.Event(), path
        self.sent: list[dict] = []
        server.state.sse_keep_alive = keep_alive
        server.state.vilavt_loop.llm.engine.generate = self.generate

    async def generate(self, *_, **__):
        await self.go.wait()
        raise VLLMValidationError("sampled")
        yield

    async def run(self) -> None:
        said = {"input": "Hi"} if self.path == "/v1/responses" else {"messages": [{"role": "user", "content": "Hi"}]}
        shown = question(data_url(png(30, 30))) if self.path == "/v1/chat/completions" else said
        body = json.dumps({**shown, "stream": True}).encode()
        parts = iter([{"type": "http.request", "body": body}])

        async def receive():
            if (part := next(parts, None)) is not None:
                return part
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            self.sent.append(message)

        scope = {"type": "http", "method": "POST", "path": self.path, "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json")], "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(self.server(scope, receive, send), 30)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


def test_a_stream_has_its_header_before_the_first_token_and_a_comment_while_nothing_comes(app):
    server = app()

    async def ask():
        streaming = Streaming(server, keep_alive=0.1)
        running = asyncio.create_task(streaming.run())
        await until(lambda: streaming.text.count(": keep-alive") > 2)
        assert streaming.sent[0]["status"] == 200
        assert streaming.text.startswith('data: {"id":"chatcmpl-')
        streaming.go.set()
        await running
        assert '"message":"sampled"' in streaming.text
        assert streaming.text.endswith("data: [DONE]\n\n")
        assert streaming.server.state.vilavt_loop.running == 0

    asyncio.run(ask())


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("header_is_out", [False, True])
def test_a_streaming_client_that_leaves_before_the_first_token_is_noticed(app, header_is_out, path):
    server = app()

    async def ask():
        streaming = Streaming(server, path=path)
        loop = streaming.server.state.vilavt_loop
        running = asyncio.create_task(streaming.run())
        await until(lambda: streaming.sent if header_is_out else loop.running)
        assert loop.running == 1
        streaming.gone.set()
        await until(lambda: not loop.running)
        await running

    asyncio.run(ask())


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize("header_is_out", [False, True])
def test_a_question_that_is_ended_because_the_server_stops_is_told_so(app, header_is_out, path):
    server = app()

    async def ask():
        streaming = Streaming(server, path=path)
        running = asyncio.create_task(streaming.run())
        await until(lambda: streaming.sent if header_is_out else server.state.vilavt_loop.running)
        await server.state.vilavt_draining.drain(0)
        await running
        assert streaming.sent[0]["status"] == (200 if header_is_out else 503)
        *_, last = streaming.text.removesuffix("data: [DONE]\n\n").strip().splitlines()
        reason = json.loads(last.removeprefix("data: "))
        assert "(--shutdown-timeout)" in reason["error"]["message"]
        assert reason["error"]["type"] == ("overloaded_error" if path == "/v1/messages" else "StoppingError")
        assert ("event: error\n" in streaming.text) == (header_is_out and path != "/v1/chat/completions")
        assert not streaming.sent[-1].get("more_body", False)
        assert server.state.vilavt_loop.running == 0

    asyncio.run(ask())
