"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}` with an HTTP status."""

import http
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

MAX_MESSAGE = 400  # characters
MESSAGES = {  # instead of those of pydantic that speak of Python
    "extra_forbidden": "is no field that is known here: leave it out",
    "model_type": "has to be an object",
    "model_attributes_type": "has to be an object",
    "list_type": "has to be a list",
}


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response with status 400 or above."""

    error: ErrorBody


class ApiError(HTTPException):
    """A refused request. An HTTPException, since FastAPI would hide other errors while it reads bodies.

    Args:
      status: the HTTP status.
      message: what is wrong, where, and how to fix it.
      code: for programs.
      param: the field of the request.
      retry_after: seconds after which the same request may be accepted.
      close: whether to close the connection, for requests whose end is unclear.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
    ):
        super().__init__(status, message)
        self.code, self.param, self.retry_after, self.close = code, param, retry_after, close

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after)))
        if self.status_code == http.HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        if self.close:
            headers["Connection"] = "close"
        return JSONResponse(self.body(), self.status_code, headers)

    def body(self) -> dict:
        param = None if self.param is None else _printable(self.param)
        error = ErrorBody(message=_printable(self.detail), type=_type(self.status_code), param=param, code=self.code)
        return ErrorResponse(error=error).model_dump()


def install(app: FastAPI) -> None:
    """Gives every error of `app` OpenAI's format."""
    app.add_exception_handler(ApiError, lambda request, error: error.response())
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)


def from_validation(error: ValidationError, body: Any) -> ApiError:
    """The error of an invalid request. Of several errors it is the deepest one: where a field may have several types,
    that is an error of the type that the client meant.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(found, key=lambda found: (len(found["loc"]), not found["type"].endswith("_type")))
    param = _path(first["loc"], body, missing=first["type"] == "missing")
    code = {
        "missing": "missing_required_parameter",
        "extra_forbidden": "unknown_parameter",
        "unsupported": "unsupported_parameter",
    }.get(first["type"], "invalid_value")
    if first["loc"] == () and not isinstance(body, dict):
        return ApiError(400, "the body has to be a JSON object, sent with Content-Type: application/json", code)
    what = MESSAGES.get(first["type"], first["msg"])
    return ApiError(400, f"{param}: {what}" if param else what, code, param)


def _path(location: tuple[str | int, ...], body: Any, missing: bool) -> str | None:
    """`messages.0.content`: the part of pydantic's location that exists in the body, and a missing field at its end.
    The location also names the types that pydantic tried."""
    path: list[str] = []
    type_named = False  # of the current object; a type may have the name of a field
    for i, key in enumerate(location, 1):
        last = i == len(location)
        named = isinstance(body, dict) and key in (body.get("type"), body.get("role"))
        if named and not (type_named or last) and (key not in body or location[i] in body):
            type_named = True
        elif isinstance(body, dict) and key in body or isinstance(body, list) and isinstance(key, int):
            path.append(str(key))
            body, type_named = body[key], False
        elif missing and last:
            path.append(str(key))
    return ".".join(path) or None


def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Errors of FastAPI itself: an unknown path, a wrong method, an invalid body."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    path = request.scope["path"]  # `request.url` takes it from the Host header
    response = ApiError(error.status_code, f"{request.method} {path}: {error.detail}", code).response()
    response.headers.update(error.headers or {})
    return response


def _bug(request: Request, error: Exception) -> JSONResponse:
    response = ApiError(500, "the server made a mistake; its log has the details", "internal_error").response()
    response.headers["x-request-id"] = request.scope.get("request_id", "")  # this response bypasses the middleware
    return response


def _type(status: int) -> str:
    named = {401: "authentication_error", 429: "rate_limit_error"}
    return named.get(status, "server_error" if status >= 500 else "invalid_request_error")


def _printable(text: str) -> str:
    """One line of valid Unicode, since it may quote any part of the request."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 3]}..."
