"""Two ranks build the tiny model that one process builds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vilavt_core.checkpoint import inspect_checkpoint
from vilavt_hf.tiny.build import new_model, save_stage
from vilavt_hf.tiny.tiny_model import tiny_processor

pytestmark = [
    pytest.mark.timeout(1100),
    pytest.mark.nightly("two builds on both cores; test_sft_ranks holds the trainer"),
]

SCRIPT = str(Path(__file__).with_name("tiny_ranks.py"))
STARTS = {"one": ("-u",), "two": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with both builds, and the untrained model they start from."""
    folder = tmp_path_factory.mktemp("tiny")
    save_stage(new_model(tiny_processor(), 0), folder / "start")
    for name, options in STARTS.items():
        command = [sys.executable, *options, SCRIPT, str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return folder


def weights(folder):
    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("stage", ["read", "talk"])
def test_both_learn_the_same(built, stage):
    start = weights(built / "start")
    one, two = (weights(built / f"{name}-work" / stage) - start for name in STARTS)
    assert one.norm() > 0.1
    assert (one - two).norm() < 0.01 * one.norm()


def test_the_checkpoint_says_on_how_many_ranks(built):
    for ranks, name in enumerate(STARTS, start=1):
        assert inspect_checkpoint(built / name).complete
        record = json.loads((built / name / "provenance.json").read_text())
        assert [(stage["name"], stage["ranks"]) for stage in record["stages"]] == [("read", ranks), ("talk", ranks)]
