"""ViLaVT for vLLM. Not implemented yet: this release reserves the name; see the README for what is planned."""

from importlib.metadata import version

__version__ = version("vilavt-vllm")
__all__ = ["__version__"]
