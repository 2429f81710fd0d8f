"""Tensors in files, and sums of them: a base and a stored difference, or a matrix and more rows."""

import collections
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from llava_jax.cli import UserError

# The types of numbers, and their names in safetensors files.
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32"}
NAMES |= {"int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
NUMBERS = {name: np.dtype(getattr(ml_dtypes, numbers, numbers)) for numbers, name in NAMES.items()}
WEIGHTS = ("F32", "BF16", "F16")  # types that weights have
AHEAD = 2  # calls that run or have a result in memory which has not been taken
FINAL_NORM = "model.norm.weight"
_NO_NORM = 0.1  # weights of a final norm are about 1, in a difference of two models about 0

Result = TypeVar("Result")


class StoredTensor(NamedTuple):
    """A tensor that has not been read yet."""

    shape: tuple[int, ...]
    dtype: str  # a key of `NUMBERS`, or a type that is not supported
    read: Callable[[], np.ndarray]  # from the file, each time


Tensors = dict[str, StoredTensor]  # by name


def read_numbers(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array that begins at byte `offset`.

    Read and not mapped: the system kills a process that reads a mapped file beyond its end after it became shorter.
    Raises UserError if it became shorter since it was opened, and for a type that is not supported.
    """
    if dtype not in NUMBERS:
        raise UserError(f"{path}: holds numbers of type {dtype!r}; supported are {', '.join(NUMBERS)}")
    numbers = NUMBERS[dtype]
    data = np.empty(math.prod(shape) * numbers.itemsize, np.uint8)
    with open(path, "rb") as file:
        file.seek(offset)
        if file.readinto(data) < len(data):
            raise UserError(f"{path}: was cut short while it was read; download it again")
    return data.view(numbers).reshape(shape)


def read_ahead(reads: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Calls each function, and yields the results in their order."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = collections.deque()
        for read in reads:
            waiting.append(pool.submit(read))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---------------------------------------------------------------------------------------------------------------- sums
# Computed when a tensor is read, so that one of them is in memory at a time.


def is_difference(tensors: Tensors) -> bool:
    """Whether a decoder is stored as its difference from another."""
    if FINAL_NORM not in tensors:
        return False
    return bool(np.abs(tensors[FINAL_NORM].read().astype(np.float32)).max(initial=0) < _NO_NORM)


def with_base(difference: Tensors, base: Tensors, whole: Iterable[str], where: str) -> Tensors:
    """Adds the base to each tensor, in the type of the difference, which may have more rows.

    Tensors whose names match a pattern of `whole` are stored as they are. Raises UserError if the base does not have
    another one, or if axes other than the first differ.
    """
    held = dict(difference)
    for name in difference:
        if any(re.fullmatch(pattern, name) for pattern in whole):
            continue
        if name not in base:
            raise UserError(f"{where}: {name} is a difference, but the base has no {name}: it is for another model")
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
