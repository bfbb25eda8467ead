"""Memory of training on a CPU."""

import os
import sys


def keep_freed_memory() -> None:
    """Restart with an allocator that does not give memory back: glibc would unmap and fault in every large tensor anew,
    which makes this training several times slower on some virtual machines.
    """
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    if sys.platform == "linux" and not wanted.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})
