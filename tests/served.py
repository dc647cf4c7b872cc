"""Servers in threads of the test's process, over a real model or over an engine that a test holds still."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import numpy as np

from semantica.pipelines.sample import load_pipeline
from semantica.serving.app import Served, make_app
from semantica.serving.batcher import Batcher
from semantica.serving.job import Card, Job
from semantica.serving.limits import Limits
from semantica.serving.metrics import Metrics
from semantica.serving.runner import Abandoned, Part, Runner, card_of
from semantica.serving.server import Server, address, listening

STORED = Path(__file__).parent / "stored"
PICTURE = STORED / "images" / "condition-0.png"
CARD = Card("held", 1, 8, 4, ("image",), True, 4, 1.5, "ddim", ("ddim", "dpmpp_2m"))
BOTH = replace(CARD, inputs=("image", "text"), whole=False)
# one for all: each would read the machine's certificates; a connection for each request
HTTP = httpx.Client(verify=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
# seconds that nothing here takes: a test fails instead of hanging
LONG = 60
LIMITS = Limits()


def job(seed: int = 0, n: int = 1, **changes) -> Job:
    return replace(Job(np.zeros((4, 4, 3), np.uint8), None, n, 4, 1.5, "ddim", seed), **changes)


def until(true: Callable[[], bool]) -> None:
    """Wait for something that will be so; a test fails if it never is."""
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


@dataclass
class Held:
    """An engine that begins a batch, and ends it when a test says so; an image's pixels are its job's seed."""

    batches: list[list[Part]] = field(default_factory=list)
    abandoned: int = 0
    bad: int | None = None

    def __post_init__(self):
        self.begun, self.going, self.free = threading.Semaphore(0), threading.Semaphore(0), False

    def __call__(self, parts: Sequence[Part], wanted: Callable[[], bool]) -> list[np.ndarray]:
        self.batches.append(list(parts))
        self.begun.release()
        while not self.free and not self.going.acquire(timeout=0.01):
            if not wanted():
                self.abandoned += 1
                raise Abandoned
        if any(part.job.seed == self.bad for part in parts):
            raise ValueError("a bad job")
        return [
            np.stack([np.full((8, 8, 3), (part.job.seed + i) % 251, np.uint8) for i in part.images]) for part in parts
        ]

    def wait(self) -> None:
        """Until another batch has begun."""
        assert self.begun.acquire(timeout=LONG)

    def release(self) -> None:
        """No batch is held any more."""
        self.free = True

    @property
    def seeds(self) -> list[list[tuple[int, int]]]:
        """Seed and number of images of every part of every batch."""
        return [[(part.job.seed, len(part.images)) for part in batch] for batch in self.batches]


@dataclass
class Live:
    """A server that runs: where it is, and what it is made of."""

    url: str
    batcher: Batcher
    server: Server
    metrics: Metrics
    card: Card

    @property
    def api(self) -> str:
        return f"{self.url}/v1"

    def figures(self) -> dict[str, float]:
        """Prometheus' figures, `name{label=value,...}` -> number."""
        from prometheus_client.parser import text_string_to_metric_families

        found = {}
        for family in text_string_to_metric_families(HTTP.get(f"{self.url}/metrics").text):
            for name, labels, value, *_ in family.samples:
                found[name + "".join(f" {key}={each}" for key, each in sorted(labels.items()))] = value
        return found


@contextmanager
def live(
    run,
    card: Card,
    limits: Limits = LIMITS,
    most: int = 4,
    wait: float = 0.0,
    queue: int = 8,
    grace: float = 20,
    **more,
) -> Iterator[Live]:
    """A server over an engine, as `semantica serve` puts it together."""
    metrics = Metrics()
    batcher = Batcher(run, most, wait, queue, metrics.batch, **more).start()
    app = make_app(Served(card, batcher, metrics), limits)
    with listening("127.0.0.1", 0) as listener:
        server = Server(app, limits, batcher, grace)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Live(address(listener, False), batcher, server, metrics, card)
        finally:
            server.should_exit = True
            thread.join(LONG)
            batcher.close()
            assert batcher.join(LONG) and not thread.is_alive()


@contextmanager
def modelled(model: Path, **options) -> Iterator[Live]:
    """A server over a model on the CPU."""
    pipeline = load_pipeline(model, "cpu")
    card = card_of(pipeline, model, "", 4, None, "dpmpp_2m")
    runner = Runner(pipeline, 4)
    with live(runner, card, **options) as running:
        yield running
