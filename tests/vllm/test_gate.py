"""What every route of the server asks for, and how requests end when it is stopped; no engine is asked anything."""

import asyncio
import json
import time
from types import SimpleNamespace

import httpx
import pytest
import vllm
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse

from vilavt_vllm import support

if problem := support.server_problem(vllm.__version__):
    pytest.skip(problem, allow_module_level=True)

from vllm.entrypoints.launchers.app import build_app
from vllm.multimodal.media import MediaConnector

from vilavt_vllm import compat
from vilavt_vllm.server.command import allow_plugins
from vilavt_vllm.server.dialects import DIALECTS
from vilavt_vllm.server.endpoint import BESIDE, TURNS
from vilavt_vllm.server.gate import OPEN, Draining, DrainingEngine, Gate
from vilavt_vllm.server.options import NO_DOMAINS, VLLM_DEFAULTS

LOOP = {"POST /v1/chat/completions", "POST /v1/responses", "POST /v1/messages"}
OURS = LOOP | {"GET /v1/vilavt", "GET /load", "GET /"}
UNGUARDED = {"GET /health", "GET /ping", "POST /ping", "GET /metrics"}
REFUSED = {f"POST {path}" for path in TURNS} | {
    "GET /v1/responses/{response_id}",
    "POST /v1/responses/{response_id}/cancel",
    "POST /v1/messages/count_tokens",
}
TOKENS = {"POST /tokenize", "POST /detokenize", "POST /generative_scoring", "POST /inference/v1/generate"}
TOKENS |= {"POST /inference/v1/abort_requests"}
"""vLLM's own, about tokens: they say nothing that could be taken for an answer."""
OPERATION = {"GET /version", "GET /kv_event_sources"}
OPERATION |= {"POST /scale_elastic_ep", "POST /is_scaling_elastic_ep"}
DOCUMENTATION = {"GET /openapi.json", "GET /docs", "GET /docs/oauth2-redirect", "GET /redoc"}
PARTS = {
    "GET /v1/models",
    "POST /v1/chat/completions/render",
    "POST /v1/chat/completions/derender",
    "POST /v1/completions/render",
    "POST /v1/completions/derender",
    "POST /v1/messages/render",
    "POST /v1/responses/render",
}
"""vLLM's own, which answer with no turn."""


