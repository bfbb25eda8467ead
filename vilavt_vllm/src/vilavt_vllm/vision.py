"""The vision tower on vLLM's layers: sharded over tensor-parallel ranks, any attention backend of `MMEncoderAttention`.

Same semantics as `vilavt_hf.modeling_vilavt`, whose `VisionLayout` packs the patches here too. What differs is how a
query-aware block attends: query tokens are appended to *all of* q, k and v, with zero queries, so that one list of
segment bounds serves queries and keys. Their output rows are dropped.

Shapes: N patches, M query tokens kept, C vision hidden size, H heads of this rank, D head size.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.distributed.utils import divide
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VisionMLP,
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VisionPatchMerger,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, cast_overflow_tensors
from vllm.model_executor.models.vision import get_vit_attn_backend

from vilavt_hf import VilavtVisionConfig
from vilavt_hf.vision_layout import Segments, VisionLayout

from . import compat

NORM_EPS = 1e-6
"""Of the tower's RMS norms (fixed in Qwen2.5-VL)."""

MOST_PATCHES = 2**17
"""Patches of the packings that are kept for calls of the same sizes: about 46 MB."""


@dataclass(frozen=True)
class AttentionSpan:
    """Segment bounds of one block kind, in the form the attention backend asks for."""

    cu_seqlens: torch.Tensor
    max_seqlen: torch.Tensor
    sequence_lengths: torch.Tensor | None
    order: torch.Tensor | None = None
    """(N + M,) sorts patches and query tokens by segment; None when there are no query tokens."""
    undo: torch.Tensor | None = None
    """(N,) places of the patches among the sorted rows."""


@dataclass(frozen=True)
class Packing:
    """A `VisionLayout` as the blocks take it, on the tower's device."""

    order: torch.Tensor
    """(N / merge_size²,) merged tokens into window order."""
    undo: torch.Tensor
    """(N / merge_size²,) and back."""
    text_index: torch.Tensor
    """(M,) kept query tokens in the flattened (Q, T) grid."""
    cos: torch.Tensor
    sin: torch.Tensor
    """(N + M, D / 2) fp32."""
    spans: Mapping[str, AttentionSpan]
    """By kind of block."""


