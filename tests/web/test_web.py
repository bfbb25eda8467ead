"""`vilavt web` in headless Chromium: asking, boxes where they belong, stopping, several visitors, phones, night."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from clips import clip, marked
from looking import box_of, contrast, luminance, relative
from PIL import Image, ImageChops, ImageStat

from vilavt_core.attention_figure import tint
from vilavt_core.backends import open_backend
from vilavt_core.drawing import png_url
from vilavt_core.results import CropsEvent
from vilavt_core.watching import with_attention

ROOT = Path(__file__).parents[2]
TINY, PICTURES = ROOT / "examples" / "vilavt-tiny", ROOT / "examples" / "pictures"
NESTED = json.loads((PICTURES / "questions.json").read_text())[0]
SCREENSHOT = ROOT / "docs" / "web.png"


@pytest.fixture(scope="module")
def tiny(serve_app):
    """The app over the tiny model, and the model."""
    backend = open_backend(str(TINY))
    return serve_app(str(TINY), backend), backend


@pytest.fixture
def red(tmp_path):
    return colour_file(tmp_path, "red", (255, 0, 0))


@pytest.fixture(autouse=True)
def _fast(scripted):
    scripted.backend.pause, scripted.backend.words = 0.0, 5
    scripted.backend.started.clear()


def colour_file(folder: Path, name: str, colour) -> Path:
    path = folder / f"{name}.png"
    Image.new("RGB", (560, 560), colour).save(path)
    return path


def ask(page, question: str, *files: Path, wait: bool = True) -> None:
    answers = page.locator(".vv-answer").count()
    if files:
        page.locator("#question input[type=file]").set_input_files([str(file) for file in files])
        page.wait_for_function(
            "n => document.querySelectorAll('#question .thumbnail-item').length == n", arg=len(files)
        )
    page.locator("#question textarea").fill(question)
    page.locator("#question textarea").press("Enter")
    if wait:
        page.locator(".vv-answer").nth(answers).wait_for()
        page.locator("#stop:disabled").wait_for()


def trace_of(page, kind: str) -> str:
    """Address of this visitor's trace."""
    return page.locator(f".vv-links a[href$='.{kind}']").first.get_attribute("href")


def test_a_question_is_answered_with_every_zoom_on_the_picture_it_came_from(tiny, open_page):
    url, backend = tiny
    page = open_page(url)
    assert "knows drawn scenes" in page.locator("#note").inner_text()
    ask(page, NESTED["question"], PICTURES / NESTED["image"])
    ours = backend.ask(PICTURES / NESTED["image"], NESTED["question"])
    assert page.locator(".vv-answer").inner_text() == ours.answer == NESTED["answer"]
    thoughts = [re.sub(r"^turn \d+ ", "", text) for text in page.locator(".vv-thought").all_inner_texts()]
    assert thoughts == [turn.action.thought for turn in ours.turns]
    crops = [image for image in ours.images if image.kind == "crop"]
    assert any(crop.parent is not None and ours.images[crop.parent].kind == "crop" for crop in crops), "none is nested"
    queries = page.locator(".vv-query").all_inner_texts()
    assert queries == [f"looks for {turn.action.query}" for turn in ours.turns[:-1]]
    for crop in crops:
        parent = ours.images[crop.parent]
        shown = page.locator(f".vv-map:has(.vv-box[data-index='{crop.index}'])")
        alt = shown.locator("img").get_attribute("alt")
        assert alt == (NESTED["image"] if parent.kind == "original" else f"image {parent.index}")
        place = relative(
            box_of(page, f".vv-box[data-index='{crop.index}']"), box_of(page, f"img[alt='{alt}'] >> nth=-1")
        )
        sides = parent.width, parent.height, parent.width, parent.height
        assert place == pytest.approx([value / side for value, side in zip(crop.box, sides, strict=True)], abs=0.01)
        assert page.locator(f".vv-crop[data-index='{crop.index}'] img").is_visible()


