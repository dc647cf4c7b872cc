"""How the host's memory is given back."""

import ctypes
import sys

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep what is freed on the host for the next allocation, in this process from now on; False where that is not up
    to glibc.

    By default glibc gives each large block back to the system at once and asks for it anew, and the system then clears
    every page of it again: in a training step on a CPU, where each activation is such a block, a tenth of the time. The
    process stays as large as it was at its peak, so this is for a process that has one job (mallopt(3);
    `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_MAX_` are the same from outside).
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # -1: never trimmed
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
