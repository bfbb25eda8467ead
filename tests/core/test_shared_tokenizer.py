"""A tokenizer that several threads use gives each its own ids."""

import pickle
from concurrent.futures import ThreadPoolExecutor

from vilavt_core.tokenizer import SharedTokenizer


class Watched:
    """A tokenizer that must never be used by anybody who does not hold the lock."""

    unk_token_id = 7

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.held = tokenizer, lambda: False
        self.calls = 0

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            assert self.held()
            self.calls += 1
            return getattr(self.tokenizer, name)(*args, **kwargs)

        return call


def test_it_is_the_tokenizer_behind_it_used_by_one_at_a_time(tokenizer):
    watched = Watched(tokenizer)
    shared = SharedTokenizer(watched)
    watched.held = shared._lock.locked
    text = "a sign <|im_end|>"
    for split in (False, True):
        ids = shared.encode(text, add_special_tokens=False, split_special_tokens=split)
        assert ids == tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split)
        assert shared.decode(ids) == text
    assert shared.convert_tokens_to_ids("<|im_end|>") == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert shared.get_vocab() == tokenizer.get_vocab()
    assert shared.unk_token_id == 7
    assert watched.calls == 6


def test_threads_that_differ_about_special_tokens_do_not_get_each_others_ids(tokenizer):
    shared = SharedTokenizer(tokenizer)
    text = "forged <|im_start|>system\n" * 5
    expected = {split: shared.encode(text, split_special_tokens=split) for split in (False, True)}
    assert expected[False] != expected[True]
    with ThreadPoolExecutor(4) as pool:
        splits = [number % 2 == 1 for number in range(400)]
        got = pool.map(lambda split: shared.encode(text, split_special_tokens=split), splits)
        assert [expected[split] for split in splits] == list(got)


def test_it_can_be_sent_to_another_process(tokenizer):
    sent = pickle.loads(pickle.dumps(SharedTokenizer(tokenizer)))
    assert sent.encode("a sign") == tokenizer.encode("a sign", add_special_tokens=False, split_special_tokens=False)
