"""What runs on the device to answer: prefill, the loop over tokens, and the choice of each.

Axes: B rows, T tokens, S cache slots, D embed, V vocabulary, K key/value heads, H head width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llava_jax.data.prompts import PromptBatch
from llava_jax.models.llama import KVCache
from llava_jax.models.llava import Llava

MAX_STEPS = 32  # tokens of a row that one call of `decode` can write


class Decoder:
    """The programs below, compiled for a model, whose layers it rearranges (`Llama.unstack_layers`)."""

    def __init__(self, model: Llava):
        model.llm.unstack_layers()
        self._weights, self._structure = jax.tree.flatten(model)
        self.prefill = self._compile(prefill, static_argnames="slots")
        self.fork = self._compile(fork, static_argnames="slots")
        self.decode = self._compile(decode, donate_argnames="cache")
        self.widen = jax.jit(widen, static_argnames="slots")

    def _compile(self, program: Callable, **options: Any) -> Callable:
        """`program(model, ...)` without its first argument. The weights are passed as a flat list, since flattening
        the modules at every call would take longer than a token of a small model."""

        def flat(weights: list[jax.Array], *args: Any, **kwargs: Any) -> Any:
            return program(jax.tree.unflatten(self._structure, weights), *args, **kwargs)

        return functools.partial(jax.jit(flat, **options), self._weights)


class Nucleus(NamedTuple):
    """Random choice among the likeliest tokens (Holtzman et al. 2020)."""

    temperature: jax.Array  # float32, a scalar
    top_p: jax.Array  # float32, a scalar
    keys: jax.Array  # [B]


def prefill(model: Llava, batch: PromptBatch, nucleus: Nucleus | None, *, slots: int) -> tuple[jax.Array, KVCache]:
    """-> the first token of each answer, int32[B], and the cache of the prompts with room for `slots` tokens a row.

    A token sees what precedes it alone, so padding on the right is seen by none, and answers overwrite it.
    """
    B, T = batch.tokens.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    x_BTD = model.embed(batch.tokens, batch.images, batch.image_feature_index)
    hidden_BTD, cache = model.llm.prefill(x_BTD, positions_BT, segment_ids_BT=jnp.ones((B, T), jnp.int32))
    return _first_token(model, hidden_BTD, batch.lengths, batch.lengths, nucleus), widen(cache, slots=slots)


def fork(
    model: Llava,
    beginnings: KVCache,
    beginning_of_B: jax.Array,
    starts_B: jax.Array,
    ends: PromptBatch,
    nucleus: Nucleus | None,
    *,
    slots: int,
) -> tuple[jax.Array, KVCache]:
    """As `prefill`, of prompts whose first `starts_B` tokens are row `beginning_of_B` of another cache."""
    T = ends.tokens.shape[1]
    cache = widen(take_rows(beginnings, beginning_of_B, model.llm.config.num_kv_heads), slots=slots)
    positions_BT = starts_B[:, None] + jnp.arange(T)[None]
    hidden_BTD, cache = model.llm.decode(model.embed(ends.tokens), positions_BT, cache)
    return _first_token(model, hidden_BTD, ends.lengths, starts_B + ends.lengths, nucleus), cache


def _first_token(model: Llava, hidden_BTD, lengths_B, positions_B, nucleus: Nucleus | None) -> jax.Array:
    last_BD = hidden_BTD[jnp.arange(len(lengths_B)), lengths_B - 1]
    return choose(model.llm.logits(last_BD), positions_B, nucleus)


def decode(
    model: Llava,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    finished_B: jax.Array,
    stop_ids: jax.Array,
    cache: KVCache,
    nucleus: Nucleus | None,
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
        tokens_B = choose(model.llm.logits(hidden_B1D[:, 0]), positions_B, nucleus)
        finished_B |= jnp.isin(tokens_B, stop_ids)
        return step + 1, tokens_B, positions_B, finished_B, cache, written.at[:, step].set(tokens_B)

    written = jnp.zeros((len(tokens_B), MAX_STEPS), jnp.int32)
    carry = (jnp.int32(0), tokens_B, positions_B, finished_B, cache, written)
    *_, cache, written = jax.lax.while_loop(unfinished, advance, carry)
    return written, cache


def choose(logits_BV: jax.Array, positions_B: jax.Array, nucleus: Nucleus | None) -> jax.Array:
    """The tokens that go to `positions_B`: the likeliest, or with a `nucleus` random ones out of it."""
    if nucleus is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = keep_nucleus(logits_BV / nucleus.temperature, nucleus.top_p)
    keys_B = jax.vmap(jax.random.fold_in)(nucleus.keys, positions_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def keep_nucleus(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """All but the fewest likeliest tokens whose probabilities together reach `top_p` become -inf."""
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    probabilities_BV = jax.nn.softmax(descending_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    inside_BV = (before_BV < top_p) | (top_p >= 1)  # rounded sums reach 1 too early
    least_B1 = jnp.min(jnp.where(inside_BV, descending_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def row_keys(seed: int, numbers_B: jax.Array) -> jax.Array:
    """A key for each row, from the seed and a number (uint32) that tells its prompt from others."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), numbers_B)


def take_rows(cache: KVCache, rows_B: jax.Array, num_kv_heads: int) -> KVCache:
    """The cache with row `rows_B[b]` as its row b."""
    rows_R = (rows_B[:, None] * num_kv_heads + jnp.arange(num_kv_heads)[None]).reshape(-1)
    return jax.tree.map(lambda x_RSH: x_RSH[rows_R], cache)


def widen(cache: KVCache, *, slots: int) -> KVCache:
    """The cache with room for `slots` tokens a row, if it has less."""
    added = max(slots - cache.slots, 0)
    return jax.tree.map(lambda x_RSH: jnp.pad(x_RSH, [(0, 0), (0, added), (0, 0)]), cache)
