"""The backend ``vllm`` of `vilavt_core.backends`: what an evaluation opens by name."""

from vilavt_core.backends import BackendOptions

from .offline import VilavtLLM


def open_llm(model: str, options: BackendOptions) -> VilavtLLM:
    """A `VilavtLLM` over an engine of its own; ``options.engine`` are arguments of `vllm.LLM`."""
    options.refuse("vllm", "device")
    preset = options.preset_for(model)
    return VilavtLLM(
        model,
        preset=preset,
        limit_changes=options.limits,
        sampling=options.change_sampling(preset.sampling),
        seed=options.seed,
        prompts=options.prompts,
        concurrency=options.concurrency,
        image_limits=options.image_limits,
        video_limits=options.video_limits,
        allow_urls=options.allow_urls,
        **{"dtype": options.dtype, **options.engine},
    )
