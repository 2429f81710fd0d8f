"""Logs a line for each response, with the request id that the response has, too, and counts it."""

import logging
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_PATH = 200  # characters that are logged
_logger = logging.getLogger("uvicorn.error")


class Log:
    """The outermost ASGI middleware. Answers HEAD like GET, without the body. Passes path and status to `responded`."""

    def __init__(self, app: ASGIApp, responded: Callable[[str, int], None]):
        self.app, self.responded = app, responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        method, request_id = scope["method"], _request_id(Headers(scope=scope))

        async def logged(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
                self.responded(scope["path"], message["status"])
                client = (scope.get("client") or ["-"])[0]
                path = ascii(scope["path"][:_PATH])[1:-1]
                _logger.info("%s %s %s %d %s", ascii(client)[1:-1], method, path, message["status"], request_id)
            elif method == "HEAD":
                message = message | {"body": b""}
            await send(message)

        scope = scope | {"request_id": request_id, "method": "GET" if method == "HEAD" else method}
        try:
            await self.app(scope, receive, logged)
        except Exception:
            _logger.error("request %s failed:", request_id)  # uvicorn prints the traceback next
            raise


def _request_id(headers: Headers) -> str:
    """The client's own id if it is harmless, else a new one."""
    given = headers.get(HEADER, "")
    return given if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", given) else uuid.uuid4().hex
