"""What bf16 changes: log-probabilities of the same conversations, computed in several ways.

    python benchmarks/precision.py [--model tiny|wide] [--questions 12] [--kinds …] [--vllm] [--small] [--json FILE]

*whole*: one pass over the finished stream, as a trainer computes it. *turn by turn*: `vilavt_hf.engine`, which prefills
what is new and decodes token by token; of the stock model a cache that is used in the same way. Every row compares two
of them at the tokens that the model says: the difference of the log-probabilities of all tokens that have more than
1e-4, and how often the likeliest token is another one. Beside every row stands the stock Qwen2.5-VL with the same
language model and tower, on the same tokens and pixels: what is beyond it is ours.

``tiny`` is `examples/vilavt-tiny` on its held-out questions; ``wide`` a random model as wide as the 3B size, of two
language and four vision layers, on the forced conversation of `multi_turn.py`. ``--vllm`` (tiny, with vilavt-vllm
installed) adds what vLLM samples against the whole pass in transformers: rollout against trainer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from multi_turn import SMALL, STOP, Conversation, Size, random_model, with_weights_in
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vilavt_core.conversation import Inquiry, SpecialTokens
from vilavt_core.episode import Request
from vilavt_core.results import Sample
from vilavt_hf import VilavtForConditionalGeneration, compat
from vilavt_hf.chat import VilavtChat
from vilavt_hf.engine import Engine, EngineRow
from vilavt_hf.tiny.benchmark import COUNTS, SceneTask, tasks
from vilavt_hf.tiny.scenes import QuestionKind

TINY = Path(__file__).parents[1] / "examples" / "vilavt-tiny"
WIDE = Size(
    inquiries=3, sampled=48, vision_width=1280, vision_mlp=3420, vision_depth=4, text_width=2048, text_mlp=11008,
    text_layers=2,
)  # fmt: skip
LIKELY = 1e-4
"""Tokens whose log-probabilities are compared: those that have at least so much in the first of the two."""

Turn = tuple[list[int], list[Inquiry], list[int]]
"""New tokens, new inquiries, and what the model says."""


@dataclass(frozen=True)
class Talk:
    """A finished conversation."""

    turns: list[Turn]
    encode: Callable[[Sequence[Inquiry]], dict[str, torch.Tensor]]
    logprobs: list[float] | None = None
    """Of the tokens said, as who sampled them has it."""

    @property
    def tokens(self) -> list[int]:
        """The stream."""
        return [token for new, _, said in self.turns for token in (*new, *said)]

    @property
    def said(self) -> torch.Tensor:
        """What the model has said, in order."""
        return torch.tensor([token for _, _, said in self.turns for token in said])

    def places(self) -> Iterator[int]:
        """Where the tokens said are foreseen: one before each."""
        at = 0
        for new, _, said in self.turns:
            yield from range(at + len(new) - 1, at + len(new) + len(said) - 1)
            at += len(new) + len(said)


def inputs_of(model: Any, talk: Talk, inquiries: Sequence[Inquiry]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Features and grids of inquiries; of the stock model without their queries."""
    inputs = talk.encode(inquiries)
    if not isinstance(model, VilavtForConditionalGeneration):
        inputs = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    return list(compat.pooled(model.model.get_image_features(**inputs))), inputs["image_grid_thw"]


