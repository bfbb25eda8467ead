"""Counters prove it: over a conversation every inquiry is encoded once and no earlier token is computed again."""

import pytest

pytestmark = pytest.mark.engine

BLOCK = 32
TURNS = [("a", 2), ("b", 1), ("c", 3), ("d", 1), ("e", 2), ("f", 1)]


@pytest.fixture(scope="module")
def engine(start, tiny):
    return start(tiny.path, block_size=BLOCK)


@pytest.fixture
def prompts(tools, pictures):
    """The prompt of every turn, with its images; text is the model's from turn to turn, as a chat client sends it."""
    counts = [1 + sum(n for _, n in TURNS[:k]) for k in range(len(TURNS) + 1)]
    images = [*pictures, tools.picture(100, 84, 84)]
    return [(tools.conversation(*TURNS[:k]), images[:count]) for k, count in enumerate(counts)]


def test_over_six_turns_each_inquiry_is_encoded_once_and_at_most_a_block_is_computed_again(engine, prompts):
    engine.forget()
    engine.counts.reset()
    before = 0
    for k, (prompt, images) in enumerate(prompts):
        output = engine.generate([(prompt, images)])[0]
        known = 0 if k == 0 else before
        assert known - BLOCK < output.num_cached_tokens <= len(output.prompt_token_ids)
        assert engine.counts.inquiries == k + 1
        assert engine.counts.images == len(images)
        before = len(output.prompt_token_ids)
    assert engine.counts.calls == len(TURNS) + 1


def test_patches_encoded_are_the_distinct_patches(engine, prompts, tiny):
    engine.forget()
    engine.counts.reset()
    for prompt, images in prompts:
        engine.generate([(prompt, images)])
    prompt, images = prompts[-1]
    assert engine.counts.patches == len(tiny.processor(text=prompt, images=images)["pixel_values"])


def test_conversations_side_by_side_share_what_is_equal_and_nothing_else(engine, tools, pictures):
    engine.forget()
    engine.counts.reset()
    engine.generate([(tools.conversation(("red", 2)), pictures[:3])])
    assert engine.counts.inquiries == 2
    engine.generate([(tools.conversation(("blue", 2)), pictures[:3])])  # same pictures, other query
    assert engine.counts.inquiries == 3
    engine.generate([(tools.conversation(("red", 2)), [pictures[0], pictures[2], pictures[1]])])  # other order
    assert engine.counts.inquiries == 4
    engine.generate([(tools.conversation(("red", 2)), pictures[:3])])
    assert engine.counts.inquiries == 4


def test_the_scheduler_never_splits_an_inquiry(start, tiny, tools, pictures):
    # 40 tokens a step are fewer than the last inquiry's tokens together with the text between its regions.
    engine = start(tiny.path, max_num_batched_tokens=40, max_num_seqs=2, enable_prefix_caching=False)
    model, seen = engine.model, []
    original = model.embed_multimodal

    def watched(**kwargs):
        seen.append(kwargs["images_per_query"].flatten().tolist())
        return original(**kwargs)

    model.embed_multimodal = watched
    try:
        engine.generate([(tools.conversation(("a", 5)), pictures[:6]), (tools.conversation(("b", 3)), pictures[4:8])])
    finally:
        del model.embed_multimodal
    assert sorted(count for call in seen for count in call) == [1, 1, 3, 5]
