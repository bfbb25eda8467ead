"""Configuration: Qwen2.5-VL plus ``vision_config.integration_point``, ``text_encoder_config`` and ``frozen``."""

import logging
import os
from copy import deepcopy
from typing import Any

from transformers import Qwen3Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

from vilavt_core.architecture import FREEZABLE, query_aware_blocks, query_encoder_part
from vilavt_core.checkpoint.config import (
    QWEN3_EMBEDDING_CONSTANTS,
    QWEN3_EMBEDDING_SIZES,
    derived_text_encoder_config,
)
from vilavt_core.checkpoint.layout import Checkpoint

logger = logging.getLogger(__name__)

QWEN3_EMBEDDING = {
    **QWEN3_EMBEDDING_SIZES,
    **{name: QWEN3_EMBEDDING_CONSTANTS[name] for name in ("max_position_embeddings", "rope_theta")},
    "tie_word_embeddings": True,
}
"""Qwen3-Embedding-0.6B, the published query encoder: the default of a config that names none."""


class VilavtVisionConfig(Qwen2_5_VLVisionConfig):
    """Qwen2.5-VL's vision tower plus ``integration_point``: which blocks attend jointly over a group and its query.

    It is a `vilavt_core.architecture.IntegrationPoint` or None.
    """

    integration_point: str | None = None

    def query_aware_blocks(self) -> frozenset[int]:
        """Indices of the query-aware blocks.

        Raises:
            CheckpointError: ``integration_point`` is not a known name.
        """
        return query_aware_blocks(
            {name: getattr(self, name) for name in ("depth", "fullatt_block_indexes", "integration_point")}
        )


class VilavtConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration with a query encoder; reads both published flavours of ``config.json``.

    Args:
        text_encoder_config: the query encoder, a ``Qwen3Config`` or its dict.
        vision_config: a ``VilavtVisionConfig`` or its dict.
        frozen: what has no gradient, any of `vilavt_core.architecture.FREEZABLE`; applied whenever a
            model is built or loaded.
    """

    model_type = "vilavt"
    sub_configs = {  # noqa: RUF012 (the parent's type)
        "vision_config": VilavtVisionConfig,
        "text_config": Qwen2_5_VLTextConfig,
        "text_encoder_config": Qwen3Config,
    }
    sub_configs_defaults = dict(sub_configs)  # noqa: RUF012 (the newest 5.x reads this name; 4.57, 5.10 and 5.19 read `sub_configs`)

    # An explicit __init__ is the one form that 4.57 (plain class) and 5.x (strict dataclass) both honour.
    def __init__(
        self,
        text_encoder_config: Qwen3Config | dict | None = None,
        vision_config: VilavtVisionConfig | dict | None = None,
        frozen: list[str] | tuple[str, ...] = (),
        **kwargs: Any,
    ):
        kwargs.pop("model_type", None)  # the SFT flavour says qwen2_5_vl
        kwargs.pop("integration_point", None)  # published files carry an unused null at the top level
        if kwargs.get("text_config") is not None:  # published files repeat the text fields flat; 5.x warns on these two
            kwargs.pop("rope_scaling", None)
            kwargs.pop("rope_theta", None)
        # 5.x writes what it makes of RoPE settings into the dicts that it is given
        kwargs = {name: deepcopy(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        if not isinstance(text_encoder_config, Qwen3Config):
            text_encoder_config = Qwen3Config(**deepcopy(text_encoder_config or QWEN3_EMBEDDING))
        if not isinstance(vision_config, VilavtVisionConfig):
            # vision_config.model_type is "qwen2_5_vl" in 4.57 files and "qwen2_5_vl_vision" in 5.x files
            vision_config = VilavtVisionConfig(**{k: v for k, v in (vision_config or {}).items() if k != "model_type"})
        self.text_encoder_config = text_encoder_config
        self.vision_config = vision_config
        self.frozen = _checked_parts(frozen)
        # some published files have none at the top level, and vLLM chooses the model by it
        kwargs["architectures"] = kwargs.get("architectures") or ["VilavtForConditionalGeneration"]
        super().__init__(vision_config=vision_config, **kwargs)
        for name in ("architectures", "tie_word_embeddings"):
            # 4.57 answers with what text_config says, which a file of 5.x does not repeat there.
            if kwargs.get(name) is not None and getattr(self, name) != kwargs[name]:
                setattr(self, name, kwargs[name])

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parent's; the published SFT flavour is completed from the shapes of the checkpoint's tensors.

        That flavour calls itself a stock Qwen2.5-VL (``model_type: qwen2_5_vl``) and names no query encoder; its only
        sign in the file is ``vision_config.integration_point``.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        vision = config.get("vision_config") or {}
        if (
            config.get("model_type") == "qwen2_5_vl"
            and "text_encoder_config" not in config
            and (vision.get("integration_point") is not None)
        ):
            logger.warning(
                "%s is the SFT flavour of a ViLaVT checkpoint: AutoConfig takes it for a stock Qwen2.5-VL. It is read "
                "as a ViLaVT here; `vilavt convert` writes a checkpoint that the Auto classes and vLLM recognise",
                pretrained_model_name_or_path,
            )
            config = {**config, "model_type": cls.model_type}
            if os.path.isdir(pretrained_model_name_or_path):
                config["text_encoder_config"] = _query_encoder_of(pretrained_model_name_or_path)
        return config, unused

    def to_dict(self) -> dict[str, Any]:
        """The parent's, readable by 4.57 and 5.x alike whichever wrote it."""
        out = super().to_dict()
        # 4.57 forwards `config.architectures = ...` into text_config, so the top level would be saved without it.
        out["architectures"] = ["VilavtForConditionalGeneration"]
        if isinstance(out.get("text_config"), dict):
            out["text_config"].pop("architectures", None)
            out["tie_word_embeddings"] = self.tie_word_embeddings
        # 5.x writes rope_parameters, 4.57 reads rope_theta and rope_scaling and would silently take default thetas.
        for text in (out.get("text_config"), out.get("text_encoder_config")):
            if isinstance(text, dict) and text.get("rope_parameters"):
                scaling = {k: v for k, v in text["rope_parameters"].items() if k != "rope_theta"}
                text["rope_theta"] = text["rope_parameters"]["rope_theta"]
                text["rope_scaling"] = scaling if len(scaling) > 1 else None  # rope_type "default" alone is no scaling
        return out


def _checked_parts(parts: list[str] | tuple[str, ...]) -> list[str]:
    unknown = [part for part in parts if part not in FREEZABLE]
    if unknown or isinstance(parts, str):
        raise ValueError(f"frozen={parts!r} must list parts out of {list(FREEZABLE)}; not known: {unknown}")
    return sorted(parts)


def _query_encoder_of(folder: str | os.PathLike) -> dict[str, Any]:
    """Configuration of the query encoder inside a checkpoint folder, from the headers of its tensors."""
    tensors = query_encoder_part(Checkpoint.open(folder).require_sound().tensors)
    return derived_text_encoder_config({name: tensor.shape for name, tensor in tensors.items()})
