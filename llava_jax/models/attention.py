"""Attention as one function with a backend for each kind of device, and attention to a KV cache.

Axes: B batch, T queries, S keys, N heads, K key/value heads, H head width, R = B K, Q = T N / K.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

CHUNK = 512  # queries that `chunked_attention` computes at a time
GROUP = 2  # rows that CPUs compute at a time in `cached_attention`
FLOOR = -1e30  # below every score, and finite, since the difference of two infinities is NaN
SPLASH_BLOCK, LANES = 512, 128  # the largest blocks of queries and keys; the lanes of TPUs


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    window: int | None = None,
    *,
    backend: str = "xla",
    packed: bool = True,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v -> [B, T, N, H], softmax in float32; K may divide N (grouped queries).

    Args:
      q_BTNH, k_BTKH, v_BTKH: queries, keys and values.
      segment_ids_BT: of a decoder, whose tokens see themselves and the earlier tokens of their segment; None for a
        vision tower, whose tokens see all tokens.
      window: a decoder's token sees at most so many tokens, including itself.
      backend: of `BACKENDS`.
      packed: whether rows may hold several segments. Otherwise each row holds one and then padding, and the results at
        padding are not used.

    Raises `ValueError` where the backend does not support this.
    """
    if window is not None and window >= q_BTNH.shape[1]:
        window = None
    with jax.named_scope("attention"):
        return BACKENDS[backend](q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, packed, window)


def choose_backend(platform: str, packed: bool, dtype: jnp.dtype = jnp.bfloat16) -> str:
    """The fastest correct backend for a platform ("cpu", "tpu", "gpu"). cuDNN's supports only 16-bit types."""
    if platform == "gpu":
        return "chunked" if packed or dtype == jnp.float32 else "cudnn"
    return {"cpu": "xla", "tpu": "splash"}[platform]


def dense_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS: jax.Array | None = None) -> jax.Array:
    """Attention by its definition. `mask_BTS`: which keys a query sees, at least one each."""
    return attention_by_head(q_BTNH, by_head(k_BSKH), by_head(v_BSKH), mask_BTS)


def xla_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, packed: bool, window: int | None) -> jax.Array:
    mask_BTT = None if segment_ids_BT is None else causal_segment_mask(segment_ids_BT, window)
    return dense_attention(q_BTNH, k_BTKH, v_BTKH, mask_BTT)


def chunked_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, packed: bool, window: int | None) -> jax.Array:
    """Computes chunks of queries one by one, and their scores again in the backward pass instead of storing them."""
    B, T, N, H = q_BTNH.shape
    if segment_ids_BT is None or T <= CHUNK:
        return xla_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, packed, window)
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT = (pad_axis(x, 1, CHUNK) for x in (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT))
    k_RSH, v_RSH = by_head(k_BTKH), by_head(v_BTKH)
    positions_S = jnp.arange(k_RSH.shape[1])

    @jax.checkpoint
    def attend(chunk: tuple[jax.Array, ...]) -> jax.Array:
        q_BCNH, segment_ids_BC, positions_C = chunk
        same_BCS = segment_ids_BC[:, :, None] == segment_ids_BT[:, None, :]
        seen_CS = within_window(positions_C[:, None] - positions_S[None], window)
        return attention_by_head(q_BCNH, k_RSH, v_RSH, same_BCS & seen_CS[None])

    def chunks(x: jax.Array) -> jax.Array:
        return x.reshape(B, -1, CHUNK, *x.shape[2:]).swapaxes(0, 1)

    attended = jax.lax.map(attend, (chunks(q_BTNH), chunks(segment_ids_BT), positions_S.reshape(-1, CHUNK)))
    return attended.swapaxes(0, 1).reshape(B, -1, N, H)[:, :T]


def splash_attention(
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, packed: bool, window: int | None, interpret: bool = False
) -> jax.Array:
    """JAX's Pallas kernel for TPUs: stores no scores, and skips blocks that are masked out.

    Sequences are padded to a multiple of the lanes with a segment of their own, heads with zeros.
    """
    (B, T, N, H), scale = q_BTNH.shape, q_BTNH.shape[-1] ** -0.5
    segments_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    segments_BT = pad_axis(segments_BT, 1, LANES)
    q_BNTH, k_BKTH, v_BKTH = (
        pad_axis(pad_axis(x, 1, LANES), 3, LANES).swapaxes(1, 2) for x in (q_BTNH * scale, k_BTKH, v_BTKH)
    )
    kernel = _splash_kernel(segments_BT.shape[1], N, segment_ids_BT is not None, window, interpret)
    attended_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, splash.SegmentIds(segments_BT, segments_BT))
    return attended_BNTH.swapaxes(1, 2)[:, :T, :, :H]


