"""Traces: what is drawn and written, and that nothing in a conversation can break out of the page."""

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from vilavt_core.drawing import COLOURS
from vilavt_core.errors import ImageError
from vilavt_core.pages import render
from vilavt_core.presets import Limits
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn
from vilavt_core.results import ChatResult, Intervention
from vilavt_core.trace import annotate, draw_conversation, write_html
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
        if tag not in ("meta", "img"):
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
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in re.sub(r"http-equiv", "", source)
    assert "url(" not in source
    image = Image.open(io.BytesIO(base64.b64decode(page.links[0].partition(",")[2])))
    assert image.size == annotate(result.views, 0).size


def test_text_from_models_and_users_is_escaped(tiny_model, processor, tmp_path):
    turns = [zoom(HOSTILE, (0, (0, 0, 40, 40))), format_turn(Answer(HOSTILE, HOSTILE))]
    result = conversation(tiny_model, processor, turns, question=HOSTILE)
    page = read(write_html(result, tmp_path / "trace.html"))
    assert "script" not in page.tags
    assert page.text.count('<script>alert("x")</script> & </pre>') >= 4


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


def test_regions_are_drawn_where_they_are_in_the_colour_of_their_crop(result):
    scale = 3  # 112 px are enlarged to about 320
    image = annotate(result.views, 0)
    assert image.size == (result.views[0].image.width * scale, result.views[0].image.height * scale)
    for index, (x1, _, x2, y2) in ((1, (0, 0, 40, 40)), (2, (60, 20, 100, 60))):
        colour = tuple(int(COLOURS[index - 1][i : i + 2], 16) for i in (1, 3, 5))
        assert image.getpixel(((x1 + x2) * scale // 2, y2 * scale - 1)) == colour
    untouched = annotate(result.views, 3)
    assert untouched.getcolors(maxcolors=2) == [(untouched.width * untouched.height, (255, 255, 255))]


def test_the_picture_of_a_conversation_grows_with_its_rounds(result, tiny_model, processor):
    short = draw_conversation(conversation(tiny_model, processor, [format_turn(Answer("seven"))]))
    picture = draw_conversation(result)
    assert picture.mode == "RGB"
    assert picture.width > short.width
    colours = {colour for _, colour in picture.getcolors(maxcolors=100_000)}
    assert {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in COLOURS[:3]} <= colours


def test_long_questions_and_answers_are_wrapped_and_cut(tiny_model, processor):
    text = "word " * 300 + "x" * 2000
    result = conversation(tiny_model, processor, [format_turn(Answer("a" * 300))], question=text)
    picture = draw_conversation(result, scale=1)
    assert picture.width < 2000
    assert picture.height < 2000


def test_a_conversation_that_a_server_told_is_shown_without_its_pictures(result, tmp_path):
    told = ChatResult.from_json(result.to_json())
    page = write_html([told], tmp_path / "told.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "region [60, 20, 100, 60] of image 0" in page
    assert "thinking of closer" in page
    with pytest.raises(ImageError, match="without its pictures"):
        draw_conversation(told)


def test_a_section_stands_as_it_is_only_if_a_template_made_it(result, tmp_path):
    (tmp_path / "section.html").write_text("<aside>{{ text }}</aside>")
    made = render("section.html", tmp_path, text=HOSTILE + "\ud800")
    page = read(write_html([result, result], tmp_path / "trace.html", sections=[made, "<aside>"]))
    assert page.tags.count("aside") == 1
    assert HOSTILE + "?" in page.text
    assert "<aside>" in page.text


def test_templates_are_loaded_when_a_page_is_written():
    code = "import sys, vilavt_core.trace, vilavt_eval.comparison; print('jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "False\n"
