"""Attention and its mask, against torch and against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.models.attention import (
    BACKENDS,
    attention,
    cached_attention,
    causal_segment_mask,
    choose_backend,
    dense_attention,
    splash_attention,
)

B, T, N, H = 2, 7, 6, 8


def random_qkv(kv_heads, keys=T):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, keys, kv_heads, H), (B, keys, kv_heads, H)]
    return [rng.normal(0, 2, shape).astype(np.float32) for shape in shapes]


def torch_attention(q, k, v, mask=None):
    q, k, v = (torch.from_numpy(x).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else torch.tensor(np.asarray(mask))[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).numpy()


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("keys", [T, 11])
def test_equals_torch_without_a_mask(kv_heads, keys):
    q, k, v = random_qkv(kv_heads, keys)
    np.testing.assert_allclose(
        dense_attention(*map(jnp.asarray, (q, k, v))), torch_attention(q, k, v), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_equals_torch_on_packed_rows(kv_heads):
    q, k, v = random_qkv(kv_heads)
    mask = causal_segment_mask(jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3]]))
    ours = dense_attention(*map(jnp.asarray, (q, k, v)), mask)
    np.testing.assert_allclose(ours, torch_attention(q, k, v, mask), rtol=0, atol=1e-5)


def test_gradients_equal_torch():
    q, k, v = random_qkv(kv_heads=2)
    mask = causal_segment_mask(jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3]]))
    weights = np.random.default_rng(1).normal(size=(B, T, N, H)).astype(np.float32)

    ours = jax.grad(lambda qkv: (dense_attention(*qkv, mask) * weights).sum())([jnp.asarray(x) for x in (q, k, v)])

    leaves = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves), attn_mask=torch.tensor(np.asarray(mask))[:, None], enable_gqa=True
    )
    (out.transpose(1, 2) * torch.from_numpy(weights)).sum().backward()
    for gradient, leaf in zip(ours, leaves, strict=True):
        np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=0, atol=1e-5)


def test_softmax_is_computed_in_float32():
    """Scores 256 and 257 are one number in bfloat16 (8 bits); their softmax is not 1/2."""
    q = jnp.array([1.0, 1.0], jnp.bfloat16).reshape(1, 1, 1, 2) * 2**0.5
    k = jnp.array([[256.0, 0.0], [256.0, 1.0]], jnp.bfloat16).reshape(1, 2, 1, 2)
    v = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1) * jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    weight = dense_attention(q, k, v)[0, 0, 0, 0]
    assert weight.dtype == jnp.bfloat16
    assert abs(float(weight) - 1 / (1 + np.exp(-1))) < 0.02


@given(st.lists(st.integers(0, 3), min_size=9, max_size=9))
def test_mask_is_causal_within_a_segment(segments):
    mask = np.asarray(causal_segment_mask(jnp.array([segments])))[0]
    expected = [[key <= query and a == b for key, b in enumerate(segments)] for query, a in enumerate(segments)]
    np.testing.assert_array_equal(mask, expected)


@given(st.lists(st.integers(1, 2), min_size=9, max_size=9), st.integers(1, 10))
def test_a_window_holds_so_many_tokens(segments, window):
    mask = np.asarray(causal_segment_mask(jnp.array([segments]), window))[0]
    expected = [
        [0 <= query - key < window and a == b for key, b in enumerate(segments)] for query, a in enumerate(segments)
    ]
    np.testing.assert_array_equal(mask, expected)


def test_padding_attends_only_padding_and_is_attended_by_none():
    mask = np.asarray(causal_segment_mask(jnp.array([[1, 1, 0, 0]])))[0]
    assert not mask[2:, :2].any() and not mask[:2, 2:].any()
    assert mask.any(axis=1).all()  # no query is left without a key, which would be NaN


LENGTH = 700  # several blocks and chunks, the last of them not full
WIDTH = 64


@functools.cache
def packed_batch(kv_heads: int):
    """q, k, v, segment ids with several samples a row and padding at the end, and weights of a loss."""
    rng = np.random.default_rng(2)
    q, k, v, weights = (
        jnp.asarray(rng.normal(0, 1, (2, LENGTH, heads, WIDTH)), jnp.float32) for heads in (4, kv_heads, kv_heads, 4)
    )
    segments = np.zeros((2, LENGTH), np.int32)
    segments[0, :690] = np.repeat([1, 2, 3], [17, 530, 143])
    segments[1, :] = np.repeat([1, 2], [350, 350])
    return q, k, v, jnp.asarray(segments), weights


def interpreted_splash(*args):
    return splash_attention(*args, interpret=True)


@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (4, 90)])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("xla", "cudnn")])
def test_backends_equal_the_definition_on_packed_rows(backend, kv_heads, window, monkeypatch):
    monkeypatch.setitem(BACKENDS, "splash", interpreted_splash)
    q, k, v, segments, weights = packed_batch(kv_heads)

    def loss(qkv, backend):
        return (attention(*qkv, segments, window, backend=backend) * weights).sum()

    expected, expected_gradients = jax.value_and_grad(loss)((q, k, v), "xla")
    value, gradients = jax.jit(jax.value_and_grad(loss), static_argnums=1)((q, k, v), backend)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


def test_cudnn_refuses_packed_rows():
    q, k, v, segments, _ = packed_batch(4)
    with pytest.raises(ValueError, match="packed"):
        attention(q, k, v, segments, backend="cudnn", packed=True)


def test_cudnn_is_given_the_window_that_is_meant(monkeypatch):
    """Of the arguments, by the definition that JAX has of them; the kernel itself needs a GPU."""
    by_definition = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, implementation, **kw: by_definition(*args, **kw))
    q, k, v = packed_batch(2)[:3]
    one_segment = jnp.ones((2, LENGTH), jnp.int32)
    for window in (None, 90):
        ours = attention(q, k, v, one_segment, window, backend="cudnn", packed=False)
        np.testing.assert_allclose(ours, attention(q, k, v, one_segment, window), rtol=0, atol=1e-5)


def test_the_backend_is_chosen_by_the_platform_and_never_one_that_would_mix_samples():
    assert [choose_backend("cpu", packed) for packed in (False, True)] == ["xla", "xla"]
    assert [choose_backend("tpu", packed) for packed in (False, True)] == ["splash", "splash"]
    assert [choose_backend("gpu", packed) for packed in (False, True)] == ["cudnn", "chunked"]


@pytest.mark.parametrize("backend", ["chunked", "splash"])
def test_a_vision_tower_has_577_tokens_and_heads_of_64(backend, monkeypatch):
    monkeypatch.setitem(BACKENDS, "splash", interpreted_splash)
    q, k, v = (x[:, :577] for x in packed_batch(4)[:3])
    np.testing.assert_allclose(
        attention(q, k, v, backend=backend), attention(q, k, v, backend="xla"), rtol=0, atol=1e-5
    )


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("window", [None, 100])
def test_rows_of_a_cache_are_attended_to_alone_as_among_many_to_the_last_bit(window):
    rng = np.random.default_rng(0)
    rows, kv_heads, size = 6, 2, 256
    S = 3 * size
    q = jnp.asarray(rng.normal(size=(rows, 1, N, H)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(20, kv_heads, size, H)), jnp.float32) for _ in "kv")
    pages = jnp.asarray(rng.permutation(20)[: 3 * rows].reshape(rows, 3))
    positions = jnp.array([[5], [300], [S], [700], [256], [255]])  # the third row does nothing

    @jax.jit
    def attend(positions):
        return cached_attention(q, k, v, pages, positions, window)

    many = attend(positions)
    for row, position in enumerate(positions[:, 0].tolist()):
        alone = attend(jnp.full_like(positions, S).at[row].set(position))
        np.testing.assert_array_equal(alone[row], many[row])
        if position < S:
            seen = slice(0 if window is None else max(position - window + 1, 0), position + 1)
            keys, values = (jnp.concatenate(x[pages[row]], axis=1)[:, seen].swapaxes(0, 1)[None] for x in (k, v))
            expected = dense_attention(q[row][None], keys, values)[0]
            np.testing.assert_allclose(many[row], expected, rtol=0, atol=1e-5)
