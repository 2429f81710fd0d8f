"""Lists the answers that toolkits score differently: what each reads in them, and the step of its rule that decides."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from llava_jax.cli import Parser, UserError, say, short, warn
from llava_jax.evaluate.benchmarks import BENCHMARKS
from llava_jax.evaluate.rules import Rule
from llava_jax.evaluate.score import read

EPILOG = f"""example:
  python -m llava_jax.evaluate explain mmstar --answers answers.jsonl --labels MMStar.tsv --as official lmms-eval

benchmarks:
{chr(10).join(f"  {name:<16}{', '.join(b.rules)}" for name, b in BENCHMARKS.items() if b.rules)}"""


def differences(rules: dict[str, Rule], pairs: Sequence[tuple[Any, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The answers with unequal scores: `question_id`, `answer`, `right`, and by rule `score`, `said` and `why`."""
    by_rule = {name: rule.cases(pairs) for name, rule in rules.items()}
    found = []
    for index, (answer, label) in enumerate(pairs):
        readings = {name: cases[index].reading for name, cases in by_rule.items()}
        if len({reading.score for reading in readings.values()}) > 1:
            right = getattr(label, "right", "")
            said = {name: reading._asdict() for name, reading in readings.items()}
            found.append({"question_id": names[index], "answer": answer.text, "right": right} | said)
    return found


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    benchmark, _, _, joined, names = read(args.benchmark, args.answers, args.labels, args.questions, args.partial)
    chosen = args.rules or list(benchmark.rules)
    scores = {}
    for name in chosen:
        try:
            scores[name] = benchmark.scored_as(name).rule.scores(name, joined.pairs)["score"]
        except UserError as error:  # such as a rule that needs another form of the labels
            if args.rules or not scores:
                raise
            warn(f"{error}; this rule is left out")
    rules = {name: benchmark.rules[name] for name in scores}
    if len(rules) < 2:
        raise UserError(
            f"{benchmark.title}: at least two rules are compared; it has {', '.join(benchmark.rules) or 'one'}"
        )
    found = differences(rules, joined.pairs, names)
    if args.json:
        print(json.dumps({"scores": scores, "total": len(joined.pairs), "differ": len(found), "answers": found}))
        return
    say("  ".join(f"{name} {value}" for name, value in scores.items()))
    say(f"{len(found)} of {len(joined.pairs)} answers differ")
    for one in found[: args.limit]:
        say(f"\n{one['question_id']}: {short(one['answer'] or '')!r}, right is {short(one['right'])!r}")
        for name in rules:
            reading = one[name]
            say(f"  {name:<16}{reading['score']:<7.3g}{short(str(reading['said']))} ({reading['why']})")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate explain", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("benchmark", metavar="BENCH", help="one of those below")
    add("--answers", required=True, metavar="F", help="as for score")
    add("--labels", required=True, nargs="+", metavar="F", help="as for score")
    add("--questions", nargs="+", default=[], metavar="F", help="as for score")
    add("--as", dest="rules", nargs="+", metavar="NAME", help="the rules to compare (default: all)")
    add("--partial", action="store_true", help="compare on an incomplete set")
    add("--limit", type=int, default=50, metavar="N", help="answers that are printed (default: 50); --json has all")
    add("--json", action="store_true", help="print one object on one line")
    return parser.parse_args(argv)
