"""What verl finds when it loads us, and that the two functions we replace still need it."""

import subprocess
import sys
import warnings

import pytest
import torch

verl = pytest.importorskip("verl", reason="verl has an environment of its own")


def test_verl_loads_the_plugin_by_itself() -> None:
    from vilavt_rl.verl import plugin

    assert plugin.LIVE == ["policy", "processor", "cpu"]


def test_without_the_cpu_platform_only_the_policy_and_the_processor_are_registered() -> None:
    code = "import verl; from vilavt_rl.verl import plugin; print(plugin.LIVE)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_without_platform()
    )
    assert run.stdout.strip().endswith("['policy', 'processor']")


def _without_platform() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}


def test_verls_processor_factory_still_does_not_know_us(tiny) -> None:
    # When this fails, verl has learned our processor (or grown a registry) and the patch can go.
    from verl.utils import hf_processor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert hf_processor.__wrapped__(str(tiny)) is None
    assert type(hf_processor(str(tiny))).__name__ == "VerlVilavtProcessor"


def test_every_place_that_took_the_factory_by_name_has_ours() -> None:
    import verl.model_merger.base_model_merger
    import verl.utils
    import verl.workers.config.model

    for module in (verl.utils, verl.utils.tokenizer, verl.workers.config.model, verl.model_merger.base_model_merger):
        assert module.hf_processor.vilavt


def test_torch_still_refuses_the_two_backends_that_verl_asks_for_on_a_cpu() -> None:
    # When this fails, `compat.use_gloo` can go.
    with pytest.raises(ValueError, match=r"[Dd]uplicate"):
        torch.distributed.distributed_c10d.BackendConfig(torch.distributed.Backend("cpu:gloo,cpu:gloo"))


def test_the_auto_class_gives_the_policy_which_cannot_say_a_placeholder(tiny, tokenizer) -> None:
    from transformers import AutoModelForImageTextToText

    from vilavt_core.conversation import SpecialTokens

    model = AutoModelForImageTextToText.from_pretrained(str(tiny), dtype=torch.float32)
    assert type(model).__name__ == "VilavtPolicy"
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    probabilities = logits.softmax(-1)[..., list(SpecialTokens.of(tokenizer).banned)]
    assert float(probabilities.detach().max()) < 1e-30
    assert torch.isfinite(logits).all()


def test_the_policy_cannot_say_an_id_without_a_token(tiny, tokenizer, tmp_path, caplog) -> None:
    from vilavt_rl.policy import VilavtPolicy

    model = VilavtPolicy.from_pretrained(str(tiny), dtype=torch.float32)
    assert model.n_tokens == len(tokenizer) < model.config.text_config.vocab_size
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits.detach()
    assert float(logits[..., len(tokenizer) :].max()) < -1000 < float(logits[..., len(tokenizer) - 1].min())
    model.save_pretrained(tmp_path)  # without its tokenizer
    bare = VilavtPolicy.from_pretrained(str(tmp_path), dtype=torch.float32)
    assert bare.n_tokens is None
    assert "no tokenizer" in caplog.text


def test_verl_brings_a_prompt_to_one_placeholder_for_each_image(tiny, tokenizer) -> None:
    from verl.utils import hf_processor
    from verl.workers.rollout.utils import get_vision_placeholder_token_ids, qwen2_5_vl_dedup_image_tokens

    processor = hf_processor(str(tiny))
    start, pad, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
    assert qwen2_5_vl_dedup_image_tokens([7, start, *[pad] * 4, end, 8, start, *[pad] * 9, end], processor) == [
        *(7, start, pad, end),
        *(8, start, pad, end),
    ]
    video = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert get_vision_placeholder_token_ids(processor) == [pad, video]


