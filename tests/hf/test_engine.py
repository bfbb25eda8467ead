"""The engine against a full re-encode and re-prefill of the same tokens: fp32, logits to 1e-4."""

import copy
from dataclasses import replace

import pytest
import torch
from family import tiles as picture

from vilavt_core.episode import Inquiry, Request
from vilavt_core.errors import EngineError
from vilavt_core.presets import Sampling
from vilavt_hf import compat
from vilavt_hf.engine import Engine, EngineRow, Sampler

TOLERANCE = 1e-4


class Script:
    """Forces given tokens through the decode loop and keeps the logits (V,) each row saw."""

    def __init__(self, tokens: dict[str, list[int]] | None = None):
        self.tokens = {name: list(ids) for name, ids in (tokens or {}).items()}
        self.seen: dict[str, list[torch.Tensor]] = {}
        self.greedy = Sampler(Sampling())

    def __call__(self, rows, logits):
        chosen = self.greedy(rows, logits)
        for b, row in enumerate(rows):
            self.seen.setdefault(row.name, []).append(logits[b].clone())
            if self.tokens.get(row.name):
                chosen[b] = self.tokens[row.name].pop(0)
        return chosen


class Talk:
    """A conversation without an episode: every turn adds two regions under one query, text, and samples."""

    def __init__(
        self, tokenizer, name: str, *, turns: int, seed: int = 0, originals: int = 1, max_new_tokens: int = 5, banned=()
    ):
        self.tokenizer, self.name, self.turns, self.seed = tokenizer, name, turns, seed
        self.originals, self.max_new_tokens, self.banned = originals, max_new_tokens, tuple(banned)
        self.stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.tokens: list[int] = []
        self.inquiries: list[Inquiry] = []
        self.turn = 0

    def next_request(self) -> Request | None:
        if self.turn == self.turns:
            return None
        k = 100 * self.seed + 10 * self.turn
        if self.turn == 0:
            new = [Inquiry((picture(k + i, 84, 56 + 28 * i),), "", (i,)) for i in range(self.originals)]
        else:
            n = sum(len(i.images) for i in self.inquiries)
            regions = (picture(k, 56, 84), picture(k + 1, 28 * (2 + (k + self.seed) % 3), 56))
            new = [Inquiry(regions, f"what is {self.name} {self.turn}?", (n, n + 1))]
        text = f"<|im_start|>user\n{self.name * (3 + self.turn)} "
        for inquiry in new:
            for image in inquiry.images:
                pads = "<|image_pad|>" * (image.width * image.height // 784)
                text += f"<|vision_start|>{pads}<|vision_end|> seen\n"
        added = self.tokenizer.encode(text + "<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
        self.tokens += added
        self.inquiries += new
        self.turn += 1
        return Request(
            new_token_ids=added,
            all_token_ids=list(self.tokens),
            new_inquiries=tuple(new),
            inquiries=tuple(self.inquiries),
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=(self.stop,),
            banned_token_ids=self.banned,
            turn=self.turn - 1,
        )


def run(engine: Engine, talks: list[Talk], seeds=None) -> dict[str, EngineRow]:
    rows = {talk.name: engine.open(seed=seeds[i] if seeds else 0, name=talk.name) for i, talk in enumerate(talks)}
    of_row = {id(rows[talk.name]): talk for talk in talks}
    for talk in talks:
        engine.submit(rows[talk.name], talk.next_request())
    while engine.busy:
        for event in engine.step():
            assert event.finish != "error", event.error
            talk = of_row[id(event.row)]
            talk.tokens.append(event.token_id)
            if event.finish and (request := talk.next_request()):
                engine.submit(event.row, request)
    return rows


def full_logits(model, processor, talk: Talk) -> torch.Tensor:
    """Everything encoded and prefilled in one plain forward: (len(tokens), V)."""
    inputs = processor.encode_inquiries(talk.inquiries)
    with torch.no_grad():
        return model(input_ids=torch.tensor([talk.tokens]), use_cache=False, **inputs).logits[0].float()


def assert_reuse_is_exact(model, processor, talk: Talk, seen: list[torch.Tensor], row: EngineRow) -> None:
    reference = full_logits(model, processor, talk)
    assert row.tokens == talk.tokens
    sampled_at = sampled_places(talk)
    assert len(sampled_at) == len(seen)
    for place, logits in zip(sampled_at, seen, strict=True):
        kept = torch.isfinite(logits)
        assert (reference[place - 1][kept] - logits[kept]).abs().max() < TOLERANCE


def sampled_places(talk: Talk) -> list[int]:
    """Indices of sampled tokens: what follows each assistant header up to the stop token or the length."""
    header = talk.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    places, at = [], 0
    while at < len(talk.tokens):
        if talk.tokens[at : at + len(header)] == header:
            at += len(header)
            for _ in range(talk.max_new_tokens):
                places.append(at)
                at += 1
                if talk.tokens[at - 1] == talk.stop:
                    break
        else:
            at += 1
    return places


def test_six_turns_with_two_regions_each_equal_a_full_prefill(tiny_model, processor, tokenizer):
    script = Script()
    talk = Talk(tokenizer, "a", turns=7, originals=2)
    rows = run(Engine(tiny_model, processor.encode_inquiries, choose=script), [talk])
    assert len(talk.inquiries) == 2 + 6
    assert_reuse_is_exact(tiny_model, processor, talk, script.seen["a"], rows["a"])


def test_reuse_stays_exact_once_the_old_name_of_the_cache_is_gone(only_new_name, tiny_model, processor, tokenizer):
    script = Script()
    talk = Talk(tokenizer, "a", turns=3)
    rows = run(Engine(tiny_model, processor.encode_inquiries, choose=script), [talk])
    assert_reuse_is_exact(tiny_model, processor, talk, script.seen["a"], rows["a"])
    assert rows["a"].work.tokens_prefilled < len(talk.tokens)


def test_the_engine_uses_nothing_deprecated(tiny_model, processor, tokenizer, deprecations):
    run(Engine(tiny_model, processor.encode_inquiries), [Talk(tokenizer, name, turns=2) for name in "ab"])
    assert deprecations() == []


@pytest.mark.parametrize("batch", [2, 8])
def test_a_batch_of_different_lengths_equals_a_full_prefill_of_each(tiny_model, processor, tokenizer, batch):
    script = Script({"bb": [40, 41, tokenizer.convert_tokens_to_ids("<|im_end|>")]})
    talks = [
        Talk(tokenizer, "a", turns=6, max_new_tokens=3),
        Talk(tokenizer, "bb", turns=2, seed=1, originals=3, max_new_tokens=9),
        Talk(tokenizer, "ccc", turns=4, seed=2, originals=0, max_new_tokens=1),
        Talk(tokenizer, "d", turns=1, seed=3, max_new_tokens=20),
    ]
    rows = run(Engine(tiny_model, processor.encode_inquiries, choose=script, max_batch_size=batch), talks)
    for talk in talks:
        assert_reuse_is_exact(tiny_model, processor, talk, script.seen[talk.name], rows[talk.name])


def test_eager_attention_is_exact_too(tiny_model, processor, tokenizer):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("eager")
    script = Script()
    talks = [Talk(tokenizer, "a", turns=3), Talk(tokenizer, "longer", turns=2, seed=4)]
    rows = run(Engine(model, processor.encode_inquiries, choose=script), talks)
    for talk in talks:
        assert_reuse_is_exact(model, processor, talk, script.seen[talk.name], rows[talk.name])


def test_greedy_tokens_do_not_depend_on_the_batch(tiny_model, processor, tokenizer):
    def talks():
        return [Talk(tokenizer, name, turns=3, seed=i, max_new_tokens=4 + i) for i, name in enumerate("abc")]

    together = run(Engine(tiny_model, processor.encode_inquiries), talks())
    for talk in talks():
        alone = run(Engine(tiny_model, processor.encode_inquiries), [talk])
        assert alone[talk.name].tokens == together[talk.name].tokens


def test_nothing_is_computed_twice(tiny_model, processor, tokenizer):
    talks = [Talk(tokenizer, "a", turns=5), Talk(tokenizer, "b", turns=2, seed=1)]
    rows = run(Engine(tiny_model, processor.encode_inquiries), talks)
    for talk in talks:
        work = rows[talk.name].work
        assert work.patches_encoded == sum(i.width * i.height // 196 for q in talk.inquiries for i in q.images)
        assert work.tokens_prefilled + work.tokens_decoded == len(talk.tokens) - 1  # the last token is never needed
        assert work.patches_ratio == work.tokens_ratio == 1.0
        assert rows[talk.name].layers[0].keys.shape[2] == len(talk.tokens) - 1  # no holes are kept


def test_each_image_is_encoded_when_it_first_appears_and_never_again(tiny_model, processor, tokenizer):
    calls = []

    def encode(inquiries):
        calls.append([image for inquiry in inquiries for image in inquiry.images])
        return processor.encode_inquiries(inquiries)

    talks = [Talk(tokenizer, "a", turns=4), Talk(tokenizer, "b", turns=4, seed=1)]
    run(Engine(tiny_model, encode), talks)
    encoded = [id(image) for call in calls for image in call]
    assert len(encoded) == len(set(encoded)) == sum(len(q.images) for talk in talks for q in talk.inquiries)
    assert len(calls) < sum(len(talk.inquiries) for talk in talks)  # groups of different rows share a call


@pytest.mark.parametrize(("tokens", "most_rows"), [(1, 1), (80, 2), (10_000, 4)])
def test_what_is_prefilled_at_once_is_bounded(tiny_model, processor, tokenizer, tokens, most_rows):
    sizes = []

    class Watched(Engine):
        def _prefill(self, rows):
            sizes.append((len(rows), max(len(row.pending) for row in rows)))
            return super()._prefill(rows)

    script = Script()
    talks = [Talk(tokenizer, name, turns=2, seed=i) for i, name in enumerate("abcd")]
    engine = Watched(tiny_model, processor.encode_inquiries, choose=script, max_prefill_tokens=tokens)
    rows = run(engine, talks)
    assert max(count for count, _ in sizes) == most_rows
    assert all(count * longest <= tokens for count, longest in sizes if count > 1)
    for talk in talks:
        assert_reuse_is_exact(tiny_model, processor, talk, script.seen[talk.name], rows[talk.name])


def test_no_state_is_left_on_the_module(tiny_model, processor, tokenizer):
    tiny_model.model.rope_deltas = "untouched"
    before = {name: dict(vars(module)) for name, module in tiny_model.named_modules()}
    try:
        run(Engine(tiny_model, processor.encode_inquiries), [Talk(tokenizer, "a", turns=3)])
        for name, module in tiny_model.named_modules():
            assert vars(module).keys() == before[name].keys()
            assert all(vars(module)[key] is before[name][key] for key in before[name])
    finally:
        tiny_model.model.rope_deltas = None


def test_two_engines_may_take_turns_on_one_model(tiny_model, processor, tokenizer):
    alone = run(Engine(tiny_model, processor.encode_inquiries), [Talk(tokenizer, "a", turns=3)])["a"].tokens
    engines = [Engine(tiny_model, processor.encode_inquiries) for _ in range(2)]
    talks = [Talk(tokenizer, "a", turns=3), Talk(tokenizer, "a", turns=3)]
    for engine, talk in zip(engines, talks, strict=True):
        engine.submit(engine.open(name="a"), talk.next_request())
    while any(engine.busy for engine in engines):
        for engine, talk in zip(engines, talks, strict=True):
            for event in engine.step():
                talk.tokens.append(event.token_id)
                if event.finish and (request := talk.next_request()):
                    engine.submit(event.row, request)
    assert talks[0].tokens == talks[1].tokens == alone


def test_sampling_depends_on_the_seed_and_not_on_the_batch(tiny_model, processor, tokenizer):
    choose = Sampler(Sampling(temperature=1.0, top_p=0.95, top_k=50))

    def talks():
        return [Talk(tokenizer, name, turns=2, seed=i, max_new_tokens=6) for i, name in enumerate("abc")]

    together = run(Engine(tiny_model, processor.encode_inquiries, choose=choose), talks(), seeds=[5, 6, 7])
    reordered = run(
        Engine(tiny_model, processor.encode_inquiries, choose=choose, max_batch_size=2), talks()[::-1], seeds=[7, 6, 5]
    )
    for i, talk in enumerate(talks()):
        alone = run(Engine(tiny_model, processor.encode_inquiries, choose=choose), [talk], seeds=[5 + i])
        assert alone[talk.name].tokens == together[talk.name].tokens == reordered[talk.name].tokens
    other = run(Engine(tiny_model, processor.encode_inquiries, choose=choose), talks(), seeds=[8, 9, 10])
    assert any(other[name].tokens != together[name].tokens for name in "abc")


def test_the_sampler_draws_from_the_filtered_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    row = EngineRow(torch.Generator().manual_seed(0))
    drawn = torch.cat([Sampler(Sampling(temperature=0.5, top_k=3))([row], logits) for _ in range(4000)])
    share = torch.bincount(drawn, minlength=5) / 4000
    expected = (logits[0, :3] / 0.5).softmax(0)
    assert share[3:].sum() == 0
    assert (share[:3] - expected).abs().max() < 0.03  # 4 standard deviations of 4000 draws
    top = torch.cat([Sampler(Sampling(temperature=1.0, top_p=0.6))([row], logits) for _ in range(50)])
    assert set(top.tolist()) == {0}


def test_ids_from_n_tokens_on_are_never_sampled_and_have_no_share_of_the_probability(tiny_model, processor, tokenizer):
    free = Talk(tokenizer, "a", turns=1, max_new_tokens=12)
    run(Engine(tiny_model, processor.encode_inquiries), [free])
    limit = free.tokens[sampled_places(free)[0]]  # the favourite has no token now
    engine, talk = Engine(tiny_model, processor.encode_inquiries, n_tokens=limit), Talk(tokenizer, "a", turns=1)
    row = engine.open()
    engine.submit(row, talk.next_request())
    events = []
    while engine.busy:
        events += engine.step()
    assert max(event.token_id for event in events) < limit
    banned = Talk(tokenizer, "a", turns=1, banned=range(limit, tiny_model.config.text_config.vocab_size))
    engine = Engine(tiny_model, processor.encode_inquiries)
    engine.submit(engine.open(), banned.next_request())
    assert [(e.token_id, e.logprob) for e in engine.step()] == [(events[0].token_id, pytest.approx(events[0].logprob))]


def test_stop_tokens_end_a_turn_and_banned_tokens_never_appear(tiny_model, processor, tokenizer):
    free = Talk(tokenizer, "a", turns=1, max_new_tokens=12)
    run(Engine(tiny_model, processor.encode_inquiries), [free])
    favourite = free.tokens[sampled_places(free)[0]]
    banned = Talk(tokenizer, "a", turns=1, max_new_tokens=12, banned=[favourite])
    run(Engine(tiny_model, processor.encode_inquiries), [banned])
    assert favourite not in banned.tokens[sampled_places(banned)[0] :]
    stopping = Talk(tokenizer, "a", turns=1, max_new_tokens=12)
    stopping.stop = favourite
    engine = Engine(tiny_model, processor.encode_inquiries)
    engine.submit(engine.open(), stopping.next_request())
    assert [event.finish for event in engine.step()] == ["stop"]
    assert not engine.busy


def test_log_probabilities_are_the_models_own(tiny_model, processor, tokenizer):
    talk = Talk(tokenizer, "a", turns=1, max_new_tokens=4, banned=[7])
    engine = Engine(tiny_model, processor.encode_inquiries, choose=Sampler(Sampling(temperature=1.3)))
    engine.submit(engine.open(seed=3), talk.next_request())
    events = []
    while engine.busy:
        events += engine.step()
    talk.tokens += [event.token_id for event in events]
    logits = full_logits(tiny_model, processor, talk)
    logits[:, 7] = -torch.inf
    for place, event in zip(sampled_places(talk), events, strict=True):
        assert logits[place - 1].log_softmax(-1)[event.token_id] == pytest.approx(event.logprob, abs=TOLERANCE)


def test_turns_that_were_not_sampled_are_prefilled_with_the_request_that_brings_them(tiny_model, processor, tokenizer):
    script = Script()
    engine = Engine(tiny_model, processor.encode_inquiries, choose=script)
    talk = Talk(tokenizer, "a", turns=3, max_new_tokens=3)
    row = engine.open(name="a")
    inquiries = []
    for _ in range(2):
        inquiries += talk.next_request().new_inquiries
        talk.tokens += [50, 51, talk.stop]
    request = talk.next_request()
    engine.submit(
        row,
        replace(
            request,
            new_token_ids=request.all_token_ids,
            new_inquiries=(*inquiries, *request.new_inquiries),
        ),
    )
    while engine.busy:
        talk.tokens += [event.token_id for event in engine.step()]
    reference = full_logits(tiny_model, processor, talk)
    for place, logits in zip(sampled_places(talk)[-len(script.seen["a"]) :], script.seen["a"], strict=True):
        assert (reference[place - 1] - logits).abs().max() < TOLERANCE
    assert row.work.tokens_ratio == 1.0


def test_a_row_that_fails_does_not_take_others_along(tiny_model, processor, tokenizer):
    def encode(inquiries):
        if any("bad" in inquiry.query for inquiry in inquiries):
            raise RuntimeError("cannot encode this")
        return processor.encode_inquiries(inquiries)

    engine = Engine(tiny_model, encode)
    talks = {name: Talk(tokenizer, name, turns=3, seed=i) for i, name in enumerate(["fine", "bad", "good"])}
    for talk in talks.values():
        engine.submit(engine.open(name=talk.name), talk.next_request())
    failures = []
    while engine.busy:
        for event in engine.step():
            if event.finish == "error":
                failures.append((event.row.name, str(event.error)))
                continue
            talk = talks[event.row.name]
            talk.tokens.append(event.token_id)
            if event.finish and (request := talk.next_request()):
                engine.submit(event.row, request)
    assert failures == [("bad", "cannot encode this")]
    for name in ("fine", "good"):
        alone = Talk(tokenizer, name, turns=3, seed=talks[name].seed)
        run(Engine(tiny_model, processor.encode_inquiries), [alone])
        assert alone.tokens == talks[name].tokens


def test_positions_of_a_chunk_continue_those_of_the_whole_stream(tiny_model, processor, tokenizer):
    talk = Talk(tokenizer, "a", turns=3, originals=2)
    chunks = [talk.next_request() for _ in range(3)]
    grids = [processor.encode_inquiries(chunk.new_inquiries)["image_grid_thw"] for chunk in chunks]
    whole = compat.rope_index(tiny_model.model, torch.tensor(talk.tokens), torch.cat(grids))
    offset, parts = 0, []
    for chunk, grid in zip(chunks, grids, strict=True):
        parts.append(compat.rope_index(tiny_model.model, torch.tensor(chunk.new_token_ids), grid) + offset)
        offset = int(parts[-1].max()) + 1
    assert torch.equal(torch.cat(parts, 1), whole)


def test_misuse_is_refused_by_name(tiny_model, processor, tokenizer):
    engine = Engine(tiny_model, processor.encode_inquiries)
    row, talk = engine.open(name="x7"), Talk(tokenizer, "a", turns=3)
    first, second = talk.next_request(), talk.next_request()
    with pytest.raises(EngineError, match=r"sample x7, turn 1: it continues \d+ tokens, the row holds 0"):
        engine.submit(row, second)
    engine.submit(row, first)
    with pytest.raises(EngineError, match="x7: a request arrived while turn 0"):
        engine.submit(row, first)
    with pytest.raises(EngineError, match="top_p"):
        Sampler(Sampling(top_p=0.0))
    model = copy.deepcopy(tiny_model).train()
    busy = Engine(model, processor.encode_inquiries)
    with pytest.raises(EngineError, match="eval"):
        busy.submit(busy.open(), Talk(tokenizer, "a", turns=1).next_request())


def test_wrong_images_for_a_request_are_an_error_of_that_row(tiny_model, processor, tokenizer):
    engine = Engine(tiny_model, processor.encode_inquiries)
    talk = Talk(tokenizer, "a", turns=1)
    request = talk.next_request()
    wrong = (Inquiry((picture(0, 28, 28),), "", (0,)),)
    engine.submit(engine.open(name="x7"), replace(request, new_inquiries=wrong))
    (event,) = engine.step()
    assert event.finish == "error"
    assert "sample x7: 6 image placeholders" in str(event.error)
    assert "1 features" in str(event.error)


def test_a_closed_row_gives_its_place_back(tiny_model, processor, tokenizer):
    engine = Engine(tiny_model, processor.encode_inquiries, max_batch_size=1)
    first, second = Talk(tokenizer, "a", turns=2, max_new_tokens=50), Talk(tokenizer, "b", turns=1, seed=1)
    rows = [engine.open(name="a"), engine.open(name="b")]
    engine.submit(rows[0], first.next_request())
    engine.submit(rows[1], second.next_request())
    engine.step()
    engine.close(rows[0])
    assert [event.row.name for event in engine.step()] == ["b"]
    with pytest.raises(EngineError, match="sample a: it failed or was closed"):
        engine.submit(rows[0], first.next_request())


def test_the_repetition_penalty_lowers_tokens_of_the_stream():
    row = EngineRow(torch.Generator(), tokens=[0, 2])
    logits = torch.tensor([[3.0, 2.0, -1.0, -1.5]])
    assert Sampler(Sampling(repetition_penalty=2.0))([row], logits).tolist() == [1]
    assert logits[0, 0] == 3.0  # reported log-probabilities stay the model's own


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_the_repetition_penalty_is_each_row_s_own_and_follows_its_stream(penalty):
    generator, choose = torch.Generator().manual_seed(0), Sampler(Sampling(repetition_penalty=penalty))
    rows = [EngineRow(torch.Generator(), tokens=tokens) for tokens in ([5], [1, 1, 2, 7, 7, 7], [0, 3])]
    for _ in range(40):
        logits = torch.randn(3, 8, generator=generator)
        logits[:, 6] = -torch.inf  # banned
        expected = logits.clone()
        for b, row in enumerate(rows):
            for token in set(row.tokens):
                expected[b, token] *= penalty if expected[b, token] < 0 else 1 / penalty
        chosen = choose(rows, logits).tolist()
        assert chosen == expected.argmax(-1).tolist()
        for row, token in zip(rows, chosen, strict=True):
            row.tokens += [token, (3 * token + 1) % 6]
