"""verl's own FSDP engine on the CPU, and the rollout engine's place in verl's registries."""

from __future__ import annotations

from typing import Any

from .names import ROLLOUT


def register_engine() -> None:
    """verl's FSDP engine runs on the CPU as it is (strategy ``fsdp2``); it is only registered for CUDA and NPU."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    if "cpu" not in EngineRegistry._engines.get("language_model", {}).get("fsdp2", {}):
        EngineRegistry.register("language_model", "fsdp2", "cpu")(FSDPEngineWithLMHead)


def register_rollout() -> None:
    """Make ``rollout.name=vilavt_hf`` mean `vilavt_rl.verl.cpu.replica`."""
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    def load() -> Any:
        from .replica import VilavtReplica

        return VilavtReplica

    RolloutReplicaRegistry.register(ROLLOUT, load)
    _ROLLOUT_REGISTRY[ROLLOUT, "async"] = "vilavt_rl.verl.cpu.replica.VilavtRollout"
