"""Sampling of the next token."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.inference.decoding import RowSampling, sample, top_k_top_p


def choice(rows: int, temperature: float, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> RowSampling:
    return RowSampling(
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, seed, jnp.uint32),
        jnp.arange(rows, dtype=jnp.uint32),
    )


LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=6, max_size=6)


@given(logits=LOGITS, top_p=st.sampled_from([0.01, 0.3, 0.7, 0.95]))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(logits, top_p):
    kept = np.isfinite(top_k_top_p(jnp.array([logits], jnp.float32), jnp.zeros(1, jnp.int32), jnp.full(1, top_p))[0])
    probabilities = np.exp(logits) / np.exp(logits).sum()
    assert kept.any()
    assert probabilities[kept].sum() >= top_p - 1e-5
    assert probabilities[kept].min() > probabilities[~kept].max(initial=0)  # ties stay together
    least = probabilities[kept].min()
    assert probabilities[probabilities > least].sum() < top_p + 1e-5


def test_everything_is_kept_at_top_p_one():
    logits = jax.random.normal(jax.random.key(0), (3, 1000)) * 5
    np.testing.assert_array_equal(top_k_top_p(logits, jnp.zeros(3, jnp.int32), jnp.ones(3)), logits)


@given(logits=LOGITS, top_k=st.integers(1, 7))
def test_top_k_keeps_so_many_likeliest_and_what_equals_the_last(logits, top_k):
    kept = np.isfinite(top_k_top_p(jnp.array([logits], jnp.float32), jnp.full(1, top_k), jnp.ones(1))[0])
    least = sorted(logits)[-min(top_k, 6)]
    np.testing.assert_array_equal(kept, np.array(logits) >= least)


def test_rows_of_one_batch_are_chosen_each_in_its_own_way():
    logits = jax.random.normal(jax.random.key(0), (4, 1000))
    mixed = RowSampling(
        jnp.array([0.0, 1.0, 1.0, 2.0]),
        jnp.array([1.0, 1.0, 0.5, 1.0]),
        jnp.array([0, 0, 0, 2]),
        jnp.array([0, 1, 2, 3], jnp.uint32),
        jnp.arange(4, dtype=jnp.uint32),
    )
    together = sample(logits, jnp.arange(4), mixed)
    alone = [
        sample(logits[i : i + 1], jnp.array([i]), RowSampling(*(x[i : i + 1] for x in mixed)))[0] for i in range(4)
    ]
    assert together.tolist() == alone
    assert together[0] == logits[0].argmax()
    assert together[3] in jnp.argsort(logits[3])[-2:]


def test_samples_have_the_probabilities_of_the_tempered_nucleus():
    logits, rows = np.array([2.0, 1.0, 0.0, -1.0, -9.0]), 4000
    tokens = sample(jnp.tile(jnp.array(logits), (rows, 1)), jnp.full(rows, 7), choice(rows, 2.0, 0.8, seed=1))
    expected = np.exp(logits[:3] / 2) / np.exp(logits[:3] / 2).sum()  # the first two reach only 0.73
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / rows, [*expected, 0, 0], rtol=0, atol=0.03)


def test_positions_and_rows_draw_differently_and_a_row_draws_the_same_in_every_batch():
    logits = jnp.zeros((64, 1000))
    rows = choice(64, 1.0)
    first, second = (np.asarray(sample(logits, jnp.full(64, position), rows)) for position in (5, 6))
    assert len(set(first)) > 32
    assert (first != second).sum() > 60
    alone = sample(logits[3:4], jnp.array([5]), RowSampling(*(x[3:4] for x in rows)))
    assert alone[0] == first[3]
