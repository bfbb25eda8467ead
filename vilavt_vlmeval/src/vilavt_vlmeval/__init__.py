"""ViLaVT for VLMEvalKit: install this package, and every VLMEvalKit of the environment knows ``--model ViLaVT-7B``.

Importing it imports nothing else; see `_autoload` for how VLMEvalKit comes to know it.
"""

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("vilavt-vlmeval")
