"""Reports how full rows and the image slots of their groups would be, packed and unpacked, and suggests sizes.

The sizes are for `config.pack`. Images are not read.
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llava_jax.cli import Parser, UserError, narrowed, positive, run, say, track, wrapped
from llava_jax.data.encoded import EncodedSource
from llava_jax.data.modality import ModalityOrder
from llava_jax.data.options import add_options, open_image_folder, read_model, text_encoder
from llava_jax.data.packing import Fill, Room, fill, image_slot_plans, pack_order
from llava_jax.data.parquet import parquet_files
from llava_jax.data.plan import Lengths, Order, plan_layout
from llava_jax.data.selection import open_json
from llava_jax.files.writing import write_json

EPILOG = """example:
  python -m llava_jax.data.pack --json llava_v1_5_mix665k.json --tokenizer vicuna-7b-v1.5 --template v1 \\
      --row-length 2048,4096,8192 --rows-per-group 4,8

For each row length and rows per group it plans one epoch with the numbers of image slots that may be best. * marks the
best plan: the one with the largest product of the used shares of positions and of image slots. It suggests the shortest
rows and smallest groups that use 97 % of positions and 95 % of image slots or, if none do, the best of all.
"""
ENOUGH = (0.97, 0.95)  # of positions and of image slots


@dataclass(frozen=True)
class Plan:
    """A line of the report. Shares are from 0 to 1."""

    kind: str  # "unpacked", "by modality" or "packed"
    row_length: int
    rows_per_group: int
    image_slots: int
    label_slots: int  # of the group that needs most
    samples_a_row: float
    rows: int
    positions_used: float
    image_slots_used: float
    label_slots_used: float
    seconds: float = 0.0  # processor time to plan an epoch
    best: bool = False  # of the packed plans with its row length and group


def unpacked_plans(lengths: Lengths, max_length: int, rows_per_group: int, seed: int, samples: int) -> Iterator[Plan]:
    """Plans with one sample a row and about `samples` rows a step, with and without `config.group_by_modality`."""
    indices = np.arange(len(lengths.tokens))
    batch_rows = -(-samples // rows_per_group) * rows_per_group
    plain = Order(indices, batch_rows, seed)
    grouped = ModalityOrder(indices, batch_rows, seed, lengths=lengths, rows_per_group=rows_per_group)
    for kind, order in (("unpacked", plain), ("by modality", grouped)):
        schedule, sizes = [(order, order.epoch_steps(0))], {"image_tokens": 1, "image_size": 1}
        layout = plan_layout(schedule, lengths, rows_per_group=rows_per_group, max_length=max_length, **sizes)
        groups = len(indices) / rows_per_group
        tokens = float(lengths.tokens.mean()) / max_length
        images = int(lengths.tiles.sum()) / (groups * max(layout.image_slots, 1))
        labels = int(lengths.targets.sum()) / (groups * layout.label_slots)
        full = Fill(len(indices), math.ceil(groups), 1.0, tokens, images, labels, layout.label_slots)
        yield _plan(kind, Room(max_length, rows_per_group, layout.image_slots), full)


def packed_plans(
    lengths: Lengths, row_length: int, rows_per_group: int, seed: int, image_slots: int | None
) -> Iterator[Plan]:
    """Plans of an epoch with one row length and group, the best first; with `image_slots` only one plan."""
    order = Order(np.arange(len(lengths.tokens)), rows_per_group, seed)
    began = time.process_time()
    if image_slots is None:
        packed = image_slot_plans(order, lengths, row_length, rows_per_group)
    else:
        packed = [pack_order(order, lengths, row_length, rows_per_group, image_slots)]
        packed[0].epoch_rows(0)
    seconds = (time.process_time() - began) / len(packed)
    for plan in packed:
        yield _plan("packed", plan.room, fill(plan), seconds=round(seconds, 2), best=plan is packed[0])


def _plan(kind: str, room: Room, full: Fill, **planned: Any) -> Plan:
    return Plan(
        kind,
        *room,
        full.label_slots,
        samples_a_row=round(full.samples_a_row, 3),
        rows=full.rows,
        positions_used=round(full.tokens, 4),
        image_slots_used=round(full.images, 4),
        label_slots_used=round(full.labels, 4),
        **planned,
    )


def suggested(plans: list[Plan]) -> Plan:
    """The plan with the shortest rows and smallest groups that are full enough, else the fullest plan."""
    best = [plan for plan in plans if plan.best]
    enough = [p for p in best if p.positions_used >= ENOUGH[0] and p.image_slots_used >= ENOUGH[1]]
    if enough:
        return min(enough, key=lambda plan: (plan.row_length, plan.rows_per_group))
    return max(best, key=lambda plan: plan.positions_used * plan.image_slots_used)


def flags(plan: Plan, samples_a_step: int) -> str:
    """The flags of `llava_jax.main` for a plan."""
    groups = max(round(samples_a_step / plan.samples_a_row / plan.rows_per_group), 1)
    values = {
        "pack": True,
        "row_length": plan.row_length,
        "rows_per_group": plan.rows_per_group,
        "image_slots": plan.image_slots or -1,
        "batch_rows": groups * plan.rows_per_group,
    }
    return " ".join(f"--config.{key}={value}" for key, value in values.items())


def lines(lengths: Lengths, plans: list[Plan], samples_a_step: int) -> Iterator[str]:
    """The report as lines of text."""
    count, tiles = len(lengths.tokens), lengths.tiles
    yield (
        f"{count:,} samples of {lengths.tokens.mean():.0f} tokens ({lengths.targets.mean():.0f} of them targets) and "
        f"{tiles.mean():.2f} image slots; {np.mean(tiles == 0):.1%} without images"
    )
    table = [
        f"{'rows':<12}{'length':>7}{'group':>7}{'image slots':>13}{'label slots':>13}{'samples a row':>15}"
        f"{'positions used':>16}{'image slots used':>18}{'label slots used':>18}{'seconds':>9}"
    ]
    for plan in plans:
        table.append(
            f"{plan.kind:<12}{plan.row_length:>7}{plan.rows_per_group:>7}{plan.image_slots:>12}"
            f"{'*' if plan.best else ' '}{plan.label_slots:>13}{plan.samples_a_row:>15.2f}{plan.positions_used:>16.1%}"
            f"{plan.image_slots_used:>18.1%}{plan.label_slots_used:>18.1%}"
            f"{plan.seconds or '-':>9}"
        )
    yield from narrowed(table, beside=12, cut=67)
    chosen = suggested(plans)
    step = flags(chosen, samples_a_step)
    rows = int(step.rpartition("=")[2])
    yield f"suggested  {step}"
    yield f"           {rows * chosen.samples_a_row:.0f} samples a step, {-(-chosen.rows // rows):,} steps an epoch"


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    from llava_jax.data.built import Built  # imports Grain, which takes seconds
    from llava_jax.data.lengths import measure_once

    source = Built(args.built) if args.built else open_json(args.json, open_image_folder(args))
    encode = text_encoder(args, max_length=args.max_length)
    lengths = measure_once(EncodedSource(source, encode), args.workers)
    longest, richest = int(lengths.tokens.max()), int(lengths.tiles.argmax())
    if args.image_slots is not None and lengths.tiles[richest] > args.image_slots:
        needed = lengths.tiles[richest]
        raise UserError(f"sample {source[richest].id}: needs {needed} slots, --image-slots is {args.image_slots}")
    found = [
        plan
        for rows_per_group in args.rows_per_group
        for plan in unpacked_plans(lengths, args.max_length, rows_per_group, args.seed, args.samples_a_step)
    ]
    sizes = list(itertools.product(args.row_length or [args.max_length], args.rows_per_group))
    for row_length, rows_per_group in track(sizes, "planning"):
        if row_length < longest:
            raise UserError(f"--row-length {row_length}: samples have up to {longest} tokens; --max-length cuts them")
        found += packed_plans(lengths, row_length, rows_per_group, args.seed, args.image_slots)
    if args.json_out:
        chosen = suggested(found)
        report = {"samples": len(source), "plans": [asdict(plan) for plan in found], "suggested": asdict(chosen)}
        write_json(args.json_out, report)
    say(wrapped("\n".join(lines(lengths, found, args.samples_a_step))))


def _numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava_jax.data.pack", description=__doc__, epilog=EPILOG)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--json", metavar="F", help="LLaVA JSON or JSONL, a YAML file that names several, or Parquet")
    data.add_argument("--built", metavar="DIR", help="a data set made by llava_jax.data.build")
    add_options(parser, images={"required": False}, checkpoint={}, tokenizer={}, template={}, max_length={})
    add_options(parser, image_tokens={}, image_size={}, anyres={})
    add = parser.add_argument
    add("--row-length", type=_numbers, metavar="T,...", help="positions of a row (--max-length)")
    add("--rows-per-group", type=_numbers, default=[4], metavar="R,...", help="rows of a group (4)")
    add("--image-slots", type=positive, metavar="I", help="image slots of a group (default: the best number)")
    add("--samples-a-step", type=positive, default=128, metavar="N", help="samples of a step, for the suggestion (128)")
    add("--seed", type=int, default=0, help="seed of the order of samples")
    add("--workers", type=int, default=0, metavar="N", help="processes that measure lengths (0: threads)")
    add("--json-out", metavar="F", help="also write the report as JSON")
    args = parser.parse_args(argv)
    read_model(args)
    if not args.tokenizer:
        parser.error("the following arguments are required: --tokenizer (or --checkpoint)")
    if args.tiling and not (args.images or args.built or parquet_files(args.json)):
        parser.error("--anyres needs --images, whose sizes count")
    return args


if __name__ == "__main__":
    run(main)
