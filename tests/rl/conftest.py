"""Fixtures of the RL tests: the shipped tiny checkpoint."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # one machine; token auth is tested by its own test

TINY = Path(__file__).parents[2] / "examples" / "vilavt-tiny"


@pytest.fixture(scope="session")
def tiny() -> Path:
    return TINY


@pytest.fixture(scope="session")
def processor(tiny: Path):
    from vilavt_hf import VilavtProcessor

    return VilavtProcessor.from_pretrained(tiny)


@pytest.fixture(scope="session")
def tokenizer(processor):
    return processor.tokenizer
