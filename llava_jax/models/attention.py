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


def cached_attention(q_BTNH: jax.Array, k_RSH: jax.Array, v_RSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """`attention` to the keys and values of a cache, R = B K; they are read where they are, without a copy."""
    with jax.named_scope("attention"):
        (B, T, N, H), (R, S, _) = q_BTNH.shape, k_RSH.shape
        K = R // B
        q_RQH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(R, -1, H)
        scores_RQS = jnp.einsum("RQH,RSH->RQS", q_RQH, k_RSH, preferred_element_type=jnp.float32) * H**-0.5
        mask_RQS = jnp.broadcast_to(mask_BTS[:, None, None], (B, K, N // K, T, S)).reshape(scores_RQS.shape)
        weights_RQS = jax.nn.softmax(jnp.where(mask_RQS, scores_RQS, -jnp.inf), axis=-1).astype(v_RSH.dtype)
        attended_RQH = jnp.einsum("RQS,RSH->RQH", weights_RQS, v_RSH)
        return attended_RQH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def causal_segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """bool[B, T, T]: a token sees itself and what precedes it in its own segment (padding is segment 0)."""
    T = segment_ids_BT.shape[1]
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return same & jnp.tri(T, dtype=bool)[None]
