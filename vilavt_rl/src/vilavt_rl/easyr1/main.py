"""``python -m vilavt_rl.easyr1.main config=… worker.actor.model.model_path=…``: EasyR1's trainer with our parts.

The arguments are EasyR1's, plus the block ``vilavt`` (see `vilavt_rl.easyr1.block`); ``config`` may be the name
of a recipe.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from vilavt_core.checkpoint import command_line
from vilavt_core.driver import ConversationSettings
from vilavt_core.shipped import find_recipe, recipe_names
from vilavt_core.spelling import did_you_mean
from vilavt_core.yaml_config import read_keys

from ..compat import require_easyr1
from ..errors import HostError
from ..launch import RECIPES
from ..preflight import check_checkpoint, check_episodes, check_output, check_rows, refuse_options
from ..run_settings import file_names, note_settings
from . import engine
from .block import Settings

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "true",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",  # vLLM's sleep mode needs it
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
"""Of Ray's processes, as EasyR1 sets it."""


def read_config(arguments: Sequence[str]) -> tuple[Any, Settings]:
    """EasyR1's checked configuration, and ours.

    Raises:
        HostError: an unknown option or key, EasyR1's or our block's, a value that cannot be, a recipe that is not
            there, or LoRA.
    """
    from verl.trainer.config import PPOConfig

    config, block = compose_config(PPOConfig(), arguments)
    config.deep_post_init()
    engine.refuse_lora(config)
    return config, Settings.read(block)


