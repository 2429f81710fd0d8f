"""A trace of a few steps, for TensorBoard's or XProf's profile page: `profile/` in the workdir."""

import jax
from etils import epath

from llava_jax.cli import warn
from llava_jax.remote import is_remote, new_local, upload


class Profile:
    """Traces `steps` steps (none if 0), the first of which is step `start`; every process writes its own file.

    The trace ends when the metrics of its last step have been read, so that no step waits for another.
    """

    def __init__(self, workdir: epath.Path, start: int, steps: int):
        self.target = workdir / "profile"
        self.directory = new_local() if is_remote(workdir) else self.target
        self.window = range(start, start + steps)
        self.running = False

    def begin(self, step: int) -> None:
        """Starts the trace before the first step of the window."""
        if step in self.window and not self.running:
            jax.profiler.start_trace(str(self.directory))
            self.running = True

    def step(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Within, the step is dispatched."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def done(self, step: int) -> bool:
        """Whether the trace ends with this step, whose metrics have been read; `close` then writes it."""
        return self.running and step >= self.window[-1]

    def close(self) -> None:
        """Writes the trace, if one is running."""
        if self.running:
            self.running = False
            try:
                jax.profiler.stop_trace()
                if self.directory != self.target:
                    upload(self.directory, self.target)
            except Exception as error:  # of the profiler or whichever client; it is no part of the training
                warn(f"{self.target}: the trace cannot be written: {error}")
