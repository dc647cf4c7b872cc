"""The host's memory: how it is given back, and how much a process took."""

import ctypes
import sys
from pathlib import Path

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


def peak_resident() -> int:
    """Bytes: this program's largest resident size; Linux's rusage has in it what the process held that started it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
