"""Plans which samples are in the rows of step k, and the static shapes that the steps of a run need.

Everything is a pure function of the number of samples, their lengths, the seed and the step, and independent of hosts,
devices, workers, restarts and library versions. So a run resumes at any step without replaying earlier ones, and the
shapes of the compiled step are known before it starts.
"""

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llava_jax.cli import UserError


class Lengths(NamedTuple):
    """How much of a batch each of N samples takes, after expansion and truncation; int32[N] each."""

    tokens: np.ndarray  # positions, image tokens included
    targets: np.ndarray  # labels that the position before them predicts
    tiles: np.ndarray  # image slots: one an image, with AnyRes one a tile
    images: np.ndarray


@functools.lru_cache(maxsize=4)
def permutation(count: int, *key: int | str) -> np.ndarray:
    """A random permutation of `count` items that depends only on `key`; int64[count], read-only.

    It sorts raw Philox output keyed by SHA-256: NumPy guarantees that stream, but not the one of its shuffles.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    philox = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    order = np.argsort(philox.random_raw(count), kind="stable")
    order.flags.writeable = False
    return order


def whole_steps(steps: float) -> int:
    """Rounded up, but for the error of floats: 1.1 epochs of 10 steps are 11."""
    return math.ceil(round(steps, 6))


def split(num_samples: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses `held_out` of the samples for validation.

    Returns the indices to train on and the held-out indices, disjoint and both ascending.
    """
    if num_samples < 1:
        raise UserError("the data set has no samples")
    if not 0 <= held_out < num_samples:
        raise UserError(f"cannot hold out {held_out} of {num_samples} samples: at least one must be left to train on")
    order = permutation(num_samples, "held out", seed)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


class Rows(NamedTuple):
    """Consecutive rows: row r has the samples `samples[starts[r] : starts[r + 1]]`."""

    samples: np.ndarray  # int[N]
    starts: np.ndarray  # int[R + 1]

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> tuple[int, ...]:
        """The samples of a row; none if it is empty or after the last one."""
        return tuple(self.samples[slice(*self.starts[number : number + 2])].tolist()) if number < self.count else ()

    def sums(self, values: np.ndarray) -> np.ndarray:
        """The sums of `values` over the samples of each row; int64[R]."""
        return np.diff(np.concatenate([[0], np.cumsum(values[self.samples], dtype=np.int64)])[self.starts])


