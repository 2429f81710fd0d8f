"""Reads the JSON of a request within limits. Its structure is checked before objects are made from it, so that no body
costs more than a fraction of a second and its own size in memory."""

import inspect
import re
from typing import NoReturn, TypeVar

import anyio
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from llava_jax.serve.errors import ApiError, from_validation

Body = TypeVar("Body", bound=BaseModel)

MAX_VALUES = 50_000  # strings, numbers, literals, lists and objects
MAX_DEPTH = 64
MAX_KEYS = 1024  # of an object
MAX_KEY = 10_000  # bytes of one
MAX_SCALAR = 100  # bytes of a number or a literal
MAX_TEXT = 4 << 20  # bytes of a string that is not a data URL
MAX_ESCAPES = 1 << 20  # backslashes
MAX_SPACE = 10_000  # bytes between two values

_SPACE = re.compile(rb"[\s,:]{0,%d}+" % MAX_SPACE)
_SCALAR = re.compile(rb'[^\s"\[\]{},:]{0,%d}+' % (MAX_SCALAR + 1))
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_KEY_END = re.compile(rb"\s*+:")


class BoundedRoute(APIRoute):
    """A route whose endpoint takes a request and its `body`, which is parsed in a thread."""

    parsing = anyio.CapacityLimiter(2)  # parsing holds the interpreter's lock most of the time

    def get_route_handler(self):
        kind = inspect.get_annotations(self.endpoint)["body"]

        async def handle(request: Request) -> Response:
            try:
                data = await _read(request)
            except ClientDisconnect:
                return Response(status_code=499)  # the client has disconnected
            body = await anyio.to_thread.run_sync(parse, data, kind, limiter=self.parsing)
            del data  # up to 32 MB, not needed while the answer is generated
            return await self.endpoint(body, request)

        return handle


async def _read(request: Request) -> bytearray:
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(400, "the body has to be a JSON object, sent with Content-Type: application/json")
    data = bytearray()
    async for part in request.stream():
        data += part
    return data


def parse(data: bytes | bytearray, kind: type[Body]) -> Body:
    """Parses and validates a body. Raises `ApiError`."""
    check(data)
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", "invalid_json") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise from_validation(error, value) from None


def check(data: bytes | bytearray) -> None:
    """Raises `ApiError` for JSON beyond the limits above, and for duplicate keys of an object. The parser finds all
    other errors."""
    if data.count(b"\\") > MAX_ESCAPES:
        _refuse(f"has more than {MAX_ESCAPES} backslashes")
    ascii, position, values = data.isascii(), _SPACE.match(data).end(), 0
    keys: list[set[bytes]] = []  # of each object or list that contains `position`
    while position < len(data):
        match data[position]:
            case 0x5B | 0x7B:  # [ {
                keys.append(set())
                end = position + 1
            case 0x5D | 0x7D:  # ] }
                if keys:
                    keys.pop()
                end, values = position + 1, values - 1
            case 0x22:  # "
                end = _string_end(data, position)
                _check_string(data, position, end, ascii)
                if keys and _KEY_END.match(data, end):
                    _add_key(keys[-1], bytes(data[position:end]))
            case _:
                end = _SCALAR.match(data, position).end()
                if not 0 < end - position <= MAX_SCALAR:
                    what = f"a number of more than {MAX_SCALAR}" if end > position else f"more than {MAX_SPACE} blank"
                    _refuse(f"has {what} characters")
        values += 1
        if values > MAX_VALUES or len(keys) > MAX_DEPTH:
            _refuse(f"has more than {MAX_VALUES} values, or lists and objects nested more than {MAX_DEPTH} deep")
        position = _SPACE.match(data, end).end()


def _string_end(data: bytes | bytearray, start: int) -> int:
    """The end of the string that begins at `start`."""
    end = data.find(b'"', start + 1) + 1
    if end and data.find(b"\\", start, end) >= 0:
        match = _STRING.match(data, start)
        end = match.end() if match else 0
    if not end:
        raise ApiError(400, f"the body is not JSON: the string at byte {start} has no end", "invalid_json")
    return end


def _check_string(data: bytes | bytearray, start: int, end: int, ascii: bool) -> None:
    if end - start <= MAX_TEXT:
        return
    if data[start + 1 : start + 6].lower() != b"data:":
        _refuse(f"has a text of more than {MAX_TEXT} bytes")
    if not (ascii or data[start:end].isascii()):
        _refuse("has a data URL that is not ASCII")


def _add_key(keys: set[bytes], key: bytes) -> None:
    if len(key) > MAX_KEY:
        _refuse(f"has a key of more than {MAX_KEY} bytes")
    if b"\\" in key:
        try:
            key = b'"%s"' % from_json(key).encode()
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: a key has {error}", "invalid_json") from None
    if key in keys:
        _refuse(f"has the key {key[:80].decode(errors='replace')} twice in one object")
    if len(keys) == MAX_KEYS:
        _refuse(f"has an object of more than {MAX_KEYS} keys")
    keys.add(key)


def _refuse(what: str) -> NoReturn:
    raise ApiError(400, f"the body {what}", "invalid_value")
