"""The tiny model's scenes as a training set on disk, in the published schema and in ours."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.episode import Episode
from vilavt_core.errors import DataError
from vilavt_core.presets import get_preset
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import IMAGE_MARK, Answer, format_turn
from vilavt_core.results import Sample
from vilavt_core.yaml_config import read_keys

from .scenes import MAX_PIXELS, QuestionKind, Split, ask_about, make_scene, scene_about

REGISTRY = "datasets.yaml"
TEXT_EVERY = 5
"""Every so many records there is one without images."""


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
    episode records), their images, and a registry of both. The frames of a clip are images here.

    Args:
        out: folder.
        tokenizer, prompts: of the tiny model; they decide how the published records read.
        count: records in each file.
        seed: of the scenes.
        split: which scans the scenes show.

    Returns:
        The names of the files, images aside.
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
            kind = kinds[i % len(kinds)]
            scene = scene_about(rng, split, kind)
            asked = ask_about(rng, scene, kind)
            question = asked.text
            texts = [*map(format_turn, asked.calls()), format_turn(Answer(asked.answer, asked.final_thought()))]
            pictures = list(scene.images)
            names = [f"pictures/{i:05d}-{n}.png" for n in range(len(pictures))]
            for name, picture in zip(names, pictures, strict=True):
                picture.save(out / name, compress_level=1)
        episode = _played(pictures, question, texts, tokenizer, prompts)
        published.append(_published(episode, i, names, out))
        episodes.append({"id": f"{i:05d}", "images": names, "question": question, "turns": texts})
    return _write_sets(out, {"published": published, "episodes": episodes})


def write_new_lesson(out: Path, *, count: int, held_out: int, seed: int = 0) -> list[str]:
    """Episode records of a question that the shipped model was never taught: the *smaller* digit on two cards.

    Writes ``smaller.jsonl`` about training scenes, to learn from, ``smaller_heldout.jsonl`` about held-out scenes, to
    validate on, their images, and both into the registry.

    Args:
        out: folder.
        count, held_out: records of each.
        seed: of the scenes.

    Returns:
        The names of the files, images aside.
    """
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    sets: dict[str, list[dict[str, Any]]] = {}
    splits: tuple[tuple[str, Split, int], ...] = (
        ("smaller", "train", count),
        ("smaller_heldout", "heldout", held_out),
    )
    for name, split, size in splits:
        sets[name] = []
        for i in range(size):
            rng = np.random.default_rng([seed, i, len(sets)])
            scene = make_scene(rng, split)
            asked = ask_about(rng, scene, QuestionKind.LARGER)
            answer = Answer(str(min(card.digit for card in asked.targets)), asked.final_thought())
            picture = f"pictures/{name}-{i:05d}.png"
            scene.image.save(out / picture, compress_level=1)
            sets[name].append(
                {
                    "id": f"{name}-{i:05d}",
                    "images": [picture],
                    "question": asked.text.replace("larger", "smaller"),
                    "turns": [*map(format_turn, asked.calls()), format_turn(answer)],
                }
            )
    return _write_sets(out, sets)


def _write_sets(out: Path, sets: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    """Write the records of each set, and the sets into the registry, beside those that are there."""
    path = out / REGISTRY
    sources = {source["name"]: source for source in read_keys(path, DataError)["datasets"]} if path.is_file() else {}
    for name, records in sets.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        sources[f"tiny_{name}"] = {"name": f"tiny_{name}", "annotations": f"{name}.jsonl"}
    path.write_text(yaml.safe_dump({"datasets": list(sources.values())}, sort_keys=False), encoding="utf-8")
    return [*(f"{name}.jsonl" for name in sets), REGISTRY]


def _played(
    pictures: list[Any], question: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, prompts: PromptSet
) -> Episode:
    preset = get_preset("default").with_limits(max_pixels=MAX_PIXELS)
    settings = ConversationSettings(tokenizer, prompts, preset, preset.limits, preset.sampling, seed=0)
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
