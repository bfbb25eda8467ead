"""``config.json`` from one flavour to the other, on plain dicts: the same result on every transformers version."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from ..architecture import is_tied, query_encoder_tensors
from ..errors import CheckpointError
from .layout import CONFIG, read_json

ARCHITECTURE = "VilavtForConditionalGeneration"
"""What our model class writes. The published class name is accepted wherever ours is."""
PUBLISHED_ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration_Vilavt"

QWEN3_EMBEDDING_SIZES: dict[str, int] = {
    "vocab_size": 151669,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
"""Of Qwen3-Embedding-0.6B, the published query encoder."""
QWEN3_EMBEDDING_CONSTANTS: dict[str, Any] = {
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
"""What shapes cannot tell: Qwen3-Embedding's values, used when the checkpoint names no query encoder configuration."""

_TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "rope_theta",
    "rope_scaling", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "attention_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_SAFETENSORS_TO_TORCH = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def vilavt_config(
    config: Mapping[str, Any],
    text_encoder: Mapping[str, Any],
    *,
    integration_point: str | None = None,
    fullatt_block_indexes: list[int] | None = None,
    architecture: str = ARCHITECTURE,
) -> dict[str, Any]:
    """The RL/vLLM flavour of a configuration: ``model_type: vilavt`` with ``text_encoder_config``.

    Everything else is kept. ``embedding_model_path`` is dropped: the query encoder is in the checkpoint and is never
    fetched. Text settings are written nested *and*, if they were, flat, as published files have them; RoPE settings in
    the form that transformers 4.57 reads and 5.x accepts. That an LM head is tied to the embedding is said in both
    places, of which either version reads one.

    Args:
        config: either flavour, or a stock Qwen2.5-VL's; not modified.
        text_encoder: the query encoder's configuration.
        integration_point: replaces ``vision_config.integration_point``.
        fullatt_block_indexes: replaces ``vision_config.fullatt_block_indexes``.
        architecture: the class name to write.
    """
    out = {key: deepcopy(value) for key, value in config.items() if key != "embedding_model_path"}
    out["model_type"] = "vilavt"
    out["architectures"] = [architecture]
    out.setdefault("integration_point", None)  # published files carry it, unused; the live one is in vision_config
    if not out.get("text_config"):
        text = {key: deepcopy(out[key]) for key in _TEXT_KEYS if key in out}
        out["text_config"] = {"model_type": "qwen2_5_vl_text", **text}
    out["text_config"]["architectures"] = [architecture]
    tied = is_tied(config)
    for section in (out, out["text_config"]):  # 4.57 reads the nested one, 5.x the other
        if tied or "tie_word_embeddings" in section:
            section["tie_word_embeddings"] = tied
    out["text_encoder_config"] = deepcopy(dict(text_encoder))
    for section in (out, out["text_config"], out["text_encoder_config"]):
        _write_rope_for_both_versions(section)
    if integration_point is not None:
        out["vision_config"]["integration_point"] = integration_point
    if fullatt_block_indexes is not None:
        out["vision_config"]["fullatt_block_indexes"] = fullatt_block_indexes
    return dict(sorted(out.items()))


def _write_rope_for_both_versions(section: dict[str, Any]) -> None:
    parameters = section.pop("rope_parameters", None)
    if parameters:  # the form of 5.x, which 4.57 does not read
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        section.setdefault("rope_theta", parameters.get("rope_theta"))
        section.setdefault("rope_scaling", scaling if len(scaling) > 1 else None)  # "default" alone is no scaling


def derived_text_encoder_config(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> dict[str, Any]:
    """A Qwen3 configuration from the shapes of a query encoder's tensors (names without ``text_encoder.``).

    Hidden size, vocabulary, layers, heads, key/value heads, head size, MLP size and biases follow from the shapes;
    the rest is `QWEN3_EMBEDDING_CONSTANTS`.

    Raises:
        CheckpointError: tensors that are needed to tell are missing.
    """
    try:
        vocab, hidden = shapes["embed_tokens.weight"]
        (head,) = shapes["layers.0.self_attn.q_norm.weight"]
        query, key = shapes["layers.0.self_attn.q_proj.weight"][0], shapes["layers.0.self_attn.k_proj.weight"][0]
        inner = shapes["layers.0.mlp.gate_proj.weight"][0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"the query encoder's sizes cannot be read off its tensors ({error}); pass --query-encoder with its folder"
        ) from error
    layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers."))
    constants = dict(QWEN3_EMBEDDING_CONSTANTS)
    for token in ("bos_token_id", "eos_token_id"):
        if constants[token] >= vocab:
            constants[token] = None
    return {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        **constants,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": query // head,
        "num_key_value_heads": key // head,
        "head_dim": head,
        "attention_bias": "layers.0.self_attn.q_proj.bias" in shapes,
        "dtype": _SAFETENSORS_TO_TORCH.get(dtype, "float32"),
        "layer_types": ["full_attention"] * layers,
        "max_window_layers": layers,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
    }


def query_encoder_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a Qwen3 query encoder, completed with the sizes that old files leave to defaults.

    Raises:
        CheckpointError: no ``config.json``, or not a Qwen3 model's.
    """
    config = read_json(folder / CONFIG)
    if config.get("model_type") != "qwen3":
        raise CheckpointError(
            f"{folder / CONFIG} has model_type {config.get('model_type')!r}, a query encoder is a Qwen3 model ('qwen3')"
        )
    if isinstance(config.get("text_encoder_config"), dict):
        raise CheckpointError(f"{folder} is a ViLaVT checkpoint, not a query encoder")
    return {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}


def check_query_encoder(encoder: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Compare a query encoder's configuration with the shapes of its tensors (names without ``text_encoder.``).

    Raises:
        CheckpointError: naming the first tensor that is missing or has another shape.
    """
    for name, shape in query_encoder_tensors(encoder).items():
        if name not in shapes:
            raise CheckpointError(
                f"{origin} calls for the query encoder tensor {name} {list(shape)}, which is not there"
            )
        if tuple(shapes[name]) != shape:
            raise CheckpointError(
                f"{origin} calls for {name} with shape {list(shape)}, the checkpoint has {list(shapes[name])}; "
                "it is the configuration of another query encoder"
            )


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Make a configuration, and its parts, ask for a type (``bfloat16``); in place."""
    for section in (config, config.get("text_config"), config.get("text_encoder_config"), config.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(section, dict) and key in section:
                section[key] = dtype
    if "torch_dtype" not in config:
        config["dtype"] = dtype
