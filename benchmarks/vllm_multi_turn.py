"""What vLLM's caches and free-running conversations save: the same scripted conversations through two engines.

    python benchmarks/vllm_multi_turn.py [--small] [--concurrent 1 8 32] [--repeats 2] [--json FILE]

a. *published*: prefix cache, processor cache and encoder cache off, all conversations in lock-step: turn k of all of
   them is one call, the next begins when the slowest has ended. This is how the published runner works.
b. *ours*: `vilavt_vllm.offline.drive` with every cache on; each conversation goes on as soon as its turn is sampled.

A conversation has 1 image and, by its seed, 2 to 6 inquiries of 2 regions and 8 to 48 tokens sampled per turn (greedy,
stop tokens ignored, so that both sides sample the same number). What the model samples goes back into the stream token
by token. Both engines hold the same random model, live side by side in processes of their own, and take turns; seconds
are the smallest of the repeats. Caches are emptied before each run, so nothing is kept from one repeat to the next. The
tokens sampled must be the same on both sides.

Work: patches encoded / distinct patches, and tokens prefilled or decoded / distinct tokens. A prefix hit ends at a
block of the cache, so up to one block per turn is computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to read the encoder's counters; both ends are ours
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from multi_turn import Size, random_model
from PIL import Image
from rich.console import Console
from rich.table import Table
from vllm import LLM

from vilavt_core.conversation import SpecialTokens
from vilavt_core.driver import Driver
from vilavt_core.episode import Inquiry, Request
from vilavt_core.presets import Sampling
from vilavt_core.results import BilledTokens, Event, Finished, Work
from vilavt_hf import VilavtProcessor, compat
from vilavt_vllm.episodes import sampling_params, take, to_prompt
from vilavt_vllm.model import take_counts
from vilavt_vllm.offline import LLMSession

TOKENIZER = Path(__file__).parents[1] / "examples" / "vilavt-tiny"
BLOCK = 32
MODEL = Size(
    vision_width=256,
    vision_mlp=512,
    vision_depth=8,
    text_width=512,
    text_mlp=1024,
    text_layers=4,
    query_width=128,
    query_layers=2,
)


@dataclass(frozen=True)
class Shape:
    """How large the conversations are; sizes in 14-pixel patches, counts from and to, both included."""

    image: tuple[int, int] = (32, 32)
    region: tuple[int, int] = (16, 24)
    inquiries: tuple[int, int] = (2, 6)
    sampled: tuple[int, int] = (8, 48)
    first_text: int = 200
    turn_text: int = 60


SMALL = Shape((8, 8), (4, 8), (1, 3), (3, 6), 40, 10)


class ScriptedRun(Driver):
    """A conversation whose turns are a script: what is new in each, and how many tokens to sample."""

    def __init__(self, seed: int, shape: Shape, special: SpecialTokens, words: list[int]) -> None:
        rng = np.random.default_rng(seed)
        self.name, self.special, self.stream, self.sampling, self.seed = str(seed), special, False, Sampling(), 0
        self.turns: list[tuple[list[int], Inquiry, int]] = []
        shown = 0
        for turn in range(1 + int(rng.integers(shape.inquiries[0], shape.inquiries[1] + 1))):
            rows, columns = shape.region if turn else shape.image
            count = 2 if turn else 1
            images = tuple(
                Image.fromarray(rng.integers(0, 256, (14 * rows, 14 * columns, 3), dtype=np.uint8))
                for _ in range(count)
            )
            query = " ".join(str(v) for v in rng.integers(0, 100, 6)) if turn else ""
            text = rng.choice(words, shape.turn_text if turn else shape.first_text).tolist()
            new = text[: len(text) // 2]
            for _ in images:
                new += [special.vision_start, *[special.image_pad] * (rows * columns // 4), special.vision_end]
            inquiry = Inquiry(images, query, tuple(range(shown, shown + count)))
            sampled = int(rng.integers(shape.sampled[0], shape.sampled[1] + 1))
            self.turns.append((new + text[len(text) // 2 :], inquiry, sampled))
            shown += count
        self.patches = sum(i.width * i.height // 196 for _, inquiry, _ in self.turns for i in inquiry.images)
        self.restart()

    def restart(self) -> None:
        self.tokens: list[int] = []
        self.answers: list[list[int]] = []
        self.work, self.billed = Work(), BilledTokens()

    @property
    def sampled(self) -> int:
        return 0  # turns arrive whole

    @property
    def computed(self) -> int:
        return self.work.tokens_prefilled + self.work.tokens_decoded

    def start(self) -> list[Event]:
        self._prepare()
        return []

    def _prepare(self) -> None:
        turn = len(self.answers)
        self.request = None
        if turn < len(self.turns):
            new, inquiry, count = self.turns[turn]
            self.tokens += new
            inquiries = tuple(entry[1] for entry in self.turns[: turn + 1])
            banned = (*self.special.banned, *self.special.stops, self.special.im_start)
            self.request = Request(new, self.tokens, (inquiry,), inquiries, count, (), banned, turn)

    def take(self, token_ids: Sequence[int], logprobs: Any = None, finish: Any = "stop") -> list[Event]:
        self.tokens += token_ids
        self.answers.append(list(token_ids))
        self._prepare()
        return []

    def fail(self, error: Exception) -> Finished:
        raise error


def save_checkpoint(folder: Path, size: Size) -> VilavtProcessor:
    """A random model with the tiny example's tokenizer."""
    processor = VilavtProcessor.from_pretrained(TOKENIZER)
    processor.image_processor = compat.PilImageProcessor(min_pixels=784, max_pixels=1024 * 1024)
    ids = SpecialTokens.of(processor.tokenizer)
    tokens = {f"{name}_token_id": getattr(ids, name) for name in ("vision_start", "vision_end")}
    tokens |= {"image_token_id": ids.image_pad, "video_token_id": ids.video_pad}
    random_model(size, len(processor.tokenizer), tokens, ids.im_end).save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def start(checkpoint: Path, concurrent: int, **options: Any) -> LLM:
    """An engine in a process of its own."""
    return LLM(
        model=str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK,
        max_model_len=8192,
        max_num_seqs=concurrent,
        gpu_memory_utilization=0.4,  # two of them share the device (or, on a CPU, the memory)
        limit_mm_per_prompt={"image": 32},
        **options,
    )


