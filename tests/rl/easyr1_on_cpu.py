"""What stands in for a GPU while EasyR1's own worker runs on a CPU; only for tests, and nothing of EasyR1 is changed.

EasyR1 names NCCL, CUDA and flash-attention in its code, without a setting. So torch's functions answer for the CPU
instead: process groups meet over gloo, device meshes are of CPUs, FSDP wraps on the CPU, models come with SDPA.
"""

from __future__ import annotations

import functools
import os

OVERRIDES = (
    "worker.actor.padding_free=false",  # needs flash-attention
    "worker.actor.use_torch_compile=false",
    "worker.actor.fsdp.enable_rank0_init=false",  # states are synchronised between GPUs only
    "worker.actor.fsdp.mp_param_dtype=fp32",
    "worker.actor.offload.offload_params=false",
    "worker.actor.offload.offload_optimizer=false",
    "worker.rollout.dtype=fp32",
    "worker.rollout.enforce_eager=true",
    "worker.rollout.tensor_parallel_size=1",
)
"""Of devices, beside sizes and paths."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
}


def stand_in() -> None:
    """Replace what EasyR1 calls of torch; in every process, before EasyR1 is imported."""
    import torch
    import torch.distributed as dist
    import torch.distributed.device_mesh as device_mesh
    from tensordict import TensorDictBase
    from transformers import PreTrainedModel

    from vilavt_rl.easyr1.engine import prepare

    prepare()
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.set_device = lambda *args: None
    torch.cuda.get_device_name = lambda *args: "cpu"
    torch.cuda.mem_get_info = lambda *args: (0, 0)
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = torch.get_rng_state, torch.set_rng_state

    TensorDictBase.cuda = lambda self, *args, **kwargs: self

    meet, mesh = dist.init_process_group, device_mesh.init_device_mesh
    load = PreTrainedModel.from_pretrained.__func__

    @functools.wraps(meet)
    def init_process_group(backend=None, *args, **kwargs):
        return meet("gloo", *args, **kwargs)

    @functools.wraps(mesh)
    def init_device_mesh(device_type, *args, **kwargs):
        return mesh("cpu", *args, **kwargs)

    @functools.wraps(load)
    def from_pretrained(cls, *args, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name != "device_map"}
        if kwargs.get("attn_implementation") == "flash_attention_2":
            kwargs["attn_implementation"] = "sdpa"
        return load(cls, *args, **kwargs)

    dist.init_process_group = init_process_group
    device_mesh.init_device_mesh = dist.init_device_mesh = init_device_mesh
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def main(arguments: list[str]) -> None:
    """`vilavt_rl.easyr1.main` on one process that counts as a GPU."""
    import ray

    from vilavt_rl.easyr1 import main as runner
    from vilavt_rl.easyr1.engine import prepare

    prepare()
    _, settings = runner.read_config(arguments)
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=1,
        include_dashboard=False,
        object_store_memory=200_000_000,
        runtime_env={
            "worker_process_setup_hook": stand_in,
            "env_vars": {
                **runner.ENVIRONMENT,
                **settings.to_environment(),
                **ENVIRONMENT,
                "PYTHONPATH": os.environ["PYTHONPATH"],
            },
        },
    )
    runner.main(arguments)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
