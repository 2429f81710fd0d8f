"""Makes the batches of a run from encoded samples and their images.

A batch is a dict of numpy arrays of static shape, B rows of T positions and G groups of I image slots:

  tokens               int32[B, T]           0 under images and padding
  labels               int32[B, T]           unshifted: position t predicts labels[t + 1] of its segment; -100 masked
  positions            int32[B, T]           restart at 0 with each sample
  segment_ids          int32[B, T]           1, 2, ... for the samples of a row; 0 is padding
  images               uint8[G, I, H, W, 3]  slots shared by the rows of a group; zeros where unused. A slot holds an
                                             image or, with AnyRes, a tile
  image_feature_index  int32[B, T]           slot in the group x P + patch; TEXT or NEWLINE of `data.features`

Batch k is a pure function of the data, the seed and k (`Batches[k]`); `Batches.iterate` gives the same batches with
threads or processes reading ahead.
"""

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from llava_jax.cli import UserError, short
from llava_jax.data import schedule
from llava_jax.data.anyres import Tiling
from llava_jax.data.encoded import BadSample, EncodedSource
from llava_jax.data.features import TEXT, shifted
from llava_jax.data.images import decode_image, preprocess
from llava_jax.data.plan import Layout, Lengths, Order, groups_of
from llava_jax.data.read_ahead import read_ahead
from llava_jax.data.sources import read_images
from llava_jax.data.tokenization import IGNORE_INDEX, Segment
from llava_jax.files import cache

Batch = dict[str, np.ndarray]

