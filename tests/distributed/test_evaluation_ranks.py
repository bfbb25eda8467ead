"""Ranks that torchrun started share a benchmark, and write the file that one process writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vilavt_hf.tiny.benchmark import write_benchmark

TINY = Path(__file__).parents[2] / "examples" / "vilavt-tiny"
VILAVT = str(Path(sys.executable).with_name("vilavt"))


@pytest.fixture(scope="module")
def definition(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("tiny"), 20)


def evaluate(definition, out, *launcher):
    command = [*launcher, VILAVT, "eval", str(definition), "--model", str(TINY), "--out", str(out)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--set", "precision=float32"], env=settings, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def rows(out):
    (path,) = out.rglob("*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in found]


def test_two_ranks_write_the_file_of_one_process(definition, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python")
    ranks = evaluate(definition, tmp_path / "two", *torchrun)
    alone = evaluate(definition, tmp_path / "one")
    assert "shard 0/2 is done" in ranks.stderr or "shard 1/2 is done" in ranks.stderr
    assert len(rows(tmp_path / "one")) > 20
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    # The rank that was last shows the scores, once.
    assert ranks.stdout.count("overall") == alone.stdout.count("overall") == 1
