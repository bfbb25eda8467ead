"""Chat: episodes over the local engine. Turns that must zoom are forced, the rest is what the tiny model samples."""

import io
import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from family import noise as picture

from vilavt_core.backends import BackendOptions
from vilavt_core.driver import Driver
from vilavt_core.episode import Inquiry
from vilavt_core.errors import CheckpointError, EngineError, ImageError
from vilavt_core.presets import Limits, Sampling, get_preset
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn
from vilavt_core.results import (
    AnswerEvent,
    CropsEvent,
    Finished,
    Intervention,
    RefusedEvent,
    Sample,
    TextDelta,
    ToolCallEvent,
)
from vilavt_core.settings import save_chat_settings
from vilavt_hf.chat import LOADED_AHEAD, VilavtChat
from vilavt_hf.engine import Sampler

LIMITS = Limits(max_turns=6, max_new_tokens_per_turn=200, max_pixels=84 * 84)


def zoom(turn: int, regions: int = 2) -> str:
    boxes = tuple(Region(0, (4 * i, 2 * turn, 30 + 4 * i, 40 + 2 * turn)) for i in range(regions))
    return format_turn(ToolCall(boxes, f"query {turn}", f"thought {turn}"))


def zooms(count: int, then: str | None = None):
    """Forces `count` zooms of two regions, then `then` (None: the model speaks)."""
    return Intervention(forced_turns=lambda sample, turn: zoom(turn) if turn < count else then)


class Forced:
    """Decodes given turns token by token, and keeps the logits of each row."""

    def __init__(self, tokenizer, turns: dict[str, list[str]]):
        stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.tokens = {
            name: [token for text in texts for token in [*tokenizer.encode(text, add_special_tokens=False), stop]]
            for name, texts in turns.items()
        }
        self.seen: dict[str, list[torch.Tensor]] = {}

    def __call__(self, rows, logits):
        for b, row in enumerate(rows):
            self.seen.setdefault(row.name, []).append(logits[b].clone())
        return torch.tensor([self.tokens[row.name].pop(0) for row in rows])


class Brief(Sampler):
    """Ends every turn after six tokens: the random model would not stop."""

    def __init__(self, tokenizer, sampling=Sampling()):  # noqa: B008 (frozen)
        super().__init__(sampling)
        self.stop = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def __call__(self, rows, logits):
        chosen = super().__call__(rows, logits)
        return torch.tensor(
            [self.stop if row.sampled == 5 else c for row, c in zip(rows, chosen.tolist(), strict=True)]
        )


@pytest.fixture
def chat(tiny_model, processor, tokenizer) -> VilavtChat:
    chat = VilavtChat(tiny_model, processor, limits=LIMITS, prompts="tiny", concurrency=4)
    chat.choose = Brief(tokenizer)
    return chat


def full_logits(chat, record) -> torch.Tensor:
    inputs = chat.processor.encode_inquiries(record.inquiries)
    with torch.no_grad():
        return chat.model(input_ids=torch.tensor([record.token_ids]), use_cache=False, **inputs).logits[0].float()


def assert_logits_match(chat, result, seen) -> None:
    """Every sampled token's logits equal those of one full prefill, 1e-4 in fp32."""
    reference = full_logits(chat, result.record)
    places = [i for i, sampled in enumerate(result.record.loss_mask) if sampled]
    assert len(places) == len(seen)
    for place, logits in zip(places, seen, strict=True):
        kept = torch.isfinite(logits)
        assert (reference[place - 1][kept] - logits[kept]).abs().max() < 1e-4


def test_six_turns_with_two_regions_equal_a_full_prefill(chat, tokenizer):
    chat.settings = replace(chat.settings, limits=replace(LIMITS, max_turns=7))
    chat.choose = script = Forced(tokenizer, {"0": [*map(zoom, range(6)), "<answer>five</answer>"]})
    (result,) = chat.ask_many([([picture(0), picture(1, 60, 60)], "how many?")])
    assert result.answer == "five"
    assert len(result.record.inquiries) == 2 + 6
    assert_logits_match(chat, result, script.seen["0"])
    assert result.work.patches_ratio == result.work.tokens_ratio == 1.0


