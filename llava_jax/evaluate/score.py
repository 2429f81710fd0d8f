"""Scores answers to a benchmark, whoever's they are, by its labels; reads nothing else and asks nobody."""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

from llava_jax.cli import Parser, printable
from llava_jax.evaluate.answers import answer_lines, count_absent, join, refuse_questions
from llava_jax.evaluate.benchmarks import listing, require
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.outcomes import Outcome, write_outcomes
from llava_jax.evaluate.questions import read_questions
from llava_jax.evaluate.suite_outcomes import outcomes_of

EPILOG = f"""example:
  python -m llava_jax.evaluate score pope --answers answers.jsonl --questions llava_pope_test.jsonl \\
    --labels coco_pope_adversarial.json coco_pope_popular.json coco_pope_random.json
  python -m llava_jax.evaluate score exact --answers answers.jsonl --labels questions.json

benchmarks (scienceqa and llava-bench have options of their own):
{listing("score")}

Answers are JSONL with `question_id`, `text` and, as far as the benchmark's ids repeat, `prompt`; an array of such
objects; one object of texts by id; or a table (TSV, XLSX) of `index` and `prediction`. Labels are the benchmark's own
files (MME: its folder). Scores are percent.

Labels of `exact` are LLaVA JSON, whose first answers are right, or JSONL of `question_id`, `answer` (or a list of them)
and, where scores are wanted by it, `category`. Case, white space and full stops at the end do not count."""


def score(
    name: str, answers: str, labels: list[str], questions: list[str], partial: bool = False, outcomes: str | None = None
) -> dict[str, Any]:
    """The scores of a file of answers. Raises `UserError` where files don't fit together, unless `partial`, or lack.

    What came of each question goes into the file `outcomes`, if there is one.
    """
    scores, found = _score(name, answers, labels, questions, partial)
    if outcomes:
        write_outcomes(outcomes, found)
    return scores


def _score(
    name: str, answers: str, labels: list[str], questions: list[str], partial: bool
) -> tuple[dict[str, Any], Iterator[Outcome]]:
    """The scores, and what came of each question."""
    benchmark = require(name, "score")
    lines = answer_lines(answers, partial)
    refuse_questions(lines, benchmark.suffix)
    asked = read_questions(questions, benchmark.suffix, benchmark.questions) if questions else []
    right = benchmark.labels(labels, lines, asked)
    joined = join(right.answers(lines, benchmark.fields), right, answers, partial)
    absent = count_absent(answer for answer, _ in joined.pairs)
    scores = benchmark.score(joined.pairs) | absent | joined.incomplete | _judges(lines)
    return scores, outcomes_of(benchmark, joined.pairs, lines, asked)


def _judges(lines: Sequence[Line]) -> dict[str, str]:
    """Who graded the answers, and by which instructions, where the lines tell."""
    known = {name: {str(line.value[name]) for line in lines if name in line.value} for name in ("judge", "prompt_hash")}
    return {name: ", ".join(sorted(values)) for name, values in known.items() if values}


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    scores, outcomes = _score(args.benchmark, args.answers, args.labels, args.questions, args.partial)
    print(json.dumps(scores) if args.json else printable("\n".join(_table(scores))), flush=True)
    if args.outcomes:
        write_outcomes(args.outcomes, outcomes)


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
    parser = Parser(prog="python -m llava_jax.evaluate score", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("benchmark", metavar="BENCH", help="one of those below")
    add("--answers", required=True, metavar="F", help="what `predict` wrote, or anybody's; of mm-vet, the "
        "judge's grades")  # fmt: skip
    add("--labels", required=True, nargs="+", metavar="F", help="the benchmark's own files")
    add("--questions", nargs="+", default=[], metavar="F", help="what was asked: tells the pictures to outcomes, "
        "and of pope and vizwiz the questions where ids are not those of the labels")  # fmt: skip
    add("--partial", action="store_true", help="score an incomplete set, and say how incomplete it is")
    add("--outcomes", metavar="F", help="write what came of each question, for `report`: DIR/NAME.outcomes.jsonl")
    add("--json", action="store_true", help="print one object on one line")
    return parser.parse_args(argv)
