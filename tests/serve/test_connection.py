"""Connections whose clients keep the server waiting. Deadlines are tiny here; no test measures time."""

import asyncio
import json
import resource
import socket
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from serving import eventually, serving
from uvicorn.server import ServerState

from llava_jax.serve.connection import OTHER_FILES, Connection, Limits, connection_limit
from llava_jax.serve.gate import Gate, Traffic
from llava_jax.serve.log import Log

FOREVER = 1000.0
HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


class App:
    """Answers, streams for ever, or echoes; knows which streams are running."""

    def __init__(self):
        self.streams = 0
        self.app = FastAPI()
        self.traffic = Traffic(limit=10, bytes_limit=1 << 20)
        self.app.add_middleware(Gate, traffic=self.traffic, closed=lambda: None, api_key=None, max_body_bytes=1 << 20)
        self.app.add_middleware(Log, responded=lambda path, status: None)
        self.app.get("/health")(self.health)
        self.app.get("/stream")(self.stream)
        self.app.get("/large")(self.large)
        self.app.post("/echo")(self.echo)

    async def health(self) -> str:
        return "ok"

    async def stream(self) -> StreamingResponse:
        return StreamingResponse(self._events())

    async def _events(self):
        self.streams += 1
        try:
            while True:
                yield b"x" * 65536
                await asyncio.sleep(0)
        finally:
            self.streams -= 1

    async def large(self) -> StreamingResponse:
        return StreamingResponse(iter([b"x" * (64 << 20)]))

    async def echo(self, request: Request) -> int:
        return len(await request.body())


@pytest.fixture
def app():
    return App()


@contextmanager
def connected(url: str, data: bytes = b"", receive_buffer: int = 0):
    with socket.socket() as connection:
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        connection.sendall(data)
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    data = bytearray()
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionError:
        pass
    return bytes(data)


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def healthy(url: str) -> bool:
    with connected(url, HEAD + b"Connection: close\r\n\r\n") as connection:
        return b'"ok"' in read_all(connection)


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"X-Slow:"])
def test_half_of_a_head_has_a_deadline(app, sent):
    with serving(app.app, Limits(head_seconds=0.1)) as url, connected(url, sent) as connection:
        assert read_all(connection) == b""
        assert healthy(url)


def test_so_has_the_next_one_of_a_connection(app):
    with serving(app.app, Limits(head_seconds=0.5)) as url, connected(url, HEAD + b"\r\n" + HEAD) as connection:
        assert read_all(connection).count(b"200 OK") == 1


def test_a_body_that_nobody_reads_any_more_has_one(app):
    head = b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    with serving(app.app, Limits(head_seconds=0.1)) as url, connected(url, head) as connection:
        assert b"405" in read_all(connection)


def test_no_deadline_holds_while_an_answer_is_awaited(app):
    release = threading.Event()
    app.app.get("/wait")(release.wait)
    request = b"GET /wait HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with serving(app.app, Limits(head_seconds=0.2)) as url, connected(url, request) as connection:
        with connected(url) as other:
            read_all(other)  # until its deadline
        release.set()
        assert b"200 OK" in read_all(connection)


@pytest.mark.parametrize("path", [b"/stream", b"/large"])
def test_who_does_not_read_is_cut_off(app, path):
    request = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path
    with serving(app.app, Limits(write_seconds=0.2)) as url, connected(url, request, 4096) as connection:
        assert eventually(lambda: path == b"/large" or app.streams == 1)
        assert eventually(lambda: app.streams == 0)
        assert eventually(lambda: connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def test_who_reads_slowly_but_reads_is_not(app):
    request = b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with serving(app.app, Limits(write_seconds=FOREVER)) as url, connected(url, request) as connection:
        assert len(read_all(connection)) > 64 << 20


def test_too_many_connections_close_those_that_wait(app):
    with serving(app.app, Limits(head_seconds=FOREVER, connections=5)) as url:
        silent = [socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) for _ in range(5)]
        with connected(url, b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n") as stream:
            stream.recv(1)
            assert all(healthy(url) for _ in range(20))
            assert app.streams == 1
        assert any(map(is_closed, silent))
        for connection in silent:
            connection.close()


def test_connections_of_one_moment_have_an_order():
    """The clock of uvloop is the same for all that happens in a millisecond."""
    config, stopped = uvicorn.Config(FastAPI(), log_config=None), SimpleNamespace(time=lambda: 1.0)
    config.load()
    first, second = (Connection(config, ServerState(), {}, stopped, limits=Limits()) for _ in range(2))
    assert first.heard < second.heard


def test_stalled_streams_hold_nobody_up(app):
    request = b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(app.app, Limits(write_seconds=0.5, connections=50)) as url:
        streams = [socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) for _ in range(20)]
        for stream in streams:
            stream.sendall(request)
        assert healthy(url)
        assert eventually(lambda: app.streams == 0)
        for stream in streams:
            stream.close()


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (b"\x16\x03\x01\x00\xa5\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 2000, 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200_000, 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * 10_000 + b"\r\n", 431),
    ],
)
def test_what_is_no_http_is_answered_as_by_the_api_and_closed(app, request_bytes, status):
    with serving(app.app) as url, connected(url, request_bytes) as connection:
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert b"x-request-id" in head
        assert body.count(b"HTTP/1.1") == 0
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_an_upgrade_is_not_made(app):
    upgrade = b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"
    with serving(app.app) as url, connected(url, HEAD + upgrade) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_who_expects_100_continue_gets_it(app):
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    with serving(app.app) as url, connected(url, head) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        assert read_all(connection).endswith(b"2")


def test_the_limit_of_open_files_leaves_room():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        limit = connection_limit()
        raised, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert raised - OTHER_FILES == limit
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
