"""Finds every problem of a data set before step 0: in its structure, images, ids, texts and lengths.

Prints each problem as a line `kind, id, detail`. The exit status is 1 if there are any. A warning is about something
that training accepts but that is seldom intended. --fix writes the samples that have no problem, or only warnings, to a
file, unchanged, and the others with the reasons to another file.
"""

import argparse
import collections
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from llava_jax.cli import Parser, UserError, positive, run, say, short, track
from llava_jax.data.check_images import image_problems
from llava_jax.data.check_records import CheckedRecords, Problem
from llava_jax.data.options import add_options, encoder_of, open_image_folder, read_model, require_images
from llava_jax.data.parquet import ImageSource, ParquetImages
from llava_jax.data.records import load_json
from llava_jax.data.selection import images_of
from llava_jax.data.template_fit import chosen_template
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.data.tokenizer_files import Tokenizer
from llava_jax.files.writing import atomic_file, atomic_list, write_json

if TYPE_CHECKING:
    from llava_jax.data.check_lengths import Measuring

EPILOG = """example:
  python -m llava_jax.data.check --json data.json --images images \\
      --tokenizer vicuna-7b-v1.5 --template v1 --max-length 2048 --fix clean.json
"""
LLAMA_SPECIAL_TOKENS = ("<s>", "</s>")
EXAMPLES = 20  # problems of a kind in the report
UNREAD_KEYS = 20  # that are listed


