"""The window of the profiler."""

import gzip
import json

import jax
import jax.numpy as jnp
from etils import epath

from llava_jax.training.profiling import Profile


def steps_in_trace(directory) -> set[str]:
    (file,) = directory.glob("profile/plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return {event["args"]["step_num"] for event in events if "step_num" in event.get("args", {})}


def loop(profile: Profile, steps: int) -> None:
    """As in training: a step's metrics are read after the next one was dispatched."""
    square, pending = jax.jit(jnp.square), None
    for step in range(1, steps + 1):
        profile.begin(step)
        with profile.step(step):
            value = square(float(step))
        if pending:
            pending[1].block_until_ready()
            if profile.done(pending[0]):
                profile.close()
        pending = (step, value)
    profile.close()


def test_the_window_is_traced_and_its_steps_are_marked(tmp_path):
    profile = Profile(epath.Path(tmp_path), 3, 2)
    loop(profile, 8)
    steps = steps_in_trace(tmp_path)
    assert {"3", "4"} <= steps <= {"3", "4", "5"}  # step 5 is dispatched before the metrics of step 4 are read
    assert not profile.running


def test_a_run_that_ends_in_the_window_writes_what_there_is(tmp_path):
    loop(Profile(epath.Path(tmp_path), 2, 100), 3)
    assert steps_in_trace(tmp_path) == {"2", "3"}


def test_no_steps_no_trace(tmp_path):
    loop(Profile(epath.Path(tmp_path), 1, 0), 3)
    assert not list(tmp_path.iterdir())
