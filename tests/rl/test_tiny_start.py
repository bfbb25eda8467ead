"""The checkpoint that GRPO starts from on a CPU."""

from dataclasses import replace

import torch

from vilavt_core.checkpoint import inspect_checkpoint
from vilavt_hf.tiny import build as building
from vilavt_rl import tiny


def test_the_start_goes_through_its_stages_and_resumes(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    stages = tiny.start_stages()
    assert [(stage.name, stage.steps) for stage in stages[-2:]] == [
        ("talk", tiny.TALK_STEPS),
        ("guess", tiny.GUESS_STEPS),
    ]
    monkeypatch.setattr(tiny, "start_stages", lambda: [replace(stage, steps=1, batch=2, warmup=1) for stage in stages])
    monkeypatch.setattr(building, "PROBED", 1)
    record = tiny.build_start(tmp_path / "start")
    assert [stage["name"] for stage in record["stages"]] == ["read", "place", "talk", "guess"]
    assert "vilavt-rl tiny checkpoint" in record["notes"][0]
    assert inspect_checkpoint(tmp_path / "start").complete
    (tmp_path / "start").rename(tmp_path / "first")
    assert tiny.build_start(tmp_path / "start", resume=True) == record
