"""The rate limit, learned from refusals, with a clock of its own."""

import asyncio
from types import SimpleNamespace

import pytest

from llava_jax.llm_api import rate_limit
from llava_jax.llm_api.errors import Refusal
from llava_jax.llm_api.rate_limit import RateLimit, RateLimiter
from llava_jax.llm_api.stop import Stop, Stopped


def test_known_and_learned_rates():
    known, sent = RateLimit(requests=120), []
    for tick in range(600, 1800):  # after a minute of rest
        sent += [tick] * (known.wait(tick / 10, 1.0) <= 0)
    assert 238 <= len(sent) <= 242
    refused = RateLimit()
    assert refused.wait(0.0, 1.0) == 0
    refused.refuse(0.0, 5.0, 1.0)
    assert refused.wait(1.0, 1.0) == 4.0


def test_tokens_have_a_rate_of_their_own():
    known, sent = RateLimit(tokens=6000), 0
    for tick in range(600, 1800):
        sent += known.wait(tick / 10, 50.0) <= 0
    assert 238 <= sent <= 242
    refused = RateLimit()
    assert all(refused.wait(0.0, 100.0) == 0 for _ in range(10))
    refused.refuse(1.0, 9.0, 100.0, of_tokens=True)
    assert refused.tokens.rate == pytest.approx(900 / 10) and refused.requests.rate == float("inf")


def test_refusals_without_a_time_back_off_once_a_pause(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rate_limit, "backoff", lambda failures: 10.0**failures)
    monkeypatch.setattr(rate_limit, "time", SimpleNamespace(monotonic=lambda: 100.0))
    limiter = RateLimiter("server", None, None, Stop())
    limiter.refused(Refusal(None), 1)
    assert limiter.limit.pause == (100.0, 110.0)
    limiter.refused(Refusal(None), 1)  # of a request that was under way
    assert limiter.limit.pause == (100.0, 110.0)
    limiter.limit.pause = None
    limiter.refused(Refusal(None), 1)
    assert limiter.limit.pause == (100.0, 200.0)
    limiter.limit.pause = None
    limiter.answered()
    limiter.refused(Refusal(None), 1)
    assert limiter.limit.pause == (100.0, 110.0)


def test_a_stopped_limiter_sends_nothing():
    async def run() -> None:
        stop = Stop()
        limiter = RateLimiter("server", None, None, stop)
        await limiter.turn(1)
        limiter.refused(Refusal(1000.0), 1)
        waiting = asyncio.create_task(limiter.turn(1))
        await asyncio.sleep(0)
        stop.set()
        with pytest.raises(Stopped):
            await waiting

    asyncio.run(run())
