"""Attention behind one function. Axes: B batch, T queries, S keys, N heads, K key/value heads, H head width."""

import jax
import jax.numpy as jnp


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v -> [B, T, N, H], softmax in float32; K may divide N (grouped queries).

    `mask_BTS` says which keys a query sees; a query must see at least one.
    """
    with jax.named_scope("attention"):
        mask = None if mask_BTS is None else mask_BTS[:, None]
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask)


def causal_segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """bool[B, T, T]: a token sees itself and what precedes it in its own segment (padding is segment 0)."""
    T = segment_ids_BT.shape[1]
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return same & jnp.tri(T, dtype=bool)[None]
