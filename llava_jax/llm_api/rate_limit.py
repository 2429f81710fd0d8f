"""The rate limit of a server, learned from its refusals.

Servers count in fixed or sliding windows, or fill a bucket steadily, and report little: a refusal (429) and when to try
again (Retry-After). Whatever way it counts, what a server accepts from the end of one pause to the end of the next is
what it accepts in that time: that gives the rate. Between refusals the rate grows, slowly at first.
"""

import asyncio
import math
import sys
import time

from llava_jax.cli import say
from llava_jax.llm_api.errors import Refusal
from llava_jax.llm_api.retry import backoff
from llava_jax.llm_api.stop import Stop, Stopped

GROWTH = 0.001  # of the rate a second, right after a refusal
DOUBLING = 20.0  # seconds without a refusal that double the growth
REPORTED = 60.0  # seconds: a longer wait is reported


class RateLimiter:
    """Delays requests to what the server accepts, in the order in which they come.

    Args:
      server: for messages.
      requests, tokens: known limits a minute, None if not known.
    """

    def __init__(self, server: object, requests: float | None, tokens: float | None, stop: Stop):
        self.server, self.stop = server, stop
        self.limit = RateLimit(requests, tokens)
        self._line = asyncio.Lock()
        self._refusals = 0  # in a row, those of one pause counted once

    async def turn(self, tokens: int) -> None:
        """Waits until a request of so many tokens may be sent. Raises `Stopped`."""
        async with self._line:
            while not self.stop.is_set():
                seconds = self.limit.wait(time.monotonic(), tokens)
                if seconds <= 0:
                    return
                if seconds > REPORTED:
                    say(f"{self.server}: the next request goes out in {seconds:.0f} s", file=sys.stderr)
                await self.stop.interrupts(asyncio.sleep(seconds))
        raise Stopped

    def refused(self, refusal: Refusal, tokens: int) -> None:
        """The server refused a request of so many tokens."""
        self._refusals += self.limit.pause is None
        seconds = backoff(self._refusals) if refusal.retry_after is None else refusal.retry_after
        self.limit.refuse(time.monotonic(), seconds, tokens, refusal.of_tokens)

    def answered(self) -> None:
        """The server answered a request."""
        self._refusals = 0


class RateLimit:
    """When the next request may be sent. Known limits are exceeded by a second's worth at most."""

    def __init__(self, requests: float | None = None, tokens: float | None = None):
        self.requests = Bucket(requests / 60 if requests else math.inf)
        self.tokens = Bucket(tokens / 60 if tokens else math.inf)
        self.pause: tuple[float, float] | None = None  # from, until

    def wait(self, now: float, tokens: float) -> float:
        """Seconds until a request of so many tokens may be sent. If 0, it counts as sent."""
        if self.pause:
            if now < self.pause[1]:
                return self.pause[1] - now
            for bucket in (self.requests, self.tokens):
                bucket.next_cycle(self.pause[1])
            self.pause = None
        seconds = max(self.requests.wait(now, 1.0), self.tokens.wait(now, tokens))
        if seconds <= 0:
            self.requests.take(1.0)
            self.tokens.take(tokens)
        return max(seconds, 0.0)

    def refuse(self, now: float, seconds: float, tokens: float, of_tokens: bool = False) -> None:
        """The server refused a request of so many tokens for so many seconds, in which nothing is sent.

        `of_tokens`: there were too many tokens, not too many requests.
        """
        self.requests.taken -= 1.0
        self.tokens.taken -= tokens
        begin, until = self.pause or (now, now)
        self.pause = (begin, max(until, now + seconds))
        (self.tokens if of_tokens else self.requests).refuse(*self.pause)


class Bucket:
    """The requests or tokens that may be sent now: filled at the rate that the server was seen to accept.

    Times are seconds on one clock. `ceiling` is the known limit a second.
    """

    def __init__(self, ceiling: float = math.inf):
        self.ceiling, self.rate = ceiling, ceiling
        self.level = 0.0 if math.isfinite(ceiling) else math.inf
        self.filled: float | None = None  # when it was last filled
        self.taken = 0.0  # in this cycle
        self.begin = 0.0  # of this cycle

    def wait(self, now: float, amount: float) -> float:
        """Seconds until `amount` may be sent."""
        self._fill(now)
        missing = min(amount, self.rate) - self.level  # more than a second's worth is sent when a second's worth is in
        return max(0.0, missing / self.rate) if math.isfinite(self.rate) else 0.0

    def take(self, amount: float) -> None:
        self.level -= amount
        self.taken += amount

    def refuse(self, begin: float, end: float) -> None:
        """The server was full from `begin` and accepts more from `end`, when a cycle ends: learns the rate of that."""
        self.rate = min(self.ceiling, max(self.taken, 1.0) / max(end - self.begin, 1e-3))
        self.level = min(self.rate * (end - begin), self._max_level)
        self.filled = end

    def next_cycle(self, begin: float) -> None:
        self.begin, self.taken = begin, 0.0

    @property
    def _max_level(self) -> float:
        """A second's worth of a known limit, a minute's of a learned one."""
        return max(self.rate * (1 if math.isfinite(self.ceiling) else 60), 1.0)

    def _fill(self, now: float) -> None:
        if self.filled is None:
            self.begin = self.filled = now
        seconds = max(0.0, now - self.filled)
        self.filled += seconds
        if math.isinf(self.rate):
            return
        quiet = now - self.begin
        growth = GROWTH * 2 ** min(quiet / DOUBLING, 20)
        self.rate = min(self.ceiling, self.rate * (1 + growth * seconds))
        self.level = min(self.level + self.rate * seconds, self._max_level)
