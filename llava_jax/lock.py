"""One process at a time writes into a directory, and `run.lock` in it says which.

On a file system that file is also locked by `flock`, which the kernel ends with the process, even at SIGKILL. Such a
lock may not reach other machines (NFS without a lock manager, Lustre, FUSE), and object stores have none. So the holder
also gives a sign of life every `BEAT` seconds: a holder on another machine that gives none for `EXPIRY` seconds of the
waiting process's own clock counts as dead, and its lock is taken over. A holder that was only frozen notices that
before it writes, and stops.
"""

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from llava_jax.cli import UserError, say, short
from llava_jax.incoming import loads
from llava_jax.remote import is_remote

LOCK = "run.lock"
BEAT, EXPIRY = 10, 60  # seconds
MAX_BYTES = 4096  # of what is read of the file, which anybody may have written


@contextlib.contextmanager
def hold(directory: epath.Path) -> Iterator[Callable[[], None]]:
    """Holds the lock of `directory`, which is made if needed; yields a check to call before what is written.

    Raises UserError, as the check does once the lock was lost, that names the process that holds it.
    """
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        store = _LockObject(directory) if is_remote(directory) else _LockFile(directory)
        _acquire(store, directory)
    except (OSError, ValueError, RuntimeError) as error:  # the latter of TensorStore
        raise UserError(f"{directory}: cannot be written ({_cause(error)})") from error
    ended, last = threading.Event(), [time.monotonic()]

    def beat() -> None:
        began = time.monotonic()
        if not store.beat():
            raise UserError(
                f"{directory}: was taken over by {_name(store.read())}, since this process gave no sign of life for "
                f"{EXPIRY} s, or since {LOCK} was removed: this one ends and writes nothing more"
            )
        last[0] = began

    def beat_until_end() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(Exception):  # a network that is down; what is lost is noticed by the check
                beat()

    def check() -> None:
        if time.monotonic() - last[0] > EXPIRY / 2:  # until then nobody can have waited long enough
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
        thread.join(BEAT)  # a network that hangs
        with contextlib.suppress(Exception):  # it expires
            store.release()
            if made and not is_remote(directory):
                directory.rmdir()  # unless something was written


def entries(directory: epath.Path) -> list[epath.Path]:
    """What a directory holds besides its lock; nothing where there is none."""
    return [entry for entry in directory.iterdir() if entry.name != LOCK] if directory.is_dir() else []


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0][:300]


def _acquire(store: "_LockFile | _LockObject", directory: epath.Path) -> None:
    while True:
        text, alive = store.look()
        if alive is None:
            say(
                f"{directory}: held by {_name(text)}, which gave its last sign of life {store.age():,.0f} s ago; waits "
                f"{EXPIRY} s for another one and takes over without it (at once if you remove {directory / LOCK})",
                file=sys.stderr,
                flush=True,
            )
            alive = _shows_life(store)
        if alive:
            store.close()
            raise UserError(
                f"{directory}: is in use by {_name(text)}; wait for its end, or end it, or choose another directory"
            )
        if store.take(_describe(store.where)):
            return


def _shows_life(store: "_LockFile | _LockObject") -> bool:
    version = store.version()
    for _ in range(EXPIRY):
        time.sleep(1)
        if (now := store.version()) != version:
            return now is not None  # None: it has just ended
    return False


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
    """The holder that a lock describes, with no fields where it is not readable."""
    with contextlib.suppress(ValueError):
        if isinstance(holder := loads(text), dict):
            return holder
    return {}


def _name(text: bytes) -> str:
    """Who holds a lock, for a message."""
    holder = _parse(text)
    if not holder:
        return "another process"
    return "another process ({pid} on {host} since {since}: {command})".format_map(
        {name: short(str(holder.get(name, "?")), 300) for name in ("pid", "host", "since", "command")}
    )


def _boot() -> str:
    """What tells this machine, since its start, from all others."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else socket.gethostname()


def _started(pid: Any) -> str | None:
    """When a process of this machine started, as the kernel counts it; None where there is no such process."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return None


