"""M-RoPE positions from token ids and image sizes alone, for what batches conversations and has no model.

Transformers' own are a method of the model (`compat.rope_index`), which the engine asks. A collator in a worker
process, verl's processor and EasyR1's driver hold no model; `tests/hf/test_positions.py` holds these positions against
that method.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mrope_positions(input_ids: Sequence[int], grids: Sequence[Sequence[int]], image_token_id: int) -> torch.Tensor:
    """Positions of Qwen2.5-VL's multimodal RoPE.

    Args:
        input_ids: (L,) one conversation without padding.
        grids: height and width in merged tokens of every image, in prompt order.
        image_token_id: the placeholder.

    Returns:
        (3, L) int64: time, row and column.
    """
    parts: list[torch.Tensor] = []
    position, i, text, sizes = 0, 0, 0, iter(grids)
    while i < len(input_ids):
        if input_ids[i] != image_token_id:
            text, i = text + 1, i + 1
            continue
        parts.append(torch.arange(position, position + text).expand(3, -1))
        position, text = position + text, 0
        height, width = next(sizes)
        rows, columns = torch.arange(height), torch.arange(width)
        image = (torch.zeros(height * width, dtype=torch.long), rows.repeat_interleave(width), columns.repeat(height))
        parts.append(position + torch.stack(image))
        position, i = position + max(height, width), i + height * width
    parts.append(torch.arange(position, position + text).expand(3, -1))
    return torch.cat(parts, dim=1)
