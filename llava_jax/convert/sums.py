"""Weights that are sums: a base and a stored difference, or a matrix and more rows.

Sums are computed when a tensor is read, so that one of them is in memory at a time.
"""

import functools

import numpy as np

from llava_jax.cli import UserError
from llava_jax.convert.stored_tensor import StoredTensor, Tensors

FINAL_NORM = "model.norm.weight"
_NO_NORM = 0.1  # weights of a final norm are about 1, in a difference of two models about 0


def is_difference(tensors: Tensors) -> bool:
    """Whether a decoder is stored as its difference from another."""
    if FINAL_NORM not in tensors:
        return False
    return bool(np.abs(tensors[FINAL_NORM].read().astype(np.float32)).max(initial=0) < _NO_NORM)


def with_base(difference: Tensors, base: Tensors, where: str) -> Tensors:
    """Adds the base to each tensor that both have, in the type of the difference, which may have more rows.

    Raises UserError if other axes differ.
    """
    held = dict(difference)
    for name in (name for name in base if name in difference):
        ours, theirs = difference[name].shape, base[name].shape
        if ours[1:] != theirs[1:] or ours[:1] < theirs[:1]:
            raise UserError(f"{where}: {name} is {ours}, of the base {theirs}: it is for another model")
        held[name] = held[name]._replace(read=functools.partial(_summed, difference[name], base[name]))
    return held


def with_rows(tensor: StoredTensor, rows: int) -> StoredTensor:
    """The tensor with `rows` rows. New ones are the mean of the others: a row of zeros could have the largest logit."""
    return tensor._replace(shape=(rows, *tensor.shape[1:]), read=lambda: resized(tensor.read(), rows))


def concatenated(first: StoredTensor, second: StoredTensor) -> StoredTensor:
    """The rows of both tensors, in the type of the first."""
    shape = (first.shape[0] + second.shape[0], *first.shape[1:])

    def read() -> np.ndarray:
        values = first.read()
        return np.concatenate([values, second.read().astype(values.dtype)])

    return first._replace(shape=shape, read=read)


def _summed(difference: StoredTensor, base: StoredTensor) -> np.ndarray:
    values = np.array(difference.read())
    added = base.read().astype(values.dtype)
    values[: len(added)] += added
    return values


def resized(values: np.ndarray, rows: int) -> np.ndarray:
    """The values of `with_rows`."""
    if rows <= len(values):
        return values[:rows]
    mean = values.mean(axis=0, keepdims=True, dtype=np.float32).astype(values.dtype)
    return np.concatenate([values, np.repeat(mean, rows - len(values), axis=0)])
