"""What one person asks: pictures, follow-ups, stopping, other wishes; and what the pages of several show."""

import io
import threading

import pytest
from clips import clip, marked
from desks import BOX, SIZE, ScriptedBackend
from PIL import Image

from vilavt_core.backends import open_backend
from vilavt_core.dialogue import PREVIEW, Dialogue, Wishes, note_of
from vilavt_core.errors import CheckpointError, EngineError, ImageError
from vilavt_core.presets import get_preset
from vilavt_core.results import CropsEvent, Finished
from vilavt_core.settings import read_chat_settings, save_chat_settings
from vilavt_core.sources import Video
from vilavt_core.web.desk import Desk, Desks


@pytest.fixture
def backend():
    return ScriptedBackend()


@pytest.fixture
def dialogue(backend):
    return Dialogue(backend)


def picture(colour=(255, 0, 0), size=(560, 560)):
    return Image.new("RGB", size, colour)


def answer(dialogue: Dialogue, question: str) -> str | None:
    *_, last = dialogue.ask(question)
    assert isinstance(last, Finished)
    return last.result.answer


def test_follow_ups_are_asked_in_the_same_conversation_and_new_pictures_join(dialogue, backend):
    dialogue.add(picture())
    answer(dialogue, "first?")
    dialogue.add(picture((0, 0, 255)), picture((0, 255, 0)))
    assert answer(dialogue, "second?") == "the mean colours are (255, 0, 0), (0, 0, 255), (0, 255, 0)"
    assert backend.asked[-1]["questions"] == ["first?", "second?"]
    assert [one.question for one in dialogue.results] == ["first?", "second?"]


