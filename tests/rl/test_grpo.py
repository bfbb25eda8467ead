"""verl's own trainer from its command line with our rollouts, on the shipped tiny checkpoint: trains, saves, resumes,
in a cluster. Each run starts Ray: nightly; in CI test_grpo_vllm.py trains, and test_cpu_engines.py holds our engine.
"""

import json
from pathlib import Path

import pytest

from vilavt_core.shipped import read_demo_questions, recipe_text

pytest.importorskip("verl", reason="verl has an environment of its own")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1100),
    pytest.mark.nightly("GRPO with our rollouts; test_grpo_vllm.py trains with vLLM's, test_cpu_engines.py holds ours"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grpo")


@pytest.fixture(scope="module")
def data(work: Path) -> Path:
    from vilavt_rl.tiny import write_data

    # Of each four rows some take two zooms: verl 0.9.1 cannot update on trajectories of one length (docs/verl.md).
    write_data(work / "data", count=12, split="train", seed=28, name="train")
    write_data(work / "data", count=4, split="dev", seed=22, name="val")
    return work / "data"


@pytest.fixture(scope="module")
def train(grpo, work: Path, data: Path):
    """`train(name, *overrides, run=…)`: the recipe tiny_cpu on this module's data; what verl logged."""
    return lambda name, *overrides, run: grpo("tiny_cpu", work, data, name, *overrides, run=run)


@pytest.fixture(scope="module")
def first(train) -> list[dict]:
    """Two steps on one node, each saved, with a validation at the end."""
    return train(
        "first",
        "trainer.total_training_steps=2",
        "trainer.save_freq=1",
        "trainer.test_freq=2",
        run="run",
    )


def test_grpo_runs_and_what_was_sampled_is_what_is_trained_on(first: list[dict]) -> None:
    assert [step["training/global_step"] for step in first] == [1, 2]
    for step in first:
        assert step["training/rollout_probs_diff_max"] <= 1e-4
        assert abs(step["rollout_corr/log_ppl_diff"]) <= 1e-5
        assert step["num_turns/mean"] >= 3  # question, call, crops, answer
        assert step["critic/score/max"] == pytest.approx(1.0)
    assert any(name.startswith("val-core/") for name in first[-1])


def test_a_run_saves_more_than_once(work: Path, first: list[dict]) -> None:
    for step in (1, 2):
        config = json.loads(
            (work / "run" / f"global_step_{step}" / "actor" / "huggingface" / "config.json").read_text()
        )
        assert config["architectures"] == ["VilavtForConditionalGeneration"]


def test_a_run_has_a_curve(work: Path, first: list[dict]) -> None:
    from vilavt_core.curves import draw
    from vilavt_rl.curves import RewardLog, reward_panels

    log = RewardLog.read(work / "first.jsonl")
    assert [step for step, _ in log.reward] == [1, 2]
    assert [step for step, _ in log.held_out_accuracy] == [step for step, _ in log.held_out_zoomed] == [2]
    assert all(turns == step["num_turns/mean"] / 2 for (_, turns), step in zip(log.turns, first, strict=True))
    assert draw(reward_panels([("first", log)]), work / "curve.png").stat().st_size > 1000


def test_a_run_resumes_where_it_was_saved(train, first: list[dict]) -> None:
    second = train("second", "trainer.total_training_steps=3", run="run")
    assert [step["training/global_step"] for step in second] == [3]
    assert second[0]["training/rollout_probs_diff_max"] <= 1e-4


def test_a_saved_policy_merges_and_answers(work: Path, tiny: Path, first: list[dict]) -> None:
    from safetensors.torch import load_file

    from vilavt_hf.chat import VilavtChat
    from vilavt_rl.merge import merge_shards

    merge_shards(work / "run" / "global_step_2" / "actor", work / "merged", dtype="fp32")
    before, after = load_file(tiny / "model.safetensors"), load_file(work / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not before[name].float().equal(after[name].float()) for name in before)
    chat = VilavtChat.from_pretrained(work / "merged")
    assert type(chat.processor).__name__ == "VilavtProcessor"
    assert chat.settings.limits == VilavtChat.from_pretrained(tiny).settings.limits
    questions = read_demo_questions(ROOT / "examples" / "pictures" / "questions.json")
    results = chat.ask_many([(q.sources, q.question) for q in questions])
    assert {result.finish for result in results} == {"answer"}
    assert sum(r.answer == q.answer for r, q in zip(results, questions, strict=True)) >= 5


def test_two_ray_nodes_train_together(train, two_ray_nodes: list[str], work: Path) -> None:
    from vilavt_rl.merge import merge_shards

    steps = train(
        "cluster",
        *two_ray_nodes,
        "trainer.total_training_steps=1",
        "trainer.save_freq=1",
        # here the reward comes from verl's reward workers
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={_loop_without_reward(work)}",
        "reward.custom_reward_function.path=pkg://vilavt_rl.verl.reward",
        "reward.custom_reward_function.name=compute_score",
        run="cluster-run",
    )
    assert steps[0]["training/rollout_probs_diff_max"] <= 1e-4
    assert steps[0]["critic/score/max"] == pytest.approx(1.0)
    shards = sorted(path.name for path in (work / "cluster-run" / "global_step_1" / "actor").glob("model_*.pt"))
    assert shards == ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"]
    assert merge_shards(work / "cluster-run" / "global_step_1" / "actor", work / "cluster-merged").world_size == 2


def _loop_without_reward(work: Path) -> Path:
    from vilavt_rl.launch import RECIPES

    path = work / "agent_loop.yaml"
    text = recipe_text("agent_loop", RECIPES)
    path.write_text(text.replace("reward: {version: strict}", "reward: null"), encoding="utf-8")
    return path
