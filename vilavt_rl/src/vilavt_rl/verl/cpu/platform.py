"""The CPU as a verl platform."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class _CpuModule(ModuleType):
    """``torch.cpu`` with the names of ``torch.cuda`` that verl uses; memory is not measured."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def _nothing(*args: Any, **kwargs: Any) -> None:
        return None

    @staticmethod
    def _zero(*args: Any, **kwargs: Any) -> int:
        return 0

    empty_cache = synchronize = reset_peak_memory_stats = manual_seed = manual_seed_all = ipc_collect = _nothing
    set_device = _nothing
    max_memory_allocated = max_memory_reserved = memory_allocated = memory_reserved = current_device = _zero

    @staticmethod
    def is_available() -> bool:
        """There is always one."""
        return True

    @staticmethod
    def device_count() -> int:
        """One."""
        return 1

    @staticmethod
    def get_device_name(*args: Any) -> str:
        """For logs."""
        return "CPU"

    @staticmethod
    def mem_get_info(*args: Any) -> tuple[int, int]:
        """(free, total) bytes; not measured."""
        return 0, 0

    @staticmethod
    def get_rng_state(*args: Any) -> torch.Tensor:
        """Of the only generator."""
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *args: Any) -> None:
        """Of the only generator."""
        torch.set_rng_state(state)


_module = _CpuModule("vilavt_rl_cpu_device")

VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default vLLM takes half of the memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer computes on the same cores
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment variables of vLLM's server on a CPU."""


class CpuPlatform(PlatformBase):
    """Everything on the CPU, processes meet over gloo."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _module

    def is_available(self) -> bool:
        """Always."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Never by itself: a driver without a GPU may serve a cluster with GPUs. ``VERL_PLATFORM=cpu`` asks for it."""
        return False

    def current_device(self) -> Any:
        """What verl passes to ``Tensor.to``."""
        return "cpu"

    def device_count(self) -> int:
        """One per process."""
        return 1

    def set_device(self, device_index: int) -> None:
        """There is nothing to choose."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing is asynchronous."""

    def manual_seed(self, seed: int) -> None:
        """Seed the only generator."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the only generator."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """Not configurable."""

    def empty_cache(self) -> None:
        """There is none."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """None: this is about CUDA devices."""
        return None, None

    def communication_backend_name(self) -> str:
        """Gloo."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """verl sets one; it has no effect here."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """No profiler."""
        yield

    def profiler_start(self) -> None:
        """No profiler."""

    def profiler_stop(self) -> None:
        """No profiler."""

    def ray_resource_name(self) -> str:
        """verl places one training process on each unit of this resource; a node declares how many it wants."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """None."""
        return []

    def is_ipc_supported(self) -> bool:
        """No."""
        return False

    def cudart(self) -> None:
        """None."""

    def rollout_env_vars(self) -> dict[str, str]:
        """What vLLM's server needs on a CPU that it shares with the trainer; what is set already stays."""
        return {name: os.environ.get(name, value) for name, value in VLLM_ENVIRONMENT.items()}


def register_platform() -> None:
    """Make ``VERL_PLATFORM=cpu`` mean this."""
    if PlatformRegistry.get("cpu") is None:
        PlatformRegistry.register(platform="cpu")(CpuPlatform)
