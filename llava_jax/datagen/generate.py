"""Makes instruction data about images with a language model that reads their captions and boxes.

The same command resumes where it was interrupted: answers are in DIR/ledger.sqlite, and none is paid for twice. At the
end, and when it is stopped, it writes the samples to DIR/llava.json and the rejected contexts with the reasons to
DIR/rejects.jsonl; at the end also DIR/report.html, which shows both with their images and measures of their quality.
Any server with an OpenAI-compatible API works; OPENAI_API_KEY has its key.
"""

import argparse
import functools
import sqlite3
import sys
from pathlib import Path

from llava_jax.cli import Parser, UserError, positive, say
from llava_jax.data.image_folder import add_allow_absolute, folder_of
from llava_jax.data.options import open_image_folder
from llava_jax.data.records import local_data
from llava_jax.data.sources import LlavaJson
from llava_jax.datagen import contexts
from llava_jax.datagen.asking import ask_in_batches, ask_singly
from llava_jax.datagen.contexts import PENDING
from llava_jax.datagen.estimate import estimate_lines
from llava_jax.datagen.load import load
from llava_jax.datagen.outputs import REJECTS, SAMPLES, Counts, write_outputs
from llava_jax.datagen.prompts import OURS, load_prompts
from llava_jax.datagen.recipe import KINDS, Recipe, next_step
from llava_jax.datagen.report import read_rejects, write_report
from llava_jax.datagen.rules import check_language
from llava_jax.llm_api.ledger import ACCEPTED, Ledger
from llava_jax.llm_api.options import add_api_arguments, work
from llava_jax.llm_api.settings import Settings, Work
from llava_jax.remote import is_remote

LEDGER, REPORT = "ledger.sqlite", "report.html"
SEES_BOXES = {"conversation": False, "detail": True, "reasoning": True}  # as in the paper
EPILOG = """examples:
  python -m llava_jax.datagen {kind} --captions captions_train2017.json \\
    --instances instances_train2017.json --images train2017 --output made/{kind} --show
  python -m llava_jax.datagen {kind} --captions captions_train2017.json \\
    --instances instances_train2017.json --images train2017 --output made/{kind} \\
    --base-url http://localhost:8000/v1 --model Qwen2.5-72B-Instruct --limit 1000
"""


def main(kind: str, argv: list[str]) -> int:
    """Makes data of a kind. Returns the exit status."""
    args = _parse(kind, argv)
    for file in filter(None, (args.captions, args.instances)):
        local_data(file)  # before anything is written
    open_image_folder(args)
    if is_remote(args.output):
        raise UserError(f"{args.output}: has to be a local directory: the ledger is a SQLite database")
    prompts = load_prompts(Path(args.prompts) if args.prompts else OURS / kind)
    language = None if args.language == "any" else args.language
    recipe = Recipe(kind, prompts, args.boxes, args.attempts, language, args.seed)
    asks = args.show is None and not args.dry_run
    job = work(args, args.model or "", asks)
    if asks and recipe.language:
        check_language(recipe.language)
    ledger = open_ledger(job.settings, args)
    try:
        if recipe.boxes and not contexts.count(ledger.db, where="boxes != '[]'"):
            raise UserError(f"{kind} uses boxes, but there are none: give --instances, or --no-boxes")
        if args.show is not None:
            return show(recipe, ledger, args.show)
        if args.dry_run:
            say(*estimate_lines(recipe, ledger, job.settings, args.limit), sep="\n")
            return 0
        ledger.identify({**recipe.identity(), "model": args.model, "body": job.settings.body})
        return generate(recipe, ledger, job, args)
    except sqlite3.OperationalError as error:  # as a full disk
        raise UserError(f"{ledger.path}: {error}; the same command resumes") from error
    finally:
        ledger.close()


conversation, detail, reasoning = (functools.partial(main, kind) for kind in KINDS)


def open_ledger(settings: Settings, args: argparse.Namespace) -> Ledger:
    """The ledger, filled with the contexts. If these cannot be read, a new ledger is removed again."""
    ledger = Ledger(Path(args.output) / LEDGER, settings.model, settings.body)
    try:
        left_out = load(ledger, args.captions, args.instances, folder_of(args))
    except BaseException:
        ledger.discard()
        raise
    for reason, count in left_out.items():
        say(f"{count} images are left out: {reason}", file=sys.stderr)
    return ledger


