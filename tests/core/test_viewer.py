"""The viewer: what a page links, that nothing in it runs but its own script, and what stands beside an answer."""

import base64
import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import Elements, crop, original, zoomed

from vilavt_core.conversation import ImageSpan, Record
from vilavt_core.pages import policy, render
from vilavt_core.trace import write_html
from vilavt_core.viewer import SCRIPT, STRIP, shown_talk, shown_tokens


def written(tmp_path, *traces) -> tuple[Elements, str]:
    source = write_html(list(traces), tmp_path / "page.html").read_text(encoding="utf-8")
    return Elements(source), source


def test_the_policy_allows_the_pages_own_script_and_no_other(tmp_path):
    page, _ = written(tmp_path, zoomed(original(0), crop(1, (0, 0, 50, 50))))
    content = next(attrs["content"] for tag, attrs in page.found if tag == "meta" and "http-equiv" in attrs)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert page.script.startswith('"use strict"')
    assert f"script-src 'sha256-{digest}'" in content
    assert "default-src 'none'" in content
    assert "unsafe-inline" not in content.replace("style-src 'unsafe-inline'", "")
    assert not [name for _, attrs in page.found for name in attrs if name.startswith("on")]


def test_a_page_without_a_script_may_run_none(tmp_path):
    (tmp_path / "plain.html").write_text('{% extends "page.html" %}{% block body %}{{ text }}{% endblock %}')
    page = Elements(render("plain.html", tmp_path, title="x", text="<script>alert(1)</script>"))
    assert "script" not in {tag for tag, _ in page.found}
    assert "script-src" not in policy("", "inside")
    assert "file:" not in policy("", "inside")


def test_a_region_its_crop_its_tag_and_the_words_have_one_link(tmp_path):
    page, _ = written(tmp_path, zoomed(original(0), crop(1, (0, 0, 50, 50)), crop(2, (100, 20, 150, 80))))
    for link in ("0-1", "0-2"):
        linked = [(tag, attrs.get("class")) for tag, attrs in page.found if link in (attrs.get("data-r") or "").split()]
        assert {tag for tag, _ in linked} >= {"g", "button", "figure", "li", "div"}
    assert page.with_class("query")[0]["data-r"] == "0-1 0-2"


def test_links_of_one_conversation_are_not_those_of_another(tmp_path):
    trace = zoomed(original(0), crop(1, (0, 0, 50, 50)))
    page, _ = written(tmp_path, trace, trace)
    assert {attrs["data-r"] for _, attrs in page.found if attrs.get("data-r")} == {"0-1", "1-1"}
    ids = [attrs["id"] for _, attrs in page.found if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_every_box_has_a_halo_and_boxes_in_one_place_take_turns_along_the_line(tmp_path):
    talk = shown_talk([zoomed(original(0), *(crop(n, (20, 20, 60, 60)) for n in (1, 2, 3)), crop(4, (100, 0, 150, 9)))])
    boxes = talk["stage"][0]["boxes"]
    assert [box["dash"] for box in boxes] == ["12 24"] * 3 + [""]
    assert len({box["offset"] for box in boxes[:3]}) == 3
    assert [box["shift"] for box in boxes] == [0, 1, 2, 0]
    page, _ = written(tmp_path, zoomed(original(0), crop(1, (0, 0, 50, 50))))
    assert [len(page.with_class(name)) for name in ("dark", "light", "line")] == [1, 1, 1]


@given(st.lists(st.sampled_from([(20, 20, 60, 60), (20, 21, 60, 60), (90, 0, 120, 30), (0, 0, 200, 100)]), max_size=9))
def test_no_two_boxes_look_the_same(places):
    talk = shown_talk([zoomed(original(0), *(crop(n, box) for n, box in enumerate(places, 1)))])
    boxes = talk["stage"][0]["boxes"]
    looks = [tuple(box[name] for name in ("x", "y", "width", "height", "dash", "offset")) for box in boxes]
    assert len(boxes) == len(places)
    assert len(set(looks)) == len(looks)


def test_a_nested_region_is_on_its_crop_and_on_the_original():
    outer = crop(1, (100, 50, 200, 100))
    inner = crop(2, (28, 28, 56, 56), parent=1, region=(0.75, 0.75, 1.0, 1.0))
    talk = shown_talk([zoomed(original(0), outer, inner)])
    on_original = talk["stage"][0]["boxes"]
    assert [(box["label"], box["nested"]) for box in on_original] == [("1", False), ("2", True)]
    assert [on_original[1][name] for name in ("x", "y", "width", "height")] == ["150", "75", "50", "25"]
    first = talk["questions"][0]["turns"][0]["images"][0]
    assert [(box["label"], box["x"]) for box in first["boxes"]] == [("2", "28")]


def test_regions_of_another_picture_stay_on_theirs():
    other = crop(2, (0, 0, 10, 10), parent=1, source=1)
    talk = shown_talk([zoomed(original(0), original(1), other)])
    assert [len(figure["boxes"]) for figure in talk["stage"]] == [0, 1]
    assert talk["chosen"] == 1


def test_many_pictures_are_a_strip_of_thumbnails_with_one_of_them_large(tmp_path):
    frames = [original(n, name="clip.mp4", time=1.5 * n) for n in range(32)]
    trace = zoomed(*frames, crop(32, (0, 0, 50, 50), parent=20, source=20))
    page, source = written(tmp_path, trace)
    assert len(frames) > STRIP
    assert page.with_class("stage")[0]["class"] == "stage many"
    assert shown_talk([trace])["chosen"] == 20
    assert len(page.with_class("on")) == 1
    assert "0:30.0" in source


def test_the_right_answer_and_how_right_it_is_stand_beside_the_answer(tmp_path):
    for score, said in ((1.0, "right"), (0.0, "wrong"), (0.5, "partly right"), (None, "")):
        trace = zoomed(original(0), target="eight", score=score)
        assert trace.verdict == said
        page, source = written(tmp_path, trace)
        assert "right answer: <b>eight</b>" in source
        assert len(page.with_class("verdict")) == bool(said)
        assert f">{said}" in source


def test_the_timeline_shares_the_seconds_out():
    parts = shown_talk([zoomed(original(0), crop(1, (0, 0, 9, 9)))])["questions"][0]["timeline"]
    assert [float(part["size"]) for part in parts] == pytest.approx([66.67, 33.33])
    assert parts[0]["label"] == "turn 1, 20 tokens, 0.50 s"


def test_tokens_show_the_loss_mask_and_log_probabilities(tmp_path):
    class Letters:
        def decode(self, token_ids, *, skip_special_tokens):
            return "".join(map(chr, token_ids))

    record = Record([60, 9, 9, 97, 98], [0, 0, 0, 1, 1], [None, None, None, -0.5, -4.0], (ImageSpan(1, 2, 0, 0),), ())
    tokens = list(shown_tokens(record, Letters(), [None, None, None, -0.25, -4.0]))
    assert [(token.text, token.trained) for token in tokens] == [
        ("<", False),
        ("[2 image tokens]", False),
        ("a", True),
        ("b", True),
    ]
    assert tokens[2].title == "token 97, log-probability -0.5000, model -0.2500"
    assert tokens[2].shade < tokens[3].shade
    _, source = written(tmp_path, zoomed(original(0), tokens=tokens, rewards={"accuracy": 1.0}))
    assert "--p:21%" in source
    assert "Rewards" in source


def test_the_script_holds_no_end_tag():
    from vilavt_core.pages import TEMPLATES

    script = (TEMPLATES / SCRIPT).read_text(encoding="utf-8")
    assert not re.search(r"</script|<!--", script)
