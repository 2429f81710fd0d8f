"""Asks about contexts, each from its first request to its verdict, which goes into the ledger."""

import asyncio
from collections.abc import Callable, Iterator

from llava_jax.cli import track
from llava_jax.datagen import contexts
from llava_jax.datagen.contexts import Context
from llava_jax.datagen.recipe import Recipe, Verdict, give_up, next_step
from llava_jax.llm_api.asking import ask_each
from llava_jax.llm_api.batches import TRIES, run_batches
from llava_jax.llm_api.client import Client
from llava_jax.llm_api.errors import REFUSED, SERVER_ERROR, Refused
from llava_jax.llm_api.ledger import Answer, Ledger, Request
from llava_jax.llm_api.settings import Work


def ask_singly(work: Work, ledger: Ledger, recipe: Recipe, pending: Iterator[Context], count: int) -> int:
    """Asks about `count` contexts with single requests, many at a time. Returns and raises as `ask_each` does."""
    turn = asyncio.Lock()

    async def ask(client: Client, context: Context) -> None:
        answers: list[Answer] = []
        step = None
        while not isinstance(step, Verdict):
            async with turn:  # one answer is read in each round of the event loop: sending and receiving come first
                await asyncio.sleep(0)
                step = next_step(recipe, context, answers)
            if isinstance(step, Request):
                try:
                    answers.append(await client.ask(step))
                except Refused as refused:
                    if refused.reason == SERVER_ERROR:  # transient: the same command asks about the context again
                        return
                    step = give_up(recipe, context, answers, refused.reason, refused.detail)
        ledger.conclude(context.id, step.reason, step.value, step.attempts)

    return ask_each(work, ledger, pending, count, "asking", ask)


def ask_in_batches(work: Work, ledger: Ledger, recipe: Recipe, pending: Callable[[], Iterator[Context]]) -> None:
    """Asks with the batch API, in rounds: each sends the next request about every context of `pending`, which is called
    in each round. It can be interrupted anywhere."""

    def next_of(context: Context) -> tuple[Request | Verdict, list[Answer]]:
        """The next step after the answers in the ledger, and these answers."""
        answers: list[Answer] = []
        while isinstance(step := next_step(recipe, context, answers), Request) and (answer := ledger.answer(step)):
            answers.append(answer)
        return step, answers

    def requests(refused: dict[str, str]) -> Iterator[Request]:
        """The next request about each context; contexts that need none get their verdict."""
        for context in track(pending(), "reading answers"):
            step, answers = next_of(context)
            if isinstance(step, Request) and context.id in refused:
                step = give_up(recipe, context, answers, REFUSED, refused[context.id])
            if isinstance(step, Verdict):
                ledger.conclude(context.id, step.reason, step.value, step.attempts)
            elif ledger.failures(step) < TRIES:  # else the next run asks again
                yield step

    run_batches(work, ledger, lambda task: next_of(contexts.get(ledger.db, task))[0], requests)
