"""Batches of one modality, like those of `group_by_modality_length` in the published code."""

import functools
from dataclasses import dataclass

import numpy as np

from llava_jax.data.plan import Lengths, Order, permutation


@dataclass(frozen=True, eq=False, kw_only=True)
class ModalityOrder(Order):
    """Takes one sample a row, in batches whose samples all have images or all have none.

    The samples of each kind are split into batches in the shuffled order of the epoch; then the batches are shuffled.
    The remaining samples of both kinds form the last batches of the epoch, which has as many batches as without
    grouping. The samples of a batch are dealt to its groups, the longest first, so that the groups are equally long.
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
        full = len(kind) - len(kind) % order.batch_rows
        batches.append(kind[:full].reshape(-1, order.batch_rows))
        rest.append(kind[full:])
    batches = np.concatenate(batches)
    if order.seed is not None:
        batches = batches[permutation(len(batches), "modality", order.seed, epoch)]
    return np.concatenate([_dealt(order, batches).ravel(), *rest])


def _dealt(order: ModalityOrder, batches: np.ndarray) -> np.ndarray:
    """Orders the rows of each batch, int[n, B]: they are dealt to the groups to and fro, the longest first."""
    longest_first = np.argsort(-order.lengths.tokens[batches], axis=1, kind="stable")
    groups = order.batch_rows // order.rows_per_group
    turn, place = np.divmod(np.arange(order.batch_rows), groups)
    group = np.where(turn % 2, groups - 1 - place, place)
    dealt = np.empty_like(batches)
    dealt[:, group * order.rows_per_group + turn] = np.take_along_axis(batches, longest_first, axis=1)
    return dealt
