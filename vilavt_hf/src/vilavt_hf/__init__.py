"""ViLaVT for transformers: importing this package registers ``model_type: vilavt`` with the Auto classes."""

from importlib.metadata import version

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .configuration_vilavt import VilavtConfig, VilavtVisionConfig
from .modeling_vilavt import VilavtForConditionalGeneration, VilavtModel, VilavtVisionModel
from .processing_vilavt import VilavtProcessor

__version__ = version("vilavt-hf")

AutoConfig.register(VilavtConfig.model_type, VilavtConfig, exist_ok=True)
AutoModelForImageTextToText.register(VilavtConfig, VilavtForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VilavtConfig, VilavtProcessor, exist_ok=True)

__all__ = [
    "VilavtConfig",
    "VilavtForConditionalGeneration",
    "VilavtModel",
    "VilavtProcessor",
    "VilavtVisionConfig",
    "VilavtVisionModel",
    "__version__",
]
