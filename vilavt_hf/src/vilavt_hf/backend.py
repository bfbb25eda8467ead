"""The backend ``hf``: a local model."""

from typing import Any

from vilavt_core.backends import Backend, BackendOptions

from .chat import VilavtChat


def open_local(model: str, options: BackendOptions) -> Backend:
    """The backend ``hf``: a `VilavtChat`."""
    preset = options.preset_for(model)
    settings: dict[str, Any] = {} if options.concurrency is None else {"max_batch_size": options.concurrency}
    chat = VilavtChat.from_pretrained(
        model,
        dtype=options.dtype,
        device=options.device,
        model_kwargs=options.engine,
        preset=preset,
        sampling=options.change_sampling(preset.sampling),
        prompts=options.prompts,
        seed=options.seed,
        image_limits=options.image_limits,
        **settings,
    )
    chat.limits = options.change_limits(chat.limits)
    return chat
