"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, and the right status."""

import http
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

LONGEST = 400  # characters of a message
WORDS = {  # for errors whose text by pydantic speaks of Python
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
    """What every status of 400 and above has as its body."""

    error: ErrorBody


class ApiError(HTTPException):
    """A request that is refused. An HTTPException, or FastAPI would hide it where it reads bodies.

    Args:
      status: of HTTP.
      message: what, where, and the way out.
      code: for programs.
      param: the field of the request.
      retry_after: seconds after which the same request may be accepted.
      close: whether the connection is closed, as where it is unclear where the request ends.
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
    """Every error that leaves `app` has OpenAI's shape."""
    app.add_exception_handler(ApiError, lambda request, error: error.response())
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)


def from_validation(error: ValidationError, body: Any) -> ApiError:
    """What is wrong with a request, in a line: of several things the one deepest within it.

    Where a field may be of several types, that one is of the type which the client meant.
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
    what = WORDS.get(first["type"], first["msg"])
    return ApiError(400, f"{param}: {what}" if param else what, code, param)


def _path(location: tuple[str | int, ...], body: Any, missing: bool) -> str | None:
    """`messages.0.content`: of pydantic's location, which names between them the types that it tried, what is there in
    the body, and at the end what is missing there."""
    path: list[str] = []
    type_named = False  # of the object at hand; its name may be that of a field, too
    for i, key in enumerate(location, 1):
        last = i == len(location)
        if not (type_named or last) and isinstance(body, dict) and key in (body.get("type"), body.get("role")):
            type_named = True
        elif isinstance(body, dict) and key in body or isinstance(body, list) and isinstance(key, int):
            path.append(str(key))
            body, type_named = body[key], False
        elif missing and last:
            path.append(str(key))
    return ".".join(path) or None


def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    """What FastAPI itself refuses: an unknown path, a wrong method, a body that cannot be parsed."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    path = request.scope["path"]  # `request.url` would have it from the Host header
    response = ApiError(error.status_code, f"{request.method} {path}: {error.detail}", code).response()
    response.headers.update(error.headers or {})
    return response


def _bug(request: Request, error: Exception) -> JSONResponse:
    response = ApiError(500, "the server made a mistake; its log has the details", "internal_error").response()
    response.headers["x-request-id"] = request.scope.get("request_id", "")  # this is sent past all middleware
    return response


def _type(status: int) -> str:
    match status:
        case 401:
            return "authentication_error"
        case 429:
            return "rate_limit_error"
        case _ if status >= 500:
            return "server_error"
        case _:
            return "invalid_request_error"


def _printable(text: str) -> str:
    """Text in a line that any JSON can carry, whatever of the request it quotes."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
