"""A request to stop, without PyTorch: known before anything slow is imported."""

import signal


class Preemption:
    """SIGTERM or SIGINT ask for an end after the running step; a second SIGINT is Python's own.

    A context manager for the main thread; called, it says whether a signal came.
    """

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Preemption":
        self.before = {kind: signal.signal(kind, self._ask) for kind in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def __call__(self) -> bool:
        return self.asked

    def _ask(self, kind: int, _) -> None:
        self.asked = True
        if kind == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
