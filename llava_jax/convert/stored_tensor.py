"""A tensor in a file."""

import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from llava_jax.cli import UserError

# The types of numbers, in safetensors' words and in numpy's.
NUMBERS = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class StoredTensor(NamedTuple):
    """What is known of it without reading it, and how it is read, each time anew."""

    shape: tuple[int, ...]
    dtype: str  # a key of `NUMBERS`, or a type that nothing here reads
    read: Callable[[], np.ndarray]


def read_numbers(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array that begins at byte `offset`, not to be written to.

    Its bytes alone are mapped into memory, and only as long as it lives. A mapping of the whole file, which the
    safetensors library makes, would stay there as long as there is room: in the end all of it. Raises UserError where
    the file has become shorter since it was opened.
    """
    numbers, count = NUMBERS[dtype], math.prod(shape)
    if not count:
        return np.empty(shape, numbers)
    start = offset % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        size = count * numbers.itemsize
        if os.fstat(file.fileno()).st_size < offset + size:
            raise UserError(f"{path}: was cut short while it was read; download it again")
        mapped = mmap.mmap(file.fileno(), start + size, access=mmap.ACCESS_READ, offset=offset - start)
    mapped.madvise(mmap.MADV_WILLNEED)  # from disk in large steps, ahead of the reader
    return np.frombuffer(mapped, numbers, count, start).reshape(shape)
