"""Registers our names with VLMEvalKit the moment it is imported.

VLMEvalKit has no plug-in seam: its models are the dict ``vlmeval.config.supported_VLM``. Its own runner, ``vlmutil``
and every rank of torchrun import that module, so our names are added when it has been executed, by an import hook that
waits for that one name and goes away. Until then nothing is imported, neither VLMEvalKit nor torch: ``import
vlmeval.vlm`` would switch gradients off in a process that only wants to train.

The hook is put in place by ``vilavt_vlmeval.pth`` at every start of the interpreter. That line stands for
`VilavtVlmeval` and imports not even this module: the first import from site-packages costs about two milliseconds.
Python 3.15 and newer run `autoload` instead, from ``vilavt_vlmeval.start``.
"""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec as find_ordinarily
from types import ModuleType

TARGET = "vlmeval.config"
SWITCH = "VILAVT_VLMEVAL_AUTOLOAD"

_finding = False


class VilavtVlmeval:
    """A finder for ``sys.meta_path``."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        return registering_spec() if name == TARGET else None


def find_spec(name: str) -> ModuleSpec | None:
    """What the finder of the ``.pth`` file asks, for `TARGET` only; None: the others shall find it."""
    return registering_spec() if switched_on() else None


def registering_spec() -> ModuleSpec | None:
    """`TARGET` as everybody else would find it, except that our names are registered after it was executed."""
    global _finding
    if _finding:
        return None
    _finding = True
    try:
        spec = find_ordinarily(TARGET)
    finally:
        _finding = False
    if spec is not None and spec.loader is not None:
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            remove()
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # this loader serves this module only
    return spec


def install() -> None:
    """Add our names to VLMEvalKit: now if it is loaded, else when it will be. Calling it again changes nothing."""
    if TARGET in sys.modules:
        _register(sys.modules[TARGET])
    elif not any(isinstance(finder, VilavtVlmeval) for finder in sys.meta_path):
        sys.meta_path.insert(0, VilavtVlmeval())


def hook_installed() -> bool:
    """Whether a hook is waiting, the ``.pth`` file's or ours."""
    return any(type(finder).__name__ == VilavtVlmeval.__name__ for finder in sys.meta_path)


def remove() -> None:
    """Take all hooks back."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != VilavtVlmeval.__name__]


def switched_on() -> bool:
    """Whether the environment does not say ``VILAVT_VLMEVAL_AUTOLOAD=0``."""
    return os.environ.get(SWITCH, "1") != "0"


def autoload() -> None:
    """`install`, if it is switched on."""
    if switched_on():
        install()


def _register(module: ModuleType) -> None:
    try:
        from .register import register

        register(module.supported_VLM)
    except Exception as error:  # whatever is wrong with us must not stop somebody else's evaluation
        print(f"vilavt-vlmeval: cannot register with VLMEvalKit: {type(error).__name__}: {error}", file=sys.stderr)
