"""Work done in other threads than what takes its results."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
AHEAD = 2  # results that are made while others are taken: no more of them are in memory


def read_ahead(reads: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """Calls each, and yields the results in their order."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = collections.deque()
        for read in reads:
            waiting.append(pool.submit(read))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
