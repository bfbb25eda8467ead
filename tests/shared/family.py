"""What tests of all packages are made of: a tiny random model family, its tokenizer, pictures. fp32, seeded."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


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


def tiny_config(tokenizer: PreTrainedTokenizerFast, *, hidden: int = 64, **vision) -> VilavtConfig:
    """LLM `hidden` x 2 layers (4 heads), tower 64 x 4 blocks (late), query encoder 32 x 2, sized for `tokenizer`."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    size = len(tokenizer)
    sections = [hidden // 32, 3 * hidden // 64, 3 * hidden // 64]  # half of the head's 16 or 32
    return VilavtConfig(
        text_config={
            "vocab_size": size,
            "hidden_size": hidden,
            "intermediate_size": hidden * 3 // 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "mrope",
                "rope_type": "default",
                "mrope_section": sections,
            },
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
            "out_hidden_size": hidden,
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
            "rope_theta": 1_000_000.0,  # what a checkpoint without settings of its query encoder is read with
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def build_tiny_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, *, hidden: int = 64, **vision
) -> VilavtForConditionalGeneration:
    """A seeded random model in eval mode whose weights are scaled up so that attention is peaked and errors show."""
    torch.manual_seed(seed)
    model = VilavtForConditionalGeneration(tiny_config(tokenizer, hidden=hidden, **vision)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * fan_in**-0.5)
            elif parameter.abs().sum() == 0:  # biases
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours with a grain, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, dtype=np.int64) + grain, 0, 255).astype(np.uint8))


def noise(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    """Every pixel another colour."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def tiles(seed: int, width: int, height: int) -> Image.Image:
    """One colour per token: 28 x 28 pixels each."""
    return noise(seed, width // 28, height // 28).resize((width, height), Image.Resampling.NEAREST)
