"""Runs every part of `benchmarks/gpu.py` once, at the size of the 7B model on a GPU, and holds it to what must be true.

Needs torch >= 2.11, transformers 5.17 to 5.24, pillow, pytest and this checkout, no network. The figures are written
to `gpu.json` in the checkout, or where VILAVT_GPU_JSON says. VILAVT_GPU_TINY=1 runs it all at a size for CPUs.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = "VILAVT_GPU_TINY" in os.environ


def pytest_collection_modifyitems(items):
    if TINY or torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU; VILAVT_GPU_TINY=1 runs it on the CPU"))


@pytest.fixture(scope="session")
def report():
    """`report.part(name)`: figures of a part, which runs when it is first asked for."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu

    if TINY:
        torch.set_num_threads(1)  # tests run side by side
    file = Path(os.environ.get("VILAVT_GPU_JSON", ROOT / "gpu.json"))
    return gpu.Report(gpu.TINY if TINY else gpu.Setting(), file)
