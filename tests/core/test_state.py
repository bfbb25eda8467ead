"""A conversation as a signed text: out of an episode and back into one, token for token; whatever else comes is refused
by name."""

import base64
import json
import zlib
from dataclasses import replace
from functools import cache

import pytest
from family import byte_tokenizer, picture
from hypothesis import given, settings
from hypothesis import strategies as st

from vilavt_core import state as states
from vilavt_core.driver import ConversationSettings, Driver
from vilavt_core.errors import StateError
from vilavt_core.presets import PRESETS, Limits
from vilavt_core.prompts import PromptSet
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn
from vilavt_core.regions import Picture, PixelBounds
from vilavt_core.results import Sample
from vilavt_core.state import (
    AskedQuestion,
    ConversationState,
    SaidQuestion,
    StateKey,
    check_origin,
    check_replayed,
    check_said,
    picture_hash,
    replay,
    unsampled,
)

KEY = StateKey(b"k" * 32)
TOKENIZER = byte_tokenizer()
LIMITS = Limits(max_pixels=64 * 784, max_context=8000, max_new_tokens_per_turn=300)


def of_preset(name: str = "default", limits: Limits = LIMITS, **changes) -> ConversationSettings:
    preset = PRESETS[name]
    return ConversationSettings(
        **{
            "tokenizer": TOKENIZER,
            "prompts": PromptSet.load("tiny"),
            "preset": preset,
            "limits": limits,
            "sampling": preset.sampling,
            "fingerprint": "f" * 64,
            **changes,
        }
    )


SETTINGS = of_preset()
ANSWER = format_turn(Answer("a red\n card"))


def zoom(index: int, *box: float) -> str:
    return format_turn(ToolCall((Region(index, box),), "the card"))


def asked(before, question, turns, pictures=(), limits=None, settings=SETTINGS, finish="stop"):
    """A question that the model, whose turns these are, has answered: its driver, and what a state has of it."""
    sample = Sample([Picture(one) for one in pictures], question, limits=limits or settings.limits)
    driver = Driver(sample, settings) if before is None else before.follow_up(sample)
    driver.start()
    for turn in turns:
        if driver.request is None or driver.episode is not driver.conversation:
            break
        ids = TOKENIZER.encode(turn, split_special_tokens=True) if isinstance(turn, str) else list(turn)
        ids = [*ids, *([driver.request.stop_token_ids[0]] if finish == "stop" else [])]
        driver.take(ids[: driver.request.max_new_tokens], None, finish)
    while driver.request is not None and driver.episode is driver.conversation:  # whatever it said, it ends
        driver.take_text(ANSWER)
    return driver, AskedQuestion.of(driver, driver.result.answer)


def again(state, said, settings=SETTINGS) -> Driver:
    """The conversation, from its state and its messages."""
    check_origin(state, settings)
    check_said(state, said)
    driver = None
    for one, told in zip(state.questions, said, strict=True):
        driver = replay(driver, settings, one, told)
    check_replayed(state, driver)
    return driver


def said_of(*drivers) -> list[SaidQuestion]:
    return [SaidQuestion(one.sample.images, one.sample.question, one.result.answer or "") for one in drivers]


@cache
def talk():
    """Two questions with three zooms, one into a crop and one that is refused; and their state."""
    first, one = asked(
        None, "Which card?", [zoom(0, 8, 8, 80, 60), zoom(1, 4, 4, 40, 30), ANSWER], [picture(1, 160, 120)]
    )
    more = [zoom(7, 1, 1, 2, 2), zoom(3, 0, 0, 60, 60), ANSWER]
    second, two = asked(first, "And this?", more, [picture(2, 90, 140)], replace(LIMITS, max_pixels=40 * 784))
    return ConversationState.of(second, [one, two], issued=1000), said_of(first, second), second


# Back into a conversation


def test_a_conversation_comes_back_token_for_token_and_pixel_for_pixel():
    state, said, driver = talk()
    back = again(KEY.read(KEY.sign(state)), said)
    ours, theirs = driver.conversation, back.conversation
    assert theirs.record.token_ids == ours.record.token_ids
    assert theirs.record.loss_mask == ours.record.loss_mask
    assert theirs.record.image_spans == ours.record.image_spans
    assert theirs.transcript == ours.transcript
    assert len(ours.views) == 5
    assert [(one.region, one.parent, one.box, one.image.tobytes()) for one in theirs.views] == [
        (one.region, one.parent, one.box, one.image.tobytes()) for one in ours.views
    ]
    assert [one.query for one in theirs.inquiries] == [one.query for one in ours.inquiries]
    following = Sample([], "Why?", limits=LIMITS)
    ids = [one.follow_up(following).conversation.next_request().all_token_ids for one in (driver, back)]
    assert ids[0] == ids[1]


