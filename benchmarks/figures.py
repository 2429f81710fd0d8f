"""What benchmarks measure, as numbers that `bench.py` collects, and the limits of the machine beside them."""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_jax.files.writing import atomic_file

BUFFER = 2**28  # bytes, more than any cache holds
WIDTHS = (2048, 4096)  # of square matrices


class Figure(NamedTuple):
    """One comparison.

    Attributes:
      what: the work.
      unit: of all numbers: "s" where less is better, else a rate.
      sides: what each run of each side measured; ours first.
      limit: what this machine allows at most, in the same unit; 0 where it is not known.
      limited_by: the limit in words.
    """

    what: str
    unit: str
    sides: dict[str, list[float]]
    limit: float = 0.0
    limited_by: str = ""

    def best(self, side: str) -> float:
        return (min if self.unit == "s" else max)(self.sides[side])

    def median(self, side: str) -> float:
        return statistics.median(self.sides[side])

    def ratio(self, one: str, other: str) -> tuple[float, float]:
        """How much faster `one` is than `other`: by the medians, and by the best runs."""
        medians, bests = ([value(one), value(other)] for value in (self.median, self.best))
        return tuple(b / a if self.unit == "s" else a / b for a, b in (medians, bests))


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures, too")


def write(path: Path | None, figures: list[Figure]) -> None:
    if path is not None:
        with atomic_file(path) as file:
            file.write(json.dumps([figure._asdict() for figure in figures], indent=1).encode() + b"\n")


def read(path: Path) -> list[Figure]:
    return [Figure(**figure) for figure in json.loads(path.read_text())]


def read_bandwidth() -> float:
    """Bytes a second that all cores together read of a buffer larger than any cache."""
    buffer = np.ones(BUFFER // 4, np.float32)
    with ThreadPoolExecutor() as pool:
        parts = np.array_split(buffer, os.cpu_count())
        before = time.perf_counter()
        list(pool.map(np.sum, parts))
        return buffer.nbytes / (time.perf_counter() - before)


def matmul_rate() -> float:
    """FLOPs a second of products of large float32 matrices: the best of NumPy's and torch's libraries."""
    import torch

    best = 0.0
    for width in WIDTHS:
        matrix = np.ones((width, width), np.float32)
        tensor = torch.from_numpy(matrix)
        for multiply, operand in ((np.matmul, matrix), (torch.matmul, tensor)):
            before = time.perf_counter()
            multiply(operand, operand)
            best = max(best, 2 * width**3 / (time.perf_counter() - before))
    return best
