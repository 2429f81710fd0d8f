"""Asks about contexts with single requests: many contexts at a time, each from its first request to its verdict."""

import asyncio
from collections.abc import Iterator

from llava_jax.datagen.contexts import Context
from llava_jax.datagen.recipe import Recipe, Verdict, give_up, next_step
from llava_jax.llm_api.asking import ask_each
from llava_jax.llm_api.client import Client
from llava_jax.llm_api.errors import SERVER_ERROR, Refused
from llava_jax.llm_api.ledger import Ledger
from llava_jax.llm_api.settings import Work


def run(work: Work, ledger: Ledger, recipe: Recipe, pending: Iterator[Context], count: int) -> int:
    """Asks about `count` contexts, whose verdicts go into the ledger. Returns and raises as `ask_each` does."""
    turn = asyncio.Lock()

    async def ask(client: Client, context: Context) -> None:
        if verdict := await _ask_about(context, recipe, client, turn):
            ledger.conclude(context.id, verdict.reason, verdict.value, verdict.attempts)

    return ask_each(work, ledger, pending, count, "asking", ask)


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
