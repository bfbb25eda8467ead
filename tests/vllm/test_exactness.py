"""vLLM gives the numbers of transformers, in fp32, whatever the caches, the scheduler and the batch do."""

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.engine

EQUAL = 1e-3  # largest difference of a log-probability over the whole vocabulary, vLLM against transformers
SAME = 1e-5  # vLLM against itself, scheduled or cached differently


@pytest.fixture(scope="module")
def engine(start, tiny):
    return start(tiny.path)


@pytest.fixture(autouse=True)
def _empty_caches(request):
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").forget()


@pytest.fixture(scope="module")
def dialog(tools, pictures):
    """Prompts and images of a conversation that grows: two originals, then groups of 2, 1 and 3 regions."""
    turns = [("the red button", 2), ("what is left of it?", 1), ("ünïcode 文字", 3)]
    prompts = [tools.conversation(*turns[:n], originals=2) for n in range(len(turns) + 1)]
    counts = [2, 4, 5, 8]
    return [(prompt, pictures[:count]) for prompt, count in zip(prompts, counts, strict=True)]


def test_next_token_distribution_equals_transformers_at_every_turn(engine, tiny, tools, dialog):
    for prompt, images in dialog:
        difference = tools.difference(engine.next_logprobs(prompt, images), tools.reference(tiny, prompt, images))
        assert difference <= EQUAL


def test_greedy_tokens_equal_transformers_over_24_tokens(engine, tiny, tools, dialog):
    for prompt, images in (dialog[0], dialog[3]):
        output = engine.generate([(prompt, images)], max_tokens=24, logprobs=None)[0]
        assert list(output.outputs[0].token_ids) == tools.greedy(tiny, prompt, images, 24)


def test_text_without_images_equals_transformers(engine, tiny, tools):
    prompt = tools.conversation(originals=0)
    expected = tools.reference(tiny, prompt, None)
    assert tools.difference(engine.next_logprobs(prompt, None), expected) <= EQUAL


def test_the_query_and_the_grouping_reach_the_encoder(engine, tools, pictures):
    # Without this, equality elsewhere could hold because conditioning has no effect. The text is the same everywhere.
    from vilavt_vllm import InquiryItem

    prompt = tools.conversation(("the red button", 2))
    first, *regions = pictures[:3]
    ours = engine.next_logprobs(prompt, [InquiryItem((first,)), InquiryItem(tuple(regions), "the red button")])
    others = {
        "another query": [InquiryItem((first,)), InquiryItem(tuple(regions), "the blue button")],
        "no query": [InquiryItem((first,)), InquiryItem(tuple(regions))],
        "not grouped": [InquiryItem((first,)), *(InquiryItem((region,), "the red button") for region in regions)],
    }
    for other in others.values():
        assert tools.difference(ours, engine.next_logprobs(prompt, other)) > 10 * EQUAL


def test_inquiries_and_plain_images_give_the_same(engine, tools, pictures):
    from vilavt_core.conversation import Inquiry
    from vilavt_vllm import InquiryItem

    prompt, images = tools.conversation(("the red button", 2)), pictures[:3]
    plain = engine.next_logprobs(prompt, images)
    engine.forget()
    ours = engine.next_logprobs(prompt, [InquiryItem((images[0],)), InquiryItem(tuple(images[1:]), "the red button")])
    assert np.array_equal(plain, ours)
    engine.forget()
    theirs = [Inquiry((images[0],), "", (0,)), Inquiry(tuple(images[1:]), "the red button", (1, 2))]
    assert np.array_equal(plain, engine.next_logprobs(prompt, theirs))


def test_token_prompts_with_one_placeholder_per_image_or_per_token_give_the_same(engine, tools, tiny, pictures):
    prompt, images = tools.conversation(("the red button", 2)), pictures[:3]
    expected = engine.next_logprobs(prompt, images)
    engine.forget()
    short = tiny.processor.tokenizer.encode(prompt, add_special_tokens=False)
    assert np.array_equal(expected, engine.next_logprobs(short, images))
    engine.forget()
    long = tiny.processor(text=prompt, images=images)["input_ids"][0]
    assert len(long) > len(short)
    assert np.array_equal(expected, engine.next_logprobs(long, images))


