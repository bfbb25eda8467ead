"""The reward of a trajectory: the published one by its probes, the strict one by its rules."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vilavt_core.errors import ScoringError
from vilavt_rl.errors import RewardError
from vilavt_rl.rewards import Message, RewardSettings, Task, Trajectory, accuracy, format_score, overall, reward

PUBLISHED, STRICT = RewardSettings("published"), RewardSettings()
A = Task("A", "multiple choice")
CALL = '<think>look</think><tool>{"region": [{"index": 0, "bbox_2d": [0, 0, 28, 28]}], "query": "the sign"}</tool>'
RIGHT = "<think>so</think><answer>A</answer>"
REPLY = Message("user", "<tool_response>… <answer>your answer</answer></tool_response>")


def of(*turns: str | Message) -> Trajectory:
    return Trajectory(tuple(turn if isinstance(turn, Message) else Message("assistant", turn) for turn in turns))


PROBES = [  # trajectory, task, what the published reward gave
    (of(RIGHT), A, 1.0),
    (of(CALL, REPLY, RIGHT), A, 1.0),
    (of("<answer>A</answer>"), A, 0.5),
    (of("<think>x</think><tool>{bad</tool>", REPLY, RIGHT), A, 0.5),
    (of(CALL.replace("the sign", " "), REPLY, RIGHT), A, 0.5),
    (of("<think>so</think><answer>B</answer>"), A, 0.0),
    (of("A"), A, 0.5),
    (of(CALL, Message("user", "final <answer>Your final answer here.</answer>")), Task("B", "multiple choice"), 0.0),
    (of("<think>so</think><answer>(A)</answer>"), A, 0.0),
    (of("<think>so</think><answer>\\boxed{A}</answer>"), A, 1.0),
    (of("A <think></think>"), A, 1.0),
    (of("<think>so</think><answer>Apple</answer>"), A, 1.0),
    (of("<think>so</think><answer>yes no</answer>"), Task("No", "judgment"), 1.0),
    (of("<think>so</think><answer>yes or no</answer>"), Task("Yes", "judgment"), 1.0),
    (of("<think>so</think><answer>1/2</answer>"), Task("0.5", "math"), 0.0),
    (of("<think>so</think><answer>42.0</answer>"), Task("42", "math"), 0.0),
    (of("<think>so</think><answer>50%</answer>"), Task("50", "numerical"), 0.0),
    (of("<think>so</think><answer>0</answer>"), Task(0, "numerical"), 0.0),
    (of(CALL.replace('"index": 0', '"index": 99').replace("28, 28]", "1e9, 1e9]"), REPLY, RIGHT), A, 1.0),
    (of("<think>so</think><answer>125</answer>"), Task("100", "regression"), 0.75),
    (of("<think>a<think>b</think></think><answer>A</answer>"), A, 1.0),
    (of("</think><think><answer>A</answer>"), A, 0.5),
    (of("<think>so</think><answer>A"), A, 0.0),
    (of("<think>so</think><answer>left</answer>"), Task("left", "free-form"), 0.0),
    (of(), A, 0.0),
]


def test_a_box_that_no_float_holds_is_no_box_and_ends_no_training() -> None:
    call = CALL.replace("28, 28]", "28, 1" + "0" * 400 + "]")
    assert call != CALL
    assert reward(of(call, REPLY, RIGHT), A, PUBLISHED).overall == 0.5


@pytest.mark.parametrize("rules", [PUBLISHED, STRICT])
@pytest.mark.parametrize("tag", ["<answer>", "<tool>", "<think>"])
def test_the_cost_of_a_trajectory_grows_with_its_length_only(rules: RewardSettings, tag: str) -> None:
    """A quadratic search would take most of an hour here."""
    assert reward(of("<think>so</think>" + tag * 300_000), A, rules).overall == 0


@pytest.mark.parametrize(("trajectory", "task", "expected"), PROBES)
def test_published_rewards(trajectory: Trajectory, task: Task, expected: float) -> None:
    assert reward(trajectory, task, PUBLISHED).overall == pytest.approx(expected)


@pytest.mark.parametrize(
    ("trajectory", "task", "expected"),
    [
        (of(RIGHT), A, 1.0),
        (of(CALL, REPLY, RIGHT), A, 1.0),
        (of(RIGHT.replace(">A<", ">(A)<")), A, 1.0),
        (of(RIGHT.replace(">A<", ">\\boxed{A}<")), A, 1.0),
        (of(RIGHT.replace(">A<", ">\\boxed{B}\\boxed{A}<")), A, 0.0),
        (of("<answer>A</answer>"), A, 0.5),  # no thought
        (of(RIGHT + " and more"), A, 0.5),
        (of("A"), A, 0.0),  # no answer tag
        (of("A <think></think>"), A, 0.0),
        (of(RIGHT.replace(">A<", ">Apple<")), A, 0.0),
        (of(CALL, Message("user", "<answer>A</answer>")), A, 0.0),  # the last turn is not the assistant's
        (of(RIGHT, REPLY), A, 0.0),
        (of(CALL, REPLY, CALL), A, 0.0),
        (of(Message("assistant", CALL, "region 0 names image 9"), REPLY, RIGHT), A, 0.5),  # the episode refused it
        (of("<think>x</think><tool>{bad</tool>", REPLY, RIGHT), A, 0.5),
        (of(RIGHT.replace(">A<", ">yes or no<")), Task("No", "judgment"), 0.0),
        (of(RIGHT.replace(">A<", ">50%<")), Task("50", "numerical"), 1.0),
        (of(RIGHT.replace(">A<", ">0<")), Task(0, "numerical"), 1.0),
        (of(RIGHT.replace(">A<", ">125<")), Task("100", "regression"), 0.8),
        (of(RIGHT + RIGHT), A, 0.0),
        (of(), A, 0.0),
    ],
)
def test_strict_rewards(trajectory: Trajectory, task: Task, expected: float) -> None:
    assert reward(trajectory, task, STRICT).overall == pytest.approx(expected)


def test_form_alone_earns_nothing() -> None:
    assert overall(0.0, 1.0) == pytest.approx(0.0)
    assert overall(0.2, 1.0) == pytest.approx(0.6)
    assert format_score(of("<think>x</think><answer>B</answer>")) == pytest.approx(1.0)


def test_shaping_is_off_by_default_and_only_for_right_answers() -> None:
    zoomed = Trajectory(of(CALL, REPLY, RIGHT).messages, sampled_tokens=900)
    wrong = Trajectory(of(CALL, REPLY, RIGHT.replace(">A<", ">B<")).messages, sampled_tokens=900)
    bonus = RewardSettings(tool_bonus=0.2)
    assert reward(zoomed, A, STRICT).overall == pytest.approx(1.0)
    assert reward(zoomed, A, bonus).overall == pytest.approx(1.2)
    assert reward(of(RIGHT), A, bonus).overall == pytest.approx(1.0)
    assert reward(wrong, A, bonus).overall == pytest.approx(0.0)
    short = RewardSettings(length_penalty=0.5, length_limit=1000, length_buffer=200)
    assert reward(zoomed, A, short).overall == pytest.approx(0.75)
    assert reward(wrong, A, short).overall == pytest.approx(0.0)
    with pytest.raises(RewardError, match="length_limit"):
        RewardSettings(length_penalty=0.5)


def test_a_penalty_never_puts_a_right_answer_below_a_wrong_one() -> None:
    long = Trajectory(of(RIGHT.replace("<think>so</think>", "")).messages, sampled_tokens=5000)
    assert reward(long, A).overall == pytest.approx(0.5)
    harsh = RewardSettings(length_penalty=0.85, length_limit=1000)
    assert reward(long, A, harsh).overall == pytest.approx(0.0)
    assert reward(of(RIGHT), A, RewardSettings(tool_bonus=-2.0)).overall == pytest.approx(1.0)
    assert reward(of(CALL, REPLY, RIGHT), A, RewardSettings(tool_bonus=-2.0)).overall == pytest.approx(0.0)


@pytest.mark.parametrize("call", ["<think>x</think><tool>{bad</tool>", "<tool>", CALL.replace("[0, 0, 28, 28]", "[0]")])
def test_a_call_that_does_not_parse_is_no_zoom_in_decoded_text_either(call: str) -> None:
    def decoded(call: str) -> Trajectory:
        return Trajectory.read(
            f"{call}<|im_end|>\n<|im_start|>user\n{REPLY.text}<|im_end|>\n<|im_start|>assistant\n{RIGHT}<|im_end|>"
        )

    bonus = RewardSettings(tool_bonus=0.2)
    assert reward(decoded(call), A, bonus).zooms == 0
    assert reward(decoded(call), A, bonus).overall == pytest.approx(0.5)
    assert reward(decoded(CALL), A, bonus).overall == pytest.approx(1.2)


def test_a_call_that_only_the_published_rules_read_is_a_zoom_if_the_episode_carried_it_out() -> None:
    twice = CALL + CALL
    assert reward(of(twice, REPLY, RIGHT), A).zooms == 1
    assert reward(of(Message("assistant", twice, "several tool calls"), REPLY, RIGHT), A).zooms == 0


def test_metrics_carry_the_data_type() -> None:
    found = reward(of(CALL, REPLY, RIGHT), A).metrics("vsi")
    assert found == pytest.approx(
        {"overall": 1, "accuracy": 1, "format": 1, "zooms": 1, "zoomed": 1, "turns": 2}
        | {"vsi_accuracy": 1, "vsi_format": 1}
    )


def test_a_trajectory_is_read_from_a_decoded_response() -> None:
    text = f"{CALL}<|im_end|>\n<|im_start|>user\n{REPLY.text}<|im_end|>\n<|im_start|>assistant\n{RIGHT}<|im_end|>"
    assert Trajectory.read(text) == of(CALL, REPLY, RIGHT)
    assert Trajectory.read(RIGHT) == of(RIGHT)
    assert Trajectory.from_json(of(CALL, REPLY).to_json()) == of(CALL, REPLY)


def test_the_episode_says_whether_a_call_was_carried_out(tokenizer) -> None:
    from vilavt_core.episode import Episode, Limits

    def play(*turns: str) -> Trajectory:
        limits = Limits(max_pixels=168 * 168)
        episode = Episode.start([Image.new("RGB", (672, 672))], "Which?", tokenizer=tokenizer, limits=limits)
        for text in turns:
            assert episode.next_request() is not None
            ids = tokenizer.encode(text, add_special_tokens=False)
            episode.feed([*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")])
        return Trajectory.of(episode.result)

    assert reward(play(CALL, RIGHT), A).overall == pytest.approx(1.0)
    assert reward(play(CALL.replace('"index": 0', '"index": 99'), RIGHT), A).overall == pytest.approx(0.5)
    assert reward(play(CALL.replace("28, 28]", "280, 280]"), RIGHT), A).overall == pytest.approx(0.5)
    assert reward(play(CALL, CALL, CALL, CALL, CALL), A).overall == pytest.approx(0.0)


def test_an_unknown_type_is_an_error_in_strict_and_nothing_in_published() -> None:
    with pytest.raises(ScoringError, match="essay"):
        reward(of(RIGHT), Task("A", "essay"))
    assert reward(of(RIGHT), Task("A", "essay"), PUBLISHED).overall == pytest.approx(0.0)


LETTERS = ("A", "B", "C", "D")


@given(data=st.data())
def test_no_reward_for_silence_repetition_or_everything_at_once(data: st.DataObject) -> None:
    kind, targets = data.draw(
        st.sampled_from([("multiple choice", LETTERS), ("judgment", ("Yes", "No")), ("numerical", ("3", "7", "12"))])
    )
    target, joiner = data.draw(st.sampled_from(targets)), data.draw(st.sampled_from([" ", ", ", " or ", "/", ""]))
    answers = ["", " ", joiner.join(targets), *(joiner.join([target] * n) for n in (2, 5))]
    if joiner == "" and kind == "numerical":
        answers = ["", " "]  # glued numbers are another number, not a list
    if kind == "judgment":
        answers = answers[:3]  # a word said again is no other word
    forms = ("<think>x</think><answer>{}</answer>", "<answer>{}</answer>", "{}", "<think>{}</think>")
    for answer, form in itertools.product(answers, forms):
        assert reward(of(form.format(answer)), Task(target, kind)).overall == pytest.approx(0.0)
    both = f"<answer>{target}</answer>" * 2
    assert accuracy(of(both), Task(target, kind)) == pytest.approx(0.0)


@given(st.text(max_size=80), st.sampled_from(["strict", "published"]))
def test_any_text_has_a_reward_between_0_and_1(text: str, version: str) -> None:
    found = reward(of(text), A, RewardSettings(version))  # type: ignore[arg-type]
    assert 0 <= found.overall <= 1
