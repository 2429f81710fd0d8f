"""An answer on its way from the engine's thread to whoever asked."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from llava_jax.cli import UserError
from llava_jax.inference.generate import Request, Sampling


class EngineError(Exception):
    """The engine failed at a request that was in order."""


class EngineClosed(EngineError):
    """The engine takes no more requests."""


class QueueFull(EngineError):
    """As many requests wait as may; `retry_after` seconds from now there should be room."""

    def __init__(self, retry_after: float):
        super().__init__(f"the queue is full: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class ContextExceeded(UserError):
    """A prompt and its answer take more positions than the context has."""

    def __init__(self, message: str, prompt_tokens: int, new_tokens: int, context: int):
        super().__init__(message)
        self.prompt_tokens, self.new_tokens, self.context = prompt_tokens, new_tokens, context


class Alternative(NamedTuple):
    """A token that was likely at a place."""

    token: str
    bytes: bytes
    logprob: float


class TokenLogprob(NamedTuple):
    """A token of an answer, and the likeliest ones at its place."""

    token: str
    bytes: bytes
    logprob: float
    top: Sequence[Alternative]


class Piece(NamedTuple):
    """What is new and certain of an answer."""

    text: str
    token_logprobs: Sequence[TokenLogprob] = ()  # of the new tokens, where `Sampling.logprobs` asks for them


Sink = Callable[[Piece | BaseException | None], None]  # takes pieces, then None, or what the request failed of


class Answer:
    """A request in the engine's hands. Iterating gives its pieces as they come, until it is finished, unless a `sink`
    takes them, which is called in the engine's thread. `prompt_tokens`: positions of the prompt, images included."""

    def __init__(self, request: Request, sampling: Sampling, prompt_tokens: int, sink: Sink | None = None):
        self.request, self.sampling, self.prompt_tokens = request, sampling, prompt_tokens
        self.prefix_tokens = 0  # how many of these were not computed again
        self.tokens: list[int] = []  # ids generated so far, one that ends the answer included
        self.finish_reason: str | None = None  # "stop", "length" or "cancelled"; None before, or where it failed
        self.first_token_seconds: float | None = None  # from `submit` to the first token; None before
        self.submitted = time.monotonic()
        self._cancelled = threading.Event()
        self._pieces: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
        self._put = sink or self._pieces.put

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Piece]:
        """May be done once. Raises UserError or EngineError where the request failed."""
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def cancel(self) -> None:
        """Ends it, before the next dispatch; after its end this changes nothing."""
        self._cancelled.set()

    # What follows is for the engine's thread.

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def give(self, piece: Piece) -> None:
        """Passes on what is new."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self.submitted
        if piece.text or piece.token_logprobs:
            self._put(piece)

    def finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._put(None)

    def fail(self, error: BaseException) -> None:
        self._put(error)
