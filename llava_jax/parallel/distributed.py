"""Several processes, on one host or many, as one run: how they start, synchronize and exit together.

No process may wait forever for another. A process that fails writes its message to the key-value store of JAX's
coordinator and exits at once; the others check the store every second and exit with that message. The coordinator
misses a process that was killed after `HEARTBEAT_SECONDS`, and JAX then ends the others. With a single process all of
this does nothing.
"""

import contextlib
import functools
import glob
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_jax.cli import UserError, report, say

HEARTBEAT_SECONDS = 30  # with JAX's default of 100 the others would wait for longer than a minute
SHUTDOWN_SECONDS = 30  # how long the first process to finish waits for the last
BARRIER_SECONDS = 24 * 3600  # long: a process that doesn't come fails or is killed, which ends the wait
FAILURES = "llava_jax/failures"  # in the store: process id -> its error message
# Messages of a collective or of the coordinator's client that lost its peer.
LOST = re.compile(r"gloo|nccl|connection|closed|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|heartbeat", re.IGNORECASE)

_exiting = threading.Event()  # set once this process is about to exit


class LostProcess(UserError):
    """Another process is gone without a word, such as one that was killed."""

    status = 134  # as of a crash, after which launchers start again


class ExitTogether(SystemExit):
    """Raised by all processes at the same step, to exit with this status."""


@contextlib.contextmanager
def joined(coordinator: str | None, num_processes: int | None, process_id: int | None, seconds: int) -> Iterator[None]:
    """Joins the processes of a run by these arguments or, without them, by those of SLURM or of a TPU pod.

    Has to be entered before JAX looks for devices. An error that is raised within ends all processes.

    Args:
      coordinator: host and port where process 0 listens, the same for all.
      num_processes, process_id: the number of processes, and the number of this one.
      seconds: how long to wait for the others.
    """
    _initialize(coordinator, num_processes, process_id, seconds)
    if not jax.distributed.is_initialized():
        yield
        return
    _exiting.clear()
    threading.Thread(target=_watch, daemon=True).start()
    try:
        yield
    except ExitTogether:
        _shut_down()
        raise
    except BaseException as error:
        _exit_with(error)
    _shut_down()


