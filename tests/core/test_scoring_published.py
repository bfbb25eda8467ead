"""The scorer of the published evaluation, answer by answer, bit for bit; an empty answer earns nothing by either."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilavt_core.errors import ScoringError
from vilavt_core.scoring import QuestionType, score_answer
from vilavt_core.scoring.published import evaluation_score, tagged_answer

VCI = "move_right:{},move_left:0,move_up:0,move_forward:0,rotate_right:0,rotate_up:0"
GOLDEN = [  # what the published evaluation gave for each
    ("A", "A", "multiple choice", 1.0),
    ("(A)", "A", "multiple choice", 0.0),
    (" b. left", "B. left", "multiple choice", 1.0),
    ("A. foo", "A", "multiple choice", 1.0),
    ("Apple", "A", "multiple choice", 1.0),
    ("<answer> A </answer>", "<answer>A</answer>", "multiple choice", 1.0),
    ("<answer>B</answer><answer>A</answer>", "A", "multiple choice", 0.0),
    ("<answer>A", "A", "multiple choice", 0.0),
    ("", "A", "multiple choice", None),
    (" \n", "A", "multiple choice", None),
    ("<answer> </answer>", "A", "multiple choice", None),
    ("A", "", "multiple choice", None),
    ("3", "3.0", "numerical", 0.0),
    ("3.14", "3.140", "numerical", 1.0),
    ("3.141", "3.144", "numerical", 1.0),
    ("3.141", "3.146", "numerical", 0.0),
    ("1,000", "1000", "numerical", 0.0),
    ("1,000", "1000.", "numerical", 1.0),
    ("three", "3", "numerical", 0.0),
    ("1,000", "1000", "regression", 1.0),
    ("42 m", "42", "regression", 0.0),
    ("", "42", "regression", 0.0),
    ("100", "100", "regression", 1.0),
    ("105", "100", "regression", 1.0),
    ("110", "100", "regression", 0.9),
    ("125", "100", "regression", 0.6),
    ("150", "100", "regression", 0.1),
    ("151", "100", "regression", 0.0),
    ("3.3", "3.0", "regression", 0.9),
    ("0", "0", "regression", 1.0),
    ("0.001", "0", "regression", 0.0),
    ("inf", "3", "regression", 0.0),
    ("nan", "3", "regression", 0.0),
    (VCI.format("0.5"), VCI.format("1"), "vci", 0.82),
    ("move_up:0, move_right:1", VCI.format("1"), "vci", 0.8),
    ("move_left:-0.5", "move_right:0.5", "vci", 1.0),
    ("move_right:1,", "move_right:1", "vci", 0.0),
    ("move_right", "move_right:1", "vci", 0.0),
    ("move_right:1,move_up:0.1", "move_right:1", "vci", 0.8),
    ("", "move_right:1", "vci", 0.0),
    ("A", "A", "Multiple Choice", 0.0),
    ("A", "A", "free-form", 0.0),
    ("yes", "yes", "judgment", 0.0),
]


@pytest.mark.parametrize(("prediction", "target", "kind", "expected"), GOLDEN)
def test_the_published_evaluation_is_reproduced(prediction, target, kind, expected):
    found = evaluation_score(prediction, target, kind)
    assert (found is None) == (expected is None)
    if expected is not None:
        assert found == pytest.approx(expected, abs=1e-12)


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6).filter(lambda t: abs(t) > 1e-3), st.integers(0, 10))
def test_relative_errors_are_compared_in_single_precision(prediction, target, tenth):
    for value in (prediction, target * (1 + 0.05 * tenth), target * (1 - 0.05 * tenth)):
        thresholds = np.linspace(0.5, 0.95, 10).astype(np.float32)
        error = np.float32(abs(value - target) / (abs(target) + 1e-8))
        expected = float(np.mean(error <= 1 - thresholds))
        assert evaluation_score(repr(value), repr(target), "regression") == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.text(), st.text(), st.sampled_from([*QuestionType, "", "riddle", "MULTIPLE CHOICE"]))
def test_the_published_scorer_never_raises(prediction, target, kind):
    found = evaluation_score(prediction, target, kind)
    assert found is None or 0 <= found <= 1


@settings(deadline=None)
@given(
    st.sampled_from(["", " ", "\n\t", "<answer></answer>", "<answer> \n</answer>"]),
    st.text(),
    st.sampled_from(list(QuestionType)),
)
def test_an_empty_answer_never_scores(prediction, target, kind):
    assert not evaluation_score(prediction, target, kind)
    if kind is not QuestionType.MATH:
        with contextlib.suppress(ScoringError):  # the target cannot be read
            assert score_answer(tagged_answer(prediction), target, kind) == pytest.approx(0, abs=1e-12)
