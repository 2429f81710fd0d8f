"""Signal handling: SIGTERM and SIGINT stop a run after the current step, which is saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any


@contextlib.contextmanager
def catch_signals() -> Iterator[SimpleNamespace]:
    """Within, SIGTERM and SIGINT only set `signal` of what this yields, else None, so that the step can end and be
    saved; a second one interrupts.

    Python sets handlers in the main thread only: in any other thread none is set.
    """
    request = SimpleNamespace(signal=None)
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
