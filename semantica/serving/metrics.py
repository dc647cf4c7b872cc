"""What a server measures of itself, for Prometheus; images a second are the rate of a counter."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from semantica.serving.refusals import of_head

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        # memory, processor time, open files
        ProcessCollector(registry=self.registry)
        own = {"registry": self.registry}
        self.queue = Gauge("semantica_queue_images", "Images that wait.", **own)
        self.ready = Gauge("semantica_ready", "Whether images can be made now.", **own)
        self.size = Histogram("semantica_batch_images", "Images made at once.", buckets=IMAGES, **own)
        self.took = Histogram("semantica_batch_seconds", "Time that a batch took.", buckets=SECONDS, **own)
        self.waited = Histogram(
            "semantica_queue_seconds", "Time that the oldest job of a batch waited.", buckets=SECONDS, **own
        )
        self.images = Counter("semantica_images", "Images made.", **own)
        self.requests = Histogram(
            "semantica_request_seconds", "Time from a request's headers to its response.", ("endpoint", "status"),
            buckets=SECONDS, **own,
        )  # fmt: skip
        self.rejected = Counter("semantica_rejected", "Requests for images that got none.", ("reason",), **own)

    def batch(self, images: int, seconds: float, waited: float) -> None:
        """A batch was made; its oldest job had waited before."""
        self.size.observe(images)
        self.took.observe(seconds)
        self.waited.observe(waited)
        self.images.inc(images)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Watched:
    """An ASGI application whose responses are timed, and carry a header that keeps browsers from guessing."""

    def __init__(self, app: ASGIApp, metrics: Metrics, clock: Callable[[], float]):
        self.app, self.metrics, self.clock = app, metrics, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = self.clock(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        refused = of_head(scope)
        try:
            await (refused.response() if refused else self.app)(scope, receive, sent)
        finally:
            # a bounded set of names, whatever is asked for
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, str(status)).observe(self.clock() - start)
