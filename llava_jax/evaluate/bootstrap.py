"""Confidence intervals by the paired bootstrap: questions are drawn again and again, the same ones for all runs."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
_AT_ONCE = 2_000_000  # draws of questions in memory


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Compared(NamedTuple):
    """Percentages of runs, and by how much each of them exceeds that of the first run."""

    values: list[Interval | None]  # None of nothing
    differences: list[Interval | None]


def compare(scores: np.ndarray, of: np.ndarray, resamples: int, seed: Sequence[int]) -> Compared:
    """Runs on the same questions.

    Args:
      scores, of: float[R, N], of R runs and N questions; a run's percentage is that of the sums.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    runs, count = scores.shape
    drawn = np.empty((runs, resamples))
    step = max(1, _AT_ONCE // count)
    for start in range(0, resamples, step):
        questions = rng.integers(count, size=(min(step, resamples - start), count))
        with np.errstate(invalid="ignore", divide="ignore"):  # of weight 0 may be all that are drawn
            drawn[:, start : start + step] = 100 * scores[:, questions].sum(-1) / of[:, questions].sum(-1)
    totals = [100 * s / o if o else None for s, o in zip(scores.sum(1), of.sum(1), strict=True)]
    first = totals[0]
    return Compared(
        [None if value is None else _interval(value, draws) for value, draws in zip(totals, drawn, strict=True)],
        [None if value is None or first is None else _interval(value - first, draws - drawn[0])
         for value, draws in zip(totals, drawn, strict=True)],
    )  # fmt: skip


def seed_of(seed: int, *names: str) -> list[int]:
    """A seed for what is called so, the same in every process."""
    return [seed, int.from_bytes(hashlib.sha256("\0".join(names).encode()).digest()[:8])]


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))
