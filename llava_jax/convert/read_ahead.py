"""Calls functions in threads, ahead of the consumer of their results."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
AHEAD = 2  # calls that run or have a result in memory which has not been taken


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
