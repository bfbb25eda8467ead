"""The commands and Python blocks of the documentation, and what a comment before a block says about running it.

A fenced block without a language, or of `console`, holds commands, one a line; `python` is Python; anything else is no
example. The rules are in docs/writing.md.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("vilavt_*/README.md")),
)
"""Of the documentation."""
SHELL = ("", "console")
PROGRAMS = {
    "pip": "installs packages: tests/test_install.py tries the wheels",
    "python3": "makes an environment",
    ".": "enters an environment",
    "export": "sets a variable for the commands below it",
    "nox": "runs the tests",
    "git": "needs a network",
    "podman": "needs a builder of containers",
    "kubectl": "needs a cluster",
    "curl": "needs a running server: tests/vllm asks one",
    "torchrun": "needs several GPUs: tests/distributed runs two processes",
    "vllm": "needs vLLM: tests/vllm starts its server",
    "vilavt-serve": "needs vLLM: tests/vllm starts it",
    "serve": "needs Ray Serve: tests/vllm/test_ray_serve.py",
    "ray": "starts a cluster of Ray: tests/vllm/test_ray_serve.py",
    "python benchmarks/": "takes minutes: tests/test_benchmarks.py runs it briefly",
    "python -m": "needs the host it starts: tests of that host",
    "python run.py": "needs a checkout of VLMEvalKit: tests/vlmeval/test_checkout.py",
    "vilavt web": "serves until it is stopped: tests/web",
    "vilavt chat": "reads a terminal: tests/core/test_talk.py",
    "vilavt sft": "trains: docs/path.md trains the tiny model, and tests/hf/test_train_run.py",
    "vilavt convert": "needs a checkpoint in the published SFT format: tests/core/test_checkpoint_convert.py",
    "vilavt push": "needs an account of the hub: tests/core/test_model_card.py",
    "vilavt-rl curve": "needs the log of a run: docs/path.md draws one",
    "vilavt tiny build": "trains for an hour",
    "vilavt tiny eval": "takes minutes: tests/hf/test_tiny.py asks fewer questions",
    "vilavt tiny data": "takes minutes: docs/path.md makes one",
    "vilavt-rl verl": "needs verl: docs/path.md runs two steps, and tests/rl",
    "vilavt-rl tiny": "takes minutes: docs/path.md makes data, `nox -s grpo_learns` the rest",
    "vilavt-rl merge": "needs the shards of a run: docs/path.md merges some",
    "vilavt-rl cpu-vllm-metadata": "changes the environment",
}
"""Beginnings of commands that CI does not run, and why. In a block that the session docs_examples runs they count for
nothing.
"""
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)
BY_SESSION = re.compile(r"<!-- run by docs_examples: (hf|vllm|verl) -->")


def tokens(page: Path) -> list[Token]:
    """A page as markdown-it reads it."""
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Example:
    """A block of commands or of Python."""

    page: Path
    line: int
    """Of the page, from 1."""
    language: str
    """``shell`` or ``python``."""
    text: str
    host: str | None
    """Beside which host the session docs_examples runs it; None: CI does, or nothing."""
    reason: str | None
    """Why nothing runs it; None: something does."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def in_ci(self) -> bool:
        """Whether CI runs it."""
        return self.reason is None and self.host is None

    def commands(self) -> Iterator[list[str]]:
        """The commands of a block, each as words; comments, and what programs print or read, are left out.

        Where lines begin with ``$``, the others are output; lines that begin with ``>`` are typed into the program.
        """
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        text = "\n".join(line for line in lines if not line.startswith("> "))
        for line in _whole_lines(text):
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ("&&", "|")), len(words))
                if words[:end]:
                    yield words[:end]
                words = words[end + 1 :]


def reason(words: list[str]) -> str | None:
    """Why CI does not run a command, wherever it stands; None: it does."""
    words = [word for i, word in enumerate(words) if i or not re.fullmatch(r"\w+=.*", word)]
    text = " ".join(words).removeprefix(".venv/bin/")
    if "--backend vllm" in text or "http://127.0.0.1" in text:
        return "needs vLLM or a running server: tests/vllm has both"
    return next((why for start, why in PROGRAMS.items() if text.startswith(start) and _ends_word(text, start)), None)


def _ends_word(text: str, start: str) -> bool:
    return start.endswith("/") or text[len(start) :][:1] in ("", " ")


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, a quoted text that goes over several lines being one of them."""
    line = ""
    for part in text.splitlines():
        line = f"{line}\n{part}" if line else part
        try:
            shlex.split(line, comments=True)
        except ValueError:  # a quotation mark is open
            continue
        yield line
        line = ""
    if line:
        yield line


def examples(page: Path) -> list[Example]:
    """Of a page, from top to bottom."""
    found, before = [], ""
    for token in tokens(page):
        if token.type == "fence":
            name = token.info.split()[0] if token.info.strip() else ""
            language = "python" if name == "python" else "shell" if name in SHELL else None
            if language is not None:
                why, by = NOT_RUN.search(before), BY_SESSION.search(before)
                line = (token.map or [0])[0] + 1
                told = None if why is None else " ".join(why[1].split())
                found.append(Example(page, line, language, token.content, by and by[1], told))
        before = token.content if token.type == "html_block" else ""
    return found


def report() -> str:
    """What runs where, and the reasons of what does not."""
    found = [example for page in PAGES for example in examples(page)]
    in_ci, by_session = sum(one.in_ci for one in found), sum(one.host is not None for one in found)
    lines = [f"{len(found)} blocks: {in_ci} in CI, {by_session} by docs_examples"]
    reasons = Counter(one.reason for one in found if one.reason)
    lines += [f"{count:3} blocks: {why}" for why, count in reasons.most_common()]
    commands = Counter(why for one in found if one.in_ci for words in one.commands() if (why := reason(words)))
    lines += [f"{count:3} commands: {why}" for why, count in commands.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
