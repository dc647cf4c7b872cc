"""Connections that nobody may hold for ever: HTTP/1.1 of uvicorn with limits on their number and on patience.

uvicorn itself waits without end for headers, and for clients that do not read what they are sent.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from semantica.serving.limits import Limits
from semantica.serving.refusals import Refused, closed


def raw(refused: Refused) -> bytes:
    """A whole response, for connections that have no request yet."""
    body = json.dumps(refused.body).encode()
    headers = {
        "content-type": "application/json", "content-length": str(len(body)), "connection": "close",
        **(refused.headers or {}),
    }  # fmt: skip
    lines = [f"HTTP/1.1 {refused.status} Refused", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


SLOW = raw(Refused(408, "request_timeout", "The request came too slowly."))
MANY = raw(closed("Too many connections are open."))
BROKEN = raw(Refused(400, "invalid_http", "That is no HTTP request, or its headers are too large."))


class Guarded(H11Protocol):
    """One connection. `limits.patience` holds for headers, the rest of a refused body and each read of a response."""

    def __init__(self, limits: Limits, **given: Any):
        super().__init__(**given)
        self.limits = limits
        # runs while something is awaited of the client; while something is left to be read by it
        self.awaited: asyncio.TimerHandle | None = None
        self.unread: asyncio.TimerHandle | None = None
        self.unsent = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self.end(MANY)
        else:
            self.expect()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self.expect()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.awaited, self.unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.expect()
        self.watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch()

    def send_400_response(self, msg: str) -> None:
        begun = self.cycle is not None and not self.cycle.response_complete
        if begun:
            # the body is broken: its request is over, and must not write any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.end(b"" if begun and self.cycle.response_started else BROKEN)

    def expect(self) -> None:
        """Start to count where a request has not come whole: its headers, or a body that outlasts the response."""
        answered = self.cycle is None or self.cycle.response_complete
        half = self.cycle is None or self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if not (answered and half) and self.awaited is not None:
            self.awaited.cancel()
            self.awaited = None
        elif answered and half and self.awaited is None and not self.transport.is_closing():
            self.awaited = self.loop.call_later(self.limits.patience, self.slow)

    def slow(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.abort()
        else:
            self.end(SLOW)

    def watch(self) -> None:
        """Hang up on a client that reads nothing of what it was sent, or of what is still to be sent."""
        if self.unread is not None:
            self.unread.cancel()
        size = self.transport.get_write_buffer_size()
        self.unsent = size
        self.unread = self.loop.call_later(self.limits.patience, self.look) if size else None

    def look(self) -> None:
        if self.transport.get_write_buffer_size() >= self.unsent:
            self.transport.abort()
        else:
            self.watch()

    def end(self, last: bytes) -> None:
        """Say something and hang up."""
        if not self.transport.is_closing():
            self.transport.write(last)
            self.transport.close()
            self.watch()
