"""The programs that generate on the device: prefill, the loop over tokens, and sampling.

Axes: B rows, T tokens, S positions of the cache, D embed, V vocabulary.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.inference.prompts import PromptBatch
from llava_jax.inference.quantization import quantize_decoder
from llava_jax.inference.requests import MAX_LOGPROBS, Sampling
from llava_jax.inference.scores import ScoreRules, allowed, ruled
from llava_jax.models import batched_lora
from llava_jax.models.config import LoraConfig
from llava_jax.models.llama import KVCache
from llava_jax.models.llava import Llava, Params

MAX_STEPS = 32  # tokens of a row that one call of `Decoder.decode` can generate


class Decoder:
    """The programs below, compiled for a model, whose layers it rearranges (`Llava.unstack_layers`).

    `quantize`: "int8" stores the weights of the language model in eight bits.
    """

    def __init__(self, model: Llava, quantize: str | None = None):
        self._quantize = quantize
        self.set_model(model)
        self.prefill = self.compile(prefill, static_argnames="size")
        self.prefill_suffixes = self.compile(prefill_suffixes, static_argnames="size")
        self.decode = self.compile(decode, donate_argnames="cache")
        self.logits = self.compile(logits)
        self.encode_images = self.compile(Llava.encode_images)
        self.embed = self.compile(Llava.embed)
        self.grow = jax.jit(grow, static_argnames="size")

    def set_model(self, model: Llava) -> None:
        """Uses the weights of another model of the same structure from now on. Nothing is compiled again."""
        model.unstack_layers()
        if self._quantize:
            quantize_decoder(model.llm)
        self._weights, self._structure = jax.tree.flatten(model)

    def drop_weights(self) -> None:
        """Keeps the compiled programs, and no weights until `set_model` brings others."""
        self._weights = []

    def set_adapter(self, index: int, config: LoraConfig, params: Params) -> None:
        """Makes these the parameters of adapter `index`, see `models.batched_lora`. Nothing is compiled again."""
        model = jax.tree.unflatten(self._structure, self._weights)
        batched_lora.write(model, index, config, params)
        self._weights = jax.tree.leaves(model)

    def compile(self, program: Callable, **options: Any) -> Callable:
        """`jax.jit(program)` without its first argument, the model; with `adapter`, int32[1], all rows use that one.

        The weights are passed as a flat list, since flattening the modules at every call would take longer than a token
        of a small model.
        """

        def flat(weights: list[jax.Array], adapter: jax.Array | None, *args: Any, **kwargs: Any) -> Any:
            model = jax.tree.unflatten(self._structure, weights)
            if adapter is not None:
                batched_lora.use(model, adapter)
            return program(model, *args, **kwargs)

        compiled = jax.jit(flat, **options)
        return lambda *args, adapter=None, **kwargs: compiled(self._weights, adapter, *args, **kwargs)


class RowSampling(NamedTuple):
    """How the next token of each row is sampled: `requests.Sampling` as arrays.

    What is drawn depends on nothing but the row's own options, seed, prompt and position.
    """

    temperature: jax.Array  # float32[B]
    top_p: jax.Array  # float32[B]
    top_k: jax.Array  # int32[B]
    min_p: jax.Array  # float32[B]
    seeds: jax.Array  # uint32[B]
    prompts: jax.Array  # uint32[B], a hash of each row's prompt

    @classmethod
    def greedy(cls, rows: int) -> "RowSampling":
        """Temperature 0 in all rows, as NumPy arrays for `set`."""
        return cls(*(np.zeros(rows, dtype) for dtype in (*"ffif", np.uint32, np.uint32)))

    def set(self, row: int, sampling: Sampling, prompt: int) -> None:
        """Sets the options of a row, and the hash of its prompt."""
        self.temperature[row], self.top_p[row], self.top_k[row] = sampling.temperature, sampling.top_p, sampling.top_k
        self.min_p[row], self.seeds[row], self.prompts[row] = sampling.min_p, sampling.seed, prompt


def prompt_hash(tokens: np.ndarray) -> int:
    """Makes different prompts draw different numbers from the same seed."""
    return zlib.crc32(tokens.tobytes())


class Slots(NamedTuple):
    """The answers that are being generated, arrays [B]. A slot at position S, or M S with pages, is idle."""

    tokens: np.ndarray  # int32, the newest ones
    positions: np.ndarray  # int32, where these go
    limits: np.ndarray  # int32, positions at which the answers have all their tokens
    pages: np.ndarray | None = None  # int32[B, M], their pages of the cache; None where slot b has row b
    sampling: RowSampling | None = None  # None: greedy
    adapters: np.ndarray | None = None  # int32, see `models.batched_lora`
    rules: ScoreRules | None = None
    endless: np.ndarray | None = None  # bool: stop tokens do not end these


class Sampled(NamedTuple):
    """Sampled tokens and their log probabilities, arrays [B, ...]. The latter are zeros, or None, without a report."""

    tokens: jax.Array  # int32; -1 in idle slots
    logprobs: jax.Array | None = None  # float32
    top_tokens: jax.Array | None = None  # int32[..., MAX_LOGPROBS], the most likely tokens
    top_logprobs: jax.Array | None = None  # float32[..., MAX_LOGPROBS]


def prefill(model: Llava, batch: PromptBatch, sampling: RowSampling | None, *, size: int) -> tuple[jax.Array, KVCache]:
    """-> the first token of each answer, int32[B], and the cache of the prompts with room for `size` tokens a row.

    A token sees only what precedes it, so none sees the padding on the right, and answers overwrite it.
    """
    hidden_BTD, cache = _forward(model, batch)
    return _first_token(model, hidden_BTD, batch.lengths, batch.lengths, sampling), grow(cache, size=size)


def logits(model: Llava, batch: PromptBatch) -> jax.Array:
    """The scores of the token after each position of the prompts, float32[B, T, V]."""
    return model.llm.logits(_forward(model, batch)[0])


def _forward(model: Llava, batch: PromptBatch) -> tuple[jax.Array, KVCache]:
    """-> hidden states [B, T, D], and the cache of the prompts with S = T."""
    positions_BT = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1])[None], batch.tokens.shape)
    x_BTD = model.embed(batch.tokens, batch.images, batch.image_feature_index)
    return model.llm.extend(x_BTD, positions_BT)


def prefill_suffixes(
    model: Llava,
    prefixes: KVCache,
    prefix_of_B: jax.Array,
    starts_B: jax.Array,
    suffixes: PromptBatch,
    sampling: RowSampling | None,
    *,
    size: int,
) -> tuple[jax.Array, KVCache]:
    """As `prefill`, of prompts whose first `starts_B` tokens are row `prefix_of_B` of another cache."""
    cache = grow(jax.tree.map(lambda x_CKSH: x_CKSH[prefix_of_B], prefixes), size=size)
    positions_BT = starts_B[:, None] + jnp.arange(suffixes.tokens.shape[1])[None]
    hidden_BTD, cache = model.llm.extend(model.embed(suffixes.tokens), positions_BT, cache)
    return _first_token(model, hidden_BTD, suffixes.lengths, starts_B + suffixes.lengths, sampling), cache


def _first_token(model: Llava, hidden_BTD, lengths_B, positions_B, sampling: RowSampling | None) -> jax.Array:
    last_BD = hidden_BTD[jnp.arange(len(lengths_B)), lengths_B - 1]
    return sample(model.llm.logits(last_BD), positions_B, sampling)


def decode(
    model: Llava,
    cache: KVCache,
    slots: Slots,
    stop_ids: jax.Array,
    steps: jax.Array,
    report: jax.Array | None = None,
    *,
    max_steps: int = MAX_STEPS,
) -> tuple[Sampled, KVCache]:
    """Generates at most `steps` tokens in every slot -> Sampled [B, max_steps], of which so many are written, and the
    cache. A slot becomes idle at a token of `stop_ids` and at its limit; when all are, the loop ends.

    `report` (bool[]) says whether log probabilities are wanted; None compiles a program without them.
    """
    idle = cache.size if slots.pages is None else slots.pages.shape[1] * cache.size
    if slots.adapters is not None:
        batched_lora.use(model, slots.adapters)

    def working(carry: tuple) -> jax.Array:
        step, _, positions_B, _, _ = carry
        return (step < steps) & (positions_B < idle).any()

    def advance(carry: tuple) -> tuple:
        step, tokens_B, positions_B, cache, generated = carry
        working_B = positions_B < idle
        x_B1D = model.embed(tokens_B[:, None])
        hidden_B1D, cache = model.llm.extend(x_B1D, positions_B[:, None], cache, slots.pages)
        logits_BV = model.llm.logits(hidden_B1D[:, 0])
        positions_B += 1
        rules = slots.rules and slots.rules.at_step(step)
        tokens_B = sample(ruled(logits_BV, rules, generated.tokens), positions_B, slots.sampling)
        sampled = with_logprobs(jnp.where(working_B, tokens_B, -1), logits_BV, report, rules)
        generated = jax.tree.map(lambda all_, new: all_.at[:, step].set(new), generated, sampled)
        stopped_B = jnp.isin(tokens_B, stop_ids)
        if slots.endless is not None:
            stopped_B &= ~slots.endless
        continues_B = working_B & (positions_B < slots.limits) & ~stopped_B
        return step + 1, tokens_B, jnp.where(continues_B, positions_B, idle), cache, generated

    B = len(slots.tokens)
    generated = Sampled(jnp.full((B, max_steps), -1, jnp.int32))
    if report is not None:
        top = (B, max_steps, MAX_LOGPROBS)
        logprobs = jnp.zeros((B, max_steps)), jnp.zeros(top, jnp.int32), jnp.zeros(top)
        generated = Sampled(generated.tokens, *logprobs)
    carry = (jnp.int32(0), slots.tokens, slots.positions, cache, generated)
    *_, cache, generated = jax.lax.while_loop(working, advance, carry)
    return generated, cache


def sample(logits_BV: jax.Array, positions_B: jax.Array, sampling: RowSampling | None) -> jax.Array:
    """The tokens int32[B] for `positions_B`; without `sampling` the most likely ones."""
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if sampling is None:
        return greedy_B
    random_B = sampling.temperature > 0
    limited_B = random_B & ((sampling.top_p < 1) | (sampling.top_k > 0))

    def draw() -> jax.Array:
        tempered_BV = logits_BV / jnp.where(random_B, sampling.temperature, 1.0)[:, None]
        kept_BV = jax.lax.cond(
            limited_B.any(), lambda: top_k_top_p(tempered_BV, sampling.top_k, sampling.top_p), lambda: tempered_BV
        )
        least_B = tempered_BV.max(axis=-1) + jnp.log(sampling.min_p)
        kept_BV = jnp.where(tempered_BV >= least_B[:, None], kept_BV, -jnp.inf)
        keys_B = jax.vmap(_key)(sampling.seeds, sampling.prompts, positions_B)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)
        return jnp.where(random_B, drawn_B, greedy_B)

    return jax.lax.cond(random_B.any(), draw, lambda: greedy_B)


def top_k_top_p(logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Sets to -inf all logits but the `top_k` highest (0: all), and of these all but the fewest whose probabilities
    together reach `top_p` (Holtzman et al. 2020). Equal logits are kept or dropped together."""
    V = logits_BV.shape[1]
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    ranked_BV = jnp.arange(V)[None] < jnp.where(top_k_B > 0, top_k_B, V)[:, None]
    probabilities_BV = jax.nn.softmax(jnp.where(ranked_BV, descending_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    top_p_B1 = top_p_B[:, None]
    inside_BV = ranked_BV & ((before_BV < top_p_B1) | (top_p_B1 >= 1))  # rounded sums reach 1 too early
    least_B1 = jnp.min(jnp.where(inside_BV, descending_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _key(seed: jax.Array, prompt: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), position)


def with_logprobs(
    tokens_B: jax.Array, logits_BV: jax.Array, report: jax.Array | None, rules: ScoreRules | None = None
) -> Sampled:
    """The tokens with their log probabilities, among the allowed ones, where `report` is true."""
    if report is None:
        return Sampled(tokens_B)

    def logprobs() -> tuple[jax.Array, ...]:
        logprobs_BV = jax.nn.log_softmax(logits_BV if rules is None else allowed(logits_BV, rules))
        logprobs_B = jnp.take_along_axis(logprobs_BV, jnp.maximum(tokens_B, 0)[:, None], axis=1)[:, 0]
        top_logprobs, top_tokens = jax.lax.top_k(logprobs_BV, MAX_LOGPROBS)
        return logprobs_B, top_tokens, top_logprobs

    def zeros() -> tuple[jax.Array, ...]:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(logprobs))

    return Sampled(tokens_B, *jax.lax.cond(report, logprobs, zeros))


def grow(cache: KVCache, *, size: int) -> KVCache:
    """The cache with room for `size` positions a row, if it has less."""
    added = max(size - cache.size, 0)
    return jax.tree.map(lambda x_CKSH: jnp.pad(x_CKSH, [(0, 0), (0, 0), (0, added), (0, 0)]), cache)
