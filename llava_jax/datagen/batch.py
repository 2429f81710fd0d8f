"""Asks about contexts with the batch API, in rounds: each sends the next request about every context."""

from collections.abc import Callable, Iterator

from llava_jax.cli import track
from llava_jax.datagen import contexts
from llava_jax.datagen.contexts import Context
from llava_jax.datagen.recipe import Recipe, Verdict, give_up, next_step
from llava_jax.llm_api.batches import TRIES, run_batches
from llava_jax.llm_api.errors import REFUSED
from llava_jax.llm_api.ledger import Answer, Ledger, Request
from llava_jax.llm_api.settings import Work


def run(work: Work, ledger: Ledger, recipe: Recipe, pending: Callable[[], Iterator[Context]]) -> None:
    """Asks about the contexts of `pending`, which is called in each round. It can be interrupted anywhere."""

    def request_of(task: str) -> Request:
        step, _ = _next(recipe, ledger, contexts.get(ledger.db, task))
        return step

    run_batches(work, ledger, request_of, lambda refused: _requests(recipe, ledger, pending(), refused))


def _requests(recipe: Recipe, ledger: Ledger, pending: Iterator[Context], refused: dict[str, str]) -> Iterator[Request]:
    """The next request about each context; contexts that need none get their verdict."""
    for context in track(pending, "reading answers"):
        step, answers = _next(recipe, ledger, context)
        if isinstance(step, Request) and context.id in refused:
            step = give_up(recipe, context, answers, REFUSED, refused[context.id])
        if isinstance(step, Request):
            if ledger.failures(step) < TRIES:  # else the next run asks again
                yield step
        else:
            ledger.conclude(context.id, step.reason, step.value, step.attempts)


def _next(recipe: Recipe, ledger: Ledger, context: Context) -> tuple[Request | Verdict, list[Answer]]:
    """The next step after the answers in the ledger, and these answers."""
    answers: list[Answer] = []
    while isinstance(step := next_step(recipe, context, answers), Request):
        if (answer := ledger.answer(step)) is None:
            break
        answers.append(answer)
    return step, answers
