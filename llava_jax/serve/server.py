"""Runs the app until a signal ends it, after the accepted requests are finished."""

import contextlib
import ctypes
import functools
import os
import socket
import sys
import threading
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI

from llava_jax.cli import UserError, say
from llava_jax.inference.engine import Engine
from llava_jax.serve.connection import Connection, Limits, connection_limit

MALLOC_MMAP_THRESHOLD, MMAP_BYTES = -3, 1 << 20  # an option of glibc's mallopt, and its value here
BACKLOG = 2048
KEEP_ALIVE_SECONDS = 8  # more than the 5 of many clients, so that they do not use a connection that is being closed
LINGER_SECONDS = 10  # for clients to read the last pieces and close their connections


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before the model is loaded. Raises `UserError` where the address is not available."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError for invalid host names
        reason = getattr(error, "strerror", None) or "it is no name of a host"
        raise UserError(f"cannot serve at {host}, port {port}: {reason}") from error
    return bound


def _url(bound: socket.socket) -> str:
    host, port, *_ = bound.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _return_freed_memory() -> None:
    """Makes glibc return large freed blocks to the system: otherwise it keeps the memory of the largest images."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(MALLOC_MMAP_THRESHOLD, MMAP_BYTES)


def http_config(app: FastAPI, limits: Limits, **options: object) -> uvicorn.Config:
    """Uvicorn's configuration for `app`: only HTTP, with our limits, and our log instead of its own."""
    http = functools.partial(Connection, limits=limits)
    options |= {"ws": "none", "access_log": False, "server_header": False, "timeout_keep_alive": KEEP_ALIVE_SECONDS}
    return uvicorn.Config(app, http=http, **options)


class Server(uvicorn.Server):
    """Serves at once, while the engine warms up in a thread.

    After SIGTERM or Ctrl-C new requests are refused and accepted ones are finished. A second signal ends it at once.
    """

    def __init__(self, app: FastAPI, engine: Engine):
        limits = Limits(connections=connection_limit())
        super().__init__(http_config(app, limits, timeout_graceful_shutdown=LINGER_SECONDS))
        self._engine, self._traffic = engine, app.state.traffic
        self._failure: BaseException | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Raises the error of the warm-up, and `UserError` where another server has taken the address by now."""
        _return_freed_memory()
        for bound in sockets or []:
            try:
                bound.listen(BACKLOG)
            except OSError as error:
                self._engine.close(drain=False)
                raise UserError(f"cannot serve at {_url(bound)}: {error.strerror}") from error
        warming = threading.Thread(target=self._warm_up, args=(sockets,), daemon=True)
        warming.start()
        super().run(sockets)
        self._engine.close(drain=False)
        if self._failure is not None:
            raise self._failure
        if warming.is_alive():  # compiling takes long, and an interpreter that exits during it aborts
            sys.stderr.flush()
            os._exit(0)

    def handle_exit(self, sig: int, frame: object) -> None:
        if self._traffic.shutting_down:
            self.force_exit = self.should_exit = True
        else:
            self._traffic.shutting_down = True
            threading.Thread(target=self._drain, daemon=True).start()

    def _warm_up(self, sockets: Sequence[socket.socket] | None) -> None:
        try:
            self._engine.warm_up()
            if self._engine.ready:
                say(f"ready: {', '.join(map(_url, sockets or []))}", file=sys.stderr, flush=True)
        except BaseException as error:
            self._failure = error
            self.should_exit = True

    def _drain(self) -> None:
        self._engine.close(drain=True)
        self.should_exit = True
