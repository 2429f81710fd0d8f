"""An answer that the engine's thread generates, as its client sees it."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from llava_jax.inference.prefix_cache import PreparedPrompt
from llava_jax.inference.requests import Sampling


class EngineError(Exception):
    """The engine failed at a valid request."""


class EngineClosed(EngineError):
    """The engine takes no more requests."""


class QueueFull(EngineError):
    """The queue is full; a slot should be free in about `retry_after` seconds."""

    def __init__(self, retry_after: float):
        super().__init__(f"the queue is full: try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Alternative(NamedTuple):
    """A token that was likely at a position."""

    token: str
    bytes: bytes
    logprob: float


class TokenLogprob(NamedTuple):
    """A token of an answer, and the most likely ones at its position."""

    token: str
    bytes: bytes
    logprob: float
    top: Sequence[Alternative]


class Piece(NamedTuple):
    """New text of an answer, which does not change any more."""

    text: str
    token_logprobs: Sequence[TokenLogprob] = ()  # of the new tokens, where `Sampling.logprobs` asks for them


Sink = Callable[[Piece | BaseException | None], None]  # gets the pieces, then None, or the error of a failed request


class Answer:
    """An answer to a prompt. Iterating yields its pieces as they are generated, unless a `sink` gets them, which is
    called in the engine's thread."""

    def __init__(self, prompt: PreparedPrompt, sampling: Sampling, sink: Sink | None = None):
        self.prompt, self.sampling = prompt, sampling
        self.prefix_tokens = 0  # positions of the prompt that the prefix cache held
        self.tokens: list[int] = []  # ids generated so far, including a stop token
        # "stop", "length" or "cancelled"; None before the end, and where the request failed.
        self.finish_reason: str | None = None
        self.submitted = time.monotonic()  # when `Engine.submit` was called
        self.first_token_seconds: float | None = None  # from then to the first token; None before it
        self._cancelled = threading.Event()
        self._pieces: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
        self._put = sink or self._pieces.put

    @property
    def prompt_tokens(self) -> int:
        """Positions of the prompt, images included."""
        return len(self.prompt.tokens)

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Piece]:
        """Can be used once. Raises `UserError` or `EngineError` where the request failed."""
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def cancel(self) -> None:
        """Ends the answer before the next dispatch. Does nothing once it is finished."""
        self._cancelled.set()

    # The methods below are for the engine's thread.

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def give(self, piece: Piece) -> None:
        if self.first_token_seconds is None:
            self.first_token_seconds = time.monotonic() - self.submitted
        if piece.text or piece.token_logprobs:
            self._put(piece)

    def finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._put(None)

    def fail(self, error: BaseException) -> None:
        self._put(error)
