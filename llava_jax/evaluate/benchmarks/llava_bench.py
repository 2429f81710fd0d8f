"""LLaVA-Bench (COCO and In-the-Wild): a judge's scores of a model's answers, in percent of the reference's."""

import argparse
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llava_jax.cli import UserError, warn
from llava_jax.evaluate.benchmark import Benchmark, ScoreCommand, register
from llava_jax.evaluate.benchmarks.llava_bench_files import read_by_id
from llava_jax.evaluate.benchmarks.llava_bench_judge import Judge, Reference
from llava_jax.evaluate.benchmarks.llava_bench_reviews import FAILED, Review, outcomes, read_reviews
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.outcomes import Outcome
from llava_jax.evaluate.tables import aligned

ALL = "all"


def score(reviews: Sequence[Review], legacy: bool = False) -> dict[str, dict[str, Any]]:
    """The scores of all reviews of a file and of each category. `legacy` counts failures as -1 and rounds first, as the
    original does."""
    groups: dict[str, list[Review]] = {ALL: list(reviews)}
    for review in reviews:
        if review.category not in (None, ALL):
            groups.setdefault(review.category, []).append(review)
    return {name: _score(groups[name], legacy) for name in sorted(groups, key=lambda name: (name != ALL, name))}


def _score(reviews: Sequence[Review], legacy: bool) -> dict[str, Any]:
    scores = [review.scores or (FAILED if legacy else None) for review in reviews]
    counted = [pair for pair in scores if pair is not None]
    result = {"relative": None, "reference": None, "model": None, "n": len(counted)}
    if counted:
        reference, model = (round(mean, 3) if legacy else mean for mean in np.asarray(counted).mean(0).tolist())
        result |= {"reference": reference, "model": model}
        if reference:
            result["relative"] = round(model / reference * 100, 1) if legacy else model / reference * 100
    return result | {"failed": sum(review.scores is None for review in reviews)}


def position_bias(reviews: Sequence[Review]) -> dict[str, float]:
    """The effect of the order of the answers, for questions that were judged in both orders; empty if there are none.

    Returns:
      `position_bias`: the mean number of points that an answer gains if it is shown first.
      `order_agreement`: the share of questions for which both orders prefer the same answer, or none.
    """
    orders = [{r.question_id: r.scores for r in reviews if r.swapped == swapped and r.scores} for swapped in (0, 1)]
    both = [(scores, orders[1][ident]) for ident, scores in orders[0].items() if ident in orders[1]]
    if not both:
        return {}
    (reference_first, model_second), (reference_second, model_first) = np.asarray(both).transpose(1, 2, 0)
    gains = (reference_first - reference_second + model_first - model_second) / 2
    agree = np.sign(model_second - reference_first) == np.sign(model_first - reference_second)
    return {"position_bias": float(gains.mean()), "order_agreement": float(agree.mean())}


def score_repeats(files: Sequence[Sequence[Review]], legacy: bool = False) -> dict[str, dict[str, Any]]:
    """The scores of one file, or the means over several and the standard deviation of the relative scores."""
    scores = [score(reviews, legacy) for reviews in files]
    names = list(dict.fromkeys(name for one in scores for name in one))
    result = {name: _combine([one[name] for one in scores if name in one]) for name in names}
    result[ALL] |= position_bias(
        [r._replace(question_id=f"{i} {r.question_id}") for i, f in enumerate(files) for r in f]
    )
    return result


