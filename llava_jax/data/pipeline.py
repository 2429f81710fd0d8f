"""From the samples of a source to batches, read by Grain.

A batch is a dict of numpy arrays of static shape, B rows of T positions and G groups of I image slots:

  tokens               int32[B, T]           0 under images and padding
  labels               int32[B, T]           unshifted: position t predicts labels[t + 1] of its segment; -100 masked
  positions            int32[B, T]           restart at 0 with each sample
  segment_ids          int32[B, T]           1, 2, ... for the samples of a row; 0 is padding
  images               uint8[G, I, H, W, 3]  slots shared by the rows of a group; zeros where unused
  image_feature_index  int32[B, T]           slot in the group x P + patch; -1 for text

Batch k is a pure function of the data, the seed and k (`Batches[k]`); `Batches.iterate` gives the same batches with
threads or processes reading ahead.
"""

import contextlib
import copy
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags
from transformers import PreTrainedTokenizerBase

from llava_jax.cli import UserError, short, track
from llava_jax.data import schedule
from llava_jax.data.conversation import Template
from llava_jax.data.fit import require_fit
from llava_jax.data.images import decode_image, preprocess
from llava_jax.data.plan import Layout, Lengths, Order, groups_of
from llava_jax.data.sources import Sample, Source
from llava_jax.data.tokenization import IGNORE_INDEX, Row, encode_sample, expand

Batch = dict[str, np.ndarray]

# What each of a row's arrays holds where no sample stands.
PADDING = {"tokens": 0, "labels": IGNORE_INDEX, "positions": 0, "segment_ids": 0, "image_feature_index": -1}

MEASURED_TOGETHER = 256  # samples; to pass one on takes a process as long as to measure it

READ_THREADS = min(16, 4 * (os.cpu_count() or 1))  # mostly waiting for storage or, without the GIL, in Pillow


