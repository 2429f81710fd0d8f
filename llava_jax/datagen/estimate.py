"""Estimates the tokens and dollars of asking about contexts, from a sample of them. Nothing is sent."""

import itertools
import math
from collections.abc import Iterator
from statistics import mean

from llava_jax.datagen import contexts
from llava_jax.datagen.contexts import PENDING
from llava_jax.datagen.recipe import Recipe, next_step
from llava_jax.llm_api.cost import estimate_tokens
from llava_jax.llm_api.ledger import Ledger
from llava_jax.llm_api.settings import Settings

SAMPLE = 500  # contexts


def estimate_lines(recipe: Recipe, ledger: Ledger, settings: Settings, limit: int | None) -> Iterator[str]:
    """The lines of the estimate, of those of the first `limit` contexts that have no verdict."""
    count = contexts.count(ledger.db, limit, PENDING)
    pending = itertools.islice(contexts.read(ledger.db, limit, PENDING), None, None, max(1, count // SAMPLE))
    requests = [next_step(recipe, context, []) for context in pending]
    if not requests:
        yield "every context has a verdict: nothing is left to ask"
        return
    prompts = [estimate_tokens(request.messages) for request in requests]
    completion, source = _completion(recipe, ledger, settings.max_completion_tokens)
    yield f"contexts to ask about: {count}"
    yield (
        f"prompt tokens, estimated: {mean(prompts):.0f} a context ({min(prompts)} to {max(prompts)} in a sample of "
        f"{len(prompts)}), {mean(prompts) * count:.0f} in all"
    )
    yield f"completion tokens, from {source}: {completion:.0f} a context, {completion * count:.0f} in all"
    if any(settings.prices):
        about = settings.prices.cost(mean(prompts), completion) * count
        worst = mean(map(settings.max_cost, requests)) * count
        most = f"at most ${worst:.2f}" if settings.max_completion_tokens else "without max_tokens there is no limit"
        yield f"cost without repairs: about ${about:.2f}; whatever the tokenizer and the answers, {most}"
    else:
        yield "cost: unknown without --prices"


def _completion(recipe: Recipe, ledger: Ledger, limit: int) -> tuple[float, str]:
    """The tokens of an answer, and the source of the estimate."""
    if answered := ledger.answer_tokens():
        return answered, "the answers in the ledger"
    answers = [estimate_tokens([{"content": answer}]) for _, answer in recipe.prompts.shots]
    if answers:
        return min(mean(answers), limit or math.inf), "the examples"
    return limit, "--max-tokens"