def test_a_batch_of_different_lengths_equals_a_full_prefill_of_each(chat, tokenizer):
    turns = {
        "a": [zoom(0), zoom(1, 1), zoom(2), "<answer>1</answer>"],
        "b": ["<think>plain to see</think><answer>a longer answer</answer>"],
        "c": [zoom(0, 3), "no action at all", "<answer>2</answer>"],
    }
    chat.choose = script = Forced(tokenizer, turns)
    samples = [Sample([picture(i, 80 + 40 * i)], "which? " * (i + 1), id=name) for i, name in enumerate(turns)]
    for result in chat.ask_many(samples):
        assert result.finish == "answer", result.error
        assert_logits_match(chat, result, script.seen[result.sample_id])
        assert result.work.patches_ratio == result.work.tokens_ratio == 1.0


def test_follow_up_questions_keep_the_cache_and_stay_exact(chat, tokenizer):
    turns = [zoom(0), "<answer>1</answer>", zoom(1), zoom(2), "<answer>2</answer>", "<answer>3</answer>"]
    chat.choose = script = Forced(tokenizer, {"": turns})
    conversation = chat.conversation(picture(0))
    first = conversation.ask("what is this?")
    second = conversation.ask("and that?", images=picture(5, 70, 70))
    third = conversation.ask("sure?")
    assert [r.answer for r in (first, second, third)] == ["1", "2", "3"]
    assert [len(r.turns) for r in (first, second, third)] == [2, 3, 1]
    assert third.record.token_ids[: len(first.record.token_ids)] == first.record.token_ids
    assert_logits_match(chat, third, script.seen[""])
    assert third.work.patches_ratio == third.work.tokens_ratio == 1.0


def test_answers_do_not_depend_on_the_batch(chat):
    samples = [Sample([picture(i, 80 + 30 * i)], "what? " * (i + 1), id=str(i)) for i in range(5)]
    together = chat.ask_many(samples, intervention=zooms(2))
    for sample, result in zip(samples, together, strict=True):
        (alone,) = chat.ask_many([sample], intervention=zooms(2))
        assert alone.record.token_ids == result.record.token_ids
        assert len(alone.views) == 1 + 4


def test_sampling_follows_the_samples_seed(tiny_model, processor, tokenizer):
    limits = replace(LIMITS, max_new_tokens_per_turn=6)
    chat = VilavtChat(tiny_model, processor, limits=limits, prompts="tiny", sampling=Sampling(temperature=1.0), seed=3)
    samples = [Sample([picture(i)], "what?", seed=10 + i) for i in range(3)]
    together = [r.record.token_ids for r in chat.ask_many(samples)]
    assert [r.record.token_ids for r in chat.ask_many(samples[::-1])] == together[::-1]
    again = chat.ask(samples[1].images, "what?", seed=11)
    assert again.record.token_ids == together[1]
    assert again.provenance.seed == 11
    named = [chat.ask_many([Sample([picture(0)], "what?", id=name)])[0] for name in "xyx"]
    assert named[0].record.token_ids == named[2].record.token_ids != named[1].record.token_ids


def test_sampling_without_a_seed_differs_from_time_to_time_and_each_can_be_repeated(tiny_model, processor):
    limits = replace(LIMITS, max_new_tokens_per_turn=6)
    chat = VilavtChat(tiny_model, processor, limits=limits, prompts="tiny", sampling=Sampling(temperature=2.0))
    drawn = chat.ask_many([(picture(0), "what?")] * 4)
    assert len({tuple(result.record.token_ids) for result in drawn}) > 1  # two of them may be alike by chance
    assert len({result.provenance.seed for result in drawn}) == 4
    again = chat.ask(picture(0), "what?", seed=drawn[1].provenance.seed)
    assert again.record.token_ids == drawn[1].record.token_ids


