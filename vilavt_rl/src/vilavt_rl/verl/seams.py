"""The names of verl 0.9 that we subclass, call or replace."""

from __future__ import annotations

from ..seams import Seam

SEAMS: tuple[Seam, ...] = (
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopBase", ()),
    ("verl.experimental.agent_loop.agent_loop", "AgentLoopOutput", ()),
    ("verl.utils.tokenizer.tokenizer", "hf_processor", ("name_or_path",)),
    ("verl.utils.distributed", "initialize_global_process_group_ray", ("backend",)),
    ("verl.plugin.platform.platform_manager", "PlatformRegistry.register", ("platform",)),
    ("verl.workers.engine.base", "EngineRegistry.register", ()),
    ("verl.workers.rollout.replica", "RolloutReplicaRegistry.register", ("name", "loader")),
    ("verl.workers.rollout.base", "_ROLLOUT_REGISTRY", ()),
)
"""Of every run."""

VLLM_SEAMS: tuple[Seam, ...] = (
    ("verl.workers.rollout.vllm_rollout.utils", "vLLMColocateWorkerExtension.update_weights_from_ipc", ("self",)),
    ("verl.workers.rollout.vllm_rollout.utils", "vLLMColocateWorkerExtension._update_weights", ("self", "weights")),
    ("verl.workers.rollout.vllm_rollout.vllm_async_server", "vLLMHttpServer.generate", ("prompt_ids", "image_data")),
    ("verl.workers.rollout.utils", "qwen2_5_vl_dedup_image_tokens", ("prompt_ids", "processor")),
)
"""Of a run with ``rollout.name=vllm``; looking them up imports vLLM."""
