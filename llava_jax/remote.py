"""Object stores (`gs://`) for libraries that need local files: downloads of directories, uploads of logs.

All other code uses `etils.epath`, which reads and writes such paths, or Orbax.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from etils import epath


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


_named: set[str] = set()


def name(*paths: Any) -> None:
    """Records the stores that the user named, on the command line or in a configuration, for `may_read`.

    From then on gcsfs lists a directory each time: its cache would not show what another host has just written.
    """
    stores = {_store(path) for path in paths if isinstance(path, str | os.PathLike) and is_remote(path)}
    if stores - _named:
        import fsspec

        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    _named.update(stores)


def may_read(path: str | os.PathLike, origin: str | os.PathLike) -> bool:
    """Whether the content of a file at `origin` may cause reads of `path`.

    It may if `path` is on a disk, in the store of the file, or in a store that the user named: an untrusted file causes
    requests to no other store.
    """
    return not is_remote(path) or _store(path) in _named | {_store(origin)}


def _store(path: str | os.PathLike) -> str:
    """Scheme and bucket."""
    scheme, _, rest = os.fspath(path).partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def local(directory: str | os.PathLike) -> Path:
    """The directory itself, or a copy of the files of a remote one (without subdirectories) until the process ends."""
    return _copy_of(os.fspath(directory)) if is_remote(directory) else Path(directory)


def new_local() -> Path:
    """A new directory that is removed when the process ends."""
    directory = Path(tempfile.mkdtemp(prefix="llava_jax_"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


@functools.cache
def _copy_of(directory: str) -> Path:
    target = new_local()
    for file in epath.Path(directory).iterdir():
        if not file.is_dir():
            (target / file.name).write_bytes(file.read_bytes())
    return target


def upload(source: Path, target: epath.Path) -> None:
    """Copies the files of a local directory and its subdirectories to `target`, replacing existing ones."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            (target / file.relative_to(source).as_posix()).write_bytes(file.read_bytes())