def test_a_follow_up_without_a_seed_draws_by_the_one_that_its_result_tells(tiny_model, processor):
    limits = replace(LIMITS, max_turns=1, max_new_tokens_per_turn=6)
    chat = VilavtChat(tiny_model, processor, limits=limits, prompts="tiny", sampling=Sampling(temperature=2.0))

    def second(seed: int | None) -> tuple[int, str]:
        """Seed and text of a second answer; the first one is always the same."""
        first = Driver(Sample([picture(0)], "what?", seed=7), chat.settings)
        session = chat._session()
        list(session.run(iter([first])))
        after = first.follow_up(Sample([], "and?", seed=seed))
        session.follow(first, after)
        *_, (_, finished) = session.run(iter([after]))
        return finished.result.provenance.seed, finished.result.turns[0].text

    fresh = [second(None) for _ in range(4)]
    assert len({seed for seed, _ in fresh}) == 4
    assert len({text for _, text in fresh}) > 1  # two of them may be alike by chance
    assert [second(seed) for seed, _ in fresh] == fresh


def test_sampling_may_be_set_between_conversations(tiny_model, processor):
    limits = replace(LIMITS, max_new_tokens_per_turn=6)
    chat = VilavtChat(tiny_model, processor, limits=limits, prompts="tiny")
    greedy = chat.ask([picture(0)], "what?")
    chat.settings = replace(chat.settings, sampling=Sampling(temperature=5.0))
    sampled = chat.ask([picture(0)], "what?")
    assert sampled.record.token_ids != greedy.record.token_ids
    assert sampled.provenance.sampling == chat.settings.sampling


