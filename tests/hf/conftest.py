"""Tests of the model compute on one thread: two of them run side by side."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
