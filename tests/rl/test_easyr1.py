"""EasyR1's parts without EasyR1: lock-step, tensors, reward, and the class trick, against fakes of its interface."""

import json
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vilavt_hf.episode import Episode, Limits
from vilavt_rl.data import read_rows
from vilavt_rl.easyr1 import batch, reward, worker
from vilavt_rl.easyr1.dataset import VilavtDataset
from vilavt_rl.easyr1.settings import Settings
from vilavt_rl.errors import HostError, RolloutError

CALL = (
    '<think>red</think><tool>{{"region": [{{"index": 0, "bbox_2d": [0, 0, {0}, 28]}}], '
    '"query": "digit on the red card"}}</tool>'
)
RECIPES = Path(__file__).parents[2] / "recipes"
ANSWER = "<think>7</think><answer>7</answer>"


class FakeLLM:
    """vLLM's `LLM.generate`, saying a script per conversation; records what it was asked."""

    def __init__(self, tokenizer, scripts) -> None:
        self.tokenizer, self.scripts, self.calls = tokenizer, scripts, []

    def generate(self, prompts, sampling_params, use_tqdm=False):
        self.calls.append((prompts, sampling_params))
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        out = []
        for prompt in prompts:
            turn = sum(token == end for token in prompt["prompt_token_ids"])
            script = self.scripts[len(prompt["multi_modal_data"]["image"]) if turn > 2 else 0]
            ids = [*self.tokenizer.encode(script, add_special_tokens=False), end]
            out.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]))
        return out


@pytest.fixture
def played(tokenizer):
    """Two conversations of different lengths in lock-step."""
    limits = Limits(max_pixels=168 * 168, max_new_tokens_per_turn=96)
    episodes = [
        Episode.start([Image.new("RGB", (672, 672), c)], "Which?", tokenizer=tokenizer, limits=limits)
        for c in ("red", "blue")
    ]
    llm = FakeLLM(tokenizer, {0: CALL.format(28), 2: ANSWER})
    sampling = SimpleNamespace(
        n=4, max_tokens=1, stop_token_ids=None, ignore_eos=True, logit_bias=None, temperature=1.0
    )
    batch.run_episodes(
        episodes,
        lambda prompts, params: llm.generate(prompts, params),
        sampling,
        lambda request: batch.engine_prompt(request, "prompt", None),
    )
    return episodes, llm, sampling


def packed(episodes, tokenizer):
    return batch.pack(
        episodes, prompt_length=1500, response_length=700, pad_token_id=tokenizer.pad_token_id, image_token_id=5
    )


def test_all_conversations_advance_with_one_call_per_turn(played) -> None:
    episodes, llm, sampling = played
    assert [len(prompts) for prompts, _ in llm.calls] == [2, 2]
    assert {str(episode.finish) for episode in episodes} == {"answer"}
    for prompts, params in llm.calls:
        for prompt, one in zip(prompts, params, strict=True):
            assert (one.n, one.max_tokens, one.ignore_eos) == (1, 96, False)
            assert len(one.logit_bias) == 4
            image_pad = episodes[0].special.image_pad
            assert prompt["prompt_token_ids"].count(image_pad) == len(prompt["multi_modal_data"]["image"])
    assert sampling.n == 4  # EasyR1's own object is left alone


def test_queries_travel_as_tensors_for_engines_that_want_them(played, processor) -> None:
    episodes, _, _ = played
    request = SimpleNamespace(
        inquiries=episodes[0].inquiries,
        all_token_ids=episodes[0].record.token_ids,
        banned_token_ids=episodes[0].special.banned,
    )
    data = batch.engine_prompt(request, "tensors", processor)["multi_modal_data"]
    assert data["image_to_query_mapping"].tolist() == [0, 1]
    assert data["query_ids"].shape == (2, 50)
    assert data["query_attention_mask"].sum(-1).tolist()[0] == 0


