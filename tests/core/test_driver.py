"""The driver of one question, without an engine: what it asks for, what comes of the answers, what failures cost."""

from dataclasses import replace

import pytest
from PIL import Image

from vilavt_core.conversation import SpecialTokens
from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.errors import EngineError, EpisodeError, ImageError
from vilavt_core.presets import Limits, Sampling, get_preset
from vilavt_core.prompts import PromptSet
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

LIMITS = Limits(max_turns=4, max_new_tokens_per_turn=300, max_pixels=168 * 168)
ZOOM = format_turn(ToolCall((Region(0, (0, 0, 84, 84)),), "the sign", "Look."))
ANSWER = format_turn(Answer("seven", "I see."))
PICTURE = Image.linear_gradient("L").convert("RGB").resize((168, 168))


@pytest.fixture
def settings(tokenizer) -> ConversationSettings:
    return ConversationSettings(tokenizer, PromptSet.load("tiny"), get_preset("default"), LIMITS, Sampling())


@pytest.fixture
def say(tokenizer):
    """Answers a driver's request, in one piece or token by token."""
    stop = SpecialTokens.of(tokenizer).im_end

    def say(driver: Driver, text: str, *, piecewise: bool = False):
        ids = [*tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), stop]
        if not piecewise:
            return driver.take(ids, [-0.5] * len(ids))
        events = []
        for number, token in enumerate(ids, 1):
            events += driver.take([token], [-0.5], "stop" if number == len(ids) else None)
        return events

    return say


def asked(settings: ConversationSettings, **options) -> Driver:
    driver = Driver(Sample([PICTURE], "What is it?", id="s1"), settings, **options)
    assert driver.start() == []
    return driver


def kinds(events: list) -> list[type]:
    return [type(event) for event in events]


def test_a_conversation_runs_from_pictures_to_its_result(settings, say):
    driver = asked(settings)
    first = driver.request
    assert first.turn == 0
    assert kinds(say(driver, ZOOM)) == [ToolCallEvent, CropsEvent]
    assert driver.request.all_token_ids[: len(first.all_token_ids)] == first.all_token_ids
    assert driver.requests == 2
    *_, finished = events = say(driver, ANSWER)
    assert kinds(events) == [AnswerEvent, Finished]
    assert driver.request is None
    result = finished.result
    assert (result.answer, result.finish, result.sample_id, result.error) == ("seven", "answer", "s1", None)
    assert [value for value in result.record.logprobs if value is not None] == [-0.5] * sum(result.record.loss_mask)
    assert result.provenance == settings.provenance(Sample([], "", id="s1").seed_from(0))


def test_streamed_text_is_whole_and_cut_between_characters(settings, say):
    driver = asked(settings, stream=True)
    text = format_turn(Answer("größer als 七", "Größe"))
    deltas = [event for event in say(driver, text, piecewise=True) if isinstance(event, TextDelta)]
    assert "".join(event.text for event in deltas) == text
    assert not any("\ufffd" in event.text for event in deltas)
    assert len(deltas) > 20


@pytest.mark.parametrize("images", [["/no/such.png"], [b"no picture"]])
def test_a_picture_that_cannot_be_loaded_ends_the_question_as_its_result(settings, images):
    driver = Driver(Sample(images, "What?", id="s2"), settings)
    (finished,) = driver.start()
    assert isinstance(finished.result.error, ImageError)
    assert (finished.result.finish, driver.request, driver.requests) == ("error", None, 0)


def test_what_an_engine_does_wrong_ends_the_question_and_raises_nothing(settings, tokenizer):
    driver = asked(settings)
    (finished,) = driver.take([driver.request.banned_token_ids[0]])
    assert isinstance(finished.result.error, EpisodeError)
    assert "placeholder id" in str(finished.result.error)
    (late,) = driver.take([1])
    assert isinstance(late.result.error, EngineError)
    failed = asked(settings)
    assert failed.fail(RuntimeError("no memory")).result.finish == "error"
    assert failed.request is None


