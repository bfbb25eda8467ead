"""What the model is made of: its parts, its query-aware vision blocks, and the names and shapes of its tensors.

A tensor has a *published* name in checkpoint files, a *module* name in `vilavt_hf.VilavtForConditionalGeneration`, and
a vLLM name in `vilavt_vllm`. Names in this package are published ones unless something else is said.

Shapes are a table here, although a model on the meta device has them too: `vilavt inspect`, `convert` and `init` need
them and load neither torch nor transformers. ``tests/hf/test_architecture.py`` holds the table equal to such a model.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args

from .errors import CheckpointError
from .failures import quoted

T = TypeVar("T")

# ---------------------------------------------------------------------- query-aware blocks

IntegrationPoint = Literal["all", "early", "late", "late2", "late3", "sparse", "none"]
"""Which vision blocks are query-aware, of ``depth``: ``all``; ``early``, the first half; ``late``, the second half;
``late2``, the last quarter; ``late3``, the last three quarters; ``sparse``, those of ``fullatt_block_indexes``;
``none``, which a configuration may also write as null."""
INTEGRATION_POINTS: tuple[IntegrationPoint, ...] = get_args(IntegrationPoint)


def query_aware_blocks(vision: Mapping[str, Any]) -> frozenset[int]:
    """Indices of the blocks that attend jointly over a group and its query, from a ``vision_config``.

    Raises:
        CheckpointError: ``integration_point`` is not one of `INTEGRATION_POINTS`, or ``depth`` is missing.
    """
    depth, point = _size(vision, "vision_config", "depth"), vision.get("integration_point")
    spans: dict[IntegrationPoint | None, Iterable[int]] = {
        "all": range(depth),
        "early": range(depth // 2),
        "late": range(depth // 2, depth),
        "late2": range(3 * depth // 4, depth),
        "late3": range(depth // 4, depth),
        "sparse": vision.get("fullatt_block_indexes") or (),
        "none": (),
        None: (),
    }
    if point not in spans:
        raise CheckpointError(
            f"vision_config.integration_point={point!r}, expected one of {list(INTEGRATION_POINTS)} or null"
        )
    return frozenset(spans[point])


def integration_points_of(blocks: Iterable[int], vision: Mapping[str, Any]) -> list[IntegrationPoint]:
    """The integration points that make exactly these blocks query-aware; several can coincide."""
    wanted = frozenset(blocks)
    points = (point for point in INTEGRATION_POINTS if point != "none")
    return [point for point in points if query_aware_blocks({**vision, "integration_point": point}) == wanted]


def stored_query_blocks(names: Iterable[str]) -> frozenset[int]:
    """Indices of the vision blocks for which `names` holds query projections."""
    found = (re.match(r"visual\.blocks\.(\d+)\.attn\.instruct_(key|value)_proj\.", name) for name in names)
    return frozenset(int(match[1]) for match in found if match)


# ---------------------------------------------------------------------- parts

Part = Literal["vision_tower", "merger", "text_encoder", "text_proj", "language_model", "lm_head"]
"""What can be frozen, trained, or given a learning rate of its own; ``vision_tower`` is the tower without its merger,
query projections included."""
PARTS: tuple[Part, ...] = get_args(Part)

FREEZABLE: dict[str, tuple[Part, ...]] = {
    "vision_tower": ("vision_tower", "merger"),
    "text_encoder": ("text_encoder",),
    "text_proj": ("text_proj",),
    "language_model": ("language_model", "lm_head"),
}
"""What ``VilavtConfig.frozen`` may list -> its parts. RL trainers freeze whole modules, as the published one does."""

_MARKS: tuple[tuple[str, Part], ...] = (
    ("visual.merger.", "merger"),
    ("visual.", "vision_tower"),
    ("text_encoder.", "text_encoder"),
    ("text_proj.", "text_proj"),
    ("lm_head.", "lm_head"),
    ("language_model.", "language_model"),
    # the published names of the language model
    ("model.embed_tokens.", "language_model"),
    ("model.layers.", "language_model"),
    ("model.norm.", "language_model"),
)


def find_part(parameter: str) -> Part | None:
    """The part that a parameter belongs to, if any, by its name in a file, in the model or in any wrapper of it."""
    return next((part for mark, part in _MARKS if parameter.startswith(mark) or f".{mark}" in parameter), None)


def part_of(parameter: str) -> Part:
    """`find_part`, of a parameter that must belong to one.

    Raises:
        ValueError: it belongs to none.
    """
    if (part := find_part(parameter)) is None:
        raise ValueError(f"{parameter} belongs to none of {PARTS}")
    return part


def counted_part(name: str) -> str:
    """Under what `vilavt inspect` counts a tensor: its part, ``query_projections`` apart, or ``other``."""
    return "query_projections" if is_query_projection(name) else find_part(name) or "other"


# ---------------------------------------------------------------------- names

# (published, module, vLLM); a name belongs to the first row whose prefix it has.
_PREFIXES = (
    ("visual.", "model.visual.", "visual."),
    ("text_encoder.", "model.text_encoder.", "text_encoder."),
    ("text_proj.", "model.text_proj.", "text_proj."),
    ("lm_head.", "lm_head.", "language_model.lm_head."),
    ("model.", "model.language_model.", "language_model.model."),
)
_QUERY_ENCODER = "text_encoder."

MODULE_NAMES = {
    f"^{published[:-1]}": module[:-1]
    for published, module, _ in _PREFIXES
    if published not in (module, "model.")
} | {r"^model(?!\.(language_model|visual|text_encoder|text_proj))": "model.language_model"}  # fmt: skip
"""Pattern of a published name -> replacement that makes it the module's, in the form that transformers applies when it
loads, and reverses when it saves."""

VLLM_PREFIXES = {module: vllm for _, module, vllm in _PREFIXES if module != vllm} | {
    published: vllm for published, _, vllm in _PREFIXES if published != vllm
}
"""Prefix of a module or published name -> vLLM's; they apply in this order."""

