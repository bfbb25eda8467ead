"""Scores of result files: no row stops them, tables, intervals, seeds, reports."""

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from vilavt_core import cli
from vilavt_core.cli import app
from vilavt_core.errors import BenchmarkError
from vilavt_core.scoring import QuestionType
from vilavt_eval.definition import load_benchmark
from vilavt_eval.metrics import find_metric
from vilavt_eval.report import label, write_report
from vilavt_eval.scores import Flaw, ScoredFile, score_file
from vilavt_eval.statistics import wilson
from vilavt_eval.summary import FigureKind, Summary, settings_of, summarise


def row(question_id: Any, response: Any = "A", answer: Any = "A", **more: Any) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "response": response,
        "answer": answer,
        "problem_type": "multiple choice",
        "finish": "answer",
        "error": None,
        **more,
    }


def write(path: Path, rows: list[Any], run: dict[str, Any] | None = None, tail: str = "") -> Path:
    lines = [*([{"run": run}] if run else []), *rows]
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text + tail, encoding="utf-8")
    return path


def scored(tmp_path: Path, *rows: Any, benchmark: str | None = None, **more: Any) -> ScoredFile:
    definition = None if benchmark is None else load_benchmark(benchmark, functions=True)
    return score_file(write(tmp_path / "results.jsonl", list(rows), **more), definition)


def figures(summary: Summary) -> dict[str, float]:
    return {figure.name: figure.score for figure in summary.figures}


# ---------------------------------------------------------------------- files


def test_a_file_of_ours_and_one_of_the_published_program_score_alike(tmp_path):
    ours = scored(tmp_path, row(1), row(2, "B"), run={"benchmark": {"name": "ERQA", "version": 1}, "seed": 3})
    theirs = scored(
        tmp_path,
        {
            "question_id": 1,
            "response": {"response": "<answer>A</answer>"},
            "answer": "<answer>A</answer>",
            "problem_type": "multiple choice",
        },
        {"question_id": 2, "response": "B", "answer": "A", "problem_type": "multiple choice", "conversations": []},
    )
    for scorer in ("strict", "published"):
        assert ours.scores(scorer) == pytest.approx([1, 0])
        assert theirs.scores(scorer) == pytest.approx([1, 0])
    assert ours.benchmark is not None
    assert (ours.benchmark.name, ours.seed) == ("ERQA", 3)
    assert theirs.benchmark is theirs.seed is None
    assert ours.problems == theirs.problems == ()


FLAWED = [
    ("{not json", Flaw.NOT_JSON),
    ("[1, 2]", Flaw.NOT_JSON),
    ("[" * 100_000, Flaw.NOT_JSON),
    ('{"question_id": ' + "[" * 500 + "]" * 500 + "}", Flaw.NOT_JSON),
    (row(2, ""), Flaw.EMPTY),
    (row(2, "<answer></answer>"), Flaw.EMPTY),
    (row(2, None), Flaw.NO_RESPONSE),
    (row(2, ["A"]), Flaw.NO_RESPONSE),
    (row(2, {"text": "A"}), Flaw.NO_RESPONSE),
    (row(2, answer=None), Flaw.NO_TARGET),
    (row(2, answer=" "), Flaw.NO_TARGET),
    (row(2, problem_type="riddle"), Flaw.BAD_TYPE),
    (row(2, problem_type=None), Flaw.BAD_TYPE),
    (row(2, problem_type=["x"]), Flaw.BAD_TYPE),
    (row(2, "3", "many", problem_type="regression"), Flaw.BAD_TARGET),
    (row(2, "", error="EngineError: no memory"), Flaw.FAILED),
]


@pytest.mark.parametrize(("line", "flaw"), FLAWED)
def test_a_flawed_row_scores_nothing_is_counted_and_listed_and_stops_no_other(line, flaw, tmp_path):
    file = scored(tmp_path, row(1), line, row(3, "B", "B"))
    assert file.scores("strict") == pytest.approx([1, 0, 1])
    assert file.flaws == {str(flaw): 1}
    assert [(p.line, p.flaw) for p in file.problems] == [(2, flaw)]
    assert summarise([file]).overall.score == pytest.approx(2 / 3)


