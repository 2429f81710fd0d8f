"""What a run writes down: files of lines, TensorBoard, Weights & Biases where asked, one line or bar on the screen."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from rich.console import Console

from llava_jax.cli import WIDTH, UserError, draws_bars, fitting, printable, progress_bar, say, time_left, warn
from llava_jax.files.reading import loads, require_regular
from llava_jax.files.writing import atomic_file
from llava_jax.remote import is_remote, new_local, upload

METRICS, BAD_SAMPLES = "metrics.jsonl", "bad_samples.jsonl"
UPLOAD_SECONDS = 60


class MetricsWriter:
    """Appends to `metrics.jsonl` and others, TensorBoard and `tracker`, a `wandb.Run` or None.

    What an interrupted run wrote beyond `start_step` is dropped (by W&B what is written again is), and all of it where
    the run begins anew. Object stores cannot append, so logs for a remote workdir are written locally and copied there
    every `UPLOAD_SECONDS`, in the background, and on `flush` and `close`. `check` is called before a line is written.
    """

    def __init__(
        self,
        workdir: epath.Path,
        start_step: int,
        tracker: Any | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self.workdir, self.check = workdir, check
        self.local = new_local() if is_remote(workdir) else workdir
        self.uploads = ThreadPoolExecutor(max_workers=1) if is_remote(workdir) else None
        self.last_upload = time.monotonic()
        for name in (METRICS, BAD_SAMPLES):
            if (workdir / name).exists():
                keep_lines(workdir / name, self.local / name, start_step)
        from tensorboardX import SummaryWriter  # and torch where it is installed, which takes seconds

        self.board = SummaryWriter(str(self.local / "tensorboard"), purge_step=start_step + 1)
        self.tracker = tracker

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.append(METRICS, {"step": step} | dict(metrics))
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(dict(metrics), step=step)
        if time.monotonic() - self.last_upload > UPLOAD_SECONDS:
            self.flush()

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Adds a line, which has a `step`, to a file of lines: all of it or nothing."""
        self.check()
        file, data = self.local / name, json.dumps(line).encode() + b"\n"
        before = os.path.getsize(file) if file.exists() else 0
        try:
            with file.open("ab") as end:
                end.write(data)
        except OSError as error:  # a full disk takes a part
            os.truncate(file, before)
            raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error

    def read(self, name: str) -> list[dict[str, Any]]:
        """The lines of such a file so far."""
        file = self.local / name
        return [loads(line, strict=False) for line in file.read_bytes().splitlines()] if file.exists() else []

    def flush(self) -> None:
        """Begins to copy to a remote workdir what is there by now."""
        if self.uploads:
            self.board.flush()
            self.last_upload = time.monotonic()
            self.uploads.submit(self._upload)

    def _upload(self) -> None:
        try:
            self.check()
            upload(self.local, self.workdir)
        except Exception as error:  # of whichever client; the next upload brings what this one did not
            warn(f"{self.workdir}: logs cannot be uploaded now: {error}")

    def close(self) -> None:
        self.board.close()
        if self.tracker:
            self.tracker.finish()
        if self.uploads:
            self.uploads.shutdown(wait=True)
            self._upload()


def keep_lines(source: epath.Path, target: epath.Path, last: int) -> None:
    """Leaves in `target` the lines of `source` up to step `last`, none for 0, and says how many were damaged.

    `target`, which may be the same file, is replaced, or not touched where it stays as it is.
    """
    require_regular(source)
    data = source.read_bytes()
    steps = [(step_of(line), line) for line in data.splitlines()]
    if damaged := sum(not math.isfinite(step) for step, _ in steps):
        say(f"{source}: dropped {damaged} damaged line{'s' * (damaged > 1)}, as a crash leaves them", file=sys.stderr)
    kept = b"".join(line + b"\n" for step, line in steps if last and step <= last)
    if kept != data or target != source:
        with atomic_file(target) as file:
            file.write(kept)


def step_of(line: bytes) -> float:
    """The step of a line of `metrics.jsonl`, infinite where a crash has cut the line off or left other bytes."""
    try:
        return float(loads(line, strict=False)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Screen:
    """A progress bar with the newest figures on a terminal, a line every few seconds elsewhere.

    Each is one line with the step, the number of steps and the time left first, and then as many figures as fit.
    """

    def __init__(self, start_step: int, steps: int, every: float = 5.0):
        self.steps, self.every, self.last = steps, every, 0.0
        self.begun: tuple[int, float] | None = None  # the first step that was shown, and when: it was compiled before
        console = Console(stderr=True)
        self.bar = progress_bar(console) if draws_bars(console) else None
        if self.bar:
            self.task = self.bar.add_task("training", total=steps, completed=start_step)
            self.bar.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        self.begun = self.begun or (step, now)
        if self.bar:
            counted = 2 * len(f"{self.steps}") + len("/ 0:00:00 left ---------- ")
            figures = fitting(_figures(metrics), max(self.bar.console.width - counted, 1))
            self.bar.update(self.task, completed=step, description=figures)
        elif step == self.steps or now - self.last >= self.every:
            self.last = now
            first, began = self.begun
            left = time_left((now - began) / (step - first) * (self.steps - step)) if step > first else "-:--:--"
            self.say(fitting([f"step {step}/{self.steps}, {left} left", *_figures(metrics)], WIDTH))

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(printable(text), highlight=False, markup=False)
        else:
            say(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def _figures(metrics: Mapping[str, float]) -> Iterator[str]:
    """The figures of a step for the screen, those that are looked at most first."""
    yield f"loss {metrics['loss']:.4f}"
    yield f"{metrics['tokens_per_second']:,.0f} tokens/s"
    yield f"lr {metrics['learning_rate']:.2e}"
    yield f"grad {metrics['grad_norm']:.2f}"
    if "mfu_full" in metrics:
        yield f"MFU {metrics['mfu_full']:.1%}"
        yield f"(causal {metrics['mfu_causal']:.1%})"
    yield f"{metrics['images_per_second']:.1f} images/s"
    yield f"learned {metrics['learned_share']:.0%}"
    yield f"padding {metrics['padding_share']:.0%}"