def test_the_response_mask_is_the_loss_mask(played, tokenizer) -> None:
    episodes, _, _ = played
    tensors, objects = packed(episodes, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = [
        t for text in (CALL.format(28), ANSWER) for t in [*tokenizer.encode(text, add_special_tokens=False), end]
    ]
    for row in range(2):
        mask = tensors["response_mask"][row].bool()
        assert tensors["responses"][row][mask].tolist() == expected
        real = tensors["attention_mask"][row].bool()
        assert tensors["input_ids"][row][real].tolist() == episodes[row].record.token_ids
    assert tensors["position_ids"].shape == (2, 4, 2200)
    assert objects["multi_modal_data"][0]["images_per_query"] == [1, 1]


def test_model_inputs_are_made_per_trajectory(played, tokenizer, processor) -> None:
    episodes, _, _ = played
    _, objects = packed(episodes, tokenizer)
    first, second = batch.model_inputs(objects["multi_modal_data"], processor)
    assert first["images_per_query"].tolist() == [1, 1]
    assert first["query_ids"].shape == (2, 50)
    assert not torch.equal(first["pixel_values"], second["pixel_values"])


def test_the_reward_manager_sees_the_conversation_and_pays_on_a_trained_token(
    played, tokenizer, rows_file: Path
) -> None:
    episodes, _, _ = played
    tensors, objects = packed(episodes, tokenizer)
    row = read_rows(rows_file)[0].to_json()
    rows = np.empty(2, dtype=object)
    rows[:] = [row | {"answer": "7"}, row | {"answer": "8"}]
    data = SimpleNamespace(batch=tensors, non_tensor_batch={"row": rows, "messages": objects["messages"]})
    manager = reward.VilavtRewardManager(SimpleNamespace(reward_function_kwargs={}))
    values, metrics = manager.compute_reward(data)
    assert values.sum(-1).tolist() == pytest.approx([1.0, 0.0])
    assert metrics["overall"] == pytest.approx([1.0, 0.0])
    assert bool(tensors["response_mask"][values.bool()].all())


def test_the_reward_file_has_easyr1s_signature() -> None:
    inputs = [
        {"response": ANSWER, "response_length": 9, "ground_truth": '{"answer": "7", "question_type": "numerical"}'},
        {"response": "<answer>red</answer>", "response_length": 3, "ground_truth": "red"},
    ]
    found = reward.compute_score(inputs)
    assert (reward.REWARD_NAME, reward.REWARD_TYPE) == ("vilavt", "batch")
    assert [score["overall"] for score in found] == pytest.approx([1.0, 0.5])
    assert {"overall", "format", "accuracy"} <= found[0].keys()


def test_the_dataset_gives_what_the_trainer_splits(rows_file: Path) -> None:
    item = VilavtDataset(str(rows_file), SimpleNamespace(filter_overlong_prompts=False), None)[0]
    assert {"input_ids", "attention_mask", "position_ids", "raw_prompt_ids", "multi_modal_data", "ground_truth"} <= set(
        item
    )
    assert item["multi_modal_data"]["row"] == item["row"]


class FakeWorker:
    """EasyR1's ``Worker``: constructed without arguments in a colocated process."""

    def __init__(self) -> None:
        self.rank = 0


class FakeFsdpWorker(FakeWorker):
    """EasyR1's ``FSDPWorker``, as far as we touch it."""

    def __init__(self, config, role) -> None:
        super().__init__()
        self.config, self.role, self.built = config, role, None

    def _build_model_optimizer(self, model_config, fsdp_config) -> None:
        self.built = model_config.override_config, fsdp_config.use_orig_params

    def _build_rollout(self) -> None:
        self.rollout = MODULE.vLLMRollout


MODULE = SimpleNamespace(vLLMRollout="theirs")


def test_the_worker_can_be_placed_and_replaces_what_it_must(processor, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_module = SimpleNamespace(SUPPORTED_MODEL_TYPE=("qwen2_vl",))
    made = worker.make_worker(FakeWorker, FakeFsdpWorker, MODULE, patch_module, rollout="ours")
    # What `create_colocated_worker_cls` does: the first base, without arguments.
    assert made.__base__().rank == 0
    monkeypatch.setenv("VILAVT_EASYR1", '{"frozen": ["vision_tower"]}')
    one = made("config", "actor_rollout")
    model_config, fsdp_config = SimpleNamespace(override_config={"x": 1}), SimpleNamespace(use_orig_params=False)
    one._build_model_optimizer(model_config=model_config, fsdp_config=fsdp_config)
    assert one.built == ({"x": 1, "frozen": ["vision_tower"]}, True)
    assert patch_module.SUPPORTED_MODEL_TYPE == ("qwen2_vl", "vilavt")
    one._build_rollout()
    assert one.rollout == "ours"


class FakeRollout:
    """EasyR1's ``vLLMRollout``, as far as we touch it."""

    def __init__(self, model_path, config, tokenizer, processor, **kwargs) -> None:
        self.config, self.pad_token_id = config, tokenizer.pad_token_id
        self.sampling_params = SimpleNamespace(n=3, temperature=0.8)
        self.inference_engine = FakeLLM(tokenizer, {0: CALL.format(28), 2: ANSWER})

    @contextmanager
    def update_sampling_params(self, **kwargs):
        yield


def roll_out(tiny: Path, processor, items) -> SimpleNamespace:
    """What our rollout makes of data set items."""
    made = worker.make_rollout(FakeRollout, SimpleNamespace, lambda tensors, batch_size: tensors)
    one = made(str(tiny), SimpleNamespace(prompt_length=256, response_length=320), processor.tokenizer, processor)
    data = np.empty(len(items), dtype=object)
    data[:] = [item["multi_modal_data"] for item in items]
    return one.generate_sequences(SimpleNamespace(non_tensor_batch={"multi_modal_data": data}, meta_info={}))


def test_the_rollout_returns_n_trajectories_per_row(processor, tiny: Path, rows_file: Path) -> None:
    out = roll_out(tiny, processor, [{"multi_modal_data": {"row": row.to_json()}} for row in read_rows(rows_file)[:2]])
    assert out.batch["responses"].shape == (6, 320)
    prompts = out.batch["prompts"].tolist()
    assert prompts[0] == prompts[1] == prompts[2] != prompts[3]
    assert len(out.non_tensor_batch["messages"]) == 6


def test_rollouts_of_every_so_many_batches_are_written_and_replayed(
    processor, tiny: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from vilavt_rl.cli import app
    from vilavt_rl.replay import play, read_rollouts

    for name, value in Settings.read({"trace_every": 2}).to_environment().items():
        monkeypatch.setenv(name, value)
    rows = [replace(row, answer=answer) for row, answer in zip(read_rows(rows_file), ("7", "8"), strict=False)]
    out = roll_out(tiny, processor, [{"multi_modal_data": {"row": row.to_json()}} for row in rows])
    for name, values in {"row": [row.to_json() for row in rows], "uid": ["first", "second"]}.items():
        out.non_tensor_batch[name] = np.repeat(np.array(values, dtype=object), 3)
    manager = reward.VilavtRewardManager(SimpleNamespace(reward_function_kwargs={}), 2, str(tmp_path / "run"))
    manager.compute_reward(out)
    assert not (tmp_path / "run").exists()
    for _ in range(3):
        manager.compute_reward(out)
    found = list(read_rollouts(tmp_path / "run"))
    assert [(one.step, one.group) for one in found] == [
        (step, g) for step in (2, 4) for g in ["first"] * 3 + ["second"] * 3
    ]
    assert [one.reward["overall"] for one in found[:6]] == pytest.approx([1, 1, 1, 0, 0, 0])
    assert found[0].temperature == pytest.approx(0.8)
    real = out.batch["attention_mask"][3].bool()
    again = play(found[3], Settings().episodes(str(tiny), processor))
    assert again.record.token_ids == out.batch["input_ids"][3][real].tolist()
    command = [
        "replay",
        str(tmp_path / "run"),
        "--model",
        str(tiny),
        "--out",
        str(tmp_path / "page.html"),
        "--step",
        "4",
    ]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("overall 1, accuracy 1, format 1, zooms 1") == 3
    assert page.count("not recorded") == 6


def test_without_a_trace_setting_no_rollouts_travel(processor, tiny: Path, rows_file: Path) -> None:
    (row, *_) = read_rows(rows_file)
    out = roll_out(tiny, processor, [{"multi_modal_data": {"row": row.to_json()}}])
    assert "rollout" not in out.non_tensor_batch


def test_a_prompt_that_is_too_long_is_left_out_and_the_run_goes_on(
    processor, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()[:2]]
    for row in rows:
        row["image_path"] = [str(rows_file.parent / image) for image in row["image_path"]]
    rows.insert(1, rows[0] | {"question": "Why? " * 300, "id": "long"})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    episodes = Settings().episodes(str(tiny), processor)

    def dataset(filtered: bool) -> VilavtDataset:
        config = SimpleNamespace(filter_overlong_prompts=filtered, max_prompt_length=256)
        return VilavtDataset(str(file), config, episodes)

    with pytest.raises(RolloutError, match="sample long: its first turn has"):
        roll_out(tiny, processor, list(dataset(filtered=False)))
    kept = dataset(filtered=True)
    assert [row.id for row in kept.rows] == [rows[0]["id"], rows[2]["id"]]
    assert len(roll_out(tiny, processor, list(kept)).non_tensor_batch["messages"]) == 6


PUBLISHED = {  # what the published run was started with
    "vilavt.frozen": ["vision_tower", "text_encoder"],
    "data.rollout_batch_size": 64,
    "data.val_batch_size": 128,
    "data.max_prompt_length": 10240,
    "data.max_response_length": 13312,
    "data.shuffle": True,
    "data.seed": 1,
    "algorithm.adv_estimator": "grpo",
    "algorithm.disable_kl": True,
    "algorithm.use_kl_loss": False,
    "worker.actor.global_batch_size": 32,
    "worker.actor.micro_batch_size_per_device_for_update": 1,
    "worker.actor.micro_batch_size_per_device_for_experience": 1,
    "worker.actor.max_grad_norm": 1.0,
    "worker.actor.clip_ratio_low": 0.2,
    "worker.actor.clip_ratio_high": 0.3,
    "worker.actor.clip_ratio_dual": 3.0,
    "worker.actor.ppo_epochs": 1,
    "worker.actor.padding_free": True,
    "worker.actor.optim.lr": 1e-6,
    "worker.actor.optim.weight_decay": 0.01,
    "worker.actor.optim.betas": [0.9, 0.999],
    "worker.actor.optim.lr_warmup_ratio": 0.0,
    "worker.rollout.n": 4,
    "worker.rollout.temperature": 1.0,
    "worker.rollout.top_p": 1.0,
    "worker.rollout.limit_images": 55,
    "worker.rollout.gpu_memory_utilization": 0.55,
    "worker.rollout.enforce_eager": False,
    "worker.rollout.tensor_parallel_size": 2,
    "worker.rollout.max_model_len": 10240 + 13312,  # the published one is half as long again, docs/rl.md
    "worker.rollout.max_num_batched_tokens": 32768,
    "trainer.total_epochs": 1,
    "trainer.nnodes": 4,
    "trainer.n_gpus_per_node": 8,
    "trainer.val_freq": -1,
    "trainer.val_before_train": False,
    "trainer.save_freq": 50,
    "trainer.save_limit": 4,
}


@pytest.mark.parametrize(("key", "value"), PUBLISHED.items())
def test_the_7b_recipe_has_the_published_settings(key: str, value: object) -> None:
    recipe = yaml.safe_load((RECIPES / "vilavt_7b_grpo_easyr1.yaml").read_text(encoding="utf-8"))
    assert reduce(getitem, key.split("."), recipe) == value


def test_unknown_keys_of_our_block_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match="unknown keys in the block vilavt: turns"):
        Settings.read({"turns": 3})
    with pytest.raises(HostError, match="must be prompt or tensors"):
        Settings.read({"queries": "x"})
    with pytest.raises(HostError, match="trace_every is -1, it must be a whole number"):
        Settings.read({"trace_every": -1})
    settings = Settings.read({"limits": {"max_turns": 3}, "frozen": []})
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.of_environment() == settings


def test_verl_from_the_package_index_is_refused_with_its_name() -> None:
    from vilavt_rl.easyr1.main import main

    pytest.importorskip("verl", reason="nothing to refuse")
    if os.environ.get("EASYR1_HOME"):
        return
    with pytest.raises(HostError, match="verl from the package index"):
        main([])
