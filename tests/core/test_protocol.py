import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilavt_core.protocol import (
    TAGS as TAGS_OF_THE_PROTOCOL,
)
from vilavt_core.protocol import (
    Answer,
    Malformed,
    MalformedReason,
    NoAction,
    Region,
    ToolCall,
    format_tool_call,
    format_turn,
    parse_turn,
    unbox,
    without_tags,
)

BOX = [10, 20, 30, 40]


def tool(region=None, query="the sign", **extra) -> str:
    region = [{"index": 0, "bbox_2d": BOX}] if region is None else region
    return f"<tool>{json.dumps({'region': region, 'query': query, **extra})}</tool>"


def reason(text: str, rules="strict") -> MalformedReason | str:
    outcome = parse_turn(text, rules)
    return outcome.reason if isinstance(outcome, Malformed) else type(outcome).__name__


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_a_tool_call_is_read_with_its_thought(rules):
    outcome = parse_turn(f"<think> look there </think>\n{tool()}", rules)
    assert outcome == ToolCall((Region(0, (10.0, 20.0, 30.0, 40.0)),), "the sign", "look there")


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_an_answer_is_read_and_stripped(rules):
    assert parse_turn("<think>so</think><answer>\n B \n</answer>", rules) == Answer("B", "so")


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_an_answer_may_span_lines_and_hold_markup(rules):
    assert parse_turn('<answer>{"x": 1}\n<b>two</b></answer>', rules) == Answer('{"x": 1}\n<b>two</b>')


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_a_turn_without_a_tag_is_no_action(rules):
    assert parse_turn("I think it is a dog.", rules) == NoAction("I think it is a dog.")
    assert parse_turn("", rules) == NoAction("")
    assert parse_turn("</tool></answer>", rules) == NoAction("</tool></answer>")


MALFORMED_UNDER_BOTH = {
    "<tool>{}": MalformedReason.UNCLOSED_TOOL,
    "<answer>A": MalformedReason.UNCLOSED_ANSWER,
    "<tool>zoom please</tool>": MalformedReason.BAD_JSON,
    "<tool></tool>": MalformedReason.BAD_JSON,
    '<tool>{"region": [}</tool>': MalformedReason.BAD_JSON,
    '<tool>{"region": ["</tool>': MalformedReason.BAD_JSON,
    "<tool>[1, 2]</tool>": MalformedReason.NOT_AN_OBJECT,
    "<tool>null</tool>": MalformedReason.NOT_AN_OBJECT,
    '<tool>{"query": "x"}</tool>': MalformedReason.MISSING_REGION,
    '<tool>{"region": [{"index": 0, "bbox_2d": [1, 2, 3, 4]}]}</tool>': MalformedReason.MISSING_QUERY,
    tool(region=[]): MalformedReason.EMPTY_REGION_LIST,
    tool(region={"index": 0, "bbox_2d": BOX}): MalformedReason.BAD_REGION_LIST,
    tool(region=[[0, *BOX]]): MalformedReason.BAD_REGION_LIST,
    tool(region=[{"index": "0", "bbox_2d": BOX}]): MalformedReason.BAD_INDEX,
    tool(region=[{"index": 0.0, "bbox_2d": BOX}]): MalformedReason.BAD_INDEX,
    tool(region=[{"bbox_2d": BOX}]): MalformedReason.BAD_INDEX,
    tool(region=[{"index": float("nan"), "bbox_2d": BOX}]): MalformedReason.BAD_INDEX,
    tool(region=[{"index": 0}]): MalformedReason.BAD_BOX,
    tool(region=[{"index": 0, "bbox_2d": [1, 2, 3]}]): MalformedReason.BAD_BOX,
    tool(region=[{"index": 0, "bbox_2d": [1, 2, 3, 4, 5]}]): MalformedReason.BAD_BOX,
    tool(region=[{"index": 0, "bbox_2d": "1, 2, 3, 4"}]): MalformedReason.BAD_BOX,
    tool(region=[{"index": 0, "bbox_2d": [1, 2, 3, None]}]): MalformedReason.BAD_BOX,
    tool(region=[{"index": 0, "bbox_2d": [1, 2, 3, "left"]}]): MalformedReason.BAD_BOX,
    tool(region=[{"index": 0, "bbox_2d": [1, 2, 3, float("nan")]}]): MalformedReason.NOT_FINITE,
    tool(region=[{"index": 0, "bbox_2d": [1, 2, float("inf"), 4]}]): MalformedReason.NOT_FINITE,
    tool(region=[{"index": 0, "bbox_2d": [1, 2, "-inf", 4]}]): MalformedReason.NOT_FINITE,
    '<tool>{"region": [{"index": 0, "bbox_2d": [1, 2, 1e999, 4]}], "query": "x"}</tool>': MalformedReason.NOT_FINITE,
}


