"""Scores answers to a benchmark, whoever's they are, by its labels; reads nothing else and asks nobody."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from llava_jax.cli import Parser
from llava_jax.evaluate.answers import answer_lines, by_key, count_absent, join
from llava_jax.evaluate.benchmarks import listing, require
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.outcomes import write_outcomes
from llava_jax.evaluate.questions import read_questions
from llava_jax.evaluate.suite_outcomes import outcomes_of

EPILOG = f"""example:
  python -m llava_jax.evaluate score pope --answers answers.jsonl --questions llava_pope_test.jsonl \\
    --labels coco_pope_adversarial.json coco_pope_popular.json coco_pope_random.json

benchmarks (scienceqa and llava-bench have options of their own):
{listing("score")}

Answers are JSONL with `question_id`, `text` and, as far as the benchmark's ids repeat, `prompt`; an array of such
objects; or one object of texts by id. Labels are the benchmark's own files (MME: its folder). Scores are percent."""


def score(
    name: str, answers: str, labels: list[str], questions: list[str], partial: bool = False, outcomes: str | None = None
) -> dict[str, Any]:
    """The scores of a file of answers. Raises `UserError` where files don't fit together, unless `partial`, or lack.

    What came of each question goes into the file `outcomes`, if there is one.
    """
    benchmark = require(name, "score")
    lines = answer_lines(answers, partial)
    asked = read_questions(questions, benchmark.suffix, benchmark.questions) if questions else []
    right = benchmark.labels(labels, lines, asked)
    joined = join(by_key(lines, right.key, benchmark.fields), right, answers, partial)
    if outcomes:
        write_outcomes(outcomes, outcomes_of(benchmark, joined.pairs, lines, asked))
    absent = count_absent(answer for answer, _ in joined.pairs)
    return benchmark.score(joined.pairs) | absent | joined.incomplete | _judges(lines)


def _judges(lines: Sequence[Line]) -> dict[str, str]:
    """Who graded the answers, and by which instructions, where the lines tell."""
    known = {name: {str(line.value[name]) for line in lines if name in line.value} for name in ("judge", "prompt_hash")}
    return {name: ", ".join(sorted(values)) for name, values in known.items() if values}


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    scores = score(args.benchmark, args.answers, args.labels, args.questions, args.partial, args.outcomes)
    print(json.dumps(scores) if args.json else "\n".join(_table(scores)))


def _table(scores: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in scores.items():
        if not isinstance(value, dict):
            shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
            lines.append(f"{indent + name:<28}{shown:>9}")
        elif any(isinstance(inner, dict) for inner in value.values()):
            lines += [
                line for inner, parts in value.items() for line in (f"{indent}{inner}", *_table(parts, indent + "  "))
            ]
        else:
            lines += _table(value, indent + "  ")
    return lines


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m llava_jax.evaluate score",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("benchmark", metavar="BENCH", help="one of those below")
    add("--answers", required=True, metavar="F", help="of mm-vet, the judge's grades")
    add("--labels", required=True, nargs="+", metavar="F", help="the benchmark's own files")
    add("--questions", nargs="+", default=[], metavar="F", help="what was asked: tells the pictures to outcomes, "
        "and of pope and vizwiz the questions where ids are not those of the labels")  # fmt: skip
    add("--partial", action="store_true", help="score an incomplete set, and say how incomplete it is")
    add("--outcomes", metavar="F", help="write what came of each question, for `report`: DIR/NAME.outcomes.jsonl")
    add("--json", action="store_true", help="print one object on one line")
    return parser.parse_args(argv)
