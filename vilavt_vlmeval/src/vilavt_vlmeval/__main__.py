"""``python -m vilavt_vlmeval …``: VLMEvalKit's own ``run.py`` with our models registered.

For environments that forbid ``.pth`` files, or where this package is only on ``PYTHONPATH``; works under torchrun.
"""

import runpy
import sys

from vilavt_core.ending import ending

from . import _autoload, compat


def main() -> None:
    """Register, then run the runner with the arguments of this process."""
    with ending("vilavt_vlmeval"):
        _run()


def _run() -> None:
    script = compat.runner()
    _autoload.install()
    sys.argv[0] = str(script)
    if script.parent.name == "vlmeval":
        runpy.run_module("vlmeval.run", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