def generate(recipe: Recipe, ledger: Ledger, job: Work, args: argparse.Namespace) -> int:
    """Asks about every context without a verdict, then writes the results, also when it is stopped.

    Returns the exit status: 1 if contexts have no verdict, since the server failed with transient errors.
    """
    if ledger.open_batches() and not job.batch:
        raise UserError(f"{ledger.path}: answers of the batch API are awaited: resume with --batch")
    pending = functools.partial(contexts.read, ledger.db, args.limit, PENDING)
    directory, caught = Path(args.output), 0
    try:
        if job.batch:
            ask_in_batches(job, ledger, recipe, pending)
        else:
            caught = ask_singly(job, ledger, recipe, pending(), contexts.count(ledger.db, args.limit, PENDING))
    finally:
        if ledger.verdicts():
            counts = write_outputs(ledger, directory, args.limit, args.seed)
            print_counts(counts, ledger, directory)
    if caught:
        return 128 + caught
    if not ledger.verdicts():
        raise UserError(f"{ledger.path}: the server failed at all contexts; the same command asks again")
    samples = LlavaJson(directory / SAMPLES) if counts.verdicts.get(ACCEPTED) else ()
    rejects, title = read_rejects(str(directory / REJECTS)), f"{recipe.kind}: {directory}"
    write_report(directory / REPORT, samples, folder_of(args), ledger, rejects, recipe.kind, title=title)
    return 1 if counts.missing else 0


def print_counts(counts: Counts, ledger: Ledger, directory: Path) -> None:
    rejected = {reason: count for reason, count in counts.verdicts.items() if reason != ACCEPTED}
    totals = ledger.totals()
    say(f"{directory / SAMPLES}: {counts.verdicts.get(ACCEPTED, 0)} samples of {counts.contexts} contexts")
    if rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
        say(f"{directory / REJECTS}: {sum(rejected.values())} contexts ({reasons})")
    say(
        f"{totals.requests} requests, {totals.prompt_tokens} prompt and {totals.completion_tokens} completion tokens"
        + (f", ${totals.cost:.4f}" if totals.cost else "")
    )
    if counts.missing:
        say(f"{counts.missing} contexts have no verdict yet: the same command resumes", file=sys.stderr)


def show(recipe: Recipe, ledger: Ledger, id: str) -> int:
    """Prints the prompt about a context, the first one if `id` is empty."""
    context = contexts.get(ledger.db, id) if id else next(contexts.read(ledger.db, 1))
    if context is None:
        raise UserError(f"no context has the id {id!r}")
    for message in next_step(recipe, context, []).messages:
        say(f"--- {message['role']}\n{message['content']}\n")
    return 0


def _parse(kind: str, argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog=f"python -m llava_jax.datagen {kind}", description=__doc__, epilog=EPILOG.format(kind=kind))
    add = parser.add_argument_group("images").add_argument
    add("--captions", required=True, metavar="F", help="COCO's captions_*.json, or JSONL of {image, captions, boxes}")
    add("--instances", metavar="F", help="COCO's instances_*.json, which has the boxes")
    add("--images", required=True, metavar="DIR", help="the image folder; images that are not in it are left out")
    add_allow_absolute(parser)
    add("--limit", type=positive, metavar="N", help="only the first N; a larger N resumes")

    add = parser.add_argument_group("prompts and answers").add_argument
    add("--prompts", metavar="DIR",
        help="system_message.txt, and NNN_caps.txt with NNN_conv.txt for each example (default: our own)")  # fmt: skip
    add("--boxes", action=argparse.BooleanOptionalAction, default=SEES_BOXES[kind],
        help=f"whether the prompts have the boxes (default: {'yes' if SEES_BOXES[kind] else 'no'})")  # fmt: skip
    add("--language", default="en", metavar="CODE", help="of the answers, ISO 639-1, or any (default: en)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")

    add_api_arguments(parser, temperature=0.7, max_tokens=1024, concurrency=64)
    add = parser.add_argument
    add("--model", metavar="M", help="its name on the server")
    add("--show", nargs="?", const="", metavar="ID", help="print the prompt of a context and send nothing")
    add("--output", required=True, metavar="DIR", help="the directory for all output")
    args = parser.parse_args(argv)
    if args.show is None and not args.dry_run and not args.model:
        parser.error("--model is needed to ask anything")
    return args