def test_a_metric_that_fails_costs_only_its_own_rows(tmp_path, monkeypatch):
    (tmp_path / "odd_metrics.py").write_text(
        "def odd(prediction, target):\n    return {'A': 0.5, 'B': 7}[prediction]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = tmp_path / "own.yaml"
    own.write_text("base: ERQA\ntypes: {multiple choice: {metric: 'odd_metrics:odd'}}\n")
    file = scored(tmp_path, row(1), row(2, "B"), row(3, "C"), benchmark=str(own))
    assert file.scores("strict") == pytest.approx([0.5, 0, 0])
    assert [p.detail for p in file.problems] == ["it gave 7.0; scores are 0 to 1", "KeyError: 'C'"]


def test_an_incomplete_last_line_is_left_out_with_a_warning(tmp_path, caplog):
    file = scored(tmp_path, row(1), tail='{"question_id": 2, "respo')
    assert len(file.rows) == 1
    assert file.flaws == {"last line cut off": 1}
    assert "line 2 is cut off" in caplog.text


def test_a_question_asked_again_after_an_error_counts_once_and_a_double_is_reported(tmp_path):
    again = scored(tmp_path, row(1, "", error="x"), row(2), row(1, "A"), row(1, "", error="later"))
    assert again.scores("strict") == pytest.approx([1, 1])
    assert again.problems == ()
    double = scored(tmp_path, row(1, "B"), row(2), row(1, "A"))
    assert double.scores("strict") == pytest.approx([1, 1])
    assert double.flaws == {"question answered twice": 1}
    assert double.problems[0].line == 3
    assert double.differences == ()


def test_what_strict_and_published_disagree_about_is_listed_per_row(tmp_path):
    file = scored(tmp_path, row(1, "(A)"), row(2, "Apple"), row(3), row(4, "42 m", "42", problem_type="regression"))
    assert [(d.question_id, d.strict, d.published) for d in file.differences] == [
        ("1", pytest.approx(1), pytest.approx(0)),
        ("2", pytest.approx(0), pytest.approx(1)),
        ("4", pytest.approx(1), pytest.approx(0)),
    ]
    assert summarise([file]).disagreements == 3


def test_rows_at_which_the_published_program_would_have_ended_are_counted(tmp_path):
    file = scored(tmp_path, row(1, ""), row(2, "", "3", problem_type="regression"), row(3))
    assert file.aborts == 1
    assert file.scores("published") == pytest.approx([0, 0, 1])


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(BenchmarkError, match="cannot be read: No such file"):
        score_file(tmp_path / "nothing.jsonl")
    with pytest.raises(BenchmarkError, match="there is no answered question in it"):
        score_file(write(tmp_path / "empty.jsonl", [], {"benchmark": "ERQA"}))
    with pytest.raises(BenchmarkError, match=r"no benchmark 'mine'.*--benchmark FILE\.yaml"):
        score_file(write(tmp_path / "own.jsonl", [row(1)], {"benchmark": {"name": "mine"}}))


def test_a_benchmark_of_ones_own_is_scored_by_the_definition_that_its_run_wrote_down(tmp_path):
    definition = dict(MINE)
    rows = [{**row(1), "problem_type": "letters", "place": "here"}]
    found = score_file(write(tmp_path / "r.jsonl", rows, {"benchmark": {"name": "mine", "definition": definition}}))
    assert [(r.strict, r.category) for r in found.rows] == [(1.0, "here")]
    definition["types"] = {}
    with pytest.raises(BenchmarkError, match="definition of 'mine'"):
        score_file(write(tmp_path / "r.jsonl", rows, {"benchmark": {"name": "mine", "definition": definition}}))


MINE = {
    "name": "mine",
    "title": "places",
    "file": "mine.json",
    "options": "question",
    "default_type": "letters",
    "types": {"letters": {"metric": "multiple choice"}},
    "report": {"category": "place"},
}


def test_a_definition_that_a_run_wrote_down_wins_over_the_packages_of_that_name_with_a_warning(tmp_path, caplog):
    def made_with(**changes: Any) -> ScoredFile:
        definition = load_benchmark("ERQA").model_dump(mode="json", exclude_unset=True) | changes
        run = {"benchmark": {"name": "ERQA", "version": definition.get("version", 1), "definition": definition}}
        return score_file(write(tmp_path / "r.jsonl", [row(1, place="here", category="there")], run))

    assert made_with(title="other words").rows[0].category == "there"
    assert caplog.text == ""
    for changes in ({}, {"version": 7}):
        found = made_with(report={"category": "place"}, **changes)
        assert found.rows[0].category == "here"
        (record,) = caplog.records
        version = changes.get("version", 1)
        assert (
            f"it holds (version {version}), which is not the package's (version 1); --benchmark ERQA" in record.message
        )
        caplog.clear()
    with pytest.raises(BenchmarkError, match=r"sufix: Extra.*--benchmark ERQA \(the package's\), or FILE\.yaml"):
        made_with(sufix="x")
    assert score_file(tmp_path / "r.jsonl", load_benchmark("ERQA")).rows[0].category == "there"


@pytest.fixture
def called(tmp_path, monkeypatch):
    """The module `spying` on the path; what it leaves behind when it is imported or called."""
    mark = tmp_path / "called"
    (tmp_path / "spying.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\ndef metric(prediction, target):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield mark
    sys.modules.pop("spying", None)
    find_metric.cache_clear()


@pytest.mark.parametrize("kind", ["spying:metric", ":metric", ".spying:metric", "spying:", "a:b:c", "spying"])
@pytest.mark.parametrize("benchmark", [None, "ERQA"])
def test_a_question_type_is_never_taken_for_a_function(kind, benchmark, tmp_path, called):
    file = scored(tmp_path, row(1), row(2, "rm", "r", problem_type=kind), benchmark=benchmark)
    assert file.scores("strict") == pytest.approx([1, 0])
    assert file.flaws == {"unknown question type": 1}
    assert not called.exists()


def test_a_definition_inside_a_result_file_may_not_call_functions_one_that_is_named_may_if_asked(tmp_path, called):
    definition = MINE | {"types": {"letters": {"metric": "spying:metric"}}}
    path = write(
        tmp_path / "r.jsonl",
        [row(1, "B", problem_type="letters")],
        {"benchmark": {"name": "mine", "definition": definition}},
    )
    with pytest.raises(BenchmarkError, match=r"'spying:metric' is a function.*--benchmark FILE\.yaml"):
        score_file(path)
    assert not called.exists()
    (tmp_path / "mine.yaml").write_text(json.dumps(definition))
    command = ["score", str(path), "--benchmark", str(tmp_path / "mine.yaml")]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, BenchmarkError)
    assert "--allow-functions" in str(refused.exception)
    assert not called.exists()
    result = CliRunner().invoke(app, [*command, "--allow-functions"])
    assert result.exit_code == 0, result.output
    assert "100.00" in result.output
    assert called.exists()


def test_the_name_of_a_benchmark_in_a_result_file_is_never_opened_as_a_path(tmp_path, called):
    (tmp_path / "other.yaml").write_text("base: ERQA\ntypes: {multiple choice: {metric: 'spying:metric'}}\n")
    for name in ("other.yaml", str(tmp_path / "other.yaml")):
        path = write(tmp_path / "r.jsonl", [row(1)], {"benchmark": name})
        with pytest.raises(BenchmarkError, match=r"no benchmark .*other\.yaml.*--benchmark FILE\.yaml"):
            score_file(path)
    assert not called.exists()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.text()
        | st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(),
            lambda x: st.lists(x) | st.dictionaries(st.text(), x),
            max_leaves=5,
        )
    ),
    st.binary(),
)
def test_no_content_of_a_file_stops_the_scoring(tmp_path_factory, values, junk):
    path = tmp_path_factory.mktemp("any") / "results.jsonl"
    rows = [row(i, value, value) for i, value in enumerate(values)]
    text = "".join(json.dumps(r) + "\n" for r in [*rows, *values]).encode("utf-8", "surrogatepass")
    path.write_bytes(json.dumps(row("first")).encode() + b"\n" + text + junk)
    file = score_file(path)
    assert all(0 <= r.strict <= 1 and 0 <= r.published <= 1 for r in file.rows)
    assert file.rows[0].strict == pytest.approx(1)


