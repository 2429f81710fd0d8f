"""A tensor in a file."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class StoredTensor(NamedTuple):
    """What is known of it without reading it, and how it is read, each time anew."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it: `F32`, `BF16`, ...
    read: Callable[[], np.ndarray]
