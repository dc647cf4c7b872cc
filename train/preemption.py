"""A request to stop, without PyTorch: known before anything slow is imported."""

import os
import signal
import socket
import sys
import threading
import time

# seconds that processes have to agree on stopping, or three times their longest step: a scheduler kills after some 30
PATIENCE = 15.0


class Stop:
    """Ends a run after its running step; this one never does."""

    def __call__(self) -> bool:
        """Whether to stop; asked once in each step."""
        return False

    def agreed(self) -> None:
        """All processes know of it: what is left to do is to save."""


class Preemption(Stop):
    """SIGTERM or SIGINT ask for an end after the running step; a second SIGINT is Python's own.

    A context manager for the main thread. Where that thread waits for other processes, deep in C++, it handles no
    signals. So another one hears of them too, and where the processes do not agree in time, since one of them hangs or
    never came, it ends this one with code 1; checkpoints are intact.
    """

    def __init__(self, patience: float = PATIENCE):
        self.asked, self.patience = False, patience
        self.last, self.longest = None, 0.0
        self.settled = threading.Event()

    def __enter__(self) -> "Preemption":
        self.heard, told = socket.socketpair()
        told.setblocking(False)
        self.told, self.wakeup = told, signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        self.before = {kind: signal.signal(kind, self._ask) for kind in (signal.SIGTERM, signal.SIGINT)}
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.settled.set()
        for kind, handler in self.before.items():
            signal.signal(kind, handler)
        signal.set_wakeup_fd(self.wakeup)
        self.told.close()

    def __call__(self) -> bool:
        now = time.monotonic()
        self.longest = max(self.longest, now - self.last if self.last else 0.0)
        self.last = now
        return self.asked

    def agreed(self) -> None:
        self.settled.set()

    def _ask(self, kind: int, _) -> None:
        self.asked = True
        if kind == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _watch(self) -> None:
        with self.heard:
            # each byte is a signal's number; none once the other end is closed
            while numbers := self.heard.recv(64):
                if {signal.SIGTERM, signal.SIGINT} & {*numbers}:
                    self.asked = True
                    threading.Thread(target=self._give_up, daemon=True).start()

    def _give_up(self) -> None:
        limit = max(self.patience, 3 * self.longest)
        if os.environ.get("WORLD_SIZE", "1") == "1" or self.settled.wait(limit):
            return
        if os.environ.get("RANK", "0") == "0":
            # the bar's line comes before
            print(
                f"\nsemantica: asked to stop, and another of the processes did not answer within {limit:.0f} s: "
                "the same command continues from the newest complete checkpoint",
                file=sys.stderr,
            )
        leave(1)


def leave(code: int) -> None:
    """End this process here and now: of an exchange that another process broke off, threads may still be at work, and
    whatever tensors they let go of while the interpreter ends abort it (pytorch/pytorch pull request 179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
