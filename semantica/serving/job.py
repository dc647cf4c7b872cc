"""What a request asks for, what a server offers, and who makes it: values that also cross between processes."""

from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from semantica.inputs import SINGLE, TEXT

# what may follow /v1/images/ in an address: inputs that a request gives
ENDPOINTS = {"variations": (SINGLE,), "generations": (TEXT,), "edits": (SINGLE, TEXT)}


@dataclass(frozen=True, eq=False)
class Job:
    """Images that one request asks for.

    picture: uint8 `[S, S, 3]` at the card's side, or None. prompt: or None.
    seed: image j is a function of the seed, j and the other fields, see `semantica.solvers.noise`.
    """

    picture: np.ndarray | None
    prompt: str | None
    n: int
    steps: int
    guidance: float
    solver: str
    seed: int

    @property
    def key(self) -> Hashable:
        """Jobs of one key may be made together."""
        return self.picture is None, self.prompt is None, self.steps, self.guidance, self.solver


@dataclass(frozen=True)
class Card:
    """What a server offers.

    name: the model's. created: when it was written, Unix time. size: side of its images in pixels. side: of the
    squares that pictures become before its encoder sees them, 0 for none. inputs: `image`, `text` or both. whole: it
    takes no request that leaves one of its inputs out. steps, guidance, solver: of requests that name none. solvers:
    that requests may name.
    """

    name: str
    created: int
    size: int
    side: int
    inputs: tuple[str, ...]
    whole: bool
    steps: int
    guidance: float
    solver: str
    solvers: tuple[str, ...]

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Of `ENDPOINTS`, those that this model serves."""
        there = {*self.inputs}
        return tuple(
            name for name, given in ENDPOINTS.items() if {*given} == there or ({*given} < there and not self.whole)
        )


class Full(Exception):
    """More is waiting than may wait; `seconds` until it is worth asking again."""

    def __init__(self, seconds: int):
        # its only argument, so that it survives the way between processes
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return f"the queue is full: ask again in {self.seconds} s"


class Closed(Exception):
    """Nothing is made any more; the message says why."""


class Failed(Exception):
    """The engine has failed at a job; its process has said how."""


class Maker(Protocol):
    """Who makes images: `semantica.serving.batcher.Batcher`, or whatever stands in front of several of them.

    A task that is cancelled while it waits in `submit` gives its job up. error: what nobody can make images after.
    """

    error: BaseException | None

    async def submit(self, job: Job) -> np.ndarray:
        """uint8 `[n, H, W, 3]`. Raises `Full`, `Closed`, `Failed`; `UserError` for what the model does not take."""

    def admit(self, count: int) -> None:
        """Whether `submit` would take so many images now, asked before they are uploaded. Raises `Full`, `Closed`."""

    def expect(self) -> AbstractContextManager[None]:
        """Held from a request's headers until its images are there: a batch may wait for what is yet to come."""

    def ready(self) -> str:
        """Why nothing can be made now; "" if it can."""

    def queued(self) -> int:
        """Images that wait."""

    def close(self, why: str = "") -> None:
        """Take nothing more; what was taken is still made."""

    def abort(self, why: str) -> None:
        """Take nothing more, and refuse what waits or is made."""

    def join(self, seconds: float) -> bool:
        """Whether all that it was made of has ended by then."""
