"""What reuse saves: one forced conversation through three loops over the same random model.

    python benchmarks/multi_turn.py [--small] [--repeats 3] [--json FILE]

The conversation has 1 image, then 6 inquiries of 2 regions, and 64 forced tokens in each of its 7 turns (sizes of
`tests/golden/README.md` §5: about 55 million parameters, 400 tokens of text at first, about 130 per turn). The loops:

a. *plain*: every turn encodes all images again and prefills the whole stream again, as the published evaluation does;
b. *encode once*: image features are kept, the stream is prefilled again;
c. *ours*: `vilavt_hf.engine.Engine`.

Repeats are interleaved; seconds are process CPU seconds on one thread (the minimum of the repeats, so that other work
on the machine does not count), wall seconds are printed beside them. The ratio is printed with its spread over the
repeats, in each of which the loops ran one after the other, and with the processor's name: decoding, which all loops
pay, is bound by the memory of the machine. All three must end in the same logits (1e-3, fp32).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from vilavt_core.episode import Inquiry, Request
from vilavt_hf import VilavtConfig, VilavtForConditionalGeneration, compat
from vilavt_hf.engine import Engine, EngineRow

VOCABULARY = 2000
IMAGE, VIDEO, VISION_START, VISION_END, STOP = range(5)
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
PATCH = 1176

Clock = Callable[[], float]
"""Seconds since some moment, of the kind that is measured."""


@dataclass(frozen=True)
class Size:
    """How large the model and the conversation are; grids are (rows, columns) of 14-pixel patches."""

    image: tuple[int, int] = (40, 40)
    regions: tuple[tuple[int, int], ...] = ((24, 24), (20, 28))
    inquiries: int = 6
    sampled: int = 64
    first_text: int = 400
    turn_text: int = 130
    query: int = 20
    vision_width: int = 320
    vision_mlp: int = 864
    vision_depth: int = 16
    text_width: int = 512
    text_mlp: int = 1376
    text_layers: int = 8
    query_width: int = 256
    query_layers: int = 4


SMALL = Size(
    image=(20, 20),
    regions=((8, 8), (8, 12)),
    inquiries=3,
    sampled=8,
    first_text=60,
    turn_text=20,
    query=6,
    vision_width=64,
    vision_mlp=96,
    vision_depth=4,
    text_width=64,
    text_mlp=96,
    text_layers=2,
    query_width=32,
    query_layers=2,
)


def with_weights_in(model: Any, dtype: torch.dtype) -> Any:
    """Cast the parameters in place, as loading in that type does: `Module.to` would round the frequencies of rotary
    positions too, which stay in fp32. Gradients are dropped.
    """
    for parameter in model.parameters():
        parameter.grad, parameter.data = None, parameter.data.to(dtype)
    return model


def random_model(
    size: Size, vocabulary: int = VOCABULARY, tokens: dict[str, int] = TOKENS, stop: int = STOP
) -> VilavtForConditionalGeneration:
    """A seeded model of the published shape (late integration), about 55 million parameters at the default size.

    Args:
        size: of the model.
        vocabulary: number of tokens.
        tokens: ids of the placeholders, as the configuration names them.
        stop: id of the token that ends a turn.
    """
    torch.manual_seed(0)
    depth, half = size.vision_depth, size.text_width // 16
    third = 3 * half // 8
    config = VilavtConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": size.text_width,
            "intermediate_size": size.text_mlp,
            "num_hidden_layers": size.text_layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rope_scaling": {
                "type": "mrope",
                "rope_type": "default",
                "mrope_section": [half - 2 * third, third, third],
            },
            "bos_token_id": None,
            "eos_token_id": stop,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": depth,
            "hidden_size": size.vision_width,
            "intermediate_size": size.vision_mlp,
            "num_heads": 8,
            "out_hidden_size": size.text_width,
            "window_size": 112,
            "fullatt_block_indexes": [depth // 4 - 1, depth // 2 - 1],
            "integration_point": "late",
        },
        text_encoder_config={
            "vocab_size": vocabulary,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": size.query_width,
            "intermediate_size": 4 * size.query_width,
            "num_hidden_layers": size.query_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": size.query_width // 4,
        },
        **tokens,
        tie_word_embeddings=True,
    )
    model = VilavtForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Scaled up, so that attention is peaked and a wrong position or mask would show in the logits.
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                scale = parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


class Conversation:
    """The forced conversation: per turn its new tokens, its new inquiries, and what the model is made to say."""

    def __init__(self, size: Size, seed: int = 2) -> None:
        generator = torch.Generator().manual_seed(seed)

        def words(count: int) -> list[int]:
            return torch.randint(10, VOCABULARY, (count,), generator=generator).tolist()

        self.turns: list[tuple[list[int], list[Inquiry], list[int]]] = []
        self.inputs: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        """Patches, grids and query of every inquiry, by its id."""
        shown = 0
        for turn in range(size.inquiries + 1):
            grids = [size.image] if turn == 0 else list(size.regions)
            # Engines only look at the places of images; pixels come from `encode` below.
            blank = tuple(Image.new("RGB", (14 * columns, 14 * rows)) for rows, columns in grids)
            inquiry = Inquiry(blank, "what?" if turn else "", tuple(range(shown, shown + len(grids))))
            shown += len(grids)
            pixels = torch.randn(sum(rows * columns for rows, columns in grids), PATCH, generator=generator)
            query = torch.tensor(words(size.query if turn else 1))
            self.inputs[id(inquiry)] = (
                pixels,
                torch.tensor([[1, r, c] for r, c in grids]),
                query if turn else query * 0,
            )
            text = words(size.first_text if turn == 0 else size.turn_text)
            new = text[: len(text) // 2]
            for rows, columns in grids:
                new += [VISION_START, *[IMAGE] * (rows * columns // 4), VISION_END]
            self.turns.append((new + text[len(text) // 2 :], [inquiry], [*words(size.sampled - 1), STOP]))

    def encode(self, inquiries: Sequence[Inquiry]) -> dict[str, torch.Tensor]:
        """Inputs of `get_image_features`: (N, 1176) patches, grids, and query rows padded to the longest."""
        parts = [self.inputs[id(inquiry)] for inquiry in inquiries]
        queries = [query for _, _, query in parts]
        longest = max(map(len, queries))
        ids = torch.stack([torch.nn.functional.pad(query, (0, longest - len(query))) for query in queries])
        mask = torch.stack([(torch.arange(longest) < len(query)).long() * int(bool(query.any())) for query in queries])
        return {
            "pixel_values": torch.cat([pixels for pixels, _, _ in parts]),
            "image_grid_thw": torch.cat([grid for _, grid, _ in parts]),
            "query_ids": ids,
            "query_attention_mask": mask,
            "images_per_query": torch.tensor([len(inquiry.images) for inquiry in inquiries]),
        }


@dataclass
class Cost:
    """CPU seconds by phase, wall seconds, and how much was computed."""

    encode: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    wall: float = 0.0
    patches: int = 0
    tokens: int = 0
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    """(sampled, vocabulary): what the model saw in the last turn."""

    @property
    def total(self) -> float:
        return self.encode + self.prefill + self.decode


@torch.inference_mode()
def run_again_and_again(model: Any, talk: Conversation, keep_features: bool, now: Clock = time.process_time) -> Cost:
    """Loops a and b: every turn starts from an empty cache."""
    cost, began, device = Cost(), time.perf_counter(), model.device
    tokens: list[int] = []
    inquiries: list[Inquiry] = []
    kept: list[torch.Tensor] = []
    grids: list[torch.Tensor] = []
    for new, added, forced in talk.turns:
        tokens, inquiries = tokens + new, inquiries + added
        clock = now()
        if not keep_features:
            kept, grids = [], []
        inputs = talk.encode(added if keep_features else inquiries)
        on_device = {name: value.to(device) for name, value in inputs.items()}
        kept += compat.pooled(model.model.get_image_features(**on_device))
        grids.append(inputs["image_grid_thw"])
        cost.patches += len(inputs["pixel_values"])
        cost.encode += now() - clock

        clock = now()
        ids = torch.tensor([tokens])
        positions = compat.rope_index(model.model, ids[0], torch.cat(grids))[:, None]
        ids, positions = ids.to(device), positions.to(device)
        embeds = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], torch.cat(kept))
        cache = DynamicCache()
        mask = torch.ones_like(ids)

        def forward(embeds: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
            out = model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                logits_to_keep=1,
                **{compat.CACHE: cache},
            )
            return out.logits[0, -1].float()

        seen = [forward(embeds, mask, positions, cache)]
        cost.tokens += len(tokens)
        cost.prefill += now() - clock

        clock = now()
        position = int(positions.max())
        for token in forced[:-1]:
            position += 1
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            embeds = model.get_input_embeddings()(torch.tensor([[token]], device=device))
            seen.append(forward(embeds, mask, torch.full((3, 1, 1), position, device=device), cache))
            cost.tokens += 1
        cost.decode += now() - clock
        tokens = tokens + forced
        cost.logits = torch.stack(seen)
    cost.wall = time.perf_counter() - began
    return cost


def run_ours(model: Any, talk: Conversation, now: Clock = time.process_time, **options: Any) -> tuple[Cost, EngineRow]:
    """Loop c: the engine, forced token by token through its decode loop. `options` are the engine's."""
    forced: list[int] = []
    seen: list[torch.Tensor] = []

    def choose(rows: Sequence[EngineRow], logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits[0].clone())
        return torch.tensor([forced[len(seen) - 1]], device=logits.device)

    engine = Engine(model, talk.encode, choose=choose, clock=now, **options)
    row = engine.open()
    began = time.perf_counter()
    inquiries: list[Inquiry] = []
    for turn, (new, added, said) in enumerate(talk.turns):
        inquiries = inquiries + added
        forced, seen = said, []
        request = Request(new, row.tokens + new, tuple(added), tuple(inquiries), len(said), (STOP,), (), turn)
        engine.submit(row, request)
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise event.error
    spent = engine.timings
    work = row.work
    tokens = work.tokens_prefilled + work.tokens_decoded
    cost = Cost(spent.encode, spent.prefill, spent.decode, time.perf_counter() - began, work.patches_encoded, tokens)
    cost.logits = torch.stack(seen)
    return cost, row


