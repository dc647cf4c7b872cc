"""Ray Serve makes the images: replicas of the engine, as many as are asked for; the HTTP application stays in front.

What is asked of a replica that ends is asked of another one, once: images are a function of their job, so they are the
same, and a job that was accepted is answered with images or with an error.
"""

import asyncio
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from semantica.errors import UserError, first_line
from semantica.serving.engine import begin
from semantica.serving.job import Card, Closed, Full, Job

if TYPE_CHECKING:
    from semantica.serving.command import ServeConfig

# images, seconds, and seconds that the oldest job has waited, of a batch
Batch = tuple[int, float, float]
# seconds that a replica may take to load its model, and how old the news of replicas may be
LOADING, NEWS = 600.0, 1.0
# seconds between the questions that Ray asks a replica
HEALTH = 2.0


class Replica:
    """An engine and its batcher in a process of Ray's, which asks for its health and puts another in its place."""

    def __init__(self, config: "ServeConfig"):
        self.batches: list[Batch] = []
        self.problem: UserError | None = None
        try:
            self.card, self.batcher = begin(config, lambda *batch: self.batches.append(batch))
        # whoever deploys it is to hear of it in one line, and Ray would try again
        except UserError as error:
            self.problem = error
            return
        # nothing is asked of it before that
        while self.batcher.ready() and not self.batcher.closed:
            time.sleep(0.02)

    async def describe(self) -> tuple[Card, int]:
        """What is served, and images of one batch."""
        if self.problem is not None:
            raise self.problem
        return self.card, self.batcher.most

    async def make(self, job: Job) -> tuple[np.ndarray, list[Batch]]:
        """The images of a job, and the batches that were made since the last one."""
        if self.problem is not None:
            raise Closed(str(self.problem))
        try:
            images = await self.batcher.submit(job)
        except Closed:
            # an engine that is lost refuses at once, so that its replica looks the least busy one and would be asked
            # for everything until Ray has found it ill; one whose process has ended is asked for nothing more
            if self.batcher.error is not None:
                os._exit(1)
            raise
        batches, self.batches = self.batches, []
        return images, batches

    def check_health(self) -> None:
        """Raises where no images can be made any more."""
        if self.problem is not None or self.batcher.closed:
            raise RuntimeError(str(self.problem or self.batcher.closed))


class Replicas:
    """A `semantica.serving.job.Maker` over the replicas of a deployment.

    Args:
        handle: of the deployment. most: images that may be on their way, waiting or being made.
        seen: as of `semantica.serving.batcher.Batcher`.
        running: how many replicas there are; asked in a thread.
        end: ends the deployment.
    """

    # replicas are replaced: nothing ends the server but a signal
    error = None

    def __init__(
        self,
        handle: Any,
        most: int,
        seen: Callable[[int, float, float], None],
        running: Callable[[], int],
        end: Callable[[], None],
    ):
        self.handle, self.most, self.seen, self.running, self.end = handle, most, seen, running, end
        # images of each request, by what tells it that the server stops
        self.waiting: dict[asyncio.Future, int] = {}
        self.closed = ""
        # seconds for an image, of late
        self.pace = 0.0
        self.asker = ThreadPoolExecutor(1, "replicas")
        self.news: Future | None = None
        self.asked, self.there = time.monotonic(), True

    async def submit(self, job: Job) -> np.ndarray:
        self.admit(job.n)
        stopped = asyncio.get_running_loop().create_future()
        self.waiting[stopped] = job.n
        ahead, start = self.queued(), time.monotonic()
        task = asyncio.ensure_future(self.made(job))
        try:
            await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Closed(self.closed)
            images, batches = task.result()
        finally:
            del self.waiting[stopped]
            task.cancel()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await task
        took = (time.monotonic() - start) / ahead
        self.pace = took if not self.pace else 0.8 * self.pace + 0.2 * took
        for batch in batches:
            self.seen(*batch)
        return images

    async def made(self, job: Job) -> tuple[np.ndarray, list[Batch]]:
        """What a replica makes of a job, or another one where that has ended."""
        for last in (False, True):
            response = self.handle.make.remote(job)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except RayTaskError as error:
                if last or not isinstance(error.cause, Closed):
                    raise error.cause from error
            # a process that has ended, or a node with the images that were made on it
            except (RayError, RayServeException) as error:
                if last:
                    raise Closed(f"two replicas in turn have ended ({first_line(error)})") from error
        raise AssertionError

    def admit(self, count: int) -> None:
        if self.closed:
            raise Closed(self.closed)
        # an empty queue takes a job of any size
        if (queued := self.queued()) and queued + count > self.most:
            raise Full(min(60, max(1, math.ceil(queued * self.pace))))

    def expect(self) -> contextlib.AbstractContextManager[None]:
        # what is uploaded here is no news to a replica
        return contextlib.nullcontext()

    def ready(self) -> str:
        if self.news is not None and self.news.done():
            with contextlib.suppress(Exception):
                self.there = self.news.result() > 0
            self.news, self.asked = None, time.monotonic()
        elif self.news is None and time.monotonic() - self.asked > NEWS and not self.closed:
            self.news = self.asker.submit(self.running)
        return self.closed or ("" if self.there else "no replica is running")

    def queued(self) -> int:
        return sum(self.waiting.values())

    def close(self, why: str = "the server is shutting down") -> None:
        """Take nothing more; what was taken is still made."""
        self.closed = self.closed or why

    def abort(self, why: str) -> None:
        """Take nothing more, and refuse what is on its way."""
        self.close(why)
        for stopped in self.waiting:
            if not stopped.done():
                stopped.set_result(None)

    def join(self, seconds: float) -> bool:
        """End the deployment."""
        self.asker.shutdown(cancel_futures=True)
        self.end()
        return True


