"""The figures of the README and docs are those of the shipped checkpoint."""

import json
from pathlib import Path

import pytest

from vilavt_hf.checkpoint import fingerprint
from vilavt_hf.tiny.evaluate import table

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "vilavt-tiny"


@pytest.mark.parametrize("page", ["README.md", "docs/tiny.md"])
def test_the_held_out_table_is_the_measured_one(page):
    report = json.loads((TINY / "heldout.json").read_text())
    assert table(report) in (ROOT / page).read_text()


def test_the_measured_checkpoint_is_the_shipped_one():
    report = json.loads((TINY / "heldout.json").read_text())
    assert report["fingerprint"] == fingerprint(TINY)
