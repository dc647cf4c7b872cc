"""What a long piece of work is doing, on standard error: a bar with the time left, or a line now and then."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

# seconds between two signs of life
EVERY = 20.0


@contextmanager
def phase(name: str, total: int | None = None, every: float = EVERY) -> Iterator[tqdm]:
    """A bar to be updated, on a terminal; elsewhere a line when it begins, and one now and then while it lasts.

    Nothing of it runs in between but a thread that sleeps: what is measured inside is not disturbed.

    Args:
        total: of its updates; nothing is shown where there are none.
        every: seconds from line to line, and after which a bar shows the time although nothing was done.
    """
    # pytest and the suite's runner have taken sys.stderr
    stream, began, over = sys.__stderr__, time.perf_counter(), threading.Event()
    bar = total != 0 and stream.isatty()
    if total != 0 and not bar:
        print(name, file=stream, flush=True)

    def tell(shown: tqdm) -> None:
        while not over.wait(every):
            if bar:
                shown.refresh()
            else:
                print(f"{name}: {so_far(shown.n, shown.total, time.perf_counter() - began)}", file=stream, flush=True)

    with open(os.devnull, "w") as nowhere:
        looks = dict(file=stream) if bar else dict(file=nowhere, mininterval=every)
        with tqdm(total=total, desc=name, leave=False, **looks) as shown:
            teller = threading.Thread(target=tell, args=(shown,), daemon=True)
            if total != 0:
                teller.start()
            try:
                yield shown
            finally:
                over.set()
                if total != 0:
                    teller.join()


def so_far(done: int, total: int | None, seconds: float) -> str:
    """How far something is after a time, and what is left at this speed."""
    after = f"after {spelled(seconds)}"
    if not total:
        return f"at it {after}"
    left = f", {time_left(seconds / done * (total - done))}" if done else ""
    return f"{done} of {total} {after}{left}"


def spelled(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def time_left(seconds: float) -> str:
    return f"about {spelled(seconds)} left"
