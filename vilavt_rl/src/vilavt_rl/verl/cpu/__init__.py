"""GRPO without a GPU, as a supported mode of verl: a platform, an engine registration, and a rollout engine.

It is switched on by ``VERL_PLATFORM=cpu`` in the environment of every process, ``trainer.device=cpu``, and
``rollout.name=vilavt_hf``; `vilavt-rl verl CONFIG` sets the first. Ray has no GPU to count then, so nodes declare one
each (``num_gpus: 1``): it stands for the training process.
"""

from ...compat import use_gloo
from .names import ROLLOUT


def register() -> None:
    """Tell verl: platform and process group now; training engine and rollout when they are first asked for."""
    from .platform import register_platform

    register_platform()
    use_gloo()
    from .engine import register_engine, register_rollout

    register_engine()
    register_rollout()


__all__ = ["ROLLOUT", "register"]
