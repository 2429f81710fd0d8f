"""Reading for stage 2 beside transformers: samples a second, equal pixels, where the time goes, useful tokens.

Ours is what training runs, `Batches.iterate`. The peer is `LlavaProcessor` (its Pillow backend) as the collation of a
torch `DataLoader`, which pads a batch to its longest sample. Both read the same batches of the samples of
`synthetic.py`, photographs of COCO's sizes and texts as long as mix665k's, in as many processes; 336 pixels, at most
2048 tokens, Mistral's 32,000 pieces in place of LLaMA's. The peer learns every token, which spares it the masks.

The sides take turns, so that other load hits both. What one has read ahead when its turn comes is not counted: what is
timed is made while it is timed. Processor time is that of all processes: what a sample costs whatever else the machine
does. Before, pixels are compared: ours, scaled and normalised by the peer's functions, have to be the peer's to the
last bit.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import figures
from data_sides import (
    IMAGE_TOKENS,
    LENGTH,
    SIZE,
    Task,
    make_task,
    our_batches,
    peer_batches,
    peer_decode,
    peer_processor,
    peer_text,
)
from figures import Figure

from llava_jax import cli
from llava_jax.data.images import decode_image, preprocess
from llava_jax.data.packing import fill, image_slot_plans
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.models.config import CLIP_MEAN

COMPARED = 16  # batches
READ_AHEAD = 10  # batches: more than either side has ready when its turn comes
STAGED = 400  # samples whose stages are timed
ROWS_PER_GROUP = 4  # of packed rows


class Turn(NamedTuple):
    """Milliseconds that a sample took: by the clock, and of processors."""

    clock: float
    processors: float


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where pixels differ."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: JAX_PLATFORMS=cpu python benchmarks/data.py --turns 7 --aspect pad",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=5, help="measured turns of a side")
    parser.add_argument("--batches", type=int, default=24, help="measured batches of a turn")
    parser.add_argument("--rows", type=int, default=16, help="samples of a batch")
    parser.add_argument("--workers", type=int, default=2, help="processes of a side that read")
    parser.add_argument(
        "--aspect", choices=("square", "pad"), default="square", help="CLIP's crop, or LLaVA 1.5's padding"
    )
    figures.add_option(parser)
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = make_task(folder, args.rows, args.aspect)
        steps = COMPARED + args.turns * (READ_AHEAD + args.batches)
        processor = peer_processor(folder, args.aspect)
        sides = {
            "llava_jax": our_batches(task, steps, args.workers),
            "transformers": peer_batches(task, processor, steps, args.workers),
        }
        differing = compare_pixels(sides, processor.image_processor)
        turns = race(sides, args.turns, args.batches, args.rows)
        setting = f"{args.workers} workers each, {os.cpu_count()} cores, aspect {args.aspect}"
        print(f"\n{setting}; medians of {args.turns} turns")
        report_speed(turns)
        rates = {name: [1e3 / turn.clock for turn in found] for name, found in turns.items()}
        figures.write(args.json, [Figure(f"reading stage 2's samples, aspect {args.aspect}", "samples/s", rates)])
        report_stages(turns, our_stages(task), peer_stages(task, processor))
        report_tokens(task)
    if differing:
        print(f"error: the pixels of {differing} pictures differ", file=sys.stderr)
        return 1
    return 0


def compare_pixels(sides: dict[str, Iterator], image_processor: Any) -> int:
    """The number of pictures that differ."""
    pictures = differing = 0
    for _ in range(COMPARED):
        ours, theirs = (next(side) for side in sides.values())
        used = (ours["image_feature_index"] >= 0).any(axis=1)  # a row has a slot of its own
        for pixels, expected in zip(ours["images"][used, 0], theirs["pixel_values"].numpy(), strict=True):
            scaled = image_processor.rescale(pixels.transpose(2, 0, 1), image_processor.rescale_factor)
            normalised = image_processor.normalize(scaled, image_processor.image_mean, image_processor.image_std)
            differing += normalised.tobytes() != expected.tobytes()
            pictures += 1
    print(f"{pictures - differing} of {pictures} pictures are equal to the last bit")
    return differing


def race(sides: dict[str, Iterator], turns: int, batches: int, rows: int) -> dict[str, list[Turn]]:
    results: dict[str, list[Turn]] = {name: [] for name in sides}
    for turn in range(1, turns + 1):
        for name, side in sides.items():
            for _ in range(READ_AHEAD):
                next(side)
            clock, processors = time.perf_counter(), processor_seconds()
            for _ in range(batches):
                next(side)
            seconds = time.perf_counter() - clock, processor_seconds() - processors
            results[name].append(Turn(*(1e3 * value / (batches * rows) for value in seconds)))
            print(f"turn {turn}: {name} {1e3 / results[name][-1].clock:.0f} samples/s", flush=True)
    return results


def processor_seconds() -> float:
    """Of this process and its workers, of which those of the other side wait."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime, see proc(5)
    return total


