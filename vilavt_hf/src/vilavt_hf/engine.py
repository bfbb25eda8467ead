"""Token-in/token-out generation for many conversations at once; no image is encoded twice, no token is prefilled twice.

Contract: token ids in, token ids out. One `EngineRow` is one conversation's token stream; `Engine.submit`
appends a request's tokens and images to it, `Engine.step` advances every row that has work, and a row that has
finished a turn waits, with its keys and values, for its next request. Text, tool calls and crops are none of the
engine's business (`vilavt_core.episode` has them).

How reuse stays exact:

- a request's new images are encoded when they first appear, all groups of all waiting rows in one call (groups never
  see each other);
- between turns a row owns its keys and values alone, without padding. To run, rows are gathered side by side,
  right-aligned; pad slots are masked and are dropped again when a row leaves, so holes never pile up;
- every position is explicit, ``(3, B, L)``: the stock M-RoPE index of the new tokens alone plus the row's offset (its
  highest position + 1). The module keeps no state, so several engines may share one model;
- the last token a model samples (its stop token) is not in the cache when a turn ends; it is fed once, in front of the
  next request.

Shapes: B rows, L new tokens, S cached slots, H key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation import RepetitionPenaltyLogitsProcessor

from vilavt_core.conversation import Inquiry
from vilavt_core.errors import EngineError
from vilavt_core.presets import Sampling
from vilavt_core.results import Timings, Work

from . import compat

if TYPE_CHECKING:
    from vilavt_core.episode import Request

    from .modeling_vilavt import VilavtForConditionalGeneration

logger = logging.getLogger(__name__)

MAX_PREFILL_TOKENS = 16384
"""What `Engine` prefills at once by default."""

Encode = Callable[[Sequence["Inquiry"]], dict[str, torch.Tensor]]
"""Inquiries to the inputs of `get_image_features`, as `VilavtProcessor.encode_inquiries` does."""


class EncodedImage(NamedTuple):
    """One image as the language model gets it."""

    features: torch.Tensor
    """(n, C), one row per token."""
    grid: torch.Tensor
    """(3,): frames, and patches along height and width."""
    computed: bool = True
    """Whether the encoder has run for it."""


Features = Callable[[Sequence[Inquiry]], list[EncodedImage]]
"""Inquiries, of several rows at once (groups never see each other), to one entry per image, in order."""


class ImageFeatures:
    """`Features` of a model.

    Args:
        model: in eval mode.
        encode: inquiries to encoder inputs.
    """

    def __init__(self, model: VilavtForConditionalGeneration, encode: Encode) -> None:
        self.model, self.encode = model, encode

    def __call__(self, inquiries: Sequence[Inquiry]) -> list[EncodedImage]:
        """Encode all images."""
        inputs = self.encode(inquiries)
        device = compat.input_device(self.model)
        on_device: dict[str, Any] = {name: value.to(device) for name, value in inputs.items()}
        features = compat.pooled(self.model.model.get_image_features(**on_device, return_dict=True))
        return [EncodedImage(*pair) for pair in zip(features, inputs["image_grid_thw"], strict=True)]


@dataclass(frozen=True)
class Sampled:
    """One token of one row, or the row's failure."""

    row: EngineRow
    token_id: int | None
    logprob: float | None
    """Natural log of the token's probability under the model at temperature 1, banned tokens excluded, fp32."""
    finish: str | None = None
    """``stop`` or ``length`` on the last token of a turn; ``error`` if the row failed."""
    error: Exception | None = None


