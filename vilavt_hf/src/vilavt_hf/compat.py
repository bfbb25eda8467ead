"""The only module that knows versions of transformers (4.57 to 5.x) and torch: what differs, by feature, not number."""

import inspect
import os
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
import transformers
from jinja2 import meta
from transformers import processing_utils
from transformers.integrations import sdpa_attention
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.utils import chat_template_utils

from vilavt_core.errors import EngineError, ProcessorError
from vilavt_core.failures import one_line
from vilavt_core.spelling import did_you_mean

_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_ATTENTION_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn",
}

# 5.x derives M-RoPE from mm_token_type_ids; 4.57 from input_ids (and would leak the argument into the decoder layers).
TAKES_MM_TOKEN_TYPE_IDS = "mm_token_type_ids" in inspect.signature(qwen.Qwen2_5_VLModel.forward).parameters
# With it came an output of the vision tower that holds more than the features.
VISION_OUTPUT_HAS_STATES = TAKES_MM_TOKEN_TYPE_IDS
# Newer 5.x `generate` encodes images before it repeats inputs for beams; 4.57 and 5.10 repeat pixels sample by sample.
GENERATE_ENCODES_FIRST = not hasattr(qwen.Qwen2_5_VLForConditionalGeneration, "_get_image_nums_and_video_nums")

# Newer 5.x call the cache of keys and values ``cache``, and warn about the old name until it goes.
CACHE = "cache" if "cache" in inspect.signature(qwen.Qwen2_5_VLModel.forward).parameters else "past_key_values"

# Newer sdpa attention treats the query heads of one key-value head as rows of one matrix, if there is a mask.
PACKS_QUERY_HEADS = hasattr(sdpa_attention, "pack_gqa")

# What a tokenizer's call takes from a processor's.
TEXT_SETTINGS = frozenset(processing_utils.TextKwargs.__annotations__)
# Newer 5.x mark control tokens that stand in a user's text, and tokenise what is marked as text.
UNMARKED = getattr(processing_utils, "_UNMARKED", "")

# What `apply_chat_template` takes beside variables of the template and settings of the processor.
CHAT_SETTINGS = frozenset(
    {
        "add_generation_prompt",
        "continue_final_message",
        "documents",
        "load_audio_from_video",
        "return_assistant_tokens_mask",
        "return_dict",
        "tokenize",
        "tools",
    }
) | ({"sanitize_control_tokens"} & TEXT_SETTINGS)
# 5.x keeps settings of the processor apart from variables of the template; 4.57 hands each all of them.
TEMPLATE_KEEPS_SETTINGS_APART = (
    "processor_kwargs" in inspect.signature(transformers.ProcessorMixin.apply_chat_template).parameters
)
# Older ones mark other tokens than the assistant's once an image has become many tokens.
MASKS_COUNT_IMAGES = hasattr(transformers.ProcessorMixin, "_adjust_assistant_masks_indices")

# The PIL backend needs no torchvision, and gives the same pixels in every version and host.
PilImageProcessor = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor


def load_image_processor(
    path: str | os.PathLike, changes: Mapping[str, Any] = MappingProxyType({}), **kwargs: Any
) -> Any:
    """`PilImageProcessor` of a checkpoint, with some settings changed.

    4.57 ignores ``size``, and 5.x writes the pixel bounds nowhere else.
    """
    settings, unused = PilImageProcessor.get_image_processor_dict(path, **kwargs)
    size = settings.get("size") or {}
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if settings.get(name) is None and size.get(edge) is not None:
            settings[name] = size[edge]
    changes = {name: value for name, value in changes.items() if value is not None}
    bounds = changes.pop("size", {})
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if edge in bounds:
            settings[name] = bounds[edge]
    return PilImageProcessor.from_dict(settings | changes, **unused)