class _LockFile:
    """The lock on a file system, which may be shared."""

    def __init__(self, directory: epath.Path):
        self.path = os.fspath(directory / LOCK)
        self.descriptor, self.text = -1, b""

    def look(self) -> tuple[bytes, bool | None]:
        """What the lock says, and whether its holder is alive, None where only its signs of life can tell."""
        while True:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self.where = f"{_boot()} {os.fstat(self.descriptor).st_dev}"  # as far as a lock certainly reaches
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                reaches = True
            except BlockingIOError:
                return self.read(), True
            except OSError:  # a file system without locks
                reaches = False
            version = self.version()
            if version and version[0] == os.fstat(self.descriptor).st_ino:
                break
            self.close()  # its holder has just removed it
        text = self.read()
        if not text or reaches and _parse(text).get("where") == self.where:
            return text, False
        return text, None

    def read(self) -> bytes:
        """By its name, since another may be there now. Opening asks the server of a network file system again."""
        try:
            with open(self.path, "rb") as file:
                return file.read(MAX_BYTES)
        except FileNotFoundError:
            return b""

    def version(self) -> tuple[int, int] | None:
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def age(self) -> float:
        return max(0.0, time.time() - os.fstat(self.descriptor).st_mtime)

    def take(self, holder: dict[str, Any]) -> bool:
        self.text = json.dumps(holder).encode()
        try:
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, self.text, 0)
            os.fsync(self.descriptor)
        except OSError:
            os.unlink(self.path)
            self.close()
            raise
        if self.read() == self.text:
            return True
        self.close()  # removed, or taken by another machine in the same moment
        return False

    def beat(self) -> bool:
        if self.read() != self.text:
            return False
        with contextlib.suppress(OSError):  # a file system that keeps no times shows no life, but loses nothing
            os.utime(self.descriptor)
        return True

    def release(self) -> None:
        if self.read() == self.text:
            os.unlink(self.path)
        self.close()

    def close(self) -> None:
        os.close(self.descriptor)


class _LockObject:
    """The lock on an object store, written on the condition that it is still what was read."""

    def __init__(self, directory: epath.Path):
        import tensorstore as ts  # which takes a while

        self.store = ts.KvStore.open(f"{os.fspath(directory).rstrip('/')}/").result()
        names = Path("/proc/self/ns/pid")  # a process id means something only inside its namespace
        self.where = f"{_boot()} {os.readlink(names) if names.exists() else uuid.uuid4()}"
        self.holder: dict[str, Any] = {}
        self.generation = b""

    def look(self) -> tuple[bytes, bool | None]:
        found = self.store.read(LOCK).result()
        self.generation = found.stamp.generation
        holder = _parse(found.value)
        if found.state == "missing":
            return b"", False
        if holder.get("where") == self.where:
            started = _started(holder.get("pid"))
            return found.value, started is not None and started == holder.get("started")
        return found.value, None

    def read(self) -> bytes:
        return self.store.read(LOCK).result().value[:MAX_BYTES]

    def version(self) -> bytes | None:
        found = self.store.read(LOCK).result()
        return None if found.state == "missing" else found.stamp.generation

    def age(self) -> float:
        seen = _parse(self.read()).get("seen")
        return max(0.0, time.time() - seen) if isinstance(seen, float) else 0.0

    def take(self, holder: dict[str, Any]) -> bool:
        self.holder = holder
        return self.beat()

    def beat(self) -> bool:
        value = json.dumps(self.holder | {"seen": time.time()})
        written = self.store.write(LOCK, value, if_equal=self.generation).result().generation
        if not written:  # another wrote it; or this process did, whose answer was lost
            found = self.store.read(LOCK).result()
            if _parse(found.value).get("id") != self.holder["id"]:
                return False
            written = found.stamp.generation
        self.generation = written
        return True

    def release(self) -> None:
        self.store.write(LOCK, None, if_equal=self.generation).result()

    def close(self) -> None:
        pass
