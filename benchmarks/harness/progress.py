"""What a long measurement is doing, on standard error: a bar with the time left, or a line for each phase."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def phase(name: str, total: int | None = None) -> Iterator[tqdm]:
    """A bar to be updated, shown on a terminal only; elsewhere one line says what has begun.

    Args:
        total: of its updates; nothing is shown where there are none.
    """
    # pytest and the suite's runner have taken sys.stderr
    stream = sys.__stderr__
    bar = total != 0 and stream.isatty()
    if total != 0 and not bar:
        print(name, file=stream, flush=True)
    with tqdm(total=total, desc=name, file=stream, leave=False, disable=not bar) as shown:
        yield shown


def time_left(seconds: float) -> str:
    return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"
