"""What verl loads in every process, through the entry point ``vilavt`` of the group ``verl.plugins``.

It registers the policy with the Auto classes, teaches verl's processor factory our processor, and, if
``VERL_PLATFORM=cpu``, registers the CPU mode. verl swallows whatever a plug-in raises, so a failure is also logged here
as an error; ``vilavt-rl doctor`` says which parts are live.
"""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)

LIVE: list[str] = []
"""What was registered in this process, for the doctor."""


def register() -> None:
    """Register everything, once.

    Raises:
        HostError: the module ``verl`` is another trainer, or an untested version.
    """
    if LIVE:
        return
    from transformers import AutoModelForImageTextToText

    from vilavt_hf import VilavtConfig

    from ..compat import patch_processor_factory, require_verl
    from ..policy import VilavtPolicy

    require_verl()
    AutoModelForImageTextToText.register(VilavtConfig, VilavtPolicy, exist_ok=True)
    LIVE.append("policy")
    patch_processor_factory()
    LIVE.append("processor")
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from .cpu import register as register_cpu

        register_cpu()
        LIVE.append("cpu")


try:
    register()
except Exception:
    logger.exception("the ViLaVT plug-in of verl could not be loaded")
    raise
