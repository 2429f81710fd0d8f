"""Object stores (`gs://`) for what knows only local files: copies of directories in, copies of logs out.

All else goes through `etils.epath`, which reads and writes such paths itself, or through Orbax.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from etils import epath


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


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
