"""The shipped checkpoint: whole conversations, token by token, through transformers and through vLLM."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vilavt_core.episode import Episode
from vilavt_hf.chat import VilavtChat

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = EXAMPLES / "vilavt-tiny"
QUESTIONS = [asked for asked in json.loads((EXAMPLES / "pictures" / "questions.json").read_text()) if "image" in asked]


@pytest.fixture(scope="module")
def engine(start):
    return start(CHECKPOINT)


@pytest.fixture(scope="module")
def chat():
    torch.set_num_threads(1)
    return VilavtChat.from_pretrained(CHECKPOINT, dtype=torch.float32)


def episode(chat, asked):
    image = Image.open(EXAMPLES / "pictures" / asked["image"]).convert("RGB")
    settings = {"tokenizer": chat.processor.tokenizer, "prompts": chat.settings.prompts, "preset": chat.settings.preset}
    return Episode.start([image], asked["question"], limits=chat.settings.limits, **settings)


@pytest.mark.parametrize("asked", QUESTIONS, ids=lambda asked: asked["image"])
def test_a_conversation_through_vllm_equals_transformers_at_every_turn(engine, chat, tools, asked):
    from vllm import SamplingParams

    engine.forget()
    engine.counts.reset()
    run, turns, before = episode(chat, asked), 0, 0
    while (request := run.next_request()) is not None:
        params = SamplingParams(
            temperature=0,
            max_tokens=request.max_new_tokens,
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=True,
            logprobs=-1,
            detokenize=False,
            logit_bias=dict.fromkeys(request.banned_token_ids, -100.0),
        )
        prompt = {"prompt_token_ids": request.all_token_ids, "multi_modal_data": {"image": list(request.inquiries)}}
        output = engine.llm.generate([prompt], params, use_tqdm=False)[0]
        with torch.no_grad():
            encoded = chat.processor.encode_inquiries(request.inquiries)
            ids = torch.tensor([request.all_token_ids])
            logits = chat.model(input_ids=ids, attention_mask=torch.ones_like(ids), **encoded).logits[0, -1].float()
        n_tokens = len(chat.processor.tokenizer)
        found, logits = tools.vocabulary(output), logits[:n_tokens]
        assert tools.difference(found[:n_tokens], logits.log_softmax(-1).numpy()) <= 1e-3
        assert bool((found[n_tokens:] == -torch.inf).all())  # they stand for no token
        assert output.num_cached_tokens > before - 32
        before = len(request.all_token_ids)
        run.feed(list(output.outputs[0].token_ids))
        turns += 1
    assert turns >= 2
    assert engine.counts.inquiries == len(run.result.inquiries)
    assert run.result.answer == asked["answer"]
    theirs = chat.ask([Image.open(EXAMPLES / "pictures" / asked["image"])], asked["question"])
    assert [turn.text for turn in theirs.turns] == [turn.text for turn in run.result.turns]
