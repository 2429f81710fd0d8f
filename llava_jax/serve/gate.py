"""Admission of HTTP requests by their size, their API key and the current load."""

import asyncio
import dataclasses
import hashlib
import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_jax.serve.errors import ApiError

BODY_SECONDS = 60.0  # for a body to arrive, unless it keeps arriving at this rate:
BODY_BYTES_PER_SECOND = 32 << 10
READ_SECONDS = 10.0  # for the next part of a body to arrive
SILENT_SECONDS = 1.0  # without data, after which a body may be refused in favour of others
MAX_TARGET = 8192  # bytes of a path with its query
MAX_HEADERS, MAX_HEADER_BYTES = 100, 16 << 10
WRITE_BYTES = 64 << 10  # of a response at a time: each part has its own deadline, see `connection`


def same_secret(given: str, secret: str) -> bool:
    """Compares in a time that reveals neither how much matches nor the length of the secret."""
    given_hash, secret_hash = (hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (given, secret))
    return hmac.compare_digest(given_hash, secret_hash)


@dataclasses.dataclass(eq=False)
class Body:
    """The part of a request's body that has arrived."""

    size: int = 0
    complete: bool = False
    heard: float = 0.0  # when its last part arrived
    waiting: asyncio.Timeout | None = None  # the deadline of its next part


@dataclasses.dataclass
class Traffic:
    """The requests for answers in progress."""

    limit: int  # of `active`
    bytes_limit: int  # of `body_bytes`
    active: int = 0  # requests whose bodies are complete
    body_bytes: int = 0  # of these and of the bodies that are being read
    reading: set[Body] = dataclasses.field(default_factory=set)
    shutting_down: bool = False

    def add(self, body: Body, size: int) -> None:
        """Counts a part of a body that arrived. With too many bytes in memory, gives up the body that has been silent
        for longest, or raises `ApiError` if none has been silent."""
        body.size += size
        self.body_bytes += size
        body.heard = now = asyncio.get_running_loop().time()
        if self.body_bytes > self.bytes_limit:
            waiting = [other for other in self.reading if other.waiting]
            silent = min(waiting, key=lambda other: other.heard, default=None)
            if silent is None or now - silent.heard < SILENT_SECONDS:
                raise _too_many()
            silent.waiting.reschedule(now)

    def release(self, body: Body) -> None:
        """The body is not in memory any more."""
        self.body_bytes -= body.size
        body.size = 0


class Gate:
    """ASGI middleware: refuses requests without the key, and those that are too large, too slow or too many.

    The scope of an accepted request has `release_body`, to be called once the body is not in memory any more.

    Args:
      app: the next application.
      traffic: the load, which this keeps up to date.
      closed: returns the reason why no requests for answers are accepted at the moment, or None.
      api_key: that `guarded` paths need as `Authorization: Bearer`; None accepts all requests.
      max_body_bytes: of any request, whether declared or not.
    """

    guarded = ("/v1/", "/metrics", "/tokenize", "/detokenize")
    working = ("/v1/chat/", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")

    def __init__(
        self,
        app: ASGIApp,
        traffic: Traffic,
        closed: Callable[[], str | None],
        api_key: str | None,
        max_body_bytes: int,
    ):
        self.app, self.traffic, self.closed = app, traffic, closed
        self.api_key, self.max_body_bytes = api_key, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        works, body = scope["path"].startswith(self.working), Body()
        scope["release_body"] = lambda: self.traffic.release(body)
        self.traffic.reading.add(body)
        try:
            self._check(scope, Headers(scope=scope), works)
            await self.app(scope, self._limited(receive, body, works), _in_parts(send))
        except ApiError as error:  # of `_check` only: the app handles its own
            await error.response()(scope, receive, send)
        finally:
            self.traffic.active -= works and body.complete
            self.traffic.reading.discard(body)
            self.traffic.release(body)

    def _check(self, scope: Scope, headers: Headers, works: bool) -> None:
        _check_head(scope, headers)
        if self.api_key is not None and scope["path"].startswith(self.guarded):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not same_secret(given.strip(), self.api_key):
                raise ApiError(401, "send the server's key as Authorization: Bearer KEY", "invalid_api_key")
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.max_body_bytes:
            raise self._too_large()
        if works and (reason := self.closed()) is not None:
            raise ApiError(503, reason, "unavailable", retry_after=5)
        if works and self.traffic.active >= self.traffic.limit:
            raise _too_many()

    def _limited(self, receive: Receive, body: Body, works: bool) -> Receive:
        """`receive` with limits on the size of the body and of all bodies, and on the time until it is complete."""
        loop = asyncio.get_running_loop()
        body.heard = loop.time()
        deadline = body.heard + BODY_SECONDS  # data postpones it, but to at most `BODY_SECONDS` from then

        async def limited() -> Message:
            nonlocal deadline
            if body.complete:
                return await receive()
            try:
                async with asyncio.timeout_at(min(deadline, loop.time() + READ_SECONDS)) as body.waiting:
                    message = await receive()
            except TimeoutError as error:
                rate = f"or at {BODY_BYTES_PER_SECOND >> 10} kB a second, with no pause of {READ_SECONDS:.0f}"
                what = f"the body has to arrive within {BODY_SECONDS:.0f} seconds, {rate}"
                raise ApiError(408, what) from error
            finally:
                body.waiting = None
            self.traffic.add(body, size := len(message.get("body", b"")))
            deadline = min(deadline + size / BODY_BYTES_PER_SECOND, body.heard + BODY_SECONDS)
            if body.size > self.max_body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                self._complete(body, works)
            return message

        return limited

    def _complete(self, body: Body, works: bool) -> None:
        body.complete = True
        self.traffic.reading.discard(body)
        self.traffic.active += works
        if self.traffic.active > self.traffic.limit:
            raise _too_many()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.max_body_bytes} bytes: send fewer or smaller images")


def _check_head(scope: Scope, headers: Headers) -> None:
    """Raises `ApiError` for heads that the HTTP library accepts, but that no client has a reason to send."""
    if len(scope.get("raw_path") or b"") + len(scope.get("query_string", b"")) > MAX_TARGET:
        raise ApiError(414, f"the URL has more than {MAX_TARGET} bytes")
    if len(headers.raw) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
        raise ApiError(431, f"the headers are more than {MAX_HEADERS} or than {MAX_HEADER_BYTES} bytes")
    if not scope["path"].startswith("/"):
        raise ApiError(400, "the path has to begin with /")
    if "content-length" in headers and "transfer-encoding" in headers:
        raise ApiError(400, "Content-Length and Transfer-Encoding exclude each other", close=True)


def _in_parts(send: Send) -> Send:
    """`send`, which splits large bodies into parts."""

    async def parts(message: Message) -> None:
        body = message.get("body", b"")
        for start in range(0, len(body) - WRITE_BYTES, WRITE_BYTES):
            await send(message | {"body": body[start : start + WRITE_BYTES], "more_body": True})
        rest = len(body) and (len(body) - 1) // WRITE_BYTES * WRITE_BYTES
        await send(message | {"body": body[rest:]} if rest else message)

    return parts


def _too_many() -> ApiError:
    return ApiError(429, "too many requests at a time: try again later", "queue_full", retry_after=1)
