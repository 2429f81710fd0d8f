"""Writes the rows of a run to files that reading processes map, so that none of them holds a plan or lengths."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_jax.data.plan import Order, Rows

SAMPLES, STARTS = "samples.npy", "starts.npy"


@dataclass(frozen=True)
class Schedule:
    """The rows of an order from step `start` on, read from files."""

    directory: Path
    start: int
    batch_rows: int

    def row(self, step: int, number: int) -> tuple[int, ...]:
        """The indices of the samples in a row of a step; none if it is empty."""
        return _mapped(self.directory).row((step - self.start) * self.batch_rows + number)

    def rows(self, step: int) -> list[tuple[int, ...]]:
        """The same of each row of a step."""
        return [self.row(step, number) for number in range(self.batch_rows)]


def write(order: Order, start: int, stop: int, directory: Path) -> Schedule:
    """Writes the rows of steps start, ..., stop - 1 of an order into a directory."""
    samples, counts = [np.empty(0, np.int64)], [np.zeros(1, np.int64)]
    (epoch, step), left = order.find(start), stop - start
    while left > 0:
        taken = min(order.epoch_steps(epoch) - step, left)
        rows = order.epoch_rows(epoch)
        first, last = (min(number * order.batch_rows, rows.count) for number in (step, step + taken))
        samples.append(rows.samples[rows.starts[first] : rows.starts[last]])
        held = np.diff(rows.starts[first : last + 1])
        counts.append(np.pad(held, (0, taken * order.batch_rows - len(held))))  # an epoch ends with empty rows
        epoch, step, left = epoch + 1, 0, left - taken
    np.save(directory / SAMPLES, np.concatenate(samples))
    np.save(directory / STARTS, np.cumsum(np.concatenate(counts)))
    return Schedule(directory, start, order.batch_rows)


@functools.lru_cache(maxsize=1)
def _mapped(directory: Path) -> Rows:
    return Rows(*(np.load(directory / name, mmap_mode="r") for name in (SAMPLES, STARTS)))