def test_one_failing_sample_does_not_lose_the_others(chat, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    samples = [
        ([picture(0)], "what?"),
        Sample([tmp_path / "broken.png"], "what?", id="broken"),
        ([picture(1)], "what?"),
        Sample([picture(2)], "boom", id="hook"),
    ]

    def forced(sample, turn):
        if sample.question == "boom" and turn == 1:
            raise RuntimeError("the hook failed")
        return zoom(turn) if turn == 0 else None

    results = chat.ask_many(samples, intervention=Intervention(forced_turns=forced))
    assert [r.finish == "error" for r in results] == [False, True, False, True]
    assert isinstance(results[1].error, ImageError)
    assert "broken.png" in str(results[1].error)
    assert str(results[3].error) == "the hook failed"
    assert json.loads(json.dumps(results[1].to_json()))["error"].startswith("ImageError: ")
    assert results[0].record.token_ids == chat.ask_many(samples[:1], intervention=zooms(1))[0].record.token_ids


def test_a_failing_row_in_the_middle_of_a_batch_is_alone(chat, processor, monkeypatch):
    encode = type(processor).encode_inquiries

    def fails_on_one(processor, inquiries, **kwargs):
        if any(inquiry.query == "query 1" and inquiry.images[0].width > 60 for inquiry in inquiries):
            raise RuntimeError("encoder failed")
        return encode(processor, inquiries, **kwargs)

    # of the class: put back on the instance, the method would stay bound to it in every copy
    monkeypatch.setattr(type(processor), "encode_inquiries", fails_on_one)

    def forced(sample, turn):
        wide = sample.id == "wide" and turn == 1
        return format_turn(ToolCall((Region(0, (0, 0, 80, 40)),), "query 1")) if wide else zoom(0) if turn < 2 else None

    samples = [Sample([picture(i)], "what?", id=name) for i, name in enumerate(["a", "wide", "b"])]
    results = chat.ask_many(samples, intervention=Intervention(forced_turns=forced))
    assert [r.finish == "error" for r in results] == [False, True, False]
    assert results[1].record is not None


def test_ask_raises_what_went_wrong(chat):
    with pytest.raises(ImageError, match=r"nowhere\.png: there is no such file"):
        chat.ask("nowhere.png", "what?")
    with pytest.raises(ImageError, match="URLs are not allowed"):
        chat.ask("https://example.com/a.png", "what?")


def test_images_may_be_paths_bytes_or_pil(chat, tmp_path):
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    sources = [picture(0), buffer.getvalue(), str(tmp_path / "a.png"), tmp_path / "a.png"]
    streams = [chat.ask(source, "what?").record.token_ids for source in sources]
    assert all(stream == streams[0] for stream in streams)


def test_streaming_yields_text_zooms_crops_and_the_answer_in_order(chat, tokenizer):
    bad = format_turn(ToolCall((Region(7, (0, 0, 9, 9)),), "none"))
    answer = "<think>日本 — é\U0001f600</think><answer>ü</answer>"
    chat.choose = Forced(tokenizer, {"": [zoom(0), bad, answer]})
    events = list(chat.stream(picture(0), "what?"))
    kinds = [type(event) for event in events if not isinstance(event, TextDelta)]
    assert kinds == [ToolCallEvent, CropsEvent, ToolCallEvent, RefusedEvent, AnswerEvent, Finished]
    for turn, text in enumerate([zoom(0), bad, answer]):
        pieces = [event.text for event in events if isinstance(event, TextDelta) and event.turn == turn]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
    crops = next(event for event in events if isinstance(event, CropsEvent))
    assert crops.query == "query 0"
    assert [image.index for image in crops.images] == [1, 2]
    assert [view.box for view in crops.views] == [(0, 0, 30, 40), (4, 0, 34, 40)]
    assert next(event for event in events if isinstance(event, RefusedEvent)).problem.startswith(
        "region 0 names image 7"
    )
    assert events[-1].result.answer == "ü"


def test_a_character_that_never_completes_is_still_streamed(chat, tokenizer):
    chat.settings = replace(chat.settings, limits=replace(LIMITS, max_new_tokens_per_turn=6))
    first_byte = tokenizer.encode("é", add_special_tokens=False)[0]
    chat.choose = lambda rows, logits: torch.full((len(rows),), first_byte)
    events = list(chat.stream(picture(0), "what?"))
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert text == events[-1].result.turns[0].text
    assert events[-1].result.finish == "length"


def test_leaving_a_stream_early_ends_the_conversation(chat):
    conversation = chat.conversation(picture(0))
    stream = conversation.stream("what?")
    next(stream)
    with pytest.raises(EngineError, match="still being answered"):
        conversation.ask("and?")
    stream.close()
    with pytest.raises(EngineError):
        conversation.ask("and?")


def test_a_question_whose_image_cannot_be_loaded_leaves_the_conversation_usable(chat):
    conversation = chat.conversation(picture(0))
    with pytest.raises(ImageError):
        conversation.ask("what?", images="nowhere.png")
    first = conversation.ask("what?")
    with pytest.raises(ImageError):
        conversation.ask("and?", images="nowhere.png")
    assert len(conversation.ask("and?").record.token_ids) > len(first.record.token_ids)


def test_limits_of_one_sample_allow_an_answer_without_zoom(chat):
    (result,) = chat.ask_many(
        [Sample([picture(0)], "what?", limits=replace(LIMITS, max_turns=1))], intervention=zooms(1)
    )
    assert result.finish == "turn_limit"
    assert "Answer now." in chat.processor.tokenizer.decode(result.record.token_ids)
    assert result.provenance.limits.max_turns == 1


def test_boxes_can_be_swapped_behind_the_text(chat):
    other = (Region(0, (40, 14, 80, 50)),)
    hooks = Intervention(
        transform_regions=lambda sample, regions, views: other,
        forced_turns=lambda sample, turn: zoom(0, 1) if turn == 0 else None,
    )
    (result,) = chat.ask_many([([picture(0)], "what?")], intervention=hooks)
    assert [view.box for view in result.views] == [None, (40, 14, 80, 50)]
    assert result.turns[0].text == zoom(0, 1)
    assert result.turns[0].action.regions[0].box == (0, 0, 30, 40)


def test_queries_and_grouping_can_be_changed_behind_the_text(chat):
    groups = []
    encode = chat.processor.encode_inquiries

    def spy(inquiries, **kwargs):
        groups.extend((len(i.images), i.query) for i in inquiries)
        return encode(inquiries, **kwargs)

    def separate(sample, inquiry):
        return [Inquiry((i,), "other", (k,)) for i, k in zip(inquiry.images, inquiry.image_indices, strict=True)]

    chat.processor.encode_inquiries = spy
    try:
        hooks = replace(zooms(1), transform_inquiry=separate)
        (result,) = chat.ask_many([([picture(0)], "what?")], intervention=hooks)
        (wrong,) = chat.ask_many(
            [([picture(0)], "what?")], intervention=replace(hooks, transform_inquiry=lambda s, i: [])
        )
    finally:
        del chat.processor.encode_inquiries  # the class's is there again, for copies of the processor too
    assert groups == [(1, "other"), (1, "other"), (1, "other")]
    assert result.episode.inquiries[1].query == "query 0"
    assert "transform_inquiry returned other images than [0]" in str(wrong.error)


def test_presets_with_a_forced_answer_fall_back_to_a_second_conversation(tiny_model, processor):
    preset = get_preset("vlmevalkit").with_limits(max_turns=2, max_pixels=84 * 84, max_new_tokens_per_turn=6)
    chat = VilavtChat(tiny_model, processor, preset=preset, prompts="tiny", sampling=Sampling())
    for result in chat.ask_many([([picture(i)], "what?") for i in range(3)], intervention=None):
        assert result.episode.answer is None
        assert result.fallback is not None
        assert result.answer == result.fallback.answer
        assert result.work.tokens_decoded >= 6


def test_results_say_where_they_come_from(tiny_checkpoint):
    limits = replace(LIMITS, max_new_tokens_per_turn=6)
    chat = VilavtChat.from_pretrained(tiny_checkpoint, limits=limits, seed=4, device="cpu")
    result = chat.ask(picture(0), "what?")
    provenance = result.to_json()["provenance"]
    assert provenance["preset"] == "default"
    assert provenance["limits"]["max_turns"] == 6
    assert provenance["seed"] == 4
    assert provenance["checkpoint"] == str(tiny_checkpoint)
    assert len(provenance["fingerprint"]) == 64
    assert set(provenance["versions"]) >= {"torch", "transformers"}
    assert provenance["dtype"] == "float32"
    assert result.turns[0].seconds > 0
    json.dumps(result.to_json(include_images=True))


def test_a_checkpoint_can_say_how_it_wants_to_be_run(tiny_checkpoint, tmp_path):
    import shutil

    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    save_chat_settings(folder, limits={"max_pixels": 7056, "max_turns": 3})
    chat = VilavtChat.from_pretrained(folder, device="cpu")
    assert (chat.settings.limits.max_pixels, chat.settings.limits.max_turns) == (7056, 3)
    assert VilavtChat.from_pretrained(folder, limits=LIMITS, device="cpu").settings.limits == LIMITS
    with pytest.raises(CheckpointError, match="unknown limits max_turn"):
        save_chat_settings(folder, limits={"max_turn": 3})
    (folder / "vilavt_chat.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"vilavt_chat\.json: cannot be read"):
        VilavtChat.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        VilavtChat.from_pretrained(tmp_path / "missing")


def test_limits_default_to_what_the_checkpoint_was_made_for(tiny_model, processor):
    limits = VilavtChat(tiny_model, processor).settings.limits
    assert limits.max_pixels == 28 * 28 * 256  # the image processor's
    assert limits.max_context == 8192  # the language model's
    assert limits.max_turns == get_preset("default").limits.max_turns


def test_answers_are_still_typed_when_the_model_just_talks(chat):
    result = chat.ask_many([([picture(0)], "what?")], intervention=zooms(0, then=format_turn(Answer("7", "easy"))))[0]
    assert result.answer == "7"
    assert result.turns[0].action == Answer("7", "easy")
    assert result.work.tokens_prefilled == 0  # a forced answer needs no computation at all


def test_a_hub_id_runs_as_its_checkpoint_asks_for(tiny_checkpoint, hub_cache, tmp_path):
    asks = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, asks)
    save_chat_settings(asks, preset="eval-vllm", limits={"max_turns": 2})
    cache = str(hub_cache(asks))
    chat = VilavtChat.from_pretrained("someone/vilavt", model_kwargs={"cache_dir": cache})
    assert (
        chat.settings.preset
        == VilavtChat.from_pretrained(asks).settings.preset
        == get_preset("eval-vllm").with_limits(max_turns=2)
    )
    assert BackendOptions().preset_for("someone/vilavt") == chat.settings.preset
    assert BackendOptions(preset="rl").preset_for("someone/vilavt") == get_preset("rl").with_limits(max_turns=2)
    assert BackendOptions().preset_for("someone/else") == get_preset("default")
    assert BackendOptions().preset_for("http://127.0.0.1:8000/v1") == get_preset("default")


def picture_as(form: str, tmp_path):
    """A picture in one of the forms that are passed around."""
    image = picture(0, 84, 84)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    return {
        "path": tmp_path / "a.png",
        "bytearray": bytearray(buffer.getvalue()),
        "file": buffer,
        "row": {"bytes": buffer.getvalue(), "path": "a.png"},
        "array": np.asarray(image),
        "tensor": torch.from_numpy(np.array(image)).permute(2, 0, 1),
        "floats": torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float64) / 255,
    }[form]