PUBLISHED = {  # what the published run was started with
    "data.train_batch_size": 64,
    "data.max_prompt_length": 10240,
    "data.max_response_length": 13312,
    "data.shuffle": True,
    "data.seed": 1,
    "algorithm.adv_estimator": "grpo",
    "algorithm.use_kl_in_reward": False,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 1,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
    "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
    "actor_rollout_ref.actor.optim.weight_decay": 0.01,
    "actor_rollout_ref.actor.optim.betas": [0.9, 0.999],
    "actor_rollout_ref.actor.optim.clip_grad": 1.0,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.3,
    "actor_rollout_ref.actor.clip_ratio_c": 3.0,
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.model.override_config.frozen": ["vision_tower", "text_encoder"],
    "actor_rollout_ref.rollout.n": 4,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1.0,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 2,
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.55,
    "actor_rollout_ref.rollout.max_num_batched_tokens": 32768,
    "actor_rollout_ref.rollout.max_model_len": 10240 + 13312,  # the published one is half as long again, docs/rl.md
    "actor_rollout_ref.rollout.enforce_eager": False,
    "actor_rollout_ref.rollout.engine_kwargs.vllm.limit_mm_per_prompt.image": 55,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 1,
    "trainer.nnodes": 4,
    "trainer.n_gpus_per_node": 8,
    "trainer.total_epochs": 1,
    "trainer.save_freq": 50,
    "trainer.max_actor_ckpt_to_keep": 4,
    "trainer.test_freq": -1,
    "trainer.val_before_train": False,
}


@pytest.fixture(scope="module")
def big_recipe(recipe_config):
    return recipe_config("vilavt_7b_grpo", "actor_rollout_ref.model.path=x", "data.train_files=y", "data.val_files=z")


@pytest.mark.parametrize(("key", "value"), PUBLISHED.items())
def test_the_7b_recipe_has_the_published_settings(key: str, value: object, big_recipe) -> None:
    from omegaconf import OmegaConf

    assert OmegaConf.select(big_recipe, key, throw_on_missing=True) == value


@pytest.mark.parametrize("name", ["tiny_cpu", "vilavt_7b_grpo"])
def test_recipes_compose_with_verls_own_defaults(name: str, recipe_config) -> None:
    config = recipe_config(name, "actor_rollout_ref.model.path=x", "data.train_files=y", "data.val_files=z")
    assert config.algorithm.adv_estimator == "grpo"
    assert config.actor_rollout_ref.actor.loss_agg_mode == "seq-mean-token-mean"
    assert config.actor_rollout_ref.rollout.agent.default_agent_loop == "vilavt"


def test_the_filter_of_long_prompts_measures_with_the_agent_loops_preset_and_limits(
    recipe_config, rows_file, tokenizer, tmp_path
) -> None:
    import yaml

    from vilavt_rl.data import read_rows
    from vilavt_rl.errors import RowError
    from vilavt_rl.rollout import cached_settings, start_row
    from vilavt_rl.verl.dataset import VilavtDataset

    loop = {"name": "vilavt", "preset": "eval-hf", "limits": {"max_pixels": 6 * 784}}
    file = tmp_path / "loop.yaml"
    file.write_text(yaml.safe_dump([{"name": "other"}, loop]), encoding="utf-8")
    settings = cached_settings(tokenizer.name_or_path, "eval-hf", (("max_pixels", 6 * 784),))
    length = max(
        len(start_row(row, settings, max_prompt=10_000, max_response=1).result.record.token_ids)
        for row in read_rows(rows_file)
    )

    def rows(max_prompt: int) -> int:
        config = recipe_config(
            "tiny_cpu",
            f"actor_rollout_ref.rollout.agent.agent_loop_config_path={file}",
            "data.filter_overlong_prompts=true",
            f"data.max_prompt_length={max_prompt}",
        )
        return len(VilavtDataset(str(rows_file), tokenizer, config.data))

    assert rows(length) == len(read_rows(rows_file))
    assert rows(length - 1) < len(read_rows(rows_file))
    file.write_text(yaml.safe_dump([{"name": "other"}]), encoding="utf-8")
    with pytest.raises(RowError, match=r"no agent loop is called 'vilavt', there are \['other'\]"):
        rows(length)
