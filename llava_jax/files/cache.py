"""The cache: results that can be computed again, as files in `$XDG_CACHE_HOME/llava_jax` (by default in ~/.cache).

Files may be deleted at any time. Damaged files are ignored. If the directory cannot be written, one warning says so and
nothing is cached. Only the owner can read the directory.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
from etils import epath

from llava_jax.cli import track, warn
from llava_jax.files import writing
from llava_jax.remote import is_remote, new_local

COPY_BYTES = 16 * 2**20
COPIES_AT_ONCE = 8
BLOCKS, BLOCK = 16, 2**14  # number and bytes of the blocks of a file that `content_version` reads


def directory() -> Path:
    """The directory of the cache; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_jax"


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Code that writes the cache runs within. If the system refuses, a warning says so once."""
    try:
        yield
    except OSError as error:
        _warn(directory(), error.strerror or str(error))


@functools.cache
def _warn(where: Path, reason: str) -> None:
    warn(f"{where}: cannot be written ({reason}): results are not kept for the next start")


def made() -> Path:
    """Makes the directory if needed and returns it. Raises OSError."""
    directory().mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory()


def digest(*parts: object) -> str:
    """A name that depends on the parts: texts, numbers or tuples of them."""
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()[:32]


def version(path: str | os.PathLike) -> str:
    """A text that changes whenever a file is written or replaced. Raises OSError.

    It has inode, size and times (copies and checkouts set the time of modification, but not that of the last change),
    or the version of an object store.
    """
    if not is_remote(path):
        stat = os.stat(path)
        return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"
    files, name = fsspec.url_to_fs(os.fspath(path))
    return files.ukey(name)


def content_version(path: str | os.PathLike) -> str:
    """The same with a hash of blocks of the file, because times may be coarse."""
    if is_remote(path):
        return version(path)
    found = hashlib.sha256()
    with open(path, "rb") as file:
        last = max(os.fstat(file.fileno()).st_size - BLOCK, 0)
        for number in range(BLOCKS):
            file.seek(last * number // (BLOCKS - 1))
            found.update(file.read(BLOCK))
    return f"{version(path)}-{found.hexdigest()}"


def load(name: str) -> dict[str, np.ndarray] | None:
    """The arrays that were saved under a name; None if there are none."""
    try:
        with np.load(directory() / f"{name}.npz") as arrays:
            return dict(arrays)
    except Exception:  # no such file, or a damaged one: NumPy, zipfile and zlib raise nearly anything
        return None


def save(name: str, **arrays: np.ndarray) -> None:
    """Saves arrays under a name."""
    with kept(), replacing(made() / f"{name}.npz") as file:
        np.savez(file, **arrays)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file of the cache to write atomically; several processes may write the same one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with writing.replacing(epath.Path(path), durable=False) as file:
        yield file


def adopt(file: epath.Path) -> None:
    """Copies a result of another machine to the cache, under the name of its file."""
    target = directory() / file.name
    with kept():
        if not target.exists():
            made()
            _copy(file, target, show=False)


def local_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """`local_file` of each path, several at once. One process of a machine copies, the others wait."""
    if not any(map(is_remote, paths)):
        return [Path(path) for path in paths]
    with _alone(), ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
        copies = pool.map(functools.partial(local_file, show=False), paths)
        return list(track(copies, "copying files to this machine", len(paths)))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Lets one process of this machine in at a time, if the cache can be written."""
    with contextlib.ExitStack() as stack:
        with kept():
            lock = stack.enter_context((made() / "copying.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def local_file(path: str | os.PathLike, show: bool = True) -> Path:
    """The file itself, or a cached copy of a remote file. A file that changes is copied again."""
    if not is_remote(path):
        return Path(path)
    return derived("copy", path, lambda target: _copy(epath.Path(path), target, show))


def derived(kind: str, path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """A cached file that `write` makes of the one at `path`. It is made again when that file changes."""
    copies = directory() / f"{kind}-{digest(os.fspath(path))}"
    copy = copies / digest(content_version(path))
    if not copy.exists():
        shutil.rmtree(copies, ignore_errors=True)  # of earlier versions of the file
        with kept():
            made()
            write(copy)
            return copy
        copy = new_local() / copy.name  # the cache cannot be written
        write(copy)
    return copy


def _copy(source: epath.Path, target: Path, show: bool) -> None:
    blocks = -(-source.stat().length // COPY_BYTES)
    with source.open("rb") as remote, replacing(target) as file:
        read = iter(lambda: remote.read(COPY_BYTES), b"")
        message = f"copying {source} in blocks of {COPY_BYTES // 2**20} MiB"
        for block in track(read, message, blocks) if show else read:
            file.write(block)
