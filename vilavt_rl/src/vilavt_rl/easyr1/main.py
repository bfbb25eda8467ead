"""``python -m vilavt_rl.easyr1.main config=… worker.actor.model.model_path=…``: EasyR1's trainer with our parts.

The arguments are EasyR1's, plus the block ``vilavt`` (see :mod:`vilavt_rl.easyr1.block`); ``config`` may be the name
of a recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from vilavt_core.checkpoint import require_vilavt
from vilavt_core.driver import ConversationSettings
from vilavt_core.shipped import find_recipe

from ..compat import require_easyr1
from ..launch import RECIPES
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
        HostError: an unknown key in our block, or LoRA.
        omegaconf.errors.ConfigKeyError: an unknown key of EasyR1's.
    """
    from omegaconf import OmegaConf
    from verl.trainer.config import PPOConfig

    given: Any = OmegaConf.from_cli(list(arguments))
    file = given.pop("config", None)
    ours = OmegaConf.create({"vilavt": given.pop("vilavt", {})})
    config: Any = OmegaConf.structured(PPOConfig())
    if file is not None:
        loaded: Any = OmegaConf.load(find_recipe(file, RECIPES) or file)
        ours = OmegaConf.merge({"vilavt": loaded.pop("vilavt", {})}, ours)
        config = OmegaConf.merge(config, loaded)
    config = OmegaConf.to_object(OmegaConf.merge(config, given))
    config.deep_post_init()
    engine.refuse_lora(config)
    block: Any = OmegaConf.to_container(ours, resolve=True)
    return config, Settings.read(block["vilavt"])


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


def run(config: Any) -> None:
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
    from .seams import check

    check()
    import ray

    config, settings = read_config(sys.argv[1:] if arguments is None else arguments)
    require_vilavt(config.worker.actor.model.model_path)
    engine.require_engine(settings.queries)
    if not ray.is_initialized():
        ray.init(
            runtime_env={
                "env_vars": {**ENVIRONMENT, **settings.to_environment()},
                "worker_process_setup_hook": engine.PREPARE,
            }
        )
    ray.get(ray.remote(num_cpus=1)(run).remote(config))


if __name__ == "__main__":
    from vilavt_core.ending import ending

    with ending("vilavt_rl.easyr1"):
        main()
