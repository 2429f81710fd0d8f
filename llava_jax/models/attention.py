"""Attention behind one function. Axes: B batch, T queries, S keys, N heads, K key/value heads, H head width."""

import jax
import jax.numpy as jnp


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v -> [B, T, N, H], softmax in float32; K may divide N (grouped queries).

    `mask_BTS` says which keys a query sees; a query must see at least one.
    """
    with jax.named_scope("attention"):
        mask = None if mask_BTS is None else mask_BTS[:, None]
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask)


def cached_attention(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """`attention` to keys and values that lie by heads, as in a cache: they are read where they are."""
    with jax.named_scope("attention"):
        (B, T, N, H), K = q_BTNH.shape, k_BKSH.shape[1]
        q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
        scores_BKGTS = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32) * H**-0.5
        weights_BKGTS = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf), axis=-1)
        return jnp.einsum("BKGTS,BKSH->BTKGH", weights_BKGTS.astype(v_BKSH.dtype), v_BKSH).reshape(B, T, N, H)


def causal_segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """bool[B, T, T]: a token sees itself and what precedes it in its own segment (padding is segment 0)."""
    T = segment_ids_BT.shape[1]
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return same & jnp.tri(T, dtype=bool)[None]
