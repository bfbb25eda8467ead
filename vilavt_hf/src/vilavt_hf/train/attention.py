"""Causal attention over packed samples: block-diagonal, and no mask of tokens x tokens is ever built."""

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .. import compat

PACKED = "vilavt_packed"
"""`attn_implementation` of the language model: each packed sample attends to itself alone.

On CUDA in 16 bits it is torch's variable-length flash kernel, where torch has one; everywhere else one SDPA call per
sample. Without sample boundaries in the batch it is plain SDPA."""


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        query: (1, H, L, D); key and value: (1, H_kv, L, D).
        cu_seq_lens_q: (samples + 1,) int32, where samples begin and end.
        max_length_q: tokens of the longest.

    Returns:
        (1, L, H, D) and None.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):  # RoPE leaves queries and keys in fp32; SDPA casts by itself, the kernel not
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    kernel = compat.varlen_kernel(query)
    if kernel is not None and dropout == 0:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = kernel(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
            scale=scaling, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out[None], None
    outs = []
    for start, end in pairwise(cu_seq_lens_q.tolist()):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        out, _ = sdpa_attention_forward(
            module, q, k, v, None, dropout=dropout, scaling=scaling, is_causal=end - start > 1
        )
        outs.append(out)
    return torch.cat(outs, 1), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
