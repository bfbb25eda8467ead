"""ViLaVT for VLMEvalKit: install this package, and every VLMEvalKit of the environment knows ``--model ViLaVT-7B``.

Importing it imports nothing else: a ``.pth`` file does so at every start of the interpreter (see `_autoload`).
"""

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("vilavt-vlmeval")
