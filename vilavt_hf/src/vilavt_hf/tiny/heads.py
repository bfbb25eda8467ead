"""The tiny model's training-only losses: heads on image features and supervised attention; no checkpoint has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class AuxiliaryHead:
    """A small classifier on image features."""

    name: str
    kind: Literal["tokens", "labels", "image", "pointer"]
    """What its targets are: ``tokens``: one class per merged token (-100: none), ``labels``: a 0/1 row (classes,) per
    token, ``image``: one class for the mean of the image's tokens, ``pointer``: the index of one token of the image."""
    classes: int
    weight: float
    block: int | None = None
    """Read the output of this vision block instead of the merged features (images of at most one window)."""
    positive_weight: float = 6.0
    """``labels``: what a 1 weighs, a 0 weighs 1."""
    single: bool = False
    """``labels``: the share of right answers counts labels, not rows that are right as a whole."""


class AuxiliaryLosses(nn.Module):
    """Heads and attention losses over the features of one forward pass.

    Args:
        heads: the classifiers.
        merged: size of merged features.
        patch: size of patch features in the tower.
        attention_weight: of the mean negative log share of attention.
        partner_block: the joint block in which patches should look at their partners, see `partner_loss`.
        partner_weight: of that loss.
    """

    def __init__(
        self,
        heads: Sequence[AuxiliaryHead],
        merged: int,
        patch: int,
        attention_weight: float = 0.4,
        partner_block: int = 0,
        partner_weight: float = 0.3,
    ):
        super().__init__()
        self.partner_block, self.partner_weight = partner_block, partner_weight
        self.specs = {head.name: head for head in heads}
        self.attention_weight = attention_weight
        self.heads = nn.ModuleDict()
        for head in heads:
            out = 1 if head.kind == "pointer" else head.classes
            if head.block is None:
                self.heads[head.name] = nn.Linear(merged, out)
            else:
                self.heads[head.name] = nn.Sequential(
                    nn.Linear(4 * patch, 2 * patch), nn.GELU(), nn.Linear(2 * patch, out)
                )

    @property
    def blocks(self) -> list[int]:
        """Vision blocks whose output the heads read."""
        return sorted({head.block for head in self.specs.values() if head.block is not None})

    def features_loss(
        self, targets: dict[str, Any], merged: torch.Tensor, sizes: Sequence[int], blocks: dict[int, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted sum of the heads' losses and, per head, its share of right answers.

        Args:
            targets: ``aux["tokens"]`` of a batch.
            merged: (tokens, merged) of all images, in order.
            sizes: merged tokens of every image.
            blocks: (patches, patch) output of the vision blocks that are read.
        """
        starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        total, right = merged.new_zeros(()), {}
        for name, (images, values) in targets.items():
            spec = self.specs[name]
            source = merged
            if spec.block is not None:
                source = blocks[spec.block].unflatten(0, (-1, 4)).flatten(1)
            counts = torch.tensor(sizes)[images]
            token = torch.cat(
                [torch.arange(s, s + n) for s, n in zip(starts[images].tolist(), counts.tolist(), strict=True)]
            )
            picked = source[token].float()
            if spec.kind in ("image", "pointer"):
                target = values
                if int(counts.min()) != int(counts.max()):
                    raise ValueError(
                        f"head {name!r} needs images of one size, got {sorted(set(counts.tolist()))} tokens"
                    )
                picked = picked.unflatten(0, (len(images), -1))
                if spec.kind == "image":
                    scores = self.heads[name](picked.mean(1))
                else:
                    scores = self.heads[name](picked)[..., 0]
            else:
                scores, target = self.heads[name](picked), values
            if spec.kind == "labels":
                loss = F.binary_cross_entropy_with_logits(
                    scores, target, pos_weight=scores.new_tensor(spec.positive_weight)
                )
                hit = (scores > 0) == (target > 0.5)
                right[name] = (hit if spec.single else hit.all(1)[target.any(1)]).float().mean()
            else:
                loss = F.cross_entropy(scores, target, ignore_index=-100)
                known = target != -100
                right[name] = (scores.argmax(-1) == target)[known].float().mean()
            total = total + spec.weight * loss
        return total, right

    def attention_loss(
        self, targets: list[tuple[int, tuple[int, ...], torch.Tensor]], attentions: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean negative log of the attention that the chosen heads pay to the chosen tokens.

        Args:
            targets: ``aux["attention"]`` of a batch: (layer, heads, (K, 3) row, query and key position).
            attentions: per layer (B, heads, L, L).
        """
        total, count, mass = attentions[0].new_zeros(()).float(), 0, {}
        for layer, heads, at in targets:
            row, query, key = at.unbind(1)
            share = torch.stack([attentions[layer][row, h, query, key] for h in heads]).float()
            total = total - (share + 1e-6).log().sum() / len(heads)
            count += len(at)
            mass[f"attention_{layer}_{heads[0]}"] = share.detach().mean()
        return self.attention_weight * total / max(1, count), mass

    def partner_loss(
        self, pairs: torch.Tensor, attention: Any, inputs: tuple[Any, ...], patches: torch.Tensor, groups: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean negative log of the attention that the patches of two images pay to each other's, place by place.

        The first half of the heads looks from the first image to the second, the other half from the second to the
        first, so that every patch has heads that are free.

        Args:
            pairs: (K, 2) images: each of one window, the two of one size and of one group.
            attention: the attention of a joint block.
            inputs: what it was called with: patches, query tokens, layout, kind.
            patches: (n_images,) patches of every image.
            groups: (n_images,) the group of every image, empty groups left out.
        """
        hidden, text, layout = inputs[:3]
        queries, keys, _ = attention.project(hidden, text, layout)
        segments = layout.segments["group"]
        order = torch.arange(len(keys)) if segments.key_order is None else segments.key_order
        bounds, starts = segments.cu_k.tolist(), (patches.cumsum(0) - patches).tolist()
        half = attention.num_heads // 2
        logs = []
        for one, other in pairs.tolist():
            size, group = int(patches[one]), int(groups[one])
            if group != int(groups[other]) or size != int(patches[other]):
                raise ValueError(f"images {one} and {other} are partners, but not of one group and one size")
            seen = order[bounds[group] : bounds[group + 1]]
            place = torch.arange(size)
            for heads, own, its in ((slice(0, half), one, other), (slice(half, None), other, one)):
                scores = torch.einsum("qhd,khd->hqk", queries[starts[own] + place, heads], keys[seen, heads])
                shares = (scores.float() * attention.scaling).log_softmax(-1)
                first = int((seen == starts[its]).nonzero()[0, 0])
                logs.append(shares[:, place, first + place])
        share = torch.stack(logs)
        return -self.partner_weight * share.mean(), {"partner": share.detach().exp().mean()}


class _Recorder:
    """Keeps what passes through some vision blocks during one forward pass (a context manager)."""

    def __init__(self, visual: Any, blocks: Sequence[int]):
        self.visual, self.blocks = visual, blocks
        self.values: dict[int, Any] = {}
        self.handles: list[Any] = []

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


class BlockOutputs(_Recorder):
    """Collects the output of vision blocks."""

    def __enter__(self) -> dict[int, torch.Tensor]:
        self.handles = [self.visual.blocks[i].register_forward_hook(self._keep(i)) for i in self.blocks]
        return self.values

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.values[index] = output[0] if isinstance(output, tuple) else output

        return hook


class AttentionInputs(_Recorder):
    """Collects what the attention of vision blocks is called with."""

    def __enter__(self) -> dict[int, tuple[Any, ...]]:
        self.handles = [self.visual.blocks[i].attn.register_forward_pre_hook(self._keep(i)) for i in self.blocks]
        return self.values

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.values[index] = inputs

        return hook
