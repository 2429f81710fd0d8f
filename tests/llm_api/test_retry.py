"""Which errors are retried, how often, and what ends it."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from llava_jax.cli import UserError
from llava_jax.llm_api import retry
from llava_jax.llm_api.errors import SERVER_ERROR, Refusal, Refused, TransientError
from llava_jax.llm_api.ledger import Answer
from llava_jax.llm_api.retry import Retry
from llava_jax.llm_api.stop import Stop, Stopped

ANSWER = Answer("Yes.", "stop", 1, 1)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF", 0.0)


def attempts(*results: Answer | Exception) -> Callable[[], Awaitable[Answer]]:
    left = list(results)

    async def attempt() -> Answer:
        result = left.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    return attempt


def until_answered(layer: Retry, *results: Answer | Exception) -> Answer:
    return asyncio.run(layer.until_answered(attempts(*results)))


def test_transient_errors_are_retried():
    assert until_answered(Retry("s", 3, 9, Stop()), TransientError("a"), TransientError("b"), ANSWER) == ANSWER


def test_refusals_for_the_rate_are_no_tries():
    refusals = [TransientError("slow down", refusal=Refusal(1.0))] * 5
    assert until_answered(Retry("s", 1, 9, Stop()), *refusals, ANSWER) == ANSWER


def test_no_answer_to_anything_ends_the_run():
    with pytest.raises(UserError, match="^s: gives no answer .b.; the same command resumes"):
        until_answered(Retry("s", 2, 9, Stop()), TransientError("a"), TransientError("b"))


def test_a_request_alone_is_refused_where_others_are_answered():
    layer = Retry("s", 1, 9, Stop())

    async def run() -> None:
        async def attempt() -> Answer:
            await layer.until_answered(attempts(ANSWER))
            raise TransientError("a")

        await layer.until_answered(attempt)

    with pytest.raises(Refused, match=f"{SERVER_ERROR}: a"):
        asyncio.run(run())


def test_patience_begins_with_the_first_refusal(monkeypatch: pytest.MonkeyPatch):
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(retry, "time", clock)
    layer = Retry("s", 1, 10, Stop())
    clock.now = 1000.0  # without a request
    assert until_answered(layer, TransientError("slow down", refusal=Refusal(1.0)), ANSWER) == ANSWER


def test_patience_ends(monkeypatch: pytest.MonkeyPatch):
    now = iter(range(0, 100, 4))
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: next(now)))
    refusals = [TransientError("slow down", refusal=Refusal(1.0))] * 9
    with pytest.raises(UserError, match="only refusals for 10 s .slow down."):
        until_answered(Retry("s", 1, 10, Stop()), *refusals)


def test_other_errors_are_not_retried():
    with pytest.raises(Refused):
        until_answered(Retry("s", 9, 9, Stop()), Refused("refused-by-server", "no"), ANSWER)


def test_a_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retry, "BACKOFF", 1000.0)
    monkeypatch.setattr(retry, "MAX_BACKOFF", 1000.0)
    stop = Stop()

    async def run() -> None:
        asyncio.get_running_loop().call_soon(stop.set)
        await Retry("s", 9, 9, stop).until_answered(attempts(TransientError("a"), ANSWER))

    with pytest.raises(Stopped):
        asyncio.run(run())