def template_variables(chat_template: str) -> frozenset[str]:
    """Names that a chat template looks up, its tags being those that transformers knows."""
    environment = chat_template_utils._compile_jinja_template(chat_template).environment
    return frozenset(meta.find_undeclared_variables(environment.parse(chat_template)))


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name; ``auto`` is CUDA if there is one, else the CPU.

    Raises:
        EngineError: torch knows no such device, was built without it, or this machine has none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        hint = "; did you mean 'cuda'?" if str(device).lower().startswith("gpu") else did_you_mean(device, _DEVICES)
        raise EngineError(f"there is no device {str(device)!r}, there are cpu, cuda, cuda:1, …{hint}") from None
    if found.type == "cuda":
        if not torch.cuda.is_available():
            why = "it sees no GPU" if torch.version.cuda or torch.version.hip else "it is built for the CPU alone"
            raise EngineError(f"device {device} cannot be used by the installed torch {torch.__version__}: {why}")
        if (found.index or 0) >= torch.cuda.device_count():
            raise EngineError(f"there is no device {device}, torch sees {torch.cuda.device_count()} GPUs")
    elif found.type != "cpu":
        try:
            torch.empty(1, device=found).cpu()
        except Exception as error:  # of many kinds, by device
            raise EngineError(f"device {device} cannot be used here: {one_line(error)}") from None
    return found


def input_device(model: Any) -> torch.device:
    """Where a model computes and wants its inputs; weights of a dispatched one may wait elsewhere, or on the disk."""
    hook = getattr(model, "_hf_hook", None)  # accelerate's
    for one in getattr(hook, "hooks", (hook,)):
        if (device := getattr(one, "execution_device", None)) is not None:
            return torch.device(device)
    return model.device


def usable_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """The type to load weights as, as it was given.

    Raises:
        EngineError: it is no floating-point type that weights are computed in.
    """
    if isinstance(dtype, torch.dtype) or dtype in _DTYPES:
        return dtype
    raise EngineError(
        f"weights cannot be loaded as {dtype!r}; choose {', '.join(_DTYPES)}{did_you_mean(dtype, _DTYPES)}"
    )


def require_attention(name: str | None) -> None:
    """Stop if attention of that name cannot be had; None is the library's choice.

    Raises:
        EngineError: transformers does not know it, or the package that it needs is not installed.
    """
    if name is None or "/" in name:  # a kernel of the hub, which transformers fetches
        return
    known = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    if name not in known:
        usual = [one for one in known if "|" not in one]
        raise EngineError(f"there is no attention {name!r}; choose {', '.join(usual)}{did_you_mean(name, usual)}")
    package = _ATTENTION_PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        raise EngineError(f"attention {name} needs the package {package}, which is not installed; sdpa needs none")


def vision_output(
    last_hidden_state: torch.Tensor | None, merged: Any, hidden_states: tuple[torch.Tensor, ...] | None = None
) -> Any:
    """What the stock tower and `get_image_features` return: a ModelOutput on 5.x, the bare value on 4.57."""
    if not VISION_OUTPUT_HAS_STATES:
        return merged
    return BaseModelOutputWithPooling(
        last_hidden_state=last_hidden_state, pooler_output=merged, hidden_states=hidden_states
    )


def pooled(output: Any) -> Any:
    """Inverse of `vision_output`: the merged features of a tower or `get_image_features` output."""
    return output.pooler_output if hasattr(output, "pooler_output") else output


def cache_argument(past_key_values: Any, cache: Any) -> dict[str, Any]:
    """A cache, given under either name, as the installed transformers takes it.

    Raises:
        ProcessorError: there are two.
    """
    if past_key_values is not None and cache is not None:
        raise ProcessorError("there are two caches: past_key_values and cache are one argument; pass one of them")
    return {CACHE: past_key_values if cache is None else cache}


def register_key_names(class_name: str, renames: dict[str, str]) -> None:
    """Make 5.x load and save `class_name` through `renames`; 4.57 reads `_checkpoint_conversion_mapping` instead."""
    try:
        from transformers.conversion_mapping import register_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return
    register_checkpoint_conversion_mapping(
        class_name, [WeightRenaming(old, new) for old, new in renames.items()], overwrite=True
    )


def register_multimodal(config_class: Any, model_class: type) -> None:
    """Let 5.x find the class as a multimodal language model too: ``AutoModelForMultimodalLM``, ``transformers serve``.

    The server goes by the table of names, which `register` does not extend. 4.57 has neither.
    """
    auto = getattr(transformers, "AutoModelForMultimodalLM", None)
    if auto is None:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    auto.register(config_class, model_class, exist_ok=True)
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__


