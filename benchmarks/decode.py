"""Where a decoded token's time goes in the local engine, and what a static cache with torch.compile makes of it.

    python benchmarks/decode.py [--context 2400] [--tokens 40] [--compile] [--small] [--json FILE]

CPU milliseconds per token on one thread, medians; the rows take turns, token by token, in one run. The model is that
of `multi_turn.py`, `--small` a tiny one. *engine*: `vilavt_hf.engine` with one conversation, or eight side by side;
*matrix products*, *attention*: what one token needs of them, without anything around them; *static cache*: the language
model called at once, with a cache of fixed size whose empty slots are masked; ``--compile``: the same compiled (needs a
C++ compiler and minutes). All must say the same tokens, and differ by 1e-5 at most in their log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from multi_turn import SMALL, VOCABULARY, Size, processor, random_model
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from vilavt_core.conversation import Request
from vilavt_hf import compat
from vilavt_hf.engine import Engine, EngineRow, GrowingLayer

SIDE_BY_SIDE = 8
TOLERANCE = 1e-5


class Decoding:
    """The engine with some conversations of the same tokens, past their prefill."""

    def __init__(self, model: Any, context: Sequence[int], rows: int) -> None:
        self.logprobs: list[torch.Tensor] = []
        self.engine = Engine(model, lambda _: {}, choose=self.choose, max_batch_size=rows)
        self.rows = [self.engine.open() for _ in range(rows)]
        for row in self.rows:
            self.engine.submit(row, Request(list(context), list(context), (), (), 1 << 20, (), (), 0))
        while self.engine._waiting:
            self.step()

    def choose(self, rows: Sequence[EngineRow], logits: torch.Tensor) -> torch.Tensor:
        """Greedily."""
        self.logprobs.append(logits[0].log_softmax(-1))
        return logits.argmax(-1)

    def step(self) -> None:
        """One token of every row."""
        for event in self.engine.step():
            if event.error is not None:
                raise event.error


class StaticLayer(GrowingLayer):
    """Keys and values of one layer in slots that are all handed out, at the next of which it writes."""

    def __init__(self, layer: GrowingLayer, slots: int, place: torch.Tensor) -> None:
        used = layer.keys.shape[2]
        pad = (0, 0, 0, slots - used)
        super().__init__(*(torch.nn.functional.pad(one, pad) for one in (layer.keys, layer.values)))
        self.place = place

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write (B, H, 1, D) and return all slots."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values


class Static:
    """One conversation that goes on from the engine's cache without the engine."""

    def __init__(self, model: Any, context: Sequence[int], tokens: int, compiled: bool) -> None:
        begun = Decoding(model, context, 1)
        row, layers = begun.rows[0], begun.engine._running.layers  # type: ignore[union-attr]
        used = layers[0].keys.shape[2]
        slots = used + tokens + 1
        self.model, self.logprobs, self.tokens = model, begun.logprobs, row.tokens
        self.place = torch.tensor([used])
        self.position = torch.full((3, 1, 1), row.next_position)
        self.mask = torch.full((1, 1, 1, slots), torch.finfo(torch.float32).min)
        self.mask[..., :used] = 0
        cache: Any = DynamicCache()
        cache.layers = [StaticLayer(layer, slots, self.place) for layer in layers]
        cache.layer_class_to_replicate = None
        self.cache = cache
        self.forward = torch.compile(self._forward, fullgraph=True, dynamic=False) if compiled else self._forward

    def _forward(self, embeds: torch.Tensor, mask: torch.Tensor, position: torch.Tensor, cache: Any) -> torch.Tensor:
        out = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=True, **{compat.CACHE: cache}
        )
        return self.model.lm_head(out.last_hidden_state[:, -1])

    @torch.inference_mode()
    def step(self) -> None:
        """One token."""
        embeds = self.model.get_input_embeddings()(torch.tensor([[self.tokens[-1]]]))
        self.mask[..., int(self.place)] = 0
        logits = self.forward(embeds, self.mask, self.position, self.cache)
        self.place.add_(1)
        self.position.add_(1)
        self.logprobs.append(logits[0].float().log_softmax(-1))
        self.tokens.append(int(logits.argmax()))


