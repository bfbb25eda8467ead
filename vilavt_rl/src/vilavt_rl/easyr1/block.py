"""Our part of an EasyR1 configuration: the block ``vilavt`` of its YAML, or ``vilavt.key=value``.

EasyR1's configuration refuses keys it does not know, so our entry point takes the block out before, and hands it to
every process in an environment variable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from vilavt_core.driver import ConversationSettings
from vilavt_core.spelling import meant

from ..errors import HostError
from ..rollout import settings_of_checkpoint
from .engine import Queries

VARIABLE = "VILAVT_EASYR1"


@dataclass(frozen=True)
class Settings:
    """How episodes run."""

    preset: str | None = None
    """None: what the checkpoint asks for."""
    limits: dict[str, Any] = field(default_factory=dict)
    """Fields of `vilavt_core.presets.Limits`."""
    inference: dict[str, Any] = field(default_factory=dict)
    """``preset`` and ``limits`` of the trained checkpoint, where they differ from these; see `vilavt-rl merge`."""
    queries: Queries = "inquiries"
    """What vLLM's model is handed: ``inquiries``, the episode's own (vilavt-vllm, vLLM 0.20 to 0.22); ``tensors``,
    query ids, masks and a mapping beside the images (the published plug-in, vLLM 0.12 and older)."""
    frozen: tuple[str, ...] = ("vision_tower", "text_encoder")
    """Parts without gradient, see `vilavt_hf.VilavtConfig`; as published."""
    trace_every: int = 0
    """Write the rollouts of every so many batches for `vilavt-rl replay`; 0: of none."""

    @classmethod
    def read(cls, block: Mapping[str, Any] | None) -> Settings:
        """Settings from a block.

        Raises:
            HostError: an unknown key or value.
        """
        block = dict(block or {})
        if unknown := sorted(set(block) - set(cls.__dataclass_fields__)):
            known = cls.__dataclass_fields__
            raise HostError(
                f"unknown keys in the block vilavt: {', '.join(unknown)}; known are {', '.join(known)}"
                f"{meant(unknown, known)}"
            )
        if (queries := block.get("queries") or "inquiries") not in get_args(Queries):
            raise HostError(f"vilavt.queries is {queries!r}, it must be {' or '.join(get_args(Queries))}")
        if not isinstance(every := block.get("trace_every") or 0, int) or every < 0:
            raise HostError(f"vilavt.trace_every is {every!r}, it must be a whole number, 0 for never")
        if "frozen" in block:
            block["frozen"] = tuple(block["frozen"] or ())
        return cls(**{key: value for key, value in block.items() if value is not None or key == "preset"})

    @classmethod
    def of_environment(cls) -> Settings:
        """Those of this run."""
        return cls.read(json.loads(os.environ.get(VARIABLE, "{}")))

    def episodes(self, model_path: str, processor: Any) -> ConversationSettings:
        """What episodes of a checkpoint start from; the filter of long prompts and the rollout use the same."""
        return settings_of_checkpoint(model_path, processor, preset=self.preset, limits=self.limits)

    def to_environment(self) -> dict[str, str]:
        """For the environment of Ray's processes."""
        return {VARIABLE: json.dumps(asdict(self))}
