"""Writes answers to a benchmark in the form that its server or its tool takes."""

import argparse
import sys

from etils import epath

from llava_jax.cli import Parser, UserError
from llava_jax.evaluate.answers import answer_lines, by_key, count_absent, question_id
from llava_jax.evaluate.benchmarks import listing, require
from llava_jax.evaluate.lines import Line
from llava_jax.whole_file import whole_file

EPILOG = f"""examples:
  python -m llava_jax.evaluate submission vqav2 --answers answers.jsonl --output vqav2.json
  python -m llava_jax.evaluate submission mmbench --answers answers.jsonl --labels mmbench_test.tsv --output upload.xlsx

benchmarks:
{listing("submission")}"""


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    benchmark = require(args.benchmark, "submission")
    lines = answer_lines(args.answers)
    answers = by_key(lines, _key)  # none is there twice
    if absent := count_absent(answers.values()):
        counts = ", ".join(f"{count} {name}" for name, count in absent.items())
        print(f"warning: {args.answers}: questions without an answer ({counts}) are handed in as such", file=sys.stderr)
    content = benchmark.submission(lines, args.labels)
    if isinstance(content, bytes):
        with whole_file(args.output) as file:
            file.write(content)
    else:
        _write_folder(epath.Path(args.output), content)
    print(f"{len(lines)} answers: {args.output}")


def _key(line: Line) -> str:
    """What tells answers apart, where ids repeat in categories, rounds and pictures."""
    rest = (str(line.value[name]) for name in ("category", "round_id", "prompt") if name in line.value)
    return " ".join([question_id(line), *rest])


def _write_folder(folder: epath.Path, files: dict[str, bytes]) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is there already; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with whole_file(folder / name) as file:
            file.write(content)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m llava_jax.evaluate submission",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("benchmark", metavar="BENCH", help="one of those below")
    add("--answers", required=True, metavar="F", help="JSONL of predict")
    add("--labels", metavar="F", help="the benchmark's own file (textvqa, mmbench) or folder (mme), which goes into "
        "the result; of vqav2 and vizwiz the questions of the whole split")  # fmt: skip
    add("--output", required=True, metavar="F", help="a file; of mme, a new folder")
    return parser.parse_args(argv)
