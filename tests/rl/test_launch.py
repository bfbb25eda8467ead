"""The command that starts verl, and what the doctor says."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

pytest.importorskip("verl", reason="verl has an environment of its own")

from vilavt_core.errors import VilavtError
from vilavt_core.yaml_config import merged
from vilavt_rl import compat, launch, preflight
from vilavt_rl.easyr1.block import Settings
from vilavt_rl.easyr1.main import check_easyr1, compose_config
from vilavt_rl.errors import HostError, RowError
from vilavt_rl.launch import AGENT_LOOP, RECIPES, verl_command

ROOT = Path(__file__).parents[2]


def test_the_command_is_verls_own_entry_point_with_absolute_paths(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = ["actor_rollout_ref.model.path=examples/vilavt-tiny", "data.seed=2"]
    command, environment = verl_command("tiny_cpu", given)
    assert command[:3] == [sys.executable, "-m", "verl.trainer.main_ppo"]
    assert command[3:5] == [f"--config-path={RECIPES}", "--config-name=tiny_cpu"]
    assert f"actor_rollout_ref.model.path={tiny}" in command
    assert "data.seed=2" in command
    assert f"actor_rollout_ref.rollout.agent.agent_loop_config_path={RECIPES / 'agent_loop.yaml'}" in command
    assert environment["VERL_PLATFORM"] == "cpu"


def test_only_keys_that_hold_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "vilavt", "model"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    names = ["actor_rollout_ref.rollout.name=vllm", "trainer.project_name=vilavt", "+data.style=model"]
    others = ["critic.model.path=Qwen/Qwen2.5-VL", "trainer.default_hdfs_dir=null", "data.custom_cls.path=pkg://vllm"]
    paths = ["actor_rollout_ref.model.path=model", "+trainer.default_local_dir=vilavt"]
    command, _ = verl_command("tiny_cpu", [*names, *others, *paths])
    for override in [*names, *others]:
        assert override in command
    assert f"actor_rollout_ref.model.path={tmp_path}/model" in command
    assert f"+trainer.default_local_dir={tmp_path}/vilavt" in command


def test_files_in_lists_and_quotes_become_absolute_and_hydra_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for name in ("a.jsonl", "b c.jsonl", "it's (1).jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    given = {
        "[a.jsonl, 'b c.jsonl', gone.jsonl]": [f"{tmp_path}/a.jsonl", f"{tmp_path}/b c.jsonl", "gone.jsonl"],
        "'b c.jsonl'": f"{tmp_path}/b c.jsonl",
        "it's (1).jsonl": f"{tmp_path}/it's (1).jsonl",
        "[gone.jsonl]": ["gone.jsonl"],
    }
    for text, expected in given.items():
        command, _ = verl_command("vilavt_7b_grpo", [f"data.train_files={text}"])
        (override,) = (part for part in command if part.startswith("data.train_files="))
        assert OverridesParser.create().parse_override(override).value() == expected


def test_the_shown_command_can_be_pasted_into_a_shell() -> None:
    import shlex

    from typer.testing import CliRunner

    from vilavt_rl.cli import app

    given = ["trainer.experiment_name=two words", "+trainer.note={a: 'b'}"]
    shown = CliRunner().invoke(app, ["verl", "tiny_cpu", "--show", *given]).output
    command, environment = verl_command("tiny_cpu", given)
    assert shlex.split(shown) == [*(f"{name}={value}" for name, value in environment.items()), *command]


def test_a_recipe_that_comes_with_the_package_is_known_by_name() -> None:
    command, _ = verl_command("tiny_cpu")
    assert "--config-name=tiny_cpu" in command
    assert any(part.endswith("recipes/agent_loop.yaml") for part in command)


def test_a_copy_of_a_recipe_runs_with_the_agent_loop_beside_it_or_else_with_the_shipped_one(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from vilavt_rl.cli import app

    copy = tmp_path / "mine.yaml"
    copy.write_text(CliRunner().invoke(app, ["recipe", "vilavt_7b_grpo"]).output, encoding="utf-8")
    command, _ = verl_command(copy)
    assert command[3:5] == [f"--config-path={tmp_path}", "--config-name=mine"]
    assert f"{AGENT_LOOP}={RECIPES / 'agent_loop.yaml'}" in command
    (tmp_path / "agent_loop.yaml").touch()
    assert f"{AGENT_LOOP}={tmp_path / 'agent_loop.yaml'}" in verl_command(copy)[0]


def test_a_gpu_recipe_sets_no_platform() -> None:
    _, environment = verl_command("vilavt_7b_grpo.yaml")
    assert "VERL_PLATFORM" not in environment


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"gone\.yaml: no such recipe; it must be a file, or one of .*tiny_cpu"):
        verl_command(tmp_path / "gone.yaml")


def test_the_two_trainers_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.flavour() == "verl"
    with pytest.raises(HostError, match="verl from the package index"):
        compat.require_easyr1()
    for name in ("workers/fsdp_workers.py", "trainer/data_loader.py", "__init__.py"):
        (tmp_path / "verl" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "verl" / name).touch()
    code = (
        "from vilavt_rl import compat\nprint(compat.flavour())\n"
        "try: compat.require_verl()\nexcept Exception as error: print(error)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.startswith("easyr1")
    assert "the module verl is EasyR1" in out
    shutil.rmtree(tmp_path / "verl")


def test_the_doctor_says_which_plugs_are_live() -> None:
    from vilavt_core.doctor import Status
    from vilavt_rl.doctor import checks

    found = {check.name: check for check in checks(None, False)}
    assert "policy, processor, cpu" in found["verl plug-in"].detail
    assert [check for check in found.values() if check.status is Status.FAILED] == []


def test_the_doctor_finds_a_plug_in_that_verl_was_told_to_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from vilavt_core.doctor import Status
    from vilavt_rl.doctor import checks

    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    plugin = next(check for check in checks(None, False) if check.name == "verl plug-in")
    assert plugin.status is Status.FAILED
    assert "leaves 'vilavt' out" in plugin.detail


def test_a_run_with_vllm_rollouts_gets_our_worker_extension_unless_it_names_one(tmp_path: Path) -> None:
    from vilavt_rl.launch import EXTENSION, OUR_EXTENSION

    added = f"++{EXTENSION}={OUR_EXTENSION}"
    bare = tmp_path / "bare.yaml"
    bare.write_text("actor_rollout_ref: {rollout: {name: vllm}}\n", encoding="utf-8")
    assert added in verl_command(bare)[0]
    assert added in verl_command("tiny_cpu", ["actor_rollout_ref.rollout.name=vllm"])[0]
    for recipe, overrides in (
        ("tiny_cpu", []),
        ("tiny_cpu_vllm", []),
        ("vilavt_7b_grpo", []),
        (bare, [f"+{EXTENSION}=my.Extension"]),
        (bare, ["actor_rollout_ref.rollout.name=vilavt_hf"]),
    ):
        assert added not in verl_command(recipe, overrides)[0]


# ------------------------------------------------------------------------------------------- before Ray starts


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of one row, with its picture."""
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (56, 56)).save(folder / "a.png")
    row = {"question": "What?", "answer": "7", "question_type": "numerical", "image_path": ["a.png"]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return folder / "rows.jsonl"


STOCK = functools.cache(preflight._stock)
"""verl's own configuration, which takes seconds to compose and is the same for all tests."""


@pytest.fixture
def start(rows: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `vilavt-rl verl RECIPE` with sound files and these overrides; returns the command that would replace us."""
    sound = {"actor_rollout_ref.model.path": tiny, "data.train_files": rows, "data.val_files": rows}

    def run(*overrides: str, recipe: str | Path = "tiny_cpu", without: str = "") -> list[str]:
        started: list[list[str]] = []
        monkeypatch.setattr(preflight, "_stock", STOCK)
        monkeypatch.setattr(os, "execve", lambda program, command, environment: started.append(command))
        launch.run_verl(recipe, [*(f"{k}={v}" for k, v in sound.items() if k != without), *overrides])
        return started[0]

    return run


@pytest.mark.parametrize("recipe", ["tiny_cpu", "tiny_cpu_vllm", "vilavt_7b_grpo"])
def test_every_recipe_starts_with_sound_files(start, recipe: str) -> None:
    assert f"--config-name={recipe}" in start("data.seed=2", "+data.note=mine", recipe=recipe)


REFUSED = {
    "data.train_fils=x": r"data\.train_fils is not in the configuration; did you mean 'data\.train_files'\?",
    "actor_rollout_ref.actor.optim.learning_rat=1": r"actor_rollout_ref\.actor\.optim\.learning_rat is not in the conf",
    "actor_rolout_ref.model.path=x": r"did you mean 'actor_rollout_ref'\?",
    "data.train_files=gone.jsonl": r"data\.train_files: gone\.jsonl: no such file; set data\.train_files=FILE",
    "data.val_files=[gone.jsonl]": r"data\.val_files: gone\.jsonl: no such file",
    "actor_rollout_ref.model.path=gone": r"actor_rollout_ref\.model\.path: gone: no such folder, and no hub id",
    "trainer.default_local_dir=/dev/null/run": r"trainer\.default_local_dir: /dev/null is a file, not a folder",
    "actor_rollout_ref.model.path": r"'actor_rollout_ref\.model\.path' is not key=value as Hydra reads it",
    "trainer=5": r"trainer is 5, but verl has a section of keys there",
    "data.train_batch_size=many": r"data\.train_batch_size is 'many', it must be a number, as 1024",
    "--shwo": r"--shwo: there is no such option, overrides are key=value; did you mean '--show'\?",
    "+actor_rollout_ref.rollout.temprature=1": r"temprature is no key of .*; did you mean 'temperature'\?",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_is_told_by_name_before_anything_starts(start, override: str) -> None:
    with pytest.raises(VilavtError, match=REFUSED[override]):
        start(override)


def test_data_that_nobody_named_is_told(start) -> None:
    with pytest.raises(
        RowError, match=r"data\.train_files: .*gsm8k/train\.parquet: no such file; set data\.train_files"
    ):
        start(without="data.train_files")


def test_rows_without_a_column_are_told(start, rows: Path, tmp_path: Path) -> None:
    row = json.loads(rows.read_text(encoding="utf-8"))
    del row["answer"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(RowError, match=r"data\.val_files: .*rows\.jsonl, row 1 \(sample rows-1\): 'answer' is missing"):
        start(f"data.val_files={tmp_path / 'rows.jsonl'}")


def test_another_model_and_half_a_checkpoint_are_told(start, tiny: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny, half, ignore=shutil.ignore_patterns("query_tokenizer"))
    with pytest.raises(HostError, match=r"model\.path: .*half lacks query_tokenizer/; convert it: .* --query-encoder"):
        start(f"actor_rollout_ref.model.path={half}")
    config = json.loads((half / "config.json").read_text(encoding="utf-8"))
    (half / "config.json").write_text(json.dumps({"model_type": "qwen3", "hidden_size": config.get("hidden_size")}))
    with pytest.raises(HostError, match=r"is a query encoder \(Qwen3\), one part of a ViLaVT; vilavt init"):
        start(f"actor_rollout_ref.model.path={half}")
    (half / "config.json").unlink()
    with pytest.raises(HostError, match=r"actor_rollout_ref\.model\.path: .*half has no config\.json"):
        start(f"actor_rollout_ref.model.path={half}")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "data: {trian_batch_size: 8}",
            r"data\.trian_batch_size is no key of verl's .*; did you mean 'train_batch_size'\?",
        ),
        ("traner: {nnodes: 1}", r"traner is no key of verl's configuration; did you mean 'trainer'\?"),
        (
            "actor_rollout_ref: {actor: {optim: {lrr: 1}}}",
            r"actor_rollout_ref\.actor\.optim\.lrr is no key of verl's configuration; did you mean 'lr'\?",
        ),
    ],
)
def test_a_mistyped_key_of_a_recipe_is_told(start, tmp_path: Path, line: str, told: str) -> None:
    recipe = yaml.safe_load((RECIPES / "vilavt_7b_grpo.yaml").read_text(encoding="utf-8"))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(merged(recipe, yaml.safe_load(line))), encoding="utf-8")
    with pytest.raises(HostError, match=told):
        start(recipe=tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("presett", "rl", "presett is no key of our agent loop; did you mean 'preset'"),
        ("preset", "rll", "no preset 'rll'"),
        ("limits", {"max_turn": 2}, "unknown limits max_turn"),
        ("reward", {"versoin": "strict"}, r"reward\.versoin is no key of a reward; did you mean 'version'"),
        ("reward", {"version": "lenient"}, "reward version 'lenient'"),
        ("inference", {"limit": {}}, "unknown keys in inference: limit"),
        ("inference", {"limits": {"max_pixels": 5}}, "max_pixels is 5, below min_pixels"),
    ],
)
def test_a_mistake_in_the_agent_loop_is_told(tiny: Path, tmp_path: Path, key: str, value: object, told: str) -> None:
    (loop,) = yaml.safe_load((RECIPES / "agent_loop.yaml").read_text(encoding="utf-8"))
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump([{**loop, key: value}]), encoding="utf-8")
    with pytest.raises(HostError, match=f"loop.yaml: .*{told}"):
        preflight.check_agent_loop(tmp_path / "loop.yaml", str(tiny))


def test_an_agent_loop_that_is_not_there_is_told(start) -> None:
    with pytest.raises(HostError, match=r"agent_loop_config_path: .*gone\.yaml: cannot be read: No such file"):
        start(f"{AGENT_LOOP}=/gone.yaml")


# ------------------------------------------------------------------------------------------- EasyR1


@dataclasses.dataclass
class EasyData:
    train_files: str = ""
    seed: int = 1


@dataclasses.dataclass
class Easy:
    """Stands in for EasyR1's configuration, which is of this kind."""

    data: EasyData = dataclasses.field(default_factory=EasyData)


def test_easyr1_s_configuration_is_its_file_s_and_the_command_line_s(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {seed: 3}\nvilavt: {preset: rl, limits: {max_turns: 2}}\n", encoding="utf-8")
    config, block = compose_config(Easy(), [f"config={file}", "data.train_files=a", "vilavt.limits.max_turns=4"])
    assert config == Easy(EasyData("a", 3))
    assert block == {"preset": "rl", "limits": {"max_turns": 4}}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["data.train_fils=x"],
            r"the command line: data\.train_fils is no key of EasyR1's .*; did you mean 'train_files'\?",
        ),
        (["dta.seed=1"], r"dta is no key of EasyR1's configuration; did you mean 'data'\?"),
        (["data.seed=abc"], r"the command line: data\.seed: .*'abc'.* could not be converted to Integer"),
        (
            ["config=gone.yaml"],
            r"config=gone\.yaml: no such recipe; it must be a file, or one of .*vilavt_7b_grpo_easyr1",
        ),
        (["--shwo"], "--shwo: there is no such option"),
    ],
)
def test_what_easyr1_would_refuse_with_a_traceback_is_told_by_name(arguments: list[str], told: str) -> None:
    with pytest.raises(HostError, match=told):
        compose_config(Easy(), arguments)


