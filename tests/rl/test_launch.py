"""The command that starts verl, and what the doctor says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl has an environment of its own")

from vilavt_rl import compat
from vilavt_rl.errors import HostError
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
