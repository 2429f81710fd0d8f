"""What took long to work out and can be worked out again: files in `$XDG_CACHE_HOME/llava_jax`, ~/.cache by default.

Any of them may be deleted at any time. One that is damaged, or whose directory cannot be written, is as good as none.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
from etils import epath

from llava_jax.cli import track
from llava_jax.remote import is_remote, new_local

COPY_BYTES = 16 * 2**20
COPIES_AT_ONCE = 8


def directory() -> Path:
    """Where caches are kept; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_jax"


def digest(*parts: object) -> str:
    """A name for what the parts say, text and numbers or tuples of them."""
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()[:32]


def version(path: str | os.PathLike) -> str:
    """What changes whenever a file is written: size and time, or what its object store says. Raises OSError."""
    if not is_remote(path):
        stat = os.stat(path)
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    files, name = fsspec.url_to_fs(os.fspath(path))
    return files.ukey(name)


def load(name: str) -> dict[str, np.ndarray] | None:
    """The arrays that were saved under a name, or None."""
    try:
        with np.load(directory() / f"{name}.npz") as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):  # none, or a damaged one
        return None


def save(name: str, **arrays: np.ndarray) -> None:
    """Keeps arrays under a name."""
    with contextlib.suppress(OSError), replacing(directory() / f"{name}.npz") as file:
        np.savez(file, **arrays)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is at `path` once it is whole, whoever else writes the same; or nowhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".partial", delete=False) as file:
        try:
            yield file
            file.close()
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def adopt(file: epath.Path) -> None:
    """Keeps what another machine has worked out, in a file of the name that it has in the cache."""
    target = directory() / file.name
    with contextlib.suppress(OSError):
        if not target.exists():
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
    try:
        directory().mkdir(parents=True, exist_ok=True)
        lock = (directory() / "copying.lock").open("w")
    except OSError:
        yield
        return
    with lock:
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
    copy = copies / digest(version(path))
    if not copy.exists():
        shutil.rmtree(copies, ignore_errors=True)  # of what the file was before
        try:
            write(copy)
        except OSError:  # nowhere to keep it
            copy = new_local() / copy.name
            write(copy)
    return copy


def _copy(source: epath.Path, target: Path, show: bool) -> None:
    blocks = -(-source.stat().length // COPY_BYTES)
    with source.open("rb") as remote, replacing(target) as file:
        read = iter(lambda: remote.read(COPY_BYTES), b"")
        told = f"copying {source} in blocks of {COPY_BYTES // 2**20} MiB"
        for block in track(read, told, blocks) if show else read:
            file.write(block)
