"""Packing: plans, from lengths, which samples share a row and which rows share a group.

The plan of an epoch is a pure function of lengths, seed and epoch. Rows are planned one by one, group by group. A row
begins with samples in the shuffled order of the epoch. It ends with the sample, or the pair of samples of most similar
length, that leaves the fewest positions free; so the remaining samples stay a mixture of lengths. Samples with no, one,
... images are drawn in proportion to their numbers: otherwise samples without images would cluster in some groups and
be missing in groups whose image slots, but not positions, are used up. Then the groups are shuffled. Samples of equal
tokens and images are interchangeable and come in the order of the epoch.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

from llava_jax.cli import UserError
from llava_jax.data.plan import Lengths, Order, Rows, permutation, whole_steps
from llava_jax.data.sources import Sample

# While more mean lengths of a row are free its samples are drawn; the last one or two samples are chosen to fit.
DRAW = 2.5
# Pairs that leave more positions free are not searched: the longest single sample is as good.
SLACK = 4
# Image slots are chosen by plans of so many samples; more samples do not change the choice.
CHOSEN_BY = 100_000


class Room(NamedTuple):
    """The sizes of rows and groups."""

    row_length: int  # positions of a row
    rows_per_group: int
    image_slots: int  # of a group


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedOrder(Order):
    """Takes every sample once an epoch, several a row. The last group and batch are filled up with empty rows.

    Epochs may differ by a step or so. A sample without tokens, such as a skipped one, may be in any row.
    """

    lengths: Lengths  # of all samples that are indexed
    room: Room
    _planned: dict[int, Rows] = field(default_factory=dict, repr=False)

    def epoch_rows(self, epoch: int) -> Rows:
        if epoch not in self._planned:
            self._planned[epoch] = self._plan(epoch)
        return self._planned[epoch]

    def row(self, step: int, number: int) -> tuple[int, ...]:
        epoch, step_in_epoch = self.find(step)
        return self.epoch_rows(epoch).row(step_in_epoch * self.batch_rows + number)

    def epoch_steps(self, epoch: int) -> int:
        return math.ceil(self.epoch_rows(epoch).count / self.batch_rows)

    def find(self, step: int) -> tuple[int, int]:
        epoch = 0
        while step >= self.epoch_steps(epoch):
            step -= self.epoch_steps(epoch)
            epoch += 1
        return epoch, step

    def steps(self, epochs: float) -> int:
        complete = int(epochs)
        rest = whole_steps(self.epoch_steps(complete) * (epochs - complete)) if epochs > complete else 0
        return sum(map(self.epoch_steps, range(complete))) + rest

    def _plan(self, epoch: int) -> Rows:
        samples = self.visits(epoch)
        groups = pack(self.lengths.tokens[samples], self.lengths.tiles[samples], self.room)
        if self.seed is not None:
            groups = [groups[i] for i in permutation(len(groups), "groups", self.seed, epoch)]
        rows = [row for group in groups for row in group]
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)
        return Rows(samples[np.array([i for row in rows for i in row], np.int64)].astype(np.int32), starts)


class Fill(NamedTuple):
    """How full the rows and groups of an epoch are, as shares of 1, without the empty rows of the last batch."""

    rows: int
    groups: int
    samples_a_row: float
    tokens: float  # of positions
    images: float  # of image slots
    labels: float  # of label slots, if each group has those that the group with most targets needs
    label_slots: int

    @property
    def used(self) -> float:
        """The product of the used shares of positions and image slots, which `image_slot_plans` maximizes."""
        return self.tokens * self.images


def fill(order: PackedOrder, epoch: int = 0) -> Fill:
    """Measures the plan of an epoch."""
    rows, room = order.epoch_rows(epoch), order.room
    groups = rows.count // room.rows_per_group
    targets = rows.sums(order.lengths.targets).reshape(groups, -1).sum(1)
    images = int(rows.sums(order.lengths.tiles).sum())
    return Fill(
        rows=rows.count,
        groups=groups,
        samples_a_row=len(rows.samples) / rows.count,
        tokens=int(rows.sums(order.lengths.tokens).sum()) / (rows.count * room.row_length),
        images=images / (groups * room.image_slots) if room.image_slots else 1.0,
        labels=int(targets.sum()) / (groups * max(int(targets.max()), 1)),
        label_slots=int(targets.max()),
    )


def pack_orders(orders: Sequence[Order], lengths: Lengths, room: Room, source: Sequence[Sample]) -> list[PackedOrder]:
    """Packs all orders into rows and groups of the same sizes. Image slots of 0 are chosen for the first order.

    Raises UserError for a sample of `source` with more images than a group has slots.
    """
    indices = np.concatenate([order.indices for order in orders])
    richest = int(indices[np.argmax(lengths.tiles[indices])])
    needed, slots = int(lengths.tiles[richest]), max(room.image_slots, 0)  # -1 asks for none
    if room.image_slots == 0:
        some = dataclasses.replace(orders[0], samples=orders[0].visits(0)[:CHOSEN_BY])
        slots = max(image_slot_plans(some, lengths, room.row_length, room.rows_per_group)[0].room.image_slots, needed)
    if needed > slots:
        what = "images" if needed == lengths.images[richest] else "tiles"
        raise UserError(f"sample {source[richest].id}: has {needed} {what}, more than image_slots={slots} of a group")
    return [pack_order(order, lengths, room.row_length, room.rows_per_group, slots) for order in orders]


def pack_order(order: Order, lengths: Lengths, row_length: int, rows_per_group: int, image_slots: int) -> PackedOrder:
    """Packs the samples of an order. Raises ValueError if one has more images than a group has slots."""
    most = lengths.tiles[order.indices].max(initial=0)
    if most > image_slots:
        raise ValueError(f"a sample has {most} images, a group {image_slots} slots")
    return PackedOrder(
        **{field.name: getattr(order, field.name) for field in fields(Order)},
        lengths=lengths,
        room=Room(row_length, rows_per_group, image_slots),
    )


def image_slot_plans(order: Order, lengths: Lengths, row_length: int, rows_per_group: int) -> list[PackedOrder]:
    """Plans the first epoch with the numbers of image slots that may be best; returns the best plan first.

    If every position of a group were used, its images would need `most` slots. That is too many, because some positions
    stay free. With the number of images that groups then have, rounded down or up, fewer slots but more positions stay
    free. The best plan has the largest product of both used shares.
    """
    visited, needed = order.visited(0), int(lengths.tiles[order.indices].max(initial=0))
    tokens, images = int(lengths.tokens[visited].sum()), int(lengths.tiles[visited].sum())
    most = math.ceil(images * row_length * rows_per_group / max(tokens, 1))
    plans = [pack_order(order, lengths, row_length, rows_per_group, max(most, needed))]
    held = images / fill(plans[0]).groups
    for slots in {max(math.floor(held), needed), max(math.ceil(held), needed)} - {plans[0].room.image_slots}:
        plans.append(pack_order(order, lengths, row_length, rows_per_group, slots))
    return sorted(plans, key=lambda plan: (-fill(plan).used, plan.room.image_slots))


def pack(tokens: np.ndarray, images: np.ndarray, room: Room) -> list[list[list[int]]]:
    """Packs samples into groups of rows.

    Args:
      tokens, images: of each sample, in the order in which samples are drawn; int[N]. None has more tokens than a row
        or more images than a group.

    Returns:
      The indices of the samples of each row of each group.
    """
    pool, groups = _Pool(tokens, images, room.row_length), []
    while pool.count:
        group, used = [], 0
        for number in range(1, room.rows_per_group + 1):
            share = math.ceil(room.image_slots * number / room.rows_per_group)  # of this row and those before
            row = list(_fill(pool, room.row_length, room.image_slots - used, share - used))
            used += sum(pool.kinds[sample][0] for sample in row)
            group.append(row)
        groups.append(group)
    return groups


def _fill(pool: "_Pool", free: int, slots: int, share: int) -> Iterator[int]:
    """Fills an empty row from the pool. Samples that are drawn may use all `slots`, the others `share` of them."""
    first = True
    while pool.count and (first or free >= DRAW * pool.tokens_left / pool.count):
        images, tokens = kind = pool.next_kind()
        if tokens > free or images > slots:
            break
        yield pool.take(kind)
        free, slots, share, first = free - tokens, slots - images, share - images, False
    while chosen := pool.closest(free, min(slots, share)):
        for images, tokens in chosen:
            yield pool.take((images, tokens))
            free, slots, share = free - tokens, slots - images, share - images


Kind = tuple[int, int]  # images and tokens: samples of the same kind are interchangeable


class _Pool:
    """The samples that are not in a row yet.

    Bit L of `present[n]`, and bit row_length - L of `mirrored[n]`, say whether a sample of n images and L tokens is
    left. So a shift and an AND find all pairs of samples with a given sum of tokens.
    """

    def __init__(self, tokens: np.ndarray, images: np.ndarray, row_length: int):
        self.row_length = row_length
        self.kinds: list[Kind] = list(zip(images.tolist(), tokens.tolist(), strict=True))
        self.count, self.tokens_left = len(self.kinds), int(tokens.sum())
        self.placed = bytearray(self.count)
        self.stacks: dict[Kind, list[int]] = {}  # the next in order on top
        for sample in reversed(range(self.count)):
            self.stacks.setdefault(self.kinds[sample], []).append(sample)
        self.numbers = np.unique(images).tolist()  # of images
        self.present, self.mirrored = dict.fromkeys(self.numbers, 0), dict.fromkeys(self.numbers, 0)
        for kind in self.stacks:
            self._flip(kind)
        self.queues = {n: np.flatnonzero(images == n)[::-1].tolist() for n in self.numbers}
        self.left = {n: len(queue) for n, queue in self.queues.items()}
        self.shares = {n: left / self.count for n, left in self.left.items()}

    def next_kind(self) -> Kind:
        """The kind of the next sample, of the number of images that is most behind its share."""
        left, shares, count = self.left, self.shares, self.count
        number = max((n for n in self.numbers if left[n]), key=lambda n: left[n] - shares[n] * count)
        queue = self.queues[number]
        while self.placed[queue[-1]]:
            queue.pop()
        return self.kinds[queue[-1]]

    def take(self, kind: Kind) -> int:
        """Removes and returns the next sample of a kind."""
        stack = self.stacks[kind]
        sample = stack.pop()
        if not stack:
            self._flip(kind)
        self.placed[sample] = True
        self.count -= 1
        self.tokens_left -= kind[1]
        self.left[kind[0]] -= 1
        return sample

    def closest(self, free: int, slots: int) -> tuple[Kind, ...]:
        """The kind, or pair of kinds, that leaves the fewest of `free` positions free; empty if none fits."""
        single = max(((self._longest(n, free), n) for n in self.numbers if n <= slots), default=(-1, 0))
        if single[0] < 0:
            return ()
        if self._any_pair(free, slots):
            for tokens in range(free, max(single[0], free - SLACK), -1):
                if pair := self._pair(tokens, slots):
                    return pair
        return (single[::-1],)

    def _longest(self, number: int, free: int) -> int:
        """The tokens of the longest sample up to `free` with `number` images; -1 without one."""
        return (self.present[number] & ((2 << free) - 1)).bit_length() - 1

    def _any_pair(self, free: int, slots: int) -> bool:
        """Whether there is a pair that leaves fewer than `SLACK` positions free."""
        numbers = [n for n in self.numbers if n <= slots]
        present = functools.reduce(operator.or_, (self.present[n] for n in numbers), 0)
        mirrored = functools.reduce(operator.or_, (self.mirrored[n] for n in numbers), 0) >> (self.row_length - free)
        for slack in (1, 2):
            mirrored |= mirrored >> slack
        return bool(present & mirrored)

    def _pair(self, tokens: int, slots: int) -> tuple[Kind, ...]:
        """The two kinds of most similar length with a sum of `tokens`; empty without such kinds."""
        half, found = (tokens + 1) // 2, []
        for number in self.numbers:
            partners = [n for n in self.numbers if n <= slots - number]
            mirrored = functools.reduce(operator.or_, (self.mirrored[n] for n in partners), 0)
            longer = (self.present[number] & (mirrored >> (self.row_length - tokens))) >> half
            while longer:
                bit = longer & -longer
                longer ^= bit
                kind = (number, half + bit.bit_length() - 1)
                rest = tokens - kind[1]
                other = next((n, rest) for n in reversed(partners) if self.present[n] >> rest & 1)
                if kind != other or len(self.stacks[kind]) > 1:
                    found.append((kind, other))
                    break
        return min(found, key=lambda pair: pair[0][1], default=())

    def _flip(self, kind: Kind) -> None:
        """Updates the bits after the first sample of a kind is added or the last one is removed."""
        number, tokens = kind
        self.present[number] ^= 1 << tokens
        self.mirrored[number] ^= 1 << (self.row_length - tokens)