@dataclass(frozen=True, eq=False)
class Visits:
    """The samples of each epoch if sets of samples have weights.

    An epoch takes round(w x n) samples of a set of n samples and weight w: the complete set floor(w) times, and a part
    of it for the rest. The parts of successive epochs cycle through one permutation of the set, which depends on the
    seed. So the visits of two samples of a set differ by at most one, within an epoch and over all epochs so far.
    """

    sets: tuple[np.ndarray, ...]  # int[n] each, indices of samples
    weights: tuple[float, ...]
    seed: int  # of the permutations

    def __len__(self) -> int:
        return sum(round(len(chosen) * weight) for chosen, weight in zip(self.sets, self.weights, strict=True))

    def epoch(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, set by set; int[len(self)]."""
        return _visited(self, epoch)


@functools.lru_cache(maxsize=4)
def _visited(visits: Visits, epoch: int) -> np.ndarray:
    visited = []
    for number, (chosen, weight) in enumerate(zip(visits.sets, visits.weights, strict=True)):
        passes, rest = divmod(round(len(chosen) * weight), max(len(chosen), 1))
        part = np.arange(epoch * rest, (epoch + 1) * rest) % max(len(chosen), 1)
        visited += [chosen] * passes
        visited.append(chosen[permutation(len(chosen), "part", visits.seed, number)[part]])
    return np.concatenate(visited)


@dataclass(frozen=True, eq=False)
class Order:
    """Takes every sample once an epoch, one a row. The last batch of an epoch is filled up with empty rows."""

    samples: np.ndarray | Visits  # int[N], indices of the samples, or those of each epoch
    batch_rows: int  # of all hosts together
    seed: int | None  # of the shuffle, new in each epoch; None keeps the order of `samples`, as in validation

    @property
    def indices(self) -> np.ndarray:
        """The indices of the samples of all epochs."""
        return np.concatenate(self.samples.sets) if isinstance(self.samples, Visits) else self.samples

    def visited(self, epoch: int) -> np.ndarray:
        """The indices of an epoch's samples, before they are shuffled."""
        return self.samples.epoch(epoch) if isinstance(self.samples, Visits) else self.samples

    def visits(self, epoch: int, part: slice = slice(None)) -> np.ndarray:
        """The same in the order of the epoch, or a part of them."""
        if self.seed is not None:
            part = permutation(len(self.samples), "epoch", self.seed, epoch)[part]
        return self.visited(epoch)[part]

    def epoch_rows(self, epoch: int) -> Rows:
        """The rows of an epoch, without the empty rows of the last batch."""
        return Rows(self.visits(epoch), np.arange(len(self.samples) + 1))

    def epoch_steps(self, epoch: int) -> int:
        return math.ceil(len(self.samples) / self.batch_rows)

    def find(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number in that epoch."""
        return divmod(step, self.epoch_steps(0))

    def steps(self, epochs: float) -> int:
        """The number of steps of so many epochs, rounded up."""
        return whole_steps(self.epoch_steps(0) * epochs)

    def before(self, step: int) -> np.ndarray:
        """The indices of all samples of the steps before `step`."""
        last, rest = self.find(step)
        epochs = [self.epoch_rows(epoch) for epoch in range(last + (rest > 0))]
        if rest:
            rows = epochs[-1]
            epochs[-1] = rows._replace(samples=rows.samples[: rows.starts[min(rest * self.batch_rows, rows.count)]])
        return np.concatenate([np.empty(0, np.int64), *(rows.samples for rows in epochs)])

    def row(self, step: int, number: int) -> tuple[int, ...]:
        """The indices of the samples in a row of a step; none if it is empty."""
        epoch, step_in_epoch = self.find(step)
        first = step_in_epoch * self.batch_rows + number
        return tuple(self.visits(epoch, slice(first, first + 1)).tolist())

    def rows(self, step: int) -> list[tuple[int, ...]]:
        """The same of each row of a step."""
        return [self.row(step, number) for number in range(self.batch_rows)]


@dataclass(frozen=True)
class Layout:
    """The static shapes of a batch."""

    batch_rows: int  # B
    rows_per_group: int  # rows that share image slots; B / rows_per_group groups are sharded and accumulated
    max_length: int  # T, positions of a row
    image_slots: int  # I, images of a group at most, or their tiles
    label_slots: int  # K, positions with a target of a group at most
    image_tokens: int  # P, positions of an image
    image_size: int  # height and width of an image in pixels

    @property
    def groups(self) -> int:
        return self.batch_rows // self.rows_per_group


def groups_of(rows: Sequence, rows_per_group: int) -> Iterable[Sequence]:
    """Splits the rows of a batch into its groups."""
    return (rows[start : start + rows_per_group] for start in range(0, len(rows), rows_per_group))


def plan_layout(
    schedules: Sequence[tuple[Order, int]],
    lengths: Lengths,
    *,
    rows_per_group: int,
    max_length: int,
    image_tokens: int,
    image_size: int,
    image_slots: int = 0,
    label_slots: int = 0,
) -> Layout:
    """Finds shapes that fit every group of every step of a run.

    Args:
      schedules: orders of equal `batch_rows` (training, validation), and how many of their steps are taken.
      lengths: of all samples that the orders index.
      image_slots, label_slots: the number of slots of a group; 0 for as few as are needed, -1 for none.

    Raises:
      UserError: rows do not divide into groups, or there are too few slots; the message has the number needed.
    """
    (batch_rows,) = {order.batch_rows for order, _ in schedules}
    if rows_per_group < 1 or batch_rows % rows_per_group:
        raise UserError(f"batch_rows={batch_rows} is no multiple of rows_per_group={rows_per_group}")
    images, labels = _largest_groups(schedules, lengths, rows_per_group)
    return Layout(
        batch_rows=batch_rows,
        rows_per_group=rows_per_group,
        max_length=max_length,
        image_slots=_choose_slots("image_slots", image_slots, images, rows_per_group),
        label_slots=_choose_slots("label_slots", label_slots, max(labels, 1), rows_per_group),
        image_tokens=image_tokens,
        image_size=image_size,
    )


def _largest_groups(schedules: Sequence[tuple[Order, int]], lengths: Lengths, rows_per_group: int) -> tuple[int, int]:
    """The largest numbers of images and of targets of a group."""
    most = np.zeros(2, np.int64)
    for order, steps in schedules:
        if not steps:
            continue
        last, rest = order.find(steps - 1)
        for epoch in range(last + 1):
            rows = order.epoch_rows(epoch)
            taken = (rest + 1) * order.batch_rows if epoch == last else rows.count
            sums = np.stack([rows.sums(lengths.tiles), rows.sums(lengths.targets)])[:, :taken]
            padded = np.pad(sums, ((0, 0), (0, -sums.shape[1] % rows_per_group)))
            most = np.maximum(most, padded.reshape(2, -1, rows_per_group).sum(2).max(1, initial=0))
    return int(most[0]), int(most[1])


def _choose_slots(name: str, wanted: int, needed: int, rows_per_group: int) -> int:
    if wanted == 0:
        return needed
    wanted = max(wanted, 0)  # -1 asks for none
    if wanted < needed:
        raise UserError(
            f"{name}={wanted} is too few: a group of {rows_per_group} rows needs {needed}; "
            f"set {name} to {needed} or to 0 (automatic), or lower rows_per_group"
        )
    return wanted