@dataclass(frozen=True)
class TextEncoder:
    """sample -> the positions it takes of a row: rendered, tokenized, images expanded, truncated.

    Raises UserError where template and tokenizer do not fit.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    image_tokens: int
    max_length: int
    image_position: str = "first"
    seed: int = 0

    def __post_init__(self) -> None:
        require_fit(self.template, self.tokenizer)

    def __call__(self, sample: Sample) -> Row:
        encoded = encode_sample(
            sample, self.template, self.tokenizer, image_position=self.image_position, seed=self.seed
        )
        return expand(encoded, self.image_tokens, self.max_length)


@dataclass(frozen=True)
class ImageDecoder:
    """(encoded picture, its name) -> uint8[size, size, 3], as the vision tower sees it."""

    size: int
    aspect: str
    mean: tuple[float, ...]

    def __call__(self, data: bytes, name: str) -> np.ndarray:
        return preprocess(decode_image(data, name), self.size, self.aspect, self.mean)


class Bad(NamedTuple):
    """A sample that is skipped, and why."""

    index: int
    id: str
    reason: str


def measure(
    source: Source,
    encode: Callable[[Sample], Row],
    workers: int = 0,
    first: int = 0,
    stride: int = 1,
    skip_bad: bool = False,
) -> Lengths:
    """Encodes the text of samples first, first + stride, ... once, so that all errors in it appear before step 0.

    Raises UserError for the first sample that cannot be encoded or holds nothing to learn; with `skip_bad` such samples
    have no tokens instead.
    """
    indices = range(first, len(source), stride)
    starts = grain.MapDataset.range(0, len(indices), MEASURED_TOGETHER)
    counts = _read_ahead(starts.map(functools.partial(_counts, source, encode, skip_bad, indices)), workers)
    if first == 0:
        counts = track(counts, f"Measuring samples, {MEASURED_TOGETHER} at a time", total=len(starts))
    return Lengths(*np.concatenate([np.zeros((0, 3), np.int32), *counts]).T)


def _counts(source: Source, encode: Callable[[Sample], Row], skip_bad: bool, indices: range, start: int) -> np.ndarray:
    """int32[n, 3]: what `_count` gives of the next samples from a place in `indices` on."""
    chosen = indices[start : start + MEASURED_TOGETHER]
    return np.array([_count(source, encode, skip_bad, index) for index in chosen], np.int32)


def _count(source: Source, encode: Callable[[Sample], Row], skip_bad: bool, index: int) -> tuple[int, int, int]:
    """Positions, targets and images of one sample."""
    try:
        row = encode_text(source, encode, index)
    except UserError:
        if skip_bad:
            return 0, 0, 0
        raise
    return len(row.tokens), _targets(row), row.num_images


def bad_texts(source: Source, encode: Callable[[Sample], Row], indices: Iterable[int]) -> Iterator[Bad]:
    """What is wrong with the texts of those of the samples that have something wrong."""
    for index in indices:
        try:
            encode_text(source, encode, index)
        except UserError as error:
            yield Bad(index, _id(source, index), str(error))


def encode_text(source: Source, encode: Callable[[Sample], Row], index: int) -> Row:
    """The text of a sample. Raises UserError where it cannot be encoded or holds nothing to learn."""
    sample = source[index]
    row = encode(sample)
    if _targets(row) == 0:
        raise UserError(
            f"sample {short(sample.id)}: nothing to learn in the {len(row.tokens)} positions that are kept, "
            "its answers are empty or cut off: raise the maximal length or remove the sample"
        )
    return row


def _targets(row: Row) -> int:
    return int(np.count_nonzero(row.labels[1:] != IGNORE_INDEX))  # nothing predicts the first label


def _id(source: Source, index: int) -> str:
    try:
        return source[index].id
    except UserError:  # it is no sample at all
        return str(index)


def build_row(samples: Sequence[tuple[Row, Sequence[np.ndarray]]], layout: Layout) -> Batch:
    """Places samples, text and images, one after the other in one row; -> the row's arrays, int32[T] each, and
    `images`, uint8[n, H, W, 3]. Image indices count the row's own images."""
    row = {name: np.full(layout.max_length, fill, np.int32) for name, fill in PADDING.items()}
    start, images = 0, []
    for segment, (text, pictures) in enumerate(samples, start=1):
        stop = start + len(text.tokens)
        if stop > layout.max_length:
            raise ValueError(f"the samples of a row take {stop} positions, it has {layout.max_length}")
        index = text.image_feature_index
        row["tokens"][start:stop] = text.tokens
        row["labels"][start:stop] = text.labels
        row["positions"][start:stop] = np.arange(stop - start)
        row["segment_ids"][start:stop] = segment
        row["image_feature_index"][start:stop] = _shift(index, len(images) * layout.image_tokens)
        start = stop
        images.extend(pictures)
    shape = (len(images), layout.image_size, layout.image_size, 3)
    return row | {"images": np.array(images, np.uint8).reshape(shape)}


def collate(rows: Sequence[Batch], layout: Layout) -> Batch:
    """Stacks the rows of whole groups and moves their images to the slots of these."""
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
            index[:] = _shift(index, used * layout.image_tokens)
            used = stop
    return batch


def _shift(image_feature_index: np.ndarray, offset: int) -> np.ndarray:
    return np.where(image_feature_index < 0, -1, image_feature_index + offset)


