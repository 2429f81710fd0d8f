"""Runs side by side: the percentages of each benchmark and category with confidence intervals."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llava_jax.cli import UserError, track, warn
from llava_jax.evaluate.bootstrap import Interval, compare, seed_of
from llava_jax.evaluate.outcomes import Outcome

ALL = "all"
Run = dict[str, dict[str, Outcome]]  # by benchmark and question


class Row(NamedTuple):
    """A category of a benchmark."""

    benchmark: str
    category: str
    questions: int
    values: list[Interval | None]  # of each run
    differences: list[Interval | None]  # to the first run


class Case(NamedTuple):
    """A question and what the runs made of it."""

    benchmark: str
    outcomes: list[Outcome]

    @property
    def spread(self) -> float:
        """Points between the best and the worst run."""
        known = [outcome.percent for outcome in self.outcomes if outcome.percent is not None]
        return max(known) - min(known) if known else 0.0


def pair_up(runs: dict[str, Run], partial: bool) -> list[Case]:
    """The questions that all runs have. Raises `UserError` where one has what others lack, unless `partial`."""
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


def compare_runs(cases: Sequence[Case], resamples: int, seed: int) -> list[Row]:
    """A row for all of each benchmark, and one for each of its categories."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        for category in (ALL, *case.outcomes[0].categories):
            groups.setdefault((case.benchmark, category), []).append(case)
    order = list(dict.fromkeys(benchmark for benchmark, _ in groups))
    names = sorted(groups, key=lambda name: order.index(name[0]))  # a stable sort: categories stay as they came
    return [_row(name, groups[name], resamples, seed) for name in track(names, "resampling")]


def _row(name: tuple[str, str], cases: Sequence[Case], resamples: int, seed: int) -> Row:
    scores, of, weights = (
        np.array([[getattr(outcome, field) for outcome in case.outcomes] for case in cases], float).T
        for field in ("score", "of", "weight")
    )
    return Row(*name, len(cases), *compare(weights * scores, weights * of, resamples, seed_of(seed, *name)))


def judges(cases: Sequence[Case]) -> dict[str, Any]:
    """By benchmark, the judges and prompt hashes of its judgements. Warns where runs were judged differently."""
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
