"""Signal handling: SIGTERM and SIGINT stop a run after the current step, which is saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StopRequest:
    """The signal that asked the run to stop, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextlib.contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Within, SIGTERM and SIGINT only set the request, so that the step can end and be saved; a second one interrupts.

    Python sets handlers in the main thread only: in any other thread none is set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: Any) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
