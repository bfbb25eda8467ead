"""Scores of answers: the strict rules, and the published ones bit for bit."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilavt_core.errors import ScoringError
from vilavt_core.protocol import Malformed, NoAction, parse_turn
from vilavt_core.scoring import (
    QuestionType,
    check_target,
    iou,
    known_options,
    mean_relative_accuracy,
    normalise,
    option_letter,
    parse_box,
    parse_number,
    parse_view_change,
    read_options,
    rouge_l,
    score_answer,
    unwrapped,
    with_letters,
    yes_or_no,
)
from vilavt_core.scoring.expressions import Comparer
from vilavt_core.scoring.published import evaluation_score


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("b", "B"),
        ("(A)", "A"),
        ("[c]", "C"),
        ("A.", "A"),
        (" b. left", "B"),
        ("B) the red one", "B"),
        ("B: left", "B"),
        ("**C**", "C"),
        ("A!", "A"),
        ("<B>", "B"),
        ("The answer is (D).", "D"),
        ("Option B", "B"),
        ("answer: C", "C"),
        ("A. Vitamin C deficiency", "A"),
        ("A. Vitamin C", "A"),
        ("A. Vitamin C.", "A"),
        ("A. Plan B", "A"),
        ("A. X-ray", "A"),
        ("A. a dog", "A"),
        ("A. 3 m. wide", "A"),
        ("B. left. A cat sits there", "B"),
        ("B. left, I think", "B"),
        ("( A )", "A"),
        ("（A）", "A"),
        ("$A$", "A"),
        ("\\(A\\)", "A"),
        ("\\text{A}", "A"),
        ("`A`", "A"),
        ('"A"', "A"),
        ("“B”", "B"),
        ("'C'", "C"),
        ("A - left", "A"),
        ("A – left", "A"),
        ("B left", "B"),
        ("C is correct", "C"),
        ("My answer is A", "A"),
        ("The answer is\nA", "A"),
        ("A\nbecause it is left", "A"),
        ("Apple", None),
        ("A cat", None),
        ("", None),
        ("A B C D", None),
        ("A, B, C, D", None),
        ("A. B. C. D.", None),
        ("(A)(B)", None),
        ("(A) or (B)", None),
        ("A/B", None),
        ("A or B", None),
        ("A. left, B. right", None),
        ("a. b. c. d", None),
        ("a, b, c, d", None),
        ("a) b) c) d)", None),
        ("A, b, c, d", None),
        ("A. or b. or c. or d.", None),
        ("A. left; B right", None),
        ("A. left or b", None),
        ("A left; B right", None),
        ("B left C right", None),
        ("B right; A left", None),
        ("A - left B - right", None),
        ("B\nC", None),
        ("A. B-C", None),
        ("A-frame", None),
        ("b left", None),
        ("I think so", None),
        ("AAAA", None),
        ("A A A", None),
        ("5", None),
        ("(B) B is closer", "B"),
        ("(B) A is closer", "B"),
        ("b. b is closer", "B"),
        ("A. B is closer to the camera", "A"),
        ("A: B is closer", "A"),
        ("[A] B is closer", "A"),
        ("A - B is closer", "A"),
        ("**B**. C is closer", "B"),
        ("The answer is (B) B is closer.", "B"),
        ("Answer: C. Both A and B", "C"),
        ("C. Both A and B", "C"),
        ("C. Either A or B", "C"),
        ("D. A and C", "D"),
        ("D. A, B and C", "D"),
        ("d. a and c", "D"),
        ("D. All of A and B", "D"),
        ("C. Neither A nor B", "C"),
        ("C. C", "C"),
        ("B. (B) left", "B"),
        ("B. B. B is closer", "B"),
        ("B. B is closer than A. The floor shows it", "B"),
        ("B. left. C is right of it", "B"),
        ("A. B is closer B. A is closer", None),
        ("A. B is closer\nB. A is closer", None),
        ("(A) B is closer (B) A is closer", None),
        ("A. A. A", None),
        ("A. B, C, D", None),
        ("A, B is closer", None),
        ("B。", "B"),
        ("Ｂ", "B"),
        ("（B）", "B"),
        ("【B】", "B"),
        ("「B」", "B"),
        ("B、左边", "B"),
        ("B．左边", "B"),
        ("B：左边", "B"),
        ("B左边", "B"),
        ("A左边", "A"),
        ("答案：B", "B"),
        ("答案是B", "B"),
        ("正确答案为（B）。", "B"),
        ("选B", "B"),
        ("我选b", "B"),
        ("故选B。", "B"),
        ("B选项", "B"),
        ("选项B", "B"),
        ("C. A和B", "C"),
        ("A、B", None),
        ("A和B", None),
        ("A或B", None),
        ("不选B", None),
        ("选B和C", None),
        ("A、左边 B、右边", None),
        ("A、左边、B、右边", None),
        ("應該選B", "B"),
        ("正確答案是B", "B"),
        ("正確選項：B", "B"),
        ("答案為（B）", "B"),
        ("我選擇B", "B"),
        ("选择了B", "B"),
        ("『B』左邊", "B"),
        ("B（左邊）", "B"),
        ("B—左", "B"),
        ("A與B", None),
        ("A還是B", None),
        ("選A或B", None),
        ("I think the answer is B.", "B"),
        ("I believe that it is (B)", "B"),
        ("It's B.", "B"),
        ("It is a dog", None),
        ("I would choose B: left", "B"),
        ("I think A or B", None),
        ("B because A is behind", "B"),
        ("B because it is left", "B"),
        ("B because A or C is behind", "B"),
        ("B; left", "B"),
        ("A; B", None),
        ("A; B is closer", None),
        ("B?", "B"),
        ("B(left)", "B"),
        ("f(x)", None),
        ("_B_", "B"),
        ("__B__", "B"),
    ],
)
def test_an_option_letter_is_read_by_rule(text: str, letter: str | None) -> None:
    assert option_letter(text) == letter


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("A", "A", 1),
        ("(A)", "A", 1),
        ("b. left", "B. left", 1),
        ("B", "B. left", 1),
        ("left", "B. left", 1),
        ("The left", "left", 1),
        ("C. left", "B. left", 0),
        ("right", "B. left", 0),
        ("A", "A. Vitamin C", 1),
        ("B. A", "B", 0),  # a is also an article
        ("A. B", "B", 0),
        ("A. B. left", "B. left", 0),
        ("A. between A and B", "A. between A and B", 1),
        ("vitamin c", "A. Vitamin C", 1),
        ("A. B", "A. B", 1),
        ("B", "A. B", 0),
        ("(B) B is closer", "B", 1),
        ("(B) B is closer", "B. B is closer", 1),
        ("B is closer", "B. B is closer", 1),
        ("A is closer", "B. A is closer", 1),
        ("A: B is closer", "A. B is closer", 1),
        ("A: B is closer", "B. B is closer", 0),
        ("C. C", "C", 1),
        ("C", "C. C", 1),
        ("D. A and C", "D. A and C", 1),
        ("A and C", "D. A and C", 1),
        ("<answer>B</answer>", "\\boxed{B}", 1),
        ("B", "$\\boxed{\\text{B}}$", 1),
        ("<answer>A</answer><answer>B</answer>", "B", 0),
        ("<answer>B", "B", 0),
        ("\\boxed{\\boxed{B}}", "B", 1),
        ("左边", "B. 左边", 1),
        ("B、左边", "B. 左边", 1),
        ("答案是左边", "B．左边", 1),
        ("A left", "A. left", 1),
        ("A left", "A", 0),
        ("A", "left", 0),
        ("Apple", "A", 0),
        ("", "A", 0),
    ],
)
def test_a_choice_is_met_by_letter_or_by_the_options_text(prediction: str, target: str, right: int) -> None:
    assert score_answer(prediction, target, "multiple choice") == right


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("42", 42, ""),
        ("-3.5", -3.5, ""),
        ("−3.5", -3.5, ""),
        ("+7", 7, ""),
        ("1,234", 1234, ""),
        ("1,234,567.8", 1234567.8, ""),
        ("$1,234.50", 1234.5, "$"),
        ("50%", 50, "%"),
        ("50 percent", 50, "%"),
        ("42 m", 42, "m"),
        ("about 42 meters", 42, "m"),
        ("42 m^2", 42, "m²"),
        ("42 m²", 42, "m²"),
        ("42 square meters", 42, "m²"),
        ("3 \\text{ m}", 3, "m"),
        ("3 yards", 3, "yd"),
        ("5 m/s", 5, "m/s"),
        ("20 °C", 20, "°C"),
        ("5 dollars", 5, "$"),
        ("minus 5", -5, ""),
        ("negative 2.5 m", -2.5, "m"),
        ("–5", -5, ""),
        ("- 5", -5, ""),
        ("1 1/2", 1.5, ""),
        ("-1 1/2", -1.5, ""),
        ("\\frac{3}{4}", 0.75, ""),
        ("1\\frac12", 1.5, ""),
        ("1 \\times 10^3", 1000, ""),
        ("1\\,000", 1000, ""),
        ("$50$", 50, ""),
        ("\\$50", 50, "$"),
        ("50\\%", 50, "%"),
        ("**5**", 5, ""),
        ("x = 5", 5, ""),
        ("3 cats", 3, ""),
        (".5", 0.5, ""),
        ("3/4", 0.75, ""),
        ("1.5e3", 1500, ""),
        ("1.5 × 10^3", 1500, ""),
        ("2 x 10^{-2}", 0.02, ""),
        ("90°", 90, "°"),
        ("The distance is 2.5 feet.", 2.5, "ft"),
        ("2½", 2.5, ""),
        ("2 ½ m", 2.5, "m"),
        ("½", 0.5, ""),
        ("⅔", 2 / 3, ""),
        ("1⁄4", 0.25, ""),
        ("1 234", 1234, ""),
        ("1\u2009234", 1234, ""),
        ("1\u202f234.5 m", 1234.5, "m"),
        ("12\u00a0345\u00a0678", 12345678, ""),
        ("-1 234", -1234, ""),
        ("3 (three)", 3, ""),
        ("three (3) chairs", 3, ""),
        ("21 (twenty-one)", 21, ""),
        ("3（三）", 3, ""),
        ("约3米", 3, "m"),
        ("大约3", 3, ""),
        ("共3个", 3, ""),
        ("一共3个", 3, ""),
        ("有3把椅子", 3, ""),
        ("答案：3。", 3, ""),
        ("答案是3", 3, ""),
        ("３．５米", 3.5, "m"),
        ("3个左右", 3, ""),
        ("3千米", 3, "km"),
        ("3平方米", 3, "m²"),
        ("3米/秒", 3, "m/s"),
        ("60公里每小时", 60, "km/h"),
        ("百分之50", 50, "%"),
        ("2分之1", 0.5, ""),
        ("负3", -3, ""),
        ("零下5度", -5, "°"),
        ("20摄氏度", 20, "°C"),
        ("3元", 3, "¥"),
        ("負3", -3, ""),
        ("約3公尺", 3, "m"),
        ("總共3個", 3, ""),
        ("３分鐘", 3, "min"),
        ("3個小時", 3, "h"),
        ("20攝氏度", 20, "°C"),
        ("3英呎", 3, "ft"),
        ("45\\degree", 45, "°"),
        ("3 m2", 3, "m²"),
        ("2 to the left, not more", 2, ""),
    ],
)
def test_a_number_is_read_with_separators_units_and_signs(text: str, value: float, unit: str) -> None:
    found = parse_number(text)
    assert found is not None
    assert found.value == pytest.approx(value)
    assert found.unit == unit


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cat",
        "3 or 4",
        "3, 4",
        "3,4",
        "1 2 3",
        "3-4",
        "1/0",
        "1.2.3",
        "nan",
        "inf",
        "1e999",
        "12,34",
        "3 ft 5 in",
        "3 or four",
        "3 hundred",
        "3 and a half",
        "3 (four)",
        "2.3 (three)",
        "three (4)",
        "3 (ten one)",
        "1 234 5",
        "5 1 234",
        "1 234, 5",
        "3或4",
        "3到4个",
        "3万",
        "3个人和一只狗",
        "3 三",
        "3 m4 m5 m6",
        "3 cats2",
        "3 4/2",
        "2^3",
        "10^3",
        "10³",
        "√9",
        "\\sqrt{9}",
        "2\\pi",
        "\\pm 3",
        "5 minus x",
        "the gap - 5 m",
        "x-5",
        "--5",
        "> 5",
        "at least 5",
        "more than 5 m",
        "It is not 5.",
        "不到3米",
        "超過3米",
        "至少3個",
        "不是3",
        "3 ft 2 in",
        "3 feet 2 inches",
        "5 kg 3 g",
        "1" * 201,
    ],
)
def test_no_number_or_several_are_none(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("3", "3.0", 1),
        ("3.14", "3.140", 1),
        ("3.141", "3.144", 0),
        ("3.141", "3.14", 1),
        ("3.15", "3.14", 0),
        ("1,000", "1000", 1),
        ("42 m", "42", 1),
        ("42 cm", "42 m", 0),
        ("42 meters", "42 m", 1),
        ("42.3", "42", 0),
        ("0", "0", 1),
        ("1e-7", "0", 0),
        ("50%", "50", 1),
        ("50%", "0.5", 1),
        ("50", "50%", 1),
        ("0.5", "50%", 1),
        ("0.05", "50%", 0),
        ("minus 5", "5", 0),
        ("minus 5", "-5", 1),
        ("–5", "-5", 1),
        ("3 yards", "3 m", 0),
        ("3 m^2", "3 m", 0),
        ("3 m^2", "3", 1),
        ("1/3", "0.33", 1),
        ("41", "42", 0),
    ],
)
def test_a_numerical_target_is_met_to_its_own_decimals(prediction: str, target: str, right: int) -> None:
    assert score_answer(prediction, target, "numerical") == right


@pytest.mark.parametrize(
    ("prediction", "at_most", "below"),
    [(100, 1.0, 1.0), (105, 1.0, 1.0), (110, 0.9, 0.9), (125, 0.6, 0.5), (150, 0.1, 0.0), (151, 0.0, 0.0)],
)
def test_mean_relative_accuracy_at_its_boundaries(prediction: float, at_most: float, below: float) -> None:
    assert mean_relative_accuracy(prediction, 100) == pytest.approx(at_most)
    assert mean_relative_accuracy(prediction, 100, inclusive=False) == pytest.approx(below)


def test_mean_relative_accuracy_near_zero_and_beyond_floats() -> None:
    assert mean_relative_accuracy(3.3, 3.0) == pytest.approx(0.9)
    assert mean_relative_accuracy(0, 0) == pytest.approx(1.0)
    assert mean_relative_accuracy(0.001, 0) == pytest.approx(0.0)
    assert mean_relative_accuracy(1e300, 1e-300) == pytest.approx(0.0)
    assert mean_relative_accuracy(float("inf"), 1.0) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("Yes, it is.", "yes"),
        ("yes or no", None),
        ("yes yes", "yes"),
        ("No, there is no dog.", "no"),
        ("No, there is no dog on the sofa, no.", "no"),
        ("yes, yes", "yes"),
        ("Yes, there is no dog", None),
        ("no yes no", None),
        ("True, there is a dog", "yes"),
        ("No, that is true", "no"),
        ("Yes, false", None),
        ("Noël", None),
        ("是", "yes"),
        ("否", "no"),
        ("是的。", "yes"),
        ("不是。", "no"),
        ("是，图中有一只狗。", "yes"),
        ("不，没有狗。", "no"),
        ("否，图中没有狗", "no"),
        ("对", "yes"),
        ("错误", "no"),
        ("有", "yes"),
        ("没有", "no"),
        ("答案：是", "yes"),
        ("答案是否", "no"),
        ("答案是：否", "no"),
        ("所以是", "yes"),
        ("ＹＥＳ", "yes"),
        ("Yes（是）", "yes"),
        ("Yes 否", None),
        ("是否", None),
        ("是或否", None),
        ("是/否", None),
        ("是 否", None),
        ("还是", None),
        ("", None),
        ("nose", None),
        ("正確", "yes"),
        ("不正確。", "no"),
        ("沒有", "no"),
        ("無", "no"),
        ("答案為是", "yes"),
        ("是對的", "yes"),
        ("是真的", "yes"),
        ("假的", "no"),
        ("還是", None),
        ("True", "yes"),
        (" false.", "no"),
        ("true or false", None),
        ("True True", None),
        ("That is not true", None),
    ],
)
def test_yes_and_no_exclude_each_other(text: str, verdict: str | None) -> None:
    assert yes_or_no(text) == verdict


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("1/2", "0.5", 1),
        ("42.0", "42", 1),
        ("\\frac{1}{2}", "0.5", 1),
        ("$\\frac{1}{2}$", "1/2", 1),
        ("\\boxed{\\frac12}", "1/2", 1),
        ("2\\sqrt{3}", "\\sqrt{12}", 1),
        ("3x+1", "1+3x", 1),
        ("x=3", "3", 1),
        ("50\\%", "50\\%", 1),
        ("$50", "50", 1),
        ("\\$50", "50", 1),
        ("50%", "50", 1),
        ("50\\%", "0.5", 1),
        ("1.5e3", "1500", 1),
        ("minus 5", "-5", 1),
        ("90°", "90", 1),
        ("1 1/2", "1.5", 1),
        ("0.333333", "1/3", 1),
        ("0.33", "1/3", 0),
        ("1000001", "1000000", 0),
        ("42 cm", "42 m", 0),
        ("7x", "7", 0),
        ("7e", "7", 0),
        ("3!", "6", 1),
        ("3!", "3", 0),
        ("f(x) = x^2", "x^2", 1),
        ("x_1 \\approx 3", "3", 1),
        ("3", "x=3", 1),
        ("\\text{Area} = 2\\pi", "2\\pi", 1),
        ("y=2x", "2x=y", 1),
        ("1=2=3", "3", 0),
        ("1=3", "3", 0),
        ("3 \\approx 4", "3", 0),
        ("x=1=2\\pi", "2\\pi", 0),
        ("\\boxed{1}\\boxed{2}", "2", 0),
        ("7 \\text{ 7}", "7", 0),
        ("7 \\text{ eight}", "7", 0),
        ("3 \\quad 4", "7", 0),
        ("3_4", "3", 0),
        ('3"4', "34", 0),
        ("\\(1\\) \\(2\\)", "2", 0),
        ("1/3", "0.5", 0),
        ("1, 2, 3, 4", "3", 0),
        ("1 or 2", "2", 0),
        ("$1$ $2$", "2", 0),
        ("1 2 3 4 5", "15", 0),
        ("x^2+y^2", "y^2+x^2", 1),
        ("", "1", 0),
    ],
)
def test_expressions_are_equal_by_value(prediction: str, target: str, right: int) -> None:
    pytest.importorskip("math_verify", reason="the math extra is not installed in this environment")
    assert score_answer(prediction, target, "math") == right


@pytest.fixture(scope="module")
def comparer() -> Iterator[Comparer]:
    pytest.importorskip("math_verify", reason="the math extra is not installed in this environment")
    comparer = Comparer(seconds=1)
    yield comparer
    comparer.stop()


def in_thread(function: Callable[[], bool]) -> bool:
    """What it returns, called as a rollout worker would: in a thread, where no signal can interrupt it."""
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it has not returned after 60 s"
    return found[0]


@pytest.mark.parametrize(
    "runaway",
    ["9^{9 ^{9 ^9}}", "(9^{99})!", "\\prod_{i=1}^{10^9} i", "\\lfloor 10^{10^9} \\rfloor", "(" * 140 + "1" + ")" * 140],
)
def test_no_answer_keeps_a_worker_busy(comparer: Comparer, runaway: str) -> None:
    assert not in_thread(lambda: comparer.equal("1", runaway))
    assert in_thread(lambda: comparer.equal("1/2", "0.5"))  # the next answer is compared as ever


def test_a_comparer_that_something_else_ended_is_started_again(comparer: Comparer) -> None:
    assert comparer.equal("1/2", "0.5")
    ended = comparer._process
    assert ended is not None
    assert ended.stdin is not None
    assert ended.stdout is not None
    ended.kill()
    ended.wait()
    assert comparer.equal("1/2", "0.5")
    assert ended.stdin.closed
    assert ended.stdout.closed


def test_a_forked_process_has_a_comparer_of_its_own() -> None:
    pytest.importorskip("math_verify", reason="the math extra is not installed in this environment")
    from vilavt_core.scoring import expressions

    assert score_answer("2\\sqrt{3}", "\\sqrt{12}", "math") == 1
    ours = expressions._comparer._process
    assert ours is not None
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            found = score_answer("2\\sqrt{3}", "\\sqrt{12}", "math")
            theirs = expressions._comparer._process
            status = int(not (found == 1 and theirs is not None and theirs.pid != ours.pid))
            expressions._comparer.stop()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert ours.poll() is None


def test_a_comparer_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ScoringError, match="/bin/false"):
        Comparer().equal("1", "1")


def test_math_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ScoringError, match=r"vilavt-hf\[math\]"):
        score_answer("1", "1", "math")


def test_free_text_counts_when_most_of_it_is_common() -> None:
    target = "a man walks his brown dog along the river"
    assert score_answer("A man walks his brown dog along the river.", target, "free-form") == pytest.approx(1.0)
    assert 0.7 < score_answer("man walks brown dog along river", target, "free-form") < 1.0
    assert score_answer(f"{target} {target}", target, "free-form") == pytest.approx(0.0)
    assert score_answer("man", target, "free-form") == pytest.approx(0.0)
    assert rouge_l("the cat sat", "cat sat down") == pytest.approx((1.0, 2 / 3, 0.8))


def test_a_box_counts_by_its_overlap_from_one_half_on() -> None:
    assert parse_box('{"bbox_2d": [10, 20, 30, 40]}') == (10, 20, 30, 40)
    assert parse_box("[30, 20, 10, 40]") is None
    assert parse_box("[1, 2, 3]") is None
    assert parse_box("[1,2,3,4] [5,6,7,8]") is None
    assert parse_box("[1,2,3,4]" + " " * 600) == (1, 2, 3, 4)
    assert parse_box("[1,2,3,4]" + " " * 600 + "[5,6,7,8]") is None
    assert parse_box("[1,2,3,4]" + " " * 600 + "is it") is None
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert score_answer("[0, 0, 10, 10]", "[0, 0, 10, 8]", "box") == pytest.approx(0.8)
    assert score_answer("[0, 0, 100, 100]", "[0, 0, 10, 10]", "box") == pytest.approx(0.0)


def test_types_are_read_leniently_and_unknown_ones_refused() -> None:
    assert QuestionType.read(" Multiple_Choice ") is QuestionType.MULTIPLE_CHOICE
    assert QuestionType.read("free form") is QuestionType.FREE_FORM
    with pytest.raises(ScoringError, match="'essay'"):
        QuestionType.read("essay")


FITTING = [
    ("multiple choice", "<answer>D</answer>", "D"),
    ("multiple choice", "<think>so</think><answer>D</answer>", "D"),
    ("multiple choice", "\\boxed{D}", "(D)"),
    ("multiple choice", "$\\boxed{\\text{D}}$", "d"),
    ("multiple choice", "TV", "tv"),
    ("free-form", "<answer>a red bicycle</answer>", "a red bicycle"),
    ("free-form", "\\boxed{\\text{a red bicycle}}", "red bicycle"),
    ("free-form", "红色的自行车", "红色的自行车。"),
    ("numerical", "\\boxed{3}", "3"),
    ("numerical", "约3米", "3 m"),
    ("judgment", "<answer>是</answer>", "yes"),
    ("judgment", "否", "没有"),
    ("vci", "move_left：1，rotate_up：30", "move_left:1,rotate_up:30"),
    ("multiple choice", "B", "B"),
    ("multiple choice", "B. left", "b"),
    ("multiple choice", "left", "Left"),
    ("numerical", "1,200", "1200"),
    ("regression", "3.5 m", "3.5"),
    ("judgment", "Yes", "yes."),
    ("judgment", "True", "true"),
    ("judgment", "False", "No"),
    ("free-form", "the red car", "red car"),
    ("box", "[0, 0, 28, 28]", "[0, 0, 28, 28]"),
    ("vci", "move_left:1", "move_left:1"),
]


@pytest.mark.parametrize(("kind", "target", "answer"), FITTING)
def test_a_target_that_passes_the_check_can_be_met(kind: str, target: str, answer: str) -> None:
    check_target(QuestionType(kind), target)
    assert score_answer(answer, target, kind) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        *((kind.value, blank) for kind in QuestionType for blank in ("", " \n")),
        ("multiple choice", "?"),
        ("multiple choice", "the"),
        ("multiple choice", "A, C"),
        ("multiple choice", "B and D"),
        ("multiple choice", "AB"),
        ("multiple choice", "ACD"),
        ("multiple choice", "A B"),
        ("multiple choice", "(A)(B)"),
        ("multiple choice", "A、B"),
        ("multiple choice", "A和B"),
        ("multiple choice", "2"),
        ("multiple choice", "<answer>2</answer>"),
        ("multiple choice", "<answer>D"),
        ("multiple choice", "<answer><answer>D</answer></answer>"),
        ("multiple choice", "<answer>A</answer><answer>B</answer>"),
        ("multiple choice", "\\boxed{A}\\boxed{B}"),
        ("multiple choice", "\\boxed{D"),
        ("free-form", "<tool>a red bicycle"),
        ("math", "\\boxed{}"),
        ("vci", "move_right:" + "9" * 400),
        ("numerical", "three"),
        ("numerical", "3 or 4"),
        ("regression", "cat"),
        ("judgment", "maybe"),
        ("judgment", "yes and no"),
        ("math", "$$"),
        ("free-form", "the"),
        ("box", "oops"),
        ("box", "[30, 20, 10, 40]"),
        ("vci", "left"),
    ],
)
def test_a_target_that_no_answer_could_meet_is_refused(kind: str, target: str) -> None:
    with pytest.raises(ScoringError, match="target"):
        check_target(QuestionType(kind), target)
    with pytest.raises(ScoringError, match="target"):
        score_answer("1", target, kind)


TARGET_PARTS = (
    *("A", "B", "C", "D", "b", "AB", "2", "3.5", "-7", "1,200", "½", "3 m", "yes", "No", "True", "是", "没有"),
    *("left", "a red bicycle", "B is closer", "Both A and B", "左边", "[0, 0, 28, 28]", "move_left:1"),
)
TARGET_FORMS = (
    *("{}", " {} ", "<answer>{}</answer>", "\\boxed{{{}}}", "$\\boxed{{\\text{{{}}}}}$", "$ {} $", "\\text{{{}}}"),
    *(
        "<answer>\\boxed{{{}}}</answer>",
        "<think>so</think><answer>{}</answer>",
        "({})",
        "{}.",
        "{}。",
        "C. {}",
        "（{}）",
    ),
    *("<answer>{}", "<answer><answer>{}</answer></answer>", "{0} or {0}", "\\boxed{{{0}}} \\boxed{{{0}}}"),
)


@given(
    st.sampled_from([kind for kind in QuestionType if kind is not QuestionType.MATH]),
    st.sampled_from(TARGET_PARTS) | st.text(max_size=12),
    st.sampled_from(TARGET_FORMS),
)
def test_every_target_that_is_accepted_is_met_by_its_canonical_answers(
    kind: QuestionType, part: str, form: str
) -> None:
    target = form.format(part)
    try:
        bare = check_target(kind, target)
    except ScoringError:
        return
    assert check_target(kind, bare) == bare
    for answer in (bare, target, f"<answer>{bare}</answer>", f"\\boxed{{{bare}}}", f" {bare}\n"):
        if answer.count("{") == answer.count("}") or "boxed" not in answer:
            assert score_answer(answer, target, kind) == pytest.approx(1.0), (answer, target)


CHOICES = (
    ("A is closer", "B is closer"),
    ("B is closer", "A is closer"),
    ("A is closer to the camera", "B is closer to the camera", "Both A and B", "A and C"),
    ("A", "B", "C", "D"),
    ("2", "3", "12"),
    ("Yes", "No"),
    ("a cat", "the cat on a mat", "Vitamin C", "it's X-rayed"),
    ("左边", "右边", "A和B都对", "以上都不对"),
    ("left", "right", "left", "right"),
)


@given(st.sampled_from(CHOICES), st.data())
def test_where_options_are_known_every_way_to_name_the_right_one_scores(texts: tuple[str, ...], data: st.DataObject):
    options = with_letters(texts)
    place = data.draw(st.integers(0, len(texts) - 1))
    letter, text = "ABCD"[place], texts[place]
    forms = ("{0}", "({0})", "{0}.", "{0}. {1}", "({0}) {1}", "{0}: {1}", "**{0}**. {1}", "{0} - {1}", "【{0}】{1}")
    more = (
        "The answer is ({0}) {1}.",
        "Answer: {0}. {1}",
        "答案是{0}",
        "选{0}",
        "{0}、{1}",
        "({0}) {1}, as one can see",
    )
    answer = data.draw(st.sampled_from(forms + more)).format(letter, text)
    if data.draw(st.booleans()):
        answer = answer.lower()
    target = data.draw(st.sampled_from(["{0}", "{0}. {1}", "<answer>{0}</answer>", "\\boxed{{{0}}}"])).format(
        letter, text
    )
    check_target(QuestionType.MULTIPLE_CHOICE, target, options)
    assert score_answer(answer, target, "multiple choice", options=options) == 1, (answer, target)
    for other in range(len(texts)):
        if other != place:
            wrong = data.draw(st.sampled_from(forms)).format("ABCD"[other], texts[other])
            assert score_answer(wrong, target, "multiple choice", options=options) == 0, (wrong, target)
    if len(text) > 1:  # a letter alone is a letter
        shared = [texts[other] for other in range(len(texts)) if texts[other] == text]
        assert score_answer(text, target, "multiple choice", options=options) == 1, (text, shared)


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("B. A is closer", "B", 0),  # letter and text disagree
        ("A: B is closer", "B", 0),
        ("B is closer", "B", 1),
        ("b is closer.", "B is closer", 1),
        ("The answer is: B is closer", "B", 1),
        ("E", "B", 0),
        ("E. none", "B", 0),
        ("A or B", "B", 0),
        ("(A) A is closer (B) B is closer", "A", 0),
        ("B. B is closer or A", "B", 0),
        ("B. B is closer, since A is behind it", "B", 1),
        ("", "B", 0),
    ],
)
def test_letter_and_text_are_compared_with_the_known_options(prediction: str, target: str, right: int) -> None:
    options = with_letters(["A is closer", "B is closer"])
    assert score_answer(prediction, target, "multiple choice", options=options) == right


def test_options_that_share_a_text_are_one_where_the_text_is_said() -> None:
    options = with_letters(["left", "right", "left"])
    for answer, target, right in [
        ("left", "A", 1),
        ("left", "C", 1),
        ("C", "A", 0),
        ("C", "left", 1),
        ("left", "B", 0),
    ]:
        assert score_answer(answer, target, "multiple choice", options=options) == right, (answer, target)


@pytest.mark.parametrize("target", ["E", "2", "up", "B. left", "A and B", "AB"])
def test_a_target_that_is_none_of_the_options_is_refused(target: str) -> None:
    with pytest.raises(ScoringError, match=r"none of the options 'A\. left', 'B\. right'"):
        check_target(QuestionType.MULTIPLE_CHOICE, target, with_letters(["left", "right"]))


def test_a_number_is_a_choice_where_it_is_an_options_text() -> None:
    options = with_letters(["1", "2", "3"])
    assert score_answer("B", "2", "multiple choice", options=options) == 1
    assert score_answer("2", "2", "multiple choice", options=options) == 1
    assert score_answer("A", "2", "multiple choice", options=options) == 0


def test_options_of_another_type_of_question_are_refused() -> None:
    with pytest.raises(ScoringError, match="options belong to a multiple choice, the question type is 'numerical'"):
        score_answer("3", "3", "numerical", options=("A. 3", "B. 4"))


@pytest.mark.parametrize(
    ("question", "target", "expected"),
    [
        ("Which?\n(A) A is closer\n(B) B is closer\nReply with a letter.", "B", ("A. A is closer", "B. B is closer")),
        ("Which?\nA. left\n\nB. right", "left", ("A. left", "B. right")),
        ("哪个？\nA、左边\nB、右边", "B", ("A. 左边", "B. 右边")),
        ("Which? A. left B. right", "B", ()),
        ("A. left\nC. right", "A", ()),
        ("A. left\nand then\nB. right", "A", ()),
        ("A. left\nB. right\nA. up\nB. down", "A", ()),
        ("Read:\nA. first\nB. second\nWhat follows?", "D", ()),
    ],
)
def test_options_are_found_where_a_question_lists_them_line_by_line(question, target, expected) -> None:
    assert known_options(None, question, target) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("left", "options are a str"),
        (3, "options are a int"),
        (["left", 3], "option 3 must be a text"),
        (["left", " "], "must be a text"),
        (["left"], "one option only"),
        ({"A": "left", "C": "right"}, "options are named A, C"),
        (["x"] * 27, "27 options"),
    ],
)
def test_options_that_cannot_be_read_are_refused(given, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        read_options(given)


def test_options_are_read_from_lists_and_objects() -> None:
    assert read_options({"A": "left", "B": "right"}) == read_options(["left", "right"]) == ("A. left", "B. right")
    assert read_options(["(A) left", "(B) right"]) == ("(A) left", "(B) right")
    assert read_options(None) == read_options([]) == ()


LONG = 500_000
"""Characters: read once they cost less than a second, in a quadratic expression an hour."""


@pytest.mark.parametrize("version", ["strict", "published"])
@pytest.mark.parametrize(
    ("before", "repeated", "after"),
    [
        ("answer", " ", "xyz"),
        ("the answer is", "\n", "5"),
        ("the", " ", "x"),
        ("A. x", "(", "B"),
        ("", "(", "1"),
        ("a", ".", "a"),
        ("", "..a", ""),
        ("move_up:", "1", "x"),
        ("move_up:1.", "1", "x"),
        ("move_up", " ", "x"),
        ("", "1", "x"),
        ("[1, 2, 3, ", "1", "x"),
        ("\\boxed{", "{", ""),
        ("", "<answer>", ""),
        ("", "yes", "no"),
        ("", "\\boxed{", ""),
        ("", "是", " "),
        ("", " ", "是"),
        ("", "选", "B"),
        ("A. ", "B, ", "C"),
        ("A. ", "A. ", "B"),
        ("", "所以", ""),
    ],
)
def test_the_cost_of_an_answer_grows_with_its_length_only(before: str, repeated: str, after: str, version: str) -> None:
    answer = before + repeated * (LONG // len(repeated)) + after
    for kind in (*TARGETS, "vci"):
        if kind != "math":
            target = TARGETS.get(kind, ("move_up:1",))[0]
            assert 0 <= score_answer(answer, target, kind, version=version) <= 1  # type: ignore[arg-type]
            assert evaluation_score(answer, target, kind) in (0.0, 1.0)
    assert isinstance(parse_turn(answer), NoAction | Malformed)


@given(st.lists(st.sampled_from(["the", "answer", "is", ":", " ", "\n", "(", "a", "B", ")", ".", ",", "1", "é"])))
def test_option_letters_and_words_do_not_depend_on_how_many_blanks_there_are(parts: list[str]) -> None:
    text = "".join(parts)
    spaced = "".join(part * (1 + part.isspace()) for part in parts)
    assert option_letter(text) == option_letter(spaced)
    assert normalise(text) == normalise(spaced)
    assert normalise(text) == " ".join(
        core for word in text.lower().split() if (core := word.strip("(:).,")) not in ("", "a", "the")
    )


PUBLISHED = [  # what the published reward gave for each, its accidents included
    ("A", "A", "multiple choice", 1.0),
    ("Apple", "A", "multiple choice", 1.0),
    ("(A)", "A", "multiple choice", 0.0),
    ("yes or no", "Yes", "judgment", 1.0),
    ("yes or no", "No", "judgment", 1.0),
    ("yes", "No", "judgment", 0.0),
    ("1/2", "0.5", "math", 0.0),
    ("42.0", "42", "math", 0.0),
    ("42", "42", "math", 1.0),
    ("50%", "50", "numerical", 0.0),
    ("1,000", "1000", "numerical", 1.0),
    ("42 m", "42", "regression", 0.0),
    ("105", "100", "regression", 1.0),
    ("110", "100", "numerical", 0.9),
    ("125", "100", "regression", 0.5),
    ("150", "100", "numerical", 0.0),
    ("", "A", "multiple choice", 0.0),
    ("A", "", "multiple choice", 0.0),
    ("left", "left", "free-form", 0.0),
]


@pytest.mark.parametrize(("prediction", "target", "kind", "expected"), PUBLISHED)
def test_published_scores(prediction: str, target: str, kind: str, expected: float) -> None:
    assert score_answer(prediction, target, kind, version="published") == pytest.approx(expected)


def test_published_math_is_what_math_verify_does_with_raw_strings() -> None:
    math_verify = pytest.importorskip("math_verify", reason="the math extra is not installed in this environment")
    for prediction, target, kind, _ in PUBLISHED:
        if kind == "math":
            expected = float(math_verify.verify(prediction, target))
            assert score_answer(prediction, target, kind, version="published") == pytest.approx(expected)


TARGETS = {
    "multiple choice": ("A", "B", "C", "D"),
    "numerical": ("3", "12", "0.5", "1,200"),
    "regression": ("3.5", "120", "7"),
    "judgment": ("Yes", "No"),
    "free-form": ("a red car on the left", "two men near the lake", "the dog and its ball"),
    "box": ("[10, 20, 60, 90]", "[0, 0, 28, 28]"),
    "math": ("1/2", "7", "\\sqrt{2}"),
}


@pytest.mark.parametrize("kind", [k for k in TARGETS if k != "math"])
@given(data=st.data())
def test_nothing_is_earned_by_silence_repetition_or_everything_at_once(kind: str, data: st.DataObject) -> None:
    _earns_nothing(kind, data)


@settings(deadline=None)  # the first comparison imports sympy
@given(data=st.data())
def test_nothing_is_earned_by_silence_repetition_or_everything_at_once_in_math(data: st.DataObject) -> None:
    pytest.importorskip("math_verify", reason="the math extra is not installed in this environment")
    _earns_nothing("math", data)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("move_right:0.5,rotate_up:30", 1.0),
        ("Move_Right: 0.5 , rotate_up: 30.", 1.0),
        ("rotate_up:30", 0.8),
        ("move_right:0.25,rotate_up:30", 0.82),
        ("move_right:0.5,move_right:0.5,rotate_up:30", 0.0),
        ("move_right:0.5 or 1,rotate_up:30", 0.0),
        ("sideways:3", 0.0),
        ("", 0.0),
    ],
)
def test_a_change_of_view_is_read_with_blanks_and_once_per_direction(prediction, expected):
    assert score_answer(prediction, "move_right:0.5,rotate_up:30", "vci") == pytest.approx(expected, abs=1e-12)
    assert parse_view_change("up:1") is None


OPTIONS = ("left", "a dog", "Vitamin C", "the red car", "3 m wide", "it's X-rayed")


@given(st.data())
def test_several_options_are_none_however_they_are_written(data: st.DataObject) -> None:
    letters = data.draw(st.permutations("ABCD"))[: data.draw(st.integers(2, 4))]
    joiner = data.draw(st.sampled_from([", ", "; ", " or ", " and ", " / ", "\n", " ", " & "]))
    wrap = data.draw(st.sampled_from(["{}. {}", "{}) {}", "({}) {}", "[{}] {}", "{}: {}", "{} - {}"]))
    texts = data.draw(st.sampled_from([[""] * 6, OPTIONS]))
    parts = [
        wrap.format(letter.lower() if data.draw(st.booleans()) else letter, text).strip()
        for letter, text in zip(letters, texts, strict=False)
    ]
    assert option_letter(joiner.join(parts)) is None
    assert {score_answer(joiner.join(parts), letter, "multiple choice") for letter in letters} == {0.0}


@given(
    st.sampled_from("ABCD"),
    st.booleans(),
    st.sampled_from(
        ["{}. {}", "{}) {}", "({}) {}", "[{}] {}", "{}: {}", "{} - {}", "**{}.** {}", "The answer is {}. {}"]
    ),
    st.sampled_from(["", *OPTIONS]),
)
def test_one_option_is_read_however_it_is_written(letter: str, small: bool, wrap: str, text: str) -> None:
    assert option_letter(wrap.format(letter.lower() if small else letter, text)) == letter


def _earns_nothing(kind: str, data: st.DataObject) -> None:
    targets = TARGETS[kind]
    target = data.draw(st.sampled_from(targets))
    joiner = data.draw(st.sampled_from([" ", ", ", " or ", " and ", "; ", "\n", "/", ". ", " | "]))
    # "C. C" is an option with its text
    least = 3 if kind == "multiple choice" and joiner in ("\n", ". ") else 2
    repeated = joiner.join([target] * data.draw(st.integers(least, 6)))
    if kind == "judgment":  # a word said again is no other word
        repeated = ""
    others = data.draw(st.permutations(targets))
    everything = joiner.join(others)
    silent = data.draw(st.sampled_from(["", " ", "\n\t", ".", "?!", "()", "**", "<answer></answer>"]))
    for prediction in (silent, repeated, everything, everything + joiner + everything):
        assert score_answer(prediction, target, kind) == 0, json.dumps(prediction)


@given(st.text(max_size=60), st.sampled_from(sorted(TARGETS)))
def test_any_text_is_scored_between_0_and_1(text: str, kind: str) -> None:
    if kind == "math":
        return
    for version in ("strict", "published"):
        assert 0 <= score_answer(text, TARGETS[kind][0], kind, version=version) <= 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, found",
    [
        ("<think>a</think>B", "B"),
        ("<think>a</think><answer>B</answer>", "B"),
        ("<answer>\\boxed{B}</answer>", "B"),
        ("<answer><answer>B</answer></answer>", None),
        ("<answer>B<answer>", None),
        ("<answer><think>a</think>B</answer>", None),
        ("<answer>B<think>a</think></answer>", None),
    ],
)
def test_what_an_answer_is_wrapped_in_is_taken_off_and_markup_inside_it_makes_it_none(text: str, found: str | None):
    assert unwrapped(text) == found
