"""Tensors in files."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from llava_jax.cli import UserError

# The types of numbers by their names in safetensors files.
NUMBERS = {
    name: np.dtype(numbers)
    for name, numbers in (
        *(("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("F64", np.float64)),
        *(("I64", np.int64), ("I32", np.int32), ("I16", np.int16), ("I8", np.int8), ("U8", np.uint8)),
        ("BOOL", np.bool_),
    )
}
WEIGHTS = ("F32", "BF16", "F16")  # types that weights have

NAMES = {numbers.name: name for name, numbers in NUMBERS.items()}  # "float32" -> "F32"


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
