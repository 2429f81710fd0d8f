"""Attention behind one function.

Axes: B batch, T queries, S keys, N heads, K key/value heads, H head width, R = B K, Q = T N / K.
"""

import jax
import jax.numpy as jnp


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v -> [B, T, N, H], softmax in float32; K may divide N (grouped queries).

    `mask_BTS` says which keys a query sees; a query must see at least one.
    """
    return attention_by_head(q_BTNH, by_head(k_BSKH), by_head(v_BSKH), mask_BTS)


def attention_by_head(
    q_BTNH: jax.Array, k_RSH: jax.Array, v_RSH: jax.Array, mask_BTS: jax.Array | None = None
) -> jax.Array:
    """`attention` to keys and values as a cache has them, R = B K: they are read where they are, without a copy.

    Scores exist once, the Q queries of a key/value head beside each other, and what is divided are the sums: on CPUs
    `jax.nn.dot_product_attention`, which moves the axes of the scores about, takes twice as long.
    """
    with jax.named_scope("attention"):
        (B, T, N, H), (R, S, _) = q_BTNH.shape, k_RSH.shape
        K = R // B
        q_RQH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(R, -1, H)
        scores_RQS = jnp.einsum("RQH,RSH->RQS", q_RQH, k_RSH, preferred_element_type=jnp.float32) * H**-0.5
        if mask_BTS is not None:
            bias_BTS = jnp.where(mask_BTS, 0.0, -jnp.inf)  # added, since a gradient need not know what was added
            scores_RQS += jnp.broadcast_to(bias_BTS[:, None, None], (B, K, N // K, T, S)).reshape(scores_RQS.shape)
        largest_RQ1 = jax.lax.stop_gradient(jnp.max(scores_RQS, axis=-1, keepdims=True))
        weights_RQS = jnp.exp(scores_RQS - largest_RQ1)
        sums_RQ1 = jnp.sum(weights_RQS, axis=-1, keepdims=True)
        attended_RQH = jnp.einsum(
            "RQS,RSH->RQH", weights_RQS.astype(v_RSH.dtype), v_RSH, preferred_element_type=jnp.float32
        )
        attended_RQH = (attended_RQH / sums_RQ1).astype(v_RSH.dtype)
        return attended_RQH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def by_head(x_BTKH: jax.Array) -> jax.Array:
    """-> [B K, T, H]"""
    B, T, K, H = x_BTKH.shape
    return x_BTKH.swapaxes(1, 2).reshape(B * K, T, H)


def causal_segment_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """bool[B, T, T]: a token sees itself and what precedes it in its own segment (padding is segment 0)."""
    T = segment_ids_BT.shape[1]
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return same & jnp.tri(T, dtype=bool)[None]
