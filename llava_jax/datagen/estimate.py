"""Estimates the tokens and dollars of asking about contexts, from a sample of them. Nothing is sent."""

from collections.abc import Iterator
from statistics import mean

from llava_jax.datagen.contexts import Context
from llava_jax.datagen.recipe import Recipe, next_step
from llava_jax.llm_api.cost import Prices, estimate_tokens, max_prompt_tokens
from llava_jax.llm_api.ledger import Ledger

SAMPLE = 500  # contexts


def estimate_lines(
    recipe: Recipe, ledger: Ledger, pending: Iterator[Context], count: int, max_completion: int, prices: Prices
) -> Iterator[str]:
    """The lines of the estimate. `pending` has `count` contexts; an answer has up to `max_completion` tokens."""
    every = max(1, count // SAMPLE)
    requests = [next_step(recipe, context, []) for i, context in enumerate(pending) if i % every == 0]
    if not requests:
        yield "every context has a verdict: nothing is left to ask"
        return
    prompts = [estimate_tokens(request.messages) for request in requests]
    completion, source = _completion(recipe, ledger, max_completion)
    yield f"contexts to ask about: {count}"
    yield (
        f"prompt tokens, estimated: {mean(prompts):.0f} a context ({min(prompts)} to {max(prompts)} in a sample of "
        f"{len(prompts)}), {mean(prompts) * count:.0f} in all"
    )
    yield f"completion tokens, from {source}: {completion:.0f} a context, {completion * count:.0f} in all"
    if any(prices):
        about = prices.cost(mean(prompts), completion) * count
        worst = mean(prices.cost(max_prompt_tokens(request.messages), max_completion) for request in requests) * count
        yield f"cost without repairs: about ${about:.2f}; whatever the tokenizer and the answers, at most ${worst:.2f}"
    else:
        yield "cost: unknown without --prices"


def _completion(recipe: Recipe, ledger: Ledger, limit: int) -> tuple[float, str]:
    """The tokens of an answer, and the source of the estimate."""
    if answered := ledger.answer_tokens():
        return answered, "the answers in the ledger"
    answers = [estimate_tokens([{"content": answer}]) for _, answer in recipe.prompts.shots]
    if answers:
        return min(mean(answers), limit), "the examples"
    return limit, "--max-tokens"