@pytest.mark.parametrize("form", ["path", "bytearray", "file", "row", "array", "tensor", "floats"])
def test_one_picture_in_any_form_is_asked_about(tiny_model, processor, tmp_path, form):
    chat = VilavtChat(tiny_model, processor, limits=replace(LIMITS, max_turns=1, max_new_tokens_per_turn=3))
    source = picture_as(form, tmp_path)
    expected = picture(0, 84, 84).tobytes()
    results = [chat.ask(source, "what?"), chat.ask([source], "what?"), *chat.ask_many([(source, "what?")])]
    with chat.conversation(source) as talk:
        results.append(talk.ask("what?"))
    with chat.conversation() as talk:
        results.append(talk.ask("what?", source))
    for result in results:
        assert [view.image.tobytes() for view in result.views] == [expected]


@pytest.mark.parametrize(
    "images, question, says",
    [
        (None, "what?", "NoneType"),
        (3, "what?", "a int "),
        ({"image": "a.png"}, "what?", "this one has 'image'"),
        ([[1]], "what?", "cannot load a list"),
        ("what?", picture(0, 84, 84), "the question is a PIL.Image.Image, it must be text; check the order"),
    ],
)
def test_what_is_no_picture_or_no_question_is_named_by_its_type(tiny_model, processor, images, question, says):
    chat = VilavtChat(tiny_model, processor, limits=LIMITS)
    with pytest.raises((ImageError, EngineError)) as error:
        chat.ask(images, question)
    assert says in str(error.value)


