"""Atomic writes: a crash, a full disk or a second writer leaves the old file or the new one, never a part of one."""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import fsspec
from etils import epath

from llava_jax.cli import UserError
from llava_jax.remote import is_remote


@contextlib.contextmanager
def atomic_file(out: epath.PathLike) -> Iterator[BinaryIO]:
    """Yields a file to write that replaces `out` at the end. If an exception ends the block, `out` stays as it was.

    A symbolic link stays, and its target is replaced. A device or a pipe is written directly.

    Raises:
      UserError: the system refuses to write.
    """
    target = epath.Path(out if is_remote(out) else os.path.realpath(out))
    irregular = not is_remote(target) and os.path.exists(target) and not os.path.isfile(target)
    try:
        with open(target, "wb") if irregular else replacing(target) as file:  # or an IsADirectoryError
            yield file
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(target: epath.Path, durable: bool = True) -> Iterator[BinaryIO]:
    """The same for code that handles OSError. `durable`: wait until the content is on the disk before the rename."""
    with _temporary(f"{target}.{uuid.uuid4().hex[:8]}.partial") as partial:
        with partial.open("wb") as file:
            yield file
            if durable and not is_remote(target):
                file.flush()
                os.fsync(file.fileno())
        partial.replace(target)


@contextlib.contextmanager
def atomic_path(target: epath.Path) -> Iterator[str]:
    """The same for code that writes a file by name or at random: yields the name of a local file to write.

    Nothing is replaced if that file does not exist at the end.
    """
    directory = tempfile.gettempdir() if is_remote(target) else os.fspath(target.parent)
    with _temporary(os.path.join(directory, f"{target.name}.{uuid.uuid4().hex}.partial")) as partial:
        yield os.fspath(partial)
        if not partial.exists():
            return
        if is_remote(target):
            files, name = fsspec.url_to_fs(os.fspath(target))
            files.put_file(os.fspath(partial), name)  # an object exists only once all of it is uploaded
        else:
            with partial.open("rb") as written:
                os.fsync(written)
            partial.replace(target)


@contextlib.contextmanager
def _temporary(name: str) -> Iterator[epath.Path]:
    """The path of a file that is removed at the end, if it still exists."""
    path = epath.Path(name)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def write_json(out: epath.PathLike, value: Any, ensure_ascii: bool = True) -> None:
    """Writes a value as indented JSON, atomically. Raises as `atomic_file` does."""
    with atomic_file(out) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=ensure_ascii).encode() + b"\n")


@contextlib.contextmanager
def atomic_list(out: epath.PathLike, lines: bool) -> Iterator[Callable[[bytes], None]]:
    """Writes a list of JSON values as `atomic_file` does: JSONL if `lines`, else an array.

    Yields a function that appends the JSON text of one value.
    """
    count = 0

    def add(value: bytes) -> None:
        nonlocal count
        file.write(value + b"\n" if lines else (b",\n" if count else b"[\n") + value)
        count += 1

    with atomic_file(out) as file:
        yield add
        if not lines:
            file.write(b"\n]\n" if count else b"[\n\n]\n")