def _splash_kernel(length: int, heads: int, causal: bool, window: int | None, interpret: bool) -> Callable:
    shape = (length, length)
    if window is not None:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    else:
        mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    block = math.gcd(length, SPLASH_BLOCK)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads), block_sizes=sizes, interpret=interpret
    )


def cudnn_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, packed: bool, window: int | None) -> jax.Array:
    """cuDNN's fused kernel for GPUs. It has no segments: unpacked rows need none, since padding comes last."""
    if packed and segment_ids_BT is not None:
        raise ValueError("cuDNN's attention would see across the samples of packed rows: use the backend 'chunked'")
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        is_causal=segment_ids_BT is not None,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


BACKENDS = {"xla": xla_attention, "chunked": chunked_attention, "splash": splash_attention, "cudnn": cudnn_attention}


def attention_by_head(
    q_BTNH: jax.Array, k_RSH: jax.Array, v_RSH: jax.Array, mask_BTS: jax.Array | None = None
) -> jax.Array:
    """`dense_attention` to keys and values in the order of a cache, R = B K, which are read without a copy.

    The scores are stored once, with the Q queries of a key/value head next to each other, and the outputs are divided
    by the sums. On CPUs, `jax.nn.dot_product_attention`, which transposes the scores, takes twice as long.
    """
    (B, T, N, H), (R, S, _) = q_BTNH.shape, k_RSH.shape
    K = R // B
    q_RQH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(R, -1, H)
    scores_RQS = jnp.einsum("RQH,RSH->RQS", q_RQH, k_RSH, preferred_element_type=jnp.float32) * H**-0.5
    if mask_BTS is not None:
        bias_BTS = jnp.where(mask_BTS, 0.0, -jnp.inf)  # added, since its gradient needs no mask
        scores_RQS += jnp.broadcast_to(bias_BTS[:, None, None], (B, K, N // K, T, S)).reshape(scores_RQS.shape)
    largest_RQ1 = jax.lax.stop_gradient(jnp.max(scores_RQS, axis=-1, keepdims=True))
    weights_RQS = jnp.exp(scores_RQS - largest_RQ1)
    sums_RQ1 = jnp.sum(weights_RQS, axis=-1, keepdims=True)
    attended_RQH = jnp.einsum(
        "RQS,RSH->RQH", weights_RQS.astype(v_RSH.dtype), v_RSH, preferred_element_type=jnp.float32
    )
    attended_RQH = (attended_RQH / sums_RQ1).astype(v_RSH.dtype)
    return attended_RQH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def cached_attention(
    q_BTNH: jax.Array,
    k_CKSH: jax.Array,
    v_CKSH: jax.Array,
    pages_BM: jax.Array,
    positions_BT: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Attention of each batch row's queries to its sequence in the cache, at and before their `positions_BT`.

    A sequence has M of the C pages, S positions each (Kwon et al. 2023): position p is entry p % S of page
    `pages_BM[b, p // S]`. Pages are computed one by one (Milakov & Gimelshein 2018): the time depends on the length of
    the sequences, not on M. Queries at position M S or beyond are padding. The result of a batch row depends neither on
    the other rows nor on which pages hold it, in any bit (batch invariance).
    """
    (_, T, N, H), (_, K, S, _) = q_BTNH.shape, k_CKSH.shape
    steps_S, size = jnp.arange(S), pages_BM.shape[1] * S

    def attend(q_TNH: jax.Array, pages_M: jax.Array, positions_T: jax.Array) -> jax.Array:
        q_KQH = q_TNH.reshape(T, K, N // K, H).transpose(1, 2, 0, 3).reshape(K, -1, H)

        def add_page(number: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest_KQ1, sums_KQ1, attended_KQH = state
            k_KSH, v_KSH = (jax.lax.dynamic_index_in_dim(x, pages_M[number], keepdims=False) for x in (k_CKSH, v_CKSH))
            scores_KQS = jnp.einsum("KQH,KSH->KQS", q_KQH, k_KSH, preferred_element_type=jnp.float32) * H**-0.5
            seen_TS = within_window(positions_T[:, None] - (number * S + steps_S)[None], window)
            seen_KQS = jnp.broadcast_to(seen_TS[None, None], (K, N // K, T, S)).reshape(scores_KQS.shape)
            scores_KQS = jnp.where(seen_KQS, scores_KQS, -jnp.inf)
            new_largest_KQ1 = jnp.maximum(largest_KQ1, scores_KQS.max(-1, keepdims=True))
            weights_KQS, kept_KQ1 = jnp.exp(scores_KQS - new_largest_KQ1), jnp.exp(largest_KQ1 - new_largest_KQ1)
            page_KQH = jnp.einsum(
                "KQS,KSH->KQH", weights_KQS.astype(v_KSH.dtype), v_KSH, preferred_element_type=jnp.float32
            )
            sums_KQ1 = sums_KQ1 * kept_KQ1 + weights_KQS.sum(-1, keepdims=True)
            return new_largest_KQ1, sums_KQ1, attended_KQH * kept_KQ1 + page_KQH

        valid_T = positions_T < size
        first = 0 if window is None else jnp.maximum(positions_T.min() - window + 1, 0) // S
        pages = jnp.max(jnp.where(valid_T, positions_T // S + 1, 0))
        nothing = [jnp.full((*q_KQH.shape[:2], n), x, jnp.float32) for n, x in ((1, FLOOR), (1, 0.0), (H, 0.0))]
        _, sums_KQ1, attended_KQH = jax.lax.fori_loop(first, pages, add_page, tuple(nothing))
        attended_KQH = attended_KQH / jnp.where(sums_KQ1 > 0, sums_KQ1, 1.0)
        return attended_KQH.reshape(K, N // K, T, H).transpose(2, 0, 1, 3).reshape(T, N, H).astype(q_TNH.dtype)

    with jax.named_scope("cached_attention"):
        valid_B = (positions_BT < size).any(axis=1)
        return EACH_ROW[jax.default_backend()](attend, valid_B, q_BTNH, pages_BM, positions_BT)


def one_by_one(function: Callable[..., jax.Array], valid_B: jax.Array, *rows: jax.Array) -> jax.Array:
    """`function` of each row, up to the last valid one."""
    shape = jax.eval_shape(function, *(x[0] for x in rows))
    last = jnp.max(jnp.where(valid_B, jnp.arange(len(valid_B)) + 1, 0))
    results = jnp.zeros((len(valid_B), *shape.shape), shape.dtype)
    return jax.lax.fori_loop(0, last, lambda b, done: done.at[b].set(function(*(x[b] for x in rows))), results)


def together(function: Callable[..., jax.Array], valid_B: jax.Array, *rows: jax.Array) -> jax.Array:
    return jax.vmap(function)(*rows)


def in_groups(function: Callable[..., jax.Array], valid_B: jax.Array, *rows: jax.Array) -> jax.Array:
    """`function` of groups of rows, up to the last group with a valid row.

    The size of groups is fixed, since the last bits of a row depend on how many are computed together.
    """
    size = math.gcd(len(valid_B), GROUP)
    grouped = [x.reshape(-1, size, *x.shape[1:]) for x in (valid_B, *rows)]
    results = one_by_one(jax.vmap(function), grouped[0].any(axis=1), *grouped[1:])
    return results.reshape(-1, *results.shape[2:])


# On CPUs, short and idle rows take no time if they are not computed together with long ones.
EACH_ROW = {"cpu": in_groups, "gpu": together, "tpu": together}


def by_head(x_BTKH: jax.Array) -> jax.Array:
    """-> [B K, T, H]"""
    B, T, K, H = x_BTKH.shape
    return x_BTKH.swapaxes(1, 2).reshape(B * K, T, H)


def causal_segment_mask(segment_ids_BT: jax.Array, window: int | None = None) -> jax.Array:
    """bool[B, T, T]: a token sees itself and the earlier tokens of its segment (padding is segment 0)."""
    positions = jnp.arange(segment_ids_BT.shape[1])
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return same & within_window(positions[:, None] - positions[None], window)[None]


def within_window(before: jax.Array, window: int | None) -> jax.Array:
    """Whether a decoder's token sees the token `before` positions earlier: at most itself and `window` - 1 others."""
    return before >= 0 if window is None else (before >= 0) & (before < window)


def pad_axis(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """`x` with zeros at the end of an axis, up to a multiple of a length."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
