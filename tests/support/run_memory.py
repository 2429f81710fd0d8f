"""Trains in a process of its own and prints, as its last line, JSON of the memory that it took.

python -m tests.support.run_memory CONFIG.json WORKDIR [STOP_AFTER_STEP], as tests/training/test_loop.py does.
"""

import gc
import json
import os
import re
import signal
import sys
from pathlib import Path

import jax

from configs import common
from llava_jax.training import loop
from llava_jax.training.builder import TrainingProgram


def main(config_file: str, workdir: str, stop: str = "0") -> None:
    gc.set_threshold(700, 10, 10)  # as for users
    config = common.get_config()
    for key, value in json.loads(Path(config_file).read_text()).items():
        config.update_from_flattened_dict({key: value})
    found = {"live": [], "donated": []}
    lower, count_tokens = TrainingProgram.lower, loop.count_tokens

    def watched(program):
        return Watched(lower(program), found)

    def after_a_step(*arguments):
        found["live"].append(live_bytes())
        if len(found["live"]) == int(stop):
            os.kill(os.getpid(), signal.SIGTERM)
        return count_tokens(*arguments)

    TrainingProgram.lower, loop.count_tokens = watched, after_a_step
    try:
        loop.train(config, workdir)
    except SystemExit as left:
        assert left.code == 128 + signal.SIGTERM
    found["peak"] = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    print(json.dumps(found))


class Watched:
    """The step, and what becomes of the state that it is given."""

    def __init__(self, step, found: dict[str, list]):
        self.step, self.found = step, found

    def compile(self) -> "Watched":
        return Watched(self.step.compile(), self.found)

    def __call__(self, state, frozen, batch):
        before = jax.tree.leaves(state)
        state, metrics = self.step(state, frozen, batch)
        self.found["donated"].append(sum(leaf.is_deleted() for leaf in before) / len(before))
        return state, metrics


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


if __name__ == "__main__":
    main(*sys.argv[1:])
