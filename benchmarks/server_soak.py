"""A server through bad hours: conversations whose clients hang up and send nonsense, while the server is stopped, and
its engine killed.

    python benchmarks/server_soak.py [--conversations 500] [--seed 0] [--json FILE]
    python benchmarks/server_soak.py --ray [--conversations 200]

Starts ``vilavt-serve`` for `examples/vilavt-tiny` on a free loopback port, and again whenever it has ended, as systemd
would. Every conversation is about an image of its own and has one to three questions; a question is asked plainly or
as a stream, and before that now and then badly: a client that hangs up before the first byte, in the middle of its own
request or in the middle of the answer, half an image, no JSON, a number that is none. After a third of the questions
the server gets a SIGTERM, after two thirds its engine a SIGKILL. A client that is told why it got no answer asks again.

``--ray`` is the same on Ray Serve (`vilavt_vllm.ray_serve`, two replicas): in the middle one replica gets a SIGKILL.

Afterwards every conversation is held once more, a few at a time and nothing else going on: every question must have the
same answer, thoughts and regions, whether its server had kept the conversation or continued it from the state that the
client sent back. One client in ten sends none; after a restart its conversation is rebuilt from the messages, without
the zooms, and so it is for the comparison. What is printed, and must be 0, of all questions:

lost         never answered, although the client asked again whenever it was told to
silent       attempts that ended without an answer and without a reason
doubled      responses whose id another one has
crossed      answers that are others
inexact      conversations that were rebuilt although their client had sent the state
unrefused    nonsense that was not refused with a reason
stuck        conversations that the server still counts as running at the end

Exits with 1 if one of them is not. Needs the ``tiny`` extra of vilavt-hf, and the ``ray`` extra of vilavt-vllm for
``--ray``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from server_load import CHECKPOINT, FLAGS, SETTINGS, free_port, start

from vilavt_hf.tiny.benchmark import tasks

CLIENTS, FEW = 16, 4
"""Conversations at a time, in the storm and when they are held again."""
PATIENCE = 900.0
"""Seconds for which a client asks a question again, before it counts as lost."""
TIMEOUT = 300.0
"""Seconds for one attempt: a client that waits longer hangs."""
KEY = {"VILAVT_STATE_KEY": "a key of this benchmark alone, which signs the states of conversations"}
"""What servers that follow one another, or run side by side, have in common."""
GRACE = 60
"""Seconds that a server gets to end: `--shutdown-timeout`."""
BAD = ("gone", "half sent", "first chunk", "half image", "no JSON", "no number")
"""What a client does before it asks properly; the first three are hang-ups."""
MUST_BE_NONE = ("lost", "silent", "doubled", "crossed", "inexact", "unrefused", "stuck")


@dataclass(frozen=True)
class Outcome:
    """What became of one attempt."""

    kind: str
    """``answer``, ``told``, ``refused`` (nobody listens), ``silent``; ``cut`` (see `Replicas`)."""
    said: Any = None
    """Of an answer: what is compared. Else the reason."""
    told: dict[str, Any] = field(default_factory=dict)
    """Of an answer: the field ``vilavt``."""
    name: str = ""
    """Of an answer: the response's id."""
    wait: float = 1.0
    """Seconds before the next attempt: what ``Retry-After`` says."""
    final: bool = False
    """Whether another attempt would end the same way: the request is said to be at fault, which it is not."""


