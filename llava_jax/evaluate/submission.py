"""Writes answers to a benchmark in the format of its server or its tool."""

import argparse
import re
from collections.abc import Sequence

from etils import epath

from llava_jax.cli import Parser, UserError, say, warn
from llava_jax.evaluate.answers import answer_lines, answer_of, count_absent, question_id, refuse_questions
from llava_jax.evaluate.benchmark import Benchmark
from llava_jax.evaluate.benchmarks import BENCHMARKS, find, listing
from llava_jax.evaluate.lines import Line
from llava_jax.files.writing import atomic_file

EPILOG = f"""examples:
  python -m llava_jax.evaluate submission vqav2 --answers answers.jsonl --output vqav2.json
  python -m llava_jax.evaluate submission mmbench --answers answers.jsonl --labels mmbench_test.tsv --output upload.xlsx

benchmarks:
{listing("submission")}"""


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    benchmark = find(args.benchmark, "submission")
    lines = answer_lines(args.answers)
    refuse_questions(lines, benchmark.suffix)
    if not args.labels:
        check_answers(benchmark, lines)
    if absent := count_absent(map(answer_of, lines)):
        counts = ", ".join(f"{count} {name}" for name, count in absent.items())
        warn(f"{args.answers}: questions without an answer ({counts}) are handed in as such")
    own = args.labels and (args.labels if len(args.labels) > 1 else args.labels[0])
    if isinstance(own, list) and not benchmark.several_files:
        raise UserError(f"--labels {own[1]}: {benchmark.title} has one file of questions")
    content = benchmark.submission(lines, own)
    if isinstance(content, bytes):
        with atomic_file(args.output) as file:
            file.write(content)
    else:
        _write_folder(epath.Path(args.output), content)
    distinct = {(question_id(line), line.value.get("prompt"), line.value.get("round_id")) for line in lines}
    say(f"{len(distinct)} answers: {args.output}")


def check_answers(benchmark: Benchmark, lines: Sequence[Line]) -> None:
    """Raises `UserError` if ids, prompts or fields of the answers are those of another benchmark.

    The benchmark's own file of questions is a stricter check: each answer has to be to one of these.
    """
    name, others = benchmark.name, [other for other in BENCHMARKS.values() if other is not benchmark]
    suffixes = tuple({other.suffix for other in others} - {benchmark.suffix, ""})
    foreign = {field: other.title for other in reversed(others) for field in other.own_fields}
    advice = "are the answers to another benchmark? If not, give its questions with --labels"
    for other in others:
        if lines and other.recognizes and all(map(other.recognizes, lines)):
            ident = question_id(lines[0])
            raise UserError(f"{lines[0].where}: question {ident} is {other.title}'s, as all others are: {advice}")
    for line in lines:
        ident, prompt = question_id(line), line.value.get("prompt")
        if benchmark.ids and not re.fullmatch(benchmark.ids, ident):
            raise UserError(f"{line.where}: question {ident} has no id of {name}: {advice}")
        if isinstance(prompt, str) and prompt.endswith(suffixes):
            asked = prompt.splitlines()[-1]
            raise UserError(f"{line.where}: question {ident} was asked to '{asked}', unlike those of {name}: {advice}")
        for field in foreign.keys() - set(benchmark.own_fields):
            if field in line.value:
                has = f"has a {field}, as answers to {foreign[field]} have"
                raise UserError(f"{line.where}: question {ident} {has}: {advice}")


def _write_folder(folder: epath.Path, files: dict[str, bytes]) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is there already; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with atomic_file(folder / name) as file:
            file.write(content)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate submission", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("benchmark", metavar="BENCH", help="one of those below, or MODULE:NAME of your own")
    add("--answers", required=True, metavar="F", help="JSONL of predict")
    add("--labels", nargs="+", metavar="F", help="the benchmark's own questions, to which the answers have to belong: "
        "textvqa, mmbench and mme (a folder) need them; of vqav2 and vizwiz those of the whole split")  # fmt: skip
    add("--output", required=True, metavar="F", help="a file; of mme, a new folder")
    return parser.parse_args(argv)
