"""How fast a server takes requests, learned from the moments at which it refuses them.

Servers count in windows (fixed or sliding) or fill a bucket steadily, and tell little of it: a refusal (429) and when
to come again (Retry-After). From the end of one pause to the end of the next a server has taken what it takes in that
time, whatever way it counts: that gives the rate. Between refusals the rate grows, slowly at first.
"""

import math
from typing import NamedTuple

GROWTH = 0.001  # of the rate a second, right after a refusal
DOUBLING = 20.0  # seconds without a refusal that double the growth


class Bucket:
    """What may still be sent, of requests or of tokens: it fills at the rate that the server was seen to take.

    Times are seconds on one clock. `ceiling` is the rate a second that is never passed.
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
        missing = min(amount, self.rate) - self.level  # what is more than a second's worth goes when that is there
        return max(0.0, missing / self.rate) if math.isfinite(self.rate) else 0.0

    def take(self, amount: float) -> None:
        self.level -= amount
        self.taken += amount

    def refuse(self, begin: float, end: float) -> None:
        """The server was full from `begin` and takes more at `end`: what it took in the cycle that ends then."""
        self.rate = min(self.ceiling, max(self.taken, 1.0) / max(end - self.begin, 1e-3))
        self.level = min(self.rate * (end - begin), self._most)
        self.filled = end

    def next_cycle(self, begin: float) -> None:
        self.begin, self.taken = begin, 0.0

    @property
    def _most(self) -> float:
        """What may be saved up: a second's worth of a known limit, a minute's of a learned one."""
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
        self.level = min(self.level + self.rate * seconds, self._most)


class Refusal(NamedTuple):
    """A 429: seconds to wait, and whether it was tokens, not requests, that were too many."""

    retry_after: float
    of_tokens: bool = False


class RateLimit:
    """When the next request may be sent. Limits a minute that are known are passed by a second's worth at most."""

    def __init__(self, requests: float | None = None, tokens: float | None = None):
        self.requests = Bucket(requests / 60 if requests else math.inf)
        self.tokens = Bucket(tokens / 60 if tokens else math.inf)
        self.pause: tuple[float, float] | None = None  # from, until

    def wait(self, now: float, tokens: float) -> float:
        """Seconds until a request of so many tokens may be sent: 0 counts it as sent."""
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

    def refuse(self, now: float, refusal: Refusal, tokens: float) -> None:
        """The server did not take a request of so many tokens. Nothing is sent before it takes more."""
        self.requests.taken -= 1.0
        self.tokens.taken -= tokens
        begin, until = self.pause or (now, now)
        self.pause = (begin, max(until, now + refusal.retry_after))
        (self.tokens if refusal.of_tokens else self.requests).refuse(*self.pause)
