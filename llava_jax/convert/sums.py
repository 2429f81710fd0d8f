"""Models that are stored as what is to be added to another: differences from a base, rows of tokens.

Sums are taken when a tensor is read, so that there is one at a time.
"""

import functools

import numpy as np

from llava_jax.cli import UserError
from llava_jax.convert.stored_tensor import StoredTensor
from llava_jax.convert.tensors import Tensors

FINAL_NORM = "model.norm.weight"
_NO_NORM = 0.1  # the final norm of a decoder multiplies by about one, a difference of two by about zero


def is_difference(tensors: Tensors) -> bool:
    """Whether a decoder is stored as its difference from another."""
    return FINAL_NORM in tensors and bool(np.abs(tensors.get(FINAL_NORM).astype(np.float32)).max(initial=0) < _NO_NORM)


def with_base(difference: Tensors, base: Tensors, where: str) -> Tensors:
    """Adds the base to each tensor that it has too, in the difference's type: of more rows to the first ones.

    Raises UserError where they do not fit.
    """
    held = {name: difference[name] for name in difference.names}
    for name in base.names:
        if name not in difference:
            continue
        ours, theirs = difference.shape(name), base.shape(name)
        if ours[1:] != theirs[1:] or ours[:1] < theirs[:1]:
            raise UserError(f"{where}: {name} is {ours}, of the base {theirs}: it is for another model")
        held[name] = held[name]._replace(read=functools.partial(_summed, difference[name], base[name]))
    return Tensors(held)


def overlaid(base: Tensors, over: Tensors) -> Tensors:
    """All tensors of both; where both have one, that of `over`."""
    return Tensors({name: base[name] for name in base.names} | {name: over[name] for name in over.names})


def with_rows(tensor: StoredTensor, rows: int) -> StoredTensor:
    """Its first rows, or all of them and further ones: the mean of those that it has, since a row of zeros can win."""
    return tensor._replace(shape=(rows, *tensor.shape[1:]), read=lambda: resized(tensor.read(), rows))


def concatenated(first: StoredTensor, second: StoredTensor) -> StoredTensor:
    """The rows of both, in the type of the first."""
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
    """What `with_rows` reads."""
    if rows <= len(values):
        return values[:rows]
    mean = values.mean(axis=0, keepdims=True, dtype=np.float32).astype(values.dtype)
    return np.concatenate([values, np.repeat(mean, rows - len(values), axis=0)])