def start(config: "ServeConfig", seen: Callable[[int, float, float], None]) -> tuple[Card, Replicas]:
    """What is served, and who makes it: a deployment on the cluster that RAY_ADDRESS names or this node belongs to, or
    on this machine alone.

    Raises:
        UserError: the model cannot be used, Ray does not start, or its cluster has no room for the fewest replicas.
    """
    least, most = config.replicas
    # keys are for those in front; a replica may run elsewhere
    own = dataclasses.replace(
        config, model=config.model.resolve(), engine=config.replica_engine, api_key=(), api_key_file=None
    )
    joined = ray.is_initialized()
    if not joined:
        try:
            ray.init(include_dashboard=False, logging_level="WARNING", log_to_driver=False)
        # of a node that does not come up Ray says so in an exception of no kind
        except Exception as error:
            ray.shutdown()
            raise UserError(f"Ray does not start or answer here ({first_line(error)}): see its log") from error
    name = f"semantica-{uuid4().hex[:8]}"

    def running() -> int:
        found = serve.status().applications[name].deployments[Replica.__name__]
        return found.replica_states.get("RUNNING", 0)

    def end() -> None:
        with contextlib.suppress(Exception):
            serve.delete(name)
        if not joined:
            ray.shutdown()

    needs = {"num_cpus": 1, "num_gpus": int(config.device == "cuda")}
    try:
        check_room(least, needs)
        # the server in front is ours: Ray listens nowhere
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(
            Replica,
            # one batch that is made, and one that comes together
            max_ongoing_requests=2 * config.ongoing,
            autoscaling_config={
                "min_replicas": least, "max_replicas": most, "target_ongoing_requests": config.ongoing,
            },
            ray_actor_options=needs,
            health_check_period_s=HEALTH,
            graceful_shutdown_timeout_s=config.grace,
        )  # fmt: skip
        handle = serve.run(deployment.bind(own), name=name, route_prefix=None)
        card, batch = handle.describe.remote().result(timeout_s=LOADING)
    # whoever is interrupted leaves nothing behind in a cluster of others
    except BaseException as error:
        end()
        if isinstance(error, RayTaskError):
            raise error.cause from error
        if isinstance(error, (RayError, RayServeException, RuntimeError, TimeoutError)):
            raise UserError(f"Ray Serve started no replica ({first_line(error)}): see its log") from error
        raise
    return card, Replicas(handle, config.queue + most * batch, seen, running, end)


def check_room(replicas: int, needs: dict[str, int]) -> None:
    """Raises `UserError` where the cluster could not hold so many replicas: Ray would wait for nodes for ever."""
    there = ray.cluster_resources()
    for option, each in needs.items():
        kind = option.removeprefix("num_").rstrip("s").upper()
        if there.get(kind, 0) < replicas * each:
            raise UserError(
                f"{replicas} replicas need {replicas * each} {kind}s, Ray's cluster has {there.get(kind, 0):g}: "
                "give fewer --replicas or another --device, or add nodes first"
            )
