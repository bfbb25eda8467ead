"""Time and memory of one call, told by the kernel."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measured(call: Callable[[], Any]) -> tuple[Any, float, int]:
    """What it returns or raises, its seconds, and by how many bytes the process grew at the most meanwhile.

    Bound the seconds by tens: what is guarded took minutes or had no end, and a loaded machine makes seconds of tenths.
    """
    Image.core.clear_cache()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _status("VmRSS"), time.perf_counter()
    try:
        result = call()
    except Exception as error:
        result = error
    seconds = time.perf_counter() - began
    return result, seconds, max(0, _status("VmHWM") - before)