def lock_step(llm: LLM, runs: list[ScriptedRun]) -> None:
    """Turn by turn, all conversations in one call."""
    for run in runs:
        run.start()
    while asked := [run for run in runs if run.request is not None]:
        prompts = [to_prompt(run.request) for run in asked if run.request is not None]
        outputs = llm.generate(prompts, [sampling_params(run) for run in asked], use_tqdm=False)  # type: ignore[arg-type]
        for run, output in zip(asked, outputs, strict=True):
            take(run, output)


def free_running(llm: LLM, runs: list[ScriptedRun]) -> None:
    """Each at its own pace."""
    for _ in LLMSession(llm, len(runs)).run(iter(runs)):
        pass


def benchmark(shape: Shape, model: Size, concurrent: list[int], repeats: int) -> dict[str, Any]:
    """Both engines at every number of concurrent conversations."""
    with tempfile.TemporaryDirectory() as folder:
        processor = save_checkpoint(Path(folder), model)
        special = SpecialTokens.of(processor.tokenizer)
        words = [i for i in range(len(processor.tokenizer)) if i not in set(processor.tokenizer.all_special_ids)]
        words = [i for i in words if i not in set(asdict(special).values())]
        published = start(Path(folder), max(concurrent), enable_prefix_caching=False, mm_processor_cache_gb=0)
        ours = start(Path(folder), max(concurrent), enable_prefix_caching=True)
        loops = {"published": (published, lock_step), "ours": (ours, free_running)}
        for llm, loop in loops.values():  # first calls set up kernels
            loop(llm, [ScriptedRun(10_000 + i, SMALL, special, words) for i in range(2)])
            sum(counts.patches for counts in llm.apply_model(take_counts))
        rows = []
        for count in concurrent:
            runs = [ScriptedRun(1000 * count + i, shape, special, words) for i in range(count)]
            patches = sum(run.patches for run in runs)
            figures: dict[str, dict[str, float]] = {}
            sampled: dict[str, list[list[list[int]]]] = {}
            for _ in range(repeats):
                for name, (llm, loop) in loops.items():
                    llm.reset_prefix_cache()
                    llm.reset_mm_cache()
                    llm.llm_engine.reset_encoder_cache()
                    for run in runs:
                        run.restart()
                    began = time.perf_counter()
                    loop(llm, runs)
                    seconds = time.perf_counter() - began
                    # What the engine sampled last need not be computed.
                    distinct = sum(len(run.tokens) - 1 for run in runs)
                    encoded = sum(counts.patches for counts in llm.apply_model(take_counts))
                    sampled[name] = [run.answers for run in runs]
                    before = figures.get(name, {}).get("seconds", float("inf"))
                    figures[name] = {
                        "seconds": min(before, seconds),
                        "patches_encoded": encoded,
                        "patches_work_ratio": encoded / patches,
                        "tokens_computed": sum(run.computed for run in runs),
                        "tokens_work_ratio": sum(run.computed for run in runs) / distinct,
                    }
            if sampled["published"] != sampled["ours"]:
                raise SystemExit(f"{count} concurrent: the two engines sampled different tokens")
            blocks = BLOCK * sum(len(run.turns) - 1 for run in runs) / distinct
            rows.append(
                {
                    "concurrent": count,
                    "speed_up": figures["published"]["seconds"] / figures["ours"]["seconds"],
                    "one_block_per_turn": blocks,
                    "distinct_patches": patches,
                    "distinct_tokens": distinct,
                    **figures,
                }
            )
    return {"rows": rows, "repeats": repeats, "shape": asdict(shape), "model": asdict(model), "block": BLOCK}


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title="scripted conversations, fp32, seconds of the whole batch")
    for column in (
        "concurrent",
        "published",
        "ours",
        "speed-up",
        "patches",
        "tokens",
        "patches (publ.)",
        "tokens (publ.)",
    ):
        table.add_column(column, justify="right")
    for row in figures["rows"]:
        ours, theirs = row["ours"], row["published"]
        table.add_row(
            str(row["concurrent"]),
            f"{theirs['seconds']:.2f}",
            f"{ours['seconds']:.2f}",
            f"{row['speed_up']:.2f}x",
            *(f"{side[f'{thing}_work_ratio']:.2f}" for side in (ours, theirs) for thing in ("patches", "tokens")),
        )
    Console().print(table)
    Console().print("patches, tokens: computed / distinct; the last two columns are the published way's")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="short conversations for CI; their ratios mean little")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    figures = benchmark(SMALL if args.small else Shape(), MODEL, args.concurrent, args.repeats)
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
