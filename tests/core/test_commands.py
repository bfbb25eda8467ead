"""Every command, whatever it is given: one line that says what to do, an exit code, and no work begun in vain."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file
from typer import Context
from typer.core import TyperGroup
from typer.main import get_command

from vilavt_core import ending
from vilavt_core.checkpoint import judge_checkpoint, require_vilavt
from vilavt_core.cli import SUBCOMMANDS, main
from vilavt_core.cli import app as vilavt
from vilavt_core.doctor import Status, examine
from vilavt_core.errors import CheckpointError, EngineError
from vilavt_core.failures import is_from_outside, loading, one_line
from vilavt_core.outputs import file_problem, folder_problem
from vilavt_core.spelling import did_you_mean
from vilavt_rl.cli import app as vilavt_rl
from vilavt_rl.cli import main as main_rl

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "vilavt-tiny"
SCENE = ROOT / "examples" / "pictures" / "scene-1.png"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
READ_ONLY = "/sys/vilavt"  # nothing can be made there, not even by root


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs `vilavt`; gives exit code and the lines on stderr. `{tmp}` in an argument is a folder of this test."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr("sys.argv", ["vilavt", *(a.replace("{tmp}", str(tmp_path)) for a in arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, [line for line in capsys.readouterr().err.splitlines() if line.strip()]

    return run


@pytest.fixture
def folders(tmp_path):
    """One folder of each kind that is often named instead of a checkpoint."""
    weights = {"x": np.zeros(2, dtype=np.float32)}

    def make(name: str, **files: dict) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file.replace("__", ".")).write_text(json.dumps(content))
        return folder

    sft = tmp_path / "sft"
    shutil.copytree(TINY, sft, ignore=shutil.ignore_patterns("query_tokenizer"))
    config = json.loads((sft / "config.json").read_text())
    del config["text_encoder_config"]
    (sft / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl"}))
    made = {
        "stock": make("stock", config__json={"model_type": "qwen2_5_vl", "vision_config": {"depth": 4}}),
        "sft": sft,
        "encoder": make("encoder", config__json={"model_type": "qwen3"}),
        "other": make("other", config__json={"model_type": "llama"}),
        "empty": make("empty"),
        "adapter": make("adapter", adapter_config__json={}),
        "adapters": make("adapters"),
        "broken": make("broken"),
        "run": make("run"),
        "shards": make("shards"),
    }
    for name in ("stock", "encoder", "other"):
        save_file(weights, made[name] / "model.safetensors")
    (made["broken"] / "config.json").write_text("{")
    for name in ("checkpoint-2", "final"):
        (made["adapters"] / name).mkdir()
        (made["adapters"] / name / "adapter_config.json").write_text("{}")
    (made["shards"] / "model_world_size_1_rank_0.pt").touch()
    (made["run"] / "final").mkdir()
    (made["run"] / "final" / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    lacking = tmp_path / "lacking"
    shutil.copytree(TINY, lacking, ignore=shutil.ignore_patterns("query_tokenizer", "preprocessor_config.json"))
    return made | {"file": tmp_path / "file", "nowhere": tmp_path / "nowhere", "lacking": lacking}


VERDICTS = {
    "stock": r"stock Qwen2\.5-VL.*vilavt init \S*stock --query-encoder",
    "sft": r"published SFT format.*vilavt convert \S*sft NEW --query-encoder",
    "encoder": r"query encoder.*vilavt init QWEN2_5_VL --query-encoder \S*encoder",
    "other": r"neither a ViLaVT nor.*vilavt inspect",
    "empty": r"empty is empty.*check the path",
    "adapter": r"is an adapter.*vilavt merge-lora \S*adapter",
    "adapters": r"but 2 adapters \(LoRA\).*vilavt merge-lora \S*adapters/final NEW",
    "broken": r"not valid JSON",
    "run": r"not a checkpoint, but holds \S*run/final",
    "shards": r"FSDP shards.*vilavt-rl merge",
    "file": r"is not a folder",
    "nowhere": r"no such folder",
    "lacking": r"lacks preprocessor_config\.json, query_tokenizer/; convert it: "
    r"vilavt convert \S* NEW --query-encoder \S+ --processor",
}
COMMANDS = {
    "ask": ["ask", "q", "--image", str(SCENE), "--model"],
    "demo": ["demo", "--model"],
    "eval": ["eval", "vstar", "--model"],
    "eval with vllm": ["eval", "vstar", "--backend", "vllm", "--model"],
    "eval-latency": ["eval-latency", "vstar", "--model"],
    "tiny eval": ["tiny", "eval"],
    "tiny data": ["tiny", "data", "--out", "{tmp}/new", "--checkpoint"],
}


@pytest.mark.parametrize("kind", VERDICTS)
def test_what_is_no_checkpoint_gets_one_verdict_with_one_remedy(folders, kind):
    verdict = judge_checkpoint(folders[kind])
    assert verdict is not None
    assert re.search(VERDICTS[kind], str(verdict)), str(verdict)
    with pytest.raises(CheckpointError, match=re.escape(str(verdict))):
        require_vilavt(folders[kind])
    check = next(check for check in examine(folders[kind]) if check.name == "checkpoint")
    assert check.status is Status.FAILED
    assert str(verdict) == "; ".join(filter(None, [check.detail, check.remedy]))


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=list(COMMANDS))
@pytest.mark.parametrize("kind", ["stock", "empty", "lacking", "nowhere"])
def test_every_command_gives_the_verdict_first(command, folders, kind, arguments):
    code, lines = command(*arguments, str(folders[kind]))
    assert (code, len(lines)) == (1, 1), lines
    assert re.search(VERDICTS[kind], lines[0]), lines[0]


def test_fine_tuning_gives_the_verdict_before_it_looks_at_the_data(command, folders):
    code, lines = command("sft", "vilavt_tiny_sft", f"model.path={folders['stock']}", "output.folder={tmp}/out")
    assert (code, len(lines)) == (1, 1)
    assert re.search(VERDICTS["stock"], lines[0])
    assert not (folders["stock"].parent / "out").exists()


def test_a_checkpoint_of_ours_passes():
    assert judge_checkpoint(TINY) is None


def test_a_hub_id_is_judged_by_its_configuration(monkeypatch, folders):
    from vilavt_core.checkpoint import verdict

    monkeypatch.setattr(verdict, "hub_config", lambda name, hub: folders["stock"] / "config.json")
    assert "vilavt init Qwen/Qwen2.5-VL-3B --query-encoder" in str(judge_checkpoint("Qwen/Qwen2.5-VL-3B"))


def test_a_hub_id_that_cannot_be_had_is_one_line(command):
    for arguments in (["init", "no/base", "--query-encoder", "no/encoder", "--out", "new"], ["inspect", "no/base"]):
        code, lines = command(*arguments)
        assert (code, len(lines)) == (1, 1)
        assert "no/base: no such folder, and no checkpoint under that hub id" in lines[0]


def test_neither_torch_nor_vllm_is_loaded_before_the_verdict(folders):
    commands = [
        ["vilavt", *COMMANDS["ask"], str(folders["stock"])],
        ["vilavt", *COMMANDS["eval with vllm"], str(folders["stock"])],
        ["vilavt", "sft", "vilavt_tiny_sft", f"model.path={folders['stock']}", "output.folder=out"],
        ["vilavt-rl", "replay", str(folders["file"]), "--model", str(folders["stock"])],
        ["vilavt-serve", str(folders["stock"])],
    ]
    code = """
