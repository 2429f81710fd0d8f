"""Retries: a request is tried again after transient errors, until it is answered or its tries are used up."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from llava_jax.cli import UserError
from llava_jax.llm_api.errors import SERVER_ERROR, Refused, TransientError
from llava_jax.llm_api.ledger import Answer
from llava_jax.llm_api.stop import Stop

BACKOFF, MAX_BACKOFF = 0.5, 60.0  # seconds


class Retry:
    """Retries the requests to one server.

    Args:
      server: for error messages.
      tries: of a request before it has failed. Rate limit errors are not counted.
      patience: seconds of rate limit errors without an answer to any request before giving up.
    """

    def __init__(self, server: object, tries: int, patience: float, stop: Stop):
        self.server, self.tries, self.patience, self.stop = server, tries, patience, stop
        self.answered_at = time.monotonic()  # when a request was answered last
        self.refused_since: float | None = None  # the first rate limit error after that

    async def until_answered(self, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
        """Calls `attempt` until it raises no `TransientError`.

        Raises:
          Refused: all tries failed, while the server answered other requests.
          UserError: all tries failed, and the server answered nothing.
        """
        begin, failures = time.monotonic(), 0
        while True:
            try:
                answer = await attempt()
                self.answered_at, self.refused_since = time.monotonic(), None
                return answer
            except TransientError as error:
                if error.refusal:  # the rate limit delays the next attempt
                    self.refused_since = self.refused_since or time.monotonic()
                    if time.monotonic() - self.refused_since <= self.patience:
                        continue
                    message = f"only refusals for {self.patience:.0f} s ({error}); the same command resumes"
                    raise UserError(f"{self.server}: {message}") from error
                failures += 1
                if failures >= self.tries:
                    if self.answered_at > begin:
                        raise Refused(SERVER_ERROR, str(error)) from error
                    raise UserError(f"{self.server}: gives no answer ({error}); the same command resumes") from error
                await self.stop.interrupts(asyncio.sleep(backoff(failures)))


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row: exponential, with jitter."""
    return random.uniform(0.1, 1.0) * min(MAX_BACKOFF, BACKOFF * 2**failures)