def test_forced_turns_need_no_engine_and_come_with_the_next_request(settings, say):
    turns = [ZOOM, format_turn(ToolCall((Region(1, (0, 0, 56, 56)),), "closer"))]
    forced = Intervention(forced_turns=lambda sample, turn: turns[turn] if turn < 2 else None)
    driver = Driver(Sample([PICTURE], "What is it?"), settings, intervention=forced, stream=True)
    events = driver.start()
    assert kinds(events) == [TextDelta, ToolCallEvent, CropsEvent] * 2
    assert (driver.request.turn, driver.requests) == (2, 1)
    assert driver.request.new_token_ids == driver.request.all_token_ids
    assert [inquiry.query for inquiry in driver.request.new_inquiries] == ["", "the sign", "closer"]
    sampled = asked(settings)
    for turn in turns:
        say(sampled, turn)
    assert sampled.request.all_token_ids == driver.request.all_token_ids


def test_a_conversation_of_forced_turns_alone_asks_the_engine_for_nothing(settings):
    driver = Driver(Sample([PICTURE], "?"), settings, intervention=Intervention(forced_turns=lambda *_: ANSWER))
    assert driver.start()[-1].result.answer == "seven"
    assert driver.requests == 0


def test_regions_are_redirected_behind_the_back_of_the_text(settings, say):
    other = Region(0, (84, 84, 168, 168))
    seen = []

    def change(sample, regions, views):
        seen.append((sample.id, [region.box for region in regions], len(views)))
        return [other]

    straight = asked(settings)
    elsewhere = asked(settings, intervention=Intervention(transform_regions=change))
    for driver in (straight, elsewhere):
        say(driver, ZOOM)
    assert seen == [("s1", [(0, 0, 84, 84)], 1)]
    assert elsewhere.request.all_token_ids == straight.request.all_token_ids
    assert elsewhere.conversation.views[1].box == other.box
    assert elsewhere.request.new_inquiries[0].query == "the sign"
    say(elsewhere, ANSWER)
    again = elsewhere.follow_up(Sample([], "And there?"))
    again.start()
    say(again, ZOOM)
    assert again.conversation.views[2].box == other.box


def test_a_redirected_region_is_checked_like_any_other(settings, say):
    change = Intervention(transform_regions=lambda *_: [Region(7, (0, 0, 84, 84))])
    driver = asked(settings, intervention=change)
    events = say(driver, ZOOM)
    assert kinds(events) == [ToolCallEvent, RefusedEvent]
    assert events[-1].problem == "region 0 names image 7, but images 0 to 0 were shown"


def test_inquiries_change_for_the_engine_alone_and_images_must_stay(settings, say):
    change = Intervention(transform_inquiry=lambda sample, one: [replace(one, query="")])
    driver = asked(settings, intervention=change)
    say(driver, ZOOM)
    assert [one.query for one in driver.request.inquiries] == ["", ""]
    assert driver.request.inquiries[1] is driver.request.new_inquiries[0]
    assert driver.conversation.inquiries[1].query == "the sign"
    broken = Driver(
        Sample([PICTURE], "?", id="s3"), settings, intervention=Intervention(transform_inquiry=lambda *_: [])
    )
    (finished,) = broken.start()
    assert "transform_inquiry returned other images than [0]" in str(finished.result.error)


def test_a_follow_up_continues_the_stream_and_counts_its_own_turns(settings, say):
    driver = asked(settings)
    say(driver, ZOOM)
    say(driver, ANSWER)
    before = driver.result.record.token_ids
    again = driver.follow_up(Sample([PICTURE], "And here?"))
    assert again.start() == []
    assert again.request.all_token_ids[: len(before)] == before
    assert (again.request.turn, again.crops, len(again.request.inquiries)) == (0, 0, 3)
    say(again, ZOOM)
    assert (driver.crops, again.crops) == (1, 1)
    say(again, ANSWER)
    assert (len(again.result.turns), again.result.question) == (2, "And here?")
    failing = again.follow_up(Sample([], "And now?"))
    failing.start()
    failing.fail(EngineError("the engine has died"))
    assert failing.crops == 0
    with pytest.raises(EngineError, match="never began"):
        Driver(Sample([], "?"), settings).follow_up(Sample([], "?"))


