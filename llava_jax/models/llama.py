"""LLaMA decoder (Touvron et al. 2023) and its relatives, the language model f of the paper.

Axes: B batch, T queries, S keys, D embed, F mlp, N heads, K key/value heads, H head width, V vocabulary, C rows or
pages of a cache, M pages of a sequence.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llava_jax.models.attention import attention_by_head, cached_attention, within_window
from llava_jax.models.config import Span, TextConfig
from llava_jax.models.execution import LAYER_INPUT, QKV, SINGLE, Execution
from llava_jax.models.layers import WEIGHT_INIT, Linear, RMSNorm, finish, stack_layers, unstack_layers
from llava_jax.models.registry import FAMILIES


class KVCache(NamedTuple):
    """Keys and values of each layer, [C, K, S, H]: entry s of a row is the token at position s of its sequence.

    Or, if sequences are in pages of S positions, entry s of page m of a sequence is the token at position m S + s.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    @property
    def size(self) -> int:
        """S, the number of positions that a row or a page has room for."""
        return self.k[0].shape[2]


class Llama(nnx.Module):
    """Embedded tokens to hidden states, of which `logits` computes the scores of the next token."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        family = FAMILIES[config.family or "llama"]
        self.embed_tokens = family.embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = stack_layers(lambda rngs: family.layer(config, rngs=rngs), config.num_layers, rngs)
        self.norm = family.norm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, execution: Execution = SINGLE
    ) -> jax.Array:
        """Embedded tokens -> hidden states [B, T, D] after the last norm. The forward of training.

        Positions (int32) restart in every segment; a token sees itself and the earlier tokens of its segment.
        """
        config, spans = self.config, self.config.spans
        rotations = [self.rotation(positions_BT, span) for span in spans]
        numbers = () if len(spans) == 1 else (jnp.int32(0),)  # of the next layer, where layers see different spans
        span_of_L = np.array([config.span_of(i) for i in range(config.num_layers)], np.int32)

        def step(carry: tuple[jax.Array, ...], layer: LlamaLayer) -> tuple[jax.Array, ...]:
            x_BTD, *numbers = carry
            layer, x_BTD = execution.gather("llm.layers", layer), checkpoint_name(x_BTD, LAYER_INPUT)
            run = functools.partial(layer, segment_ids_BT=segment_ids_BT, execution=execution)
            runs = [functools.partial(run, rotation=r, window=s.window) for r, s in zip(rotations, spans, strict=True)]
            if not numbers:
                return (runs[0](x_BTD),)
            return jax.lax.switch(jnp.asarray(span_of_L)[numbers[0]], runs, x_BTD), numbers[0] + 1

        with jax.named_scope("llama_layers"):
            x_BTD, *_ = execution.scan_layers(step, (x_BTD, *numbers), self.layers, config.num_layers)
            return self.norm(x_BTD)

    def extend(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: KVCache | None = None, pages_BM: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """T more tokens of B sequences -> hidden states [B, T, D], and the cache with their keys and values.

        A token sees its sequence up to its own position. The forward of answering: layer by layer, without gradients.

        Args:
          x_BTD: embedded tokens.
          positions_BT: int32. Those of a sequence follow each other. A token at position S (with pages, M S) or beyond
            is padding: it is not stored, and its hidden state means nothing.
          cache: of the tokens before; None where these are the first, at positions 0 ... T - 1: S is T then.
          pages_BM: int32, the pages of the cache that hold each sequence, in order; None where sequence b is row b.
        """
        spans = self.config.spans
        rotations = [self.rotation(positions_BT, span) for span in spans]
        B, T = positions_BT.shape
        queries, keys = (jnp.arange(T)[None], T) if cache is None else (positions_BT, cache.size)
        before_BTS = queries[:, :, None] - jnp.arange(keys)[None, None]
        seen = [within_window(before_BTS, span.window) for span in spans]
        rows_BT, steps_BT = jnp.arange(B)[:, None], positions_BT
        if pages_BM is not None:
            numbers_BT, steps_BT = jnp.divmod(positions_BT, cache.size)
            rows_BT = jnp.take_along_axis(pages_BM, numbers_BT, axis=1, mode="fill", fill_value=len(cache.k[0]))
        entries = (rows_BT[:, None], jnp.arange(self.config.num_kv_heads)[None, :, None], steps_BT[:, None])

        def attend(q_BTNH: jax.Array, k_CKSH: jax.Array, v_CKSH: jax.Array, span: int) -> jax.Array:
            if pages_BM is not None:
                return cached_attention(q_BTNH, k_CKSH, v_CKSH, pages_BM, positions_BT, spans[span].window)
            # The rows of a batch are about as long as each other: looking at all S positions at once is faster then.
            k_RSH, v_RSH = (x.reshape(-1, *x.shape[2:]) for x in (k_CKSH, v_CKSH))
            with jax.named_scope("attention"):
                return attention_by_head(q_BTNH, k_RSH, v_RSH, seen[span])

        new_cache = []
        for i, layer in enumerate(self.each_layer()):
            span = self.config.span_of(i)
            q_BTNH, *new = layer.queries_keys_values(x_BTD, rotations[span])
            k_CKSH, v_CKSH = (x_BTKH.swapaxes(1, 2) for x_BTKH in new)
            if cache is not None:
                k_CKSH = cache.k[i].at[entries].set(k_CKSH, mode="drop")
                v_CKSH = cache.v[i].at[entries].set(v_CKSH, mode="drop")
            new_cache.append((k_CKSH, v_CKSH))
            x_BTD = layer.after_attention(x_BTD, attend(q_BTNH, k_CKSH, v_CKSH, span))
        return self.norm(x_BTD), KVCache(*zip(*new_cache, strict=True))

    def unstack_layers(self, transposed: bool = False) -> None:
        """Makes the layers a list, for decoding. `transposed` stores kernels as [out, in]: CPUs multiply these with a
        single row a quarter faster, and with several rows at half the speed.
        """
        unstack_layers(self, self.config.num_layers)
        for layer in self.layers if transposed else ():
            replace_linears(layer, RowLinear)

    def each_layer(self) -> list["LlamaLayer"]:
        """The layers one by one, whether they are stacked or not."""
        if isinstance(self.layers, nnx.List):
            return list(self.layers)
        return [jax.tree.map(lambda stacked, i=i: stacked[i], self.layers) for i in range(self.config.num_layers)]

    def head(self, hidden: jax.Array, execution: Execution = SINGLE) -> tuple[jax.Array, jax.Array]:
        """The vocabulary projection [D, V], gathered not before `hidden` is computed; and `hidden`."""
        if self.config.tie_word_embeddings:
            embed_tokens, hidden = execution.gather_after("llm.embed_tokens", self.embed_tokens, hidden)
            return embed_tokens.embedding[...].T, hidden
        lm_head, hidden = execution.gather_after("llm.lm_head", self.lm_head, hidden)
        return lm_head.kernel[...], hidden

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32[..., V]."""
        if hasattr(self, "int8_head"):  # see `inference.quantization`
            return self.int8_head.scores(hidden)
        kernel_DV, hidden = self.head(hidden)
        return vocabulary_scores(hidden, kernel_DV)

    def rotation(self, positions: jax.Array, span: Span | None = None) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [B, T, 1, H/2] of the rotary embedding (Su et al. 2021), angles in float32."""
        frequencies = rotary_frequencies(self.config, span or self.config.spans[0])
        angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None]
        return jnp.cos(angles), jnp.sin(angles)


def rotary_frequencies(config: TextConfig, span: Span) -> jax.Array:
    """Radians a position, float32[H/2]."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies, scaling = 1.0 / span.theta**exponents, span.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