def built(*arguments: str) -> FastAPI:
    """The application as vLLM's server builds it, and ours starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "")
        patch.delenv("VLLM_PLUGINS")
        allow_plugins()
        return build_app(compat.server_arguments(["--model", "none", *arguments], VLLM_DEFAULTS), ("generate",), None)


@pytest.fixture(scope="module")
def closed() -> FastAPI:
    """With a key."""
    return built("--api-key", "secret")


def operations(app: FastAPI) -> list[str]:
    return [
        f"{method} {route.path}"
        for route in app.routes
        for method in sorted(getattr(route, "methods", None) or ["GET"])
        if method != "HEAD"
    ]


def send(app, method: str, path: str, headers=(), **more) -> httpx.Response:
    async def once():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, headers=dict(headers), **more)

    return asyncio.run(once())


def test_the_table_names_every_route_of_the_server(closed):
    raw = {name for name in operations(closed) if "/v1/raw/" in name}
    assert set(operations(closed)) - raw == OURS | UNGUARDED | REFUSED | TOKENS | OPERATION | DOCUMENTATION | PARTS
    assert {name.replace("/v1/raw/", "/v1/") for name in raw} == (
        {name for name in OURS | REFUSED | PARTS if " /v1/" in name} - {"GET /v1/vilavt"}
    )


def test_with_a_key_every_route_but_those_for_probes_asks_for_it(closed):
    open_ones = []
    for name in operations(closed):
        method, path = name.split()
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"X-Api-Key": "secret"}):
            if send(closed, method, path, headers).status_code != 401:
                open_ones.append(name)
    assert set(open_ones) == UNGUARDED
    assert all(path in OPEN for path in (name.split()[1] for name in open_ones))


@pytest.mark.parametrize("path", ["//invocations", "/INVOCATIONS", "/tokenize/", "/health/../tokenize", "/nowhere"])
def test_no_spelling_of_a_path_gets_past_the_key(closed, path):
    assert send(closed, "POST", path).status_code == 401


def test_the_key_opens_and_none_is_asked_for_where_there_is_none(closed, monkeypatch):
    key = {"Authorization": "Bearer secret"}
    for app, headers in ((closed, key), (built(), {})):
        assert send(app, "GET", "/version", headers).json()["version"] == vllm.__version__
    monkeypatch.setenv("VLLM_API_KEY", "from the environment")
    assert send(built(), "GET", "/version").status_code == 401


def test_the_loop_answers_every_protocol_it_has():
    assert {f"POST {path}" for path in DIALECTS} == LOOP


@pytest.mark.parametrize("operation", sorted(REFUSED))
def test_a_route_that_would_answer_with_a_turn_or_about_one_says_where_to_go(closed, operation):
    method, path = operation.split()
    assert path in (*TURNS, *BESIDE)
    answer = send(closed, method, path, {"Authorization": "Bearer secret"}, json={"model": "none", "input": "x"})
    message = answer.json()["error"]["message"]
    there = next((one for one in DIALECTS if path.startswith(f"{one}/")), "/v1/chat/completions")
    assert (answer.status_code, path in message, f"POST {there}" in message) == (400, True, True)
    assert ("/v1/raw/" in message) == path.startswith("/v1/")


def test_the_server_listens_on_this_machine_and_fetches_nothing_unless_it_is_told_to(tmp_path):
    args = compat.server_arguments(["--model", "none"], VLLM_DEFAULTS)
    assert (args.host, args.allowed_media_domains) == ("127.0.0.1", NO_DOMAINS)
    told = ["--host", "0.0.0.0", "--allowed-media-domains", "example.org"]
    args = compat.server_arguments(["--model", "none", *told], VLLM_DEFAULTS)
    assert (args.host, args.allowed_media_domains) == ("0.0.0.0", ["example.org"])
    config = tmp_path / "config.yaml"
    config.write_text("host: 0.0.0.0\n")
    assert compat.server_arguments(["--model", "none", "--config", str(config)], VLLM_DEFAULTS).host == "0.0.0.0"


@pytest.mark.parametrize("host", ["127.0.0.1:9", "example.org", "[::1]:9", "none", NO_DOMAINS[0], ""])
def test_vllms_own_routes_fetch_from_no_host(host):
    connector = MediaConnector(allowed_media_domains=NO_DOMAINS)
    with pytest.raises(ValueError, match=r"allowed.domains|parse"):
        connector.fetch_image(f"http://{host}/picture.png")


# Being stopped


class Routes:
    """An application of which each route waits until it is let go, behind a gate."""

    def __init__(self) -> None:
        self.draining, self.go, self.cancelled = Draining(), asyncio.Event(), 0
        self.app = FastAPI()
        self.app.add_middleware(Gate, draining=self.draining)
        self.app.add_api_route("/whole", self.whole)
        self.app.add_api_route("/stream", self.stream)
        self.app.add_api_route("/health", self.health)
        self.app.add_api_route("/stubborn", self.stubborn)

    async def health(self):
        return {}

    async def whole(self):
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return {"answer": 1}

    async def stream(self):
        async def chunks():
            yield "data: 1\n\n"
            await self.whole()
            yield "data: 2\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def stubborn(self):
        """Takes a cancellation for a client that is gone, as vLLM's handlers do."""
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            return JSONResponse({"error": "Client disconnected"}, 400)

    def run(self, seconds: float, *paths: str, let_go_after: float | None = None):
        """(responses to requests that run when the server is stopped, to those that come then, seconds it took)."""

        async def everything():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://s") as client:
                running = [asyncio.create_task(client.get(path)) for path in paths]
                await asyncio.sleep(0.1)
                assert len(self.draining) == len(paths)
                begun = time.monotonic()
                stopped = []
                state = SimpleNamespace(server=SimpleNamespace(config=SimpleNamespace(timeout_graceful_shutdown=None)))
                engine = DrainingEngine(
                    SimpleNamespace(shutdown=lambda timeout: stopped.append(timeout)), self.draining, state
                )
                stopping = asyncio.get_running_loop().run_in_executor(None, engine.shutdown, seconds)
                await asyncio.sleep(0.1)
                late = [await client.get(path) for path in ("/whole", "/health")]
                if let_go_after is not None:
                    await asyncio.sleep(let_go_after)
                    assert not stopped, "the engine ended before its requests"
                    self.go.set()
                await stopping
                took = time.monotonic() - begun
                assert stopped[0] >= 1
                assert state.server.config.timeout_graceful_shutdown is not None
                return await asyncio.gather(*running), late, took

        return asyncio.run(everything())


def test_running_requests_finish_and_new_ones_are_sent_elsewhere():
    running, (late, health), took = Routes().run(30, "/whole", "/stream", let_go_after=0.3)
    assert [one.status_code for one in running] == [200, 200]
    assert (running[0].json(), running[1].text) == ({"answer": 1}, "data: 1\n\ndata: 2\n\n")
    assert (late.status_code, "Retry-After" in late.headers) == (503, True)
    assert "being stopped" in late.json()["error"]["message"]
    assert health.status_code == 200
    assert took < 30


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_what_does_not_end_in_time_is_told_why(seconds):
    routes = Routes()
    (whole, stream, stubborn), _, took = routes.run(seconds, "/whole", "/stream", "/stubborn")
    assert routes.cancelled == 2
    for one in (whole, stubborn):
        assert (one.status_code, "Retry-After" in one.headers) == (503, True)
        assert f"within {seconds:g} s (--shutdown-timeout)" in one.json()["error"]["message"]
    *_, told, done = [line for line in stream.text.splitlines() if line]
    assert stream.text.startswith("data: 1\n\n")
    assert "--shutdown-timeout" in json.loads(told[6:])["error"]["message"]
    assert done == "data: [DONE]"
    assert seconds <= took < seconds + 30


def test_an_engine_client_is_otherwise_the_one_behind_it():
    async def made():
        return DrainingEngine(SimpleNamespace(model_config=3), Draining(), None)

    assert asyncio.run(made()).model_config == 3
