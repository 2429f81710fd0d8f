"""Training on samples as long as real ones: packed rows beside padded batches of torch, in useful tokens a second.

Lengths are those of the samples of `synthetic.py`, a mixture like llava_v1_5_mix665k; useful tokens are those of
samples, image tokens included, and not padding. Ours is the step of `train_step.py` with samples packed into a row.
The peers are its torch side with batches that are padded to their longest sample: of samples in random order, and of
samples of similar length, which the original repository groups (`group_by_modality_length`). Token ids are random. Each
side runs in a process of its own, and they take turns, so that other load hits all.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import figures
import numpy as np
from data_sides import TEMPLATE, tokenizer_directory
from figures import Figure, matmul_rate
from peers import CONFIG, Side
from synthetic import write_json
from train_step import jax_step, step_flops, torch_step

from llava_jax import cli
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.lengths import measure
from llava_jax.data.packing import fill, image_slot_plans
from llava_jax.data.plan import Layout, Lengths, Order, plan_layout
from llava_jax.data.sources import LlavaJson
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.models.config import LlavaConfig

SAMPLES, LENGTH = 4000, 2048
MEGABATCH = 50  # batches within which samples are sorted by length, as transformers' LengthGroupedSampler does
OURS, LIMIT = "llava_jax", "the rate of large matrix products, with rows without padding"


class Work(NamedTuple):
    """What the sides train on.

    Attributes:
      lengths: of the samples.
      steps: by side, the samples of each row of each step.
      layout: of the packed rows.
    """

    lengths: Lengths
    steps: dict[str, list[list[tuple[int, ...]]]]
    layout: Layout


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: JAX_PLATFORMS=cpu python benchmarks/packing.py --turns 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--turns", type=int, default=4, help="measured turns of a side, after one to warm up")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a turn")
    parser.add_argument("--batch", type=int, default=4, help="samples of a padded batch: near those of a packed row")
    figures.add_option(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        work = plan(Path(folder), args.batch)
    sides = {name: Side(StepSide(name, work), CONFIG) for name in work.steps}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    rates = []
    for turn in range(args.turns + 1):
        rates.append(matmul_rate())
        for name, side in sides.items():
            numbers = [turn * (args.steps + 1) + number for number in range(args.steps + 1)]
            # As in train_step.py, the first step gets memory back and is not counted.
            taken = [(number, side.call(number)[1]) for number in numbers][1:]
            useful = sum(int(work.lengths.tokens[list(sum(work.steps[name][number], ()))].sum()) for number, _ in taken)
            total = sum(seconds for _, seconds in taken)
            if turn:
                speeds[name].append(useful / total)
            print(f"turn {turn or 'to warm up'}: {name} {useful} tokens in {total:.2f} s", flush=True)
    limit = max(rates) / step_flops(CONFIG, layout=work.layout) * LENGTH
    figure = Figure(
        f"training on lengths like mix665k's, at most {LENGTH}, float32", "useful tokens/s", speeds, limit, LIMIT
    )
    figures.write(args.json, [figure])
    for name, side in sides.items():
        ratios = figure.ratio(OURS, name)
        ratio = "" if name == OURS else "; llava_jax is {:.2f} x (median), {:.2f} x (best)".format(*ratios)
        print(f"{name}: {figure.median(name):.0f} useful tokens/s (median), {side.stop() / 2**30:.2f} GiB{ratio}")
    print(f"{os.cpu_count()} cores; a full row at the machine's rate of large products: {limit:.0f} tokens/s")


def plan(folder: Path, batch: int) -> Work:
    """Measures samples and plans their rows and batches."""
    write_json(folder / "samples.json", SAMPLES)
    encode = TextEncoder(TEMPLATE, load_tokenizer(tokenizer_directory(folder)), CONFIG.image_tokens, LENGTH)
    lengths = measure(EncodedSource(LlavaJson(folder / "samples.json", folder), encode))
    order = Order(np.arange(SAMPLES), 1, seed=0)
    packed = image_slot_plans(order, lengths, LENGTH, 1)[0]
    steps = packed.epoch_steps(0)
    layout = plan_layout(
        [(packed, steps)],
        lengths,
        rows_per_group=1,
        max_length=LENGTH,
        image_tokens=CONFIG.image_tokens,
        image_size=CONFIG.vision.image_size,
    )
    print(f"{SAMPLES} samples of {lengths.tokens.mean():.0f} tokens; packed rows are {fill(packed).tokens:.1%} full")
    shuffled = np.random.default_rng(0).permutation(SAMPLES)
    grouped = shuffled.copy()
    for start in range(0, SAMPLES, MEGABATCH * batch):
        part = grouped[start : start + MEGABATCH * batch]
        part[:] = part[np.argsort(-lengths.tokens[part], kind="stable")]
    order = np.random.default_rng(1).permutation(SAMPLES // batch)
    padded = {"torch, random batches": shuffled, "torch, batches of similar length": grouped}
    found = {OURS: [packed.rows(step) for step in range(steps)]}
    for name, samples in padded.items():
        batches = samples[: len(order) * batch].reshape(-1, batch)[order]
        found[name] = [[(sample,) for sample in each] for each in batches.tolist()]
        tokens = lengths.tokens[batches]
        print(f"{name}: {tokens.sum() / (tokens.max(1) * batch).sum():.1%} of the positions hold tokens")
    return Work(lengths, found, layout)


class StepSide(NamedTuple):
    """Makes the step of a side in its process."""

    name: str
    work: Work

    def __call__(self, config: LlavaConfig) -> Callable[[int], float]:
        ours = self.name == OURS
        layout = self.work.layout

        def batch(number: int) -> dict[str, np.ndarray]:
            rows = self.work.steps[self.name][number]
            lengths = self.work.lengths
            if ours:
                return random_rows(rows, lengths, config, layout.max_length, layout.image_slots, number)
            longest = int(lengths.tokens[[sample for row in rows for sample in row]].max())
            return random_rows(rows, lengths, config, longest, len(rows), number)

        return jax_step(config, batches=batch, layout=layout) if ours else torch_step(config, batches=batch)


def random_rows(
    rows: list[tuple[int, ...]], lengths: Lengths, config: LlavaConfig, width: int, slots: int, seed: int
) -> dict[str, np.ndarray]:
    """Rows of samples with random tokens and images, in the layout of the training step; a group of all rows."""
    rng, size, image_tokens = np.random.default_rng(seed), config.vision.image_size, config.image_tokens
    tokens, positions, segments = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    labels, index = (np.full((len(rows), width), fill, np.int32) for fill in (-100, -1))
    used = 0
    for row, samples in enumerate(rows):
        start = 0
        for segment, sample in enumerate(samples, 1):
            length, targets = int(lengths.tokens[sample]), int(lengths.targets[sample])
            part, answer = slice(start, start + length), slice(start + length - targets, start + length)
            tokens[row, part] = rng.integers(0, config.text.vocab_size - 1, length)
            labels[row, answer] = tokens[row, answer]
            positions[row, part], segments[row, part] = np.arange(length), segment
            for _ in range(int(lengths.images[sample])):
                tokens[row, start : start + image_tokens] = 0
                index[row, start : start + image_tokens] = np.arange(used, used + image_tokens)
                used += image_tokens
            start += length
    images = rng.integers(0, 256, (1, slots, size, size, 3), np.uint8)
    return {
        "tokens": tokens,
        "labels": labels,
        "positions": positions,
        "segment_ids": segments,
        "images": images,
        "image_feature_index": index,
    }


if __name__ == "__main__":
    cli.run(main)