def test_a_prefix_hit_gives_what_a_fresh_run_gives(engine, tools, dialog):
    prompt, images = dialog[3]
    fresh = engine.next_logprobs(prompt, images)
    output = engine.generate([(prompt, images)])[0]
    assert output.num_cached_tokens > 0
    assert tools.difference(fresh, tools.vocabulary(output)) <= SAME


def test_an_encoder_cache_hit_gives_what_a_fresh_run_gives(engine, tools, dialog):
    prompt, images = dialog[3]
    fresh = engine.next_logprobs(prompt, images)
    engine.forget(encoder=False, processor=False)
    engine.counts.reset()
    output = engine.generate([(prompt, images)])[0]
    assert output.num_cached_tokens == 0
    assert engine.counts.inquiries == 0
    assert tools.difference(fresh, tools.vocabulary(output)) <= SAME


def test_turn_after_turn_gives_what_one_shot_gives(engine, tools, dialog):
    one_shot = []
    for prompt, images in dialog:
        engine.forget()
        one_shot.append(engine.next_logprobs(prompt, images))
    engine.forget()
    for expected, (prompt, images) in zip(one_shot, dialog, strict=True):
        assert tools.difference(expected, engine.next_logprobs(prompt, images)) <= SAME


def test_a_mixed_batch_gives_what_each_request_gives_alone(engine, tools, dialog, pictures):
    requests = [
        dialog[3],
        (tools.conversation(("the blue thing", 2)), [pictures[3], pictures[2], pictures[1]]),
        (tools.conversation(originals=0), None),
        (tools.conversation(originals=1), [pictures[9]]),
    ]
    alone = []
    for prompt, images in requests:
        engine.forget()
        alone.append(engine.next_logprobs(prompt, images))
    engine.forget()
    together = engine.generate(requests)
    for expected, output in zip(alone, together, strict=True):
        assert tools.difference(expected, tools.vocabulary(output)) <= SAME


def test_chunked_prefill_without_any_cache_gives_what_a_whole_prefill_gives(start, engine, tiny, tools, dialog):
    expected = [engine.next_logprobs(prompt, images) for prompt, images in dialog]
    chunked = start(
        tiny.path, max_num_batched_tokens=48, enable_prefix_caching=False, mm_processor_cache_gb=0, max_num_seqs=4
    )
    for logprobs, (prompt, images) in zip(expected, dialog, strict=True):
        assert tools.difference(logprobs, chunked.next_logprobs(prompt, images)) <= SAME


NIGHTLY = pytest.mark.nightly("an engine for each variant of the tower; test_vision_tower holds them without one")


@pytest.mark.parametrize(
    "vision",
    [
        {"integration_point": None},
        {"integration_point": "late3", "window_size": 84},
        *(
            pytest.param(variant, marks=NIGHTLY)
            for variant in (
                {"integration_point": "all"},
                {"integration_point": "late2", "fullatt_block_indexes": []},
                {"integration_point": "early"},
                {"integration_point": "late2"},
                {"integration_point": "late3"},
                {"integration_point": "sparse"},
                {"integration_point": "none"},
                {"integration_point": "late", "fullatt_block_indexes": [0, 2]},
                {"integration_point": "late", "window_size": 112},
            )
        ),
    ],
    ids=lambda vision: "-".join(str(value) for value in vision.values()),
)
def test_every_integration_point_fullatt_list_and_window_size(start, build_checkpoint, tools, tiny, dialog, vision):
    path, model = build_checkpoint(**vision)
    prompt, images = dialog[3]
    variant = type(tiny)(path=path, model=model, processor=tiny.processor)
    expected = tools.reference(variant, prompt, images)
    assert tools.difference(start(path).next_logprobs(prompt, images), expected) <= EQUAL
    torch.set_num_threads(1)