import json, sys
from vilavt_core.cli import main as vilavt
from vilavt_rl.cli import main as vilavt_rl
from vilavt_vllm.server.command import main as vilavt_serve
found = []
for program, *arguments in json.loads(sys.argv[1]):
    sys.argv = [program, *arguments]
    try:
        {"vilavt": vilavt, "vilavt-rl": vilavt_rl, "vilavt-serve": vilavt_serve}[program]()
    except SystemExit as end:
        found.append([program, end.code, [m for m in ("torch", "transformers", "vllm") if m in sys.modules]])
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=folders["stock"].parent,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [[arguments[0], 1, []] for arguments in commands], done.stderr
    assert len(re.findall(VERDICTS["stock"], done.stderr)) == len(commands)


OUTPUTS = {
    "ask --trace": ["ask", "q", "--image", str(SCENE), "--model", str(TINY), "--trace"],
    "ask --picture": ["ask", "q", "--image", str(SCENE), "--model", str(TINY), "--picture"],
    "demo --out": ["demo", "--out"],
    "eval-latency --json": ["eval-latency", "vstar", "--model", str(TINY), "--json"],
    "eval-latency --markdown": ["eval-latency", "vstar", "--model", str(TINY), "--markdown"],
    "data check --json": ["data", "check", "x.jsonl", "--model", str(TINY), "--json"],
    "data stats --json": ["data", "stats", "x.jsonl", "--model", str(TINY), "--json"],
    "tiny eval --json": ["tiny", "eval", "--json"],
}
FOLDERS = {
    "eval --out": ["eval", "vstar", "--model", str(TINY), "--out"],
    "score --out": ["score", "nothing.jsonl", "--out"],
    "prompts import --out": ["prompts", "import", ".", "--out"],
    "tiny build --out": ["tiny", "build", "--out"],
    "tiny benchmark --out": ["tiny", "benchmark", "--out"],
    "tiny scenes --out": ["tiny", "scenes", "--out"],
    "tiny data --out": ["tiny", "data", "--out"],
    "convert": ["convert", str(TINY)],
    "init --out": ["init", str(TINY), "--query-encoder", str(TINY), "--out"],
    "merge-lora": ["merge-lora", "adapter"],
    "sft": ["sft", "vilavt_tiny_sft", f"model.path={TINY}"],
}


