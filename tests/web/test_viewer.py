"""The pages of `vilavt view` and of a trace in headless Chromium: regions and words, keys, phones, night, filters."""

import base64
import io
import json
from pathlib import Path

import pytest
from looking import box_of, contrast, luminance, relative
from PIL import Image, ImageDraw
from recorded import crop, original, zoomed
from typer.testing import CliRunner

from vilavt_core.cli import app
from vilavt_core.conversation import FinishReason, Result, ShownImage, Turn, Usage
from vilavt_core.presets import Limits, Sampling
from vilavt_core.protocol import Answer, format_turn
from vilavt_core.results import ChatResult, Provenance, Work
from vilavt_core.trace import write_html
from vilavt_eval.questions import Question
from vilavt_eval.runner import row_of

WIDTH, HEIGHT = 200, 100
"""Of the picture as it was shown."""
LEFT, RIGHT, NESTED = (0, 0, 80, 50), (100, 50, 200, 100), (14, 14, 42, 42)
IMAGES = (
    original(0, name="a.png"),
    crop(1, LEFT),
    crop(2, RIGHT),
    crop(3, NESTED, parent=2, region=(0.625, 0.625, 0.875, 0.875)),
)
STAGE_BOX = ".stage .box[data-r='{}'] .line"


def answered(question: str, images: tuple[ShownImage, ...], answer: str | None, thought: str) -> ChatResult:
    """A conversation that zooms into all crops at once, or answers at first look."""
    turns = zoomed(*images).turns
    last = Answer(answer or "", thought)
    turns = (
        (*turns[:1], Turn(1, format_turn(last), last, 5)) if len(images) > 1 else (Turn(0, format_turn(last), last, 5),)
    )
    finish = FinishReason.ANSWER if answer else FinishReason.TURN_LIMIT
    provenance = Provenance("default", Limits(), Sampling(), 0, "default", "0" * 64, "x", None, "f", "cpu", "sdpa", {})
    episode = Result(
        answer, finish, "", tuple(turns), tuple(images), (), (), Usage(1, 1, 1, len(images), 2), "default", Limits(),
        "default", "0" * 64, {}, None,
    )  # fmt: skip
    return ChatResult(question, None, episode, None, provenance, Work(10, 10, 5, 5, 10), 1.5)


