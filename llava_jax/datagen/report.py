"""Reports the quality of instruction data as one HTML page: lengths, turns, kinds of questions and their first words,
objects in boxes and answers, objects without support by a box or caption, and a browser of samples with their images.

The page is one file without dependencies. The browser shows --shown samples, with small images.
"""

import argparse
import collections
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from llava_jax.cli import Parser, UserError, positive, say, track
from llava_jax.data.image_folder import add_allow_absolute
from llava_jax.data.options import open_image_folder
from llava_jax.data.records import local_data, scan
from llava_jax.data.samples import Sample, record_value
from llava_jax.data.sources import LlavaJson
from llava_jax.datagen import contexts
from llava_jax.datagen.load import load
from llava_jax.datagen.objects import Finder
from llava_jax.datagen.report_page import page
from llava_jax.datagen.report_samples import UNSUPPORTED, Draw, Shown, select
from llava_jax.datagen.statistics import Facts, Statistics
from llava_jax.files.writing import atomic_file
from llava_jax.llm_api.ledger import Ledger
from llava_jax.remote import new_local

EPILOG = """example:
  python -m llava_jax.datagen report --json llava_instruct_158k.json --images train2017 \\
      --captions captions_train2017.json --instances instances_train2017.json --output report.html
"""
SHOWN = 300  # samples in the browser


def write_report(
    output: str | Path,
    samples: Sequence[Sample],
    images: epath.PathLike,
    ledger: Ledger | None = None,
    rejects: Iterable[dict[str, Any]] = (),
    kind: str | None = None,
    shown: int = SHOWN,
    title: str = "Instruction data",
) -> None:
    """Writes the page.

    Args:
      images: the image folder, see `image_folder.ImageFolder`.
      ledger: holds the contexts, without which objects are not counted, and the costs.
      rejects: contexts without a sample: `id`, `image`, `reason` and optionally `detail`.
      kind: of all samples. None infers it from each sample.
      shown: samples and rejects in the browser.
    """
    facts = None
    if ledger:
        read = functools.partial(contexts.read, ledger.db)
        finder = Finder(dict.fromkeys(box.category for context in read() for box in context.boxes))
        facts = Facts(track(read(), "reading contexts for the report", contexts.count(ledger.db)), finder)
    statistics, draw = Statistics(facts, kind), Draw(shown)
    for index, sample in enumerate(track(samples, "counting for the report")):
        group, claims = statistics.add(sample)
        draw.put(group, index)
        if claims and claims.unsupported:
            draw.put(f"{group} {UNSUPPORTED}", index)
    reasons: collections.Counter[str] = collections.Counter()
    for reject in rejects:
        reasons[str(reject.get("reason"))] += 1
        draw.put_reject(reject)
    browser = select(draw, shown, samples, Shown(images, ledger, facts, kind))
    text = page(title, list(_about(len(samples), reasons.total(), ledger)), statistics, reasons, browser)
    with atomic_file(output) as file:
        file.write(text.encode(errors="backslashreplace"))


def _about(accepted: int, rejected: int, ledger: Ledger | None) -> Iterator[tuple[str, Any]]:
    """The rows of the first table."""
    yield "samples", accepted
    if rejected:
        yield "rejected", rejected
    if ledger and (totals := ledger.totals()).requests:
        yield "model", ledger.model
        yield "requests", totals.requests
        yield "prompt tokens", totals.prompt_tokens
        yield "completion tokens", totals.completion_tokens
        if totals.cost:
            yield "cost", f"${totals.cost:,.2f}"
            yield "cost of a sample", f"${totals.cost / accepted:.5f}" if accepted else "-"


def read_rejects(path: str) -> Iterator[dict[str, Any]]:
    """The rejects of a run. Raises `UserError` for other records."""
    file = local_data(path)
    with file.open("rb") as data:
        if not data.read(2).strip():
            return  # a run that rejected nothing
    for record in scan(file, path):
        value = record_value(record)
        if not isinstance(value, dict):
            raise UserError(f"{record.where}: is no object: rejects as datagen writes them were expected")
        yield value


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    images = open_image_folder(args)
    ledger = None
    if args.captions:
        ledger = Ledger(new_local() / "ledger.sqlite")
        load(ledger, args.captions, args.instances, images, anywhere=True)  # names may differ by a folder
    rejects = read_rejects(args.rejects) if args.rejects else ()
    samples = LlavaJson(args.json)
    write_report(args.output, samples, images, ledger, rejects, shown=args.shown, title=args.json)
    say(f"{args.output}: {len(samples)} samples", file=sys.stderr)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.datagen report", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--json", required=True, metavar="F", help="LLaVA JSON or JSONL")
    add("--images", required=True, metavar="DIR", help="the image folder")
    add_allow_absolute(parser)
    add("--captions", metavar="F", help="COCO's captions_*.json, or JSONL of {image, captions, boxes}: for objects")
    add("--instances", metavar="F", help="COCO's instances_*.json, which has the boxes")
    add("--rejects", metavar="F", help="the rejects.jsonl of a run")
    add("--shown", type=positive, default=SHOWN, metavar="N", help="samples in the browser (default: %(default)s)")
    add("--output", required=True, metavar="F", help="the page, such as report.html")
    args = parser.parse_args(argv)
    if args.instances and not args.captions:
        parser.error("--instances needs --captions")
    return args
