"""What runs on the device to answer: prefill, the loop over tokens, and the choice of each.

Axes: B rows, T tokens, S cache slots, D embed, V vocabulary, K key/value heads, H head width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llava_jax.inference.prompts import PromptBatch
from llava_jax.models.llama import KVCache
from llava_jax.models.llava import Llava

MAX_STEPS = 32  # tokens of a row that one call of `decode` can write


class Decoder:
    """The programs below, compiled for a model, whose layers it rearranges (`Llava.unstack_layers`)."""

    def __init__(self, model: Llava):
        self.hold(model)
        self.prefill = self._compile(prefill, static_argnames="slots")
        self.fork = self._compile(fork, static_argnames="slots")
        self.decode = self._compile(decode, donate_argnames="cache")
        self.widen = jax.jit(widen, static_argnames="slots")

    def hold(self, model: Llava) -> None:
        """Goes on with the weights of this model, which has to be built as the one before: nothing is compiled anew."""
        model.unstack_layers()
        self._weights, self._structure = jax.tree.flatten(model)

    def let_go(self) -> None:
        """Keeps what is compiled and no weights, until `hold` brings others."""
        self._weights = []

    def _compile(self, program: Callable, **options: Any) -> Callable:
        """`program(model, ...)` without its first argument. The weights are passed as a flat list, since flattening
        the modules at every call would take longer than a token of a small model."""

        def flat(weights: list[jax.Array], *args: Any, **kwargs: Any) -> Any:
            return program(jax.tree.unflatten(self._structure, weights), *args, **kwargs)

        compiled = jax.jit(flat, **options)
        return lambda *args, **kwargs: compiled(self._weights, *args, **kwargs)


class Choice(NamedTuple):
    """How each row's next token is chosen: at temperature 0 the likeliest, else a random one among the likeliest.

    What is drawn depends on the row's own seed, number and position alone.
    """

    temperature: jax.Array  # float32[B]
    top_p: jax.Array  # float32[B], see `keep_likeliest`
    top_k: jax.Array  # int32[B]
    seeds: jax.Array  # uint32[B]
    numbers: jax.Array  # uint32[B], tells the row's prompt from others


def prefill(model: Llava, batch: PromptBatch, choice: Choice | None, *, slots: int) -> tuple[jax.Array, KVCache]:
    """-> the first token of each answer, int32[B], and the cache of the prompts with room for `slots` tokens a row.

    A token sees what precedes it alone, so padding on the right is seen by none, and answers overwrite it.
    """
    B, T = batch.tokens.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    x_BTD = model.embed(batch.tokens, batch.images, batch.image_feature_index)
    hidden_BTD, cache = model.llm.prefill(x_BTD, positions_BT, segment_ids_BT=jnp.ones((B, T), jnp.int32))
    return _first_token(model, hidden_BTD, batch.lengths, batch.lengths, choice), widen(cache, slots=slots)


def fork(
    model: Llava,
    beginnings: KVCache,
    beginning_of_B: jax.Array,
    starts_B: jax.Array,
    ends: PromptBatch,
    choice: Choice | None,
    *,
    slots: int,
) -> tuple[jax.Array, KVCache]:
    """As `prefill`, of prompts whose first `starts_B` tokens are row `beginning_of_B` of another cache."""
    T = ends.tokens.shape[1]
    cache = widen(take_rows(beginnings, beginning_of_B, model.llm.config.num_kv_heads), slots=slots)
    positions_BT = starts_B[:, None] + jnp.arange(T)[None]
    hidden_BTD, cache = model.llm.decode(model.embed(ends.tokens), positions_BT, cache)
    return _first_token(model, hidden_BTD, ends.lengths, starts_B + ends.lengths, choice), cache


def _first_token(model: Llava, hidden_BTD, lengths_B, positions_B, choice: Choice | None) -> jax.Array:
    last_BD = hidden_BTD[jnp.arange(len(lengths_B)), lengths_B - 1]
    return choose(model.llm.logits(last_BD), positions_B, choice)


def decode(
    model: Llava,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    finished_B: jax.Array,
    stop_ids: jax.Array,
    cache: KVCache,
    choice: Choice | None,
    steps: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """What follows `tokens_B`, which go into the cache at `positions_B`.

    -> int32[B, MAX_STEPS], of which the first `steps` are written, or fewer if all rows finish before; and the cache.
    """

    def unfinished(carry):
        step, _, _, finished_B, _, _ = carry
        return (step < steps) & ~finished_B.all()

    def advance(carry):
        step, tokens_B, positions_B, finished_B, cache, written = carry
        hidden_B1D, cache = model.llm.decode(model.embed(tokens_B[:, None]), positions_B[:, None], cache)
        positions_B += 1
        tokens_B = choose(model.llm.logits(hidden_B1D[:, 0]), positions_B, choice)
        finished_B |= jnp.isin(tokens_B, stop_ids)
        return step + 1, tokens_B, positions_B, finished_B, cache, written.at[:, step].set(tokens_B)

    written = jnp.zeros((len(tokens_B), MAX_STEPS), jnp.int32)
    carry = (jnp.int32(0), tokens_B, positions_B, finished_B, cache, written)
    *_, cache, written = jax.lax.while_loop(unfinished, advance, carry)
    return written, cache


def choose(logits_BV: jax.Array, positions_B: jax.Array, choice: Choice | None) -> jax.Array:
    """The tokens int32[B] that go to `positions_B`; without a choice the likeliest."""
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if choice is None:
        return likeliest_B
    random_B = choice.temperature > 0
    limited_B = random_B & ((choice.top_p < 1) | (choice.top_k > 0))

    def draw() -> jax.Array:
        tempered_BV = logits_BV / jnp.where(random_B, choice.temperature, 1.0)[:, None]
        kept_BV = jax.lax.cond(
            limited_B.any(), lambda: keep_likeliest(tempered_BV, choice.top_p, choice.top_k), lambda: tempered_BV
        )
        keys_B = jax.vmap(_key)(choice.seeds, choice.numbers, positions_B)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)
        return jnp.where(random_B, drawn_B, likeliest_B)

    return jax.lax.cond(random_B.any(), draw, lambda: likeliest_B)


def keep_likeliest(logits_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """All but the `top_k` likeliest (0: all), and of these the fewest likeliest whose probabilities together reach
    `top_p` (Holtzman et al. 2020), become -inf. Equal ones go or stay together."""
    V = logits_BV.shape[1]
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    ranked_BV = jnp.arange(V)[None] < jnp.where(top_k_B > 0, top_k_B, V)[:, None]
    probabilities_BV = jax.nn.softmax(jnp.where(ranked_BV, descending_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    top_p_B1 = top_p_B[:, None]
    inside_BV = ranked_BV & ((before_BV < top_p_B1) | (top_p_B1 >= 1))  # rounded sums reach 1 too early
    least_B1 = jnp.min(jnp.where(inside_BV, descending_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _key(seed: jax.Array, number: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), position)


def take_rows(cache: KVCache, rows_B: jax.Array, num_kv_heads: int) -> KVCache:
    """The cache with row `rows_B[b]` as its row b."""
    rows_R = (rows_B[:, None] * num_kv_heads + jnp.arange(num_kv_heads)[None]).reshape(-1)
    return jax.tree.map(lambda x_RSH: x_RSH[rows_R], cache)


def widen(cache: KVCache, *, slots: int) -> KVCache:
    """The cache with room for `slots` tokens a row, if it has less."""
    added = max(slots - cache.slots, 0)
    return jax.tree.map(lambda x_RSH: jnp.pad(x_RSH, [(0, 0), (0, added), (0, 0)]), cache)
