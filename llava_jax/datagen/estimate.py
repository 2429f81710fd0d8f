"""What asking about contexts will take in tokens and dollars, told from a sample of them; nothing is sent."""

from collections.abc import Iterator
from statistics import mean

from llava_jax.datagen.contexts import Context
from llava_jax.datagen.recipe import Recipe, next_step
from llava_jax.llm_api.cost import Prices, estimate_tokens, max_prompt_tokens
from llava_jax.llm_api.ledger import Ledger

SAMPLE = 500  # contexts


def estimate_lines(
    recipe: Recipe, ledger: Ledger, pending: Iterator[Context], count: int, most_completion: int, prices: Prices
) -> Iterator[str]:
    """The estimate for people. `pending` are `count` contexts, `most_completion` the tokens of an answer at most."""
    every = max(1, count // SAMPLE)
    requests = [next_step(recipe, context, []) for i, context in enumerate(pending) if i % every == 0]
    if not requests:
        yield "every context has a verdict: nothing is left to ask"
        return
    prompts = [estimate_tokens(request.messages) for request in requests]
    completion, told_from = _completion(recipe, ledger, most_completion)
    yield f"contexts to ask about: {count}"
    yield (
        f"prompt tokens, estimated: {mean(prompts):.0f} a context ({min(prompts)} to {max(prompts)} in a sample of "
        f"{len(prompts)}), {mean(prompts) * count:.0f} in all"
    )
    yield f"completion tokens, from {told_from}: {completion:.0f} a context, {completion * count:.0f} in all"
    if any(prices):
        about = prices.cost(mean(prompts), completion) * count
        worst = mean(prices.cost(max_prompt_tokens(request.messages), most_completion) for request in requests) * count
        yield f"cost without repairs: about ${about:.2f}; whatever the tokenizer and the answers, at most ${worst:.2f}"
    else:
        yield "cost: unknown without --prices"


def _completion(recipe: Recipe, ledger: Ledger, most: int) -> tuple[float, str]:
    """Tokens of an answer, and what tells."""
    if answered := ledger.answer_tokens():
        return answered, "the answers in the ledger"
    answers = [estimate_tokens([{"content": answer}]) for _, answer in recipe.prompts.shots]
    if answers:
        return min(mean(answers), most), "the examples"
    return most, "--max-tokens"
