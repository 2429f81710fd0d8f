"""Writes the metrics of a run: JSON lines, TensorBoard, Weights & Biases, and a line or progress bar on the screen."""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from ml_collections import ConfigDict
from rich.console import Console

from llava_jax.cli import WIDTH, UserError, draws_bars, fitting, printable, progress_bar, say, time_left, warn
from llava_jax.files.reading import loads, require_regular
from llava_jax.files.writing import atomic_file
from llava_jax.remote import is_remote, new_local, upload

METRICS, BAD_SAMPLES = "metrics.jsonl", "bad_samples.jsonl"
UPLOAD_SECONDS = 60
# The charts of TensorBoard's tab "custom scalars" by group, each with the metrics that it shows (regular expressions).
CHARTS = {
    "training": {
        "loss": ("loss$", "validation_loss$"),
        "learning rates": (".*learning_rate",),
        "gradient norm": ("grad_norm$",),
        "scores of evaluations": (".+/.+",),
    },
    "speed": {
        "tokens a second": ("tokens_per_second$",),
        "images and tiles a second": ("images_per_second$", "tiles_per_second$"),
        "seconds a step": ("seconds$",),
        "MFU": ("mfu_.+",),
    },
    "data": {
        "shares of learned tokens and of padding": ("learned_share$", "padding_share$"),
        "bad samples": ("bad_samples$",),
    },
}


class MetricsWriter:
    """Appends to `metrics.jsonl` and `bad_samples.jsonl`, to TensorBoard and to `tracker`, a `wandb.Run` or None.

    Lines of an interrupted run after `start_step` are dropped, and all lines if that is 0; W&B drops what is written
    again. Object stores cannot append: the logs of a remote workdir are written locally and copied in the background,
    every `UPLOAD_SECONDS`, on `flush` and on `close`. `check` is called before a line is written.
    """

    def __init__(
        self, workdir: epath.Path, start_step: int, tracker: Any | None = None, check: Callable[[], None] = lambda: None
    ):
        self.workdir, self.check = workdir, check
        self.local = new_local() if is_remote(workdir) else workdir
        self.uploads = ThreadPoolExecutor(max_workers=1) if is_remote(workdir) else None
        self.last_upload = time.monotonic()
        for name in (METRICS, BAD_SAMPLES):
            if (workdir / name).exists():
                keep_lines(workdir / name, self.local / name, start_step)
        from tensorboardX import SummaryWriter  # slow: it imports torch if that is installed

        self.board = SummaryWriter(str(self.local / "tensorboard"), purge_step=start_step + 1)
        self.board.add_custom_scalars(
            {
                group: {title: ["Multiline", list(metrics)] for title, metrics in charts.items()}
                for group, charts in CHARTS.items()
            }
        )
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
        """Appends a line, which has a `step`, to a file, or raises UserError and leaves the file as it was."""
        self.check()
        file, data = self.local / name, json.dumps(line).encode() + b"\n"
        before = os.path.getsize(file) if file.exists() else 0
        try:
            with file.open("ab") as end:
                end.write(data)
        except OSError as error:  # a full disk takes a part of the line
            os.truncate(file, before)
            raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error

    def read(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file so far."""
        file = self.local / name
        return [loads(line, strict=False) for line in file.read_bytes().splitlines()] if file.exists() else []

    def flush(self) -> None:
        """Begins to copy the logs to a remote workdir."""
        if self.uploads:
            self.board.flush()
            self.last_upload = time.monotonic()
            self.uploads.submit(self._upload)

    def _upload(self) -> None:
        try:
            self.check()
            upload(self.local, self.workdir)
        except Exception as error:  # of any remote client; the next upload copies everything again
            warn(f"{self.workdir}: logs cannot be uploaded now: {error}")

    def close(self) -> None:
        self.board.close()
        if self.tracker:
            self.tracker.finish()
        if self.uploads:
            self.uploads.shutdown(wait=True)
            self._upload()


def start_tracking(config: ConfigDict, workdir: epath.Path) -> Any | None:
    """The `wandb.Run` of this workdir, which a resume continues; None if `config.wandb.project` is empty.

    W&B's environment variables work: with WANDB_MODE=offline everything stays on disk, for `wandb sync`.
    """
    if not config.wandb.project:
        return None
    import wandb  # an extra, and slow to import

    place = str(workdir) if "://" in str(workdir) else str(workdir.resolve())
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity or None,
        name=config.wandb.name or workdir.name,
        id=hashlib.sha256(place.encode()).hexdigest()[:16],
        resume="allow",
        config=config.to_dict(),
        dir=None if "://" in place else place,
    )


def keep_lines(source: epath.Path, target: epath.Path, last: int) -> None:
    """Writes the lines of `source` up to step `last` to `target`, none for 0, and prints how many were damaged.

    `target` may be the same file, which is not touched if nothing changes.
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
    """The step of a line of `metrics.jsonl`; infinite if the line is damaged, as by a crash."""
    try:
        return float(loads(line, strict=False)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Screen:
    """Shows the newest metrics: a progress bar on a terminal, otherwise a line every few seconds.

    Both are one line: the step, the number of steps and the time left, then as many figures as fit.
    """

    def __init__(self, start_step: int, steps: int, every: float = 5.0):
        self.steps, self.every, self.last = steps, every, 0.0
        self.begun: tuple[int, float] | None = None  # the first step shown, after compilation, and its time
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
    """The figures of a step for the screen, the most important ones first."""
    yield f"loss {metrics['loss']:.4f}"
    yield f"{metrics['tokens_per_second']:,.0f} tokens/s"
    yield f"lr {metrics['learning_rate']:.2e}"
    yield f"grad {metrics['grad_norm']:.2f}"
    if "mfu_full" in metrics:
        yield f"MFU {metrics['mfu_full']:.1%}"
        yield f"(causal {metrics['mfu_causal']:.1%})"
    tiles = f", {metrics['tiles_per_second']:.1f} tiles/s" if "tiles_per_second" in metrics else ""
    yield f"{metrics['images_per_second']:.1f} images/s{tiles}"
    yield f"learned {metrics['learned_share']:.0%}"
    yield f"padding {metrics['padding_share']:.0%}"
