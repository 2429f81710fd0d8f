"""A tensor in a file."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from llava_jax.cli import UserError

# The types of numbers, in safetensors' words and in numpy's.
NUMBERS = {
    name: np.dtype(numbers)
    for name, numbers in (
        *(("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("F64", np.float64)),
        *(("I64", np.int64), ("I32", np.int32), ("I16", np.int16), ("I8", np.int8), ("U8", np.uint8)),
        ("BOOL", np.bool_),
    )
}


class StoredTensor(NamedTuple):
    """What is known of it without reading it, and how it is read, each time anew."""

    shape: tuple[int, ...]
    dtype: str  # a key of `NUMBERS`, or a type that nothing here reads
    read: Callable[[], np.ndarray]


def read_numbers(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array that begins at byte `offset`.

    Read and not mapped: of a mapped file that becomes shorter, the system kills who reads on. Raises UserError where it
    has become shorter since it was opened, and for a type that nothing here reads.
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
