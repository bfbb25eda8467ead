"""Curves of training runs: what is drawn is what was logged, of runs that are still going on too."""

import json
import math
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vilavt_core.cli import app, main
from vilavt_core.curves import Curve, Panel, Style, draw, read_log, run_names, running_mean
from vilavt_core.errors import LogError
from vilavt_core.training_curves import TrainingLog, training_panels

STEPS = [{"step": n, "loss": 2.0 / n, "learning_rate": 1e-4 * n, "grad_norm": 0.5 + n} for n in range(1, 5)]
VALIDATIONS = [
    {"step": 0, "loss": 3.0, "tokens_right": 0.2},
    {"step": 4, "loss": 0.75, "tokens_right": 0.6, "answers_right": 0.25, "questions": 8},
]


def lines(*figures: dict) -> str:
    return "".join(json.dumps(one) + "\n" for one in figures)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "log.jsonl").write_text(lines(*STEPS))
    (folder / "validation.jsonl").write_text(lines(*VALIDATIONS))
    return folder


def curve(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, ["curve", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def plotted(figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points of every line, by its label, by the label of its axes."""
    return {
        axis.get_ylabel(): {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axis.lines}
        for axis in figure.axes
    }


def test_a_runs_curves_are_its_log(run, drawn, tmp_path):
    assert curve(run, "--out", tmp_path / "c.png").strip() == str(tmp_path / "c.png")
    (figure,) = drawn
    found = plotted(figure)
    assert found["loss per token"]["loss"] == [(line["step"], line["loss"]) for line in STEPS]
    assert found["loss per token"]["validation"] == [(0, 3.0), (4, 0.75)]
    assert found["share of questions"] == {"answers right": [(4, 0.25)]}
    assert found["learning rate"] == {"learning rate": [(line["step"], line["learning_rate"]) for line in STEPS]}
    assert found["gradient norm"] == {"gradient norm": [(line["step"], line["grad_norm"]) for line in STEPS]}
    assert figure.axes[-1].get_xlabel() == "step"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(found["loss per token"])
    with Image.open(tmp_path / "c.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_several_runs_share_each_panel_and_each_has_its_name_and_colour(run, drawn, tmp_path):
    other = tmp_path / "second"
    other.mkdir()
    (other / "log.jsonl").write_text(lines(*({**line, "loss": line["loss"] + 1} for line in STEPS)))
    curve(run, other, "--out", tmp_path / "c.svg")
    (figure,) = drawn
    found = plotted(figure)
    assert [y for _, y in found["loss per token"]["second: loss"]] == [line["loss"] + 1 for line in STEPS]
    assert list(found["share of questions"]) == ["first: answers right"]  # the other one asked none
    colours = {line.get_label().partition(":")[0]: line.get_color() for line in figure.axes[0].lines}
    assert colours.keys() == {"first", "second"}
    assert len(set(colours.values())) == 2
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")


def test_a_run_in_progress_is_drawn_up_to_its_last_whole_line(run, drawn, tmp_path):
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    curve(run, "--out", tmp_path / "c.png")
    assert [step for step, _ in plotted(drawn[0])["loss per token"]["loss"]] == [1, 2, 3, 4]
    assert len(read_log(run / "log.jsonl")) == 4


def test_a_checkpoint_of_any_trainer_of_transformers_has_curves_too(tmp_path):
    for step in (2, 10):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        history = [{"step": n, "loss": 1.0 / n, "learning_rate": 1e-5} for n in range(1, step + 1)]
        history += [{"step": step, "eval_loss": 0.5, "eval_runtime": 3.0}, {"step": step, "train_runtime": 9.0}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    whole = TrainingLog.read(tmp_path / "run")
    assert [line["step"] for line in whole.steps] == list(range(1, 11)), "the newest checkpoint: 10, not 2"
    assert [(line["step"], line["loss"]) for line in whole.validations] == [(10, 0.5)]
    early = tmp_path / "run" / "checkpoint-2"
    assert TrainingLog.read(early) == TrainingLog.read(early / "trainer_state.json")
    assert len(TrainingLog.read(early).steps) == 2


def test_a_mean_starts_with_the_first_values_and_survives_a_loss_that_is_no_number():
    assert running_mean([(1, 4.0), (2, 2.0), (3, 3.0)]) == [(1, 4.0), (2, 3.0), (3, 3.0)]
    assert running_mean([(1, 4.0), (2, math.nan), (3, math.inf), (4, 2.0)]) == [(1, 4.0), (4, 3.0)]
    constant = running_mean([(step, 1.5) for step in range(100)])
    assert [value for _, value in constant] == pytest.approx([1.5] * 100)


def test_runs_are_called_by_as_much_of_their_path_as_tells_them_apart():
    assert run_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert run_names([Path("/x/a/run"), Path("/x/b/run"), Path("/x/run.jsonl")]) == ["a/run", "b/run", "x/run"]
    with pytest.raises(LogError, match="/x/a: this run is named twice"):
        run_names([Path("/x/a"), Path("/x/b"), Path("/x/a")])


def test_names_of_runs_are_no_formulas_and_hide_no_curve(drawn, tmp_path):
    panel = Panel("y", (Curve("_a$^$", "z", [(1, 1.0)]), Curve("b", "z", [(1, 2.0)], Style.MARKED)))
    draw([panel], tmp_path / "c.png")
    assert len(drawn[0].axes[0].get_legend().get_texts()) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "missing: there is no such file or folder"),
        (lambda folder: folder, "no log.jsonl, and no trainer_state.json in it or its checkpoints"),
        (lambda folder: write(folder / "log.jsonl", ""), "there is nothing to draw yet; no step was logged"),
        (lambda folder: write(folder / "x.jsonl", '{"step": 1, "data": {}}'), "x.jsonl: no line has a loss"),
        (lambda folder: write(folder / "trainer_state.json", "[]"), "trainer_state.json: not the state of a trainer"),
        (lambda folder: write(folder / "trainer_state.json", "{"), "trainer_state.json: not the state of a trainer"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path, make, message):
    with pytest.raises(LogError, match=message):
        draw(training_panels([("run", TrainingLog.read(make(tmp_path)))]), tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_missing_extra_is_named_in_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("sys.argv", ["vilavt", "curve", str(run), "--out", str(tmp_path / "c.png")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == 'vilavt: this command needs matplotlib: pip install "vilavt-hf[eval]"\n'


def test_an_ending_that_no_chart_has_is_refused_before_a_log_is_read(tmp_path):
    for name, said in (("c.pgn", "did you mean"), ("c", "a file without an ending")):
        done = CliRunner().invoke(app, ["curve", str(tmp_path / "missing"), "--out", str(tmp_path / name)])
        assert isinstance(done.exception, LogError)
        assert said in str(done.exception)