def test_crops_of_one_zoom_are_side_by_side(tiny, open_page):
    pair = json.loads((PICTURES / "questions.json").read_text())[2]
    page = open_page(tiny[0])
    ask(page, pair["question"], PICTURES / pair["image"])
    crops = page.locator(".vv-crop")
    assert crops.count() == 2
    (x1, y1, w1, _), (x2, y2, *_) = (box_of(page, f".vv-crop >> nth={n}") for n in range(2))
    assert x1 + w1 <= x2
    assert y1 == y2


def test_the_attention_of_every_zoom_lies_over_its_crops_when_it_is_asked_for(tiny, open_page):
    url, backend = tiny
    page = open_page(url)
    assert page.locator("#attention").is_disabled()
    ask(page, NESTED["question"], PICTURES / NESTED["image"])
    assert page.locator(".vv-heat").count() == 0
    page.locator("#attention:enabled").wait_for()
    page.locator("#attention").focus()
    page.keyboard.press("Enter")
    page.locator(".vv-looks").nth(1).wait_for()
    page.locator("#attention:disabled").wait_for()
    ours = with_attention(backend, backend.ask(PICTURES / NESTED["image"], NESTED["question"]))
    zooms = page.locator(".vv-zoom")
    assert zooms.count() == len(ours.attention) == 2
    for number, picture in enumerate(ours.attention):
        zoom, heats = zooms.nth(number), picture.layers[0].heats
        assert zoom.locator(".vv-looks input").count() == len(heats) + 1
        for place, index in enumerate(picture.image_indices):
            crop = zoom.locator(f".vv-crop[data-index='{index}']")
            assert crop.locator(".vv-heat:visible").get_attribute("src") == png_url(tint(heats[0], place))
            below, over = (crop.locator(name).first.bounding_box() for name in (".vv-under > img", ".vv-heat:visible"))
            assert over == pytest.approx(below, abs=1)
        zoom.locator(".vv-looks input[value='2']").check()
        assert zoom.locator(".vv-heat:visible").first.get_attribute("src") == png_url(tint(heats[1], 0))
        zoom.locator(".vv-looks input[value='0']").check()
        assert zoom.locator(".vv-heat:visible").count() == 0
    page.locator(".vv-links a").first.wait_for()
    trace = page.evaluate("url => fetch(url).then(answer => answer.json())", trace_of(page, "json"))
    assert trace[0]["attention"] == [picture.to_json() for picture in ours.attention]


def test_a_backend_that_gives_no_attention_says_so(scripted, open_page, red):
    page = open_page(scripted.url)
    ask(page, "what?", red)
    page.locator("#attention").click()
    page.locator(".vv-problem").wait_for()
    assert "gives no attention" in page.locator(".vv-problem").inner_text()


def test_the_picture_in_the_docs_is_this_page(tiny, open_page, tmp_path):
    """VILAVT_DRAW=1 draws it."""
    page = open_page(tiny[0], width=1000, height=700)
    ask(page, NESTED["question"], PICTURES / NESTED["image"])
    page.evaluate("document.activeElement.blur()")
    _, top, _, height = box_of(page, "#question")
    page.screenshot(
        path=tmp_path / "web.png", full_page=True, clip={"x": 0, "y": 0, "width": 1000, "height": top + height + 12}
    )
    shown = Image.open(tmp_path / "web.png").convert("RGB")
    if "VILAVT_DRAW" in os.environ:
        shown.quantize(256).save(SCREENSHOT, optimize=True)
    kept = Image.open(SCREENSHOT).convert("RGB")
    assert SCREENSHOT.stat().st_size <= 250_000
    assert kept.width == shown.width
    assert abs(kept.height - shown.height) < 40
    small = [one.resize((50, 50), Image.Resampling.BOX) for one in (kept, shown)]
    apart = ImageStat.Stat(ImageChops.difference(*small)).mean
    assert max(apart) < 12, f"the page looks otherwise now: draw {SCREENSHOT.name} anew with VILAVT_DRAW=1"


