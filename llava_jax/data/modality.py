"""Batches of one modality, as the original's `group_by_modality_length` makes them."""

import functools
from dataclasses import dataclass

import numpy as np

from llava_jax.data.plan import Lengths, Order, permutation


@dataclass(frozen=True, eq=False, kw_only=True)
class ModalityOrder(Order):
    """One sample a row, in batches of samples that all have images or all have none.

    Samples of each kind keep the shuffled order of the epoch until they are cut into batches, and these are shuffled.
    What is left of both kinds at the end goes together into the last batches of the epoch, of which there are so many
    as without grouping. In a batch the samples are dealt to the groups, the longest first, so that these are equally
    long.
    """

    lengths: Lengths  # of all samples that are indexed
    rows_per_group: int  # `batch_rows` is a multiple

    def visits(self, epoch: int, part: slice = slice(None)) -> np.ndarray:
        return _grouped(self, epoch)[part]


@functools.lru_cache(maxsize=4)
def _grouped(order: ModalityOrder, epoch: int) -> np.ndarray:
    shuffled = Order.visits(order, epoch)
    with_images = order.lengths.images[shuffled] > 0
    batches, rest = [], []
    for kind in (shuffled[with_images], shuffled[~with_images]):
        whole = len(kind) - len(kind) % order.batch_rows
        batches.append(kind[:whole].reshape(-1, order.batch_rows))
        rest.append(kind[whole:])
    batches = np.concatenate(batches)
    if order.seed is not None:
        batches = batches[permutation(len(batches), "modality", order.seed, epoch)]
    return np.concatenate([_dealt(order, batches).ravel(), *rest])


def _dealt(order: ModalityOrder, batches: np.ndarray) -> np.ndarray:
    """The rows of each batch, int[n, B], so that its groups are equally long: dealt to and fro, the longest first."""
    longest_first = np.argsort(-order.lengths.tokens[batches], axis=1, kind="stable")
    groups = order.batch_rows // order.rows_per_group
    turn, place = np.divmod(np.arange(order.batch_rows), groups)
    group = np.where(turn % 2, groups - 1 - place, place)
    dealt = np.empty_like(batches)
    dealt[:, group * order.rows_per_group + turn] = np.take_along_axis(batches, longest_first, axis=1)
    return dealt
