"""The application: OpenAI's image endpoints over whoever makes the images, as a pure function of what is served."""

import asyncio
import json
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from semantica import __version__
from semantica.errors import UserError, first_line
from semantica.inputs import SINGLE
from semantica.serving.body import Budget, check_key, check_site, decoded, encoded, received
from semantica.serving.fields import ImagesResponse, check_model, described, fields_of, read
from semantica.serving.job import ENDPOINTS, Card, Closed, Failed, Full, Job, Maker
from semantica.serving.limits import Limits
from semantica.serving.metrics import Metrics, Watched
from semantica.serving.refusals import LEFT, ErrorBody, Refused, busy, closed, failed, handled, late

# of the page: it asks nobody but this server
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
REFUSALS = (400, 401, 403, 404, 408, 413, 415, 429, 431, 500, 503, 504)


@dataclass(frozen=True)
class Served:
    """What an application serves: what it offers, who makes the images, and its figures."""

    card: Card
    maker: Maker
    metrics: Metrics = field(default_factory=Metrics)


class Left(Exception):
    """The client has gone."""


def make_app(served: Served, limits: Limits) -> FastAPI:
    """The endpoints of OpenAI's API that the model can serve, `/v1/models`, `/healthz`, `/readyz`, `/metrics`, `/`.

    It owns nothing: whoever calls it starts and ends the maker.
    """
    card, metrics = served.card, served.metrics
    app = FastAPI(title=f"semantica serve: {card.name}", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Watched, metrics=metrics, clock=time.perf_counter)
    handled(app, ", ".join([*(f"POST /v1/images/{name}" for name in card.endpoints), "GET /v1/models"]))
    images = Images(served, limits)
    refusals: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in REFUSALS}
    for name in card.endpoints:
        kind = fields_of(name, card, limits)
        app.add_api_route(
            f"/v1/images/{name}", images.handler(name, kind), methods=["POST"], name=name,
            response_model=None, responses={200: {"model": ImagesResponse}, **refusals},
            openapi_extra=described(name, kind), summary=f"{name.capitalize()}: images as OpenAI's API makes them.",
        )  # fmt: skip

    model = {"id": card.name, "object": "model", "created": card.created, "owned_by": "semantica"}
    plain = {status: refusals[status] for status in (401, 404)}

    @app.get("/v1/models", responses=plain)
    async def models(request: Request) -> dict[str, Any]:
        """What is served: one model."""
        check_key(request, limits.keys)
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name}", responses=plain)
    async def one_model(request: Request, name: str) -> dict[str, Any]:
        """The model, by its name."""
        check_key(request, limits.keys)
        check_model(name, card)
        return model

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": ErrorBody}})
    async def readyz() -> dict[str, str]:
        """Images can be made."""
        if reason := served.maker.ready():
            raise closed(f"Not ready: {reason}.")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        """For Prometheus."""
        metrics.queue.set(served.maker.queued())
        metrics.ready.set(not served.maker.ready())
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    page = resources.files("semantica.serving").joinpath("page.html").read_text(encoding="utf-8")
    page = page.replace('"CARD"', json.dumps(shown(card, limits)).replace("<", "\\u003c"))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def home() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    return app


def shown(card: Card, limits: Limits) -> dict[str, Any]:
    """What the page knows of a server."""
    names = ("name", "size", "steps", "guidance", "endpoints")
    more = {"most": limits.images, "mostSteps": limits.steps, "keys": bool(limits.keys)}
    return {name: getattr(card, name) for name in names} | more


class Images:
    """Requests for images, from their headers to their response."""

    def __init__(self, served: Served, limits: Limits):
        self.served, self.limits, self.budget = served, limits, Budget(limits.uploads)
        # decoded pictures are large: no more at a time than processors
        self.threads = CapacityLimiter(min(4, os.cpu_count() or 1))

    def handler(self, endpoint: str, kind: Any) -> Callable[[Request], Awaitable[Response]]:
        async def images(request: Request) -> Response:
            try:
                async with asyncio.timeout(self.limits.deadline):
                    return await self.answer(request, endpoint, kind)
            except TimeoutError:
                refused = late(self.limits.deadline)
            except Full as error:
                refused = busy(error.seconds, "Too much is waiting.")
            except Closed as error:
                refused = closed(f"No images are made: {error}.")
            except Failed:
                refused = failed()
            except UserError as error:
                refused = Refused(400, "invalid_value", first_line(error))
            except (Left, ClientDisconnect):
                self.served.metrics.rejected.labels("client_left").inc()
                return Response(status_code=LEFT)
            except Refused as error:
                refused = error
            self.served.metrics.rejected.labels(refused.code).inc()
            raise refused

        return images

    async def answer(self, request: Request, endpoint: str, kind: Any) -> Response:
        maker = self.served.maker
        check_site(request)
        check_key(request, self.limits.keys)
        maker.admit(1)
        with maker.expect():
            fields, job = await self.asked(request, endpoint, kind)
            made = await unless_left(request, maker.submit(job))
        content = await self.apart(body_of, made, fields, job.seed)
        return Response(content, media_type="application/json")

    async def asked(self, request: Request, endpoint: str, kind: Any) -> tuple[dict[str, Any], Job]:
        """The fields of a request, and its job. Raises `Refused`."""
        card, limits = self.served.card, self.limits
        with self.budget.held() as take:
            given, upload = await received(request, SINGLE in ENDPOINTS[endpoint], limits, take)
            fields = read(kind, given)
            check_model(fields["model"], card)
            picture = None
            if upload is not None:
                picture = await self.apart(decoded, upload, card.side, limits)
        # by default another one each time, that JavaScript's numbers hold too
        seed = secrets.randbits(53) if fields["seed"] is None else fields["seed"]
        settings = {name: fields[name] for name in ("n", "steps", "guidance", "solver")}
        return fields, Job(picture, fields.get("prompt"), seed=seed, **settings)

    async def apart(self, function: Callable, *arguments: Any) -> Any:
        """A function's result, from a thread."""
        return await to_thread.run_sync(partial(function, *arguments), limiter=self.threads)


def body_of(made: np.ndarray, fields: dict[str, Any], seed: int) -> bytes:
    """A response's JSON. made: uint8 `[n, H, W, 3]`."""
    form, url = fields["output_format"], fields["response_format"] == "url"
    data = [encoded(image, form, fields["output_compression"], url) for image in made]
    height, width = made.shape[1:3]
    facts = {"output_format": form, "size": f"{width}x{height}", "seed": seed}
    return json.dumps({"created": int(time.time()), "data": data, **facts}).encode()


async def unless_left(request: Request, work: Coroutine[Any, Any, np.ndarray]) -> np.ndarray:
    """What a coroutine gives; it is cancelled when the client goes, and then `Left` is raised."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Left
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
