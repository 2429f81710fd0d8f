"""Asks about contexts with single requests: many contexts at a time, each from its first request to its verdict."""

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


def run(work: Work, ledger: Ledger, recipe: Recipe, pending: Iterator[Context], count: int) -> int:
    """Asks about the `count` contexts of `pending`, whose verdicts go into the ledger.

    Returns the number of the signal that stopped it, 0 for none. Raises `UserError` if no request can succeed. Either
    way requests under way are waited for.
    """

    async def ask_all() -> int:
        async with Client(work.settings, ledger, Budget(work.budget, ledger.totals().cost)) as client:
            with (
                stopped_by_signals(client.stop) as received,
                contextlib.closing(track(pending, "asking", count)) as tracked,
            ):
                turn = asyncio.Lock()
                # Twice as many workers as connections: while some wait to try again, others use the connections.
                workers = [_work(tracked, recipe, client, turn) for _ in range(2 * work.settings.concurrency)]
                for result in await asyncio.gather(*workers, return_exceptions=True):
                    if isinstance(result, BaseException):
                        raise result
        return received[0] if received else 0

    return asyncio.run(ask_all())


async def _work(pending: Iterator[Context], recipe: Recipe, client: Client, turn: asyncio.Lock) -> None:
    """One worker, which stops the others if it fails."""
    try:
        for context in pending:
            if client.stop.is_set():
                return
            if verdict := await _ask_about(context, recipe, client, turn):
                client.ledger.conclude(context.id, verdict.reason, verdict.value, verdict.attempts)
    except Stopped:
        pass
    except BaseException:
        client.stop.set()
        raise


async def _ask_about(context: Context, recipe: Recipe, client: Client, turn: asyncio.Lock) -> Verdict | None:
    """None if the server failed with transient errors: the same command asks about the context again."""
    answers = []
    while True:
        async with turn:  # read one answer in each round of the event loop, so that sending and receiving come first
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
