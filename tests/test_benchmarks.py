"""The benchmarks run, and write the figures that others read; how fast they are decides nothing here."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(name: str, *options: str) -> dict:
        file = tmp_path / "figures.json"
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.setattr(sys, "argv", [name, *options, "--json", str(file)])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return json.loads(file.read_text())

    return run


def test_the_multi_turn_benchmark_does_every_piece_of_work_once(run):
    figures = run("multi_turn.py", "--small", "--repeats", "1")
    assert figures["patches_work_ratio"] == pytest.approx(1, abs=1e-9)
    assert figures["tokens_work_ratio"] == pytest.approx(1, abs=1e-9)
    assert figures["plain_patches_work_ratio"] > 2
    assert figures["plain_tokens_work_ratio"] > 2
    assert {"ratio_total", "ratio_without_decode"} <= set(figures)
    assert max(figures["logit_difference"].values()) < 1e-3


def test_the_benchmark_of_pages_finds_every_picture(run):
    figures = run("view.py", "--small")
    assert figures["pages"] == 20
    assert figures["missing"] == 0
    assert figures["index_bytes"] < 20 * 2000 + 20_000


def test_the_packing_benchmark_wastes_nothing_in_packs(run):
    figures = run("packing.py", "--small", "--samples", "12", "--repeats", "1")
    packed, alone, *padded = figures["rows"]
    assert packed["padding"] == pytest.approx(0, abs=1e-9)
    assert (alone["batches"], alone["padding"]) == ("one sample a batch", pytest.approx(0, abs=1e-9))
    assert [row["padding"] > 0.1 for row in padded] == [True, True]
    assert all(row["loss"] == pytest.approx(packed["loss"], abs=1e-4) for row in figures["rows"])


def test_the_groups_benchmark_reports_every_number_of_groups(run):
    figures = run("vision_groups.py", "--small", "--repeats", "1")
    assert {"ratio_4", "ratio_16"} <= set(figures)
    assert list(figures["seconds"]) == ["1", "4", "16"]


def test_the_generalisation_benchmark_asks_every_row(run):
    figures = run("tiny_generalisation.py", "--questions", "2", "--split", "dev")
    assert [row["questions"] for row in figures] == [5, 5, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert all(0 <= row["low"] <= row["right"] <= row["high"] <= 1 for row in figures)
    assert sum(row["right"] * row["questions"] for row in figures) >= 16  # of 33, some of them without a query


@pytest.mark.nightly("half a minute; tests/eval scores fewer rows")
def test_a_hundred_thousand_rows_are_scored_right_within_a_gigabyte(run):
    figures = run("scoring_speed.py", "--rows", "100000")
    for name, score in figures["expected"].items():
        assert figures["found"][name] == pytest.approx(score, abs=1e-9)
    assert figures["found"]["overall"] == pytest.approx(sum(figures["expected"].values()) / 4, abs=1e-9)
    assert figures["flaws"] == {"empty answer": 33_333}
    assert figures["peak_mb"] < 1000


@pytest.mark.nightly("half a minute of fresh interpreters; test_imports.py holds what they load")
def test_the_start_up_benchmark_reports_every_case_of_every_checkout(run):
    some = "vilavt_(core|hf)|help|check"
    figures = run("startup.py", "--repeats", "1", "--cases", some, "--beside", str(BENCHMARKS.parent))
    light = {"import vilavt_core", "vilavt --help", "vilavt data check"}
    assert set(figures["cases"]) == light | {"import vilavt_hf"}
    for checkouts in figures["cases"].values():
        assert set(checkouts) == {"here", "beside"}
        assert checkouts["here"]["cpu_seconds"] > 0
    torch = figures["cases"]["import vilavt_hf"]["here"]["peak_mb"]
    assert all(figures["cases"][case]["here"]["peak_mb"] < torch / 2 for case in light)


ONLY_WHAT_A_GPU_MACHINE_HAS = """
import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from packaging.requirements import Requirement

there, found = ["torch", "transformers", "pillow", "pytest"], set()
while there:
    name = there.pop().lower().replace("_", "-")
    if name not in found:
        found.add(name)
        try:
            wanted = map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            continue
        there += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
missing = {
    module
    for module, distributions in packages_distributions().items()
    if not found & {name.lower().replace("_", "-") for name in distributions}
}


class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        places = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec else []
        return None if name in missing and any("site-packages" in place for place in places) else spec


sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""
"""A plugin of pytest: what torch, transformers, pillow and pytest do not bring along is not installed."""


@pytest.mark.nightly("a minute; it measures what tests/hf holds")
def test_the_gpu_suite_runs_from_a_bare_checkout_at_a_tiny_size(tmp_path):
    (tmp_path / "bare_machine.py").write_text(ONLY_WHAT_A_GPU_MACHINE_HAS)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("PYTEST")}
    env |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env |= {"VILAVT_GPU_TINY": "1", "VILAVT_GPU_JSON": str(tmp_path / "gpu.json"), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bare_machine", "tests/gpu"]
    run = subprocess.run(command, env=env, cwd=BENCHMARKS.parent, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout
    parts = {"golden", "reuse", "batch", "gradient", "conversation", "groups", "training"}
    assert parts <= set(json.loads((tmp_path / "gpu.json").read_text()))


@pytest.mark.nightly("half a minute: it starts a process for each of seven steps")
def test_the_benchmark_of_real_sizes_does_every_step(run):
    figures = run("real_size.py", "--shape", "3b", "--small")
    steps = figures["steps"]
    assert list(steps) == ["inspect", "convert", "doctor", "load", "encode", "prefill", "decode"]
    done = figures["conversation"]
    assert done["patches"] == 12 * 8 * 3  # the picture, and two crops that are enlarged to its size
    assert done["decoded"] >= 30  # a call of two regions, and an answer: 39
    assert steps["decode"]["planned_mb"] > steps["load"]["planned_mb"] > done["imported_mb"]
    assert steps["decode"]["peak_mb"] >= steps["load"]["peak_mb"] >= done["imported_mb"]  # highest so far


def test_the_benchmark_of_precision_finds_no_difference_where_there_is_none(run):
    figures = run("precision.py", "--model", "wide", "--small")
    rows = {row["compared"]: row for row in figures["rows"]}
    exact = rows["fp32: turn by turn, whole"]
    for which in ("ours", "stock"):
        assert exact[which]["max"] < 1e-3
        assert exact[which]["flips_per_1000"] == 0
        assert rows["whole: fp32, bf16"][which]["max"] > 10 * exact[which]["max"]
        assert exact[which]["tokens"] == 4 * 8


def test_the_benchmark_of_precision_asks_about_one_image_and_several(run):
    figures = run("precision.py", "--model", "tiny", "--questions", "1", "--kinds", "one", "sum-across")
    (exact,) = (row for row in figures["rows"] if row["compared"] == "fp32: turn by turn, whole")
    assert figures["conversations"] == 2
    assert exact["ours"]["max"] < 1e-3
    assert exact["ours"]["flips_per_1000"] == 0


def test_the_benchmark_of_work_outside_the_model_asks_the_same_of_both_ways(run):
    figures = run("outside_model.py", "--small", "--questions", "3", "--concurrency", "2", "--repeats", "1")
    for way in ("before", "now"):
        assert figures[way]["outside the model"] > figures[way]["preparing patches"] > 0
        assert figures[way]["in the model"] > 0
        assert 0 < figures[way]["share"] < 1
