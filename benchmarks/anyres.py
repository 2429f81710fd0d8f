"""AnyRes images beside transformers' processor, at equal pixels; and how full packed rows and tile slots are.

Both sides decode the same JPEGs and make the tiles of LLaVA-1.6 of them, in one thread; they take turns. The images are
scikit-image's photographs, resized to COCO's sizes and to those of documents. Transformers also scales and normalizes,
which this project leaves to the device; "as bytes" is transformers without these two steps.

The mixture that is packed: samples with a photograph (60 %), with a document (20 %), and of text alone (20 %), whose
texts are as long as those of mix665k.
"""

import argparse
import functools
import io
import statistics
import sys
import time
from collections.abc import Callable

import figures
import numpy as np
from figures import Figure
from PIL import Image
from synthetic import SIZES, photographs
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llava_jax.data.anyres import GRIDS, AnyRes, Tiling
from llava_jax.data.features import Size
from llava_jax.data.images import decode_image
from llava_jax.data.packing import fill, image_slot_plans
from llava_jax.data.plan import Lengths, Order
from llava_jax.models.config import CLIP_MEAN

SIDE, PATCHES = 336, 24
DOCUMENTS = {(1700, 2200): 4, (2480, 3508): 1, (1920, 1080): 2, (1170, 2532): 2}
TILING = Tiling(AnyRes(), SIDE, PATCHES, CLIP_MEAN)
ROW_LENGTH, ROWS_PER_GROUP, SAMPLES = 16_384, 4, 20_000


def main(argv: list[str] | None = None) -> int:
    """Exits with 1 where pixels differ."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: JAX_PLATFORMS=cpu python benchmarks/anyres.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=5, help="measured turns of a side, after one to warm up")
    parser.add_argument("--images", type=int, default=40, help="images of each kind")
    figures.add_option(parser)
    args = parser.parse_args(argv)
    rng, differing, found = np.random.default_rng(0), 0, []
    for kind, sizes in (("COCO", SIZES), ("documents", DOCUMENTS)):
        files = [encoded(size, rng) for size in drawn(sizes, args.images, rng)]
        differing += sum(not np.array_equal(ours(data), theirs(data, normalized=False)) for data in files)
        sides = {"llava_jax": ours, "transformers": theirs, "as bytes": functools.partial(theirs, normalized=False)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(args.turns + 1):
            for name, read in sides.items():
                taken = timed(read, files)
                if turn:
                    seconds[name].append(1e3 * taken / len(files))
        for name, values in seconds.items():
            middle = statistics.median(values)
            print(f"{kind:<10} {name:<13} {middle:6.1f} ms an image (median), {min(values):.1f} (best)")
        rates = {name: [1e3 / value for value in seconds[name]] for name in ("llava_jax", "transformers")}
        found.append(Figure(f"tiles of LLaVA-1.6, sizes of {kind}, one thread", "images/s", rates))
        own, full, raw = map(statistics.median, seconds.values())
        print(f"{kind:<10} {full / own:.2f} x, as bytes {raw / own:.2f} x; pixels of {len(files)} images are compared")
    figures.write(args.json, found)
    report_fill(rng)
    if differing:
        print(f"error: the pixels of {differing} images differ", file=sys.stderr)
    return int(differing > 0)


def drawn(sizes: dict[tuple[int, int], int], count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    weights = np.array(list(sizes.values()), float)
    return [list(sizes)[number] for number in rng.choice(len(sizes), count, p=weights / weights.sum())]


def encoded(size: tuple[int, int], rng: np.random.Generator) -> bytes:
    """A photograph of this size as JPEG."""
    images = photographs()
    file = io.BytesIO()
    images[rng.integers(len(images))].resize(size).save(file, "JPEG", quality=90)
    return file.getvalue()


def ours(data: bytes) -> np.ndarray:
    return TILING.tiles(decode_image(data), several=False)


PROCESSOR = LlavaNextImageProcessorPil(
    image_grid_pinpoints=[[rows * SIDE, columns * SIDE] for rows, columns in GRIDS],
    size={"shortest_edge": SIDE},
    crop_size={"height": SIDE, "width": SIDE},
)


def theirs(data: bytes, normalized: bool = True) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    found = PROCESSOR(image, do_rescale=normalized, do_normalize=normalized)["pixel_values"][0]
    return found if normalized else found.transpose(0, 2, 3, 1)


def timed(read: Callable[[bytes], np.ndarray], files: list[bytes]) -> float:
    start = time.perf_counter()
    for data in files:
        read(data)
    return time.perf_counter() - start


def report_fill(rng: np.random.Generator) -> None:
    """Prints the used shares of positions and of tile slots of packed rows."""
    kinds = rng.choice(3, SAMPLES, p=[0.6, 0.2, 0.2])
    text = np.minimum(rng.lognormal(5, 0.9, SAMPLES).astype(int) + 40, 1200)
    features = []
    for sizes in (SIZES, DOCUMENTS):
        found = [TILING.features(Size(*size), False) for size in drawn(sizes, SAMPLES, rng)]
        features.append([(len(each.index), each.tiles) for each in found])
    features.append([(0, 0)] * SAMPLES)
    images = np.array([features[kind][number] for number, kind in enumerate(kinds)])
    parts = text + images[:, 0], text // 2, images[:, 1], images[:, 1] > 0
    lengths = Lengths(*(part.astype(np.int32) for part in parts))
    order = Order(np.arange(SAMPLES), ROWS_PER_GROUP, seed=0)
    plan = image_slot_plans(order, lengths, ROW_LENGTH, ROWS_PER_GROUP)[0]
    full = fill(plan)
    print(
        f"packed rows of {ROW_LENGTH}, groups of {ROWS_PER_GROUP} with {plan.room.image_slots} tile slots: "
        f"{full.tokens:.1%} of positions and {full.images:.1%} of tile slots are used"
    )


if __name__ == "__main__":
    raise SystemExit(main())
