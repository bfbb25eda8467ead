"""Where every patch and query token of a batch sits: window order, rotary positions, attention segments.

Shapes: N patches, M query tokens kept, Q queries, T query columns, H heads, D head size.
"""

from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from .configuration_vilavt import VilavtVisionConfig

ROPE_THETA = 10000.0
"""Base of the vision tower's rotary embedding (fixed in Qwen2.5-VL)."""

TORCH_VARLEN = "torch_varlen"
"""`attn_implementation` name: torch's own variable-length flash attention in the tower (CUDA), SDPA elsewhere."""

# The name must be known to both tables to be accepted for the whole model; only the tower treats it specially.
AttentionInterface.register(TORCH_VARLEN, sdpa_attention_forward)
AttentionMaskInterface.register(TORCH_VARLEN, sdpa_mask)


class Segments:
    """Variable-length attention: query segment s attends to the whole of key segment s.

    Args:
        query_lengths: tokens of each query segment, in packed order.
        key_lengths: tokens of each key segment.
        device: where the indices live.
        key_order: (K,) sorts packed keys by segment, None when they already are.
    """

    def __init__(
        self,
        query_lengths: list[int],
        key_lengths: list[int],
        device: torch.device,
        key_order: torch.Tensor | None = None,
    ):
        self.key_order = key_order
        self.max_q, self.max_k = max(query_lengths), max(key_lengths)
        self._lengths = torch.tensor(query_lengths), torch.tensor(key_lengths)
        self._device = device
        self.cu_q, self.cu_k = (nn.functional.pad(n.cumsum(0), (1, 0)).to(device, torch.int32) for n in self._lengths)

    @cached_property
    def buckets(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each shape of segments, the places of their queries (segments, q) and keys (segments, k): they share one
        dense, maskless call, so that no (S, S) mask over several groups is ever built. Kernels that take `cu_q` and
        `cu_k` need none of it.
        """
        q_lens, k_lens = self._lengths
        q_start, k_start = q_lens.cumsum(0) - q_lens, k_lens.cumsum(0) - k_lens
        buckets = []
        for q_len, k_len in torch.unique(torch.stack([q_lens, k_lens], 1), dim=0).tolist():
            same = (q_lens == q_len) & (k_lens == k_len)
            q, k = q_start[same, None] + torch.arange(q_len), k_start[same, None] + torch.arange(k_len)
            buckets.append((q.to(self._device), k.to(self._device)))
        return buckets

    @cached_property
    def unbucket(self) -> torch.Tensor:
        """(N,) puts the buckets' outputs in packed order."""
        return torch.argsort(torch.cat([q.flatten() for q, _ in self.buckets]))

    def attend(self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (N, H, D) over k, v (N + M, H, D) -> (N, H * D), through the attention implementation of the config."""
        implementation = module.config._attn_implementation
        common = {"attention_mask": None, "scaling": module.scaling, "dropout": 0.0, "is_causal": False}
        if self.key_order is not None:
            k, v = k[self.key_order], v[self.key_order]
        if implementation == TORCH_VARLEN:
            return self._torch_varlen(q, k, v, module.scaling)
        call = qwen.ALL_ATTENTION_FUNCTIONS.get(implementation, qwen.eager_attention_forward)
        if "flash" in implementation:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            lengths: dict[str, Any] = {
                "cu_seq_lens_q": self.cu_q,
                "cu_seq_lens_k": self.cu_k,
                "max_length_q": self.max_q,
                "max_length_k": self.max_k,
            }
            return call(module, q, k, v, **lengths, **common)[0].flatten(0, 1).flatten(1)
        if len(self.buckets) == 1:  # equal segments: a view instead of a gather
            n = len(self.buckets[0][0])
            q, k, v = (x.unflatten(0, (n, -1)).transpose(1, 2) for x in (q, k, v))
            return call(module, q, k, v, **common)[0].flatten(0, 1).flatten(1)
        out = [
            call(module, q[i].transpose(1, 2), k[j].transpose(1, 2), v[j].transpose(1, 2), **common)[0].flatten(0, 1)
            for i, j in self.buckets
        ]
        return torch.cat(out)[self.unbucket].flatten(1)

    def _torch_varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            raise ValueError(
                f"attn_implementation={TORCH_VARLEN!r} needs torch.nn.attention.varlen, which this torch "
                f"({torch.__version__}) does not have; install a newer torch, or use 'sdpa'"
            ) from None
        if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"attn_implementation={TORCH_VARLEN!r} needs CUDA and float16 or bfloat16, the tower runs in "
                f"{q.dtype} on {q.device}; use 'sdpa'"
            )
        out: Any = varlen_attn(q, k, v, self.cu_q, self.cu_k, self.max_q, self.max_k, scale=scale)
        return out.flatten(1)


class VisionLayout:
    """The packing of one encoder call. Patches are in window order: windows, frames, images and groups are contiguous.

    Attributes:
        order: (N / merge_size², ) merged-token permutation into window order.
        text_index: (M,) kept query tokens in the flattened (Q, T) grid.
        position: (N + M, 2) row and column of patches, then query tokens.
        cos, sin: (N + M, 1, D) fp32, patches then query tokens.
        segments: block kind ("window" | "frame" | "group") -> Segments.

    A plain class on purpose: FSDP walks into dataclasses, tuples and dicts among a block's inputs and casts their
    floats to bf16, which would cost the rotary angles their precision.
    """

    @torch.no_grad()
    def __init__(
        self,
        grid_thw: torch.Tensor,
        images_per_query: torch.Tensor,
        query_mask: torch.Tensor,
        config: VilavtVisionConfig,
        device: torch.device,
    ):
        """All index arithmetic, on the CPU, vectorised over patches: the only device syncs of an encode.

        Args:
            grid_thw: (n_images, 3) frames, height and width in patches.
            images_per_query: (Q,) images of each group, in prompt order, summing to n_images.
            query_mask: (Q, T), 1 for query tokens that condition their group.
            config: the tower's configuration.
            device: where the results live.
        """
        self.device = device
        self._packed = (grid_thw, images_per_query, query_mask, config)
        self._elsewhere: dict[torch.device, VisionLayout] = {}
        t, h, w = grid_thw.cpu().long().unbind(1)
        per_query, keep = images_per_query.cpu().long(), query_mask.cpu().bool()
        merge, unit = config.spatial_merge_size, config.spatial_merge_size**2
        side = config.window_size // merge // config.patch_size  # merged tokens per window side
        patches = t * h * w
        image = torch.repeat_interleave(patches)  # image of every patch
        within = torch.arange(len(image)) - (patches.cumsum(0) - patches)[image]
        frame, cell = within // (h * w)[image], within % (h * w)[image]
        # patches come merge block by merge block: (h/m, w/m, m, m)
        block_y, block_x = cell // unit // (w // merge)[image], cell // unit % (w // merge)[image]
        y, x = block_y * merge + cell // merge % merge, block_x * merge + cell % merge

        windows_x, windows_y = (w // merge + side - 1) // side, (h // merge + side - 1) // side
        n_windows = t * windows_y * windows_x
        window = (n_windows.cumsum(0) - n_windows)[image] + (
            frame * (windows_y * windows_x)[image] + block_y // side * windows_x[image] + block_x // side
        )
        patch_order = torch.argsort(window, stable=True)

        # Diagonal offsets: each image of a group starts after the previous ones, its query after all of them.
        group = torch.repeat_interleave(per_query)  # group of every image
        extent = torch.maximum(h, w)
        group_extent = torch.zeros(len(per_query), dtype=torch.long).index_add_(0, group, extent)
        offset = extent.cumsum(0) - extent - (group_extent.cumsum(0) - group_extent)[group]
        row, column = keep.nonzero(as_tuple=True)
        used = per_query[row] > 0  # a query without images conditions nothing
        row, column = row[used], column[used]
        self.position = torch.cat(
            [
                torch.stack([y, x], 1)[patch_order] + offset[image[patch_order], None],
                # the column of the padded row counts, so a left-padded query starts later
                (group_extent[row] + column)[:, None].expand(-1, 2),
            ]
        ).to(device)
        self._half = config.hidden_size // config.num_heads // 2
        q_lens = torch.zeros(len(per_query), dtype=torch.long).index_add_(0, group, patches)[per_query > 0]
        k_lens = q_lens + keep.sum(1)[per_query > 0]
        key_order = torch.argsort(torch.cat([group[image], row]), stable=True).to(device) if len(row) else None
        frames = (h * w).repeat_interleave(t).tolist()
        windows = torch.bincount(window).tolist()
        self.order = (patch_order[::unit] // unit).to(device)
        self.text_index = (row * keep.shape[1] + column).to(device)
        self.segments = {
            "window": Segments(windows, windows, device),
            "frame": Segments(frames, frames, device),
            "group": Segments(q_lens.tolist(), k_lens.tolist(), device, key_order),
        }

    @torch.no_grad()
    def angles(self, device: torch.device) -> torch.Tensor:
        """(N + M, D / 2) fp32 rotary angles, computed on a device: rows first, then columns."""
        # computed, not a buffer: `model.bfloat16()` would round a buffer
        steps = torch.arange(0, self._half, 2, device=device, dtype=torch.float32) / self._half
        position = self.position
        if device.type == "cuda" and position.device.type == "cpu":
            position = position.pin_memory()  # so that the copy does not hold up this thread
        return (position.to(device, non_blocking=True)[:, :, None].float() * (1.0 / ROPE_THETA**steps)).flatten(1)

    @cached_property
    def cos(self) -> torch.Tensor:
        """Of the angles, for both halves of a head."""
        return self.angles(self.position.device).cos().repeat(1, 2)[:, None]

    @cached_property
    def sin(self) -> torch.Tensor:
        """Of the angles, for both halves of a head."""
        return self.angles(self.position.device).sin().repeat(1, 2)[:, None]

    def on(self, device: torch.device) -> "VisionLayout":
        """This layout where a block computes: the blocks of a dispatched tower may be on several devices."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = VisionLayout(*self._packed, device)
        return self._elsewhere[device]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (n, H, D), multiplied in fp32 as the parent does."""
    y = x.float()
    return (y * cos + qwen.rotate_half(y) * sin).to(x.dtype)
