"""Checkpoints that other versions of transformers have written (`tests/hf/test_handoff.py`) give their numbers in vLLM.

nox sets ``VILAVT_HANDOFF``; the sessions of vilavt-hf write, those with a vLLM read.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version
from PIL import Image
from safetensors.numpy import load_file

from vilavt_core.shipped import read_demo_questions
from vilavt_vllm import VilavtLLM

pytestmark = pytest.mark.engine

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
HANDOFF = os.environ.get("VILAVT_HANDOFF")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.skipif(HANDOFF is None, reason="VILAVT_HANDOFF names no folder; nox sets it")
def test_every_checkpoint_that_was_handed_over_gives_the_writers_numbers(start, tools):
    folders = sorted(path.parents[1] for path in Path(HANDOFF).glob("*/*/expected/found.json"))
    assert folders, f"{HANDOFF} holds no checkpoint: run `nox -s hf_newest hf_oldest` before"
    if "VILAVT_NIGHTLY" not in os.environ:  # the oldest and the newest writer's: each starts an engine
        writers = sorted({folder.parent for folder in folders}, key=lambda path: Version(path.name))
        folders = [
            folder
            for folder in folders
            if folder.parent == writers[0] or (folder.parent == writers[-1] and folder.name == "untied")
        ]
    questions = read_demo_questions(PICTURES / "questions.json")
    for folder in folders:
        expected = json.loads((folder / "expected" / "found.json").read_text())
        tensors = load_file(folder / "expected" / "found.safetensors")
        engine = start(folder)
        for number, prompt in enumerate(expected["prompts"]):
            images = [Image.open(folder / "expected" / "pictures" / name).convert("RGB") for name in prompt["images"]]
            output = engine.generate([(prompt["text"], images)])[0]
            assert output.prompt_token_ids == tensors[f"tokens.{number}"].tolist(), f"prompt {number} of {folder}"
            n_tokens = engine.model.n_tokens  # the rest stands for no token, and vLLM leaves it out
            written = tensors[f"logprobs.{number}"][:n_tokens]
            written = written - np.log(np.exp(written).sum())
            difference = tools.difference(tools.vocabulary(output)[:n_tokens], written)
            assert difference <= 1e-3, f"prompt {number} of {folder}: {difference}"
        for size, count in zip(expected["sizes"], expected["image_tokens"], strict=True):
            prompt_ids = engine.generate([(IMAGE, [Image.new("RGB", size)])])[0].prompt_token_ids
            assert len(prompt_ids) - 2 == count, f"a picture of {size} for {folder}"
        llm = VilavtLLM(engine.llm)
        assert llm.settings.prompts.sha256 == expected["prompts_sha256"]
        assert llm.settings.preset.name == expected["preset"]
        results = llm.ask_many([(q.sources, q.question) for q in questions])
        assert [result.error for result in results] == [None] * len(results)
        assert [[turn.text for turn in result.turns] for result in results] == expected["transcripts"], folder
