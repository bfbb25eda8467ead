"""Fixtures of the RL tests: the shipped tiny checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vilavt_rl

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # one machine
os.environ.setdefault("RAY_worker_niceness", "0")  # defaults to 15: beside other tests its workers would wait for them
os.environ["VERL_PLATFORM"] = "cpu"  # verl reads it when it is imported

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "vilavt-tiny"
RECIPES = Path(vilavt_rl.__file__).with_name("recipes")


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
def start_grpo(tiny: Path):
    """Runs `vilavt-rl verl RECIPE …` on the shipped tiny checkpoint: `(exit code, log, metrics file)`."""

    def start(recipe: str, work: Path, data: Path, name: str, *overrides: str, run: str) -> tuple[int, str, Path]:
        metrics = work / f"{name}.jsonl"
        command = [
            sys.executable,
            "-m",
            "vilavt_rl",
            "verl",
            recipe,
            f"actor_rollout_ref.model.path={tiny}",
            f"data.train_files={data / 'train.jsonl'}",
            f"data.val_files={data / 'val.jsonl'}",
            "data.train_batch_size=4",
            "data.shuffle=false",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
            f"trainer.default_local_dir={work / run}",
            "trainer.logger=[file]",
            # a cluster that is running already has another environment
            f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={metrics}",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            *overrides,
        ]
        env = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_memory_monitor_refresh_ms": "0",  # other work on the machine must not decide a test
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        for other in ("RAY_ADDRESS", "VLLM_ENABLE_V1_MULTIPROCESSING"):
            env.pop(other, None)
        log = work / f"{name}.log"
        with log.open("w") as file:
            code = subprocess.run(command, env=env, stdout=file, stderr=subprocess.STDOUT, cwd=work, timeout=1000)
        return code.returncode, log.read_text(encoding="utf-8", errors="replace"), metrics

    return start


@pytest.fixture
def two_ray_nodes():
    """A Ray cluster of two nodes on this machine: the overrides with which verl trains on both."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 8, "num_gpus": 1, "object_store_memory": 300_000_000}
    quiet = {"memory_monitor_refresh_ms": 0}  # other work on the machine must not decide a test
    head = {**node, "include_dashboard": False, "_system_config": quiet}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        yield [
            "trainer.nnodes=2",
            "~ray_kwargs.ray_init.num_cpus",
            "~ray_kwargs.ray_init.num_gpus",
            f"ray_kwargs.ray_init.address={cluster.address}",
        ]
    finally:
        cluster.shutdown()


@pytest.fixture(scope="session")
def grpo(start_grpo):
    """`start_grpo` that must end well; returns what verl logged, one dict per step."""

    def run(*args, **kwargs) -> list[dict]:
        code, log, metrics = start_grpo(*args, **kwargs)
        assert code == 0, log[-4000:]
        return [line["data"] for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines())]

    return run


@pytest.fixture(scope="session")
def processor(tiny: Path):
    from vilavt_hf import VilavtProcessor

    return VilavtProcessor.from_pretrained(tiny)


@pytest.fixture(scope="session")
def tokenizer(processor):
    return processor.tokenizer


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions about six scenes of one image, of five kinds, as RL data."""
    from vilavt_rl.tiny import write_data

    return write_data(tmp_path_factory.mktemp("rl-data"), count=6, split="dev", seed=29, name="train")
