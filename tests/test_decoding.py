"""The choice of the next token."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.decoding import Nucleus, choose, keep_nucleus, row_keys

LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=6, max_size=6)


@given(logits=LOGITS, top_p=st.sampled_from([0.01, 0.3, 0.7, 0.95]))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(logits, top_p):
    kept = np.isfinite(keep_nucleus(jnp.array([logits], jnp.float32), jnp.float32(top_p))[0])
    probabilities = np.exp(logits) / np.exp(logits).sum()
    assert kept.any()
    assert probabilities[kept].sum() >= top_p - 1e-5
    assert probabilities[kept].min() > probabilities[~kept].max(initial=0)  # ties stay together
    least = probabilities[kept].min()
    assert probabilities[probabilities > least].sum() < top_p + 1e-5


def test_everything_is_kept_at_top_p_one():
    logits = jax.random.normal(jax.random.key(0), (3, 1000)) * 5
    np.testing.assert_array_equal(keep_nucleus(logits, jnp.float32(1.0)), logits)


def test_samples_have_the_probabilities_of_the_tempered_nucleus():
    logits, rows = np.array([2.0, 1.0, 0.0, -1.0, -9.0]), 4000
    keys = row_keys(1, np.arange(rows, dtype=np.uint32))
    nucleus = Nucleus(jnp.float32(2.0), jnp.float32(0.8), keys)
    tokens = choose(jnp.tile(jnp.array(logits), (rows, 1)), jnp.full(rows, 7), nucleus)
    expected = np.exp(logits[:3] / 2) / np.exp(logits[:3] / 2).sum()  # the first two reach only 0.73
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / rows, [*expected, 0, 0], rtol=0, atol=0.03)


def test_positions_and_rows_draw_differently_and_a_row_draws_the_same_in_every_batch():
    logits = jnp.zeros((64, 1000))
    keys = row_keys(0, np.arange(64, dtype=np.uint32))
    nucleus = Nucleus(jnp.float32(1.0), jnp.float32(1.0), keys)
    first, second = (np.asarray(choose(logits, jnp.full(64, position), nucleus)) for position in (5, 6))
    assert len(set(first)) > 32
    assert (first != second).sum() > 60
    alone = choose(logits[3:4], jnp.array([5]), nucleus._replace(keys=keys[3:4]))
    assert alone[0] == first[3]
