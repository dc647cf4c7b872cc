"""Dynamic batching: requests wait in one queue, and one thread makes images of those that go together."""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from semantica.errors import LOST, UserError, device_failure
from semantica.serving.job import Closed, Failed, Full, Job
from semantica.serving.runner import Abandoned, Part

logger = logging.getLogger(__name__)
# how many times longer a batch waits while requests are on their way
UPLOADING = 4
# (parts, wanted) -> images of each part
Run = Callable[[Sequence[Part], Callable[[], bool]], list[np.ndarray]]


class Ticket:
    """A job on its way: how many of its images were begun, what was made of them, and who waits for it."""

    def __init__(self, job: Job):
        self.job, self.begun, self.made = job, 0, []
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future = self.loop.create_future()
        self.arrived = time.monotonic()
        # who asked has left, or was told of a failure
        self.gone = False

    def answer(self, give: Callable[[Any], None], value: Any) -> None:
        """From the engine's thread, to a task that may have left, in a loop that may be closed."""

        def told() -> None:
            if not self.future.done():
                give(value)

        self.gone = True
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(told)


class Batcher:
    """A `semantica.serving.job.Maker` over one engine.

    The oldest job always goes first, and others of its key join it in the order in which they came; so none waits for
    ever. A job of more images than one batch takes goes in several. A batch starts when it is full, or `wait` seconds
    after its oldest job has come and the batch before it has ended: those who were just answered come back together
    with those who waited meanwhile, instead of taking turns with them in halves. For requests that are being uploaded
    or decoded it waits a few times longer.

    Args:
        run: makes a batch, such as a `Runner`. most: images of one batch.
        queue: images that may wait; what is being made does not count.
        seen: told of every batch: images, seconds, and seconds that its oldest job has waited.
        begin: called in the engine's thread before the first batch.
    """

    def __init__(
        self,
        run: Run,
        most: int,
        wait: float,
        queue: int,
        seen: Callable[[int, float, float], None] = lambda *_: None,
        begin: Callable[[], None] = lambda: None,
    ):
        self.run, self.most, self.wait, self.queue, self.seen, self.begin = run, most, wait, queue, seen, begin
        self.waiting: deque[Ticket] = deque()
        self.running: list[Ticket] = []
        self.changed = threading.Condition()
        # why nothing is taken; what the engine has failed at for good
        self.closed = ""
        self.error: BaseException | None = None
        self.begun = False
        # requests that are answered at the moment, and those of them whose job is here
        self.asked, self.here = 0, 0
        # seconds for an image, of late; when the last batch has ended
        self.pace, self.ended = 0.0, 0.0
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> "Batcher":
        self.thread.start()
        return self

    async def submit(self, job: Job) -> np.ndarray:
        ticket = Ticket(job)
        with self.changed:
            self.admit(job.n)
            self.waiting.append(ticket)
            self.here += 1
            self.changed.notify()
        try:
            return await ticket.future
        finally:
            self.here -= 1
            # cancelled: what has not begun is dropped here, the rest at the next step
            if not ticket.gone:
                ticket.gone = True
                with self.changed, suppress(ValueError):
                    self.waiting.remove(ticket)

    def admit(self, count: int) -> None:
        if self.closed:
            raise Closed(self.closed)
        # an empty queue takes a job of any size
        if (queued := self.queued()) and queued + count > self.queue:
            raise Full(min(60, max(1, math.ceil(queued * self.pace))))

    @contextmanager
    def expect(self) -> Iterator[None]:
        self.asked += 1
        try:
            yield
        finally:
            with self.changed:
                self.asked -= 1
                self.changed.notify()

    def due(self, oldest: Ticket) -> float:
        """When a batch that is not full starts."""
        wait = self.wait * (UPLOADING if self.asked > self.here else 1)
        return max(oldest.arrived, self.ended) + wait

    def ready(self) -> str:
        return self.closed or ("" if self.begun else "the engine is warming up")

    def queued(self) -> int:
        with self.changed:
            return sum(ticket.job.n - ticket.begun for ticket in self.waiting)

    def close(self, why: str = "the server is shutting down") -> None:
        """Take nothing more; what was taken is still made."""
        with self.changed:
            self.closed = self.closed or why
            self.changed.notify()

    def abort(self, why: str) -> None:
        """Take nothing more, and refuse what waits or runs."""
        self.close(why)
        with self.changed:
            left = [*self.waiting, *self.running]
            self.waiting.clear()
        for ticket in left:
            ticket.answer(ticket.future.set_exception, Closed(why))

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended by then."""
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def _work(self) -> None:
        try:
            self.begin()
            self.begun = True
            while batch := self._next():
                self._make(batch)
                self.running, self.ended = [], time.monotonic()
        # whoever waits must hear of it, whatever it was
        except BaseException as error:
            self.error = error
            self.abort("the engine has failed: see the server's log")

    def _next(self) -> list[tuple[Ticket, range]]:
        """The next batch, once it is due; empty when there will be none."""
        with self.changed:
            while True:
                batch = self._joined()
                if batch:
                    left = self.due(batch[0][0]) - time.monotonic()
                    if left <= 0 or self.closed or sum(len(images) for _, images in batch) == self.most:
                        return self._taken(batch)
                    self.changed.wait(left)
                elif self.closed:
                    return []
                else:
                    self.changed.wait()

    def _joined(self) -> list[tuple[Ticket, range]]:
        batch, room = [], self.most
        for ticket in self.waiting:
            if room and ticket.job.key == self.waiting[0].job.key:
                count = min(room, ticket.job.n - ticket.begun)
                batch.append((ticket, range(ticket.begun, ticket.begun + count)))
                room -= count
        return batch

    def _taken(self, batch: list[tuple[Ticket, range]]) -> list[tuple[Ticket, range]]:
        for ticket, images in batch:
            ticket.begun = images.stop
            if ticket.begun == ticket.job.n:
                self.waiting.remove(ticket)
        self.running = [ticket for ticket, _ in batch]
        return batch

    def _make(self, batch: list[tuple[Ticket, range]]) -> None:
        start, count = time.monotonic(), sum(len(images) for _, images in batch)
        try:
            parts = [Part(ticket.job, images) for ticket, images in batch]
            made = self.run(parts, lambda: any(not ticket.gone for ticket, _ in batch))
        except Abandoned:
            return
        except Exception as error:
            # what is wrong with one must not be told to the others
            if len(batch) > 1 and not device_failure(error):
                for one in batch:
                    self._make([one])
            else:
                self._failed(batch, error)
            return
        seconds = time.monotonic() - start
        self.pace = seconds / count if not self.pace else 0.8 * self.pace + 0.2 * seconds / count
        self.seen(count, seconds, start - batch[0][0].arrived)
        for (ticket, _), images in zip(batch, made, strict=True):
            ticket.made.append(images)
            if sum(map(len, ticket.made)) == ticket.job.n and not ticket.gone:
                ticket.answer(ticket.future.set_result, np.concatenate(ticket.made))

    def _failed(self, batch: list[tuple[Ticket, range]], error: Exception) -> None:
        with self.changed:
            for ticket, _ in batch:
                with suppress(ValueError):
                    self.waiting.remove(ticket)
        theirs, failure = isinstance(error, UserError), device_failure(error)
        if lost := failure is not None and LOST in failure:
            self.error = error
            self.close(failure)
        for ticket, _ in batch:
            ticket.answer(ticket.future.set_exception, error if theirs else Failed())
        if not theirs:
            logger.error("a batch failed: %s", failure or error, exc_info=None if failure else error)
        if lost:
            self.abort(failure)
