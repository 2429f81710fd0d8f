"""LLaMA decoder (Touvron et al. 2023) and its relatives, the language model f of the paper.

Axes: B batch, T queries, S keys, D embed, F mlp, N heads, K key/value heads, H head width, V vocabulary, R = B K.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llava_jax.models.attention import attention_by_head, by_head, cached_attention, within_window
from llava_jax.models.config import TextConfig
from llava_jax.models.execution import LAYER_INPUT, QKV, SINGLE, Execution
from llava_jax.models.layers import WEIGHT_INIT, Linear, RMSNorm, add_bias, stack_layers, unstack_layers
from llava_jax.models.registry import FAMILIES


class KVCache(NamedTuple):
    """Keys and values of each layer, [R, S, H] with R = B K: slot s of a row's head is the token at position s.

    Were B and K apart, XLA's CPU backend would copy the cache at every token.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    @property
    def slots(self) -> int:
        return self.k[0].shape[1]


class Conversations(NamedTuple):
    """Keys and values of C conversations, each layer's [C, K, S, H]; what has position S is in none of them."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    @property
    def positions(self) -> int:
        return self.k[0].shape[2]


class Llama(nnx.Module):
    """Embedded tokens to hidden states; `logits` turns these into scores of the next token."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs)
        layer = FAMILIES[config.family or "llama"].layer
        self.layers = stack_layers(lambda rngs: layer(config, rngs=rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, execution: Execution = SINGLE
    ) -> jax.Array:
        """Embedded tokens -> hidden states [B, T, D] after the last norm.

        Positions (int32) restart in every segment; a token sees itself and what precedes it in its segment.
        """
        rotation = self.rotation(positions_BT)

        def step(x_BTD: jax.Array, layer: LlamaLayer) -> jax.Array:
            layer = execution.gather("llm.layers", layer)
            return layer(checkpoint_name(x_BTD, LAYER_INPUT), rotation, segment_ids_BT, execution)[0]

        with jax.named_scope("llama_layers"):
            return self.norm(execution.scan_layers(step, x_BTD, self.layers))

    def prefill(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """As calling, and the keys and values of the prompt with S = T."""
        rotation = self.rotation(positions_BT)
        keys, values = [], []
        for layer in self.each_layer():
            x_BTD, (k_BTKH, v_BTKH) = layer(x_BTD, rotation, segment_ids_BT)
            keys.append(by_head(k_BTKH))
            values.append(by_head(v_BTKH))
        return self.norm(x_BTD), KVCache(tuple(keys), tuple(values))

    def decode(self, x_BTD: jax.Array, positions_BT: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """T more tokens a row (one, as a rule): -> hidden [B, T, D] and the cache with their slots filled.

        A token sees all slots up to its own. What lies past the end of the cache is written to its last slot.
        """
        rotation = self.rotation(positions_BT)
        before_BTS = positions_BT[:, :, None] - jnp.arange(cache.slots)[None, None]
        seen_BTS = within_window(before_BTS, self.config.sliding_window)
        slots_RT = jnp.repeat(positions_BT, self.config.num_kv_heads, axis=0)
        heads_R1 = jnp.arange(len(slots_RT))[:, None]
        keys, values = [], []
        for layer, k_RSH, v_RSH in zip(self.each_layer(), *cache, strict=True):
            q_BTNH, k_BTKH, v_BTKH = layer.queries_keys_values(x_BTD, rotation)
            keys.append(k_RSH.at[heads_R1, slots_RT].set(by_head(k_BTKH), mode="clip"))
            values.append(v_RSH.at[heads_R1, slots_RT].set(by_head(v_BTKH), mode="clip"))
            x_BTD = layer.feed(x_BTD, attention_by_head(q_BTNH, keys[-1], values[-1], seen_BTS))
        return self.norm(x_BTD), KVCache(tuple(keys), tuple(values))

    def extend(
        self, x_BTD: jax.Array, positions_BT: jax.Array, conversations_B: jax.Array, cache: Conversations
    ) -> tuple[jax.Array, Conversations]:
        """T more tokens of the conversations of these numbers: -> hidden [B, T, D] and the cache with them in it.

        The positions of a row follow each other; from S on there is no token.
        """
        rotation = self.rotation(positions_BT)
        B, T = positions_BT.shape
        K = self.config.num_kv_heads
        places = (conversations_B.reshape(B, 1, 1), jnp.arange(K).reshape(1, K, 1), positions_BT.reshape(B, 1, T))
        keys, values = [], []
        for layer, k_CKSH, v_CKSH in zip(self.each_layer(), *cache, strict=True):
            q_BTNH, k_BTKH, v_BTKH = layer.queries_keys_values(x_BTD, rotation)
            keys.append(k_CKSH.at[places].set(k_BTKH.swapaxes(1, 2), mode="drop"))
            values.append(v_CKSH.at[places].set(v_BTKH.swapaxes(1, 2), mode="drop"))
            attended = cached_attention(
                q_BTNH, keys[-1], values[-1], conversations_B, positions_BT, self.config.sliding_window
            )
            x_BTD = layer.feed(x_BTD, attended)
        return self.norm(x_BTD), Conversations(tuple(keys), tuple(values))

    def unstack_layers(self, transposed: bool = False) -> None:
        """Arranges the layers for decoding, which is bound by reading their weights: as a list, and if `transposed`
        with kernels [out, in], which CPUs multiply with a single row a quarter faster, and with more at half the speed.
        """
        unstack_layers(self, self.config.num_layers)
        for layer in self.layers if transposed else ():
            replace_linears(layer, RowLinear)

    def each_layer(self) -> list["LlamaLayer"]:
        """The layers one by one, stacked or not."""
        if isinstance(self.layers, nnx.List):
            return list(self.layers)
        return [jax.tree.map(lambda stacked, i=i: stacked[i], self.layers) for i in range(self.config.num_layers)]

    def head(self, hidden: jax.Array, execution: Execution = SINGLE) -> tuple[jax.Array, jax.Array]:
        """The vocabulary projection [D, V], whole as soon as `hidden`, which is returned too, needs it."""
        if self.config.tie_word_embeddings:
            embed_tokens, hidden = execution.gather_after("llm.embed_tokens", self.embed_tokens, hidden)
            return embed_tokens.embedding[...].T, hidden
        lm_head, hidden = execution.gather_after("llm.lm_head", self.lm_head, hidden)
        return lm_head.kernel[...], hidden

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32[..., V]."""
        if hasattr(self, "int8_head"):  # see `models.quantization`
            return self.int8_head.scores(hidden)
        kernel_DV, hidden = self.head(hidden)
        return vocabulary_scores(hidden, kernel_DV)

    def rotation(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines [B, T, 1, H/2] of the rotary embedding (Su et al. 2021), angles in float32."""
        angles = positions.astype(jnp.float32)[..., None, None] * rotary_frequencies(self.config)[None, None, None]
        return jnp.cos(angles), jnp.sin(angles)


def rotary_frequencies(config: TextConfig) -> jax.Array:
    """Radians a position, float32[H/2]."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies, scaling = 1.0 / config.rope_theta**exponents, config.rope_scaling
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
    """Rotates the pairs (x[i], x[i + H/2]) by their position's angles."""
    cos, sin = rotation
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)


class Embedding(nnx.Module):
    """`embedding` [V, D]. Rows are taken in the table's own type, so that its gradient adds up in it too."""

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

    def __call__(
        self, x_BTD, rotation, segment_ids_BT, execution: Execution = SINGLE
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """-> the new x and this layer's rotated keys and values [B, T, K, H]."""
        q, k, v = self.queries_keys_values(x_BTD, rotation)
        return self.feed(x_BTD, execution.attend(q, k, v, segment_ids_BT, self.attention.window)), (k, v)

    def queries_keys_values(self, x_BTD, rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.attention.project(self.input_layernorm(x_BTD), rotation)

    def feed(self, x_BTD, attended_BTNH) -> jax.Array:
        """What follows attention."""
        x_BTD += self.attention.o_proj(attended_BTNH.reshape(*x_BTD.shape[:2], -1))
        with jax.named_scope("mlp"):
            x_BTD += self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD


class LlamaAttention(nnx.Module):
    """The projections of grouped-query attention (Ainslie et al. 2023): N query heads share K key/value heads."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        D, H = config.hidden_size, config.head_dim
        self.head_dim, self.window = H, config.sliding_window
        self.q_proj = Linear(D, config.num_heads * H, bias=config.qkv_bias, rngs=rngs)
        self.k_proj = Linear(D, config.num_kv_heads * H, bias=config.qkv_bias, rngs=rngs)
        self.v_proj = Linear(D, config.num_kv_heads * H, bias=config.qkv_bias, rngs=rngs)
        self.o_proj = Linear(config.num_heads * H, D, bias=False, rngs=rngs)

    def project(self, x_BTD: jax.Array, rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """-> q [B, T, N, H] and k, v [B, T, K, H]; queries and keys rotated."""
        with jax.named_scope("qkv"):
            q, k, v = (
                project(x_BTD).reshape(*x_BTD.shape[:2], -1, self.head_dim)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
            return tuple(checkpoint_name(x, QKV) for x in (rotate(q, rotation), rotate(k, rotation), v))


class RowLinear(nnx.Module):
    """A `Linear` whose `kernel` is [out, in]: times a single vector, CPUs read it a third faster."""

    def __init__(self, linear: Linear):
        self.kernel = nnx.Param(linear.kernel[...].T)
        self.bias = linear.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        return add_bias(jnp.einsum("oi,...i->...o", self.kernel[...].astype(x.dtype), x), self.bias)


def replace_linears(layer: LlamaLayer, make: Callable[[Linear], nnx.Module]) -> None:
    """Puts what `make` makes of every `Linear` of a layer in its place."""
    for module in (layer.attention, layer.mlp):
        for name, value in list(vars(module).items()):
            if isinstance(value, Linear):
                setattr(module, name, make(value))


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, F, bias=False, rngs=rngs)
        self.up_proj = Linear(D, F, bias=False, rngs=rngs)
        self.down_proj = Linear(F, D, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
