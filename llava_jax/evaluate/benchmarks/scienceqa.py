"""ScienceQA: the score command, the conversion of its problems, and a second model with or without a judge."""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from llava_jax.evaluate.answers import count_absent, join
from llava_jax.evaluate.benchmark import LETTER, Benchmark, ScoreCommand, register
from llava_jax.evaluate.benchmarks.scienceqa_ensemble import Judge, ScoreEnsemble
from llava_jax.evaluate.benchmarks.scienceqa_scores import (
    STORED,
    choice,
    outcomes,
    read_problems,
    read_results,
    score,
    table,
)
from llava_jax.evaluate.outcomes import Outcome


class Score(ScoreCommand):
    name, what = "scienceqa", "ScienceQA: accuracy by subject, context and grade"
    epilog = """example:
  python -m llava_jax.evaluate score scienceqa --results answers.jsonl --problems problems.json --splits pid_splits.json

Columns: subjects (natural, social, language science); TXT has a hint, IMG has an image, NO has neither; grades; all.
An answer counts as `failed`, and as wrong, if no option can be read from it or if the question has no such option.
Options are read as in the original: the text is a letter, begins with `X. `, or says `The answer is X.` once.
"""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        kinds = "a result JSON of the original ({results, outputs}), answers as JSONL, or one object {id: answer}"
        add("--results", "--answers", required=True, metavar="F", help=kinds)
        add("--problems", required=True, metavar="F", help="ScienceQA's problems.json")
        add("--splits", required=True, metavar="F", help="ScienceQA's pid_splits.json")
        add("--split", default="test", metavar="NAME", help="test by default")
        add("--reextract", action="store_true", help="for a result JSON, read the texts again instead of the indices")
        add("--partial", action="store_true", help="score an incomplete set, and report how much is missing")
        add("--outcomes", metavar="F", help="write the outcome of each problem, for `report`: DIR/NAME.outcomes.jsonl")

    def score(self, args: argparse.Namespace) -> tuple[dict[str, Any], Iterable[Outcome]]:
        problems = read_problems(args.problems, args.splits, args.split)
        answers = read_results(args.results, args.partial, ("outputs",) if args.reextract else STORED)
        joined = join(answers, problems, args.results, args.partial)
        scores = score([(choice(answer, problem), problem) for answer, problem in joined.pairs])
        scores |= count_absent(answer for answer, _ in joined.pairs) | joined.incomplete
        return scores, outcomes(answers, problems)

    def table(self, scores: Mapping[str, Any]) -> str:
        return table(scores)


@register
class ScienceQa(Benchmark):
    name, what = "scienceqa", "ScienceQA: accuracy in the nine columns of the paper"
    label_files = "`problems.json`, `pid_splits.json`"
    suffix = LETTER
    max_new_tokens = 1024
    judge = Judge()
    score_commands = (Score(), ScoreEnsemble())
    commands = {
        "questions scienceqa": (
            "llava_jax.evaluate.benchmarks.scienceqa_questions",
            "problems to LLaVA JSON: training data and questions",
        )
    }
