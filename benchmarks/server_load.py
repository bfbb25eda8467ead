"""A server under load: no answer lost, doubled or crossed, no memory kept, and how long clients wait.

    python benchmarks/server_load.py [--clients 64] [--requests 300] [--json FILE]
    python benchmarks/server_load.py --url http://127.0.0.1:8000/v1 --pid PID     # a server that runs already

Starts ``vilavt-serve`` for `examples/vilavt-tiny` on a free loopback port and lets many clients ask held-out questions
at once: most plainly, some streaming, some reading slowly, some hanging up after the first chunk, some with half an
image. Every image is different (other cards, and a nonce in its first pixel). Afterwards every question that was
answered is asked once more, a few at a time and in the opposite order: the answer, the thoughts and every region must
be the same, so an answer that went to another client shows, whichever time it did, unless both questions have the same
transcript (their share is printed).

Memory is measured before and after that load, of the process that holds the loop and of all processes of the server.
Before it come ``--warm-up`` requests of the same kind: the worker of vLLM's CPU build grows until it levels off after
about 900 requests (probably kernels prepared per number of tokens). Needs the ``tiny`` extra of vilavt-hf and the
``openai`` client.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
from openai import APIStatusError, AsyncOpenAI
from rich.console import Console

from vilavt_hf.tiny.benchmark import tasks

CHECKPOINT = Path(__file__).parents[1] / "examples" / "vilavt-tiny"
KINDS = {"plain": 50, "stream": 26, "slow": 8, "cancelled": 8, "malformed": 8}
"""What a client does -> how often, in percent."""
FEW = 4
"""Questions at a time when they are asked again. One by one, the engine's processes mostly wait for each other."""


