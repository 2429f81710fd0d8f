"""One request over HTTP: sent whole or streamed, and what comes back as an `Answer` or as one of two errors."""

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import httpx2
import openai

from llava_jax.llm_api.errors import ServerError, TransientError, server_error
from llava_jax.llm_api.ledger import Answer, Request
from llava_jax.llm_api.replies import join_chunks, read_completion, read_json
from llava_jax.llm_api.settings import Settings, connect

PATH = "/chat/completions"


class Transport:
    """Sends requests to a server. `close` closes its connections."""

    def __init__(self, settings: Settings):
        self.settings, self.api = settings, connect(settings)
        more = {"stream": True, "stream_options": {"include_usage": True}} if settings.stream else {}
        self._rest = json.dumps({**more, "model": settings.model, **settings.body}).encode()[1:]  # of a body

    @property
    def server(self) -> object:
        """The server's address, for messages."""
        return self.api.base_url

    async def close(self) -> None:
        await self.api.close()

    async def send(self, request: Request) -> Answer:
        """Raises `ServerError` for an error that the server reports, `TransientError` for one on the way."""
        headers: Mapping[str, str] = {}
        try:
            async with asyncio.timeout(self.settings.timeout):
                completion, headers = await (self._streamed if self.settings.stream else self._whole)(request)
            return read_completion(completion, request.messages, self.settings.max_completion_tokens)
        except ServerError as error:
            error.headers = headers
            raise
        except openai.APIStatusError as error:
            failure = server_error(error.body or error.message, error.status_code)
            failure.headers = error.response.headers
            raise failure from error
        except (openai.APIError, httpx2.HTTPError, TimeoutError, ValueError) as error:  # cut off, too late, no JSON
            if body := getattr(error, "body", None):  # in a stream
                failure = server_error(body)
                failure.charged = True
                raise failure from error
            raise TransientError(first_cause(error), charged=not _never_sent(error)) from error

    async def _whole(self, request: Request) -> tuple[Any, Mapping[str, str]]:
        """A completion, and the headers of its response."""
        response = await self._post(request, cast_to=httpx2.Response)
        return read_json(response.content), response.headers

    async def _streamed(self, request: Request) -> tuple[Any, Mapping[str, str]]:
        """The same of a streamed answer, joined to a completion."""
        how = {"stream": True, "stream_cls": openai.AsyncStream[object]}
        async with await self._post(request, cast_to=object, **how) as stream:
            headers = stream.response.headers
            if "event-stream" not in headers.get("content-type", "event-stream"):  # an error, or a server without it
                return read_json(await stream.response.aread()), headers
            return join_chunks([chunk async for chunk in stream]), headers

    async def _post(self, request: Request, **how: Any) -> Any:
        """As chat.completions.create, which spends more time on checking messages and answer than all the rest takes.

        Each try of a request with the same options has the same key, also by later processes: gateways that know such
        keys charge it once.
        """
        key = [self._rest.decode(), request.task, request.attempt, request.prompt_hash]
        headers = {"Idempotency-Key": hashlib.sha256(json.dumps(key).encode()).hexdigest()}
        body = b'{"messages": %b, %b' % (request.messages_json, self._rest)  # messages are encoded only once
        return await self.api.post(PATH, content=body, options={"headers": headers}, **how)


def first_cause(error: BaseException) -> str:
    """The error at the beginning of a chain of errors, in one line."""
    *_, first = _causes(error)
    return " ".join(f"{type(first).__name__}: {first}".split())


def _never_sent(error: BaseException) -> bool:
    """Whether no connection was made. One that the server closes may have carried the request."""
    return any(
        isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError) for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__
