"""Which samples share a row and which rows a group, planned from lengths before training.

The plan of an epoch is a pure function of lengths, seed and epoch. Rows are planned one after the other, group by
group. A row begins with samples drawn in the shuffled order of the epoch and is closed by the sample, or the pair of
them, that leaves the least of it free, as much alike in length as possible, so that what is left over stays a mixture.
Draws go through the numbers of images (none, one, ...) in proportion to what there is of each: else samples without
images would clump in some groups, and be missing where a group's image slots are used up but its positions are not.
Then the groups are shuffled. Samples of equal tokens and images are interchangeable: their order is the epoch's.
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
from llava_jax.data.plan import Lengths, Order, Rows, permutation
from llava_jax.data.sources import Sample

# A row is drawn while more than so many mean lengths of it are free: the last two samples are chosen, not drawn.
DRAW = 2.5
# A pair that leaves more than so many positions free is not looked for, the longest single sample being as good.
SLACK = 4
# Image slots are chosen by plans of so many samples: more would say the same.
CHOSEN_BY = 100_000


class Room(NamedTuple):
    """What rows and groups hold."""

    row_length: int  # positions of a row
    rows_per_group: int
    image_slots: int  # of a group


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedOrder(Order):
    """Several samples a row; every sample once an epoch, the last group and batch filled up with empty rows.

    Epochs may differ by a step or so. A sample of no tokens, as skipped ones are, may stand in any row.
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
        whole = int(epochs)
        part = math.ceil(self.epoch_steps(whole) * (epochs - whole)) if epochs > whole else 0
        return sum(map(self.epoch_steps, range(whole))) + part

    def _plan(self, epoch: int) -> Rows:
        samples = self.visits(epoch)
        groups = pack(self.lengths.tokens[samples], self.lengths.images[samples], self.room)
        if self.seed is not None:
            groups = [groups[i] for i in permutation(len(groups), "groups", self.seed, epoch)]
        rows = [row for group in groups for row in group]
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)
        return Rows(samples[np.array([i for row in rows for i in row], np.int64)].astype(np.int32), starts)


class Fill(NamedTuple):
    """How full the rows and groups of an epoch are, in parts of 1; without the rows that fill up its last batch."""

    rows: int
    groups: int
    samples_a_row: float
    tokens: float  # of positions
    images: float  # of image slots
    labels: float  # of label slots, if a group has as many as any of them needs
    label_slots: int

    @property
    def whole(self) -> float:
        """What is used of both positions and image slots: the aim of `image_slot_plans`."""
        return self.tokens * self.images


def fill(order: PackedOrder, epoch: int = 0) -> Fill:
    """Measures the plan of an epoch."""
    rows, room = order.epoch_rows(epoch), order.room
    groups = rows.count // room.rows_per_group
    targets = rows.sums(order.lengths.targets).reshape(groups, -1).sum(1)
    images = int(rows.sums(order.lengths.images).sum())
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
    """Packs all into the same room, whose image slots are chosen for the first of them where they are 0.

    Raises UserError for a sample of `source` that has more images than a group slots.
    """
    indices = np.concatenate([order.indices for order in orders])
    richest = int(indices[np.argmax(lengths.images[indices])])
    least, slots = int(lengths.images[richest]), max(room.image_slots, 0)  # -1 asks for none
    if room.image_slots == 0:
        some = dataclasses.replace(orders[0], samples=orders[0].visits(0)[:CHOSEN_BY])
        slots = max(image_slot_plans(some, lengths, room.row_length, room.rows_per_group)[0].room.image_slots, least)
    if least > slots:
        raise UserError(f"sample {source[richest].id}: has {least} images, more than image_slots={slots} of a group")
    return [pack_order(order, lengths, room.row_length, room.rows_per_group, slots) for order in orders]


def pack_order(order: Order, lengths: Lengths, row_length: int, rows_per_group: int, image_slots: int) -> PackedOrder:
    """The samples of an order, several in a row. Raises ValueError where one has more images than a group slots."""
    most = lengths.images[order.indices].max(initial=0)
    if most > image_slots:
        raise ValueError(f"a sample has {most} images, a group {image_slots} slots")
    return PackedOrder(
        **{field.name: getattr(order, field.name) for field in fields(Order)},
        lengths=lengths,
        room=Room(row_length, rows_per_group, image_slots),
    )


