"""A lock that lets one process at a time write to a directory. The file `run.lock` in it describes the holder.

On a file system the file is also locked by `flock`, which the kernel releases when the process ends, even by SIGKILL.
Such a lock may not reach other machines (NFS without a lock manager, Lustre, FUSE), and object stores have none. So the
holder also updates the file every `BEAT` seconds. If a holder on another machine does not for `EXPIRY` seconds of the
waiting process's clock, its lock is taken over. A holder that was only frozen notices that before it writes, and stops.
"""

import contextlib
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from llava_jax.cli import UserError, one_line, say, short, warn
from llava_jax.files.reading import loads
from llava_jax.remote import is_remote

LOCK = "run.lock"
BEAT, EXPIRY = 10, 60  # seconds
MAX_BYTES = 4096  # that are read of the file, which anybody may have written


@contextlib.contextmanager
def hold(directory: epath.Path) -> Iterator[Callable[[], None]]:
    """Holds the lock of `directory`, which is made if needed. Yields a check to call before each write.

    Raises UserError naming the process that holds the lock; so does the check after the lock was lost. Object stores
    that TensorStore does not support cannot be locked: a warning says so.
    """
    if is_remote(directory) and not os.fspath(directory).startswith(("gs://", "s3://")):
        warn(f"{directory}: cannot be locked: make sure that no other process writes there")
        yield lambda: None
        return
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        store = _LockObject(directory) if is_remote(directory) else _LockFile(directory)
        _acquire(store, directory)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError of TensorStore
        raise UserError(f"{directory}: cannot be written ({_cause(error)})") from error
    ended, last = threading.Event(), [time.monotonic()]

    def beat() -> None:
        began = time.monotonic()
        if not store.beat():
            raise UserError(
                f"{directory}: was taken over by {_name(store.seen()[0])}, since this process gave no sign of life for "
                f"{EXPIRY} s, or since {LOCK} was removed: this one ends and writes nothing more"
            )
        last[0] = began

    def beat_until_end() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(Exception):  # the network may be down; the check notices a lost lock
                beat()

    def check() -> None:
        if time.monotonic() - last[0] > EXPIRY / 2:  # before that no other process can have waited long enough
            try:
                beat()
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(f"{directory / LOCK}: cannot be written ({_cause(error)})") from error

    thread = threading.Thread(target=beat_until_end, daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join(BEAT)  # at most: the network may hang
        with contextlib.suppress(Exception):  # else it expires
            store.release()
            if made and not is_remote(directory):
                directory.rmdir()  # unless something was written


def entries(directory: epath.Path) -> list[epath.Path]:
    """The entries of a directory but its lock; none if it does not exist."""
    return [entry for entry in directory.iterdir() if entry.name != LOCK] if directory.is_dir() else []


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0][:300]


def _acquire(store: "_LockFile | _LockObject", directory: epath.Path) -> None:
    while True:
        text, alive = store.look()
        if alive is None:
            say(
                f"{directory}: held by {_name(text)}, whose last sign of life was {store.age():,.0f} s ago; waits "
                f"up to {2 * EXPIRY} s until it ends, or gives none for {EXPIRY} s, and takes over then (at once if "
                f"you remove {directory / LOCK})",
                file=sys.stderr,
                flush=True,
            )
            alive = _shows_life(store)
        if alive:
            store.release()
            raise UserError(
                f"{directory}: is in use by {_name(text)}; wait for its end, or end it, or choose another directory"
            )
        if store.take(_describe(store.where)):
            return


def _shows_life(store: "_LockFile | _LockObject") -> bool:
    """Waits until a holder ends (as a preempted one does after saving) or expires; True if it does neither."""
    version, unchanged = store.seen()[1], 0
    for _ in range(2 * EXPIRY):
        time.sleep(1)
        before, (_, version) = version, store.seen()
        unchanged = unchanged + 1 if version == before else 0
        if version is None or unchanged == EXPIRY:
            return False
    return True


def _describe(where: str) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": shlex.join(sys.orig_argv)[:300],
        "where": where,
        "id": uuid.uuid4().hex,
    }


def _parse(text: bytes) -> dict[str, Any]:
    """The holder that a lock describes, without fields if it cannot be parsed."""
    with contextlib.suppress(ValueError):
        if isinstance(holder := loads(text), dict):
            return holder
    return {}


def _name(text: bytes) -> str:
    """The holder of a lock, for a message."""
    holder = _parse(text)
    if not holder:
        return "another process"
    return "another process ({pid} on {host} since {since}: {command})".format_map(
        {name: short(one_line(str(holder.get(name, "?"))), 300) for name in ("pid", "host", "since", "command")}
    )