def test_neither_a_word_of_the_messages_nor_a_picture_is_in_a_state():
    data = states._adapter().dump_json(talk()[0])
    assert b"Which" not in data
    assert b"red" not in data
    assert len(KEY.sign(talk()[0])) < 2500


@pytest.mark.parametrize(
    "turns, finish", [([ANSWER[:20]], "length"), ([[]], "length"), ([zoom(0, 1, 1, 90, 90), "<think>and"], "length")]
)
def test_a_question_without_an_answer_can_be_followed_up_too(turns, finish):
    driver, one = asked(None, "What?", turns, [picture(3, 120, 120)], finish=finish)
    assert driver.result.answer is None
    state = ConversationState.of(driver, [one])
    assert again(state, said_of(driver)).conversation.record.token_ids == driver.conversation.record.token_ids


def test_an_answer_that_was_not_sampled_is_gone_through_under_limits_that_fit_it():
    long = "word " * 100
    sample = Sample([Picture(picture(1, 60, 60))], "What?", limits=unsampled(LIMITS))
    driver = Driver(sample, SETTINGS)
    driver.start()
    driver.take_text(format_turn(Answer(long)))
    one = AskedQuestion.of(driver, long, LIMITS)
    assert len(one.turns[0].token_ids) > LIMITS.max_new_tokens_per_turn
    state = KEY.read(KEY.sign(ConversationState.of(driver, [one])))
    back = again(state, [SaidQuestion(sample.images, "What?", long)])
    assert back.conversation.record.token_ids == driver.conversation.record.token_ids


zooms = st.builds(
    lambda index, x, y, width, height: zoom(index, x, y, x + width, y + height),
    st.integers(0, 3),
    *[st.integers(low, high) for low, high in ((0, 15), (0, 15), (8, 40), (8, 60))],
)
turn = st.one_of(
    zooms,
    st.just(ANSWER),
    st.text(st.characters(codec="ascii", exclude_characters="<|"), max_size=30),
    st.lists(st.integers(0, 255), max_size=12),
)
question = st.tuples(
    st.text(max_size=12),
    st.builds(list.__add__, st.lists(zooms, max_size=2), st.lists(turn, max_size=2)),
    st.lists(st.tuples(st.integers(60, 200), st.integers(60, 200)), min_size=1, max_size=2),
    st.builds(
        Limits,
        max_turns=st.integers(1, 5),
        max_images=st.integers(4, 52),
        max_new_tokens_per_turn=st.integers(100, 300),
        max_context=st.integers(4000, 8000),
        max_pixels=st.integers(16 * 784, 64 * 784),
        crop_max_pixels=st.none() | st.integers(16 * 784, 64 * 784),
    ),
    st.sampled_from(["stop", "length"]),
)


@settings(deadline=None, max_examples=25)
@given(st.lists(question, min_size=1, max_size=3), st.sampled_from(list(PRESETS)))
def test_any_conversation_comes_back(questions, preset):
    here, driver, drivers, ours = of_preset(preset), None, [], []
    for number, (text, turns, sizes, limits, finish) in enumerate(questions):
        pictures = [picture(10 * number + i, *size) for i, size in enumerate(sizes)]
        driver, one = asked(driver, text, turns, pictures, limits, here, finish)
        if driver.result.error is not None or not driver.result.turns:
            return  # it did not fit: nothing is there to continue
        drivers.append(driver)
        ours.append(one)
    state = ConversationState.of(driver, ours, issued=5)
    text = KEY.sign(state)
    assert KEY.read(text) == state
    assert text.isascii()
    back = again(KEY.read(text), said_of(*drivers), here)
    assert back.conversation.record.token_ids == driver.conversation.record.token_ids
    assert ConversationState.of(back, state.questions, 5) == state


# What is refused


def test_every_bit_that_changes_is_noticed():
    text = KEY.sign(talk()[0])
    for place in range(len(text)):
        for bit in range(8):
            changed = text[:place] + chr(ord(text[place]) ^ (1 << bit)) + text[place + 1 :]
            with pytest.raises(StateError, match=r"vilavt\.state"):
                KEY.read(changed)


@settings(deadline=None)
@given(st.data())
def test_a_state_that_was_cut_joined_or_padded_is_none(data):
    text = KEY.sign(talk()[0])
    cut = data.draw(st.integers(0, len(text) - 1))
    more = data.draw(st.text(st.sampled_from("AZaz09-_=\n +/\u00e9"), min_size=1, max_size=4))
    for changed in (text[:cut], text[:cut] + more + text[cut:], text + more, more + text, text * 2, text[cut:] + more):
        with pytest.raises(StateError):
            KEY.read(changed)