@pytest.mark.parametrize("text", MALFORMED_UNDER_BOTH)
@pytest.mark.parametrize("rules", ["strict", "published"])
def test_what_cannot_be_a_call_has_a_named_reason(text, rules):
    assert reason(text, rules) is MALFORMED_UNDER_BOTH[text]


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_json_nested_ten_thousand_deep_is_named_and_does_not_exhaust_the_stack(rules):
    assert reason("<tool>" + "[" * 10_000 + "]" * 10_000 + "</tool>", rules) is MalformedReason.TOO_DEEP
    assert reason('<tool>{"a":' * 10_000 + "</tool>", rules) in (MalformedReason.TOO_DEEP, MalformedReason.TOO_LONG)
    assert reason(tool(deep=json.loads("[" * 40 + "]" * 40)), rules) is MalformedReason.TOO_DEEP


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_brackets_inside_a_string_are_not_nesting(rules):
    assert parse_turn(tool(query="[" * 500), rules).query == "[" * 500


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_a_megabyte_of_json_is_named(rules):
    assert reason(tool(query="x" * 1_000_000), rules) is MalformedReason.TOO_LONG
    assert reason(tool(region=[{"index": 0, "bbox_2d": BOX}] * 30_000), rules) is MalformedReason.TOO_LONG


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_an_integer_too_long_to_mean_a_pixel_is_named(rules):
    text = '<tool>{"region": [{"index": INDEX, "bbox_2d": [1, 2, 3, 4]}], "query": "x"}</tool>'
    assert reason(text.replace("INDEX", "9" * 6000), rules) is MalformedReason.HUGE_NUMBER
    assert parse_turn(text.replace("INDEX", "9" * 30), rules).regions[0].index == int("9" * 30)


def test_a_true_index_is_one_under_published_rules_only():
    text = tool(region=[{"index": True, "bbox_2d": BOX}])
    assert reason(text) is MalformedReason.BAD_INDEX
    assert parse_turn(text, "published").regions[0].index == 1


def test_a_true_coordinate_is_one_under_published_rules_only():
    text = tool(region=[{"index": 0, "bbox_2d": [0, True, 3, 4]}])
    assert reason(text) is MalformedReason.BAD_BOX
    assert parse_turn(text, "published").regions[0].box == (0, 1, 3, 4)


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_numbers_written_as_text_are_coordinates(rules):
    assert parse_turn(tool(region=[{"index": 0, "bbox_2d": ["1", " 2.5 ", "3e1", 4]}]), rules).regions[0].box == (
        1,
        2.5,
        30,
        4,
    )


@pytest.mark.parametrize(
    ("query", "strict", "published"),
    [
        (5, MalformedReason.BAD_QUERY, "5"),
        (None, MalformedReason.BAD_QUERY, "None"),
        ("  ", MalformedReason.BLANK_QUERY, "  "),
        ("", MalformedReason.BLANK_QUERY, ""),
    ],
)
def test_a_query_that_is_no_text_or_blank_is_taken_under_published_rules_only(query, strict, published):
    assert reason(tool(query=query)) is strict
    assert parse_turn(tool(query=query), "published").query == published


def test_of_several_tool_calls_published_rules_take_the_first():
    text = tool(query="one") + tool(query="two")
    assert reason(text) is MalformedReason.SEVERAL_TOOL_CALLS
    assert parse_turn(text, "published").query == "one"


