"""Profiles a few steps, for TensorBoard or XProf: `profile/` in the workdir."""

import jax
from etils import epath

from llava_jax.cli import warn
from llava_jax.remote import is_remote, new_local, upload


class Profile:
    """Traces `steps` steps from step `start` on; every process writes a file.

    The trace ends when the metrics of its last step have been read, so that no step waits for it.
    """

    def __init__(self, workdir: epath.Path, start: int, steps: int):
        self.target = workdir / "profile"
        self.directory = new_local() if is_remote(workdir) else self.target
        self.window = range(start, start + steps)
        self.running = False

    def begin(self, step: int) -> None:
        """Starts the trace if `step` is in the window."""
        if step in self.window and not self.running:
            jax.profiler.start_trace(str(self.directory))
            self.running = True

    def step(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Marks a step in the trace, which is dispatched within."""
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def done(self, step: int) -> bool:
        """Whether the trace ends with this step, whose metrics have been read; then call `close`."""
        return self.running and step >= self.window[-1]

    def close(self) -> None:
        """Ends and writes the trace if one is running."""
        if self.running:
            self.running = False
            try:
                jax.profiler.stop_trace()
                if self.directory != self.target:
                    upload(self.directory, self.target)
            except Exception as error:  # of the profiler or a remote client; it must not stop the training
                warn(f"{self.target}: the trace cannot be written: {error}")
