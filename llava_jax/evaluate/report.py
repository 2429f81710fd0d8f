"""Compares runs: a table with confidence intervals, a chart, and a page of questions and answers.

Each DIR has the outcomes of one checkpoint, by `score ... --outcomes DIR/BENCHMARK.outcomes.jsonl`. Intervals (95%) are
of the paired bootstrap: the same questions are drawn for all runs, so that differences are more certain than scores.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence

from etils import epath

from llava_jax.cli import Parser, UserError, printable, say
from llava_jax.data.image_folder import add_allow_absolute, folder_of
from llava_jax.evaluate.comparison import Interval, Row, compare_runs, judges, pair_up
from llava_jax.evaluate.outcomes import read_run
from llava_jax.evaluate.report_page import MAX_ROWS, draw, page
from llava_jax.evaluate.tables import aligned
from llava_jax.files.writing import atomic_file
from llava_jax.remote import is_remote, new_local, upload

EPILOG = """examples:
  python -m llava_jax.evaluate report runs/a runs/b
  python -m llava_jax.evaluate report runs/a runs/b --output comparison --images images

OUTPUT gets report.html (one file that includes all images), chart.png, report.json and, for TensorBoard, a folder for
each run, at the step that its DIR's name ends with."""


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    names = _names(args.runs)
    cases = pair_up({name: read_run(path) for name, path in zip(names, args.runs, strict=True)}, args.partial)
    rows, judged = compare_runs(names, cases, args.resamples, args.seed), judges(cases)
    report = {
        "runs": names,
        "resamples": args.resamples,
        "seed": args.seed,
        "judges": judged,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    if args.output:
        chart, output = draw(names, rows[:MAX_ROWS]), epath.Path(args.output)
        html = page(names, rows, cases, judged, chart, folder_of(args), args.limit)
        output.mkdir(parents=True, exist_ok=True)
        contents = {
            "chart.png": chart,
            "report.html": html.encode(),
            "report.json": json.dumps(report).encode() + b"\n",
        }
        for name, content in contents.items():
            with atomic_file(output / name) as file:
                file.write(content)
        write_board(output, args.runs, names, rows)
        say(f"{output / 'report.html'}: {len(cases)} questions, {len(names)} runs", file=sys.stderr)
    print(json.dumps(report) if args.json else printable(table(names, rows)))
    if args.tests and not args.json:
        print(printable(tests(names, rows)))


def table(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The rows as text."""
    head = ["benchmark", "category", "questions", *names, *(f"{name} more" for name in names[1:])]
    lines = [head]
    for row in rows:
        cells = [_cell(row.values[name], "") for name in names]
        cells += [_cell(row.differences[name], "+") for name in names[1:]]
        lines.append([row.benchmark, row.category, str(row.questions), *cells])
    return aligned(lines, left=2)


def tests(names: Sequence[str], rows: Sequence[Row]) -> str:
    """The tests of differences to the first run as text."""
    lines = [["benchmark", "category", "run", "difference", "p", "by", "detectable"]]
    for row in rows:
        for name in names[1:]:
            if test := row.tests[name]:
                difference = f"{row.differences[name].value:+.1f}"
                lines.append([row.benchmark, row.category, name, difference, f"{test.p:.3g}", test.by,
                              f"{test.detectable:.1f}"])  # fmt: skip
    return "\n" + aligned(lines, left=3)


def _cell(interval: Interval | None, sign: str) -> str:
    if interval is None:
        return "-"
    return f"{interval.value:{sign}.1f} [{interval.low:{sign}.1f}, {interval.high:{sign}.1f}]"


def write_board(output: epath.Path, paths: Sequence[str], names: Sequence[str], rows: Sequence[Row]) -> None:
    """Writes the values for TensorBoard. A run's step is the number at the end of its directory's name, or 0."""
    from tensorboardX import SummaryWriter  # imports torch if it is installed, which takes seconds

    directory = new_local() if is_remote(output) else output
    for path, name in zip(paths, names, strict=True):
        digits = re.search(r"\d+$", path.rstrip("/"))
        with SummaryWriter(str(directory / "tensorboard" / re.sub(r"[^\w.-]+", "_", name))) as board:
            for row in rows:
                if interval := row.values[name]:
                    tag = f"{row.benchmark}/{row.category}"
                    board.add_scalar(tag, interval.value, int(digits[0]) if digits else 0)
    if is_remote(output):
        upload(directory, output)


def _names(paths: Sequence[str]) -> list[str]:
    """The names of the runs: the last part of each path, or the full paths if these are not unique."""
    short = [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]
    names = short if len(set(short)) == len(short) else [path.rstrip("/") for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(paths)}: a directory is given twice")
    return names


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.evaluate report", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("runs", nargs="+", metavar="DIR", help="outcomes of one checkpoint each; others are compared with the first")
    add("--output", metavar="DIR", help="folder of the page, the chart and the data")
    add("--images", metavar="DIR", help="the folder of the questions' images (default: a page without images)")
    add_allow_absolute(parser)
    add("--limit", type=int, default=500, metavar="N",
        help="questions on the page, those with the largest differences (default: 500)")  # fmt: skip
    add("--resamples", type=int, default=2000, metavar="N", help="of the bootstrap (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    add("--tests", action="store_true", help="test the differences to the first run: McNemar's exact test of right and "
        "wrong answers, else the bootstrap; `detectable` is the smallest difference found with 80%% power")  # fmt: skip
    add("--partial", action="store_true", help="compare on the questions that all runs have")
    add("--json", action="store_true", help="print one object on one line")
    args = parser.parse_args(argv)
    if args.limit < 0 or args.resamples < 2:
        parser.error("--limit has to be 0 or more, --resamples 2 or more")
    return args
