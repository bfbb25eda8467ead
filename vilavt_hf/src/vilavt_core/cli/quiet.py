"""What a command says beside its own lines: nothing, but how long the weights take."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..progress import waiting

Opened = TypeVar("Opened")


def load_quietly() -> None:
    """Keep transformers from writing about the weights that it is going to load, without importing it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    hide_bars()
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def hide_bars() -> None:
    """Keep transformers' bars from the terminal, where ours are, and from files."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def open_quietly(model: str, open: Callable[[], Opened]) -> Opened:
    """Import torch, load weights, and say on a terminal what is done if it takes long. A hub id is fetched first, with
    the hub's own bars.

    Args:
        model: checkpoint folder or hub id.
        open: does it.
    """
    from ..checkpoint.hub import checkpoint_folder, names_hub_id

    if names_hub_id(model) and sys.stderr.isatty():
        checkpoint_folder(model)
    load_quietly()
    with waiting(f"loading {Path(model).name}"):
        return open()
