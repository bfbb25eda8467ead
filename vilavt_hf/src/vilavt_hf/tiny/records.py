"""The tiny model's scenes as a training set on disk, in the published schema and in ours."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.episode import Episode
from vilavt_core.presets import get_preset
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import IMAGE_MARK, Answer, format_turn
from vilavt_core.results import Sample

from .scenes import MAX_PIXELS, QuestionKind, Split, ask_about, make_scene

REGISTRY = "datasets.yaml"
TEXT_EVERY = 5
"""Every so many records there is one without pictures."""


def write_training_set(
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    *,
    count: int,
    seed: int = 0,
    split: Split = "train",
) -> list[str]:
    """Ideal conversations about generated scenes.

    Writes ``published.jsonl`` (every turn spelled out, crops as files), ``episodes.jsonl`` (the same conversations as
    episode records), their pictures, and a registry of both.

    Args:
        out: folder.
        tokenizer, prompts: of the tiny model; they decide how the published records read.
        count: records in each file.
        seed: of the scenes.
        split: which scans the scenes show.

    Returns:
        The names of the files, pictures aside.
    """
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    published, episodes = [], []
    kinds = list(QuestionKind)
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        if i % TEXT_EVERY == TEXT_EVERY - 1:
            a, b = (int(digit) for digit in rng.integers(0, 10, 2))
            question = f"What is the sum of {a} and {b}?"
            texts = [format_turn(Answer(str(a + b), f"{a}+{b}"))]
            names, pictures = [], []
        else:
            scene = make_scene(rng, split)
            asked = ask_about(rng, scene, kinds[i % len(kinds)])
            question = asked.text
            texts = [*map(format_turn, asked.calls()), format_turn(Answer(asked.answer, asked.final_thought()))]
            names, pictures = [f"pictures/{i:05d}.png"], [scene.image]
            scene.image.save(out / names[0])
        episode = _played(pictures, question, texts, tokenizer, prompts)
        published.append(_published(episode, i, names, out))
        episodes.append({"id": f"{i:05d}", "images": names, "question": question, "turns": texts})
    sources = []
    for name, records in (("published", published), ("episodes", episodes)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        sources.append(f"  - name: tiny_{name}\n    annotations: {name}.jsonl\n")
    (out / REGISTRY).write_text("datasets:\n" + "".join(sources), encoding="utf-8")
    return ["published.jsonl", "episodes.jsonl", REGISTRY]


def _played(
    pictures: list[Any], question: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, prompts: PromptSet
) -> Episode:
    preset = get_preset("default").with_limits(max_pixels=MAX_PIXELS)
    settings = ConversationSettings(tokenizer, prompts, preset, preset.limits, preset.sampling)
    driver = Driver(Sample(pictures, question), settings)
    driver.start()
    for text in texts:
        driver.take_text(text)
    if driver.result.error is not None:
        raise driver.result.error
    assert driver.conversation is not None
    return driver.conversation


def _published(episode: Episode, number: int, names: list[str], out: Path) -> dict[str, Any]:
    """The episode as an annotation; writes its crops."""
    turns = []
    for turn in episode.transcript.split("<|im_start|>")[1:]:
        role, _, text = turn.partition("\n")
        text = re.sub(r"<image \d+x\d+>", IMAGE_MARK, text.removesuffix("\n").removesuffix("<|im_end|>"))
        turns.append({"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text})
    images, mapping = list(names), []
    for i, inquiry in enumerate(episode.inquiries):
        mapping += [i] * len(inquiry.images)
    for index, view in enumerate(episode.views[len(names) :], len(names)):
        images.append(f"pictures/{number:05d}-crop-{index}.png")
        view.image.save(out / images[-1])
    return {
        "id": f"{number:05d}",
        "images": images,
        "conversations": turns,
        "queries": [inquiry.query for inquiry in episode.inquiries],
        "image_to_query_mapping": mapping,
    }
