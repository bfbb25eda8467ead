"""GRPO lifts a model that can zoom and mostly guesses. Half an hour: `nox -s grpo_learns`, not part of CI."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl has an environment of its own")

OUT = os.environ.get("VILAVT_GRPO_LEARNS")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3 * 3600),
    pytest.mark.skipif(OUT is None, reason="takes half an hour; `nox -s grpo_learns` runs it"),
]

ROOT = Path(__file__).parents[2]


def test_grpo_lifts_the_held_out_accuracy_by_ten_points() -> None:
    from vilavt_rl.tiny import read_curve

    work = Path(OUT or "")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    vilavt_rl = [sys.executable, "-m", "vilavt_rl"]
    commands = [
        [*vilavt_rl, "tiny", "checkpoint", "--out", "tiny-start"],
        [*vilavt_rl, "tiny", "data", "--out", "tiny-data"],
        [
            *vilavt_rl,
            "verl",
            str(ROOT / "recipes" / "tiny_cpu.yaml"),
            "actor_rollout_ref.model.path=tiny-start",
            "data.train_files=tiny-data/train.jsonl",
            "data.val_files=tiny-data/val.jsonl",
        ],
        [*vilavt_rl, "tiny", "curve", "vilavt/tiny_cpu.jsonl"],
    ]
    for number, command in enumerate(commands):
        with (work / f"{number}.log").open("w") as log:
            code = subprocess.run(command, cwd=work, stdout=log, stderr=subprocess.STDOUT).returncode
        assert code == 0, (work / f"{number}.log").read_text(encoding="utf-8")[-4000:]
    rewards, accuracies = read_curve(work / "vilavt" / "tiny_cpu.jsonl")
    assert accuracies[0][0] == 0
    assert accuracies[-1][1] >= accuracies[0][1] + 0.1
    assert sum(r for _, r in rewards[-5:]) > sum(r for _, r in rewards[:5])
    assert (work / "curve.png").is_file()
