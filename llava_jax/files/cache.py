"""What took long to work out and can be worked out again: files in `$XDG_CACHE_HOME/llava_jax`, ~/.cache by default.

Any of them may be deleted at any time. One that is damaged is as good as none; where the directory cannot be written,
a warning says so once, and work continues without. The directory is for its owner alone.
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
BLOCKS, BLOCK = 16, 2**14  # of a file that `content_version` reads, and bytes of each


def directory() -> Path:
    """Where caches are kept; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_jax"


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within, the cache is written. What the system refuses becomes a warning, once."""
    try:
        yield
    except OSError as error:
        _warn(directory(), error.strerror or str(error))


@functools.cache
def _warn(where: Path, reason: str) -> None:
    warn(f"{where}: cannot be written ({reason}): results are not kept for the next start")


def made() -> Path:
    """The directory, which now exists. Raises OSError."""
    directory().mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory()


def digest(*parts: object) -> str:
    """A name for what the parts say, text and numbers or tuples of them."""
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()[:32]


def version(path: str | os.PathLike) -> str:
    """What changes whenever a file is written or replaced: inode, size and times (copies and checkouts set that of the
    last write, nobody that of the last change), or what its object store says. Raises OSError."""
    if not is_remote(path):
        stat = os.stat(path)
        return f"{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"
    files, name = fsspec.url_to_fs(os.fspath(path))
    return files.ukey(name)


def content_version(path: str | os.PathLike) -> str:
    """The same with what stands at the beginning, at the end and at places between: times may be coarse."""
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
    """The arrays that were saved under a name, or None."""
    try:
        with np.load(directory() / f"{name}.npz") as arrays:
            return dict(arrays)
    except Exception:  # there is none, or it is damaged: NumPy, zipfile and zlib raise nearly anything
        return None


def save(name: str, **arrays: np.ndarray) -> None:
    """Keeps arrays under a name."""
    with kept(), replacing(made() / f"{name}.npz") as file:
        np.savez(file, **arrays)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is at `path` once it is whole, whoever else writes the same; or nowhere."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with writing.replacing(epath.Path(path), durable=False) as file:
        yield file


def adopt(file: epath.Path) -> None:
    """Keeps what another machine has worked out, in a file of the name that it has in the cache."""
    target = directory() / file.name
    with kept():
        if not target.exists():
            made()
            data = file.read_bytes()
            with replacing(target) as copy:
                copy.write(data)


def local_files(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """`local_file` of each, several at once. One process of a machine copies, the others wait for it."""
    if not any(map(is_remote, paths)):
        return [Path(path) for path in paths]
    with _alone(), ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
        copies = pool.map(functools.partial(local_file, show=False), paths)
        return list(track(copies, "copying files to this machine", len(paths)))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Within is one process of this machine at a time, if there is where to keep copies."""
    with contextlib.ExitStack() as stack:
        with kept():
            lock = stack.enter_context((made() / "copying.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def local_file(path: str | os.PathLike, show: bool = True) -> Path:
    """The file itself or, of a remote one, a copy that the next call finds, if the file is still the same."""
    if not is_remote(path):
        return Path(path)
    return derived("copy", path, lambda target: _copy(epath.Path(path), target, show))


def derived(kind: str, path: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """A local file that `write` makes of the one at `path`, which the next call finds if that is still the same."""
    copies = directory() / f"{kind}-{digest(os.fspath(path))}"
    copy = copies / digest(content_version(path))
    if not copy.exists():
        shutil.rmtree(copies, ignore_errors=True)  # of what the file was before
        with kept():
            made()
            write(copy)
            return copy
        copy = new_local() / copy.name  # there is nowhere to keep it
        write(copy)
    return copy


def _copy(source: epath.Path, target: Path, show: bool) -> None:
    blocks = -(-source.stat().length // COPY_BYTES)
    with source.open("rb") as remote, replacing(target) as file:
        read = iter(lambda: remote.read(COPY_BYTES), b"")
        told = f"copying {source} in blocks of {COPY_BYTES // 2**20} MiB"
        for block in track(read, told, blocks) if show else read:
            file.write(block)
