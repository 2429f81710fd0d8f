"""A tensor in a file."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

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
    """The array that begins at byte `offset`.

    The file is not mapped into memory: what is mapped stays there as long as there is room, in the end all of it.
    """
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return np.fromfile(file, NUMBERS[dtype], math.prod(shape)).reshape(shape)
