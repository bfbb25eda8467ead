"""Reward curves: what verl, EasyR1 and kept rollouts say of a run, episodes that zoom included."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vilavt_core.errors import LogError
from vilavt_core.presets import Limits
from vilavt_rl.cli import app
from vilavt_rl.curves import RewardLog, reward_panels
from vilavt_rl.data import Row
from vilavt_rl.errors import RowError
from vilavt_rl.replay import Rollout, SampledTurn, write_rollouts
from vilavt_rl.rewards import Reward

VERL = [
    {"step": 0, "data": {"val-core/tiny-one/acc/mean@1": 0.5, "val-core/tiny-sum/acc/mean@1": 0.1,
                         "val-aux/tiny-one/zoomed/mean@1": 0.25, "val-aux/tiny-sum/zoomed/mean@1": 0.75}},
    {"step": 1, "data": {"critic/score/mean": 0.4, "num_turns/mean": 3.0, "training/global_step": 1}},
    {"step": 2, "data": {"critic/score/mean": 0.6, "num_turns/mean": 5.0, "training/global_step": 2,
                         "val-core/tiny-one/acc/mean@1": 0.75, "val-aux/tiny-one/zoomed/mean@1": 1.0}},
]  # fmt: skip
EASYR1 = [
    {"step": 0, "val": {"reward_score": 0.2, "accuracy_reward": 0.3, "zoomed_reward": 0.5}},
    {"step": 1, "reward": {"overall": 0.45, "accuracy": 0.4, "zoomed": 0.6, "turns": 1.8},
     "critic": {"score": {"mean": 1}}},
    {"step": 2, "reward": {"overall": 0.55, "accuracy": 0.5, "zoomed": 0.7, "turns": 1.9}},
]  # fmt: skip


def written(path: Path, lines: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def keep_rollouts(run: Path, step: int, *earned: tuple[float, int], temperature: float = 1.0) -> None:
    """Rollouts of a step: reward and zooms of each; an episode has a turn more than zooms."""
    row = Row(id="r", question="what?", answer="7", images=("a.png",), question_type="numerical")
    write_rollouts(
        run,
        [
            Rollout(
                row, tuple(SampledTurn([1], [-0.5]) for _ in range(zooms + 1)), "default", Limits(), "0" * 64,
                temperature, step, "g", Reward(value, float(value > 0), 1.0, zooms, zooms + 1).metrics(),
            )
            for value, zooms in earned
        ],
    )  # fmt: skip


def test_verls_log_has_rewards_turns_and_what_validations_found(tmp_path: Path) -> None:
    log = RewardLog.read(written(tmp_path / "vilavt" / "tiny.jsonl", VERL))
    assert log.reward == [(1, 0.4), (2, 0.6)]
    assert log.turns == [(1, 1.5), (2, 2.5)]
    assert log.held_out_accuracy == [(0, pytest.approx(0.3)), (2, 0.75)]
    assert log.held_out_zoomed == [(0, pytest.approx(0.5)), (2, 1.0)]
    assert not log.zoomed
    assert not log.accuracy


def test_the_kept_rollouts_of_a_verl_run_say_how_many_training_episodes_zoom(tmp_path: Path) -> None:
    metrics = written(tmp_path / "vilavt" / "tiny.jsonl", VERL)
    checkpoints = tmp_path / "checkpoints" / "vilavt" / "tiny"  # verl's default
    keep_rollouts(checkpoints, 1, (1.0, 0), (0.0, 0), (1.0, 2), (0.5, 0))
    keep_rollouts(checkpoints, 2, (1.0, 1), (0.0, 1))
    keep_rollouts(checkpoints, 2, (1.0, 0), (1.0, 0), temperature=0.0)  # of a validation
    log = RewardLog.read(metrics)
    assert log.zoomed == [(1, 0.25), (2, 1.0)]
    assert log.accuracy == [(1, 0.75), (2, 0.5)]
    assert log.turns == [(1, 1.5), (2, 2.5)], "verl's own, of every step"
    elsewhere = tmp_path / "elsewhere"
    keep_rollouts(elsewhere, 2, (1.0, 0), (0.0, 1))
    assert RewardLog.read(metrics, elsewhere).zoomed == [(2, 0.5)]
    alone = RewardLog.read(elsewhere)
    assert (alone.reward, alone.zoomed, alone.turns) == ([(2, 0.5)], [(2, 0.5)], [(2, 1.5)])


@pytest.mark.parametrize("name", ["experiment_log.jsonl", ""])
def test_easyr1s_log_has_them_all(tmp_path: Path, name: str) -> None:
    written(tmp_path / "run" / "experiment_log.jsonl", EASYR1)
    log = RewardLog.read(tmp_path / "run" / name)
    assert log.reward == [(1, 0.45), (2, 0.55)]
    assert log.accuracy == [(1, 0.4), (2, 0.5)]
    assert log.zoomed == [(1, 0.6), (2, 0.7)]
    assert log.turns == [(1, 1.8), (2, 1.9)]
    assert log.held_out_accuracy == [(0, 0.3)]
    assert log.held_out_zoomed == [(0, 0.5)]


def test_the_names_that_are_read_are_those_that_our_rewards_log() -> None:
    from vilavt_rl.verl.reward import score_fields

    earned = Reward(1.0, 1.0, 1.0, 2, 3)
    assert {"overall", "accuracy", "zoomed", "turns"} <= earned.metrics().keys()
    assert {"acc", "zoomed"} <= score_fields(earned).keys()
    assert (earned.metrics()["zoomed"], earned.metrics()["turns"]) == (1.0, 3.0)
    assert Reward(0.0, 0.0, 0.0, 0, 1).metrics()["zoomed"] == 0.0


def test_runs_of_both_trainers_are_drawn_over_each_other(tmp_path: Path, drawn) -> None:
    ours = written(tmp_path / "vilavt" / "ours.jsonl", VERL)
    written(tmp_path / "theirs" / "experiment_log.jsonl", EASYR1)
    out = tmp_path / "curve.png"
    done = CliRunner().invoke(app, ["curve", str(ours), str(tmp_path / "theirs"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.stat().st_size > 1000
    (figure,) = drawn
    found = {
        axis.get_ylabel(): {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axis.lines}
        for axis in figure.axes
    }
    assert found["reward of an episode"]["ours: reward"] == [(1, 0.4), (2, 0.6)]
    assert found["reward of an episode"]["theirs: reward"] == [(1, 0.45), (2, 0.55)]
    assert found["episodes that zoom"]["theirs: in training"] == [(1, 0.6), (2, 0.7)]
    assert found["episodes that zoom"]["ours: held out"] == [(0, pytest.approx(0.5)), (2, 1.0)]
    assert found["turns of an episode"] == {"ours: turns": [(1, 1.5), (2, 2.5)], "theirs: turns": [(1, 1.8), (2, 1.9)]}
    assert {axis.get_ylabel(): axis.get_ylim() for axis in figure.axes}["episodes that zoom"] == (0, 1)
    assert list(found) == [panel.label for panel in reward_panels([])]


def test_what_is_no_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="missing: there is no such file or folder"):
        RewardLog.read(tmp_path / "missing")
    with pytest.raises(LogError, match=r"x\.jsonl: no reward in it; name what verl's or EasyR1's file logger wrote"):
        RewardLog.read(written(tmp_path / "x.jsonl", [{"step": 1, "loss": 2.0}]))
    (tmp_path / "folder").mkdir()
    with pytest.raises(RowError, match="no rollouts; set trace_every"):
        RewardLog.read(tmp_path / "folder")
    done = CliRunner().invoke(app, ["curve", str(tmp_path / "x.jsonl"), "--rollouts", "a", "--rollouts", "b"])
    assert done.exit_code == 2