def test_another_key_another_version_and_no_state_are_told_apart():
    text = KEY.sign(talk()[0])
    other = StateKey(b"o" * 32)
    with pytest.raises(StateError, match=rf"signed with another key \({KEY.name}, this server has {other.name}\)"):
        other.read(text)
    data = bytearray(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    data[-1] ^= 1
    with pytest.raises(StateError, match="changed on its way: its signature does not fit"):
        KEY.read(base64.urlsafe_b64encode(data).rstrip(b"=").decode())
    data[0] = 9
    with pytest.raises(StateError, match="has version 9, this server reads version 1"):
        KEY.read(base64.urlsafe_b64encode(data).rstrip(b"=").decode())
    for nonsense in ("", "A", "no state", "A" * 40, "\ud800", "\u0661" * 60):
        with pytest.raises(StateError, match="it is no base64url of a state"):
            KEY.read(nonsense)


def test_a_state_that_is_too_old_is_refused_with_both_ages():
    text = KEY.sign(talk()[0])  # of second 1000
    assert KEY.read(text, max_age=60, now=1060).issued == 1000
    assert KEY.read(text, now=1e9).issued == 1000
    with pytest.raises(StateError, match=r"is 61 s old, at most 60 are allowed \(--state-max-age\)"):
        KEY.read(text, max_age=60, now=1061)


def signed(payload: bytes, key: StateKey = KEY) -> str:
    head = bytes([states.VERSION]) + key._name
    return base64.urlsafe_b64encode(head + key._mac(head, payload) + payload).rstrip(b"=").decode()


def test_size_is_looked_at_before_anything_is_decoded_and_while_it_is_inflated(monkeypatch):
    bomb = signed(zlib.compress(b"[" * 30_000_000, 9))
    assert len(bomb) < states.MAX_CHARACTERS
    with pytest.raises(StateError, match=f"does not end within {states.MAX_BYTES} bytes"):
        KEY.read(bomb)
    monkeypatch.setattr(states.base64, "urlsafe_b64decode", None)  # it would fail if it were called
    with pytest.raises(StateError, match=rf"has 524289 characters, at most {states.MAX_CHARACTERS} are read"):
        KEY.read("A" * (states.MAX_CHARACTERS + 1))


def test_nothing_is_inflated_before_the_signature_fits(monkeypatch):
    monkeypatch.setattr(states.zlib, "decompressobj", None)
    with pytest.raises(StateError, match="signed with another key"):
        KEY.read(signed(b"x" * 100, StateKey(b"z" * 32)))


def test_a_conversation_that_is_too_long_for_a_state_is_said_so(monkeypatch):
    monkeypatch.setattr(states, "MAX_CHARACTERS", 500)
    with pytest.raises(StateError, match=r"has \d+ characters \(\d+ bytes of JSON\), at most 500"):
        KEY.sign(talk()[0])


@pytest.mark.parametrize(
    "payload", [b"no zlib", zlib.compress(b"{}"), zlib.compress(b"{}") + b"x", zlib.compress(b"[")]
)
def test_what_is_signed_and_yet_no_state_is_refused(payload):
    with pytest.raises(StateError, match=r"vilavt\.state cannot be read"):
        KEY.read(signed(payload))


def test_a_field_of_nobody_is_refused():
    data = json.loads(states._adapter().dump_json(talk()[0]))
    assert KEY.read(signed(zlib.compress(json.dumps(data).encode()))) == talk()[0]
    for part in (data, data["origin"], data["questions"][0], data["images"][0]):
        part["extra"] = 1
        with pytest.raises(StateError, match="extra"):
            KEY.read(signed(zlib.compress(json.dumps(data).encode())))
        del part["extra"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"fingerprint": "0" * 64}, f"another checkpoint: {'f' * 64}, this server has {'0' * 64}"),
        ({"prompts": PromptSet.load("default")}, "another prompt set"),
        ({"preset": PRESETS["rl"]}, "another preset: default, this server has rl"),
        ({"preset": replace(PRESETS["default"], query_prefix="Query: ")}, "another version of the preset default"),
        ({"limits": replace(LIMITS, max_turns=4)}, "question 0: it was asked with max_turns 5, this server has 4"),
        ({"limits": replace(LIMITS, max_pixels=50 * 784)}, "question 0: it was asked with max_pixels 50176, .* 39200"),
        ({"limits": replace(LIMITS, crop_max_pixels=60 * 784)}, "with crop_max_pixels 50176, this server has 47040"),
        ({"limits": replace(LIMITS, max_total_pixels=10**6)}, "max_total_pixels unlimited, this server has 1000000"),
        ({"limits": replace(LIMITS, min_pixels=784)}, "with min_pixels 3136, this server has 784"),
    ],
)
def test_a_state_of_another_server_is_refused_with_what_is_different(changes, words):
    with pytest.raises(StateError, match=words):
        check_origin(talk()[0], replace(SETTINGS, **changes))


