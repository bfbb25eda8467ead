"""A tiny model family, built in the test process: no downloads, fp32, seeded."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration, VilavtProcessor, compat

GOLDEN = Path(__file__).parent.parent / "golden"
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> SimpleNamespace:
    """Where the golden vectors are, and their manifest."""
    return SimpleNamespace(
        root=GOLDEN,
        checkpoint=GOLDEN / "ckpt" / "tiny_late",
        sharded=GOLDEN / "ckpt" / "tiny_late_sharded",
        configs=GOLDEN / "ckpt" / "configs",
        manifest=json.loads((GOLDEN / "out" / "manifest.json").read_text()),
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then Qwen's special tokens: 263 tokens, reversible for any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
            "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Qwen's special tokens."""
    return byte_tokenizer()


def tiny_config(tokenizer: PreTrainedTokenizerFast, **vision) -> VilavtConfig:
    """LLM 64 x 2 layers, tower 64 x 4 blocks (late), query encoder 32 x 2 layers, sized for `tokenizer`."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    size = len(tokenizer)
    return VilavtConfig(
        text_config={
            "vocab_size": size,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "integration_point": "late",
            **vision,
        },
        text_encoder_config={
            "vocab_size": size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def build_tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **vision) -> VilavtForConditionalGeneration:
    """A seeded random model in eval mode whose weights are scaled up so that attention is peaked and errors show."""
    torch.manual_seed(seed)
    model = VilavtForConditionalGeneration(tiny_config(tokenizer, **vision)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * fan_in**-0.5)
            elif parameter.abs().sum() == 0:  # biases
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="session")
def build_model(tokenizer):
    """Builds further members of the family: `build_model(seed=0, **vision_config)`."""
    return partial(build_tiny_model, tokenizer)


@pytest.fixture(scope="session")
def tiny_model(tokenizer) -> VilavtForConditionalGeneration:
    """Shared and therefore never modified by a test."""
    return build_tiny_model(tokenizer)


@pytest.fixture(scope="session")
def processor(tokenizer) -> VilavtProcessor:
    """A processor without prompts whose query tokenizer is the tokenizer itself."""
    image_processor = compat.PilImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 256)
    return VilavtProcessor(image_processor, tokenizer, query_tokenizer=tokenizer)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_model, processor) -> Path:
    """A complete checkpoint folder of `tiny_model`."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Makes ``someone/vilavt`` a hub id of a checkpoint, on a machine without a network; returns the hub's cache."""

    def fill(checkpoint: Path) -> Path:
        repository = tmp_path / "hub" / "models--someone--vilavt"
        snapshot = repository / "snapshots" / ("0" * 40)
        shutil.copytree(checkpoint, repository / "blobs")
        for blob in (p for p in (repository / "blobs").rglob("*") if p.is_file()):
            link = snapshot / blob.relative_to(repository / "blobs")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)  # as the hub's client lays them out
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return tmp_path / "hub"

    return fill
