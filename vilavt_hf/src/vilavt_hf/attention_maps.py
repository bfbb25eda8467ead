"""Where each patch looks inside the vision encoder: at the other regions of its group, and at the words of the query.

    inquiry = zoom(chat.settings, ["photo.jpg"], [Region(0, (28, 28, 84, 84))])    # or one of a conversation's record
    image = attention_of(chat.model, chat.processor, inquiry)                  # 8-bit maps: vilavt_core.attention
    maps = look(chat.model, chat.processor.encode_inquiries([inquiry]))[0]         # exact numbers: tensors

`look` encodes the images once more with a hook on the attention of every watched block. The hook takes queries and keys
of the block's own `project` and computes the softmax in fp32, some patches at a time: attention of all heads over all
pairs of patches, (H, N, N), never exists, only what is asked of it. A model that nobody watches has no hook.

Shapes: H heads, E entries (the mean of all heads, then every chosen head), R images of a group, N its patches, M its
query tokens, P chosen patches, C size of a merged feature. Patches go image by image, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from unicodedata import east_asian_width

import numpy as np
import torch

from vilavt_core.attention import AttentionPicture, Heat, Layer, QueryDifference
from vilavt_core.conversation import Inquiry, is_whole_text
from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.errors import AttentionError
from vilavt_core.protocol import Region, ToolCall, format_turn
from vilavt_core.results import Finished, ImageSource, RefusedEvent, Sample

from . import compat
from .modeling_vilavt import VilavtForConditionalGeneration, VilavtModel, group_sizes

if TYPE_CHECKING:
    from .processing_vilavt import VilavtProcessor
    from .vision_layout import VisionLayout

MAX_SCORES = 2**22
"""Attention scores (heads x patches x keys) that exist at once, unless one patch alone has more: 16 MiB in fp32."""


class Patch(NamedTuple):
    """A patch of an image, counted from 0 in patches of 14 pixels."""

    image: int
    """Among all images of the call, in their order."""
    row: int
    column: int
    frame: int = 0


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """Where the patches of one group look, in one block. CPU, fp32; a patch's attention sums to 1."""

    block: int
    kind: Literal["group", "frame", "window"]
    """``group``: query-aware. A patch of the others looks at its own frame or window only, and at no word."""
    heads: tuple[int | None, ...]
    """What the E entries are: None, the mean of all heads, then the chosen heads."""
    looks: torch.Tensor
    """(E, R, N + M): how much the patches of image r look at every patch and query token, on average."""
    shares: torch.Tensor
    """(E, N, R + M): how much of every patch's attention goes to each image, and to each query token."""
    chosen: torch.Tensor
    """(E, P, N + M): how much the chosen patches look at every patch and query token."""


@dataclass(frozen=True, eq=False)
class GroupAttention:
    """What the encoder did with one group."""

    query: int
    """Its row of the query inputs."""
    token_ids: tuple[int, ...]
    """Of the query encoder, the M that condition the group."""
    grids: tuple[tuple[int, int, int], ...]
    """For each of its R images the frames, and the patches along height and width."""
    chosen: tuple[Patch, ...]
    """The P chosen patches that are in the group, images counted from the group's first."""
    blocks: tuple[BlockAttention, ...]
    features: tuple[torch.Tensor, ...]
    """For each image (t * h * w / merge_size², C): what the language model gets. CPU, fp32."""

    @property
    def sizes(self) -> list[int]:
        """Patches of each image; they sum to N."""
        return [t * h * w for t, h, w in self.grids]


