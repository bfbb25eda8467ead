"""verl's own trainer with verl's own vLLM server as rollout engine, on the CPU: `nox -s verl_vllm_cpu`.

Sampled at temperature 1.7 and with an entropy bonus, because the shipped model is so sure of itself that at temperature
1 it has no gradient, and a weight update that never arrives would not be noticed.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vilavt_core.presets import Sampling
from vilavt_core.shipped import read_demo_questions, recipe_text

pytest.importorskip("verl", reason="verl has an environment of its own")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1100),
    pytest.mark.skipif(find_spec("vllm") is None, reason="the environment of verl alone has no vLLM"),
]

ROOT = Path(__file__).parents[2]
EQUAL, MOVED = 1e-3, 1e-2
"""Largest difference of a sampled token's log-probability under the same weights; smallest under others."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grpo-vllm")


@pytest.fixture(scope="module")
def data(work: Path) -> Path:
    from vilavt_rl.tiny import write_data

    file = write_data(work / "data", count=24, split="train", seed=28, name="train")
    write_data(work / "data", count=4, split="dev", seed=22, name="val")
    rows = read_lines(file)
    write_lines(work / "data" / "all.jsonl", rows)
    both = iter(row for row in rows if row["data_type"] in ("tiny-larger", "tiny-sum"))  # two crops in one call
    nested = iter(row for row in rows if row["data_type"] == "tiny-nested")  # a zoom into a crop
    batches = [next(nested if place == 1 else both) for _ in range(2) for place in range(4)]
    write_lines(file, batches)
    return work / "data"


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def loop(work: Path) -> Path:
    """The published rules of reading a turn, and every rollout kept."""
    from vilavt_rl.launch import RECIPES

    path = work / "agent_loop.yaml"
    text = recipe_text("agent_loop", RECIPES)
    path.write_text(
        text.replace("preset: null", "preset: rl").replace("trace_every: 10", "trace_every: 1"), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def steps(grpo, work: Path, data: Path, loop: Path) -> list[dict]:
    """Two steps, each saved."""
    return grpo(
        "tiny_cpu_vllm",
        work,
        data,
        "two-steps",
        "trainer.total_training_steps=2",
        "trainer.save_freq=1",
        "actor_rollout_ref.rollout.temperature=1.7",
        "actor_rollout_ref.actor.entropy_coeff=0.02",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loop}",
        run="run",
    )


@pytest.fixture(scope="module")
def rollouts(work: Path, steps: list[dict]) -> list:
    from vilavt_rl.replay import read_rollouts

    return list(read_rollouts(work / "run"))


@pytest.fixture(scope="module")
def gap(tiny: Path, rollouts: list, processor):
    """`gap(checkpoint, step)`: largest difference between the log-probabilities that vLLM gave for what it sampled in a
    step, and those of the checkpoint's weights in transformers."""
    from vilavt_rl.policy import VilavtPolicy
    from vilavt_rl.replay import model_logprobs, play
    from vilavt_rl.rollout import settings_of_checkpoint

    settings = settings_of_checkpoint(tiny)

    def measure(checkpoint: Path, step: int) -> float:
        model = VilavtPolicy.from_pretrained(checkpoint, dtype=torch.float32).eval()
        worst = 0.0
        for rollout in (rollout for rollout in rollouts if rollout.step == step):
            sampled = [value for turn in rollout.turns for value in turn.logprobs]
            found = model_logprobs(model, processor, play(rollout, settings), rollout.temperature)
            ours = [value for value in found if value is not None]
            worst = max(worst, *(abs(a - b) for a, b in zip(sampled, ours, strict=True)))
        return worst

    return measure