def test_a_fallback_follows_a_conversation_without_an_answer_unless_it_is_left_out(settings, say):
    hf = replace(settings, preset=get_preset("eval-hf"), limits=replace(LIMITS, max_turns=1))
    main, alone = asked(hf), asked(hf, fallback=False)
    for driver in (main, alone):
        say(driver, ZOOM)
    assert alone.request is None
    assert alone.result.fallback is None
    assert main.episode is not main.conversation
    say(main, "seven")
    assert (main.result.answer, main.result.fallback.answer, main.result.episode.answer) == ("seven", "seven", None)


def test_a_known_turn_is_taken_as_text(settings):
    driver = asked(settings)
    assert kinds(driver.take_text(ANSWER)) == [AnswerEvent, Finished]
    special = driver.episode.special
    assert driver.result.record.token_ids[-1] == special.im_end


HOT = Sampling(temperature=2.0)


def drawn(settings: ConversationSettings, sample: Sample, **options) -> int:
    """The seed that a question is drawn with, which its result tells."""
    driver = Driver(sample, settings, **options)
    assert driver.result.provenance.seed == driver.seed
    return driver.seed


def test_a_question_that_samples_without_a_seed_gets_a_fresh_one_that_its_result_tells(settings):
    hot = replace(settings, sampling=HOT)
    for sample in (Sample([], "?"), Sample([], "?", id="a")):
        assert len({drawn(hot, sample) for _ in range(8)}) == 8
        assert len({drawn(settings, sample, sampling=HOT) for _ in range(8)}) == 8
        assert len({drawn(settings, sample) for _ in range(8)}) == 1  # greedy draws nothing
        assert len({drawn(replace(hot, seed=3), sample) for _ in range(8)}) == 1
    assert drawn(hot, Sample([], "?", seed=7)) == 7
    assert drawn(replace(hot, seed=3), Sample([], "?", seed=7)) == 7


def test_samples_without_an_id_draw_by_their_place(settings):
    seeded = replace(settings, sampling=HOT, seed=3)
    places = [drawn(seeded, Sample([], "?"), place=place) for place in range(8)]
    assert len(set(places)) == 8
    assert places[0] == 3
    assert places == [drawn(seeded, Sample([], "?"), place=place) for place in range(8)]
    assert {drawn(seeded, Sample([], "?", id="a"), place=place) for place in range(3)} == {
        Sample([], "?", id="a").seed_from(3)
    }


def test_a_follow_up_draws_anew_unless_it_is_given_a_seed(settings, say):
    hot = replace(settings, sampling=HOT)
    first = asked(hot)
    say(first, ANSWER)
    assert len({first.seed, *(first.follow_up(Sample([], "And?")).seed for _ in range(4))}) == 5
    assert first.follow_up(Sample([], "And?", seed=5)).seed == 5


def test_limits_of_a_sample_do_not_lift_what_the_encoder_can_take(settings):
    capped = replace(settings, limits=replace(LIMITS, max_inquiry_images=2, max_inquiry_pixels=20_000))
    driver = Driver(Sample([PICTURE], "?", limits=Limits(max_turns=2)), capped)
    assert driver.start() == []
    limits = driver.result.provenance.limits
    assert driver.episode.limits == limits
    assert (limits.max_turns, limits.max_inquiry_images, limits.max_inquiry_pixels) == (2, 2, 20_000)
    tighter = Driver(Sample([PICTURE], "?", limits=Limits(max_inquiry_images=1)), capped).result.provenance.limits
    assert (tighter.max_inquiry_images, tighter.max_inquiry_pixels) == (1, 20_000)


def test_pictures_that_were_loaded_ahead_make_no_difference(settings, say):
    driver = Driver(Sample([PICTURE], "What is it?", id="s1"), settings)
    driver.prepare()
    episode = driver.episode
    assert driver.start() == []
    assert driver.episode is episode
    usual = asked(settings)
    assert driver.request.new_token_ids == usual.request.new_token_ids
    say(driver, ZOOM)
    (*_, finished) = say(driver, ANSWER)
    assert finished.result.answer == "seven"
    assert finished.result.seconds >= 0


def test_a_picture_that_could_not_be_loaded_ahead_is_told_at_the_start(settings):
    driver = Driver(Sample(["missing.png"], "What is it?", id="s1"), settings)
    driver.prepare()
    (finished,) = driver.start()
    assert isinstance(finished.result.error, ImageError)
    assert "missing.png" in str(finished.result.error)
