"""The query encoder: transformers' own Qwen3, replicated on every tensor-parallel rank.

vLLM's Qwen3 would claim space in the KV cache; a query has at most 50 tokens and is encoded once.
"""

import copy

import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model


class QueryEncoder(Qwen3Model):
    """Qwen3 without a head; parameters are named as in the checkpoint."""

    def __init__(self, config: Qwen3Config):
        config = copy.deepcopy(config)
        config._attn_implementation = "sdpa"
        config.dtype = torch.get_default_dtype()  # vLLM's, while it builds a model
        super().__init__(config)

    @torch.inference_mode()
    def features(self, query_ids: torch.Tensor, query_mask: torch.Tensor) -> torch.Tensor:
        """(Q, T) ids and mask -> (Q, T, hidden) of the last layer; rows without tokens are zero.

        Args:
            query_ids: (Q, T).
            query_mask: (Q, T), on the CPU.
        """
        columns = query_mask.any(0).nonzero()
        width = int(columns.max()) + 1 if len(columns) else 0
        out = self.embed_tokens.weight.new_zeros(*query_ids.shape, self.config.hidden_size)
        asked = query_mask.any(1).nonzero()[:, 0].to(query_ids.device)
        if width:  # originals have no query, and most calls have nothing else
            mask = query_mask.to(query_ids.device)
            output = self(
                input_ids=query_ids[asked, :width], attention_mask=mask[asked, :width], use_cache=False
            ).last_hidden_state
            out[asked, :width] = output.to(out.dtype)
        return out
