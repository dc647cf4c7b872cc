"""What a request is told that gets no images: errors in the shape of OpenAI's API."""

from collections.abc import Mapping
from itertools import chain

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

# of a response to somebody who has left; nobody reads it, metrics count it
LEFT = 499
# headers of a request, and their bytes with its address; the server below reads them in blocks and counts less closely
HEADERS, HEAD = 128, 1 << 14
# what may stand in a message of something that a client sent
SHOWN = 64


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is no success."""

    error: Error


class Refused(Exception):
    """A request that is refused.

    status: of HTTP. code, kind: what programs look at, in OpenAI's words. param: the field that is wrong.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        kind: str = "",
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    @property
    def body(self) -> dict:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def busy(seconds: int, message: str) -> Refused:
    """Come back in so many seconds."""
    headers = {"Retry-After": str(seconds)}
    return Refused(429, "rate_limit_exceeded", message, headers=headers, kind="rate_limit_error")


def closed(message: str) -> Refused:
    """Come back later, or elsewhere."""
    return Refused(503, "service_unavailable", message, headers={"Retry-After": "5"})


def late(seconds: float) -> Refused:
    """Not made in time; the same request again would only add to what waits."""
    return Refused(
        504, "deadline_exceeded", f"no images within {seconds:g} s", headers={"x-should-retry": "false"}
    )  # fmt: skip


def failed() -> Refused:
    """It is not the client's fault."""
    return Refused(500, "internal_error", "The server has failed at this request; its log says how.")


def of_head(scope: Scope) -> Refused | None:
    """Of a request whose headers or address are larger than any client's."""
    size = len(scope["path"]) + len(scope["query_string"]) + sum(map(len, chain(*scope["headers"])))
    if len(scope["headers"]) <= HEADERS and size <= HEAD:
        return None
    return Refused(431, "headers_too_large", f"A request may have {HEADERS} headers, and {HEAD} bytes of them.")


def of_fields(error: ValidationError) -> Refused:
    """The first field that is wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0])[:SHOWN] if first["loc"] else None
    if first["type"] == "missing":
        return Refused(400, "missing_required_parameter", f"Missing required parameter: {name!r}.", name)
    if first["type"] == "extra_forbidden":
        return Refused(400, "unknown_parameter", f"Unknown parameter: {name!r}.", name)
    where = f"Invalid value for {name!r}" if name else "The body is not valid"
    return Refused(400, "invalid_value", f"{where}: {first['msg']}.", name)


def handled(app: FastAPI, offered: str) -> None:
    """Every error of an application in that shape. offered: said where there is nothing at an address."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refused)
        return error.response()

    async def plain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        known = {404: ("not_found", f"Nothing is served there; there is {offered}."),
                 405: ("method_not_allowed", "This address takes another method.")}  # fmt: skip
        code, message = known.get(error.status_code, ("bad_request", str(error.detail)))
        return Refused(error.status_code, code, message, headers=error.headers).response()

    async def other(request: Request, error: Exception) -> JSONResponse:
        return failed().response()

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, plain)
    app.add_exception_handler(Exception, other)
