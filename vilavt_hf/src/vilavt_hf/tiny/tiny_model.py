"""The tiny model: sizes, initialisation, processor, and a fast image path for training."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen3Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

from vilavt_core.data.example import ImageGroup
from vilavt_core.prompts import PromptSet

from .. import compat
from ..configuration_vilavt import VilavtConfig, VilavtVisionConfig
from ..modeling_vilavt import VilavtForConditionalGeneration
from ..processing_vilavt import VilavtProcessor
from ..train.training_model import VilavtForTraining
from .heads import AuxiliaryHead, AuxiliaryLosses
from .scenes import CELLS, COLOURS, MAX_PIXELS
from .teacher import corpus
from .tokenizer import train_tokenizer, wrap_tokenizer

WIDTH, LAYERS = 192, 4
VISION_WIDTH, VISION_DEPTH = 128, 6
FIRST_JOINT = VISION_DEPTH // 2
"""The first vision block that attends jointly."""
QUERY_WIDTH, QUERY_LAYERS = 128, 2
ATTENTION = {"text_config": "eager", "vision_config": "sdpa", "text_encoder_config": "sdpa"}
"""Training needs the language model's attention weights, only eager attention returns them."""
Model = TypeVar("Model", bound=VilavtForTraining)
HEAD = 32
"""Head size everywhere: the smallest that serving engines' CPU attention accepts."""


def tiny_processor() -> VilavtProcessor:
    """Tokenizers trained on the fly (the same every time), the ``tiny`` prompts, images of at most `MAX_PIXELS`."""
    prompts = PromptSet.load("tiny")
    tokenizer = train_tokenizer(corpus(prompts))
    image_processor = compat.PilImageProcessor(
        min_pixels=3136, max_pixels=MAX_PIXELS, patch_size=14, temporal_patch_size=2, merge_size=2
    )
    return VilavtProcessor(image_processor, wrap_tokenizer(tokenizer), wrap_tokenizer(tokenizer, query=True), prompts)


