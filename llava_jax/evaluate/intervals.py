"""How certain scores and differences are: confidence intervals, paired tests and minimum detectable differences.

Questions about the same image are not independent, so whole clusters of them are resampled (Miller, "Adding Error Bars
to Evals", 2024). Independent answers that are right or wrong have Wilson's interval, and McNemar's exact test.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llava_jax.evaluate.rules import Rule, Term

Z = 1.959963984540054  # of 95%, two-sided
POWER = 0.8416212335729143  # the normal quantile of 80%
RESAMPLES = 1000
MAX_DRAWN = 2_000_000  # elements of resamples that are in memory


def draws(count: int, resamples: int, seed: Any) -> Iterator[np.ndarray]:
    """Resamples of `count` elements, as indices int[r, count], some at a time."""
    rng, step = np.random.default_rng(seed), max(1, MAX_DRAWN // count)
    for start in range(0, resamples, step):
        yield rng.integers(count, size=(min(step, resamples - start), count))


def wilson(right: float, total: int) -> tuple[float, float]:
    """Wilson's interval of a share, in percent."""
    share, spread = right / total, Z * Z / total
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def detectable(error: float) -> float:
    """The smallest true difference that a test at 5% finds with 80% power, from the standard error of a difference."""
    return (Z + POWER) * error


def of_score(rule: Rule, terms: Sequence[Term]) -> dict[str, Any]:
    """The interval (95%) of a score, how it was computed, and the smallest difference to another model's score that
    could be told from chance if errors of the two were independent; with paired answers, `report` knows better."""
    terms = [term for term in terms if term.headline]
    clusters: dict[str, int] = {}
    places = [clusters.setdefault(term.cluster or f"\0{number}", len(clusters)) for number, term in enumerate(terms)]
    parts = {part: number for number, part in enumerate(dict.fromkeys(term.part for term in terms))}
    got, of = np.zeros((2, len(parts), len(clusters)))
    for term, place in zip(terms, places, strict=True):
        got[parts[term.part], place] += term.got
        of[parts[term.part], place] += term.of
    if not len(clusters) or not of.sum():
        return {}
    values = []
    for drawn in draws(len(clusters), RESAMPLES, 0):
        with warnings.catch_warnings(action="ignore"):  # all drawn terms of a part may be 0 of 0
            shares = got[:, drawn].sum(-1) / of[:, drawn].sum(-1)
            total = np.nansum(shares, 0) if rule.sums else np.nanmean(shares, 0)
        values.append(got[:, drawn].sum((0, -1)) if rule.counts else rule.points * total)
    sampled = np.concatenate(values)
    low, high = np.nanquantile(sampled, [0.025, 0.975])
    how, simple = f"bootstrap of {len(clusters)} clusters", len(clusters) == len(terms) and len(parts) == 1
    if simple and all(term.of == 1 and term.got in (0, 1) for term in terms):
        low, high = wilson(got.sum(), len(terms))
        how = "Wilson"
        if rule.counts:
            low, high = low * len(terms) / 100, high * len(terms) / 100
    error = math.sqrt(2) * float(np.nanstd(sampled))
    return {"interval": [round(float(low), 2), round(float(high), 2)], "interval_by": how,
            "detectable_difference": round(detectable(error), 2)}  # fmt: skip


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The p-value of McNemar's exact test, of right and wrong answers of two models to the same questions."""
    from scipy.stats import binomtest  # takes half a second

    better, worse = int((second > first).sum()), int((second < first).sum())
    return float(binomtest(better, better + worse, 0.5).pvalue) if better + worse else 1.0


def by_bootstrap(difference: float, drawn: np.ndarray) -> float:
    """The two-sided p-value of a difference from its resamples, shifted to the null hypothesis."""
    shifted = drawn - difference
    return float((1 + (np.abs(shifted) >= abs(difference)).sum()) / (1 + len(shifted)))