def embedded(model: Any, tokens: Sequence[int], features: list[torch.Tensor]) -> torch.Tensor:
    """(1, L, C)."""
    ids = torch.tensor([tokens])
    embeds = model.get_input_embeddings()(ids)
    if features:
        image = (ids == model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(image, torch.cat(features).to(embeds.dtype))
    return embeds


@torch.inference_mode()
def whole(model: Any, talk: Talk, positions: torch.Tensor) -> torch.Tensor:
    """(said, vocabulary) log-probabilities out of one pass over the stream."""
    features, _ = inputs_of(model, talk, [one for _, added, _ in talk.turns for one in added])
    embeds = embedded(model, talk.tokens, features)
    places = torch.tensor(list(talk.places()))
    out = model(inputs_embeds=embeds, position_ids=positions[:, None], use_cache=False, logits_to_keep=places)
    return out.logits[0].float().log_softmax(-1)


@torch.inference_mode()
def positions_of(model: VilavtForConditionalGeneration, talk: Talk) -> torch.Tensor:
    """(3, L) M-RoPE positions of the stream, which no model disagrees about."""
    grids = talk.encode([one for _, added, _ in talk.turns for one in added])["image_grid_thw"]
    return compat.rope_index(model.model, torch.tensor(talk.tokens), grids)


@torch.inference_mode()
def cached(model: Any, talk: Talk, positions: torch.Tensor) -> torch.Tensor:
    """The same of the stock model, turn by turn with a cache."""
    cache, at, seen = DynamicCache(), 0, []
    for new, added, said in talk.turns:
        features = inputs_of(model, talk, added)[0] if added else []
        steps = [(new, features), *(([token], []) for token in said)]
        for count, (tokens, images) in enumerate(steps):
            place = positions[:, None, at : at + len(tokens)]
            options = {"position_ids": place, "use_cache": True, "logits_to_keep": 1, compat.CACHE: cache}
            mask = torch.ones(1, at + len(tokens), dtype=torch.long)
            out = model(inputs_embeds=embedded(model, tokens, images), attention_mask=mask, **options)
            at += len(tokens)
            if count < len(said):
                seen.append(out.logits[0, -1].float().log_softmax(-1))
    return torch.stack(seen)


def turn_by_turn(model: Any, talk: Talk, stop: int) -> torch.Tensor:
    """The same of ours, by its engine."""
    forced = iter(talk.said.tolist())
    seen: list[torch.Tensor] = []

    def choose(rows: Sequence[EngineRow], logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits[0].log_softmax(-1))
        return torch.tensor([next(forced)])

    engine = Engine(model, talk.encode, choose=choose)
    row = engine.open()
    inquiries: list[Inquiry] = []
    for turn, (new, added, said) in enumerate(talk.turns):
        inquiries = inquiries + added
        request = Request(new, row.tokens + new, tuple(added), tuple(inquiries), len(said), (stop,), (), turn)
        engine.submit(row, request)
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise event.error
    return torch.stack(seen)


def stock_of(model: VilavtForConditionalGeneration) -> Qwen2_5_VLForConditionalGeneration:
    """The stock model with the same language model and tower."""
    config = model.config.to_dict()
    known = {key: config[key] for key in ("text_config", "vision_config", "image_token_id", "video_token_id")}
    known |= {key: config[key] for key in ("vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")}
    known["vision_config"] = {
        k: v for k, v in known["vision_config"].items() if k not in ("integration_point", "model_type")
    }
    known["text_config"] = {k: v for k, v in known["text_config"].items() if k != "model_type"}
    stock = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**known)).eval()
    lost = stock.load_state_dict(model.state_dict(), strict=False)
    if lost.missing_keys:
        raise SystemExit(f"the stock model has weights that ours lacks: {lost.missing_keys[:3]}")
    return stock