@torch.no_grad()
def look(
    model: VilavtForConditionalGeneration | VilavtModel,
    inputs: Mapping[str, torch.Tensor],
    *,
    blocks: Sequence[int] | Literal["all"] | None = None,
    heads: Sequence[int] | Literal["all"] = (),
    patches: Sequence[Patch] = (),
) -> list[GroupAttention]:
    """Encode images and say where their patches looked.

    Costs one more encode, and for each watched block its projection and softmax once more. What is kept of a block
    takes ``4 * E * (N * (R + M) + (R + P) * (N + M))`` bytes of host memory.

    Args:
        model: on one device.
        inputs: of `VilavtModel.get_image_features`, as `VilavtProcessor.encode_inquiries` gives them.
        blocks: which to watch. None: the query-aware ones.
        heads: to keep one by one, beside the mean of all.
        patches: of which everything they look at is kept.

    Returns:
        One entry for each group with images, in order.

    Raises:
        AttentionError: a block, head or patch that is not there, or no block is query-aware and none was named.
        GroupError: the inputs do not describe valid groups.
    """
    base = model if isinstance(model, VilavtModel) else model.model
    config = base.visual.config
    grids = inputs["image_grid_thw"].cpu().long()
    if inputs.get("query_ids") is None:
        counts, ids = torch.ones(len(grids), dtype=torch.long), torch.zeros(len(grids), 0, dtype=torch.long)
        mask = ids.bool()
    else:
        ids = inputs["query_ids"].cpu()
        counts = group_sizes(len(grids), ids, inputs.get("images_per_query"), inputs.get("image_to_query_mapping"))
        given = inputs.get("query_attention_mask")
        mask = torch.ones_like(ids).bool() if given is None else given.cpu().bool()
    watch = _Watch(
        _Packing(grids, counts, mask, config.spatial_merge_size),
        _chosen("head", heads, config.num_heads),
        _located(patches, grids),
    )
    watched = _watched_blocks(base, blocks)
    hooks = [base.visual.blocks[i].attn.register_forward_pre_hook(watch.hook(i)) for i in watched]
    try:
        device = compat.input_device(model)
        on_device: dict[str, Any] = {name: value.to(device) for name, value in inputs.items()}
        features = [one.float().cpu() for one in compat.pooled(base.get_image_features(**on_device, return_dict=True))]
    finally:
        for hook in hooks:
            hook.remove()
    packing, out = watch.packing, []
    for g, images in enumerate(packing.images):
        if not len(images):
            continue
        first = images[0]
        out.append(
            GroupAttention(
                query=g,
                token_ids=tuple(ids[g][mask[g]].tolist()),
                grids=tuple((t, h, w) for t, h, w in grids[first : images[-1] + 1].tolist()),
                chosen=tuple(patch._replace(image=patch.image - first) for patch in patches if patch.image in images),
                blocks=tuple(watch.found[i][g] for i in watched),
                features=tuple(features[image] for image in images),
            )
        )
    return out