class Report:
    """The results of a check: counts and examples of problems, reasons to reject samples, lengths and padding."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
        self.reasons: dict[int, list[str]] = collections.defaultdict(list)  # to reject a sample, by its index
        self.lengths: dict[str, Any] | None = None
        self.padding: str | None = None  # if there would be much

    def add(self, problem: Problem) -> None:
        self.counts[problem.kind] += 1
        if len(self.examples[problem.kind]) < EXAMPLES:
            self.examples[problem.kind].append({"id": problem.id, "detail": problem.detail})
        if not problem.warning:
            self.reasons[problem.index].append(f"{problem.kind}: {problem.detail}")

    def summary(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        return f"{self.counts.total()} problems: {counts}" if counts else "no problems"


def histogram_lines(lengths: dict[str, Any], width: int = 40) -> Iterator[str]:
    """The lengths as lines of text."""
    if not lengths["samples"]:
        return
    yield "tokens a sample: " + ", ".join(f"{name} {lengths[name]}" for name in ("mean", "p50", "p90", "p99", "max"))
    most = max(part["samples"] for part in lengths["histogram"])
    for part in lengths["histogram"]:
        bar = "#" * -(-width * part["samples"] // most)
        yield f"{part['from']:>8} to {part['below'] - 1:<8} {part['samples']:>9} {bar}"


def find_problems(
    checked: CheckedRecords,
    images: ImageSource,
    report: Report,
    special_tokens: Iterable[str] = LLAMA_SPECIAL_TOKENS,
    measuring: "Measuring | None" = None,
    workers: int = 1,
) -> Iterator[Problem]:
    """All problems of a file and its folder of images. Sets the lengths and the padding of `report`."""
    yield from checked.read(tuple(special_tokens))
    yield from checked.duplicates()
    unreadable = set()  # samples with images that cannot be read
    for problem in image_problems(checked, images, workers):
        unreadable.add(problem.index)
        yield problem
    if measuring and len(checked):
        lengths = measuring.measure(checked)
        report.lengths = measuring.describe(lengths)
        report.padding = measuring.padding(lengths)
        yield from measuring.problems(checked, lengths, unreadable)


def fix(checked: CheckedRecords, reasons: dict[int, list[str]], out: str) -> tuple[str, int]:
    """Writes the good records to `out` in the format of the file, byte for byte, and the others to a file beside it.

    Returns:
      The name of the file of rejects, JSONL of `id`, `reasons` and `record`; the number of records in `out`.
    """
    count = len(checked.lines)
    if len(reasons) == count:
        raise UserError(f"{out}: not written: none of the {count} samples is without a problem")
    rejects = f"{out.removesuffix('.jsonl').removesuffix('.json')}.rejects.jsonl"
    with atomic_list(out, lines=checked.unit.endswith("line")) as keep, atomic_file(rejects) as rejected:
        for index in track(range(count), f"writing {out}"):
            if index in reasons:
                rejected.write(_reject(checked, index, reasons[index]))
            else:
                keep(checked.record(index).value)
    return rejects, count - len(reasons)


def _reject(checked: CheckedRecords, index: int, reasons: list[str]) -> bytes:
    data = checked.record(index).value
    try:
        ident, record = checked.id(index), load_json(data, "")
    except UserError:  # no JSON: as text
        ident, record = str(index), data.decode(errors="backslashreplace")
    return json.dumps({"id": ident, "reasons": reasons, "record": record}).encode() + b"\n"


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    images = open_image_folder(args)
    for out in filter(None, (args.fix, args.report)):
        if Path(out).resolve() == Path(args.json).resolve():
            raise UserError(f"{out}: is the file that is checked: write to another")
    measuring, special_tokens = None, LLAMA_SPECIAL_TOKENS
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
        special_tokens = [token for token in tokenizer.all_special_tokens if token != IMAGE_TOKEN]
        measuring = _measuring(args, tokenizer)
    checked, report, console = CheckedRecords(args.json, args.image_position, images), Report(), Console()
    if checked.selected:
        images = images_of(checked.selected, images)
    if args.fix and checked.selected and Path(args.fix).exists():
        raise UserError(f"{args.fix}: exists already, and may be one of the files that are checked: write to another")
    if args.fix and isinstance(images, ParquetImages):
        raise UserError(
            f"{args.fix}: --fix writes JSON, which holds no images of Parquet: training can skip bad samples"
        )
    for problem in find_problems(checked, images, report, special_tokens, measuring, args.workers):
        report.add(problem)
        _show(problem, console)
    if checked.unread:
        keys = ", ".join(f"{short(key)} ({count:,})" for key, count in checked.unread.most_common(UNREAD_KEYS))
        say(f"keys of samples that are not read: {keys}", file=sys.stderr)
    if report.lengths:
        say(*histogram_lines(report.lengths), sep="\n", file=sys.stderr)
    if report.padding:
        say(f"padding, one sample a row: {report.padding}", file=sys.stderr)
    if args.fix:
        rejects, kept = fix(checked, report.reasons, args.fix)
        say(f"{args.fix}: {kept} samples; {rejects}: {len(report.reasons)} rejects with reasons", file=sys.stderr)
    if args.report:
        values = {
            "json": args.json,
            "images": args.images,
            "records": len(checked.lines),
            "samples": len(checked),
            "rejected": len(report.reasons),
            "problems": report.counts.total(),
            "counts": dict(report.counts.most_common()),
            "examples": report.examples,
            "lengths": report.lengths,
            "padding": report.padding,
        }
        write_json(args.report, values)
    say(report.summary(), file=sys.stderr)
    return 1 if report.counts else 0


def _measuring(args: argparse.Namespace, tokenizer: Tokenizer) -> "Measuring | None":
    """How to measure lengths; None, with a message, if no option asks for lengths and the template is unknown."""
    from llava_jax.data import check_lengths  # imports Grain, which takes seconds

    try:
        template = chosen_template(args.template, tokenizer, args.tokenizer)
    except UserError as error:
        if args.template is not None or args.max_length is not None:
            raise
        say(f"lengths are not measured: {error}", file=sys.stderr)
        return None
    settings = {"image_position": args.image_position, "seed": args.seed}
    encode = encoder_of(args, template, tokenizer, max_length=check_lengths.UNLIMITED, **settings)
    return check_lengths.Measuring(encode, args.max_length, args.workers)


def _show(problem: Problem, console: Console) -> None:
    if console.is_terminal:
        kind, rest = str(problem).split(",", 1)
        console.print(Text.assemble((kind, "bold red"), f",{rest}"), soft_wrap=True)
    else:
        say(problem)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.data.check", description=__doc__, epilog=EPILOG)
    tokenizer = {"help": "a Hugging Face tokenizer directory, to measure lengths"}
    length = {"default": None, "help": "report samples of more tokens"}
    add_options(parser, json={}, images={"required": False}, tokenizer=tokenizer, template={}, max_length=length)
    add_options(parser, checkpoint={}, image_tokens={}, image_size={}, anyres={}, image_position={}, seed={})
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N", help="default: one a core")
    parser.add_argument("--report", metavar="OUT", help="write counts, examples and lengths to OUT, as JSON")
    parser.add_argument("--fix", metavar="OUT", help="write good samples to OUT, the others to OUT's .rejects.jsonl")
    args = parser.parse_args(argv)
    require_images(parser, args)
    read_model(args)
    for option, value in (("--max-length", args.max_length), ("--template", args.template)):
        if value is not None and not args.tokenizer:
            parser.error(f"{option} needs --tokenizer")
    return args


if __name__ == "__main__":
    run(main)
