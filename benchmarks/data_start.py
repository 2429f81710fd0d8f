"""How long a run waits for its first batch of 665,298 samples, and in how much memory.

A process does what training does up to there, from importing JAX to reading ahead in workers, on the data set of
`synthetic.py` (0.95 GB of JSON) or, with --built, on what `llava_jax.data.build` makes of it. It runs twice: without
caches and with those of the first time. Memory is what the process and its workers hold together, shared pages counted
once (the sum of PSS), and the most of it until some more batches have been read.
"""

import argparse
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from data_sides import IMAGE_TOKENS, LENGTH, PICTURES, SIZE, TEMPLATE, tokenizer_directory
from ml_collections import ConfigDict
from PIL import Image
from synthetic import write_json, write_pictures

from llava_jax import cli
from llava_jax.models.config import CLIP_MEAN

WORKERS = 2
ROWS, ROW_LENGTH, ROWS_PER_GROUP = 32, 2 * LENGTH, 4  # of a batch: some 150 samples
BATCHES = 20  # read after the first
POLL = 0.2  # seconds


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where a process fails."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: JAX_PLATFORMS=cpu python benchmarks/data_start.py --folder /tmp/mix665k",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the data set is made, or was")
    parser.add_argument("--samples", type=int, help="the first so many only")
    parser.add_argument(
        "--built", action="store_true", help="read shards; pictures are thumbnails, for the disk's sake"
    )
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return first_batch(args.folder, args.built, args.child)

    make_data(args.folder, args.samples, args.built)
    shutil.rmtree(args.folder / "cache", ignore_errors=True)
    environment = os.environ | {"XDG_CACHE_HOME": os.fspath(args.folder / "cache")}
    command = [sys.executable, __file__, "--folder", os.fspath(args.folder), *(["--built"] if args.built else [])]
    for start in ("without caches", "with caches"):
        print(f"\n{start}", flush=True)
        with subprocess.Popen([*command, "--child", str(time.time())], env=environment) as process, memory(process.pid):
            if process.wait():
                return 1
    return 0


def make_data(folder: Path, samples: int | None, built: bool) -> None:
    """What is missing of JSON, pictures, tokenizer and shards."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_directory(folder)
    write_pictures(folder / "pictures", PICTURES)
    if not (folder / "samples.json").exists():
        write_json(folder / "samples.json", samples, PICTURES)
    if built:
        (folder / "thumbnails").mkdir(exist_ok=True)
        for picture in (folder / "pictures").glob("*.jpg"):
            with Image.open(picture) as image:
                image.reduce(8).save(folder / "thumbnails" / picture.name)
        given = ["--json", folder / "samples.json", "--images", folder / "thumbnails", "--output", folder / "built"]
        subprocess.run([sys.executable, "-m", "llava_jax.data.build", *given], check=True)


def first_batch(folder: Path, built: bool, began: float) -> int:
    """The process: prints what has happened, and when."""

    def say(what: str) -> None:
        print(f"{time.time() - began:7.1f} s  {what}", flush=True)

    import jax

    import llava_jax.training.loop  # noqa: F401, as `llava_jax.main` imports it, with all that it imports
    from llava_jax.data.encoded import EncodedSource, TextEncoder
    from llava_jax.data.lengths import measure_once
    from llava_jax.data.mixture import open_data
    from llava_jax.data.packing import Room, pack_orders
    from llava_jax.data.pipeline import Batches, ImageDecoder
    from llava_jax.data.plan import Order, plan_layout
    from llava_jax.data.tokenization import load_tokenizer

    jax.devices()
    encode = TextEncoder(TEMPLATE, load_tokenizer(folder / "tokenizer"), IMAGE_TOKENS, LENGTH)
    say("imports")
    data = {"built": folder / "built"} if built else {"json": folder / "samples.json", "images": folder / "pictures"}
    source = open_data(ConfigDict(dict.fromkeys(("json", "images", "built", "mixture"), "") | data))
    say(f"{len(source):,} samples")
    encoded = EncodedSource(source, encode)
    lengths = measure_once(encoded, WORKERS)
    say("their lengths")
    order = Order(np.arange(len(source)), ROWS, seed=0)
    room = Room(ROW_LENGTH, ROWS_PER_GROUP, image_slots=0)
    (order,) = pack_orders([order], lengths, room, source)
    steps = order.steps(1)
    layout = plan_layout(
        [(order, steps)],
        lengths,
        rows_per_group=ROWS_PER_GROUP,
        max_length=ROW_LENGTH,
        image_tokens=IMAGE_TOKENS,
        image_size=SIZE,
        image_slots=order.room.image_slots,
    )
    say(f"a plan of {steps:,} steps")
    decode = ImageDecoder(SIZE, "square", CLIP_MEAN)
    batches = Batches(encoded, decode, order, layout).iterate(0, steps, WORKERS)
    batch = next(batches).batch
    say(f"the first batch, of {batch['segment_ids'].max(1).sum()} samples")
    more = sum(1 for _ in itertools.islice(batches, BATCHES))
    say(f"{more} more")
    batches.close()
    return 0


@contextlib.contextmanager
def memory(root: int) -> Iterator[None]:
    """Within, watches a process and its descendants; prints the most that they held."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(POLL):
            most[0] = max(most, [sum(map(pss, [root, *descendants(root)]))])[0]

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print(f"{most[0] / 2**30:7.2f} GiB at most", flush=True)


def descendants(process: int) -> Iterator[int]:
    with contextlib.suppress(OSError):  # it has ended
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


def pss(process: int) -> int:
    """Bytes that a process holds, shared pages in proportion."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


if __name__ == "__main__":
    cli.run(main)