VLLM_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layer of vLLM's language model -> the layers of a checkpoint that it holds as one."""


def published_name(name: str) -> str:
    """The published name of a published or module name (``model.visual.x`` -> ``visual.x``)."""
    for published, module, _ in _PREFIXES:
        if name.startswith(module):
            return published + name[len(module) :]
    return name


def module_name(name: str) -> str:
    """The module name of a published or module name (``visual.x`` -> ``model.visual.x``)."""
    if any(name.startswith(module) for _, module, _ in _PREFIXES):
        return name
    for published, module, _ in _PREFIXES:
        if name.startswith(published):
            return module + name[len(published) :]
    return name


def vllm_name(name: str) -> str:
    """The vLLM name of a published one, before layers are fused (``lm_head.x`` -> ``language_model.lm_head.x``)."""
    for published, _, vllm in _PREFIXES:
        if name.startswith(published):
            return vllm + name[len(published) :]
    return name


def names_of_vllm(parameter: str) -> set[str]:
    """The published names of the tensors that one parameter of vLLM's model holds."""
    for published, _, vllm in _PREFIXES:
        if parameter.startswith(vllm):
            parameter = published + parameter[len(vllm) :]
            break
    fused = next((layer for layer in VLLM_FUSED if f".{layer}." in parameter), None)
    return {parameter} if fused is None else {parameter.replace(fused, layer) for layer in VLLM_FUSED[fused]}


def is_query_projection(name: str) -> bool:
    """Whether a tensor projects query tokens to keys or values of a query-aware block."""
    return ".instruct_key_proj." in name or ".instruct_value_proj." in name


def is_new(name: str) -> bool:
    """Whether neither a Qwen2.5-VL nor a query encoder has this tensor: a query projection, or ``text_proj``."""
    return is_query_projection(name) or name.startswith("text_proj.")