def _combine(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    combined = {}
    for name in ("relative", "reference", "model"):
        values = [one[name] for one in scores if one[name] is not None]
        combined[name] = statistics.fmean(values) if values else None
    relative = [one["relative"] for one in scores if one["relative"] is not None]
    combined |= {name: sum(one[name] for one in scores) for name in ("n", "failed")}
    if len(scores) > 1:
        combined["std"] = statistics.stdev(relative) if len(relative) > 1 else None
    return combined


def check_complete(files: dict[str, Sequence[Review]], questions: Iterable[str], partial: bool) -> dict[str, int]:
    """The number of reviews that each incomplete file lacks: of `questions` or, without them, of the questions in any
    file. Raises `UserError` for incomplete files unless `partial`, and for reviews of other questions."""
    reviewed = {path: {review.question_id for review in reviews} for path, reviews in files.items()}
    wanted = list(questions) or list(dict.fromkeys(r.question_id for f in files.values() for r in f))
    lacking = {}
    for path, found in reviewed.items():
        if unknown := found.difference(wanted):
            raise UserError(f"{path}: reviews question {min(unknown)}, which is not among the questions")
        if missing := [ident for ident in wanted if ident not in found]:
            lacking[path] = len(missing)
            message = f"{path}: has no review of {len(missing)} of {len(wanted)} questions, {missing[0]} the first"
            if not partial:
                raise UserError(f"{message}; --partial scores what is there")
            warn(message)
    return lacking


def with_categories(reviews: Sequence[Review], questions: Mapping[str, Line]) -> list[Review]:
    """The reviews. Those without a category, such as those of Vicuna's 80 questions, get that of their question."""

    def category(review: Review) -> str | None:
        question = questions.get(review.question_id)
        known = question.value.get("category") if question and review.category is None else None
        return review.category if known is None else str(known)

    return [review._replace(category=category(review)) for review in reviews]


def _cell(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


class Score(ScoreCommand):
    name, what = "llava-bench", "LLaVA-Bench: relative scores by a judge"
    epilog = """examples:
  python -m llava_jax.evaluate score llava-bench --reviews reviews.jsonl
  python -m llava_jax.evaluate score llava-bench --reviews run1.jsonl run2.jsonl run3.jsonl --json

For each category and for all: `relative` is the mean score of the model in percent of the mean score of the reference;
`reference` and `model` are these means, from 1 to 10 as the judge gives them (the original prints ten times as much);
`n` counts the reviews in these means, `failed` those without scores, which are left out. Several files are repeats:
the first three are then means over the files, and `std` is the (sample) standard deviation of `relative`."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--reviews", nargs="+", required=True, metavar="F", help="JSONL of reviews; several files are repeats")
        add("--questions", metavar="F", help="JSONL of the questions: each needs a review")
        add("--outcomes", metavar="F", help="write the outcome of each question, for `report`: DIR/NAME.outcomes.jsonl")
        add("--answers", metavar="F", help="JSONL of the answers that were judged, to be added to the outcomes")
        add("--reference", metavar="F", help="JSONL of the reference answers, likewise")
        add("--partial", action="store_true", help="score an incomplete set, and report how much is missing")
        add("--reparse", action="store_true", help="read the scores from the texts again instead of the stored ones")
        add("--legacy", action="store_true", help="the original's arithmetic: failures count as -1, means are rounded "
            "to three decimals first and the relative score to one")  # fmt: skip

    def score(self, args: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], Iterable[Outcome]]:
        """The scores of the files of reviews, and the outcomes of the questions."""
        if len(set(args.reviews)) < len(args.reviews):
            raise UserError("--reviews: a file is given twice; repeats are files of their own")
        questions = read_by_id(args.questions)
        files = {
            path: with_categories(read_reviews(path, args.partial, args.reparse, args.legacy), questions)
            for path in args.reviews
        }
        lacking = check_complete(files, questions, args.partial)
        scores = score_repeats(list(files.values()), args.legacy)
        if not scores[ALL]["n"]:
            raise UserError(f"{args.reviews[0]}: none of the {scores[ALL]['failed']} reviews has scores")
        scores[ALL] |= Counter(review.absent for reviews in files.values() for review in reviews if review.absent)
        if lacking:
            scores[ALL]["missing"] = sum(lacking.values())
        for name in ("judge", "prompt_hash"):
            if known := sorted({getattr(reviews[0], name) or "" for reviews in files.values()} - {""}):
                scores[ALL][name] = ", ".join(known)
        return scores, outcomes(list(files.values()), questions, args.answers, args.reference)

    def table(self, scores: dict[str, dict[str, Any]]) -> str:
        """The scores as text."""
        columns = ["relative", "reference", "model", "n", "failed"]
        columns[1:1] = ["std"] if "std" in scores[ALL] else []
        rows = [["", *columns]]
        for name, values in scores.items():
            rows.append([name, *(_cell(values[column]) for column in columns)])
        others = {name: value for name, value in scores[ALL].items() if name not in (*columns, "std")}
        more = [f"{name}: {value if isinstance(value, str | int) else _cell(value)}" for name, value in others.items()]
        return "\n".join([aligned(rows), *more])

    def to_json(self, scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Percent are rounded to two decimals, other numbers to four."""

        def rounded(name: str, value: Any) -> Any:
            return round(value, 2 if name in ("relative", "std") else 4) if isinstance(value, float) else value

        return {name: {key: rounded(key, value) for key, value in values.items()} for name, values in scores.items()}


@register
class LlavaBench(Benchmark):
    name, what = "llava-bench", Score.what
    label_files = "reviews by a judge"
    max_new_tokens = 1024
    judge, reference = Judge(), Reference()
    score_commands = (Score(),)
