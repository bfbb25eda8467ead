"""Traces: what is drawn and written, and that nothing in a conversation can break out of the page."""

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vilavt_core.drawing import COLOURS, load_font, wrap, written
from vilavt_core.errors import ImageError
from vilavt_core.presets import Limits
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn
from vilavt_core.results import ChatResult, Intervention
from vilavt_core.trace import annotate, draw_conversation, write_html
from vilavt_core.viewer import Trace
from vilavt_hf.chat import VilavtChat

HOSTILE = '<script>alert("x")</script> & </pre>\'"'


def conversation(model, processor, turns: list[str], question: str = "Which one?") -> ChatResult:
    limits = Limits(max_turns=4, max_new_tokens_per_turn=400, max_pixels=112 * 112)
    chat = VilavtChat(model, processor, limits=limits, prompts="tiny")
    image = Image.new("RGB", (224, 168), "white")
    forced = Intervention(forced_turns=lambda sample, turn: turns[turn])
    return chat.ask_many([([image], question)], intervention=forced)[0]


def zoom(query: str, *boxes: tuple[int, tuple[float, float, float, float]]) -> str:
    return format_turn(ToolCall(tuple(Region(i, box) for i, box in boxes), query, f"thinking of {query}"))


@pytest.fixture
def result(tiny_model, processor) -> ChatResult:
    turns = [
        zoom("left part", (0, (0, 0, 40, 40)), (0, (60, 20, 100, 60))),
        zoom("closer", (1, (10, 10, 30, 30))),
        format_turn(Answer("seven", "clear")),
    ]
    return conversation(tiny_model, processor, turns)


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []  # well formed
    return page


def test_a_page_shows_every_turn_with_its_images_queries_thoughts_tokens_and_seconds(result, tmp_path):
    page = read(write_html(result, tmp_path / "trace.html"))
    for text in ("Which one?", "left part", "thinking of closer", "seven", "clear", "Turn 3"):
        assert text in page.text
    assert page.tags.count("img") == len(result.views) == 4
    assert len(re.findall(r"\d+ tokens · \d+\.\d\d s", page.text)) == 3
    assert "region [10, 10, 30, 30] of image 1" in page.text
    assert "1.00 per distinct one" in page.text


def test_a_page_refers_to_nothing_outside_itself(result, tmp_path):
    source = write_html(result, tmp_path / "trace.html").read_text(encoding="utf-8")
    page = Page(source)
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert "http" not in re.sub(r"http-equiv", "", source)
    assert "url(" not in source
    pictures = [link for link in page.links if link.startswith("data:")]
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2]))).size == result.views[0].image.size


def test_text_from_models_and_users_is_escaped(tiny_model, processor, tmp_path):
    turns = [zoom(HOSTILE, (0, (0, 0, 40, 40))), format_turn(Answer(HOSTILE, HOSTILE))]
    result = conversation(tiny_model, processor, turns, question=HOSTILE)
    trace = Trace.of(result, target=HOSTILE, run=HOSTILE, tokenizer=processor.tokenizer, facts={HOSTILE: HOSTILE})
    page = read(write_html(trace, tmp_path / "trace.html"))
    assert page.tags.count("script") == 1  # the viewer's own
    assert page.text.count('<script>alert("x")</script> & </pre>') >= 8


def test_refused_failed_and_unanswered_conversations_are_written_too(tiny_model, processor, tmp_path):
    refused = conversation(tiny_model, processor, [zoom("far", (9, (0, 0, 9, 9))), "I see <nothing>.", "?", "?"])
    failed = replace(refused, episode=None, error=ValueError("<boom>"))
    page = read(write_html([refused, failed], tmp_path / "trace.html"))
    assert "region 0 names image 9" in page.text
    assert "I see <nothing>." in page.text
    assert "No answer (no_action)" in page.text
    assert "ValueError: <boom>" in page.text
    assert page.tags.count("article") == 2
    assert draw_conversation(refused).size > (0, 0)


def test_all_questions_of_a_conversation_stand_on_one_page_below_each_other(tiny_model, processor, tmp_path):
    limits = Limits(max_turns=2, max_new_tokens_per_turn=8, max_pixels=112 * 112)
    chat = VilavtChat(tiny_model, processor, limits=limits, prompts="tiny")
    talk = chat.conversation(Image.new("RGB", (112, 112), "white"))
    first, second = talk.ask("Which one is first?"), talk.ask("And the second one?")
    page = read(write_html([[first, second]], tmp_path / "trace.html"))
    assert page.tags.count("article") == 1
    assert page.tags.count("img") == 1
    assert page.text.index("Which one is first?") < page.text.index("And the second one?")
    assert "Which one is first?" in second.transcript.partition("And the second one?")[0]


