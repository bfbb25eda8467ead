"""One run against another: paired tests against sums done by hand, flips, and a page that nothing breaks out of."""

import json
import re
from html.parser import HTMLParser
from math import comb, erfc, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from vilavt_core.cli import app
from vilavt_core.errors import BenchmarkError
from vilavt_core.protocol import Answer, Region, ToolCall, format_turn
from vilavt_eval.comparison import compare, write_side_by_side
from vilavt_eval.definition import load_benchmark
from vilavt_eval.scores import ScoredFile, score_file
from vilavt_eval.statistics import mcnemar, sign_flip

HOSTILE = "<script>alert('x')</script> & </pre>\" \ud800"


def file_of(path: Path, scores: dict[Any, str], benchmark: str | None = None, **more: Any) -> ScoredFile:
    """A file of multiple choices whose right answer is A."""
    rows = [
        {"question_id": i, "response": said, "answer": "A", "problem_type": "multiple choice", **more}
        for i, said in scores.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return score_file(path, None if benchmark is None else load_benchmark(benchmark))


def by_hand(only_first: int, only_second: int) -> float:
    number = only_first + only_second
    tail = sum(comb(number, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**number)


def test_mcnemars_test_is_the_binomial_one_of_the_discordant_pairs():
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 1024, abs=1e-12)
    assert mcnemar(0, 5) == pytest.approx(2 / 32, abs=1e-12)
    assert mcnemar(5, 5) == pytest.approx(1, abs=1e-12)
    assert mcnemar(0, 0) == pytest.approx(1, abs=1e-12)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemars_test_agrees_with_whole_numbers(only_first, only_second):
    assert mcnemar(only_first, only_second) == pytest.approx(by_hand(only_first, only_second), rel=1e-9)
    assert mcnemar(only_first, only_second) == pytest.approx(mcnemar(only_second, only_first), rel=1e-9)


def test_mcnemars_test_holds_for_many_pairs():
    assert mcnemar(50_000, 50_000) == pytest.approx(1, abs=1e-9)
    normal = erfc((50_300 - 49_700 - 1) / sqrt(2 * 100_000))  # with the correction for whole numbers
    assert mcnemar(49_700, 50_300) == pytest.approx(normal, rel=1e-3)


def test_random_signs_of_equal_differences_are_the_sign_test():
    differences = np.array([0.5] * 9 + [-0.5])
    expected = by_hand(1, 9)
    found = sign_flip(differences, np.random.default_rng(0), 200_000)
    assert found == pytest.approx(expected, abs=4 * (expected / 200_000) ** 0.5)
    assert sign_flip(np.zeros(5), np.random.default_rng(0)) == pytest.approx(1, abs=1e-12)


def test_random_signs_of_graded_differences_match_all_their_combinations():
    differences = np.array([0.9, 0.1, 0.4, -0.2, 0.3, 0.05, -0.1])
    signs = np.array(np.meshgrid(*[[1, -1]] * 7)).reshape(7, -1)
    exact = float((np.abs(differences @ signs) >= differences.sum() - 1e-9).mean())
    assert sign_flip(differences, np.random.default_rng(0), 100_000) == pytest.approx(exact, abs=0.01)


def test_random_signs_reject_a_true_null_as_rarely_as_they_say():
    rng = np.random.default_rng(0)
    values = [sign_flip(rng.normal(size=30), rng, 400) for _ in range(400)]
    assert 0.02 <= np.mean(np.array(values) <= 0.05) <= 0.08


def test_two_runs_are_compared_on_the_questions_that_both_answered(tmp_path):
    first = file_of(tmp_path / "first.jsonl", {0: "A", 1: "A", 2: "B", 3: "B", 4: "B", 5: "A"})
    second = file_of(tmp_path / "second.jsonl", {0: "A", 1: "B", 2: "A", 3: "A", 4: "A", 6: "A"})
    found = compare([first], [second])
    overall = found.overall
    assert (found.first, found.second) == ("first", "second")
    assert (overall.questions, overall.better, overall.worse) == (5, 3, 1)
    assert (overall.first, overall.second, overall.difference) == pytest.approx((0.4, 0.8, 0.4))
    assert overall.test == "McNemar, exact"
    assert overall.p_value == pytest.approx(by_hand(1, 3))
    assert overall.interval.low < 0.4 < overall.interval.high
    assert [flip.question_id for flip in found.flips] == ["1", "2", "3", "4"]
    assert (found.only_first, found.only_second) == (("5",), ("6",))


def test_a_run_against_itself_differs_in_nothing(tmp_path):
    file = file_of(tmp_path / "first.jsonl", {i: "AB"[i % 2] for i in range(20)})
    found = compare([file], [file])
    assert found.flips == ()
    assert found.overall.p_value == pytest.approx(1)
    assert found.overall.difference == pytest.approx(0, abs=1e-12)
    # twenty equal answers do not say that the next one is equal, too
    assert (found.overall.interval.low, found.overall.interval.high) == pytest.approx((-0.126, 0.126), abs=1e-3)


def test_questions_with_another_right_answer_are_no_pair(tmp_path):
    first = file_of(tmp_path / "first.jsonl", {0: "A", 1: "A"})
    rows = [json.loads(line) for line in first.path.read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1] | {"answer": "C"}) + "\n")
    found = compare([first], [score_file(other)])
    assert (found.other_targets, found.overall.questions) == (("1",), 1)