def exit_on_error(kind: type | None, error: BaseException | None, traceback: Any) -> None:
    """For `ExitStack.push`: exits after an error, before anything is closed that would wait for other processes."""
    if error is not None and jax.distributed.is_initialized() and not isinstance(error, ExitTogether):
        _exit_with(error)


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes. A `name` can be used once."""
    if jax.distributed.is_initialized():
        _client().wait_at_barrier(f"llava_jax/{name}", timeout_in_ms=BARRIER_SECONDS * 1000)


def gather(name: str, value: np.ndarray) -> list[np.ndarray]:
    """The arrays of all processes, in their order. They may differ in length."""
    if jax.process_count() == 1:
        return [value]
    barrier(name)  # collectives time out sooner than barriers
    gathered = multihost_utils.process_allgather
    sizes = gathered(np.array(value.shape[0])).reshape(-1)
    padded = np.zeros((max(sizes), *value.shape[1:]), value.dtype)
    padded[: len(value)] = value
    return [array[:size] for array, size in zip(gathered(padded), sizes, strict=True)]


def gather_json(name: str, value: Any) -> list[Any]:
    """`gather` for a value that JSON can hold."""
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    return [json.loads(array.tobytes()) for array in gather(name, encoded)]


class SignalSync:
    """Shares a few numbers of every process without waiting: all processes read the maxima one step later.

    So all hosts stop at the same step, whichever of them received the signal.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._max = jax.jit(functools.partial(jnp.max, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._result: jax.Array | None = None

    def exchange(self, *numbers: int) -> list[int]:
        """Sends this process's numbers; returns the maxima of the last call or, with a single process, the numbers."""
        if jax.process_count() == 1:
            return list(numbers)
        known = [0] * len(numbers) if self._result is None else np.asarray(self._result).tolist()
        shape = (self._sharding.mesh.size, len(numbers))
        mine = jax.make_array_from_callback(shape, self._sharding, lambda _: np.array([numbers], np.int32))
        self._result = self._max(mine)
        return known


# ------------------------------------------------------------------------------------------------------------ joining


def _initialize(coordinator: str | None, num_processes: int | None, process_id: int | None, seconds: int) -> None:
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        if not _has_peers():
            return
    elif None in given:
        raise UserError("--coordinator, --num_processes and --process_id belong together: give all three or none")
    elif not re.fullmatch(r".+:\d+", coordinator) or not 0 <= process_id < num_processes:
        raise UserError(
            f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: "
            "the first is HOST:PORT, the last counts from 0 to one below the number of processes"
        )
    # JAX's handler would replace ours for SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    where = f"the processes did not all meet at {coordinator or 'the coordinator'}"
    advice = "is each of them started, and can it reach that address?"
    timeout = threading.Timer(seconds, _exit, (1, f"error: {where} within {seconds} s: {advice}"))
    timeout.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=_local_devices(),
            initialization_timeout=seconds + 60,  # at which JAX would end the process with a C++ stack trace
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if coordinator is None and not _is_slurm() and not isinstance(error, RuntimeError):
            return  # a TPU VM outside of a pod, such as in a container
        raise UserError(f"{where}: {_first_line(error)}; {advice}") from None
    finally:
        timeout.cancel()


def _has_peers() -> bool:
    """Whether `srun` started several tasks, or this is a TPU VM, where JAX finds out about its pod."""
    if _is_slurm():
        return int(os.environ.get("SLURM_NTASKS", 1)) > 1
    tpu_is_used = "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu")
    return tpu_is_used and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _is_slurm() -> bool:
    """Whether `srun` started this process; the script of `sbatch` is a single process."""
    return "SLURM_STEP_NODELIST" in os.environ


def _local_devices() -> list[int] | None:
    """All GPUs of the node for a SLURM task that is the only one there; by default JAX gives a task one GPU."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 1(x4)
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if re.fullmatch(r"1(\(x\d+\))?", tasks) and gpus.isdecimal() else None


# ------------------------------------------------------------------------------------------------------------ leaving


def _client() -> Any:
    from jax._src import distributed  # JAX has no public name for it; Orbax uses this one, too

    return distributed.global_state.client


def _watch() -> None:
    """Ends this process if another one fails or the coordinator, which is in process 0, is gone."""
    while not _exiting.wait(1.0):
        try:
            failure, status = _others_failure(), 1
        except jax.errors.JaxRuntimeError as error:
            failure, status = f"the coordinator, process 0, is gone ({_first_line(error)})", LostProcess.status
        if failure and not _exiting.is_set():
            _exit(status, f"error: {failure}; process {jax.process_index()} exits, too")


def _others_failure() -> str | None:
    failures = sorted(_client().key_value_dir_get(FAILURES))
    return next((f"process {key.rsplit('/', 1)[1]}: {said}" for key, said in failures), None)


def _shut_down() -> None:
    """Waits for all processes, however long the last one takes to upload its logs, and disconnects."""
    try:
        barrier("end")
    except jax.errors.JaxRuntimeError as error:
        _exit_with(error)
    _exiting.set()
    jax.distributed.shutdown()


def _exit_with(error: BaseException) -> NoReturn:
    """Reports an error and exits at once: an orderly exit would wait for the others, which wait for this process."""
    _exiting.set()
    if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
        # The message of the process that failed says more.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            for _ in range(20):
                if failure := _others_failure():
                    _exit(1, f"error: {failure}; process {jax.process_index()} exits, too")
                time.sleep(0.1)
        error = LostProcess(f"lost another process, or the connection to it ({_first_line(error)})")
    status, message = report(error)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{FAILURES}/{jax.process_index()}", message)
        if is_first():
            time.sleep(3.0)  # the coordinator is in this process: the others need time to read the message
    _exit(status)


def _exit(status: int, message: str | None = None) -> NoReturn:
    if message:
        say(message, file=sys.stderr)
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