def save_under(model: Any, renames: dict[str, str]) -> None:
    """Make 5.x save this model through the reverse of `renames` alone.

    Loaded under ZeRO-3 it also remembers renames of old checkpoints, and would undo those as well.
    """
    if getattr(model, "_weight_conversions", None) is not None:
        from transformers.core_model_loading import WeightRenaming

        model._weight_conversions = [WeightRenaming(old, new) for old, new in renames.items()]


def rope_index(base: Any, input_ids: torch.Tensor, image_grid_thw: torch.Tensor | None) -> torch.Tensor:
    """Stock M-RoPE positions (3, L) of one unpadded stretch of tokens (L,) that starts at position 0.

    `base` is the `VilavtModel`; only its configuration is read. 5.x wants the token types and a keyword, 4.57 finds
    images by their tokens.
    """
    ids = input_ids[None]
    if not TAKES_MM_TOKEN_TYPE_IDS:
        return base.get_rope_index(ids, image_grid_thw)[0][:, 0]
    types = (ids == base.config.image_token_id).int()
    return base.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=image_grid_thw)[0][:, 0]


def decoder_mask(base: Any, mask: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """What to pass as ``attention_mask`` with L new embeddings (B, L, C) and the mask (B, S + L) of real slots.

    The 2-D mask is always right. With sdpa on a CPU the finished additive mask (B, 1, L, S + L) is faster: torch makes
    one of a boolean mask in every layer; and newer transformers read the keys once for all query heads of a group if
    there is a mask, else once for each.
    """
    text = base.config.text_config
    rows, new = embeds.shape[:2]
    total = mask.shape[1]
    if embeds.device.type != "cpu" or text._attn_implementation != "sdpa":
        return mask
    whole = bool(mask.all())
    if whole and (new == total or (new == 1 and not PACKS_QUERY_HEADS)):
        return mask  # no mask is needed, and transformers sees that
    visible = mask[:, None, None].bool()
    if new > 1:
        slots = torch.arange(total)
        visible = visible & (slots <= slots[-new:, None])
    hidden = torch.finfo(embeds.dtype).min  # not -inf: a padding slot sees nothing at all
    return torch.zeros(rows, 1, new, total, dtype=embeds.dtype).masked_fill(~visible, hidden)


def varlen_kernel(query: torch.Tensor) -> Any:
    """Torch's variable-length flash attention if it can take `query` and knows grouped heads and windows, else None."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa"} <= known.keys() else None


def training_arguments(
    *,
    warmup: float,
    recompute: bool,
    fsdp: dict[str, Any] | None = None,
    **kwargs: Any,
) -> "transformers.TrainingArguments":
    """``TrainingArguments``; only training needs transformers' trainer, which loads peft too.

    Args:
        warmup: steps, or below 1 a fraction of all steps.
        recompute: activations in the backward pass, without re-entrant autograd.
        fsdp: settings of FSDP2, None for no FSDP.
        kwargs: arguments that have one name in all versions.
    """
    # Newer 5.x: another name for recomputing activations; all 5.x: one warm-up in steps or as a fraction.
    known = transformers.TrainingArguments.__dataclass_fields__
    two_warmups = "warmup_ratio" in known
    kwargs["warmup_ratio" if two_warmups and warmup < 1 else "warmup_steps"] = int(warmup) if warmup >= 1 else warmup
    if recompute and fsdp is None:
        name = "activation" if "activation_checkpointing" in known else "gradient"
        kwargs |= {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
    if fsdp is not None:
        kwargs["fsdp_config"] = {**fsdp, "activation_checkpointing": recompute}
        kwargs["fsdp"] = "full_shard auto_wrap" if two_warmups else True
        if two_warmups:  # 4.57 leaves these to a launcher's environment; without them it shards as FSDP1
            keys = ("version", "reshard_after_forward", "state_dict_type")
            os.environ.update({f"FSDP_{key.upper()}": str(fsdp[key]) for key in keys if key in fsdp})
    return transformers.TrainingArguments(**kwargs)