class Batches:
    """The batches of a run by step: `batches[k]`, or read ahead, `batches.iterate(start, stop)`.

    Args:
      encode, decode: as `TextEncoder` and `ImageDecoder` do.
      layout: the shapes, planned for all steps that will be taken.
      groups: those of each batch that are read, ascending; by default all. The others belong to other processes.
      skip_bad: whether a sample with a fault is skipped, in its place, instead of raising. One whose text is at fault
        takes no positions, as `measure` says; of one whose picture is, nothing is learned, and its pictures are zeros.
    """

    def __init__(
        self,
        source: Source,
        encode: Callable[[Sample], Row],
        decode: Callable[[bytes, str], np.ndarray],
        order: Order,
        layout: Layout,
        groups: Sequence[int] | None = None,
        skip_bad: bool = False,
    ):
        self.source = source
        self.encode = encode
        self.decode = decode
        self.order = order
        self.layout = layout
        self.skip_bad = skip_bad
        per_group = layout.rows_per_group
        chosen = range(layout.groups) if groups is None else groups
        self.rows = [row for group in chosen for row in range(group * per_group, (group + 1) * per_group)]

    def __getitem__(self, step: int) -> Batch:
        rows = self.order.rows(step)
        return self._collate([self._row(rows[row]) for row in self.rows])[0]

    def ids(self, step: int) -> list[str]:
        """The ids of the samples of a step, row by row."""
        return [_id(self.source, index) for row in self.order.rows(step) for index in row]

    def iterate(self, start: int, stop: int, workers: int = 0) -> Iterator[Batch]:
        """The batches of steps start, ..., stop - 1, read ahead by `workers` processes or, if 0, by threads of this
        one; to begin at any step costs nothing."""
        with contextlib.closing(self.iterate_with_bad(start, stop, workers)) as batches:
            yield from (batch for batch, _ in batches)

    def iterate_with_bad(self, start: int, stop: int, workers: int = 0) -> Iterator[tuple[Batch, list[Bad]]]:
        """The same with those samples of each batch of which a picture is at fault."""
        per_batch = len(self.rows)
        numbers = grain.MapDataset.range(start * per_batch, stop * per_batch)
        with contextlib.ExitStack() as stack:
            reader = self
            if workers:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llava_jax_")))
                reader = copy.copy(self)
                reader.order = schedule.write(self.order, start, stop, directory)
            rows = _read_ahead(numbers.map(reader._numbered_row), workers, buffer=2 * per_batch)
            batches = iter(rows.batch(per_batch, batch_fn=self._collate))
            stack.callback(batches.close)
            yield from batches

    def _numbered_row(self, number: int) -> tuple[Batch, list[Bad]]:
        step, row = divmod(number, len(self.rows))
        return self._row(self.order.rows(step)[self.rows[row]])

    def _collate(self, rows: Sequence[tuple[Batch, list[Bad]]]) -> tuple[Batch, list[Bad]]:
        return collate([row for row, _ in rows], self.layout), [one for _, bad in rows for one in bad]

    def _row(self, indices: Sequence[int]) -> tuple[Batch, list[Bad]]:
        samples, bad = [], []
        for index in indices:
            try:
                samples.append(self._read(index))
            except UserError as error:
                if not self.skip_bad:
                    raise
                samples.append(self._blank(index))
                if len(samples[-1][0].tokens):  # else it was known when the texts were measured
                    bad.append(Bad(index, _id(self.source, index), str(error)))
        return build_row(samples, self.layout), bad

    def _read(self, index: int) -> tuple[Row, Sequence[np.ndarray]]:
        text = encode_text(self.source, self.encode, index)
        pictures = self.source.read_pictures(index, text.num_images)
        sample = self.source[index]
        try:
            return text, [self.decode(data, name) for data, name in zip(pictures, sample.images, strict=False)]
        except UserError as error:
            raise UserError(f"sample {short(sample.id)}: {error}") from error

    def _blank(self, index: int) -> tuple[Row, Sequence[np.ndarray]]:
        """A bad sample: in its positions, if its text takes any, nothing to see or to learn."""
        try:
            text = encode_text(self.source, self.encode, index)
        except UserError:
            return Row(*np.zeros((3, 0), np.int32), num_images=0), []
        size = self.layout.image_size
        pictures = np.zeros((text.num_images, size, size, 3), np.uint8)
        return text._replace(labels=np.full_like(text.labels, IGNORE_INDEX)), pictures


def _read_ahead(dataset: grain.MapDataset, workers: int, buffer: int = 0) -> grain.IterDataset:
    """The elements in order, made ahead by threads here or, with `workers`, in that many processes; `buffer` at least,
    and at least one a thread."""
    buffer = max(READ_THREADS, buffer // max(workers, 1))  # of each process
    threads = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=buffer)
    elements = dataset.to_iter_dataset(threads)
    if workers == 0:
        return elements
    if not flags.FLAGS.is_parsed():  # Grain asks Abseil's flags, which only `main` parses
        flags.FLAGS.mark_as_parsed()
    # Rows travel through pipes: containers often have too little shared memory for pictures, and die of it.
    pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    elements = grain.experimental.WithOptionsIterDataset(elements, pipes)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=8)
    return elements.mp_prefetch(options, worker_init_fn=_end_with_parent)


def _end_with_parent(_worker: int, _workers: int) -> None:
    """A worker of a process that is killed would wait for ever for someone to take its rows.

    Signals to all processes of a group are the parent's: it saves, for which it may need another batch.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
