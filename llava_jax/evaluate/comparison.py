"""Compares runs: percentages of each benchmark and category with confidence intervals.

Intervals are of the paired bootstrap: questions are resampled, the same ones for all runs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llava_jax.cli import UserError, track, warn
from llava_jax.evaluate.intervals import by_bootstrap, detectable, draws, mcnemar
from llava_jax.evaluate.outcomes import Outcome

ALL = "all"
LEVEL = 0.95
Run = dict[str, dict[str, Outcome]]  # by benchmark and question


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Test:
    """Whether a difference may be chance: `p`, how it was computed, and the smallest difference that would be found."""

    p: float
    by: str
    detectable: float


@dataclass(frozen=True)
class Row:
    """A category of a benchmark, in percent, by the names of the runs."""

    benchmark: str
    category: str
    questions: int
    values: dict[str, Interval | None]
    differences: dict[str, Interval | None]  # to the first run
    tests: dict[str, Test | None]  # of these differences


class Case(NamedTuple):
    """A question and its outcome in each run."""

    benchmark: str
    outcomes: list[Outcome]

    @property
    def spread(self) -> float:
        """The difference between the best and the worst run, in points."""
        known = [outcome.percent for outcome in self.outcomes if outcome.percent is not None]
        return max(known) - min(known) if known else 0.0


def pair_up(runs: dict[str, Run], partial: bool) -> list[Case]:
    """The questions that all runs have. Raises `UserError` if a run lacks a question of another, unless `partial`."""
    cases = []
    for benchmark in dict.fromkeys(name for run in runs.values() for name in run):
        answered = {name: run.get(benchmark, {}) for name, run in runs.items()}
        every = dict.fromkeys(ident for outcomes in answered.values() for ident in outcomes)
        for name, outcomes in answered.items():
            if lacking := [ident for ident in every if ident not in outcomes]:
                message = f"{name}: lacks {len(lacking)} of {len(every)} questions of {benchmark} that others have, " \
                          f"{lacking[0]} the first"  # fmt: skip
                if not partial:
                    raise UserError(f"{message}; --partial compares what all have")
                warn(f"{message}; they are left out")
        shared = [ident for ident in every if all(ident in outcomes for outcomes in answered.values())]
        cases += [Case(benchmark, [outcomes[ident] for outcomes in answered.values()]) for ident in shared]
    if not cases:
        raise UserError(f"{', '.join(runs)}: have no question in common")
    return cases


def compare_runs(runs: Sequence[str], cases: Sequence[Case], resamples: int, seed: int) -> list[Row]:
    """A row for each benchmark, followed by one for each of its categories."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        for category in (ALL, *case.outcomes[0].categories):
            groups.setdefault((case.benchmark, category), []).append(case)
    order = list(dict.fromkeys(benchmark for benchmark, _ in groups))
    names = sorted(groups, key=lambda name: order.index(name[0]))  # a stable sort keeps the order of categories
    return [_row(runs, name, groups[name], resamples, seed) for name in track(names, "resampling")]


def _row(runs: Sequence[str], name: tuple[str, str], cases: Sequence[Case], resamples: int, seed: int) -> Row:
    scores, of, weights = (
        np.array([[getattr(outcome, field) for outcome in case.outcomes] for case in cases], float).T
        for field in ("score", "of", "weight")
    )
    binary = bool((of == 1).all() and np.isin(scores, (0, 1)).all() and (weights == weights.flat[0]).all())
    got, possible = (_by_cluster(cases, weights * some) for some in (scores, of))
    of_runs = bootstrap(got, possible, resamples, seed_of(seed, *name), scores if binary else None)
    return Row(*name, len(cases), *(dict(zip(runs, found, strict=True)) for found in of_runs))


def _by_cluster(cases: Sequence[Case], values: np.ndarray) -> np.ndarray:
    """The sums over questions of the same cluster: float[R, C] from float[R, N]; questions without one are clusters."""
    names = [case.outcomes[0].cluster or f"\0{number}" for number, case in enumerate(cases)]
    if len(set(names)) == len(names):
        return values
    _, places = np.unique(names, return_inverse=True)
    return np.stack([np.bincount(places, row) for row in values])


def bootstrap(
    scores: np.ndarray, of: np.ndarray, resamples: int, seed: Sequence[int], right: np.ndarray | None = None
) -> tuple[list[Interval | None], list[Interval | None], list[Test | None]]:
    """The percentages of runs on the same questions, their differences to the first run, and tests of these; None if
    `of` is 0.

    Args:
      scores, of: float[R, N] of R runs and N questions. The percentage of a run is that of the sums over questions.
      right: whether answers are right, if they are right or wrong.
    """
    with np.errstate(invalid="ignore", divide="ignore"):  # all drawn questions may have weight 0
        parts = [100 * scores[:, questions].sum(-1) / of[:, questions].sum(-1)
                 for questions in draws(scores.shape[1], resamples, seed)]  # fmt: skip
    drawn = np.concatenate(parts, 1)
    totals = [100 * s / o if o else None for s, o in zip(scores.sum(1), of.sum(1), strict=True)]
    first = totals[0]
    return (
        [None if value is None else _interval(value, some) for value, some in zip(totals, drawn, strict=True)],
        [None if value is None or first is None else _interval(value - first, some - drawn[0])
         for value, some in zip(totals, drawn, strict=True)],
        [None if value is None or first is None else
         _test(value - first, some - drawn[0], None if right is None or right.shape != scores.shape else
               (right[0], right[run]))
         for run, (value, some) in enumerate(zip(totals, drawn, strict=True))],
    )  # fmt: skip


def _test(difference: float, drawn: np.ndarray, right: tuple[np.ndarray, np.ndarray] | None) -> Test:
    by, p = ("McNemar", mcnemar(*right)) if right else ("bootstrap", by_bootstrap(difference, drawn))
    return Test(p, by, detectable(float(np.nanstd(drawn))))


def seed_of(seed: int, *names: str) -> list[int]:
    """A seed for each name, the same in every process."""
    return [seed, int.from_bytes(hashlib.sha256("\0".join(names).encode()).digest()[:8])]


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def judges(cases: Sequence[Case]) -> dict[str, Any]:
    """The judges and prompt hashes of each benchmark. Warns if runs were judged differently."""
    found: dict[str, dict[tuple[str, str], None]] = {}
    for case in cases:
        for outcome in case.outcomes:
            if outcome.judge:
                found.setdefault(case.benchmark, {})[outcome.judge, outcome.prompt_hash] = None
    for benchmark, known in found.items():
        if len(known) > 1:
            names = "; ".join(f"{judge} ({hash_[:12]})" for judge, hash_ in known)
            warn(f"{benchmark}: different judges or prompts make runs incomparable: {names}")
    return {
        benchmark: [{"judge": judge, "prompt_hash": hash_} for judge, hash_ in known]
        for benchmark, known in found.items()
    }
