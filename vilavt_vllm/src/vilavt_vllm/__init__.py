"""ViLaVT in an unmodified vLLM: an out-of-tree model, found through the entry point group ``vllm.general_plugins``.

Importing this package imports neither torch nor vLLM: vLLM imports it in every process it starts.
"""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .registration import register

if TYPE_CHECKING:
    from .offline import VilavtLLM
    from .online import AsyncVilavtLLM
    from .processing import InquiryItem

__version__ = version("vilavt-vllm")

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""For ``--chat-template``: ChatML that refuses structural tokens in the text of a message (status 400)."""

_LAZY = {"AsyncVilavtLLM": "online", "InquiryItem": "processing", "VilavtLLM": "offline"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


__all__ = ["CHAT_TEMPLATE", "AsyncVilavtLLM", "InquiryItem", "VilavtLLM", "__version__", "register"]
