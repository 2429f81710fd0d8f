"""Rules that change the scores of tokens before one is sampled: allowed tokens, biases and penalties.

They are arrays of one shape, and rows without rules have neutral values, so that all requests share a program.

Axes: B rows, V vocabulary, S positions of a row, M tokens of a dispatch, K biases.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.inference.requests import MAX_BIASES, WORD, Sampling

ALL = np.uint32(0xFFFFFFFF)  # of a word


class ScoreRules(NamedTuple):
    """Of each row. A token of V is none."""

    active: np.ndarray  # bool[], whether any row has a rule
    allowed: np.ndarray  # uint32[B, V / 32], a bit for each token
    biased: np.ndarray  # int32[B, K], tokens
    biases: np.ndarray  # float32[B, K]
    tokens: np.ndarray  # int32[B, S], of the prompt and the answer; none where an image is
    prompt_lengths: np.ndarray  # int32[B]
    penalties: np.ndarray  # float32[B, 3]: repetition, presence, frequency

    @classmethod
    def neutral(cls, rows: int, vocabulary: int, positions: int) -> "ScoreRules":
        """Rules that change nothing, as NumPy arrays for `set`."""
        return cls(
            np.zeros((), bool),
            np.full((rows, -(-vocabulary // WORD)), ALL),
            np.full((rows, MAX_BIASES), vocabulary, np.int32),
            np.zeros((rows, MAX_BIASES), np.float32),
            np.full((rows, positions), vocabulary, np.int32),
            np.zeros(rows, np.int32),
            np.tile(np.float32([1, 0, 0]), (rows, 1)),
        )

    def set(
        self,
        row: int,
        sampling: Sampling,  # has the biases and penalties
        prompt: np.ndarray,  # tokens int32[L]
        is_text: np.ndarray,  # bool[L], false where an image is
        answer: Sequence[int],  # the tokens that are generated so far
        mask: np.ndarray | None,  # bits of the allowed tokens, uint32[V / 32]; None for all
    ) -> None:
        """Sets the rules of a row of the arrays."""
        self.active[...] = True
        for number, (token, bias) in enumerate(sampling.logit_bias):
            self.biased[row, number], self.biases[row, number] = token, bias
        self.tokens[row, : len(prompt)][is_text] = prompt[is_text]
        self.tokens[row, len(prompt) : len(prompt) + len(answer)] = answer
        self.prompt_lengths[row] = len(prompt)
        self.penalties[row] = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        if mask is not None:
            self.allowed[row] = mask

    def at_step(self, step: jax.Array) -> "ScoreRules":
        """Of a token of a dispatch. What is allowed after the first one depends on it, and only the host knows."""
        return self._replace(allowed=jnp.where(step > 0, ALL, self.allowed))


def ruled(logits_BV: jax.Array, rules: ScoreRules | None, new_BM: jax.Array) -> jax.Array:
    """The scores by the rules. `new_BM`: tokens that this dispatch has generated so far; -1 is none."""
    if rules is None:
        return logits_BV
    return jax.lax.cond(rules.active, lambda: _changed(logits_BV, rules, new_BM), lambda: logits_BV)


def _changed(logits_BV: jax.Array, rules: ScoreRules, new_BM: jax.Array) -> jax.Array:
    """In vLLM's order: allowed tokens, biases, then the penalties."""
    B, V = logits_BV.shape
    rows_B1 = jnp.arange(B)[:, None]
    biased_BV = allowed(logits_BV, rules).at[rows_B1, rules.biased].add(rules.biases, mode="drop")

    in_answer_BS = jnp.arange(rules.tokens.shape[1])[None] >= rules.prompt_lengths[:, None]
    none_BV = jnp.zeros((B, V), jnp.int32)
    generated_BV = none_BV.at[rows_B1, rules.tokens].add(in_answer_BS.astype(jnp.int32), mode="drop")
    generated_BV = generated_BV.at[rows_B1, jnp.where(new_BM < 0, V, new_BM)].add(1, mode="drop")
    in_prompt_BV = none_BV.at[rows_B1, rules.tokens].add(1 - in_answer_BS, mode="drop") > 0

    repetition_B1, presence_B1, frequency_B1 = jnp.split(rules.penalties, 3, axis=1)
    factor_BV = jnp.where(in_prompt_BV | (generated_BV > 0), repetition_B1, 1.0)
    scores_BV = jnp.where(biased_BV > 0, biased_BV / factor_BV, biased_BV * factor_BV)
    return scores_BV - frequency_B1 * generated_BV - presence_B1 * (generated_BV > 0)


def allowed(logits_BV: jax.Array, rules: ScoreRules) -> jax.Array:
    """The scores, -inf for tokens that are not allowed."""
    V = logits_BV.shape[1]
    bits_BW32 = (rules.allowed[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)[None, None]) & 1
    return jnp.where(bits_BW32.reshape(len(logits_BV), -1)[:, :V] > 0, logits_BV, -jnp.inf)
