"""`semantica serve`: what it can be told, and the server that comes of it."""

import math
import pkgutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.extras import literal_type_from_choices

from semantica.engines import BACKENDS
from semantica.errors import UserError
from semantica.lock import held
from semantica.solvers import SOLVERS

if TYPE_CHECKING:
    from semantica.serving.limits import Limits

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
# what Ray Serve needs besides Ray itself, which comes with other extras too
RAY, RAY_PACKAGES = "ray", ("ray", "aiohttp", "grpc_reflection", "opencensus", "smart_open")
# who makes the images: this process, or replicas
BEGIN = ("semantica.serving.engine:begin", "semantica.serving.replicas:start")
KEY = 8


@dataclass(frozen=True)
class ServeConfig:
    """Serve images over HTTP, with the endpoints that clients of OpenAI's API speak.

    POST /v1/images/variations, generations or edits, as the model reads pictures, text or both; GET /v1/models,
    /healthz, /readyz, /metrics (Prometheus), and a page at / to drop a picture on. Requests are batched: the images of
    a request depend on its seed, not on what else is asked for.
    """

    model: Path
    """Run folder made by `semantica train`, bundle made by `semantica export`, or folder of a diffusers pipeline."""
    name: str = ""
    """What clients call the model; by default as its folder."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of this machine."""
    port: int = 8000
    """0 takes a free one, and says which."""
    engine: literal_type_from_choices(("auto", *BACKENDS, RAY)) = "auto"
    """What runs a bundle, as of `semantica sample`; or ray: replicas of the model in Ray Serve, on the cluster of
    RAY_ADDRESS or on this machine, which come and go with what is asked. What a replica leaves undone, another does."""
    replica_engine: literal_type_from_choices(("auto", *BACKENDS)) = "auto"
    """What runs a bundle in each replica."""
    replicas: tuple[int, int] = (1, 4)
    """Fewest and most replicas; each has a processor, and with --device cuda a GPU."""
    ongoing: int = 8
    """Requests that a replica is to have at a time: of more there are more replicas, of fewer there are fewer."""
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """As of `semantica sample`."""
    steps: int = 20
    """Sampling steps of requests that name none."""
    guidance: float | None = None
    """Guidance of requests that name none; by default the model's."""
    solver: literal_type_from_choices(SOLVERS) = "dpmpp_2m"
    max_batch: int | None = None
    """Images that are made at once; by default 8, or fewer where the engine takes no more."""
    max_wait: float = 5.0
    """Milliseconds that a request waits for others to join its batch."""
    queue: int = 64
    """Images that may wait; what is more is refused with 429 and Retry-After."""
    deadline: float = 60.0
    """Seconds until a request is answered; what is not made by then is refused with 504."""
    grace: float = 30.0
    """Seconds that accepted requests have to finish in after SIGTERM."""
    max_n: int = 10
    """Images of one request."""
    max_steps: int = 100
    """Sampling steps of one request."""
    max_upload: int = 20
    """MiB of one request; all uploads together may hold twelve times as many."""
    max_pixels: int = 1 << 24
    """Of a picture, as its header says: one of more is never decoded."""
    patience: float = 20.0
    """Seconds that headers, an upload, or a client that reads nothing may take."""
    connections: int = 256
    """Open at a time."""
    api_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A key that requests must bring as `Authorization: Bearer KEY`; may be repeated. Others see it in the list of
    processes: prefer a file."""
    api_key_file: Path | None = None
    """Keys, one in a line."""
    tls_cert: Annotated[Path | None, tyro.conf.arg(metavar="PEM")] = None
    tls_key: Annotated[Path | None, tyro.conf.arg(metavar="PEM")] = None
    """Serve HTTPS with this certificate (and its chain) and key."""

    def check(self) -> "ServeConfig":
        """Raises `UserError` for impossible numbers, keys or files."""
        for name in ("steps", "queue", "max_n", "max_steps", "max_upload", "max_pixels", "connections", "ongoing"):
            if getattr(self, name) < 1:
                raise UserError(f"{option(name)} is {getattr(self, name)}: give at least 1")
        if self.max_batch is not None and self.max_batch < 1:
            raise UserError(f"--max-batch is {self.max_batch}: give at least 1")
        for name in ("deadline", "grace", "patience"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{option(name)} is {getattr(self, name)}: give seconds above 0")
        if not 0 <= self.max_wait < math.inf:
            raise UserError(f"--max-wait is {self.max_wait}: give milliseconds, 0 or more")
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port is {self.port}: give 0 to 65535")
        if not abs(self.guidance or 0.0) <= 100:
            raise UserError(f"--guidance is {self.guidance}: give a number from -100 to 100")
        least, most = self.replicas
        if not 1 <= least <= most:
            raise UserError(f"--replicas is {least} {most}: give the fewest and the most, from 1 up")
        if self.engine == RAY and self.device.startswith("cuda:"):
            raise UserError(f"--device {self.device}: Ray gives each replica a GPU of its own, give cuda")
        for name in ("replica_engine", "replicas", "ongoing"):
            if self.engine != RAY and getattr(self, name) != getattr(ServeConfig, name):
                raise UserError(f"{option(name)} is nothing without --engine {RAY}: give that too")
        if self.steps > self.max_steps:
            raise UserError(f"--steps is {self.steps}, above --max-steps {self.max_steps}: raise that too")
        return self

    def keys(self) -> tuple[str, ...]:
        """All keys. Raises `UserError` for a file without any, and for a key that nobody should use."""
        found = [*self.api_key]
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or type(error).__name__
                raise UserError(
                    f"--api-key-file {self.api_key_file} cannot be read ({why}): give a text file"
                ) from error
            found += [line.strip() for line in lines if line.strip()]
            if len(found) == len(self.api_key):
                raise UserError(f"--api-key-file {self.api_key_file} has no key: give one in a line")
        for i, key in enumerate(found, 1):
            if len(key) < KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise UserError(f"API key {i} cannot be used: give at least {KEY} ASCII characters without spaces")
        return tuple(found)

    def limits(self) -> "Limits":
        """Raises `UserError` as `keys`."""
        from semantica.serving.limits import Limits

        upload = self.max_upload << 20
        return Limits(
            upload=upload, uploads=12 * upload, pixels=self.max_pixels, images=self.max_n, steps=self.max_steps,
            deadline=self.deadline, patience=self.patience, connections=self.connections, keys=self.keys(),
        )  # fmt: skip


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def serve(config: ServeConfig) -> int:
    """Serve until a signal; returns the exit code.

    Raises:
        UserError: the model cannot be used or is still being trained, the port is in use, impossible options.
        Exception: what ended the engine.
    """
    config.check()
    limits = config.limits()
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f'{", ".join(missing)} not installed here: pip install "semantica-diffusion[serve]"')
    if config.engine == RAY and any(find_spec(name) is None for name in RAY_PACKAGES):
        raise UserError('--engine ray needs Ray Serve, which is not here: pip install "semantica-diffusion[serve-ray]"')
    if held(config.model / ".lock"):
        raise UserError(
            f"{config.model} is still being trained: wait for that, or export a bundle of it and serve that"
        )

    from semantica.serving.server import address, check_tls, listening

    check_tls(config.tls_cert, config.tls_key)
    # first, as it is quickly known
    with listening(config.host, config.port) as listener:
        from semantica.serving.app import Served, make_app
        from semantica.serving.metrics import Metrics
        from semantica.serving.server import Server

        begin, metrics = pkgutil.resolve_name(BEGIN[config.engine == RAY]), Metrics()
        card, maker = begin(config, metrics.batch)
        try:
            app = make_app(Served(card, maker, metrics), limits)
            server = Server(app, limits, maker, config.grace, config.tls_cert, config.tls_key)
            place = address(listener, config.tls_cert is not None)
            print(f"{card.name} at {place}/v1 ({', '.join(card.endpoints)}), a page at {place}/", flush=True)
            server.run([listener])
        finally:
            maker.close()
            maker.join(config.grace)
    if maker.error is not None:
        raise maker.error
    return 0
