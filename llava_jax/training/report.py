"""What a run reports: the metrics of its steps, one step late, the scores of evaluations, and bad samples."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import jax

from llava_jax.checkpoint.training import TrainingCheckpoints
from llava_jax.cli import UserError, say, warn
from llava_jax.data.plan import Layout, Lengths
from llava_jax.parallel import distributed
from llava_jax.parallel.hardware import peak_flops
from llava_jax.training import flops, optim
from llava_jax.training.bad_samples import BadSamples, bad_texts
from llava_jax.training.goodput import Goodput
from llava_jax.training.metrics import BAD_SAMPLES, METRICS, MetricsWriter, Screen, start_tracking
from llava_jax.training.profiling import Profile
from llava_jax.training.setup import Run

# Called with a step and its metrics.
Callback = Callable[[int, Mapping[str, float]], None]

MAX_SHOWN = 20  # bad samples on the screen, in one start of a run


class Reporter:
    """Owns the clock of the steps, the metrics that are pending, and all that is written about them.

    The metrics of a step are read when the next one is on the device, which so never waits for the host. Every process
    checks that the loss is finite; process 0 writes.
    """

    def __init__(
        self,
        run: Run,
        checkpoints: TrainingCheckpoints,  # for the message about a loss that is not finite
        goodput: Goodput,  # its clock says what steps take
        callbacks: Sequence[Callback],  # called by process 0 with all that is written
        check_lock: Callable[[], None],  # raises UserError if the lock is lost; called before anything is written
    ):
        config, start = run.config, run.start.step
        self._run, self._checkpoints, self._goodput = run, checkpoints, goodput
        self._callbacks, self._check_lock = callbacks, check_lock
        self.profile = Profile(run.workdir, config.profile.start, config.profile.steps)
        self._writer = self._screen = None
        if distributed.is_first():
            if config.profile.steps and not set(self.profile.window) & set(range(start + 1, run.data.steps + 1)):
                warn(f"no step is profiled: config.profile.start is {config.profile.start}, and the run has the steps "
                     f"{start + 1} to {run.data.steps} to do")  # fmt: skip
            self._writer = MetricsWriter(run.workdir, start, start_tracking(config, run.workdir), check_lock)
            self._screen = Screen(start, run.steps)
        self._rates = optim.reported_rates(config, run.steps)
        self._flops = run.program.flops
        self._peak = peak_flops(jax.devices()[0].device_kind)  # None on CPUs

        self._skips_bad, self._shown = run.data.encoded.skip_bad, 0
        (found, self.written), *_ = distributed.gather_json("written so far", self._read_written(start))
        self.bad = BadSamples(run.data.order, run.data.lengths, config.data.max_bad_share, start, found)
        if start == 0 and self._skips_bad and self._writer:
            self._write_bad(bad_texts(run.data.encoded, run.data.lengths))
        self._pending: tuple[int, dict[str, jax.Array], dict[str, int]] | None = None
        self._began, self._clock = time.monotonic(), goodput.step_seconds()

    def _read_written(self, start: int) -> tuple[int, list[str]]:
        """How many bad images earlier starts found, and the names of the metrics that they wrote of step `start`."""
        if not self._writer:
            return 0, []
        found = sum(line.get("part") == "training" for line in self._writer.read(BAD_SAMPLES))
        return found, [name for line in self._writer.read(METRICS) if line["step"] == start for name in line]

    # ----------------------------------------------------------------------------------------------------- of a step

    def hold(self, step: int, values: dict[str, jax.Array], counts: dict[str, int]) -> None:
        """Takes the metrics of a step, to be read by the next `flush`."""
        self._pending = step, values, counts

    def flush(self) -> None:
        """Waits for the pending metrics and writes them. Raises UserError if they are not finite."""
        if self._pending is None:
            return
        (step, metrics, counts), self._pending = self._pending, None
        self._check_lock()
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, values.values())):
            ids = self._run.batches(self._run.data.order).ids(step - 1)
            raise UserError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; nothing was saved since "
                f"step {self._checkpoints.latest}. The samples of this batch: {', '.join(ids)}"
            )
        self._goodput.done(step)
        if self.profile.done(step):
            with self._goodput.measure("profile"):
                self.profile.close()
        if not self._writer:
            return
        values |= self._host_metrics(step, counts)
        self._screen.show(step, values)
        if step % self._run.config.log_every == 0 or step == self._run.steps:
            self._write(step, values)

    def _host_metrics(self, step: int, counts: dict[str, int]) -> dict[str, float]:
        """What the host adds to the metrics of a step: learning rates, bad samples, speed."""
        now = self._goodput.step_seconds()
        seconds, self._clock = now - self._clock, now
        values = {name: float(rate(step - 1)) for name, rate in self._rates.items()}
        if self._skips_bad:
            values["bad_samples"] = self.bad.count
        values |= {
            "tokens_per_second": counts["tokens"] / seconds,
            "images_per_second": counts["images"] / seconds,
            **({"tiles_per_second": counts["tiles"] / seconds} if self._run.start.model.anyres else {}),
            "learned_share": counts["targets"] / max(counts["tokens"], 1),
            "padding_share": 1 - counts["tokens"] / counts["positions"],
            "seconds": seconds,
        }
        if self._peak:
            mfu = flops.mfu(self._flops, seconds, jax.device_count(), self._peak)
            values |= {f"mfu_{convention}": value for convention, value in mfu.items()}
        return values

    # -------------------------------------------------------------------------------------------- scores, bad samples

    def write_scores(self, step: int, scores: Mapping[str, float], line: str) -> None:
        """Writes the scores of an evaluation; `line` is for the screen."""
        if self._writer:
            self._write(step, scores)
            self.say(f"step {step}: {line}")

    def share_bad(self, when: str) -> None:
        """All processes together: the bad samples that each has found become known to all, and are written."""
        found = self.bad.gather(f"bad samples of {when}") if self._skips_bad else []
        if self._writer:
            self._write_bad(found)

    def say(self, text: str) -> None:
        """Prints a line on the screen of process 0."""
        if self._screen:
            self._screen.say(text)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self._writer.write(step, values)
        for callback in self._callbacks:
            callback(step, dict(values))

    def _write_bad(self, found: Sequence[dict]) -> None:
        for one in found:
            self._writer.append(BAD_SAMPLES, one)
            if self._shown < MAX_SHOWN:
                self.say(f"skipped    {one['reason']}")
            elif self._shown == MAX_SHOWN:
                self.say(f"           more are skipped: see {BAD_SAMPLES}")
            self._shown += 1

    # -------------------------------------------------------------------------------------------------------- the end

    def upload(self) -> None:
        """Begins to copy the logs to a remote workdir."""
        if self._writer:
            self._writer.flush()

    def write_goodput(self) -> None:
        self._check_lock()
        self._goodput.write()

    def close(self) -> None:
        with ExitStack() as closing:
            for each in (self._writer, self._screen, self.profile):
                if each:
                    closing.callback(each.close)

    def say_done(self) -> None:
        """Prints what the run has done, after all is closed."""
        if distributed.is_first():
            run, minutes = self._run, (time.monotonic() - self._began) / 60
            done = f"{run.steps} steps done, the last {run.steps - run.start.step} in {minutes:.1f} min"
            say(f"{run.workdir}: {done}", file=sys.stderr)
            say(self._goodput.summary(), file=sys.stderr)


def count_tokens(lengths: Lengths, rows: Sequence[Sequence[int]], layout: Layout) -> dict[str, int]:
    """Tokens (image tokens included), target tokens, images, tiles and positions of a step, over all processes."""
    samples = [index for row in rows for index in row]
    counts = {name: int(counts[samples].sum()) for name, counts in lengths._asdict().items()}
    return counts | {"positions": layout.batch_rows * layout.max_length}
