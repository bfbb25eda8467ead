"""Replicas on Ray Serve: what the application takes, and a real cluster of which one replica is killed.

Only where `ray[serve]` is installed beside vLLM: `nox -s ray_serve`.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import vllm
import yaml

from vilavt_vllm import compat, support

pytest.importorskip("ray.serve", reason="ray[serve] is not installed beside vLLM here; `nox -s ray_serve` has it")
if problem := support.server_problem(vllm.__version__):
    pytest.skip(problem, allow_module_level=True)

from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from vilavt_vllm.ray_serve import NAME, Arguments, _read, app
from vilavt_vllm.server.options import VLLM_DEFAULTS

ROOT = Path(__file__).parents[2]
FILE = yaml.safe_load((ROOT / "deploy" / "ray-serve.yaml").read_text())
TINY = str(ROOT / "examples" / "vilavt-tiny")
FLAGS = "--dtype float32 --enforce-eager --block-size 32 --num-gpu-blocks-override 1024"


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({}, "model"),
        ({"model": "x", "modle": "y"}, "modle"),
        ({"model": "x", "min_replicas": "2"}, "min_replicas is 2 and max_replicas 1"),
        ({"model": "x", "target_ongoing_requests": 65}, "target_ongoing_requests is 65 and max_ongoing_requests 64"),
        ({"model": "x", "gpus": -1}, "gpus"),
        ({"model": "x", "flags": "--max-turns many"}, "argument --max-turns: invalid int value: 'many'"),
        ({"model": "x", "flags": "--prompts 'published"}, "No closing quotation"),
        ({"model": "x", "flags": "--model y"}, "two checkpoints are named"),
        ({"model": "x", "flags": "--help"}, "ask for help"),
        ({"model": "x", "flags": "--vllm-help"}, "--vllm-help has no place here"),
    ],
)
def test_wrong_arguments_are_told_before_anything_starts(wrong, words):
    with pytest.raises(ValidationError, match=re.escape(words)):
        Arguments(**wrong)


def test_arguments_of_a_command_line_are_words():
    arguments = Arguments(model="x", gpus="0.5", max_replicas="3", flags="--max-turns 3 --dtype float32")
    assert (arguments.gpus, arguments.max_replicas) == (0.5, 3)
    line = _read(arguments.model, arguments.flags)
    assert (line.own["max_turns"], line.rest) == (3, ["--dtype", "float32"])


def test_the_config_file_is_one_and_its_arguments_are_the_applications():
    config = ServeDeploySchema.model_validate(FILE)
    (application,) = config.applications
    arguments = Arguments(**application.args)
    line = _read(arguments.model, arguments.flags)
    compat.server_arguments(["--model", line.checkpoint, *line.rest], VLLM_DEFAULTS)
    assert application.import_path == f"{app.__module__}:{app.__name__}"
    assert [one.name for one in application.deployments] == [NAME]
    assert config.http_options.host == "127.0.0.1"


@pytest.fixture
def cluster(monkeypatch):
    """Ray with Serve on a free loopback port: `cluster(**arguments)` deploys the tiny model and gives its address."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    sys.path.append(str(ROOT / "benchmarks"))
    from server_load import free_port

    port = free_port()

    def deploy(flags: str = FLAGS, **arguments) -> str:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2**28)
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        serve.run(app(Arguments(model=TINY, flags=flags, gpus=0, **arguments)))
        return f"http://127.0.0.1:{port}"

    yield deploy
    serve.shutdown()
    ray.shutdown()


@pytest.mark.engine
@pytest.mark.nightly("a start of Ray with two vLLM servers, and 200 conversations twice")
@pytest.mark.timeout(5400)
def test_with_one_replica_killed_no_answer_is_lost_or_crossed_and_follow_ups_go_on_elsewhere_with_their_zooms(tmp_path):
    out = tmp_path / "soak.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "server_soak.py"), "--ray", "--conversations", "200"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=5000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures = json.loads(out.read_text())
    assert figures["answered"] == figures["questions"] > 300
    assert figures["history"]["state"] > 0  # elsewhere, and the same to the last region
    (end,) = figures["ends"]
    assert end["left"] == []  # no process of its engine outlives a replica


@pytest.mark.engine
@pytest.mark.nightly("one more start of Ray and vLLM")
@pytest.mark.timeout(900)
def test_whoever_comes_when_all_is_full_is_told_when_to_come_again(cluster):
    url = cluster(
        flags=f"{FLAGS} --api-key secret", max_ongoing_requests=1, target_ongoing_requests=1, max_queued_requests=2
    )
    key = {"Authorization": "Bearer secret"}
    body = {"messages": [{"role": "user", "content": "Which digit is on the red card?"}]}

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{url}/v1/chat/completions", json=body, headers=key, timeout=300)

    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(ask, range(24)))
    assert {reply.status_code for reply in replies} == {200, 503}
    assert all("Retry-After" in reply.headers for reply in replies if reply.status_code == 503)
    said = {reply.json()["choices"][0]["message"]["content"] for reply in replies if reply.status_code == 200}
    assert len(said) == 1
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/v1/vilavt").status_code == 401
    settings = httpx.get(f"{url}/v1/vilavt", headers=key).json()
    assert settings["model"] == TINY
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, headers=key) as stream:
        chunks = [line for line in stream.iter_lines() if line]
    assert len(chunks) > 3
    assert chunks[-1] == "data: [DONE]"
