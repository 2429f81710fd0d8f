"""Answers many requests at a time with one model.

One thread owns the device and answers; `submit` and `Answer` may be used from any other.
"""

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from llava_jax.checkpoint import Checkpoint
from llava_jax.cli import UserError, track
from llava_jax.data.conversation import Template
from llava_jax.generate import Generator, Request, Sampling
from llava_jax.models.config import LlavaConfig

SAMPLES = 1024  # of the time to the first token that `stats` keeps


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
    takes them, which is called in the engine's thread.

    Attributes:
      prompt_tokens: positions that the prompt takes, pictures included.
      completion_tokens: tokens generated so far.
      finish_reason: "stop", "length" or "cancelled"; None until it is finished, or where it failed.
      first_token_seconds: from `submit` to the first token; None before.
    """

    def __init__(self, request: Request, sampling: Sampling, prompt_tokens: int, sink: Sink | None = None):
        self.request, self.sampling, self.prompt_tokens = request, sampling, prompt_tokens
        self.completion_tokens = 0
        self.finish_reason: str | None = None
        self.first_token_seconds: float | None = None
        self._submitted = time.monotonic()
        self._cancelled = threading.Event()
        self._pieces: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
        self._put = sink or self._pieces.put

    def __iter__(self) -> Iterator[Piece]:
        """May be done once. Raises UserError or EngineError where the request failed."""
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def cancel(self) -> None:
        """Ends it, before the next dispatch; after its end this changes nothing."""
        self._cancelled.set()


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and what is going on."""

    slots: int
    busy: int  # slots that answer
    queued: int  # requests that wait for one
    prompt_tokens: int
    generated_tokens: int
    finished: int
    cancelled: int
    failed: int
    prefix_tokens: int  # of the prompts, what was not computed again
    first_token_seconds: tuple[float, ...]  # of the last `SAMPLES` answers


class Engine:
    """Args:
    generator: the model, its tokenizer and template.
    slots: answers at a time.
    context: positions of a prompt and its answer; by default as many as the model knows.
    queue: requests that may wait for a slot.
    """

    def __init__(self, generator: Generator, *, slots: int = 8, context: int | None = None, queue: int = 64):
        longest = generator.config.text.max_position_embeddings
        self.context = min(context or longest, longest)
        self.slots, self.ready = slots, False
        self._generator, self._limit = generator, queue
        self._waiting: collections.deque[Answer] = collections.deque()
        self._changed = threading.Condition()
        self._closing, self._draining = False, True
        self._counts = collections.Counter()
        self._busy = 0
        self._first_token_seconds: collections.deque[float] = collections.deque(maxlen=SAMPLES)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, template: Template | None = None, *, dtype: jnp.dtype | None = None, **options
    ) -> "Engine":
        """Loads the weights in `dtype`, by default float32 on CPUs and bfloat16 elsewhere."""
        return cls(Generator.from_checkpoint(checkpoint, template, dtype), **options)

    @property
    def config(self) -> LlavaConfig:
        return self._generator.config

    @property
    def capacity(self) -> int:
        """Requests that it holds at a time: those it answers and those that wait."""
        return self.slots + self._limit

    @property
    def tokenizer(self):
        return self._generator.tokenizer

    @property
    def template(self) -> Template:
        return self._generator.template

    def warm_up(self) -> None:
        """Compiles what answering takes; then the engine is `ready`."""
        for _ in track(range(1), "compiling"):
            for _ in self._generator.stream(Request([("user", "Hello")]), Sampling(max_new_tokens=8)):
                pass
        self.ready = True

    def count_tokens(self, request: Request) -> int:
        """Positions that its prompt takes, pictures included."""
        return len(self._generator._encode(request).tokens)

    def room(self, request: Request) -> int:
        """Positions that the prompt leaves for an answer; negative if the prompt itself does not fit."""
        return self.context - self.count_tokens(request)

    def submit(self, request: Request, sampling: Sampling, sink: Sink | None = None) -> Answer:
        """Hands over a request. With a `sink`, which must not block, the answer is not iterated.

        Raises:
          UserError: it is malformed or a picture is damaged.
          ContextExceeded: with `max_new_tokens` it is beyond the context.
          QueueFull: too many wait already.
          EngineClosed: the engine is closed or closing.
        """
        length, new = self.count_tokens(request), sampling.max_new_tokens
        if length + new > self.context:
            raise ContextExceeded(
                f"request {request}: its prompt takes {length} positions and the answer up to {new}, but the context "
                f"has {self.context}: shorten the conversation or lower max-new-tokens",
                length,
                new,
                self.context,
            )
        answer = Answer(request, sampling, length, sink)
        with self._changed:
            if self._closing:
                raise EngineClosed("the engine is shutting down")
            if len(self._waiting) >= self._limit:
                raise QueueFull(1.0)
            self._waiting.append(answer)
            self._changed.notify_all()
        return answer

    def stats(self) -> EngineStats:
        with self._changed:
            counts = {
                name: self._counts[name]
                for name in ("prompt_tokens", "generated_tokens", "finished", "cancelled", "failed", "prefix_tokens")
            }
            return EngineStats(
                slots=self.slots,
                busy=self._busy,
                queued=len(self._waiting),
                first_token_seconds=tuple(self._first_token_seconds),
                **counts,
            )

    def close(self, drain: bool = True) -> None:
        """Takes no more requests. Finishes those that it has, or cancels them without `drain`; then returns."""
        with self._changed:
            self._closing, self._draining, self.ready = True, drain, False
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                answer = self._waiting.popleft()
                self._busy = 1
            self._answer(answer)
            with self._changed:
                self._busy = 0

    def _answer(self, answer: Answer) -> None:
        try:
            pieces = self._generator._pieces([self._generator._encode(answer.request)], answer.sampling, 4)
            answer.finish_reason = None
            for (text,) in pieces:
                if answer.first_token_seconds is None:
                    answer.first_token_seconds = time.monotonic() - answer._submitted
                    self._first_token_seconds.append(answer.first_token_seconds)
                if answer._cancelled.is_set() or (self._closing and not self._draining):
                    answer.finish_reason = "cancelled"
                    break
                if text:
                    answer.completion_tokens += len(self.tokenizer.encode(text, add_special_tokens=False))
                    answer._put(Piece(text))
            else:
                longest = answer.completion_tokens >= answer.sampling.max_new_tokens
                answer.finish_reason = "length" if longest else "stop"
            self._count("cancelled" if answer.finish_reason == "cancelled" else "finished", answer)
            answer._put(None)
        except UserError as error:
            self._count("failed", answer)
            answer._put(error)
        except Exception as error:
            self._count("failed", answer)
            failure = EngineError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            answer._put(failure)

    def _count(self, outcome: str, answer: Answer) -> None:
        with self._changed:
            self._counts[outcome] += 1
            self._counts["prompt_tokens"] += answer.prompt_tokens
            self._counts["generated_tokens"] += answer.completion_tokens