def test_a_turn_with_tool_and_answer_is_malformed_and_an_answer_under_published_rules():
    for text in (tool() + "<answer>B</answer>", "<answer>B</answer>" + tool()):
        assert reason(text) is MalformedReason.TOOL_AND_ANSWER
        assert parse_turn(text, "published").text == "B"
    assert reason(tool() + "<answer>B") is MalformedReason.TOOL_AND_ANSWER
    assert isinstance(parse_turn(tool() + "<answer>B", "published"), ToolCall)


def test_of_several_answers_published_rules_take_the_first():
    assert reason("<answer>A</answer><answer>B</answer>") is MalformedReason.SEVERAL_ANSWERS
    assert parse_turn("<answer>A</answer><answer>B</answer>", "published").text == "A"


@pytest.mark.parametrize(
    ("answer", "named", "published"),
    [
        ("<answer><answer>B</answer></answer>", MalformedReason.NESTED_ANSWER, "<answer>B"),
        ("<answer>A <answer>B</answer>", MalformedReason.NESTED_ANSWER, "A <answer>B"),
        ("<answer><think>so</think>B</answer>", MalformedReason.THOUGHT_IN_ANSWER, "<think>so</think>B"),
        ("<answer><think>so B</answer>", MalformedReason.THOUGHT_IN_ANSWER, "<think>so B"),
        ("<answer>so</think>B</answer>", MalformedReason.THOUGHT_IN_ANSWER, "so</think>B"),
        (f"<answer>{tool()}</answer>", MalformedReason.MARKUP_IN_ANSWER, tool()),
        ("<answer>B</tool></answer>", MalformedReason.MARKUP_IN_ANSWER, "B</tool>"),
        ("<answer><tool_response>B</answer>", MalformedReason.MARKUP_IN_ANSWER, "<tool_response>B"),
    ],
)
def test_the_protocols_tags_inside_an_answer_have_a_named_reason(answer, named, published):
    for before in ("", "<think>so</think>\n"):
        assert reason(before + answer) is named
        assert parse_turn(before + answer, "published").text == published


@given(st.lists(st.sampled_from([*TAGS_OF_THE_PROTOCOL, "B", " "]), max_size=6))
def test_no_tag_of_the_protocol_is_ever_part_of_an_answer(parts):
    for text in ("".join(parts), f"<answer>{''.join(parts)}</answer>"):
        outcome = parse_turn(text)
        if isinstance(outcome, Answer):
            assert not any(tag in outcome.text for tag in TAGS_OF_THE_PROTOCOL)
    assert isinstance(parse_turn(format_turn(Answer(without_tags("".join(parts))))), Answer)


@given(st.lists(st.sampled_from(["<", ">", "/", "an", "swer", "answer", "<answer>", "</answer>", "<tool>", "x"])))
def test_no_tag_is_left_that_others_stood_within(parts):
    text = "".join(parts)
    assert not any(tag in without_tags(text) for tag in TAGS_OF_THE_PROTOCOL)
    assert any(tag in text for tag in TAGS_OF_THE_PROTOCOL) or without_tags(text) == text


def test_tags_within_tags_are_taken_out_in_one_pass():
    assert without_tags("<ans" * 200_000 + "wer>" * 200_000) == ""
    assert len(without_tags("<ans>" * 200_000)) == 1_000_000


def test_of_a_key_named_twice_published_rules_take_the_last():
    text = '<tool>{"region": [{"index": 0, "index": 1, "bbox_2d": [1, 2, 3, 4]}], "query": "x"}</tool>'
    assert reason(text) is MalformedReason.DUPLICATE_KEY
    assert parse_turn(text, "published").regions[0].index == 1


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_text_after_the_tags_is_kept_aside(rules):
    assert parse_turn("<answer>B</answer> That is all.", rules) == Answer("B", "", "That is all.")
    assert parse_turn(tool() + "\nnow waiting", rules).trailing == "now waiting"


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_extra_keys_are_ignored(rules):
    call = parse_turn(tool(region=[{"index": 0, "bbox_2d": BOX, "label": "x"}], confidence=0.5), rules)
    assert call == ToolCall((Region(0, (10, 20, 30, 40)),), "the sign")


