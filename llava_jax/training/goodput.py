"""Accounts for the time of a run over all its starts: `goodput.json` in the workdir.

Every second is charged to one of `KINDS`, so they add up to the time that the run was up. "step" is the time that the
loop waits for the device. What the device computes while the host waits for data is charged to "data".
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from etils import epath

from llava_jax.cli import UserError, warn
from llava_jax.files.reading import read_object
from llava_jax.files.writing import write_json

Item = TypeVar("Item")

# "setup" is what is charged to no other kind before the loop, "step" within it.
KINDS = ("setup", "compile", "data", "step", "checkpoint", "evaluation", "profile")


class Goodput:
    """Charges time from its creation on; `open` adds the account of earlier starts of the run.

    The file is written every `every` seconds and at the end, so a SIGKILL loses less than that.
    """

    def __init__(self, every: float = 60.0):
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.starts, self.step, self.steps_done, self.steps_repeated = 1, 0, 0, 0
        self.every, self.written = every, time.monotonic()
        self.kind, self.since = "setup", time.monotonic()
        self.file: epath.Path | None = None

    def open(self, workdir: epath.Path, start_step: int) -> None:
        """Continues the account of a run that resumes after `start_step`; later steps will be repeated."""
        self.file, self.step = workdir / "goodput.json", start_step
        # A damaged account must not stop the training: it begins anew.
        with contextlib.suppress(UserError, OSError, KeyError, TypeError, AttributeError):
            earlier = read_object(self.file)
            seconds = {kind: earlier["seconds"].get(kind, 0.0) + self.seconds[kind] for kind in KINDS}
            repeated = earlier["steps_repeated"] + max(earlier["step"] - start_step, 0)
            starts, done = self.starts + earlier["starts"], self.steps_done + earlier["steps_done"]
            self.seconds, self.starts, self.steps_done, self.steps_repeated = seconds, starts, done, repeated

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Charges the time within to `kind`."""
        self._charge()
        outer, self.kind = self.kind, kind
        try:
            yield
        finally:
            self._charge()
            self.kind = outer

    def waiting(self, kind: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items and charges the time of waiting for them to `kind`."""
        iterator, end = iter(items), object()
        while True:
            with self.measure(kind):
                item = next(iterator, end)
            if item is end:
                return
            yield item

    def step_seconds(self) -> float:
        """The seconds of all steps and of waiting for their data so far, without compiling, saving and evaluating."""
        self._charge()
        return self.seconds["step"] + self.seconds["data"]

    def done(self, step: int) -> None:
        """Counts a step whose metrics are known."""
        self.step, self.steps_done = step, self.steps_done + 1
        if time.monotonic() - self.written >= self.every:
            self.write()

    def write(self) -> None:
        """Writes the file atomically, on process 0."""
        self._charge()
        self.written = time.monotonic()
        if self.file is None or jax.process_index() != 0:
            return
        try:
            write_json(self.file, self.account())
        except Exception as error:  # of any remote client; it must not stop the training
            warn(f"{self.file}: cannot be written now: {error}")

    def account(self) -> dict:
        """The content of the file. `goodput` is the share of the time that went into steps that were not repeated."""
        total = sum(self.seconds.values())
        kept = 1 - self.steps_repeated / max(self.steps_done, 1)
        return {
            "starts": self.starts,
            "step": self.step,
            "steps_done": self.steps_done,
            "steps_repeated": self.steps_repeated,
            "seconds": {kind: round(seconds, 3) for kind, seconds in self.seconds.items()},
            "goodput": round(self.seconds["step"] * kept / max(total, 1e-9), 4),
        }

    def summary(self) -> str:
        """The account in one line."""
        self._charge()
        total, account = sum(self.seconds.values()), self.account()
        parts = [f"{kind} {seconds:,.0f} s" for kind, seconds in self.seconds.items() if seconds >= 0.5]
        times = f"{self.starts} start{'s' if self.starts > 1 else ''}"
        return f"goodput {account['goodput']:.0%} of {total:,.0f} s in {times}: {', '.join(parts)}"

    def _charge(self) -> None:
        now = time.monotonic()
        self.seconds[self.kind] += now - self.since
        self.since = now