def test_two_steps_of_grpo_move_the_weights(steps: list[dict]) -> None:
    assert [step["training/global_step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["actor/grad_norm"] > 1e-3
        assert step["training/rollout_probs_diff_max"] <= EQUAL


def test_the_rollouts_zoom_into_crops_and_take_several_crops_at_once(rollouts: list, tiny: Path) -> None:
    from vilavt_rl.replay import play
    from vilavt_rl.rollout import settings_of_checkpoint

    settings = settings_of_checkpoint(tiny)
    assert {rollout.step for rollout in rollouts} == {1, 2}
    assert len(rollouts) == 32
    episodes = [play(rollout, settings) for rollout in rollouts]
    assert any(len(inquiry.images) > 1 for episode in episodes for inquiry in episode.inquiries)
    regions = [region for e in episodes for turn in e.turns if turn.views for region in turn.action.regions]
    assert any(region.index > 0 for region in regions), "no zoom into a crop"


def test_the_first_step_samples_from_the_start_checkpoint(gap, tiny: Path) -> None:
    assert gap(tiny, 1) <= EQUAL


def test_the_second_step_samples_from_exactly_what_the_first_one_made(gap, tiny: Path, work: Path) -> None:
    from vilavt_rl.merge import merge_shards

    merge_shards(work / "run" / "global_step_1" / "actor", work / "merged", dtype="fp32")
    assert gap(work / "merged", 2) <= EQUAL
    assert gap(tiny, 2) > MOVED


def test_a_saved_policy_merges_and_converses(steps: list[dict], tiny: Path, work: Path) -> None:
    from vilavt_hf.chat import VilavtChat
    from vilavt_rl.merge import merge_shards

    merged = work / "merged-2"
    merge_shards(work / "run" / "global_step_2" / "actor", merged, dtype="fp32")
    chat = VilavtChat.from_pretrained(merged)
    assert type(chat.processor).__name__ == "VilavtProcessor"
    assert chat.settings.limits == VilavtChat.from_pretrained(tiny).settings.limits
    chat.settings = replace(chat.settings, sampling=Sampling())  # greedy, which the preset rl is not
    questions = read_demo_questions(ROOT / "examples" / "pictures" / "questions.json")
    results = chat.ask_many([(q.sources, q.question) for q in questions])
    assert {result.error for result in results} == {None}
    assert any(len(result.turns) > 1 for result in results)
    if "VILAVT_VERL_HANDOFF" in os.environ:  # for tests/vllm/test_verl_weights.py
        folder = Path(os.environ["VILAVT_VERL_HANDOFF"])
        shutil.copytree(merged, folder / "merged", dirs_exist_ok=True)
        transcripts = [[turn.text for turn in result.turns] for result in results]
        (folder / "transcripts.json").write_text(json.dumps(transcripts), encoding="utf-8")


OTHER_SIZES = (
    # devices
    "trainer.device=cpu",
    "trainer.nnodes=1",
    "trainer.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.model.use_remove_padding=false",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
    "actor_rollout_ref.rollout.dtype=float32",
    "actor_rollout_ref.rollout.enforce_eager=true",
    "+actor_rollout_ref.rollout.enable_sleep_mode=false",
    "actor_rollout_ref.rollout.free_cache_engine=false",
    "+ray_kwargs.ray_init.address=local",
    "+ray_kwargs.ray_init.num_gpus=1",
    "ray_kwargs.ray_init.num_cpus=16",
    "+ray_kwargs.ray_init.include_dashboard=false",
    # sizes
    "data.max_prompt_length=256",
    "data.max_response_length=320",
    "data.dataloader_num_workers=0",
    "actor_rollout_ref.rollout.max_model_len=1024",
    "actor_rollout_ref.rollout.max_num_batched_tokens=2048",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.2",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=64",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1",
    "trainer.total_training_steps=1",
    "trainer.save_freq=-1",
)
"""What a run of the 7B recipe on a CPU overrides, beside paths and the batch sizes of `start_grpo`."""


@pytest.mark.nightly("one more start of Ray and vLLM")
def test_the_7b_recipe_runs_with_the_tiny_model_on_a_cpu(grpo, work: Path, data: Path) -> None:
    (step,) = grpo("vilavt_7b_grpo", work, data, "seven", *OTHER_SIZES, run="seven")
    assert step["training/global_step"] == 1
    assert step["training/rollout_probs_diff_max"] <= EQUAL
    assert step["num_turns/mean"] >= 3
    assert step["critic/score/max"] == pytest.approx(1.0)


@pytest.mark.nightly("one more start of Ray, with two vLLM servers")
def test_two_ray_nodes_train_together_each_with_a_vllm_server(
    grpo, two_ray_nodes: list[str], work: Path, data: Path
) -> None:
    (step,) = grpo("tiny_cpu_vllm", work, data, "nodes", *two_ray_nodes, "trainer.total_training_steps=1", run="nodes")
    assert step["training/rollout_probs_diff_max"] <= EQUAL
    assert step["critic/score/max"] == pytest.approx(1.0)


def test_the_documentation_lists_what_that_run_overrides() -> None:
    text = (ROOT / "docs" / "verl.md").read_text(encoding="utf-8")
    for override in OTHER_SIZES:
        assert f"`{override.lstrip('+')}`" in text


@pytest.mark.nightly("one more start of Ray and vLLM; test_agent_loop.py holds our part, the rest is verl's")
def test_what_cannot_be_answered_costs_its_own_trajectories_and_the_run_goes_on(
    start_grpo, work: Path, data: Path, loop: Path, tiny: Path
) -> None:
    from vilavt_rl.replay import play, read_rollouts
    from vilavt_rl.rollout import settings_of_checkpoint

    rows = read_lines(data / "all.jsonl")
    for row in rows:
        row["image_path"] = [str(data / name) for name in row["image_path"]]
    kinds = ("tiny-larger", "tiny-nested", "tiny-one", "tiny-pair", "tiny-sum", "tiny-one")
    chosen = [next(rows.pop(i) for i, row in enumerate(rows) if row["data_type"] == kind) for kind in kinds]
    broken = data / "broken.png"
    whole = Path(chosen[3]["image_path"][0]).read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    chosen[3] |= {"image_path": [str(broken)], "id": "cut-short"}
    chosen[4] |= {"question": "What is on it? " * 60, "id": "too-long"}
    chosen[5] |= {"image_path": chosen[5]["image_path"] * 4, "id": "too-many"}
    (data / "faulty").mkdir()
    for name in ("train", "val"):
        write_lines(data / "faulty" / f"{name}.jsonl", chosen)
    code, log, metrics = start_grpo(
        "tiny_cpu_vllm",
        work,
        data / "faulty",
        "faulty",
        "trainer.total_training_steps=1",
        "data.train_batch_size=6",
        "actor_rollout_ref.actor.ppo_mini_batch_size=6",
        "data.max_prompt_length=400",
        # A picture has more tokens than a scheduler step may have.
        "actor_rollout_ref.rollout.max_num_batched_tokens=32",
        "actor_rollout_ref.rollout.max_num_seqs=16",
        "actor_rollout_ref.rollout.engine_kwargs.vllm.limit_mm_per_prompt.image=3",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loop}",
        run="faulty",
    )
    assert code == 0, log[-4000:]
    (step,) = [line["data"] for line in read_lines(metrics)]
    assert step["training/global_step"] == 1
    assert step["training/rollout_probs_diff_max"] <= EQUAL
    assert re.search(r"broken\.png: .*damaged", log)
    assert "sample too-long: its first turn has" in log
    assert "the prompt has 4 images, at most 3 are allowed" in log
    left = list(read_rollouts(work / "faulty"))
    assert {rollout.row.id for rollout in left} == {row["id"] for row in chosen[:3]}
    settings = settings_of_checkpoint(tiny)
    groups = [inquiry for rollout in left for inquiry in play(rollout, settings).inquiries]
    assert any(sum(image.width * image.height // 784 for image in group.images) > 32 for group in groups)


@pytest.mark.nightly("one more start of Ray and vLLM; test_vllm_rollouts.py holds the parts")
def test_a_weight_update_that_vllm_refuses_ends_the_run_with_its_cause(start_grpo, work: Path, data: Path) -> None:
    code, log, _ = start_grpo(
        "tiny_cpu_vllm",
        work,
        data,
        "refused",
        "trainer.total_training_steps=1",
        # vLLM builds another model than the trainer's: one whose vision tower has no query-aware block.
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides.vision_config.integration_point=none",
        run="refused",
    )
    assert code != 0
    assert "vLLM refused a weight update: WeightsError: the tensor" in log
    assert "instruct_key_proj" in log