@dataclass(eq=False)
class EngineRow:
    """One conversation: its token stream and, between turns, its keys and values. Made by `Engine.open`."""

    generator: torch.Generator
    name: str = ""
    tokens: list[int] = field(default_factory=list)
    """The whole stream: prompts, sampled tokens, tool responses."""
    pending: list[int] = field(default_factory=list)
    """The end of `tokens` that is not in the cache yet."""
    next_position: int = 0
    """Highest M-RoPE position so far + 1."""
    layers: list[GrowingLayer] | None = None
    """Keys and values of n = len(tokens) - len(pending) tokens, without padding; None while the row runs or before it
    has run.
    """
    work: Work = field(default_factory=Work)
    inquiries: list[Inquiry] = field(default_factory=list)
    """Groups whose images are in `pending` and not encoded yet."""
    request: Request | None = None
    sampled: int = 0
    """Tokens sampled in the current turn."""
    images: set[int] = field(default_factory=set)
    """Indices of the images that were encoded."""
    closed: bool = False
    _distinct: set[int] = field(default_factory=set, repr=False)
    _counted: int = 0
    """Tokens that `_distinct` has taken in."""

    def distinct_tokens(self) -> set[int]:
        """Every token of the stream, once. Looks only at those that came since it was last asked: a stream grows."""
        self._distinct.update(self.tokens[self._counted :])
        self._counted = len(self.tokens)
        return self._distinct


class Choose(Protocol):
    """Picks the next token of every row."""

    def __call__(self, rows: Sequence[EngineRow], logits: torch.Tensor) -> torch.Tensor:
        """(B, V) fp32 logits, banned tokens at -inf, to (B,) token ids."""
        ...


