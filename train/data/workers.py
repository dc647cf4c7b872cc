"""How many processes load data: as many as the step can use, by a measurement, as far as there is room."""

import math
import os
import time
from pathlib import Path

import torch

from semantica.errors import UserError
from semantica.images import jpeg_decoder
from semantica.train.data.loading import shared_room, worker_bytes
from semantica.train.data.pairs import Pairs

# the loader is timed for so long, or for so many samples
SECONDS, SAMPLES = 0.5, 64
# of its peak, no training step reaches more; and loading should be faster than it, or pages from disk come too late
BEST_MFU, SPARE = 0.7, 1.25
# beyond this, processes wait for one another's memory
MOST = 32
# the share of the room for shared memory that may be taken: other programs use it too
ROOM = 0.8
CGROUP = Path("/sys/fs/cgroup/cpu.max")


def choose(
    pairs: Pairs, first_index: int, batch: int, asked: int | None, demand: float | None, sharing: int, device: str
) -> tuple[int, str]:
    """How many worker processes one process of a run gets, and why, in words.

    Args:
        batch: samples of each batch of this process. asked: `--workers`. sharing: processes of the run on this machine.
        demand: samples a second that its step can use at most; None where that is not known.
        device: "cuda", where one processor drives the device; or "cpu", where the step needs the processors itself.
    """
    if asked is not None:
        return asked, f"data: {asked} workers, as asked for"
    spare = processors() // sharing - 1 if device == "cuda" else processors() // sharing // 2
    seconds = sample_seconds(pairs, first_index)
    if seconds is None:
        return 1, "data: 1 worker; its speed cannot be measured, for the first samples cannot be read"
    wanted = MOST if demand is None else math.ceil(SPARE * demand * seconds)
    # what comes from afar is mostly waited for
    most = MOST if pairs.data.remote else max(1, min(MOST, spare))
    held = int(min(MOST, ROOM * shared_room() / sharing // worker_bytes(pairs, batch)))
    workers = min(max(1, wanted), most, held)
    step = "the step can use" + (" all there is" if demand is None else f" {demand:,.0f} a second at most")
    decoder = "simplejpeg" if jpeg_decoder() else "Pillow"
    said = f"data: {seconds * 1e3:.2f} ms a sample on one processor (JPEG by {decoder}), {step}: "
    said += "1 worker" if workers == 1 else f"{workers} workers"
    if held < min(wanted, most):
        return workers, f"{said}; shared memory has no room for more, give it more (docker: --shm-size or --ipc=host)"
    if demand is not None and most < wanted:
        return workers, f"{said} of {wanted} that it takes, no more processors: store smaller pictures (pairs --resize)"
    return workers, said


def sample_seconds(pairs: Pairs, first_index: int) -> float | None:
    """Seconds that one processor takes for one sample; None where data fails, which the first batch will report."""
    threads = torch.get_num_threads()
    # as in a worker
    torch.set_num_threads(1)
    try:
        indices = range(first_index, first_index + SAMPLES)
        pairs[first_index]
        began, count = time.perf_counter(), 0
        pairs.prefetch(indices)
        while count < SAMPLES and (count == 0 or time.perf_counter() - began < SECONDS):
            pairs[indices[count]]
            count += 1
        return (time.perf_counter() - began) / count
    except UserError:
        return None
    finally:
        torch.set_num_threads(threads)


def processors() -> int:
    """Processors that this process may use: of its affinity, and of its container's share."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP.read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    # no such file, or "max"
    except (OSError, ValueError):
        return allowed
