"""Passes the answers to one request from the engine's thread to the event loop."""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Sequence
from typing import NoReturn

import anyio

from llava_jax.cli import UserError
from llava_jax.data.templates import Template
from llava_jax.inference.adapters import Adapter, UnknownAdapter
from llava_jax.inference.answer import Answer, EngineClosed, EngineError, Piece, QueueFull
from llava_jax.inference.constraints import ConstraintFailed
from llava_jax.inference.engine import Engine, UnknownToken
from llava_jax.inference.prefix_cache import PreparedPrompt, Text
from llava_jax.inference.prompts import ContextExceeded
from llava_jax.inference.requests import Request, Sampling
from llava_jax.serve.errors import ApiError
from llava_jax.serve.metrics import Metrics

PING_SECONDS = 15.0  # without data, after which a waiting client gets a comment


async def prepare(
    engine: Engine, request: Request | Text, adapter: Adapter, field: str = "messages", special: bool = True
) -> PreparedPrompt:
    """`Engine.prepare` in a thread. Raises `ApiError` that names the `field` of the request."""
    try:
        return await anyio.to_thread.run_sync(engine.prepare, request, adapter, special)
    except UserError as error:
        _raise(error, field)


class Answers:
    """An answer to each of `wanted`, prompts and how they are sampled. The engine's thread delivers the pieces.

    Args:
      field: of the request, that has the prompt.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        wanted: Sequence[tuple[PreparedPrompt, Sampling]],
        field: str = "messages",
    ):
        self.answers: list[Answer] = []
        self._cancelled = False
        self._engine, self._metrics, self._wanted, self._field = engine, metrics, wanted, field
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()
        self._start = time.monotonic()

    @property
    def template(self) -> Template:
        """Of the first prompt."""
        return self.answers[0].prompt.adapter.prompts.template

    async def submit(self) -> None:
        """Submits all to the engine, or none. Raises `ApiError`."""
        try:
            await anyio.to_thread.run_sync(self._submit)
        except BaseException as error:
            self.cancel()
            _raise(error, self._field)

    def _submit(self) -> None:
        for index, (prompt, sampling) in enumerate(self._wanted):
            self.answers.append(self._engine.submit(prompt, sampling, sink=functools.partial(self._put, index)))
            if self._cancelled:  # by the event loop, which does not wait for this thread
                return self.cancel()

    def _put(self, index: int, item: Piece | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nothing waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, item))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None] | None]:
        """Yields (index of an answer, its next piece), with None for a piece at the answer's end; and None after every
        `PING_SECONDS` without a piece. Raises `ApiError` where an answer failed."""
        running = len(self.answers)
        while running:
            try:
                async with asyncio.timeout(PING_SECONDS):
                    index, item = await self._events.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(item, BaseException):
                _raise(item)
            if item is None:
                running -= 1
                self._end(self.answers[index])
            yield index, item

    def _end(self, answer: Answer) -> None:
        if answer.finish_reason == "cancelled":  # by the engine: after `cancel` nothing reads the pieces
            raise ApiError(503, "the server is shutting down", "unavailable", retry_after=5)
        self._metrics.finished(answer, time.monotonic() - self._start)

    def cancel(self) -> None:
        """Cancels all unfinished answers, also those that are being submitted."""
        self._cancelled = True
        for answer in self.answers:
            answer.cancel()


def _raise(error: BaseException, field: str = "messages") -> NoReturn:
    """Raises the `ApiError` of an error of the engine, and other errors as they are."""
    match error:
        case QueueFull():
            raise ApiError(429, str(error), "queue_full", retry_after=error.retry_after) from error
        case ContextExceeded():
            raise ApiError(400, str(error), "context_length_exceeded", field) from error
        case UnknownAdapter():  # it was unloaded just now
            raise ApiError(404, str(error), "model_not_found", "model") from error
        case UnknownToken():
            raise ApiError(400, str(error), "invalid_value") from error
        case UserError():
            raise ApiError(400, str(error), "invalid_value", field) from error
        case EngineClosed():
            raise ApiError(503, str(error), "unavailable", retry_after=5) from error
        case ConstraintFailed():
            what = f"the format of the answer takes too much work ({error}): make it simpler"
            raise ApiError(400, what, "invalid_value") from error
        case EngineError():
            raise ApiError(500, "the answer failed: the server's log has the details", "internal_error") from error
    raise error