def compare(
    model: Any,
    talk: Conversation,
    repeats: int,
    now: Clock = time.process_time,
    tolerance: float = 1e-3,
    limit: float = math.inf,
) -> dict[str, Any]:
    """Run the three loops `repeats` times, interleaved, and compare the fastest of each.

    Args:
        model: on the device that is measured.
        talk: what is said.
        repeats: of each loop.
        now: what is measured.
        tolerance: of the last turn's logits.
        limit: wall seconds after which no further repeat begins.
    """
    loops: dict[str, Callable[[], Cost]] = {
        "plain": lambda: run_again_and_again(model, talk, keep_features=False, now=now),
        "encode once": lambda: run_again_and_again(model, talk, keep_features=True, now=now),
        "ours": lambda: run_ours(model, talk, now)[0],
    }
    runs: dict[str, list[Cost]] = {name: [] for name in loops}
    began = time.perf_counter()
    while len(runs["ours"]) < repeats and (not runs["ours"] or time.perf_counter() - began < limit):
        for name, loop in loops.items():
            runs[name].append(loop())
    reference = runs["plain"][0].logits
    difference = {name: float((costs[0].logits - reference).abs().max()) for name, costs in runs.items()}
    rms = {name: float((costs[0].logits - reference).pow(2).mean().sqrt()) for name, costs in runs.items()}
    if not max(difference.values()) <= tolerance:
        raise SystemExit(f"the loops disagree on the last turn's logits: {difference}")
    # Each phase's minimum: noise only ever adds.
    best = {
        name: Cost(
            min(c.encode for c in costs),
            min(c.prefill for c in costs),
            min(c.decode for c in costs),
            min(c.wall for c in costs),
            costs[0].patches,
            costs[0].tokens,
        )
        for name, costs in runs.items()
    }
    distinct_patches = sum(len(talk.encode(added)["pixel_values"]) for _, added, _ in talk.turns)
    distinct_tokens = sum(len(new) + len(said) for new, _, said in talk.turns) - 1  # the last one is never needed
    plain, ours = best["plain"], best["ours"]
    per_repeat = {
        "ratio_total": [a.total / b.total for a, b in zip(runs["plain"], runs["ours"], strict=True)],
        "ratio_without_decode": [
            (a.encode + a.prefill) / (b.encode + b.prefill) for a, b in zip(runs["plain"], runs["ours"], strict=True)
        ],
    }
    return {
        "ratio_total": plain.total / ours.total,
        "ratio_without_decode": (plain.encode + plain.prefill) / (ours.encode + ours.prefill),
        "ratio_wall": plain.wall / ours.wall,
        "ratios_of_repeats": per_repeat,
        "patches_work_ratio": ours.patches / distinct_patches,
        "tokens_work_ratio": ours.tokens / distinct_tokens,
        "plain_patches_work_ratio": plain.patches / distinct_patches,
        "plain_tokens_work_ratio": plain.tokens / distinct_tokens,
        "distinct_patches": distinct_patches,
        "distinct_tokens": distinct_tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "logit_difference": difference,
        "logit_difference_rms": rms,
        "logit_spread": float(reference.std()),
        "repeats": len(runs["ours"]),
        "seconds": {
            name: {"encode": c.encode, "prefill": c.prefill, "decode": c.decode, "total": c.total}
            for name, c in best.items()
        },
        "wall_seconds": {name: c.wall for name, c in best.items()},
        "patches": {name: c.patches for name, c in best.items()},
        "tokens": {name: c.tokens for name, c in best.items()},
    }


