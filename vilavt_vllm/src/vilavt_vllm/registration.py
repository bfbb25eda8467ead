"""What vLLM learns of us, as strings: architectures and the configuration's model type. Cheap and re-entrant."""

from typing import Any

MODEL_TYPE = "vilavt"

ARCHITECTURES = {
    "VilavtForConditionalGeneration": "vilavt_vllm.model:VilavtForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration_Vilavt": "vilavt_vllm.model:VilavtForConditionalGeneration",
}
"""Architecture named in ``config.json`` -> the class that serves it. The second is what published checkpoints say."""


class ConfigOnFirstUse:
    """Stands in the table of `AutoConfig` until a ``vilavt`` configuration is read, then imports vilavt_hf.

    `AutoConfig` only calls `from_dict`. vilavt_hf puts its own class in this place when it is imported; importing it
    here would load transformers' and our model in every vLLM process, whatever model it serves.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The `VilavtConfig` of a parsed ``config.json``."""
        from vilavt_hf import VilavtConfig

        return VilavtConfig.from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The `VilavtConfig` of a checkpoint."""
        from vilavt_hf import VilavtConfig

        return VilavtConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)


def register() -> None:
    """Tell vLLM and `AutoConfig` about ViLaVT; vLLM calls this in every process, some of them more than once."""
    from transformers import CONFIG_MAPPING
    from vllm import ModelRegistry

    if MODEL_TYPE not in CONFIG_MAPPING:
        CONFIG_MAPPING.register(MODEL_TYPE, ConfigOnFirstUse)
    known = ModelRegistry.get_supported_archs()
    for architecture, path in ARCHITECTURES.items():
        if architecture not in known:
            ModelRegistry.register_model(architecture, path)