def test_of_pictures_one_of_which_is_broken_none_is_added(dialogue, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        dialogue.add(picture(), tmp_path / "broken.png")
    assert dialogue.sources == dialogue.given == []


def test_a_video_is_its_frames_with_their_times(dialogue, backend):
    given = dialogue.add(Video(clip(marked(4)), frames=4, name="clip.mp4"))
    assert [one.label for one in given] == [f"clip.mp4, {n / 10:.1f} s" for n in range(4)]
    answer(dialogue, "what?")
    assert backend.asked[-1]["pictures"] == 4


@pytest.mark.parametrize("how", ["left", "stopped", "interrupted"])
def test_a_question_that_is_not_finished_ends_in_the_engine_and_the_next_begins_anew(dialogue, backend, how):
    dialogue.add(picture())
    answer(dialogue, "first?")
    events = dialogue.ask("second?")
    next(events)
    if how == "left":
        events.close()
    elif how == "stopped":
        dialogue.stop()
        assert list(events) == []
    else:
        with pytest.raises(KeyboardInterrupt):
            events.throw(KeyboardInterrupt)
    assert backend.ended == ["whole", "early"]
    dialogue.ready()
    answer(dialogue, "third?")
    assert backend.asked[-1]["questions"] == ["third?"]
    assert backend.asked[-1]["pictures"] == 1
    assert [one.question for one in dialogue.results] == ["first?", "third?"]


def test_other_wishes_begin_a_new_conversation_and_reach_the_backend(dialogue, backend):
    dialogue.add(picture())
    answer(dialogue, "first?")
    dialogue.wishes = Wishes(get_preset("eval-vllm"), {"max_turns": 2}, {"temperature": 0.5}, 7)
    assert not dialogue.continues
    answer(dialogue, "second?")
    asked = backend.asked[-1]
    assert asked["questions"] == ["second?"]
    assert (asked["told"].preset, asked["told"].limits.max_turns) == ("eval-vllm", 2)
    assert (asked["told"].sampling.temperature, asked["told"].seed) == (0.5, 7)


def test_a_second_question_waits_for_the_first(dialogue):
    dialogue.add(picture())
    events = dialogue.ask("first?")
    next(events)
    with pytest.raises(EngineError, match="still being answered"):
        next(dialogue.ask("second?"))
    events.close()
    answer(dialogue, "second?")


def test_a_blank_question_is_refused(dialogue):
    with pytest.raises(EngineError, match="blank"):
        next(dialogue.ask(" \n"))


def test_closing_while_a_question_is_answered_stops_it_and_forgets_all(dialogue, backend):
    dialogue.add(picture())
    events = dialogue.ask("first?")
    next(events)
    threading.Thread(target=dialogue.close).start()
    for _ in events:
        pass
    assert backend.ended == ["early"]
    assert dialogue.sources == dialogue.given == dialogue.results == []


def test_a_crop_lies_where_it_was_cut(dialogue):
    dialogue.add(picture(), picture((0, 0, 9), (2 * PREVIEW, PREVIEW)))
    assert [one.size for one in dialogue.given] == [(560, 560), (2 * PREVIEW, PREVIEW)]
    assert dialogue.given[1].preview.size == (PREVIEW, PREVIEW // 2)
    (event,) = [event for event in dialogue.ask("what?") if isinstance(event, CropsEvent)]
    (cut,) = dialogue.cuts(event)
    assert (cut.index, cut.parent, cut.given) == (2, None, 0)
    assert cut.box == pytest.approx([value / side for value, side in zip(BOX, (*SIZE, *SIZE), strict=True)])
    assert dialogue.crop(2) is cut


def test_the_pixels_that_a_server_does_not_tell_are_cut_from_the_picture(stub_server):
    image = picture((255, 255, 255))
    image.paste((200, 0, 0), (0, 0, 280, 280))
    dialogue = Dialogue(open_backend(stub_server.url))
    dialogue.add(image)
    (event,) = [event for event in dialogue.ask("what?") if isinstance(event, CropsEvent)]
    assert event.views == ()
    (cut,) = dialogue.cuts(event)
    assert cut.box == (0, 0, 0.5, 0.5)
    assert cut.image.size == (56, 56)
    assert cut.image.getcolors() == [(56 * 56, (200, 0, 0))]


def test_a_server_is_asked_in_another_way_without_a_new_connection(stub_server):
    client = open_backend(stub_server.url)
    other = client.varied(limits={"max_turns": 2}, sampling={"temperature": 0.5})
    other.ask([picture()], "what?")
    sent = stub_server.requests[-1]
    assert (sent["temperature"], sent["vilavt"]) == (0.5, {"max_turns": 2})
    client.ask([picture()], "what?")
    assert "temperature" not in stub_server.requests[-1]
    with pytest.raises(EngineError, match="runs the preset 'default', 'rl' was asked for"):
        client.varied(preset=get_preset("rl"))
    with pytest.raises(EngineError, match="cannot limit min_pixels"):
        client.varied(limits={"min_pixels": 9})


def test_a_note_of_a_checkpoint_is_kept_and_told(tmp_path, backend):
    assert note_of(str(tmp_path), backend) == ""
    save_chat_settings(tmp_path, limits={"max_turns": 2}, note="Knows cards only.")
    assert note_of(str(tmp_path), backend) == "Knows cards only."
    read_chat_settings(tmp_path).changed(limits={"max_turns": 3}).save(tmp_path)
    assert note_of(str(tmp_path), backend) == "Knows cards only."
    (tmp_path / "vilavt_chat.json").write_text('{"note": 3}')
    with pytest.raises(CheckpointError, match=r"vilavt_chat.json: it must be"):
        read_chat_settings(tmp_path)


def test_what_is_shown_of_one_visitor_is_not_shown_to_another(backend):
    desks = Desks(backend)
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        assert desks.of(name).put("what?", [picture(colour)], Wishes())
    for name in ("b", "a"):
        for _ in desks.of(name).answer():
            pass
    assert "(255, 0, 0)" in desks.of("a").thread
    assert "(0, 0, 255)" not in desks.of("a").thread
    assert "(0, 0, 255)" in desks.of("b").thread
    tokens = [desks.of(name).token for name in "ab"]
    assert desks.by_token(tokens[0]) is desks.of("a")
    assert desks.by_token("é" + tokens[0]) is None
    desks.leave("a")
    assert desks.by_token(tokens[0]) is None
    assert desks.of("a").shown == []


def test_of_too_many_visitors_the_one_that_was_idle_longest_is_forgotten(backend):
    desks = Desks(backend, most=2)
    first, second = desks.of("a"), desks.of("b")
    desks.of("a")
    desks.of("c")
    assert desks.of("a") is first
    assert desks.of("b") is not second


def test_a_question_without_a_picture_says_so_and_one_that_was_stopped_while_it_waited_is_not_asked(backend):
    desk = Desk(backend)
    assert not desk.put("what?", [], Wishes())
    assert "nothing to look at" in desk.shown[-1]
    assert list(desk.answer()) == []
    assert desk.put("what?", [picture()], Wishes())
    desk.dialogue.stop()
    for _ in desk.answer():
        pass
    assert backend.asked == []
    assert "Stopped" in desk.shown[-1]


def test_what_is_shown_is_escaped(backend):
    desk = Desk(backend)
    desk.put("<script>alert(1)</script>", [{"bytes": png(picture()), "path": "<b>.png"}], Wishes())
    assert "<script>" not in desk.thread
    assert "<b>.png" not in desk.thread
    assert "&lt;b&gt;.png" in desk.thread


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