def products(model: Any) -> Callable[[], None]:
    """The matrix products of one token."""
    text = model.model.language_model
    x = torch.ones(1, 1, model.config.text_config.hidden_size)

    @torch.inference_mode()
    def run() -> None:
        for layer in text.layers:
            attention, mlp = layer.self_attn, layer.mlp
            attention.k_proj(x)
            attention.v_proj(x)
            attention.o_proj(attention.q_proj(x))
            mlp.down_proj(mlp.gate_proj(x) + mlp.up_proj(x))
        model.lm_head(x)

    return run


def attention(decoding: Decoding, heads: int) -> Callable[[], None]:
    """The attention of one token: what it reads is what the engine has in its cache."""
    layers = decoding.engine._running.layers  # type: ignore[union-attr]
    size, groups = layers[0].keys.shape[-1], layers[0].keys.shape[1]
    query = torch.ones(1, groups, heads // groups, size)

    @torch.inference_mode()
    def run() -> None:
        for layer in layers:
            mask = torch.zeros(1, 1, 1, layer.keys.shape[2])
            torch.nn.functional.scaled_dot_product_attention(query, layer.keys, layer.values, attn_mask=mask)

    return run


def benchmark(size: Size, context: int, tokens: int, compiled: bool) -> dict[str, Any]:
    """Milliseconds of each row, and whether all said the same."""
    torch.set_num_threads(1)
    model = random_model(size)
    words = torch.randint(10, VOCABULARY, (context,), generator=torch.Generator().manual_seed(5)).tolist()
    one, many = Decoding(model, words, 1), Decoding(model, words, SIDE_BY_SIDE)
    static = {"static cache": Static(model, words, tokens, compiled=False)}
    if compiled:
        static["static cache, compiled"] = Static(model, words, tokens, compiled=True)
    rows: dict[str, Callable[[], None]] = {
        "engine, 1 conversation": one.step,
        f"engine, {SIDE_BY_SIDE} side by side, per token": many.step,
        "matrix products": products(model),
        "attention": attention(one, model.config.text_config.num_attention_heads),
        **{name: way.step for name, way in static.items()},
    }
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for step in range(tokens):
        for name, run in rows.items():
            began = time.process_time()
            run()
            if step:  # the first sets up kernels, or compiles
                taken[name].append(1000 * (time.process_time() - began))
    found = {name: statistics.median(times) for name, times in taken.items()}
    found[f"engine, {SIDE_BY_SIDE} side by side, per token"] /= SIDE_BY_SIDE
    difference = {}
    for name, way in static.items():
        if way.tokens != one.rows[0].tokens:
            raise SystemExit(f"{name} says other tokens than the engine")
        pairs = zip(way.logprobs, one.logprobs, strict=True)
        difference[name] = max(float((a - b).abs().max()) for a, b in pairs)
    if not max(difference.values()) <= TOLERANCE:
        raise SystemExit(f"log-probabilities differ from the engine's: {difference}")
    return {
        "processor": processor(),
        "parameters_of_language_model": sum(p.numel() for p in model.model.language_model.parameters()),
        "context": context,
        "milliseconds": found,
        "logprob_difference": difference,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2400, help="tokens before the first that is measured")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--compile", action="store_true", help="also compiled, with a C++ compiler")
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    figures = benchmark(SMALL if options.small else Size(), options.context, options.tokens, options.compile)
    million = figures["parameters_of_language_model"] / 1e6
    table = Table(title=f"{million:.1f} M parameters, {options.context} tokens of context, {figures['processor']}")
    for column in ("", "CPU ms per token", "engine / this"):
        table.add_column(column, justify="right" if column else "left")
    engine, *_ = figures["milliseconds"].values()
    for name, milliseconds in figures["milliseconds"].items():
        table.add_row(name, f"{milliseconds:.2f}", f"{engine / milliseconds:.2f}")
    console = Console()
    console.print(table)
    console.print(f"largest difference of log-probabilities: {max(figures['logprob_difference'].values()):.1e}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
