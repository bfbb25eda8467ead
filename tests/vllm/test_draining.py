"""A real `vilavt-serve`, and one that is told to finish: what each does, also on a SIGTERM while it answers: who is
answered, who is told why not, when it is gone.
"""

import base64
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import vllm
from openai import OpenAI
from serving import serving

from vilavt_vllm import support

pytestmark = pytest.mark.engine
if problem := support.server_problem(vllm.__version__):
    pytest.skip(problem, allow_module_level=True)

ROOT = Path(__file__).parents[2]
MODEL, PICTURES = str(ROOT / "examples" / "vilavt-tiny"), ROOT / "examples" / "pictures"
ASKED = json.loads((PICTURES / "questions.json").read_text())[:3]  # of one picture
FLAGS = ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "1024"]
MARGIN = 60
"""Seconds beyond the time-out after which a server must be gone: it does not hang, however slow the machine."""


def body(number: int, **more) -> dict:
    asked = ASKED[number % len(ASKED)]
    data = base64.b64encode((PICTURES / asked["image"]).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return {"messages": [{"role": "user", "content": [image, {"type": "text", "text": asked["question"]}]}], **more}


def ask(url: str, number: int) -> tuple[str, str]:
    """(``right``, ``raw``, ``told`` or what went wrong, its words), of a whole answer, a stream, or a raw turn."""
    kind = ("whole", "stream", "raw")[number % 3]
    path = "/raw/chat/completions" if kind == "raw" else "/chat/completions"
    sent = body(number // 3, stream=kind == "stream", **({"max_tokens": 200} if kind == "raw" else {}))
    response = httpx.post(url + path, json=sent, timeout=150)
    if kind != "stream" or response.status_code != 200:
        data = response.json()
    else:
        chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        deltas = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk.get("choices")]
        data = {"choices": [{"message": {"content": "".join(deltas)}}]}
        data = next((chunk for chunk in chunks if "error" in chunk), data)
    if "error" in data:
        message = data["error"]["message"]
        return ("told" if "--shutdown-timeout" in message else f"{response.status_code}"), message
    answer = data["choices"][0]["message"]["content"]
    if kind == "raw":
        return ("raw" if answer else "empty"), answer
    right = answer == ASKED[number // 3 % len(ASKED)]["answer"]
    return ("right", answer) if right else ("wrong", response.text[-1000:])


def stop_while_running(server, count: int) -> tuple[list[tuple[str, str]], httpx.Response | None, float]:
    """What `count` running requests got, what came to one sent later (None: no connection), seconds until the end."""
    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(ask, server.url, number) for number in range(count)]
        while server.metric("vilavt_episodes_running") + server.metric("vllm:num_requests_running") < count // 2:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        time.sleep(0.2)
        try:
            late = httpx.post(f"{server.url}/chat/completions", json=body(0), timeout=150)
        except httpx.TransportError:
            late = None
        got = [one.result() for one in running]
        server.process.wait(150)
    return got, late, time.monotonic() - begun


def run_examples(server) -> None:
    """Every script in examples/, as its docstring says to start it; the request of the README through the loop."""
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert scripts == {"openai_client.py"}, "a new example needs its own run here"
    url, asked = server.url, ASKED[0]
    command = [sys.executable, str(ROOT / "examples" / "openai_client.py"), f"{url}/raw", MODEL]
    command += [str(PICTURES / asked["image"]), asked["question"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"<answer>{asked['answer']}</answer>" in done.stdout
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        reply = client.chat.completions.create(model=MODEL, **body(0))
        assert reply.choices[0].message.content == asked["answer"]


def test_the_examples_run_and_questions_that_run_are_finished(tmp_path):
    with serving(tmp_path / "log", *FLAGS, "--shutdown-timeout", "60") as server:
        run_examples(server)
        got, late, took = stop_while_running(server, 6)
    assert Counter(kind for kind, _ in got) == {"right": 4, "raw": 2}, got
    assert late is None or (late.status_code, "Retry-After" in late.headers) == (503, True)
    assert took < 60 + MARGIN


@pytest.mark.nightly("another server; test_server_requests.py holds what those that wait are told")
@pytest.mark.parametrize("flags", [FLAGS, []], ids=["eager", "defaults"])
def test_questions_that_cannot_be_finished_are_told_why_and_nobody_hangs(flags, tmp_path):
    """Also by a server that was told nothing but its address, whose model vLLM compiles."""
    with serving(tmp_path / "log", *flags) as server:
        run_examples(server)
        got, _, took = stop_while_running(server, 24)
    kinds = Counter(kind for kind, _ in got)
    assert set(kinds) <= {"right", "raw", "told"}, [one for one in got if one[0] not in ("right", "raw", "told")]
    assert len(got) == 24
    assert kinds["told"] > 0
    assert took < MARGIN
