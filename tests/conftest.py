"""What tests of several packages share."""

import json
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from vilavt_core.presets import Limits, Sampling
from vilavt_core.results import Provenance


class StubServer:
    """Speaks like ``vilavt-serve`` without a model: `requests` are what it was asked, `answer` decides what it says.

    `answer` takes a request and returns an answer, None (no answer), or an HTTP status to fail with.
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
                body = {"model": "stub", "provenance": stub.provenance.to_json()}
                self._send(200 if known else 404, body if known else {"error": {"message": "not found"}})

            def do_POST(self):
                stub.keys.append(self.headers.get("Authorization"))
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append(request)
                answer = stub.answer(request)
                if isinstance(answer, int):
                    self._send(answer, {"error": {"message": "the stub was told to fail", "code": answer}})
                else:
                    self._send(200, stub.reply(request, answer))

            def _send(self, status, body):
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def reply(self, request: dict, answer: str | None) -> dict:
        """The body of a response."""
        message = {"role": "assistant", "content": answer or "", "reasoning_content": "I looked."}
        crops = [{"image": 1, "width": 56, "height": 56, "source": 0, "region": [0.0, 0.0, 0.5, 0.5]}]
        events = [
            {"type": "zoom", "turn": 0, "query": "digit", "regions": [{"image": 0, "box": [0, 0, 28, 28]}]},
            {"type": "crops", "turn": 0, "crops": crops},
        ]
        return {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": "stub",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
            "vilavt": {
                "finish": "answer" if answer else "turn_limit",
                "detail": "",
                "turns": 2,
                "images": 2,
                "events": events,
                "provenance": {**self.provenance.to_json(), "seed": request["seed"]},
            },
        }

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
