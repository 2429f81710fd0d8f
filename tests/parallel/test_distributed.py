"""Two real processes of two devices each, which meet over gloo: one run, one checkpoint, one end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.files.lock import hold
from llava_jax.parallel import distributed

STEPS, SAVED = 60, 40


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("world")
    model = tiny.checkpoint(directory)
    file, images = tiny.data(directory, samples=24)
    return {"init": str(model), "data.json": str(file), "data.images": str(images)}


class Run:
    """`processes` processes of the real command, what they say in files."""

    def __init__(self, world: dict[str, str], workdir: Path, processes: int, devices: int, flags=(), **changes):
        self.workdir = workdir
        config = world | {"stage": "finetune", "max_length": 64, "batch_rows": 8, "steps": STEPS}
        config |= {"learning_rate": 1e-3, "data.holdout": 4, "eval_every": 30, "save_every": 20, "keep": 9} | changes
        command = [sys.executable, "-m", "llava_jax.main", "--config=configs/common.py", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in config.items()]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        self.said, self.processes = [], []
        port = free_port()
        for i in range(processes):
            meet = [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={i}"]
            self.said.append(workdir.with_name(f"{workdir.name}.{i}"))
            with self.said[i].open("w") as file:
                arguments = command + (meet if processes > 1 else []) + list(flags)
                self.processes.append(subprocess.Popen(arguments, env=environment, stdout=file, stderr=file))

    def wait(self) -> list[int]:
        return [process.wait() for process in self.processes]

    def wait_for(self, reached: Callable[[], bool]) -> None:
        while not reached():
            assert not any(process.poll() for process in self.processes), self.told()
            time.sleep(0.02)

    def told(self, process: int | None = None) -> str:
        said = self.said if process is None else [self.said[process]]
        return "\n".join(file.read_text() for file in said)

    def metrics(self, key: str = "loss") -> dict[int, float]:
        """Of whole lines alone, since the last may be half written."""
        file = self.workdir / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return {m["step"]: m[key] for m in map(json.loads, lines) if key in m}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def run(world) -> Iterator[Callable[..., Run]]:
    """Starts runs; what still runs when the test ends is killed."""
    runs = []

    def start(workdir: Path, processes: int, devices: int, **options) -> Run:
        runs.append(Run(world, workdir, processes, devices, **options))
        return runs[-1]

    yield start
    for process in [process for started in runs for process in started.processes]:
        process.kill()
        process.wait()


def assert_equal_runs(run: Run, other: Run) -> None:
    """Same losses and weights within the rounding of sums in another order."""
    for key in ("loss", "validation_loss", "learned_share"):
        mine, others = run.metrics(key), other.metrics(key)
        assert mine.keys() == others.keys()
        np.testing.assert_allclose(list(mine.values()), list(others.values()), rtol=1e-4, err_msg=key)
    expected = open_checkpoint(other.workdir).load()
    for name, value in open_checkpoint(run.workdir).load().items():
        np.testing.assert_allclose(value, expected[name], atol=2e-4, err_msg=name)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Run:
    """One process with all four devices, uninterrupted."""
    run = Run(world, tmp_path_factory.mktemp("whole") / "run", processes=1, devices=4)
    assert run.wait() == [0], run.told()
    losses = run.metrics()
    assert len(losses) == STEPS and losses[STEPS] < losses[1] - 0.5
    return run


def test_a_signal_to_one_of_two_saves_and_stops_both_and_one_process_goes_on(run, whole, tmp_path):
    split = run(tmp_path / "split", processes=2, devices=2)
    split.wait_for(lambda: len(split.metrics()) >= 3)
    split.processes[1].send_signal(signal.SIGTERM)
    assert split.wait() == [128 + signal.SIGTERM] * 2, split.told()
    saved = open_checkpoint(split.workdir).step
    assert 3 <= saved < STEPS and max(split.metrics()) == saved
    assert "stopped by SIGTERM" in split.told(0)
    assert "loss" not in split.told(1) and "stage" not in split.told(1), "process 0 alone speaks"
    resumed = run(split.workdir, processes=1, devices=4)
    assert resumed.wait() == [0], resumed.told()
    assert f"resuming after step {saved}" in resumed.told()
    assert_equal_runs(resumed, whole)


def test_when_one_is_killed_the_other_leaves(run, tmp_path):
    """Process 0, since with it the coordinator goes. Nor do the reading processes stay."""
    pair = run(tmp_path / "run", processes=2, devices=2, steps=3000, **{"data.holdout": 0, "data.workers": 1})
    pair.wait_for(lambda: len(pair.metrics()) >= 2)
    readers = [reader for process in pair.processes for reader in children(process.pid)]
    assert len(readers) >= 2
    pair.processes[0].kill()
    assert pair.processes[1].wait() != 0
    while any(map(is_running, readers)):
        time.sleep(0.1)
    told = pair.told(1)
    assert (
        "the coordinator, process 0, is gone" in told or "lost another process" in told or "another task died" in told
    )


def children(pid: int) -> list[int]:
    """Whichever of its threads started them."""
    return [
        int(child)
        for of_thread in Path(f"/proc/{pid}/task").glob("*/children")
        for child in of_thread.read_text().split()
    ]


def is_running(pid: int) -> bool:
    """Whether there is such a process that is not a zombie."""
    file = Path(f"/proc/{pid}/stat")
    return file.exists() and file.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_host_that_falls_silent_is_missed(run, tmp_path):
    """Its connections stay open, as when a machine freezes or its network is cut: only the heartbeat tells."""
    pair = run(tmp_path / "run", processes=2, devices=2, steps=3000, **{"data.holdout": 0})
    pair.wait_for(lambda: len(pair.metrics()) >= 2)
    pair.processes[1].send_signal(signal.SIGSTOP)
    assert pair.processes[0].wait() != 0
    assert "heartbeat" in pair.told(0)


def test_an_error_of_one_ends_both_with_its_words(run, world, tmp_path):
    images = Path(shutil.copytree(world["data.images"], tmp_path / "images"))
    (images / "0.png").write_bytes(b"no picture")
    pair = run(tmp_path / "run", processes=2, devices=2, **{"data.images": str(images), "data.holdout": 0})
    assert pair.wait() == [1, 1], pair.told()
    finder = 0 if "error: sample" in pair.told(0) else 1
    assert "error: sample sample-0: image" in pair.told(finder)
    told = pair.told(1 - finder)
    assert f"error: process {finder}: sample sample-0: image" in told and "Traceback" not in told


def test_too_many_bad_samples_stop_both_and_the_packed_run_goes_on_elsewhere(run, world, tmp_path):
    """One process finds the damaged picture; both say so and leave after the same step. One alone then ends the run."""
    images = Path(shutil.copytree(world["data.images"], tmp_path / "images"))
    (images / "4.png").write_bytes(b"no picture")
    packed = {"pack": True, "row_length": 160, "rows_per_group": 2, "steps": 12, "data.holdout": 0}
    packed |= {"data.images": str(images), "data.on_bad_sample": "skip", "save_every": 5}
    cached = {"compilation_cache": str(tmp_path / "cache"), "data.max_bad_share": 0.03}
    pair = run(tmp_path / "run", processes=2, devices=2, **packed, **cached)
    whole = run(tmp_path / "whole", processes=1, devices=4, **packed, **{"data.max_bad_share": 1})
    assert pair.wait() == [1, 1], pair.told()
    saved = open_checkpoint(pair.workdir).step
    assert 1 <= saved < 6
    said = [re.findall("error: .* are bad.*", pair.told(process)) for process in range(2)]
    assert said[0] == said[1] and f"step {saved}, which is saved: " in said[0][0]
    resumed = run(pair.workdir, processes=1, devices=4, **packed, **{"data.max_bad_share": 1})
    assert resumed.wait() == whole.wait() == [0], resumed.told() + whole.told()
    logs = [(each.workdir / "bad_samples.jsonl").read_text() for each in (resumed, whole)]
    assert logs[0] == logs[1] and logs[0].count('"id": "sample-4"') == resumed.metrics("bad_samples")[12] > 1
    np.testing.assert_allclose(list(resumed.metrics().values()), list(whole.metrics().values()), rtol=1e-4)


def test_a_workdir_in_use_is_refused_and_both_say_by_whom(run, tmp_path):
    with hold(epath.Path(tmp_path / "run")):
        pair = run(tmp_path / "run", processes=2, devices=2)
        assert pair.wait() == [1, 1], pair.told()
    said = f"{tmp_path}/run: is in use by another process ({os.getpid()} on "
    assert f"error: {said}" in pair.told(0) and f"error: process 0: {said}" in pair.told(1)
    assert "Traceback" not in pair.told() and not (tmp_path / "run").exists()


def test_a_damaged_step_is_told_by_both_who_go_on_from_what_one_process_saved_before(run, whole, tmp_path):
    """Where one had the rows of a step at once, these accumulate."""
    workdir = Path(shutil.copytree(whole.workdir, tmp_path / "run"))
    data = max((workdir / f"checkpoints/{STEPS}/optimizer/ocdbt.process_0/d").iterdir(), key=lambda f: f.stat().st_size)
    data.write_bytes(bytes(byte ^ 1 for byte in data.read_bytes()))
    pair = run(workdir, processes=2, devices=2)
    assert pair.wait() == [1, 1] and "Traceback" not in pair.told(), pair.told()
    said = f"checkpoints/{STEPS}: this step is damaged"
    assert said in pair.told(0) and said in pair.told(1) and f"--resume-from {SAVED}" in pair.told(0)
    pair = run(workdir, processes=2, devices=2, flags=[f"--resume-from={SAVED}"], max_rows_per_device=1)
    assert pair.wait() == [0, 0], pair.told()
    told = pair.told(0)
    assert "2 microbatches" in told and f"resuming after step {SAVED}" in told and "set_aside" not in pair.told(1)
    assert_equal_runs(pair, whole)


def test_nobody_waits_for_ever_for_one_that_never_starts(run, tmp_path):
    alone = run(tmp_path / "run", processes=2, devices=2, flags=["--start_timeout=2"])
    alone.processes[0].kill()
    assert alone.processes[1].wait() == 1
    assert "error: the processes did not all meet at localhost:" in alone.told(1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((None, None, 1), "belong together"),
        (("here", 2, 1), "HOST:PORT"),
        (("here:1", 2, 2), "counts from 0"),
    ],
)
def test_flags_that_say_too_little_are_refused(flags, message):
    with pytest.raises(UserError, match=message), distributed.joined(*flags, seconds=1):
        pass


def test_one_process_alone_joins_nobody():
    with distributed.joined(None, None, None, seconds=1):
        assert not jax.distributed.is_initialized()
        distributed.barrier("nobody")
        (mine,) = distributed.gather("nobody", np.arange(3))
        np.testing.assert_array_equal(mine, np.arange(3))


def test_a_tpu_that_knows_of_no_pod_is_one_process(monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed, "_has_peers", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with distributed.joined(None, None, None, seconds=60):
        assert jax.process_count() == 1
    with pytest.raises(UserError, match="did not all meet at here:1: coordinator_address"):
        distributed._initialize("here:1", 2, 0, 60)


@pytest.mark.parametrize(
    ("environment", "company", "devices"),
    [
        ({}, False, None),
        # What `srun --nodes=4 --ntasks-per-node=1 --gpus-per-node=8` and `--ntasks-per-node=8` set, and `sbatch` alone.
        ({"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
          "SLURM_GPUS_ON_NODE": "8"}, True, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "32", "SLURM_STEP_TASKS_PER_NODE": "8(x4)",
          "SLURM_GPUS_ON_NODE": "8"}, True, None),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, False, None),
        ({"SLURM_NTASKS": "4"}, False, None),
    ],
)  # fmt: skip
def test_slurm_is_recognized(monkeypatch, environment, company, devices):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (distributed._has_peers(), distributed._local_devices()) == (company, devices)
