"""Stopping a client: nothing new is sent, and answers under way, which are paid for, are waited for."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The client was stopped while a request waited to be sent."""


class Stop(asyncio.Event):
    """Set to stop the client."""

    async def interrupts(self, awaitable: Awaitable[None]) -> None:
        """Awaits, but raises `Stopped` as soon as the event is set."""
        waiting, stopping = asyncio.ensure_future(awaitable), asyncio.ensure_future(self.wait())
        try:
            await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise Stopped
            waiting.result()
        finally:
            waiting.cancel()
            stopping.cancel()


@contextlib.contextmanager
def stopped_by_signals(stop: Stop) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM sets `stop`, a second one ends the process. Yields the list of signals received."""
    loop, received = asyncio.get_running_loop(), []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])

    def handle(number: int) -> None:
        received.append(number)
        stop.set()
        restore()
        print("waiting for the answers under way, which are paid for; once more gives them up", file=sys.stderr)

    for number in SIGNALS:
        loop.add_signal_handler(number, handle, number)
    try:
        yield received
    finally:
        restore()
