"""Reads elements ahead with Grain, in threads of this process or in processes of their own."""

import multiprocessing
import os
import signal
import sys
import threading

import grain
from absl import flags

READ_THREADS = min(16, 4 * (os.cpu_count() or 1))  # they mostly wait for storage or, without the GIL, for Pillow


def read_ahead(dataset: grain.MapDataset, workers: int, buffer: int = 0) -> grain.IterDataset:
    """Iterates over a data set in order, made ahead by threads here or, with `workers`, in that many processes.

    `buffer` elements are made ahead, or one a thread if that is more.
    """
    buffer = max(READ_THREADS, buffer // max(workers, 1))  # of each process
    threads = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=buffer)
    elements = dataset.to_iter_dataset(threads)
    if workers == 0:
        return elements
    if not flags.FLAGS.is_parsed():  # Grain reads flags of Abseil, which only `main` parses
        flags.FLAGS.mark_as_parsed()
    # Rows travel through pipes: containers often have too little shared memory for images, which kills them.
    pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    elements = grain.experimental.WithOptionsIterDataset(elements, pipes)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=8)
    return elements.mp_prefetch(options, worker_init_fn=_end_with_parent)


def _end_with_parent(_worker: int, _workers: int) -> None:
    """Ends a worker whose parent was killed: it would wait forever for someone to take its rows.

    Signals to the process group are left to the parent, which saves and may need another batch for that.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