def words_of(tokenizer: Any, token_ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of a query with the places of their tokens; the words joined are the decoded query, spaces aside.

    A word ends at a space; a wide character (Chinese, Japanese, Korean) and a special token are words of their own. A
    token is in one word only: a character whose bytes are several tokens stays in one piece.
    """
    special = set(tokenizer.all_special_ids)
    words: list[tuple[str, list[int]]] = []
    places: list[int] = []
    before, ended = "", True
    for place, token in enumerate(token_ids):
        places.append(place)
        whole = tokenizer.decode(list(token_ids[: place + 1]), clean_up_tokenization_spaces=False)
        if not is_whole_text(whole) and place + 1 < len(token_ids):
            continue
        piece, before = whole[len(before) :], whole
        text = piece.strip()
        begins = ended or token in special or piece[:1].isspace() or east_asian_width(text[:1] or " ") in "WF"
        only_spaces = bool(words) and not words[-1][0]
        if words and (only_spaces or not begins):
            words[-1] = (words[-1][0] + text, words[-1][1] + places)
        else:
            words.append((text, places))
        ended, places = token in special or piece[-1:].isspace(), []
    return words


def picture_of(
    maps: GroupAttention, inquiry: Inquiry, processor: VilavtProcessor, captions: Sequence[str] | None = None
) -> AttentionPicture:
    """The 8-bit maps of one inquiry.

    Args:
        maps: what `look` found for it.
        inquiry: that was encoded.
        processor: its query tokenizer names the words.
        captions: what each image is; None: their places in the conversation.

    Raises:
        AttentionError: the maps belong to other images.
    """
    merge = processor.image_processor.patch_size
    sizes = tuple(image.size for image in inquiry.images)
    if [(1, h // merge, w // merge) for w, h in sizes] != list(maps.grids):
        raise AttentionError(
            f"the inquiry has images of {list(sizes)} pixels, the maps are of {list(maps.grids)} frames, rows and "
            "columns of patches; both must come from the same images"
        )
    words = words_of(processor.query_tokenizer, maps.token_ids) if maps.token_ids else []
    return AttentionPicture(
        query=inquiry.query,
        words=tuple(word for word, _ in words),
        captions=tuple(captions or (f"image {index}" for index in inquiry.image_indices)),
        sizes=sizes,
        patches=tuple((patch.image, patch.row, patch.column) for patch in maps.chosen),
        layers=tuple(_layer(maps, entry, words, every_word=n == 0) for n, entry in enumerate(_entries(maps))),
        image_indices=inquiry.image_indices,
        images=inquiry.images,
    )


def compare_queries(
    before: GroupAttention, after: GroupAttention, pictures: tuple[AttentionPicture, AttentionPicture]
) -> QueryDifference:
    """What the second query changes.

    Args:
        before: what `look` found with one query.
        after: with another, of the same images, blocks and heads.
        pictures: `picture_of` both.

    Raises:
        AttentionError: images, blocks or heads differ.
    """
    watched = [[(block.block, block.heads) for block in maps.blocks] for maps in (before, after)]
    if before.grids != after.grids or watched[0] != watched[1]:
        raise AttentionError(
            f"images of {list(before.grids)} patches in blocks and heads {watched[0]} cannot be compared with images "
            f"of {list(after.grids)} patches in {watched[1]}; change the query only"
        )
    cosine, change = [], []
    for grid, a, b in zip(before.grids, before.features, after.features, strict=True):
        distance = 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)
        side = round((grid[1] * grid[2] * grid[0] / len(a)) ** 0.5)
        cosine.append(distance.clamp(min=0).view(grid[0] * grid[1] // side, grid[2] // side).numpy())
        change.append(float((a - b).norm(dim=-1).mean() / a.norm(dim=-1).mean()))
    pairs = list(zip(_entries(before), _entries(after), strict=True))
    return QueryDifference(
        before=pictures[0],
        after=pictures[1],
        features=Heat.of("features", "distance", cosine),
        feature_change=tuple(change),
        moved=tuple(_moved(before, a, b) for a, b in pairs),
        layers=tuple(_changed_layer(before, after, a, b) for a, b in pairs),
    )


def attention_of(
    model: VilavtForConditionalGeneration | VilavtModel,
    processor: VilavtProcessor,
    inquiry: Inquiry,
    other_query: str | None = None,
    *,
    blocks: Sequence[int] | Literal["all"] | None = None,
    heads: Sequence[int] | Literal["all"] = (),
    patches: Sequence[Patch] = (),
    captions: Sequence[str] | None = None,
) -> AttentionPicture | QueryDifference:
    """Where the patches of an inquiry look; with another query, what that changes.

    Args:
        model: see `look`, for the other arguments too.
        processor: the model's.
        inquiry: the images and the query.
        other_query: about the same images; "" is no query.
        blocks, heads: which to draw.
        patches: of the inquiry's images, counted from 0.
        captions: what each image is; None: ``region 0``, …

    Raises:
        AttentionError: see `look`.
    """
    queries = [inquiry.query] if other_query is None else [inquiry.query, other_query]
    captions = captions or [f"region {i}" for i in range(len(inquiry.images))]
    found, pictures = [], []
    for query in queries:
        asked = replace(inquiry, query=query)
        inputs = processor.encode_inquiries([asked])
        found.append(look(model, inputs, blocks=blocks, heads=heads, patches=patches)[0])
        pictures.append(picture_of(found[-1], asked, processor, captions))
    if len(found) == 1:
        return pictures[0]
    return compare_queries(found[0], found[1], (pictures[0], pictures[1]))


def zoom(settings: ConversationSettings, images: Sequence[ImageSource], regions: Sequence[Region]) -> Inquiry:
    """The inquiry that a call for these regions makes at the start of a conversation, without a model; its query is
    for the caller to replace.

    Args:
        settings: of the backend, e.g. ``VilavtChat.settings``.
        images: images of the conversation.
        regions: boxes in pixels of the images as they are shown.

    Raises:
        AttentionError: the call is refused, e.g. a region leaves its image; says why.
        ImageError: an image cannot be loaded.
    """
    limits = replace(settings.limits, max_turns=max(2, settings.limits.max_turns))
    driver = Driver(Sample(images, "?", limits=limits), settings, fallback=False)
    events = driver.start()
    if driver.request is not None:
        events += driver.take_text(format_turn(ToolCall(tuple(regions), "?")))
    for event in events:
        if isinstance(event, Finished) and event.result.error is not None:
            raise event.result.error
        if isinstance(event, RefusedEvent):
            raise AttentionError(event.problem)
    record = driver.result.record
    assert record is not None
    return record.inquiries[-1]


# ---------------------------------------------------------------------- measuring


class _Packing:
    """Which rows of the encoder's packed patches and query tokens belong to which group, and where in it."""

    def __init__(self, grids: torch.Tensor, counts: torch.Tensor, mask: torch.Tensor, merge: int) -> None:
        ends = counts.cumsum(0).tolist()
        self.images = [range(end - count, end) for end, count in zip(ends, counts.tolist(), strict=True)]
        patches = grids.prod(1)
        self.image_ends = patches.cumsum(0).tolist()
        self.merge = merge
        starts = torch.tensor([0, *self.image_ends[:-1]])
        ranks = []  # the encoder's patches come merge block by merge block
        for (t, h, w), start in zip(grids.tolist(), starts.tolist(), strict=True):
            within = torch.arange(t * h * w).view(t, h // merge, merge, w // merge, merge)
            ranks.append(start + within.transpose(2, 3).flatten())
        self.rank = torch.cat(ranks)
        """Patch of the encoder's input -> its place image by image, row by row."""
        group_of_image = torch.repeat_interleave(counts)
        self.group = group_of_image.repeat_interleave(patches)
        self.image = torch.repeat_interleave(patches)
        """Group, and image, of every patch; the same in packed order, which only permutes within an image."""
        self.start = [self.image_ends[images[0] - 1] if len(images) and images[0] else 0 for images in self.images]
        self.size = [
            self.image_ends[images[-1]] - start if len(images) else 0
            for images, start in zip(self.images, self.start, strict=True)
        ]
        self.tokens = [int(row.sum()) if len(images) else 0 for row, images in zip(mask, self.images, strict=True)]

    def places(self, layout: VisionLayout) -> torch.Tensor:
        """(N + M,) for every packed patch and query token of all groups its place among its group's keys."""
        order, unit = layout.order.cpu(), self.merge**2
        packed = (order[:, None] * unit + torch.arange(unit)).flatten()
        patches = self.rank[packed] - torch.tensor(self.start)[self.group]
        tokens = [size + torch.arange(count) for size, count in zip(self.size, self.tokens, strict=True)]
        return torch.cat([patches, *tokens])


class _Watch:
    """Hooks, and what they found: ``found[block][group]``."""

    def __init__(self, packing: _Packing, heads: list[int], patches: list[int]) -> None:
        self.packing, self.heads = packing, heads
        self.patches = patches
        """Places of the chosen patches among all, image by image, row by row."""
        self.found: dict[int, dict[int, BlockAttention]] = {}

    def hook(self, block: int) -> Any:
        """A forward pre-hook of the attention of this block."""

        def measure(attention: Any, args: tuple[Any, ...]) -> None:
            hidden_states, text, layout, kind = args
            q, k, _ = attention.project(hidden_states, text, layout)
            self.found[block] = self._measure(block, kind, q, k, attention.scaling, layout)

        return measure

    def _measure(
        self, block: int, kind: Any, q: torch.Tensor, k: torch.Tensor, scaling: float, layout: VisionLayout
    ) -> dict[int, BlockAttention]:
        """Segment by segment; q (N, H, D) and k (N or N + M, H, D) of all groups."""
        packing, segments, device = self.packing, layout.segments[kind], q.device
        places = packing.places(layout).to(device)
        entries = 1 + len(self.heads)
        out: dict[int, BlockAttention] = {}
        for g, images in enumerate(packing.images):
            n, m, r = packing.size[g], packing.tokens[g], len(images)
            own = sum(packing.start[g] <= patch < packing.start[g] + n for patch in self.patches)
            shapes = [(entries, r, n + m), (entries, n, r + m), (entries, own, n + m)]
            looks, shares, chosen = (torch.zeros(shape, device=device) for shape in shapes)
            out[g] = BlockAttention(block, kind, (None, *self.heads), looks, shares, chosen)
        queries, keys = segments.cu_q.tolist(), segments.cu_k.tolist()
        for s in range(len(queries) - 1):
            rows = torch.arange(keys[s], keys[s + 1], device=device)
            rows = rows if segments.key_order is None else segments.key_order[rows]
            group = int(packing.group[queries[s]])
            self._add_segment(out[group], group, q, k[rows].float(), places, rows, queries[s : s + 2], scaling)
        for g, found in out.items():
            for i, image in enumerate(packing.images[g]):
                found.looks[:, i] /= packing.image_ends[image] - (packing.image_ends[image - 1] if image else 0)
            kept = {name: getattr(found, name).cpu() for name in ("looks", "shares", "chosen")}
            out[g] = BlockAttention(block, kind, found.heads, **kept)
        return out

    def _add_segment(
        self,
        out: BlockAttention,
        group: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        places: torch.Tensor,
        rows: torch.Tensor,
        span: list[int],
        scaling: float,
    ) -> None:
        """Add what the patches ``span`` (packed) look at: keys (K, H, D) fp32, packed rows (K,)."""
        packing = self.packing
        n, images = packing.size[group], packing.images[group]
        where = places[rows]
        # Columns of `shares`: the image of a patch, or one for each token.
        image = packing.image.to(rows.device)[rows.clamp(max=len(packing.image) - 1)] - images[0]
        column = torch.where(where < n, image, len(images) + where - n)
        keys = keys.permute(1, 2, 0) * scaling
        for first, last in self._pieces(span, keys.shape[0] * keys.shape[2]):
            scores = q[first:last].float().transpose(0, 1) @ keys
            weights = scores.softmax(-1)  # (H, patches, K)
            weights = torch.cat([weights.mean(0, keepdim=True), weights[self.heads]])
            own = int(packing.image[first]) - images[0]
            out.looks[:, own].index_add_(1, where, weights.sum(1))
            at = places[first:last]
            sums = out.shares.new_zeros(len(weights), last - first, out.shares.shape[2])
            out.shares[:, at] = sums.index_add_(2, column, weights)
            index = {patch - packing.start[group]: i for i, patch in enumerate(self._own_patches(group))}
            for i, place in enumerate(at.tolist() if index else ()):
                if place in index:
                    out.chosen[:, index[place], where] = weights[:, i]

    def _pieces(self, span: list[int], scores: int) -> Iterator[tuple[int, int]]:
        """Ranges of packed patches of one image each, small enough for `MAX_SCORES`."""
        step, first = max(1, MAX_SCORES // scores), span[0]
        while first < span[1]:
            end = self.packing.image_ends[int(self.packing.image[first])]
            last = min(first + step, span[1], end)
            yield first, last
            first = last

    def _own_patches(self, group: int) -> list[int]:
        start = self.packing.start[group]
        return [patch for patch in self.patches if start <= patch < start + self.packing.size[group]]


def _watched_blocks(base: VilavtModel, blocks: Sequence[int] | Literal["all"] | None) -> list[int]:
    if blocks is not None:
        return _chosen("block", blocks, len(base.visual.blocks))
    aware = sorted(base.visual.config.query_aware_blocks())
    if not aware:
        raise AttentionError(
            f"none of the {len(base.visual.blocks)} vision blocks is query-aware "
            f"(integration_point={base.visual.config.integration_point!r}), so no query changes what they look at; "
            "name blocks to see how they look inside windows and frames"
        )
    return aware


def _chosen(kind: str, wanted: Sequence[int] | Literal["all"], count: int) -> list[int]:
    """Indices below `count`, each once, in order."""
    if wanted == "all":
        return list(range(count))
    if isinstance(wanted, str):
        raise AttentionError(f"{kind}s={wanted!r}: give numbers from 0 to {count - 1}, or 'all'")
    for one in wanted:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < count:
            raise AttentionError(f"{kind} {one!r}: the vision encoder has {count} {kind}s, numbered 0 to {count - 1}")
    return sorted(set(wanted))


def _located(patches: Sequence[Patch], grids: torch.Tensor) -> list[int]:
    """Places of patches among all, image by image, row by row."""
    starts = [0, *grids.prod(1).cumsum(0).tolist()]
    out = []
    for patch in patches:
        if not 0 <= patch.image < len(grids):
            raise AttentionError(f"{patch}: there are {len(grids)} images, numbered 0 to {len(grids) - 1}")
        t, h, w = grids[patch.image].tolist()
        for name, value, size in (("frame", patch.frame, t), ("row", patch.row, h), ("column", patch.column, w)):
            if not 0 <= value < size:
                raise AttentionError(
                    f"{patch}: image {patch.image} has {size} {name}s of patches, numbered 0 to {size - 1}"
                )
        out.append(starts[patch.image] + (patch.frame * h + patch.row) * w + patch.column)
    if len(set(out)) != len(out):
        raise AttentionError(f"patches={list(patches)}: one is named twice")
    return out


# ---------------------------------------------------------------------- reducing to images


class _Entry(NamedTuple):
    """One block and head, or a mean over blocks."""

    block: int | None
    head: int | None
    looks: torch.Tensor
    """(R, N + M)"""
    shares: torch.Tensor
    """(N, R + M)"""
    chosen: torch.Tensor
    """(P, N + M)"""


def _entries(maps: GroupAttention) -> list[_Entry]:
    """The mean of several blocks, then each of them, with its chosen heads behind it."""
    single = [
        _Entry(block.block, head, block.looks[e], block.shares[e], block.chosen[e])
        for block in maps.blocks
        for e, head in enumerate(block.heads)
    ]
    if len(maps.blocks) == 1:
        return single
    means = [
        torch.stack([getattr(block, name)[0] for block in maps.blocks]).mean(0)
        for name in ("looks", "shares", "chosen")
    ]
    return [_Entry(None, None, *means), *single]


def _received(maps: GroupAttention, entry: _Entry) -> torch.Tensor:
    """(N + M,): how much each patch and query token is looked at, mean over all patches."""
    weights = torch.tensor(maps.sizes) / sum(maps.sizes)
    return (weights[:, None] * entry.looks).sum(0)


def _masses(maps: GroupAttention, entry: _Entry) -> torch.Tensor:
    """(R, R + 1): how much the patches of an image look at each image, and at the query."""
    images = len(maps.grids)
    of_images = torch.stack([part.mean(0) for part in entry.shares.split(maps.sizes)])
    return torch.cat([of_images[:, :images], of_images[:, images:].sum(1, keepdim=True)], 1)


def _rows(table: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def _per_image(maps: GroupAttention, values: torch.Tensor) -> list[np.ndarray]:
    """(N,) as one (frames * h, w) array for each image."""
    parts = values.split(maps.sizes)
    return [part.view(t * h, w).numpy() for part, (t, h, w) in zip(parts, maps.grids, strict=True)]


def _layer(maps: GroupAttention, entry: _Entry, words: Sequence[tuple[str, list[int]]], *, every_word: bool) -> Layer:
    images, patches = len(maps.grids), sum(maps.sizes)
    keys = patches + len(maps.token_ids)

    def heat(name: str, looks: torch.Tensor) -> Heat:
        return Heat.of(name, "times even", _per_image(maps, looks[:patches] * keys))

    heats = [heat("received", _received(maps, entry))]
    if images > 1:
        heats += [heat(f"region {r}", looks) for r, looks in enumerate(entry.looks)]
    heats += [heat(f"patch {p}", looks) for p, looks in enumerate(entry.chosen)]
    per_word = [entry.shares[:, [images + place for place in places]].sum(1) for _, places in words]
    if words:
        heats.append(Heat.of("query", "share", _per_image(maps, entry.shares[:, images:].sum(1))))
        if every_word:
            heats += [Heat.of(f"word {w}", "share", _per_image(maps, share)) for w, share in enumerate(per_word)]
    return Layer(
        entry.block,
        entry.head,
        _rows(_masses(maps, entry)),
        tuple(float(share.mean()) for share in per_word),
        tuple(heats),
    )


def _moved(maps: GroupAttention, before: _Entry, after: _Entry) -> float:
    """See `QueryDifference.moved`."""
    patches = sum(maps.sizes)

    def lumped(looks: torch.Tensor) -> torch.Tensor:
        return torch.cat([looks[:, :patches], looks[:, patches:].sum(1, keepdim=True)], 1)

    return float((lumped(after.looks) - lumped(before.looks)).abs().sum(1).mean() / 2)


def _changed_layer(before: GroupAttention, after: GroupAttention, a: _Entry, b: _Entry) -> Layer:
    """After minus before."""
    images, patches = len(before.grids), sum(before.sizes)

    def even(maps: GroupAttention, entry: _Entry) -> torch.Tensor:
        return _received(maps, entry)[:patches] * (patches + len(maps.token_ids))

    received = _per_image(before, even(after, b) - even(before, a))
    query = _per_image(before, b.shares[:, images:].sum(1) - a.shares[:, images:].sum(1))
    heats = (
        Heat.of("received", "times even", received, signed=True),
        Heat.of("query", "share", query, signed=True),
    )
    return Layer(a.block, a.head, _rows(_masses(after, b) - _masses(before, a)), (), heats)
