"""What is decided about an HTTP request before anything of its body is read."""

import asyncio
import dataclasses
import hashlib
import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_jax.serve.errors import ApiError

BODY_SECONDS = 60.0  # in which a body has to have arrived


def same_secret(given: str, secret: str) -> bool:
    """Compares in a time that tells neither how much is right nor how long the secret is."""
    given_hash, secret_hash = (hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (given, secret))
    return hmac.compare_digest(given_hash, secret_hash)


@dataclasses.dataclass
class Traffic:
    """The requests for answers that are being worked on."""

    limit: int  # of `active`
    bytes_limit: int  # of `body_bytes`
    active: int = 0
    body_bytes: int = 0  # of them that are in memory
    shutting_down: bool = False


@dataclasses.dataclass
class _Body:
    """What has arrived of a request's body."""

    size: int = 0
    complete: bool = False


class Gate:
    """ASGI middleware: refuses requests without the key, too large, too slow, too many, or at the wrong time.

    Args:
      app: what comes behind.
      traffic: kept up to date.
      closed: -> why no requests for answers are taken just now, or None.
      api_key: what `Authorization: Bearer` has to bring to `guarded` paths; None to let everyone in.
      max_body_bytes: of any request, declared or not.
    """

    guarded = ("/v1/", "/metrics")
    working = ("/v1/chat/",)

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
        works, body = scope["path"].startswith(self.working), _Body()
        self.traffic.active += works
        try:
            self._check(scope["path"], Headers(scope=scope), works)
            await self.app(scope, self._limited(receive, body), send)
        except ApiError as error:  # of the check only: the app answers its own
            await error.response()(scope, receive, send)
        finally:
            self.traffic.active -= works
            self.traffic.body_bytes -= body.size

    def _check(self, path: str, headers: Headers, works: bool) -> None:
        if self.api_key is not None and path.startswith(self.guarded):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not same_secret(given.strip(), self.api_key):
                raise ApiError(401, "send the server's key as Authorization: Bearer KEY", "invalid_api_key")
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.max_body_bytes:
            raise self._too_large()
        if works and (reason := self.closed()) is not None:
            raise ApiError(503, reason, "unavailable", retry_after=5)
        if works and self.traffic.active > self.traffic.limit:
            raise _too_many()

    def _limited(self, receive: Receive, body: _Body) -> Receive:
        """`receive`, until the body is whole with limits on its size, that of all bodies and the time it takes."""
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def limited() -> Message:
            if body.complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(408, f"the body took more than {BODY_SECONDS:.0f} seconds to arrive") from error
            part = len(message.get("body", b""))
            body.size += part
            self.traffic.body_bytes += part
            body.complete = not message.get("more_body", False)
            if body.size > self.max_body_bytes:
                raise self._too_large()
            if self.traffic.body_bytes > self.traffic.bytes_limit:
                raise _too_many()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.max_body_bytes} bytes: send fewer or smaller pictures")


def _too_many() -> ApiError:
    return ApiError(429, "too many requests at a time: try again later", "queue_full", retry_after=1)