class Sampler:
    """Greedy, or repetition penalty / temperature / top-k / top-p with one uniform number per token from the row's own
    generator.

    The penalty is transformers' `RepetitionPenaltyLogitsProcessor`, which does the same as vLLM's. Its temperature,
    top-k and top-p processors only mask; they neither draw per row nor keep ties in a fixed order, so the rest is done
    here.

    A row draws from its generator only, and exactly once per token, so what else is in the batch does not change its
    samples.

    Raises:
        EngineError: a setting is out of range.
    """

    def __init__(self, sampling: Sampling) -> None:
        wrong = (
            sampling.temperature < 0
            or not 0 < sampling.top_p <= 1
            or sampling.top_k < 0
            or sampling.repetition_penalty <= 0
        )
        if wrong:
            raise EngineError(
                f"{sampling}: temperature and top_k must be 0 or more, "
                "repetition_penalty above 0, top_p above 0 and at most 1"
            )
        self.sampling = sampling
        self._penalty = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))

    def __call__(self, rows: Sequence[EngineRow], logits: torch.Tensor) -> torch.Tensor:
        """See `Choose`."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            logits = self._penalised(rows, logits)
        if sampling.temperature == 0:
            return logits.argmax(-1)
        ordered, index = (logits / sampling.temperature).sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1, dtype=torch.float64)
        keep = probabilities.cumsum(-1) - probabilities < sampling.top_p
        if sampling.top_k:
            keep[:, sampling.top_k :] = False
        cumulative = (probabilities * keep).cumsum(-1)
        draw = torch.stack([torch.rand((), generator=row.generator, dtype=torch.float64) for row in rows]).to(
            logits.device
        )
        place = torch.searchsorted(cumulative, (draw * cumulative[:, -1])[:, None], right=True)
        # Rounding may put the draw on the very end of the kept mass.
        last = (probabilities * keep).gt(0).sum(-1, keepdim=True) - 1
        return index.gather(-1, torch.minimum(place, last))[:, 0]

    def _penalised(self, rows: Sequence[EngineRow], logits: torch.Tensor) -> torch.Tensor:
        """Logits after the repetition penalty over each row's whole stream, prompt included, as vLLM counts it."""
        seen = [list(row.distinct_tokens()) for row in rows]
        longest = max(map(len, seen))
        # transformers takes a rectangle; naming a token twice changes nothing
        ids = torch.tensor([tokens + tokens[:1] * (longest - len(tokens)) for tokens in seen], device=logits.device)
        penalised: torch.Tensor = self._penalty(ids, logits)
        return penalised


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer (B, H, S, D) with room to grow: the stock layer copies the whole cache for every
    new token.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        super().__init__()
        if keys is not None and values is not None:
            self._adopt(keys, values)

    def _adopt(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self._room = (
            keys,
            values,
        )  # written to only beyond its end, that is never before it was replaced by an own buffer
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, H, L, D) and return all S + L."""
        if not self.is_initialized:
            self._adopt(key_states, value_states)
            return self.keys, self.values
        before, after = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if after > self._room[0].shape[2]:
            slots = after + after // 4 + 64
            self._room = (_with_room(self.keys, slots), _with_room(self.values, slots))
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, before:after] = new
        self.keys, self.values = (room[:, :, :after] for room in self._room)
        return self.keys, self.values


def _with_room(old: torch.Tensor, slots: int) -> torch.Tensor:
    batch, heads, used, size = old.shape
    room = old.new_empty(batch, heads, slots, size)
    room[:, :, :used] = old
    return room


@dataclass
class _Batch:
    """Rows that run side by side: slot s of row b is real where mask[b, s]."""

    rows: list[EngineRow]
    mask: torch.Tensor
    layers: list[GrowingLayer]

    @property
    def cache(self) -> DynamicCache:
        """The layers as the model takes them; they grow in place."""
        cache: Any = DynamicCache()
        cache.layers, cache.layer_class_to_replicate = self.layers, None
        return cache


class Engine:
    """Generates for many rows at once; see the module docstring for the contract.

    Args:
        model: in eval mode; it may be quantised, or dispatched over devices by transformers.
        encode: inquiries to encoder inputs.
        choose: picks tokens; greedy by default.
        max_batch_size: rows that run side by side; more wait in line.
        max_prefill_tokens: new tokens, padding included, that one step prefills (and whose images it encodes) at most,
            unless one row alone has more; bounds the memory of a step.
        clock: what `timings` is measured with, e.g. `time.process_time`.
        n_tokens: ids from here on stand for no token (the tokenizer's length; a Qwen2.5-VL has rows for more) and are
            never sampled. None: all may be.

    Raises:
        EngineError: the language model has sliding-window layers (padding slots would count as distance).
    """

    def __init__(
        self,
        model: VilavtForConditionalGeneration,
        encode: Encode,
        *,
        choose: Choose | None = None,
        max_batch_size: int = 8,
        max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        clock: Callable[[], float] = time.perf_counter,
        n_tokens: int | None = None,
    ) -> None:
        config: Any = model.config
        kinds = set(getattr(config.text_config, "layer_types", None) or ()) - {"full_attention"}
        if kinds:
            raise EngineError(
                f"the language model has layers of kind {sorted(kinds)}, only full_attention is supported"
            )
        if max_batch_size < 1:
            raise EngineError(f"max_batch_size={max_batch_size}, it must be at least 1")
        self.model = model
        self.device = compat.input_device(model)
        """Where inputs go."""
        self.features: Features = ImageFeatures(model, encode)
        """Where features come from; an ablation wraps it."""
        self.choose = choose or Sampler(Sampling())
        self.max_batch_size = max_batch_size
        self.max_prefill_tokens = max_prefill_tokens
        self._layers: int = config.text_config.num_hidden_layers
        self._merge_unit: int = config.vision_config.spatial_merge_size**2
        self.clock = clock
        self.n_tokens = n_tokens
        self.timings = Timings()
        self._waiting: list[EngineRow] = []
        self._running: _Batch | None = None
        self._banned: dict[tuple[int, ...], torch.Tensor] = {}

    # ------------------------------------------------------------------ rows

    def open(self, seed: int = 0, name: str = "") -> EngineRow:
        """A new, empty conversation; `seed` drives its sampling alone, `name` appears in error messages."""
        return EngineRow(torch.Generator().manual_seed(seed), name)

    def submit(self, row: EngineRow, request: Request) -> None:
        """Append a request to its row and queue the row for generation.

        Args:
            row: idle, with the stream the request continues.
            request: see `vilavt_core.episode.Request`.

        Raises:
            EngineError: the row is busy, or the request continues another stream.
        """
        self._append(row, request)
        if request.max_new_tokens < 1:
            raise EngineError(f"{self._name(row)}: max_new_tokens={request.max_new_tokens}, it must be at least 1")
        row.request, row.sampled = request, 0
        self._waiting.append(row)

    def close(self, row: EngineRow) -> None:
        """Free the row's keys and values; a running or waiting row is taken out first."""
        if row in self._waiting:
            self._waiting.remove(row)
        if self._running is not None and row in self._running.rows:
            self._leave([self._running.rows.index(row)])
        row.request = row.layers = None
        row.closed = True

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting) or self._running is not None

    def _append(self, row: EngineRow, request: Request) -> None:
        if self.model.training:
            raise EngineError("the model is in training mode; call model.eval() before generating")
        if row.closed:
            raise EngineError(
                f"{self._name(row)}: it failed or was closed, its keys and values are gone; open a new row"
            )
        if row.request is not None:
            raise EngineError(f"{self._name(row)}: a request arrived while turn {row.request.turn} is being generated")
        before = len(request.all_token_ids) - len(request.new_token_ids)
        if before != len(row.tokens) or list(request.all_token_ids[:before]) != row.tokens:
            raise EngineError(
                f"{self._name(row)}, turn {request.turn}: it continues {before} tokens, "
                f"the row holds {len(row.tokens)} (or other ones); one row takes all requests of an episode, in order"
            )
        row.tokens += request.new_token_ids
        row.pending += request.new_token_ids
        row.inquiries += request.new_inquiries

    @staticmethod
    def _name(row: EngineRow) -> str:
        return f"sample {row.name}" if row.name else "row"

    # ------------------------------------------------------------------ one step

    @torch.inference_mode()
    def step(self) -> list[Sampled]:
        """Prefill rows that wait, if there is room, else decode one token for all running rows.

        Returns:
            One entry per row that moved. A row whose computation raised gets ``finish="error"`` and is closed; the
            others go on.
        """
        room = self.max_batch_size - (len(self._running.rows) if self._running else 0)
        if self._waiting and room > 0:
            return self._start(self._next_rows(room))
        if self._running is None:
            return []
        batch = self._running
        try:
            began = self.clock()
            batch, logits = self._decode(batch)
            self.timings.decode += self.clock() - began
            return self._emit(batch, logits)
        except Exception as error:  # one bad batch must not take the waiting rows along
            logger.exception("decoding failed for %d rows", len(batch.rows))
            self._running = None
            return [self._failed(row, error) for row in batch.rows]

    def _next_rows(self, room: int) -> list[EngineRow]:
        """Take the rows that are prefilled together out of the line: the first always, then while they fit."""
        rows = self._waiting[:1]
        longest = len(rows[0].pending)
        for row in self._waiting[1:room]:
            longest = max(longest, len(row.pending))
            if (len(rows) + 1) * longest > self.max_prefill_tokens:
                break
            rows.append(row)
        del self._waiting[: len(rows)]
        return rows

    def _start(self, rows: list[EngineRow]) -> list[Sampled]:
        try:
            batch, logits = self._prefill(rows)
        except Exception as error:
            if len(rows) == 1:
                return [self._failed(rows[0], error)]
            # Side by side rows run on copies and keep what they own until the prefill has succeeded, so each can be
            # tried alone.
            logger.warning("prefill of %d rows failed (%s); trying them one by one", len(rows), error)
            return [event for row in rows for event in self._start([row])]
        first = len(self._running.rows) if self._running else 0
        return self._emit(self._join(batch), logits, first)

    def _failed(self, row: EngineRow, error: Exception) -> Sampled:
        row.request = row.layers = None
        row.closed = True
        return Sampled(row, None, None, "error", error)

    def _emit(self, batch: _Batch, logits: torch.Tensor, first: int = 0) -> list[Sampled]:
        """Choose a token for rows `first` … of the batch, from their logits (n, V), and let finished rows leave."""
        rows = batch.rows[first:]
        requests = [row.request for row in rows if row.request is not None]
        logits = logits.float()
        if self.n_tokens is not None:
            logits[:, self.n_tokens :] = -torch.inf
        for b, request in enumerate(requests):
            if request.banned_token_ids:
                logits[b, self._banned_ids(request.banned_token_ids)] = -torch.inf
        chosen = self.choose(rows, logits)
        logprobs = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0].tolist()
        self._running = batch
        events, leaving = [], []
        for b, (row, request, token, logprob) in enumerate(zip(rows, requests, chosen.tolist(), logprobs, strict=True)):
            row.tokens.append(token)
            row.pending.append(token)
            row.sampled += 1
            finish = (
                "stop"
                if token in request.stop_token_ids
                else "length"
                if row.sampled >= request.max_new_tokens
                else None
            )
            if finish:
                leaving.append(first + b)
            events.append(Sampled(row, token, logprob, finish))
        self._leave(leaving)
        return events

    def _banned_ids(self, ids: tuple[int, ...]) -> torch.Tensor:
        ids = tuple(ids)
        if ids not in self._banned:
            self._banned[ids] = torch.tensor(ids, device=self.device)
        return self._banned[ids]

    # ------------------------------------------------------------------ model calls

    def _prefill(self, rows: list[EngineRow]) -> tuple[_Batch, torch.Tensor]:
        """Run the pending tokens of all rows, right-aligned; returns their batch and the logits (n, V) after the last
        token of each.
        """
        device = self.device
        began = self.clock()
        features, images = self._encode(rows)
        grids = [torch.stack([one.grid for one in mine]) if mine else None for mine in images]
        encoded = self.clock()
        self.timings.encode += encoded - began
        pad = rows[0].pending[0]  # any valid id: pad slots are masked
        length = max(len(row.pending) for row in rows)
        ids = torch.full((len(rows), length), pad)
        new = torch.zeros(len(rows), length, dtype=torch.long)
        positions = torch.zeros(3, len(rows), length, dtype=torch.long)
        image = torch.zeros(len(rows), length, dtype=torch.bool)
        ends = []
        for b, (row, grid) in enumerate(zip(rows, grids, strict=True)):
            chunk = torch.tensor(row.pending)
            start = length - len(chunk)
            ids[b, start:], new[b, start:] = chunk, 1
            image[b, start:] = chunk == self.model.config.image_token_id
            self._check_features(row, int(image[b].sum()), grid)
            where = compat.rope_index(self.model.model, chunk, grid) + row.next_position
            positions[:, b, start:] = where
            ends.append(int(where.max()) + 1)
        embeds = self.model.get_input_embeddings()(ids.to(device))
        if features is not None:
            embeds = embeds.masked_scatter(image.to(device)[..., None], features.to(device, embeds.dtype))
        layers, mask = self._gather(rows)
        batch = _Batch(list(rows), mask, layers)
        batch.mask = torch.cat([mask, new.to(device)], 1)
        logits = self._forward(embeds, batch.mask, positions.to(device), batch.cache)
        self.timings.prefill += self.clock() - encoded
        for row, end, mine in zip(rows, ends, images, strict=True):
            self._count_patches(row, mine)
            row.work.tokens_prefilled += len(row.pending)
            row.work.distinct_tokens = len(row.tokens)
            row.next_position = end
            row.pending, row.inquiries = [], []
            row.layers = None
        return batch, logits

    def _decode(self, batch: _Batch) -> tuple[_Batch, torch.Tensor]:
        """Run the last sampled token of every row."""
        device = self.device
        embeds = self.model.get_input_embeddings()(
            torch.tensor([[row.pending[-1]] for row in batch.rows], device=device)
        )
        positions = torch.tensor([[row.next_position] for row in batch.rows], device=device).expand(3, -1, -1)
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], 1)
        logits = self._forward(embeds, batch.mask, positions, batch.cache)
        for row in batch.rows:
            row.pending = []
            row.next_position += 1
            row.work.tokens_decoded += 1
            row.work.distinct_tokens = len(row.tokens)
        return batch, logits

    def _forward(
        self, embeds: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        out = self.model(
            inputs_embeds=embeds,
            attention_mask=compat.decoder_mask(self.model.model, mask, embeds),
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{compat.CACHE: cache},
        )
        return out.logits[:, -1]

    def _encode(self, rows: list[EngineRow]) -> tuple[torch.Tensor | None, list[list[EncodedImage]]]:
        """Features (n, C) of all rows' new images in stream order, and each row's images."""
        inquiries = [inquiry for row in rows for inquiry in row.inquiries]
        if not inquiries:
            return None, [[] for _ in rows]
        encoded = iter(self.features(inquiries))
        images = [list(islice(encoded, sum(len(i.images) for i in row.inquiries))) for row in rows]
        return torch.cat([one.features for mine in images for one in mine]), images

    @staticmethod
    def _count_patches(row: EngineRow, images: Sequence[EncodedImage]) -> None:
        """An image counts as distinct by its index in the conversation, however often its pixels are sent."""
        indices = [index for inquiry in row.inquiries for index in inquiry.image_indices]
        for index, image in zip(indices, images, strict=True):
            if image.computed:
                patches = int(image.grid.prod())
                row.work.patches_encoded += patches
                row.work.distinct_patches += 0 if index in row.images else patches
                row.images.add(index)

    def _check_features(self, row: EngineRow, placeholders: int, grid: torch.Tensor | None) -> None:
        features = 0 if grid is None else int(grid.prod(-1).sum()) // self._merge_unit
        if placeholders != features:
            raise EngineError(
                f"{self._name(row)}: {placeholders} image placeholders among the new tokens, {features} features "
                "from its new images; both must come from the same request"
            )

    # ------------------------------------------------------------------ cache

    def _gather(self, rows: list[EngineRow]) -> tuple[list[GrowingLayer], torch.Tensor]:
        """The rows' own caches side by side, right-aligned, and the mask (B, S) of their real slots."""
        lengths = [row.layers[0].keys.shape[2] if row.layers else 0 for row in rows]
        slots = max(lengths)
        mask = torch.zeros(len(rows), slots, dtype=torch.long)
        for b, length in enumerate(lengths):
            mask[b, slots - length :] = 1
        example = next((row.layers for row in rows if row.layers), None)
        if example is None:
            return [GrowingLayer() for _ in range(self._layers)], mask.to(self.device)
        if len(rows) == 1:
            return example, mask.to(self.device)  # nothing to align: it grows where it is
        blank = [GrowingLayer(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in example]
        layers = []
        for parts in zip(*(row.layers or blank for row in rows), strict=True):
            keys = torch.cat([_pad_left(part.keys, slots) for part in parts])
            values = torch.cat([_pad_left(part.values, slots) for part in parts])
            layers.append(GrowingLayer(keys, values))
        return layers, mask.to(self.device)

    def _join(self, new: _Batch) -> _Batch:
        """Put newly prefilled rows under the running ones, right-aligned."""
        old = self._running
        if old is None:
            return new
        slots = max(old.mask.shape[1], new.mask.shape[1])
        mask = torch.cat([torch.nn.functional.pad(part.mask, (slots - part.mask.shape[1], 0)) for part in (old, new)])
        layers = [
            GrowingLayer(
                torch.cat([_pad_left(a.keys, slots), _pad_left(b.keys, slots)]),
                torch.cat([_pad_left(a.values, slots), _pad_left(b.values, slots)]),
            )
            for a, b in zip(old.layers, new.layers, strict=True)
        ]
        return _Batch(old.rows + new.rows, mask, layers)

    def _leave(self, places: list[int]) -> None:
        """Hand the rows at `places` their own keys and values back, without holes, and close the gap."""
        batch = self._running
        if batch is None or not places:
            return
        for b in places:
            row, real = batch.rows[b], batch.mask[b].bool()
            row.request = None
            if len(batch.rows) == 1 and bool(real.all()):
                row.layers = batch.layers  # with their room to grow
                continue
            row.layers = [_kept(layer, [b], real) for layer in batch.layers]
        stay = [b for b in range(len(batch.rows)) if b not in places]
        if not stay:
            self._running = None
            return
        # Slots that only the leaving rows used are dropped with them.
        mask = batch.mask[stay]
        used = mask.bool().any(0)
        layers = [_kept(layer, stay, used) for layer in batch.layers]
        self._running = _Batch([batch.rows[b] for b in stay], mask[:, used], layers)


def _kept(layer: GrowingLayer, rows: list[int], slots: torch.Tensor) -> GrowingLayer:
    """Some rows of a layer and the slots (S,) that are true; layers may be on several devices."""
    slots = slots.to(layer.keys.device)
    return GrowingLayer(layer.keys[rows][:, :, slots], layer.values[rows][:, :, slots])


def _pad_left(x: torch.Tensor, slots: int) -> torch.Tensor:
    """(B, H, n, D) -> (B, H, slots, D), zeros in front: masked, but they must be finite."""
    return torch.nn.functional.pad(x, (0, 0, slots - x.shape[2], 0)) if x.shape[2] < slots else x