def difference(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Between log-probabilities (said, vocabulary) of conversations."""
    off = torch.cat([(a - b).abs()[a > torch.tensor(LIKELY).log()] for a, b in pairs])
    flips = torch.cat([a.argmax(-1) != b.argmax(-1) for a, b in pairs])
    return _figures(off, flips)


def _figures(off: torch.Tensor, flips: torch.Tensor) -> dict[str, float]:
    ordered = off.double().sort().values
    return {
        "rms": float(ordered.square().mean().sqrt()),
        "p999": float(ordered[min(len(ordered) - 1, int(0.999 * len(ordered)))]),
        "max": float(ordered[-1]),
        "flips_per_1000": float(1000 * flips.double().mean()),
        "tokens": len(flips),
    }


def compare(model: VilavtForConditionalGeneration, talks: Sequence[Talk], stop: int) -> list[dict[str, Any]]:
    """All rows of one model, in fp32 as it comes."""
    found: dict[str, list[torch.Tensor]] = {}
    places = [positions_of(model, talk) for talk in talks]
    stock = stock_of(model)
    for kind in ("fp32", "bf16"):
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        model, stock = with_weights_in(model, dtype), with_weights_in(stock, dtype)
        pairs = list(zip(talks, places, strict=True))
        found[f"ours whole {kind}"] = [whole(model, talk, at) for talk, at in pairs]
        found[f"ours steps {kind}"] = [turn_by_turn(model, talk, stop) for talk in talks]
        found[f"stock whole {kind}"] = [whole(stock, talk, at) for talk, at in pairs]
        found[f"stock steps {kind}"] = [cached(stock, talk, at) for talk, at in pairs]
    rows = []
    for name, a, b in (
        ("fp32: turn by turn, whole", "whole fp32", "steps fp32"),
        ("whole: fp32, bf16", "whole fp32", "whole bf16"),
        ("bf16: turn by turn, whole", "whole bf16", "steps bf16"),
        ("fp32 whole, bf16 turn by turn", "whole fp32", "steps bf16"),
    ):
        row: dict[str, Any] = {"compared": name}
        for which in ("ours", "stock"):
            row[which] = difference(list(zip(found[f"{which} {a}"], found[f"{which} {b}"], strict=True)))
        rows.append(row)
    return rows


def sampled_and_trained(
    model: VilavtForConditionalGeneration, talks: Sequence[Talk], tokenizer: Any
) -> dict[str, float]:
    """What was sampled elsewhere against the whole pass, which leaves the ids out that are never sampled, as a trainer
    does: a flip is a token that is not the likeliest there.
    """
    off, flips = [], []
    never = [*SpecialTokens.of(tokenizer).banned, *range(len(tokenizer), model.config.text_config.vocab_size)]
    for talk in talks:
        there = whole(model, talk, positions_of(model, talk))
        there = there.index_fill(-1, torch.tensor(never), -torch.inf).log_softmax(-1)
        off.append((there.gather(-1, talk.said[:, None])[:, 0] - torch.tensor(talk.logprobs)).abs())
        flips.append(there.argmax(-1) != talk.said)
    return _figures(torch.cat(off), torch.cat(flips))


def forced_talk(size: Size) -> tuple[VilavtForConditionalGeneration, list[Talk]]:
    """A random model and its conversation."""
    talk = Conversation(size)
    return random_model(size), [Talk(talk.turns, talk.encode)]


def asked_talks(chat: Any, processor: Any, todo: Sequence[SceneTask]) -> list[Talk]:
    """What a backend says to questions, greedily."""
    found = []
    samples = [Sample(list(task.images), task.question.text) for task in todo]
    for result in chat.ask_many(samples):
        if result.error is not None:
            raise result.error
        record = result.record
        turns: list[Turn] = []
        waiting = list(record.inquiries)
        starts = [span.start for span in record.image_spans]
        at, end = 0, len(record.token_ids)
        while at < end:
            middle = next((i for i in range(at, end) if record.loss_mask[i]), end)
            after = next((i for i in range(middle, end) if not record.loss_mask[i]), end)
            images, added = sum(at <= start < middle for start in starts), []
            while images > 0:
                added.append(waiting.pop(0))
                images -= len(added[-1].images)
            if middle < end:
                turns.append((record.token_ids[at:middle], added, record.token_ids[middle:after]))
            at = after
        known = [p for p, mask in zip(record.logprobs, record.loss_mask, strict=True) if mask]
        found.append(Talk(turns, processor.encode_inquiries, known))
    return found


def run(which: str, todo: Sequence[SceneTask], small: bool, with_vllm: bool) -> dict[str, Any]:
    """Compare, and return the rows."""
    torch.set_num_threads(1)
    if which == "wide":
        model, talks = forced_talk(SMALL if small else WIDE)
        return {"model": "wide", "weights": "random, seed 0", "conversations": 1, "rows": compare(model, talks, STOP)}
    chat = VilavtChat.from_pretrained(TINY, dtype="float32", device="cpu")
    stop = chat.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    talks = asked_talks(chat, chat.processor, todo)
    figures: dict[str, Any] = {"model": "tiny", "weights": chat.settings.fingerprint, "conversations": len(talks)}
    figures["rows"] = compare(chat.model, talks, stop)
    if with_vllm:
        from vilavt_vllm import VilavtLLM

        figures["rollout"] = {}
        for dtype in ("float32", "bfloat16"):
            llm = VilavtLLM(TINY, dtype=dtype, enforce_eager=True, disable_log_stats=True)
            talks = asked_talks(llm, chat.processor, todo)
            model = with_weights_in(chat.model, getattr(torch, dtype))
            figures["rollout"][dtype] = sampled_and_trained(model, talks, chat.processor.tokenizer)
            del llm
    return figures


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    of = f"{figures['model']} ({figures['weights']})"
    table = Table(title=f"{of}: log-probabilities of {figures['conversations']} conversations")
    for column in ("compared", "of", "rms", "99.9 %", "max", "flips per 1,000", "tokens"):
        table.add_column(column, justify="left" if column in ("compared", "of") else "right")

    def add(name: str, of: str, row: dict[str, float]) -> None:
        sizes = (f"{row[key]:.2g}" for key in ("rms", "p999", "max"))
        table.add_row(name, of, *sizes, f"{row['flips_per_1000']:.1f}", str(row["tokens"]))

    for row in figures["rows"]:
        add(row["compared"], "ours", row["ours"])
        add("", "stock", row["stock"])
    for dtype, row in figures.get("rollout", {}).items():
        add(f"{dtype}: vLLM, whole", "ours", row)
    Console().print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "wide"), default="tiny")
    parser.add_argument("--questions", type=int, default=12, help="of tiny, at least one of every kind")
    parser.add_argument("--kinds", nargs="+", choices=[*QuestionKind], default=[*QuestionKind], help="of tiny")
    parser.add_argument("--vllm", action="store_true", help="tiny: also what vLLM samples")
    parser.add_argument("--small", action="store_true", help="wide: sizes for CI")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    if options.vllm and options.model != "tiny":
        parser.error("--vllm needs --model tiny")
    if options.small and options.model != "wide":
        parser.error("--small needs --model wide")
    counts = {kind: COUNTS[kind] for kind in map(QuestionKind, options.kinds)}
    figures = run(options.model, tasks("heldout", options.questions, counts), options.small, options.vllm)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