@pytest.mark.parametrize("arguments", OUTPUTS.values(), ids=list(OUTPUTS))
@pytest.mark.parametrize(
    "place, said",
    [
        ("nodir/x.png", "does not exist; create it first"),
        (".", "is a folder; name a file"),
        (f"{READ_ONLY}.png", "cannot be written"),
        ("file/x.png", "is not a folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(command, tmp_path, arguments, place, said):
    (tmp_path / "file").touch()
    code, lines = command(*arguments, place)
    assert (code, len(lines)) == (2, 1), lines
    assert said in lines[0]
    assert arguments[-1] in lines[0]  # the option


@pytest.mark.parametrize("arguments", FOLDERS.values(), ids=list(FOLDERS))
@pytest.mark.parametrize("place", [READ_ONLY, "file/new", "file"])
def test_a_folder_that_cannot_be_written_is_told_before_the_work(command, tmp_path, arguments, place):
    (tmp_path / "file").touch()
    place = f"output.folder={place}" if arguments[0] == "sft" else place
    code, lines = command(*arguments, place)
    assert code in (1, 2)
    assert len(lines) == 1, lines
    assert re.search("cannot be written|is a file|is not a folder|exists;", lines[0])


def test_trying_an_output_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "old.json").write_text("old")
    for path in ("old.json", "new.json"):
        assert file_problem(tmp_path / path) is None
    assert folder_problem(tmp_path / "a" / "b") is None
    assert folder_problem(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


@given(name=st.text(min_size=1).filter(lambda name: name.strip(". /")))
def test_any_name_of_an_output_is_judged_without_an_error(name):
    for problem in (file_problem(Path("/sys") / name), folder_problem(Path("/sys/x") / name)):
        assert problem is None or isinstance(problem, str)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_disk_is_told_before_the_work():
    assert "No space left" in str(file_problem("/dev/full"))


@pytest.mark.parametrize("name", ["x.xyz", "x", "x.mp4"])
def test_a_picture_needs_an_ending_that_can_be_written(command, name):
    code, lines = command(*OUTPUTS["ask --picture"], name)
    assert (code, len(lines)) == (2, 1)
    assert "name a .png file" in lines[0]


@pytest.mark.parametrize(
    "source, said",
    [
        ("clip.mp4", "it is a video; give it as one"),
        ("paper.pdf", "it is a PDF"),
        ("*.png", "patterns are not expanded here"),
        (".", "it is a folder"),
        ("https://example.com/a.png", "--allow-urls"),
    ],
)
def test_a_source_that_is_no_picture_is_told_before_the_model_is_loaded(command, tmp_path, source, said):
    for name in ("clip.mp4", "paper.pdf"):
        (tmp_path / name).write_bytes(b"not a picture")
    code, lines = command("ask", "q", "--model", str(TINY), "--image", source)
    assert (code, len(lines)) == (1, 1)
    assert said in lines[0]
    assert "allow_urls=" not in lines[0]


@pytest.mark.parametrize(
    "arguments, meant",
    [
        (["evl"], "'eval'"),
        (["ask", "q", "--image", str(SCENE), "--model", str(TINY), "--preset", "defalt"], "'default'"),
        (["eval", "VStarBnch", "--model", str(TINY)], "'VStarBench'"),
        (["eval", "vstar", "--model", str(TINY), "--preset", "defaul"], "'default'"),
        (["eval", "vstar", "--model", str(TINY), "--set", "max_turn=1"], "'max_turns'"),
        (["eval", "vstar", "--model", str(TINY), "--ablate", "no-zom"], "'no-zoom'"),
        (["sft", "vilavt_tny_sft"], "'vilavt_tiny_sft'"),
        (["sft", "vilavt_tiny_sft", "data.max_lenght=3"], "'data.max_length'"),
        (["sft", "vilavt_tiny_sft", "optimiser.epochs=3"], "'optimizer'"),
        (["recipe", "vilavt_tiny"], "'vilavt_tiny_sft'"),
        (["prompts", "show", "defualt"], "'default'"),
        (["data", "check", "spar7m_v3", "--model", str(TINY)], "'spar7m_v2'"),
        (["data", "check", "sett.jsonl", "--model", str(TINY)], "'set.jsonl'"),
        (["init", "a", "--query-encoder", "b", "--out", "c", "--integration-point", "lat"], "'late'"),
        (["tiny", "eval", "--split", "heldut"], "'heldout'"),
        (["score", "x.jsonl", "--scorer", "strikt"], "'strict'"),
    ],
)
def test_a_misspelt_name_is_told_what_it_means(command, tmp_path, arguments, meant):
    (tmp_path / "set.jsonl").touch()
    code, lines = command(*arguments)
    assert code in (1, 2)
    assert len(lines) == 1, lines
    assert f"did you mean {meant}?" in lines[0]


def _below(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command and all its subcommands, with the words that call them."""
    yield words, command
    if isinstance(command, TyperGroup):
        for name in command.list_commands(None):
            found = command.resolve_command(Context(command), [name])[1]
            yield from _below(found, (*words, name))


EVERY = [
    (program, *found)
    for program, app in (("vilavt", vilavt), ("vilavt-rl", vilavt_rl))
    for found in _below(get_command(app))
]


@pytest.mark.parametrize("program, words, found", EVERY, ids=[" ".join([program, *w]) for program, w, _ in EVERY])
def test_misuse_is_one_line_at_every_level_of_both_commands(monkeypatch, capsys, program, words, found):
    def told(*more: str) -> str:
        monkeypatch.setattr("sys.argv", [program, *words, *more])
        with pytest.raises(SystemExit) as ended:
            {"vilavt": main, "vilavt-rl": main_rl}[program]()
        out, error = capsys.readouterr()
        assert (ended.value.code, out, len(error.splitlines())) == (2, "", 1), error
        return error

    if words != ("verl",):  # hands options on to verl
        assert told("--hlep") == f"{program}: there is no option --hlep; did you mean '--help'?\n"
        assert told("--xyzzy").startswith(f"{program}: there is no option --xyzzy; `")
    if isinstance(found, TyperGroup):
        for name in found.list_commands(None):
            misspelt = f"{name[:-1]}x{name[-1]}"
            assert told(misspelt) == f"{program}: there is no command {misspelt!r}; did you mean {name!r}?\n"
        assert told("xyzzy").startswith(f"{program}: there is no command 'xyzzy'; there are ")


def test_a_group_without_a_subcommand_shows_its_help_page(capsys, monkeypatch):
    for words in ((), ("data",), ("tiny",)):
        monkeypatch.setattr("sys.argv", ["vilavt", *words])
        with pytest.raises(SystemExit):
            main()
        out, error = capsys.readouterr()
        assert "Commands" in out
        assert error == ""


@given(known=st.lists(st.text("abcxyz_", min_size=3), min_size=1, unique=True))
def test_a_name_in_capitals_is_taken_for_itself_and_a_stranger_for_none(known):
    assert did_you_mean(known[0].upper(), known) == f"; did you mean {known[0]!r}?"
    assert did_you_mean("0123456789", known) == ""


def test_a_file_that_is_no_result_file_is_an_error(command, tmp_path):
    (tmp_path / "README.md").write_text("# Read me\n\nText.\n")
    (tmp_path / "records.jsonl").write_text('{"conversations": []}\n' * 3)
    (tmp_path / "list.json").write_text(json.dumps([{"question": "q"}], indent=1))
    for name in ("README.md", "records.jsonl", "list.json"):
        code, lines = command("score", name)
        assert (code, len(lines)) == (1, 1)
        assert f"{name}: not one of its" in lines[0]


def test_a_missing_data_file_is_said_to_be_missing(command):
    code, lines = command("data", "check", "nope.jsonl", "--model", str(TINY))
    assert (code, lines) == (1, ["vilavt: DataError: nope.jsonl: there is no such file"])


def test_data_of_a_checkpoint_that_is_none_is_told(command, folders):
    (folders["empty"].parent / "set.jsonl").write_text("{}\n")
    code, lines = command("data", "stats", "{tmp}/set.jsonl", "--model", str(folders["empty"]))
    assert (code, len(lines)) == (1, 1)
    assert "is empty" in lines[0]


@pytest.mark.parametrize("more, said", [([], "exists;"), (["--force"], "not a checkpoint")])
def test_the_tiny_model_is_not_built_over_something(command, tmp_path, more, said):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    code, lines = command("tiny", "build", "--out", "out", *more)
    assert (code, len(lines)) == (1, 1)
    assert said in lines[0]


def test_stages_of_an_earlier_build_are_not_overwritten(command, tmp_path):
    (tmp_path / "out-work" / "look").mkdir(parents=True)
    (tmp_path / "out-work" / "look" / "stage.json").touch()
    code, lines = command("tiny", "build", "--out", "out")
    assert (code, len(lines)) == (2, 1)
    assert "--resume" in lines[0]


def test_a_library_s_error_is_one_line_and_a_fault_of_ours_is_not(monkeypatch, capsys):
    from vilavt_core import cli

    def raising(error: BaseException):
        def run(**_: str) -> None:
            raise error

        monkeypatch.setattr(cli, "app", run)
        with pytest.raises((SystemExit, type(error))) as ended:
            main()
        return ended.value, capsys.readouterr().err.splitlines()

    for error in (
        OSError(28, "No space left on device", "x.json"),
        Image.UnidentifiedImageError("a\nb"),
        MemoryError(),
    ):
        ended, lines = raising(error)
        assert isinstance(ended, SystemExit)
        assert len(lines) == 1
    assert raising(OSError(28, "No space left on device", "x.json"))[1] == ["vilavt: x.json: No space left on device"]
    assert isinstance(raising(KeyError("ours"))[0], KeyError)


def test_loading_names_what_was_loaded_and_the_option_that_does_not_exist():
    with pytest.raises(EngineError, match="tiny: there is no option 'nonsense'; take it out"), loading("tiny"):
        judge_checkpoint("x", nonsense=1)
    with pytest.raises(CheckpointError, match=r"tiny: cannot be loaded: RuntimeError: CUDA is away$"), loading("tiny"):
        raise RuntimeError("CUDA is away\n\nCompile with …")


@given(text=st.text())
def test_any_error_is_told_in_one_short_line(text):
    line = one_line(OSError(text))
    assert len(line.splitlines()) <= 1
    assert len(line) < 500
    assert is_from_outside(OSError(text))


def test_ctrl_c_is_one_line_and_says_whether_the_work_goes_on(monkeypatch, capsys):
    from vilavt_core import cli

    def stopped(_: list[str]) -> None:
        with ending.resumable():
            raise KeyboardInterrupt

    monkeypatch.setattr("vilavt_core.cli.recipe.recipe", lambda: stopped([]))
    monkeypatch.setattr("sys.argv", ["vilavt", "recipe"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "vilavt: stopped; the same command goes on where it stopped\n"


def test_ctrl_c_ends_worker_processes_without_a_traceback(tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    record = {
        "images": ["a.png"],
        "conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "<answer>B</answer>"}],
        "queries": [""],
        "image_to_query_mapping": [0],
    }
    (tmp_path / "set.jsonl").write_text((json.dumps(record) + "\n") * 200_000)
    run = subprocess.Popen(
        [sys.executable, "-m", "vilavt_core", "data", "stats", "set.jsonl", "--model", str(TINY), "--workers", "2"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ENVIRONMENT,
    )
    started = time.monotonic()
    while time.monotonic() - started < 60 and not _children(run.pid):
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(run.pid, signal.SIGINT)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert "Traceback" not in error
    assert error.splitlines()[-1] == "vilavt: stopped"


def _children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def test_the_package_runs_as_a_module_and_says_its_version():
    done = subprocess.run([sys.executable, "-m", "vilavt_core", "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"vilavt \d+\.\d+\.\d+\S*\n", done.stdout)


def test_tab_completes_subcommands_and_their_options():
    def completed(line: str) -> str:
        words = {"_VILAVT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        code = "import sys; sys.argv = ['vilavt']; from vilavt_core.cli import app; app(prog_name='vilavt')"
        environment = {**ENVIRONMENT, **words}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout

    assert completed("vilavt ev").split() == ["eval", "eval-latency"]
    assert "--integration-point" in completed("vilavt init --int")
    assert set(completed("vilavt ").split()) == set(SUBCOMMANDS)


def test_the_doctor_lists_the_extras_that_are_missing(monkeypatch):
    from vilavt_core import doctor

    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "math-verify" else "999")
    check = doctor._extras()
    assert check.status is Status.NOTE
    assert "vilavt-hf[math] lacks math-verify" in check.detail
    assert 'pip install "' in check.remedy
    assert '"vilavt-hf[math]"' in check.remedy


def test_the_packages_that_commands_ask_for_are_in_the_extras_they_name():
    from importlib import metadata

    names = {"yaml": "pyyaml", "sklearn": "scikit-learn", "math_verify": "math-verify"}
    extras = metadata.metadata("vilavt-hf").get_all("Provides-Extra")
    required = " ".join(metadata.requires("vilavt-hf")).lower()
    for package, extra in ending._EXTRAS.items():
        assert extra in extras
        assert names.get(package, package) in required