def test_only_runs_on_the_same_questions_are_compared(tmp_path):
    plain = file_of(tmp_path / "plain.jsonl", {0: "A"})
    named = file_of(tmp_path / "named.jsonl", {0: "A"}, "ERQA")
    apart = file_of(tmp_path / "apart.jsonl", {1: "A"})
    with pytest.raises(BenchmarkError, match=r"plain\.jsonl is of no benchmark, .*named\.jsonl of ERQA"):
        compare([plain], [named])
    with pytest.raises(BenchmarkError, match="have no question in common: 1 and 1 ids, 0 in both"):
        compare([plain], [apart])


def test_means_over_seeds_and_categories_are_tested_by_random_signs(tmp_path):
    def seeds(name: str, *answers: str) -> list[ScoredFile]:
        return [file_of(tmp_path / f"{name}{i}.jsonl", dict(enumerate(a))) for i, a in enumerate(answers)]

    found = compare(seeds("first", "AABB", "AAAB"), seeds("second", "AABB", "BBBB"))
    assert found.overall.test == "random signs"
    assert found.overall.difference == pytest.approx(0.5 - 0.625 - 0.25)
    assert [(flip.question_id, flip.first, flip.second) for flip in found.flips] == [
        ("0", pytest.approx(1), pytest.approx(0.5)),
        ("1", pytest.approx(1), pytest.approx(0.5)),
        ("2", pytest.approx(0.5), pytest.approx(0)),
    ]


def test_the_difference_of_a_macro_score_weighs_categories_alike(tmp_path):
    def run(name: str, easy: str, hard: str) -> ScoredFile:
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {
                "question_id": f"{kind}{i}",
                "response": said,
                "answer": "A",
                "problem_type": "multiple choice",
                "original_question_type": kind,
            }
            for kind, answers in (("route_planning", easy), ("object_counting", hard))
            for i, said in enumerate(answers)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return score_file(path, load_benchmark("VSI-Bench"))

    found = compare([run("first", "AAAA", "B")], [run("second", "AAAB", "A")])
    assert found.overall.difference == pytest.approx((-1 / 4 + 1) / 2)
    assert found.overall.test == "random signs"
    assert [(c.name, c.test) for c in found.contrasts[1:]] == [
        ("route_planning", "McNemar, exact"),
        ("object_counting", "McNemar, exact"),
    ]


class Page(HTMLParser):
    """Tags and text of a page; every tag must close."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_traces_of_flipped_questions_stand_side_by_side_and_are_escaped(tmp_path):
    turns = [
        format_turn(ToolCall((Region(0, (1, 2, 30, 40)),), "look at " + HOSTILE, "thinking " + HOSTILE)),
        format_turn(Answer("A", "now I see")),
        HOSTILE,
        "<tool>{broken",
        "",
    ]
    more = {"question": HOSTILE, "category": HOSTILE, "images": [HOSTILE], "finish": "answer"}
    first = file_of(tmp_path / "first.jsonl", {HOSTILE: "A", 1: "B"}, "ERQA", turns=turns, **more)
    second = file_of(tmp_path / "second.jsonl", {HOSTILE: HOSTILE, 1: "B"}, "ERQA", error=None, turns="none", **more)
    found = compare([first], [second])
    path = write_side_by_side(found, tmp_path / "flips.html")
    page = Page(path)
    assert not {"script", "link", "iframe"} & set(page.tags)
    for text in ("look at <script>alert", "thinking <script>", "now I see", "image 0 [1, 2, 30, 40]", "Turn 5"):
        assert text in page.text
    assert page.tags.count("article") == 1
    assert "http" not in re.sub("http-equiv", "", path.read_text())


def test_a_page_shows_flips_of_both_directions_up_to_its_limit(tmp_path):
    first = file_of(tmp_path / "first.jsonl", {i: "AB"[i >= 5] for i in range(10)}, turns=[])
    second = file_of(tmp_path / "second.jsonl", {i: "BA"[i >= 5] for i in range(10)}, turns=[])
    found = compare([first], [second])
    page = Page(write_side_by_side(found, tmp_path / "flips.html", limit=4))
    assert page.tags.count("article") == 4
    assert "10 questions are scored differently" in page.text
    assert "4 are shown" in page.text


def test_a_question_that_only_a_later_seed_answered_is_shown_from_its_file(tmp_path):
    first = [
        file_of(tmp_path / "first_seed_0.jsonl", {0: "A"}, question="zero"),
        file_of(tmp_path / "first_seed_1.jsonl", {0: "A", 1: "A"}, question="one"),
    ]
    second = [file_of(tmp_path / "second.jsonl", {0: "A", 1: "B"})]
    found = compare(first, second)
    assert [flip.first_place for flip in found.flips] == [(str(first[1].path), 2)]
    assert "one" in Page(write_side_by_side(found, tmp_path / "flips.html")).text


def test_the_command_compares_two_runs(tmp_path):
    first = file_of(tmp_path / "first.jsonl", {i: "A" if i < 3 else "B" for i in range(10)}).path
    second = file_of(tmp_path / "second.jsonl", dict.fromkeys(range(10), "A")).path
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["score", str(second), "--against", str(first), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "+70.00" in result.output
    comparison = json.loads((out / "scores.json").read_text())["comparison"]
    assert comparison["contrasts"][0]["p_value"] == pytest.approx(2 / 128)
    assert len(comparison["flips"]) == 7
    assert "second against first" in (out / "scores.md").read_text()
    assert (out / "flips.html").is_file()
    several = CliRunner().invoke(app, ["score", str(first), str(second), "--against", str(first)])
    assert several.exit_code == 2
