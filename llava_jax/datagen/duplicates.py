"""Finds near-duplicates of earlier texts by MinHash. The result depends on the texts and their order alone.

The signature of a text is the minimum of each of many hash functions over its runs of words. The share of it in which
two texts agree estimates the Jaccard similarity of their runs. Only texts that agree in a whole band of their
signatures are compared, which texts above the threshold nearly always do.
"""

import collections
import re
import zlib
from collections.abc import Iterable

import numpy as np

RUN = 4  # words
BANDS, ROWS = 16, 4  # pairs of similarity 0.7 are compared with probability 0.988, of 0.8 with 0.9998, of 0.3 with 0.12
THRESHOLD = 0.7

_WORDS = re.compile(r"\w+")
_FACTORS, _TERMS = np.random.default_rng(0).integers(1 << 63, 1 << 64, (2, BANDS * ROWS), np.uint64)


def signature(text: str) -> np.ndarray:
    """uint32[BANDS * ROWS]"""
    words = _WORDS.findall(text.casefold())
    runs = {" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}
    hashes = np.fromiter((zlib.crc32(run.encode()) for run in runs), np.uint64, len(runs))
    # Multiply-shift: the upper half of a product modulo 2^64 is as good as random.
    return ((hashes[:, None] * _FACTORS + _TERMS) >> np.uint64(32)).min(axis=0).astype(np.uint32)


def near_duplicates(texts: Iterable[str]) -> dict[int, int]:
    """The near-duplicates, each with the earlier text that it repeats, which is no near-duplicate itself."""
    signatures = np.fromiter(map(signature, texts), np.dtype((np.uint32, BANDS * ROWS)))
    bands = [_shared(signatures[:, start : start + ROWS]) for start in range(0, BANDS * ROWS, ROWS)]
    kept: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    found = {}
    for i in sorted({int(i) for band in bands for i in np.flatnonzero(band >= 0)}):
        keys = [(number, int(band[i])) for number, band in enumerate(bands) if band[i] >= 0]
        earlier = np.array(sorted({j for key in keys for j in kept[key]}), np.int64)
        alike = (signatures[earlier] == signatures[i]).mean(axis=1) >= THRESHOLD
        if alike.any():
            found[i] = int(earlier[alike.argmax()])
            continue
        for key in keys:
            kept[key].append(i)
    return found


def _shared(band: np.ndarray) -> np.ndarray:
    """int64[N]: a number for each repeated row of uint32[N, ROWS], -1 for the others."""
    if not len(band):
        return np.empty(0, np.int64)
    _, numbers, counts = np.unique(band, axis=0, return_inverse=True, return_counts=True)
    return np.where(counts[numbers.ravel()] > 1, numbers.ravel(), -1)