def compose_config(schema: Any, arguments: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """EasyR1's configuration with a file's values and those of the command line, and our block of both.

    Args:
        schema: EasyR1's configuration with its defaults, a dataclass.
        arguments: ``config=FILE`` and ``key=value``.

    Raises:
        HostError: see `read_config`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    refuse_options(arguments, ())
    given: Any = OmegaConf.from_cli(list(arguments))
    file = given.pop("config", None)
    blocks = [given.pop("vilavt", {})]
    layers, origin = [given], "the command line"
    if file is not None:
        found = find_recipe(file, RECIPES)
        if found is None:
            raise HostError(
                f"config={file}: no such recipe; it must be a file, or one of {', '.join(recipe_names(RECIPES))}"
            )
        read_keys(found, HostError)  # names what is wrong with a file that holds no keys
        loaded: Any = OmegaConf.load(found)
        blocks.insert(0, loaded.pop("vilavt", {}))
        layers.insert(0, loaded)
    config: Any = OmegaConf.structured(schema)
    try:
        for layer in layers:
            origin = str(file) if layer is not given else "the command line"
            config = OmegaConf.merge(config, layer)
        block: Any = OmegaConf.to_container(OmegaConf.merge(*({"vilavt": one} for one in blocks)), resolve=True)
        return OmegaConf.to_object(config), block["vilavt"] or {}
    except OmegaConfBaseException as error:
        name = error.full_key or "a key"
        fields = getattr(error.object_type, "__dataclass_fields__", {})
        if fields and (key := name.rpartition(".")[2]) not in fields:
            raise HostError(
                f"{origin}: {name} is no key of EasyR1's configuration{did_you_mean(key, fields)}"
            ) from None
        raise HostError(f"{origin}: {name}: {str(error).splitlines()[0]}") from None


def check_easyr1(config: Any, settings: Settings) -> None:
    """Make sure that what a run names is there and can be used.

    Raises:
        HostError: the checkpoint, the folder of the run, or a preset or limit cannot be used; names the key.
        RowError: the data cannot be used.
    """
    model = config.worker.actor.model.model_path
    check_checkpoint("worker.actor.model.model_path", model)
    for name in ("train_files", "val_files"):
        check_rows(f"data.{name}", getattr(config.data, name))
    check_episodes("vilavt", asdict(settings), model)
    check_output("trainer.save_checkpoint_path", config.trainer.save_checkpoint_path)


def worker_class() -> type:
    """Our worker over the installed EasyR1."""
    import verl.models.monkey_patch as patch_module
    import verl.workers.fsdp_workers as workers_module
    import verl.workers.rollout.vllm_rollout_spmd as rollout_module
    import verl.workers.sharding_manager.fsdp_vllm as sharding_module
    from tensordict import TensorDict
    from verl.protocol import DataProto
    from verl.single_controller.base import Worker

    from .worker import make_rollout, make_worker

    rollout = make_rollout(workers_module.vLLMRollout, DataProto, TensorDict)
    translation = partial(engine.translated, rollout_module, sharding_module)
    return make_worker(Worker, workers_module.FSDPWorker, workers_module, patch_module, rollout, translation)


def dataloaders(config: Any, episodes: ConversationSettings) -> tuple[Any, Any]:
    """Training and validation loaders over our dataset, as EasyR1's ``data`` section asks."""
    import torch
    from torch.utils.data import RandomSampler, SequentialSampler
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.utils.dataset import collate_fn

    from .dataset import EasyR1Dataset

    train, val = (EasyR1Dataset(files, config, episodes) for files in (config.train_files, config.val_files))
    seed = torch.Generator().manual_seed(config.seed)
    order = RandomSampler(train, generator=seed) if config.shuffle else SequentialSampler(train)
    return (
        StatefulDataLoader(
            train,
            batch_size=config.mini_rollout_batch_size or config.rollout_batch_size,
            sampler=order,
            collate_fn=collate_fn,
            drop_last=True,
        ),
        StatefulDataLoader(
            val,
            batch_size=len(val) if config.val_batch_size == -1 else config.val_batch_size,
            shuffle=False,
            collate_fn=collate_fn,
        ),
    )


def train(config: Any) -> None:
    """Train, inside a Ray task."""
    import ray
    from verl.single_controller.ray import RayWorkerGroup
    from verl.trainer.ray_trainer import RayPPOTrainer, ResourcePoolManager, Role
    from verl.utils.tokenizer import get_processor, get_tokenizer

    import vilavt_hf  # noqa: F401 (registers the processor)

    from .reward import VilavtRewardManager

    model = config.worker.actor.model
    kwargs = {"override_chat_template": config.data.override_chat_template, "use_fast": True}
    tokenizer = get_tokenizer(model.model_path, trust_remote_code=model.trust_remote_code, **kwargs)
    processor = get_processor(model.model_path, trust_remote_code=model.trust_remote_code, **kwargs)
    pool = "global_pool"
    manager = ResourcePoolManager(
        resource_pool_spec={pool: [config.trainer.n_gpus_per_node] * config.trainer.nnodes},
        mapping={Role.ActorRolloutRef: pool},
    )
    rewards = ray.remote(VilavtRewardManager).options(num_cpus=config.worker.reward.num_cpus)
    settings = Settings.of_environment()
    if config.trainer.save_freq > 0:
        files = file_names(config.data.train_files)
        noted = json.dumps(asdict(settings))
        note_settings(config.trainer.save_checkpoint_path, model.model_path, noted, files, command_line())
    train, val = dataloaders(config.data, settings.episodes(model.model_path, processor))
    trainer = RayPPOTrainer(
        config=config,
        tokenizer=tokenizer,
        processor=processor,
        train_dataloader=train,
        val_dataloader=val,
        role_worker_mapping={Role.ActorRolloutRef: ray.remote(worker_class())},
        resource_pool_manager=manager,
        ray_worker_group_cls=RayWorkerGroup,
        reward_fn=rewards.remote(config.worker.reward, settings.trace_every, config.trainer.save_checkpoint_path),
        val_reward_fn=rewards.remote(config.worker.reward),
    )
    trainer.init_workers()
    trainer.fit()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    require_easyr1()
    engine.prepare()
    engine.fitting(engine.vllm_version())  # before anything imports it
    from .seams import check_seams

    check_seams()
    import ray

    config, settings = read_config(sys.argv[1:] if arguments is None else arguments)
    check_easyr1(config, settings)
    engine.require_engine(settings.queries)
    if not ray.is_initialized():
        ray.init(
            runtime_env={
                "env_vars": {**ENVIRONMENT, **settings.to_environment()},
                "worker_process_setup_hook": engine.PREPARE,
            }
        )
    ray.get(ray.remote(num_cpus=1)(train).remote(config))


if __name__ == "__main__":
    from vilavt_core.ending import ending

    with ending("vilavt_rl.easyr1"):
        main()
