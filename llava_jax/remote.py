"""Object stores (`gs://`) for what knows only local files: copies of directories in, copies of logs out.

All else goes through `etils.epath`, which reads and writes such paths itself, or through Orbax.
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
    """Notes which stores the user named, on the command line or in a configuration: see `may_read`. From then on gcsfs
    lists a directory anew each time: from its cache it would not see what another host has just written."""
    stores = {_store(path) for path in paths if isinstance(path, str | os.PathLike) and is_remote(path)}
    if stores - _named:
        import fsspec

        fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    _named.update(stores)


def may_read(path: str | os.PathLike, origin: str | os.PathLike) -> bool:
    """Whether what a file at `origin` says may make us read `path`: on a disk it may, and where the store is that of
    the file, or one that the user named. A file of others contacts no other place."""
    return not is_remote(path) or _store(path) in _named | {_store(origin)}


def _store(path: str | os.PathLike) -> str:
    """Scheme and bucket."""
    scheme, _, rest = os.fspath(path).partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def local(directory: str | os.PathLike) -> Path:
    """The directory itself, or a copy of a remote one's files (not of its directories) that lasts as long as we do."""
    return _copy_of(os.fspath(directory)) if is_remote(directory) else Path(directory)


def new_local() -> Path:
    """A new directory that lasts as long as this process."""
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
    """Copies a local directory's files, with those of its directories, over what is there."""
    for file in sorted(source.rglob("*")):
        if file.is_file():
            (target / file.relative_to(source).as_posix()).write_bytes(file.read_bytes())
