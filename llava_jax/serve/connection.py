"""Deadlines of client connections, and a limit on their number: the ones that are idle for longest are closed."""

import asyncio
import itertools
import json
import resource
import socket
import struct
import sys
import uuid
from collections import Counter
from typing import NamedTuple

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from llava_jax.serve.errors import ApiError

MAX_CONNECTIONS = 2000
ORDER = itertools.count()  # of what happens; the loop's clock is the same for all that happens in a millisecond
OTHER_FILES = 256  # file descriptors for other things than connections
MAX_HEAD_BYTES = 16 << 10
MAX_CHUNKS, MIN_CHUNK_BYTES = 1000, 256  # of a body: more chunks are accepted if they have this size on average


class Limits(NamedTuple):
    """Limits for each client."""

    head_seconds: float = 10.0  # from connecting, or from the last response, to the end of a request's headers
    write_seconds: float = 30.0  # to read what the server writes, 64 KB at a time
    connections: int = MAX_CONNECTIONS


def connection_limit() -> int:
    """Raises the limit of open files as needed -> the number of connections that this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, soft - OTHER_FILES))


class RequestReader(h11.Connection):
    """h11's parser with limits: it accepts a head of any size that arrives at once, and chunks of single bytes."""

    parts = size = 0  # of a body

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE:
            data, _ = self.trailing_data
            if len(data) > MAX_HEAD_BYTES and data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) < 0:
                raise h11.RemoteProtocolError("the head is too large", error_status_hint=431)
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.parts = self.size = 0
        elif isinstance(event, h11.Data):
            self.parts, self.size = self.parts + 1, self.size + len(event.data)
            if self.parts > MAX_CHUNKS + self.size // MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("the chunks are too small")
        return event


class Connection(H11Protocol):
    """Uvicorn's protocol with deadlines. Pass it as `functools.partial(Connection, limits=...)`."""

    def __init__(self, *args, limits: Limits, **kwargs):
        super().__init__(*args, **kwargs)
        self.conn = RequestReader(h11.SERVER, MAX_HEAD_BYTES)
        self.limits = limits
        self.heard = next(ORDER)  # when the client last sent something
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def waits_for_client(self) -> bool:
        """Whether no complete request is being answered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._cut_off_after(self.limits.head_seconds)
        if len(self.connections) > self.limits.connections:
            self._make_room()

    def _make_room(self) -> None:
        """Closes some connections with silent clients: first those of the address with most of them, and of these the
        ones that are silent for longest. Several at a time, since sorting all of them takes time."""
        waiting = [other for other in self.connections if other.waits_for_client and not other.transport.is_closing()]
        crowd = Counter(other.address for other in waiting)
        waiting.sort(key=lambda other: (-crowd[other.address], other.heard))
        for other in waiting[: 1 + self.limits.connections // 50]:
            other.transport.abort()

    @property
    def address(self) -> str:
        return self.client[0] if self.client else ""

    def connection_lost(self, exc: Exception | None) -> None:
        self._cut_off_after(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.heard = next(ORDER)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # the headers of a request are complete
            self._cut_off_after(self.limits.write_seconds if self.flow.write_paused else None)

    def on_response_complete(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._cut_off_after(self.limits.write_seconds if unsent else self.limits.head_seconds)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_off_after(self.limits.write_seconds)

    def resume_writing(self) -> None:
        super().resume_writing()
        idle = self.cycle is None or self.cycle.response_complete
        self._cut_off_after(self.limits.head_seconds if idle else None)

    def _cut_off_after(self, seconds: float | None) -> None:
        """Replaces the deadline; None for no deadline."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._cut_off)

    def _cut_off(self) -> None:
        if self.transport.get_write_buffer_size():  # makes the kernel drop its send buffer, too
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.transport.abort()

    def _should_upgrade(self) -> bool:
        return False  # a request to upgrade to WebSockets is answered like any other

    def send_400_response(self, msg: str) -> None:
        """Answers invalid HTTP with an error of the API, and closes. Called while h11's error is handled."""
        if self.cycle is not None and not self.cycle.response_complete:  # its body is invalid: no second answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return self.transport.abort()
        status = getattr(sys.exception(), "error_status_hint", 400)
        body = json.dumps(ApiError(status, "the request is not valid HTTP").body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers["x-request-id"] = uuid.uuid4().hex
        head = h11.Response(status_code=status, headers=list(headers.items()), reason=STATUS_PHRASES[status])
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()
