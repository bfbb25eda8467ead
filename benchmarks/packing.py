"""What packing saves: tokens trained per second in packs, against batches of the same samples, alone and padded.

    python benchmarks/packing.py [--small] [--samples 48] [--repeats 3] [--json FILE]

The length mix is one of the kinds of sets that the published training uses, in shares of our own: 40 % text alone
(log-normal, median 300 tokens, 90 % below 750), 35 % one image, 25 % four to eight images (frames of a video,
several views); every second sample with images also has two crops under a query. Images have 64 to 256 tokens, the
recipe's limit. Model: random, 21 million parameters, fp32, one thread, SDPA; as in the 7B model, the tower costs about
0.4 of what the language model costs per token of an image.
Forward and backward pass, logits only where there are labels; batches are made beforehand. Packs hold 4096 tokens in
block-diagonal attention; batches hold one sample, which needs no padding, or 4 or 8 drawn at random. Seconds are
process CPU seconds, the minimum of interleaved repeats; every way does the same samples, and a token counts if it is
no padding. All losses must agree to 1e-4 per token.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from multi_turn import IMAGE, PATCH, SMALL, VOCABULARY, Clock, Size, random_model
from PIL import Image
from rich.console import Console
from rich.table import Table
from vision_groups import keep_freed_memory

from vilavt_core.data.example import IGNORE, Example, ImageGroup
from vilavt_core.data.order import best_fit
from vilavt_hf.train.attention import PACKED
from vilavt_hf.train.collator import VilavtCollator, label_weight
from vilavt_hf.train.training_model import VilavtForTraining

MEDIUM = Size(vision_width=128, vision_mlp=344, vision_depth=8, text_width=384, text_mlp=1032, text_layers=8)
BUDGET = 4096
BATCHES = (1, 4, 8)


def sample(rng: np.random.Generator, scale: float) -> Example:
    """A random conversation; a quarter of its text tokens are trained."""
    text = int(np.clip(rng.lognormal(np.log(300), 0.7), 60, 2000) * scale) + 8
    groups: list[ImageGroup] = []
    pictures = int(rng.choice([0, 1, rng.integers(4, 9)], p=[0.4, 0.35, 0.25]))
    if pictures:
        groups += [ImageGroup((picture(rng, scale),)) for _ in range(pictures)]
        if rng.random() < 0.5:
            groups.append(ImageGroup((picture(rng, scale), picture(rng, scale)), "what does the sign say"))
    images = sum(i.width * i.height // 784 for g in groups for i in g.images)
    words = rng.integers(10, VOCABULARY, text).tolist()
    trained = text // 4
    return Example(
        [IMAGE] * images + words,
        [IGNORE] * (images + text - trained) + words[text - trained :],
        groups=tuple(groups),
    )


def picture(rng: np.random.Generator, scale: float) -> Image.Image:
    side = max(1, int(rng.integers(8, 17) * scale**0.5))
    return Image.new("RGB", (28 * side, 28 * side), (int(rng.integers(255)), 90, 90))


def encode(groups: Sequence[ImageGroup]) -> dict[str, torch.Tensor]:
    """Random pixels and query tokens in place of a processor's."""
    grid = torch.tensor([[1, i.height // 14, i.width // 14] for g in groups for i in g.images])
    generator = torch.Generator().manual_seed(len(grid))
    asked = torch.tensor([[bool(g.query)] * 12 for g in groups]).long()
    return {
        "pixel_values": torch.randn(int(grid.prod(-1).sum()), PATCH, generator=generator),
        "image_grid_thw": grid,
        "query_ids": torch.randint(10, VOCABULARY, asked.shape, generator=generator),
        "query_attention_mask": asked,
        "images_per_query": torch.tensor([len(g.images) for g in groups]),
    }


def model_for(size: Size, attention: str) -> VilavtForTraining:
    base = random_model(size)
    model = VilavtForTraining(base.config).train()
    model.load_state_dict(base.state_dict())
    model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa", "text_encoder_config": "sdpa"})
    return model


def compare(
    model_with: Callable[[str], VilavtForTraining],
    count: int,
    scale: float,
    repeats: int,
    now: Clock = time.process_time,
    tolerance: float = 1e-4,
    limit: float = math.inf,
) -> dict[str, Any]:
    """Figures of every way of batching the same samples.

    Args:
        model_with: the same weights with `PACKED` attention or with "sdpa", on the device that is measured.
        count: samples.
        scale: of their lengths.
        repeats: of every way.
        now: what is measured.
        tolerance: of the loss per token.
        limit: wall seconds after which no further repeat begins.
    """
    rng = np.random.default_rng(0)
    examples = [sample(rng, scale) for _ in range(count)]
    lengths = np.array([len(e.input_ids) for e in examples])
    budget = max(int(BUDGET * scale), int(lengths.max()))
    shuffled = rng.permutation(count)
    ways: dict[str, tuple[str, list[Any]]] = {
        "packed": (PACKED, batches(examples, best_fit(shuffled, lengths, budget), packed=True))
    }
    for n in BATCHES:
        rows = [shuffled[i : i + n].tolist() for i in range(0, count, n)]
        ways[f"padded, {n} a batch" if n > 1 else "one sample a batch"] = (
            "sdpa",
            batches(examples, rows, packed=False),
        )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, float] = {}
    began = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - began > limit:
            break
        for name, (attention, prepared) in ways.items():
            model = model_with(attention)
            begin = now()
            losses[name] = train(model, prepared)
            seconds[name].append(now() - begin)
    expected = losses["packed"]
    if not all(abs(loss - expected) <= tolerance for loss in losses.values()):
        raise SystemExit(f"the losses differ: {losses}")
    tokens = int(lengths.sum())
    rows = []
    for name, (_, prepared) in ways.items():
        slots = sum(batch["input_ids"].numel() for batch in prepared)
        rows.append(
            {
                "batches": name,
                "padding": 1 - tokens / slots,
                "tokens_per_second": tokens / min(seconds[name]),
                "ratio": min(seconds[name]) / min(seconds["packed"]),
                "loss": losses[name],
            }
        )
    return {
        "samples": count,
        "repeats": len(seconds["packed"]),
        "tokens": tokens,
        "longest": int(lengths.max()),
        "budget": budget,
        "rows": rows,
    }


def benchmark(size: Size, count: int, scale: float, repeats: int) -> dict[str, Any]:
    """`compare` on one thread of this machine's processor."""
    keep_freed_memory()
    torch.set_num_threads(1)
    models = {attention: model_for(size, attention) for attention in (PACKED, "sdpa")}
    return compare(models.__getitem__, count, scale, repeats)


def batches(examples: Sequence[Example], rows: Sequence[Sequence[int]], *, packed: bool) -> list[dict[str, Any]]:
    collate = VilavtCollator(encode, pad_token_id=9, image_token_id=IMAGE, packed=packed, ask_always=False)
    made = [collate([examples[i] for i in row]) for row in rows]
    for batch in made:
        batch.pop("counts")
        # the same pixels for a sample whatever it is batched with, so that the losses can be compared
        if "pixel_values" in batch:
            batch["pixel_values"] = torch.ones_like(batch["pixel_values"]) * 0.1
            batch["query_ids"] = torch.full_like(batch["query_ids"], 11)
    return made


def train(model: VilavtForTraining, prepared: Sequence[dict[str, Any]]) -> float:
    """Forward and backward over all batches; the loss per labelled token."""
    model.zero_grad()
    total, weight = 0.0, 0.0
    for batch in prepared:
        batch = {name: v.to(model.device) if torch.is_tensor(v) else v for name, v in batch.items()}
        loss = model(**batch)["loss"]
        loss.backward()
        total, weight = total + loss.item(), weight + label_weight(batch).item()
    return total / weight


def main() -> None:
    """Print the table; exit with 1 if the losses differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model and samples that take seconds")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    size, scale = (SMALL, 0.2) if options.small else (MEDIUM, 1.0)
    report = benchmark(size, options.samples, scale, options.repeats)
    table = Table("batches", "padding", "tokens/s", "seconds / packed", title=f"{report['tokens']} tokens")
    for row in report["rows"]:
        table.add_row(
            row["batches"], f"{100 * row['padding']:.1f} %", f"{row['tokens_per_second']:.0f}", f"{row['ratio']:.2f}"
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