@dataclass
class Conversation:
    """One client's: its image and its questions."""

    number: int
    url: str
    """Of the image, as data."""
    questions: list[str]
    draws: random.Random
    sends_state: bool = True
    answers: list[Outcome] = field(default_factory=list)

    def body(self, **more: Any) -> dict[str, Any]:
        """The request of the next question, with all that was said before it."""
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": self.url}}]
        messages: list[dict[str, Any]] = []
        for place, question in enumerate(self.questions[: len(self.answers) + 1]):
            messages.append({"role": "user", "content": [*(parts if place == 0 else ()), _text(question)]})
            if place < len(self.answers):
                messages.append({"role": "assistant", "content": self.answers[place].said[0]})
        state = self.answers[-1].told.get("state") if self.answers and self.sends_state else None
        return {"messages": messages, **({"vilavt": {"state": state}} if state else {}), **more}

    def again(self, apart: int = 0) -> Conversation:
        """The same conversation from its beginning.

        Args:
            apart: of each number above 0 the image is written in another way, so that the server does not know the
                conversation.
        """
        url = self.url.replace("data:image/png;", f"data:image/png;again={apart};") if apart else self.url
        return Conversation(self.number, url, self.questions, self.draws, not apart)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def conversations(count: int, seed: int) -> list[Conversation]:
    """About images of which no two are alike."""
    out: list[Conversation] = []
    scenes = [task for task in tasks("heldout") if task.question.pictures == 1]
    for number in range(count):
        draws = random.Random(f"{seed} {number}")
        task = scenes[number % len(scenes)]
        scene = task.draw()
        picture = scene.image
        picture.putpixel((0, 0), (number % 256, number // 256, seed % 256))
        file = io.BytesIO()
        picture.save(file, "png", compress_level=1)
        cards = draws.sample(scene.cards, k=min(len(scene.cards), draws.choice((0, 1, 1, 2))))
        more = [f"Which digit is on the {card.colour} card?" for card in cards]
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        out.append(Conversation(number, url, [task.question.text, *more], draws, draws.random() < 0.9))
    return out


class Server:
    """A ``vilavt-serve`` that is started again when it has ended."""

    cut_short = "silent"
    """What an answer that breaks off counts as."""

    def __init__(self) -> None:
        self.port, self.up, self.stopping = free_port(), asyncio.Event(), float("inf")
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (closed where the server ends for good)
        self.url, self.ends, self.over = f"http://127.0.0.1:{self.port}", [], False
        self.events = {"SIGTERM": self.terminate, "engine killed": self.kill_engine}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Within the block there is a server, or soon will be."""
        os.environ.update(KEY)
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            self.over = True
            self.process.terminate()
            await watching
            self.log.close()

    async def _watch(self) -> None:
        while not self.over:
            self.process = await asyncio.to_thread(start, self.port, self.log, "--shutdown-timeout", str(GRACE))
            self.stopping = float("inf")
            self.up.set()
            code = await asyncio.to_thread(self.process.wait)
            self.up.clear()
            if self.stopping < float("inf"):
                self.ends.append({"after": self.event, "seconds": time.monotonic() - self.stopping, "code": code})

    async def terminate(self) -> None:
        """What systemd and Kubernetes do."""
        self.stopping, self.event = time.monotonic(), "SIGTERM"
        self.process.terminate()

    async def kill_engine(self) -> None:
        """What the kernel does when memory is short."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        engine = next(child for child in children if "EngineCore" in " ".join(child.cmdline()))
        self.stopping, self.event = time.monotonic(), "engine killed"
        engine.send_signal(signal.SIGKILL)

    def session(self, conversation: Conversation) -> dict[str, str]:
        """Headers that keep a conversation in one place."""
        return {}

    async def stuck(self) -> int:
        """Conversations and requests that the server counts as running."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        counted = ("vilavt_episodes_running", "vllm:num_requests_running", "vllm:num_requests_waiting{")
        return sum(int(float(line.rsplit(" ", 1)[1])) for line in text.splitlines() if line.startswith(counted))


class Replicas:
    """Two replicas on Ray Serve, in a cluster of this machine."""

    cut_short = "cut"
    """Ray's proxy closes the connection of an answer whose replica was killed: its client sees that, and asks again."""

    def __init__(self) -> None:
        self.port, self.up, self.stopping = free_port(), asyncio.Event(), float("inf")
        self.url, self.ends = f"http://127.0.0.1:{self.port}", []
        self.events = {"replica killed": self.kill_replica}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Within the block there are replicas."""
        os.environ.update({"RAY_AUTH_MODE": "disabled", **SETTINGS, **KEY})
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions

        from vilavt_vllm.ray_serve import Arguments, app

        def begin() -> None:
            ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2**28)
            serve.start(http_options=HTTPOptions(host="127.0.0.1", port=self.port))
            wanted = {"min_replicas": 2, "max_replicas": 2, "gpus": 0, "cpus": 1, "max_queued_requests": CLIENTS}
            serve.run(app(Arguments(model=str(CHECKPOINT), flags=" ".join(FLAGS), **wanted)))

        def end() -> None:
            serve.shutdown()
            ray.shutdown()

        try:
            await asyncio.to_thread(begin)
            self.up.set()
            yield
        finally:
            await asyncio.to_thread(end)

    @property
    def replicas(self) -> list[psutil.Process]:
        """Processes of the replicas that run, oldest first."""
        found = [
            one
            for one in psutil.process_iter(["cmdline", "create_time"])
            if (one.info["cmdline"] or [""])[0].startswith("ray::ServeReplica:default:vilavt")
        ]
        return sorted(found, key=lambda one: one.info["create_time"])

    async def kill_replica(self) -> None:
        """What the loss of a machine does."""
        replica = self.replicas[0]
        processes = [replica, *replica.children(recursive=True)]
        replica.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        await asyncio.to_thread(psutil.wait_procs, processes, 60)
        left = [one.pid for one in processes if one.is_running()]
        self.ends.append({"after": "replica killed", "seconds": time.monotonic() - begun, "left": left})

    def session(self, conversation: Conversation) -> dict[str, str]:
        """Headers that keep a conversation in one place."""
        return {"x-session-id": f"conversation {conversation.number}"}

    async def stuck(self) -> int:
        """Each replica counts for itself: an answer of one says nothing of the other."""
        return 0


class Soak:
    """The storm, and what is counted in it."""

    def __init__(self, target: Server | Replicas, client: httpx.AsyncClient) -> None:
        self.target, self.client = target, client
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.answered = 0
        self.path = f"{target.url}/v1/chat/completions"

    async def hold(self, conversation: Conversation, storm: bool) -> None:
        """All questions of a conversation, one after the other."""
        while len(conversation.answers) < len(conversation.questions):
            if storm and conversation.draws.random() < 0.3:
                await self.misbehave(conversation, conversation.draws.choice(BAD))
            outcome = await self.ask(conversation, storm and conversation.draws.random() < 0.5)
            if outcome is None:
                self.counts["lost"] += len(conversation.questions) - len(conversation.answers)
                return
            conversation.answers.append(outcome)
            self.answered += 1

    async def ask(self, conversation: Conversation, stream: bool) -> Outcome | None:
        """Until there is an answer; None: there is none."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            await self.target.up.wait()
            outcome = await self.attempt(conversation, stream)
            if outcome.kind == "answer":
                self.names[outcome.name] += 1
                return outcome
            self.counts[outcome.kind] += 1
            self.reasons[f"{outcome.kind}: {outcome.said}"[:160]] += 1
            if outcome.final:
                break
            await asyncio.sleep(outcome.wait)
        return None

    async def attempt(self, conversation: Conversation, stream: bool) -> Outcome:
        """One request."""
        begun, begun_answer = time.monotonic(), False
        body, headers = conversation.body(stream=stream), self.target.session(conversation)
        try:
            async with self.client.stream("POST", self.path, json=body, headers=headers) as response:
                begun_answer = True
                text = (await response.aread()).decode()
        except httpx.ConnectError as error:
            return Outcome("refused", type(error).__name__)
        except httpx.TransportError as error:
            # Not accepted by a server that was about to end, although the kernel had taken the connection.
            late = begun > self.target.stopping and not begun_answer
            kind = "refused" if late else self.target.cut_short
            return Outcome(kind, f"{type(error).__name__} {error}")
        if response.status_code != 200:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if message := json.loads(text)["error"]["message"]:
                    wait, final = float(response.headers.get("Retry-After", 1)), response.status_code < 500
                    return Outcome("told", f"{response.status_code} {message}", wait=wait, final=final)
            if text and response.status_code in (503, 500) and isinstance(self.target, Replicas):
                return Outcome("told", f"{response.status_code} {text[:80]}")  # Ray's own words, without our JSON
            return Outcome("silent", f"{response.status_code} {text[:80]!r}")
        if not stream:
            return _of_whole(json.loads(text))
        return _of_stream(text) or Outcome(self.target.cut_short, "a stream without an end")

    async def misbehave(self, conversation: Conversation, bad: str) -> None:
        """Hang up, or send nonsense, which must be refused with a reason."""
        await self.target.up.wait()
        self.counts[f"bad: {bad}"] += 1
        body, headers = conversation.body(stream=bad == "first chunk"), self.target.session(conversation)
        delay = conversation.draws.uniform(0, 0.6)
        try:
            if bad == "gone":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self.client.post(self.path, json=body, headers=headers)
                return
            if bad == "half sent":
                await self.client.post(self.path, content=_half(json.dumps(body)), headers={**headers, **JSON})
                return
            if bad == "first chunk":
                async with self.client.stream("POST", self.path, json=body, headers=headers) as response:
                    chunks = itertools.count()
                    async for _ in response.aiter_text():
                        if next(chunks) >= conversation.draws.randrange(4):
                            return
                return
            content = _nonsense(bad, body)
            response = await self.client.post(self.path, content=content, headers={**headers, **JSON})
        except (httpx.TransportError, _HungUp):
            return  # the server may be away at the moment
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if response.status_code in (400, 503) and response.json()["error"]["message"]:
                return
        if response.status_code in (500, 503) and isinstance(self.target, Replicas):
            return  # a replica that was killed meanwhile
        self.counts["unrefused"] += 1
        self.reasons[f"unrefused {bad}: {response.status_code} {response.text[:80]}"] += 1


JSON = {"Content-Type": "application/json"}


class _HungUp(Exception):
    """Ends a request in the middle of its body."""


async def _half(text: str) -> AsyncIterator[bytes]:
    yield text[: len(text) // 2].encode()
    await asyncio.sleep(0.05)
    raise _HungUp


def _nonsense(bad: str, body: dict[str, Any]) -> bytes:
    if bad == "no JSON":
        return json.dumps(body).encode()[:-1]
    if bad == "no number":
        return json.dumps({**body, "temperature": "warm"}).encode()
    picture = body["messages"][0]["content"][0]["image_url"]
    picture["url"] = picture["url"][: len(picture["url"]) // 3]
    body.pop("vilavt", None)
    body["messages"] = body["messages"][:1]
    return json.dumps(body).encode()


def _of_whole(reply: dict[str, Any]) -> Outcome:
    message, told = reply["choices"][0]["message"], reply["vilavt"]
    return Outcome("answer", (message["content"], message["reasoning_content"], told["events"]), told, reply["id"])


def _of_stream(text: str) -> Outcome | None:
    """None: it does not come to its end."""
    content = thoughts = name = ""
    told: dict[str, Any] = {}
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    for line in lines:
        if line == "[DONE]":
            break
        chunk = json.loads(line)
        if "error" in chunk:
            message = chunk["error"]["message"]
            return Outcome("told" if message else "silent", f"in a stream: {message}")
        name = chunk["id"]
        for choice in chunk["choices"]:
            content += choice["delta"].get("content") or ""
            thoughts += choice["delta"].get("reasoning_content") or ""
        if (said := chunk.get("vilavt")) and said["type"] == "end":
            told = said
    else:
        return None
    return Outcome("answer", (content, thoughts, told["events"]), told, name)


async def at_a_time(count: int, work: Any, things: list[Any]) -> None:
    """Do `work` on all things, `count` of them at the same time."""
    waiting = list(reversed(things))

    async def one() -> None:
        while waiting:
            await work(waiting.pop())

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())


async def strike(soak: Soak, questions: int) -> None:
    """Let the bad things happen, at equal distances."""
    events = soak.target.events
    for place, (name, happen) in enumerate(events.items(), 1):
        while soak.answered < questions * place / (len(events) + 1):
            await asyncio.sleep(0.05)
        await soak.target.up.wait()
        Console(stderr=True).print(f"after {soak.answered} of {questions} answers: {name}")
        await happen()


async def measure(target: Server | Replicas, count: int, seed: int) -> dict[str, Any]:
    """The storm, then everything once more."""
    talks = conversations(count, seed)
    questions = sum(len(talk.questions) for talk in talks)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with target.running(), httpx.AsyncClient(limits=limits, timeout=TIMEOUT) as client:
        storm, quiet = Soak(target, client), Soak(target, client)
        await target.up.wait()
        striking = asyncio.create_task(strike(storm, questions))
        begun = time.monotonic()
        await at_a_time(CLIENTS, lambda talk: storm.hold(talk, True), talks)
        seconds = time.monotonic() - begun
        await striking
        await target.up.wait()
        stuck = await settled(target)
        again = [talk.again() for talk in talks]
        await at_a_time(FEW, lambda talk: quiet.hold(talk, False), again)
        figures = await compare(quiet, talks, again)
    ids = Counter(storm.names)
    return {
        "conversations": count,
        "questions": questions,
        "seconds": seconds,
        "answered": storm.answered,
        "told": storm.counts["told"],
        "refused_connections": storm.counts["refused"],
        "cut": storm.counts["cut"],
        "bad": {bad: storm.counts[f"bad: {bad}"] for bad in BAD},
        "ends": target.ends,
        **figures,
        "lost": storm.counts["lost"] + quiet.counts["lost"],
        "silent": storm.counts["silent"] + quiet.counts["silent"],
        "doubled": sum(times - 1 for times in ids.values()),
        "unrefused": storm.counts["unrefused"],
        "stuck": stuck,
        "reasons": dict((storm.reasons + quiet.reasons).most_common()),
    }


async def settled(target: Server | Replicas) -> int:
    """What still runs when nobody waits for anything; requests that were hung up on are given time to end."""
    for _ in range(60):
        if not (stuck := await target.stuck()):
            break
        await asyncio.sleep(1)
    return stuck


async def compare(quiet: Soak, talks: list[Conversation], again: list[Conversation]) -> dict[str, Any]:
    """Whether every answer of the storm is that of its own question."""
    history: Counter[str] = Counter()
    crossed = inexact = 0
    for talk, second in zip(talks, again, strict=True):
        rebuilt: Conversation | None = None
        for place, (answer, whole) in enumerate(zip(talk.answers, second.answers, strict=False)):
            told = answer.told.get("history") or "first"
            inexact += talk.sends_state and told == "rebuilt"
            if told == "rebuilt":
                rebuilt = talk.again(apart=place)
                rebuilt.answers = [Outcome("answer", earlier.said) for earlier in talk.answers[:place]]
            expected: Outcome | None = whole
            if rebuilt is not None:  # and what comes later goes on from what was rebuilt
                expected = await quiet.ask(rebuilt, False)
                rebuilt.answers += [expected or answer]
            if expected and answer.said == expected.said:
                history[told] += 1
            else:
                crossed += 1
                other = expected and expected.said[:2]
                quiet.reasons[f"crossed: {talk.number} {place} {told}: {answer.said[:2]} {other}"[:300]] += 1
    said = Counter(json.dumps(answer.said) for talk in talks for answer in talk.answers)
    shared = sum(times for times in said.values() if times > 1) / max(1, sum(said.values()))
    return {"crossed": crossed, "inexact": inexact, "history": dict(history), "shared_transcripts": shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", action="store_true", help="two replicas on Ray Serve instead of one server")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = asyncio.run(_run(args))
    none = ", ".join(f"{figures[name]} {name}" for name in MUST_BE_NONE)
    Console().print(
        f"{figures['conversations']} conversations, {figures['questions']} questions in {figures['seconds']:.0f} s: "
        f"{figures['answered']} answered; {none}\n"
        f"attempts that were told why not: {figures['told']}; while nobody listened: {figures['refused_connections']}; "
        f"cut short: {figures['cut']}; bad requests: {figures['bad']}\n"
        f"how they went on: {figures['history']}; {figures['shared_transcripts']:.0%} share a transcript with another\n"
        f"ends: {figures['ends']}",
        highlight=False,
    )
    for reason, times in figures["reasons"].items():
        Console().print(f"{times:5d}  {reason}", highlight=False, markup=False)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(any(figures[name] for name in MUST_BE_NONE))


async def _run(args: argparse.Namespace) -> dict[str, Any]:
    return await measure(Replicas() if args.ray else Server(), args.conversations, args.seed)


if __name__ == "__main__":
    main()
