"""Signals that stop a client: what is paid for is waited for."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator

from llava_jax.llm_api.client import Client

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stopped_by_signals(client: Client) -> Iterator[list[int]]:
    """Within, the first SIGINT or SIGTERM stops the client, and a second one ends the process; yields those caught."""
    loop, caught = asyncio.get_running_loop(), []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])

    def stop(number: int) -> None:
        caught.append(number)
        client.stop.set()
        restore()
        print("waiting for the answers under way, which are paid for; once more gives them up", file=sys.stderr)

    for number in SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        yield caught
    finally:
        restore()
