"""Every command and every Python block of the documentation: names, options and syntax are right, and what is cheap
runs, on the tiny model, in a folder in which the reader's own files exist. The rules are in docs/writing.md.
"""

import ast
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from clips import clip, marked
from page_examples import PAGES, PROGRAMS, ROOT, Example, examples, reason
from PIL import Image
from typer.testing import CliRunner

from vilavt_core.cli import SUBCOMMANDS
from vilavt_core.cli import app as vilavt
from vilavt_rl.cli import app as vilavt_rl
from vilavt_vllm.server.command import read_command_line

EXAMPLES = [example for page in PAGES for example in examples(page)]
TINY = ROOT / "examples" / "vilavt-tiny"
CHECKPOINTS = ("path/to/ViLaVT", "CKPT", "CHECKPOINT", "FOLDER", "vilavt-tiny")
PICTURES = ("photo.jpg", "a.jpg", "b.jpg", "c.jpg", "another.jpg", "plan.png")
MOST_REASONS = 16
"""Of blocks; what a page cannot show being run should stay the exception."""
PYTHON_PROGRAMS = ("python", "python3", "pip", "nox", "torchrun", ".venv/bin/pip", ".venv/bin/nox")
OTHERS = ("git", "podman", "kubectl", "curl", "vllm", "serve", "ray", "export", ".")


def in_page(example: Example) -> str:
    return str(example)


SHELL = [one for one in EXAMPLES if one.language == "shell"]
PYTHON = [one for one in EXAMPLES if one.language == "python"]


# ---------------------------------------------------------------------- names, options, syntax


@pytest.mark.parametrize("example", SHELL, ids=in_page)
def test_the_commands_of_a_page_exist_with_their_options(example):
    for words in example.commands():
        _, command = split_environment(words)
        check(without_redirection(command), str(example))