class Watched(io.BytesIO):
    """A file that notes which thread reads it."""

    def __init__(self, seed: int, read_by: list[str]):
        super().__init__()
        picture(seed, 84, 56).save(self, "png")
        self.seek(0)
        self.read_by = read_by

    def read(self, *args):
        self.read_by.append(threading.current_thread().name)
        return super().read(*args)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_pictures_are_loaded_beside_the_engine_and_change_nothing_of_what_it_does(chat, concurrency):
    chat.concurrency = concurrency
    read_by: list[str] = []
    samples = [Sample([Watched(seed, read_by)], "what?", id=str(seed)) for seed in range(5)]
    samples.insert(2, Sample(["missing.png"], "what?", id="missing"))
    results = chat.ask_many(samples)
    assert read_by
    assert all(name.startswith("vilavt-images") for name in read_by)
    assert [result.sample_id for result in results] == [sample.id for sample in samples]
    assert isinstance(results[2].error, ImageError)
    for seed, result in enumerate(result for result in results if result.error is None):
        alone = chat.ask([picture(seed, 84, 56)], "what?", id=str(seed))
        assert result.record.token_ids == alone.record.token_ids


def test_no_more_pictures_are_loaded_than_the_next_questions_have(chat):
    chat.concurrency = 1
    begun: list[int] = []

    def samples():
        for seed in range(8):
            begun.append(seed)
            yield Sample([picture(seed, 84, 56)], "what?", id=str(seed))

    results = chat.iter_many(samples())
    next(results)
    assert len(begun) <= 1 + LOADED_AHEAD
    results.close()  # what is loading ends
    assert len(begun) <= 1 + LOADED_AHEAD