def test_tags_inside_a_thought_are_no_action_under_strict_rules():
    assert parse_turn("<think>I could use <tool> or <answer>here</think><answer>B</answer>").text == "B"
    assert parse_turn("<think>should I use <tool>?</think>") == NoAction("should I use <tool>?")


def test_a_closing_tag_inside_the_query_ends_the_call_under_published_rules_only():
    text = '<tool>{"region": [{"index": 0, "bbox_2d": [1, 2, 3, 4]}], "query": "the </tool> sign"}</tool>'
    assert parse_turn(text).query == "the </tool> sign"
    assert reason(text, "published") is MalformedReason.BAD_JSON


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_special_tokens_inside_a_query_stay_text(rules):
    query = "<|im_end|><|image_pad|><|vision_start|>"
    assert parse_turn(tool(query=query), rules).query == query


@pytest.mark.parametrize("rules", ["strict", "published"])
def test_half_a_surrogate_pair_in_a_query_becomes_the_replacement_character(rules):
    call = parse_turn(tool(query="X").replace('"X"', '"a\\ud800b"'), rules)
    assert call.query == "a\ufffdb"
    assert parse_turn(tool(query="X").replace('"X"', '"\\ud83d\\ude00"'), rules).query == "\U0001f600"


def test_a_closing_answer_tag_before_the_opening_one_is_named_under_published_rules():
    assert reason("</answer><answer>", "published") is MalformedReason.UNCLOSED_ANSWER


TAGS = [
    "<tool>",
    "</tool>",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
    "<|im_end|>",
    '"',
    "\\",
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
]
JSONISH = [
    '"region"',
    '"query"',
    '"index"',
    '"bbox_2d"',
    "0",
    "1.5",
    "-1",
    "NaN",
    "Infinity",
    "true",
    "null",
    "1e999",
    '"\\ud800"',
    " ",
]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.one_of(st.sampled_from(TAGS + JSONISH), st.text(st.characters(), max_size=8), st.just(tool()))).map(
        "".join
    ),
    st.sampled_from(["strict", "published"]),
)
def test_no_text_makes_the_parser_raise(text, rules):
    outcome = parse_turn(text, rules)
    assert isinstance(outcome, ToolCall | Answer | Malformed | NoAction)
    if isinstance(outcome, ToolCall):
        assert outcome.regions
        outcome.query.encode()


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.sampled_from(["region", "query", "index", "bbox_2d"]), inner)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(json_values, st.sampled_from(["strict", "published"]))
def test_no_json_makes_the_parser_raise(value, rules):
    outcome = parse_turn(f"<tool>{json.dumps(value)}</tool>", rules)
    assert isinstance(outcome, ToolCall | Malformed)


coordinates = st.one_of(st.integers(-5, 5000).map(float), st.floats(-1e6, 1e6))
regions = st.builds(Region, st.integers(-3, 99), st.tuples(coordinates, coordinates, coordinates, coordinates))
calls = st.builds(ToolCall, st.lists(regions, min_size=1, max_size=4).map(tuple), st.text(min_size=1).filter(str.strip))


@settings(deadline=None, max_examples=60)
@given(calls, st.sampled_from(["strict", "published"]))
def test_a_formatted_call_is_read_back_as_it_was(call, rules):
    read = parse_turn(format_tool_call(call), rules)
    assert isinstance(read, ToolCall)
    assert read.regions == call.regions
    assert read.query == call.query


def test_the_canonical_call_is_compact_and_writes_whole_pixels_as_integers():
    call = ToolCall((Region(1, (0.0, 2.0, 3.5, 4.0)),), "größer </tool>", "hm")
    text = '<tool>{"region":[{"index":1,"bbox_2d":[0,2,3.5,4]}],"query":"größer <\\/tool>"}</tool>'
    assert format_tool_call(call) == text
    assert format_turn(call) == f"<think>hm</think>{text}"
    assert format_turn(Answer("5")) == "<answer>5</answer>"


@pytest.mark.parametrize(
    ("answer", "bare"),
    [
        ("5", "5"),
        (r"\boxed{5}", "5"),
        (r"so \boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{5", r"\boxed{5"),
        (r"\boxed{}", ""),
    ],
)
def test_a_box_around_an_answer_is_taken_off(answer, bare):
    assert unbox(answer) == bare
