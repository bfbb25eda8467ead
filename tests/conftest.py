"""What tests of several packages share."""

import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

if find_spec("vilavt_core") is None:  # a bare checkout, in which tests/gpu runs
    sys.path.insert(0, str(Path(__file__).parents[1] / "vilavt_hf" / "src"))

from vilavt_core import wire
from vilavt_core.conversation import Result, ShownImage, Turn, Usage
from vilavt_core.presets import Limits, Sampling
from vilavt_core.protocol import Answer, FinishReason, NoAction, Region, ToolCall, format_turn
from vilavt_core.results import (
    BilledTokens,
    ChatResult,
    CropsEvent,
    Provenance,
    TextDelta,
    ToolCallEvent,
    Work,
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: programs that tests start inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(ImportError):  # the hosts' environments have no hypothesis
    from hypothesis import settings

    settings.register_profile("no deadline", deadline=None)  # a timing never decides a test
    settings.load_profile("no deadline")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave what is marked ``nightly`` to `nox -s nightly`, which sets ``VILAVT_NIGHTLY`` or says ``-m nightly``."""
    if "VILAVT_NIGHTLY" in os.environ or "nightly" in config.option.markexpr:
        return
    for item in items:
        if (marker := item.get_closest_marker("nightly")) is not None:
            item.add_marker(pytest.mark.skip(reason=f"{marker.args[0]}: `nox -s nightly` runs it"))


def pytest_collection_finish() -> None:
    """Leave all that was imported out of later garbage collections, which would take a tenth of the time."""
    gc.collect()
    gc.freeze()


class StubServer:
    """Speaks like ``vilavt-serve`` without a model: `requests` are what it was asked, `answer` decides what it says.

    `answer` takes a request and returns an answer, None (no answer), an HTTP status or an error to fail with. Answers
    come with the state ``state-N``, N being the number of messages.
    """

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.answer = lambda request: "A"
        self.provenance = Provenance(
            "default", Limits(), Sampling(), 0, "default", "0" * 64, "stub", "f" * 64, "float32", "cpu", "vllm", {}
        )
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                known = self.path == "/v1/vilavt"
                body = wire.settings_body("stub", stub.provenance)
                self._send(200 if known else 404, body if known else {"error": {"message": "not found"}})

            def do_POST(self):
                stub.keys.append(self.headers.get("Authorization"))
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append(request)
                answer = stub.answer(request)
                if isinstance(answer, Exception):
                    self._send(400, wire.error_body(str(answer), type(answer).__name__, 400))
                elif isinstance(answer, int):
                    self._send(answer, wire.error_body("the stub was told to fail", "error", answer))
                elif request.get("stream"):
                    self._send_text(200, "".join(stub.chunks(request, answer)), "text/event-stream")
                else:
                    self._send(200, stub.reply(request, answer))

            def _send(self, status, body):
                self._send_text(status, json.dumps(body), "application/json")

            def _send_text(self, status, text, kind):
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def result(self, request: dict, answer: str | None) -> ChatResult:
        """A conversation that zoomed once."""
        call = ToolCall((Region(0, (0.0, 0.0, 28.0, 28.0)),), "digit", "I looked.")
        said = Answer(answer) if answer else NoAction()
        turns = (
            Turn(0, format_turn(call), call, 20, image_indices=(1,), feedback="<image 56x56>"),
            Turn(1, answer or "", said, 5),
        )
        images = (
            ShownImage(0, "original", 56, 56, 0, (0.0, 0.0, 1.0, 1.0), None, None, ""),
            ShownImage(1, "crop", 56, 56, 0, (0.0, 0.0, 0.5, 0.5), 0, (0.0, 0.0, 28.0, 28.0), "digit"),
        )
        provenance = replace(self.provenance, seed=request["seed"])
        finish = FinishReason.ANSWER if answer else FinishReason.TURN_LIMIT
        episode = Result(
            answer, finish, "", turns, images, (), (), Usage(10, 25, 8, 2, 2), provenance.preset, provenance.limits,
            provenance.prompts, provenance.prompts_sha256, {}, None,
        )  # fmt: skip
        question = str(request["messages"][-1]["content"][-1]["text"])
        state = f"state-{len(request['messages'])}"
        return ChatResult(question, None, episode, None, provenance, Work(), 0.5, BilledTokens(10, 4, 25), state=state)

    def reply(self, request: dict, answer: str | None) -> dict:
        """The body of a response."""
        return wire.Reply("stub").whole(self.result(request, answer))

    def chunks(self, request: dict, answer: str | None) -> list[str]:
        """The lines of a streamed response."""
        result, reply = self.result(request, answer), wire.Reply("stub", include_usage=True)
        (turn, last), images = result.turns, result.images[1:]
        events = [TextDelta(0, turn.text), ToolCallEvent(0, turn.action), CropsEvent(0, images, (), "digit")]
        lines = [reply.progress(event) for event in (*events, TextDelta(1, last.text))]
        return [reply.begin(), *filter(None, lines), *reply.end(result)]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def start_stub():
    """Starts servers that stop with the module."""
    running = []

    def start() -> StubServer:
        running.append(StubServer())
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def stub_server(start_stub):
    """A server that answers ``A``; see `StubServer`."""
    return start_stub()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A ``vilavt-serve`` for vilavt-tiny, for most tests that ask one; see `serving`."""
    from serving import FOR_MOST_TESTS, KEY, serving

    with serving(tmp_path_factory.mktemp("server") / "log", *FOR_MOST_TESTS, key=KEY) as running:
        yield running


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> SimpleNamespace:
    """Where the golden vectors are, and their manifest."""
    return SimpleNamespace(
        root=GOLDEN,
        checkpoint=GOLDEN / "ckpt" / "tiny_late",
        sharded=GOLDEN / "ckpt" / "tiny_late_sharded",
        configs=GOLDEN / "ckpt" / "configs",
        manifest=json.loads((GOLDEN / "out" / "manifest.json").read_text()),
    )


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with Qwen's special tokens."""
    from family import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def build_model(tokenizer):
    """Builds members of the tiny family: `build_model(seed=0, **vision_config)`."""
    from family import build_tiny_model

    return partial(build_tiny_model, tokenizer)


@pytest.fixture(scope="session")
def tiny_model(build_model):
    """Shared and therefore never modified by a test."""
    return build_model()


@pytest.fixture(scope="session")
def processor(tokenizer):
    """A processor without prompts whose query tokenizer is the tokenizer itself."""
    from vilavt_hf import VilavtProcessor, compat

    image_processor = compat.PilImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 256)
    return VilavtProcessor(image_processor, tokenizer, query_tokenizer=tokenizer)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_model, processor) -> Path:
    """A complete checkpoint folder of `tiny_model`."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Makes ``someone/vilavt`` a hub id of a checkpoint, on a machine without a network; returns the hub's cache."""

    def fill(checkpoint: Path) -> Path:
        repository = tmp_path / "hub" / "models--someone--vilavt"
        snapshot = repository / "snapshots" / ("0" * 40)
        shutil.copytree(checkpoint, repository / "blobs")
        for blob in (p for p in (repository / "blobs").rglob("*") if p.is_file()):
            link = snapshot / blob.relative_to(repository / "blobs")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)  # as the hub's client lays them out
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return tmp_path / "hub"

    return fill


@pytest.fixture
def drawn(monkeypatch):
    """The figures that matplotlib has drawn, which stay readable: axes, lines, bars, legends."""
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)