# ---------------------------------------------------------------------- what they amount to


def vsi(i: int, category: str, right: bool) -> dict[str, Any]:
    return row(i, "A" if right else "B", original_question_type=category)


def test_vsi_bench_merges_variants_and_averages_over_the_types_that_are_there(tmp_path):
    kinds = [("object_rel_direction_easy", 1), ("object_rel_direction_hard", 0), ("object_rel_direction_medium", 0)]
    rows = [
        *kinds,
        ("object_rel_direction_easy", 0),
        ("route_planning", 1),
        ("object_counting", 1),
        ("object_counting", 0),
    ]
    summary = summarise([scored(tmp_path, *(vsi(i, *r) for i, r in enumerate(rows)), benchmark="VSI-Bench")])
    found = figures(summary)
    assert found["object_rel_direction"] == pytest.approx(1 / 4)
    assert found["overall"] == pytest.approx((1 / 4 + 1 + 1 / 2) / 3)
    assert found["all questions"] == pytest.approx(3 / 7)
    assert found["Multiple choice"] == pytest.approx(2 / 5)
    order = [f.name for f in summary.figures if f.kind is FigureKind.CATEGORY]
    assert order == ["object_rel_direction", "route_planning", "object_counting"]


def test_spar_bench_groups_are_means_over_rows_and_the_whole_is_one_over_types(tmp_path):
    rows = [
        ("depth_prediction_oc", 1), ("depth_prediction_oc", 0), ("distance_prediction_oo", 1),
        ("position_matching", 0), ("spatial_imagination_oo_mv", 1), ("something_else", 1), ("something_else", 1),
    ]  # fmt: skip
    summary = summarise([scored(tmp_path, *(vsi(i, *r) for i, r in enumerate(rows)), benchmark="SPAR-Bench")])
    found = figures(summary)
    assert (found["Low"], found["Medium"], found["High"]) == pytest.approx((2 / 3, 0, 1))
    assert found["overall"] == pytest.approx((1 / 2 + 1 + 0 + 1) / 4)
    assert found["all questions"] == pytest.approx(5 / 7)
    assert [f.name for f in summary.figures if not f.counted] == ["something_else"]


