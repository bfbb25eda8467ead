"""GRPO for ViLaVT in unmodified trainers: verl, and EasyR1 from a checkout. Importing this package imports neither."""

from importlib.metadata import version

__version__ = version("vilavt-rl")
__all__ = ["__version__"]