def test_follow_up_questions_keep_the_pictures_and_the_trace_has_all_of_them(scripted, open_page, red, tmp_path):
    page = open_page(scripted.url)
    assert page.locator(".vv-links").count() == 0
    ask(page, "first?", red)
    ask(page, "second?")
    assert scripted.backend.asked[-1]["questions"] == ["first?", "second?"]
    assert page.locator(".vv-question h2").all_inner_texts() == ["first?", "second?"]
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="open").click()
    assert "second?" in opened.value.locator("body").inner_text()
    with page.expect_download() as download:
        page.get_by_role("link", name="save as JSON").click()
    assert [one["question"] for one in json.loads(Path(download.value.path()).read_text())] == ["first?", "second?"]
    with page.expect_download() as download:
        page.get_by_role("link", name="save as HTML").click()
    assert "<html" in Path(download.value.path()).read_text()
    page.locator("#new").click()
    page.locator(".vv-question").first.wait_for(state="detached")
    ask(page, "third?", colour_file(tmp_path, "blue", (0, 0, 255)))
    assert scripted.backend.asked[-1]["questions"] == ["third?"]


def test_settings_reach_the_engine_and_begin_a_new_conversation(scripted, open_page, red):
    page = open_page(scripted.url)
    ask(page, "first?", red)
    page.get_by_text("Settings", exact=True).last.click()
    page.get_by_label("Seed").fill("7")
    page.get_by_label("number input for Turns at most").fill("2")
    page.get_by_label("number input for Temperature (0: greedy)").fill("0.5")
    page.get_by_label("Pixels of an image, at most").fill("100000")
    page.get_by_label("Pixels of an image, at most").press("Tab")
    ask(page, "second?")
    told = scripted.backend.asked[-1]
    assert told["questions"] == ["second?"]
    assert told["pictures"] == 1
    assert (told["told"].seed, told["told"].sampling.temperature) == (7, 0.5)
    assert (told["told"].limits.max_turns, told["told"].limits.max_pixels) == (2, 100000)


def test_thoughts_stream_and_stop_ends_the_engines_work(scripted, open_page, red):
    scripted.backend.pause, scripted.backend.words = 0.2, 1000
    page = open_page(scripted.url)
    ask(page, "what?", red, wait=False)
    page.locator("#now .vv-thought", has_text="word3").wait_for()
    ended = len(scripted.backend.ended)
    page.locator("#stop").click()
    page.locator(".vv-remark", has_text="Stopped").wait_for()
    assert scripted.backend.ended[ended:] == ["early"]
    page.locator("#stop:disabled").wait_for()  # by the update after the remark's
    scripted.backend.pause, scripted.backend.words = 0.0, 5
    ask(page, "and now?")
    assert scripted.backend.asked[-1] | {"told": None} == {"questions": ["and now?"], "pictures": 1, "told": None}


def test_a_page_that_is_closed_ends_its_question(scripted, open_page, red):
    scripted.backend.pause, scripted.backend.words = 0.1, 10_000
    page = open_page(scripted.url)
    ask(page, "what?", red, wait=False)
    page.locator("#now .vv-thought", has_text="word3").wait_for()
    ended = len(scripted.backend.ended)
    page.close()
    deadline = time.monotonic() + 60
    while len(scripted.backend.ended) == ended and time.monotonic() < deadline:
        time.sleep(0.2)
    assert scripted.backend.ended[ended:] == ["early"]


def test_visitors_see_their_own_pictures_alone(scripted, open_page, red, tmp_path):
    first, second = open_page(scripted.url), open_page(scripted.url)
    scripted.backend.pause = 0.1
    ask(first, "mine?", red, wait=False)
    ask(second, "and mine?", colour_file(tmp_path, "blue", (0, 0, 255)))
    first.locator(".vv-answer").wait_for()
    assert first.locator(".vv-answer").inner_text() == "the mean colours are (255, 0, 0)"
    assert second.locator(".vv-answer").inner_text() == "the mean colours are (0, 0, 255)"
    assert "blue.png" not in first.content()
    assert "red.png" not in second.content()
    assert first.locator(".vv-question").count() == second.locator(".vv-question").count() == 1
    links = [page.get_by_role("link", name="open").get_attribute("href") for page in (first, second)]
    assert links[0] != links[1]
    assert first.request.get(f"{scripted.url}{links[0][:-10]}.json").status == 404