def rotations(question: str, right: tuple[bool, ...], start: int) -> list[dict[str, Any]]:
    options = ["red", "green", "blue", "white"]
    return [
        row(
            start + i,
            "A" if ok else "B",
            question=question,
            options=[f"{letter}. {o}" for letter, o in zip("ABCD", options[i:] + options[:i], strict=True)],
            category="single",
            cycle_category=i,
        )
        for i, ok in enumerate(right)
    ]


def test_a_circular_score_wants_every_rotation_of_a_question_right(tmp_path):
    one = rotations("What colour?", (True, True, True, True), 0)
    other = rotations("Which one?", (True, True, True, False), 4)
    twin = rotations("What colour?", (True, False, True, True), 8)  # worded alike, another question
    short = rotations("And this?", (True, True), 12)  # two copies are missing
    shuffled = [r for rows in zip(one, other, twin, strict=True) for r in rows] + short
    summary = summarise([scored(tmp_path, *shuffled, benchmark="HRBench4K")])
    circular = next(f for f in summary.figures if f.kind is FigureKind.CIRCULAR)
    assert (circular.questions, circular.score) == (4, pytest.approx(1 / 4))
    assert summary.overall.questions == 4
    assert summary.overall.score == pytest.approx(12 / 14)
    assert [f.score for f in summary.figures if f.kind is FigureKind.ROTATION] == pytest.approx([1, 3 / 4, 1, 2 / 3])


def test_files_that_differ_in_their_seed_are_averaged_with_their_spread(tmp_path):
    files = []
    for seed, right in enumerate((1, 2, 3)):
        run = {"benchmark": "ERQA", "model": "/m/tiny", "preset": {"name": "default"}, "seed": seed}
        rows = [row(i, "A" if i < right else "B", category="x") for i in range(4)]
        files.append(score_file(write(tmp_path / f"default-seed{seed}.jsonl", rows, run)))
    other = write(
        tmp_path / "other.jsonl",
        [row(1, category="x")],
        {"benchmark": "ERQA", "ablation": "no-zoom", "model": "/m/tiny", "preset": {"name": "default"}},
    )
    ((*same,), (alone,)) = settings_of([*files, score_file(other)])
    assert same == files
    summary = summarise(same)
    assert summary.name == "tiny default"
    assert summarise([alone]).name == "tiny default no-zoom"
    assert summary.seeds == (0, 1, 2)
    overall = summary.overall
    assert overall.per_seed == pytest.approx((0.25, 0.5, 0.75))
    assert overall.score == pytest.approx(0.5)
    assert overall.spread == pytest.approx(0.25)
    assert overall.questions == 4
    assert summarise(files[:1]).overall.spread is None


def run_line(seed: int, **changes: Any) -> dict[str, Any]:
    """What `vilavt eval` writes, in short; names of `changes` may be dotted with two underscores."""
    run: dict[str, Any] = {
        "benchmark": {"name": "ERQA", "version": 1, "questions_sha256": "q"},
        "model": "/m/tiny",
        "backend": "hf",
        "preset": {"name": "default", "sampling": {"temperature": 0.0}, "prompts_sha256": "p"},
        "provenance": {
            "checkpoint": "/m/tiny",
            "fingerprint": "f",
            "dtype": "float32",
            "attention": "sdpa",
            "limits": {"max_turns": 5},
            "device": "cpu",
            "seed": seed,
            "versions": {"torch": "2.13.0"},
        },
        "seed": seed,
        "ablation": None,
    }
    for name, value in changes.items():
        *parents, last = name.split("__")
        part = run
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    return run


def two_seeds(tmp_path: Path, **changes: Any) -> list[tuple[ScoredFile, ...]]:
    first = score_file(write(tmp_path / "a.jsonl", [row(1)], run_line(0)))
    return settings_of([first, score_file(write(tmp_path / "b.jsonl", [row(1)], run_line(1, **changes)))])


@pytest.mark.parametrize(
    "changes",
    [
        {"provenance__fingerprint": "g"},
        {"provenance__dtype": "bfloat16"},
        {"provenance__attention": "flash_attention_2"},
        {"provenance__limits__max_turns": 2},
        {"preset__sampling__temperature": 0.7},
        {"preset__prompts_sha256": "r"},
        {"benchmark__questions_sha256": "r"},
        {"engine__quantization": "fp8"},
        {"backend": "vllm"},
    ],
)
def test_what_differs_in_more_than_its_seed_is_not_averaged_and_the_reason_is_told(changes, tmp_path, caplog):
    assert len(two_seeds(tmp_path, **changes)) == 2
    ((name, value),) = changes.items()
    assert (
        f"b.jsonl is no seed of {tmp_path / 'a.jsonl'}: '{name.replace('__', '.')}' is {value!r}, there" in caplog.text
    )


def test_a_checkpoint_is_known_by_its_fingerprint_wherever_it_was_found(tmp_path, caplog):
    moved = {"model": "/other/tiny", "provenance__checkpoint": "/other/tiny", "provenance__device": "cuda:0"}
    assert len(two_seeds(tmp_path, **moved)) == 1
    assert caplog.text == ""


def test_seeds_of_other_package_versions_are_averaged_with_a_warning(tmp_path, caplog):
    assert len(two_seeds(tmp_path, provenance__versions={"torch": "2.14.1"})) == 1
    assert "made with other versions than" in caplog.text
    assert "'provenance.versions.torch' is '2.14.1', there '2.13.0'" in caplog.text


def test_published_files_of_several_seeds_are_known_by_their_names(tmp_path):
    names = ("ViLaVT_ERQA_seed_0_results", "ViLaVT_ERQA_seed_42_results", "ViLaVT_MMSI_seed_0_results")
    found = settings_of([score_file(write(tmp_path / f"{name}.jsonl", [row(1)])) for name in names])
    assert [[file.path.stem for file in files] for files in found] == [list(names[:2]), [names[2]]]
    assert [file.seed for file in found[0]] == [0, 42]


def test_shards_of_a_run_are_one_seed_and_two_answers_with_one_seed_are_refused(tmp_path):
    def part(name: str, seed: int, *rows: Any) -> ScoredFile:
        return score_file(write(tmp_path / f"{name}.jsonl", list(rows), {"benchmark": "ERQA", "seed": seed}))

    shards = [part("a", 0, row(1), row(2, "B")), part("b", 0, row(3))]
    (files,) = settings_of([*shards, part("c", 1, row(1), row(2), row(3))])
    summary = summarise(files)
    assert summary.seeds == (0, 1)
    assert summary.overall.per_seed == pytest.approx((2 / 3, 1))
    with pytest.raises(BenchmarkError, match=r"a\.jsonl and .*d\.jsonl both answer question 2 .*same seed \(0\)"):
        settings_of([*shards, part("d", 0, row(2))])


def test_a_benchmark_whose_categories_are_not_there_says_so(tmp_path, caplog):
    summary = summarise([scored(tmp_path, row(1), row(2, "B"), benchmark="SPAR-Bench")])
    assert summary.overall.score == pytest.approx(0.5)
    assert "no row has a category that counts (original_question_type)" in caplog.text


def test_the_memory_of_a_summary_does_not_grow_with_the_longest_name(tmp_path):
    def peak(*kinds: str) -> int:
        rows = [row(i, problem_type=kinds[0] if i else kinds[-1]) for i in range(2_001)]
        file = scored(tmp_path, *rows)
        tracemalloc.start()
        summary = summarise([file], resamples=10)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [f.questions for f in summary.figures if f.kind is FigureKind.TYPE] == [2_000, 1]
        return used

    assert peak("box", "x" * 5_000) < peak("box", "x") + 2_000_000


def test_the_same_seed_gives_the_same_intervals(tmp_path):
    files = [
        score_file(write(tmp_path / f"r.seed_{n}.jsonl", [row(i, "AB"[i % n % 2]) for i in range(50)])) for n in (3, 5)
    ]
    assert summarise(files, seed=1).figures == summarise(files, seed=1).figures
    assert summarise(files, seed=1).figures != summarise(files, seed=2).figures


def test_right_or_wrong_answers_of_one_seed_have_wilson_s_interval_overall_and_in_every_category(tmp_path):
    (figure, *_) = summarise([scored(tmp_path, row(0, "A"))]).figures
    assert figure.interval == wilson(1, 1)
    file = scored(tmp_path, *(row(i, "AB"[i % 3 % 2]) for i in range(50)))
    assert {figure.interval for figure in summarise([file]).figures} == {wilson(33, 50)}


# ---------------------------------------------------------------------- reports and the command


def test_a_report_holds_every_figure_flaw_and_difference_in_all_its_forms(tmp_path):
    hostile = "| <script> `x` $y_{$ \n \ud800"
    rows = [row(hostile, hostile, category=hostile), row(2, "(A)", category="b"), row(3, "", category="b")]
    file = scored(tmp_path, *rows, run={"benchmark": "ERQA", "model": hostile, "seed": 0})
    json_file, md, png, csv = write_report(tmp_path / "out", [(summarise([file]), [file])])
    (setting,) = json.loads(json_file.read_text())["settings"]
    assert [f["name"] for f in setting["figures"]][:1] == ["overall"]
    assert setting["flaws"] == {"empty answer": 1}
    assert len(setting["differences"]) == 1
    assert len(setting["problems"]) == 1
    text = md.read_text()
    assert "| overall | 3 | 33.33 |" in text
    assert "<script>" not in text.replace(r"\<script\>", "")
    assert "empty answer 1." in text
    assert "the published program would have ended" in text
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(csv.read_text().splitlines()) >= 4


def test_the_bars_of_a_report_are_its_scores_and_their_whiskers_its_intervals(tmp_path, drawn):
    ours = [row(i, "AB"[i % 3 == 0], category="near" if i % 2 else "far") for i in range(40)]
    theirs = [row(i, "AB"[i % 5 == 0], category="near" if i % 2 else "far") for i in range(40)]
    summaries = []
    for name, rows in (("ours", ours), ("theirs", theirs)):
        (tmp_path / name).mkdir()
        file = scored(tmp_path / name, *rows, run={"benchmark": "ERQA", "model": name, "seed": 0})
        summaries.append((summarise([file], resamples=50), [file]))
    write_report(tmp_path / "out", summaries)
    (figure,) = drawn
    (axis,) = figure.axes
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert {"overall", "near", "far"} <= set(names)
    bars = [container for container in axis.containers if hasattr(container, "patches")]
    assert [container.get_label() for container in bars] == [summary.name for summary, _ in summaries]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [summary.name for summary, _ in summaries]
    assert "95 % intervals" in axis.get_xlabel()
    for container, (summary, _) in zip(bars, summaries, strict=True):
        (_, _, (whiskers,)) = container.errorbar.lines
        ends = [(low, high) for (low, _), (high, _) in whiskers.get_segments()]
        found = [(bar.get_width(), *span) for bar, span in zip(container.patches, ends, strict=True)]
        expected = [figure for figure in summary.figures if label(figure) in names]
        assert len(found) == len(expected) == len(names)
        for (width, low, high), one in zip(found, expected, strict=True):
            assert width == pytest.approx(100 * one.score)
            assert (low, high) == pytest.approx((100 * one.interval.low, 100 * one.interval.high))
            assert 0 < low < width < high < 100


def test_a_plot_of_many_or_long_names_stays_a_picture_and_tables_have_them_all_in_short(tmp_path):
    rows = [row(i, category=f"{'long ' * 1_000}{i}", problem_type="riddle " * 1_000) for i in range(300)]
    file = scored(tmp_path, *rows, row("x"), benchmark="ERQA")
    _, md, png, _ = write_report(tmp_path / "out", [(summarise([file], resamples=10), [file])])
    width, height = Image.open(png).size
    assert width < 2_000
    assert 100 * 30 < height < 100 * 60
    assert max(map(len, md.read_text().splitlines())) < 1_000
    assert md.read_text().count("| long long") == 300


def test_the_command_scores_folders_and_says_what_was_wrong(tmp_path):
    (tmp_path / "runs").mkdir()
    write(tmp_path / "runs" / "a.jsonl", [row(1), row(2, "")])
    write(tmp_path / "runs" / "a.shard-0-of-2.jsonl", [row(9)])
    result = CliRunner().invoke(app, ["score", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "empty answer: 1 rows" in result.output
    assert "50.00" in result.output
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["settings"][0]["rows"] == 2
    published = CliRunner().invoke(app, ["score", str(tmp_path / "runs"), "--scorer", "published"])
    assert "published, %" in published.output
    wrong = CliRunner().invoke(app, ["score", str(tmp_path / "runs"), "--scorer", "lenient"])
    assert wrong.exit_code == 2
    assert CliRunner().invoke(app, ["score", str(tmp_path)]).exit_code == 0


def run_score(*arguments: object, **more: Any) -> Result:
    return CliRunner(**more).invoke(app, ["score", *map(str, arguments)])


def test_texts_of_a_file_reach_the_terminal_without_surrogates_markup_and_control_characters(tmp_path):
    odd = "[/bold]\x1b[31m\ud800"
    run = {"benchmark": "ERQA", "model": odd, "seed": 0}
    rows = [row(1, category=odd), row(2, "B", category="b", problem_type=odd)]
    path = write(tmp_path / "r.jsonl", rows, run)
    other = write(tmp_path / "s.jsonl", [row(1, category=odd), row(2, category="b")], run)
    result = run_score(path, "--against", other, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    assert "[/bold]\ufffd[31m\ufffd" in result.output
    assert "\x1b[31m" not in result.output
    whole = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert odd in [figure["name"] for figure in whole["settings"][0]["figures"]]


def test_a_terminal_that_cannot_show_a_character_is_sent_another(tmp_path):
    path = write(tmp_path / "r.jsonl", [row(1, category="größer")], {"benchmark": "ERQA"})
    result = run_score(path, charset="ascii")
    assert result.exit_code == 0, result.exception
    assert r"gr\xf6\xdfer" in result.output


def test_what_cannot_be_scored_in_a_folder_is_left_out_with_a_warning_and_refused_by_name(tmp_path):
    write(tmp_path / "good.jsonl", [row(1)])
    for name, text in (("empty", ""), ("begun", '{"run": {"benchmark": "ERQA"}}\n')):
        (tmp_path / f"{name}.jsonl").write_text(text)
    write(tmp_path / "unknown.jsonl", [row(1)], {"benchmark": "mine"})
    result = run_score(tmp_path, tmp_path / "good.jsonl", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.exception
    for name in ("empty.jsonl: there is no", "begun.jsonl: there is no", "unknown.jsonl: no benchmark 'mine'"):
        assert f"left out: {tmp_path / name}" in result.output
    (setting,) = json.loads((tmp_path / "out" / "scores.json").read_text())["settings"]
    assert setting["files"] == [str(tmp_path / "good.jsonl")]
    assert isinstance(run_score(tmp_path / "empty.jsonl").exception, BenchmarkError)
    (tmp_path / "good.jsonl").unlink()
    with pytest.raises(BenchmarkError, match="none of the 3 result files"):
        CliRunner().invoke(app, ["score", str(tmp_path)], catch_exceptions=False)


ODD = ["", "\ud800", "os:popen", ":x", ".a:x", "[/b]", "\x1b[31m", "ERQA", "x.yaml", *QuestionType]
ANY = st.recursive(
    st.sampled_from(ODD) | st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: (
        st.lists(x, max_size=3) | st.dictionaries(st.text() | st.sampled_from(["name", "response"]), x, max_size=3)
    ),
    max_leaves=4,
)
ROW_KEYS = (
    "question_id", "response", "answer", "problem_type", "error", "finish", "category", "original_question_type",
    "cycle_category", "question", "options", "images", "turns", "seed",
)  # fmt: skip
RUN_KEYS = ("model", "backend", "preset", "provenance", "ablation", "seed", "format", "shard")


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(ROW_KEYS), st.sampled_from(ODD) | ANY, min_size=2), min_size=1, max_size=4
    ),
    st.dictionaries(st.sampled_from(RUN_KEYS), st.sampled_from(ODD) | ANY),
    st.sampled_from(["ERQA", "VSI-Bench", "SPAR-Bench", "HRBench4K", None]),
)
def test_no_value_of_any_key_stops_the_command(tmp_path_factory, rows, run, benchmark):
    folder = tmp_path_factory.mktemp("any")
    changed = [row(f"question {i}") | values for i, values in enumerate(rows)]
    first = write(folder / "a.jsonl", [row("first"), *changed], run | {"benchmark": benchmark})
    second = write(folder / "b.jsonl", [row("first", "B"), *changed], {"benchmark": benchmark})
    with pytest.MonkeyPatch.context() as patch:  # a picture takes longer than everything else
        patch.setattr("vilavt_eval.report.plot", lambda summaries, path: None)
        result = run_score(first, "--against", second, "--out", folder / "out", "--resamples", 10)
    assert result.exit_code == 0, result.exception
    whole = json.loads((folder / "out" / "scores.json").read_text())
    assert whole["comparison"]["contrasts"][0]["questions"] >= 1
    assert "first" in (folder / "out" / "flips.html").read_text(encoding="utf-8")


def test_a_missing_package_is_named_with_the_smallest_extra_that_brings_it(monkeypatch, capsys):
    def missing(**_: str) -> None:
        raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    monkeypatch.setattr(cli, "app", missing)
    for command, extra in (("score", "eval"), ("sft", "train")):
        monkeypatch.setattr(sys, "argv", ["vilavt", command])
        with pytest.raises(SystemExit):
            cli.main()
        assert f'pip install "vilavt-hf[{extra}]"' in capsys.readouterr().err


# ---------------------------------------------------------------------- options


def test_options_of_a_row_are_compared_by_letter_and_text(tmp_path):
    depth = {"question": "Which is closer?", "options": ["A is closer", "B is closer"]}
    listed = {"question": "Which is closer?\n(A) B is closer\n(B) A is closer"}
    found = scored(
        tmp_path,
        row(1, "(B) B is closer", "B", **depth),
        row(2, "B is closer", "B", **depth),
        row(3, "B. A is closer", "B", **depth),
        row(4, "A is closer", "B", **listed),
        row(5, "A: B is closer", "A", **listed),
        row(6, "B. B is closer", "B", **listed),
        row(7, "(B) B is closer", "B"),
        row(8, "B", "B", options=7, question=3),  # of anybody's file
    )
    assert found.scores("strict") == pytest.approx([1, 1, 0, 1, 1, 0, 1, 1])
    assert found.problems == ()


def test_a_right_answer_that_is_none_of_the_options_is_a_flaw(tmp_path):
    found = scored(tmp_path, row(1, "E", "E", options=["left", "right"]), row(2, "AB", "AB"))
    assert found.flaws == {Flaw.BAD_TARGET: 2}


def test_a_right_answer_is_read_without_tag_and_box(tmp_path):
    targets = ["<answer>D</answer>", "\\boxed{D}", "$\\boxed{\\text{D}}$", "<think>so</think><answer>D</answer>"]
    found = scored(tmp_path, *(row(i, "(D)", target) for i, target in enumerate(targets)))
    assert found.scores("strict") == pytest.approx([1, 1, 1, 1])
