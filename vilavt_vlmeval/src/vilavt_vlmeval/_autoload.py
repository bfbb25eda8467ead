"""Runs at interpreter start, from ``vilavt_vlmeval.pth`` (from ``vilavt_vlmeval.start`` on Python 3.15 and newer).

VLMEvalKit has no plug-in seam: its models are the dict ``vlmeval.config.supported_VLM``. Its own runner, ``vlmutil`` and
every rank of torchrun import that module, so our names are added the moment it has been executed, once, by an import
hook that waits for that one name. Until then nothing is imported: ``import vlmeval.vlm`` would switch gradients off in a
process that only wants to train.
"""

import os
import sys

TARGET = "vlmeval.config"
SWITCH = "VILAVT_VLMEVAL_AUTOLOAD"


class VlmevalFinder:
    """Finds `TARGET` as everybody else would, and has `register` called after it was executed."""

    _busy = False

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """See `importlib.abc.MetaPathFinder`."""
        if name != TARGET or cls._busy:
            return None
        from importlib.util import find_spec

        cls._busy = True
        try:
            spec = find_spec(name)
        finally:
            cls._busy = False
        loader = getattr(spec, "loader", None)
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]
                execute(module)
                remove()
                _register(module)

            loader.exec_module = exec_module  # on this loader only, which serves this module only
        return spec


def install() -> None:
    """Add our names to VLMEvalKit: now if it is loaded, else when it will be. Calling it again changes nothing."""
    if TARGET in sys.modules:
        _register(sys.modules[TARGET])
    elif VlmevalFinder not in sys.meta_path:
        sys.meta_path.insert(0, VlmevalFinder)


def remove() -> None:
    """Take the hook back."""
    if VlmevalFinder in sys.meta_path:
        sys.meta_path.remove(VlmevalFinder)


def autoload() -> None:
    """`install`, unless the environment says ``VILAVT_VLMEVAL_AUTOLOAD=0``."""
    if os.environ.get(SWITCH, "1") != "0":
        install()


def _register(module) -> None:  # type: ignore[no-untyped-def]
    try:
        from .register import register

        register(module.supported_VLM)
    except Exception as error:  # whatever is wrong with us must not stop somebody else's evaluation
        print(f"vilavt-vlmeval: cannot register with VLMEvalKit: {type(error).__name__}: {error}", file=sys.stderr)
