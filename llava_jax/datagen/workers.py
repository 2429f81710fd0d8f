"""Carries requests one by one: many contexts at a time, each from its first request to its verdict."""

import asyncio
import contextlib
from collections.abc import Iterator

from llava_jax.cli import track
from llava_jax.datagen.contexts import Context
from llava_jax.datagen.recipe import Recipe, Verdict, give_up, next_step
from llava_jax.llm_api.asking import Work
from llava_jax.llm_api.budget import Budget
from llava_jax.llm_api.client import Client
from llava_jax.llm_api.errors import SERVER_ERROR, Refused
from llava_jax.llm_api.ledger import Ledger
from llava_jax.llm_api.stop import Stopped, stopped_by_signals


async def ask_about(pending: Iterator[Context], recipe: Recipe, client: Client) -> None:
    """Brings every context to its verdict, which goes into the ledger.

    Returns early where the client is stopped. Raises `UserError` where nothing more can be done; either way what was
    under way has come to its end.
    """
    # While some wait to try again, others make use of the connections.
    turn = asyncio.Lock()
    workers = [_work(pending, recipe, client, turn) for _ in range(2 * client.settings.concurrency)]
    for result in await asyncio.gather(*workers, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def _work(pending: Iterator[Context], recipe: Recipe, client: Client, turn: asyncio.Lock) -> None:
    try:
        for context in pending:
            if client.stop.is_set():
                return
            if (verdict := await _talk(recipe, context, client, turn)) is None:
                continue
            client.ledger.conclude(context.id, verdict.reason, verdict.value, verdict.attempts)
    except Stopped:
        pass
    except BaseException:
        client.stop.set()
        raise


async def _talk(recipe: Recipe, context: Context, client: Client, turn: asyncio.Lock) -> Verdict | None:
    """None where the server failed for a while: the context stays open, and the same command asks about it again."""
    answers = []
    while True:
        async with turn:  # one answer is read in each round of the event loop: what can be sent or received goes first
            await asyncio.sleep(0)
            step = next_step(recipe, context, answers)
        if isinstance(step, Verdict):
            return step
        try:
            answers.append(await client.ask(step))
        except Refused as refused:
            if refused.reason == SERVER_ERROR:
                return None
            return give_up(recipe, context, answers, refused.reason, refused.detail)


def run(given: Work, ledger: Ledger, recipe: Recipe, pending: Iterator[Context], count: int) -> int:
    """Asks about `count` contexts. Returns the signal that stopped it, 0 if none did."""

    async def main() -> int:
        async with Client(given.settings, ledger, Budget(given.budget, ledger.totals().cost)) as client:
            with (
                stopped_by_signals(client.stop) as caught,
                contextlib.closing(track(pending, "asking", count)) as tracked,
            ):
                await ask_about(tracked, recipe, client)
        return caught[0] if caught else 0

    return asyncio.run(main())
