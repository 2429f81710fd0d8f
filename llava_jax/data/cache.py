"""What took long to work out and can be worked out again: files in `$XDG_CACHE_HOME/llava_jax`, ~/.cache by default.

Any of them may be deleted at any time. One that is damaged, or whose directory cannot be written, is as good as none.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
from etils import epath

from llava_jax.cli import track
from llava_jax.remote import is_remote, new_local

COPY_BYTES = 16 * 2**20


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


def local_file(path: str | os.PathLike) -> Path:
    """The file itself or, of a remote one, a copy that the next call finds, if the file is still the same."""
    if not is_remote(path):
        return Path(path)
    copies = directory() / f"copy-{digest(os.fspath(path))}"
    copy = copies / digest(version(path))
    if copy.exists():
        return copy
    shutil.rmtree(copies, ignore_errors=True)  # of what the file was before
    try:
        return _copy(epath.Path(path), copy)
    except OSError:  # nowhere to keep it
        return _copy(epath.Path(path), new_local() / copy.name)


def _copy(source: epath.Path, target: Path) -> Path:
    blocks = -(-source.stat().length // COPY_BYTES)
    with source.open("rb") as remote, replacing(target) as file:
        read = iter(lambda: remote.read(COPY_BYTES), b"")
        for block in track(read, f"copying {source} in blocks of {COPY_BYTES // 2**20} MiB", blocks):
            file.write(block)
    return target