def test_what_the_model_saw_is_in_the_result_and_on_the_page(result, tmp_path):
    assert result.transcript.startswith("<|im_start|>system")
    assert "<image 112x84>" in result.transcript
    assert ChatResult.from_json(result.to_json()).transcript == result.transcript
    assert result.transcript in read(write_html(result, tmp_path / "trace.html")).text


def test_regions_are_drawn_where_they_are_in_the_colour_of_their_crop(result):
    scale = 3  # 112 px are enlarged to about 320
    image = annotate(result.views, 0)
    assert image.size == (result.views[0].image.width * scale, result.views[0].image.height * scale)
    for index, (x1, _, x2, y2) in ((1, (0, 0, 40, 40)), (2, (60, 20, 100, 60))):
        colour = tuple(int(COLOURS[index - 1][i : i + 2], 16) for i in (1, 3, 5))
        assert image.getpixel(((x1 + x2) * scale // 2, y2 * scale - 1)) == colour
    untouched = annotate(result.views, 3)
    assert untouched.getcolors(maxcolors=2) == [(untouched.width * untouched.height, (255, 255, 255))]


def test_a_box_on_a_ground_of_its_own_colour_and_two_boxes_in_one_place_are_seen(tiny_model, processor):
    first = COLOURS[0]
    turns = [zoom("twice", (0, (28, 28, 84, 84)), (0, (28, 28, 84, 84))), format_turn(Answer("x"))]
    result = conversation(tiny_model, processor, turns)
    views = [replace(result.views[0], image=Image.new("RGB", (112, 112), first)), *result.views[1:]]
    drawn = {colour for _, colour in annotate(views, 0).getcolors(maxcolors=100_000)}
    ground, second = (tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (first, COLOURS[1]))
    assert {ground, second, (0, 0, 0), (255, 255, 255)} <= drawn


def test_the_picture_of_a_conversation_grows_with_its_rounds(result, tiny_model, processor):
    short = draw_conversation(conversation(tiny_model, processor, [format_turn(Answer("seven"))]))
    picture = draw_conversation(result)
    assert picture.mode == "RGB"
    assert picture.width > short.width
    colours = {colour for _, colour in picture.getcolors(maxcolors=100_000)}
    assert {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in COLOURS[:3]} <= colours


def test_the_picture_grows_with_long_questions_and_answers(result):
    pictures = []
    for length in (600, 6000):
        answered = replace(result.episode, answer="a" * length)
        pictures.append(draw_conversation(replace(result, episode=answered, question="word " * 300), scale=1))
    assert all(picture.width < 2000 for picture in pictures)
    assert pictures[1].height > pictures[0].height + 1000


def test_a_failed_conversation_is_drawn_without_pictures(result):
    failed = replace(result, episode=None, error=ValueError("boom"))
    assert draw_conversation(failed, scale=1).width > 100


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200), st.integers(40, 400))
def test_lines_hold_all_of_a_text_and_are_no_wider_than_told(text, width):
    font = load_font(14)
    lines = wrap(text, font, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(len(line) == 1 or font.getlength(line) <= width for line in lines if line)


def test_other_scripts_are_drawn_or_spelled_out_but_never_as_empty_boxes(monkeypatch):
    text, _ = written("card 蓝色", 20)
    assert text in ("card 蓝色", "card \\u84dd\\u8272")
    monkeypatch.setattr("vilavt_core.drawing.WIDE_FONTS", ())
    text, font = written("card 蓝\U00012345", 20)
    assert text == "card \\u84dd\\U00012345"
    assert font.getlength(text) > 0


def test_a_conversation_that_a_server_told_is_shown_without_its_pictures(result, tmp_path):
    told = ChatResult.from_json(result.to_json())
    page = write_html([told], tmp_path / "told.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "region [60, 20, 100, 60] of image 0" in page
    assert "thinking of closer" in page
    assert page.count('class="box') == 4  # of three regions; the nested one is on the original, too
    with pytest.raises(ImageError, match="HTML"):
        draw_conversation(told)


def test_templates_are_loaded_when_a_page_is_written():
    code = "import sys, vilavt_core.trace, vilavt_eval.comparison; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "False\n"
