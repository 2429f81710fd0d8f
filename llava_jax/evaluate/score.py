"""Scores answers to a benchmark by its labels. It only reads files, of any origin, and needs no model."""

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llava_jax.cli import Parser, printable
from llava_jax.evaluate.answers import Joined, answer_lines, count_absent, join, refuse_questions
from llava_jax.evaluate.benchmark import Benchmark, ScoreCommand, Scores
from llava_jax.evaluate.benchmarks import BENCHMARKS, find, listing
from llava_jax.evaluate.label_formats import LABEL_FORMATS
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.outcomes import Outcome, outcomes_of, write_outcomes
from llava_jax.evaluate.questions import Question, read_questions

OWN = {command.name: command for benchmark in BENCHMARKS.values() for command in benchmark.score_commands}
OWN_COMMANDS = "\n".join(f"  {name:<20}{command.what}" for name, command in OWN.items())
EPILOG = f"""example:
  python -m llava_jax.evaluate score pope --answers answers.jsonl --questions llava_pope_test.jsonl \\
    --labels coco_pope_adversarial.json coco_pope_popular.json coco_pope_random.json
  python -m llava_jax.evaluate score exact --answers answers.jsonl --labels questions.json

benchmarks:
{listing("score")}

benchmarks with options of their own (score BENCH --help):
{OWN_COMMANDS}

Answers are JSONL with `question_id`, `text` and, if ids of the benchmark repeat, `prompt`; an array of such objects;
one object of texts by id; or a table (TSV, XLSX) of `index` and `prediction`. Labels are the benchmark's own files
(MME: its folder). Scores are percent.

Labels of `exact` are LLaVA JSON, whose first answers are right, or JSONL of `question_id`, `answer` (a text or a list)
and, for scores by category, `category`. Case, white space and full stops at the end do not count."""


class Answered(NamedTuple):
    """The answers of a file, joined with their labels."""

    benchmark: Benchmark
    lines: list[Line]
    asked: list[Question]  # if files of questions are given
    joined: Joined
    keys: list[str]  # of the joined answers

    def score(self, rule: str | None = None) -> tuple[Scores, Iterator[Outcome]]:
        """The scores, and the outcome of each question. `rule` is a toolkit's, such as `lmms-eval`; by default the
        benchmark's own."""
        benchmark, pairs = self.benchmark.scored_as(rule) if rule else self.benchmark, self.joined.pairs
        absent = count_absent(answer for answer, _ in pairs)
        scores = benchmark.score(pairs) | absent | self.joined.incomplete | _judges(self.lines)
        if benchmark.rule:
            from llava_jax.evaluate.intervals import of_score  # numpy takes a tenth of a second

            scores |= of_score(benchmark.rule, list(benchmark.rule.terms(benchmark.rule.cases(pairs))))
        return scores, outcomes_of(benchmark, pairs, self.lines, self.asked)


def read(
    name: str,
    answers: str,
    labels: Sequence[str],
    questions: Sequence[str],
    partial: bool = False,
    label_format: str | None = None,
) -> Answered:
    """The answers to the benchmark `name` from a file, with the labels in others.

    Args:
      questions: files of questions, for benchmarks whose labels do not say which questions were asked; [] for none.
      partial: takes an incomplete set.

    Raises:
      UserError: if files do not belong together, or are incomplete without `partial`.
    """
    benchmark = find(name, "score")
    lines = answer_lines(answers, partial)
    refuse_questions(lines, benchmark.suffix)
    asked = read_questions(questions, benchmark.suffix, benchmark.questions) if questions else []
    form = LABEL_FORMATS.import_and_find(label_format) if label_format else None
    right = benchmark.read_labels(labels, lines, asked, form)
    found = right.answers(lines, benchmark.fields)
    joined = join(found, right, answers, partial)
    return Answered(benchmark, lines, asked, joined, [key for key in right if key in found])


def score(*files: Any, rule: str | None = None, **options: Any) -> tuple[Scores, Iterator[Outcome]]:
    """`read(...).score(rule)`."""
    return read(*files, **options).score(rule)


def _judges(lines: Sequence[Line]) -> dict[str, str]:
    """The judges of the answers and the hashes of their instructions, if the lines have them."""
    known = {name: {str(line.value[name]) for line in lines if name in line.value} for name in ("judge", "prompt_hash")}
    return {name: ", ".join(sorted(values)) for name, values in known.items() if values}


def add_files(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `read_files`."""
    add = parser.add_argument
    add("benchmark", metavar="BENCH", help="one of those below, or MODULE:NAME of your own")
    add("--answers", required=True, metavar="F", help="answers by `predict` or in another form (`score --help` has "
        "them); of mm-vet, the judge's grades")  # fmt: skip
    add("--labels", required=True, nargs="+", metavar="F", help="the benchmark's own files")
    add("--label-format", metavar="NAME", help="a known one, or MODULE:NAME of your own (default: the files tell it)")
    add("--questions", nargs="+", default=[], metavar="F", help="the questions: they add images to outcomes, and tell "
        "the questions of pope and vizwiz if ids are not those of the labels")  # fmt: skip
    add("--partial", action="store_true", help="take an incomplete set, and report how much is missing")


def read_files(args: argparse.Namespace) -> Answered:
    return read(args.benchmark, args.answers, args.labels, args.questions, args.partial, args.label_format)


class Score(ScoreCommand):
    name, what, epilog = "", str(__doc__), EPILOG

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_files(parser)
        add = parser.add_argument
        add("--as", dest="rule", metavar="NAME", help="the rule of a toolkit: official, lmms-eval or vlmevalkit")
        add("--outcomes", metavar="F", help="write the outcome of each question, for `report`: DIR/NAME.outcomes.jsonl")

    def score(self, args: argparse.Namespace) -> tuple[Scores, Iterator[Outcome]]:
        return read_files(args).score(args.rule)

    def table(self, scores: Scores) -> str:
        return "\n".join(_rows(scores))


def _rows(scores: Scores, indent: str = "") -> Iterator[str]:
    for name, value in scores.items():
        if not isinstance(value, dict):
            shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
            yield f"{indent + name:<28}{shown:>9}" if len(shown) < 10 else f"{indent}{name}: {shown}"
        elif any(isinstance(inner, dict) for inner in value.values()):
            for inner, parts in value.items():
                yield f"{indent}{inner}"
                yield from _rows(parts, indent + "  ")
        else:
            yield from _rows(value, indent + "  ")


def main(argv: Sequence[str]) -> None:
    command, argv = (OWN[argv[0]], argv[1:]) if argv and argv[0] in OWN else (Score(), argv)
    prog = f"python -m llava_jax.evaluate score {command.name}".rstrip()
    parser = Parser(prog=prog, description=command.what, epilog=command.epilog)
    command.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one object on one line")
    args = parser.parse_args(argv)
    scores, outcomes = command.score(args)
    print(json.dumps(command.to_json(scores)) if args.json else printable(command.table(scores)), flush=True)
    if getattr(args, "outcomes", None):
        write_outcomes(args.outcomes, outcomes)
