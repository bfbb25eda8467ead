"""Tests of the model compute on one thread: two of them run side by side. Nothing of weight is imported here: xdist's
first process, which runs no test, reads this file too.
"""

import logging
import warnings

import pytest


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def only_new_name(monkeypatch):
    """A later transformers: `cache` is the one name, and the old one would be swallowed without a word."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    from vilavt_hf import compat

    def renamed(forward):
        def later(self, *args, cache=None, **kwargs):
            kwargs.pop("past_key_values", None)
            return forward(self, *args, **{name: cache}, **kwargs)

        return later

    name = compat.CACHE  # as the installed one has it
    for parent in (qwen.Qwen2_5_VLModel, qwen.Qwen2_5_VLForConditionalGeneration):
        monkeypatch.setattr(parent, "forward", renamed(parent.forward))
    monkeypatch.setattr(compat, "CACHE", "cache")


@pytest.fixture
def deprecations():
    """What has been said so far about names that will go, by Python's warnings or by the log of transformers."""
    from transformers.utils import logging as transformers_logging

    class Heard(logging.Handler):
        def __init__(self):
            super().__init__()
            self.lines = []

        def emit(self, record):
            self.lines.append(record.getMessage())

    log, heard = transformers_logging.get_logger("transformers"), Heard()
    transformers_logging.warning_once.cache_clear()  # what was said to another test counts too
    log.addHandler(heard)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [
            line for line in [*heard.lines, *(str(one.message) for one in caught)] if "deprecated" in line.lower()
        ]
    log.removeHandler(heard)