def vocabulary_scores(hidden: jax.Array, kernel_DV: jax.Array) -> jax.Array:
    """[..., D] -> float32[..., V]."""
    with jax.named_scope("logits"):
        return jnp.matmul(hidden, kernel_DV.astype(hidden.dtype), preferred_element_type=jnp.float32)


def rotate(x_BTNH: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (x[i], x[i + H/2]) by the angles of their position."""
    cos, sin = rotation
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


class Embedding(nnx.Module):
    """`embedding` [V, D]. Rows are taken in the table's own type, so that its gradient is accumulated in it, too."""

    def __init__(self, vocab_size: int, features: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(WEIGHT_INIT(rngs.params(), (vocab_size, features)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], tokens, axis=0, mode="clip")


class LlamaLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = LlamaAttention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x_BTD, rotation, segment_ids_BT, execution: Execution = SINGLE, window: int | None = None):
        q, k, v = self.queries_keys_values(x_BTD, rotation)
        return self.after_attention(x_BTD, execution.attend(q, k, v, segment_ids_BT, window))

    def queries_keys_values(self, x_BTD, rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.attention.project(self.input_layernorm(x_BTD), rotation)

    def after_attention(self, x_BTD, attended_BTNH) -> jax.Array:
        """The rest of the layer: the attention's output projection, and the MLP."""
        x_BTD += self.attention.o_proj(attended_BTNH.reshape(*x_BTD.shape[:2], -1))
        with jax.named_scope("mlp"):
            x_BTD += self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD


class LlamaAttention(nnx.Module):
    """The projections of grouped-query attention (Ainslie et al. 2023): N query heads share K key/value heads."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        D, H = config.hidden_size, config.head_dim
        self.head_dim = H
        self.q_proj = Linear(D, config.num_heads * H, bias=config.qkv_bias, rngs=rngs)
        self.k_proj = Linear(D, config.num_kv_heads * H, bias=config.qkv_bias, rngs=rngs)
        self.v_proj = Linear(D, config.num_kv_heads * H, bias=config.qkv_bias, rngs=rngs)
        self.o_proj = Linear(config.num_heads * H, D, bias=False, rngs=rngs)

    def project(self, x_BTD: jax.Array, rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """-> q [B, T, N, H] and k, v [B, T, K, H]; queries and keys rotated."""
        with jax.named_scope("qkv"):
            q, k, v = self.heads(x_BTD)
            return tuple(checkpoint_name(x, QKV) for x in (rotate(q, rotation), rotate(k, rotation), v))

    def heads(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The same before the rotation."""
        return tuple(
            project(x_BTD).reshape(*x_BTD.shape[:2], -1, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )


class RowLinear(nnx.Module):
    """A `Linear` whose `kernel` is [out, in], which CPUs multiply faster with a single vector."""

    def __init__(self, linear: Linear):
        self.kernel = nnx.Param(linear.kernel[...].T)
        self.bias, self.lora = linear.bias, linear.lora

    def weight(self, dtype: jnp.dtype) -> jax.Array:
        """As `Linear.weight`, [in, out]."""
        return self.kernel[...].T.astype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return finish(self, x, jnp.einsum("oi,...i->...o", self.kernel[...].astype(x.dtype), x))


def replace_linears(layer: LlamaLayer, make: Callable[[Linear], nnx.Module]) -> None:
    """Replaces every `Linear` of a layer by `make(linear)`."""
    for module in (layer.attention, layer.mlp):
        for name, value in list(vars(module).items()):
            if isinstance(value, Linear):
                setattr(module, name, make(value))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    activation = staticmethod(jax.nn.silu)

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, F, bias=False, rngs=rngs)
        self.up_proj = Linear(D, F, bias=False, rngs=rngs)
        self.down_proj = Linear(F, D, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