def _boot() -> str:
    """An id of this machine since it was booted."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else socket.gethostname()


def _started(pid: Any) -> str | None:
    """The start time of a process of this machine, in the kernel's units; None if there is no such process."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return None


class _LockFile:
    """A lock on a file system, which may be shared."""

    def __init__(self, directory: epath.Path):
        self.path = os.fspath(directory / LOCK)
        self.text = b""  # what this process wrote

    def look(self) -> tuple[bytes, bool | None]:
        """The text of the lock and whether its holder is alive, None if only its signs of life can tell."""
        while True:
            self._refuse_irregular()
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            opened, reaches = os.fstat(self.descriptor), True
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return self.seen()[0], True
            except OSError:  # a file system without locks
                reaches = False
            text, version = self.seen()
            if version and version[0] == opened.st_ino:
                break
            os.close(self.descriptor)  # its holder has just removed the file
        self.where = f"{_boot()} {opened.st_dev}"  # where a lock certainly works
        dead = not text or (reaches and _parse(text).get("where") == self.where)
        return text, False if dead else None

    def seen(self) -> tuple[bytes, tuple[int, int] | None]:
        """The text of the lock and a version that changes with each sign of life, None if the file is gone.

        The file is opened again, because it may have been replaced, and so that a network file system asks its server.
        """
        self._refuse_irregular()
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                return file.read(MAX_BYTES), (found.st_ino, found.st_mtime_ns)
        except FileNotFoundError:
            return b"", None

    def _refuse_irregular(self) -> None:
        """Raises UserError for a pipe, which would block, or a link, whose target would be overwritten."""
        if os.path.lexists(self.path) and not stat.S_ISREG(os.lstat(self.path).st_mode):
            raise UserError(f"{self.path}: is not a regular file, as a lock is: remove it")

    def age(self) -> float:
        return time.time() - os.fstat(self.descriptor).st_mtime

    def take(self, holder: dict[str, Any]) -> bool:
        self.text = json.dumps(holder).encode()
        try:
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, self.text, 0)
            os.fsync(self.descriptor)
        except OSError:
            os.unlink(self.path)
            os.close(self.descriptor)
            raise
        taken = self.seen()[0] == self.text
        if not taken:  # removed, or taken by another machine at the same moment
            os.close(self.descriptor)
        return taken

    def beat(self) -> bool:
        if self.seen()[0] != self.text:
            return False
        with contextlib.suppress(OSError):  # a file system without times shows no life, but the lock is not lost
            os.utime(self.descriptor)
        return True

    def release(self) -> None:
        if self.text and self.seen()[0] == self.text:
            os.unlink(self.path)
        os.close(self.descriptor)


class _LockObject:
    """A lock on an object store, written only if it is still what was read."""

    def __init__(self, directory: epath.Path):
        import tensorstore as ts  # takes a while to import

        self.store = ts.KvStore.open(f"{os.fspath(directory).rstrip('/')}/").result()
        names = Path("/proc/self/ns/pid")  # a process id means something only inside its namespace
        self.where = f"{_boot()} {os.readlink(names) if names.exists() else uuid.uuid4()}"
        self.holder: dict[str, Any] = {}

    def look(self) -> tuple[bytes, bool | None]:
        found = self.store.read(LOCK).result()
        self.generation, holder = found.stamp.generation, _parse(found.value)
        if holder.get("where") != self.where:
            return found.value, False if found.state == "missing" else None
        started = _started(holder.get("pid"))
        return found.value, started is not None and started == holder.get("started")

    def seen(self) -> tuple[bytes, bytes | None]:
        found = self.store.read(LOCK).result()
        return found.value[:MAX_BYTES], None if found.state == "missing" else found.stamp.generation

    def age(self) -> float:
        seen = _parse(self.seen()[0]).get("seen")
        return time.time() - seen if isinstance(seen, float) else 0.0

    def take(self, holder: dict[str, Any]) -> bool:
        self.holder = holder
        return self.beat()

    def beat(self) -> bool:
        value = json.dumps(self.holder | {"seen": time.time()})
        written = self.store.write(LOCK, value, if_equal=self.generation).result().generation
        if not written:  # another process wrote it, or the answer to this one was lost
            text, written = self.seen()
            if _parse(text).get("id") != self.holder["id"]:
                return False
        self.generation = written
        return True

    def release(self) -> None:
        if self.holder:
            self.store.write(LOCK, None, if_equal=self.generation).result()