def split_environment(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The variables that stand before a command, and the command."""
    end = next((i for i, word in enumerate(words) if not re.fullmatch(r"\w+=.*", word)), len(words))
    return dict(word.split("=", 1) for word in words[:end]), words[end:]


def check(words: list[str], where: str) -> None:
    """Stop if a command names a program, a subcommand, an option, a module or a file that is not there."""
    if not words:
        return
    program, *rest = words
    if program == "vilavt":
        parse(SUBCOMMANDS[rest[0]].load(rest[0]) if rest[0] in SUBCOMMANDS else typer.main.get_command(vilavt), rest)
    elif program == "vilavt-rl":
        parse(typer.main.get_command(vilavt_rl), rest, inside=False)
    elif program == "vilavt-serve":
        assert read_command_line(rest).checkpoint
    elif program in PYTHON_PROGRAMS:
        check_python(program.rpartition("/")[2], rest, where)
    else:
        assert program in OTHERS, f"{where}: {program}"


def parse(command: object, words: list[str], *, inside: bool = True) -> None:
    """Read words by a command of typer's, whose paths and values are not looked at.

    Args:
        command: the command that the first word names, if `inside`, else the group above it.
        words: the first names a command; further ones do, below groups.
    """
    if inside:
        words = words[1:]
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, [*words], resilient_parsing=True)
    given, _, _ = command.make_parser(context).parse_args([*words])
    missing = [one.name for one in command.params if one.required and given.get(one.name) in (None, (), [])]
    assert not missing, f"{shlex.join(words)} lacks {missing}"


def check_python(program: str, words: list[str], where: str) -> None:
    """Stop at modules of ours, scripts, sessions, packages and extras that are not there."""
    if "-m" in words[:4] or "--no-python" in words:
        if "--no-python" in words:
            check(words[words.index("--no-python") + 1 :], where)
        elif (module := words[words.index("-m") + 1]).startswith("vilavt_"):
            assert importlib.util.find_spec(module.partition(".")[0]), where
            path = module.replace(".", "/")
            assert [*ROOT.glob(f"vilavt_*/src/{path}.py"), *ROOT.glob(f"vilavt_*/src/{path}")], f"{where}: {module}"
    elif program == "python":
        assert words[0] == "run.py" or (ROOT / words[0]).is_file(), f"{where}: {words[0]}"
    elif program == "nox" and "-s" in words:
        sessions = set(re.findall(r"@nox\.session[^\n]*\n(?:@[^\n]*\n)*def (\w+)\(", (ROOT / "noxfile.py").read_text()))
        named = [word for word in words[words.index("-s") + 1 :] if not word.startswith("-")]
        assert set(named) <= sessions, where
    elif program == "pip":
        for folder, extras in re.findall(r"\./(vilavt_\w+)(?:\[([\w,-]+)\])?", " ".join(words)):
            project = (ROOT / folder / "pyproject.toml").read_text(encoding="utf-8")
            assert all(re.search(rf"^{one} = ", project, re.MULTILINE) for one in extras.split(",") if one), where


@pytest.mark.parametrize("example", PYTHON, ids=in_page)
def test_the_python_of_a_page_compiles_and_what_it_imports_of_ours_is_there(example):
    tree = compile(example.text, str(example), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vilavt_"):
            path = str(node.module).replace(".", "/")
            (file,) = [*ROOT.glob(f"vilavt_*/src/{path}.py"), *ROOT.glob(f"vilavt_*/src/{path}/__init__.py")]
            text = file.read_text(encoding="utf-8")
            assert [one.name for one in node.names if not re.search(rf"\b{one.name}\b", text)] == [], str(example)


def test_the_blocks_that_nothing_runs_are_few_and_say_why():
    reasons = {one.reason for one in EXAMPLES if one.reason is not None}
    assert len(reasons) <= MOST_REASONS, sorted(reasons)
    told = [*reasons, *PROGRAMS.values()]
    files = {name for why in told for name in re.findall(r"\b(?:tests|docs)/[\w/.]+\w", why)}
    assert [name for name in files if not (ROOT / name).exists()] == []


# ---------------------------------------------------------------------- what is cheap runs


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder with what pages call the reader's own."""
    folder = tmp_path
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "docs").mkdir()
    for name in CHECKPOINTS:
        (folder / name).symlink_to(TINY, target_is_directory=True)
    (folder / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    for i, name in enumerate(PICTURES):
        Image.open(ROOT / "examples" / "pictures" / f"scene-{i % 3 + 1}.png").convert("RGB").save(folder / name)
    (folder / "clip.mp4").write_bytes(clip(marked(20)))
    write_benchmark(folder / "path" / "to" / "benchmark")
    return folder


def write_benchmark(folder: Path) -> None:
    """Two questions under the file names of the benchmarks that pages ask."""
    folder.mkdir()
    picture = folder / "scene.png"
    shutil.copy(ROOT / "examples" / "pictures" / "scene-1.png", picture)
    question = "Which digit is on the purple card? A. 5 B. 3"
    rows = [
        {"question_id": f"q{i}", "question": question, "images": ["scene.png"], "answer": "A"}
        | {"problem_type": "multiple choice", "category": "one", "original_question_type": "one", "options": ["5", "3"]}
        for i in range(2)
    ]
    for name in ("mmsi_bench.json", "ERQA.json", "HRBench4K.json"):
        (folder / name).write_text(json.dumps([row | {"question": f"<image>{question}"} for row in rows]))


def test_the_commands_of_pages_run(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    found = [(example, words) for example in SHELL if example.in_ci for words in example.commands()]
    each = {tuple(words): example for example, words in reversed(found) if reason(words) is None}
    failures = [
        f"{example}: {shlex.join(words)}: {problem}"
        for words, example in reversed(each.items())
        for problem in run([*words])
    ]
    assert failures == []


def run(words: list[str]) -> Iterator[str]:
    """What went wrong with a command of ours."""
    command = without_redirection(words)
    result = CliRunner().invoke({"vilavt": vilavt, "vilavt-rl": vilavt_rl}[command[0]], command[1:])
    allowed = (0, 1) if command[1] == "doctor" else (0, 3)
    """1: another host is not installed; 3: the tiny model gave no answer, or did not zoom, on what is not its world."""
    if result.exit_code not in allowed:
        yield f"exit code {result.exit_code}: {result.exception!r} {result.output[-400:]}"
    if ">" in words:
        Path(words[words.index(">") + 1]).write_text(result.stdout)


def without_redirection(words: list[str]) -> list[str]:
    return words[: words.index(">")] if ">" in words else words


PAGES_WITH_PYTHON = sorted({example.page for example in PYTHON if example.in_ci})


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs_from_top_to_bottom(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    names: dict[str, object] = {"__name__": "page"}
    for example in PYTHON:
        if example.page == page and example.in_ci:
            exec(compile(example.text, str(example), "exec"), names)


@pytest.mark.skipif("VILAVT_EXAMPLES" not in os.environ, reason="takes minutes: `nox -s docs_examples` runs it")
@pytest.mark.timeout(3 * 3600)
def test_the_commands_that_take_minutes_run(workplace):
    """VILAVT_EXAMPLES is the host whose blocks run: hf, vllm or verl."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    servers: list[subprocess.Popen] = []
    try:
        for example in SHELL:
            if example.host != os.environ["VILAVT_EXAMPLES"]:
                continue
            for words in example.commands():
                print(f"{example}: {shlex.join(words)}", flush=True)
                variables, command = split_environment(words)
                if command[0] == "vilavt-serve":
                    servers.append(subprocess.Popen(command, cwd=workplace, env=environment | variables))
                    wait_for(servers[-1], "http://127.0.0.1:8000/health")
                elif command[0] != "pip":
                    with contextlib.ExitStack() as stack:
                        into = stack.enter_context((workplace / command[-1]).open("wb")) if ">" in command else None
                        call = {"cwd": workplace, "env": environment | variables, "stdout": into}
                        subprocess.run(without_redirection(command), **call, check=True, timeout=3000)
    finally:
        for server in servers:
            server.terminate()
            server.wait(60)


def wait_for(server: subprocess.Popen, url: str) -> None:
    """Until a server answers.

    Raises:
        AssertionError: it has ended instead, or does not answer for ten minutes.
    """
    last = time.monotonic() + 600
    while True:
        assert server.poll() is None, f"the server ended with {server.returncode}"
        assert time.monotonic() < last, f"the server does not answer at {url} ten minutes after its start"
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(1)
