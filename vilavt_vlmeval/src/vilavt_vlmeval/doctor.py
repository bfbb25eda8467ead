"""What `vilavt doctor` says about VLMEvalKit: which one it is, where its runner is, whether it will know our names.

It is not imported: that would switch gradients off in the process that asks.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from vilavt_core.doctor import Check, Status, guarded

from . import _autoload, compat


def checks(checkpoint: Path | None, load: bool) -> Iterator[Check]:
    """See `vilavt_core.doctor`."""
    yield guarded("vlmeval", compat.distribution_found, compat.INSTALL)
    yield guarded("vlmeval runner", lambda: str(compat.runner()), "run from a checkout, or pip install ms-vlmeval")
    yield guarded("vlmeval names", _hook)


def _hook() -> Check:
    remedy = "start evaluations with `python -m vilavt_vlmeval`"
    if not _autoload.switched_on():
        return Check("vlmeval names", Status.NOTE, f"{_autoload.SWITCH}=0", remedy)
    if _autoload.hook_installed() or _autoload.TARGET in sys.modules:
        return Check("vlmeval names", Status.OK, "registered when vlmeval is imported")
    return Check(
        "vlmeval names", Status.NOTE, "vilavt_vlmeval.pth was not run at the start of this interpreter", remedy
    )
