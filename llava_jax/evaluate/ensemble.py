"""Scores what a model and a second one, such as GPT-4, answer to ScienceQA together, as in the paper.

As complement, the second answers, and the model where the second gives no option. With a judge, what both say stands;
where they differ the judge's answer does (`judge scienceqa`), or the model's where that gives no option either.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from llava_jax.cli import Parser, UserError, say
from llava_jax.evaluate.answers import WHOLE, join
from llava_jax.evaluate.lines import read_lines
from llava_jax.evaluate.scienceqa import COLUMNS, FAILED, STORED, Problem, choice, read_problems, read_results, score

EPILOG = """examples:
  python -m llava_jax.evaluate score scienceqa-ensemble --ours answers.jsonl --other gpt4.json \\
    --problems problems.json --splits pid_splits.json
  ... --judged judged.jsonl --json

`upper` is the share of problems that either of the two answers rightly."""


class Pair(NamedTuple):
    """The options that the two chose for a problem."""

    problem: Problem
    ours: int
    other: int
    absent: tuple[str, str] = ("", "")  # why there is no answer of ours, and of the other

    @property
    def differ(self) -> bool:
        return self.ours != self.other


def read_pairs(args: argparse.Namespace) -> dict[str, Pair]:
    """By problem, what both chose: by their texts where there are any, since older result JSONs store a guess as the
    index of what has no option. Raises `UserError` where either lacks an answer."""
    problems = read_problems(args.problems, args.splits, args.split)
    joined = [
        join(read_results(path, stored=STORED[::-1]), problems, path, partial=False, advice=WHOLE).pairs
        for path in (args.ours, args.other)
    ]
    return {
        ident: Pair(problem, choice(ours, problem), choice(other, problem), (ours.absent, other.absent))
        for (ident, problem), (ours, _), (other, _) in zip(problems.items(), *joined, strict=True)
    }


def _absent(pairs: Iterable[Pair]) -> dict[str, int]:
    """How many answers of either are none, as `ours_empty` or `other_cut_off`."""
    whose = zip(("ours", "other"), zip(*(pair.absent for pair in pairs), strict=True), strict=True)
    return dict(Counter(f"{name}_{why}" for name, reasons in whose for why in reasons if why))


def complement(pair: Pair) -> int:
    return pair.ours if pair.other == FAILED else pair.other


def decide(pair: Pair, verdict: int) -> int:
    """The option of both; where they differ the judge's, or ours if the judge has none."""
    if not pair.differ:
        return pair.ours
    return pair.ours if verdict == FAILED else verdict


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    pairs = read_pairs(args)
    differing = {ident: pair.problem for ident, pair in pairs.items() if pair.differ}
    if args.judged:
        verdicts = _verdicts(args.judged, differing)
        chosen = [decide(pair, verdicts.get(ident, FAILED)) for ident, pair in pairs.items()]
        known = {"judge_failed": sum(verdict == FAILED for verdict in verdicts.values()), **_judge(args.judged)}
    else:
        chosen, known = [complement(pair) for pair in pairs.values()], {}
    scores = score([(option, pair.problem) for option, pair in zip(chosen, pairs.values(), strict=True)])
    right = sum(pair.problem["answer"] in (pair.ours, pair.other) for pair in pairs.values())
    scores |= {
        "scheme": "judge" if args.judged else "complement",
        "differ": len(differing),
        "other_failed": sum(pair.other == FAILED for pair in pairs.values()),
        "upper": round(100 * right / len(pairs), 2),
        **_absent(pairs.values()),
        **known,
    }
    if args.json:
        print(json.dumps(scores))
        return
    say("  ".join(f"{name:>5}" for name in COLUMNS))
    say("  ".join("    -" if scores[name] is None else f"{scores[name]:5.2f}" for name in COLUMNS))
    say("\n".join(f"{name}: {value}" for name, value in scores.items() if name not in COLUMNS))


def _verdicts(path: str, differing: Mapping[str, Problem]) -> dict[str, int]:
    """What the judge chose. Raises `UserError` unless it judged all problems on which the two differ, and no more."""
    answers = read_results(path)
    for ident, answer in answers.items():
        if ident not in differing:
            raise UserError(
                f"{answer.where}: judges problem {ident}, on which the two do not differ: made of other files?"
            )
    if not differing:
        return {}
    joined = join(answers, differing, path, partial=False, advice=WHOLE)
    return {ident: choice(answer, problem) for ident, (answer, problem) in zip(differing, joined.pairs, strict=True)}


def _judge(path: str) -> dict[str, str]:
    """The judge's model and the hash of its instructions. Raises `UserError` where lines are of several."""
    known: dict[str, Any] = {}
    for line in read_lines(path):
        judge = {name: line.value[name] for name in ("judge", "prompt_hash") if name in line.value}
        if known and judge != known:
            raise UserError(f"{line.where}: is by another judge than the lines before")
        known = judge
    return known


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that name the answers of both and the problems."""
    add = parser.add_argument
    add("--ours", required=True, metavar="F", help="the model's answers: what `score scienceqa` takes")
    add("--other", required=True, metavar="F", help="those of the second model, such as GPT-4")
    add("--problems", required=True, metavar="F", help="ScienceQA's problems.json")
    add("--splits", required=True, metavar="F", help="ScienceQA's pid_splits.json")
    add("--split", default="test", metavar="NAME", help="test by default")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate score scienceqa-ensemble", description=__doc__, epilog=EPILOG)
    add_arguments(parser)
    add = parser.add_argument
    add("--judged", metavar="F", help="what `judge scienceqa` wrote about the two; without it, the complement is "
        "scored")  # fmt: skip
    add("--json", action="store_true", help="print one object on one line")
    return parser.parse_args(argv)