FLAGS = ("--dtype", "float32", "--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "1024")
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(port: int, log: IO[bytes], *flags: str) -> subprocess.Popen[bytes]:
    """A server on this loopback port, once it answers.

    Raises:
        SystemExit: it ended instead.
    """
    command = [sys.executable, "-m", "vilavt_vllm.server.command", str(CHECKPOINT), "--host", "127.0.0.1"]
    command += ["--port", str(port), *FLAGS, *flags]
    process = subprocess.Popen(command, env=SETTINGS | os.environ, stdout=log, stderr=subprocess.STDOUT)
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                break
        if process.poll() is not None:
            log.seek(0)
            raise SystemExit(f"the server did not start:\n{log.read().decode()[-3000:]}")
        time.sleep(0.5)
    return process


@contextlib.contextmanager
def running_server(key: str) -> Iterator[tuple[str, int]]:
    """(base URL, pid) of a server that stops with the block."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        # A cache that the first load fills: what grows after it is no cache.
        process = start(port, log, "--api-key", key, "--mm-processor-cache-gb", "0.05")
        try:
            yield f"http://127.0.0.1:{port}/v1", process.pid
        finally:
            process.terminate()
            process.wait(60)


def memory(pid: int) -> tuple[int, int]:
    """Bytes that a process holds alone (unique set size), and with its children."""
    server = psutil.Process(pid)
    loop, *others = (process.memory_full_info().uss for process in [server, *server.children(recursive=True)])
    return loop, loop + sum(others)


class Question:
    """One question as a client sends it."""

    def __init__(self, number: int, kind: str, task: Any) -> None:
        self.number, self.kind, self.right = number, kind, task.question.answer
        picture = task.scene.image.copy()
        picture.putpixel((0, 0), (number % 256, number // 256, 0))
        file = io.BytesIO()
        picture.save(file, "png", compress_level=1)  # the default takes the client longer than the server's answer
        data = base64.b64encode(file.getvalue()).decode()
        url = (
            f"data:image/png;base64,{data[: len(data) // 3]}"
            if kind == "malformed"
            else f"data:image/png;base64,{data}"
        )
        image = {"type": "image_url", "image_url": {"url": url}}
        self.messages = [{"role": "user", "content": [image, {"type": "text", "text": task.question.text}]}]

    async def ask(self, client: AsyncOpenAI, kind: str) -> tuple[str, Any]:
        """(id of the response, what it said); what a client that hung up saw is None."""
        create = client.chat.completions.create
        if kind in ("plain", "malformed"):
            reply = await create(model=str(CHECKPOINT), messages=self.messages)  # type: ignore[call-overload]
            message = reply.choices[0].message
            return reply.id, (message.content, message.reasoning_content, reply.vilavt["events"])
        content = thoughts = ""
        events: Any = None
        stream = await create(model=str(CHECKPOINT), messages=self.messages, stream=True)  # type: ignore[call-overload]
        async for chunk in stream:
            name, delta = chunk.id, chunk.choices[0].delta
            content += delta.content or ""
            thoughts += getattr(delta, "reasoning_content", None) or ""
            if kind == "cancelled" and thoughts:
                await stream.close()
                return name, None
            if kind == "slow":
                await asyncio.sleep(0.1)
            if (said := getattr(chunk, "vilavt", None)) and said["type"] == "end":
                events = said["events"]
        return name, (content, thoughts, events)


async def load(
    client: AsyncOpenAI, questions: list[Question], clients: int, kind: str | None = None
) -> dict[int, tuple[str, Any, float]]:
    """Ask all questions, at most `clients` at a time, all of them as `kind` if it is given.

    Returns:
        Number of the question -> (response id or error, said, seconds).
    """
    waiting, out = list(reversed(questions)), {}

    async def one_client() -> None:
        while waiting:
            question, began = waiting.pop(), time.perf_counter()
            try:
                name, said = await question.ask(client, kind or question.kind)
            except APIStatusError as error:
                name, said = f"status {error.status_code}", None
            out[question.number] = name, said, time.perf_counter() - began

    await asyncio.gather(*(one_client() for _ in range(clients)))
    return out


def make(count: int, first: int, todo: list[Any]) -> list[Question]:
    """Questions of all kinds, in a fixed random order, about images of which no two are alike."""
    kinds = random.Random(first).choices(list(KINDS), weights=list(KINDS.values()), k=count)
    return [Question(i, kind, todo[i % len(todo)]) for i, kind in enumerate(kinds, first)]


async def measure(url: str, pid: int, key: str, clients: int, requests: int, warm_up: int) -> dict[str, Any]:
    """Two loads, and the second one's questions once more, a few at a time."""
    limits, todo = httpx.Limits(max_connections=clients), tasks("heldout")
    async with AsyncOpenAI(
        base_url=url, api_key=key, max_retries=0, timeout=300, http_client=httpx.AsyncClient(limits=limits, timeout=300)
    ) as client:
        await load(client, make(warm_up, 0, todo), clients)
        before = await settled(pid)
        questions = make(requests, warm_up, todo)
        began = time.perf_counter()
        under_load = await load(client, questions, clients)
        seconds = time.perf_counter() - began
        after = await settled(pid)
        answered = [q for q in questions if q.kind in ("plain", "stream", "slow")]
        again = await load(client, answered[::-1], FEW, "plain")
    said = {q.number: under_load[q.number] for q in answered if q.number in under_load}
    pairs = [tuple(found[q.number][1] if q.number in found else None for found in (said, again)) for q in answered]
    names = Counter(name for name, _, _ in under_load.values() if name.startswith("chatcmpl"))
    waits = sorted(seconds for q in answered if q.kind != "slow" for seconds in [said[q.number][2]])
    transcripts = Counter(json.dumps(second) for _, second in pairs)
    return {
        "clients": clients,
        "requests": requests,
        "kinds": dict(Counter(q.kind for q in questions)),
        "answered": len(answered),
        "lost": sum(None in pair for pair in pairs),
        "doubled": sum(count - 1 for count in names.values()),
        "crossed": sum(None not in pair and pair[0] != pair[1] for pair in pairs),
        "shared_transcripts": sum(count for count in transcripts.values() if count > 1) / len(pairs),
        "malformed_refused": sum(under_load[q.number][0] == "status 400" for q in questions if q.kind == "malformed"),
        "right": sum(said[q.number][1][0] == q.right for q in answered if said[q.number][1]) / len(answered),
        "p50": waits[len(waits) // 2],
        "p95": waits[int(len(waits) * 0.95)],
        "requests_per_second": requests / seconds,
        "loop_memory": [before[0], after[0]],
        "loop_memory_ratio": after[0] / before[0],
        "memory": [before[1], after[1]],
        "memory_ratio": after[1] / before[1],
    }


async def settled(pid: int) -> tuple[int, int]:
    """The server's memory, once requests that were hung up on are gone."""
    await asyncio.sleep(2)
    return memory(pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=900, help="requests before the measured ones")
    parser.add_argument("--url", help="of a running server of the same checkpoint")
    parser.add_argument("--pid", type=int, help="of that server")
    parser.add_argument("--key", default="benchmark", help="API key")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (args.url is None) != (args.pid is None):
        parser.error("--url and --pid go together")
    with contextlib.ExitStack() as stack:
        url, pid = (args.url, args.pid) if args.url else stack.enter_context(running_server(args.key))
        figures = asyncio.run(measure(url, pid, args.key, args.clients, args.requests, args.warm_up))
    Console().print(
        f"{args.clients} clients, {figures['requests']} requests {figures['kinds']}: {figures['answered']} to answer, "
        f"{figures['lost']} lost, {figures['doubled']} doubled, {figures['crossed']} crossed "
        f"({figures['shared_transcripts']:.0%} share a transcript with another); {figures['malformed_refused']} of "
        f"{figures['kinds'].get('malformed', 0)} malformed refused; {figures['right']:.1%} right\n"
        f"p50 {figures['p50']:.2f} s, p95 {figures['p95']:.2f} s, {figures['requests_per_second']:.1f} requests/s; "
        f"memory after / before: {figures['loop_memory_ratio']:.3f} of the loop's process, "
        f"{figures['memory_ratio']:.3f} of all ({figures['memory'][1] / 2**20:.0f} MiB)"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