def tiny_config(tokenizer: PreTrainedTokenizerBase) -> VilavtConfig:
    """About four million parameters in the structure of Qwen2.5-VL."""
    vocabulary = tokenizer.get_vocab()
    size = -(-len(tokenizer) // 16) * 16
    ids = {
        name: vocabulary[f"<|{name}|>"]
        for name in ("endoftext", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    }
    text = Qwen2_5_VLTextConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=528,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // HEAD,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_scaling={"rope_type": "default", "type": "default", "mrope_section": [4, 6, 6]},
        bos_token_id=None,
        eos_token_id=ids["im_end"],
        pad_token_id=ids["endoftext"],
        use_sliding_window=False,
    )
    vision = VilavtVisionConfig(
        depth=VISION_DEPTH,
        hidden_size=VISION_WIDTH,
        intermediate_size=352,
        num_heads=VISION_WIDTH // HEAD,
        out_hidden_size=WIDTH,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[2],
        integration_point="late",
    )
    query = Qwen3Config(
        vocab_size=size,
        hidden_size=QUERY_WIDTH,
        intermediate_size=3 * QUERY_WIDTH,
        num_hidden_layers=QUERY_LAYERS,
        num_attention_heads=QUERY_WIDTH // HEAD,
        num_key_value_heads=2,
        head_dim=HEAD,
        max_position_embeddings=512,
        rope_theta=10000.0,
        bos_token_id=None,
        eos_token_id=ids["endoftext"],
        pad_token_id=ids["endoftext"],
        tie_word_embeddings=True,
    )
    return VilavtConfig(
        text_config=text.to_dict(),
        vision_config=vision,
        text_encoder_config=query,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        eos_token_id=ids["im_end"],
        pad_token_id=ids["endoftext"],
        tie_word_embeddings=False,
    )


def tiny_model(config: VilavtConfig, seed: int, model_class: type[Model] = VilavtForTraining) -> Model:
    """Weights N(0, 1 / fan-in), embeddings N(0, 0.05²): with the usual 0.02 so small a model hardly learns."""
    torch.manual_seed(seed)
    model: Model = model_class._from_config(config, attn_implementation=ATTENTION)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
        elif isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in model.model.visual.blocks:
        # a random attention output would bury the fine print in the mean of its surroundings
        block.attn.proj.weight.data.mul_(0.2)
    return model.float()


def tiny_auxiliary() -> AuxiliaryLosses:
    """The training-only heads: place and colours per token, digit per token (early), the asked card, the ink of
    plates where the joint blocks begin."""
    heads = [
        AuxiliaryHead("row", "tokens", CELLS, 0.1),
        AuxiliaryHead("column", "tokens", CELLS, 0.1),
        AuxiliaryHead("colour", "labels", len(COLOURS), 0.5),
        AuxiliaryHead("digit_seen", "tokens", 10, 1.5, block=VISION_DEPTH // 2 - 1),
        AuxiliaryHead("digit", "image", 10, 1.2),
        AuxiliaryHead("asked", "pointer", 4, 0.2),
        AuxiliaryHead("corner", "tokens", 4, 0.2),
        AuxiliaryHead("ink", "labels", 16, 3.0, block=FIRST_JOINT, positive_weight=1.0, single=True),
    ]
    return AuxiliaryLosses(heads, merged=WIDTH, patch=VISION_WIDTH, partner_block=FIRST_JOINT)


def fast_encoder(processor: VilavtProcessor) -> Callable[[Sequence[ImageGroup]], dict[str, torch.Tensor]]:
    """`VilavtProcessor.encode_inquiries` without the image processor's per-image cost; a test shows them equal."""
    images = processor.image_processor
    mean, std = np.array(images.image_mean, np.float32), np.array(images.image_std, np.float32)
    scale, shift = 1 / (255 * std), mean / std
    patch, merge = images.patch_size, images.merge_size

    @functools.lru_cache(maxsize=1024)
    def query_row(query: str) -> tuple[int, ...]:
        ids, mask = processor.tokenize_queries([query], padding="longest")
        return tuple(ids[0][mask[0].bool()].tolist())

    def encode(groups: Sequence[ImageGroup]) -> dict[str, torch.Tensor]:
        pixels, grids = [], []
        for group in groups:
            for image in group.images:
                a = np.asarray(image, np.float32) * scale - shift
                h, w = a.shape[0] // patch, a.shape[1] // patch
                p = a.reshape(h // merge, merge, patch, w // merge, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
                pixels.append(p.reshape(h * w, 3, 1, patch * patch))
                grids.append((1, h, w))
        flat = np.concatenate(pixels)
        rows = [query_row(g.query) if g.query else () for g in groups]
        width = max(1, *map(len, rows)) if len(rows) > 1 else max(1, len(rows[0]))
        end = processor.query_tokenizer.pad_token_id  # type: ignore[union-attr]
        ids, mask = torch.full((len(rows), width), end), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        return {
            "pixel_values": torch.from_numpy(np.repeat(flat, 2, axis=2).reshape(len(flat), -1)),
            "image_grid_thw": torch.tensor(grids),
            "query_ids": ids,
            "query_attention_mask": mask,
            "images_per_query": torch.tensor([len(g.images) for g in groups]),
        }

    return encode


class PatchLinear(nn.Module):
    """The patch embedding's convolution as the matrix product it is: several times faster on a CPU, same numbers."""

    def __init__(self, embed: Any):
        super().__init__()
        self.proj = embed.proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, 1176) -> (N, C)."""
        return nn.functional.linear(hidden_states, self.proj.weight.flatten(1))


class linear_patches:
    """Run a model's patch embedding as a matrix product inside the block."""

    def __init__(self, model: VilavtForConditionalGeneration):
        self.embed = model.model.visual.patch_embed

    def __enter__(self) -> None:
        self.embed.forward = PatchLinear(self.embed).forward

    def __exit__(self, *error: object) -> None:
        del self.embed.forward
