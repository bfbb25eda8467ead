"""In every process of a test run: what a machine without CUDA and without a network needs to drive VLMEvalKit.

The runner asks for NCCL whatever the machine; and a benchmark's table that is not the published file, to the byte, is
downloaded. Both are arranged when the runner asks for them, so that processes which do not are left alone.
"""

import importlib.abc
import importlib.util
import sys


class _After(importlib.abc.MetaPathFinder):
    """Calls a function with a module after it was executed."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.change(module)

        spec.loader.exec_module = exec_module
        return spec


def gloo(distributed):
    begin = distributed.init_process_group
    distributed.init_process_group = lambda backend=None, **more: begin("gloo", **more)


def any_table(datasets):
    for known in datasets.DATASET_CLASSES:
        for name in getattr(known, "DATASET_MD5", {}):
            known.DATASET_MD5[name] = None


sys.meta_path[:0] = [_After("torch.distributed", gloo), _After("vlmeval.dataset", any_table)]