def median(turns: list[Turn]) -> Turn:
    return Turn(*(statistics.median(values) for values in zip(*turns, strict=True)))


def report_speed(turns: dict[str, list[Turn]]) -> None:
    ours, theirs = medians = [median(results) for results in turns.values()]
    for name, (clock, processors) in zip(turns, medians, strict=True):
        busy = processors / clock
        print(
            f"{name:<13}{1e3 / clock:4.0f} samples/s, {processors:.2f} ms of processors a sample, {busy:.1f} cores busy"
        )
    by_clock, by_processors = theirs.clock / ours.clock, theirs.processors / ours.processors
    print(f"{'ratio':<13}{by_clock:.2f} x by the clock, {by_processors:.2f} x by processor time")


def our_stages(task: Task) -> dict[str, float]:
    """Milliseconds of a sample, as the mean over some."""
    source = task.encoded.source
    names = [source[i].images[:1] for i in range(STAGED)]
    stored = [source.read_images(i, names[i]) for i in range(STAGED)]
    decoded = [[decode_image(data) for data in pictures] for pictures in stored]
    aspect = task.decode.aspect
    return {
        "read the file": milliseconds(lambda i: source.read_images(i, names[i])),
        "decode JPEG": milliseconds(lambda i: [decode_image(data) for data in stored[i]]),
        "preprocess the image": milliseconds(lambda i: [preprocess(im, SIZE, aspect, CLIP_MEAN) for im in decoded[i]]),
        "text to tokens": milliseconds(lambda i: task.encoded.encode(source[i])),
    }


def peer_stages(task: Task, processor: Any) -> dict[str, float]:
    """The same of the peer, whose picture comes out scaled and normalised, and whose text has no masks."""
    source = task.encoded.source
    names = [source[i].images[:1] for i in range(STAGED)]
    stored = [source.read_images(i, names[i]) for i in range(STAGED)]
    decoded = [[peer_decode(data) for data in pictures] for pictures in stored]

    def tokenize(i: int) -> None:
        processor.tokenizer(peer_text(source[i].turns).replace(IMAGE_TOKEN, IMAGE_TOKEN * IMAGE_TOKENS))

    return {
        "read the file": milliseconds(lambda i: source.read_images(i, names[i])),
        "decode JPEG": milliseconds(lambda i: [peer_decode(data) for data in stored[i]]),
        "preprocess the image": milliseconds(lambda i: [processor.image_processor(im) for im in decoded[i]]),
        "text to tokens": milliseconds(tokenize),
    }


def milliseconds(stage: Callable[[int], Any]) -> float:
    """Processor time of a sample."""
    before = time.process_time()
    for i in range(STAGED):
        stage(i)
    return 1e3 * (time.process_time() - before) / STAGED


def report_stages(turns: dict[str, list[Turn]], *stages: dict[str, float]) -> None:
    """What the stages do not explain makes rows and batches, and moves them between threads and processes."""
    print(f"\n{'ms of processors a sample':<28}" + "".join(f"{name:>14}" for name in turns))
    totals = [median(results).processors for results in turns.values()]
    rest = [total - sum(parts.values()) for total, parts in zip(totals, stages, strict=True)]
    rows = {name: [parts[name] for parts in stages] for name in stages[0]}
    for name, values in (rows | {"make and move batches": rest, "together": totals}).items():
        print(f"{name:<28}" + "".join(f"{value:14.2f}" for value in values))


def report_tokens(task: Task) -> None:
    """The share of a batch's positions that hold a token of a sample, over an epoch."""
    tokens, order = task.lengths.tokens, task.order
    batches = [list(itertools.chain(*order.rows(step))) for step in range(order.epoch_steps(0))]
    padded = sum(len(batch) * int(tokens[batch].max()) for batch in batches)
    shares = {
        "transformers, padded to the longest": tokens.sum() / padded,
        f"llava_jax, a sample a row of {LENGTH}": tokens.mean() / LENGTH,
    }
    for length in (LENGTH, 2 * LENGTH):
        plan = image_slot_plans(order, task.lengths, length, ROWS_PER_GROUP)[0]
        shares[f"llava_jax, packed in rows of {length}"] = fill(plan).tokens
    print(f"\nuseful tokens of {len(tokens):,} samples, {tokens.mean():.0f} each, {order.batch_rows} rows a batch")
    for name, share in shares.items():
        print(f"{name:<38}{share:6.1%}")


if __name__ == "__main__":
    cli.run(main)
