"""What `vilavt doctor` says about transformers: the device, the registered classes, and a checkpoint's processor."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from vilavt_core.conversation import SpecialTokens
from vilavt_core.doctor import Check, Status, guarded
from vilavt_core.results import Sample

from .chat import VilavtChat
from .configuration_vilavt import VilavtConfig
from .modeling_vilavt import VilavtForConditionalGeneration
from .processing_vilavt import VilavtProcessor


def checks(checkpoint: Path | None, load: bool) -> Iterator[Check]:
    """See `vilavt_core.doctor`."""
    yield guarded("device", _device)
    yield guarded("Auto classes", _auto_classes, "reinstall vilavt-hf")
    if checkpoint is None:
        return
    yield guarded("processor", lambda: _processor(checkpoint), f"vilavt inspect {checkpoint} says more")
    if load:
        yield guarded("weights", lambda: _load(checkpoint), f"vilavt inspect {checkpoint} says more")


def _device() -> Check:
    if torch.cuda.is_available():
        return Check("device", Status.OK, f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    return Check("device", Status.NOTE, f"torch {torch.__version__}, CPU only, {torch.get_num_threads()} threads")


def _auto_classes() -> str:
    config = AutoConfig.for_model("vilavt")
    model = AutoModelForImageTextToText._model_mapping[VilavtConfig]
    if type(config) is not VilavtConfig or model is not VilavtForConditionalGeneration:
        raise RuntimeError(f"model type vilavt leads to {type(config)} and {model}")
    return "model type vilavt is registered"


def _processor(folder: Path) -> str:
    processor = VilavtProcessor.from_pretrained(folder)
    SpecialTokens.of(processor.tokenizer)
    if processor.query_tokenizer is None:
        raise RuntimeError(f"{folder} has no query_tokenizer/: the encoder cannot be asked")
    return "loads, with its query tokenizer" + (" and its own prompts" if processor.prompts else "")


def _load(folder: Path) -> str:
    chat = VilavtChat.from_pretrained(folder)
    picture = Image.linear_gradient("L").convert("RGB")
    short = replace(chat.settings.limits, max_turns=2, max_new_tokens_per_turn=256)  # whatever it has to say
    result = chat.ask_many([Sample([picture], "What is this?", limits=short)])[0]
    if result.error is not None:
        raise result.error
    tokens = sum(turn.token_count for turn in result.turns)
    where = f"load on {chat.model.device} in {chat.model.dtype}"
    return f"{where} and answer a question, with {tokens} tokens ({result.finish})"
