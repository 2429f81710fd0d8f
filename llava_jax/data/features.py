"""Which features of the vision tower an image has in the sequence, and in which order."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# In an index of features, instead of tile x P + patch:
TEXT = -1  # a word
NEWLINE = -2  # the learned newline of AnyRes


class Size(NamedTuple):
    """Of an image in pixels, upright."""

    width: int
    height: int


class Features(NamedTuple):
    """What an image has in the sequence.

    Attributes:
      index: int32[N], tile x P + patch or `NEWLINE`; read-only.
      tiles: that the tower computes for it.
    """

    index: np.ndarray
    tiles: int


def joined(images: Iterable[Features], tokens: int) -> np.ndarray:
    """The index of several images whose tiles follow each other, `tokens` features (P) a tile; int32[N]."""
    parts, tiles = [np.zeros(0, np.int32)], 0
    for image in images:
        parts.append(shifted(image.index, tiles * tokens))
        tiles += image.tiles
    return np.concatenate(parts)


def shifted(index: np.ndarray, offset: int) -> np.ndarray:
    """An index of features that come after `offset` others."""
    return np.where(index < 0, index, index + offset)
