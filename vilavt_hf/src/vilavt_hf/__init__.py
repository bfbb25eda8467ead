"""ViLaVT for transformers: importing this package registers ``model_type: vilavt`` with the Auto classes."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from . import compat
from .configuration_vilavt import VilavtConfig, VilavtVisionConfig
from .modeling_vilavt import VilavtForConditionalGeneration, VilavtModel, VilavtVisionModel
from .processing_vilavt import VilavtProcessor

if TYPE_CHECKING:
    from vilavt_core.sources import Video

    from .chat import VilavtChat

__version__ = version("vilavt-hf")

AutoConfig.register(VilavtConfig.model_type, VilavtConfig, exist_ok=True)
AutoModelForImageTextToText.register(VilavtConfig, VilavtForConditionalGeneration, exist_ok=True)
compat.register_multimodal(VilavtConfig, VilavtForConditionalGeneration)
AutoProcessor.register(VilavtConfig, VilavtProcessor, exist_ok=True)

__all__ = [
    "Video",
    "VilavtChat",
    "VilavtConfig",
    "VilavtForConditionalGeneration",
    "VilavtModel",
    "VilavtProcessor",
    "VilavtVisionConfig",
    "VilavtVisionModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "VilavtChat":  # the engine and the episode are imported when they are used
        from .chat import VilavtChat

        return VilavtChat
    if name == "Video":
        from vilavt_core.sources import Video

        return Video
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
