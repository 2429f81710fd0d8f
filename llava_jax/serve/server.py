"""Runs the app until it is told to stop, and then lets what was begun come to its end."""

import functools
import os
import socket
import sys
import threading
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI

from llava_jax.cli import UserError, say
from llava_jax.serve.connection import Connection, Limits, connection_limit
from llava_jax.serve.engine import Engine

LINGER_SECONDS = 10  # that the last pieces have to be read, and web pages to let go


def listen(host: str, port: int) -> socket.socket:
    """A bound socket: that it can be had is known before the model is loaded. Raises UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError for what can be no name at all
        reason = getattr(error, "strerror", None) or "it is no name of a host"
        raise UserError(f"cannot serve at {host}, port {port}: {reason}") from error
    return bound


def _url(bound: socket.socket) -> str:
    host, port, *_ = bound.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def http_config(app: FastAPI, limits: Limits, **options: object) -> uvicorn.Config:
    """How uvicorn serves `app`: HTTP alone, with our limits, and our log instead of its own."""
    http = functools.partial(Connection, limits=limits)
    return uvicorn.Config(app, http=http, ws="none", access_log=False, server_header=False, **options)


class Server(uvicorn.Server):
    """Serves at once, and warms the engine up meanwhile.

    SIGTERM or Ctrl-C: new requests are refused, answers that were asked for are finished; a second one: now.
    """

    def __init__(self, app: FastAPI, engine: Engine):
        limits = Limits(connections=connection_limit())
        super().__init__(http_config(app, limits, timeout_graceful_shutdown=LINGER_SECONDS))
        self._engine, self._traffic = engine, app.state.traffic
        self._failure: BaseException | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Raises what the warm-up raised."""
        warming = threading.Thread(target=self._warm_up, args=(sockets,), daemon=True)
        warming.start()
        try:
            super().run(sockets)
        except OSError as error:  # another server began to listen there meanwhile
            self._failure = UserError(
                f"cannot serve at {', '.join(map(_url, sockets or []))}: {error.strerror or error}"
            )
        self._engine.close(drain=False)
        if self._failure is not None:
            raise self._failure
        if warming.is_alive():  # compiling: that takes long, and an interpreter that ends meanwhile aborts
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