def benchmark(size: Size, repeats: int) -> dict[str, Any]:
    """`compare` on one thread of this machine's processor."""
    torch.set_num_threads(1)
    model = random_model(size)
    run_ours(model, Conversation(SMALL))  # first calls set up kernels
    return {
        "processor": processor(),
        "transformers": transformers.__version__,
        "size": asdict(size),
        **compare(model, Conversation(size), repeats),
    }


def processor() -> str:
    """The name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def spread(values: Sequence[float]) -> str:
    """Median and range, as text."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    size = f"{figures['size']['inquiries']} inquiries, {figures['parameters'] / 1e6:.1f} M parameters"
    table = Table(title=f"{size}, fp32, one thread, CPU seconds")
    for column in ("loop", "encode", "prefill", "decode", "total", "wall", "ratio", "no decode"):
        table.add_column(column, justify="left" if column == "loop" else "right", no_wrap=True)
    base = figures["seconds"]["plain"]
    for name, cpu in figures["seconds"].items():
        without = (base["encode"] + base["prefill"]) / (cpu["encode"] + cpu["prefill"])
        phases = (f"{cpu[phase]:.2f}" for phase in ("encode", "prefill", "decode", "total"))
        wall = f"{figures['wall_seconds'][name]:.2f}"
        table.add_row(name, *phases, wall, f"{base['total'] / cpu['total']:.2f}x", f"{without:.2f}x")
    console = Console()
    console.print(table)
    for thing in ("patches", "tokens"):
        counts = ", ".join(f"{name} {count}" for name, count in figures[thing].items())
        ratio, plain = figures[f"{thing}_work_ratio"], figures[f"plain_{thing}_work_ratio"]
        console.print(f"{thing}: {counts}; work ratio of ours {ratio:.2f}, of plain {plain:.2f}")
    ratios = figures["ratios_of_repeats"]
    console.print(
        f"plain / ours over {figures['repeats']} repeats, median (range): {spread(ratios['ratio_total'])} in all, "
        f"{spread(ratios['ratio_without_decode'])} without decode; {figures['processor']}, "
        f"transformers {figures['transformers']}"
    )
    console.print(f"largest difference of the last turn's logits: {max(figures['logit_difference'].values()):.1e}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a model and conversation for CI; its ratios mean little")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    figures = benchmark(SMALL if args.small else Size(), args.repeats)
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
