"""The names of EasyR1 that we subclass, call or replace, so that a moved one is reported before a run and not in it.

Recorded from commit b44b311 (0.3.3.dev0, 2026-07-30).
"""

from __future__ import annotations

from ..errors import HostError
from ..seams import Seam, seam_problems
from . import engine

COMMIT = "b44b311b669bf1fd1aa2fc36f2251482ba33cb16"

SEAMS: tuple[Seam, ...] = (
    ("verl.single_controller.base", "Worker", ()),
    ("verl.single_controller.ray", "RayWorkerGroup", ()),
    ("verl.protocol", "DataProto", ()),
    ("verl.trainer.config", "PPOConfig", ()),
    ("verl.trainer.ray_trainer", "ResourcePoolManager", ("resource_pool_spec", "mapping")),
    ("verl.trainer.ray_trainer", "Role", ()),
    (
        "verl.trainer.ray_trainer",
        "RayPPOTrainer",
        (
            "config",
            "tokenizer",
            "processor",
            "train_dataloader",
            "val_dataloader",
            "role_worker_mapping",
            "resource_pool_manager",
            "ray_worker_group_cls",
            "reward_fn",
            "val_reward_fn",
        ),
    ),
    ("verl.utils.dataset", "collate_fn", ("features",)),
    ("verl.utils.tokenizer", "get_tokenizer", ("model_path", "override_chat_template")),
    ("verl.utils.tokenizer", "get_processor", ("model_path", "override_chat_template")),
    ("verl.workers.fsdp_workers", "FSDPWorker", ("config", "role")),
    ("verl.workers.fsdp_workers", "FSDPWorker._build_rollout", ("self",)),
    ("verl.workers.fsdp_workers", "FSDPWorker._build_model_optimizer", ("self", "model_config")),
    ("verl.workers.fsdp_workers", "FSDPWorker._process_multi_modal_inputs", ("self", "data")),
    ("verl.workers.fsdp_workers", "vLLMRollout", ("model_path", "config", "tokenizer", "processor")),
    ("verl.workers.fsdp_workers", "vLLMRollout.generate_sequences", ("self", "prompts")),
    ("verl.workers.fsdp_workers", "vLLMRollout.update_sampling_params", ("self",)),
    ("verl.workers.rollout.vllm_rollout_spmd", "LLM", ()),
    ("verl.workers.sharding_manager.fsdp_vllm", "vllm_ps", ()),
    ("verl.models.monkey_patch", "SUPPORTED_MODEL_TYPE", ()),
)
"""See `vilavt_rl.seams`."""


def check_seams() -> None:
    """Look every seam up, and what EasyR1 itself uses of vLLM: without that nothing of it can be imported.

    Raises:
        HostError: one is gone or has lost a parameter; names all of them.
    """
    if wrong := engine.missing():
        raise HostError(f"this vLLM lacks what EasyR1 uses: {'; '.join(wrong)}; {engine.install_command()}")
    if wrong := seam_problems(SEAMS):
        raise HostError(f"this EasyR1 is not the one that was tested ({COMMIT[:7]}): {'; '.join(wrong)}")