def image_slot_plans(order: Order, lengths: Lengths, row_length: int, rows_per_group: int) -> list[PackedOrder]:
    """Plans with the image slots that may be best, planned for the first epoch, the best first.

    As many slots as images come with as many tokens as a group has positions are too many, since some positions stay
    free. The numbers next to what groups then hold trade free positions for free slots; the best plan uses the most
    of both, that is of their product.
    """
    visited, least = order.visited(0), int(lengths.images[order.indices].max(initial=0))
    tokens, images = int(lengths.tokens[visited].sum()), int(lengths.images[visited].sum())
    most = math.ceil(images * row_length * rows_per_group / max(tokens, 1))
    plans = [pack_order(order, lengths, row_length, rows_per_group, max(most, least))]
    held = images / fill(plans[0]).groups
    for slots in {max(math.floor(held), least), max(math.ceil(held), least)} - {plans[0].room.image_slots}:
        plans.append(pack_order(order, lengths, row_length, rows_per_group, slots))
    return sorted(plans, key=lambda plan: (-fill(plan).whole, plan.room.image_slots))


def pack(tokens: np.ndarray, images: np.ndarray, room: Room) -> list[list[list[int]]]:
    """Groups of rows of samples, by their `tokens` and `images`, int[N]: none has more tokens than a row or more images
    than a group. Samples are numbered as they are given, which is the order of the draws."""
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
    """Takes the samples of an empty row from the pool: drawn ones may use all `slots`, others `share` of them."""
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


Kind = tuple[int, int]  # images and tokens of samples that are interchangeable


class _Pool:
    """The samples that are not placed yet.

    Bit L of `present[n]` says whether a sample of n images and L tokens is left, and so does bit row_length - L of
    `mirrored[n]`: so a shift and an AND find all pairs of samples that add up to a number of tokens.
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
        """The kind of the next sample in order, among those of the number of images that is furthest behind."""
        left, shares, count = self.left, self.shares, self.count
        number = max((n for n in self.numbers if left[n]), key=lambda n: left[n] - shares[n] * count)
        queue = self.queues[number]
        while self.placed[queue[-1]]:
            queue.pop()
        return self.kinds[queue[-1]]

    def take(self, kind: Kind) -> int:
        """Places the next sample of a kind, which is returned."""
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
        """The kind, or the two, of which samples leave the least of so many positions free; none if none fits."""
        single = max(((self._longest(n, free), n) for n in self.numbers if n <= slots), default=(-1, 0))
        if single[0] < 0:
            return ()
        if self._any_pair(free, slots):
            for tokens in range(free, max(single[0], free - SLACK), -1):
                if pair := self._pair(tokens, slots):
                    return pair
        return (single[::-1],)

    def _longest(self, number: int, free: int) -> int:
        """The most tokens, up to `free`, of a sample left with so many images; -1 without one."""
        return (self.present[number] & ((2 << free) - 1)).bit_length() - 1

    def _any_pair(self, free: int, slots: int) -> bool:
        """Whether it is worth looking for pairs that leave less than `SLACK` positions free."""
        numbers = [n for n in self.numbers if n <= slots]
        present = functools.reduce(operator.or_, (self.present[n] for n in numbers), 0)
        mirrored = functools.reduce(operator.or_, (self.mirrored[n] for n in numbers), 0) >> (self.row_length - free)
        for slack in (1, 2):
            mirrored |= mirrored >> slack
        return bool(present & mirrored)

    def _pair(self, tokens: int, slots: int) -> tuple[Kind, ...]:
        """Two kinds that have so many tokens together, as much alike as possible; empty without."""
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
        """After the first sample of a kind has come, or the last has gone."""
        number, tokens = kind
        self.present[number] ^= 1 << tokens
        self.mirrored[number] ^= 1 << (self.row_length - tokens)