def write_run(path: Path, **rows: tuple[str | None, tuple[ShownImage, ...], str]) -> Path:
    """A result file as `vilavt eval` writes it; by id: the answer (right is A), the images, a thought."""
    lines = []
    for key, (answer, images, thought) in rows.items():
        text = f"Which of the signs of question {key} is the larger one?"
        record = {"images": ["a.png"], "question": text}
        question = Question(key, record, (path.parent / "a.png",), (), text, "multiple choice", (), "A", None)
        lines.append(json.dumps(row_of(question, answered(text, images, answer, thought))))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def view(*arguments: Path) -> Path:
    *runs, out = arguments
    done = CliRunner().invoke(app, ["view", *map(str, runs), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a picture: red, its right lower quarter blue."""
    image = Image.new("RGB", (4 * WIDTH, 4 * HEIGHT), "red")
    ImageDraw.Draw(image).rectangle((2 * WIDTH, 2 * HEIGHT, 4 * WIDTH, 4 * HEIGHT), fill="blue")
    image.save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture
def browsed(folder) -> Path:
    """Five conversations: right and wrong, zooming and not, one without an answer."""
    first = write_run(
        folder / "first.jsonl",
        a=("A", IMAGES, "the lighthouse is far"),
        b=("B", IMAGES, "the lighthouse is near"),
        c=("A", IMAGES[:1], "a plain look"),
        d=("B", IMAGES[:1], "a plain look"),
        e=(None, IMAGES, ""),
    )
    return view(first, folder / "out")


@pytest.fixture
def compared(folder) -> Path:
    first = write_run(folder / "one.jsonl", a=("A", IMAGES, "x"), b=("B", IMAGES, "x"), c=("A", IMAGES, "x"))
    second = write_run(folder / "two.jsonl", a=("B", IMAGES, "x"), b=("A", IMAGES, "x"), c=("A", IMAGES[:1], "x"))
    return view(first, second, folder / "out")


def lit(page, selector: str) -> list[str]:
    """Links of the elements that are highlighted."""
    return page.locator(f"{selector}.lit").evaluate_all("found => found.map(one => one.dataset.r)")


def link_of(page, index: int) -> str:
    """How the page names the region that image `index` was cut from."""
    return page.locator(f".turns figure:has(img[alt^='image {index}'])").first.get_attribute("data-r")


def point_at(page, selector: str) -> None:
    page.locator(selector).scroll_into_view_if_needed()
    x, y, width, height = box_of(page, selector)
    page.mouse.move(x + width / 2, y + height / 2)


def test_a_page_shows_its_pictures_with_boxes_where_the_regions_are(browsed, open_file):
    page = open_file(browsed / "pages" / "00001.html")
    assert page.locator("h2").inner_text() == "Which of the signs of question a is the larger one?"
    page.wait_for_function("[...document.images].every(one => one.complete)")
    assert page.locator("img").evaluate_all("all => all.map(one => one.naturalWidth > 0)") == [True] * 4
    picture = box_of(page, ".stage figure img")
    for index, box in ((1, LEFT), (2, RIGHT)):
        found = relative(box_of(page, STAGE_BOX.format(link_of(page, index))), picture)
        assert found == pytest.approx([v / side for v, side in zip(box, (WIDTH, HEIGHT) * 2, strict=True)], abs=0.01)
    talk = box_of(page, ".turns")
    assert picture[0] + picture[2] <= talk[0], "the picture is beside the conversation, not above it"


def test_pointing_at_a_region_lights_its_crop_and_its_words_and_no_other(browsed, open_file):
    page = open_file(browsed / "pages" / "00001.html")
    first, second = link_of(page, 1), link_of(page, 2)
    assert first != second
    point_at(page, STAGE_BOX.format(first))
    assert lit(page, ".turns figure") == lit(page, ".regions li") == lit(page, ".chip") == [first]
    assert len(lit(page, ".query")) == 1
    point_at(page, f".turns figure[data-r='{second}'] figcaption")
    assert lit(page, ".stage .box") == lit(page, ".regions li") == [second]
    point_at(page, f".chip[data-r='{first}']")
    assert lit(page, ".stage .box") == lit(page, ".turns figure") == [first]
    point_at(page, ".query >> nth=0")
    page.mouse.move(1, 1)
    assert page.locator(".lit").count() == 0


def test_a_click_keeps_what_belongs_together_lit_until_escape(browsed, open_file):
    page = open_file(browsed / "pages" / "00001.html")
    link = link_of(page, 2)
    page.locator(f".stage .tag[data-r='{link}']").click()
    page.mouse.move(1, 1)
    assert lit(page, ".turns figure") == [link]
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    assert page.locator(".lit").count() == 0


def test_the_keyboard_goes_through_turns_regions_pages_and_pictures(browsed, open_file):
    page = open_file(browsed / "pages" / "00001.html")
    for key, turn in (("j", "turn 1"), ("j", "turn 2"), ("k", "turn 1")):
        page.keyboard.press(key)
        focused = "document.activeElement.querySelector('.who').textContent.toLowerCase()"
        assert page.evaluate(focused) == turn
    page.keyboard.press("Tab")
    chosen = page.evaluate("document.activeElement.dataset.r")
    assert chosen == link_of(page, 1), "after the turn comes its first region"
    assert lit(page, ".stage .box") == lit(page, ".turns figure") == [chosen]
    page.locator(".stage .enlarge").focus()
    page.keyboard.press("Enter")
    page.locator("dialog[open]").wait_for()
    before = box_of(page, "dialog .frame img")[2]
    page.keyboard.press("+")
    assert box_of(page, "dialog .frame img")[2] == pytest.approx(1.5 * before, rel=0.02)
    page.keyboard.press("0")
    assert box_of(page, "dialog .frame img")[2] == pytest.approx(before, rel=0.02)
    page.keyboard.press("Escape")
    page.locator("dialog[open]").wait_for(state="detached")
    page.keyboard.press("n")
    page.wait_for_url("**/00002.html")
    page.keyboard.press("p")
    page.wait_for_url("**/00001.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_a_conversation_by_day_and_night(browsed, open_file, scheme):
    page = open_file(browsed / "pages" / "00001.html", width=400, height=800, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    picture, turns = box_of(page, ".stage img"), box_of(page, ".turns")
    assert picture[1] + picture[3] <= turns[1], "on a phone the picture comes first"
    for selector in ("h1", "h2", ".answer", ".query", ".verdict", "figcaption", ".chip", ".keys", "nav a"):
        x, _, width, _ = box_of(page, f"{selector} >> nth=0")
        assert x >= 0, selector
        assert x + width <= 400, selector
        assert contrast(page, f"{selector} >> nth=0") >= 4.5, selector
    assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.1) == (scheme == "dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_an_index_by_day_and_night(browsed, open_file, scheme):
    page = open_file(browsed / "index.html", width=400, height=800, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    for selector in ("h1", "#text", "#verdict", "#count", ".list p", ".list .small", ".list .verdict"):
        x, _, width, _ = box_of(page, f"{selector} >> nth=0")
        assert x >= 0, selector
        assert x + width <= 400, selector
        assert contrast(page, f"{selector} >> nth=0") >= 4.5, selector


def ids(page) -> list[str]:
    """Of the rows that an index shows."""
    return [text[0] for text in page.locator(".list li:visible > a > div > p:last-child").all_inner_texts()]


def wait_for_rows(page, expected: str) -> None:
    """Until the index shows these rows: what is typed is heeded a moment later."""
    page.wait_for_function(
        """wanted => [...document.querySelectorAll('.list li:not([hidden]) a > div > p:last-child')]
            .map(line => line.textContent.trim()[0]).join('') == wanted""",
        arg=expected,
    )


def test_an_index_is_filtered_by_right_and_wrong_end_turns_and_words(browsed, open_file):
    page = open_file(browsed / "index.html")
    page.wait_for_function("document.images.length == 5 && [...document.images].every(one => one.complete)")
    assert ids(page) == list("abcde")
    assert page.locator("#count").inner_text() == "5 shown"
    for choices, expected in (
        ({"verdict": "right"}, "ac"),
        ({"verdict": "wrong"}, "bde"),
        ({"finish": "turn_limit"}, "e"),
        ({"turns": "1"}, "cd"),
        ({"turns": "1", "verdict": "wrong"}, "d"),
        ({"turns": "2", "finish": "answer"}, "ab"),
    ):
        for name, value in choices.items():
            page.locator(f"#{name}").select_option(value)
        assert ids(page) == list(expected), choices
        assert page.locator("#count").inner_text() == f"{len(expected)} shown"
        for name in choices:
            page.locator(f"#{name}").select_option("")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"
    for words, expected in (("lighthouse", "ab"), ("near LIGHTHOUSE", "b"), ("plain wrong", "d"), ("zebra", "")):
        page.locator("#text").fill(words)
        wait_for_rows(page, expected)
        assert page.locator("#count").inner_text() == f"{len(expected)} shown", words
    page.locator("#text").fill("")
    wait_for_rows(page, "abcde")
    page.locator(".list a").nth(1).click()
    page.wait_for_url("**/pages/00002.html")
    page.get_by_role("link", name="index").click()
    page.wait_for_url("**/index.html")


def test_two_runs_are_beside_each_other_and_one_does_not_light_the_other(compared, open_file):
    page = open_file(compared / "pages" / "00001.html")
    (x1, y1, w1, _), (x2, y2, *_) = (box_of(page, f".talk >> nth={n}") for n in range(2))
    assert x1 + w1 <= x2
    assert y1 == y2
    assert page.locator(".talk .verdict").all_inner_texts() == ["right", "wrong"]
    link = page.locator(".talk >> nth=0").locator(".turns figure").first.get_attribute("data-r")
    page.locator(".talk >> nth=0").locator(f".chip[data-r='{link}']").hover()
    assert page.locator(".talk >> nth=0").locator(".lit").count() > 0
    assert page.locator(".talk >> nth=1").locator(".lit").count() == 0
    narrow = open_file(compared / "pages" / "00001.html", width=400, height=800)
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 400
    (x1, y1, _, h1), (x2, y2, *_) = (box_of(narrow, f".talk >> nth={n}") for n in range(2))
    assert x1 == x2
    assert y1 + h1 <= y2


def test_an_index_of_two_runs_is_filtered_by_what_changed(compared, open_file):
    page = open_file(compared / "index.html")
    for change, expected in (("worse", "a"), ("better", "b"), ("equally right", "c"), ("", "abc")):
        page.locator("#change").select_option(change)
        assert ids(page) == list(expected), change


def test_a_trace_is_one_file_with_all_that_it_shows(folder, open_file):
    colours = {0: "red", 1: "lime", 2: "blue", 3: "black"}
    trace = zoomed(*IMAGES, pictures={index: data_url(colour) for index, colour in colours.items()})
    page = open_file(write_html(trace, folder / "trace.html"))
    addresses = page.evaluate("performance.getEntriesByType('resource').map(one => one.name)")
    assert [address for address in addresses if not address.startswith("data:")] == []
    page.wait_for_function("document.images.length == 4 && [...document.images].every(one => one.complete)")
    assert page.locator("img").evaluate_all("all => all.map(one => one.naturalWidth)") == [28] * 4
    point_at(page, STAGE_BOX.format(link_of(page, 1)))
    assert lit(page, ".turns figure") == [link_of(page, 1)]


def data_url(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
