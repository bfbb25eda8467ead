"""LoRA on the language model: the numbers of a model with the update merged in, and the encoder's work is shared."""

from types import SimpleNamespace

import pytest
from adapters import RANK, write_adapter
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from vilavt_core.errors import CheckpointError, EngineError
from vilavt_core.results import Sample
from vilavt_vllm import VilavtLLM
from vilavt_vllm.episodes import lora_arguments, lora_of, require_lora

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """A folder as peft saves it for the transformers model, and that model with the update merged in."""
    folder = tmp_path_factory.mktemp("adapter")
    return folder, write_adapter(tiny.model, folder, seed=3, spread=0.1)


@pytest.fixture(scope="module")
def engine(start, tiny):
    return start(tiny.path, enable_lora=True, max_lora_rank=RANK, max_loras=3)  # one more than adapters


def test_an_adapter_gives_the_numbers_of_the_merged_model_and_leaves_the_encoder_alone(
    engine, tiny, tools, pictures, adapter
):
    folder, merged = adapter
    prompt, images = tools.conversation(("the red button", 2)), pictures[:3]
    plain = engine.next_logprobs(prompt, images)
    assert tools.difference(plain, tools.reference(tiny, prompt, images)) <= 1e-3
    encoded = engine.counts.inquiries
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    request = {"prompt": prompt, "multi_modal_data": {"image": images}}
    adapted = tools.vocabulary(
        engine.llm.generate([request], params, use_tqdm=False, lora_request=LoRARequest("a", 1, str(folder)))[0]
    )
    expected = tools.reference(type(tiny)(model=merged, processor=tiny.processor), prompt, images)
    assert tools.difference(adapted, expected) <= 1e-3
    assert tools.difference(adapted, plain) > 1e-2
    assert engine.counts.inquiries == encoded


def test_side_by_side_each_request_gets_its_own_adapter_or_none(engine, tools, pictures, adapter):
    prompt, lora = tools.conversation(("the red button", 2)), LoRARequest("a", 1, str(adapter[0]))
    request = {"prompt": prompt, "multi_modal_data": {"image": pictures[:3]}}
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=-1, detokenize=False)

    def generated(*adapters):
        requests = [request] * len(adapters)
        return engine.llm.generate(requests, params, use_tqdm=False, lora_request=[*adapters])

    alone = [*generated(None), *generated(lora)]
    for one, other in zip(alone, generated(None, lora), strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        for place in range(4):
            assert tools.difference(tools.vocabulary(one, place), tools.vocabulary(other, place)) <= 1e-3
    assert tools.difference(*map(tools.vocabulary, alone)) > 1e-2


def test_conversations_are_answered_by_the_adapter_that_they_name(engine, pictures, adapter):
    folder, changes = adapter[0], {"max_new_tokens_per_turn": 8, "max_turns": 1}
    asked = [Sample([pictures[0]], "What is it?", id="a")]
    backends = [VilavtLLM(engine.llm, adapter=one, limit_changes=changes) for one in (None, folder)]
    plain, adapted = (backend.ask_many(asked)[0] for backend in backends)
    assert [plain.error, adapted.error] == [None, None]
    assert adapted.provenance.fingerprint.startswith(f"{plain.provenance.fingerprint}+")
    first = adapted.record.loss_mask.index(1)
    prompt, said = adapted.record.token_ids[:first], adapted.record.token_ids[first : first + 8]
    assert plain.record.token_ids[:first] == prompt
    assert plain.record.token_ids[first : first + 8] != said
    request = {"prompt_token_ids": prompt, "multi_modal_data": {"image": list(adapted.record.inquiries)}}
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (output,) = engine.llm.generate([request], params, use_tqdm=False, lora_request=LoRARequest("b", 2, str(folder)))
    assert list(output.outputs[0].token_ids[: len(said)]) == said


def test_an_engine_without_adapters_and_a_folder_without_one_are_refused_by_name(adapter, tmp_path):
    lora = lora_of(adapter[0])
    assert lora_arguments(lora) == {"enable_lora": True, "max_lora_rank": RANK}
    assert lora_arguments(None) == {}
    require_lora(None, SimpleNamespace(lora_config=None))
    with pytest.raises(EngineError, match="runs without LoRA adapters; start it with enable_lora=True"):
        require_lora(lora, SimpleNamespace(lora_config=None))
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json in it"):
        lora_of(tmp_path)