def test_a_server_that_allows_more_reads_a_state():
    check_origin(talk()[0], replace(SETTINGS, limits=replace(LIMITS, max_turns=9, max_pixels=1e6, max_context=None)))


def test_a_state_of_other_messages_is_refused_with_the_question_that_is_different():
    state, (one, two), _ = talk()
    (picture_one,) = one.pictures
    dot = picture_one.image.copy()
    dot.putpixel((159, 119), (1, 2, 3))
    for said, words in [
        ([one], "of a conversation of 2 questions, the messages have 1 before the last one"),
        ([one, two, two], "of 2 questions, the messages have 3"),
        ([replace(one, question="which card?"), two], "question 0 had another text"),
        ([one, replace(two, answer="a redcard")], "question 1 had another answer"),
        ([replace(one, pictures=[]), two], "question 0 had 1 images, now it has 0"),
        ([replace(one, pictures=[Picture(dot)]), two], r"question 0 had another image 0 \(SHA-256 \w+…, now \w+…\)"),
        ([replace(one, pictures=two.pictures), replace(two, pictures=one.pictures)], "question 0 had another image 0"),
        (
            [replace(one, pictures=[replace(picture_one, bounds=PixelBounds(max_pixels=9000))]), two],
            "question 0 had another image 0",
        ),
        ([replace(one, pictures=[replace(picture_one, time=1.5)]), two], "question 0 had another image 0"),
    ]:
        with pytest.raises(StateError, match=words):
            check_said(state, said)
    check_said(state, [one, replace(two, answer=" a  red card\n")])  # clients strip and wrap


def test_what_comes_out_otherwise_is_refused_even_with_the_right_signature():
    """Somebody with the key, or a replica with another version, cannot move a crop."""
    state, said, _ = talk()
    image = state.images[2]
    for forged, words in [
        (replace(state, images=(*state.images[:2], replace(image, box=(0, 0, 9, 9)), *state.images[3:])), "image 2 as"),
        (replace(state, images=state.images[:2]), "has 2 images, 5 come out"),
        (replace(state, stream="0" * 64), "is of a stream of"),
        (replace(state, pixels="0" * 64), "with other pixels"),
        (with_turns(state, state.questions[0].turns[1:]), "has 5 images, 2 come out"),
        (with_turns(state, state.questions[0].turns[:1]), "of 1 turns goes on after 1"),
        (with_turns(state, state.questions[0].turns + state.questions[0].turns[-1:]), "of 4 turns ends after 3"),
        (with_turns(state, (replace(state.questions[0].turns[0], token_ids=(259, 261)),)), "cannot be carried out"),
        (with_turns(state, (replace(state.questions[0].turns[0], token_ids=(7,) * 400),)), "400 tokens were fed"),
        (with_turns(state, (replace(state.questions[0].turns[0], token_ids=(-1, 10**30)),)), "cannot be carried out"),
    ]:
        with pytest.raises(StateError, match=words):
            again(forged, said)


def with_turns(state: ConversationState, turns) -> ConversationState:
    return replace(state, questions=(replace(state.questions[0], turns=turns), *state.questions[1:]))


# Keys


def test_a_key_comes_out_of_a_file_and_is_known_by_its_name_alone(tmp_path):
    path = tmp_path / "key"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    key = StateKey.from_file(path)
    assert key.name == StateKey(b"0123456789abcdef0123456789abcdef").name
    assert key.read(key.sign(talk()[0])) == talk()[0]
    assert len({key.name, KEY.name, StateKey.fresh().name, StateKey.fresh().name}) == 4


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "has 0 bytes, it must have at least 32"),
        (b"short\n", "has 5 bytes"),
        (b"x" * 5000, "more than 4096 bytes"),
    ],
)
def test_a_file_without_a_key_is_refused_by_its_name(tmp_path, content, words):
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(StateError, match=rf"{path}.*{words}"):
        StateKey.from_file(path)


def test_no_file_is_refused_by_its_name(tmp_path):
    for path, words in [(tmp_path / "gone", "cannot be read"), (tmp_path, "is no file")]:
        with pytest.raises(StateError, match=rf"{path}.*{words}"):
            StateKey.from_file(path)


def test_pictures_of_the_same_pixels_have_the_same_hash_and_no_others():
    one = picture(5, 300, 700)
    same = picture_hash(Picture(one))
    assert picture_hash(Picture(one.copy(), name="b.png")) == same
    others = [one.transpose(0), one.resize((700, 300)), one.crop((0, 0, 300, 699)), one.convert("L")]
    assert len({same, *(picture_hash(Picture(other)) for other in others)}) == 5
