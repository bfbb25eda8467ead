"""How long the local engine's thread is busy outside the model: loading, resizing, cutting and preparing images.

    python benchmarks/outside_model.py [--questions 16] [--concurrency 8] [--repeats 3] [--small] [--json FILE]

Every question is about a JPEG of 12 million pixels; the model is made to ask for two regions of it, then to answer.
Both ways answer the same questions in one run, one after the other:

before: images are loaded by the engine's thread, and prepared by the stock image processor;
now: `VilavtChat`: threads load the images of the next questions, pixels stay bytes until the model needs them.

Figures are CPU seconds of the engine's own thread, which other work on the machine does not change; what loading
threads take stands beside them. The model is `examples/vilavt-tiny`, which decides the share but not the seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from random_photo import photo
from rich.console import Console
from rich.table import Table

from vilavt_core.driver import Driver
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn
from vilavt_core.results import Finished, Sample
from vilavt_hf.chat import LOADED_AHEAD, LocalSession, VilavtChat
from vilavt_hf.engine import Engine, EngineRow

CHECKPOINT = Path(__file__).parents[1] / "examples" / "vilavt-tiny"
SHOWN = 1036 * 756
"""Pixels of an image as it is shown."""


class Forced:
    """Every question's words: a call of two regions of so many pixels a side, then an answer."""

    def __init__(self, tokenizer: Any, side: int) -> None:
        half = side // 2
        regions = Region(0, (0, 0, side, side)), Region(0, (half, half, half + side, half + side))
        says = [ToolCall(regions, "what is here?"), Answer("nothing")]
        stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.words = [[*tokenizer(format_turn(one), add_special_tokens=False)["input_ids"], stop] for one in says]
        self.done: dict[EngineRow, int] = {}

    def __call__(self, rows: Sequence[EngineRow], logits: torch.Tensor) -> torch.Tensor:
        """The next word of each row."""
        chosen = []
        for row in rows:
            turn = self.done.setdefault(row, 0)
            chosen.append(self.words[turn][row.sampled])
            self.done[row] += row.sampled + 1 == len(self.words[turn])
        return torch.tensor(chosen)


def ask(chat: VilavtChat, files: Sequence[bytes], concurrency: int, side: int, *, stock: bool) -> dict[str, float]:
    """CPU seconds per question: of the engine's thread in the model and outside it, and of the other threads."""
    clock, preparing = time.thread_time, 0.0
    processor = chat.processor

    def encode(inquiries: Sequence[Any]) -> dict[str, torch.Tensor]:
        nonlocal preparing
        began = clock()
        if stock:
            images = [image for inquiry in inquiries for image in inquiry.images]
            pixels = processor.image_processor(images=images, return_tensors="pt", do_resize=False)
            ids, mask = processor.tokenize_queries([one.query for one in inquiries], padding="longest")
            inputs = {name: pixels[name] for name in ("pixel_values", "image_grid_thw")}
            inputs |= {"query_ids": ids, "query_attention_mask": mask}
            inputs["images_per_query"] = torch.tensor([len(one.images) for one in inquiries])
        else:
            inputs = processor.encode_inquiries(inquiries)
        preparing += clock() - began
        return inputs

    engine = Engine(
        chat.model,
        encode,
        choose=Forced(processor.tokenizer, side),
        clock=clock,
        max_batch_size=concurrency,
        n_tokens=len(processor.tokenizer),
    )
    session = LocalSession(engine, ahead=0 if stock else LOADED_AHEAD)
    drivers = [Driver(Sample([file], "What is it?", id=str(i)), chat.settings) for i, file in enumerate(files)]
    began, cpu = clock(), time.process_time()
    if stock:
        for driver in drivers:  # in this thread
            driver.prepare()
    for driver, event in session.run(iter(drivers)):
        if isinstance(event, Finished):
            if event.result.error is not None:
                raise event.result.error
            if (event.result.answer, driver.crops) != ("nothing", 2):
                raise SystemExit(f"the forced conversation ended with {event.result.finish} after {driver.crops} crops")
            session.release(driver)
    own, everything = clock() - began, time.process_time() - cpu
    model = engine.timings.encode + engine.timings.prefill + engine.timings.decode - preparing
    each = {"in the model": model, "preparing patches": preparing, "outside the model": own - model}
    return {name: value / len(files) for name, value in (each | {"other threads": everything - own}).items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="the smallest counts")
    parser.add_argument("--small", action="store_true", help="small images, for the tests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    width, height, side = (400, 300, 56) if options.small else (4000, 3000, 300)
    files = [photo(seed, width, height) for seed in range(options.questions)]
    chat = VilavtChat.from_pretrained(CHECKPOINT, dtype="float32", device="cpu")
    shown = 112 * 112 if options.small else SHOWN
    limits = replace(chat.settings.limits, max_pixels=shown, max_context=None, max_new_tokens_per_turn=512)
    chat.settings = replace(chat.settings, limits=limits)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "before": lambda: ask(chat, files, options.concurrency, side, stock=True),
        "now": lambda: ask(chat, files, options.concurrency, side, stock=False),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            found[name].append(way())
    figures: dict[str, Any] = {"questions": len(files), "concurrency": options.concurrency, "pixels": width * height}
    figures["weights"] = chat.settings.fingerprint
    table = Table(title="CPU seconds per question, of the engine's thread")
    for column in ("", "outside the model", "of it patches", "in the model", "share outside", "other threads"):
        table.add_column(column, justify="right" if column else "left")
    for name, repeats in found.items():
        best = {key: min(one[key] for one in repeats) for key in repeats[0]}
        best["share"] = best["outside the model"] / (best["outside the model"] + best["in the model"])
        figures[name] = best
        seconds = (best[key] for key in ("outside the model", "preparing patches", "in the model"))
        table.add_row(name, *(f"{x:.3f}" for x in seconds), f"{best['share']:.0%}", f"{best['other threads']:.3f}")
    Console().print(table)
    figures["ratio_outside"] = figures["before"]["outside the model"] / figures["now"]["outside the model"]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
