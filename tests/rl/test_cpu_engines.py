"""The heart of it: what the rollout engine says a token's probability is, the trainer says too.

Real episodes of the shipped tiny model, several turns with crops, sampled at temperature 1 by our CPU rollout through
verl's agent loop; then verl's own FSDP2 worker computes the log-probabilities of the same trajectories.
"""

import asyncio
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

pytest.importorskip("verl", reason="verl has an environment of its own")

from vilavt_rl.data import read_rows


class Direct:
    """verl's server client without Ray between it and the server."""

    def __init__(self, server) -> None:
        self.server = server

    async def generate(self, request_id, **request):
        out = await self.server.generate(request_id=request_id, **request)
        steps = out.extra_fields["global_steps"]
        out.extra_fields |= {"min_global_steps": steps, "max_global_steps": steps}
        return out


@pytest.fixture(scope="module")
def config(recipe_config, tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    from omegaconf import OmegaConf

    found = recipe_config(
        "tiny_cpu",
        f"actor_rollout_ref.model.path={tiny}",
        f"trainer.default_local_dir={tmp_path_factory.mktemp('run')}",
        "actor_rollout_ref.actor.optim.total_training_steps=10",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=0",  # the first step of a warm-up has rate 0
        "+actor_rollout_ref.model.override_config.frozen=[vision_tower]",
    )
    OmegaConf.resolve(found)
    return found


@pytest.fixture(scope="module")
def server(tiny: Path):
    from vilavt_rl.verl.cpu.replica import VilavtServer

    return VilavtServer(str(tiny), max_batch_size=8, seed=3)


def roll_out(config, server, rows):
    """(trajectories as verl's batch, work of the rollout engine)."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
    from verl.protocol import DataProto

    worker = AgentLoopWorker(config, Direct(server))
    arrays = {}
    for name, values in {
        "row": [row.to_json() for row in rows],
        "raw_prompt": [[{"role": "user", "content": row.question}] for row in rows],
    }.items():
        arrays[name] = np.empty(len(values), dtype=object)
        arrays[name][:] = values
    batch = DataProto.from_dict(tensors={"dummy": torch.zeros(len(rows), 1)}, non_tensors=arrays)

    async def both():
        return await worker.generate_sequences(batch), await server.work()

    return asyncio.run(both())


@pytest.fixture(scope="module")
def rollouts(config, server, rows_file: Path):
    return roll_out(config, server, [row for row in read_rows(rows_file) for _ in range(2)])


@pytest.fixture(scope="module")
def trainer(config):
    """verl's training worker, world of one, FSDP2 over gloo."""
    from functools import partial

    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(world)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.model_config = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    setup = TrainingWorkerConfig(
        model_type="language_model",
        model_config=actor.model_config,
        engine_config=actor.engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
        profiler_config=None,
    )
    setup.engine_config.use_dynamic_bsz = False
    worker = TrainingWorker(config=setup)
    worker.reset()
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    yield worker
    torch.distributed.destroy_process_group()
    for name in world:
        os.environ.pop(name)


def logprobs(trainer, batch, micro_batch: int) -> torch.Tensor:
    """(B, R) log-probabilities of the response tokens, computed `micro_batch` trajectories at a time."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

    trainer.engine.engine_config.infer_micro_batch_size_per_gpu = micro_batch
    batch.meta_info = {"temperature": 1.0}
    data = left_right_2_no_padding(batch.to_tensordict())
    tu.assign_non_tensor(data, calculate_entropy=True, compute_loss=False)
    out = trainer.infer_batch(data)
    assert torch.isfinite(tu.get(out, "entropy").values()).all()
    return no_padding_2_padding(tu.get(out, "log_probs"), data)


def test_the_trajectories_are_real_ones(rollouts) -> None:
    batch, _ = rollouts
    assert set(batch.non_tensor_batch["finish"]) == {"answer"}
    assert batch.non_tensor_batch["zooms"].sum() >= 8
    assert max(len(inputs["image_grid_thw"]) for inputs in batch.non_tensor_batch["multi_modal_inputs"]) >= 3


def test_the_trainer_computes_the_log_probabilities_of_the_rollout(rollouts, trainer) -> None:
    batch, _ = rollouts
    mask = batch.batch["response_mask"].bool()
    gap = (logprobs(trainer, batch, 2) - batch.batch["rollout_log_probs"]).abs()[mask]
    assert int(mask.sum()) > 400
    assert float(gap.max()) <= 1e-4


def test_the_replay_command_shows_the_gap_to_the_models_own_log_probabilities(
    config, server, rows_file: Path, tiny: Path, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from vilavt_rl.cli import app

    warmer = config.copy()
    warmer.trainer.default_local_dir = str(tmp_path / "run")
    warmer.actor_rollout_ref.rollout.temperature = 0.6
    roll_out(warmer, server, read_rows(rows_file)[:2])
    page = tmp_path / "page.html"
    run = str(tmp_path / "run")
    shown = CliRunner().invoke(app, ["replay", run, "--model", str(tiny), "--out", str(page), "--gaps"])
    assert shown.exit_code == 0, shown.output
    gaps = re.findall(r"gap to the model given</td><td>largest (\S+), mean", page.read_text(encoding="utf-8"))
    assert len(gaps) == 2
    assert max(map(float, gaps)) <= 1e-4


def test_two_trajectories_together_are_two_trajectories_apart(rollouts, trainer) -> None:
    batch, _ = rollouts
    mask = batch.batch["response_mask"].bool()
    gap = (logprobs(trainer, batch, 2) - logprobs(trainer, batch, 1)).abs()[mask]
    assert float(gap.max()) <= 1e-4


def test_without_the_queries_the_log_probabilities_are_others(rollouts, trainer) -> None:
    batch, _ = rollouts
    mask = batch.batch["response_mask"].bool()
    whole = batch.non_tensor_batch["multi_modal_inputs"]
    blind = np.empty(len(whole), dtype=object)
    for i, inputs in enumerate(whole):
        blind[i] = inputs | {"query_attention_mask": torch.zeros_like(inputs["query_attention_mask"])}
    batch.non_tensor_batch["multi_modal_inputs"] = blind
    try:
        gap = (logprobs(trainer, batch, 2) - batch.batch["rollout_log_probs"]).abs()[mask]
    finally:
        batch.non_tensor_batch["multi_modal_inputs"] = whole
    assert float(gap.max()) > 1e-2


def test_the_loss_mask_counts_the_sampled_tokens(rollouts, tokenizer) -> None:
    batch, _ = rollouts
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    mask, turns = batch.batch["response_mask"].bool(), (batch.non_tensor_batch["__num_turns__"] // 2).tolist()
    for row, count in enumerate(turns):
        trained = batch.batch["responses"][row][mask[row]].tolist()
        assert trained.count(end) == count  # every turn's own end of turn is trained on
    assert bool((batch.batch["rollout_log_probs"] < 0)[mask].any())
    assert torch.equal(batch.batch["rollout_log_probs"] * ~mask, torch.zeros_like(mask, dtype=torch.float32))


def test_nothing_is_encoded_or_prefilled_twice(rollouts) -> None:
    _, work = rollouts
    assert work == pytest.approx({"patches_ratio": 1.0, "tokens_ratio": 1.0})


def test_an_update_trains_what_is_not_frozen_and_reaches_the_rollout(
    rollouts, trainer, server, tiny: Path, rows_file: Path
) -> None:
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    batch, _ = rollouts
    module = trainer.engine.module
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in module.named_parameters() if name.startswith("model.visual.")}
    before = {name: p.detach().full_tensor().clone() for name, p in module.named_parameters()}
    old = logprobs(trainer, batch, 2)
    mask = batch.batch["response_mask"]
    batch.batch["old_log_probs"] = old.float()
    praised = torch.arange(len(mask)) < len(mask) // 2  # whole groups: the two trajectories of a row may be equal
    batch.batch["advantages"] = mask.float() * torch.where(praised, 1.0, -1.0)[:, None]
    trainer.engine.engine_config.micro_batch_size_per_gpu = 2
    data = left_right_2_no_padding(batch.to_tensordict())
    tu.assign_non_tensor(
        data,
        calculate_entropy=False,
        distillation_use_topk=False,
        distillation_only=False,
        global_batch_size=len(mask),
        mini_batch_size=len(mask),
        epochs=1,
        seed=1,
        dataloader_kwargs={"shuffle": False},
        compute_loss=True,
    )
    trainer.train_mini_batch(data)
    changed = {n for n, p in module.named_parameters() if not torch.equal(before[n], p.detach().full_tensor())}
    assert not changed & frozen
    gained = ((logprobs(trainer, batch, 2) - old) * mask).sum(-1)
    assert float(gained[praised].mean()) > float(gained[~praised].mean())
    assert float(gained[~praised].mean()) < 0
    assert {"lm_head.weight", "model.text_proj.weight"} <= changed
    tensors, _ = trainer.engine.get_per_tensor_param()
    sent = {name: tensor.detach().clone() for name, tensor in tensors}
    with safe_open(tiny / "model.safetensors", "pt") as stored:
        assert sent.keys() == set(stored.keys())  # published names: what vLLM's plug-in takes
    asyncio.run(server.update_weights(sent, 7))
    assert server.global_steps == 7
    held = server.model.state_dict()
    for name, parameter in module.named_parameters():
        assert torch.equal(held[name], parameter.detach().full_tensor())
    if "VILAVT_VERL_HANDOFF" in os.environ:
        _hand_off(Path(os.environ["VILAVT_VERL_HANDOFF"]), sent, batch, logprobs(trainer, batch, 1), rows_file)


def _hand_off(folder: Path, weights, batch, values: torch.Tensor, rows_file: Path) -> None:
    """What tests/vllm/test_verl_weights.py reads in vLLM's environment: weights as verl sends them, and the
    log-probabilities that verl's trainer computes with them for one trajectory.
    """
    import json
    import shutil

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")
    row = read_rows(rows_file)[0]
    shutil.copyfile(row.images[0], folder / "image.png")
    mask = batch.batch["response_mask"][0].tolist()
    ids, turns = batch.batch["responses"][0].tolist(), []
    for i, sampled in enumerate(mask):
        if sampled and (i == 0 or not mask[i - 1]):
            turns.append({"token_ids": [], "logprobs": []})
        if sampled:
            turns[-1]["token_ids"].append(ids[i])
            turns[-1]["logprobs"].append(float(values[0, i]))
    trajectory = {"question": row.question, "max_turns": row.max_turns, "turns": turns}
    (folder / "trajectory.json").write_text(json.dumps(trajectory), encoding="utf-8")


def test_images_that_come_without_an_inquiry_are_refused(server) -> None:
    from PIL import Image

    from vilavt_rl.errors import RolloutError

    params = {"max_tokens": 1, "stop_token_ids": [2]}
    with pytest.raises(RolloutError, match="got Image in the place of an inquiry"):
        asyncio.run(server.generate([5], params, "x", image_data=[Image.new("RGB", (28, 28))]))
    with pytest.raises(RolloutError, match="inquiries only"):
        asyncio.run(server.generate([5], params, "x", mm_processor_kwargs={"queries": [""]}))


def test_a_weight_update_with_other_tensors_is_refused(server) -> None:
    from vilavt_rl.errors import RolloutError

    with pytest.raises(RolloutError, match="missing"):
        asyncio.run(server.update_weights({"lm_head.weight": server.model.lm_head.weight.detach()}, 8))
