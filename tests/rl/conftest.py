"""Fixtures of the RL tests: the shipped tiny checkpoint."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # one machine
os.environ["VERL_PLATFORM"] = "cpu"  # verl reads it when it is imported

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "vilavt-tiny"
RECIPES = ROOT / "recipes"


@pytest.fixture(scope="session")
def recipe_config():
    """Recipe name and overrides to the configuration that verl's trainer gets."""
    from hydra import compose, initialize_config_dir

    def composed(name: str, *overrides: str):
        loop = f"actor_rollout_ref.rollout.agent.agent_loop_config_path={RECIPES / 'agent_loop.yaml'}"
        with initialize_config_dir(str(RECIPES), version_base=None):
            return compose(name, overrides=[loop, *overrides])

    return composed


@pytest.fixture(scope="session")
def tiny() -> Path:
    return TINY


@pytest.fixture(scope="session")
def processor(tiny: Path):
    from vilavt_hf import VilavtProcessor

    return VilavtProcessor.from_pretrained(tiny)


@pytest.fixture(scope="session")
def tokenizer(processor):
    return processor.tokenizer


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions about six scenes, as RL data."""
    from vilavt_rl.tiny import write_data

    return write_data(tmp_path_factory.mktemp("rl-data"), count=6, split="dev", seed=5, name="train")