# The values of the arrays of a row in padding.
PADDING = {"tokens": 0, "labels": IGNORE_INDEX, "positions": 0, "segment_ids": 0, "image_feature_index": TEXT}


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes and preprocesses an image: (its file, its name) -> uint8[tiles, size, size, 3].

    There is one tile without AnyRes. `several`: whether the sample has more than one image.
    """

    size: int
    aspect: str
    mean: tuple[float, ...]
    resample: str = "bicubic"
    tiling: Tiling | None = None

    def __call__(self, data: bytes, name: str, several: bool = False) -> np.ndarray:
        image = decode_image(data, name)
        if self.tiling is not None:
            return self.tiling.tiles(image, several)
        return preprocess(image, self.size, self.aspect, self.mean, self.resample)[None]


def build_row(samples: Sequence[tuple[Segment, Sequence[np.ndarray]]], layout: Layout) -> Batch:
    """Places the segments of samples, and the tiles of their images, one after the other in a row.

    Returns the row's arrays, int32[T] each, and `images`, uint8[n, H, W, 3], which its `image_feature_index` counts.
    """
    row = {name: np.full(layout.max_length, fill, np.int32) for name, fill in PADDING.items()}
    start, used = 0, 0
    images = [np.zeros((0, layout.image_size, layout.image_size, 3), np.uint8)]
    for number, (segment, sample_images) in enumerate(samples, start=1):
        stop = start + len(segment.tokens)
        if stop > layout.max_length:
            raise ValueError(f"the samples of a row take {stop} positions, it has {layout.max_length}")
        index = segment.image_feature_index
        row["tokens"][start:stop] = segment.tokens
        row["labels"][start:stop] = segment.labels
        row["positions"][start:stop] = np.arange(stop - start)
        row["segment_ids"][start:stop] = number
        row["image_feature_index"][start:stop] = shifted(index, used * layout.image_tokens)
        start, used = stop, used + segment.num_tiles
        images.extend(sample_images)
    return row | {"images": np.concatenate(images)}


def collate(rows: Sequence[Batch], layout: Layout) -> Batch:
    """Stacks the rows of complete groups and moves their images to the image slots of the groups."""
    batch = {name: np.stack([row[name] for row in rows]) for name in PADDING}
    groups, size = len(rows) // layout.rows_per_group, layout.image_size
    batch["images"] = np.zeros((groups, layout.image_slots, size, size, 3), np.uint8)
    members = list(zip(rows, batch["image_feature_index"], strict=True))
    for slots, group in zip(batch["images"], groups_of(members, layout.rows_per_group), strict=True):
        used = 0
        for row, index in group:
            stop = used + len(row["images"])
            if stop > layout.image_slots:
                raise ValueError(f"a group of rows holds {stop} or more images, it has {layout.image_slots} slots")
            slots[used:stop] = row["images"]
            index[:] = shifted(index, used * layout.image_tokens)
            used = stop
    return batch


class StepBatch(NamedTuple):
    """The batch of a step.

    Attributes:
      batch: the arrays of the groups that this process reads.
      rows: the indices of the samples in each row of the step, including the rows that other processes read.
      bad: the samples of `batch` whose images are bad.
    """

    batch: Batch
    rows: list[tuple[int, ...]]
    bad: list[BadSample]


@dataclass(eq=False)
class Batches:
    """The batches of a run by step: `batches[k]`, or read ahead, `batches.iterate(start, stop)`.

    Attributes:
      encoded: the samples; its `skip_bad` says what happens to bad ones.
      decode: as `ImageDecoder` does.
      order: which samples are in the rows of a step.
      layout: the shapes, planned for all steps that will be taken.
      groups: the groups of each batch to read, ascending; by default all. Other processes read the others.
      lengths: of all samples, with which `layout` was planned. With AnyRes they depend on files that may have changed.
    """

    encoded: EncodedSource
    decode: Callable[..., np.ndarray]
    order: Order
    layout: Layout
    groups: Sequence[int] | None = None
    lengths: Lengths | None = None

    def __post_init__(self) -> None:
        per_group = self.layout.rows_per_group
        chosen = range(self.layout.groups) if self.groups is None else self.groups
        self.rows = [row for group in chosen for row in range(group * per_group, (group + 1) * per_group)]

    def __getitem__(self, step: int) -> Batch:
        return self._collate([self._row(step, row) for row in self.rows])[0]

    def ids(self, step: int) -> list[str]:
        """The ids of the samples of a step, row by row."""
        return [self.encoded.id(index) for row in self.order.rows(step) for index in row]

    def iterate(self, start: int, stop: int, workers: int = 0) -> Iterator[StepBatch]:
        """Yields the batches of steps start, ..., stop - 1.

        They are read ahead by `workers` processes or, if 0, by threads of this one. No earlier step is replayed.
        """
        per_batch = len(self.rows)
        numbers = grain.MapDataset.range(start * per_batch, stop * per_batch)
        with contextlib.ExitStack() as stack:
            reader = self
            if workers:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llava_jax_")))
                reader = copy.copy(self)
                reader.order = schedule.write(self.order, start, stop, directory)
            rows = read_ahead(numbers.map(reader._numbered_row), workers, buffer=2 * per_batch)
            batches = iter(rows.batch(per_batch, batch_fn=self._collate))
            stack.callback(batches.close)
            for step, (batch, bad) in enumerate(batches, start):
                yield StepBatch(batch, reader.order.rows(step), bad)

    def _numbered_row(self, number: int) -> tuple[Batch, list[BadSample]]:
        step, row = divmod(number, len(self.rows))
        return self._row(step, self.rows[row])

    def _collate(self, rows: Sequence[tuple[Batch, list[BadSample]]]) -> tuple[Batch, list[BadSample]]:
        return collate([row for row, _ in rows], self.layout), [one for _, bad in rows for one in bad]

    def _row(self, step: int, number: int) -> tuple[Batch, list[BadSample]]:
        samples, bad = [], []
        for index in self.order.row(step, number):
            text, images, fault = self._read(index)
            self._require_measured(index, text)
            samples.append((text, images))
            bad += [fault] if fault else []
        return build_row(samples, self.layout), bad

    def _require_measured(self, index: int, text: Segment) -> None:
        """Raises UserError for a sample that takes more or less than was planned, and is not skipped."""
        if self.lengths is None or not len(text.tokens):
            return
        planned = int(self.lengths.tokens[index]), int(self.lengths.tiles[index])
        if (len(text.tokens), text.num_tiles) != planned:
            raise UserError(
                f"sample {short(self.encoded.id(index))}: its images have other sizes than when they were measured: "
                f"put them back, or remove lengths-*.npz in {cache.directory()} and begin a new run"
            )

    def _read(self, index: int) -> tuple[Segment, Sequence[np.ndarray], BadSample | None]:
        """Text and images of a sample, whose record is parsed once, and what is wrong with an image."""
        text = Segment(*np.zeros((3, 0), np.int32), 0, 0)  # what a sample with a bad text takes
        side = self.layout.image_size
        if self.encoded.skip_bad and self.lengths is not None and not self.lengths.tokens[index]:
            return text, [np.zeros((0, side, side, 3), np.uint8)], None  # it was reported when it was measured
        sample = None
        try:
            sample = self.encoded.source[index]
            text = self.encoded.segment(index, sample)
            several = self.encoded.needs_sizes and len(sample.images) > 1
            decode = functools.partial(self.decode, several=True) if several else self.decode
            images = read_images(self.encoded.source, index, sample, decode, text.num_images)
            if sum(map(len, images)) != text.num_tiles:
                raise UserError(
                    f"sample {short(sample.id)}: an image has another size than its header says: save it again"
                )
            return text, images, None
        except UserError as error:
            if not self.encoded.skip_bad:
                raise
            known = len(text.tokens) or self.lengths is not None  # a text that was good when it was measured
            bad = BadSample(index, sample.id if sample else str(index), str(error)) if known else None
        images = np.zeros((text.num_tiles, side, side, 3), np.uint8)
        return text._replace(labels=np.full_like(text.labels, IGNORE_INDEX)), [images], bad
