"""Ranks that torchrun started share a benchmark, and write the file that one process writes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vilavt_hf.tiny.benchmark import tasks, write_benchmark

pytestmark = pytest.mark.nightly("four processes; tests/eval/test_command.py holds how shards of a run are merged")

TINY = Path(__file__).parents[2] / "examples" / "vilavt-tiny"
VILAVT = str(Path(sys.executable).with_name("vilavt"))


@pytest.fixture(scope="module")
def definition(tmp_path_factory):
    return write_benchmark(tmp_path_factory.mktemp("tiny"), tasks("heldout", 12))


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python")


def evaluate(definition, out, *launcher, code=0):
    command = [*launcher, VILAVT, "eval", str(definition), "--model", str(TINY), "--out", str(out)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--set", "precision=float32"], env=settings, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def rows(out):
    (path,) = out.rglob("*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in found]


def test_two_ranks_write_the_file_of_one_process(definition, tmp_path):
    ranks = evaluate(definition, tmp_path / "two", *TORCHRUN)
    alone = evaluate(definition, tmp_path / "one")
    assert "shard 0/2 is done" in ranks.stderr or "shard 1/2 is done" in ranks.stderr
    assert len(rows(tmp_path / "one")) > 12
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    # The rank that was last shows the scores, once.
    assert ranks.stdout.count("overall") == alone.stdout.count("overall") == 1


def test_a_rank_whose_questions_fail_does_not_end_the_other_one(tmp_path):
    asked = tasks("heldout", 5)
    definition = write_benchmark(tmp_path / "tiny", asked)
    for number in range(1, len(asked), 2):  # all of the second rank's questions: it ends at once
        for file in (tmp_path / "tiny" / "pictures").glob(f"{number}[-.]*"):
            file.write_bytes(b"no picture")
    ranks = evaluate(definition, tmp_path / "out", *TORCHRUN, code=1)
    found = rows(tmp_path / "out")[1:]
    assert [bool(row["error"]) for row in found] == [number % 2 == 1 for number in range(len(asked))]
    assert ranks.stdout.count("overall") == 1
    assert f"{len(asked) // 2} of {len(asked)} questions ended in an error" in ranks.stderr
    assert re.search(r"exitcode\s*: 3\b", ranks.stderr)
