"""What a run writes down: `metrics.jsonl`, TensorBoard, Weights & Biases where asked, one line or bar on the screen."""

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from rich.console import Console
from tensorboardX import SummaryWriter

from llava_jax.cli import progress_bar


class MetricsWriter:
    """Appends to `metrics.jsonl`, TensorBoard and `tracker`, a `wandb.Run` or None.

    What an interrupted run wrote beyond `start_step` is dropped (by W&B what is written again is).
    """

    def __init__(self, workdir: epath.Path, start_step: int, tracker: Any | None = None):
        self.file = workdir / "metrics.jsonl"
        if self.file.exists():
            kept = [line for line in self.file.read_text().splitlines() if _step(line) <= start_step]
            self.file.write_text("".join(line + "\n" for line in kept))
        self.lines = self.file.open("a")
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
        self.tracker = tracker

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.lines.write(json.dumps({"step": step} | dict(metrics)) + "\n")
        self.lines.flush()
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(dict(metrics), step=step)

    def close(self) -> None:
        self.lines.close()
        self.board.close()
        if self.tracker:
            self.tracker.finish()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # cut off by a crash in the middle of a line


def utilization(step_flops: Mapping[str, float], seconds: float, peak: float | None) -> dict[str, float]:
    """MFU, the share of the devices' peak that a step's model FLOPs make up: {"mfu_full": 0.45, "mfu_causal": 0.4}.

    Args:
      step_flops: FLOPs of a step by convention: "full" counts attention over all pairs of positions, "causal" half.
      seconds: of the step.
      peak: FLOP/s of all devices together; None where it is not known, as on CPU: then there is no MFU.
    """
    return {f"mfu_{name}": flops / seconds / peak for name, flops in step_flops.items()} if peak else {}


class Screen:
    """A progress bar with the newest figures on a terminal, a line every few seconds elsewhere."""

    def __init__(self, start_step: int, steps: int, every: float = 5.0):
        self.steps, self.every, self.last = steps, every, 0.0
        console = Console(stderr=True)
        self.bar = progress_bar(console) if console.is_terminal else None
        if self.bar:
            self.task = self.bar.add_task("training", total=steps, completed=start_step)
            self.bar.start()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        text = (
            f"loss {metrics['loss']:.4f}  lr {metrics['learning_rate']:.2e}  grad {metrics['grad_norm']:.2f}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  {metrics['images_per_second']:.1f} images/s  "
            f"learned {metrics['learned_share']:.0%}  padding {metrics['padding_share']:.0%}"
        )
        if "mfu_full" in metrics:
            text += f"  MFU {metrics['mfu_full']:.1%} (causal {metrics['mfu_causal']:.1%})"
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        elif step == self.steps or time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            self.say(f"step {step}/{self.steps}  {text}")

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
