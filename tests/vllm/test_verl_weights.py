"""Weights that verl's trainer sent, in vLLM: they load by name and give the trainer's log-probabilities; and the merged
checkpoint of a GRPO run, which answers in vLLM as in transformers.

verl and the newest vLLM want different transformers, so the two halves of this test run in two environments: `nox -s
verl_vllm_cpu` writes the files, `nox -s vllm_cpu` reads them.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vilavt_core.episode import Episode
from vilavt_core.presets import Sampling
from vilavt_core.shipped import read_demo_questions
from vilavt_hf.chat import VilavtChat
from vilavt_vllm import VilavtLLM

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "vilavt-tiny"
HANDOFF = Path(os.environ.get("VILAVT_VERL_HANDOFF", "nowhere"))


def handed_over(name):
    return pytest.mark.skipif(not (HANDOFF / name).is_file(), reason="`nox -s verl_vllm_cpu` has not run before")


@handed_over("transcripts.json")
def test_the_merged_checkpoint_of_a_run_speaks_in_vllm_as_in_transformers(start):
    questions = read_demo_questions(EXAMPLES / "pictures" / "questions.json")
    llm = VilavtLLM(start(HANDOFF / "merged").llm)
    llm.settings = replace(llm.settings, sampling=Sampling())  # as the transcripts were made
    results = llm.ask_many([(q.sources, q.question) for q in questions])
    assert [[turn.text for turn in result.turns] for result in results] == json.loads(
        (HANDOFF / "transcripts.json").read_text(encoding="utf-8")
    )


@handed_over("trajectory.json")
def test_weights_from_verls_trainer_give_its_log_probabilities(start, monkeypatch):
    from vllm import SamplingParams, _custom_ops

    # As on CUDA: vLLM's CPU layers otherwise pack a copy of each weight and drop the parameter.
    monkeypatch.setattr(_custom_ops, "_supports_onednn", False)
    engine = start(CHECKPOINT)
    engine.model.load_weights(load_file(HANDOFF / "weights.safetensors").items())
    engine.forget()
    trajectory = json.loads((HANDOFF / "trajectory.json").read_text(encoding="utf-8"))
    chat = VilavtChat.from_pretrained(CHECKPOINT, dtype=torch.float32)
    image = Image.open(HANDOFF / "image.png").convert("RGB")
    settings = {"tokenizer": chat.processor.tokenizer, "prompts": chat.settings.prompts, "preset": chat.settings.preset}
    run = Episode.start([image], trajectory["question"], limits=chat.settings.limits, **settings)
    compared = 0
    for turn in trajectory["turns"]:
        request = run.next_request()
        ids = [*request.all_token_ids, *turn["token_ids"]]
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": list(request.inquiries)}}
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        rows = engine.llm.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs[len(request.all_token_ids) :]
        found = [row[token].logprob for row, token in zip(rows, turn["token_ids"], strict=True)]
        assert found == pytest.approx(turn["logprobs"], abs=1e-3)
        compared += len(found)
        run.feed(turn["token_ids"])
    assert compared > 20