def test_a_broken_file_shows_an_error_and_keeps_the_question(scripted, open_page, red, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n but no picture")
    page = open_page(scripted.url)
    ask(page, "what?", broken, wait=False)
    page.locator(".vv-problem").wait_for()
    text = page.locator(".vv-problem").inner_text()
    assert "broken.png" in text
    assert "/tmp" not in text
    assert page.locator("#question textarea").input_value() == "what?"
    ask(page, "what?", red)
    assert scripted.backend.asked[-1]["pictures"] == 1


def test_what_people_and_models_write_is_text(scripted, open_page, red):
    page = open_page(scripted.url)
    hostile = "<img src=x onerror=alert(1)> ${1+1} {{7*7}} <b>bold</b>"
    ask(page, hostile, red)
    assert page.locator(".vv-question h2").inner_text() == hostile


def test_a_picture_is_pasted_from_the_clipboard_and_dropped(scripted, open_page):
    page = open_page(scripted.url)
    script = """([kind, name, selector]) => new Promise(done => {
        const canvas = document.createElement('canvas');
        canvas.width = canvas.height = 280;
        const context = canvas.getContext('2d');
        context.fillStyle = 'rgb(0, 128, 0)';
        context.fillRect(0, 0, 280, 280);
        canvas.toBlob(blob => {
            const data = new DataTransfer();
            data.items.add(new File([blob], name, {type: 'image/png'}));
            const target = document.querySelector(selector);
            const event = kind == 'paste'
                ? new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})
                : new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
            target.dispatchEvent(event);
            done();
        });
    })"""
    for count, kind in enumerate(("paste", "drop"), 1):
        page.evaluate(script, [kind, f"{kind}ed.png", "#question textarea"])
        page.locator("#question .thumbnail-item").nth(count - 1).wait_for()
    ask(page, "what?")
    assert page.locator(".vv-answer").inner_text() == "the mean colours are (0, 128, 0), (0, 128, 0)"


def test_a_video_is_shown_as_frames(scripted, open_page, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(clip(marked(5)))
    page = open_page(scripted.url)
    ask(page, "what?", tmp_path / "clip.mp4")
    assert scripted.backend.asked[-1]["pictures"] == 5
    assert page.locator(".vv-question figure").count() == 5
    assert "clip.mp4, 0.0 s" in page.locator(".vv-question figcaption").first.inner_text()


def test_an_example_scene_is_a_click_away(tiny, open_page):
    page = open_page(tiny[0])
    page.locator("#scenes button, #scenes tr.tr-body, #scenes .gallery-item").first.click()
    page.locator("#question .thumbnail-item").wait_for()
    page.locator("#question textarea").press("Enter")
    page.locator(".vv-answer").wait_for()
    assert page.locator(".vv-answer").inner_text() == NESTED["answer"]


def test_the_keyboard_is_enough(scripted, open_page, red):
    """Tab, Enter, typing: choosing a file, asking, stopping, asking again."""
    scripted.backend.pause, scripted.backend.words = 0.2, 1000
    page = open_page(scripted.url)
    page.wait_for_function("document.activeElement.tagName == 'TEXTAREA'")  # where the page itself puts the focus
    page.on("filechooser", lambda chooser: chooser.set_files(str(red)))  # long before: the browser is told in its time
    tab_to(page, "upload")
    page.keyboard.press("Enter")
    page.locator("#question .thumbnail-item").wait_for()
    tab_to(page, "textarea")
    page.keyboard.type("what?")
    page.keyboard.press("Enter")
    page.locator("#now .vv-thought", has_text="word1").wait_for()
    tab_to(page, "stop")
    page.keyboard.press("Enter")
    page.locator(".vv-remark", has_text="Stopped").wait_for()
    scripted.backend.pause, scripted.backend.words = 0.0, 5
    tab_to(page, "textarea")
    page.keyboard.type("again?")
    page.keyboard.press("Enter")
    page.locator(".vv-answer").wait_for()


def tab_to(page, what: str) -> None:
    """Press Tab until the focus is on the stop button, the question's text, or its button that chooses files."""
    tests = {
        "upload": "e => !!e.closest('#question') && e.tagName == 'BUTTON' && /upload/i.test(e.outerHTML)",
        "textarea": "e => !!e.closest('#question') && e.tagName == 'TEXTAREA'",
        "stop": "e => !!e.closest('#stop') || e.id == 'stop'",
    }
    for _ in range(60):
        if page.evaluate(f"({tests[what]})(document.activeElement)"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab never reaches {what}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_by_day_and_night(scripted, open_page, red, scheme):
    page = open_page(scripted.url, width=400, height=800, color_scheme=scheme)
    ask(page, "a question that is longer than a line of a phone, as questions often are?", red)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    for selector in (".vv-answer", ".vv-question h2", ".vv-query", ".vv-thought", ".vv-remark", ".vv-crop figcaption"):
        x, _, width, _ = box_of(page, f"{selector} >> nth=0")
        assert x >= 0
        assert x + width <= 400
        assert contrast(page, f"{selector} >> nth=0") >= 4.5, selector
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.1) == (scheme == "dark")


def test_names_and_passwords_are_asked_for(serve_app, scripted, browser):
    url = serve_app("scripted", scripted.backend, users=(("anna", "secret"),))
    context = browser.new_context()
    page = context.new_page()
    assert context.request.get(f"{url}config").status == 401
    page.goto(url)
    page.locator("input[type=password]").fill("wrong")
    page.get_by_label("username").fill("anna")
    page.get_by_role("button", name="Login").click()
    page.get_by_text(re.compile("incorrect", re.IGNORECASE)).first.wait_for()
    assert page.locator("#question textarea").count() == 0
    page.locator("input[type=password]").fill("secret")
    page.get_by_label("username").fill("anna")
    page.get_by_role("button", name="Login").click()
    page.locator("#question textarea").wait_for()
    context.close()


def test_a_server_tells_no_pixels_and_its_crops_are_shown_all_the_same(stub_server, serve_app, open_page, tmp_path):
    picture = Image.new("RGB", (560, 560), (255, 255, 255))
    picture.paste((200, 0, 0), (0, 0, 280, 280))  # the part that the stub zooms into
    picture.save(tmp_path / "corner.png")
    page = open_page(serve_app(stub_server.url, open_backend(stub_server.url)))
    ask(page, "what?", tmp_path / "corner.png")
    assert page.locator(".vv-answer").inner_text() == "A"
    assert page.locator(".vv-thought").first.inner_text() == "turn 1 I looked."
    place = relative(box_of(page, ".vv-box"), box_of(page, ".vv-map img"))
    assert place == pytest.approx([0, 0, 0.5, 0.5], abs=0.01)
    colour = page.locator(".vv-crop img").evaluate(
        """image => { const canvas = document.createElement('canvas'), context = canvas.getContext('2d');
        context.drawImage(image, 0, 0); return [...context.getImageData(20, 20, 1, 1).data].slice(0, 3); }"""
    )
    assert colour == [200, 0, 0]
    assert not any(isinstance(event, CropsEvent) and event.views for event in open_backend(stub_server.url).stream(
        [tmp_path / "corner.png"], "what?"))  # fmt: skip


def test_the_command_serves_says_where_and_ends_with_ctrl_c(stub_server, free_port):
    command = [sys.executable, "-c", "from vilavt_core.cli import main; main()", "web", "--model", stub_server.url]
    port = str(free_port())
    with subprocess.Popen([*command, "--port", port], stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port}/")
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).status == 200
        taken = subprocess.run([*command, "--port", port], capture_output=True, text=True)
        assert taken.returncode == 1
        assert f"127.0.0.1:{port} cannot be served" in taken.stderr
        assert "Traceback" not in taken.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