def test_a_mistyped_key_of_an_easyr1_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {sed: 3}\n", encoding="utf-8")
    with pytest.raises(
        HostError, match=r"run\.yaml: data\.sed is no key of EasyR1's configuration; did you mean 'seed'\?"
    ):
        compose_config(Easy(), [f"config={file}"])


def test_files_of_an_easyr1_run_are_checked(rows: Path, tiny: Path, tmp_path: Path) -> None:
    def run(model: object = tiny, train: object = rows, block: Mapping[str, object] = {}) -> None:
        actor = SimpleNamespace(model=SimpleNamespace(model_path=str(model)))
        data = SimpleNamespace(train_files=str(train), val_files=str(rows))
        trainer = SimpleNamespace(save_checkpoint_path=str(tmp_path / "run"))
        config = SimpleNamespace(worker=SimpleNamespace(actor=actor), data=data, trainer=trainer)
        check_easyr1(config, Settings.read(block))

    run()
    with pytest.raises(HostError, match=r"worker\.actor\.model\.model_path: gone: no such folder"):
        run(model="gone")
    with pytest.raises(RowError, match=r"data\.train_files: gone: no such file"):
        run(train="gone")
    with pytest.raises(HostError, match="vilavt: unknown limits max_turn"):
        run(block={"limits": {"max_turn": 2}})
