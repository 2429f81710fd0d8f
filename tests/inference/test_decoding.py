"""Sampling of the next token, against transformers' logits processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process

from llava_jax.inference.decoding import RowSampling, sample, top_k_top_p
from llava_jax.inference.requests import MAX_BIASES, Sampling
from llava_jax.inference.scores import ScoreRules, ruled


def choice(rows: int, temperature: float, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> RowSampling:
    return RowSampling(
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.zeros(rows),
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
        jnp.zeros(4),
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


@pytest.mark.parametrize("min_p", [0.02, 0.2, 0.9])
def test_min_p_keeps_the_tokens_that_transformers_keeps(min_p):
    logits = np.asarray(jax.random.normal(jax.random.key(0), (1, 50)) * 2)
    rows = choice(4000, 1.0)._replace(min_p=jnp.full(4000, min_p))
    drawn = set(np.asarray(sample(jnp.tile(logits, (4000, 1)), jnp.arange(4000), rows)).tolist())
    kept = logits_process.MinPLogitsWarper(min_p)(torch.zeros(1, 0), torch.tensor(logits))
    possible = set(np.flatnonzero(np.isfinite(kept[0])).tolist())
    assert drawn <= possible < set(range(50))
    assert min_p < 0.1 or drawn == possible


V, PROMPT, ANSWER, NEW = 70, [3, 5, 5, 9, 60], [7, 7, 9, 2], [7, 69]


def scores_of(sampling: Sampling, mask=None, active: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two rows before and after the rules, of which the first has none."""
    rules = ScoreRules.neutral(2, V, 20)
    prompt = np.array([*PROMPT, 0, 0])  # the last two are an image
    if active:
        rules.set(1, sampling, prompt, np.arange(7) < 5, ANSWER, mask)
    logits = jax.random.normal(jax.random.key(1), (2, V)) * 4
    after = jax.jit(ruled)(logits, rules, jnp.array([[-1, -1, -1], [*NEW, -1]]))
    return np.asarray(logits), np.asarray(after)


def by(processor, logits: np.ndarray, tokens=(*PROMPT, *ANSWER, *NEW)) -> np.ndarray:
    return processor(torch.tensor([tokens]), torch.tensor(logits[1:]))[0].numpy()


def test_the_repetition_penalty_is_that_of_transformers():
    for penalty in (1.3, 0.7):
        logits, scores = scores_of(Sampling(repetition_penalty=penalty))
        expected = by(logits_process.RepetitionPenaltyLogitsProcessor(penalty), logits)
        np.testing.assert_allclose(scores[1], expected, rtol=1e-6)
        np.testing.assert_array_equal(scores[0], logits[0])
        assert scores[1, 0] == logits[1, 0]  # no token of an image


def test_biases_are_those_of_transformers_and_come_before_the_penalty():
    biases = {5: 2.5, 60: -100.0, 1: 7.0, 69: 0.25}
    logits, scores = scores_of(Sampling(logit_bias=tuple(biases.items()), repetition_penalty=1.5))
    biased = by(logits_process.SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases.items()}), logits)
    expected = by(logits_process.RepetitionPenaltyLogitsProcessor(1.5), np.stack([biased, biased]))
    np.testing.assert_allclose(scores[1], expected, rtol=1e-6)
    assert len(Sampling(logit_bias=tuple((token, 1.0) for token in range(MAX_BIASES))).logit_bias) == MAX_BIASES


def test_frequency_and_presence_count_the_tokens_of_the_answer_alone():
    logits, scores = scores_of(Sampling(frequency_penalty=0.5, presence_penalty=-1.5))
    counts = torch.bincount(torch.tensor([*ANSWER, *NEW]), minlength=V)  # vllm/model_executor/layers/utils.py
    expected = torch.tensor(logits[1]) - 0.5 * counts - -1.5 * (counts > 0)
    np.testing.assert_allclose(scores[1], expected, rtol=1e-6)


def test_only_allowed_tokens_have_scores_and_rows_without_rules_keep_theirs():
    allowed = np.array([0, 31, 32, 64, 69])
    bits = np.zeros(96, np.uint8)
    bits[allowed] = 1
    logits, scores = scores_of(Sampling(), np.packbits(bits, bitorder="little").view(np.uint32))
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(scores[1])), allowed)
    np.testing.assert_array_equal(scores[1, allowed], logits[1, allowed])
    np.testing.assert_array_equal(scores[0], logits[0])
    logits, scores = scores_of(Sampling(), active=False)
    np.testing.assert_array_equal(scores, logits)
