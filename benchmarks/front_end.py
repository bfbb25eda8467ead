"""How many large originals a second the part of the server in front of the engine prepares, on one core and in all.

    python benchmarks/front_end.py [--originals N] [--turns N] [--threads N] [--small] [--json FILE]

Both ways decode the same JPEG files of 12 million pixels and begin an episode about each, which brings it to the size
the encoder sees (6.4 million pixels, as a 7B checkpoint allows). They take turns in one run.

plain: one thread for all episodes; the stock image processor (PIL), whose patches are fp32 and hold every pixel twice;
pixels hashed at every turn.

default: what `vilavt-serve` does: several threads; patches as bytes, scaled in the engine; pixels hashed once, in those
threads.

As in the server, one further thread stands for vLLM's renderer. An original per second *and core* is one per second of
CPU time of the whole process, which no number of threads changes; the wall clock shows what the threads bring. Needs
vLLM, but no engine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from random_photo import photo

from vilavt_core.conversation import Inquiry
from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.images import load_image
from vilavt_core.presets import FULL_PIXELS, Limits, get_preset
from vilavt_core.prompts import PromptSet
from vilavt_core.regions import Picture
from vilavt_core.results import Sample
from vilavt_core.tokenizer import FileTokenizer, SharedTokenizer
from vilavt_hf import VilavtProcessor
from vilavt_hf.pixels import patches_of
from vilavt_vllm.online import THREADS

CHECKPOINT = Path(__file__).parents[1] / "examples" / "vilavt-tiny"
BOUNDS = (56 * 56, FULL_PIXELS)


def begun(image: Image.Image, settings: ConversationSettings) -> Inquiry:
    """The first inquiry of an episode about an image, as the engine is given it."""
    driver = Driver(Sample([Picture(image)], "What is it?"), settings)
    driver.start()
    assert driver.request is not None
    (inquiry,) = driver.request.inquiries
    return inquiry


def plain(inquiry: Inquiry, processor: Any, turns: int) -> Any:
    """Stock patches of an original, hashed at every turn."""
    (image,) = inquiry.images
    for _ in range(turns):
        hashlib.sha256(image.tobytes()).digest()
    return processor.image_processor(images=[image], return_tensors="pt", do_resize=False)["pixel_values"]


def default(inquiry: Inquiry, processor: Any, turns: int) -> Any:
    """Its patches as bytes; it has its hash already."""
    (image,) = inquiry.images
    for _ in range(turns):
        inquiry.identities  # noqa: B018 (kept)
    return patches_of(image, processor.image_processor, BOUNDS)[0]


def hashed(image: Image.Image, settings: ConversationSettings) -> Inquiry:
    """As `begun`, with the hash of the pixels."""
    inquiry = begun(image, settings)
    inquiry.identities  # noqa: B018 (found in this thread, and kept)
    return inquiry


def prepare(
    files: list[bytes],
    settings: ConversationSettings,
    processor: Any,
    turns: int,
    threads: int,
    begin: Callable[..., Inquiry],
    encode: Callable[..., Any],
) -> tuple[float, float]:
    """(seconds, CPU seconds) until all originals are ready for the engine."""

    def decoded(file: bytes) -> Image.Image:
        return load_image(file, settings.image_limits, rules=settings.preset.rules)

    with ThreadPoolExecutor() as decoders, ThreadPoolExecutor(threads) as episodes, ThreadPoolExecutor(1) as renderer:
        began, cpu = time.perf_counter(), time.process_time()

        def one(file: bytes) -> None:
            inquiry = episodes.submit(begin, decoded(file), settings).result()
            renderer.submit(encode, inquiry, processor, turns).result()

        for done in [decoders.submit(one, file) for file in files]:
            done.result()
        return time.perf_counter() - began, time.process_time() - cpu


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--originals", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3, help="of each conversation")
    parser.add_argument("--threads", type=int, default=THREADS, help="for episodes, of the second way")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--small", action="store_true", help="small images, for the tests")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    width, height = (400, 300) if args.small else (4000, 3000)
    files = [photo(seed, width, height) for seed in range(args.originals)]
    preset = get_preset("default")
    settings = ConversationSettings(
        SharedTokenizer(FileTokenizer(CHECKPOINT)),
        PromptSet.load("default"),
        preset,
        Limits(min_pixels=BOUNDS[0], max_pixels=BOUNDS[1]),
        preset.sampling,
    )
    processor = VilavtProcessor.from_pretrained(CHECKPOINT)
    ways = {"plain": (1, begun, plain), "default": (args.threads, hashed, default)}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            took[name].append(prepare(files, settings, processor, args.turns, *way))
    figures: dict[str, Any] = {"originals": len(files), "pixels": width * height, "threads": args.threads}
    for name, times in took.items():
        wall, cpu = (min(column) for column in zip(*times, strict=True))
        figures[name] = {"per_second": len(files) / wall, "per_second_and_core": len(files) / cpu}
        print(f"{name}: {len(files) / wall:.2f} originals a second, {len(files) / cpu:.2f} a second and core")
    for key in ("per_second", "per_second_and_core"):
        figures[f"ratio_{key}"] = figures["default"][key] / figures["plain"][key]
    print(f"ratio: {figures['ratio_per_second']:.2f}, per core {figures['ratio_per_second_and_core']:.2f}")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