class Packings:
    """The packings that were used last: the same sizes of images come again and again, and making one takes the
    worker's main thread longer than launching the tower's kernels.

    Args:
        most_patches: of all that are kept, about 350 bytes each; one above it alone is not kept.
    """

    def __init__(self, most_patches: int) -> None:
        self.most_patches, self.patches = most_patches, 0
        self._kept: OrderedDict[Hashable, tuple[Packing, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(
        self,
        grid_thw: torch.Tensor,
        images_per_query: torch.Tensor,
        query_mask: torch.Tensor,
        make: Callable[[], Packing],
    ) -> Packing:
        """The packing of these images and queries, all on the CPU; made if it is not kept."""
        # Which of a query's columns hold tokens decides all that its text does here; a query takes room like a patch.
        parts = (grid_thw.long(), images_per_query.long(), query_mask.bool())
        key = tuple((tuple(part.shape), part.numpy().tobytes()) for part in parts)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        packing, size = make(), int(grid_thw.prod(-1).sum()) + query_mask.numel()
        self._kept[key] = packing, size
        self.patches += size
        while self.patches > self.most_patches:
            _, (_, least) = self._kept.popitem(last=False)
            self.patches -= least
        return packing


class VisionAttention(nn.Module):
    """Attention of one block; a query-aware one has projections for query tokens."""

    def __init__(
        self, config: VilavtVisionConfig, query_aware: bool, quant_config: QuantizationConfig | None, prefix: str
    ):
        super().__init__()
        dim, heads = config.hidden_size, config.num_heads
        self.head_dim = divide(dim, heads)
        self.num_heads = divide(heads, get_tensor_model_parallel_world_size())
        self.qkv = QKVParallelLinear(
            dim, self.head_dim, heads, heads, quant_config=quant_config, prefix=f"{prefix}.qkv"
        )
        self.proj = RowParallelLinear(dim, dim, quant_config=quant_config, prefix=f"{prefix}.proj")
        if query_aware:
            self.instruct_key_proj = ColumnParallelLinear(
                dim, dim, quant_config=quant_config, prefix=f"{prefix}.instruct_key_proj"
            )
            self.instruct_value_proj = ColumnParallelLinear(
                dim, dim, quant_config=quant_config, prefix=f"{prefix}.instruct_value_proj"
            )
        self.attn = MMEncoderAttention(
            num_heads=self.num_heads, head_size=self.head_dim, scale=self.head_dim**-0.5, prefix=f"{prefix}.attn"
        )
        # fp32 as in transformers; also the only way to keep large positions apart in bf16
        self.apply_rotary_emb = ApplyRotaryEmb(enforce_enable=True, enable_fp32_compute=True)

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, span: AttentionSpan
    ) -> torch.Tensor:
        """(N, C) patches, (M, C) query tokens, (N + M, D / 2) angles -> (N, C)."""
        n = len(x)
        q, k, v = self.qkv(x)[0].view(n, 3, self.num_heads, self.head_dim).unbind(1)
        if span.order is not None:
            text_k = self.instruct_key_proj(text)[0].view(-1, self.num_heads, self.head_dim)
            text_v = self.instruct_value_proj(text)[0].view(-1, self.num_heads, self.head_dim)
            q, k, v = torch.cat([q, torch.zeros_like(text_k)]), torch.cat([k, text_k]), torch.cat([v, text_v])
        rows = len(q)
        q, k = self.apply_rotary_emb(torch.stack([q, k]), cos[:rows], sin[:rows]).unbind(0)
        if span.order is not None:
            q, k, v = q[span.order], k[span.order], v[span.order]
        out = self.attn(
            query=q[None].contiguous(),
            key=k[None].contiguous(),
            value=v[None].contiguous(),
            cu_seqlens=span.cu_seqlens,
            max_seqlen=span.max_seqlen,
            sequence_lengths=span.sequence_lengths,
        ).reshape(rows, -1)
        return self.proj(out if span.undo is None else out[span.undo])[0]


class VisionBlock(nn.Module):
    """A block of one kind: "group" (query-aware, joint), "frame" (full per frame) or "window"."""

    def __init__(self, config: VilavtVisionConfig, kind: str, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.norm2 = RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.attn = VisionAttention(config, kind == "group", quant_config, f"{prefix}.attn")
        self.mlp = Qwen2_5_VisionMLP(
            config.hidden_size,
            config.intermediate_size,
            bias=True,
            act_fn=get_act_and_mul_fn(config.hidden_act),
            quant_config=quant_config,
            prefix=f"{prefix}.mlp",
        )

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, span: AttentionSpan
    ) -> torch.Tensor:
        """(N, C) -> (N, C)."""
        attended, residual = self.norm2(self.attn(self.norm1(x), text, cos, sin, span), residual=x)
        return residual + self.mlp(attended)


class VisionTower(nn.Module):
    """Qwen2.5-VL's tower with query-aware blocks where ``integration_point`` puts them."""

    def __init__(self, config: VilavtVisionConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()
        self.config = config
        self.tp_size = get_tensor_model_parallel_world_size()
        head_dim = config.hidden_size // config.num_heads
        self.attn_backend = get_vit_attn_backend(head_size=head_dim, dtype=torch.get_default_dtype())
        self.patch_embed = Qwen2_5_VisionPatchEmbed(
            patch_size=config.patch_size,
            temporal_patch_size=config.temporal_patch_size,
            in_channels=config.in_channels,
            hidden_size=config.hidden_size,
        )
        joint, full = config.query_aware_blocks(), set(config.fullatt_block_indexes)
        self.packings = Packings(MOST_PATCHES)
        self.kinds = ["group" if i in joint else "frame" if i in full else "window" for i in range(config.depth)]
        self.blocks = nn.ModuleList(
            VisionBlock(config, kind, quant_config, f"{prefix}.blocks.{i}") for i, kind in enumerate(self.kinds)
        )
        self.merger = Qwen2_5_VisionPatchMerger(
            d_model=config.out_hidden_size,
            context_dim=config.hidden_size,
            norm_layer=partial(RMSNorm, eps=NORM_EPS),
            spatial_merge_size=config.spatial_merge_size,
            quant_config=quant_config,
            prefix=f"{prefix}.merger",
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.patch_embed.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.patch_embed.proj.weight.device

    def forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor,
        images_per_query: torch.Tensor,
        query_features: torch.Tensor,
        query_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Encode images, group by group.

        Args:
            pixel_values: (N, 1176).
            grid_thw: (n_images, 3), on the CPU.
            images_per_query: (Q,), on the CPU.
            query_features: (Q, T, C) projected query tokens.
            query_mask: (Q, T), on the CPU.

        Returns:
            (N / merge_size², out_hidden) in prompt order.
        """
        packing = self.packings.get(
            grid_thw,
            images_per_query,
            query_mask,
            partial(self._packing, grid_thw, images_per_query, query_mask, len(pixel_values)),
        )
        text = query_features.flatten(0, 1)[packing.text_index]
        x = self.patch_embed(pixel_values.to(self.device, self.dtype))
        x = x.unflatten(0, (-1, self.config.spatial_merge_size**2))[packing.order].flatten(0, 1)
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            x = block(x, text, packing.cos, packing.sin, packing.spans[kind])
        if x.dtype == torch.float16:  # long images overflow in the last block
            x = cast_overflow_tensors(x)
        return self.merger(x)[packing.undo]

    def _packing(
        self, grid_thw: torch.Tensor, images_per_query: torch.Tensor, query_mask: torch.Tensor, n: int
    ) -> Packing:
        """Of these images with their queries, `n` patches; see `forward`."""
        cpu = torch.device("cpu")  # bounds are read on the CPU: packing there costs no device sync
        layout = VisionLayout(grid_thw, images_per_query, query_mask, self.config, cpu)
        angles = layout.angles(self.device)
        order = self._here(layout.order)
        return Packing(
            order=order,
            undo=torch.argsort(order),
            text_index=self._here(layout.text_index),
            cos=angles.cos(),
            sin=angles.sin(),
            # only what this tower's blocks use
            spans={kind: self._span(layout.segments[kind], n) for kind in dict.fromkeys(self.kinds)},
        )

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        """It on the tower's device; from pinned memory the copy does not hold up this thread."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _span(self, segments: Segments, n: int) -> AttentionSpan:
        bounds = segments.cu_k.numpy()
        cu_seqlens, lengths = compat.packed_bounds(
            self.attn_backend, bounds, self.config.hidden_size, self.tp_size, self.device
        )
        undo = None if segments.key_order is None else self._here(torch.argsort(segments.key_order)[:n])
        return AttentionSpan(
            cu_seqlens=cu_seqlens,
            # a scalar on the CPU: backends call .item()
            max_seqlen=torch.tensor(
                MMEncoderAttention.compute_max_seqlen(self.attn_backend, bounds), dtype=torch.int32
            ),
            sequence_lengths=lengths,
            order=None if segments.key_order is None else self._here(segments.key_order),
            undo=undo,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors by their names in the checkpoint, without the ``visual.`` in front."""
        loaded: set[str] = set()
        return AutoWeightsLoader(self).load_weights(compat.stack_halves(self, weights, loaded)) | loaded
