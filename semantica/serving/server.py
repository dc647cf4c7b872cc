"""The server around an application: its socket, TLS, signals and the way it ends."""

import asyncio
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from uvicorn.server import HANDLED_SIGNALS

from semantica.errors import UserError, first_line
from semantica.serving.guard import Guarded
from semantica.serving.job import Maker
from semantica.serving.limits import Limits


def listening(host: str, port: int) -> socket.socket:
    """A socket that connections may come to from now on; they wait until they are served.

    Raises:
        UserError: the port is in use, not allowed, or the host is none of this machine.
    """
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
    except (OSError, OverflowError) as error:
        # which may say the address once more
        why = (getattr(error, "strerror", None) or first_line(error)).partition(" (")[0]
        raise UserError(f"cannot listen on {host} port {port} ({why}): choose another --port or --host") from error


def address(listener: socket.socket, tls: bool) -> str:
    """What to type into a browser."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """Raises `UserError` for one file without the other, a missing one, or two that do not belong together."""
    if (certificate is None) != (key is None):
        raise UserError("--tls-cert and --tls-key go together: give both, or neither")
    for name, path in (("--tls-cert", certificate), ("--tls-key", key)):
        if path is not None and not path.is_file():
            raise UserError(f"{name} {path} is not a file: give one in PEM")
    if certificate is not None:

        def password() -> str:
            raise UserError(f"--tls-key {key} is encrypted: give one without a password")

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password)
        except (ssl.SSLError, OSError) as error:
            raise UserError(
                f"--tls-cert {certificate} and --tls-key {key} cannot be used ({first_line(error)}): "
                "give a certificate and its key in PEM"
            ) from error


class Server(uvicorn.Server):
    """uvicorn, which returns after a signal, finishes what it has accepted, and ends where its engine does.

    Args:
        grace: seconds that requests have from the signal on; then they are refused.
    """

    def __init__(
        self,
        app: FastAPI,
        limits: Limits,
        maker: Maker,
        grace: float,
        certificate: Path | None = None,
        key: Path | None = None,
    ):
        super().__init__(
            uvicorn.Config(
                app, http=partial(Guarded, limits), ws="none", lifespan="off", log_level="error", access_log=False,
                proxy_headers=False, server_header=False, timeout_keep_alive=int(max(1, limits.patience)),
                # for those who do not read their refusal either
                timeout_graceful_shutdown=int(grace) + 5, ssl_certfile=certificate, ssl_keyfile=key,
            )
        )  # fmt: skip
        self.maker, self.grace = maker, grace

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again at the end
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self.maker.error is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        left = len(self.server_state.tasks)
        print(f"stopping: {left} requests to finish, within {self.grace:g} s", file=sys.stderr, flush=True)
        self.maker.close()
        timer = asyncio.get_running_loop().call_later(
            self.grace, self.maker.abort, f"the server has stopped, {self.grace:g} s after it was told to"
        )
        await super().shutdown(sockets)
        timer.cancel()