def is_added(name: str) -> bool:
    """Whether a Qwen2.5-VL lacks this tensor."""
    return is_new(name) or name.startswith(_QUERY_ENCODER)


def query_encoder_part(tensors: Mapping[str, T]) -> dict[str, T]:
    """Those of the query encoder, by the names that they have in its own checkpoint."""
    return {n.removeprefix(_QUERY_ENCODER): t for n, t in tensors.items() if n.startswith(_QUERY_ENCODER)}


def as_query_encoder_part(tensors: Mapping[str, T]) -> dict[str, T]:
    """Inverse of `query_encoder_part`."""
    return {f"{_QUERY_ENCODER}{name}": tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------------- shapes

Shape = tuple[int, ...]

_LANGUAGE_MODEL = {
    "model.embed_tokens.weight": "vocab hidden",
    "model.norm.weight": "hidden",
    "lm_head.weight": "vocab hidden",
}
_LAYER = {
    "self_attn.q_proj.weight": "query hidden",
    "self_attn.k_proj.weight": "key hidden",
    "self_attn.v_proj.weight": "key hidden",
    "self_attn.o_proj.weight": "hidden query",
    "mlp.gate_proj.weight": "inner hidden",
    "mlp.up_proj.weight": "inner hidden",
    "mlp.down_proj.weight": "hidden inner",
    "input_layernorm.weight": "hidden",
    "post_attention_layernorm.weight": "hidden",
}
"""Of Qwen2.5 and Qwen3 alike."""
_BIASES = {"self_attn.q_proj.bias": "query", "self_attn.k_proj.bias": "key", "self_attn.v_proj.bias": "key"}
_QUERY_ENCODER_MODEL = {"embed_tokens.weight": "vocab hidden", "norm.weight": "hidden"}
_HEAD_NORMS = {"self_attn.q_norm.weight": "head", "self_attn.k_norm.weight": "head"}
_VISION_TOWER = {
    "visual.patch_embed.proj.weight": "hidden channels frames patch patch",
    "visual.merger.ln_q.weight": "hidden",
    "visual.merger.mlp.0.weight": "merged merged",
    "visual.merger.mlp.0.bias": "merged",
    "visual.merger.mlp.2.weight": "out merged",
    "visual.merger.mlp.2.bias": "out",
}
_BLOCK = {
    "norm1.weight": "hidden",
    "norm2.weight": "hidden",
    "attn.qkv.weight": "qkv hidden",
    "attn.qkv.bias": "qkv",
    "attn.proj.weight": "hidden hidden",
    "attn.proj.bias": "hidden",
    "mlp.gate_proj.weight": "inner hidden",
    "mlp.gate_proj.bias": "inner",
    "mlp.up_proj.weight": "inner hidden",
    "mlp.up_proj.bias": "inner",
    "mlp.down_proj.weight": "hidden inner",
    "mlp.down_proj.bias": "hidden",
}
_QUERY_PROJECTIONS = {
    "attn.instruct_key_proj.weight": "hidden hidden",
    "attn.instruct_key_proj.bias": "hidden",
    "attn.instruct_value_proj.weight": "hidden hidden",
    "attn.instruct_value_proj.bias": "hidden",
}


def expected_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Name -> shape of every tensor that a ViLaVT with this ``config.json`` has, an LM head that is tied included.

    Without ``text_encoder_config`` the query encoder's tensors and ``text_proj`` are left out.

    Raises:
        CheckpointError: the configuration lacks a size, or names an unknown integration point.
    """
    vision, encoder = config.get("vision_config") or {}, config.get("text_encoder_config")
    tensors = _language_model(config) | _vision_tower(vision)
    if encoder:
        hidden = _size(vision, "vision_config", "hidden_size")
        tensors |= as_query_encoder_part(query_encoder_tensors(encoder)) | {
            "text_proj.weight": (hidden, _size(encoder, "text_encoder_config", "hidden_size")),
            "text_proj.bias": (hidden,),
        }
    return tensors


def query_encoder_tensors(encoder: Mapping[str, Any]) -> dict[str, Shape]:
    """Name in its own checkpoint -> shape of every tensor of a Qwen3 model.

    Raises:
        CheckpointError: the configuration lacks a size.
    """
    sizes = _decoder_sizes(encoder, "text_encoder_config")
    layer = _LAYER | _HEAD_NORMS
    if encoder.get("attention_bias"):
        layer |= _BIASES | {"self_attn.o_proj.bias": "hidden"}
    tensors = _shapes(_QUERY_ENCODER_MODEL, sizes)
    for i in range(_size(encoder, "text_encoder_config", "num_hidden_layers")):
        tensors |= _shapes(layer, sizes, f"layers.{i}.")
    return tensors


def text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's settings: nested since transformers 4.52, at the top level before."""
    return config.get("text_config") or config


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the LM head shares the embedding's weight and may therefore be absent."""
    return bool(config.get("tie_word_embeddings", text_fields(config).get("tie_word_embeddings", False)))


def _language_model(config: Mapping[str, Any]) -> dict[str, Shape]:
    text = text_fields(config)
    sizes = _decoder_sizes(text, "text_config")
    tensors = _shapes(_LANGUAGE_MODEL, sizes)
    for i in range(_size(text, "text_config", "num_hidden_layers")):
        tensors |= _shapes(_LAYER | _BIASES, sizes, f"model.layers.{i}.")
    return tensors


def _vision_tower(vision: Mapping[str, Any]) -> dict[str, Shape]:
    def size(key: str, default: int | None = None) -> int:
        return _size(vision, "vision_config", key, default)

    hidden = size("hidden_size")
    sizes = {
        "hidden": hidden,
        "qkv": 3 * hidden,
        "inner": size("intermediate_size"),
        "merged": hidden * size("spatial_merge_size", 2) ** 2,
        "out": size("out_hidden_size"),
        "channels": size("in_channels", vision.get("in_chans") or 3),
        "frames": size("temporal_patch_size", 2),
        "patch": size("patch_size", 14),
    }
    tensors, joint = _shapes(_VISION_TOWER, sizes), query_aware_blocks(vision)
    for i in range(size("depth")):
        tensors |= _shapes(_BLOCK | (_QUERY_PROJECTIONS if i in joint else {}), sizes, f"visual.blocks.{i}.")
    return tensors


def _decoder_sizes(section: Mapping[str, Any], title: str) -> dict[str, int]:
    hidden, heads = _size(section, title, "hidden_size"), _size(section, title, "num_attention_heads")
    head = _size(section, title, "head_dim", hidden // heads)
    return {
        "vocab": _size(section, title, "vocab_size"),
        "hidden": hidden,
        "inner": _size(section, title, "intermediate_size"),
        "query": heads * head,
        "key": _size(section, title, "num_key_value_heads") * head,
        "head": head,
    }


def _shapes(table: Mapping[str, str], sizes: Mapping[str, int], prefix: str = "") -> dict[str, Shape]:
    return {f"{prefix}{name}": tuple(sizes[size] for size in shape.split()) for name, shape in table.items()}


_COUNTED, _MOST_LAYERS = ("num_hidden_layers", "depth"), 10_000
"""Sizes that are counted up to: each layer has tensors to be listed."""


def _size(section: Mapping[str, Any], title: str, key: str, default: int | None = None) -> int:
    value = section.get(key)
    value = default if value is None else value
    if type(value) is not int or value <= 0:
        raise CheckpointError(f"config.json: {title}.{key} is {quoted(repr(value))}, expected a positive whole number")
    if key in _COUNTED and value > _MOST_LAYERS:
        raise CheckpointError(f"config.json: {title}.{key} is {value}, at most {_MOST_LAYERS} layers are read")
    return value
