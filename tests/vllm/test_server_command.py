"""What `vilavt-serve` understands of its command line, and which of vLLM's flags it refuses; no engine is started."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
import vllm

from vilavt_vllm import compat, support
from vilavt_vllm.errors import CommandError, UnsupportedError
from vilavt_vllm.server.command import main, read_command_line
from vilavt_vllm.server.options import VLLM_DEFAULTS, ServerOptions, options_of

if problem := support.server_problem(vllm.__version__):
    pytest.skip(problem, allow_module_level=True)

TINY = str(Path(__file__).parents[2] / "examples" / "vilavt-tiny")


@pytest.fixture
def flags_file(tmp_path):
    def write(text: str, name: str = "flags.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def served(*words: str):
    """(checkpoint, our options, vLLM's namespace) of a command line."""
    line = read_command_line(words)
    args = compat.server_arguments(["--model", line.checkpoint, *line.rest], VLLM_DEFAULTS)
    assert args.model == line.checkpoint
    assert args.model_tag in (None, line.checkpoint)
    return line.checkpoint, options_of(line.own), args


@pytest.mark.parametrize(
    "words",
    [
        ("CKPT", "--port", "9000", "--max-episodes", "3"),
        ("--port", "9000", "--max-episodes", "3", "CKPT"),
        ("--max-episodes", "3", "--port", "9000", "CKPT"),
        ("--max-episodes", "3", "CKPT", "--port=9000"),
        ("--port", "9000", "CKPT", "--max_episodes", "3"),
        ("--enforce-eager", "CKPT", "--max_episodes=3", "--port", "9000"),
        ("--model", "CKPT", "--port", "9000", "--max-episodes", "3"),
        ("--max-episodes", "3", "--port", "9000", "--model=CKPT"),
        ("CKPT", "--model", "CKPT", "--port", "9000", "--max-episodes", "3"),
    ],
    ids=" ".join,
)
def test_the_checkpoint_may_stand_anywhere_between_flags(words):
    if words[:3] == ("CKPT", "--model", "CKPT"):
        with pytest.raises(CommandError, match="two checkpoints are named, 'CKPT' and --model 'CKPT'; name one"):
            read_command_line(words)
        return
    checkpoint, options, args = served(*words)
    assert (checkpoint, options.max_episodes, args.port) == ("CKPT", 3, 9000)


def test_a_file_of_flags_has_ours_and_vllms_and_the_command_line_wins(flags_file):
    file = flags_file("model: CKPT\nport: 9000\nmax_episodes: 3\nmax-turns: 2\nenforce-eager: true\nseed: 4\n")
    for words in (("--config", file), (f"--config={file}",)):
        checkpoint, options, args = served(*words)
        assert (checkpoint, options.max_episodes, options.limits, options.seed) == ("CKPT", 3, {"max_turns": 2}, 4)
        assert (args.port, args.enforce_eager) == (9000, True)
    for words in (("OTHER", "--config", file, "--port", "1"), ("--config", file, "--port", "1", "OTHER")):
        checkpoint, options, args = served(*words, "--max-episodes", "5")
        assert (checkpoint, options.max_episodes, options.seed, args.port) == ("OTHER", 5, 4, 1)
    checkpoint, _, args = served("--model", "OTHER", "--config", file)
    assert (checkpoint, args.port) == ("OTHER", 9000)


@pytest.mark.parametrize("text", ["port: [", "just words", "- a\n- list\n"])
def test_a_file_that_holds_no_flags_is_named(flags_file, text):
    with pytest.raises(CommandError, match=r"flags\.yaml: no YAML file of flags .* such as port: 8000"):
        read_command_line(["CKPT", "--config", flags_file(text)])


def test_a_file_that_is_missing_of_another_kind_or_names_another_is_refused(flags_file):
    with pytest.raises(CommandError, match=r"nowhere\.yaml: no YAML file of flags .*No such file"):
        read_command_line(["--config", "nowhere.yaml"])
    with pytest.raises(CommandError, match=r"flags\.json: no YAML file of flags"):
        read_command_line(["CKPT", "--config", flags_file("{}", "flags.json")])
    with pytest.raises(CommandError, match=r"it names another file of flags, more\.yaml; put them into one"):
        read_command_line(["CKPT", "--config", flags_file("config: more.yaml")])


@pytest.mark.parametrize("words", [(), ("--port", "8000"), ("--max-episodes", "3"), ("--model",), "a file"])
def test_no_checkpoint_is_one_line_with_the_remedy(words, flags_file, capsys):
    words = ["--config", flags_file("port: 9000")] if words == "a file" else list(words)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == ("vilavt-serve: CommandError: no checkpoint is named: vilavt-serve CHECKPOINT, a folder or a hub id")


def test_no_thread_for_episodes_is_refused_before_anything_starts():
    with pytest.raises(CommandError, match="--episode-threads is 0, at least one is needed"):
        options_of(read_command_line([TINY, "--episode-threads", "0"]).own)


def test_two_checkpoints_are_refused_wherever_they_stand(monkeypatch):
    for words in (["A", "--model", "B"], ["--model", "B", "A"]):
        with pytest.raises(CommandError, match="two checkpoints are named, 'A' and --model 'B'; name one"):
            read_command_line(words)
    line = read_command_line(["--model", "B", "--port", "8000", "A"])  # which of them is one, vLLM's parser finds out
    with pytest.raises(CommandError, match="two checkpoints are named, 'B' and 'A'; name one"):
        compat.serve(["--model", line.checkpoint, *line.rest], None, VLLM_DEFAULTS)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--api-server-count", "2"], "a conversation is remembered in the process that answered it"),
        (["--api-server-count", "2", "--data-parallel-size", "2"], "a conversation is remembered"),
        (["--headless"], "use `vllm serve --headless`"),
        (["--grpc"], "the loop is in the HTTP server"),
        (
            ["--data-parallel-multi-port-external-lb", "--data-parallel-size", "2", "--data-parallel-size-local", "2"],
            "start each with --data-parallel-rank",
        ),
    ],
)
def test_what_would_start_other_processes_than_one_server_is_refused_by_name(words, message):
    with pytest.raises(UnsupportedError) as refusal:
        compat.serve(["--model", TINY, *words], None, VLLM_DEFAULTS)
    assert str(refusal.value).startswith(words[0])
    assert message in str(refusal.value)
    compat.refuse_other_processes(compat.server_arguments(["--model", TINY], VLLM_DEFAULTS))


@pytest.mark.parametrize(
    "words", ["--port 8001", "--host 0.0.0.0", "--shutdown-timeout 60", "--ssl-keyfile k", "--grpc"]
)
def test_where_something_else_listens_what_is_about_listening_is_refused_by_name(words):
    async def start():
        async with compat.application(["--model", TINY, *words.split()], ServerOptions(), VLLM_DEFAULTS):
            pass

    with pytest.raises(UnsupportedError, match=words.partition(" ")[0]):
        asyncio.run(start())


def test_where_something_else_listens_an_unknown_flag_is_refused_by_name():
    async def start():
        async with compat.application(["--model", TINY, "--max-turnz", "3"], ServerOptions(), VLLM_DEFAULTS):
            pass

    with pytest.raises(CommandError, match="max-turnz"):
        asyncio.run(start())


def test_help_and_version_load_neither_torch_nor_vllm():
    code = "import sys; from vilavt_vllm.server.command import main\ntry: main([sys.argv[1]])\n"
    code += "finally: print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    for flag in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr
