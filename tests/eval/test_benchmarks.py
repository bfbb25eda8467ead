"""Definitions of benchmarks: those known by name, those of a user's own, and what is refused."""

from pathlib import Path

import pytest

from vilavt_core.errors import BenchmarkError
from vilavt_eval.definition import Benchmark, known_benchmarks, load_benchmark

NAMES = (
    "EmbSpatial",
    "ERQA",
    "HRBench4K",
    "HRBench8K",
    "MMSI-Bench",
    "SPAR-Bench",
    "SpatialEval-real",
    "ViewSpatial",
    "VSI-Bench",
    "VSI-Bench-video",
    "VStarBench",
)


def own(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_benchmarks_are_known_by_name():
    assert sorted(known_benchmarks()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_known_benchmark_loads_and_its_file_is_named_after_it(name):
    benchmark = load_benchmark(name)
    assert benchmark.name == name
    assert benchmark.title
    assert "thought" in benchmark.hidden


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("vsi_bench", "VSI-Bench"),
        ("VSIBench", "VSI-Bench"),
        ("V*Bench", "VStarBench"),
        ("vstar", "VStarBench"),
        ("ViewSpatial-Bench", "ViewSpatial"),
        ("erqa", "ERQA"),
    ],
)
def test_usual_spellings_of_a_name_are_understood(spelling, name):
    assert load_benchmark(spelling).name == name


def test_every_field_of_a_definition_is_described():
    def described(schema: dict) -> None:
        for key, field in schema.get("properties", {}).items():
            assert "description" in field or "$ref" in field, key
            if "$ref" in field:
                described(parts[field["$ref"].rpartition("/")[2]])

    schema = Benchmark.model_json_schema()
    parts = schema["$defs"]
    described(schema)
    for part in parts.values():
        described(part)
        assert part["description"]


def test_unknown_names_list_the_known_ones():
    with pytest.raises(BenchmarkError, match=r"no benchmark 'ERQB'; known are .*ERQA.*path of a YAML file"):
        load_benchmark("ERQB")


def test_a_definition_of_ones_own_works_by_path_and_can_start_from_a_known_one(tmp_path):
    path = own(
        tmp_path,
        "base: HRBench8K\nname: mine\ntypes: {multiple choice: {suffix: A letter}}\nreport: {rotation: null}\n",
    )
    benchmark, base = load_benchmark(path), load_benchmark("HRBench8K")
    assert benchmark.name == "mine"
    assert benchmark.types["multiple choice"].suffix == "A letter"
    assert benchmark.types["multiple choice"].metric == "multiple choice"
    assert benchmark.report.rotation is None
    assert benchmark.report.category == base.report.category == "category"
    assert benchmark.file == "HRBench8K.json"


def test_a_new_metric_is_a_function_named_in_the_file(tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text("def half(prediction, target):\n    return 0.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = own(tmp_path, "base: ERQA\ntypes: {multiple choice: {metric: 'my_metrics:half'}}\n")
    assert load_benchmark(path, functions=True).types["multiple choice"].metric == "my_metrics:half"


def test_a_function_is_not_even_imported_unless_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "my_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(a, b):\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own(tmp_path, "base: ERQA\ntypes: {multiple choice: {metric: 'my_evil:f'}}\n")
    (tmp_path / "based.yaml").write_text("base: own.yaml\n")
    for name in ("own.yaml", "based.yaml"):
        with pytest.raises(BenchmarkError, match=rf"{name}.*'my_evil:f' is a function.*--allow-functions"):
            load_benchmark(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    load_benchmark(tmp_path / "based.yaml", functions=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: ERQA\nsufix: x\n", "sufix: Extra inputs are not permitted"),
        ("base: ERQA\nkeys: {questoin: x}\n", "keys.questoin"),
        ("base: ERQA\noptions: sometimes\n", "options: Input should be 'question', 'list' or 'either'"),
        ("name: x\ntitle: y\n", "file: Field required; types: Field required; options: Field required"),
        ("base: ERQA\ntypes: {multiple choice: {metric: guess}}\n", "no metric 'guess'; known are multiple choice"),
        ("base: ERQA\ntypes: {multiple choice: {metric: 'no_such:f'}}\n", "No module named 'no_such'"),
        ("base: ERQA\ntypes: {multiple choice: {metric: 'json:__name__'}}\n", "it must be a function"),
        ("base: ERQA\ntypes: {multiple choice: {metric: ':f'}}\n", "metric ':f' cannot be imported: ValueError"),
        ("base: ERQA\ntypes: {multiple choice: {metric: '.a:f'}}\n", "metric '.a:f' cannot be imported: TypeError"),
        ("base: ERQA\ndefault_type: riddle\n", "default_type: 'riddle' is not among types: multiple choice"),
        ("base: MMSI-Bench\nkeys: {question: thought}\n", "hidden: thought cannot be hidden"),
        ("base: VSI-Bench\nreport: {category: null}\n", "category: name the key"),
        ("base: ERQA\nreport: {ungrouped: dropped}\n", "ungrouped: dropped needs groups"),
        ("base: ERQA\nreport: {groups: {a: [x], b: [x]}}\n", "x stand in more than one place"),
        ("base: own.yaml\n", "leads back to"),
        ("base: nothing.yaml\n", "cannot be read: No such file"),
        ("- a\n- b\n", "it must hold keys and values, it is a list"),
        ("a: [\n", "not YAML"),
    ],
)
def test_a_wrong_definition_is_refused_with_file_key_and_remedy(tmp_path, text, message):
    with pytest.raises(BenchmarkError) as caught:
        load_benchmark(own(tmp_path, text), functions=True)
    assert "own.yaml" in str(caught.value)
    assert message in str(caught.value)


def test_easy_and_hard_variants_of_a_type_are_one_category():
    benchmark = load_benchmark("VSI-Bench")
    names = ("object_rel_direction_hard", "object_rel_direction_easy", "route_planning")
    assert [benchmark.category_of({"original_question_type": name}) for name in names] == [
        "object_rel_direction",
        "object_rel_direction",
        "route_planning",
    ]
    assert benchmark.category_of({}) is None
