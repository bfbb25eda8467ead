"""Lets the torchvision of the default package index (a CUDA build on x86-64) import beside a CPU-only torch.

vLLM imports torchvision's Python code, none of its operators. On import torchvision describes two operators that its
C++ library would have defined; beside a CPU torch that library cannot load, so they are declared here first. A ``.pth``
file runs this in every process of the environment, because vLLM starts several; it costs nothing until torchvision is
imported.
"""

import importlib.abc
import sys
from typing import Any

_SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, operator):
                    library.define(_SCHEMA.format(operator))
            _declared.append(library)  # a library that is collected takes its operators with it


sys.meta_path.insert(0, _BeforeTorchvision())
